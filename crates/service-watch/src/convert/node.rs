//! Nodes: from `wire` to the model.

use std::net::IpAddr;

use ipnet::IpNet;

use super::problems::{Child, Problems};
use super::{Conversion, Converted, Converter, IpFamily, label};
use crate::lenient::Lenient;
use crate::model::Node;
use crate::wire;

const ZONE: &str = "topology.kubernetes.io/zone";
/// The taint of a Node that the cluster autoscaler is about to remove.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

impl Converter {
    pub(super) fn read_node(&mut self, object: &wire::Node, problems: &Problems) -> Node {
        let zone = label(&object.metadata, ZONE).filter(|zone| !zone.is_empty());
        Node {
            addresses: node_addresses(object, problems),
            zone: zone.map(|zone| self.names.get(zone)),
            pod_cidrs: pod_cidrs(object, problems),
            is_being_removed: object.metadata.deletion_timestamp.is_some() || has_taint(object, TO_BE_DELETED),
        }
    }
}

/// The addresses of another Node: all that is used of it.
pub(super) fn peer_node(object: &wire::Node) -> Converted<Vec<IpAddr>> {
    let problems = Problems::default();
    let addresses = node_addresses(object, &problems);
    problems.into_converted(Conversion::Serve(addresses))
}

fn has_taint(object: &wire::Node, key: &str) -> bool {
    let Lenient::Present(spec) = &object.spec else { return false };
    let Lenient::Present(taints) = &spec.taints else { return false };
    taints
        .iter()
        .any(|taint| matches!(taint, Lenient::Present(wire::Taint { key: Lenient::Present(text) }) if **text == *key))
}

/// The internal addresses of a Node, followed by the external ones.
fn node_addresses(object: &wire::Node, problems: &Problems) -> Vec<IpAddr> {
    const UNUSED: &str = "this address is not used";
    let status = problems.value(&object.status, "status", "the Node is treated as having no addresses");
    let mut internal = Vec::new();
    let mut external = Vec::new();
    for (at, address) in status
        .into_iter()
        .flat_map(|status| problems.items(&status.addresses, "status.addresses", "the Node is treated as having none"))
    {
        let Some(address) = problems.value(address, at, UNUSED) else { continue };
        let list = match problems.value(&address.r#type, Child(at, "type"), UNUSED).map_or("", |text| text) {
            "InternalIP" => &mut internal,
            "ExternalIP" => &mut external,
            // Host names and unknown types.
            _ => continue,
        };
        let text = problems.value(&address.address, Child(at, "address"), UNUSED);
        list.extend(text.and_then(|text| problems.ip(text, Child(at, "address"), UNUSED)));
    }
    internal.append(&mut external);
    internal
}

/// The pod ranges of a Node, one of each family. (The API server sets both fields.)
fn pod_cidrs(object: &wire::Node, problems: &Problems) -> Vec<IpNet> {
    const UNUSED: &str = "this range is not used";
    const SINGLE: &str = "spec.podCIDR";
    let Some(spec) = problems.value(&object.spec, "spec", "the Node is treated as having no pod ranges") else {
        return Vec::new();
    };
    let mut ranges: Vec<IpNet> = Vec::new();
    let mut is_listed = false;
    for (at, text) in problems.items(&spec.pod_cidrs, "spec.podCIDRs", "the Node is treated as having none") {
        is_listed = true;
        let Some(text) = problems.value(text, at, UNUSED) else { continue };
        let Some(range) = problems.range(text, at, UNUSED) else { continue };
        let family = IpFamily::of(range.addr());
        if ranges.iter().any(|other| IpFamily::of(other.addr()) == family) {
            problems.add(format_args!(
                "{at} {range} is a second {} range: {UNUSED}; give one for each family",
                family.name()
            ));
        } else {
            ranges.push(range);
        }
    }
    if !is_listed {
        let single = problems.value(&spec.pod_cidr, SINGLE, UNUSED).filter(|text| !text.is_empty());
        ranges.extend(single.and_then(|text| problems.range(text, SINGLE, UNUSED)));
    }
    ranges
}
