//! The objects of the API that were there, and what follows from them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context, Result};
use lab::objects::{self, with};
use serde_json::{Value, json};

/// The node that the agent runs on.
pub(crate) const NODE: &str = "node-a";

/// Every object, as manifests have them.
#[derive(Clone, Debug)]
pub(crate) struct Objects(Vec<Value>);

/// The objects that stand in one manifest: a Service and its slices.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) service: Value,
    pub(crate) slices: Vec<Value>,
}

impl Objects {
    /// Takes a list of objects, and adds the Node with these addresses unless it is among them.
    pub(crate) fn new(list: Value, node: &[IpAddr]) -> Result<Self> {
        let mut objects: Vec<Value> = match list {
            Value::Object(mut list) => list.get_mut("items").map(Value::take).unwrap_or_default(),
            list => list,
        }
        .as_array()
        .cloned()
        .context("the objects are no list")?;
        if !objects.iter().any(|object| object["kind"] == "Node" && object["metadata"]["name"] == NODE) {
            let addresses: Vec<String> = node.iter().map(ToString::to_string).collect();
            let node = objects::node(NODE, &addresses.iter().map(String::as_str).collect::<Vec<_>>());
            objects.push(with(node, json!({"metadata": {"labels": {"kubernetes.io/hostname": NODE}}, "spec": {}})));
        }
        Ok(Self(objects))
    }

    /// What is neither a Service nor a slice of one.
    pub(crate) fn others(&self) -> impl Iterator<Item = &Value> {
        self.0.iter().filter(|object| object["kind"] != "Service" && service_of(object).is_none())
    }

    /// Every Service with its slices, by name.
    pub(crate) fn groups(&self) -> BTreeMap<String, Group> {
        let services = self.0.iter().filter(|object| object["kind"] == "Service");
        let group = |service: &Value| {
            let name = service["metadata"]["name"].as_str()?;
            let slices = self.0.iter().filter(|object| service_of(object) == Some(name)).cloned().collect();
            Some((name.to_owned(), Group { service: service.clone(), slices }))
        };
        services.filter_map(group).collect()
    }

    pub(crate) fn service(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|object| object["kind"] == "Service" && object["metadata"]["name"] == name)
    }

    /// The Service that has this address.
    pub(crate) fn service_at(&self, address: IpAddr) -> Option<&Value> {
        let mut services = self.0.iter().filter(|object| object["kind"] == "Service");
        services.find(|service| vips(service).any(|(vip, _)| vip == address))
    }

    /// The ready endpoints of a Service in one family, with the nodes they are on.
    pub(crate) fn endpoints(&self, service: &str, is_ipv6: bool) -> BTreeSet<(IpAddr, String)> {
        let slices = self.0.iter().filter(|object| service_of(object) == Some(service));
        let endpoints = slices.flat_map(|slice| list(&slice["endpoints"]));
        endpoints
            .filter(|endpoint| endpoint["conditions"]["ready"] != false)
            .filter_map(|endpoint| {
                let address: IpAddr = endpoint["addresses"][0].as_str()?.parse().ok()?;
                Some((address, endpoint["nodeName"].as_str().unwrap_or_default().to_owned()))
            })
            .filter(|(address, _)| address.is_ipv6() == is_ipv6)
            .collect()
    }

    /// The VIPs of all Services, with the words that the recordings have for them.
    pub(crate) fn vips(&self) -> impl Iterator<Item = (IpAddr, &'static str)> {
        self.0.iter().filter(|object| object["kind"] == "Service").flat_map(vips)
    }
}

/// The VIPs of a Service.
fn vips(service: &Value) -> impl Iterator<Item = (IpAddr, &'static str)> {
    let named = |list: &'static str| move |ip: &Value| Some((ip.as_str()?.parse().ok()?, list));
    let cluster = list(&service["spec"]["clusterIPs"]).iter().filter_map(named("the ClusterIP"));
    let external = list(&service["spec"]["externalIPs"]).iter().filter_map(named("the external IP"));
    let ingress = list(&service["status"]["loadBalancer"]["ingress"]).iter();
    let balancer = ingress.map(|ingress| &ingress["ip"]).filter_map(named("the load-balancer IP"));
    cluster.chain(external).chain(balancer)
}

/// The Service that a slice belongs to.
fn service_of(object: &Value) -> Option<&str> {
    let is_slice = object["kind"] == "EndpointSlice";
    object["metadata"]["labels"]["kubernetes.io/service-name"].as_str().filter(|_| is_slice)
}

pub(crate) fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_those_of_the_service_and_the_family() {
        let slice = |name: &str, address: &str, ready: bool| {
            json!({"kind": "EndpointSlice", "metadata": {"labels": {"kubernetes.io/service-name": name}},
                "endpoints": [{"addresses": [address], "conditions": {"ready": ready}, "nodeName": "node-b"}]})
        };
        let empty = json!({"kind": "EndpointSlice", "metadata": {}, "endpoints": null});
        let service = json!({"kind": "Service", "metadata": {"name": "a"}, "spec": {"externalIPs": ["1.2.3.4"]}});
        let list = json!([
            service,
            empty,
            slice("a", "10.0.0.1", true),
            slice("a", "10.0.0.2", false),
            slice("a", "fd00::1", true),
            slice("b", "10.0.0.3", true),
        ]);
        let objects = Objects::new(list, &["192.168.10.11".parse().unwrap()]).unwrap();
        let expected = BTreeSet::from([("10.0.0.1".parse().unwrap(), "node-b".to_owned())]);
        assert_eq!(objects.endpoints("a", false), expected);
        assert_eq!(objects.endpoints("a", true).len(), 1);
        assert_eq!(objects.groups()["a"].slices.len(), 3);
        assert_eq!(objects.service_at("1.2.3.4".parse().unwrap()), objects.service("a"));
        assert!(objects.others().any(|object| object["status"]["addresses"][0]["address"] == "192.168.10.11"));
    }
}
