//! What the packet filter is told about a Service, and what happens where it does not take it.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{NODE, World, endpoint, ip, ips, name, port, ready, service, slice, tcp};
use ipvs_netlink::Family;
use reconciler::Policy;
use reconciler::contribution::AddressOwner;
use reconciler::fake::{FakeKernel, Fault};
use reconciler::filter::{
    Access, FrontEndElements, FrontEndRule, Masquerade, ObservedFilter, SetElement, SourceRangesElement,
};
use reconciler::front_end::FrontEnd;
use reconciler::kernel::Cause;
use reconciler::plan::Operation;
use service_watch::{Change, Endpoint, Node, Protocol, Service, ServiceKind, ServicePort, TrafficPolicy};

const CLUSTER_IP: &str = "10.96.0.10";
const EXTERNAL: &str = "198.51.100.10";
const BALANCED: &str = "203.0.113.10";
const OWN: &str = "192.168.1.1";
/// The bit of the set `closed-to-node`.
const CLOSED_TO_NODE: u32 = 1 << 8;

/// A load balancer of every kind of front end.
fn balancer() -> Service {
    Service {
        kind: ServiceKind::LoadBalancer,
        external_ips: vec![ip(EXTERNAL)],
        load_balancer_ips: vec![ip(BALANCED)],
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: port(80),
            node_port: Some(port(30080)),
        }],
        ..service("web", &[CLUSTER_IP])
    }
}

fn local(address: &str) -> Endpoint {
    Endpoint { node: Some(NODE.into()), ..endpoint(address) }
}

fn node() -> Node {
    Node { addresses: vec![ip(OWN)], ..Node::default() }
}

fn world(service: Service, endpoints: Vec<Endpoint>) -> World {
    let changes = vec![Change::Node(node()), Change::Service(service), Change::Slice(slice("web-1", "web", endpoints))];
    World::with(FakeKernel::default(), Policy::new(NODE), changes)
}

fn rule(masquerade: Masquerade, access: Access) -> FrontEndElements {
    FrontEndElements::from(&FrontEndRule { masquerade, access, is_closed_to_node: false, source_ranges: None })
}

fn front_ends(world: &mut World) -> BTreeMap<String, FrontEndElements> {
    let front_ends = &world.kernel().filter.front_ends;
    front_ends.iter().map(|(front_end, elements)| (front_end.to_string(), elements.clone())).collect()
}

#[test]
fn each_front_end_has_the_rule_of_its_type_and_policy() {
    let (remote, here) = (|| vec![endpoint("10.0.0.2")], || vec![local("10.0.0.1"), endpoint("10.0.0.2")]);
    let outsiders = rule(Masquerade::Outsiders, Access::Open);
    let refuse = rule(Masquerade::Nobody, Access::Refused);
    for (what, external, endpoints, from_inside, from_outside) in [
        ("Cluster", TrafficPolicy::Cluster, here(), &outsiders, rule(Masquerade::Everybody, Access::Open)),
        ("Local", TrafficPolicy::Local, here(), &outsiders, rule(Masquerade::Nobody, Access::Open)),
        ("Local, none here", TrafficPolicy::Local, remote(), &outsiders, rule(Masquerade::Node, Access::Insiders)),
        ("Cluster, none at all", TrafficPolicy::Cluster, vec![], &refuse, refuse.clone()),
        ("Local, none at all", TrafficPolicy::Local, vec![], &refuse, refuse.clone()),
    ] {
        let mut world = world(Service { external_policy: external, ..balancer() }, endpoints);
        let found = front_ends(&mut world);
        assert_eq!(found.len(), 4, "{what}");
        for (front_end, elements) in found {
            let wanted = if front_end.contains(CLUSTER_IP) { from_inside } else { &from_outside };
            assert_eq!(elements, *wanted, "{what}: {front_end}");
        }
    }
}

#[test]
fn udp_of_the_node_is_refused_without_endpoints() {
    let mut udp = service("dns", &[CLUSTER_IP]);
    udp.ports[0].protocol = Protocol::Udp;
    let mut world = world(udp, vec![]);
    let front_end = FrontEnd { protocol: Protocol::Udp, ..tcp(CLUSTER_IP, 80) };
    assert_eq!(world.kernel().filter.front_ends[&front_end], rule(Masquerade::NodeIsRefused, Access::Refused));
}

#[test]
fn source_ranges_restrict_only_load_balancer_ips() {
    for (ranges, is_closed_to_node) in [(["10.1.0.0/16", "192.168.0.0/16"], false), (["10.1.0.0/16", "fd00::/8"], true)]
    {
        let ranges = ranges.iter().map(|text| text.parse().unwrap()).collect();
        let mut world = world(Service { source_ranges: Some(ranges), ..balancer() }, vec![endpoint("10.0.0.2")]);
        for (front_end, elements) in front_ends(&mut world) {
            let is_restricted = front_end.contains(BALANCED);
            let service = is_restricted.then(|| name("web"));
            let expected = service.map_or(SourceRangesElement::Absent, SourceRangesElement::Service);
            assert_eq!(elements.source_ranges, expected, "{front_end}");
            assert_eq!(elements.sets & CLOSED_TO_NODE != 0, is_restricted && is_closed_to_node, "{front_end}");
        }
        assert_eq!(world.kernel().filter.source_ranges.keys().collect::<Vec<_>>(), [&(name("web"), Family::Ipv4)]);
    }
}

#[test]
fn an_address_that_is_external_ip_and_load_balancer_ip_is_restricted() {
    let both = Service {
        external_ips: vec![ip(BALANCED)],
        source_ranges: Some(vec!["10.1.0.0/16".parse().unwrap()]),
        ..balancer()
    };
    let mut world = world(both, vec![endpoint("10.0.0.2")]);
    assert_eq!(
        world.kernel().filter.front_ends[&tcp(BALANCED, 80)].source_ranges,
        SourceRangesElement::Service(name("web"))
    );
}

#[test]
fn ranges_of_only_the_other_family_admit_nobody() {
    for (range, is_restricted) in [("fd00::/8", true), ("0.0.0.0/0", false)] {
        let ranges = Some(vec![range.parse().unwrap()]);
        let mut world = world(Service { source_ranges: ranges, ..balancer() }, vec![endpoint("10.0.0.2")]);
        let element = &world.kernel().filter.front_ends[&tcp(BALANCED, 80)].source_ranges;
        assert_eq!(*element != SourceRangesElement::Absent, is_restricted, "{range}");
    }
}

#[test]
fn hairpin_has_all_local_endpoints() {
    let unready = Endpoint { ready: false, serving: false, ..local("10.0.0.3") };
    let mut world = world(balancer(), vec![local("10.0.0.1"), endpoint("10.0.0.2"), unready]);
    let elements: Vec<SetElement> = world.kernel().filter.elements.iter().copied().collect();
    let hairpins = ["10.0.0.1:8080", "10.0.0.3:8080"].map(|it| SetElement::Hairpin(it.parse().unwrap(), Protocol::Tcp));
    assert_eq!(
        elements.iter().filter(|element| matches!(element, SetElement::Hairpin(..))).collect::<Vec<_>>(),
        [&hairpins[0], &hairpins[1]]
    );
}

#[test]
fn health_check_ports_follow_policy_local() {
    let checked =
        |external_policy| Service { external_policy, health_check_node_port: Some(port(31000)), ..balancer() };
    let mut world = world(checked(TrafficPolicy::Local), vec![local("10.0.0.1")]);
    let element = SetElement::HealthCheckPort(Family::Ipv4, 31000);
    assert!(world.kernel().filter.elements.contains(&element));
    world.apply(Change::Service(checked(TrafficPolicy::Cluster))).settle();
    assert!(!world.kernel().filter.elements.contains(&element));
}

#[test]
fn node_addresses_are_refused_as_vips_and_reported_once() {
    let mut world = world(service("web", &[CLUSTER_IP]), vec![endpoint("10.0.0.2")]);
    world.apply(Change::PeerNode("node-b".into(), vec![ip(EXTERNAL)]));
    world.apply(Change::Service(Service { external_ips: vec![ip(OWN), ip(EXTERNAL)], ..balancer() }));
    let report = world.sync();
    let mut refused = report.refused_vips;
    refused.sort();
    assert_eq!(refused, [(name("web"), ip(OWN), AddressOwner::Node), (name("web"), ip(EXTERNAL), AddressOwner::Node)]);
    assert!(!world.kernel().servers.contains_key(&tcp(OWN, 80)));
    assert!(!world.kernel().servers.contains_key(&tcp(EXTERNAL, 80)));
    assert!(world.kernel().servers.contains_key(&tcp(OWN, 30080)), "NodePorts are what a node's address has");
    assert!(!world.kernel().addresses.as_ref().unwrap().contains_key(&ip(EXTERNAL)));
    assert!(!world.kernel().filter.elements.contains(&SetElement::Vip(ip(OWN))), "a node is never shielded");
    assert_eq!(world.audit().refused_vips, []);
    // Another node goes away: now it is an address like any other.
    world.apply(Change::PeerNodeDeleted("node-b".into())).settle();
    assert!(world.kernel().servers.contains_key(&tcp(EXTERNAL, 80)));
}

#[test]
fn what_cannot_be_guarded_is_not_served() {
    let mut world = World::new();
    world.kernel().fault = Some(Box::new(|operation| match operation {
        Operation::SetFrontEnd { front_end, .. } if front_end.address == ip(BALANCED) => Some(Cause::Refused),
        Operation::AddElement(SetElement::Vip(vip)) if *vip == ip(EXTERNAL) => Some(Cause::Refused),
        _ => None,
    }));
    world.apply(Change::Service(balancer()));
    world.apply(Change::Slice(ready("web-1", "web", &["10.0.0.2"])));
    let report = world.sync();
    assert_eq!(report.failures.len(), 2);
    assert!(!world.kernel().servers.contains_key(&tcp(BALANCED, 80)), "no guard, no virtual server");
    assert!(!world.kernel().addresses.as_ref().unwrap().contains_key(&ip(EXTERNAL)), "no shield, no address");
    assert!(world.kernel().servers.contains_key(&tcp(CLUSTER_IP, 80)), "the rest is served");
    world.kernel().fault = None;
    world.wait(Duration::from_secs(2)).settle();
    assert!(world.kernel().servers.contains_key(&tcp(BALANCED, 80)));
    assert!(world.kernel().addresses.as_ref().unwrap().contains_key(&ip(EXTERNAL)));
}

#[test]
fn a_guard_stays_while_its_front_end_is_reachable() {
    let restricted = Service { source_ranges: Some(vec!["10.1.0.0/16".parse().unwrap()]), ..balancer() };
    let mut world = world(restricted, vec![endpoint("10.0.0.2")]);
    world.kernel().fault = Some(Box::new(|operation| match operation {
        Operation::UnbindAddress(vip) if *vip == ip(BALANCED) => Some(Cause::Refused),
        Operation::DeleteVirtualServer(front_end) if front_end.address == ip(BALANCED) => Some(Cause::Refused),
        _ => None,
    }));
    world.apply(Change::ServiceDeleted(name("web"))).sync();
    let filter = &world.kernel().filter;
    assert_eq!(filter.front_ends.keys().collect::<Vec<_>>(), [&tcp(BALANCED, 80)]);
    assert!(filter.elements.contains(&SetElement::Vip(ip(BALANCED))));
    assert!(filter.source_ranges.contains_key(&(name("web"), Family::Ipv4)));
    world.kernel().fault = None;
    world.wait(Duration::from_secs(2)).settle();
    world.audit();
    let filter = &world.kernel().filter;
    assert!(filter.front_ends.is_empty() && filter.elements.is_empty() && filter.source_ranges.is_empty());
}

#[test]
fn a_front_end_admits_external_clients_after_remote_endpoints_go() {
    let policy_local = Service { external_policy: TrafficPolicy::Local, ..balancer() };
    let mut world = world(policy_local, vec![endpoint("10.0.0.2")]);
    world.kernel().log.clear();
    world.apply(Change::Slice(slice("web-1", "web", vec![local("10.0.0.1"), endpoint("10.0.0.2")]))).sync();
    let of = |operation: &Operation| match operation {
        Operation::SetFrontEnd { front_end, .. } if front_end.address == ip(EXTERNAL) => Some("open"),
        Operation::AddRealServer(front_end, _) if front_end.address == ip(EXTERNAL) => Some("local in"),
        Operation::DrainRealServer(front_end, _) if front_end.address == ip(EXTERNAL) => Some("remote out"),
        _ => None,
    };
    assert_eq!(world.kernel().log.iter().filter_map(of).collect::<Vec<_>>(), ["local in", "remote out", "open"]);
    // The other way round it is closed first.
    world.kernel().log.clear();
    world.apply(Change::Slice(slice("web-1", "web", vec![endpoint("10.0.0.2")]))).sync();
    assert_eq!(world.kernel().log.iter().find_map(of), Some("open"));
}

#[test]
fn a_front_end_masquerades_until_remote_endpoints_are_gone() {
    let endpoints = vec![local("10.0.0.1"), endpoint("10.0.0.2")];
    let mut world = world(balancer(), endpoints);
    let of = |operation: &Operation| match operation {
        Operation::SetFrontEnd { front_end, after, .. } if front_end.address == ip(EXTERNAL) => {
            Some(if after.sets & Masquerade::Everybody.set() != 0 { "more" } else { "less" })
        }
        Operation::AddRealServer(front_end, _) | Operation::SetRealServer(front_end, _)
            if front_end.address == ip(EXTERNAL) =>
        {
            Some("remote in")
        }
        Operation::DrainRealServer(front_end, _) if front_end.address == ip(EXTERNAL) => Some("remote out"),
        _ => None,
    };
    for (policy, expected) in
        [(TrafficPolicy::Local, ["remote out", "less"]), (TrafficPolicy::Cluster, ["more", "remote in"])]
    {
        world.kernel().log.clear();
        world.apply(Change::Service(Service { external_policy: policy, ..balancer() })).sync();
        assert_eq!(world.kernel().log.iter().filter_map(of).collect::<Vec<_>>(), expected, "{policy:?}");
    }
}

#[test]
fn a_socket_failure_while_building_a_table_is_retried() {
    let mut is_first_audit = true;
    let fault: Fault = Box::new(move |operation| {
        let fails = matches!(operation, Operation::BuildTable { .. }) && std::mem::take(&mut is_first_audit);
        fails.then_some(Cause::Unknown)
    });
    let kernel = FakeKernel { fault: Some(fault), ..FakeKernel::default() };
    let mut world = World::unsynced(kernel, Policy::new(NODE));
    world.apply(Change::Service(balancer())).apply(Change::Synced);
    assert_eq!(world.sync().failures.len(), 1);
    assert!(world.kernel().servers.is_empty());
    world.sync();
    assert_eq!(world.kernel().servers.len(), 3);
}

#[test]
fn without_its_table_nothing_of_a_family_is_served() {
    let fault: Fault = Box::new(|operation| match operation {
        Operation::BuildTable { ruleset, .. } if ruleset.family() == Family::Ipv6 => Some(Cause::Refused),
        _ => None,
    });
    let kernel = FakeKernel { fault: Some(fault), ..FakeKernel::default() };
    let mut dual = balancer();
    dual.cluster_ips.push(ip("fd96::10"));
    let mut world = World::unsynced(kernel, Policy::new(NODE));
    world.apply(Change::Service(dual)).apply(Change::Synced);
    assert_eq!(world.sync().failures.len(), 1, "the table alone");
    assert!(world.kernel().servers.keys().all(|front_end| front_end.address.is_ipv4()));
    assert!(world.kernel().addresses.as_ref().unwrap().keys().all(std::net::IpAddr::is_ipv4));
    world.kernel().fault = None;
    world.audit();
    assert!(world.kernel().addresses.as_ref().unwrap().contains_key(&ip("fd96::10")));
}

#[test]
fn a_table_is_not_replaced_while_everything_is_retained() {
    let restricted = Service { source_ranges: Some(vec!["10.1.0.0/16".parse().unwrap()]), ..balancer() };
    let kernel = world(restricted, vec![endpoint("10.0.0.2")]).kill();
    let before = kernel.filter.clone();
    // The next agent would write other rules, and cannot read the file with the Service.
    let policy = Policy { masquerade_all: true, ..Policy::new(NODE) };
    let mut next = World::unsynced(kernel, policy);
    next.interfaces(ips(&["127.0.0.1", OWN, "fd01::1"]));
    next.apply(Change::Incomplete(true)).apply(Change::Synced).settle();
    assert_eq!(next.kernel().filter, before);
}

#[test]
fn a_peer_node_address_does_not_disable_a_cluster_ip() {
    let mut world = world(service("web", &[CLUSTER_IP]), vec![endpoint("10.0.0.2")]);
    world.apply(Change::PeerNode("node-b".into(), vec![ip(CLUSTER_IP)])).settle();
    assert!(world.kernel().servers.contains_key(&tcp(CLUSTER_IP, 80)));
}

#[test]
fn endpoints_are_updated_while_the_packet_filter_fails() {
    let mut world = world(balancer(), vec![endpoint("10.0.0.2")]);
    world.kernel().fault =
        Some(Box::new(|operation| matches!(operation, Operation::SetFrontEnd { .. }).then_some(Cause::Refused)));
    let restricted = Service { source_ranges: Some(vec!["10.1.0.0/16".parse().unwrap()]), ..balancer() };
    world.apply(Change::Service(restricted));
    world.apply(Change::Slice(ready("web-1", "web", &["10.0.0.3"])));
    world.sync();
    assert!(world.weights(CLUSTER_IP, 80).contains_key("10.0.0.3:8080"));
}

#[test]
fn a_table_with_foreign_changes_is_rebuilt_with_all_elements() {
    let mut world = world(balancer(), vec![local("10.0.0.1")]);
    let whole = world.kernel().filter.clone();
    world.kernel().filter.rulesets.insert(Family::Ipv4, 1);
    world.kernel().filter.front_ends.clear();
    let report = world.audit();
    assert_eq!((report.applied.filters_built, report.applied.filter_added), (1, 0), "in one step");
    assert_eq!(world.kernel().filter, whole);
    // The whole table, without an audit between: the next change meets it.
    world.kernel().filter = ObservedFilter::default();
    world.apply(Change::Service(Service { external_ips: vec![], ..balancer() })).sync();
    world.kernel().filter.front_ends.get(&tcp(CLUSTER_IP, 80)).unwrap();
    assert!(!world.kernel().filter.front_ends.contains_key(&tcp(EXTERNAL, 80)));
    assert_eq!(world.audit().applied.total(), 0);
}

#[test]
fn an_endpoint_change_does_not_touch_the_packet_filter() {
    let mut world = world(balancer(), vec![endpoint("10.0.0.2")]);
    world.apply(Change::Slice(ready("web-1", "web", &["10.0.0.2", "10.0.0.3"])));
    let done = world.sync().applied;
    assert_eq!((done.filter_added, done.filter_removed, done.filters_built), (0, 0, 0));
}

#[test]
fn stale_udp_flows_are_deleted_with_their_real_servers() {
    let mut dns = service("dns", &[CLUSTER_IP]);
    dns.ports[0].protocol = Protocol::Udp;
    let udp_slice = |addresses: &[&str]| {
        let mut slice = ready("dns-1", "dns", addresses);
        slice.ports[0].protocol = Protocol::Udp;
        Change::Slice(slice)
    };
    let front_end = FrontEnd { protocol: Protocol::Udp, ..tcp(CLUSTER_IP, 80) };
    let flow = |to: &str| (front_end, to.parse().unwrap());
    let mut world = World::with(
        FakeKernel::default(),
        Policy::new(NODE),
        vec![Change::Service(dns.clone()), udp_slice(&["10.0.0.1", "10.0.0.2"])],
    );
    let (first, second) = (flow("10.0.0.1:8080"), flow("10.0.0.2:8080"));
    world.kernel().flows.extend([first, second]);
    world.apply(udp_slice(&["10.0.0.2"])).sync();
    assert_eq!(world.kernel().flows.iter().collect::<Vec<_>>(), [&second]);
    // An endpoint more: everybody stays where he is.
    world.apply(udp_slice(&["10.0.0.2", "10.0.0.3"])).sync();
    assert_eq!(world.kernel().flows.len(), 1);
    world.apply(Change::ServiceDeleted(name("dns"))).sync();
    assert!(world.kernel().flows.is_empty());
    // To nobody at first, then to somebody.
    world.apply(Change::Service(dns)).apply(udp_slice(&[])).settle();
    world.kernel().flows.insert(flow("10.96.0.10:9"));
    world.apply(udp_slice(&["10.0.0.5"])).sync();
    assert!(world.kernel().flows.is_empty());
    // A killed agent's last deed may have been half done.
    world.kernel().flows.insert(first);
    let changes = world.kill();
    let mut next = World::with(changes, Policy::new(NODE), vec![]);
    next.interfaces(ips(&[OWN]));
    assert!(next.kernel().servers.is_empty());
    assert!(next.kernel().flows.is_empty());
    // One that was killed before it forgot the front end has left a trace of what it was about.
    next.kernel().filter.front_ends.insert(front_end, rule(Masquerade::Outsiders, Access::Open));
    next.kernel().flows.insert(first);
    next.audit();
    assert!(next.kernel().flows.is_empty());
}

#[test]
fn a_drain_ends_at_its_timeout_if_there_is_one() {
    for (timeout, is_deleted) in [(None, false), (Some(Duration::from_secs(10)), true)] {
        let policy = Policy { drain_timeout: timeout, ..Policy::new(NODE) };
        let mut world = World::with(
            FakeKernel::default(),
            policy,
            vec![
                Change::Service(service("web", &[CLUSTER_IP])),
                Change::Slice(ready("web-1", "web", &["10.0.0.1", "10.0.0.2"])),
            ],
        );
        world.connections((CLUSTER_IP, 80), "10.0.0.1:8080", 1);
        world.apply(Change::Slice(ready("web-1", "web", &["10.0.0.2"]))).sync();
        assert_eq!(world.weights(CLUSTER_IP, 80)["10.0.0.1:8080"], 0);
        if timeout.is_some() {
            let deadline = world.now + Duration::from_secs(10);
            while world.reconciler.next_check().unwrap() < deadline {
                world.now = world.reconciler.next_check().unwrap();
                world.sync();
                assert!(world.weights(CLUSTER_IP, 80).contains_key("10.0.0.1:8080"), "not before its time");
            }
            assert_eq!(world.reconciler.next_check(), Some(deadline));
        }
        world.wait(Duration::from_secs(10)).sync();
        assert_eq!(!world.weights(CLUSTER_IP, 80).contains_key("10.0.0.1:8080"), is_deleted, "{timeout:?}");
    }
}

#[test]
fn the_drain_timeout_is_for_endpoints_that_are_gone_or_terminate() {
    let timeout = Duration::from_secs(10);
    let not_ready = |address| Endpoint { ready: false, serving: false, ..endpoint(address) };
    let terminating = |address| Endpoint { ready: false, terminating: true, ..endpoint(address) };
    let hinted = |address, name: &str| Endpoint {
        hints: Some(Box::new(service_watch::Hints { nodes: vec![name.into()], ..Default::default() })),
        ..endpoint(address)
    };
    let two = || endpoint("10.0.0.2");
    // What becomes of the endpoint with the open connection, and whether it is cut. A second change comes half the timeout later.
    for (name, first, second, is_cut) in [
        ("gone", vec![two()], None, true),
        ("terminating", vec![terminating("10.0.0.1"), two()], None, true),
        ("not ready", vec![not_ready("10.0.0.1"), two()], None, false),
        ("not preferred", vec![hinted("10.0.0.1", "other"), hinted("10.0.0.2", NODE)], None, false),
        ("not ready, then gone", vec![not_ready("10.0.0.1"), two()], Some(vec![two()]), false),
        ("gone, then not ready", vec![two()], Some(vec![not_ready("10.0.0.1"), two()]), false),
    ] {
        let policy = Policy { drain_timeout: Some(timeout), ..Policy::new(NODE) };
        let all = ready("web-1", "web", &["10.0.0.1", "10.0.0.2"]);
        let changes = vec![Change::Service(service("web", &[CLUSTER_IP])), Change::Slice(all)];
        let mut world = World::with(FakeKernel::default(), policy, changes);
        world.connections((CLUSTER_IP, 80), "10.0.0.1:8080", 1);
        world.apply(Change::Slice(slice("web-1", "web", first))).sync();
        assert_eq!(world.weights(CLUSTER_IP, 80)["10.0.0.1:8080"], 0, "{name}");
        world.wait(timeout / 2);
        let is_in_two_steps = second.is_some();
        if let Some(second) = second {
            world.apply(Change::Slice(slice("web-1", "web", second)));
        }
        world.sync();
        world.wait(timeout / 2).sync();
        assert_eq!(!world.weights(CLUSTER_IP, 80).contains_key("10.0.0.1:8080"), is_cut, "{name}");
        world.wait(timeout / 2).sync();
        let is_cut_later = is_cut || (is_in_two_steps && name.ends_with("gone"));
        assert_eq!(!world.weights(CLUSTER_IP, 80).contains_key("10.0.0.1:8080"), is_cut_later, "{name}, later");
    }
}
