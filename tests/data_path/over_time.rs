//! What becomes of open connections and of clients that stick to an endpoint when that endpoint is to go.

use std::time::{Duration, Instant};

use ipvs_netlink::Connections;
use lab::objects::State;
use serde_json::json;

use crate::common::ipvs;
use crate::network::Network;
use crate::objects::{file, manifests, ready, service, slice};
use crate::serving;
use crate::traffic::{Connection, PATIENCE, Server};

const VIP: &str = "10.96.0.10:80";
const SECOND: Duration = Duration::from_secs(1);

/// Whether a real server with an open, idle connection goes while somebody waits, after its endpoint is gone; and how
/// long it stayed: not longer than this.
fn time_to_drain(flags: &[&str], wait: Duration) -> Option<Duration> {
    let network = Network::new(1, 2);
    let _servers = [0, 1].map(|pod| Server::start(&network.pods[pod].namespace, "web", 8080));
    let web = service("web", json!({"clusterIPs": ["10.96.0.10"]}));
    let manifests = manifests(&[web, ready("web", [network.pods[0].v4])]);
    let mut agent = serving(&manifests, flags);
    let mut connection = network.clients[0].run(|| Connection::open(VIP, PATIENCE)).unwrap();
    assert!(connection.ask().is_ok());
    let web = service("web", json!({"clusterIPs": ["10.96.0.10"]}));
    let start = Instant::now();
    manifests.write("objects.json", &file(&[web, ready("web", [network.pods[1].v4])]));
    let old = |weight| {
        move |line: &String| line.contains(&format!("-r 10.244.1.1:8080 -m -w {weight}")) && line.contains("-t")
    };
    agent.until("drain the old endpoint", |_| ipvs().iter().any(old(0)));
    let draining = Instant::now();
    while draining.elapsed() < wait {
        if !ipvs().iter().any(old(0)) {
            let took = start.elapsed();
            let result = connection.ask();
            assert!(result.is_err(), "the connection outlived its real server: {result:?}");
            return Some(took);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(connection.ask().is_ok(), "the connection is cut while its real server drains");
    None
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn open_connections_are_cut_after_the_drain_timeout() {
    let took = time_to_drain(&["--ipvs-drain-timeout=1s"], PATIENCE).expect("nothing happened");
    println!("the real server was gone {took:?} after its endpoint");
    assert!(took >= SECOND, "{took:?}");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_drain_timeout_does_not_cut_connections_of_pods_that_live() {
    let network = Network::new(1, 2);
    let _servers = [0, 1].map(|pod| Server::start(&network.pods[pod].namespace, "web", 8080));
    let objects = |state| {
        let web = service("web", json!({"clusterIPs": ["10.96.0.10"]}));
        let states = [state, State::Ready];
        file(&[web, slice("web", network.pods.iter().map(|pod| pod.v4).zip(states))])
    };
    let manifests = manifests(&[]);
    manifests.write("objects.json", &objects(State::Ready));
    let mut agent = serving(&manifests, &["--ipvs-drain-timeout=1s"]);
    let client = &network.clients[0];
    let mut connection = loop {
        let connection = client.run(|| Connection::open(VIP, PATIENCE)).unwrap();
        let connected = Connections::of_this_namespace().unwrap().map(Result::unwrap);
        if connected.into_iter().any(|it| it.real_address.ip() == network.pods[0].v4) {
            break connection;
        }
    };
    let old = |line: &String| line.contains("-t") && line.contains("-r 10.244.1.1:8080 -m -w 0");
    manifests.write("objects.json", &objects(State::NotReady));
    agent.until("drain the endpoint that is not ready", |_| ipvs().iter().any(old));
    std::thread::sleep(SECOND * 5 / 2);
    assert!(ipvs().iter().any(old) && connection.ask().is_ok(), "its connection is cut although its pod lives");
    manifests.write("objects.json", &objects(State::Terminating));
    agent.until("delete the endpoint that ends", |_| !ipvs().iter().any(old));
    assert!(connection.ask().is_err());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn open_connections_last_without_a_drain_timeout() {
    assert_eq!(time_to_drain(&[], SECOND * 5 / 2), None);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_client_with_affinity_moves_at_once_when_its_endpoint_goes() {
    let network = Network::new(1, 2);
    let _servers = ["one", "two"]
        .iter()
        .zip(&network.pods)
        .map(|(name, pod)| Server::start(&pod.namespace, name, 8080))
        .collect::<Vec<_>>();
    let web = || service("web", json!({"clusterIPs": ["10.96.0.10"], "sessionAffinity": "ClientIP"}));
    let manifests = manifests(&[web(), ready("web", network.pods.iter().map(|pod| pod.v4))]);
    let mut agent = serving(&manifests, &[]);
    let client = &network.clients[0];
    // TCP and UDP have endpoints of their own.
    let firsts = [client.tcp(VIP).unwrap().backend, client.udp(VIP).unwrap().backend];
    let mut open = client.run(|| Connection::open(VIP, PATIENCE)).unwrap();
    assert_eq!(open.ask().unwrap().backend, firsts[0]);
    for _ in 0..5 {
        assert_eq!([client.tcp(VIP), client.udp(VIP)].map(|answer| answer.unwrap().backend), firsts);
    }
    for (protocol, first) in ["-t", "-u"].into_iter().zip(&firsts) {
        let (goes, stays) = if first == "one" { (0, 1) } else { (1, 0) };
        manifests.write("objects.json", &file(&[web(), ready("web", [network.pods[stays].v4])]));
        let old = format!("-a {protocol} {VIP} -r {}:8080", network.pods[goes].v4);
        agent.until("take the endpoint away", |_| {
            ipvs().iter().all(|line| !line.starts_with(&old) || line.ends_with("-w 0"))
        });
        let name = ["one", "two"][stays];
        let answer = if protocol == "-t" { client.tcp(VIP) } else { client.udp(VIP) };
        assert_eq!(answer.unwrap().backend, name, "{protocol}");
        if protocol == "-t" {
            assert_eq!(open.ask().unwrap().backend, *first, "a connection that is open stays where it is");
        }
        manifests.write("objects.json", &file(&[web(), ready("web", network.pods.iter().map(|pod| pod.v4))]));
        agent.until("take both endpoints", |_| {
            ipvs().iter().filter(|line| line.starts_with("-a") && line.contains("-w 1")).count() == 4
        });
    }
}
