//! The agent is one program that runs no other, whatever it has to do.

use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::FLAGS;
use crate::common::{Agent, addresses, has_tables, ipvs, run};
use crate::network::{CLUSTER_CIDR, Network};
use crate::objects::{file, manifests, ready, service};
use crate::traffic::Server;

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_agent_runs_no_other_program() {
    let network = Network::new(1, 2);
    let _server = Server::start(&network.pods[0].namespace, "web", 8080);
    let spec = |ranges: &[&str]| {
        json!({
            "type": "LoadBalancer",
            "clusterIPs": ["10.96.0.10", "fd00:96::10"],
            "loadBalancerIPs": ["203.0.113.10"],
            "loadBalancerSourceRanges": ranges,
        })
    };
    let manifests = manifests(&[service("web", spec(&["192.168.1.0/24"])), ready("web", ["10.244.1.1"])]);
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace");
    let mut agent = Agent::start_command(
        Command::new("strace")
            .args(["-f", "-e", "trace=execve,execveat", "-o"])
            .arg(&trace)
            .arg(env!("CARGO_BIN_EXE_kube-ipvs"))
            .args(["--hostname-override=node-a", "--ipvs-min-sync-period=0s", "--ipvs-sync-period=300ms", CLUSTER_CIDR])
            // Otherwise nobody could delete a table.
            .arg("--own-tables=false")
            .args(FLAGS)
            .arg(format!("--manifests={}", manifests.path().display())),
    );
    agent.says("audited");
    assert!(network.clients[0].udp("10.96.0.10:80").is_ok());
    // Endpoints and ranges change: a UDP flow goes from connection tracking, and a real server drains.
    manifests.write("objects.json", &file(&[service("web", spec(&["10.0.0.0/8"])), ready("web", ["10.244.1.2"])]));
    agent.until("take in the change", |_| ipvs().iter().any(|line| line.contains("10.244.1.2")));
    // Repairs, settings of the node and the device among them.
    run("nft delete table ip kube-ipvs");
    lab::link::delete("kube-ipvs0").unwrap();
    agent.until("repair", |_| addresses().contains(&"10.96.0.10/32".to_owned()) && has_tables());
    manifests.remove("objects.json");
    agent.until("take everything away", |_| ipvs().is_empty());
    agent.audits(2);
    let read = || std::fs::read_to_string(&trace).unwrap();
    // Each line begins with the process. strace would leave the agent behind if it were stopped itself.
    let pid: i32 = read().split_whitespace().next().unwrap().parse().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    assert!(agent.ends().success(), "{}", agent.log());
    ran_nothing(&read());
    // Served once more, to be cleaned up.
    manifests.write("objects.json", &file(&[service("web", spec(&["10.0.0.0/8"]))]));
    assert!(manifests.agent(&[&FLAGS[..], &["--once"]].concat()).ends().success());
    let mut cleanup = Agent::start_command(
        Command::new("strace")
            .args(["-f", "-e", "trace=execve,execveat", "-o"])
            .arg(&trace)
            .args([env!("CARGO_BIN_EXE_kube-ipvs"), "cleanup"]),
    );
    assert!(cleanup.ends().success(), "{}", cleanup.log());
    assert!(ipvs().is_empty());
    ran_nothing(&read());
}

/// The one program in the trace is the agent.
fn ran_nothing(trace: &str) {
    let programs: Vec<&str> = trace.lines().filter(|line| line.contains("exec")).collect();
    assert_eq!(programs.len(), 1, "{trace}");
    assert!(programs[0].contains("/kube-ipvs"), "{trace}");
}
