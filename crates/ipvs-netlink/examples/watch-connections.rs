//! Prints connections and persistence templates of IPVS that come (+), change state (~) and go (-). Without privileges:
//! `cargo run --example watch-connections -- [SECONDS [ADDRESS[:PORT]]]`, as in `watch-connections 0.5 10.96.0.1:80`.
//!
//! SECONDS pass between two looks at the connection table, 1 unless given; what comes and goes between them is not
//! seen. Only connections to ADDRESS are shown, if given.

use std::collections::HashMap;
use std::error::Error;
use std::io::{self, Write, stdout};
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use ipvs_netlink::{Connection, ConnectionState, Connections, ProcError};

const USAGE: &str = "usage: watch-connections [SECONDS [ADDRESS[:PORT]]]";

/// States by connection.
type Table = HashMap<Connection, ConnectionState>;

struct Args {
    interval: Duration,
    address: Option<IpAddr>,
    port: Option<u16>,
}

fn main() -> ExitCode {
    match Args::parse(std::env::args().skip(1)).and_then(|args| watch(&args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("watch-connections: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Goes on until nobody reads what it prints.
fn watch(args: &Args) -> Result<(), Box<dyn Error>> {
    let mut before = Table::new();
    loop {
        let now = read_table(args)?;
        for line in changes(&before, &now) {
            match writeln!(stdout(), "{line}") {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                result => result?,
            }
        }
        before = now;
        sleep(args.interval);
    }
}

fn read_table(args: &Args) -> Result<Table, ProcError> {
    let mut table = Table::new();
    for connection in Connections::of_this_namespace()? {
        match connection {
            Ok(connection) if args.wants(connection.virtual_address) => {
                let (identity, state) = identify(connection);
                table.insert(identity, state);
            }
            Ok(_) => {}
            Err(error @ ProcError::Line { .. }) => eprintln!("watch-connections: left out: {error}"),
            Err(error) => return Err(error),
        }
    }
    Ok(table)
}

/// A connection without what changes, and its state.
fn identify(mut connection: Connection) -> (Connection, ConnectionState) {
    connection.expires = Duration::ZERO;
    let state = std::mem::replace(&mut connection.state, ConnectionState::None);
    (connection, state)
}

fn changes(before: &Table, now: &Table) -> Vec<String> {
    let gone = before.iter().filter(|(connection, _)| !now.contains_key(connection));
    let gone = gone.map(|(connection, state)| format!("- {} {state}", describe(connection)));
    let come_or_changed = now.iter().filter_map(|(connection, state)| match before.get(connection) {
        None => Some(format!("+ {} {state}", describe(connection))),
        Some(old) if old != state => Some(format!("~ {} {old} -> {state}", describe(connection))),
        Some(_) => None,
    });
    gone.chain(come_or_changed).collect()
}

fn describe(connection: &Connection) -> String {
    let Connection { protocol, client, virtual_address, real_address, .. } = connection;
    // A template of a mark is one without its state, too.
    let destination = match connection.template().and_then(|template| template.firewall_mark) {
        Some(mark) => format!("firewall mark {mark}"),
        None => format!("{protocol} {virtual_address}"),
    };
    format!("{client} -> {destination} -> {real_address}")
}

impl Args {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, Box<dyn Error>> {
        let (seconds, address, None) = (args.next(), args.next(), args.next()) else { return Err(USAGE.into()) };
        let seconds = seconds.as_deref().unwrap_or("1");
        let interval = seconds.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let interval = interval.ok_or_else(|| format!("{seconds:?} is no number of seconds\n{USAGE}"))?;
        let Some(text) = address else { return Ok(Self { interval, address: None, port: None }) };
        let (address, port) = match (text.parse::<SocketAddr>(), text.parse()) {
            (Ok(both), _) => (both.ip(), Some(both.port())),
            (_, Ok(address)) => (address, None),
            _ => return Err(format!("{text:?} is no address\n{USAGE}").into()),
        };
        Ok(Self { interval, address: Some(address), port })
    }

    fn wants(&self, address: SocketAddr) -> bool {
        self.address.is_none_or(|wanted| wanted == address.ip())
            && self.port.is_none_or(|wanted| wanted == address.port())
    }
}
