//! A client that asks all the time while an agent starts with many Services: nothing goes wrong on the way, not once.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::network::{Network, masqueraded};
use crate::objects::{manifests, ready, service};
use crate::traffic::{Connection, Flow, PATIENCE, Server, Try};
use crate::{FLAGS, Over};

/// How many Services there are.
const SERVICES: usize = 1000;
/// Among them those with endpoints that live: one that is served before all others, and the last by name.
const LIVING: [(&str, u8); 2] = [("kubernetes", 1), ("z-last", 2)];
/// How long a client at first waits for a VIP that may not be there yet: the kernel sends few unreachables to one peer.
/// It waits longer each time, or on a busy machine it would never hear an answer.
const FIRST_PATIENCE: Duration = Duration::from_millis(40);
/// How often a client is to be served.
const ENOUGH: usize = 5;

/// A thousand Services with endpoints nobody has, but for a few with the first pod. All are served from outside, where
/// everybody is masqueraded.
pub(crate) fn objects(network: &Network) -> Vec<Value> {
    let pod = &network.pods[0];
    let mut objects = Vec::new();
    for number in 0..SERVICES - LIVING.len() {
        let name = format!("service-{number}");
        let vip = format!("10.97.{}.{}", number / 250, number % 250 + 1);
        let external = format!("203.0.{}.{}", number / 250, number % 250 + 1);
        objects.push(service(&name, json!({"clusterIPs": [vip], "externalIPs": [external]})));
        objects.push(ready(&name, [format!("10.244.7.{}", number % 250 + 1)]));
    }
    for (name, number) in LIVING {
        let spec = json!({
            "clusterIPs": [format!("10.96.0.{number}"), format!("fd00:96::{number}")],
            "externalIPs": [format!("203.0.113.{number}"), format!("2001:db8::{number}")],
        });
        objects.extend([service(name, spec), ready(name, [pod.v4]), ready(name, [pod.v6])]);
    }
    objects
}

/// Where the living ones answer.
pub(crate) fn targets() -> Vec<String> {
    let of = |number: u8| {
        [
            format!("10.96.0.{number}:80"),
            format!("203.0.113.{number}:80"),
            format!("[fd00:96::{number}]:80"),
            format!("[2001:db8::{number}]:80"),
        ]
    };
    LIVING.iter().flat_map(|(_, number)| of(*number)).collect()
}

/// How often a client has asked, and was served.
#[derive(Default)]
struct Count {
    asked: AtomicUsize,
    served: AtomicUsize,
}

/// Asks a target until it is over. Returns what came of it, in order.
fn hammer(is_over: &AtomicBool, count: &Count, ask: impl Fn(Duration) -> Try) -> Vec<Try> {
    let mut results: Vec<Try> = Vec::new();
    let mut patience = FIRST_PATIENCE;
    while !is_over.load(Ordering::Relaxed) {
        let is_served = results.last().is_some_and(Result::is_ok);
        let result = ask(if is_served { PATIENCE } else { patience });
        count.asked.fetch_add(1, Ordering::Relaxed);
        count.served.fetch_add(usize::from(result.is_ok()), Ordering::Relaxed);
        results.push(result);
        patience += Duration::from_millis(2);
        thread::sleep(Duration::from_millis(50));
    }
    results
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_cold_start_of_1000_services_never_serves_a_client_wrongly() {
    let network = Network::new(1, 1);
    let client = &network.clients[0];
    let _server = Server::start(&network.pods[0].namespace, "pod", 8080);
    // Listens on every address, so on every VIP: nobody may ever get there by one.
    let _host = Server::start(&lab::netns::Namespace::own().unwrap(), "host", 80);
    let manifests = manifests(&objects(&network));
    let (targets, is_over) = (targets(), AtomicBool::new(false));
    let counts: Vec<[Count; 2]> = targets.iter().map(|_| Default::default()).collect();
    let results = thread::scope(|scope| {
        let over = Over(&is_over);
        let is_over = &is_over;
        let asking: Vec<_> = targets
            .iter()
            .zip(&counts)
            .flat_map(|(target, [tcp, udp])| {
                let by_tcp = move |patience| Connection::open(target, patience)?.ask();
                let by_udp = move |patience| Flow::open(target, patience)?.ask();
                [
                    ("TCP", target, scope.spawn(move || client.run(|| hammer(is_over, tcp, by_tcp)))),
                    ("UDP", target, scope.spawn(move || client.run(|| hammer(is_over, udp, by_udp)))),
                ]
            })
            .collect();
        let have_all = |number: fn(&Count) -> &AtomicUsize, wanted| {
            counts.iter().flatten().all(|count| number(count).load(Ordering::Relaxed) >= wanted)
        };
        lab::wait::until("ask for every target", || have_all(|count| &count.asked, 1)).unwrap();
        let mut agent = manifests.agent(&[&FLAGS[..], &["--masquerade-all"]].concat());
        agent.says("audited");
        agent.until("serve every target", |_| have_all(|count| &count.served, ENOUGH));
        drop(over);
        asking
            .into_iter()
            .map(|(protocol, target, asking)| (protocol, target, asking.join().unwrap()))
            .collect::<Vec<_>>()
    });
    let mut total = [0, 0];
    for (protocol, target, results) in results {
        let begin = results.iter().position(Result::is_ok).unwrap_or(results.len());
        let (before, after) = results.split_at(begin);
        let is_absence = |result: &Try| matches!(result, Err(word) if word == "unreachable" || word == "timeout");
        let wrong: Vec<_> = before.iter().filter(|result| !is_absence(result)).collect();
        assert!(wrong.is_empty(), "{protocol} to {target} before it was served: {wrong:?}");
        let right = masqueraded("pod", target);
        let wrong: Vec<_> = after.iter().filter(|result| **result != right).collect();
        assert!(wrong.is_empty(), "{protocol} to {target} once it was served: {wrong:?} of {}", after.len());
        assert!(!before.is_empty() && after.len() > 3, "{protocol} to {target}: {} {}", before.len(), after.len());
        total = [total[0] + before.len(), total[1] + after.len()];
    }
    println!("{} tries before, {} after, none wrong", total[0], total[1]);
}
