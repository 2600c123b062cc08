//! What one Service may have of a node: the budget, and what is left out beyond it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use common::{NODE, World, endpoint, ip, name, port, service};
use ipvs_netlink::Family;
use reconciler::Policy;
use reconciler::budget::ServiceBudget;
use reconciler::contribution::Contribution;
use reconciler::fake::FakeKernel;
use reconciler::node::NodeView;
use reconciler::table::ServiceEntry;
use service_watch::{
    Change, Endpoint, EndpointSlice, Protocol, Service, ServiceKind, ServicePort, SlicePort, TrafficPolicy,
};

fn number(number: usize) -> u16 {
    u16::try_from(number).unwrap()
}

fn address(first: u8, index: usize) -> IpAddr {
    let [_, b, c, d] = u32::try_from(index).unwrap().to_be_bytes();
    [first, b, c, d].into()
}

fn ports(count: usize) -> Vec<ServicePort> {
    let of = |it| ServicePort {
        name: format!("p{it}").into(),
        protocol: Protocol::Tcp,
        port: port(number(it)),
        node_port: None,
    };
    (1..=count).map(of).collect()
}

fn slice_ports(count: usize) -> Vec<SlicePort> {
    let of = |it| SlicePort { name: format!("p{it}").into(), protocol: Protocol::Tcp, port: port(number(it)) };
    (1..=count).map(of).collect()
}

/// A Service of so many ports and external IPs.
fn large(ports_of: usize, external_ips: usize) -> Service {
    let external_ips = (0..external_ips).map(|index| address(20, index)).collect();
    Service { ports: ports(ports_of), external_ips, ..service("large", &["10.96.0.10"]) }
}

/// Slices of a thousand endpoints.
fn slices(ports: usize, endpoints: usize) -> Vec<EndpointSlice> {
    let of = |first: usize| EndpointSlice {
        name: name(&format!("large-{first:06}")),
        service: name("large"),
        is_ipv6: false,
        ports: slice_ports(ports),
        endpoints: (first..endpoints.min(first + 1000))
            .map(|index| Endpoint { address: address(11, index), ..endpoint("10.0.0.1") })
            .collect(),
        trigger_time: None,
    };
    (0..endpoints).step_by(1000).map(of).collect()
}

fn contribution(service: Service, slices: Vec<EndpointSlice>, budget: ServiceBudget) -> Contribution {
    let slices = slices.into_iter().map(|slice| (slice.name.clone(), slice)).collect();
    let entry = ServiceEntry { service: Some(Arc::new(service)), slices, ..ServiceEntry::default() };
    let node = NodeView { node_port_addresses: [ip("192.168.1.1")].into(), ..NodeView::default() };
    Contribution::new(&entry, &node, &Policy { service_budget: budget, ..Policy::new(NODE) })
}

/// Front ends, their real servers, and how many front ends are left out.
fn sums(it: &Contribution) -> (usize, usize, usize) {
    let real_servers = it.servers.values().map(|server| server.real_servers.len()).sum();
    (it.servers.len(), real_servers, it.left_out.map_or(0, |left_out| left_out.front_ends))
}

#[test]
fn a_service_gets_no_more_than_its_budget() {
    let small = ServiceBudget { front_ends: 10, real_servers: 100 };
    for (what, service, slices, expected) in [
        ("fits exactly", large(5, 1), slices(5, 10), (10, 100, 0)),
        ("an external IP too many", large(5, 2), slices(5, 1), (10, 10, 5)),
        ("an endpoint too many", large(5, 1), slices(5, 11), (10, 100, 1)),
        ("endpoints for some front ends only", large(5, 1), slices(5, 20), (5, 100, 5)),
        ("endpoints for a part of one", large(1, 0), slices(1, 130), (1, 100, 1)),
        ("more endpoints than are considered", large(2, 0), slices(2, 60), (2, 100, 1)),
        ("no endpoints", large(11, 0), vec![], (10, 0, 1)),
        ("everything", large(65_535, 2000), slices(20_000, 3000), (1, 100, 65_535 * 2001)),
    ] {
        let contribution = contribution(service, slices, small);
        let (front_ends, real_servers, left_out) = sums(&contribution);
        if what == "everything" {
            assert!(front_ends <= 10 && real_servers <= 100 && left_out > 1_000_000, "{what}");
        } else {
            assert_eq!((front_ends, real_servers, left_out), expected, "{what}");
        }
        let bound = contribution.vips.iter().all(|vip| contribution.servers.keys().any(|it| it.address == *vip));
        assert!(bound, "{what}: a VIP without a front end is not bound");
    }
}

#[test]
fn what_the_cluster_assigned_is_served_first() {
    let node_port = |index: usize, it| ServicePort { node_port: Some(port(number(30_000 + index))), ..it };
    let service = Service {
        kind: ServiceKind::LoadBalancer,
        ports: ports(2).into_iter().enumerate().map(|(index, it)| node_port(index, it)).collect(),
        external_ips: vec![ip("1.1.1.1")],
        load_balancer_ips: vec![ip("1.1.1.2")],
        ..service("large", &["10.96.0.10"])
    };
    let order = [
        ("10.96.0.10", 1),
        ("10.96.0.10", 2),
        ("192.168.1.1", 30_000),
        ("192.168.1.1", 30_001),
        ("1.1.1.2", 1),
        ("1.1.1.2", 2),
        ("1.1.1.1", 1),
        ("1.1.1.1", 2),
    ];
    for front_ends in 1..=order.len() {
        let budget = ServiceBudget { front_ends, ..ServiceBudget::default() };
        let served = contribution(service.clone(), vec![], budget).servers;
        let mut served: Vec<_> = served.keys().map(|it| (it.address.to_string(), it.port)).collect();
        let mut expected: Vec<_> = order[..front_ends].iter().map(|(it, port)| ((*it).to_owned(), *port)).collect();
        served.sort();
        expected.sort();
        assert_eq!(served, expected, "{front_ends}");
    }
}

#[test]
fn the_default_budget_fits_5000_endpoints_at_10_ports_of_10_addresses() {
    let contribution = contribution(large(10, 9), slices(10, 5000), ServiceBudget::default());
    assert_eq!(sums(&contribution), (100, 500_000, 0));
}

#[test]
fn every_port_of_an_address_fits_the_default_budget() {
    assert_eq!(sums(&contribution(large(65_535, 0), vec![], ServiceBudget::default())), (65_535, 0, 0));
}

/// Each of these would take hours if the parts of the objects were multiplied.
#[test]
fn what_objects_multiply_to_costs_no_more_than_the_budget() {
    let budget = ServiceBudget { front_ends: 1000, real_servers: 10_000 };
    let same_name = |count| -> Vec<SlicePort> {
        let of = |it| SlicePort { name: "p1".into(), protocol: Protocol::Tcp, port: port(number(it)) };
        (1..=count).map(of).collect()
    };
    let many_numbers =
        slices(1, 20_000).into_iter().map(|slice| EndpointSlice { ports: same_name(60_000), ..slice }).collect();
    let other_ports = (0..1000)
        .map(|index| EndpointSlice { name: name(&format!("s{index}")), ..slices(1000, 1).remove(0) })
        .collect::<Vec<_>>();
    let local = |service| Service { internal_policy: TrafficPolicy::Local, ..service };
    let mut one_is_local = slices(60_000, 10_000);
    one_is_local[0].endpoints[0].node = Some(NODE.into());
    for (what, service, slices) in [
        ("ports x external IPs", large(65_535, 100_000), vec![]),
        ("ports x external IPs, with endpoints", large(65_535, 100_000), slices(60_000, 1)),
        ("ports x endpoints", large(65_535, 0), slices(60_000, 50_000)),
        ("ports x endpoints, of which one is local", local(large(65_535, 0)), one_is_local),
        ("one port x numbers x endpoints", large(1, 0), many_numbers),
        ("ports x slices of other ports", large(65_535, 0), other_ports),
        ("an external IP many times", large(1, 0), vec![]),
    ] {
        let service = match what {
            "an external IP many times" => Service { external_ips: vec![ip("1.1.1.1"); 1_000_000], ..service },
            _ => service,
        };
        let (front_ends, real_servers, _) = sums(&contribution(service, slices, budget));
        assert!(front_ends <= 1000 && real_servers <= 10_000, "{what}: {front_ends}, {real_servers}");
    }
}

#[test]
fn a_service_over_its_budget_is_reported_once_and_counted() {
    let policy = Policy { service_budget: ServiceBudget { front_ends: 2, real_servers: 100 }, ..Policy::new(NODE) };
    let mut world = World::with(FakeKernel::default(), policy, vec![]);
    world.apply(Change::Service(large(3, 0)));
    let report = world.sync();
    let [(service, left_out)] = report.over_budget.as_slice() else { panic!("{:?}", report.over_budget) };
    assert_eq!((service, left_out.front_ends, report.totals.over_budget), (&name("large"), 1, 1));
    for slice in slices(3, 1) {
        world.apply(Change::Slice(slice));
    }
    let report = world.sync();
    assert!(report.over_budget.is_empty() && report.totals.over_budget == 1, "{:?}", report.over_budget);
    world.apply(Change::Service(large(2, 0)));
    assert_eq!(world.sync().totals.over_budget, 0);
    world.apply(Change::Service(large(3, 0)));
    assert_eq!(world.sync().over_budget.len(), 1, "again");
    world.apply(Change::ServiceDeleted(name("large")));
    assert_eq!(world.sync().totals.over_budget, 0);
}

#[test]
fn a_service_within_its_budget_is_served_as_without() {
    let service = || Service { affinity_seconds: Some(10), ..large(7, 3) };
    let contribution = |budget| contribution(service(), slices(5, 20), budget);
    let (without, exactly) =
        (contribution(ServiceBudget::default()), contribution(ServiceBudget { front_ends: 28, real_servers: 400 }));
    assert_eq!(without, exactly);
    let by_address = without.servers.keys().fold(BTreeMap::new(), |mut counts: BTreeMap<_, usize>, it| {
        *counts.entry(it.address).or_default() += 1;
        counts
    });
    assert!(by_address.len() == 4 && by_address.values().all(|count| *count == 7));
    assert!(without.servers.keys().all(|it| Family::of(it.address) == Family::Ipv4));
}
