//! Endpoints that end, with every scheduler: nobody new is refused, and open connections live on.

use ipvs_netlink::Scheduler;
use lab::objects::State;
use serde_json::json;

use crate::common::{Manifests, ipvs};
use crate::network::{Host, Network};
use crate::objects::{file, manifests, service, slice};
use crate::serving;
use crate::traffic::{Connection, PATIENCE, Server};

const NAMES: [&str; 3] = ["one", "two", "three"];
/// How many connections are made while a real server drains.
const ENOUGH: usize = 60;

/// The real servers of the Service at TCP port 80 with this weight.
fn with_weight(weight: u32) -> Vec<String> {
    let end = format!("-w {weight}");
    ipvs().into_iter().filter(|line| line.starts_with("-a -t") && line.ends_with(&end)).collect()
}

/// Two of three endpoints end, one after the other, each with a connection that stays open.
fn endpoints_end(
    network: &Network,
    vip: &str,
    addresses: &[String; 3],
    manifests: &Manifests,
    spec: &serde_json::Value,
) -> Result<(), String> {
    let client = &network.clients[0];
    let mut states = [State::Ready; 3];
    let write = |states: [State; 3]| {
        let endpoints = addresses.iter().zip(states).map(|(address, state)| (address.clone(), state));
        manifests.write("objects.json", &file(&[service("web", spec.clone()), slice("web", endpoints)]));
    };
    let mut open = Vec::new();
    for ended in 1..=2 {
        let mut connection = client.run(|| Connection::open(vip, PATIENCE))?;
        let backend = connection.ask()?.backend;
        open.push((connection, backend.clone()));
        let index = NAMES.iter().position(|name| *name == backend).unwrap();
        if states[index] != State::Ready {
            return Err(format!("{backend} ends and gets a new connection"));
        }
        states[index] = State::Terminating;
        write(states);
        lab::wait::until("drain", || with_weight(0).len() == ended && with_weight(1).len() == 3 - ended).unwrap();
        for number in 0..ENOUGH {
            let answer = client.tcp(vip).map_err(|word| format!("connection {number} while {ended} drain: {word}"))?;
            let index = NAMES.iter().position(|name| *name == answer.backend).unwrap();
            if states[index] != State::Ready {
                return Err(format!("{} ends and got connection {number}", answer.backend));
            }
        }
        for (connection, backend) in &mut open {
            let answer = connection.ask().map_err(|word| format!("the open connection to {backend}: {word}"))?;
            assert_eq!(answer.backend, *backend);
        }
    }
    // The pods are gone, and then there are new ones.
    drop(open);
    write([State::Ready; 3]);
    lab::wait::until("serve all", || with_weight(1).len() == 3).unwrap();
    Ok(())
}

fn every_scheduler(vip: &str, cluster_ip: &str, address: impl Fn(&Host) -> String, more: &serde_json::Value) {
    let network = Network::new(1, 3);
    let _servers: Vec<Server> =
        NAMES.iter().zip(&network.pods).map(|(name, pod)| Server::start(&pod.namespace, name, 8080)).collect();
    let addresses = [0, 1, 2].map(|pod| address(&network.pods[pod]));
    let spec = lab::objects::with(json!({"clusterIPs": [cluster_ip]}), more.clone());
    let mut failed = Vec::new();
    for scheduler in Scheduler::ALL {
        let endpoints = addresses.iter().map(|address| (address.clone(), State::Ready));
        let manifests = manifests(&[service("web", spec.clone()), slice("web", endpoints)]);
        let mut agent = serving(&manifests, &[&format!("--ipvs-scheduler={scheduler}")]);
        if let Err(word) = endpoints_end(&network, vip, &addresses, &manifests, &spec) {
            failed.push(format!("{scheduler}: {word}"));
        }
        agent.terminate();
        assert!(agent.ends().success());
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn no_scheduler_refuses_clients_while_endpoints_end() {
    every_scheduler("10.96.0.10:80", "10.96.0.10", |pod| pod.v4.to_string(), &json!({}));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn no_scheduler_refuses_ipv6_clients_while_endpoints_end() {
    every_scheduler("[fd00:96::10]:80", "fd00:96::10", |pod| pod.v6.to_string(), &json!({}));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn no_scheduler_refuses_clients_with_affinity_while_endpoints_end() {
    let affinity = json!({"sessionAffinity": "ClientIP"});
    every_scheduler("10.96.0.10:80", "10.96.0.10", |pod| pod.v4.to_string(), &affinity);
}
