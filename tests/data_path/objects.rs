//! Services and EndpointSlices as JSON, and directories of them.

use lab::objects::{self, State, endpoint, port, with};
use serde_json::{Value, json};

use crate::common::Manifests;
use crate::network::node;

/// By TCP and UDP, at this number.
fn ports(number: u16) -> Vec<Value> {
    vec![port("tcp", "TCP", number), port("udp", "UDP", number)]
}

/// A Service with these fields in its `spec`, of port 80 for TCP and UDP unless they say otherwise. `loadBalancerIPs` are those of
/// its status.
pub(crate) fn service(name: &str, mut spec: Value) -> Value {
    let texts = |list: &Value| -> Vec<String> {
        list.as_array().into_iter().flatten().map(|text| text.as_str().unwrap().to_owned()).collect()
    };
    let service = objects::service(name, &texts(&spec["clusterIPs"]), &ports(80));
    let status = spec.as_object_mut().unwrap().remove("loadBalancerIPs").map(|it| objects::load_balancer(&texts(&it)));
    with(service, json!({"spec": spec, "status": status}))
}

/// A slice of endpoints of this node on port 8080.
pub(crate) fn slice<A: ToString>(service: &str, endpoints: impl IntoIterator<Item = (A, State)>) -> Value {
    let on_node = |(address, state): (A, State)| with(endpoint(&address, state), json!({"nodeName": "node-a"}));
    let slice = objects::slice("", service, &ports(8080), &endpoints.into_iter().map(on_node).collect::<Vec<_>>());
    let family = slice["addressType"].as_str().unwrap_or_default().to_lowercase();
    with(slice, json!({"metadata": {"name": format!("{service}-{family}")}}))
}

/// A slice of endpoints that are ready.
pub(crate) fn ready<A: ToString>(service: &str, addresses: impl IntoIterator<Item = A>) -> Value {
    slice(service, addresses.into_iter().map(|address| (address, State::Ready)))
}

/// Objects one after the other, as a file has them.
pub(crate) fn file(objects: &[Value]) -> String {
    objects::manifest(objects)
}

/// A directory with the node, and with a file of these objects.
pub(crate) fn manifests(objects: &[Value]) -> Manifests {
    let manifests = Manifests::new();
    manifests.write("node.yaml", &node()).write("objects.json", &file(objects));
    manifests
}
