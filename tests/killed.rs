//! The agent is killed before or after any message to the kernel, again and again: what stays is served all along, and in
//! the end everything is as a fresh start would have made it.
//!
//! How many histories each test has: `KUBE_IPVS_HISTORIES`, or 2.

#![cfg(feature = "fault-points")]
#![expect(clippy::panic, clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use common::{Agent, Filter, Manifests, addresses, eth0, ipvs, ipvsadm, run};
use lab::link;
use lab::netns::isolate;
use lab::objects::{self, with};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};

/// Where the server is that answers all along: on the node itself.
const SERVER: &str = "192.168.1.1:8080";
const FOREIGN: &str = "-A -t 172.16.0.1:80 -s rr";

/// A Service with the port 80, or 80 and 81.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Service {
    endpoints: BTreeSet<u8>,
    has_two_ports: bool,
    node_port: Option<u16>,
    external_ip: Option<u8>,
    has_affinity: bool,
    is_udp: bool,
    source_range: Option<u8>,
}

/// Services by the last part of their cluster IP.
type Services = BTreeMap<u8, Service>;

/// How often an agent was killed.
static KILLED: AtomicU32 = AtomicU32::new(0);

/// The Service with a connection to it that is open all along.
const KEPT: u8 = 1;

fn service() -> impl Strategy<Value = Service> {
    (
        btree_set(1_u8..6, 0..4),
        any::<bool>(),
        option::weighted(0.3, 30_000_u16..30_003),
        option::weighted(0.3, 1_u8..4),
        any::<bool>(),
        prop::bool::weighted(0.3),
        option::weighted(0.2, 0_u8..3),
    )
        .prop_map(|(endpoints, has_two_ports, node_port, external_ip, has_affinity, is_udp, source_range)| {
            Service { endpoints, has_two_ports, node_port, external_ip, has_affinity, is_udp, source_range }
        })
}

/// What there is at some time, with the Service that is always there.
fn services() -> impl Strategy<Value = Services> {
    (btree_map(2_u8..7, service(), 0..5), service()).prop_map(|(mut services, kept)| {
        services.insert(KEPT, Service { is_udp: false, has_affinity: false, ..kept });
        services
    })
}

/// The number of a message, and whether the agent is killed before or after it.
fn kill() -> impl Strategy<Value = String> {
    (1_u32..40, any::<bool>())
        .prop_map(|(number, is_after)| format!("{number}-{}", if is_after { "after" } else { "before" }))
}

fn manifest(number: u8, service: &Service) -> String {
    let protocol = if service.is_udp { "UDP" } else { "TCP" };
    let with_node_port = |port: Value| match service.node_port {
        Some(node_port) => with(port, json!({"nodePort": node_port})),
        None => port,
    };
    let mut ports = vec![with_node_port(objects::port("a", protocol, 80))];
    let mut slice_ports = vec![objects::port("a", protocol, 8080)];
    if service.has_two_ports {
        ports.push(objects::port("b", protocol, 81));
        slice_ports.push(objects::port("b", protocol, 8081));
    }
    let kind = match (service.source_range, service.node_port) {
        (Some(_), _) => "LoadBalancer",
        (None, Some(_)) => "NodePort",
        (None, None) => "ClusterIP",
    };
    // What is not there is null, which is nothing.
    let more = json!({
        "spec": {
            "type": kind,
            "externalIPs": service.external_ip.map(|it| [format!("203.0.113.{it}")]),
            "loadBalancerSourceRanges": service.source_range.map(|it| [format!("10.{it}.0.0/16")]),
            "sessionAffinity": service.has_affinity.then_some("ClientIP"),
        },
        "status": service.source_range.map(|_| objects::load_balancer(&[format!("198.51.100.{number}")])),
    });
    let mut endpoints: Vec<String> = service.endpoints.iter().map(|it| format!("10.244.1.{it}")).collect();
    if number == KEPT {
        endpoints.push("192.168.1.1".to_owned());
    }
    let name = format!("s{number}");
    objects::manifest(&[
        with(objects::service(&name, &[format!("10.96.0.{number}")], &ports), more),
        objects::slice(&format!("{name}-1"), &name, &slice_ports, &objects::ready(endpoints)),
    ])
}

/// The lines of `ipvsadm -Sn` and the addresses that these Services cannot be without.
fn served(services: &Services) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    for (number, service) in services {
        let flag = if service.is_udp { "-u" } else { "-t" };
        for (port, target) in [(80, 8080), (81, 8081)].into_iter().take(1 + usize::from(service.has_two_ports)) {
            let front_end = format!("{flag} 10.96.0.{number}:{port}");
            // What it is like otherwise may change at any time.
            lines.insert(format!("-A {front_end} "));
            for endpoint in &service.endpoints {
                lines.insert(format!("-a {front_end} -r 10.244.1.{endpoint}:{target} -m -w 1"));
            }
        }
        lines.insert(format!("10.96.0.{number}/32"));
    }
    lines
}

fn node() {
    eth0();
    // So that connections to the server are not cut off when the node itself is what they are masqueraded for.
    link::add_route_dev("0.0.0.0/0", "eth0").unwrap();
}

/// What a fresh start makes of Services: virtual servers, addresses, packet filter.
fn fresh(manifests: &Manifests) -> (Vec<String>, Vec<String>, Filter) {
    thread::scope(|scope| {
        let fresh = scope.spawn(|| {
            isolate().unwrap();
            node();
            ipvsadm("-A -t 172.16.0.1:80 -s rr");
            assert!(manifests.agent(&["--once"]).ends().success());
            (ipvs(), addresses(), Filter::read())
        });
        fresh.join().unwrap()
    })
}

/// A connection by way of the VIP.
struct Open(TcpStream);

impl Open {
    fn new() -> Self {
        let stream = TcpStream::connect(("10.96.0.1", 80)).unwrap();
        stream.set_read_timeout(Some(lab::wait::LIMIT)).unwrap();
        Self(stream)
    }

    fn works(&mut self) -> bool {
        let mut answer = [0; 4];
        self.0.write_all(b"ping").is_ok() && self.0.read_exact(&mut answer).is_ok() && answer == *b"ping"
    }
}

/// Answers what it is told, for as long as the test runs.
fn serve() {
    let listener = TcpListener::bind(SERVER).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || std::io::copy(&mut stream.try_clone().unwrap(), &mut { stream }));
        }
    });
}

fn write(manifests: &Manifests, services: &Services) {
    for number in 1..7 {
        let file = format!("s{number}.json");
        match services.get(&number) {
            Some(service) => {
                manifests.write(&file, &manifest(number, service));
            }
            None if manifests.contains(&file) => manifests.remove(&file),
            None => {}
        }
    }
}

fn history(first: &Services, steps: &[(Services, Vec<String>)]) {
    isolate().unwrap();
    node();
    serve();
    ipvsadm(FOREIGN);
    run("nft add table ip foreign");
    let manifests = Manifests::new();
    // The connection is to go to the server that answers.
    let mut alone = first.clone();
    alone.get_mut(&KEPT).unwrap().endpoints.clear();
    write(&manifests, &alone);
    assert!(manifests.agent(&["--once"]).ends().success());
    let mut open = Open::new();
    assert!(open.works());

    let mut stays = served(&alone);
    for (services, kills) in steps {
        write(&manifests, services);
        let to_be = served(services);
        stays.retain(|it| to_be.contains(it));
        for kill in kills {
            let directory = format!("--manifests={}", manifests.path().display());
            let mut command = Agent::command();
            let mut agent = Agent::start_command(command.args([&directory, "--once"]).env("NETLINK_KILL_AT", kill));
            let status = agent.ends();
            assert!(status.success() || status.code().is_none(), "{}", agent.log());
            KILLED.fetch_add(u32::from(!status.success()), Ordering::Relaxed);
            if status.success() {
                stays.clone_from(&to_be);
            }
            let held: Vec<String> = ipvs().into_iter().chain(addresses()).collect();
            let is_there = |it: &&String| held.iter().any(|line| line.starts_with(it.as_str()));
            let missing: Vec<&String> = stays.iter().filter(|it| !is_there(it)).collect();
            assert_eq!(missing, [""; 0], "killed at {kill}; there is {held:#?}; log: {}", agent.log());
            assert!(held.iter().any(|line| line == FOREIGN), "{held:#?}");
            assert!(open.works(), "killed at {kill}: {}", agent.log());
        }
    }

    let (servers, bound, ruleset) = fresh(&manifests);
    let lines: Vec<&str> = servers.iter().map(String::as_str).collect();
    let mut agent = manifests.agent(&[]);
    // What drained is deleted a moment later.
    agent.has(&lines);
    agent.until("have these addresses", |_| addresses() == bound);
    agent.until("have this packet filter", |_| ruleset.is_again());
    assert!(run("nft list tables").contains("table ip foreign"));
    assert!(open.works());
}

/// An agent that cannot be killed by a fault point would survive everything.
fn the_agent_has_fault_points() {
    isolate().unwrap();
    node();
    let manifests = Manifests::new();
    let directory = format!("--manifests={}", manifests.path().display());
    let mut command = Agent::command();
    let mut agent = Agent::start_command(command.args([&directory, "--once"]).env("NETLINK_KILL_AT", "1-before"));
    assert_eq!(agent.ends().code(), None, "{}", agent.log());
}

fn a_kill_at_any_message_is_recovered_by_the_next_start() {
    thread::spawn(the_agent_has_fault_points).join().unwrap();
    let histories = std::env::var("KUBE_IPVS_HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    let config = ProptestConfig {
        cases: histories,
        max_shrink_iters: 20,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let steps = vec((services(), vec(kill(), 1..4)), 1..4);
    let result = TestRunner::new(config).run(&(services(), steps), |(first, steps)| {
        let history = thread::spawn(move || history(&first, &steps));
        history.join().map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
            TestCaseError::fail(text)
        })
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    println!("killed {} times in {histories} histories", KILLED.load(Ordering::Relaxed));
}

/// The same, several times: each test has histories of its own, and many tests run at once.
macro_rules! several {
    ($function:ident: $($name:ident),+) => {
        mod $function {
            $(
                #[test]
                #[ignore = "needs a kernel with IPVS: cargo xtask test"]
                fn $name() {
                    super::$function();
                }
            )+
        }
    };
}

several!(a_kill_at_any_message_is_recovered_by_the_next_start: first, second, third, fourth, fifth, sixth,
    seventh, eighth);
