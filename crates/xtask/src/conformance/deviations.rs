//! Where the agent differs from kube-proxy on purpose: rules that turn what kube-proxy left in the kernel into what is
//! right. A state is compared exactly under a rule too; a rule excuses nothing but what it says.
//!
//! The reasons stand in `docs/deviations.md`, under the same names.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context, Result};
use serde_json::Value;

use super::case::{Case, Expectation, Step, VirtualServer};
use super::state::State;

/// A rule: its name in the document, and what it makes of an expectation.
type Rule = (&'static str, fn(&mut Expectation, &Objects));

const RULES: [Rule; 7] = [
    ("drift-is-repaired", drift_is_repaired),
    ("hash-schedulers-fall-back", hash_schedulers_fall_back),
    ("internal-local-means-local", internal_local_means_local),
    ("none-but-ours-is-deleted", none_but_ours_is_deleted),
    ("node-addresses-are-no-vips", node_addresses_are_no_vips),
    ("node-ports-not-on-vips", node_ports_not_on_vips),
    ("slice-follows-its-label", slice_follows_its_label),
];

/// The rules under which a state is as expected: one alone if possible.
pub(crate) fn explain(expected: &Expectation, state: &State, objects: &Objects) -> Option<Vec<&'static str>> {
    let holds = |rules: &[Rule]| {
        let mut changed = expected.clone();
        for (_, apply) in rules {
            apply(&mut changed, objects);
        }
        state.diff(&changed).is_empty()
    };
    let single = RULES.iter().find(|rule| holds(&[**rule])).map(|rule| vec![rule.0]);
    single.or_else(|| holds(&RULES).then(|| RULES.iter().map(|rule| rule.0).collect()))
}

const DOCUMENT: &str = include_str!("../../../../docs/deviations.md");

/// Whether the document names a case in the line of a rule.
pub(crate) fn is_documented(rule: &str, case: &str) -> bool {
    DOCUMENT.lines().any(|line| line.contains(&format!("`{rule}`")) && line.contains(&format!("`{case}`")))
}

/// The objects of the API at a step, and what else there is.
#[derive(Default)]
pub(crate) struct Objects {
    by_file: BTreeMap<String, Value>,
    /// The name of the agent's Node.
    node: String,
    /// Virtual servers that others have made.
    pub(crate) strangers: Vec<VirtualServer>,
}

impl Objects {
    /// Takes in what a step deletes and applies.
    pub(crate) fn take_in(&mut self, case: &Case, step: &Step) -> Result<()> {
        self.node.clone_from(&case.node_name);
        for object in &step.delete {
            self.by_file.remove(&object.file_name());
        }
        for file in &step.apply {
            let path = case.dir.join(file);
            let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let object = serde_saphyr::from_str(&text).with_context(|| format!("cannot understand {file}"))?;
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            self.by_file.insert(name, object);
        }
        Ok(())
    }

    fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.by_file.values().filter(move |object| object["kind"] == kind)
    }

    /// The endpoints of the slices that name a Service.
    fn endpoints_of<'a>(&'a self, service: &'a Value) -> impl Iterator<Item = &'a Value> {
        self.of_kind("EndpointSlice")
            .filter(|slice| {
                slice["metadata"]["namespace"] == service["metadata"]["namespace"]
                    && slice["metadata"]["labels"]["kubernetes.io/service-name"] == service["metadata"]["name"]
            })
            .flat_map(|slice| list(&slice["endpoints"]))
    }

    fn ports(&self, field: &str) -> BTreeSet<(u64, &str)> {
        self.of_kind("Service")
            .flat_map(|service| list(&service["spec"]["ports"]))
            .filter_map(|port| Some((port[field].as_u64()?, port["protocol"].as_str().unwrap_or("TCP"))))
            .collect()
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn is_on_device(expected: &Expectation, address: IpAddr) -> bool {
    let on_device = expected.kube_ipvs0.iter().flatten().filter_map(|entry| entry.split('/').next());
    on_device.filter_map(|entry| entry.parse::<IpAddr>().ok()).any(|entry| entry == address)
}

/// A virtual server that others have made stays, where no Service wants its front end.
fn none_but_ours_is_deleted(expected: &mut Expectation, objects: &Objects) {
    for stranger in &objects.strangers {
        if !expected.virtual_servers.iter().any(|server| server.is_at_the_front_end_of(stranger)) {
            expected.virtual_servers.push(stranger.clone());
        }
    }
}

/// Everything the agent writes it also compares: forwarding methods, weights, thresholds and netmasks of what it manages.
fn drift_is_repaired(expected: &mut Expectation, objects: &Objects) {
    let node_ports = objects.ports("nodePort");
    let is_managed = |server: &VirtualServer| {
        let front_end = server.port.map(u64::from).zip(server.protocol.as_deref());
        server.address.is_some_and(|address| is_on_device(expected, address))
            || front_end.is_some_and(|front_end| node_ports.contains(&front_end))
    };
    let managed: Vec<bool> = expected.virtual_servers.iter().map(is_managed).collect();
    for (server, _) in expected.virtual_servers.iter_mut().zip(managed).filter(|(_, managed)| *managed) {
        let is_ipv4 = server.address.is_some_and(|address| address.is_ipv4());
        if is_ipv4 { "255.255.255.255" } else { "128" }.clone_into(&mut server.netmask);
        for real in &mut server.real_servers {
            "masquerade".clone_into(&mut real.forward);
            (real.weight, real.upper_threshold, real.lower_threshold) = (1, 0, 0);
        }
    }
}

/// `mh` and `sh` choose another real server for a client whose own one drains.
fn hash_schedulers_fall_back(expected: &mut Expectation, _: &Objects) {
    for server in &mut expected.virtual_servers {
        if matches!(&*server.scheduler, "mh" | "sh") {
            server.flags.insert("flag-1".to_owned());
        }
    }
}

/// A ClusterIP with policy Local has no endpoint of another node, also if the Service has external addresses.
fn internal_local_means_local(expected: &mut Expectation, objects: &Objects) {
    for service in objects.of_kind("Service").filter(|it| it["spec"]["internalTrafficPolicy"] == "Local") {
        let local: BTreeSet<IpAddr> = objects
            .endpoints_of(service)
            .filter(|endpoint| endpoint["nodeName"] == *objects.node)
            .filter_map(|endpoint| endpoint["addresses"][0].as_str()?.parse().ok())
            .collect();
        let cluster_ips: BTreeSet<IpAddr> =
            list(&service["spec"]["clusterIPs"]).iter().filter_map(|ip| ip.as_str()?.parse().ok()).collect();
        for server in &mut expected.virtual_servers {
            if server.address.is_some_and(|address| cluster_ips.contains(&address)) {
                server.real_servers.retain(|real| local.contains(&real.address));
            }
        }
    }
}

/// An address of a Node is not served as a VIP; NodePorts are what it has.
fn node_addresses_are_no_vips(expected: &mut Expectation, objects: &Objects) {
    let node_ports = objects.ports("nodePort");
    let nodes: BTreeSet<IpAddr> = objects
        .of_kind("Node")
        .flat_map(|node| list(&node["status"]["addresses"]))
        .filter_map(|address| address["address"].as_str()?.parse().ok())
        .collect();
    expected.virtual_servers.retain(|server| {
        let front_end = server.port.map(u64::from).zip(server.protocol.as_deref());
        !server.address.is_some_and(|address| nodes.contains(&address))
            || front_end.is_some_and(|front_end| node_ports.contains(&front_end))
    });
    if let Some(bound) = &mut expected.kube_ipvs0 {
        let address = |entry: &String| entry.split('/').next()?.parse::<IpAddr>().ok();
        bound.retain(|entry| !address(entry).is_some_and(|address| nodes.contains(&address)));
    }
}

/// NodePorts listen on the node's own addresses, and a VIP is none of them.
fn node_ports_not_on_vips(expected: &mut Expectation, objects: &Objects) {
    let (node_ports, ports) = (objects.ports("nodePort"), objects.ports("port"));
    let is_extra: Vec<bool> = expected
        .virtual_servers
        .iter()
        .map(|server| {
            let front_end = server.port.map(u64::from).zip(server.protocol.as_deref());
            server.address.is_some_and(|address| is_on_device(expected, address))
                && front_end.is_some_and(|front_end| node_ports.contains(&front_end) && !ports.contains(&front_end))
        })
        .collect();
    let mut is_extra = is_extra.into_iter();
    expected.virtual_servers.retain(|_| !is_extra.next().unwrap_or(false));
}

/// A slice serves the Service its label names, and no longer the one it named before.
fn slice_follows_its_label(expected: &mut Expectation, objects: &Objects) {
    for server in &mut expected.virtual_servers {
        let Some(address) = server.address else { continue };
        let has_address = |service: &&Value| {
            list(&service["spec"]["clusterIPs"]).iter().any(|ip| ip.as_str() == Some(&address.to_string()))
        };
        let Some(service) = objects.of_kind("Service").find(has_address) else { continue };
        let endpoints: BTreeSet<IpAddr> = objects
            .endpoints_of(service)
            .filter_map(|endpoint| endpoint["addresses"][0].as_str()?.parse().ok())
            .collect();
        server.real_servers.retain(|real| endpoints.contains(&real.address));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_counts_as_documented_only_in_the_line_of_its_rule() {
        assert!(is_documented("drift-is-repaired", "forward-wrong"));
        assert!(!is_documented("slice-follows-its-label", "forward-wrong"));
        assert!(!is_documented("drift-is-repaired", "forward"));
    }

    #[test]
    fn the_document_names_every_rule() {
        for (name, _) in RULES {
            assert!(DOCUMENT.contains(&format!("`{name}`")), "docs/deviations.md does not mention {name}");
        }
    }
}
