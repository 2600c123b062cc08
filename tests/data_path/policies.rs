//! Traffic policies, and what clients notice while they change.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use lab::objects::{State, endpoint, with};
use serde_json::{Value, json};

use crate::common::ipvs;
use crate::network::{CLUSTER_CIDR, Host, NODE_V4, Network};
use crate::objects::{file, manifests, ready, service};
use crate::traffic::{Server, tcp};
use crate::{Over, serving};

const CLUSTER_IP: &str = "10.96.0.10:80";
const NODE_PORT: &str = "192.168.1.1:30080";
const LB_IP: &str = "203.0.113.1:80";

/// A Service that is reachable in every way, with these traffic policies.
fn web(internal: &str, external: &str) -> Value {
    let ports = json!([{"name": "tcp", "protocol": "TCP", "port": 80, "nodePort": 30080},
        {"name": "udp", "protocol": "UDP", "port": 80, "nodePort": 30080}]);
    service(
        "web",
        json!({"type": "LoadBalancer", "clusterIPs": ["10.96.0.10"], "ports": ports, "loadBalancerIPs": ["203.0.113.1"],
            "internalTrafficPolicy": internal, "externalTrafficPolicy": external}),
    )
}

/// A slice with endpoints of this node and of another.
fn endpoints(here: &[&Host], elsewhere: &[&Host]) -> Value {
    let on = |node: &'static str| {
        move |host: &&Host| with(endpoint(&host.v4.to_string(), State::Ready), json!({"nodeName": node}))
    };
    let all: Vec<Value> = here.iter().map(on("node-a")).chain(elsewhere.iter().map(on("node-b"))).collect();
    with(ready("web", ["10.244.1.1"]), json!({"endpoints": all}))
}

/// Which real servers of weight 1 a TCP front end has.
fn real_servers(target: &str) -> Vec<String> {
    let start = format!("-a -t {target} ");
    ipvs().into_iter().filter(|line| line.starts_with(&start) && line.ends_with("-w 1")).collect()
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_cluster_ip_of_policy_local_refuses_without_local_endpoint() {
    let network = Network::new(1, 3);
    let (here, elsewhere) = (&network.pods[0], &network.pods[1]);
    let _servers =
        [("here", here), ("elsewhere", elsewhere)].map(|(name, pod)| Server::start(&pod.namespace, name, 8080));
    let manifests = manifests(&[web("Local", "Cluster"), endpoints(&[], &[elsewhere])]);
    let mut agent = serving(&manifests, &[CLUSTER_CIDR]);
    let refused = Err("refused".to_owned());
    let clients = [&network.clients[0], &network.pods[2]];
    for client in clients {
        assert_eq!(client.tcp(CLUSTER_IP), refused);
        assert_eq!(client.udp(CLUSTER_IP), refused);
        for target in [NODE_PORT, LB_IP] {
            assert_eq!(client.tcp(target).unwrap().backend, "elsewhere", "{target}");
        }
    }
    assert_eq!(tcp(CLUSTER_IP), refused, "the node");
    manifests.write("objects.json", &file(&[web("Local", "Cluster"), endpoints(&[here], &[elsewhere])]));
    agent.until("serve the local endpoint", |_| real_servers(CLUSTER_IP).len() == 1);
    lab::wait::until("answer", || clients[0].tcp(CLUSTER_IP).is_ok_and(|answer| answer.backend == "here")).unwrap();
    manifests.write("objects.json", &file(&[web("Cluster", "Cluster"), endpoints(&[], &[elsewhere])]));
    lab::wait::until("answer", || clients[0].tcp(CLUSTER_IP).is_ok_and(|answer| answer.backend == "elsewhere"))
        .unwrap();
}

/// Goes through states of the Service and its endpoints under load from outside. Nobody elsewhere may see the client's own address: the
/// answer would not come back through this node. `may_be_refused` is for states without a local endpoint.
fn others_never_see_clients(states: &[(&str, bool)], is_over_soon: usize, may_be_refused: bool) {
    let network = Network::new(1, 3);
    let pods: Vec<&Host> = network.pods.iter().collect();
    let names = ["here", "elsewhere", "elsewhere"];
    let _servers: Vec<Server> =
        names.iter().zip(&pods).map(|(name, pod)| Server::start(&pod.namespace, name, 8080)).collect();
    let objects = |(policy, is_local): (&str, bool)| {
        let here = if is_local { &pods[..1] } else { &[] };
        file(&[web("Cluster", policy), endpoints(here, &pods[1..])])
    };
    let manifests = manifests(&[]);
    manifests.write("objects.json", &objects(states[0]));
    let _agent = serving(&manifests, &[CLUSTER_CIDR]);
    let client = &network.clients[0];
    let node: IpAddr = NODE_V4.parse().unwrap();
    let (is_over, count) = (AtomicBool::new(false), AtomicUsize::new(0));
    let load = |target: &str| {
        let mut failed = Vec::new();
        while !is_over.load(Ordering::Relaxed) {
            match tcp(target) {
                Ok(answer) if answer.backend == "elsewhere" && answer.source != node => {
                    failed.push(format!("{target}: another node saw {}", answer.source));
                }
                Ok(_) => {}
                Err(word) if may_be_refused && word == "refused" => {}
                Err(word) => failed.push(format!("{target}: {word}")),
            }
            count.fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(1));
        }
        failed
    };
    let mut failed = Vec::new();
    thread::scope(|scope| {
        let over = Over(&is_over);
        let loads: Vec<_> =
            [NODE_PORT, LB_IP, LB_IP].map(|target| scope.spawn(move || client.run(|| load(target)))).into();
        for state in states.iter().cycle().skip(1).take(is_over_soon) {
            manifests.write("objects.json", &objects(*state));
            let before = count.load(Ordering::Relaxed);
            lab::wait::until("connect", || count.load(Ordering::Relaxed) >= before + 60).unwrap();
        }
        drop(over);
        for load in loads {
            failed.extend(load.join().unwrap());
        }
    });
    println!("{count:?} connections");
    assert!(failed.is_empty(), "{} of {count:?} connections: {failed:?}", failed.len());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_change_of_the_external_policy_is_not_noticed() {
    others_never_see_clients(&[("Cluster", true), ("Local", true)], 24, false);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn clients_are_masqueraded_whenever_another_node_serves_them() {
    let states =
        [("Cluster", true), ("Local", false), ("Local", true), ("Cluster", false), ("Local", false), ("Cluster", true)];
    others_never_see_clients(&states, 24, true);
}
