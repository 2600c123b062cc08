//! Tests of the conversion, as tables of objects: one file for each kind; this one has what they share.

mod endpoint_slice;
mod node;
mod service;

use serde_json::{Value, json};

use super::{Converted, Converter, Object};
use crate::model::Change;
use crate::wire;

fn convert<K: Object>(object: &Value) -> Converted<Change> {
    // As from the API server: text, not a value.
    let object: K = serde_json::from_str(&object.to_string()).unwrap();
    let mut converter = Converter::new("node-a".into());
    let name = Converter::object_name(object.meta()).unwrap();
    object.convert(&name, &mut converter)
}

/// `base` with `patch` merged into it; `null` removes.
fn patched(mut base: Value, patch: &Value) -> Value {
    fn merge(base: &mut Value, patch: &Value) {
        match (base, patch) {
            (Value::Object(base), Value::Object(patch)) => {
                for (key, value) in patch {
                    if value.is_null() {
                        base.remove(key);
                    } else {
                        merge(base.entry(key.clone()).or_insert(Value::Null), value);
                    }
                }
            }
            (base, patch) => *base = patch.clone(),
        }
    }
    merge(&mut base, patch);
    base
}

fn ips<I: ToString>(ips: impl IntoIterator<Item = I>) -> Vec<String> {
    ips.into_iter().map(|ip| ip.to_string()).collect()
}

fn service_json() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": "web", "namespace": "default", "creationTimestamp": "2026-01-02T03:04:05Z",
            "annotations": { "x": "y" }, "managedFields": [{ "manager": "kubectl" }],
        },
        "spec": {
            "type": "ClusterIP", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ipFamilies": ["IPv4"],
            "ports": [{ "name": "http", "protocol": "TCP", "port": 80, "targetPort": "web" }],
            "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
        },
        "status": { "loadBalancer": {} },
    })
}

#[test]
fn an_invalid_object_does_not_affect_its_page() {
    let odd =
        patched(service_json(), &json!({ "metadata": { "name": "odd", "labels": "x" }, "spec": 7, "status": [1] }));
    let page = json!({
        "apiVersion": "v1", "kind": "ServiceList", "metadata": { "resourceVersion": "1" },
        "items": [service_json(), odd, service_json()],
    });
    let list: kube::core::ObjectList<wire::Service> = serde_json::from_str(&page.to_string()).unwrap();
    assert_eq!(list.items.len(), 3);
    let names: Vec<_> = list.items.iter().map(|item| item.metadata.name.as_deref().unwrap()).collect();
    assert_eq!(names, ["web", "odd", "web"]);
}

#[test]
fn unused_metadata_is_dropped() {
    let object: wire::Service = serde_json::from_str(&service_json().to_string()).unwrap();
    assert_eq!((object.metadata.annotations, object.metadata.managed_fields), (None, None));
}
