//! Services and EndpointSlices as JSON, and directories of them.

use serde_json::{Value, json};

use crate::common::Manifests;
use crate::network::NODE;

/// A Service with these fields in its `spec`, of port 80 for TCP and UDP unless they say otherwise.
pub(crate) fn service(name: &str, spec: Value) -> Value {
    let mut service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "type": "ClusterIP",
            "ports": [{"name": "tcp", "protocol": "TCP", "port": 80}, {"name": "udp", "protocol": "UDP", "port": 80}],
        },
    });
    let Value::Object(spec) = spec else { panic!("a spec is an object") };
    for (key, value) in spec {
        if key == "loadBalancerIPs" {
            let ingress: Vec<Value> = value.as_array().unwrap().iter().map(|ip| json!({"ip": ip})).collect();
            service["status"] = json!({"loadBalancer": {"ingress": ingress}});
        } else {
            service["spec"][&key] = value;
        }
    }
    service["spec"]["clusterIP"] = service["spec"]["clusterIPs"][0].clone();
    service
}

/// An endpoint's state, as a pod goes through them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Ready,
    Terminating,
}

/// A slice of endpoints of this node on port 8080.
pub(crate) fn slice<A: ToString>(service: &str, endpoints: impl IntoIterator<Item = (A, State)>) -> Value {
    let endpoints: Vec<Value> = endpoints
        .into_iter()
        .map(|(address, state)| {
            let ready = state == State::Ready;
            json!({
                "addresses": [address.to_string()],
                "conditions": {"ready": ready, "serving": true, "terminating": !ready},
                "nodeName": "node-a",
            })
        })
        .collect();
    let is_v6 = endpoints.first().is_some_and(|endpoint| endpoint["addresses"][0].as_str().unwrap().contains(':'));
    let family = if is_v6 { "IPv6" } else { "IPv4" };
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-{}", family.to_lowercase()),
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": family,
        "ports": [{"name": "tcp", "protocol": "TCP", "port": 8080}, {"name": "udp", "protocol": "UDP", "port": 8080}],
        "endpoints": endpoints,
    })
}

/// A slice of endpoints that are ready.
pub(crate) fn ready<A: ToString>(service: &str, addresses: impl IntoIterator<Item = A>) -> Value {
    slice(service, addresses.into_iter().map(|address| (address, State::Ready)))
}

/// Objects one after the other, as a file has them.
pub(crate) fn file(objects: &[Value]) -> String {
    objects.iter().map(Value::to_string).collect::<Vec<_>>().join("\n")
}

/// A directory with the node, and with a file of these objects.
pub(crate) fn manifests(objects: &[Value]) -> Manifests {
    let manifests = Manifests::new();
    manifests.write("node.yaml", NODE).write("objects.json", &file(objects));
    manifests
}
