//! Statistics of a whole network namespace, which the kernel tells in files of `/proc` alone.

use std::io::BufRead;

use crate::proc::{self, Line, Lines, ProcError, Words, number};
use crate::stats::Stats;

/// What has passed in a network namespace since it was made, or since all its counters were zeroed; virtual servers
/// that are gone by now included.
///
/// ```no_run
/// let stats = ipvs_netlink::Totals::of_this_namespace()?.stats;
/// println!("{} connections, {} a second", stats.connections, stats.connection_rate);
/// # Ok::<(), ipvs_netlink::ProcError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Totals {
    /// All together. The kernel brings it up to date every two seconds, rates and counters. The files do not tell how
    /// wide the counters are: taken for 64 bits here, as they are since Linux 4.1; before, all but bytes wrap at 32.
    pub stats: Stats,
    /// By CPU, of all that the machine may have; empty unless asked for.
    pub cpus: Vec<CpuStats>,
}

/// What has passed through one CPU. Unlike [`Totals::stats`] it is up to date, and zeroing does not touch it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CpuStats {
    /// The number of the CPU, from 0.
    pub cpu: u32,
    /// Connections scheduled.
    pub connections: u64,
    /// Packets from clients.
    pub incoming_packets: u64,
    /// Packets to clients; stays 0 where replies do not pass IPVS.
    pub outgoing_packets: u64,
    /// Bytes from clients.
    pub incoming_bytes: u64,
    /// Bytes to clients.
    pub outgoing_bytes: u64,
}

impl Totals {
    /// Those of the calling thread's network namespace, from `/proc/thread-self/net/ip_vs_stats`. Reading it takes no
    /// capability.
    ///
    /// Fails with [`ProcError::Open`] where the kernel has no IPVS; unlike [`Client::connect`](crate::Client::connect),
    /// this loads no module.
    pub fn of_this_namespace() -> Result<Self, ProcError> {
        Self::read(proc::open("/proc/thread-self/net/ip_vs_stats")?)
    }

    /// The same with those of each CPU, from `/proc/thread-self/net/ip_vs_stats_percpu`, since Linux 2.6.39.
    pub fn of_this_namespace_by_cpu() -> Result<Self, ProcError> {
        Self::read(proc::open("/proc/thread-self/net/ip_vs_stats_percpu")?)
    }

    /// Those in the text of `ip_vs_stats` or `ip_vs_stats_percpu`. What follows the rates is not read.
    pub fn read(reader: impl BufRead) -> Result<Self, ProcError> {
        let mut lines = Lines::new(reader);
        for _ in 0..2 {
            lines.expect("the file ends above its counters")?;
        }
        let mut cpus = Vec::new();
        let counters = loop {
            let line = lines.expect("the file ends before its totals")?;
            match parse_counters(line)? {
                (Some(cpu), counters) => cpus.push(CpuStats::new(cpu, counters)),
                (None, counters) => break counters,
            }
        };
        // An empty line, and names.
        for _ in 0..2 {
            lines.expect("the file ends before its rates")?;
        }
        let rates = parse_rates(lines.expect("the file ends before its rates")?)?;
        Ok(Self { stats: stats(counters, rates), cpus })
    }
}

impl CpuStats {
    fn new(cpu: u32, counters: [u64; 5]) -> Self {
        let [connections, incoming_packets, outgoing_packets, incoming_bytes, outgoing_bytes] = counters;
        Self { cpu, connections, incoming_packets, outgoing_packets, incoming_bytes, outgoing_bytes }
    }
}

fn stats(counters: [u64; 5], rates: [u64; 5]) -> Stats {
    let [connections, incoming_packets, outgoing_packets, incoming_bytes, outgoing_bytes] = counters;
    let [connection_rate, incoming_packet_rate, outgoing_packet_rate, incoming_byte_rate, outgoing_byte_rate] = rates;
    Stats {
        connections,
        incoming_packets,
        outgoing_packets,
        incoming_bytes,
        outgoing_bytes,
        connection_rate,
        incoming_packet_rate,
        outgoing_packet_rate,
        incoming_byte_rate,
        outgoing_byte_rate,
        ..Stats::default()
    }
}

/// Five counters, with a CPU's number before them if they are of one, or with `~` if they are of all.
fn parse_counters(line: Line<'_>) -> Result<(Option<u32>, [u64; 5]), ProcError> {
    let mut words = line.words();
    let cpu = match (words.clone().count(), words.clone().next()) {
        (6, Some(b"~")) => {
            words.next();
            None
        }
        (6, Some(cpu)) => {
            words.next();
            let cpu = number(cpu, 16).and_then(|cpu| u32::try_from(cpu).ok());
            Some(cpu.ok_or_else(|| line.error("the number of its CPU is not one in hexadecimal"))?)
        }
        _ => None,
    };
    let counters = five(words).ok_or_else(|| line.error("it has not five counters of 64 bits in hexadecimal"))?;
    Ok((cpu, counters))
}

fn parse_rates(line: Line<'_>) -> Result<[u64; 5], ProcError> {
    five(line.words()).ok_or_else(|| line.error("it has not five rates of 64 bits in hexadecimal"))
}

fn five(mut words: Words<'_>) -> Option<[u64; 5]> {
    let mut numbers = [0; 5];
    for place in &mut numbers {
        *place = number(words.next()?, 16)?;
    }
    words.next().is_none().then_some(numbers)
}
