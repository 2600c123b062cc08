//! What other programs set up on a host that keeps Services from working: the agent tells it, once, and changes nothing.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::process::Command;

use common::{Agent, HEALTH, Manifests, get, metric, node, service, service_with_node_port};
use lab::link;
use lab::netns::isolate;
use lab::objects;
use serde_json::Value;
use tempfile::TempDir;
use test_apiserver::Server;

const WEB: &str = "-A -t 10.96.0.10:80 -s rr";

fn write(key: &str, value: &str) {
    fs::write(format!("/proc/sys/net/{key}"), value).unwrap();
}

fn read(key: &str) -> String {
    fs::read_to_string(format!("/proc/sys/net/{key}")).unwrap().trim().to_owned()
}

fn nft(rules: &str) {
    assert!(Command::new("nft").arg(rules).status().unwrap().success(), "{rules}");
}

fn problem(name: &str) -> Option<f64> {
    metric(&format!("kube_ipvs_host_problem{{problem=\"{name}\"}}"))
}

fn has(agent: &mut Agent, name: &str, expected: f64) {
    agent.until(&format!("have {name} {expected}"), |_| problem(name) == Some(expected));
}

fn ipv6_service() -> Value {
    objects::service("six", &["fd00:96::10"], &[objects::port("http", "TCP", 80)])
}

fn count(agent: &Agent, text: &str) -> usize {
    agent.log().matches(text).count()
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn chains_that_begin_to_drop_are_told_once_with_the_rule_to_add() {
    isolate().unwrap();
    let (server, directory) = (Server::new(), TempDir::new().unwrap());
    let kubeconfig = directory.path().join("kubeconfig");
    Server::write_kubeconfig(&kubeconfig, server.listen_in_thread().unwrap());
    server.apply(node());
    server.apply(service("web", "10.96.0.10"));
    // There at the start, before the API server is known.
    nft("table ip early { chain f { type filter hook forward priority 0; policy drop; }; }");
    let mut agent = Agent::start(&[
        &format!("--kubeconfig={}", kubeconfig.display()),
        "--ipvs-sync-period=1s",
        "--ipvs-min-sync-period=0s",
    ]);
    agent.has(&[WEB]);
    has(&mut agent, "DroppedAtForward", 1.0);
    assert_eq!(problem("DroppedAtInput"), Some(0.0));
    nft("table inet late { chain i { type filter hook input priority 0; policy drop; iif lo accept; }; }");
    has(&mut agent, "DroppedAtInput", 1.0);
    agent.says("`nft insert rule inet late i ip daddr SERVICE_CIDR accept`");
    agent.says("`nft insert rule ip early f ct state established,related accept`");
    for reason in ["DroppedAtInput", "DroppedAtForward"] {
        let is_told = |event: &Value| event["reason"] == reason && event["regarding"]["kind"] == "Node";
        agent.until(&format!("post {reason}"), |_| server.events().iter().any(is_told));
    }
    let body = get(HEALTH, "/healthz").unwrap();
    assert!(body.status == 200 && body.body.contains("inet late i"), "{}", body.body);
    agent.audits(8);
    assert_eq!(count(&agent, "drops packets to this node"), 1, "{}", agent.log());
    assert_eq!(count(&agent, "drops forwarded packets"), 1, "{}", agent.log());
    nft("delete table inet late");
    has(&mut agent, "DroppedAtInput", 0.0);
    assert_eq!(problem("DroppedAtForward"), Some(1.0));
    assert!(!get(HEALTH, "/healthz").unwrap().body.contains("inet late i"));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn ipv6_forwarding_that_is_off_is_told_and_not_set() {
    isolate().unwrap();
    link::set_up("lo").unwrap();
    write("ipv6/conf/all/forwarding", "0");
    let manifests = Manifests::new();
    manifests.write("web.json", &service("web", "10.96.0.10"));
    let mut agent = manifests.agent(&["--ipvs-sync-period=1s"]);
    agent.has(&[WEB]).audits(5);
    assert_eq!(problem("IPv6ForwardingOff"), Some(0.0), "there is no IPv6 Service");
    manifests.write("six.json", &ipv6_service());
    has(&mut agent, "IPv6ForwardingOff", 1.0);
    agent.says("`sysctl net.ipv6.conf.all.forwarding=1`");
    let health = get(HEALTH, "/healthz").unwrap();
    assert!(health.status == 200 && health.body.contains("IPv6 forwarding is off"), "{}", health.body);
    assert_eq!(read("ipv6/conf/all/forwarding"), "0");
    write("ipv6/conf/all/forwarding", "1");
    has(&mut agent, "IPv6ForwardingOff", 0.0);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn ipv6_that_is_switched_off_leaves_ipv4_healthy() {
    isolate().unwrap();
    link::set_up("lo").unwrap();
    write("ipv6/conf/all/forwarding", "1");
    let manifests = Manifests::new();
    manifests.write("web.json", &service("web", "10.96.0.10")).write("six.json", &ipv6_service());
    let mut agent = manifests.agent(&["--ipvs-sync-period=1s"]);
    let (six, other) = ("-A -t [fd00:96::10]:80 -s rr", "-A -t 10.96.0.11:80 -s rr");
    agent.has(&[WEB, six]);
    write("ipv6/conf/all/disable_ipv6", "1");
    has(&mut agent, "IPv6SwitchedOff", 1.0);
    agent.audits(8);
    let health = get(HEALTH, "/healthz").unwrap();
    assert!(health.status == 200 && health.body.contains("IPv6 was switched off"), "{}\n{}", health.body, agent.log());
    manifests.write("other.json", &service("other", "10.96.0.11"));
    agent.until("serve another", |_| common::ipvs().iter().any(|line| line == other));
    assert_eq!(get(HEALTH, "/healthz").unwrap().status, 200);
    write("ipv6/conf/all/disable_ipv6", "0");
    has(&mut agent, "IPv6SwitchedOff", 0.0);
    agent.has(&[WEB, other, six]);
    agent.until("be healthy with both", |_| {
        get(HEALTH, "/healthz").is_some_and(|answer| answer.status == 200 && answer.body.contains("IPv6"))
    });
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn node_ports_that_the_kernel_may_give_away_are_told() {
    isolate().unwrap();
    write("ipv4/ip_local_port_range", "32768\t60999");
    let manifests = Manifests::new();
    manifests.write("web.json", &service_with_node_port("web", "10.96.0.10", 32000));
    let mut agent = manifests.agent(&["--ipvs-sync-period=1s"]);
    agent.has(&[WEB]).audits(5);
    assert_eq!(problem("NodePortsNotReserved"), Some(0.0));
    manifests.write("web.json", &service_with_node_port("web", "10.96.0.10", 40000));
    has(&mut agent, "NodePortsNotReserved", 1.0);
    agent.says("the NodePort 40000 is among the ports");
    write("ipv4/ip_local_reserved_ports", "39000-41000");
    has(&mut agent, "NodePortsNotReserved", 0.0);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_bridge_whose_packets_bypass_the_filter_is_told() {
    isolate().unwrap();
    let manifests = Manifests::new();
    manifests.write("web.json", &service("web", "10.96.0.10"));
    let mut agent = manifests.agent(&["--ipvs-sync-period=1s"]);
    agent.has(&[WEB]);
    link::add_bridge("cni0").unwrap();
    for port in ["port0", "port1"] {
        link::add_dummy(port, &[]).unwrap();
        link::set_master(port, "cni0").unwrap();
    }
    let passes = fs::read_to_string("/proc/sys/net/bridge/bridge-nf-call-iptables").is_ok_and(|on| on.trim() == "1");
    if passes {
        agent.audits(8);
        assert_eq!(problem("BridgeBypassesFilter"), Some(0.0));
        write("bridge/bridge-nf-call-iptables", "0");
    }
    has(&mut agent, "BridgeBypassesFilter", 1.0);
    agent.says("packets within the bridge cni0 do not pass the packet filter");
    link::delete("cni0").unwrap();
    has(&mut agent, "BridgeBypassesFilter", 0.0);
}
