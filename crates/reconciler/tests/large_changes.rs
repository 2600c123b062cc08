//! Large changes are carried out in parts: between them smaller changes come first, and the order within a large one keeps traffic
//! correct.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use common::{NODE, World, endpoint, ip, name, port, ready, service, slice, tcp};
use reconciler::Policy;
use reconciler::fake::FakeKernel;
use service_watch::{Change, Endpoint, EndpointSlice, Protocol, Service, ServicePort, SlicePort};

/// How many ports the large Service has, from [`FIRST`] on.
const LARGE: u16 = 9000;

/// Not DNS.
const FIRST: u16 = 1000;

fn large(ports: u16) -> Service {
    let of = |number| ServicePort {
        name: format!("p{number}").into(),
        protocol: Protocol::Tcp,
        port: port(number),
        node_port: None,
    };
    Service { ports: (FIRST..FIRST + ports).map(of).collect(), ..service("large", &["10.96.0.99"]) }
}

fn slice_of_large(ports: u16, endpoints: usize) -> EndpointSlice {
    let of = |number| SlicePort { name: format!("p{number}").into(), protocol: Protocol::Tcp, port: port(number) };
    let address = |index: usize| -> IpAddr {
        let [_, b, c, d] = u32::try_from(index).unwrap().to_be_bytes();
        [11, b, c, d].into()
    };
    let endpoints = (0..endpoints).map(|index| Endpoint { address: address(index), ..endpoint("10.0.0.1") });
    EndpointSlice { ports: (FIRST..FIRST + ports).map(of).collect(), ..slice("large", "large", endpoints.collect()) }
}

/// A world that serves a small Service.
fn world() -> World {
    let changes = vec![Change::Service(service("web", &["10.96.0.10"])), web(1)];
    World::with(FakeKernel::default(), Policy::new(NODE), changes)
}

fn web(endpoint: u8) -> Change {
    Change::Slice(ready("web", "web", &[&format!("10.0.0.{endpoint}")]))
}

/// Carries out parts until nothing is left, and returns how many there were. Between them the small Service changes, and each change
/// is in the kernel after one part.
fn parts(world: &mut World, mut look: impl FnMut(&mut World)) -> usize {
    for part in 1.. {
        let endpoint = u8::try_from(1 + part % 250).unwrap();
        world.apply(web(endpoint));
        world.reconciler.sync_part(world.now).unwrap();
        let weights = world.weights("10.96.0.10", 80);
        assert_eq!(weights.get(&format!("10.0.0.{endpoint}:8080")), Some(&1), "part {part}");
        look(world);
        if !world.reconciler.is_dirty() {
            return part;
        }
        assert!(part < 10_000, "it does not end");
    }
    0
}

fn count_of_large(world: &mut World) -> usize {
    world.kernel().servers.keys().filter(|it| it.address == ip("10.96.0.99")).count()
}

fn is_bound(world: &mut World) -> bool {
    world.kernel().addresses.as_ref().is_some_and(|addresses| addresses.contains_key(&ip("10.96.0.99")))
}

#[test]
fn small_changes_come_between_the_parts_of_a_large_one() {
    let mut world = world();
    world.apply(Change::Service(large(LARGE)));
    let count = parts(&mut world, |_| {});
    assert!(count > 3, "{count}");
    assert_eq!(count_of_large(&mut world), usize::from(LARGE));
    world.apply(Change::ServiceDeleted(name("large")));
    let count = parts(&mut world, |_| {});
    assert!(count > 1, "{count}");
    assert_eq!(count_of_large(&mut world), 0);
    assert!(world.audit().drifted_keys.is_empty());
}

#[test]
fn a_large_service_is_bound_last_and_unbound_first() {
    let mut world = world();
    world.apply(Change::Service(large(LARGE)));
    parts(&mut world, |world| {
        let count = count_of_large(world);
        assert_eq!(is_bound(world), count == usize::from(LARGE), "{count}");
    });
    world.apply(Change::ServiceDeleted(name("large")));
    parts(&mut world, |world| assert!(!is_bound(world) || count_of_large(world) == usize::from(LARGE)));
    assert!(!is_bound(&mut world));
}

#[test]
fn a_virtual_server_of_many_real_servers_is_filled_in_parts() {
    let mut world = world();
    let held =
        |world: &mut World| world.kernel().servers.get(&tcp("10.96.0.99", FIRST)).map_or(0, |it| it.real_servers.len());
    world.apply(Change::Service(large(1))).apply(Change::Slice(slice_of_large(1, 9000)));
    let mut before = 0;
    let count = parts(&mut world, |world| {
        let now = held(world);
        assert!(now - before <= 4000, "{now} after {before}");
        assert!(!is_bound(world) || now == 9000);
        before = now;
    });
    assert!(count > 2, "{count}");
    assert_eq!(held(&mut world), 9000);
    // All others, so that every one is replaced: none goes before its successors have come.
    let mut others = slice_of_large(1, 18_000);
    others.endpoints.drain(..9000);
    world.apply(Change::Slice(others));
    parts(&mut world, |world| {
        let weights = world.weights("10.96.0.99", FIRST);
        let (live, draining) =
            weights.values().fold(
                (0, 0),
                |(live, draining), weight| {
                    if *weight > 0 { (live + 1, draining) } else { (live, draining + 1) }
                },
            );
        assert!(draining == 0 || live >= 9000, "{live} live, {draining} drain");
    });
    world.wait(Duration::from_secs(1)).settle();
    assert_eq!(held(&mut world), 9000);
}

#[test]
fn a_large_service_that_changes_all_the_time_ends_as_its_last_version() {
    let mut world = world();
    for round in 0..10 {
        world.apply(Change::Service(large(LARGE - round))).apply(Change::Slice(slice_of_large(100 + round, 3)));
        world.apply(web(u8::try_from(round + 1).unwrap()));
        world.reconciler.sync_part(world.now).unwrap();
        assert!(world.weights("10.96.0.10", 80).contains_key(&format!("10.0.0.{}:8080", round + 1)));
    }
    world.settle();
    let mut fresh = self::world();
    fresh.apply(Change::Service(large(LARGE - 9))).apply(Change::Slice(slice_of_large(109, 3))).apply(web(10)).settle();
    let state = |world: &mut World| -> BTreeMap<_, Vec<_>> {
        let servers = world.kernel().servers.iter();
        servers.map(|(front_end, held)| (*front_end, held.real_servers.keys().copied().collect())).collect()
    };
    assert_eq!(state(&mut world), state(&mut fresh));
    assert!(world.audit().drifted_keys.is_empty());
}

#[test]
fn an_agent_that_ends_between_parts_is_continued_by_the_next() {
    let changes = || {
        vec![
            Change::Service(service("web", &["10.96.0.10"])),
            web(1),
            Change::Service(large(LARGE)),
            Change::Slice(slice_of_large(200, 5)),
        ]
    };
    for parts in [1, 2, 4] {
        let mut world = world();
        world.apply_all(changes());
        (0..parts).for_each(|_| drop(world.reconciler.sync_part(world.now).unwrap()));
        let mut next = World::with(world.kill(), Policy::new(NODE), changes());
        assert_eq!(count_of_large(&mut next), usize::from(LARGE), "{parts}");
        assert!(is_bound(&mut next) && next.audit().drifted_keys.is_empty(), "{parts}");
    }
}

#[test]
fn a_large_audit_reads_in_parts_and_finds_all_drift() {
    let mut world = world();
    world.apply(Change::Service(large(31_000))).apply(Change::Slice(slice_of_large(100, 1))).settle();
    world.kernel().servers.remove(&tcp("10.96.0.99", FIRST + 7));
    world.server("10.96.0.99", FIRST + 8).real_servers.clear();
    let first = world.reconciler.audit_part(world.now).unwrap();
    assert!(world.reconciler.is_dirty(), "real servers are left");
    let mut drifted = first.drifted_keys;
    let mut count = 0;
    while world.reconciler.is_dirty() {
        count += 1;
        let endpoint = u8::try_from(1 + count % 250).unwrap();
        world.apply(web(endpoint));
        drifted.extend(world.reconciler.sync_part(world.now).unwrap().drifted_keys);
        assert!(world.weights("10.96.0.10", 80).contains_key(&format!("10.0.0.{endpoint}:8080")));
    }
    let drifted: Vec<String> = drifted.iter().map(ToString::to_string).collect();
    assert_eq!(drifted.len(), 2, "{drifted:?}");
    assert!(count > 10, "{count}");
    assert_eq!(world.server("10.96.0.99", FIRST + 8).real_servers.len(), 1);
    assert_eq!(count_of_large(&mut world), 31_000);
}

#[test]
fn the_first_audit_serves_small_services_before_a_large_one() {
    let mut world = World::unsynced(FakeKernel::default(), Policy::new(NODE));
    let changes =
        vec![Change::Service(large(LARGE)), Change::Service(service("web", &["10.96.0.10"])), web(1), Change::Synced];
    world.apply_all(changes);
    let report = world.reconciler.sync_part(world.now).unwrap();
    assert!(report.is_first_audit && report.left > 0);
    assert_eq!(world.weights("10.96.0.10", 80).len(), 1);
    assert!(!is_bound(&mut world));
    world.settle();
    assert!(is_bound(&mut world) && count_of_large(&mut world) == usize::from(LARGE));
}
