//! Where the traffic differs from that through kube-proxy on purpose: rules that turn what was recorded for a cell into
//! what is right. A cell is compared exactly under a rule too.
//!
//! The reasons stand in `docs/deviations.md`, under the same names.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::compare::{CONNECTED, Expected, Names};
use super::objects::{NODE, Objects};
use super::recording::{Cell, Question};

/// What the rules look at besides the cell.
pub(crate) struct Circumstances<'a> {
    pub(crate) flags: &'a [String],
    pub(crate) objects: &'a Objects,
    pub(crate) names: &'a Names,
}

/// A rule: its name in the document, and what it wants of a cell that it is about.
type Rule = (&'static str, fn(&Cell, &Expected, &Circumstances<'_>) -> Option<Expected>);

const RULES: [Rule; 5] = [
    ("external-client-refused-without-local-endpoint", external_client_refused_without_local_endpoint),
    ("node-reaches-local-policy-without-local-endpoint", node_reaches_local_policy_without_local_endpoint),
    ("no-endpoints-is-refused-everywhere", no_endpoints_is_refused_everywhere),
    ("node-is-seen-with-its-own-address", node_is_seen_with_its_own_address),
    ("cluster-ip-refused-without-local-endpoint", cluster_ip_refused_without_local_endpoint),
];

/// The rule that is about a cell, and what it wants.
pub(crate) fn wanted(cell: &Cell, recorded: &Expected, at: &Circumstances<'_>) -> Option<(&'static str, Expected)> {
    RULES.iter().find_map(|(name, rule)| Some((*name, rule(cell, recorded, at)?)))
}

const DOCUMENT: &str = include_str!("../../../../docs/deviations.md");

/// Whether the document has a line for a rule.
pub(crate) fn is_documented(rule: &str) -> bool {
    DOCUMENT.lines().any(|line| line.starts_with(&format!("| `{rule}` |")))
}

/// Whether the document names a Service in the line of a rule.
pub(crate) fn is_named(rule: &str, service: &str) -> bool {
    let mut lines = DOCUMENT.lines().filter(|line| line.starts_with(&format!("| `{rule}` |")));
    lines.any(|line| line.contains(&format!("`{service}`")))
}

/// A Service with policy Local for this front end, and no endpoint on the node.
fn is_local_without_local(cell: &Cell, at: &Circumstances<'_>) -> bool {
    cell.front_end.as_deref() != Some("ClusterIP") && is_without_local(cell, "externalTrafficPolicy", at)
}

/// A Service with this policy Local, and no endpoint on the node.
fn is_without_local(cell: &Cell, policy: &str, at: &Circumstances<'_>) -> bool {
    let name = cell.service.as_deref().unwrap_or_default();
    let policy = at.objects.service(name).map(|service| &service["spec"][policy]);
    let endpoints = at.objects.endpoints(name, cell.is_ipv6());
    policy.is_some_and(|policy| policy == "Local")
        && !endpoints.is_empty()
        && endpoints.iter().all(|(_, node)| node != NODE)
}

/// Whether the agent can tell who is outside the cluster.
fn has_detector(flags: &[String], is_ipv6: bool) -> bool {
    let others = ["--detect-local-mode=", "--pod-bridge-interface=", "--pod-interface-name-prefix="];
    let is_other =
        |flag: &String| others.iter().any(|other| flag.starts_with(other)) && !flag.ends_with("=ClusterCIDR");
    let ranges = flags.iter().filter_map(|flag| flag.strip_prefix("--cluster-cidr=")).flat_map(|list| list.split(','));
    flags.iter().any(is_other) || ranges.filter(|range| !range.is_empty()).any(|range| range.contains(':') == is_ipv6)
}

/// A client outside the cluster is told at once that nobody here serves it, instead of waiting for an answer that
/// comes from somewhere else.
fn external_client_refused_without_local_endpoint(
    cell: &Cell,
    recorded: &Expected,
    at: &Circumstances<'_>,
) -> Option<Expected> {
    let is_outside = matches!(cell.client.as_deref(), Some("client" | "remote"));
    let applies = is_outside
        && recorded.is("timeout")
        && is_local_without_local(cell, at)
        && has_detector(at.flags, cell.is_ipv6());
    applies.then(refused)
}

/// The node itself is served by the endpoints elsewhere, which see it by its own address.
fn node_reaches_local_policy_without_local_endpoint(
    cell: &Cell,
    recorded: &Expected,
    at: &Circumstances<'_>,
) -> Option<Expected> {
    let is_vip = matches!(cell.front_end.as_deref(), Some("externalIP" | "loadBalancerIP"));
    let is_from_node = cell.client.as_deref() == Some("node");
    if !is_vip || !is_from_node || !recorded.is("timeout") || !is_local_without_local(cell, at) {
        return None;
    }
    let node: IpAddr = at.names.address("node", cell.is_ipv6())?;
    let endpoints = at.objects.endpoints(cell.service.as_deref()?, cell.is_ipv6());
    let seen: BTreeSet<_> = endpoints.iter().map(|(endpoint, _)| (at.names.name(*endpoint), node)).collect();
    let backends = Some(seen.iter().map(|(backend, _)| backend.clone()).collect());
    Some(Expected { outcomes: [CONNECTED.to_owned()].into(), backends, seen: Some(seen) })
}

/// The node itself is told the same as everybody else.
fn no_endpoints_is_refused_everywhere(cell: &Cell, recorded: &Expected, _: &Circumstances<'_>) -> Option<Expected> {
    let is_udp = cell.protocol.as_deref() == Some("UDP");
    (cell.client.as_deref() == Some("node") && is_udp && recorded.is("not permitted")).then(refused)
}

/// With VIPs by routes IPv6 gives the node's own connections one of its addresses, not the VIP.
fn node_is_seen_with_its_own_address(cell: &Cell, recorded: &Expected, at: &Circumstances<'_>) -> Option<Expected> {
    let is_by_routes = at.flags.iter().any(|flag| flag == "--vip-binding=route");
    let (Ok(Question::Tcp(vip) | Question::Udp(vip)), Some(seen)) = (cell.question(), &recorded.seen) else {
        return None;
    };
    let has_vip_source = !seen.is_empty() && seen.iter().all(|(_, source)| *source == vip.ip());
    let is_vip = matches!(cell.front_end.as_deref(), Some("externalIP" | "loadBalancerIP"));
    if !is_by_routes || !is_vip || !vip.is_ipv6() || !has_vip_source || cell.client.as_deref() != Some("node") {
        return None;
    }
    let node = at.names.address("node", true)?;
    let seen = seen.iter().map(|(backend, _)| (backend.clone(), node)).collect();
    Some(Expected { seen: Some(seen), ..recorded.clone() })
}

/// A ClusterIP with policy Local has no endpoint of another node, whatever else the Service has.
fn cluster_ip_refused_without_local_endpoint(
    cell: &Cell,
    recorded: &Expected,
    at: &Circumstances<'_>,
) -> Option<Expected> {
    let is_cluster_ip = cell.front_end.as_deref() == Some("ClusterIP");
    (is_cluster_ip && recorded.is(CONNECTED) && is_without_local(cell, "internalTrafficPolicy", at)).then(refused)
}

fn refused() -> Expected {
    Expected { outcomes: ["refused".to_owned()].into(), backends: Some([].into()), seen: Some([].into()) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_document_names_every_rule() {
        for (name, _) in RULES {
            assert!(is_documented(name), "docs/deviations.md has no line for {name}");
        }
        assert!(!is_documented("a-rule-that-is-not-there"));
    }

    #[test]
    fn rules_follow_from_the_objects() {
        let slice = |name: &str, node: &str| {
            json!({"kind": "EndpointSlice", "metadata": {"labels": {"kubernetes.io/service-name": name}},
                "endpoints": [{"addresses": ["10.244.2.6"], "nodeName": node}]})
        };
        let service = |name: &str| {
            let spec = json!({"externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local"});
            json!({"kind": "Service", "metadata": {"name": name}, "spec": spec})
        };
        let list = json!([service("far"), slice("far", "node-b"), service("near"), slice("near", NODE)]);
        let objects = Objects::new(list, &[]).unwrap();
        let topology = json!({"addresses": {"node": ["192.168.10.11"], "remote-pod": ["10.244.2.6"]}});
        let names = Names::new(&serde_json::from_value(topology).unwrap(), &objects);
        let six = json!({"addresses": {"node": ["fd00:192::11"]}});
        let six = Names::new(&serde_json::from_value(six).unwrap(), &objects);
        let under = |flag: &str, service: &str, front_end: &str, client: &str, result: &str| {
            let cell = json!({"service": service, "front_end": front_end, "client": client, "target": "1.2.3.4:80",
                "protocol": "UDP", "result": result});
            let cell: Cell = serde_json::from_value(cell).unwrap();
            let flags = [flag.to_owned()];
            let at = Circumstances { flags: &flags, objects: &objects, names: &names };
            let (rule, wanted) = wanted(&cell, &Expected::new(&cell, &names).unwrap(), &at)?;
            Some((rule, wanted.describe(&names)))
        };
        let outside = RULES[0].0;
        let cidr = "--cluster-cidr=10.244.0.0/16";
        let refused = "refused".to_owned();
        assert_eq!(under(cidr, "far", "NodePort", "client", "timeout"), Some((outside, refused.clone())));
        assert_eq!(under("--masquerade-all", "far", "NodePort", "client", "timeout"), None);
        assert_eq!(under(cidr, "near", "NodePort", "client", "timeout"), None);
        assert_eq!(under(cidr, "far", "ClusterIP", "client", "timeout"), None);
        assert_eq!(under(cidr, "far", "NodePort", "client", "refused"), None);
        let served = "connected: remote-pod sees node".to_owned();
        assert_eq!(under(cidr, "far", "externalIP", "node", "timeout"), Some((RULES[1].0, served)));
        assert_eq!(under(cidr, "far", "NodePort", "node", "timeout"), None);
        assert_eq!(under(cidr, "none", "ClusterIP", "node", "not permitted"), Some((RULES[2].0, refused.clone())));
        assert_eq!(under(cidr, "far", "ClusterIP", "client", "connected"), Some((RULES[4].0, refused)));
        assert_eq!(under(cidr, "far", "NodePort", "client", "connected"), None);
        assert_eq!(under(cidr, "near", "ClusterIP", "client", "connected"), None);
        let by_routes = |target: &str, source: &str, flag: &str| {
            let cell = json!({"service": "near", "front_end": "externalIP", "client": "node", "target": target, "protocol": "TCP",
                "result": "connected", "seen": [{"backend": "remote-pod", "source_address": source}]});
            let cell: Cell = serde_json::from_value(cell).unwrap();
            let flags = [flag.to_owned()];
            let at = Circumstances { flags: &flags, objects: &objects, names: &six };
            wanted(&cell, &Expected::new(&cell, &six).unwrap(), &at).map(|(rule, _)| rule)
        };
        assert_eq!(by_routes("[fd00::1]:80", "fd00::1", "--vip-binding=route"), Some(RULES[3].0));
        assert_eq!(by_routes("[fd00::1]:80", "fd00::1", "--vip-binding=address"), None);
        assert_eq!(by_routes("[fd00::2]:80", "fd00::1", "--vip-binding=route"), None);
        assert_eq!(by_routes("10.96.0.1:80", "10.96.0.1", "--vip-binding=route"), None);
    }

    #[test]
    fn a_detector_is_one_for_a_family() {
        let flags = |list: &[&str]| list.iter().map(|flag| (*flag).to_owned()).collect::<Vec<_>>();
        assert!(has_detector(&flags(&["--cluster-cidr=10.244.0.0/16"]), false));
        assert!(!has_detector(&flags(&["--cluster-cidr=10.244.0.0/16"]), true));
        assert!(has_detector(&flags(&["--detect-local-mode=InterfaceNamePrefix"]), true));
        assert!(!has_detector(&flags(&["--detect-local-mode=ClusterCIDR"]), true));
        assert!(!has_detector(&flags(&["--masquerade-all"]), false));
    }
}
