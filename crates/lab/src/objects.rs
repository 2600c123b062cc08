//! Objects of the Kubernetes API for tests, as JSON. What a test needs besides, [`with`] adds.

use serde_json::{Value, json};

/// A Node with these internal addresses.
pub fn node(name: &str, addresses: &[&str]) -> Value {
    let addresses: Vec<Value> =
        addresses.iter().map(|address| json!({"type": "InternalIP", "address": address})).collect();
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": {"addresses": addresses},
    })
}

/// A port of a Service or of a slice. Those of the same name belong together.
pub fn port(name: &str, protocol: &str, number: u16) -> Value {
    json!({"name": name, "protocol": protocol, "port": number})
}

/// A Service of type `ClusterIP` in the namespace `default`.
pub fn service<A: ToString>(name: &str, cluster_ips: &[A], ports: &[Value]) -> Value {
    let cluster_ips: Vec<Value> = cluster_ips.iter().map(|address| address.to_string().into()).collect();
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {"type": "ClusterIP", "clusterIP": cluster_ips.first(), "clusterIPs": cluster_ips, "ports": ports},
    })
}

/// The `status` of a Service that a load balancer has given these addresses.
pub fn load_balancer<A: ToString>(addresses: &[A]) -> Value {
    let ingress: Vec<Value> = addresses.iter().map(|address| json!({"ip": address.to_string()})).collect();
    json!({"loadBalancer": {"ingress": ingress}})
}

/// The state of an endpoint: its pod has all of them in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not yet, or no longer, ready.
    NotReady,
    /// Ready to serve.
    Ready,
    /// About to end, and still serving.
    Terminating,
}

/// An endpoint of a slice.
pub fn endpoint(address: &(impl ToString + ?Sized), state: State) -> Value {
    let conditions = json!({
        "ready": state == State::Ready, "serving": state != State::NotReady, "terminating": state == State::Terminating,
    });
    json!({"addresses": [address.to_string()], "conditions": conditions})
}

/// Endpoints that are ready.
pub fn ready<A: ToString>(addresses: impl IntoIterator<Item = A>) -> Vec<Value> {
    addresses.into_iter().map(|address| endpoint(&address, State::Ready)).collect()
}

/// A slice of a Service in the namespace `default`, of the family of its first endpoint.
pub fn slice(name: &str, service: &str, ports: &[Value], endpoints: &[Value]) -> Value {
    let first = endpoints.first().and_then(|endpoint| endpoint["addresses"][0].as_str());
    let family = if first.is_some_and(|address| address.contains(':')) { "IPv6" } else { "IPv4" };
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
        "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": service}},
        "ports": ports, "endpoints": endpoints,
    })
}

/// An object with these fields added or replaced, at any depth; `null` removes one. Lists are replaced as a whole, as by a JSON
/// merge patch (RFC 7396).
pub fn with(mut object: Value, patch: Value) -> Value {
    merge(&mut object, patch);
    object
}

fn merge(target: &mut Value, patch: Value) {
    let Value::Object(fields) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in fields {
        match target.as_object_mut() {
            Some(target) if value.is_null() => {
                target.remove(&key);
            }
            Some(target) => merge(target.entry(key).or_insert(Value::Null), value),
            None => {}
        }
    }
}

/// Objects one after the other, as a manifest `*.json` has them. (YAML wants a line `---` between them.)
pub fn manifest<'a>(objects: impl IntoIterator<Item = &'a Value>) -> String {
    objects.into_iter().map(Value::to_string).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_has_its_first_cluster_ip_twice() {
        let service = service("web", &["10.96.0.10", "fd00:96::10"], &[port("http", "TCP", 80)]);
        assert_eq!(service["spec"]["clusterIP"], "10.96.0.10");
        assert_eq!(service["spec"]["clusterIPs"], json!(["10.96.0.10", "fd00:96::10"]));
    }

    #[test]
    fn a_slice_has_the_family_of_its_endpoints() {
        assert_eq!(slice("a", "a", &[], &[])["addressType"], "IPv4");
        assert_eq!(slice("a", "a", &[], &ready(["fd00::1"]))["addressType"], "IPv6");
    }

    #[test]
    fn a_patch_adds_replaces_and_removes_at_any_depth() {
        let patch = json!({"a": {"b": null, "d": [4]}, "e": {"f": {"g": 5}}});
        let object = with(json!({"a": {"b": 1, "c": 2, "d": [3, 4]}}), patch);
        assert_eq!(object, json!({"a": {"c": 2, "d": [4]}, "e": {"f": {"g": 5}}}));
    }
}
