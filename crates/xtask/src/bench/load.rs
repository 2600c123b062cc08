//! Synthetic Services and EndpointSlices, as large as those that an API server sends.

use std::net::Ipv4Addr;

use lab::objects::{self, State, with};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// How many Services there are, and how many endpoints each has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Size {
    pub(crate) services: usize,
    pub(crate) endpoints: usize,
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} x {}", grouped(self.services), grouped(self.endpoints))
    }
}

impl Size {
    /// The own Node, and all Services with their slices. The first is `default/kubernetes`.
    pub(crate) fn objects(self) -> impl Iterator<Item = Value> {
        let pods = json!({"spec": {"podCIDR": "10.128.1.0/24", "podCIDRs": ["10.128.1.0/24"]}});
        let node = with(objects::node(NODE, &["192.168.1.1"]), pods);
        std::iter::once(node).chain((0..self.services).flat_map(move |number| {
            let slices = (0..self.endpoints).step_by(PER_SLICE).map(move |first| {
                let endpoints = first..self.endpoints.min(first + PER_SLICE);
                let addresses = endpoints.map(|it| endpoint(number * self.endpoints + it));
                slice(number, &format!("s{}", first / PER_SLICE), addresses)
            });
            std::iter::once(service(number)).chain(slices)
        }))
    }
}

/// The name of the own Node.
pub(crate) const NODE: &str = "node-0001";
/// What controllers put into one slice.
const PER_SLICE: usize = 100;
const PORT: u16 = 80;
const TARGET_PORT: u16 = 8080;
const CREATED: &str = "2026-01-02T03:04:05Z";

/// Namespace and name of a Service.
fn name(number: usize) -> (String, String) {
    match number {
        0 => ("default".to_owned(), "kubernetes".to_owned()),
        number => (format!("team-{:02}", number % 50), format!("service-{number}")),
    }
}

/// The ClusterIP of a Service: one after the other from 10.96.0.1.
pub(crate) fn vip(number: usize) -> Ipv4Addr {
    nth(Ipv4Addr::new(10, 96, 0, 1), number)
}

/// The address of an endpoint: one after the other from 10.128.0.1.
pub(crate) fn endpoint(number: usize) -> Ipv4Addr {
    nth(Ipv4Addr::new(10, 128, 0, 1), number)
}

fn nth(first: Ipv4Addr, number: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(first).wrapping_add(u32::try_from(number).unwrap_or(0)))
}

/// A Service with one TCP port.
pub(crate) fn service(number: usize) -> Value {
    let (namespace, name) = name(number);
    let port = with(objects::port("http", "TCP", PORT), json!({"targetPort": TARGET_PORT}));
    let more = json!({
        "metadata": {
            "namespace": namespace, "uid": uid("5e", number), "creationTimestamp": CREATED,
            "labels": {"app.kubernetes.io/name": name, "app.kubernetes.io/managed-by": "Helm"},
            "annotations": {"meta.helm.sh/release-name": name, "meta.helm.sh/release-namespace": namespace},
            "managedFields": [{
                "manager": "helm", "operation": "Update", "apiVersion": "v1", "time": CREATED, "fieldsType": "FieldsV1",
                "fieldsV1": {"f:metadata": {"f:labels": {".": {}, "f:app.kubernetes.io/name": {}}},
                    "f:spec": {"f:ports": {".": {}, "k:{\"port\":80,\"protocol\":\"TCP\"}": {".": {}, "f:name": {},
                        "f:port": {}, "f:protocol": {}, "f:targetPort": {}}}, "f:selector": {}, "f:type": {}}},
            }],
        },
        "spec": {
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack", "internalTrafficPolicy": "Cluster",
            "sessionAffinity": "None", "selector": {"app.kubernetes.io/name": name},
        },
        "status": {"loadBalancer": {}},
    });
    with(objects::service(&name, &[vip(number)], &[port]), more)
}

/// A slice of a Service with these endpoints.
pub(crate) fn slice(number: usize, suffix: &str, addresses: impl Iterator<Item = Ipv4Addr>) -> Value {
    let (namespace, name) = name(number);
    let endpoints: Vec<Value> = addresses
        .map(|address| {
            let pod = u32::from(address);
            let more = json!({
                "nodeName": format!("node-{:04}", pod % 100),
                "zone": format!("zone-{}", pod % 3),
                "targetRef": {"kind": "Pod", "namespace": namespace, "name": format!("{name}-{pod:x}"),
                    "uid": uid("b0", pod as usize)},
            });
            with(objects::endpoint(&address, State::Ready), more)
        })
        .collect();
    let more = json!({
        "metadata": {
            "namespace": namespace, "uid": uid("51", number),
            "generateName": format!("{name}-"), "generation": 1, "creationTimestamp": CREATED,
            "labels": {"app.kubernetes.io/name": name,
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": name, "uid": uid("5e", number),
                "controller": true, "blockOwnerDeletion": true}],
            "managedFields": [{
                "manager": "kube-controller-manager", "operation": "Update", "apiVersion": "discovery.k8s.io/v1",
                "time": CREATED, "fieldsType": "FieldsV1",
                "fieldsV1": {"f:addressType": {}, "f:endpoints": {}, "f:metadata": {"f:generateName": {},
                    "f:labels": {".": {}, "f:kubernetes.io/service-name": {}}, "f:ownerReferences": {}}, "f:ports": {}},
            }],
        },
    });
    let ports = [objects::port("http", "TCP", TARGET_PORT)];
    with(objects::slice(&format!("{name}-{suffix}"), &name, &ports, &endpoints), more)
}

/// Kind, namespace and name of a slice, to delete it.
pub(crate) fn slice_name(number: usize, suffix: &str) -> (String, String) {
    let (namespace, name) = name(number);
    (namespace, format!("{name}-{suffix}"))
}

/// Namespace and name of a Service, to delete it.
pub(crate) fn service_name(number: usize) -> (String, String) {
    name(number)
}

/// What `ipvsadm --restore` reads to make the same virtual and real servers.
pub(crate) fn ipvsadm_rules(size: Size) -> String {
    use std::fmt::Write;
    let mut rules = String::new();
    for number in 0..size.services {
        let front_end = format!("{}:{PORT}", vip(number));
        let _ = writeln!(rules, "-A -t {front_end} -s rr");
        for it in 0..size.endpoints {
            let address = endpoint(number * size.endpoints + it);
            let _ = writeln!(rules, "-a -t {front_end} -r {address}:{TARGET_PORT} -m -w 1");
        }
    }
    rules
}

/// What `ip -batch` reads to bind the same VIPs.
pub(crate) fn address_commands(size: Size) -> String {
    use std::fmt::Write;
    let mut commands = String::new();
    for number in 0..size.services {
        let _ = writeln!(commands, "address add {}/32 dev kube-ipvs0", vip(number));
    }
    commands
}

fn uid(kind: &str, number: usize) -> String {
    format!("{kind}5d2f10-7a1c-4c57-9b3e-{number:012x}")
}

/// A number with a comma every three digits.
pub(crate) fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_service_comes_with_slices_of_at_most_a_hundred_endpoints() {
        let objects: Vec<Value> = Size { services: 2, endpoints: 250 }.objects().collect();
        let kinds: Vec<&str> = objects.iter().map(|it| it["kind"].as_str().unwrap()).collect();
        let one = ["Service", "EndpointSlice", "EndpointSlice", "EndpointSlice"];
        assert_eq!(kinds, [&["Node"], &one[..], &one[..]].concat());
        let lengths: Vec<usize> = objects.iter().filter_map(|it| it["endpoints"].as_array()).map(Vec::len).collect();
        assert_eq!(lengths, [100, 100, 50, 100, 100, 50]);
        assert_eq!(objects[1]["metadata"]["name"], "kubernetes");
    }

    #[test]
    fn numbers_are_grouped_by_three_digits() {
        assert_eq!([7, 1000, 1_234_567].map(grouped), ["7", "1,000", "1,234,567"]);
    }
}
