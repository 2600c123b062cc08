//! Random histories of changes: whatever the path, the kernel ends up where the objects alone would have led it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use common::{NODE, World, ip, port};
use ipvs_netlink::{Family, Forwarding, Persistence, RealServer, Scheduler, SchedulerFlags};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use reconciler::Policy;
use reconciler::fake::{FakeKernel, FakeRealServer, FakeServer};
use reconciler::filter::ObservedFilter;
use reconciler::front_end::{FrontEnd, ServerConfig};
use reconciler::kernel::{Cause, Kernel as _, Scope};
use reconciler::mirror::Mirror;
use reconciler::policy::{DetectLocal, NodePortAddresses};
use service_watch::{
    Change, Endpoint, EndpointSlice, Hints, Node, ObjectName, Protocol, Service, ServiceKind, ServicePort, SlicePort,
    TrafficPolicy,
};

const SERVICES: [&str; 4] = ["a", "b", "c", "d"];
const SLICES: [&str; 5] = ["s1", "s2", "s3", "s4", "s5"];
const PORT_NAMES: [&str; 2] = ["http", "dns"];
/// Few addresses, so that Services clash, share VIPs, and have VIPs that the node has too.
/// One is a pod's sometimes.
const VIPS: [&str; 7] = ["203.0.113.1", "203.0.113.2", "192.168.1.1", "10.0.0.3", "fd03::1", "fd03::2", "fd01::1"];
const ENDPOINTS: [&str; 6] = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1", "fd00::2", "fd00::3"];
const RANGES: [&str; 5] = ["10.0.0.0/8", "10.1.2.3/16", "0.0.0.0/0", "fd00::/8", "192.168.1.1/32"];
const INTERFACES: [&str; 5] = ["127.0.0.1", "192.168.1.1", "192.168.1.2", "fd01::1", "fe80::1"];

/// One event of a history.
#[derive(Clone, Debug)]
enum Event {
    Change(Change),
    Interfaces(BTreeSet<IpAddr>),
    Audit,
}

impl Event {
    fn happen(self, world: &mut World) {
        match self {
            Self::Change(change) => world.reconciler.apply(change),
            Self::Interfaces(addresses) => {
                world.interfaces(addresses);
            }
            Self::Audit => {
                world.audit();
            }
        }
    }
}

/// All that exists at some point of a history.
#[derive(Clone, Debug, Default)]
struct Objects {
    services: BTreeMap<ObjectName, Service>,
    slices: BTreeMap<ObjectName, EndpointSlice>,
    node: Option<Node>,
    /// The last Node that had addresses. They stay its own while it has none.
    former_node: Option<Node>,
    peer_nodes: BTreeMap<Arc<str>, Vec<IpAddr>>,
    interfaces: BTreeSet<IpAddr>,
}

impl Objects {
    fn apply(&mut self, event: &Event) {
        match event.clone() {
            Event::Change(Change::Service(service)) => {
                self.services.insert(service.name.clone(), service);
            }
            Event::Change(Change::ServiceDeleted(name)) => {
                self.services.remove(&name);
            }
            Event::Change(Change::Slice(slice)) => {
                self.slices.insert(slice.name.clone(), slice);
            }
            Event::Change(Change::SliceDeleted(name)) => {
                self.slices.remove(&name);
            }
            Event::Change(Change::Node(node)) => {
                if !node.addresses.is_empty() {
                    self.former_node = Some(node.clone());
                }
                self.node = Some(node);
            }
            Event::Change(Change::NodeDeleted) => self.node = None,
            // The former addresses stay its own.
            Event::Change(Change::PeerNode(name, addresses))
                if addresses.is_empty() && self.peer_nodes.contains_key(&name) => {}
            Event::Change(Change::PeerNode(name, addresses)) => {
                self.peer_nodes.insert(name, addresses);
            }
            Event::Change(Change::PeerNodeDeleted(name)) => {
                self.peer_nodes.remove(&name);
            }
            Event::Change(Change::Synced | Change::Incomplete(_) | Change::ApiServerAddresses(_)) | Event::Audit => {}
            Event::Interfaces(addresses) => self.interfaces = addresses,
        }
    }

    /// All of it, in another order than the histories': slices before Services, and backwards.
    fn changes(&self) -> Vec<Change> {
        let slices = self.slices.values().rev().cloned().map(Change::Slice);
        let services = self.services.values().rev().cloned().map(Change::Service);
        let peer_nodes = self.peer_nodes.clone().into_iter();
        let peer_nodes = peer_nodes.map(|(name, addresses)| Change::PeerNode(name, addresses));
        let node = self.node.clone().map_or(Change::NodeDeleted, Change::Node);
        let former = self.former_node.clone().map(Change::Node);
        former.into_iter().chain(slices).chain(services).chain([node]).chain(peer_nodes).collect()
    }

    /// A kernel that an agent has filled that never knew anything else.
    fn fresh_kernel(&self, policy: &Policy) -> FakeKernel {
        let mut world = World::unsynced(FakeKernel::default(), policy.clone());
        world.interfaces(self.interfaces.clone());
        for change in self.changes() {
            world.apply(change);
        }
        world.apply(Change::Synced).settle();
        world.kill()
    }
}

fn name(of: &str) -> ObjectName {
    ObjectName::new("default", of)
}

fn policy_of_traffic() -> impl Strategy<Value = TrafficPolicy> {
    prop_oneof![Just(TrafficPolicy::Cluster), Just(TrafficPolicy::Local)]
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![3 => Just(Protocol::Tcp), 1 => Just(Protocol::Udp), 1 => Just(Protocol::Sctp)]
}

fn addresses(from: &'static [&'static str]) -> impl Strategy<Value = Vec<IpAddr>> {
    subsequence(from.to_vec(), 0..=3).prop_map(|texts| texts.into_iter().map(ip).collect())
}

fn service() -> impl Strategy<Value = Service> {
    let kind = prop_oneof![Just(ServiceKind::ClusterIp), Just(ServiceKind::NodePort), Just(ServiceKind::LoadBalancer)];
    let service_port = (select(&PORT_NAMES[..]), protocol(), 80_u16..83, option::of(30080_u16..30082)).prop_map(
        |(port_name, protocol, number, node_port)| ServicePort {
            name: port_name.into(),
            protocol,
            port: port(number),
            node_port: node_port.map(port),
        },
    );
    let ranges = subsequence(RANGES.to_vec(), 0..=3)
        .prop_map(|texts| texts.into_iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>());
    (
        (0..SERVICES.len(), option::of(0_i64..3), kind, 1_u8..4),
        (addresses(&VIPS), addresses(&VIPS), vec(service_port, 1..3)),
        (option::of(1_u32..3), policy_of_traffic(), policy_of_traffic()),
        (option::of(ranges), option::of(30_000_u16..30_002)),
    )
        .prop_map(
            |(
                (index, created, kind, families),
                (external_ips, load_balancer_ips, ports),
                (affinity_seconds, internal_policy, external_policy),
                (source_ranges, health_check_node_port),
            )| {
                let cluster_ips = [(1, format!("10.96.0.{index}")), (2, format!("fd96::{index}"))];
                Service {
                    name: name(SERVICES[index]),
                    created,
                    kind,
                    cluster_ips: cluster_ips
                        .iter()
                        .filter(|(bit, _)| families & bit != 0)
                        .map(|(_, text)| ip(text))
                        .collect(),
                    external_ips,
                    load_balancer_ips,
                    ports,
                    affinity_seconds,
                    internal_policy,
                    external_policy,
                    source_ranges,
                    health_check_node_port: health_check_node_port.map(port),
                }
            },
        )
}

fn endpoint() -> impl Strategy<Value = Endpoint> {
    let node = prop_oneof![Just(None), Just(Some(NODE)), Just(Some("node-b"))];
    let hints = |of: &'static [&'static str]| subsequence(of.to_vec(), 0..=of.len());
    (
        select(&ENDPOINTS[..]),
        prop::bool::weighted(0.7),
        any::<bool>(),
        prop::bool::weighted(0.3),
        node,
        hints(&["zone-1", "zone-2"]),
        hints(&[NODE]),
    )
        .prop_map(|(address, ready, serving, terminating, node, zones, nodes)| Endpoint {
            address: ip(address),
            ready,
            serving,
            terminating,
            node: node.map(Into::into),
            hints: Some(Box::new(Hints {
                zones: zones.into_iter().map(Into::into).collect(),
                nodes: nodes.into_iter().map(Into::into).collect(),
            })),
        })
}

fn slice() -> impl Strategy<Value = EndpointSlice> {
    let slice_port = (select(&PORT_NAMES[..]), protocol(), 8080_u16..8082)
        .prop_map(|(port_name, protocol, number)| SlicePort { name: port_name.into(), protocol, port: port(number) });
    (select(&SLICES[..]), select(&SERVICES[..]), vec(slice_port, 1..3), vec(endpoint(), 0..4)).prop_map(
        |(slice_name, owner, ports, endpoints)| EndpointSlice {
            name: name(slice_name),
            service: name(owner),
            is_ipv6: false,
            ports,
            endpoints,
            trigger_time: None,
        },
    )
}

fn node() -> impl Strategy<Value = Node> {
    let zone = prop_oneof![Just(None), Just(Some("zone-1")), Just(Some("zone-2"))];
    let pod_cidrs = subsequence(vec!["10.244.1.0/24", "fd00:1::/64"], 0..=2);
    (addresses(&INTERFACES), zone, pod_cidrs).prop_map(|(addresses, zone, pod_cidrs)| Node {
        addresses,
        zone: zone.map(Into::into),
        pod_cidrs: pod_cidrs.into_iter().map(|text| text.parse().unwrap()).collect(),
        is_being_removed: false,
    })
}

fn event() -> impl Strategy<Value = Event> {
    let interfaces = subsequence(INTERFACES.to_vec(), 0..=INTERFACES.len())
        .prop_map(|texts| Event::Interfaces(texts.into_iter().map(ip).collect()));
    prop_oneof![
        6 => service().prop_map(|service| Event::Change(Change::Service(service))),
        8 => slice().prop_map(|slice| Event::Change(Change::Slice(slice))),
        2 => select(&SERVICES[..]).prop_map(|of| Event::Change(Change::ServiceDeleted(name(of)))),
        2 => select(&SLICES[..]).prop_map(|of| Event::Change(Change::SliceDeleted(name(of)))),
        2 => node().prop_map(|node| Event::Change(Change::Node(node))),
        1 => Just(Event::Change(Change::NodeDeleted)),
        1 => (select(vec!["n1", "n2"]), addresses(&VIPS))
            .prop_map(|(name, addresses)| Event::Change(Change::PeerNode(name.into(), addresses))),
        1 => select(vec!["n1", "n2"]).prop_map(|name| Event::Change(Change::PeerNodeDeleted(name.into()))),
        1 => interfaces,
        1 => Just(Event::Audit),
    ]
}

fn policy() -> impl Strategy<Value = Policy> {
    prop_oneof![
        Just(NodePortAddresses::All),
        Just(NodePortAddresses::Primary),
        Just(NodePortAddresses::Within(vec!["192.168.0.0/16".parse().unwrap()])),
    ]
    .prop_flat_map(|node_port_addresses| {
        let detect = prop_oneof![
            Just(DetectLocal::ClusterCidr(vec![])),
            Just(DetectLocal::NodeCidr),
            Just(DetectLocal::BridgeInterface("cni0".to_owned()))
        ];
        detect.prop_map(move |detect_local| Policy {
            node_port_addresses: node_port_addresses.clone(),
            detect_local,
            ..Policy::new(NODE)
        })
    })
}

/// What a kernel answers to one operation after the other in the place of carrying it out, and whether all of that is true:
/// that something exists, or does not, is false here.
fn failures() -> impl Strategy<Value = (bool, Vec<Option<Cause>>)> {
    const HONEST: &[Cause] = &[Cause::Refused, Cause::Unknown];
    const ALL: &[Cause] = &[Cause::Exists, Cause::NotFound, Cause::NoDevice, Cause::Refused, Cause::Unknown];
    let causes = |of: &'static [Cause]| vec(prop_oneof![6 => Just(None), 4 => select(of).prop_map(Some)], 1..60);
    prop_oneof![(Just(true), causes(HONEST)), (Just(false), causes(ALL))]
}

/// What clients see: everything but how it came about.
fn visible(kernel: &FakeKernel) -> (&BTreeMap<FrontEnd, FakeServer>, Vec<IpAddr>, &ObservedFilter) {
    let addresses = kernel.addresses.iter().flat_map(|addresses| addresses.keys().copied()).collect();
    (&kernel.servers, addresses, &kernel.filter)
}

/// The virtual servers that nothing proves to be this agent's, and none is in the place of one that is wanted.
fn foreign_servers(kernel: &mut FakeKernel) -> BTreeMap<FrontEnd, FakeServer> {
    let mirror = Mirror::from_dump(kernel.dump(Scope::All).unwrap());
    let foreign_servers = kernel.servers.iter().filter(|(front_end, _)| !mirror.is_owned(front_end));
    foreign_servers.map(|(front_end, server)| (*front_end, server.clone())).collect()
}

/// A kernel in which somebody has been before: an earlier run, another version, or a person with ipvsadm.
fn kernel() -> impl Strategy<Value = FakeKernel> {
    let real_server = (select(&ENDPOINTS[..]), 8080_u16..8082, 0_u32..3, any::<bool>(), 0_u32..2).prop_map(
        |(address, number, weight, is_direct, upper_threshold)| {
            let mut server = RealServer { weight, upper_threshold, ..RealServer::new((ip(address), number).into()) };
            if is_direct {
                server.forwarding = Forwarding::DirectRoute;
            }
            server
        },
    );
    let config = (select(&Scheduler::ALL[..]), option::of(1_u32..3), any::<bool>());
    let addresses = ["10.96.0.0", "10.96.0.1", "fd96::0", "203.0.113.1", "fd03::1", "192.168.1.1", "10.77.0.1"];
    let front_end = (select(addresses.to_vec()), 80_u16..83, protocol());
    let servers = vec((front_end, config, vec(real_server, 0..4)), 0..6);
    let bound = option::of(subsequence(addresses.to_vec(), 0..5));
    (servers, bound).prop_map(|(servers, bound)| {
        let servers =
            servers.into_iter().map(|((address, port, protocol), (scheduler, persistence, one_packet), real)| {
                let front_end = FrontEnd { address: ip(address), port, protocol };
                let config = ServerConfig {
                    scheduler,
                    scheduler_flags: SchedulerFlags::NONE,
                    persistence: persistence.map(|timeout| Persistence::new(timeout, Family::of(front_end.address))),
                    engine: None,
                    one_packet,
                };
                let real = real.into_iter().filter(|server| server.address.is_ipv4() == front_end.address.is_ipv4());
                let real_servers =
                    real.map(|server| (server.socket_address(), FakeRealServer { server, connections: 0 }));
                (front_end, FakeServer { config, real_servers: real_servers.collect() })
            });
        let full = |address: IpAddr| (address, if address.is_ipv4() { 32 } else { 128 });
        FakeKernel {
            servers: servers.collect(),
            addresses: bound.map(|bound| bound.into_iter().map(|address| full(ip(address))).collect()),
            ..FakeKernel::default()
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn the_final_state_depends_only_on_the_objects(policy in policy(), history in vec(event(), 1..16)) {
        let mut objects = Objects::default();
        let mut world = World::unsynced(FakeKernel::default(), policy.clone());
        world.apply(Change::Synced).settle();
        for event in history {
            objects.apply(&event);
            event.happen(&mut world);
            world.settle();
            let fresh = objects.fresh_kernel(&policy);
            prop_assert_eq!(visible(world.kernel()), visible(&fresh));
            let again = world.audit();
            prop_assert_eq!(again.applied.total(), 0, "a second plan is empty");
            prop_assert_eq!(again.failures, vec![]);
        }
    }

    #[test]
    fn any_kernel_state_converges_to_the_objects(
        mut kernel in kernel(),
        history in vec(event(), 1..16),
    ) {
        let foreign_servers = foreign_servers(&mut kernel);
        let (mut objects, policy) = (Objects::default(), Policy::new(NODE));
        for event in &history {
            objects.apply(event);
        }
        let mut world = World::unsynced(kernel, policy.clone());
        world.interfaces(objects.interfaces.clone());
        objects.changes().into_iter().for_each(|change| { world.apply(change); });
        world.apply(Change::Synced).settle();
        let mut fresh = objects.fresh_kernel(&policy);
        for (front_end, server) in foreign_servers {
            fresh.servers.entry(front_end).or_insert(server);
        }
        prop_assert_eq!(visible(world.kernel()), visible(&fresh));
        prop_assert_eq!(world.audit().applied.total(), 0, "a second plan is empty");
    }

    #[test]
    fn failures_and_drift_are_repaired_by_the_next_audit(
        history in vec(event(), 1..16),
        failures in failures(),
    ) {
        let (is_honest, causes) = failures;
        let (mut objects, policy) = (Objects::default(), Policy::new(NODE));
        let mut world = World::unsynced(FakeKernel::default(), policy.clone());
        world.apply(Change::Synced).settle();
        let mut causes = causes.into_iter();
        world.kernel().fault = Some(Box::new(move |_| causes.next().flatten()));
        for event in history {
            objects.apply(&event);
            event.happen(&mut world);
            world.sync();
        }
        world.kernel().fault = None;
        world.settle();
        let mut fresh = objects.fresh_kernel(&policy);
        if !is_honest {
            world.audit();
            world.settle();
            // One that was said not to be there is nobody's.
            fresh.servers.extend(foreign_servers(world.kernel()));
        }
        prop_assert_eq!(visible(world.kernel()), visible(&fresh));
    }

    #[test]
    fn a_kill_after_any_operation_keeps_service_and_recovers(
        policy in policy(),
        before in vec(event(), 1..12),
        after in vec(event(), 1..6),
        operations in 0_usize..60,
    ) {
        let mut objects = Objects::default();
        let mut world = World::unsynced(FakeKernel::default(), policy.clone());
        world.apply(Change::Synced).settle();
        for event in before {
            objects.apply(&event);
            event.happen(&mut world);
        }
        world.settle();
        let before = objects.fresh_kernel(&policy);
        let mut left = operations;
        world.kernel().fault = Some(Box::new(move |_| {
            let is_alive = left > 0;
            left = left.saturating_sub(1);
            (!is_alive).then_some(Cause::Refused)
        }));
        // All at once: what goes for a moment and comes back is not there in between.
        for event in after.into_iter().filter(|event| !matches!(event, Event::Audit)) {
            objects.apply(&event);
            event.happen(&mut world);
        }
        world.sync();
        let mut killed = world.kill();
        killed.fault = None;

        let after = objects.fresh_kernel(&policy);
        for (front_end, server) in &before.servers {
            let Some(to_be) = after.servers.get(front_end) else { continue };
            let held = killed.servers.get(front_end);
            prop_assert!(held.is_some(), "{} is missing", front_end);
            for address in server.real_servers.keys().filter(|it| to_be.real_servers.contains_key(it)) {
                let weight = held.and_then(|held| held.real_servers.get(address)).map(|held| held.server.weight);
                prop_assert_eq!(weight, Some(1), "{} of {}", address, front_end);
            }
        }
        for address in before.addresses.iter().flatten().filter(|it| after.addresses.iter().flatten().any(|to_be| to_be == *it)) {
            prop_assert!(killed.addresses.iter().flatten().any(|held| held == address), "{:?} is not bound", address);
        }

        let mut world = World::unsynced(killed, policy.clone());
        world.interfaces(objects.interfaces.clone());
        objects.changes().into_iter().for_each(|change| { world.apply(change); });
        world.apply(Change::Synced).settle();
        prop_assert_eq!(visible(world.kernel()), visible(&after));
    }

    #[test]
    fn changes_synced_together_or_alone_give_the_same_state(policy in policy(), history in vec(event(), 1..30)) {
        let mut objects = Objects::default();
        let mut world = World::unsynced(FakeKernel::default(), policy.clone());
        world.apply(Change::Synced).settle();
        for event in history {
            objects.apply(&event);
            event.happen(&mut world);
        }
        world.settle();
        let fresh = objects.fresh_kernel(&policy);
        prop_assert_eq!(visible(world.kernel()), visible(&fresh));
    }
}
