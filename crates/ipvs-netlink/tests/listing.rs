//! The examples that show what the kernel has, in the lab, beside ipvsadm.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::servers::servers;
use common::{client, example, local_service, real, round_robin, run, tcp};
use ipvs_netlink::{Client, Family, Message, Protocol, RealServer, Stats, VirtualServerEntry, VirtualServerId};
use lab::wait::LIMIT;

const MODES: [&str; 8] = [
    "",
    "--stats",
    "--rate",
    "--thresholds",
    "--stats --exact",
    "--rate --exact",
    "--stats --rate --thresholds",
    "--thresholds --rate",
];

/// Compares listings, while nothing changes between the two that ipvsadm is asked for around ours.
fn assert_listed_alike() {
    for mode in MODES {
        let until = Instant::now() + LIMIT;
        loop {
            let theirs = run(&format!("ipvsadm -Ln {mode}"));
            let ours = run(&format!("{} {mode}", example("list")));
            if theirs == run(&format!("ipvsadm -Ln {mode}")) {
                assert_eq!(ours, theirs, "{mode}");
                break;
            }
            assert!(Instant::now() < until, "{mode}");
        }
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn list_shows_what_ipvsadm_does_byte_for_byte() {
    let mut client = client();
    assert_listed_alike();
    let mut messages = Vec::new();
    for (server, reals) in servers() {
        messages.push(Message::AddVirtualServer(server));
        // ipvsadm has no order for addresses of two families.
        let reals = reals.into_iter().filter(|real| Family::of(real.address) == server.id.family());
        messages.extend(reals.map(|real| Message::AddRealServer(server.id, real)));
    }
    for result in client.apply(&messages).unwrap() {
        result.unwrap();
    }
    assert_listed_alike();
}

/// Some connections that are open, some that were, and a billion bytes.
fn traffic(client: &mut Client) -> (Vec<VirtualServerId>, Vec<TcpStream>) {
    let mut open = Vec::new();
    let mut ids = Vec::new();
    for (virtual_ip, real_ip) in [("10.96.0.1", "10.1.0.7"), ("fd00:96::1", "fd00:1::7")] {
        let [virtual_address, real_address] =
            [(virtual_ip, 80), (real_ip, 8080)].map(|(ip, port)| SocketAddr::new(ip.parse().unwrap(), port));
        let id = local_service(client, Protocol::Tcp, virtual_ip, real_ip);
        let idle = RealServer { weight: 0, upper_threshold: 10, ..RealServer::new(real_address) };
        client.add_real_server(&id, &RealServer { port: 9090, ..idle }).unwrap();
        let listener = TcpListener::bind(real_address).unwrap();
        for number in 0..5 {
            let mut near = TcpStream::connect(virtual_address).unwrap();
            let (mut far, _) = listener.accept().unwrap();
            near.write_all(&[1; 1000]).unwrap();
            far.read_exact(&mut [0; 1000]).unwrap();
            if number < 3 {
                open.extend([near, far]);
            }
        }
        ids.push(id);
    }
    let id = VirtualServerId::address(Protocol::Udp, "10.96.0.1:53".parse().unwrap());
    client.add_virtual_server(&round_robin(id).persistent(60)).unwrap();
    client.add_real_server(&id, &real("10.1.0.7:5353")).unwrap();
    // Nobody reads them.
    let _far = UdpSocket::bind("10.1.0.7:5353").unwrap();
    let near = UdpSocket::bind("10.96.0.1:0").unwrap();
    near.connect("10.96.0.1:53").unwrap();
    let datagram = vec![1; 60_000];
    for _ in 0..17_000 {
        near.send(&datagram).unwrap();
    }
    ids.push(id);
    let until = Instant::now() + LIMIT;
    while client.virtual_server(&id).unwrap().stats.incoming_bytes < 17_000 * 60_000 {
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(50));
    }
    (ids, open)
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn list_shows_traffic_as_ipvsadm_does() {
    let mut client = client();
    let (_, _open) = traffic(&mut client);
    let listed = run("ipvsadm -Ln --stats");
    assert!(listed.contains("    1020M"), "{listed}");
    assert_listed_alike();
}

/// An exporter that ends with the test.
struct Exporter {
    process: Child,
    address: SocketAddr,
}

impl Exporter {
    fn start(command: &str) -> Self {
        let mut words = command.split_whitespace();
        let mut command = Command::new(words.next().unwrap());
        let mut process = command.args(words).arg("127.0.0.1:0").stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("http://").unwrap().strip_suffix("/metrics").unwrap();
        Self { process, address: address.parse().unwrap() }
    }

    /// The status and the body.
    fn ask(&self, request: &str) -> (String, String) {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{head}");
        (head.lines().next().unwrap().to_owned(), body.to_owned())
    }

    fn metrics(&self) -> String {
        let (status, body) = self.ask("GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!(status, "HTTP/1.1 200 OK");
        body
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Every sample of a text in Prometheus' format, which is checked: families are whole, have help and a type, and their
/// names say whether they are counters.
fn samples(text: &str) -> BTreeMap<String, u64> {
    let mut families = BTreeSet::new();
    let (mut name, mut samples) = ("", BTreeMap::new());
    let mut lines = text.lines();
    assert!(text.ends_with('\n'));
    while let Some(line) = lines.next() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            name = help.split(' ').next().unwrap();
            assert!(families.insert(name) && help.len() > name.len() + 10, "{line}");
            let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
            assert_eq!(lines.next(), Some(format!("# TYPE {name} {kind}").as_str()));
            continue;
        }
        let (sample, value) = line.rsplit_once(' ').unwrap();
        let labels = sample.strip_prefix(name).and_then(|labels| labels.strip_prefix('{')?.strip_suffix('}')).unwrap();
        for label in labels.split(',') {
            let (label, value) = label.split_once('=').unwrap();
            assert!(label.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{line}");
            assert!(value.len() > 2 && value.starts_with('"') && value.ends_with('"'), "{line}");
        }
        assert_eq!(samples.insert(sample.to_owned(), value.parse().unwrap()), None, "{line}");
    }
    assert_eq!(families.len(), 16);
    samples
}

fn counters(stats: &Stats) -> [(&'static str, u64); 5] {
    [
        ("connections_total", stats.connections),
        ("incoming_packets_total", stats.incoming_packets),
        ("outgoing_packets_total", stats.outgoing_packets),
        ("incoming_bytes_total", stats.incoming_bytes),
        ("outgoing_bytes_total", stats.outgoing_bytes),
    ]
}

/// What the exporter is to say of everything that is there.
fn wanted(client: &mut Client) -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    let entries: Vec<VirtualServerEntry> = client.virtual_servers().unwrap();
    for entry in entries {
        let id = entry.server.id;
        let local = match id {
            VirtualServerId::Address { protocol, address, port } => {
                format!("proto=\"{protocol}\",local_address=\"{address}\",local_port=\"{port}\"")
            }
            VirtualServerId::FirewallMark { mark, family } => {
                format!("proto=\"FWM\",local_mark=\"{mark}\",local_family=\"{family}\"")
            }
        };
        for (name, value) in counters(&entry.stats) {
            all.insert(format!("ipvs_virtual_server_{name}{{{local}}}"), value);
        }
        for entry in client.real_servers(&id).unwrap() {
            let RealServer { address, port, weight, upper_threshold, lower_threshold, .. } = entry.server;
            let gauges = [
                ("active_connections", entry.active_connections),
                ("inactive_connections", entry.inactive_connections),
                ("persistent_connections", entry.persistent_connections),
                ("weight", weight),
                ("upper_threshold_connections", upper_threshold),
                ("lower_threshold_connections", lower_threshold),
            ];
            let gauges = gauges.map(|(name, value)| (name, u64::from(value)));
            for (name, value) in counters(&entry.stats).into_iter().chain(gauges) {
                let remote = format!("remote_address=\"{address}\",remote_port=\"{port}\"");
                all.insert(format!("ipvs_real_server_{name}{{{local},{remote}}}"), value);
            }
        }
    }
    all
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_exporter_tells_prometheus_what_the_kernel_lists() {
    let mut client = client();
    let exporter = Exporter::start(&example("exporter"));
    assert_eq!(samples(&exporter.metrics()), BTreeMap::new());
    let (ids, _open) = traffic(&mut client);
    for family in [Family::Ipv4, Family::Ipv6] {
        client.add_virtual_server(&round_robin(VirtualServerId::firewall_mark(7, family).unwrap())).unwrap();
    }
    let limited = RealServer { upper_threshold: 100, lower_threshold: 50, weight: 0, ..real("10.1.0.8:80") };
    client.add_real_server(&ids[0], &limited).unwrap();
    let until = Instant::now() + LIMIT;
    loop {
        let before = wanted(&mut client);
        let found = samples(&exporter.metrics());
        if before == wanted(&mut client) {
            assert_eq!(found, before);
            break;
        }
        assert!(Instant::now() < until);
    }
    let name = |kind: &str| {
        format!(
            "ipvs_real_server_{kind}{{proto=\"TCP\",local_address=\"10.96.0.1\",local_port=\"80\",remote_address=\"10.1.0.7\",remote_port=\"8080\"}}"
        )
    };
    let found = samples(&exporter.metrics());
    assert_eq!([found[&name("connections_total")], found[&name("active_connections")]], [5, 3]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_exporter_answers_whatever_it_is_asked() {
    let mut client = client();
    client.add_virtual_server(&round_robin(tcp("10.96.0.1:80"))).unwrap();
    let exporter = Exporter::start(&example("exporter"));
    for (request, status) in [
        ("GET /metrics HTTP/1.0\r\n\r\n", "200 OK"),
        ("GET /metrics?a=b HTTP/1.1\r\nHost: x\r\n\r\n", "200 OK"),
        ("GET / HTTP/1.1\r\n\r\n", "404 Not Found"),
        ("POST /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
        ("\r\n\r\n", "400 Bad Request"),
        ("GET /metrics SPDY/3\r\n\r\n", "400 Bad Request"),
    ] {
        assert_eq!(exporter.ask(request).0, format!("HTTP/1.1 {status}"), "{request:?}");
    }
    // One that says nothing, and one that goes on saying it slowly, do not keep others waiting for as long as they are there.
    let _silent = TcpStream::connect(exporter.address).unwrap();
    assert_eq!(samples(&exporter.metrics()).len(), 5);
    let slow = TcpStream::connect(exporter.address).unwrap();
    let writer = thread::spawn(move || {
        while (&slow).write_all(b"G").is_ok() {
            thread::sleep(Duration::from_millis(250));
        }
    });
    assert_eq!(samples(&exporter.metrics()).len(), 5);
    writer.join().unwrap();
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_exporter_says_why_it_cannot_read_the_kernel() {
    let _client = client();
    let exporter =
        Exporter::start(&format!("setpriv --reuid 65534 --regid 65534 --clear-groups {}", example("exporter")));
    let (status, body) = exporter.ask("GET /metrics HTTP/1.1\r\n\r\n");
    assert_eq!(status, "HTTP/1.1 500 Internal Server Error");
    assert!(body.starts_with("cannot list the virtual servers: ") && body.contains("CAP_NET_ADMIN"), "{body}");
}
