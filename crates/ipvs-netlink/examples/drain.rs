//! Takes a real server out of service and cuts no connection: gives it weight 0, waits for its last one, deletes it.
//! As root: `cargo run --example drain -- VIRTUAL REAL [SECONDS]`, as in `drain tcp://10.96.0.1:80 10.1.0.7:8080 60`.
//!
//! VIRTUAL is `tcp://`, `udp://` or `sctp://` and ADDRESS:PORT, `fwmark:MARK` or, for IPv6, `fwmark6:MARK`. It exits
//! with 1 after an error, and with 2 when SECONDS ran out: the real server then stays, with weight 0.

use std::error::Error;
use std::fmt;
use std::io::{Write, stdout};
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use ipvs_netlink::{Client, Family, Protocol, RealServer, RealServerEntry, VirtualServerId};

const USAGE: &str =
    "usage: drain tcp://ADDRESS:PORT|udp://…|sctp://…|fwmark:MARK|fwmark6:MARK REAL-ADDRESS:PORT [SECONDS]";
const INTERVAL: Duration = Duration::from_millis(500);

/// What to drain, and for how long at most.
struct Args {
    id: VirtualServerId,
    real: SocketAddr,
    limit: Option<Duration>,
}

fn main() -> ExitCode {
    match Args::parse(std::env::args().skip(1)).and_then(|args| drain(&args)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(2),
        Err(error) => {
            eprintln!("drain: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether it has come to its end in time.
fn drain(Args { id, real, limit }: &Args) -> Result<bool, Box<dyn Error>> {
    let started = Instant::now();
    let mut ipvs = Client::connect()?;
    let is_persistent = ipvs.virtual_server(id)?.server.persistence.is_some();
    let entry =
        find(&mut ipvs, id, *real)?.ok_or_else(|| format!("{id} has no real server {real}: see `ipvsadm -Ln`"))?;
    ipvs.set_real_server(id, &RealServer { weight: 0, ..entry.server })?;
    print_line(format_args!("{real} of {id} has weight 0 now; it had {}", entry.server.weight));
    if is_persistent && entry.persistent_connections > 0 && !expires_quiescent_templates() {
        print_line(format_args!(
            "{} persistence templates lead there: their clients come back until they expire, in spite of weight 0, \
             unless you set `sysctl net.ipv4.vs.expire_quiescent_template=1`",
            entry.persistent_connections
        ));
    }
    let mut told = None;
    loop {
        let Some(entry) = find(&mut ipvs, id, *real)? else {
            print_line(format_args!("{real} of {id} is gone: somebody else has deleted it"));
            return Ok(true);
        };
        if entry.server.weight != 0 {
            return Err(
                format!("somebody has given {real} weight {} again: stop them first", entry.server.weight).into()
            );
        }
        let counts = (entry.active_connections, entry.inactive_connections);
        if told.replace(counts) != Some(counts) {
            print_line(format_args!(
                "{:>4} s: {} active, {} inactive",
                started.elapsed().as_secs(),
                counts.0,
                counts.1
            ));
        }
        if entry.is_idle() {
            ipvs.delete_real_server(id, *real)?;
            print_line(format_args!("deleted"));
            return Ok(true);
        }
        if limit.is_some_and(|limit| started.elapsed() >= limit) {
            print_line(format_args!("out of time: {real} stays, with weight 0; run this again to go on waiting"));
            return Ok(false);
        }
        sleep(INTERVAL);
    }
}

fn find(
    ipvs: &mut Client,
    id: &VirtualServerId,
    real: SocketAddr,
) -> Result<Option<RealServerEntry>, ipvs_netlink::Error> {
    Ok(ipvs.real_servers(id)?.into_iter().find(|entry| entry.server.socket_address() == real))
}

/// Whether templates that lead to a real server of weight 0 lose their meaning; not, where that cannot be read.
fn expires_quiescent_templates() -> bool {
    std::fs::read_to_string("/proc/sys/net/ipv4/vs/expire_quiescent_template").is_ok_and(|text| text.trim() != "0")
}

/// Prints a line. Nobody listening is no reason to stop half-way.
fn print_line(line: fmt::Arguments<'_>) {
    let _ = writeln!(stdout(), "{line}");
}

impl Args {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, Box<dyn Error>> {
        let (Some(id), Some(real), limit, None) = (args.next(), args.next(), args.next(), args.next()) else {
            return Err(USAGE.into());
        };
        let limit = limit.map(|limit| limit.parse().map_err(|_| format!("{limit:?} is no number of seconds\n{USAGE}")));
        // The real servers of a mark need no port: packets keep theirs.
        let address = real.parse().or_else(|_| real.parse().map(|address: IpAddr| (address, 0).into()));
        Ok(Self {
            id: virtual_server(&id).ok_or_else(|| format!("{id:?} is no virtual server\n{USAGE}"))?,
            real: address.map_err(|_| format!("{real:?} is no address of a real server\n{USAGE}"))?,
            limit: limit.transpose()?.map(Duration::from_secs),
        })
    }
}

fn virtual_server(text: &str) -> Option<VirtualServerId> {
    let (kind, rest) = text.split_once(':')?;
    let address = |protocol| Some(VirtualServerId::address(protocol, rest.strip_prefix("//")?.parse().ok()?));
    match kind {
        "tcp" => address(Protocol::Tcp),
        "udp" => address(Protocol::Udp),
        "sctp" => address(Protocol::Sctp),
        "fwmark" => VirtualServerId::firewall_mark(rest.parse().ok()?, Family::Ipv4),
        "fwmark6" => VirtualServerId::firewall_mark(rest.parse().ok()?, Family::Ipv6),
        _ => None,
    }
}
