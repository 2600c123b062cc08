//! From kube-proxy to kube-ipvs, and back: with clients that go on all along, and none of them noticing.

use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::kube_proxy::{Iptables, install_recording, recording};
use serde_json::json;

use crate::common::ipvsadm;
use crate::common::{Manifests, addresses, ipvs, run};
use crate::network::{CLUSTER_CIDR, Network};
use crate::objects::{file, manifests, ready, service};
use crate::traffic::{Connection, PATIENCE, Server, tcp};
use crate::{FLAGS, Over, finds_nothing_to_change, serving};

/// What the recording `lb-vip` has: a Service of type LoadBalancer.
const CLUSTER_IP: &str = "10.96.0.10:80";
const LB_IP: &str = "203.0.113.10:80";
const NODE_PORT: &str = "192.168.1.1:30080";
const RECORDING: &str = "lb-vip";

const FOREIGN: [&str; 3] = [
    "-A FORWARD -s 10.9.0.0/16 -m comment --comment \"of somebody else\" -j ACCEPT",
    "-A INPUT -j SOMEBODYS",
    "-A SOMEBODYS -p tcp -m tcp --dport 22 -j ACCEPT",
];

fn web(network: &Network) -> Manifests {
    let spec = json!({
        "type": "LoadBalancer",
        "clusterIPs": ["10.96.0.10"],
        "loadBalancerIPs": ["203.0.113.10"],
        "ports": [{"name": "tcp", "protocol": "TCP", "port": 80, "nodePort": 30080}],
    });
    manifests(&[service("web", spec), ready("web", [network.pods[0].v4, network.pods[1].v4])])
}

/// The kernel as kube-proxy leaves it that served this Service.
fn left_by_kube_proxy(network: &Network, iptables: Iptables, tool: &str) {
    for setting in ["conntrack", "expire_nodest_conn", "expire_quiescent_template"] {
        std::fs::write(format!("/proc/sys/net/ipv4/vs/{setting}"), "1").unwrap();
    }
    lab::link::add_dummy("kube-ipvs0", &[]).unwrap();
    lab::link::set_down("kube-ipvs0").unwrap();
    for address in ["10.96.0.10", "203.0.113.10"] {
        lab::link::add_address("kube-ipvs0", address).unwrap();
    }
    for front_end in [CLUSTER_IP, LB_IP, NODE_PORT, "10.244.0.1:30080"] {
        ipvsadm(&format!("-A -t {front_end} -s rr"));
        for pod in &network.pods {
            ipvsadm(&format!("-a -t {front_end} -r {}:8080 -m -w 1", pod.v4));
        }
    }
    run(&format!("{tool} -N SOMEBODYS"));
    for rule in FOREIGN {
        run(&format!("{tool} {rule}"));
    }
    rules_of_kube_proxy(network, iptables);
}

/// Its chains and sets, with the endpoints that are here.
fn rules_of_kube_proxy(network: &Network, iptables: Iptables) {
    install_recording(&recording(RECORDING), iptables);
    for pod in &network.pods {
        run(&format!("ipset add KUBE-LOOP-BACK {0},tcp:8080,{0}", pod.v4));
    }
}

/// Makes connections to the Service from everywhere while something happens; returns how many there were. None may fail,
/// and those that were open before stay so.
fn under_load(network: &Network, action: impl FnOnce(&dyn Fn())) -> usize {
    let is_over = AtomicBool::new(false);
    let counts: [AtomicUsize; 4] = Default::default();
    // Waits until everybody has made connections meanwhile.
    let settle = || {
        let before = counts.each_ref().map(|count| count.load(Ordering::Relaxed));
        let more = || counts.iter().zip(before).all(|(count, before)| count.load(Ordering::Relaxed) > before + 5);
        lab::wait::until("connect from everywhere", || more() || is_over.load(Ordering::Relaxed)).unwrap();
    };
    let (client, pod) = (&network.clients[0], &network.pods[0]);
    thread::scope(|scope| {
        let over = Over(&is_over);
        let sources = [(Some(client), LB_IP), (Some(client), NODE_PORT), (Some(pod), CLUSTER_IP), (None, CLUSTER_IP)];
        let loads: Vec<_> = sources
            .into_iter()
            .zip(&counts)
            .map(|((host, target), count)| {
                let is_over = &is_over;
                let load = move || {
                    let mut lasting = Connection::open(target, PATIENCE).unwrap();
                    let mut failed = Vec::new();
                    while !is_over.load(Ordering::Relaxed) {
                        failed.extend(tcp(target).err().map(|word| format!("new: {word}")));
                        failed.extend(lasting.ask().err().map(|word| format!("open: {word}")));
                        count.fetch_add(1, Ordering::Relaxed);
                        thread::sleep(Duration::from_millis(10));
                    }
                    (format!("{target}: {failed:?}"), count.load(Ordering::Relaxed), failed.len())
                };
                // The node is this thread's namespace, and that of the threads it starts.
                scope.spawn(move || match host {
                    Some(host) => host.run(load),
                    None => load(),
                })
            })
            .collect();
        settle();
        action(&settle);
        settle();
        drop(over);
        let mut all = 0;
        for load in loads {
            let (what, begun, failed) = load.join().unwrap();
            assert_eq!(failed, 0, "of {begun} connections: {what}");
            assert!(begun > 10, "no load: {what}");
            all += begun;
        }
        all
    })
}

fn kube_ipvs(arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-ipvs"));
    let output = command.args(arguments).env("NO_COLOR", "1").output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {log}");
    log
}

/// What is left of kube-proxy.
fn kube_objects() -> Vec<String> {
    let all = ["iptables-nft-save", "ip6tables-nft-save", "ipset list -n"].map(run).concat();
    let legacy = if std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default().is_empty() {
        String::new()
    } else {
        ["iptables-legacy-save", "ip6tables-legacy-save"].map(run).concat()
    };
    (all + &legacy).lines().filter(|line| line.contains("KUBE-")).map(str::to_owned).collect()
}

fn taken_over_and_back(iptables: Iptables, tool: &str) {
    let network = Network::new(1, 2);
    let _servers = [0, 1].map(|pod| Server::start(&network.pods[pod].namespace, "web", 8080));
    left_by_kube_proxy(&network, iptables, tool);
    let manifests = web(&network);
    let flag = format!("--manifests={}", manifests.path().display());
    let before = ipvs();
    let connections = || -> u64 {
        let list = run("ipvsadm -Ln --stats --exact");
        list.lines()
            .filter(|line| line.starts_with("TCP"))
            .map(|line| line.split_whitespace().nth(2).unwrap().parse::<u64>().unwrap())
            .sum()
    };

    let served_before = connections();
    let begun = under_load(&network, |settle| {
        let log = kube_ipvs(&[&["takeover", &flag, "--hostname-override=node-a", CLUSTER_CIDR], &FLAGS[..]].concat());
        let (in_place, gone) = (log.find("audited").unwrap(), log.find("done: delete").unwrap());
        assert!(in_place < gone, "never before ours is in place: {log}");
        assert!(!log.contains("virtual_servers="), "virtual servers are kept as they are: {log}");
        settle();
        let _agent = serving(&manifests, &[CLUSTER_CIDR]);
        settle();
    });
    println!("{begun} connections through the takeover, none failed");
    // Nothing was made anew: it goes on counting. (The kernel sums up every two seconds.)
    lab::wait::until("count them all", || connections() >= served_before + begun as u64).unwrap();
    assert_eq!(ipvs(), before);
    assert_eq!(addresses(), ["10.96.0.10/32", "203.0.113.10/32"]);
    assert_eq!(kube_objects(), [""; 0]);
    let rules = run(&format!("{tool}-save"));
    for rule in FOREIGN {
        assert!(rules.contains(rule), "{rule} is gone: {rules}");
    }
    finds_nothing_to_change(&manifests);
    let log = kube_ipvs(&[&["takeover", &flag, "--hostname-override=node-a", CLUSTER_CIDR], &FLAGS[..]].concat());
    assert!(log.contains("kube-proxy left nothing"), "it may be repeated: {log}");

    // The way back: kube-proxy makes what it makes and finds the rest in place; then our tables go.
    let begun = under_load(&network, |settle| {
        rules_of_kube_proxy(&network, iptables);
        settle();
        kube_ipvs(&["cleanup", "--filter-only"]);
    });
    println!("{begun} connections on the way back, none failed");
    assert!(!run("nft list tables").contains("kube-ipvs"));
    assert_eq!(ipvs(), before);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn takeover_and_return_lose_no_connection_with_iptables_nft() {
    taken_over_and_back(Iptables::Nft, "iptables-nft");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn takeover_and_return_lose_no_connection_with_iptables_legacy() {
    taken_over_and_back(Iptables::Legacy, "iptables-legacy");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_takeover_that_cannot_sync_removes_nothing() {
    let network = Network::new(1, 2);
    left_by_kube_proxy(&network, Iptables::Nft, "iptables-nft");
    let before = kube_objects();
    assert!(before.len() > 20, "{before:?}");
    let manifests = web(&network);
    manifests.write("broken.yaml", "kind: Service\nmetadata: [");
    let flag = format!("--manifests={}", manifests.path().display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-ipvs"));
    let output = command.args(["takeover", &flag, "--hostname-override=node-a"]).args(FLAGS).output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && log.contains("audited") && log.contains("not everything could be parsed"),
        "{log}"
    );
    assert_eq!(kube_objects(), before);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_cleanup_flag_removes_our_and_kube_proxys_objects() {
    let network = Network::new(1, 2);
    left_by_kube_proxy(&network, Iptables::Nft, "iptables-nft");
    serving(&web(&network), &[CLUSTER_CIDR]).kill();
    let log = kube_ipvs(&["--cleanup"]);
    assert_eq!((kube_objects(), ipvs()), (vec![], vec![]), "{log}");
    assert!(!run("nft list tables").contains("kube-ipvs") && !lab::link::exists("kube-ipvs0").unwrap(), "{log}");
    let rules = run("iptables-nft-save");
    assert!(FOREIGN.iter().all(|rule| rules.contains(rule)), "{rules}");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_service_that_the_kernel_refuses_does_not_stop_a_takeover() {
    let network = Network::new(1, 2);
    left_by_kube_proxy(&network, Iptables::Nft, "iptables-nft");
    let manifests = web(&network);
    // Where the clients' network is talked to as a whole.
    let odd = service("odd", json!({"clusterIPs": ["10.96.0.99"]}));
    manifests.write("odd.json", &file(&[odd, ready("odd", ["192.168.1.255"])]));
    let flag = format!("--manifests={}", manifests.path().display());
    let log = kube_ipvs(&[&["takeover", &flag, "--hostname-override=node-a", CLUSTER_CIDR], &FLAGS[..]].concat());
    assert!(log.contains("192.168.1.255") && log.contains("for single Services"), "{log}");
    assert_eq!(kube_objects(), [""; 0], "{log}");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn takeover_without_iptables_legacy_tools_warns_and_continues() {
    let network = Network::new(1, 2);
    left_by_kube_proxy(&network, Iptables::Legacy, "iptables-legacy");
    let manifests = web(&network);
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-ipvs"));
    command.arg("takeover").arg(format!("--manifests={}", manifests.path().display())).args(FLAGS);
    // As in an image that holds the agent and nothing else.
    let output =
        command.args(["--hostname-override=node-a", CLUSTER_CIDR]).env("PATH", "/nonexistent").output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    for text in ["not checked: ", "iptables-legacy-restore", "left: ", "ipset KUBE-CLUSTER-IP"] {
        assert!(log.contains(text), "{text}: {log}");
    }
    assert!(run("iptables-legacy-save").contains("KUBE-SERVICES"));
}
