//! What the reconciler does with changes, failures, drift and restarts, on a model of the kernel.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{NODE, World, endpoint, for_zone, ip, ips, name, port, ready, service, slice, tcp};
use ipvs_netlink::{Forwarding, Scheduler};
use reconciler::Policy;
use reconciler::fake::FakeKernel;
use reconciler::kernel::Cause;
use reconciler::plan::{Key, Operation, Phase};
use service_watch::{Change, Endpoint, Node, ObjectName, Protocol, Service, ServiceKind, TrafficPolicy};

fn weights(expected: &[(&str, u32)]) -> BTreeMap<String, u32> {
    expected.iter().map(|(address, weight)| ((*address).to_owned(), *weight)).collect()
}

/// A synced world with the Service `web` of two endpoints.
fn web() -> World {
    World::with(
        FakeKernel::default(),
        Policy::new(NODE),
        vec![
            Change::Service(service("web", &["10.96.0.10"])),
            Change::Slice(ready("web-1", "web", &["10.0.0.1", "10.0.0.2"])),
        ],
    )
}

#[test]
fn a_service_becomes_a_virtual_server_and_an_address() {
    let mut world = web();
    assert_eq!(world.weights("10.96.0.10", 80), weights(&[("10.0.0.1:8080", 1), ("10.0.0.2:8080", 1)]));
    assert_eq!(world.kernel().addresses, Some([(ip("10.96.0.10"), 32)].into()));
}

#[test]
fn a_service_without_endpoints_has_a_virtual_server_too() {
    let mut world = World::new();
    world.apply(Change::Service(service("web", &["10.96.0.10", "fd96::10"]))).settle();
    assert_eq!(world.weights("10.96.0.10", 80), weights(&[]));
    assert_eq!(world.weights("fd96::10", 80), weights(&[]));
}

#[test]
fn not_ready_before_the_initial_list_is_complete() {
    let mut world = World::unsynced(FakeKernel::default(), Policy::new(NODE));
    world.apply(Change::Service(service("web", &["10.96.0.10"])));
    assert!(!world.reconciler.is_ready());
    world.apply(Change::Synced);
    assert!(world.reconciler.is_ready());
}

#[test]
fn bootstrap_serves_the_api_server_first_and_deletes_nothing() {
    // What an agent before this one has left: more endpoints than are known yet, and Services of which nothing has come.
    let mut world = World::with(
        FakeKernel::default(),
        Policy::new(NODE),
        vec![
            Change::Service(service("web", &["10.96.0.10"])),
            Change::Slice(ready("web-1", "web", &["10.0.0.1"])),
            Change::Service(service("kubernetes", &["10.96.0.1"])),
            Change::Slice(ready("kubernetes-1", "kubernetes", &["10.0.0.7", "10.0.0.8"])),
        ],
    );
    world.kernel().servers.get_mut(&tcp("10.96.0.1", 80)).unwrap().real_servers.clear();
    let mut world = World::unsynced(world.kill(), Policy::new(NODE));
    world.apply(Change::Node(Node::default()));
    world.apply(Change::Service(service("web", &["10.96.0.11"])));
    world.apply(Change::Service(service("kubernetes", &["10.96.0.1"])));
    assert_eq!(
        world.reconciler.sync_bootstrap(world.now).unwrap(),
        None,
        "without an endpoint there is nothing to serve"
    );
    world.apply(Change::Slice(ready("kubernetes-1", "kubernetes", &["10.0.0.7"])));
    let bootstrap = world.reconciler.sync_bootstrap(world.now).unwrap().unwrap();
    assert_eq!(bootstrap.applied.real_servers_added, 1);
    assert_eq!(world.weights("10.96.0.1", 80), weights(&[("10.0.0.7:8080", 1)]));
    assert_eq!(world.weights("10.96.0.10", 80).len(), 1, "what may still come stays");
    assert!(!world.kernel().servers.contains_key(&tcp("10.96.0.11", 80)), "others have their time");
    assert_eq!(world.reconciler.sync_bootstrap(world.now).unwrap(), None, "once is enough");

    world.apply(Change::Synced);
    let first = world.sync();
    assert!(first.is_audit && first.is_first_audit);
    assert_eq!(first.applied.real_servers_added, 1, "what was done ahead is told with the rest");
    world.settle();
    assert!(!world.kernel().servers.contains_key(&tcp("10.96.0.10", 80)));
    assert!(world.kernel().servers.contains_key(&tcp("10.96.0.11", 80)));
}

#[test]
fn no_bootstrap_beside_virtual_servers_without_tables() {
    let mut world = web();
    world.kernel().filter = FakeKernel::default().filter;
    let mut world = World::unsynced(world.kill(), Policy::new(NODE));
    world.apply(Change::Node(Node::default()));
    world.apply(Change::Service(service("kubernetes", &["10.96.0.1"])));
    world.apply(Change::Slice(ready("kubernetes-1", "kubernetes", &["10.0.0.7"])));
    assert_eq!(world.reconciler.sync_bootstrap(world.now).unwrap(), None);
    assert!(!world.kernel().servers.contains_key(&tcp("10.96.0.1", 80)));
    world.apply(Change::Synced);
    assert!(world.sync().is_first_audit);
    assert!(world.kernel().servers.contains_key(&tcp("10.96.0.1", 80)));
}

#[test]
fn found_state_stays_while_an_object_cannot_be_parsed() {
    let mut world = web();
    world.apply(Change::Service(service("other", &["10.96.0.12"])));
    world.apply(Change::Slice(ready("other-1", "other", &["10.0.0.5", "10.0.0.6"]))).settle();
    // A restart: of `web` nothing is understood, of `other` one of two slices.
    let mut world = World::with(
        world.kill(),
        Policy::new(NODE),
        vec![
            Change::Incomplete(true),
            Change::Service(service("other", &["10.96.0.12"])),
            Change::Slice(ready("other-1", "other", &["10.0.0.5"])),
            Change::Service(service("new", &["10.96.0.11"])),
        ],
    );
    for _ in 0..2 {
        assert_eq!(world.weights("10.96.0.10", 80).len(), 2, "what may be in the rest stays");
        assert!(world.kernel().addresses.as_ref().unwrap().contains_key(&ip("10.96.0.10")));
        assert_eq!(world.weights("10.96.0.12", 80).len(), 2);
        assert_eq!(world.weights("10.96.0.11", 80).len(), 0, "what is new comes");
        world.audit();
    }
    world.apply(Change::ServiceDeleted(name("new")));
    world.audit();
    assert_eq!(world.kernel().servers.len(), 2, "what was understood and is gone goes");
    world.apply(Change::Incomplete(false)).settle();
    assert_eq!(world.kernel().servers.len(), 1);
    assert_eq!(world.weights("10.96.0.12", 80), weights(&[("10.0.0.5:8080", 1)]));
    assert_eq!(world.kernel().addresses, Some([(ip("10.96.0.12"), 32)].into()));
}

#[test]
fn an_audit_reads_the_addresses_of_the_interfaces_too() {
    let mut lb = service("web", &["10.96.0.10"]);
    lb.kind = ServiceKind::NodePort;
    lb.ports[0].node_port = Some(port(30080));
    let mut world = World::new();
    world.apply(Change::Service(lb)).settle();
    // Nobody tells of it.
    world.kernel().interfaces = ips(&["192.168.1.9"]);
    world.audit();
    assert!(world.kernel().servers.contains_key(&tcp("192.168.1.9", 30080)));
    assert!(!world.kernel().servers.contains_key(&tcp("192.168.1.1", 30080)));
}

#[test]
fn an_invalid_address_affects_no_other() {
    let mut world = web();
    world.kernel().fault =
        Some(Box::new(|operation| (*operation == Operation::BindAddress(ip("ff05::1"))).then_some(Cause::NotFound)));
    let mut odd = service("odd", &["10.96.0.11"]);
    odd.cluster_ips.push(ip("fd96::11"));
    odd.external_ips = vec![ip("ff05::1")];
    world.apply(Change::Service(odd));
    let before = world.kernel().counts.operations;
    let report = world.sync();
    assert_eq!(report.failures.len(), 1);
    assert_eq!(
        world.kernel().counts.operations - before,
        15,
        "three virtual servers, three addresses, their entries in the packet filter, their flows, and nothing again"
    );
}

#[test]
fn an_endpoint_change_among_5000_services_needs_no_dump() {
    let mut changes = Vec::new();
    for i in 0..5000_u32 {
        let (high, low) = (i / 250, i % 250 + 1);
        changes.push(Change::Service(service(&format!("s{i}"), &[&format!("10.96.{high}.{low}")])));
        changes.push(Change::Slice(ready(
            &format!("s{i}-1"),
            &format!("s{i}"),
            &[&format!("10.{high}.{low}.1"), &format!("10.{high}.{low}.2")],
        )));
    }
    let mut world = World::with(FakeKernel::default(), Policy::new(NODE), changes);
    let before = world.kernel().counts;
    let added = ready("s7-1", "s7", &["10.0.8.1", "10.0.8.2", "10.0.8.3"]);
    world.apply(Change::Slice(added)).settle();
    let after_add = world.kernel().counts;
    assert_eq!(after_add.operations - before.operations, 1, "the new real server");
    assert_eq!((after_add.full_dumps, after_add.servers_read), (before.full_dumps, before.servers_read));

    world.apply(Change::Slice(ready("s7-1", "s7", &["10.0.8.1", "10.0.8.2"]))).settle();
    let after_remove = world.kernel().counts;
    assert_eq!(after_remove.operations - after_add.operations, 2, "weight 0, then the deletion");
    assert_eq!(after_remove.full_dumps, after_add.full_dumps);
    assert_eq!(after_remove.servers_read - after_add.servers_read, 1, "the one that drained");
}

#[test]
fn a_restart_with_nothing_changed_writes_nothing() {
    let changes = || {
        vec![
            Change::Service(Service { affinity_seconds: Some(300), ..service("web", &["10.96.0.10", "fd96::10"]) }),
            Change::Slice(ready("web-1", "web", &["10.0.0.1", "10.0.0.2"])),
        ]
    };
    let policy = Policy { scheduler: Scheduler::MaglevHashing, ..Policy::new(NODE) };
    let kernel = World::with(FakeKernel::default(), policy.clone(), changes()).kill();
    let writes = kernel.counts.operations;
    let mut world = World::with(kernel, policy, changes());
    assert_eq!(world.kernel().counts.operations, writes);
}

#[test]
fn an_unchanged_object_makes_nothing_dirty() {
    let mut world = web();
    world.apply(Change::Service(service("web", &["10.96.0.10"])));
    world.apply(Change::Slice(ready("web-1", "web", &["10.0.0.1", "10.0.0.2"])));
    assert!(!world.reconciler.is_dirty());
}

#[test]
fn a_removed_endpoint_drains_until_its_last_connection_ends() {
    let mut world = web();
    world.connections(("10.96.0.10", 80), "10.0.0.2:8080", 3);
    world.apply(Change::Slice(ready("web-1", "web", &["10.0.0.1"]))).settle();
    assert_eq!(world.weights("10.96.0.10", 80), weights(&[("10.0.0.1:8080", 1), ("10.0.0.2:8080", 0)]));
    world.connections(("10.96.0.10", 80), "10.0.0.2:8080", 0);
    world.wait(Duration::from_secs(60)).settle();
    assert_eq!(world.weights("10.96.0.10", 80), weights(&[("10.0.0.1:8080", 1)]));
}

#[test]
fn a_draining_endpoint_that_comes_back_takes_connections_again() {
    let mut world = web();
    world.connections(("10.96.0.10", 80), "10.0.0.2:8080", 3);
    world.apply(Change::Slice(ready("web-1", "web", &["10.0.0.1"]))).settle();
    world.apply(Change::Slice(ready("web-1", "web", &["10.0.0.1", "10.0.0.2"]))).settle();
    assert_eq!(world.weights("10.96.0.10", 80), weights(&[("10.0.0.1:8080", 1), ("10.0.0.2:8080", 1)]));
    assert_eq!(world.reconciler.next_check(), None);
}

#[test]
fn a_restarted_agent_goes_on_draining_without_a_write() {
    let mut world = web();
    world.connections(("10.96.0.10", 80), "10.0.0.2:8080", 3);
    let changes =
        || vec![Change::Service(service("web", &["10.96.0.10"])), Change::Slice(ready("web-1", "web", &["10.0.0.1"]))];
    world.apply(Change::Slice(ready("web-1", "web", &["10.0.0.1"]))).settle();
    let kernel = world.kill();
    let writes = kernel.counts.operations;
    let mut world = World::with(kernel, Policy::new(NODE), changes());
    assert_eq!(world.kernel().counts.operations, writes);
    world.connections(("10.96.0.10", 80), "10.0.0.2:8080", 0);
    world.wait(Duration::from_secs(60)).settle();
    assert_eq!(world.weights("10.96.0.10", 80), weights(&[("10.0.0.1:8080", 1)]));
}

#[test]
fn a_connection_made_before_weight_0_is_not_cut() {
    let mut world = web();
    // Idle when it was last read; a connection comes while the plan is on its way.
    world.audit();
    world.apply(Change::Slice(ready("web-1", "web", &["10.0.0.1"])));
    world.sync();
    world.connections(("10.96.0.10", 80), "10.0.0.2:8080", 1);
    world.settle();
    assert_eq!(world.weights("10.96.0.10", 80), weights(&[("10.0.0.1:8080", 1), ("10.0.0.2:8080", 0)]));
}

#[test]
fn udp_and_sctp_real_servers_are_deleted_at_once() {
    for protocol in [Protocol::Udp, Protocol::Sctp] {
        let mut dns = service("dns", &["10.96.0.20"]);
        dns.ports[0].protocol = protocol;
        let mut both = ready("dns-1", "dns", &["10.0.0.1", "10.0.0.2"]);
        both.ports[0].protocol = protocol;
        let mut one = both.clone();
        one.endpoints.truncate(1);
        let mut world =
            World::with(FakeKernel::default(), Policy::new(NODE), vec![Change::Service(dns), Change::Slice(both)]);
        for server in world.kernel().servers.values_mut() {
            server.real_servers.values_mut().for_each(|real| real.connections = 5);
        }
        world.apply(Change::Slice(one));
        let report = world.sync();
        assert_eq!(report.applied.real_servers_deleted, 1, "{protocol:?}");
    }
}

#[test]
fn a_deleted_service_loses_its_virtual_servers_and_vips() {
    let mut world = web();
    world.connections(("10.96.0.10", 80), "10.0.0.2:8080", 3);
    world.apply(Change::ServiceDeleted(name("web")));
    let report = world.sync();
    assert_eq!((report.applied.servers_deleted, report.applied.addresses_unbound, report.applied.total()), (1, 1, 4));
    assert_eq!(report.applied.filter_removed, 2, "the front end and the VIP");
    assert!(world.kernel().servers.is_empty());
}

#[test]
fn leftovers_are_deleted_except_excluded_ranges_and_marks() {
    let mut kernel = World::with(
        FakeKernel::default(),
        Policy::new(NODE),
        vec![
            Change::Service(service("old", &["10.96.0.99"])),
            Change::Service(service("kept", &["10.50.0.1"])),
            Change::Service(service("odd", &["10.96.0.77"])),
        ],
    )
    .kill();
    // Somebody bound one with a prefix that we never use: not ours.
    kernel.addresses.as_mut().unwrap().insert(ip("10.96.0.77"), 24);
    let policy = Policy { exclude: vec!["10.50.0.0/16".parse().unwrap()], ..Policy::new(NODE) };
    let mut world = World::with(kernel, policy, vec![]);
    assert_eq!(world.kernel().servers.keys().copied().collect::<Vec<_>>(), [tcp("10.50.0.1", 80)]);
    assert_eq!(world.kernel().addresses, Some([(ip("10.96.0.77"), 24)].into()));
}

#[test]
fn a_vip_of_two_services_stays_until_both_are_deleted() {
    let shared = |service_name: &str, cluster_ip: &str, number: u16| {
        let mut shared = service(service_name, &[cluster_ip]);
        shared.external_ips = vec![ip("203.0.113.1")];
        shared.ports[0].port = port(number);
        shared
    };
    let mut world = World::new();
    world.apply(Change::Service(shared("a", "10.96.0.1", 81))).apply(Change::Service(shared("b", "10.96.0.2", 82)));
    world.settle().apply(Change::ServiceDeleted(name("a"))).settle();
    assert!(world.kernel().addresses.as_ref().unwrap().contains_key(&ip("203.0.113.1")));
    world.apply(Change::ServiceDeleted(name("b"))).settle();
    assert!(world.kernel().addresses.as_ref().unwrap().is_empty());
}

#[test]
fn only_conflicts_that_last_are_reported() {
    let web = |service_name: &str, node_port: u16, created: i64| {
        let mut web = service(service_name, &[if service_name == "a" { "10.96.0.1" } else { "10.96.0.2" }]);
        web.created = Some(created);
        web.ports[0].node_port = node_port.try_into().ok();
        Change::Service(web)
    };
    let deleted = |service_name: &str| Change::ServiceDeleted(name(service_name));
    // The changes of one sync, and who loses to whom.
    for (what, changes, expected) in [
        ("NodePorts are exchanged", vec![web("a", 30002, 1), web("b", 30001, 2)], None),
        ("the same, in another order", vec![web("b", 30001, 2), web("a", 30002, 1)], None),
        ("a successor", vec![deleted("b"), web("c", 30002, 3)], None),
        ("one moves to a port that is taken", vec![web("a", 30002, 1)], Some(("a", "b"))),
        ("both move to one port", vec![web("b", 30003, 2), web("a", 30003, 1)], Some(("a", "b"))),
        ("one moves to the other's, which has moved to a third's", vec![web("a", 30002, 1), web("b", 30003, 2)], None),
    ] {
        let mut world = World::new();
        world.interfaces([ip("192.168.1.1")].into());
        world.apply_all(vec![web("a", 30001, 1), web("b", 30002, 2)]).sync();
        world.apply_all(changes);
        let report = world.sync();
        let told: Vec<_> = report.conflicts.iter().map(|it| (it.winner.name(), it.loser.name())).collect();
        assert_eq!(told, Vec::from_iter(expected), "{what}");
    }
}

#[test]
fn the_older_service_wins_a_front_end_conflict() {
    let clashing = |service_name: &str, cluster_ip: &str, created: i64| Service {
        created: Some(created),
        external_ips: vec![ip("203.0.113.1")],
        ..service(service_name, &[cluster_ip])
    };
    for order in [["young", "old"], ["old", "young"]] {
        let mut world = World::new();
        let mut conflicts = Vec::new();
        for service_name in order {
            let (cluster_ip, created) = if service_name == "old" { ("10.96.0.1", 1) } else { ("10.96.0.2", 2) };
            world.apply(Change::Service(clashing(service_name, cluster_ip, created)));
            let address = if service_name == "old" { "10.0.0.1" } else { "10.0.0.2" };
            world.apply(Change::Slice(ready(service_name, service_name, &[address])));
            conflicts.extend(world.sync().conflicts);
        }
        assert_eq!(conflicts.len(), 1);
        assert_eq!((&conflicts[0].winner, &conflicts[0].loser), (&name("old"), &name("young")));
        world.settle();
        assert_eq!(world.weights("203.0.113.1", 80), weights(&[("10.0.0.1:8080", 1)]));
        assert_eq!(world.weights("10.96.0.2", 80), weights(&[("10.0.0.2:8080", 1)]), "the loser keeps its own");
        world.apply(Change::ServiceDeleted(name("old"))).settle();
        assert_eq!(world.weights("203.0.113.1", 80), weights(&[("10.0.0.2:8080", 1)]), "the loser inherits");
    }
}

#[test]
fn a_slice_that_changes_its_service_serves_only_the_new_one() {
    let mut world = web();
    world.apply(Change::Service(service("b", &["10.96.0.11"])));
    world.apply(Change::Slice(ready("web-1", "b", &["10.0.0.1"]))).settle();
    assert_eq!(world.weights("10.96.0.10", 80), weights(&[]));
    assert_eq!(world.weights("10.96.0.11", 80), weights(&[("10.0.0.1:8080", 1)]));
}

#[test]
fn a_new_node_address_gets_node_ports() {
    let mut web_port = service("web", &["10.96.0.10"]);
    web_port.kind = ServiceKind::NodePort;
    web_port.ports[0].node_port = Some(port(30080));
    let mut world = World::new();
    world.apply(Change::Service(web_port)).settle();
    assert!(world.kernel().servers.contains_key(&tcp("192.168.1.1", 30080)));
    world.interfaces(ips(&["192.168.1.2", "fd01::1"]));
    let report = world.sync();
    assert_eq!((report.applied.servers_added, report.applied.servers_deleted), (1, 1));
    assert!(world.kernel().servers.contains_key(&tcp("192.168.1.2", 30080)));
}

#[test]
fn a_vip_on_another_interface_is_unbound() {
    let mut lb = service("web", &["10.96.0.10"]);
    lb.load_balancer_ips = vec![ip("203.0.113.1")];
    let mut world = World::new();
    world.apply(Change::Service(lb)).settle();
    world.interfaces(ips(&["192.168.1.1", "203.0.113.1"]));
    assert_eq!(world.sync().applied.addresses_unbound, 1);
    assert!(world.kernel().servers.contains_key(&tcp("203.0.113.1", 80)), "the virtual server stays");
}

#[test]
fn an_audit_repairs_and_reports_drift() {
    let mut world = web();
    let foreign_servers = world.server("10.96.0.10", 80).clone();
    world.kernel().servers.insert(tcp("10.77.0.1", 80), foreign_servers);
    world.kernel().addresses.as_mut().unwrap().clear();
    let server = world.server("10.96.0.10", 80);
    server.config.scheduler = Scheduler::LeastConnection;
    let mut real_servers = server.real_servers.values_mut();
    real_servers.next().unwrap().server.weight = 0;
    real_servers.next().unwrap().server.forwarding = Forwarding::DirectRoute;
    let report = world.audit();
    assert_eq!(report.drifted_keys, [Key::VirtualServer(tcp("10.96.0.10", 80)), Key::Vip(ip("10.96.0.10"))]);
    assert_eq!(world.audit().applied.total(), 0, "all is repaired");
    assert_eq!(world.audit().drifted_keys, []);
}

/// keepalived's, or somebody's with ipvsadm: nothing in the kernel says that it is ours.
#[test]
fn a_virtual_server_of_unknown_owner_stays() {
    let mut world = web();
    let other = world.server("10.96.0.10", 80).clone();
    for front_end in [tcp("10.77.0.1", 80), tcp("10.96.0.10", 81)] {
        world.kernel().servers.insert(front_end, other.clone());
    }
    assert_eq!(world.audit().drifted_keys, []);
    world.apply(Change::ServiceDeleted(name("web"))).settle();
    assert_eq!(
        world.kernel().servers.keys().copied().collect::<Vec<_>>(),
        [tcp("10.77.0.1", 80), tcp("10.96.0.10", 81)]
    );
}

#[test]
fn virtual_servers_of_kube_proxy_are_adopted_even_after_a_kill() {
    let before = web().kill();
    let mut left =
        FakeKernel { servers: before.servers.clone(), addresses: before.addresses.clone(), ..FakeKernel::default() };
    let stranger = before.servers[&tcp("10.96.0.10", 80)].clone();
    left.servers.insert(tcp("10.77.0.1", 80), stranger);
    // It lives just long enough to make the tables.
    left.fault =
        Some(Box::new(|operation| (!matches!(operation, Operation::BuildTable { .. })).then_some(Cause::Refused)));
    let mut killed = World::with(left, Policy::new(NODE), vec![]).kill();
    killed.fault = None;
    assert!(killed.servers.contains_key(&tcp("10.96.0.10", 80)));

    let world = World::with(killed, Policy::new(NODE), vec![]).kill();
    assert_eq!(world.servers.keys().copied().collect::<Vec<_>>(), [tcp("10.77.0.1", 80)]);
    assert_eq!(world.filter.front_ends.len(), 0);
}

#[test]
fn pending_changes_are_not_drift() {
    let mut world = web();
    world.apply(Change::Slice(ready("web-1", "web", &["10.0.0.1", "10.0.0.2", "10.0.0.3"])));
    let report = world.audit();
    assert_eq!((report.drifted_keys.len(), report.applied.real_servers_added), (0, 1));
}

#[test]
fn a_missing_scheduler_affects_no_other_service() {
    let mut world = web();
    world.kernel().missing_schedulers.insert(Scheduler::RoundRobin);
    world.apply(Change::Service(service("new", &["10.96.0.11"])));
    world.apply(Change::Slice(ready("web-1", "web", &["10.0.0.1", "10.0.0.2", "10.0.0.3"])));
    let report = world.sync();
    assert_eq!(report.applied.real_servers_added, 1, "the rest is served");
    assert_eq!(report.applied.addresses_bound, 1);
    assert_eq!(report.failures.len(), 1);
    assert_eq!(report.failures[0].service, Some(name("new")));
    assert!(!report.failures[0].is_repeated);
    // Again after a second, then after two.
    world.wait(Duration::from_secs(1));
    assert!(world.sync().failures[0].is_repeated);
    world.wait(Duration::from_secs(1));
    assert_eq!(world.sync().failures, []);
    world.kernel().missing_schedulers.clear();
    world.wait(Duration::from_secs(1));
    assert_eq!(world.sync().applied.servers_added, 1);
    assert_eq!(world.reconciler.next_check(), None);
}

#[test]
fn a_refused_real_server_affects_no_other() {
    let mut world = World::new();
    world.kernel().fault = Some(Box::new(|operation| match operation {
        Operation::AddRealServer(_, server) if server.address == ip("224.0.0.1") => Some(Cause::Refused),
        _ => None,
    }));
    world.apply(Change::Service(service("web", &["10.96.0.10"])));
    world.apply(Change::Slice(ready("web-1", "web", &["10.0.0.1", "224.0.0.1"])));
    let report = world.sync();
    assert_eq!(report.failures.len(), 1);
    assert_eq!(world.weights("10.96.0.10", 80), weights(&[("10.0.0.1:8080", 1)]));
}

#[test]
fn a_stale_key_is_reread_and_planned_again_in_the_same_sync() {
    let mut world = web();
    let foreign_servers = world.server("10.96.0.10", 80).clone();
    // Somebody made the virtual server we are about to make, deleted one we are about to change, and bound an address.
    world.kernel().servers.insert(tcp("10.96.0.11", 80), foreign_servers);
    world.kernel().servers.remove(&tcp("10.96.0.10", 80));
    world.kernel().addresses.as_mut().unwrap().insert(ip("10.96.0.11"), 32);
    world.apply(Change::Service(service("new", &["10.96.0.11"])));
    world.apply(Change::Slice(ready("web-1", "web", &["10.0.0.1", "10.0.0.3"])));
    let report = world.sync();
    assert_eq!(report.failures, []);
    let drifted: Vec<String> = report.drifted_keys.iter().map(ToString::to_string).collect();
    let expected = ["virtual server TCP 10.96.0.10:80", "virtual server TCP 10.96.0.11:80"];
    assert_eq!(drifted, expected, "no audit will tell of it");
    world.settle();
    assert_eq!(world.weights("10.96.0.10", 80), weights(&[("10.0.0.1:8080", 1), ("10.0.0.3:8080", 1)]));
    assert_eq!(world.weights("10.96.0.11", 80), weights(&[]));
}

#[test]
fn a_lost_device_comes_back_with_all_its_addresses() {
    let mut world = web();
    world.kernel().addresses = None;
    world.apply(Change::Service(service("new", &["10.96.0.11"])));
    let report = world.sync();
    assert_eq!((report.applied.device_added, report.applied.addresses_bound), (1, 2));
    assert_eq!(report.failures, []);
    assert_eq!(report.drifted_keys.len(), 1, "no audit will tell of it");
}

#[test]
fn a_failed_socket_causes_a_full_dump() {
    let mut world = web();
    let mut fails = true;
    world.kernel().fault = Some(Box::new(move |_| std::mem::take(&mut fails).then_some(Cause::Unknown)));
    world.apply(Change::Slice(ready("web-1", "web", &["10.0.0.1", "10.0.0.2", "10.0.0.3"])));
    assert_eq!(world.sync().failures.len(), 1);
    let dumps = world.kernel().counts.full_dumps;
    let report = world.sync();
    assert_eq!(report.applied.real_servers_added, 1);
    assert_eq!(world.kernel().counts.full_dumps, dumps + 1);
}

#[test]
fn operations_are_sorted_by_phase() {
    let mut world = web();
    world.connections(("10.96.0.10", 80), "10.0.0.1:8080", 1);
    world.kernel().log.clear();
    world.apply(Change::Service(service("gone", &["10.96.0.98"]))).settle();
    world.apply(Change::ServiceDeleted(name("gone")));
    world.apply(Change::Service(service("new", &["10.96.0.11"])));
    world.apply(Change::Slice(ready("new-1", "new", &["10.0.0.7"])));
    world.apply(Change::Slice(ready("web-1", "web", &["10.0.0.2", "10.0.0.3"])));
    world.kernel().log.clear();
    world.sync();
    let phases: Vec<Phase> = world.kernel().log.iter().map(Operation::phase).collect();
    assert_eq!(
        phases,
        [
            Phase::AddToFilter,
            Phase::AddToFilter,
            Phase::AddVirtualServers,
            Phase::AddRealServers,
            Phase::AddRealServers,
            Phase::DeleteUntranslatedFlows,
            Phase::BindVips,
            Phase::RemoveRealServers,
            Phase::UnbindVips,
            Phase::DeleteVirtualServers,
            Phase::RemoveFromFilter,
            Phase::RemoveFromFilter,
        ]
    );
}

#[test]
fn a_cold_start_programs_the_api_server_and_dns_first() {
    let mut dns = Service { name: ObjectName::new("kube-system", "dns"), ..service("dns", &["10.96.0.250"]) };
    dns.ports[0].port = port(53);
    // Whoever may write Services may use port 53 too.
    let mut other = service("another", &["10.96.0.9"]);
    other.ports[0].port = port(53);
    let mut world = World::unsynced(FakeKernel::default(), Policy::new(NODE));
    world.interfaces(ips(&[]));
    for change in [
        Change::Service(service("a", &["10.96.0.10"])),
        Change::Service(other),
        Change::Service(dns),
        Change::Service(service("kubernetes", &["10.96.0.251"])),
        Change::Synced,
    ] {
        world.apply(change);
    }
    world.sync();
    let order: Vec<String> = world
        .kernel()
        .log
        .iter()
        .filter_map(|operation| match operation {
            Operation::BindAddress(address) => Some(address.to_string()),
            _ => None,
        })
        .collect();
    assert_eq!(order, ["10.96.0.250", "10.96.0.251", "10.96.0.9", "10.96.0.10"]);
}

#[test]
fn a_changed_zone_selects_endpoints_again() {
    let hinted = |address: &str, zone: &str| for_zone(zone, endpoint(address));
    let mut world = World::new();
    world.apply(Change::Service(service("web", &["10.96.0.10"])));
    world.apply(Change::Slice(slice("web-1", "web", vec![hinted("10.0.0.1", "a"), hinted("10.0.0.2", "b")])));
    for (zone, expected) in [("a", "10.0.0.1:8080"), ("b", "10.0.0.2:8080")] {
        world.apply(Change::Node(Node { zone: Some(zone.into()), ..Default::default() })).settle();
        assert_eq!(world.weights("10.96.0.10", 80), weights(&[(expected, 1)]));
    }
}

#[test]
fn a_service_deleted_with_a_node_change_is_removed() {
    let mut world = web();
    world.apply(Change::ServiceDeleted(name("web")));
    world.apply(Change::Node(Node { zone: Some("b".into()), ..Default::default() })).settle();
    assert!(world.kernel().servers.is_empty());
}

#[test]
fn a_local_policy_applies_per_front_end() {
    let mut lb = service("web", &["10.96.0.10"]);
    lb.kind = ServiceKind::LoadBalancer;
    lb.load_balancer_ips = vec![ip("203.0.113.1")];
    lb.external_policy = TrafficPolicy::Local;
    let local = Endpoint { node: Some(NODE.into()), ..endpoint("10.0.0.1") };
    let mut world = World::new();
    world.apply(Change::Service(lb)).apply(Change::Slice(slice("web-1", "web", vec![local, endpoint("10.0.0.2")])));
    world.settle();
    assert_eq!(world.weights("203.0.113.1", 80), weights(&[("10.0.0.1:8080", 1)]));
    assert_eq!(world.weights("10.96.0.10", 80).len(), 2);
}

#[test]
fn proof_of_ownership_stays_until_the_server_is_deleted() {
    let mut world = web();
    let mut lies = 1;
    world.kernel().fault = Some(Box::new(move |operation| match operation {
        Operation::DeleteVirtualServer(_) if lies > 0 => {
            lies -= 1;
            Some(Cause::NotFound)
        }
        _ => None,
    }));
    world.apply_all(vec![Change::ServiceDeleted(name("web")), Change::SliceDeleted(name("web-1"))]).settle();
    assert_eq!(world.kernel().servers, BTreeMap::new());
    assert_eq!(world.kernel().filter.front_ends, BTreeMap::new());
}
