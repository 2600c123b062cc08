//! Lists virtual servers and their real servers, as `ipvsadm -Ln` does.
//!
//! ```text
//! sudo cargo run -p ipvs-netlink --example list -- [--stats | --rate | --thresholds] [--exact]
//! ```
//!
//! Text and order are those of ipvsadm 1.31 but where it is mistaken: it shows firewall marks from 2,147,483,648 on as
//! negative, leaves `flag-3` of the schedulers `sh` and `mh` out, calls real servers that are bypassed `(null)`, cuts
//! packets, connections and rates of real servers to 32 bits, and puts addresses that are more than half of all apart,
//! such as 10.0.0.1 and 192.168.0.1, in the wrong order.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::process::ExitCode;

use ipvs_netlink::{
    Client, Error, Family, Forwarding, Info, Netmask, Protocol, RealServerEntry, ServerEntry, Stats, VirtualServer,
    VirtualServerEntry, VirtualServerId,
};

/// What stands in the columns; of several, ipvsadm takes the one that is first here.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Columns {
    Stats,
    Rate,
    Thresholds,
    Forwarding,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let known = ["--stats", "--rate", "--thresholds", "--exact"];
    if let Some(unknown) = arguments.iter().find(|argument| !known.contains(&argument.as_str())) {
        eprintln!("list: {unknown:?} is none of {}", known.join(", "));
        return ExitCode::from(2);
    }
    let given = |name: &str| arguments.iter().any(|argument| argument == name);
    let columns = match () {
        () if given("--stats") => Columns::Stats,
        () if given("--rate") => Columns::Rate,
        () if given("--thresholds") => Columns::Thresholds,
        () => Columns::Forwarding,
    };
    let text = match read() {
        Ok((info, entries)) => list(info, &entries, columns, given("--exact")),
        Err(error) => {
            eprintln!("list: {error}");
            return ExitCode::FAILURE;
        }
    };
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("list: cannot write: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Everything, in ipvsadm's order: addresses by family first, then firewall marks.
fn read() -> Result<(Info, Vec<ServerEntry>), Error> {
    let mut client = Client::connect()?;
    let info = client.info()?;
    let mut entries = client.servers()?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(|entry| match entry.virtual_server.server.id {
        id @ VirtualServerId::Address { .. } => (0, Some(id.family()), id),
        id @ VirtualServerId::FirewallMark { .. } => (1, None, id),
    });
    for entry in &mut entries {
        entry.real_servers.sort_by_key(|entry| entry.server.socket_address());
    }
    Ok((info, entries))
}

fn list(info: Info, entries: &[ServerEntry], columns: Columns, exact: bool) -> String {
    let (major, minor, patch) = info.version;
    let mut text = format!("IP Virtual Server version {major}.{minor}.{patch} (size={})\n", info.connection_table_size);
    text += &title(columns);
    for entry in entries {
        text += &virtual_row(&entry.virtual_server, columns, exact);
        for real_server in &entry.real_servers {
            text += &real_row(real_server, columns, exact);
        }
    }
    text
}

fn title(columns: Columns) -> String {
    let local = "Prot LocalAddress:Port";
    let remote = "  -> RemoteAddress:Port";
    let numbers = |names: [&str; 5]| {
        let names = names.map(|name| format!(" {name:>8}")).concat();
        format!("{local:<33}{names}\n{remote}\n")
    };
    match columns {
        Columns::Stats => numbers(["Conns", "InPkts", "OutPkts", "InBytes", "OutBytes"]),
        Columns::Rate => numbers(["CPS", "InPPS", "OutPPS", "InBPS", "OutBPS"]),
        Columns::Thresholds => {
            let names = ["Uthreshold", "Lthreshold", "ActiveConn", "InActConn"].map(|name| format!(" {name:<10}"));
            format!("{local:<33}{}\n{remote}\n", names.concat())
        }
        Columns::Forwarding => {
            format!("{local} Scheduler Flags\n{remote:<33} Forward Weight ActiveConn InActConn\n")
        }
    }
}

fn virtual_row(entry: &VirtualServerEntry, columns: Columns, exact: bool) -> String {
    let name = match entry.server.id {
        VirtualServerId::Address { protocol, address, port } => {
            let protocol = match protocol {
                Protocol::Other(number) => number.to_string(),
                known => known.to_string(),
            };
            format!("{protocol:<4} {}", SocketAddr::new(address, port))
        }
        VirtualServerId::FirewallMark { mark, family: Family::Ipv4 } => format!("FWM  {mark}"),
        VirtualServerId::FirewallMark { mark, family: Family::Ipv6 } => format!("FWM  {mark} IPv6"),
    };
    match columns {
        Columns::Stats => format!("{name:<33}{}\n", large(counters(&entry.stats), exact)),
        Columns::Rate => format!("{name:<33}{}\n", large(rates(&entry.stats), exact)),
        Columns::Thresholds | Columns::Forwarding => format!("{name} {}\n", scheduling(&entry.server)),
    }
}

/// The scheduler, and how clients stay with their real server.
fn scheduling(server: &VirtualServer) -> String {
    let mut text = server.scheduler.to_string();
    let flags: Vec<&str> = server.scheduler_flags.names(server.scheduler).collect();
    // To a String nothing fails.
    if !flags.is_empty() {
        let _ = write!(text, " ({})", flags.join(","));
    }
    if let Some(persistence) = server.persistence {
        let _ = write!(text, " persistent {}", persistence.timeout);
        if persistence.netmask != Netmask::host(server.id.family()) {
            let _ = write!(text, " mask {}", persistence.netmask);
        }
        if let Some(engine) = server.engine {
            let _ = write!(text, " pe {engine}");
        }
    }
    if server.one_packet {
        text += " ops";
    }
    text
}

fn real_row(entry: &RealServerEntry, columns: Columns, exact: bool) -> String {
    let server = &entry.server;
    let name = format!("  -> {:<28}", server.socket_address().to_string());
    let (active, inactive) = (entry.active_connections, entry.inactive_connections);
    match columns {
        Columns::Stats => format!("{name}{}\n", large(counters(&entry.stats), exact)),
        Columns::Rate => {
            // These three without units, unlike those of virtual servers.
            let [connections, incoming, outgoing, bytes @ ..] = rates(&entry.stats);
            format!("{name} {connections:>8} {incoming:>8} {outgoing:>8}{}\n", large::<2>(bytes, exact))
        }
        Columns::Thresholds => {
            let (upper, lower) = (server.upper_threshold, server.lower_threshold);
            format!("{name} {upper:<10} {lower:<10} {active:<10} {inactive:<10}\n")
        }
        Columns::Forwarding => {
            let method = match server.forwarding {
                Forwarding::Masquerade => "Masq",
                Forwarding::Local => "Local",
                Forwarding::Tunnel(_) => "Tunnel",
                Forwarding::DirectRoute => "Route",
                Forwarding::Bypass => "Bypass",
                Forwarding::Other(_) => "Other",
            };
            format!("{name} {method:<7} {:<6} {active:<10} {inactive:<10}\n", server.weight)
        }
    }
}

fn counters(stats: &Stats) -> [u64; 5] {
    [stats.connections, stats.incoming_packets, stats.outgoing_packets, stats.incoming_bytes, stats.outgoing_bytes]
}

fn rates(stats: &Stats) -> [u64; 5] {
    [
        stats.connection_rate,
        stats.incoming_packet_rate,
        stats.outgoing_packet_rate,
        stats.incoming_byte_rate,
        stats.outgoing_byte_rate,
    ]
}

/// Numbers in columns of nine, with decimal units from 100 million on unless they are to be exact.
fn large<const N: usize>(numbers: [u64; N], exact: bool) -> String {
    let one = |number: u64| match number {
        _ if exact => format!(" {number:>8}"),
        ..100_000_000 => format!("{number:>9}"),
        100_000_000..1_000_000_000 => format!("{:>8}K", number / 1_000),
        1_000_000_000..100_000_000_000 => format!("{:>8}M", number / 1_000_000),
        100_000_000_000..100_000_000_000_000 => format!("{:>8}G", number / 1_000_000_000),
        _ => format!("{:>8}T", number / 1_000_000_000_000),
    };
    numbers.map(one).concat()
}
