//! A cold start on a node with a default route: packets to a VIP that is not there yet leave by it.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::cold_start::{objects, targets};
use crate::common::{addresses, run};
use crate::network::{Network, masqueraded};
use crate::objects::{manifests, ready, service};
use crate::traffic::{Connection, Flow, PATIENCE, Server};
use crate::{FLAGS, Over, serving};

/// What clients get that go on trying. Where connection tracking is at work before the agent, it knows their connections
/// by the time the VIP is there.
fn try_across_a_cold_start(is_tracked: bool) {
    const EVERY: Duration = Duration::from_millis(200);
    let network = Network::new(1, 1);
    let client = &network.clients[0];
    let _server = Server::start(&network.pods[0].namespace, "pod", 8080);
    lab::link::add_dummy("uplink", &[]).unwrap();
    ["0.0.0.0/0", "::/0"].iter().try_for_each(|prefix| lab::link::add_route_dev(prefix, "uplink")).unwrap();
    if is_tracked {
        run(
            "nft 'table inet cni { chain forward { type filter hook forward priority 0; ct state invalid counter; }; }'",
        );
    }
    let manifests = manifests(&objects(&network));
    let targets: Vec<String> = targets().into_iter().skip(5).step_by(2).collect();
    let is_over = AtomicBool::new(false);
    let (flows, connections) = thread::scope(|scope| {
        let over = Over(&is_over);
        let is_over = &is_over;
        let flows: Vec<_> = targets
            .iter()
            .map(|target| {
                scope.spawn(move || {
                    client.run(|| {
                        let flow = Flow::open(target, Duration::from_millis(100)).unwrap();
                        let mut answers = Vec::new();
                        while !is_over.load(Ordering::Relaxed) {
                            answers.extend(flow.ask().ok());
                            thread::sleep(Duration::from_millis(50));
                        }
                        (target, answers)
                    })
                })
            })
            .collect();
        // Connections begin at every stage. One that tracking knows as translated by nobody would stay so: each of its
        // packets renews that.
        let begin = || {
            thread::sleep(EVERY);
            let connect = |target: &str| Connection::open(target, PATIENCE)?.ask();
            let begun = targets.iter().map(|target| scope.spawn(move || (target, client.run(|| connect(target)))));
            begun.collect::<Vec<_>>()
        };
        let mut connecting = begin();
        connecting.extend(begin());
        let mut agent = manifests.agent(&[&FLAGS[..], &["--masquerade-all"]].concat());
        agent.until("serve", |agent| {
            connecting.extend(begin());
            agent.log().contains("audited")
        });
        connecting.extend(begin());
        let connections: Vec<_> = connecting.into_iter().map(|connecting| connecting.join().unwrap()).collect();
        drop(over);
        (flows.into_iter().map(|flow| flow.join().unwrap()).collect::<Vec<_>>(), connections)
    });
    let wrong: Vec<_> = connections.iter().filter(|(target, result)| *result != masqueraded("pod", target)).collect();
    let kinds: BTreeSet<String> = wrong.iter().map(|(_, result)| format!("{result:?}")).collect();
    assert!(wrong.is_empty(), "{} of {} connections: {kinds:?}", wrong.len(), connections.len());
    for (target, answers) in flows {
        assert!(!answers.is_empty(), "UDP to {target} is not served");
        let right = masqueraded("pod", target).unwrap();
        let wrong: Vec<_> = answers.iter().filter(|answer| **answer != right).collect();
        assert!(wrong.is_empty(), "UDP to {target}: {} of {} answers: {wrong:?}", wrong.len(), answers.len());
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn clients_that_retry_during_a_cold_start_are_served() {
    try_across_a_cold_start(false);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn clients_tracked_before_a_cold_start_are_served_after_it() {
    try_across_a_cold_start(true);
}

/// A counter of this thread's network namespace: a file has lines of names, and below each a line of numbers.
fn counter(file: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let place = |names: &str| names.split(' ').position(|word| word == name);
    let found = lines.chunks_exact(2).find_map(|pair| pair[1].split(' ').nth(place(pair[0])?)?.parse().ok());
    found.unwrap_or_else(|| panic!("{file} has no {name}"))
}

/// The packet filter knows a VIP before the device has it and after it had it. What comes in between must not leave a trace.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_connection_begun_before_its_vip_is_bound_is_served_later() {
    let network = Network::new(1, 1);
    let client = &network.clients[0];
    let _server = Server::start(&network.pods[0].namespace, "pod", 8080);
    lab::link::add_dummy("uplink", &["198.18.0.1/24"]).unwrap();
    lab::link::add_route_dev("0.0.0.0/0", "uplink").unwrap();
    let spec = json!({"clusterIPs": ["10.96.0.10"], "externalIPs": ["203.0.113.10"]});
    let manifests = manifests(&[service("web", spec), ready("web", ["10.244.1.1"])]);
    let mut agent = serving(&manifests, &["--ipvs-sync-period=300ms"]);
    // The second packet of a connection comes after a second, the third two seconds later: the second must do. Where the VIP is
    // back only after the second, the try says nothing.
    for _ in 0..10 {
        let (begun, repeated) = client.run(|| (counter("snmp", "ActiveOpens"), counter("netstat", "TCPSynRetrans")));
        let (result, late) = thread::scope(|scope| {
            let mut connecting = None;
            agent.stop_while(|| {
                lab::link::delete_address("kube-ipvs0", "203.0.113.10/32").unwrap();
                let connect = || client.run(|| Connection::open("203.0.113.10:80", PATIENCE)?.ask());
                connecting = Some(scope.spawn(connect));
                let has_begun = || client.run(|| counter("snmp", "ActiveOpens")) > begun;
                lab::wait::until("begin a connection", has_begun).unwrap();
            });
            agent.until("bind the VIP again", |_| addresses().contains(&"203.0.113.10/32".to_owned()));
            let late = client.run(|| counter("netstat", "TCPSynRetrans")) - repeated;
            (connecting.unwrap().join().unwrap(), late)
        });
        assert_eq!(result, masqueraded("pod", "203.0.113.10:80"));
        if late == 0 {
            let all = client.run(|| counter("netstat", "TCPSynRetrans")) - repeated;
            assert!(all <= 1, "the client was served after {all} more packets");
            return;
        }
    }
    panic!("the VIP was never back in time");
}
