//! Who may write Services must not become the node, another Service or the API server: a table of what they may try, and what
//! comes of it. (Addresses that are nobody's in a network, such as 127.0.0.1, get no further than `service-watch`.)

mod common;

use common::{NODE, World, endpoint, ip, ips, port, reached_at, ready, service, tcp};
use reconciler::Policy;
use reconciler::contribution::AddressOwner;
use reconciler::fake::FakeKernel;
use reconciler::filter::SourceRangesElement;
use reconciler::policy::PodAddresses;
use service_watch::{Change, Endpoint, Node, ObjectName, Service, ServiceKind, ServicePort, TrafficPolicy};

const OWN: &str = "192.168.1.1";
const OTHER_NODE: &str = "192.168.1.2";
const API_SERVER: &str = "192.168.1.9";
const API_SERVER_BY_KUBECONFIG: &str = "203.0.113.99";
/// An address of an interface of this node, of which its Node says nothing.
const INTERFACE: &str = "172.17.0.1";

/// A cluster with a victim, of which the hostile Service is older.
fn cluster() -> World {
    let policy = Policy { api_servers: vec![ip(API_SERVER_BY_KUBECONFIG)], ..Policy::new(NODE) };
    let mut world = World::with(FakeKernel::default(), policy, vec![]);
    world.interfaces(ips(&["127.0.0.1", OWN, INTERFACE]));
    let node = Node { addresses: vec![ip(OWN)], ..Node::default() };
    let ports = vec![ServicePort { node_port: Some(port(30080)), ..service("x", &[]).ports.remove(0) }];
    let victim =
        Service { created: Some(100), kind: ServiceKind::NodePort, ports, ..service("victim", &["10.96.0.10"]) };
    world.apply_all(vec![
        Change::Node(node),
        Change::PeerNode("node-b".into(), vec![ip(OTHER_NODE)]),
        Change::Service(service("kubernetes", &["10.96.0.1"])),
        Change::Slice(ready("kubernetes", "kubernetes", &[API_SERVER])),
        Change::Service(victim),
        Change::Slice(ready("victim-1", "victim", &["10.0.0.1"])),
        Change::Slice(ready("hostile-1", "hostile", &["10.66.6.6"])),
    ]);
    world.settle();
    world
}

/// What the hostile Service is like but for what it tries.
fn hostile() -> Service {
    Service { created: Some(1), kind: ServiceKind::LoadBalancer, ..service("hostile", &["10.96.0.66"]) }
}

/// What comes of an address that a Service asks for.
#[derive(Debug, PartialEq, Eq)]
enum AddressTreatment {
    /// Neither served nor bound, and told.
    Refused(AddressOwner),
    /// Served at that port, and the address is this node's.
    Served,
    /// Served at that port of an address that stays the interface's: every other port is as before.
    ServedAtOnePort,
    /// It stays the other Service's, and that is told.
    LeftToTheOther,
}

#[test]
fn external_addresses_with_another_owner_are_not_served() {
    for (address, number, fate) in [
        (OWN, 80, AddressTreatment::Refused(AddressOwner::Node)),
        (OTHER_NODE, 80, AddressTreatment::Refused(AddressOwner::Node)),
        (API_SERVER, 80, AddressTreatment::Refused(AddressOwner::ApiServer)),
        (API_SERVER_BY_KUBECONFIG, 80, AddressTreatment::Refused(AddressOwner::ApiServer)),
        (INTERFACE, 80, AddressTreatment::ServedAtOnePort),
        (INTERFACE, 30080, AddressTreatment::LeftToTheOther),
        ("10.96.0.10", 80, AddressTreatment::LeftToTheOther),
        ("10.96.0.10", 81, AddressTreatment::Served),
        ("203.0.113.1", 80, AddressTreatment::Served),
    ] {
        for is_by_balancer in [false, true] {
            let mut world = cluster();
            let addresses = vec![ip(address)];
            let (external_ips, load_balancer_ips) =
                if is_by_balancer { (vec![], addresses) } else { (addresses, vec![]) };
            let ports = vec![ServicePort { port: port(number), ..hostile().ports.remove(0) }];
            world.apply(Change::Service(Service { external_ips, load_balancer_ips, ports, ..hostile() }));
            let report = world.sync();
            world.settle();
            let is_refused =
                report.refused_vips.iter().find(|(_, vip, _)| *vip == ip(address)).map(|(.., holder)| *holder);
            let is_served = world.kernel().servers.get(&tcp(address, number)).is_some_and(|server| {
                server.real_servers.keys().any(|real_server| real_server.ip() == ip("10.66.6.6"))
            });
            let is_bound = world.kernel().addresses.as_ref().unwrap().contains_key(&ip(address));
            let is_clash = report.conflicts.iter().any(|clash| {
                (clash.winner.name(), clash.loser.name()) == ("victim", "hostile")
                    && clash.front_end.address == ip(address)
            });
            let found = match (is_refused, is_served, is_bound, is_clash) {
                (Some(holder), false, false, false) => AddressTreatment::Refused(holder),
                (None, true, true, false) => AddressTreatment::Served,
                (None, true, false, false) => AddressTreatment::ServedAtOnePort,
                (None, false, _, true) => AddressTreatment::LeftToTheOther,
                other => panic!("{address}:{number}: {other:?}"),
            };
            assert_eq!(found, fate, "{address}:{number}");
            // Whatever it tried, the victim is served as before.
            for (address, number) in [("10.96.0.10", 80), (OWN, 30080)] {
                assert_eq!(world.weights(address, number), [("10.0.0.1:8080".to_owned(), 1)].into());
            }
            // And it itself on the address it was given.
            assert!(world.kernel().servers.contains_key(&tcp("10.96.0.66", number)));
        }
    }
}

#[test]
fn an_allocated_cluster_ip_takes_precedence_over_external_ips() {
    let mut world = cluster();
    world.apply(Change::Service(Service { external_ips: vec![ip("10.96.0.77")], ..hostile() })).settle();
    assert_eq!(world.weights("10.96.0.77", 80), [("10.66.6.6:8080".to_owned(), 1)].into());
    let late = Service { created: Some(1000), ..service("late", &["10.96.0.77"]) };
    world.apply_all(vec![Change::Service(late), Change::Slice(ready("late-1", "late", &["10.0.0.7"]))]);
    world.settle();
    assert_eq!(world.weights("10.96.0.77", 80)["10.0.0.7:8080"], 1);
    assert!(!world.weights("10.96.0.77", 80).contains_key("10.66.6.6:8080"));
    // When it goes, who asked may have it.
    world
        .apply_all(vec![Change::ServiceDeleted(common::name("late")), Change::SliceDeleted(common::name("late-1"))])
        .settle();
    assert_eq!(world.weights("10.96.0.77", 80), [("10.66.6.6:8080".to_owned(), 1)].into());
}

#[test]
fn an_external_ip_that_becomes_the_cluster_ip_takes_precedence() {
    let mut world = cluster();
    let asks = |name: &str, created, cluster_ip: &str| Service {
        external_ips: vec![ip("10.96.0.77")],
        created: Some(created),
        kind: ServiceKind::LoadBalancer,
        ..service(name, &[cluster_ip])
    };
    world.apply_all(vec![
        Change::Service(asks("hostile", 1, "10.96.0.66")),
        Change::Service(asks("other", 2, "10.96.0.67")),
        Change::Slice(ready("other-1", "other", &["10.0.0.9"])),
    ]);
    world.settle();
    assert!(world.weights("10.96.0.77", 80).contains_key("10.66.6.6:8080"));
    world.apply(Change::Service(asks("other", 2, "10.96.0.77"))).settle();
    assert!(world.weights("10.96.0.77", 80).contains_key("10.0.0.9:8080"));
    assert!(!world.weights("10.96.0.77", 80).contains_key("10.66.6.6:8080"));
}

#[test]
fn services_of_the_control_plane_may_use_api_server_addresses() {
    let mut world = cluster();
    let service = Service {
        name: ObjectName::new("kube-system", "control-plane"),
        load_balancer_ips: vec![ip(API_SERVER_BY_KUBECONFIG)],
        ..hostile()
    };
    world.apply(Change::Service(service)).settle();
    assert!(world.kernel().servers.contains_key(&tcp(API_SERVER_BY_KUBECONFIG, 80)));
}

#[test]
fn a_new_api_server_address_is_taken_from_other_services() {
    let mut world = cluster();
    world.apply(Change::Service(Service { external_ips: vec![ip("192.168.1.8")], ..hostile() })).settle();
    assert!(world.kernel().servers.contains_key(&tcp("192.168.1.8", 80)));
    world.apply(Change::Slice(ready("kubernetes", "kubernetes", &["192.168.1.8"]))).settle();
    assert!(!world.kernel().servers.contains_key(&tcp("192.168.1.8", 80)));
    assert!(!world.kernel().addresses.as_ref().unwrap().contains_key(&ip("192.168.1.8")));
}

#[test]
fn only_the_api_servers_own_slice_defines_api_servers() {
    let mut world = cluster();
    world.apply(Change::Service(Service { external_ips: vec![ip("203.0.113.1")], ..hostile() })).settle();
    // An endpoint that names a node would be a pod's.
    let anybody = Endpoint { node: None, ..endpoint("203.0.113.1") };
    world.apply(Change::Slice(common::slice("kubernetes-2", "kubernetes", vec![anybody]))).settle();
    assert!(world.kernel().servers.contains_key(&tcp("203.0.113.1", 80)));
}

#[test]
fn policy_and_source_ranges_of_a_service_affect_no_other() {
    let mut world = cluster();
    let before = world.kernel().filter.front_ends[&tcp("10.96.0.10", 80)].clone();
    world.apply(Change::Service(Service {
        external_ips: vec![ip("10.96.0.10")],
        load_balancer_ips: vec![ip("10.96.0.10")],
        external_policy: TrafficPolicy::Local,
        source_ranges: Some(vec![]),
        ..hostile()
    }));
    world.apply(Change::Slice(common::slice("hostile-2", "hostile", vec![endpoint("10.66.6.7")]))).settle();
    assert_eq!(world.kernel().filter.front_ends[&tcp("10.96.0.10", 80)], before);
}

/// A Service of port 53 that requests whatever a Service can request, with its slice.
fn of_port_53(namespace: &str, name: &str, cluster_ip: &str, endpoint: &str) -> [Change; 2] {
    let requested = [API_SERVER, "10.96.0.1", "10.96.0.10", "203.0.113.1"].map(ip);
    let ports = vec![ServicePort { port: port(53), node_port: Some(port(30053)), ..hostile().ports.remove(0) }];
    let service = Service {
        name: ObjectName::new(namespace, name),
        external_ips: requested.to_vec(),
        load_balancer_ips: requested.to_vec(),
        health_check_node_port: Some(port(30054)),
        source_ranges: Some(vec![]),
        external_policy: TrafficPolicy::Local,
        ports,
        ..service(name, &[cluster_ip])
    };
    let slice = service_watch::EndpointSlice {
        name: ObjectName::new(namespace, name),
        service: ObjectName::new(namespace, name),
        ..ready(name, name, &[endpoint])
    };
    [Change::Service(Service { created: Some(1), kind: ServiceKind::LoadBalancer, ..service }), Change::Slice(slice)]
}

#[test]
fn only_cluster_ips_of_the_control_plane_are_served_ahead() {
    // The own Node, which comes before all Services, and what is served ahead of the rest of the list.
    let ahead = |changes: &[[Change; 2]]| -> (Vec<String>, Vec<String>) {
        let mut world = World::unsynced(FakeKernel::default(), Policy::new(NODE));
        world.interfaces(ips(&["127.0.0.1", OWN]));
        world.apply(Change::Node(Node { addresses: vec![ip(OWN)], ..Node::default() }));
        for change in changes.iter().flatten() {
            world.apply(change.clone());
            world.reconciler.sync_bootstrap(world.now).unwrap();
        }
        let kernel = world.kernel();
        assert!(kernel.filter.source_ranges.is_empty(), "{:?}", kernel.filter.source_ranges);
        let bound = kernel.addresses.iter().flat_map(|addresses| addresses.keys().map(ToString::to_string)).collect();
        (kernel.servers.keys().map(|front_end| format!("{}:{}", front_end.address, front_end.port)).collect(), bound)
    };
    let kubernetes = || {
        let slice = Change::Slice(ready("kubernetes", "kubernetes", &[API_SERVER]));
        [Change::Service(service("kubernetes", &["10.96.0.1"])), slice]
    };
    let none: Vec<String> = Vec::new();
    for (namespace, name) in
        [("default", "dns"), ("default", "kubernetes-2"), ("aaa", "kubernetes"), ("kube-system2", "kube-dns")]
    {
        let hostile = || of_port_53(namespace, name, "10.96.0.66", "10.66.6.6");
        assert_eq!(ahead(&[hostile()]), (none.clone(), none.clone()), "{namespace}/{name}");
        let expected = (vec!["10.96.0.1:80".to_owned()], vec!["10.96.0.1".to_owned()]);
        assert_eq!(ahead(&[hostile(), kubernetes()]), expected, "{namespace}/{name}");
        assert_eq!(ahead(&[kubernetes(), hostile()]), expected, "{namespace}/{name}");
    }
    // What those two request waits for the rest of the list too.
    for (namespace, name) in [("kube-system", "kube-dns"), ("default", "kubernetes")] {
        let own = of_port_53(namespace, name, "10.96.0.53", "10.0.0.53");
        let expected = (vec!["10.96.0.53:53".to_owned()], vec!["10.96.0.53".to_owned()]);
        assert_eq!(ahead(&[own]), expected, "{namespace}/{name}");
    }
}

#[test]
fn what_was_served_ahead_is_completed_with_the_list() {
    let mut world = World::unsynced(FakeKernel::default(), Policy::new(NODE));
    world.interfaces(ips(&["127.0.0.1", OWN]));
    world.apply(Change::Node(Node { addresses: vec![ip(OWN)], ..Node::default() }));
    world.apply_all(of_port_53("kube-system", "kube-dns", "10.96.0.53", "10.0.0.53").into());
    world.reconciler.sync_bootstrap(world.now).unwrap();
    world.apply(Change::Synced).settle();
    for (address, number) in [("10.96.0.53", 53), ("203.0.113.1", 53), (OWN, 30053)] {
        assert_eq!(world.weights(address, number), [("10.0.0.53:8080".to_owned(), 1)].into(), "{address}");
    }
}

/// How a Service comes to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    ClusterIp,
    LoadBalancer,
    /// The same address by both.
    LoadBalancerAndExternal,
    External,
}

#[test]
fn the_origin_of_an_address_decides_before_age_and_name() {
    const SHARED: &str = "10.96.0.77";
    let claim = |name: &str, number: u8, created: i64, origin: Origin| {
        let cluster_ip = if origin == Origin::ClusterIp { SHARED.to_owned() } else { format!("10.96.1.{number}") };
        let has = |origins: &[Origin]| if origins.contains(&origin) { vec![ip(SHARED)] } else { vec![] };
        let service = Service {
            created: Some(created),
            kind: ServiceKind::LoadBalancer,
            external_ips: has(&[Origin::External, Origin::LoadBalancerAndExternal]),
            load_balancer_ips: has(&[Origin::LoadBalancer, Origin::LoadBalancerAndExternal]),
            source_ranges: Some(vec!["198.51.100.0/24".parse().unwrap()]),
            ..service(name, &[&cluster_ip])
        };
        let slice = ready(name, name, &[&format!("10.0.0.{number}")]);
        [Change::Service(service), Change::Slice(slice)]
    };
    let all = [Origin::ClusterIp, Origin::LoadBalancer, Origin::LoadBalancerAndExternal, Origin::External];
    let rank = |origin: Origin| match origin {
        Origin::ClusterIp => 0,
        Origin::LoadBalancer | Origin::LoadBalancerAndExternal => 1,
        Origin::External => 2,
    };
    let pairs = all.iter().flat_map(|a| all.map(|b| (*a, b)));
    for (strong, weak) in pairs.filter(|(strong, weak)| rank(*strong) <= rank(*weak)) {
        // Among equals the older one, which is `weak`.
        let weak_wins = rank(strong) == rank(weak);
        for strong_is_first in [false, true] {
            let mut world = cluster();
            // The weak one is older and the first by name.
            let mut changes = [claim("aaa", 1, 1, weak), claim("zzz", 2, 1000, strong)];
            if strong_is_first {
                changes.reverse();
            }
            let mut conflicts = Vec::new();
            for change in changes {
                world.apply_all(change.into());
                conflicts.extend(world.sync().conflicts);
                world.settle();
            }
            let what = format!("{strong:?} against {weak:?}, first: {strong_is_first}");
            let (endpoint, winner, origin) =
                if weak_wins { ("10.0.0.1", "aaa", weak) } else { ("10.0.0.2", "zzz", strong) };
            assert_eq!(world.weights(SHARED, 80), [(format!("{endpoint}:8080"), 1)].into(), "{what}");
            assert!(conflicts.iter().any(|it| it.winner.name() == winner), "{what}: {conflicts:?}");
            // The source ranges are the owner's, or nobody's.
            let restricted = rank(origin) == 1;
            let expected = if restricted {
                SourceRangesElement::Service(common::name(winner))
            } else {
                SourceRangesElement::Absent
            };
            let ranges = world.kernel().filter.front_ends[&tcp(SHARED, 80)].source_ranges.clone();
            assert_eq!(ranges, expected, "{what}");
            // The owner's deletion gives the front end to the other one, and nothing of the owner stays.
            let loser = if weak_wins { "zzz" } else { "aaa" };
            world.apply(Change::ServiceDeleted(common::name(winner))).settle();
            assert_eq!(world.weights(SHARED, 80).len(), 1, "{what}: {loser}");
            assert!(!world.weights(SHARED, 80).contains_key(&format!("{endpoint}:8080")), "{what}");
        }
    }
}

#[test]
fn a_node_port_comes_before_addresses_of_load_balancers() {
    for is_by_balancer in [false, true] {
        let mut world = cluster();
        let addresses = vec![ip(INTERFACE)];
        let (external_ips, load_balancer_ips) = if is_by_balancer { (vec![], addresses) } else { (addresses, vec![]) };
        let ports = vec![ServicePort { port: port(30080), ..hostile().ports.remove(0) }];
        world.apply(Change::Service(Service { external_ips, load_balancer_ips, ports, ..hostile() })).settle();
        assert_eq!(world.weights(INTERFACE, 30080), [("10.0.0.1:8080".to_owned(), 1)].into());
    }
}

fn is_bound(world: &mut World, address: &str) -> bool {
    world.kernel().addresses.as_ref().is_some_and(|addresses| addresses.contains_key(&ip(address)))
}

/// Lets the hostile Service request an address; whether it is then bound or served.
fn takes(world: &mut World, address: &str) -> bool {
    world.apply(Change::Service(Service { external_ips: vec![ip(address)], ..hostile() })).settle();
    let is_served = world.kernel().servers.contains_key(&tcp(address, 80));
    assert!(is_served || !is_bound(world, address));
    is_served
}

#[test]
fn where_the_api_server_is_reached_is_its_own() {
    let mut world = cluster();
    assert!(takes(&mut world, "203.0.113.7"), "nothing is known of it");
    world.apply(reached_at(&["203.0.113.7:6443", "[fd00::7]:6443"])).settle();
    assert!(!is_bound(&mut world, "203.0.113.7"), "what was taken is given back");
    assert!(!world.kernel().servers.contains_key(&tcp("203.0.113.7", 80)));
    world.apply(reached_at(&["203.0.113.8:6443", "203.0.113.7:6443"])).settle();
    assert!(!takes(&mut world, "203.0.113.7") && !takes(&mut world, "203.0.113.8"));
}

#[test]
fn endpoints_of_the_api_server_stay_its_own_while_they_are_missing() {
    for (missing, name) in [
        (Change::Slice(ready("kubernetes", "kubernetes", &[])), "no endpoint"),
        (Change::SliceDeleted(common::name("kubernetes")), "no slice"),
        (Change::ServiceDeleted(common::name("kubernetes")), "no Service"),
        (Change::Slice(ready("kubernetes", "victim", &[API_SERVER])), "the slice of another Service"),
    ] {
        let mut world = cluster();
        world.apply(missing).settle();
        assert!(!takes(&mut world, API_SERVER), "{name}");
        world.apply(Change::Slice(ready("kubernetes", "kubernetes", &["192.168.1.8"]))).settle();
        assert!(!takes(&mut world, "192.168.1.8"), "{name}");
        assert!(takes(&mut world, API_SERVER), "{name}: another has taken its place");
    }
}

#[test]
fn addresses_of_nodes_stay_theirs_while_they_are_missing() {
    for (missing, address) in [
        (Change::NodeDeleted, OWN),
        (Change::Node(Node::default()), OWN),
        (Change::PeerNode("node-b".into(), vec![]), OTHER_NODE),
    ] {
        let mut world = cluster();
        world.apply(missing.clone()).settle();
        assert!(!takes(&mut world, address), "{missing:?}");
    }
    let mut world = cluster();
    world.apply(Change::Node(Node { addresses: vec![ip("192.168.1.3")], ..Node::default() })).settle();
    assert!(takes(&mut world, OWN), "the Node has another address");
}

#[test]
fn without_a_node_object_no_address_of_an_interface_is_taken() {
    let mut world = World::unsynced(FakeKernel::default(), Policy::new(NODE));
    world.interfaces(ips(&["127.0.0.1", OWN, "10.96.0.66"]));
    world.apply_all(vec![reached_at(&["192.0.2.1:6443"]), Change::Synced]).settle();
    assert!(!takes(&mut world, OWN));
    assert!(world.kernel().servers.contains_key(&tcp("10.96.0.66", 80)), "ClusterIPs are served all the same");
    world.apply(Change::Node(Node { addresses: vec![ip("192.168.1.3")], ..Node::default() })).settle();
    assert!(takes(&mut world, OWN), "it is no address of the Node");
}

#[test]
fn an_address_that_hides_the_api_server_is_unbound_before_the_list() {
    const ADDRESS: &str = "203.0.113.7";
    for (reached, port_of_service, is_released) in [
        ("203.0.113.7:6443", 80, true),
        ("203.0.113.7:80", 80, false),
        ("203.0.113.8:6443", 80, false),
        ("10.96.0.1:443", 443, false),
    ] {
        let mut world = World::new();
        let ports = vec![ServicePort { port: port(port_of_service), ..hostile().ports.remove(0) }];
        let service = Service { external_ips: vec![ip(ADDRESS)], ports, ..service("hostile", &["10.96.0.1"]) };
        world.apply_all(vec![Change::Service(service), Change::Slice(ready("h", "hostile", &["10.66.6.6"]))]).settle();
        let mut world = World::unsynced(world.kill(), Policy::new(NODE));
        assert_eq!(world.reconciler.release_api_server(world.now).unwrap(), None);
        world.apply(reached_at(&[reached]));
        let report = world.reconciler.release_api_server(world.now).unwrap();
        assert_eq!(report.is_some(), is_released, "{reached}");
        assert_eq!(is_bound(&mut world, ADDRESS), !is_released, "{reached}");
        assert!(is_bound(&mut world, "10.96.0.1"), "{reached}");
        assert_eq!(world.reconciler.release_api_server(world.now).unwrap(), None, "once is enough");
    }
}

/// An endpoint of a pod on another node.
const POD: &str = "10.0.0.9";

#[test]
fn addresses_of_pods_are_refused_unless_they_are_allowed() {
    // The address, who has an endpoint there that names a node, the ranges of all pods, and whether it is refused as an external IP
    // and as a load balancer's.
    type Case = (&'static str, Option<&'static str>, &'static [&'static str], [bool; 2]);
    let range = |text: &str| text.parse().unwrap();
    let cases: [Case; 9] = [
        ("10.244.1.9", None, &[], [true, true]),
        ("10.244.7.9", None, &[], [false, false]),
        ("10.244.7.9", None, &["10.244.0.0/16"], [true, true]),
        ("10.244.7.9", None, &["fd00::/8", "10.244.0.0/16"], [true, true]),
        ("203.0.113.9", None, &["0.0.0.0/0"], [false, false]),
        (POD, Some("other"), &[], [true, true]),
        (POD, Some("hostile"), &[], [false, false]),
        // A slice of a user takes no address that a load balancer assigned.
        (POD, Some("other"), &["10.244.0.0/16"], [true, false]),
        (POD, Some("other"), &["fd00::/8"], [true, true]),
    ];
    for (address, pod_of, ranges, expected) in cases {
        for (is_by_balancer, is_refused) in [false, true].into_iter().zip(expected) {
            for allows_pod_addresses in [false, true] {
                let ranges_of_pods = ranges.iter().map(|text| range(text)).collect();
                let pod_addresses =
                    if allows_pod_addresses { PodAddresses::Allowed } else { PodAddresses::Refused(ranges_of_pods) };
                let policy = Policy { pod_addresses, ..Policy::new(NODE) };
                let mut world = World::with(FakeKernel::default(), policy, vec![]);
                let pod_cidrs = vec![range("10.244.1.0/24")];
                world.apply(Change::Node(Node { addresses: vec![ip(OWN)], pod_cidrs, ..Node::default() }));
                if let Some(service) = pod_of {
                    world.apply(Change::Slice(ready("pods", service, &["10.0.0.8", POD])));
                }
                let (external_ips, load_balancer_ips) =
                    if is_by_balancer { (vec![], vec![ip(address)]) } else { (vec![ip(address)], vec![]) };
                world.apply(Change::Service(Service { external_ips, load_balancer_ips, ..hostile() }));
                let report = world.sync();
                world.settle();
                let is_refused = is_refused && !allows_pod_addresses;
                let what = format!("{address} of {pod_of:?}, {ranges:?}, {is_by_balancer} {allows_pod_addresses}");
                let expected: Vec<_> =
                    is_refused.then(|| (common::name("hostile"), ip(address), AddressOwner::Pod)).into_iter().collect();
                assert_eq!(report.refused_vips, expected, "{what}");
                assert_eq!(is_bound(&mut world, address), !is_refused, "{what}");
                assert_eq!(world.kernel().servers.contains_key(&tcp(address, 80)), !is_refused, "{what}");
            }
        }
    }
}

#[test]
fn an_address_is_given_to_the_pod_and_back_as_endpoints_change() {
    let without_node = || common::slice("pods", "other", vec![Endpoint { node: None, ..endpoint(POD) }]);
    let mut world = cluster();
    assert!(takes(&mut world, POD));
    for (change, is_taken) in [
        (Change::Slice(without_node()), true),
        (Change::Slice(ready("pods", "other", &[POD])), false),
        (Change::Slice(ready("pods", "hostile", &[POD])), true),
        (Change::Slice(ready("pods", "other", &["10.0.0.8", POD])), false),
        (Change::Slice(ready("more", "third", &[POD])), false),
        (Change::Slice(ready("pods", "other", &["10.0.0.8"])), false),
        (Change::SliceDeleted(common::name("more")), true),
        (Change::Slice(ready("pods", "other", &[POD])), false),
        // Without the address and with it again.
        (Change::Service(hostile()), false),
        (Change::SliceDeleted(common::name("pods")), false),
        (Change::Service(Service { load_balancer_ips: vec![ip(POD)], ..hostile() }), true),
        (Change::Slice(ready("pods", "other", &[POD])), false),
        (Change::ServiceDeleted(common::name("hostile")), false),
        (Change::Service(Service { external_ips: vec![ip(POD)], ..hostile() }), false),
        (Change::SliceDeleted(common::name("pods")), true),
    ] {
        world.apply(change.clone()).settle();
        assert_eq!(is_bound(&mut world, POD), is_taken, "{change:?}");
        assert_eq!(world.kernel().servers.contains_key(&tcp(POD, 80)), is_taken, "{change:?}");
    }
}
