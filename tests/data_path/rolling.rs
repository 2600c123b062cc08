//! A rolling update under load, and what else a Service lives through, without one connection lost.

use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ipvs_netlink::{ConnectionState, Connections};
use lab::objects::State;
use serde_json::json;

use crate::common::{Agent, Manifests, ipvs, run};
use crate::network::{Host, Network};
use crate::objects::{file, manifests, service, slice};
use crate::traffic::{Connection, PATIENCE, Server, tcp};
use crate::{FLAGS, Over, serving};

const VIP: &str = "10.96.0.10:80";
const PER_SECOND: u32 = 200;
const THREADS: u32 = 4;
/// How many connections are made in each state.
const ENOUGH: usize = 40;

/// Makes new connections at a steady pace until it is over, and counts them; returns what went wrong.
fn new_connections(is_over: &AtomicBool, count: &AtomicUsize) -> Vec<String> {
    let (start, mut begun, mut failed) = (Instant::now(), 0, Vec::new());
    while !is_over.load(Ordering::Relaxed) {
        if let Err(word) = tcp(VIP) {
            failed.push(format!("{word} after {:?}", start.elapsed()));
        }
        begun += 1;
        count.fetch_add(1, Ordering::Relaxed);
        let due = start + Duration::from_secs(1) * begun * THREADS / PER_SECOND;
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    failed
}

/// Whether no connection to an endpoint is under way: the client of each has closed it.
fn is_idle(pod: &Host) -> bool {
    let mut connections = Connections::of_this_namespace().unwrap().map(Result::unwrap);
    let is_over = [ConnectionState::FinWait, ConnectionState::TimeWait, ConnectionState::Close];
    connections.all(|connection| connection.real_address.ip() != pod.v4 || is_over.contains(&connection.state))
}

/// The endpoints of the Service, each with its state, and the directory they are written to.
struct Endpoints<'a> {
    manifests: &'a Manifests,
    now: Vec<(&'a Host, State)>,
}

impl Endpoints<'_> {
    fn write(&self) {
        let slice = slice("web", self.now.iter().map(|(host, state)| (host.v4, *state)));
        self.manifests.write("slice.json", &file(&[slice]));
    }

    /// Waits until exactly those that are ready get new connections.
    fn are_served(&self, agent: &mut Agent) {
        let mut ready: Vec<String> = self
            .now
            .iter()
            .filter(|(_, state)| *state == State::Ready)
            .map(|(host, _)| format!("-a -t {VIP} -r {}:8080 -m -w 1", host.v4))
            .collect();
        ready.sort();
        agent.until("serve what is ready", |_| {
            let lines = ipvs().into_iter().filter(|line| line.contains("-t") && line.ends_with("-w 1"));
            lines.collect::<Vec<_>>() == ready
        });
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_rolling_update_a_kill_and_an_upgrade_lose_no_connection() {
    let network = Network::new(1, 9);
    let (client, stayer) = (&network.clients[0], &network.pods[8]);
    let _stayer = Server::start(&stayer.namespace, "stayer", 8080);
    let (old, new) = network.pods[..8].split_at(4);
    let mut servers: Vec<Server> = old.iter().map(|pod| Server::start(&pod.namespace, "old", 8080)).collect();
    let manifests = manifests(&[service("web", json!({"clusterIPs": ["10.96.0.10"]}))]);
    let now = old.iter().chain([stayer]).map(|pod| (pod, State::Ready)).collect();
    let mut endpoints = Endpoints { manifests: &manifests, now };
    endpoints.write();
    let mut agent = serving(&manifests, &[]);
    let mut lasting = loop {
        let mut connection = client.run(|| Connection::open(VIP, PATIENCE)).unwrap();
        if connection.ask().unwrap().backend == "stayer" {
            break connection;
        }
    };
    let mut lasts =
        |after: &str| assert_eq!(lasting.ask().map(|answer| answer.backend), Ok("stayer".into()), "{after}");
    let (is_over, begun) = (AtomicBool::new(false), AtomicUsize::new(0));
    let more = || {
        let before = begun.load(Ordering::Relaxed);
        lab::wait::until("connect", || begun.load(Ordering::Relaxed) >= before + ENOUGH).unwrap();
    };
    let mut failed = Vec::new();
    thread::scope(|scope| {
        let over = Over(&is_over);
        let loads: Vec<_> =
            (0..THREADS).map(|_| scope.spawn(|| client.run(|| new_connections(&is_over, &begun)))).collect();
        for (gone, pod) in new.iter().enumerate() {
            servers.push(Server::start(&pod.namespace, "new", 8080));
            endpoints.now.push((pod, State::Ready));
            endpoints.write();
            endpoints.are_served(&mut agent);
            more();
            let leaving = endpoints.now.iter_mut().find(|(pod, _)| pod.v4 == old[gone].v4).unwrap();
            leaving.1 = State::Terminating;
            endpoints.write();
            endpoints.are_served(&mut agent);
            // The pod has its grace, ends what it has begun, and is no more.
            more();
            lab::wait::until("finish connections", || is_idle(&old[gone])).unwrap();
            drop(servers.remove(0));
            endpoints.now.retain(|(pod, _)| pod.v4 != old[gone].v4);
            endpoints.write();
            lasts("an endpoint was replaced");
        }
        endpoints.are_served(&mut agent);
        agent.kill();
        more();
        lasts("the agent was killed");
        let mut agent = serving(&manifests, &[]);
        lasts("it was started again");
        agent.terminate();
        assert!(agent.ends().success());
        let upgrade = manifests.path().join(".upgraded");
        // Not by this process: what it writes, another test's child may hold open when this is to be run.
        run(&format!("cp {} {}", env!("CARGO_BIN_EXE_kube-ipvs"), upgrade.display()));
        let mut upgraded = Agent::start_command(
            Command::new(&upgrade)
                .args(["--hostname-override=node-a", "--ipvs-min-sync-period=0s"])
                .args(FLAGS)
                .arg(format!("--manifests={}", manifests.path().display())),
        );
        upgraded.says("audited, nothing to change");
        lasts("it was upgraded");
        endpoints.now.retain(|(pod, _)| pod.v4 == stayer.v4 || pod.v4 == new[0].v4);
        endpoints.write();
        endpoints.are_served(&mut upgraded);
        more();
        lasts("all others but one were removed");
        drop(over);
        for load in loads {
            failed.extend(load.join().unwrap());
        }
    });
    println!("{begun:?} connections");
    assert!(failed.is_empty(), "{} of {begun:?} connections failed: {failed:?}", failed.len());
}
