//! What an outcome tells beside what was done: load balancers' answers, policies without local endpoints, drift that cannot
//! be repaired, totals, and when slices changed.

mod common;

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use common::{NODE, World, endpoint, ip, ips, name, port, ready, service, slice};
use ipvs_netlink::Family;
use reconciler::Policy;
use reconciler::contribution::HealthCheck;
use reconciler::fake::FakeKernel;
use reconciler::kernel::Cause;
use reconciler::plan::Operation;
use reconciler::policy::{DetectLocal, NodePortAddresses};
use service_watch::{Change, Endpoint, EndpointSlice, Node, Service, ServiceKind, TrafficPolicy};

const LOCAL: TrafficPolicy = TrafficPolicy::Local;

/// A Service that load balancers ask about.
fn checked(cluster_ips: &[&str]) -> Service {
    Service {
        kind: ServiceKind::LoadBalancer,
        external_policy: LOCAL,
        health_check_node_port: Some(port(31777)),
        ..service("web", cluster_ips)
    }
}

fn here(address: &str) -> Endpoint {
    Endpoint { node: Some(NODE.into()), ..endpoint(address) }
}

fn check(family: Family, local_endpoints: usize) -> HealthCheck {
    HealthCheck { family, port: port(31777), addresses: None, local_endpoints }
}

/// What load balancers are told of `web` after these changes.
fn told(world: &mut World, changes: Vec<Change>) -> Option<Vec<HealthCheck>> {
    for change in changes {
        world.apply(change);
    }
    let mut told = world.sync().health_checks;
    assert!(told.iter().all(|(service, _)| *service == name("web")));
    told.pop().map(|(_, checks)| checks)
}

#[test]
fn health_checks_count_ready_local_addresses() {
    let mut world = World::new();
    let mixed = vec![
        here("10.0.0.1"),
        // On two ports, or in two slices, it is still one.
        here("10.0.0.1"),
        here("10.0.0.2"),
        Endpoint { ready: false, ..here("10.0.0.3") },
        Endpoint { ready: false, terminating: true, ..here("10.0.0.4") },
        endpoint("10.0.0.5"),
    ];
    let first = vec![Change::Service(checked(&["10.96.0.10", "fd00::a"])), Change::Slice(slice("a", "web", mixed))];
    let expected = vec![check(Family::Ipv4, 2), check(Family::Ipv6, 0)];
    assert_eq!(told(&mut world, first), Some(expected));
    assert_eq!(told(&mut world, vec![]), None, "nothing changed");
    let more = vec![Change::Slice(slice("b", "web", vec![here("10.0.0.1"), here("10.0.0.9")]))];
    assert_eq!(told(&mut world, more), Some(vec![check(Family::Ipv4, 3), check(Family::Ipv6, 0)]));
    let cluster = Service { external_policy: TrafficPolicy::Cluster, ..checked(&["10.96.0.10"]) };
    assert_eq!(told(&mut world, vec![Change::Service(cluster)]), Some(vec![]), "nobody is told any more");
    assert_eq!(told(&mut world, vec![Change::ServiceDeleted(name("web"))]), None);
}

#[test]
fn health_checks_listen_on_node_port_addresses_and_loopback() {
    let policy = Policy {
        node_port_addresses: NodePortAddresses::Within(vec![
            "127.0.0.0/8".parse().unwrap(),
            "192.168.1.0/24".parse().unwrap(),
        ]),
        ..Policy::new(NODE)
    };
    let mut world = World::with(FakeKernel::default(), policy, vec![]);
    let checks = told(&mut world, vec![Change::Service(checked(&["10.96.0.10", "fd00::a"]))]).unwrap();
    let addresses: Vec<Option<BTreeSet<_>>> = checks.into_iter().map(|check| check.addresses).collect();
    assert_eq!(addresses, [Some(ips(&["127.0.0.1", "192.168.1.1"])), None], "no range of IPv6: on all of it");
}

/// How many Services find no local endpoint: internal and external, of IPv4.
fn without_local(service: Service, endpoints: Vec<Endpoint>) -> (usize, usize) {
    let changes = vec![Change::Service(service), Change::Slice(slice("a", "web", endpoints))];
    let mut world = World::with(FakeKernel::default(), Policy::new(NODE), changes);
    let totals = world.audit().totals;
    assert_eq!((totals.internal_without_local[1], totals.external_without_local[1]), (0, 0), "nothing is of IPv6");
    (totals.internal_without_local[0], totals.external_without_local[0])
}

#[test]
fn policy_local_without_local_endpoints_is_counted() {
    let plain = || service("web", &["10.96.0.10"]);
    let internal = || Service { internal_policy: LOCAL, ..plain() };
    let external = || Service { external_policy: LOCAL, external_ips: vec![ip("198.51.100.1")], ..plain() };
    let both = || Service { internal_policy: LOCAL, ..external() };
    let elsewhere = || vec![endpoint("10.0.0.1")];
    let terminating = || vec![Endpoint { ready: false, terminating: true, ..endpoint("10.0.0.1") }];
    let unready = || vec![Endpoint { ready: false, serving: false, ..endpoint("10.0.0.1") }];
    for (what, service, endpoints, expected) in [
        ("no policy", plain(), elsewhere(), (0, 0)),
        ("internal", internal(), elsewhere(), (1, 0)),
        ("external", external(), elsewhere(), (0, 1)),
        ("both", both(), elsewhere(), (1, 1)),
        ("one is here", both(), vec![endpoint("10.0.0.1"), here("10.0.0.2")], (0, 0)),
        ("others serve while they terminate", internal(), terminating(), (1, 0)),
        ("none is of use", internal(), unready(), (0, 0)),
        ("none at all", both(), vec![], (0, 0)),
        (
            "a policy for the outside, and nothing outside",
            Service { external_policy: LOCAL, ..plain() },
            elsewhere(),
            (0, 0),
        ),
    ] {
        assert_eq!(without_local(service, endpoints), expected, "{what}");
    }
}

#[test]
fn only_drift_that_cannot_be_repaired_is_unrepaired() {
    let web = vec![Change::Service(service("web", &["10.96.0.10"])), Change::Slice(ready("a", "web", &["10.0.0.1"]))];
    let mut world = World::with(FakeKernel::default(), Policy::new(NODE), web);
    let refuse = |operation: &Operation| matches!(operation, Operation::BindAddress(_)).then_some(Cause::Refused);
    world.kernel().fault = Some(Box::new(refuse));
    world.apply(Change::Service(service("new", &["fd00::a"])));
    let report = world.sync();
    assert_eq!((report.failures.len(), report.unrepaired), (1, BTreeSet::new()), "it never was right");

    world.kernel().addresses.as_mut().unwrap().remove(&ip("10.96.0.10"));
    let report = world.audit();
    assert_eq!((report.drifted_keys.len(), &report.unrepaired), (1, &[Family::Ipv4].into()));
    world.wait(Duration::from_secs(5));
    assert_eq!(world.sync().unrepaired, [Family::Ipv4].into(), "it is still so when it is tried again");
    world.kernel().fault = None;
    world.wait(Duration::from_secs(60));
    let report = world.sync();
    assert_eq!((report.unrepaired, report.totals.failing), (BTreeSet::new(), 0));
}

#[test]
fn a_table_or_device_that_cannot_be_added_is_unrepaired() {
    for (fault, families) in
        [("filter", BTreeSet::from([Family::Ipv6])), ("device", BTreeSet::from([Family::Ipv4, Family::Ipv6]))]
    {
        let refuse = move |operation: &Operation| {
            let is_it = match operation {
                Operation::BuildTable { ruleset, .. } => fault == "filter" && ruleset.family() == Family::Ipv6,
                Operation::AddDevice => fault == "device",
                _ => false,
            };
            is_it.then_some(Cause::Refused)
        };
        let kernel = FakeKernel { fault: Some(Box::new(refuse)), ..FakeKernel::default() };
        let mut world = World::unsynced(kernel, Policy::new(NODE));
        world.apply(Change::Service(service("web", &["10.96.0.10"]))).apply(Change::Synced);
        assert_eq!(world.sync().unrepaired, families, "{fault}");
    }
}

#[test]
fn totals_count_services_servers_and_vips() {
    let mut world = World::with(
        FakeKernel::default(),
        Policy::new(NODE),
        vec![
            Change::Service(service("web", &["10.96.0.10", "fd00::a"])),
            Change::Service(service("other", &["10.96.0.11"])),
            Change::Slice(ready("a", "web", &["10.0.0.1", "10.0.0.2"])),
        ],
    );
    let totals = world.audit().totals;
    assert_eq!((totals.services, totals.virtual_servers, totals.real_servers, totals.vips), (2, 3, 2, 3));
    world.connections(("10.96.0.10", 80), "10.0.0.2:8080", 1);
    world.apply(Change::Slice(ready("a", "web", &["10.0.0.1", "10.0.0.3"])));
    let totals = world.sync().totals;
    assert_eq!((totals.real_servers, totals.draining), (3, 1), "one has a connection, and so is still there");
    world.apply(Change::ServiceDeleted(name("web")));
    let totals = world.sync().totals;
    assert_eq!((totals.services, totals.virtual_servers, totals.real_servers, totals.draining), (1, 1, 0, 0));
}

#[test]
fn draining_servers_lost_while_the_kernel_is_unknown_are_not_counted() {
    let mut world = World::new();
    world.apply(Change::Service(service("web", &["10.96.0.10"])));
    world.apply(Change::Slice(ready("a", "web", &["10.0.0.1", "10.0.0.2"]))).settle();
    world.connections(("10.96.0.10", 80), "10.0.0.2:8080", 1);
    world.apply(Change::Slice(ready("a", "web", &["10.0.0.1"])));
    assert_eq!(world.sync().totals.draining, 1);

    world.kernel().fault = Some(Box::new(|_| Some(Cause::Unknown)));
    world.apply(Change::Slice(ready("a", "web", &["10.0.0.1", "10.0.0.3"])));
    assert_eq!(world.sync().totals.draining, 0, "who knows");

    world.kernel().fault = None;
    world.kernel().servers.clear();
    world.kernel().filter.front_ends.clear();
    world.apply(Change::ServiceDeleted(name("web")));
    assert_eq!(world.sync().totals.draining, 0);
    assert_eq!(world.reconciler.next_check(), None);
}

#[test]
fn trigger_times_are_reported_once() {
    let mut world = World::new();
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    let changed = |addresses: &[&str]| EndpointSlice { trigger_time: Some(at), ..ready("a", "web", addresses) };
    world.apply(Change::Service(service("web", &["10.96.0.10"]))).apply(Change::Slice(changed(&["10.0.0.1"])));
    assert_eq!(world.sync().trigger_times, [(Family::Ipv4, at)]);
    world.apply(Change::Slice(changed(&["10.0.0.1"])));
    assert_eq!(world.sync().trigger_times, [], "it says nothing new");
    world.apply(Change::Slice(changed(&[])));
    assert_eq!(world.sync().trigger_times, [(Family::Ipv4, at)], "to become empty is a change");
    world.apply(Change::SliceDeleted(name("a")));
    assert_eq!(world.sync().trigger_times, [], "what goes has no such time");
}

#[test]
fn missing_node_data_is_detected() {
    let node = |addresses: &[&str], pod_cidrs: &[&str]| {
        Change::Node(Node {
            addresses: addresses.iter().map(|text| ip(text)).collect(),
            pod_cidrs: pod_cidrs.iter().map(|text| text.parse().unwrap()).collect(),
            ..Node::default()
        })
    };
    let primary = Policy { node_port_addresses: NodePortAddresses::Primary, ..Policy::new(NODE) };
    let bound = Policy { bind_address: Some(ip("192.168.1.1")), ..primary.clone() };
    let by_node = Policy { detect_local: DetectLocal::NodeCidr, ..Policy::new(NODE) };
    for (policy, lacks) in [
        (Policy::new(NODE), [false, false, false, false]),
        (primary, [true, true, false, false]),
        (bound, [false, false, false, false]),
        (by_node, [true, true, true, false]),
    ] {
        let mut world = World::unsynced(FakeKernel::default(), policy.clone());
        let mut seen = vec![world.reconciler.is_missing_node_data()];
        for change in [node(&[], &[]), node(&["192.168.1.1"], &[]), node(&["192.168.1.1"], &["10.244.1.0/24"])] {
            world.apply(change);
            seen.push(world.reconciler.is_missing_node_data());
        }
        assert_eq!(seen, lacks, "{policy:?}");
    }
}
