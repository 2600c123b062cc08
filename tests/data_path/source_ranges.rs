//! `loadBalancerSourceRanges`: who may connect to a load-balancer IP, and what is left open beside it.

use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::{filter_knows, run};
use crate::network::{CLUSTER_CIDR, Host, Network, masqueraded};
use crate::objects::{file, manifests, ready, service};
use crate::traffic::{PATIENCE, SILENCE, Server, Try, tcp_within, udp_within};
use crate::{finds_nothing_to_change, serving};

const LB_V4: &str = "203.0.113.10:80";
const LB_V6: &str = "[2001:db8::10]:80";
const CLUSTER_V4: &str = "10.96.0.10:80";
const CLUSTER_V6: &str = "[fd00:96::10]:80";

/// The Service `web` with a load-balancer IP of each family, restricted to these ranges; its endpoint is the first pod.
fn web(network: &Network, ranges: &[&str]) -> Vec<Value> {
    let spec = json!({
        "type": "LoadBalancer",
        "clusterIPs": ["10.96.0.10", "fd00:96::10"],
        "loadBalancerIPs": ["203.0.113.10", "2001:db8::10"],
        "loadBalancerSourceRanges": ranges,
    });
    let pod = &network.pods[0];
    vec![service("web", spec), ready("web", [pod.v4]), ready("web", [pod.v6])]
}

/// What everybody gets, all asked at once: a refusal by silence takes its time.
fn ask<'a>(
    patience: Duration,
    askers: &'a [(&'a str, Option<&'a Host>)],
    targets: &'a [&'a str],
) -> Vec<(String, Try)> {
    thread::scope(|scope| {
        let mut asked = Vec::new();
        for (name, host) in askers {
            for target in targets {
                for (protocol, try_it) in [("TCP", tcp_within as fn(Duration, &str) -> Try), ("UDP", udp_within)] {
                    // The node is this thread's namespace, and that of the threads it starts.
                    let try_it = move || try_it(patience, target);
                    let asking = scope.spawn(move || host.map_or_else(try_it, |host| host.run(try_it)));
                    asked.push((format!("{name}, {protocol} to {target}"), asking));
                }
            }
        }
        asked.into_iter().map(|(what, asking)| (what, asking.join().unwrap())).collect()
    })
}

/// Whether nothing came back. The node is told by its own kernel when it sends a datagram.
fn is_silence(result: &Try) -> bool {
    matches!(result, Err(word) if word == "timeout" || word == "not permitted")
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn source_ranges_allow_their_clients_and_drop_others() {
    let network = Network::new(2, 2);
    let _server = Server::start(&network.pods[0].namespace, "web", 8080);
    let manifests = manifests(&web(&network, &["192.168.1.0/24", "fd00:192:1::/64"]));
    let mut agent = serving(&manifests, &[CLUSTER_CIDR]);
    let clients = [("client", Some(&network.clients[0])), ("node", None)];
    for (what, result) in ask(PATIENCE, &clients, &[LB_V4, LB_V6]) {
        let target = if what.ends_with(LB_V4) { LB_V4 } else { LB_V6 };
        assert_eq!(result, masqueraded("web", target), "{what}");
    }
    let others = [("stranger", Some(&network.clients[1])), ("pod", Some(&network.pods[1]))];
    for (what, result) in ask(SILENCE, &others, &[LB_V4, LB_V6]) {
        assert_eq!(result, Err("timeout".to_owned()), "{what}");
    }
    for (what, result) in ask(PATIENCE, &others, &[CLUSTER_V4, CLUSTER_V6]) {
        assert!(result.is_ok(), "{what}: {result:?}: ranges are about load-balancer IPs");
    }
    // The other way round.
    let ranges = ["192.168.2.2/32", "fd00:192:2::2/128", "10.244.1.2/32", "fd00:244::/64"];
    manifests.write("objects.json", &file(&web(&network, &ranges)));
    agent.until("take in other ranges", |_| network.clients[1].tcp(LB_V6).is_ok());
    for (what, result) in ask(PATIENCE, &others, &[LB_V4, LB_V6]) {
        assert!(result.is_ok(), "{what}: {result:?}");
    }
    for (what, result) in ask(SILENCE, &clients, &[LB_V4, LB_V6]) {
        assert!(is_silence(&result), "{what}: {result:?}");
    }
    // Without ranges everybody may.
    manifests.write("objects.json", &file(&web(&network, &[])));
    agent.until("take ranges away", |_| network.clients[0].tcp(LB_V6).is_ok());
    for (what, result) in ask(PATIENCE, &[clients, others].concat(), &[LB_V4, LB_V6]) {
        assert!(result.is_ok(), "{what}: {result:?}");
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn source_ranges_of_one_family_close_the_other() {
    let network = Network::new(1, 2);
    let _server = Server::start(&network.pods[0].namespace, "web", 8080);
    let manifests = manifests(&web(&network, &["192.168.1.0/24", "10.244.0.0/16"]));
    let _agent = serving(&manifests, &[CLUSTER_CIDR]);
    let everybody = [("client", Some(&network.clients[0])), ("pod", Some(&network.pods[1])), ("node", None)];
    for (what, result) in ask(PATIENCE, &everybody, &[LB_V4]) {
        assert!(result.is_ok(), "{what}: {result:?}");
    }
    for (what, result) in ask(SILENCE, &everybody, &[LB_V6]) {
        assert!(is_silence(&result), "{what}: {result:?}");
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_source_range_of_one_address_is_written_once() {
    let network = Network::new(1, 1);
    let manifests = manifests(&web(&network, &["192.168.1.2/32", "192.168.1.2/32", "fd00:192:1::2/128"]));
    let mut agent = serving(&manifests, &[CLUSTER_CIDR, "--ipvs-sync-period=100ms"]);
    // The user data and the elements, but no counters: what is written anew has a new handle.
    let list = || run("nft -a list table ip kube-ipvs && nft -a list table ip6 kube-ipvs");
    let before = list();
    assert!(before.contains("192.168.1.2"), "{before}");
    agent.audits(3);
    // Its own slices change, and another Service does.
    manifests.write("more.json", &file(&[service("other", json!({"clusterIPs": ["10.96.0.11"]}))]));
    agent.until("serve the other", |_| filter_knows("10.96.0.11"));
    manifests.remove("more.json");
    agent.until("forget the other", |_| !filter_knows("10.96.0.11"));
    assert_eq!(list(), before);
    assert!(!agent.log().contains("somebody else"), "{}", agent.log());
    agent.kill();
    finds_nothing_to_change(&manifests);
}
