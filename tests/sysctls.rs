//! The kernel's settings at the start of the agent: what it sets, what it leaves, and what it says where it may not.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::process::Command;

use common::{Agent, Manifests, ipvs, service};
use lab::netns::isolate;

const WEB: &str = "-A -t 10.96.0.10:80 -s rr";

/// What a fresh network namespace has otherwise.
const NEEDED: [&str; 4] = [
    "net/ipv4/vs/conntrack",
    "net/ipv4/vs/expire_nodest_conn",
    "net/ipv4/vs/expire_quiescent_template",
    "net/ipv4/ip_forward",
];
const ARP_IGNORE: &str = "net/ipv4/conf/all/arp_ignore";
const ARP_ANNOUNCE: &str = "net/ipv4/conf/all/arp_announce";
const REUSE: &str = "net/ipv4/vs/conn_reuse_mode";

fn read(key: &str) -> String {
    fs::read_to_string(format!("/proc/sys/{key}")).unwrap().trim().to_owned()
}

fn write(key: &str, value: &str) {
    fs::write(format!("/proc/sys/{key}"), value).unwrap();
}

fn web() -> Manifests {
    let manifests = Manifests::new();
    manifests.write("service.yaml", &service("web", "10.96.0.10"));
    manifests
}

/// The lines of a log about settings that were written, as `key old new`.
fn written(log: &str) -> Vec<String> {
    let field = |line: &str, name: &str| {
        let rest = line.split_once(&format!(" {name}="))?.1;
        rest.split_whitespace().next().map(str::to_owned)
    };
    let lines = log.lines().filter(|line| line.contains("INFO set key="));
    lines.map(|line| ["key", "old", "new"].map(|name| field(line, name).unwrap()).join(" ")).collect()
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn required_sysctls_are_set_and_logged_once() {
    isolate().unwrap();
    for key in NEEDED {
        write(key, "0");
    }
    // A value that kube-proxy's recorded runs left alone too.
    let before = [ARP_IGNORE, ARP_ANNOUNCE, REUSE].map(read);
    let manifests = web();
    let flags = ["--once", "--conntrack-max-per-core=0", "--conntrack-udp-timeout=17s", "--conntrack-tcp-be-liberal"];
    let mut agent = manifests.agent(&flags);
    assert!(agent.ends().success(), "{}", agent.log());
    assert_eq!(NEEDED.map(read), ["1"; 4]);
    assert_eq!([ARP_IGNORE, ARP_ANNOUNCE, REUSE].map(read), before);
    assert_eq!(read("net/netfilter/nf_conntrack_udp_timeout"), "17");
    assert_eq!(read("net/netfilter/nf_conntrack_tcp_timeout_established"), "86400");
    let log = agent.log();
    let written_first = written(&log);
    for key in NEEDED {
        assert!(written_first.contains(&format!("{} 0 1", key.replace('/', "."))), "{log}");
    }
    assert!(written_first.contains(&"net.netfilter.nf_conntrack_udp_timeout 30 17".to_owned()), "{log}");
    assert!(!log.contains("ERROR"), "{log}");
    let mut again = manifests.agent(&flags);
    assert!(again.ends().success());
    assert_eq!(written(&again.log()), [""; 0], "{}", again.log());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn strict_arp_is_set_when_asked_for_and_stays() {
    isolate().unwrap();
    let manifests = web();
    assert!(manifests.agent(&["--once", "--ipvs-strict-arp"]).ends().success());
    assert_eq!([ARP_IGNORE, ARP_ANNOUNCE].map(read), ["1", "2"]);
    assert!(manifests.agent(&["--once"]).ends().success());
    assert_eq!([ARP_IGNORE, ARP_ANNOUNCE].map(read), ["1", "2"]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_conntrack_limit_that_is_read_only_does_not_stop_the_start() {
    isolate().unwrap();
    let manifests = web();
    // No kernel has this limit by itself, and only the initial network namespace may set it.
    let mut agent = manifests.agent(&["--conntrack-min=123457"]);
    agent.has(&[WEB]);
    let log = agent.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("ERROR")).collect();
    assert!(lines[0].contains("net.netfilter.nf_conntrack_max must be 123457, is "), "{log}");
    assert!(lines[0].contains("run `sysctl -w net.netfilter.nf_conntrack_max=123457` on the node"), "{log}");
}

/// Starts an agent for which /proc/sys is read-only, as it is for one in a container without privileges.
fn without_writable_sysctls(manifests: &Manifests, flags: &str) -> Agent {
    let agent = env!("CARGO_BIN_EXE_kube-ipvs");
    let manifests = manifests.path().display();
    Agent::start_command(Command::new("unshare").args(["-m", "sh", "-c"]).arg(format!(
        "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && \
         exec {agent} --hostname-override=node-a --manifests={manifests} {flags}"
    )))
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn wrong_read_only_sysctls_stop_the_start_and_are_all_named() {
    isolate().unwrap();
    for key in NEEDED {
        write(key, "0");
    }
    let manifests = web();
    let mut agent = without_writable_sysctls(&manifests, "--once --ipvs-strict-arp");
    assert!(!agent.ends().success());
    let log = agent.log();
    for key in NEEDED {
        let key = key.replace('/', ".");
        assert!(log.contains(&format!("{key} must be 1, is 0, and cannot be written (Read-only file system")), "{log}");
        assert!(log.contains(&format!("run `sysctl -w {key}=1` on the node")), "{log}");
    }
    assert!(log.contains("net.ipv4.conf.all.arp_announce must be 2, is 0"), "{log}");
    assert_eq!(ipvs().len(), 0);
    // Where somebody else has set them, there is nothing to write.
    for key in NEEDED {
        write(key, "1");
    }
    let mut agent = without_writable_sysctls(&manifests, "--once --conntrack-max-per-core=0");
    assert!(agent.ends().success(), "{}", agent.log());
    assert_eq!(ipvs(), [WEB]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn estimation_is_set_only_if_configured() {
    const ESTIMATION: &str = "net/ipv4/vs/run_estimation";
    isolate().unwrap();
    let manifests = web();
    for (flags, left) in [
        (&["--once"][..], "1"),
        (&["--once", "--ipvs-estimation=false"], "0"),
        (&["--once"], "0"),
        (&["--once", "--ipvs-estimation"], "1"),
    ] {
        let mut agent = manifests.agent(&[&["--conntrack-max-per-core=0"], flags].concat());
        assert!(agent.ends().success(), "{}", agent.log());
        assert_eq!(read(ESTIMATION), left, "{flags:?}");
        assert!(!agent.log().contains("WARN"), "{}", agent.log());
    }
}
