//! VIPs by routes: they are served as those that are addresses, what is no VIP reaches nobody, one way takes the other's place
//! without a gap, and what somebody takes away comes back.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use lab::link;
use lab::netns::Namespace;
use serde_json::json;

use crate::common::{Agent, Manifests, addresses, has_tables, run};
use crate::network::{CLUSTER_CIDR, Network, masqueraded};
use crate::objects::{manifests, ready, service};
use crate::traffic::{Flow, SILENCE, Server, tcp, udp_within};
use crate::{FLAGS, Over, serving};

const BY_ROUTES: &str = "--vip-binding=route";
const RANGES: &str = "--vip-ranges=10.96.0.0/12,fd00:96::/108";
/// What the device has by routes.
const ANCHOR: &str = "127.105.112.118/32";
/// The routing table, and protocols in it: the agent's, and that of routes of an administrator.
const LOCAL: u8 = 255;
const OURS: u8 = 105;
const STATIC: u8 = 4;
const TARGETS: [&str; 4] = ["10.96.0.10:80", "203.0.113.10:80", "[fd00:96::10]:80", "[2001:db8::10]:80"];
const OWN_ROUTES: [&str; 4] = ["10.96.0.10", "203.0.113.10", "2001:db8::10", "fd00:96::10"];
const WITH_RANGES: [&str; 4] = ["10.96.0.0/12", "203.0.113.10", "2001:db8::10", "fd00:96::/108"];

fn web() -> Manifests {
    let spec = json!({
        "clusterIPs": ["10.96.0.10", "fd00:96::10"],
        "externalIPs": ["203.0.113.10", "2001:db8::10"],
    });
    manifests(&[service("web", spec), ready("web", ["10.244.1.1"]), ready("web", ["fd00:244::1"])])
}

/// The destinations of our routes.
fn routes() -> Vec<String> {
    let mut routes = link::routes(LOCAL, OURS, "kube-ipvs0").unwrap();
    routes.sort_by_key(|route| (route.contains(':'), route.clone()));
    routes
}

fn is_bound_by_routes(expected: [&str; 4]) {
    assert_eq!((routes(), addresses()), (expected.map(str::to_owned).to_vec(), vec![ANCHOR.to_owned()]));
}

/// Everybody is served: outside, a pod, and the node.
fn is_served(network: &Network) {
    for target in TARGETS {
        let web = masqueraded("web", target);
        assert_eq!(network.clients[0].tcp(target), web, "{target}");
        assert_eq!(network.clients[0].udp(target), web, "{target}");
        assert_eq!(network.pods[1].tcp(target).map(|answer| answer.backend), Ok("web".to_owned()), "{target}");
        assert_eq!(tcp(target).map(|answer| answer.backend), Ok("web".to_owned()), "{target}");
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn vips_bound_by_routes_are_served_without_addresses() {
    let network = Network::new(1, 2);
    let _server = Server::start(&network.pods[0].namespace, "web", 8080);
    let manifests = web();
    for (flags, expected) in
        [(&[CLUSTER_CIDR, BY_ROUTES][..], OWN_ROUTES), (&[CLUSTER_CIDR, BY_ROUTES, RANGES], WITH_RANGES)]
    {
        let agent = serving(&manifests, flags);
        is_bound_by_routes(expected);
        is_served(&network);
        agent.kill();
        let mut again = manifests.agent(&[&FLAGS[..], flags, &["--once"]].concat());
        assert!(again.ends().success(), "{}", again.log());
        assert!(again.log().contains("audited, nothing to change"), "{}", again.log());
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn addresses_of_a_range_that_are_no_vip_are_refused() {
    const TO_NOBODY: [&str; 4] = ["10.96.0.99:22", "10.111.255.254:22", "[fd00:96::99]:22", "10.96.0.10:22"];
    let network = Network::new(1, 3);
    let _servers = [
        Server::start(&network.pods[0].namespace, "web", 8080),
        Server::start(&Namespace::own().unwrap(), "node", 22),
        Server::start(&Namespace::own().unwrap(), "node", 9),
        Server::start(&network.pods[2].namespace, "host-port", 80),
    ];
    // As a network plugin makes a hostPort: for every address that is the node's.
    run("nft 'table ip hostport { chain prerouting { type nat hook prerouting priority -100; \
         fib daddr type local tcp dport 9 dnat to 10.244.1.3:80; }; \
         chain output { type nat hook output priority -100; fib daddr type local tcp dport 9 dnat to 10.244.1.3:80; }; }'");
    let manifests = web();
    let mut agent = serving(&manifests, &[CLUSTER_CIDR, BY_ROUTES, RANGES, "--ipvs-sync-period=300ms"]);
    let client = &network.clients[0];
    assert_eq!(client.tcp("192.168.1.1:22").map(|answer| answer.backend), Ok("node".to_owned()));
    assert_eq!(client.tcp("192.168.1.1:9").map(|answer| answer.backend), Ok("host-port".to_owned()));
    let refused = Err("refused".to_owned());
    for target in TO_NOBODY {
        assert_eq!(client.tcp(target), refused, "{target}");
        assert_eq!(client.udp(target), refused, "{target}");
        assert_eq!(network.pods[1].tcp(target), refused, "{target}");
        assert_eq!(tcp(target), refused, "{target} from the node");
    }
    for target in ["10.96.0.99:9", "10.96.0.99:80", "[fd00:96::99]:9"] {
        assert_eq!(client.tcp(target), refused, "{target}");
        assert_eq!(tcp(target), refused, "{target} from the node");
    }
    // An address that comes later is the node's all the same.
    link::add_address("eth0", "10.97.0.1/32").unwrap();
    agent.until("know the address", |_| {
        client.tcp("10.97.0.1:22").map(|answer| answer.backend) == Ok("node".to_owned())
    });
    link::delete_address("eth0", "10.97.0.1/32").unwrap();
    // A Service that goes leaves nobody; and one that comes is served as the first.
    manifests.remove("objects.json");
    agent.until("delete the Service", |_| client.tcp("10.96.0.10:80") == refused);
    // The routes go after what they led to.
    agent.until("remove the routes of the VIPs", |_| routes() == ["10.96.0.0/12", "fd00:96::/108"]);
    assert_eq!(client.tcp("10.96.0.10:22"), refused);
    assert_eq!(client.udp("10.96.0.10:80"), refused);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_vip_binding_can_be_changed_without_an_interruption() {
    const WAYS: [&[&str]; 5] = [&[], &[BY_ROUTES], &[BY_ROUTES, RANGES], &[], &[BY_ROUTES, RANGES]];
    let network = Network::new(1, 2);
    let client = &network.clients[0];
    let _server = Server::start(&network.pods[0].namespace, "web", 8080);
    let manifests = web();
    let agent = serving(&manifests, &[CLUSTER_CIDR]);
    agent.kill();
    // Each packet to a VIP asks whether that is the node's, before anything else is done with it.
    run("nft 'table inet watch { chain prerouting { type filter hook prerouting priority -400; \
         ip daddr { 10.96.0.10, 203.0.113.10 } fib daddr type != local counter; \
         ip6 daddr { fd00:96::10, 2001:db8::10 } fib daddr type != local counter; }; }'");
    let are_none_lost = || run("nft list table inet watch").matches("counter packets 0 ").count() == 2;
    let (is_over, tries) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let over = Over(&is_over);
        for target in TARGETS {
            let (is_over, tries) = (&is_over, &tries);
            scope.spawn(move || {
                client.run(|| {
                    while !is_over.load(Ordering::Relaxed) {
                        assert_eq!(tcp(target), masqueraded("web", target), "{target}");
                        tries.fetch_add(1, Ordering::Relaxed);
                    }
                });
            });
            scope.spawn(move || {
                client.run(|| {
                    let flow = Flow::open(target, Duration::from_millis(1)).unwrap();
                    while !is_over.load(Ordering::Relaxed) {
                        let _ = flow.ask();
                        thread::sleep(Duration::from_millis(5));
                    }
                });
            });
        }
        for way in WAYS {
            let flags = [&FLAGS[..], &[CLUSTER_CIDR, "--once"], way].concat();
            let mut agent = manifests.agent(&flags);
            assert!(agent.ends().success(), "{}", agent.log());
            match way {
                [] => assert_eq!(routes(), [""; 0]),
                [_] => is_bound_by_routes(OWN_ROUTES),
                _ => is_bound_by_routes(WITH_RANGES),
            }
            assert!(are_none_lost(), "{way:?}: {}\n{}", run("nft list table inet watch"), agent.log());
            let mut again = manifests.agent(&flags);
            assert!(again.ends().success(), "{}", again.log());
            assert!(again.log().contains("audited, nothing to change"), "{}", again.log());
        }
        drop(over);
    });
    assert!(tries.load(Ordering::Relaxed) > 20, "{tries:?}");
    assert!(are_none_lost(), "{}", run("nft list table inet watch"));
    // The counter counts, where there is something.
    link::delete("kube-ipvs0").unwrap();
    assert!(client.run(|| udp_within(SILENCE, TARGETS[0])).is_err() && !are_none_lost());
    assert!(manifests.agent(&[&FLAGS[..], &[CLUSTER_CIDR, "--once"]].concat()).ends().success());
    is_served(&network);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn an_audit_restores_what_was_removed() {
    type Taking = fn() -> Result<(), lab::Error>;
    let network = Network::new(1, 2);
    let _server = Server::start(&network.pods[0].namespace, "web", 8080);
    let manifests = web();
    let mut agent = serving(&manifests, &[CLUSTER_CIDR, BY_ROUTES, RANGES, "--ipvs-sync-period=300ms"]);
    let expected = WITH_RANGES.map(str::to_owned);
    let takings: [(&str, Taking); 6] = [
        ("the route to a VIP", || link::delete_local_route("203.0.113.10", "kube-ipvs0")),
        ("the route to a range", || link::delete_local_route("10.96.0.0/12", "kube-ipvs0")),
        ("the route to a range of IPv6", || link::delete_local_route("fd00:96::/108", "kube-ipvs0")),
        ("all routes of IPv6, which go with a device that is down", || link::set_down("kube-ipvs0")),
        ("all routes of IPv4, which go with the last address", || link::delete_address("kube-ipvs0", ANCHOR)),
        ("the device", || link::delete("kube-ipvs0")),
    ];
    for (what, take) in takings {
        take().unwrap();
        agent.until(&format!("restore {what}"), |_| routes() == expected && addresses() == [ANCHOR]);
        is_served(&network);
    }
    // Routes of somebody else stay.
    link::add_local_route("10.96.0.0/12", "lo", STATIC).unwrap();
    link::add_local_route("192.0.2.1", "kube-ipvs0", STATIC).unwrap();
    // An address that comes and goes takes nothing along.
    link::add_address("kube-ipvs0", "192.0.2.9/24").unwrap();
    link::delete_address("kube-ipvs0", "192.0.2.9/24").unwrap();
    assert_eq!(routes(), expected);
    agent.audits(2);
    assert_eq!(link::routes(LOCAL, STATIC, "lo").unwrap(), ["10.96.0.0/12"]);
    assert_eq!(link::routes(LOCAL, STATIC, "kube-ipvs0").unwrap(), ["192.0.2.1"]);
    assert_eq!(routes(), expected);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn cleanup_takes_the_routes_too() {
    let _network = Network::new(1, 1);
    let manifests = web();
    for has_foreign_address in [false, true] {
        assert!(manifests.agent(&[&FLAGS[..], &[BY_ROUTES, RANGES, "--once"]].concat()).ends().success());
        if has_foreign_address {
            link::add_address("kube-ipvs0", "10.77.0.1/24").unwrap();
        }
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_kube-ipvs"));
        let mut cleanup = Agent::start_command(command.arg("cleanup"));
        assert!(cleanup.ends().success(), "{}", cleanup.log());
        for device in ["kube-ipvs0", "lo", "eth0", "pod1"] {
            assert_eq!(link::routes(LOCAL, OURS, device).unwrap(), [""; 0], "{device}");
        }
        assert_eq!(link::exists("kube-ipvs0").unwrap(), has_foreign_address);
    }
}

/// The way back to kube-proxy, which binds by addresses: no range may stay open without its guard.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn routes_are_removed_before_the_tables_that_guard_them() {
    let _network = Network::new(1, 1);
    let manifests = web();
    assert!(manifests.agent(&[&FLAGS[..], &[BY_ROUTES, RANGES, "--once"]].concat()).ends().success());
    link::add_address("kube-ipvs0", "10.96.0.10/32").unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_kube-ipvs"));
    let mut cleanup = Agent::start_command(command.args(["cleanup", "--filter-only"]));
    assert!(cleanup.ends().success(), "{}", cleanup.log());
    let log = cleanup.log();
    let (route, tables) = (log.find("10.96.0.0/12").unwrap(), log.find("delete the tables").unwrap());
    assert!(route < tables, "{log}");
    assert_eq!(routes(), [""; 0]);
    assert!(addresses().contains(&"10.96.0.10/32".to_owned()), "what kube-proxy binds stays");
    assert!(!has_tables());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_range_with_an_address_of_the_node_stops_the_start() {
    let _network = Network::new(1, 1);
    let manifests = web();
    let flags = [&FLAGS[..], &[BY_ROUTES, "--vip-ranges=10.96.0.0/12,192.168.0.0/16", "--once"]].concat();
    let mut agent = manifests.agent(&flags);
    assert!(!agent.ends().success());
    let log = agent.log();
    for part in [
        "192.168.0.0/16 contains 192.168.1.1, an address of an interface of this node",
        "omit the range",
        "Nothing was changed",
    ] {
        assert!(log.contains(part), "{log}");
    }
    assert!(!link::exists("kube-ipvs0").unwrap());
}

/// On a cable, as load balancers do that announce VIPs: who answers to whom.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn arp_is_answered_for_vips_and_whole_ranges_unless_strict() {
    let network = Network::new(1, 1);
    let client = &network.clients[0];
    let _server = Server::start(&network.pods[0].namespace, "web", 8080);
    let manifests = web();
    client.run(|| {
        for address in ["10.96.0.10", "10.96.0.99", "203.0.113.10", "fd00:96::10"] {
            link::add_route_dev(address, "eth0").unwrap();
        }
    });
    // Who is not answered is told so after three questions: at once, since each waits.
    let try_all = || {
        client.run(|| link::flush_neighbours("eth0")).unwrap();
        let all = ["10.96.0.10:80", "203.0.113.10:80", "10.96.0.99:80", "[fd00:96::10]:80"];
        thread::scope(|scope| {
            let tries = all.map(|target| scope.spawn(move || client.tcp(target).map(|answer| answer.backend)));
            tries.map(|one| one.join().unwrap().unwrap_or_else(|error| error))
        })
    };
    for (flags, expected) in [
        (&[][..], ["web", "web", "unreachable", "unreachable"]),
        (&[BY_ROUTES], ["web", "web", "unreachable", "unreachable"]),
        (&[BY_ROUTES, RANGES], ["web", "web", "refused", "unreachable"]),
        (&["--ipvs-strict-arp"], ["unreachable"; 4]),
        (&[BY_ROUTES, RANGES, "--ipvs-strict-arp"], ["unreachable"; 4]),
    ] {
        let agent = serving(&manifests, &[&[CLUSTER_CIDR], flags].concat());
        assert_eq!(try_all(), expected, "{flags:?}");
        agent.kill();
    }
}
