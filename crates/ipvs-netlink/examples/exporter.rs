//! Metrics of IPVS for Prometheus, at `/metrics` of a small HTTP server.
//!
//! ```text
//! sudo cargo run -p ipvs-netlink --example exporter -- [127.0.0.1:9901]
//! curl http://127.0.0.1:9901/metrics
//! ```
//!
//! Virtual servers are told apart by `proto`, `local_address` and `local_port`, or by `local_mark` and `local_family`;
//! real servers by `remote_address` and `remote_port` as well. Where the kernel cannot be read the answer is 500, with the
//! reason. Clients are served one after the other, for at most five seconds each.

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ipvs_netlink::{Client, Error, Protocol, RealServerEntry, Stats, VirtualServerEntry, VirtualServerId};

/// How long one client may keep the others waiting.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest request line with all headers.
const MAX_REQUEST_BYTES: usize = 16 << 10;

fn main() -> ExitCode {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:9901".to_owned());
    let listener =
        match address.parse().map_err(io::Error::other).and_then(|address: SocketAddr| TcpListener::bind(address)) {
            Ok(listener) => listener,
            Err(error) => {
                eprintln!("exporter: cannot listen at {address:?}: {error}");
                return ExitCode::FAILURE;
            }
        };
    // With the port that was chosen where 0 was asked for.
    match listener.local_addr() {
        Ok(address) => println!("http://{address}/metrics"),
        Err(error) => eprintln!("exporter: {error}"),
    }
    for stream in listener.incoming() {
        if let Err(error) = stream.and_then(|stream| serve(&stream)) {
            eprintln!("exporter: a client got no answer: {error}");
        }
    }
    ExitCode::SUCCESS
}

/// Answers one request.
fn serve(stream: &TcpStream) -> io::Result<()> {
    let until = Instant::now() + CLIENT_TIMEOUT;
    let request = read_request(stream, until)?;
    let (status, kind, body) = answer(&request);
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    write_until(stream, (head + &body).as_bytes(), until)
}

/// Reads a request up to the empty line that ends its headers.
fn read_request(mut stream: &TcpStream, until: Instant) -> io::Result<Vec<u8>> {
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|four| four == b"\r\n\r\n") && request.len() < MAX_REQUEST_BYTES {
        stream.set_read_timeout(Some(left(until)?))?;
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            break;
        }
        request.extend_from_slice(&buffer[..length]);
    }
    Ok(request)
}

/// Writes all of it, however slowly the other side reads, or gives up in time.
fn write_until(mut stream: &TcpStream, mut bytes: &[u8], until: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.set_write_timeout(Some(left(until)?))?;
        let length = stream.write(bytes)?;
        bytes = &bytes[length..];
    }
    Ok(())
}

fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// Status, type and body.
fn answer(request: &[u8]) -> (&'static str, &'static str, String) {
    const TEXT: &str = "text/plain; charset=utf-8";
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some(version)) = (words.next(), words.next(), words.next()) else {
        return ("400 Bad Request", TEXT, "no HTTP request\n".to_owned());
    };
    let path = target.split('?').next().unwrap_or_default();
    match (method, path) {
        _ if !version.starts_with("HTTP/1.") => ("400 Bad Request", TEXT, "HTTP/1 is spoken here\n".to_owned()),
        ("GET", "/metrics") => match read() {
            Ok(table) => ("200 OK", "text/plain; version=0.0.4; charset=utf-8", render(&table)),
            Err(error) => ("500 Internal Server Error", TEXT, format!("{error}\n")),
        },
        (_, "/metrics") => ("405 Method Not Allowed", TEXT, "GET it\n".to_owned()),
        _ => ("404 Not Found", TEXT, "the metrics are at /metrics\n".to_owned()),
    }
}

/// Virtual servers with their real servers.
type Table = Vec<(VirtualServerEntry, Vec<RealServerEntry>)>;

fn read() -> Result<Table, Error> {
    let mut client = Client::connect()?;
    let virtual_servers = client.virtual_servers()?;
    virtual_servers.into_iter().map(|entry| Ok((entry, client.real_servers(&entry.server.id)?))).collect()
}

/// A metric, and its value for a virtual or real server.
struct Metric<T> {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    value: fn(&T) -> u64,
}

const fn counter<T>(name: &'static str, help: &'static str, value: fn(&T) -> u64) -> Metric<T> {
    Metric { name, kind: "counter", help, value }
}

const fn gauge<T>(name: &'static str, help: &'static str, value: fn(&T) -> u64) -> Metric<T> {
    Metric { name, kind: "gauge", help, value }
}

const COUNTERS: [Metric<Stats>; 5] = [
    counter("connections_total", "Connections scheduled.", |stats| stats.connections),
    counter("incoming_packets_total", "Packets from clients.", |stats| stats.incoming_packets),
    counter("outgoing_packets_total", "Packets to clients that passed IPVS.", |stats| stats.outgoing_packets),
    counter("incoming_bytes_total", "Bytes from clients.", |stats| stats.incoming_bytes),
    counter("outgoing_bytes_total", "Bytes to clients that passed IPVS.", |stats| stats.outgoing_bytes),
];

const GAUGES: [Metric<RealServerEntry>; 6] = [
    gauge("active_connections", "Connections in a state that counts as active.", |entry| {
        entry.active_connections.into()
    }),
    gauge("inactive_connections", "All other connections.", |entry| entry.inactive_connections.into()),
    gauge("persistent_connections", "Persistence templates.", |entry| entry.persistent_connections.into()),
    gauge("weight", "Share of new connections; 0 takes none.", |entry| entry.server.weight.into()),
    gauge("upper_threshold_connections", "Connections from which on it takes no new ones; 0 for no limit.", |entry| {
        entry.server.upper_threshold.into()
    }),
    gauge(
        "lower_threshold_connections",
        "Connections below which it takes new ones again; 0 for 3/4 of the upper threshold.",
        |entry| entry.server.lower_threshold.into(),
    ),
];

/// The text format of Prometheus, version 0.0.4.
fn render(table: &Table) -> String {
    let virtual_labels: Vec<_> = table.iter().map(|(entry, _)| virtual_labels(&entry.server.id)).collect();
    let virtual_servers: Vec<_> = table.iter().map(|(entry, _)| entry).zip(&virtual_labels).collect();
    let real_servers: Vec<(&RealServerEntry, String)> = table
        .iter()
        .zip(&virtual_labels)
        .flat_map(|((_, entries), labels)| {
            entries.iter().map(move |entry| {
                let server = &entry.server;
                let remote = [("remote_address", server.address.to_string()), ("remote_port", server.port.to_string())];
                (entry, format!("{labels},{}", labels_text(&remote)))
            })
        })
        .collect();
    let mut text = String::new();
    for metric in &COUNTERS {
        let samples = virtual_servers.iter().map(|(entry, labels)| (labels.as_str(), (metric.value)(&entry.stats)));
        text += &family("ipvs_virtual_server", metric, samples);
    }
    for metric in &COUNTERS {
        let samples = real_servers.iter().map(|(entry, labels)| (labels.as_str(), (metric.value)(&entry.stats)));
        text += &family("ipvs_real_server", metric, samples);
    }
    for metric in &GAUGES {
        let samples = real_servers.iter().map(|(entry, labels)| (labels.as_str(), (metric.value)(entry)));
        text += &family("ipvs_real_server", metric, samples);
    }
    text
}

/// A metric with all its samples.
fn family<'a, T>(prefix: &str, metric: &Metric<T>, samples: impl Iterator<Item = (&'a str, u64)>) -> String {
    let name = format!("{prefix}_{}", metric.name);
    let mut text = format!("# HELP {name} {}\n# TYPE {name} {}\n", metric.help, metric.kind);
    for (labels, value) in samples {
        // To a String nothing fails.
        let _ = writeln!(text, "{name}{{{labels}}} {value}");
    }
    text
}

fn virtual_labels(id: &VirtualServerId) -> String {
    labels_text(&match *id {
        VirtualServerId::Address { protocol, address, port } => {
            let protocol = match protocol {
                Protocol::Other(number) => number.to_string(),
                known => known.to_string(),
            };
            [("proto", protocol), ("local_address", address.to_string()), ("local_port", port.to_string())]
        }
        VirtualServerId::FirewallMark { mark, family } => {
            [("proto", "FWM".to_owned()), ("local_mark", mark.to_string()), ("local_family", family.to_string())]
        }
    })
}

fn labels_text(labels: &[(&str, String)]) -> String {
    let escape = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect::<Vec<_>>().join(",")
}
