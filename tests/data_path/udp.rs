//! UDP clients that keep one source port: they follow their Service wherever its endpoints go.

use std::fs;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use ipvs_netlink::{Client, Protocol, VirtualServerId};
use serde_json::{Value, json};

use crate::common::addresses;
use crate::network::{CLUSTER_CIDR, Network, masqueraded};
use crate::objects::{file, manifests, ready, service};
use crate::traffic::{Flow, PATIENCE, Server};
use crate::{Over, serving};

const CLUSTER_IP: &str = "10.96.0.10:80";
const NODE_PORT: &str = "192.168.1.1:30080";

/// The Service `dns` with this endpoint, at this port.
fn dns(endpoint: &str, port: u16) -> String {
    let ports = json!([{"name": "udp", "protocol": "UDP", "port": 80, "nodePort": 30080}]);
    let spec = json!({"type": "NodePort", "clusterIPs": ["10.96.0.10"], "ports": ports});
    let mut slice: Value = ready("dns", [endpoint]);
    slice["ports"] = json!([{"name": "udp", "protocol": "UDP", "port": port}]);
    file(&[service("dns", spec), slice])
}

/// A client that sends every 10 ms from one port, and who has answered when.
struct Steady<'a> {
    flow: &'a Flow,
    answers: Mutex<Vec<(Instant, String)>>,
}

impl<'a> Steady<'a> {
    fn new(flow: &'a Flow) -> Self {
        Self { flow, answers: Mutex::default() }
    }

    fn start<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, is_over: &'scope AtomicBool) {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                // Nobody there is no news.
                let _ = self.flow.send("hello");
                thread::sleep(Duration::from_millis(10));
            }
        });
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                if let Ok(answer) = self.flow.hear() {
                    self.answers.lock().unwrap().push((Instant::now(), answer.backend));
                }
            }
        });
    }

    /// When a backend first answered after an instant. A flow that nobody ends lasts for as long as the client sends.
    fn first_from(&self, backend: &str, since: Instant) -> Instant {
        let start = Instant::now();
        loop {
            let answers = self.answers.lock().unwrap();
            if let Some((at, _)) = answers.iter().find(|(at, from)| *at >= since && from == backend) {
                return *at;
            }
            assert!(start.elapsed() < PATIENCE, "{backend} does not answer; {:?}", answers.last());
            drop(answers);
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Waits until a real server is gone, and says when that was.
fn gone(target: &str, real_server: &str) -> Instant {
    let id = VirtualServerId::address(Protocol::Udp, target.parse().unwrap());
    let real_server: SocketAddr = real_server.parse().unwrap();
    let mut client = Client::connect().unwrap();
    let start = Instant::now();
    while client.real_servers(&id).is_ok_and(|all| all.iter().any(|one| one.server.socket_address() == real_server)) {
        assert!(start.elapsed() < PATIENCE, "{real_server} stays");
        thread::sleep(Duration::from_micros(200));
    }
    Instant::now()
}

fn flows_to(vip: &str) -> Vec<String> {
    let table = fs::read_to_string("/proc/thread-self/net/nf_conntrack").unwrap();
    // A line has the original direction first.
    let is_there =
        |line: &str| line.contains(" udp ") && line.split(" dst=").nth(1).is_some_and(|rest| rest.starts_with(vip));
    table.lines().filter(|line| is_there(line)).map(str::to_owned).collect()
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_udp_client_with_one_port_moves_to_a_living_endpoint_at_once() {
    let network = Network::new(1, 2);
    let pods = &network.pods;
    let _servers = [("one", 0, 8080), ("two", 1, 8080), ("two-new", 1, 8081)]
        .map(|(name, pod, port)| Server::start(&pods[pod].namespace, name, port));
    let manifests = manifests(&[]);
    let (one, two) = (pods[0].v4.to_string(), pods[1].v4.to_string());
    manifests.write("dns.json", &dns(&one, 8080));
    let _agent = serving(&manifests, &[CLUSTER_CIDR]);
    let open = |target| Flow::open(target, Duration::from_millis(50)).unwrap();
    // From outside by either way, and from a pod, which is not masqueraded.
    let flows = [
        ("ClusterIP", CLUSTER_IP, network.clients[0].run(|| open(CLUSTER_IP))),
        ("NodePort", NODE_PORT, network.clients[0].run(|| open(NODE_PORT))),
        ("ClusterIP from a pod", CLUSTER_IP, pods[1].run(|| open(CLUSTER_IP))),
    ];
    let clients: Vec<Steady<'_>> = flows.iter().map(|(_, _, flow)| Steady::new(flow)).collect();
    let is_over = AtomicBool::new(false);
    let mut took = Vec::new();
    thread::scope(|scope| {
        let _over = Over(&is_over);
        for client in &clients {
            client.start(scope, &is_over);
        }
        let start = Instant::now();
        for client in &clients {
            client.first_from("one", start);
        }
        let moves = [
            ("two", &two, 8080, format!("{one}:8080"), "its endpoint went"),
            ("two-new", &two, 8081, format!("{two}:8080"), "the target port changed"),
            ("one", &one, 8080, format!("{two}:8081"), "its endpoint went again"),
        ];
        for (to, address, port, from, why) in &moves {
            manifests.write("dns.json", &dns(address, *port));
            thread::scope(|watchers| {
                let watching: Vec<_> =
                    flows.iter().map(|(way, target, _)| (way, watchers.spawn(|| gone(target, from)))).collect();
                for (client, (way, watching)) in clients.iter().zip(watching) {
                    let gone = watching.join().unwrap();
                    took.push((client.first_from(to, gone) - gone, format!("{way}, {why}")));
                }
            });
        }
    });
    println!("{took:#?}");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_deleted_service_leaves_no_udp_flow() {
    // Linux 5.9 and later end connections to what is gone by themselves, others do when a client sends in the right instant.
    let expires = |value| fs::write("/proc/sys/net/ipv4/vs/expire_nodest_conn", value).unwrap();
    for is_silent in [true, false] {
        let network = Network::new(1, 2);
        let pods = &network.pods;
        let _servers = [("one", 0), ("two", 1)].map(|(name, pod)| Server::start(&pods[pod].namespace, name, 8080));
        // No flow expires while this waits.
        for timeout in ["udp_timeout", "udp_timeout_stream"] {
            fs::write(format!("/proc/sys/net/netfilter/nf_conntrack_{timeout}"), "3600").unwrap();
        }
        let manifests = manifests(&[]);
        manifests.write("dns.json", &dns(&pods[0].v4.to_string(), 8080));
        let mut agent = serving(&manifests, &[CLUSTER_CIDR]);
        let flow = network.clients[0].run(|| Flow::open(CLUSTER_IP, Duration::from_millis(50)).unwrap());
        assert_eq!(flow.ask(), masqueraded("one", CLUSTER_IP));
        let client = Steady::new(&flow);
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let _over = Over(&is_over);
            if is_silent {
                expires("0");
            } else {
                client.start(scope, &is_over);
            }
            assert_eq!(flows_to("10.96.0.10").len(), 1);
            manifests.remove("dns.json");
            agent.until("unbind the VIP", |_| addresses().is_empty());
            let start = Instant::now();
            agent.until("delete the flow", |_| flows_to("10.96.0.10").is_empty());
            println!("the flow was deleted {:?} after the VIP", start.elapsed());
            // Whatever the client sends meanwhile begins none. What it sends later is answered later.
            let _ = flow.send("hello");
            assert_eq!(network.clients[0].tcp("192.168.1.1:9"), Err("refused".to_owned()));
            assert_eq!(flows_to("10.96.0.10"), [""; 0]);
            expires("1");
            manifests.write("dns.json", &dns(&pods[1].v4.to_string(), 8080));
            agent.until("serve again", |_| !addresses().is_empty());
            if is_silent {
                // The slice may come after the Service; an error may be left of what was sent.
                agent.until("answer", |_| flow.ask() == masqueraded("two", CLUSTER_IP));
            } else {
                client.first_from("two", Instant::now());
            }
        });
    }
}
