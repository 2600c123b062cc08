//! `kube-ipvs cleanup`: what it removes, what it leaves, and what it says.

mod common;

use std::process::Command;

use common::{Agent, Manifests, addresses, eth0, ipvs, ipvsadm, run, service_with_node_port, slice};
use lab::link;
use lab::netns::isolate;

/// A node with a Service that has a NodePort, served.
fn served() -> Manifests {
    eth0();
    let manifests = Manifests::new();
    let web = service_with_node_port("web", "10.96.0.10", 30080);
    manifests.write("service.yaml", &web);
    manifests.write("slice.yaml", &slice("web-1", "web", &["10.0.0.1"]));
    assert!(manifests.agent(&["--once"]).ends().success());
    assert_eq!(ipvs().len(), 4);
    manifests
}

fn cleanup() -> String {
    let mut agent = Agent::start_command(Command::new(env!("CARGO_BIN_EXE_kube-ipvs")).arg("cleanup"));
    assert!(agent.ends().success(), "{}", agent.log());
    agent.log()
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn cleanup_removes_only_our_objects_and_may_be_repeated() {
    isolate().unwrap();
    run("nft add table ip foreign && nft add chain ip foreign c");
    let before = run("nft list ruleset");
    let _manifests = served();
    ipvsadm("-A -t 172.16.0.1:80 -s rr\n-A -f 7 -s rr");
    assert!(run("nft list tables").contains("table ip6 kube-ipvs"));
    let log = cleanup();
    assert_eq!(ipvs(), ["-A -f 7 -s rr", "-A -t 172.16.0.1:80 -s rr"]);
    assert!(!link::exists("kube-ipvs0").unwrap());
    assert_eq!(run("nft list ruleset"), before);
    assert!(log.contains("left: virtual server TCP 172.16.0.1:80"), "{log}");
    assert!(log.contains("delete virtual server TCP 192.168.1.1:30080"), "{log}");
    let again = cleanup();
    assert!(again.contains("there was nothing to remove"), "{again}");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn cleanup_keeps_the_device_if_it_has_a_foreign_address() {
    isolate().unwrap();
    let _manifests = served();
    link::add_address("kube-ipvs0", "10.77.0.1/24").unwrap();
    let log = cleanup();
    assert_eq!(addresses(), ["10.77.0.1/24"]);
    assert!(log.contains("left: address 10.77.0.1/24 on kube-ipvs0"), "{log}");
    assert_eq!(ipvs(), Vec::<String>::new());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_start_after_cleanup_programs_everything_again() {
    isolate().unwrap();
    let manifests = served();
    let nft = run("nft list ruleset");
    cleanup();
    assert!(manifests.agent(&["--once"]).ends().success());
    assert_eq!(ipvs().len(), 4);
    assert_eq!(run("nft list ruleset"), nft);
}
