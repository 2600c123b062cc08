//! Other users of IPVS on the same node, without `--ipvs-exclude-cidrs`: keepalived, and people with ipvsadm. The agent never changes
//! what is not provably its own.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::process::{Child, Command, Stdio};

use common::{Manifests, addresses, has_tables, ipvs, ipvsadm, run, service, slice};
use lab::link;
use lab::netns::isolate;
use lab::objects::manifest;
use tempfile::TempDir;

/// What keepalived has: at an address of its own that VRRP brings, at one that is also a Service's VIP, and by firewall mark.
const KEEPALIVED: &str = "
global_defs { router_id lab }
vrrp_instance one {
    state MASTER
    interface eth0
    virtual_router_id 51
    priority 100
    advert_int 1
    virtual_ipaddress { 192.168.1.200/32 dev eth0 }
}
virtual_server 192.168.1.200 443 {
    lb_algo wrr
    lb_kind NAT
    protocol TCP
    real_server 192.168.1.50 8443 { weight 3 }
    real_server 192.168.1.51 8443 { weight 1 }
}
virtual_server 10.96.0.10 8443 {
    lb_algo wlc
    lb_kind DR
    persistence_timeout 120
    protocol TCP
    real_server 192.168.1.52 8443 { weight 7 }
}
virtual_server fwmark 7 {
    lb_algo rr
    lb_kind NAT
    real_server 192.168.1.53 0 { weight 1 }
}
";
const THEIRS: [&str; 7] = [
    "-A -f 7 -s rr",
    "-A -t 10.96.0.10:8443 -s wlc -p 120",
    "-A -t 192.168.1.200:443 -s wrr",
    "-a -f 7 -r 192.168.1.53:0 -m -w 1",
    "-a -t 10.96.0.10:8443 -r 192.168.1.52:8443 -g -w 7",
    "-a -t 192.168.1.200:443 -r 192.168.1.50:8443 -m -w 3",
    "-a -t 192.168.1.200:443 -r 192.168.1.51:8443 -m -w 1",
];
/// By hand, as keepalived would not: where a NodePort could be, and of UDP and SCTP.
const BY_HAND: [&str; 5] = [
    "-A -t 192.168.1.1:30099 -s lc",
    "-a -t 192.168.1.1:30099 -r 192.168.1.60:80 -m -w 5",
    "-A -u 203.0.113.50:53 -s sh",
    "-A --sctp-service 203.0.113.51:9 -s rr",
    "-a -u 203.0.113.50:53 -r 192.168.1.61:53 -m -w 1",
];

/// The running keepalived, with its children.
struct Keepalived {
    process: Child,
    dir: TempDir,
}

impl Keepalived {
    fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let file = |name: &str| dir.path().join(name).display().to_string();
        fs::write(file("conf"), KEEPALIVED).unwrap();
        let log = fs::File::create(file("log")).unwrap();
        let process = Command::new("keepalived")
            .args(["--dont-fork", "--log-console", "--log-detail", "--use-file", &file("conf")])
            .args(["--pid", &file("pid"), "--vrrp_pid", &file("vrrp"), "--checkers_pid", &file("checkers")])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let keepalived = Self { process, dir };
        if let Err(error) = lab::wait::until("make what keepalived is configured for", is_served) {
            let log = fs::read_to_string(keepalived.dir.path().join("log")).unwrap();
            panic!("{error}; there is {:#?}; {log}", ipvs());
        }
        keepalived
    }
}

/// Whether all that keepalived makes is there.
fn is_served() -> bool {
    let held = ipvs();
    let has_address = || link::addresses("eth0").unwrap().contains(&"192.168.1.200/32".to_owned());
    THEIRS.iter().all(|line| held.iter().any(|it| it == line)) && has_address()
}

impl Drop for Keepalived {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn node() {
    isolate().unwrap();
    // VRRP takes a device with multicast.
    link::add_veth("eth0", "far", None::<&fs::File>).unwrap();
    link::add_address("eth0", "192.168.1.1/24").unwrap();
    link::set_up("far").unwrap();
    link::set_up("eth0").unwrap();
    ipvsadm(&BY_HAND.join("\n"));
}

/// What there is that is not the Services'.
fn others() -> Vec<String> {
    let ours = |line: &String| {
        ["10.96.0.10:80 ", "10.96.0.11:80 ", "10.96.0.12:80 "].iter().any(|front_end| line.contains(front_end))
    };
    ipvs().into_iter().filter(|line| !ours(line)).collect()
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn virtual_servers_of_keepalived_and_ipvsadm_are_never_changed() {
    node();
    let _keepalived = Keepalived::start();
    let before = others();
    assert_eq!(before.len(), THEIRS.len() + BY_HAND.len(), "{before:#?}");
    let untouched = |when: &str| {
        assert_eq!(others(), before, "{when}");
        assert!(is_served(), "{when}");
    };

    let manifests = Manifests::new();
    let web = manifest(&[service("web", "10.96.0.10"), slice("web-1", "web", &["10.0.0.1"])]);
    manifests.write("web.json", &web);
    let mut agent = manifests.agent(&["--ipvs-sync-period=200ms", "--own-tables=false"]);
    agent.until("serve", |_| ipvs().iter().any(|line| line == "-a -t 10.96.0.10:80 -r 10.0.0.1:8080 -m -w 1"));
    agent.says("kept virtual servers that belong to no Service");
    untouched("after the first start");

    manifests.write("zoo.json", &manifest(&[service("zoo", "10.96.0.11"), slice("zoo-1", "zoo", &["10.0.0.2"])]));
    agent.until("serve another", |_| ipvs().iter().any(|line| line.starts_with("-a -t 10.96.0.11:80")));
    // The Service whose VIP keepalived has a port of goes.
    manifests.remove("web.json");
    agent.until("let a Service go", |_| !ipvs().iter().any(|line| line.contains("10.96.0.10:80 ")));
    agent.audits(2);
    untouched("after changes and audits");

    // Without a table there is only the device to tell by.
    run("nft delete table ip kube-ipvs");
    agent.until("make the table again", |_| has_tables());
    agent.audits(2);
    untouched("after the table was lost");
    agent.kill();
    run("nft delete table ip kube-ipvs");
    manifests.write("web.json", &web).remove("zoo.json");
    let mut agent = manifests.agent(&["--once"]);
    assert!(agent.ends().success(), "{}", agent.log());
    assert!(!ipvs().iter().any(|line| line.contains("10.96.0.11:80")), "{:#?}", ipvs());
    untouched("after a start without a table");

    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-ipvs"));
    assert!(command.arg("cleanup").output().unwrap().status.success());
    assert!(!ipvs().iter().any(|line| line.contains("10.96.0.10:80")), "{:#?}", ipvs());
    untouched("after cleanup");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn first_start_adopts_kube_proxys_vips_and_leaves_other_servers() {
    node();
    let _keepalived = Keepalived::start();
    let before = others();
    // As kube-proxy leaves it: a Service that is still wanted, and one that went while nothing ran.
    link::add_dummy("kube-ipvs0", &[]).unwrap();
    link::set_down("kube-ipvs0").unwrap();
    for vip in ["10.96.0.10", "10.96.0.12"] {
        link::add_address("kube-ipvs0", vip).unwrap();
        ipvsadm(&format!("-A -t {vip}:80 -s rr\n-a -t {vip}:80 -r 10.0.0.1:8080 -m"));
    }
    let manifests = Manifests::new();
    manifests.write("web.json", &manifest(&[service("web", "10.96.0.10"), slice("web-1", "web", &["10.0.0.1"])]));
    let mut agent = manifests.agent(&["--once"]);
    assert!(agent.ends().success(), "{}", agent.log());
    assert_eq!(addresses(), ["10.96.0.10/32"]);
    assert!(!ipvs().iter().any(|line| line.contains("10.96.0.12")), "{:#?}", ipvs());
    // Its VIP is on the device, so it goes too: what is at an address of kube-proxy's was kube-proxy's.
    let theirs: Vec<String> = before.into_iter().filter(|line| !line.contains("10.96.0.10:8443")).collect();
    let others: Vec<String> = others().into_iter().filter(|line| !line.contains("10.96.0.10:8443")).collect();
    assert_eq!(others, theirs);
    assert!(link::addresses("eth0").unwrap().contains(&"192.168.1.200/32".to_owned()));
}
