//! The agent as a process on a real kernel: what it does with manifests, with what is wrong, and when it is stopped.

mod common;

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use common::{Agent, Manifests, addresses, eth0, ipvs, ipvsadm, run, service, service_with_node_port, slice};
use lab::link;
use lab::netns::isolate;
use lab::objects::{manifest, node, port, with};
use serde_json::json;

const WEB: &str = "-A -t 10.96.0.10:80 -s rr";
const WEB_1: &str = "-a -t 10.96.0.10:80 -r 10.0.0.1:8080 -m -w 1";
const WEB_2: &str = "-a -t 10.96.0.10:80 -r 10.0.0.2:8080 -m -w 1";

/// The Service `web` with two endpoints.
fn web() -> Manifests {
    let manifests = Manifests::new();
    manifests.write("service.yaml", &service("web", "10.96.0.10"));
    manifests.write("slice.yaml", &slice("web-1", "web", &["10.0.0.1", "10.0.0.2"]));
    manifests
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn manifests_become_virtual_servers_and_follow_changes() {
    isolate().unwrap();
    let manifests = web();
    let mut agent = manifests.agent(&[]);
    agent.has(&[WEB, WEB_1, WEB_2]).binds(&["10.96.0.10/32"]);
    // All other tests read the kernel without these programs.
    let mut lines: Vec<String> = run("ipvsadm -Sn").lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(ipvs(), lines);
    assert!(run("ip -br address show dev kube-ipvs0").contains("10.96.0.10/32"));
    manifests.write("slice.yaml", &slice("web-1", "web", &["10.0.0.1"]));
    agent.has(&[WEB, WEB_1]);
    manifests.remove("service.yaml");
    agent.has(&[]);
    agent.until("unbind the VIP", |_| addresses().is_empty());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn once_syncs_and_exits() {
    isolate().unwrap();
    let manifests = web();
    let mut agent = manifests.agent(&["--once"]);
    assert!(agent.ends().success());
    assert_eq!(ipvs().len(), 3);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_example_that_embeds_the_reconciler_programs_manifests() {
    isolate().unwrap();
    // `cargo test` builds it beside the tests.
    let test = std::env::current_exe().unwrap();
    let example = test.ancestors().nth(2).unwrap().join("examples/program_manifests");
    let output = Command::new(example).arg(web().path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let mut expected = [WEB, WEB_1, WEB_2];
    expected.sort_unstable();
    assert_eq!(ipvs(), expected);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_restart_with_nothing_changed_writes_nothing() {
    isolate().unwrap();
    let manifests = web();
    let mut agent = manifests.agent(&["--ipvs-udp-timeout=33s"]);
    agent.says("audited");
    agent.kill();
    // Every message the agent sends is in the trace; a write is one that is neither a dump nor a look-up.
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace");
    let mut again = Agent::start_command(
        Command::new("strace")
            .args(["-f", "-xx", "-e", "trace=sendto", "-o"])
            .arg(&trace)
            .arg(env!("CARGO_BIN_EXE_kube-ipvs"))
            .args(["--hostname-override=node-a", "--once", "--ipvs-udp-timeout=33s"])
            .arg(format!("--manifests={}", manifests.path().display())),
    );
    assert!(again.ends().success());
    let trace = std::fs::read_to_string(trace).unwrap();
    let sent: Vec<&str> = trace.lines().filter(|line| line.contains("nlmsg_type=")).collect();
    assert!(sent.len() > 5, "the trace shows what was sent:\n{trace}");
    let writes: Vec<&&str> = sent.iter().filter(|message| !is_read(message) && !takes_possession(message)).collect();
    assert!(writes.is_empty(), "{writes:#?}");
    assert!(again.log().contains("audited, nothing to change"), "{}", again.log());
}

/// Whether a transaction of `nf_tables` only takes possession of tables, or finds out whether the kernel can do that: between its
/// beginning and end it has nothing but `NFT_MSG_NEWTABLE` and `NFT_MSG_DELTABLE`, and a table that is made anew has more.
fn takes_possession(message: &str) -> bool {
    let kinds = message.split("nlmsg_type=").skip(1).filter_map(|rest| rest.split(' ').next());
    let (mut tables, mut others) = (0, 0);
    for kind in kinds {
        match kind {
            "0x10" | "0x11" => {}
            "0xa00" | "0xa02" => tables += 1,
            _ => others += 1,
        }
    }
    tables > 0 && others == 0
}

/// Whether a message in a trace of strace only reads: the look-up of the family, IPVS's `GET_SERVICE`, `GET_DEST`,
/// `GET_CONFIG` and `GET_INFO`, or rtnetlink's `RTM_GETLINK`, `RTM_GETADDR` and `RTM_GETROUTE`.
fn is_read(message: &str) -> bool {
    // RTM_GETLINK, RTM_GETADDR, RTM_GETROUTE; NFT_MSG_GETTABLE, GETCHAIN, GETRULE, GETSET and GETSETELEM; IPCTNL_MSG_CT_GET.
    let kinds = ["0x12", "0x16", "0x1a", "0xa01", "0xa04", "0xa07", "0xa0a", "0xa0d", "0x101"];
    let is_get = kinds.iter().any(|kind| message.contains(&format!("nlmsg_type={kind} ")));
    let payload = message.split("}, \"").nth(1).unwrap_or_default();
    let reads =
        [r"\x03\x02\x00\x00", r"\x04\x01\x00\x00", r"\x08\x01\x00\x00", r"\x0d\x01\x00\x00", r"\x0f\x01\x00\x00"];
    is_get || reads.iter().any(|command| payload.starts_with(command))
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_draining_real_server_survives_a_restart_until_it_is_idle() {
    isolate().unwrap();
    link::add_addresses("lo", &["10.0.0.1", "10.0.0.2"]).unwrap();
    let listener = TcpListener::bind("0.0.0.0:8080").unwrap();
    let manifests = web();
    manifests.write("slice.yaml", &slice("web-1", "web", &["10.0.0.1"]));
    let mut agent = manifests.agent(&["--ipvs-tcpfin-timeout=1s"]);
    agent.has(&[WEB, WEB_1]);
    let mut client = TcpStream::connect("10.96.0.10:80").unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let mut exchange = |text: &[u8; 4]| {
        client.write_all(text).unwrap();
        let mut read = [0; 4];
        server.read_exact(&mut read).unwrap();
        assert_eq!(&read, text);
    };
    exchange(b"one.");

    manifests.write("slice.yaml", &slice("web-1", "web", &["10.0.0.2"]));
    let drained = "-a -t 10.96.0.10:80 -r 10.0.0.1:8080 -m -w 0";
    agent.has(&[WEB, WEB_2, drained]);
    exchange(b"two.");
    agent.kill();
    let mut agent = manifests.agent(&["--ipvs-tcpfin-timeout=1s", "--ipvs-sync-period=100ms"]);
    agent.says("audited");
    agent.audits(2);
    agent.has(&[WEB, WEB_2, drained]);
    exchange(b"tri.");

    // A reset: after an orderly end IPVS keeps the connection for two minutes more (TIME_WAIT).
    rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    drop(client);
    agent.has(&[WEB, WEB_2]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn sigterm_leaves_the_kernel_unchanged_and_is_logged() {
    isolate().unwrap();
    let manifests = web();
    let mut agent = manifests.agent(&[]);
    agent.has(&[WEB, WEB_1, WEB_2]).binds(&["10.96.0.10/32"]);
    agent.terminate();
    assert!(agent.ends().success());
    assert!(agent.log().contains("SIGTERM: stopping; virtual servers and addresses stay as they are"));
    assert_eq!(ipvs().len(), 3);
    assert_eq!(addresses(), ["10.96.0.10/32"]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_file_that_no_longer_parses_keeps_its_last_valid_content() {
    isolate().unwrap();
    let manifests = web();
    let mut agent = manifests.agent(&[]);
    agent.has(&[WEB, WEB_1, WEB_2]);
    manifests.write("slice.yaml", "endpoints: [: nonsense");
    agent.says("slice.yaml");
    manifests.write("other.yaml", &service("other", "10.96.0.11"));
    agent.has(&[WEB, WEB_1, WEB_2, "-A -t 10.96.0.11:80 -s rr"]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn bad_objects_are_named_and_harm_no_other() {
    isolate().unwrap();
    let manifests = web();
    // The last is where a network is talked to as a whole: only the kernel knows that.
    eth0();
    let endpoints = ["10.0.0.1", "not-an-address", "224.0.0.7", "10.0.0.2", "192.168.1.255"];
    manifests.write("slice.yaml", &slice("web-1", "web", &endpoints));
    let zero = with(service("zero", "10.96.0.11"), json!({"spec": {"ports": [port("http", "TCP", 0)]}}));
    manifests.write("zero.yaml", &zero);
    manifests.write("clash-1.yaml", &service("clash-a", "10.96.0.12"));
    manifests.write("clash-2.yaml", &service("clash-b", "10.96.0.12"));
    manifests.write("last.yaml", &service("last", "10.96.0.13"));
    let mut agent = manifests.agent(&[]);
    agent.has(&[WEB, WEB_1, WEB_2, "-A -t 10.96.0.12:80 -s rr", "-A -t 10.96.0.13:80 -s rr"]);
    agent.says("EndpointSlice default/web-1").says("not-an-address").says("224.0.0.7 is a multicast address");
    agent.says("Service default/zero");
    agent.says("default/clash-b").says("belongs to Service default/clash-a");
    // The kernel's own no, with the Service and the real server it is about.
    agent.says("cannot add real server 192.168.1.255:8080 of TCP 10.96.0.10:80").says("default/web");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_missing_scheduler_stops_the_start_and_changes_nothing() {
    isolate().unwrap();
    let manifests = web();
    manifests.agent(&[]).has(&[WEB, WEB_1, WEB_2]).binds(&["10.96.0.10/32"]);
    let mut agent = manifests.agent(&["--ipvs-scheduler=nosuch"]);
    assert!(!agent.ends().success());
    assert!(agent.log().contains("modprobe ip_vs_nosuch"), "{}", agent.log());
    assert_eq!(ipvs().len(), 3);
    assert_eq!(addresses(), ["10.96.0.10/32"]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn without_cap_net_admin_the_start_fails_with_a_remedy() {
    isolate().unwrap();
    let manifests = web();
    let mut agent = Agent::start_command(
        Command::new("setpriv")
            .args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"])
            .arg(env!("CARGO_BIN_EXE_kube-ipvs"))
            .arg(format!("--manifests={}", manifests.path().display())),
    );
    assert!(!agent.ends().success());
    assert!(agent.log().contains("CAP_NET_ADMIN"), "{}", agent.log());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_foreign_kube_ipvs0_stops_the_start() {
    isolate().unwrap();
    link::add_veth("kube-ipvs0", "other", None::<&std::fs::File>).unwrap();
    let manifests = web();
    let mut agent = manifests.agent(&[]);
    assert!(!agent.ends().success());
    assert!(agent.log().contains("kube-ipvs0 is not a dummy device"), "{}", agent.log());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn addresses_of_the_node_are_followed_at_once() {
    isolate().unwrap();
    eth0();
    let manifests = Manifests::new();
    let web = service_with_node_port("web", "10.96.0.10", 30080);
    manifests.write("service.yaml", &web);
    // With this period only notifications can be as quick as the test asks for.
    let mut agent = manifests.agent(&["--ipvs-sync-period=10m", "--nodeport-addresses=192.168.0.0/16"]);
    agent.has(&[WEB, "-A -t 192.168.1.1:30080 -s rr"]);
    link::add_address("eth0", "192.168.1.2/24").unwrap();
    agent.has(&[WEB, "-A -t 192.168.1.1:30080 -s rr", "-A -t 192.168.1.2:30080 -s rr"]);
    link::delete_address("eth0", "192.168.1.1/24").unwrap();
    agent.has(&[WEB]);
    link::add_address("eth0", "192.168.1.2/24").unwrap();
    agent.has(&[WEB, "-A -t 192.168.1.2:30080 -s rr"]);
    link::delete("kube-ipvs0").unwrap();
    agent.until("bring back the device", |_| addresses() == ["10.96.0.10/32"]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn every_scheduler_can_be_chosen() {
    isolate().unwrap();
    let manifests = web();
    for scheduler in ["rr", "wrr", "lc", "wlc", "lblc", "lblcr", "dh", "sh", "sed", "nq", "fo", "ovf", "mh", "twos"] {
        let flags = match scheduler {
            "mh" => " -b mh-fallback,mh-port",
            "sh" => " -b sh-fallback",
            _ => "",
        };
        let mut agent = manifests.agent(&[&format!("--ipvs-scheduler={scheduler}")]);
        agent.has(&[&format!("-A -t 10.96.0.10:80 -s {scheduler}{flags}"), WEB_1, WEB_2]);
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn ipvs_timeouts_are_set_and_0_keeps_the_kernels_value() {
    isolate().unwrap();
    ipvsadm("--set 800 100 200");
    let manifests = web();
    let mut agent = manifests.agent(&["--once", "--ipvs-tcp-timeout=90500ms", "--ipvs-udp-timeout=900ms"]);
    assert!(agent.ends().success());
    let timeouts = ipvs_netlink::Client::connect().unwrap().timeouts().unwrap();
    assert_eq!((timeouts.tcp, timeouts.tcp_fin, timeouts.udp), (90, 100, 200));
}

#[test]
fn a_kernel_without_ipvs_is_an_error_with_a_remedy() {
    if std::path::Path::new("/proc/net/ip_vs").exists() {
        return; // This kernel has it; the guest of the lab and most servers do.
    }
    let manifests = web();
    let mut agent = manifests.agent(&["--once"]);
    if agent.ends().success() {
        return; // The kernel had it as a module, and has loaded it.
    }
    let log = agent.log();
    assert!(log.contains("modprobe ip_vs") || log.contains("CAP_NET_ADMIN"), "{log}");
}

#[test]
fn invalid_flags_exit_with_status_1_and_the_reason() {
    for (flag, reason) in [
        ("--proxy-mode=iptables", "run kube-proxy"),
        ("--ipvs-sync-period=never", "not a duration"),
        ("--no-such-flag", "unexpected argument"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_kube-ipvs")).arg(flag).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(reason), "{flag}: {text}");
        assert_eq!(output.status.code(), Some(1), "{flag}");
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn many_address_changes_leave_no_stale_node_port() {
    isolate().unwrap();
    eth0();
    let manifests = Manifests::new();
    manifests.write("service.yaml", &service_with_node_port("web", "10.96.0.10", 30080));
    let mut agent = manifests.agent(&["--ipvs-sync-period=10m"]);
    agent.has(&[WEB, "-A -t 192.168.1.1:30080 -s rr"]);
    // More notifications than the agent's socket holds while it does not run.
    agent.stop_while(|| {
        for action in ["add", "del"] {
            let mut lines = String::new();
            for i in 0..3000 {
                writeln!(lines, "address {action} 172.16.{}.{}/32 dev eth0", i / 250, i % 250 + 1).unwrap();
            }
            std::fs::write("/tmp/flood", lines).unwrap();
            run("ip -batch /tmp/flood");
        }
        link::add_address("eth0", "192.168.1.2/24").unwrap();
    });
    agent.has(&[WEB, "-A -t 192.168.1.1:30080 -s rr", "-A -t 192.168.1.2:30080 -s rr"]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn an_address_configured_twice_counts_until_both_are_removed() {
    isolate().unwrap();
    link::add_dummy("eth0", &[]).unwrap();
    link::add_addresses("eth0", &["192.168.1.1/24", "192.168.1.1/32"]).unwrap();
    let manifests = Manifests::new();
    manifests.write("service.yaml", &service_with_node_port("web", "10.96.0.10", 30080));
    let mut agent = manifests.agent(&["--ipvs-sync-period=10m"]);
    agent.has(&[WEB, "-A -t 192.168.1.1:30080 -s rr"]);
    link::delete_address("eth0", "192.168.1.1/32").unwrap();
    link::add_address("eth0", "192.168.1.9/24").unwrap();
    agent.has(&[WEB, "-A -t 192.168.1.1:30080 -s rr", "-A -t 192.168.1.9:30080 -s rr"]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_renamed_device_is_replaced() {
    isolate().unwrap();
    let manifests = web();
    let mut agent = manifests.agent(&["--ipvs-sync-period=300ms"]);
    agent.has(&[WEB, WEB_1, WEB_2]);
    agent.until("bind the VIP", |_| addresses() == ["10.96.0.10/32"]);
    agent.audits(1);
    link::set_down("kube-ipvs0").unwrap();
    link::rename("kube-ipvs0", "elsewhere").unwrap();
    agent.until("bring back the device", |_| addresses() == ["10.96.0.10/32"]);
    agent.audits(2);
    let lines = agent.log().lines().count();
    agent.audits(2);
    assert_eq!(agent.log().lines().count(), lines, "{}", agent.log());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_file_that_never_parsed_removes_nothing() {
    isolate().unwrap();
    let manifests = web();
    manifests.agent(&[]).has(&[WEB, WEB_1, WEB_2]);
    manifests.write("service.yaml", "spec: [: nonsense");
    manifests.write("new.yaml", &service("new", "10.96.0.11"));
    let mut once = manifests.agent(&["--once"]);
    assert!(!once.ends().success());
    assert!(once.log().contains("not everything could be parsed"), "{}", once.log());
    let mut agent = manifests.agent(&[]);
    agent.has(&[WEB, WEB_1, WEB_2, "-A -t 10.96.0.11:80 -s rr"]);
    manifests.write("service.yaml", "# nothing to serve here");
    agent.has(&["-A -t 10.96.0.11:80 -s rr"]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn foreign_chains_that_drop_forwarded_packets_are_named() {
    isolate().unwrap();
    run(
        "nft add table inet wall && nft 'add chain inet wall gate { type filter hook forward priority 0; policy drop; }'",
    );
    let manifests = web();
    let mut agent = manifests.agent(&["--once"]);
    assert!(agent.ends().success());
    assert!(agent.log().contains("inet wall gate"), "{}", agent.log());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn node_ports_on_the_primary_address_follow_the_node() {
    isolate().unwrap();
    link::add_dummy("eth0", &[]).unwrap();
    link::add_addresses("eth0", &["192.168.1.1/24", "192.168.1.2/24"]).unwrap();
    let manifests = Manifests::new();
    let node_port = service_with_node_port("web", "10.96.0.10", 30080);
    manifests.write("service.yaml", &node_port);
    let mut agent = manifests.agent(&["--nodeport-addresses=primary"]);
    agent.has(&[WEB, "-A -t 192.168.1.1:30080 -s rr"]);
    manifests.write("node.yaml", &node("node-a", &["192.168.1.2"]));
    agent.has(&[WEB, "-A -t 192.168.1.2:30080 -s rr"]);
}

/// What who may write Services might ask for to become the node, its peer Nodes or the API server. (What comes of every
/// combination is a table in `crates/reconciler/tests/untrusted_services.rs`.)
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn addresses_of_nodes_and_api_servers_are_not_served_or_bound() {
    isolate().unwrap();
    eth0();
    link::add_dummy("other", &["172.17.0.1/16"]).unwrap();
    let manifests = web();
    manifests.write(
        "kubernetes.json",
        &manifest(&[service("kubernetes", "10.96.0.1"), slice("kubernetes", "kubernetes", &["192.168.1.9"])]),
    );
    let refused = [
        "0.0.0.0",
        "127.0.0.1",
        "169.254.169.254",
        "224.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "ff02::1",
        "192.168.1.1",
        "192.168.1.9",
    ];
    // The victim's VIP at its own port, and an interface's address.
    let asked_for = [&refused[..], &["10.96.0.10", "172.17.0.1", "203.0.113.1"]].concat();
    let old = json!({"metadata": {"creationTimestamp": "2020-01-01T00:00:00Z"}, "spec": {"externalIPs": asked_for}});
    let hostile = with(service("hostile", "10.96.0.66"), old);
    let endpoints = ["10.66.6.6", "127.0.0.1", "169.254.169.254"];
    manifests.write("hostile.json", &manifest(&[hostile, slice("hostile-1", "hostile", &endpoints)]));
    let mut agent = manifests.agent(&[]);
    let mut expected = vec![WEB.to_owned(), WEB_1.to_owned(), WEB_2.to_owned()];
    expected
        .extend(["-A -t 10.96.0.1:80 -s rr".to_owned(), "-a -t 10.96.0.1:80 -r 192.168.1.9:8080 -m -w 1".to_owned()]);
    for vip in ["10.96.0.66", "172.17.0.1", "203.0.113.1"] {
        expected.extend([format!("-A -t {vip}:80 -s rr"), format!("-a -t {vip}:80 -r 10.66.6.6:8080 -m -w 1")]);
    }
    agent.has(&expected.iter().map(String::as_str).collect::<Vec<_>>());
    agent.binds(&["10.96.0.1/32", "10.96.0.10/32", "10.96.0.66/32", "203.0.113.1/32"]);
    for word in ["unspecified", "loopback", "link-local", "multicast", "broadcast"] {
        agent.says(&format!("is a {word} address"));
    }
    agent.says("is the address of a Node").says("is the address of the API server");
    agent.says("belongs to Service");
}
