//! Every operation there is, refused in every way: what concerns others is done, it is tried again ever more rarely, and once the
//! kernel has no objection everything is as if it never had one.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{NODE, World, endpoint, ip, ips, name, port, ready, service, slice, tcp};
use reconciler::Policy;
use reconciler::binding::{VipBinding, VipRanges};
use reconciler::fake::{FakeKernel, FakeServer};
use reconciler::filter::ObservedFilter;
use reconciler::front_end::FrontEnd;
use reconciler::kernel::Cause;
use reconciler::plan::Operation;
use reconciler::report::SyncReport;
use service_watch::{Change, Protocol, Service, ServiceKind, ServicePort};

const CAUSES: [Cause; 5] = [Cause::Exists, Cause::NotFound, Cause::NoDevice, Cause::Refused, Cause::Unknown];

/// What an operation is called in the enumeration.
fn variant(operation: &Operation) -> String {
    let text = format!("{operation:?}");
    text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_owned()
}

fn policies() -> Vec<Policy> {
    let ranges = VipRanges::new(&["10.97.0.0/16".parse().unwrap()]).unwrap();
    [VipBinding::Addresses, VipBinding::Routes(ranges)].map(|binding| Policy { binding, ..Policy::new(NODE) }).into()
}

/// A load balancer with source ranges, a NodePort, and a UDP port.
fn balancer(range: &str) -> Service {
    let mut balancer = service("balancer", &["10.96.0.20"]);
    let udp = ServicePort { name: "dns".into(), protocol: Protocol::Udp, port: port(53), node_port: None };
    balancer.ports[0].node_port = Some(port(30080));
    balancer.ports.push(udp);
    Service {
        kind: ServiceKind::LoadBalancer,
        load_balancer_ips: vec![ip("203.0.113.20")],
        source_ranges: Some(vec![range.parse().unwrap()]),
        ..balancer
    }
}

/// What happens, one after the other; after each comes a sync, and after some an audit.
fn history() -> Vec<Vec<Change>> {
    let mut dns = ready("balancer-2", "balancer", &["10.0.1.1"]);
    dns.ports[0] = service_watch::SlicePort { name: "dns".into(), protocol: Protocol::Udp, port: port(5353) };
    vec![
        vec![
            Change::Service(service("web", &["10.96.0.10"])),
            Change::Slice(ready("web-1", "web", &["10.0.0.1", "10.0.0.2"])),
        ],
        vec![
            Change::Service(balancer("10.0.0.0/8")),
            Change::Slice(ready("balancer-1", "balancer", &["10.0.1.1"])),
            Change::Slice(dns.clone()),
        ],
        vec![
            Change::Service(service("ranged", &["10.97.0.1"])),
            Change::Slice(ready("ranged-1", "ranged", &["10.0.2.1"])),
        ],
        vec![Change::Service(Service { affinity_seconds: Some(60), ..service("web", &["10.96.0.10"]) })],
        vec![Change::Slice(ready("web-1", "web", &["10.0.0.2", "10.0.0.3"]))],
        vec![Change::Service(balancer("192.168.0.0/16")), Change::Slice(slice("balancer-1", "balancer", vec![]))],
        vec![Change::Slice(service_watch::EndpointSlice { endpoints: vec![endpoint("10.0.1.2")], ..dns })],
        vec![Change::ServiceDeleted(name("balancer")), Change::ServiceDeleted(name("ranged"))],
        vec![Change::Slice(ready("web-1", "web", &["10.0.0.1", "10.0.0.3"]))],
    ]
}

/// Plays the history, with somebody who changes a weight in between; returns the outcomes.
fn play(world: &mut World) -> Vec<SyncReport> {
    let mut outcomes = Vec::new();
    for (index, changes) in history().into_iter().enumerate() {
        world.apply_all(changes);
        outcomes.extend(world.reconciler.sync(world.now));
        if let Some(held) =
            world.kernel().servers.get_mut(&tcp("10.96.0.10", 80)).and_then(|it| it.real_servers.values_mut().next())
        {
            held.server.weight = 7;
        }
        if index % 3 == 1 {
            outcomes.extend(world.reconciler.audit(world.now));
        }
        world.wait(Duration::from_millis(300));
    }
    outcomes
}

fn world(policy: &Policy) -> World {
    let mut world = World::unsynced(FakeKernel::default(), policy.clone());
    world.interfaces(ips(&["127.0.0.1", "192.168.1.1"]));
    world.apply(Change::Synced);
    world
}

/// What clients see.
fn visible(
    world: &mut World,
) -> (BTreeMap<FrontEnd, FakeServer>, Option<BTreeSet<IpAddr>>, BTreeSet<ipnet::IpNet>, ObservedFilter) {
    let kernel = world.kernel();
    let addresses = kernel.addresses.as_ref().map(|addresses| addresses.keys().copied().collect());
    (kernel.servers.clone(), addresses, kernel.routes.clone(), kernel.filter.clone())
}

/// Every kind of operation that the history takes.
fn variants(policy: &Policy) -> BTreeSet<String> {
    let mut world = world(policy);
    play(&mut world);
    world.reconciler.audit(world.now).unwrap();
    world.settle();
    world.kernel().log.iter().map(variant).collect()
}

#[test]
fn the_history_contains_every_operation() {
    let all: BTreeSet<String> = policies().iter().flat_map(variants).collect();
    let expected = [
        "BuildTable",
        "SetSourceRanges",
        "SetFrontEnd",
        "AddElement",
        "AddDevice",
        "SetDeviceUp",
        "AddVirtualServer",
        "SetVirtualServer",
        "AddRealServer",
        "SetRealServer",
        "DeleteUntranslatedFlows",
        "BindAddress",
        "AddRoute",
        "DrainRealServer",
        "DeleteRealServer",
        "UnbindAddress",
        "RemoveRoute",
        "DeleteVirtualServer",
        "DeleteStaleFlows",
        "RemoveFrontEnd",
        "RemoveElement",
        "AddRoutedVip",
        "RemoveRoutedVip",
        "RemoveSourceRanges",
    ];
    assert_eq!(all, expected.into_iter().map(str::to_owned).collect());
}

#[test]
fn any_operation_refused_a_few_times_succeeds_in_the_end() {
    for policy in policies() {
        let mut honest = world(&policy);
        play(&mut honest);
        honest.reconciler.audit(honest.now).unwrap();
        honest.settle();
        let right = visible(&mut honest);
        for refused in variants(&policy) {
            for cause in CAUSES {
                let mut world = world(&policy);
                let (mut left, kind) = (3, refused.clone());
                world.kernel().fault = Some(Box::new(move |operation| {
                    let is_refused = left > 0 && variant(operation) == kind;
                    left -= u32::from(is_refused);
                    is_refused.then_some(cause)
                }));
                let outcomes = play(&mut world);
                world.kernel().fault = None;
                world.wait(Duration::from_secs(60));
                world.reconciler.audit(world.now).unwrap();
                world.settle();
                assert_eq!(visible(&mut world), right, "{refused} {cause:?}, {:?}", policy.binding);
                assert_eq!(world.audit().failures, [], "{refused} {cause:?}");
                let is_told = outcomes.iter().any(|report| !report.failures.is_empty());
                assert!(is_told || cause != Cause::Refused, "{refused} was refused, and nobody is told");
            }
        }
    }
}

#[test]
fn a_permanent_refusal_backs_off_and_affects_no_other_service() {
    for policy in policies() {
        for refused in variants(&policy) {
            let mut world = world(&policy);
            let attempts = Arc::new(Mutex::new(0_u32));
            let (count, kind) = (attempts.clone(), refused.clone());
            world.kernel().fault = Some(Box::new(move |operation| {
                let is_refused = variant(operation) == kind;
                *count.lock().unwrap() += u32::from(is_refused);
                is_refused.then_some(Cause::Refused)
            }));
            play(&mut world);
            *attempts.lock().unwrap() = 0;
            // Ten minutes in which nothing changes: after 1, 2, 4 … 60 s, for each thing.
            world.settle();
            let things = world.reconciler.audit(world.now).unwrap().totals.failing.max(1);
            let tried = *attempts.lock().unwrap();
            assert!(tried as usize <= 24 * things * 2, "{refused}: {tried} times for {things} things in ten minutes");
        }
    }
}

/// One Service that the kernel will have nothing of, and one beside it.
#[test]
fn a_service_with_all_operations_refused_affects_no_other() {
    for policy in policies() {
        for cause in [Cause::Refused, Cause::Exists, Cause::NotFound] {
            let mut world = world(&policy);
            world.kernel().fault = Some(Box::new(move |operation| {
                let is_of_it = format!("{operation:?}").contains("10.96.0.20")
                    || format!("{operation:?}").contains("203.0.113.20");
                // The tables are everybody's.
                (is_of_it && variant(operation) != "BuildTable").then_some(cause)
            }));
            play(&mut world);
            world.wait(Duration::from_secs(60));
            world.reconciler.audit(world.now).unwrap();
            world.settle();
            assert_eq!(
                world.weights("10.96.0.10", 80),
                [("10.0.0.1:8080".to_owned(), 1), ("10.0.0.3:8080".to_owned(), 1)].into(),
                "{cause:?}"
            );
        }
    }
}
