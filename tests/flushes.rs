//! What another program flushes is back at once, not at the next audit: these agents have a sync period of an hour.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::process::Command;

use common::{Agent, Manifests, addresses, eth0, has_tables, ipvs, metric, node, observed_filter, run, service, slice};
use lab::link;
use lab::netns::isolate;

const BY_ROUTES: &str = "--vip-binding=route";
const OTHERS_MAY_WRITE: &str = "--own-tables=false";

/// Two Services of both families, and an agent that serves them.
fn cluster(flags: &[&str]) -> (Manifests, Agent) {
    isolate().unwrap();
    eth0();
    let manifests = Manifests::new();
    manifests.write("node.yaml", &node());
    for (name, address, backend) in
        [("web", "10.96.0.10", "10.0.0.1"), ("zoo", "10.96.0.11", "10.0.0.2"), ("six", "fd00:96::10", "fd00::1")]
    {
        manifests.write(&format!("{name}.yaml"), &service(name, address));
        manifests.write(&format!("{name}-1.yaml"), &slice(&format!("{name}-1"), name, &[backend]));
    }
    let mut agent = manifests.agent(&[&["--ipvs-sync-period=1h", "--ipvs-min-sync-period=0s"], flags].concat());
    agent.says("audited");
    agent.until("serve all", |_| ipvs().len() == 6);
    (manifests, agent)
}

/// What the agent has made: virtual servers, addresses, routes, and how much is in the packet filter.
fn state() -> (Vec<String>, Vec<String>, Vec<String>, usize) {
    let routes = link::routes(255, 105, "kube-ipvs0").unwrap_or_default();
    (ipvs(), addresses(), routes, observed_filter().front_ends.len())
}

fn is_restored_after(agent: &mut Agent, commands: &[&str]) {
    let right = state();
    for command in commands {
        let found = metric("kube_ipvs_drift_found_total").unwrap_or(0.0);
        run(command);
        agent.until(&format!("repair after {command:?}"), |_| {
            metric("kube_ipvs_drift_found_total").unwrap_or(0.0) > found
                && link::exists("kube-ipvs0").unwrap()
                && state() == right
        });
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn flushed_virtual_servers_and_addresses_come_back_at_once() {
    let (_manifests, mut agent) = cluster(&[]);
    is_restored_after(
        &mut agent,
        &[
            "ipvsadm -C",
            "ip address flush dev kube-ipvs0",
            "ip -6 address flush dev kube-ipvs0",
            "ip address del 10.96.0.11/32 dev kube-ipvs0",
            "ip link del kube-ipvs0",
            "ipvsadm -D -t 10.96.0.10:80",
            "ipvsadm -E -t 10.96.0.11:80 -s wlc",
            "ipvsadm -C; ip address flush dev kube-ipvs0",
        ],
    );
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn flushed_routes_come_back_at_once() {
    let (_manifests, mut agent) = cluster(&[BY_ROUTES, "--vip-ranges=10.96.0.0/12,fd00:96::/108"]);
    is_restored_after(
        &mut agent,
        &[
            "ip link set kube-ipvs0 down",
            "ip route del local 10.96.0.0/12 dev kube-ipvs0 table local",
            "ip -6 route flush table local dev kube-ipvs0",
            "ip address flush dev kube-ipvs0",
        ],
    );
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn flushed_tables_come_back_at_once() {
    let (_manifests, mut agent) = cluster(&[OTHERS_MAY_WRITE]);
    is_restored_after(
        &mut agent,
        &[
            "nft flush ruleset",
            "nft delete table ip kube-ipvs",
            "nft flush table ip6 kube-ipvs",
            "nft flush set ip kube-ipvs vips",
            "nft insert rule ip kube-ipvs filter-input drop",
            "nft flush ruleset; ipvsadm -C; ip address flush dev kube-ipvs0",
        ],
    );
}

/// Since Linux 6.9: nobody else can flush them, they outlive their owner, and the next agent owns them again.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn owned_tables_cannot_be_flushed_and_outlive_the_agent() {
    let (manifests, agent) = cluster(&[]);
    let refused = |command: &str| !Command::new("sh").args(["-c", command]).status().unwrap().success();
    if !run("nft list table ip kube-ipvs").contains("owner") {
        println!("this kernel has no tables that outlive their owner");
        return;
    }
    let right = observed_filter();
    for _ in 0..2 {
        run("nft flush ruleset");
        assert_eq!(observed_filter(), right, "a flush of everything passes them over");
        for command in
            ["nft delete table ip kube-ipvs", "nft flush table ip kube-ipvs", "nft flush set ip kube-ipvs vips"]
        {
            assert!(refused(command), "{command}");
        }
        assert_eq!(observed_filter(), right);
    }
    agent.kill();
    assert_eq!(observed_filter(), right, "they outlive the agent");
    let mut next = manifests.agent(&["--ipvs-sync-period=1h"]);
    next.says("nothing to change");
    run("nft flush ruleset");
    assert_eq!(observed_filter(), right, "the next agent has adopted them");
    next.kill();
    // Without an agent they are anybody's.
    run("nft flush ruleset");
    assert!(!has_tables());
    let mut last = manifests.agent(&["--once"]);
    assert!(last.ends().success(), "{}", last.log());
    assert_eq!(observed_filter(), right);
    let mut cleanup = Agent::start_command(Agent::command().arg("cleanup"));
    assert!(cleanup.ends().success(), "{}", cleanup.log());
    assert!(!has_tables());
}

/// Of a version that did not own them, or of an agent with `--own-tables=false`.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn tables_without_an_owner_are_taken_over() {
    let (manifests, agent) = cluster(&[OTHERS_MAY_WRITE]);
    let right = observed_filter();
    agent.kill();
    let mut next = manifests.agent(&["--ipvs-sync-period=1h"]);
    next.says("audited");
    assert_eq!(observed_filter(), right);
    if run("nft list table ip kube-ipvs").contains("owner") {
        run("nft flush ruleset");
        assert_eq!(observed_filter(), right);
    }
    next.kill();
    let mut last = manifests.agent(&["--once", OTHERS_MAY_WRITE]);
    assert!(last.ends().success(), "{}", last.log());
    assert!(last.log().contains("nothing to change"), "{}", last.log());
}

/// Somebody takes everything away again and again: the agent repairs, and has time for everything else.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_fight_over_everything_does_not_stop_changes() {
    let (manifests, mut agent) = cluster(&[OTHERS_MAY_WRITE]);
    let audits = || metric("kube_ipvs_drift_found_total").unwrap_or(0.0);
    let before = audits();
    for round in 0..20 {
        run("nft flush ruleset; ipvsadm -C; ip address flush dev kube-ipvs0 || true");
        manifests.write("web-1.yaml", &slice("web-1", "web", &[&format!("10.0.1.{round}")]));
        agent.until("serve what changes", |_| {
            ipvs().iter().any(|line| line.contains(&format!("-r 10.0.1.{round}:8080 -m -w 1")))
        });
    }
    assert!(audits() > before);
    agent.until("have the last word", |_| has_tables() && ipvs().len() == 6 && addresses().len() == 3);
}
