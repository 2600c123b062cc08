//! The examples as one runs them, in the lab.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Lines};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use common::{client, real, round_robin, tcp};
use ipvs_netlink::{Client, ErrorKind, Family, Protocol, Timeouts, VirtualServerId};

/// An example, which `cargo test` builds beside the tests.
fn example(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let path: PathBuf = test.ancestors().nth(2).unwrap().join("examples").join(name);
    assert!(path.exists(), "build it first: cargo build --package ipvs-netlink --examples");
    Command::new(path)
}

fn output(name: &str, args: &str) -> (i32, String, String) {
    let Output { status, stdout, stderr } = example(name).args(args.split_whitespace()).output().unwrap();
    (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// One that runs, and its lines.
struct Running {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Running {
    fn start(name: &str, args: &str) -> Self {
        let mut child = example(name).args(args.split_whitespace()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    fn line(&mut self) -> String {
        self.lines.next().unwrap().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn add_addresses() {
    lab::link::add_addresses("lo", &["10.96.0.1", "10.1.0.7"]).unwrap();
}

fn udp_server(client: &mut Client) -> VirtualServerId {
    add_addresses();
    let id = VirtualServerId::address(Protocol::Udp, "10.96.0.1:80".parse().unwrap());
    client.add_virtual_server(&round_robin(id)).unwrap();
    client.add_real_server(&id, &real("10.1.0.7:8080")).unwrap();
    // Flows end soon.
    client.set_timeouts(Timeouts { udp: 2, ..Timeouts::default() }).unwrap();
    id
}

fn send() {
    let socket = UdpSocket::bind("10.96.0.1:5000").unwrap();
    socket.send_to(&[1], "10.96.0.1:80").unwrap();
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn drain_deletes_a_real_server_after_its_last_connection() {
    let mut client = client();
    let id = udp_server(&mut client);
    client.set_virtual_server(&round_robin(id).persistent(60)).unwrap();
    send();
    let mut drain = Running::start("drain", "udp://10.96.0.1:80 10.1.0.7:8080 60");
    assert_eq!(drain.line(), "10.1.0.7:8080 of UDP 10.96.0.1:80 has weight 0 now; it had 1");
    assert!(client.real_servers(&id).unwrap().iter().all(|entry| entry.server.weight == 0));
    assert_eq!(
        drain.line(),
        "1 persistence templates lead there: their clients come back until they expire, in spite of weight 0, unless \
         you set `sysctl net.ipv4.vs.expire_quiescent_template=1`"
    );
    assert_eq!(drain.line(), "   0 s: 0 active, 1 inactive");
    let line = drain.line();
    assert!(line.ends_with(" s: 0 active, 0 inactive") && !line.contains(" 0 s:"), "{line}");
    assert_eq!(drain.line(), "deleted");
    assert!(drain.child.wait().unwrap().success());
    assert_eq!(client.real_servers(&id).unwrap(), []);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn drain_leaves_a_real_server_with_weight_0_when_its_time_is_out() {
    let mut client = client();
    add_addresses();
    let id = tcp("10.96.0.1:80");
    client.add_virtual_server(&round_robin(id)).unwrap();
    client.add_real_server(&id, &real("10.1.0.7:8080")).unwrap();
    let listener = TcpListener::bind("10.1.0.7:8080").unwrap();
    let _near = TcpStream::connect("10.96.0.1:80").unwrap();
    let _far = listener.accept().unwrap();
    let (code, out, errors) = output("drain", "tcp://10.96.0.1:80 10.1.0.7:8080 1");
    assert_eq!((code, errors.as_str()), (2, ""));
    assert_eq!(
        out,
        "10.1.0.7:8080 of TCP 10.96.0.1:80 has weight 0 now; it had 1\n   0 s: 1 active, 0 inactive\nout of time: \
         10.1.0.7:8080 stays, with weight 0; run this again to go on waiting\n"
    );
    assert_eq!(client.real_servers(&id).unwrap()[0].server.weight, 0);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn drain_takes_firewall_marks_of_both_families() {
    let mut client = client();
    // So templates are nothing to warn of.
    fs::write("/proc/sys/net/ipv4/vs/expire_quiescent_template", "1").unwrap();
    for (family, args) in [(Family::Ipv4, "fwmark:7 10.1.0.7"), (Family::Ipv6, "fwmark6:7 [fd00:1::7]:0")] {
        let id = VirtualServerId::firewall_mark(7, family).unwrap();
        client.add_virtual_server(&round_robin(id).persistent(60)).unwrap();
        let address = if family == Family::Ipv4 { "10.1.0.7:0" } else { "[fd00:1::7]:0" };
        client.add_real_server(&id, &real(address)).unwrap();
        let (code, out, errors) = output("drain", args);
        assert_eq!((code, errors.as_str()), (0, ""));
        let told = format!("{address} of {id} has weight 0 now; it had 1\n   0 s: 0 active, 0 inactive\ndeleted\n");
        assert_eq!(out, told);
        assert_eq!(client.real_servers(&id).unwrap(), []);
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn drain_stops_where_somebody_gives_weight_again() {
    let mut client = client();
    let id = udp_server(&mut client);
    send();
    let mut drain = Running::start("drain", "udp://10.96.0.1:80 10.1.0.7:8080");
    while !drain.line().ends_with("1 inactive") {}
    client.set_real_server(&id, &real("10.1.0.7:8080")).unwrap();
    assert_eq!(drain.child.wait().unwrap().code(), Some(1));
    assert_eq!(client.real_servers(&id).unwrap()[0].server, real("10.1.0.7:8080"));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn drain_says_what_is_wrong_and_changes_nothing() {
    let mut client = client();
    let id = udp_server(&mut client);
    for (args, error) in [
        ("", "usage: drain "),
        ("udp://10.96.0.1:80", "usage: drain "),
        ("http://10.96.0.1:80 10.1.0.7:8080", "\"http://10.96.0.1:80\" is no virtual server\nusage: "),
        ("fwmark:0 10.1.0.7:8080", "\"fwmark:0\" is no virtual server\nusage: "),
        ("udp://10.96.0.1:80 web", "\"web\" is no address of a real server\nusage: "),
        ("udp://10.96.0.1:80 10.1.0.7:8080 soon", "\"soon\" is no number of seconds\nusage: "),
        ("udp://10.96.0.1:80 10.1.0.8:8080", "UDP 10.96.0.1:80 has no real server 10.1.0.8:8080: see `ipvsadm -Ln`"),
        ("udp://10.96.0.2:80 10.1.0.7:8080", "cannot read virtual server UDP 10.96.0.2:80: "),
    ] {
        let (code, out, errors) = output("drain", args);
        assert_eq!((code, out.as_str()), (1, ""), "{args}");
        assert!(errors.starts_with(&format!("drain: {error}")), "{args}: {errors}");
    }
    assert_eq!(client.real_servers(&id).unwrap()[0].server, real("10.1.0.7:8080"));
    assert_eq!(client.virtual_server(&tcp("10.96.0.1:80")).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn watch_connections_shows_what_comes_changes_and_goes() {
    let mut client = client();
    udp_server(&mut client);
    let id = tcp("10.96.0.1:80");
    client.add_virtual_server(&round_robin(id)).unwrap();
    client.add_real_server(&id, &real("10.1.0.7:8080")).unwrap();
    let mut all = Running::start("watch-connections", "0.05");
    let mut elsewhere = Running::start("watch-connections", "0.05 10.96.0.1:81");
    send();
    assert_eq!(all.line(), "+ 10.96.0.1:5000 -> UDP 10.96.0.1:80 -> 10.1.0.7:8080 UDP");
    assert_eq!(all.line(), "- 10.96.0.1:5000 -> UDP 10.96.0.1:80 -> 10.1.0.7:8080 UDP");

    let mut filtered = Running::start("watch-connections", "0.05 10.96.0.1");
    let listener = TcpListener::bind("10.1.0.7:8080").unwrap();
    let near = TcpStream::connect("10.96.0.1:80").unwrap();
    let (far, _) = listener.accept().unwrap();
    let name = format!("{} -> TCP 10.96.0.1:80 -> 10.1.0.7:8080", near.local_addr().unwrap());
    for watch in [&mut all, &mut filtered] {
        // Seldom it looks in the middle of the handshake.
        let line = watch.line();
        assert!(line.starts_with(&format!("+ {name} ")), "{line}");
    }
    drop((near, far));
    for watch in [&mut all, &mut filtered] {
        let line = watch.line();
        assert!(line.starts_with(&format!("~ {name} ")), "{line}");
    }
    elsewhere.child.kill().unwrap();
    assert!(elsewhere.lines.next().is_none());

    let (code, out, errors) = output("watch-connections", "often");
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(errors.starts_with("watch-connections: \"often\" is no number of seconds\nusage: "), "{errors}");
    let (_, _, errors) = output("watch-connections", "1 web");
    assert!(errors.starts_with("watch-connections: \"web\" is no address\nusage: "), "{errors}");
}
