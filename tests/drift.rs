//! Whatever somebody does to the kernel behind the agent's back: within a sync period it is as it was, and that is told.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::process::Command;

use common::{
    Agent, Filter, Manifests, addresses, eth0, has_tables, http, ipvs, ipvsadm, listed_filter, metric, node, run,
    service, slice,
};
use lab::link;
use lab::netns::isolate;
use test_apiserver::Server;

const SYNC_PERIOD: &str = "--ipvs-sync-period=300ms";
/// Otherwise nobody could change the tables, on kernels that have owners of tables.
const OTHERS_MAY_WRITE: &str = "--own-tables=false";
/// How many audits may pass until all is as it was. Some changes take away what others need.
const AUDITS: usize = 3;
const FOREIGN: &str = "-A -t 172.16.0.1:80 -s rr";

/// What the agent has made, and somebody else's virtual server.
#[derive(Debug, PartialEq, Eq)]
struct Kernel {
    servers: Vec<String>,
    addresses: Vec<String>,
    filter: Filter,
}

impl Kernel {
    /// `None` where not even the tables are there.
    fn read() -> Option<Self> {
        let is_there = has_tables() && link::exists("kube-ipvs0").unwrap();
        is_there.then(|| Self { servers: ipvs(), addresses: addresses(), filter: Filter::read() })
    }

    /// Whether the kernel is like this. What is read without running a program is read first.
    fn is_again(&self) -> bool {
        ipvs() == self.servers && addresses() == self.addresses && self.filter.is_again()
    }
}

/// What somebody does, with commands of the shell.
const MEDDLING: [(&str, &str); 24] = [
    ("removes an address", "ip address del 10.96.0.10/32 dev kube-ipvs0"),
    ("adds a surplus address", "ip address add 10.96.0.99/32 dev kube-ipvs0"),
    ("flushes the addresses", "ip address flush dev kube-ipvs0"),
    ("deletes the device", "ip link del kube-ipvs0"),
    ("renames the device", "ip link set kube-ipvs0 down; ip link set kube-ipvs0 name other"),
    ("makes the device anew", "ip link del kube-ipvs0; ip link add kube-ipvs0 type dummy || true"),
    ("deletes a virtual server", "ipvsadm -D -t 10.96.0.10:80"),
    ("deletes all virtual servers", "ipvsadm -C; ipvsadm -A -t 172.16.0.1:80 -s rr"),
    ("changes a scheduler", "ipvsadm -E -t 10.96.0.10:80 -s wlc"),
    ("makes a virtual server persistent", "ipvsadm -E -t 10.96.0.10:80 -s rr -p 60"),
    ("sets a weight to 0", "ipvsadm -e -t 10.96.0.10:80 -r 10.0.0.1:8080 -m -w 0"),
    ("sets a weight to 100", "ipvsadm -e -t 10.96.0.10:80 -r 10.0.0.1:8080 -m -w 100"),
    ("sets a threshold", "ipvsadm -e -t 10.96.0.10:80 -r 10.0.0.1:8080 -m -w 1 -x 5 -y 2"),
    (
        "forwards otherwise",
        "ipvsadm -d -t 10.96.0.10:80 -r 10.0.0.1:8080; ipvsadm -a -t 10.96.0.10:80 -r 10.0.0.1:8080 -i -w 1",
    ),
    ("deletes a real server", "ipvsadm -d -t 10.96.0.10:80 -r 10.0.0.1:8080"),
    ("adds a real server", "ipvsadm -a -t 10.96.0.10:80 -r 10.66.6.6:8080 -m"),
    ("deletes the table", "nft delete table ip kube-ipvs"),
    ("flushes the packet filter", "nft flush ruleset"),
    ("flushes the rules", "nft flush table ip kube-ipvs"),
    ("adds a rule", "nft insert rule ip kube-ipvs filter-input drop"),
    ("lets the table sleep", "nft add table ip kube-ipvs '{ flags dormant; }'"),
    ("empties a set", "nft flush set ip kube-ipvs vips"),
    ("adds to a set", "nft add element ip kube-ipvs vips '{ 10.96.0.98 }'"),
    ("makes a chain", "nft add chain ip kube-ipvs mine"),
];

fn cluster() -> (Server, Agent, Manifests) {
    isolate().unwrap();
    eth0();
    ipvsadm(FOREIGN);
    let server = Server::new();
    let manifests = Manifests::new();
    for object in [
        node(),
        service("web", "10.96.0.10"),
        service("zoo", "10.96.0.11"),
        slice("web-1", "web", &["10.0.0.1", "10.0.0.2"]),
        slice("zoo-1", "zoo", &["10.0.0.3"]),
    ] {
        server.apply(object);
    }
    let kubeconfig = manifests.path().join("kubeconfig");
    Server::write_kubeconfig(&kubeconfig, server.listen_in_thread().unwrap());
    let kubeconfig = format!("--kubeconfig={}", kubeconfig.display());
    let mut agent = Agent::start(&[&kubeconfig, SYNC_PERIOD, "--ipvs-min-sync-period=0s", OTHERS_MAY_WRITE]);
    agent.says("audited");
    (server, agent, manifests)
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn drift_is_repaired_within_a_sync_period_and_reported() {
    let (server, mut agent, _manifests) = cluster();
    agent.until("be ready", |_| Kernel::read().is_some_and(|kernel| kernel.servers.len() == 6));
    let right = Kernel::read().unwrap();
    let found = || metric("kube_ipvs_drift_found_total").unwrap_or(0.0);
    for (what, command) in MEDDLING {
        let before = found();
        // Sometimes the agent is faster than the second half of it.
        run(&format!("{command} || true"));
        let mut audits = 0;
        while !(found() > before && right.is_again()) {
            assert!(audits < AUDITS, "that somebody {what} is not repaired: {:#?}\n{}", Kernel::read(), agent.log());
            agent.audits(1);
            audits += 1;
        }
        println!("{what}: repaired by audit {audits} at the latest");
        if link::exists("other").unwrap() {
            link::delete("other").unwrap();
        }
    }
    assert_eq!(http("GET", common::HEALTH, "/healthz", "").unwrap().status, 200);
    let is_told = |event: &serde_json::Value| event["reason"] == "DriftFound" && event["regarding"]["kind"] == "Node";
    agent.until("tell the Node's Events", |_| server.events().iter().any(is_told));
    assert!(ipvs().iter().any(|line| line == FOREIGN), "{:#?}", ipvs());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_changed_sysctl_is_restored_and_reported() {
    let (_server, mut agent, _manifests) = cluster();
    for key in ["net.ipv4.ip_forward", "net.ipv4.vs.conntrack", "net.ipv4.vs.expire_nodest_conn"] {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        fs::write(&path, "0").unwrap();
        agent.until("set it again", |_| fs::read_to_string(&path).unwrap().trim() == "1");
        agent.says(&format!("another program had changed {key}, which Services require: it is 1 again"));
    }
    agent.until("count none as wrong", |_| metric("kube_ipvs_settings_wrong") == Some(0.0));
}

/// While somebody else's device has the name, nothing can be bound; what is no address goes on.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_foreign_kube_ipvs0_is_reported_and_the_rest_keeps_working() {
    let (server, mut agent, _manifests) = cluster();
    let right = Kernel::read().unwrap().addresses;
    // In one go, before the agent can make its own.
    agent.stop_while(|| {
        link::delete("kube-ipvs0").unwrap();
        link::add_veth("kube-ipvs0", "peer", None::<&fs::File>).unwrap();
    });
    agent.says("the interface kube-ipvs0 is not a dummy device");
    server.apply(slice("web-1", "web", &["10.0.0.9"]));
    agent.until("be unhealthy", |_| {
        http("GET", common::HEALTH, "/healthz", "").is_some_and(|answer| answer.status == 503)
    });
    link::delete("kube-ipvs0").unwrap();
    agent.until("bind all again", |_| Kernel::read().is_some_and(|kernel| kernel.addresses == right));
    agent.until("take in what came meanwhile", |_| ipvs().iter().any(|line| line.contains("10.0.0.9:8080")));
    agent.until("be healthy", |_| {
        http("GET", common::HEALTH, "/healthz", "").is_some_and(|answer| answer.status == 200)
    });
}

/// Another program that writes the same table again and again: the agent does not give up, and everything else is served.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn two_writers_of_one_table_affect_only_that_table() {
    let (server, mut agent, _manifests) = cluster();
    for round in 0..20 {
        // In one transaction; it is refused while the agent makes the table anew.
        let meddling = "flush set ip kube-ipvs vips; add rule ip kube-ipvs filter-input counter";
        Command::new("nft").arg(meddling).output().unwrap();
        server.apply(slice("web-1", "web", &[&format!("10.0.1.{round}")]));
        agent.until("serve what changes", |_| {
            ipvs().iter().any(|line| line.contains(&format!("-r 10.0.1.{round}:8080 -m -w 1")))
        });
    }
    agent.until("have the last word", |_| {
        let words = listed_filter();
        words.iter().any(|it| it.contains("10.96.0.10")) && !words.iter().any(|it| it.contains("counter packets"))
    });
}
