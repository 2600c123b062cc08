//! The kernel's state, read and compared in the terms of a case.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use ipvs_netlink::{Client, Forwarding, Netmask, SchedulerFlags, VirtualServerId};
use serde::Deserialize;

use super::answers;
use super::case::{Expectation, Link, RealServer, Timeouts, VirtualServer};

/// What the kernel holds.
pub(crate) struct State {
    pub(crate) virtual_servers: Vec<VirtualServer>,
    /// `None` without the device.
    pub(crate) kube_ipvs0: Option<BTreeSet<String>>,
    timeouts: Timeouts,
    link: Option<Link>,
    sysctls: BTreeMap<String, String>,
    /// What the agent answers, in lines; nothing where nothing is expected.
    no_local_endpoints: BTreeSet<String>,
    health_checks: BTreeSet<String>,
}

/// A device as `ip -json address` shows it.
#[derive(Deserialize)]
struct Device {
    #[serde(default)]
    flags: Vec<String>,
    #[serde(default)]
    mtu: u32,
    #[serde(default)]
    addr_info: Vec<Address>,
}

#[derive(Deserialize)]
struct Address {
    local: String,
    prefixlen: u8,
}

impl State {
    /// Reads the state of the calling thread's network namespace, as far as something is expected of it.
    pub(crate) fn read(expected: &Expectation) -> Result<Self> {
        let timeouts = Client::connect()?.timeouts()?;
        let device = device()?;
        Ok(Self {
            virtual_servers: virtual_servers()?,
            kube_ipvs0: device.as_ref().map(|device| {
                let addresses = device.addr_info.iter().filter(|address| !address.local.starts_with("fe80:"));
                addresses.map(|address| format!("{}/{}", address.local, address.prefixlen)).collect()
            }),
            timeouts: Timeouts { tcp: timeouts.tcp, tcp_fin: timeouts.tcp_fin, udp: timeouts.udp },
            link: device.map(|device| Link {
                up: device.flags.iter().any(|flag| flag == "UP"),
                arp: !device.flags.iter().any(|flag| flag == "NOARP"),
                mtu: device.mtu,
            }),
            sysctls: expected.sysctls.keys().map(|key| Ok((key.clone(), sysctl(key)?))).collect::<Result<_>>()?,
            no_local_endpoints: match expected.no_local_endpoints {
                Some(_) => answers::no_local_endpoints()?,
                None => BTreeSet::new(),
            },
            health_checks: answers::health_checks(expected.health_check_node_ports.as_deref().unwrap_or_default()),
        })
    }

    /// What differs from an expectation, a line each: `-` is missing, `+` is too much. Empty where nothing differs.
    pub(crate) fn diff(&self, expected: &Expectation) -> String {
        let mut lines = difference(&lines(&expected.virtual_servers), &lines(&self.virtual_servers));
        let addresses = |addresses: &Option<BTreeSet<String>>| match addresses {
            None => BTreeSet::from(["no device kube-ipvs0".to_owned()]),
            Some(addresses) => addresses.iter().map(|address| format!("kube-ipvs0 {address}")).collect(),
        };
        lines += &difference(&addresses(&expected.kube_ipvs0), &addresses(&self.kube_ipvs0));
        if let Some(timeouts) = expected.ipvs_timeouts.filter(|timeouts| *timeouts != self.timeouts) {
            let _ = writeln!(lines, "- {timeouts:?}\n+ {:?}", self.timeouts);
        }
        if expected.kube_ipvs0_link.is_some() && expected.kube_ipvs0_link != self.link {
            let _ = writeln!(lines, "- kube-ipvs0 {:?}\n+ kube-ipvs0 {:?}", expected.kube_ipvs0_link, self.link);
        }
        let sysctls = |sysctls: &BTreeMap<String, String>| -> BTreeSet<String> {
            sysctls.iter().map(|(key, value)| format!("{key} = {value}")).collect()
        };
        lines += &difference(&sysctls(&expected.sysctls), &sysctls(&self.sysctls));
        let no_local = answers::no_local_lines(expected.no_local_endpoints.as_deref().unwrap_or_default());
        lines += &difference(&no_local, &self.no_local_endpoints);
        let health_checks =
            answers::health_check_lines(expected.health_check_node_ports.as_deref().unwrap_or_default());
        lines += &difference(&health_checks, &self.health_checks);
        lines
    }
}

/// A value below /proc/sys, which shows that of the reading thread's namespace.
fn sysctl(key: &str) -> Result<String> {
    let value = fs::read_to_string(Path::new("/proc/sys").join(key)).with_context(|| format!("cannot read {key}"))?;
    Ok(value.trim().to_owned())
}

fn device() -> Result<Option<Device>> {
    let output = Command::new("ip").args(["-json", "address", "show", "dev", "kube-ipvs0"]).output();
    let output = output.context("cannot run ip")?;
    if !output.status.success() {
        return Ok(None);
    }
    let devices: Vec<Device> = serde_json::from_slice(&output.stdout).context("cannot understand what ip says")?;
    Ok(devices.into_iter().next())
}

/// The virtual servers of the calling thread's network namespace.
pub(crate) fn virtual_servers() -> Result<Vec<VirtualServer>> {
    let mut ipvs = Client::connect()?;
    let listed = ipvs.virtual_servers()?;
    listed.iter().map(|entry| virtual_server(&mut ipvs, &entry.server)).collect()
}

fn virtual_server(ipvs: &mut Client, server: &ipvs_netlink::VirtualServer) -> Result<VirtualServer> {
    let (mut protocol, mut address, mut port, mut fwmark, mut family) = (None, None, None, None, None);
    match server.id {
        VirtualServerId::Address { protocol: p, address: a, port: q } => {
            (protocol, address, port) = (Some(p.to_string()), Some(a), Some(q));
        }
        VirtualServerId::FirewallMark { mark, family: f } => {
            (fwmark, family) = (Some(mark.get()), Some(f.to_string()));
        }
    }
    let mut flags = BTreeSet::new();
    for (flag, name) in [
        (server.persistence.is_some(), "persistent"),
        (server.one_packet, "one-packet"),
        (server.scheduler_flags.contains(SchedulerFlags::FLAG_1), "flag-1"),
        (server.scheduler_flags.contains(SchedulerFlags::FLAG_2), "flag-2"),
        (server.scheduler_flags.contains(SchedulerFlags::FLAG_3), "flag-3"),
    ] {
        if flag {
            flags.insert(name.to_owned());
        }
    }
    let real_servers = ipvs.real_servers(&server.id)?.into_iter().map(|entry| RealServer {
        address: entry.server.address,
        port: entry.server.port,
        forward: forward(entry.server.forwarding),
        weight: entry.server.weight,
        upper_threshold: entry.server.upper_threshold,
        lower_threshold: entry.server.lower_threshold,
    });
    Ok(VirtualServer {
        protocol,
        address,
        port,
        fwmark,
        family,
        scheduler: server.scheduler.to_string(),
        flags,
        persistence_timeout: server.persistence.map_or(0, |persistence| persistence.timeout),
        // Without persistence it means nothing; kube-proxy leaves each client for itself there.
        netmask: server
            .persistence
            .map_or_else(|| Netmask::host(server.id.family()), |persistence| persistence.netmask)
            .to_string(),
        real_servers: real_servers.collect(),
    })
}

/// The words of the recordings.
fn forward(forwarding: Forwarding) -> String {
    match forwarding {
        Forwarding::DirectRoute => "route".to_owned(),
        other => other.to_string(),
    }
}

fn lines(servers: &[VirtualServer]) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    for server in servers {
        let name = match (server.address, server.port, server.fwmark) {
            (Some(address), Some(port), _) => {
                format!("{} {address} {port}", server.protocol.as_deref().unwrap_or("no protocol"))
            }
            (_, _, mark) => format!("fwmark {mark:?} {:?}", server.family),
        };
        let flags = server.flags.iter().map(String::as_str).collect::<Vec<_>>().join(",");
        lines.insert(format!(
            "{name}: {} flags [{flags}] timeout {} netmask {}",
            server.scheduler, server.persistence_timeout, server.netmask
        ));
        for real in &server.real_servers {
            let mut line = format!("{name} -> {} {} {} weight {}", real.address, real.port, real.forward, real.weight);
            if real.upper_threshold != 0 || real.lower_threshold != 0 {
                let _ = write!(line, " thresholds {} {}", real.upper_threshold, real.lower_threshold);
            }
            lines.insert(line);
        }
    }
    lines
}

fn difference(expected: &BTreeSet<String>, actual: &BTreeSet<String>) -> String {
    let mut lines = String::new();
    for line in expected.union(actual) {
        match (expected.contains(line), actual.contains(line)) {
            (true, false) => lines.push_str("- "),
            (false, true) => lines.push_str("+ "),
            _ => continue,
        }
        lines.push_str(line);
        lines.push('\n');
    }
    lines
}
