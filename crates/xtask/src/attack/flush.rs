//! Flushes by other software on the node, which has root's rights: what it takes must be back at once, and that must be told.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ipvs_netlink::{Client, Protocol, VirtualServerId};
use lab::http::Metrics;
use lab::link;
use lab::netns::Namespace;
use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::record::Recorder;
use crate::workload::cluster::{LONG_LIVED, TCP_TARGETS, Target, UDP_TARGETS};

/// What is waited for before the run goes on with other attacks. What takes longer is a failure long before.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What is flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flush {
    /// A command.
    Command(&'static str),
    /// All tracked connections, as `conntrack -F`.
    Connections,
}

pub(crate) const ALL: [Flush; 6] = [
    Flush::Command("nft flush ruleset"),
    Flush::Command("ipvsadm -C"),
    Flush::Command("ip address flush dev kube-ipvs0"),
    Flush::Command("ip link del kube-ipvs0"),
    Flush::Command("nft delete table ip kube-ipvs"),
    Flush::Connections,
];

impl Flush {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Command(command) => command,
            Self::Connections => "conntrack -F",
        }
    }

    /// Flushes, and waits until everything of honest Services is back.
    pub(crate) fn run(self, node: &Namespace, recorder: &Recorder) -> Result<()> {
        let told_before = findings();
        recorder.attacked(&format!("flush by root: {}", self.name()));
        recorder.traffic.flushed();
        let start = Instant::now();
        let had_effect = match self {
            // Tables with an owner are nobody else's to delete; the agent may just have no device, too.
            Self::Command(command) => node.exec(command).is_ok() && !is_whole(node)?,
            Self::Connections => flush_connections().map(|()| false).context("cannot flush connection tracking")?,
        };
        while had_effect && !is_whole(node)? && start.elapsed() < TIMEOUT {
            std::thread::sleep(Duration::from_millis(20));
        }
        recorder.traffic.repaired();
        if had_effect {
            let took = recorder.elapsed(start);
            recorder.lock().flushes.entry(self.name().to_owned()).or_default().add(took);
            if !is_told(told_before) {
                recorder.broken(&format!("`{}` was repaired, and no metric tells of it", self.name()));
            }
        }
        Ok(())
    }
}

/// What the agent says that it has found changed; none where it does not answer.
fn findings() -> Option<f64> {
    Metrics::read().ok().map(|metrics| metrics.sum("kube_ipvs_drift_found_total"))
}

/// The metric may come a moment later than the repair.
fn is_told(before: Option<f64>) -> bool {
    lab::wait::until("count a repair", || before.is_none() || findings() > before).is_ok()
}

/// Whether every honest Service with traffic has real servers and its address, and whether the tables are there.
pub(crate) fn is_whole(node: &Namespace) -> Result<bool> {
    // Where the device is deleted it has none.
    let Ok(bound) = link::addresses("kube-ipvs0") else { return Ok(false) };
    let tcp = TCP_TARGETS.iter().chain([&LONG_LIVED]).map(|target| (target, Protocol::Tcp));
    let udp = UDP_TARGETS.iter().map(|target| (target, Protocol::Udp));
    let mut ipvs = Client::connect()?;
    for (target, protocol) in tcp.chain(udp) {
        let front_end = target.socket_address()?;
        // A virtual server that does not exist is an error.
        let real_servers = ipvs.real_servers(&VirtualServerId::address(protocol, front_end)).unwrap_or_default();
        // The NodePort's address is that of another device.
        let is_bound = |target: &Target| {
            target.name == "NodePort"
                || bound.iter().any(|it| it.split('/').next() == Some(&front_end.ip().to_string()))
        };
        if real_servers.is_empty() || !is_bound(target) {
            return Ok(false);
        }
    }
    Ok(node.exec("nft list set ip kube-ipvs vips").is_ok_and(|set| set.contains("10.97.0.1")))
}

/// Deletes all entries of connection tracking of IPv4: `IPCTNL_MSG_CT_DELETE` without a tuple.
fn flush_connections() -> io::Result<()> {
    const DELETE: u16 = 1 << 8 | 2;
    const REQUEST_AND_ACK: u16 = 0x1 | 0x4;
    const IPV4: u8 = 2;
    let mut request = Vec::with_capacity(20);
    request.extend(20_u32.to_ne_bytes());
    request.extend(DELETE.to_ne_bytes());
    request.extend(REQUEST_AND_ACK.to_ne_bytes());
    request.extend([0; 8]); // sequence number and port
    request.extend([IPV4, 0, 0, 0]);
    let socket =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(NETFILTER))?;
    rustix::net::sendto(&socket, &request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut reply = [0; 256];
    let (_, length) = rustix::net::recv(&socket, &mut reply[..], RecvFlags::empty())?;
    // After the 16 bytes of the header an acknowledgement has the error, negated.
    match reply[..length].get(16..20) {
        Some(&[0, 0, 0, 0]) => Ok(()),
        Some(&[a, b, c, d]) => Err(io::Error::from_raw_os_error(-i32::from_ne_bytes([a, b, c, d]))),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
