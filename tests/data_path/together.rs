//! Changes that belong together: nobody notices what only gets another name, or moves from one object to another.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lab::objects::with;
use serde_json::{Value, json};

use crate::common::Manifests;
use crate::network::{CLUSTER_CIDR, Network, node};
use crate::objects::{file, ready, service};
use crate::traffic::{Connection, PATIENCE, Server, tcp};
use crate::{Over, serving};

const CLUSTER_IP: &str = "10.96.0.10:80";
const NODE_PORTS: [&str; 2] = ["192.168.1.1:30080", "192.168.1.1:30081"];
const ROUNDS: usize = 8;
/// How many connections are made to each target in each round.
const ENOUGH: usize = 30;

/// A Service of TCP port 80 with a NodePort.
fn web(name: &str, cluster_ip: &str, node_port: u16) -> Value {
    let ports = json!([{"name": "tcp", "protocol": "TCP", "port": 80, "nodePort": node_port}]);
    service(name, json!({"type": "NodePort", "clusterIPs": [cluster_ip], "ports": ports}))
}

/// A slice with a name of its own.
fn named(name: &str, service: &str, endpoints: &[String]) -> Value {
    let slice = if endpoints.is_empty() {
        with(ready(service, ["10.244.1.1"]), json!({"endpoints": []}))
    } else {
        ready(service, endpoints)
    };
    with(slice, json!({"metadata": {"name": name}}))
}

/// What changes, and the objects of each state.
struct Case {
    name: &'static str,
    states: [Vec<Value>; 2],
}

fn cases(pods: &[String]) -> Vec<Case> {
    let both = |slices: Vec<Value>| [vec![web("a", "10.96.0.10", 30080)], slices].concat();
    let exchanged = |first: u16, second: u16| {
        vec![
            web("a", "10.96.0.10", first),
            named("a", "a", &pods[..1]),
            web("b", "10.96.0.11", second),
            named("b", "b", &pods[1..]),
        ]
    };
    vec![
        Case {
            name: "a slice gets another name",
            states: [both(vec![named("a-1", "a", pods)]), both(vec![named("a-2", "a", pods)])],
        },
        Case {
            name: "an endpoint moves to another slice",
            states: [
                both(vec![named("a-1", "a", &pods[..1]), named("a-2", "a", &[])]),
                both(vec![named("a-1", "a", &[]), named("a-2", "a", &pods[..1])]),
            ],
        },
        Case {
            name: "a Service gets another name",
            states: ["a", "b"].map(|name| vec![web(name, "10.96.0.10", 30080), named(name, name, pods)]),
        },
        Case { name: "NodePorts are exchanged", states: [exchanged(30080, 30081), exchanged(30081, 30080)] },
    ]
}

/// Makes new connections until it is over; returns what went wrong.
fn new_connections(target: &str, is_over: &AtomicBool, count: &AtomicUsize) -> Vec<String> {
    let (start, mut failed) = (Instant::now(), Vec::new());
    while !is_over.load(Ordering::Relaxed) {
        if let Err(word) = tcp(target) {
            failed.push(format!("{target}: {word} after {:?}", start.elapsed()));
        }
        count.fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(2));
    }
    failed
}

/// Goes from state to state and back under load, with connections that stay open.
fn nobody_notices(network: &Network, case: &Case, write: &dyn Fn(&[Value])) {
    let client = &network.clients[0];
    let mut targets = vec![CLUSTER_IP, NODE_PORTS[0]];
    targets.extend((case.states[0].len() == 4).then_some(NODE_PORTS[1]));
    for target in &targets {
        lab::wait::until("serve", || client.tcp(target).is_ok()).unwrap();
    }
    let is_over = AtomicBool::new(false);
    let counts: Vec<AtomicUsize> = targets.iter().map(|_| AtomicUsize::new(0)).collect();
    let mut failed = Vec::new();
    thread::scope(|scope| {
        let over = Over(&is_over);
        let is_over = &is_over;
        let loads: Vec<_> = targets
            .iter()
            .zip(&counts)
            .map(|(target, count)| scope.spawn(move || client.run(|| new_connections(target, is_over, count))))
            .collect();
        for round in 1..=ROUNDS {
            let after = &case.states[round % 2];
            let mut open: Vec<(Connection, String)> = targets
                .iter()
                .map(|target| {
                    let mut connection = client.run(|| Connection::open(target, PATIENCE)).unwrap();
                    let backend = connection.ask().unwrap().backend;
                    (connection, backend)
                })
                .collect();
            write(after);
            let made: Vec<usize> = counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
            lab::wait::until("connect", || {
                counts.iter().zip(&made).all(|(count, made)| count.load(Ordering::Relaxed) >= made + ENOUGH)
            })
            .unwrap();
            for (connection, backend) in &mut open {
                assert_eq!(connection.ask().map(|answer| answer.backend).as_ref(), Ok(&*backend), "{}", case.name);
            }
        }
        drop(over);
        for load in loads {
            failed.extend(load.join().unwrap());
        }
    });
    println!("{}: {counts:?} connections", case.name);
    assert!(failed.is_empty(), "{}: {} of {counts:?} connections failed: {failed:?}", case.name, failed.len());
}

fn network() -> (Network, Vec<String>, [Server; 2]) {
    let network = Network::new(1, 2);
    let pods = network.pods.iter().map(|pod| pod.v4.to_string()).collect();
    let servers = [0, 1].map(|pod| Server::start(&network.pods[pod].namespace, &format!("pod{pod}"), 8080));
    (network, pods, servers)
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn changes_of_one_file_are_made_together() {
    let (network, pods, _servers) = network();
    for case in cases(&pods) {
        let manifests = Manifests::new();
        manifests.write("node.yaml", &node()).write("objects.json", &file(&case.states[0]));
        let mut agent = serving(&manifests, &[CLUSTER_CIDR]);
        nobody_notices(&network, &case, &|after| {
            manifests.write("objects.json", &file(after));
        });
        agent.terminate();
        assert!(agent.ends().success());
    }
}
