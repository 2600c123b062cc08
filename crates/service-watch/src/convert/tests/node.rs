//! Nodes: the own one and its peers.

use serde_json::{Value, json};

use super::{convert, ips};
use crate::convert::Conversion;
use crate::model::{Change, Node};
use crate::wire;

fn node(object: &Value) -> (Node, Vec<String>) {
    let converted = convert::<wire::Node>(object);
    match converted.conversion {
        Conversion::Serve(Change::Node(node)) => (node, converted.problems),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_node_has_internal_before_external_addresses_and_a_zone() {
    let (read, problems) = node(&json!({
        "metadata": { "name": "node-a", "labels": { "topology.kubernetes.io/zone": "zone-1" } },
        "status": { "addresses": [
            { "type": "Hostname", "address": "node-a" }, { "type": "ExternalIP", "address": "198.51.100.1" },
            { "type": "InternalIP", "address": "192.168.10.11" }, { "type": "InternalDNS", "address": "a.internal" },
            { "type": "InternalIP", "address": "fd00::11" }, { "type": "InternalIP", "address": "nonsense" },
        ] },
    }));
    assert_eq!(ips(read.addresses), ["192.168.10.11", "fd00::11", "198.51.100.1"]);
    assert_eq!(read.zone.as_deref(), Some("zone-1"));
    assert_eq!(problems.len(), 1, "{problems:?}");
    for zoneless in
        [json!({ "name": "node-a" }), json!({ "name": "node-a", "labels": { "topology.kubernetes.io/zone": "" } })]
    {
        assert_eq!(node(&json!({ "metadata": zoneless })), (Node::default(), vec![]));
    }
}

#[test]
fn a_node_has_one_pod_range_per_family() {
    for (spec, read, problems) in [
        (Value::Null, vec![], 0),
        (json!({}), vec![], 0),
        (json!({ "podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"] }), vec!["10.244.1.0/24"], 0),
        (
            json!({ "podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:1::/64"] }),
            vec!["10.244.1.0/24", "fd00:1::/64"],
            0,
        ),
        (json!({ "podCIDR": "10.244.1.9/24" }), vec!["10.244.1.0/24"], 0),
        (json!({ "podCIDR": "10.244.1.0/24", "podCIDRs": [] }), vec!["10.244.1.0/24"], 0),
        (json!({ "podCIDR": "" }), vec![], 0),
        (json!({ "podCIDR": "10.244.1.0" }), vec![], 1),
        (json!({ "podCIDR": 5 }), vec![], 1),
        (
            json!({ "podCIDRs": ["10.244.1.0/24", "10.244.2.0/24", "fd00:1::/64"] }),
            vec!["10.244.1.0/24", "fd00:1::/64"],
            1,
        ),
        (json!({ "podCIDRs": ["x", 7, "10.244.2.0/24"] }), vec!["10.244.2.0/24"], 2),
        (json!({ "podCIDRs": "10.244.1.0/24" }), vec![], 1),
        (json!("10.244.1.0/24"), vec![], 1),
    ] {
        let (read_node, found_problems) = node(&json!({ "metadata": { "name": "node-a" }, "spec": spec }));
        assert_eq!(ips(read_node.pod_cidrs), read, "{spec}");
        assert_eq!(found_problems.len(), problems, "{spec}: {found_problems:?}");
    }
}

#[test]
fn a_node_with_deletion_timestamp_or_taint_is_being_removed() {
    for (object, is_being_removed) in [
        (json!({ "metadata": { "name": "node-a" } }), false),
        (json!({ "metadata": { "name": "node-a", "deletionTimestamp": "2026-01-01T00:00:00Z" } }), true),
        (json!({ "metadata": { "name": "node-a" }, "spec": { "taints": [{ "key": "other" }, 5, {}] } }), false),
        (
            json!({ "metadata": { "name": "node-a" }, "spec": { "taints": [{ "key": "ToBeDeletedByClusterAutoscaler" }] } }),
            true,
        ),
        (json!({ "metadata": { "name": "node-a" }, "spec": { "taints": "ToBeDeletedByClusterAutoscaler" } }), false),
    ] {
        assert_eq!(node(&object).0.is_being_removed, is_being_removed, "{object}");
    }
}

#[test]
fn of_a_peer_node_only_the_addresses_are_read() {
    let converted = convert::<wire::Node>(&json!({
        "metadata": { "name": "node-b", "labels": { "topology.kubernetes.io/zone": "z" } },
        "spec": { "podCIDR": "nonsense" },
        "status": { "addresses": [
            { "type": "ExternalIP", "address": "198.51.100.2" }, { "type": "InternalIP", "address": "192.168.10.12" },
            { "type": "InternalIP", "address": "nonsense" },
        ] },
    }));
    let Conversion::Serve(Change::PeerNode(name, addresses)) = converted.conversion else { panic!("{converted:?}") };
    assert_eq!((&*name, ips(addresses)), ("node-b", vec!["192.168.10.12".to_owned(), "198.51.100.2".to_owned()]));
    assert_eq!(converted.problems.len(), 1, "{:?}", converted.problems);
    assert!(converted.problems[0].starts_with("status.addresses[2].address"), "{:?}", converted.problems);
}
