//! Which endpoints a front end gets: a table of cases.
//!
//! An endpoint is written as its last octet and its conditions: `l` on this node, `u` not ready, `n` not serving,
//! `t` terminating, `z1`/`z2` hinted for a zone, `h` hinted for this node, `o` hinted for another. So `1` is ready and
//! elsewhere, and `2lut` is a local endpoint that serves while it terminates.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{NODE, endpoint, for_zone, ip, port, service, slice, tcp};
use reconciler::Policy;
use reconciler::contribution::Contribution;
use reconciler::front_end::FrontEnd;
use reconciler::node::NodeView;
use reconciler::table::ServiceEntry;
use service_watch::{Endpoint, Hints, Service, ServiceKind, TrafficPolicy};

const CLUSTER: TrafficPolicy = TrafficPolicy::Cluster;
const LOCAL: TrafficPolicy = TrafficPolicy::Local;

/// What is on the two front ends of a Service: its ClusterIP and its external IP.
struct Case {
    name: &'static str,
    zone: Option<&'static str>,
    internal: TrafficPolicy,
    /// `None`: the Service has no front end but its ClusterIP.
    external: Option<TrafficPolicy>,
    endpoints: &'static str,
    on_cluster_ip: &'static [u8],
    on_external_ip: &'static [u8],
}

const fn case(name: &'static str, endpoints: &'static str, on_cluster_ip: &'static [u8]) -> Case {
    Case { name, zone: Some("1"), internal: CLUSTER, external: None, endpoints, on_cluster_ip, on_external_ip: &[] }
}

const fn policies(
    name: &'static str,
    internal: TrafficPolicy,
    external: TrafficPolicy,
    endpoints: &'static str,
    on_cluster_ip: &'static [u8],
    on_external_ip: &'static [u8],
) -> Case {
    Case { name, zone: Some("1"), internal, external: Some(external), endpoints, on_cluster_ip, on_external_ip }
}

const CASES: &[Case] = &[
    case("no endpoints", "", &[]),
    case("ready ones, local or not", "1 2l", &[1, 2]),
    case("not ready ones are left out", "1 2u", &[1]),
    case("serving counts only while terminating", "1u 2un", &[]),
    case("none ready: those that serve while terminating", "1ut 2lut 3unt 4u", &[1, 2]),
    case("some ready: those that terminate are left out", "1 2ut", &[1]),
    case("neither ready, serving nor terminating", "1un", &[]),
    case("zone hints choose", "1z1 2z2 3z1", &[1, 3]),
    case("a hint for several zones matches any", "1z1z2 2z2", &[1]),
    case("one ready endpoint without a hint: no choice", "1z1 2z2 3", &[1, 2, 3]),
    case("no endpoint for our zone: no choice", "1z2 2z2", &[1, 2]),
    case("an endpoint of our zone that is not ready does not count", "1z1 2z2 3z1u", &[1]),
    case("only one that is not ready in our zone: no choice", "1z2 2z1u", &[1]),
    case("one that is not ready needs no hint", "1z1 2z2 3u", &[1]),
    Case { zone: None, ..case("a node without a zone: no choice", "1z1 2z2", &[1, 2]) },
    Case { zone: Some("3"), ..case("a node in another zone: no choice", "1z1 2z2", &[1, 2]) },
    case("hints do not count among those that terminate", "1z1ut 2z2ut", &[1, 2]),
    case("node hints choose before zone hints", "1z1h 2z1o", &[1]),
    case("one ready endpoint without a node hint: zones choose", "1z1h 2z1 3z2o", &[1, 2]),
    case("no endpoint hinted for us: zones choose", "1z1o 2z2o", &[1]),
    policies("external Local: local ones outside, all inside", CLUSTER, LOCAL, "1 2l", &[1, 2], &[2]),
    policies("external Local ignores hints", CLUSTER, LOCAL, "1z1 2lz2", &[1], &[2]),
    policies("external Local, none local: all of them", CLUSTER, LOCAL, "1 2", &[1, 2], &[1, 2]),
    policies("external Local, the local one terminates", CLUSTER, LOCAL, "1 2lut", &[1], &[2]),
    policies("external Local, the local one neither serves", CLUSTER, LOCAL, "1 2lunt", &[1], &[1]),
    policies("internal Local: local ones inside, all outside", LOCAL, CLUSTER, "1 2l", &[2], &[1, 2]),
    policies("internal Local, none local: none inside, all outside", LOCAL, CLUSTER, "1 2", &[], &[1, 2]),
    policies("both Local", LOCAL, LOCAL, "1 2l", &[2], &[2]),
    policies("both Local, none local", LOCAL, LOCAL, "1 2", &[], &[1, 2]),
    policies("both Local, none local, all terminate", LOCAL, LOCAL, "1ut 2ut", &[], &[1, 2]),
    Case { internal: LOCAL, ..case("internal only and Local, none local: none", "1 2", &[]) },
    Case { internal: LOCAL, ..case("internal only and Local", "1 2l 3l", &[2, 3]) },
    Case { internal: LOCAL, ..case("internal only and Local, the local one terminates", "1 2lut", &[2]) },
];

fn hints(endpoint: &mut Endpoint) -> &mut Hints {
    endpoint.hints.get_or_insert_default()
}

fn parse(text: &str) -> Endpoint {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (octet, conditions) = text.split_at(digits);
    let mut endpoint = endpoint(&format!("10.0.0.{octet}"));
    let mut conditions = conditions.chars();
    while let Some(condition) = conditions.next() {
        match condition {
            'l' => endpoint.node = Some(NODE.into()),
            'u' => endpoint.ready = false,
            'n' => endpoint.serving = false,
            't' => endpoint.terminating = true,
            'z' => hints(&mut endpoint).zones.push(conditions.next().unwrap().to_string().into()),
            'h' => hints(&mut endpoint).nodes.push(NODE.into()),
            'o' => hints(&mut endpoint).nodes.push("node-b".into()),
            other => panic!("{other}"),
        }
    }
    endpoint
}

fn entry(service: Service, endpoints: &str) -> ServiceEntry {
    let slice = slice("web-1", "web", endpoints.split_whitespace().map(parse).collect());
    ServiceEntry {
        service: Some(service.into()),
        slices: [(slice.name.clone(), slice)].into_iter().collect(),
        ..ServiceEntry::default()
    }
}

fn octets(contribution: &Contribution, front_end: &FrontEnd) -> Vec<u8> {
    let places = contribution.servers.get(front_end).map(|server| server.real_servers.to_vec()).unwrap_or_default();
    places.iter().map(|(address, _)| address.to_string().rsplit('.').next().unwrap().parse().unwrap()).collect()
}

#[test]
fn endpoints_are_selected_by_policy_hints_and_conditions() {
    for case in CASES {
        let mut web = service("web", &["10.96.0.10"]);
        web.internal_policy = case.internal;
        if let Some(policy) = case.external {
            web.kind = ServiceKind::LoadBalancer;
            web.external_ips = vec![ip("203.0.113.1")];
            web.external_policy = policy;
        }
        let node = NodeView { zone: case.zone.map(Into::into), ..NodeView::default() };
        let contribution = Contribution::new(&entry(web, case.endpoints), &node, &Policy::new(NODE));
        assert_eq!(octets(&contribution, &tcp("10.96.0.10", 80)), case.on_cluster_ip, "{}: ClusterIP", case.name);
        assert_eq!(octets(&contribution, &tcp("203.0.113.1", 80)), case.on_external_ip, "{}: external IP", case.name);
    }
}

#[test]
fn the_external_policy_is_ignored_without_external_access() {
    let mut web = service("web", &["10.96.0.10"]);
    web.external_policy = LOCAL;
    web.ports[0].node_port = Some(port(30080));
    let node = NodeView { node_port_addresses: [ip("192.168.1.1")].into(), ..NodeView::default() };
    let contribution = Contribution::new(&entry(web, "1 2l"), &node, &Policy::new(NODE));
    assert_eq!(octets(&contribution, &tcp("192.168.1.1", 30080)), [1, 2]);
}

#[test]
fn families_select_endpoints_independently() {
    let mut slice = slice("web-1", "web", vec![parse("1z1"), parse("2z2")]);
    for (address, zone) in [("fd00::1", "2"), ("fd00::2", "2")] {
        slice.endpoints.push(for_zone(zone, endpoint(address)));
    }
    let entry = ServiceEntry {
        service: Some(service("web", &["10.96.0.10", "fd96::10"]).into()),
        slices: [(slice.name.clone(), slice)].into_iter().collect(),
        ..ServiceEntry::default()
    };
    let node = NodeView { zone: Some("1".into()), ..NodeView::default() };
    let contribution = Contribution::new(&entry, &node, &Policy::new(NODE));
    assert_eq!(octets(&contribution, &tcp("10.96.0.10", 80)), [1]);
    assert_eq!(contribution.servers[&tcp("fd96::10", 80)].real_servers.len(), 2, "IPv6 has no endpoint for our zone");
}

#[test]
fn of_duplicate_endpoints_the_better_one_is_used_in_any_order() {
    // Two endpoints with one address, and whether that is used inside the cluster, and outside with policy Local.
    for (first, second, inside, outside) in [
        ("1", "1ut", true, true),
        ("1", "1u", true, true),
        ("1un", "1", true, true),
        ("1lut", "1u", false, false),
        ("1l", "1", true, true),
        // Another endpoint is on this node.
        ("1 2l", "1l", true, true),
        ("1 2l", "1lu", true, false),
        ("1lu 2l", "1", true, false),
    ] {
        for order in [["a", "b"], ["b", "a"]] {
            let slices = [(order[0], first), (order[1], second)]
                .map(|(name, endpoints)| slice(name, "web", endpoints.split_whitespace().map(parse).collect()));
            let web = Service {
                kind: ServiceKind::LoadBalancer,
                external_ips: vec![ip("203.0.113.1")],
                external_policy: LOCAL,
                ..service("web", &["10.96.0.10"])
            };
            let entry = ServiceEntry {
                service: Some(web.into()),
                slices: slices.map(|slice| (slice.name.clone(), slice)).into_iter().collect(),
                ..ServiceEntry::default()
            };
            let contribution = Contribution::new(&entry, &NodeView::default(), &Policy::new(NODE));
            let uses = |address| octets(&contribution, &tcp(address, 80)).contains(&1);
            assert_eq!(uses("10.96.0.10"), inside, "{first}, {second}, {order:?}");
            assert_eq!(uses("203.0.113.1"), outside, "{first}, {second}, {order:?}");
        }
    }
}

#[test]
fn a_port_is_served_by_slice_ports_of_its_name_and_protocol() {
    let mut other_name = slice("a", "web", vec![parse("1")]);
    other_name.ports[0].name = "admin".into();
    let mut other_protocol = slice("b", "web", vec![parse("2")]);
    other_protocol.ports[0].protocol = service_watch::Protocol::Udp;
    let same = slice("c", "web", vec![parse("3")]);
    let entry = ServiceEntry {
        service: Some(service("web", &["10.96.0.10"]).into()),
        slices: [other_name, other_protocol, same].map(|slice| (slice.name.clone(), slice)).into_iter().collect(),
        ..ServiceEntry::default()
    };
    let contribution = Contribution::new(&entry, &NodeView::default(), &Policy::new(NODE));
    assert_eq!(octets(&contribution, &tcp("10.96.0.10", 80)), [3]);
}

#[test]
fn external_ips_need_the_gate_and_families_need_the_node() {
    let mut web = service("web", &["10.96.0.10", "fd96::10"]);
    web.external_ips = vec![ip("203.0.113.1")];
    let entry = entry(web, "1");
    let count = |policy: &Policy| Contribution::new(&entry, &NodeView::default(), policy).vips.len();
    let open = Policy::new(NODE);
    assert_eq!(count(&open), 3);
    assert_eq!(count(&Policy { external_ips: false, ..open.clone() }), 2);
    let ipv4_only = reconciler::policy::Families { ipv4: true, ipv6: false };
    assert_eq!(count(&Policy { families: ipv4_only, ..open }), 2);
}
