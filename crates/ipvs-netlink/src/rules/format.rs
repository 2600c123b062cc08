//! Writing rules.

use std::fmt::{self, Display, Write};
use std::net::SocketAddr;

use super::error::FormatError;
use super::parse;
use crate::id::{Family, Protocol, VirtualServerId};
use crate::message::Message;
use crate::real_server::{Forwarding, GueChecksum, RealServer, Tunnel};
use crate::sync_daemon::SyncDaemon;
use crate::virtual_server::{Netmask, VirtualServer};

/// Writes a message that changes something as a line, without the end of the line. [`parse`](super::parse()) and
/// `ipvsadm -R` read it as the same message; where they could not, there is an error.
pub fn format(message: &Message) -> Result<String, FormatError> {
    let line = match message {
        Message::AddVirtualServer(server) => virtual_server("-A", server)?,
        Message::SetVirtualServer(server) => virtual_server("-E", server)?,
        Message::DeleteVirtualServer(id) => format!("-D {}", service(id)?),
        Message::AddRealServer(id, server) => real_server("-a", id, server)?,
        Message::SetRealServer(id, server) => real_server("-e", id, server)?,
        Message::DeleteRealServer(id, address) => format!("-d {} -r {address}", service(id)?),
        Message::Flush => "-C".to_owned(),
        Message::Zero => "-Z".to_owned(),
        Message::ZeroVirtualServer(id) => format!("-Z {}", service(id)?),
        Message::SetTimeouts(timeouts) => format!("--set {} {} {}", timeouts.tcp, timeouts.tcp_fin, timeouts.udp),
        Message::StartSyncDaemon(daemon) => sync_daemon(daemon),
        Message::StopSyncDaemon(role) => format!("--stop-daemon {role}"),
        Message::GetVirtualServer(_)
        | Message::ListVirtualServers
        | Message::ListRealServers(_)
        | Message::ListSyncDaemons
        | Message::GetTimeouts
        | Message::GetInfo
        | Message::VirtualServer(_)
        | Message::RealServer(_)
        | Message::SyncDaemon(_)
        | Message::Timeouts(_)
        | Message::Info(_) => return Err(FormatError::NoChange),
    };
    // What can be read is said in one place, where it is read.
    match parse::line(&line) {
        Ok(Some(read)) if read == *message => Ok(line),
        Ok(_) => Err(FormatError::Ambiguous(line)),
        Err(error) => Err(FormatError::Value(error)),
    }
}

fn service(id: &VirtualServerId) -> Result<String, FormatError> {
    Ok(match *id {
        VirtualServerId::Address { protocol, address, port } => {
            let option = match protocol {
                Protocol::Tcp => "-t",
                Protocol::Udp => "-u",
                Protocol::Sctp => "--sctp-service",
                Protocol::Other(_) => return Err(FormatError::Protocol(protocol)),
            };
            format!("{option} {}", SocketAddr::new(address, port))
        }
        VirtualServerId::FirewallMark { mark, family: Family::Ipv4 } => format!("-f {mark}"),
        VirtualServerId::FirewallMark { mark, family: Family::Ipv6 } => format!("-f {mark} -6"),
    })
}

/// An option and its value, where there is one.
struct Maybe<T>(&'static str, Option<T>);

impl<T: Display> Display for Maybe<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.1.as_ref().map_or(Ok(()), |value| write!(f, " {} {value}", self.0))
    }
}

fn virtual_server(command: &str, server: &VirtualServer) -> Result<String, FormatError> {
    let mut line = format!("{command} {} -s {}", service(&server.id)?, server.scheduler);
    // To a String nothing fails.
    if let Some(persistence) = server.persistence {
        let netmask = Some(persistence.netmask).filter(|netmask| *netmask != Netmask::host(server.id.family()));
        let _ = write!(line, " -p {}{}", persistence.timeout, Maybe("-M", netmask));
    }
    let _ = write!(line, "{}", Maybe("--pe", server.engine));
    if server.one_packet {
        line += " -o";
    }
    let flags: Vec<&str> = server.scheduler_flags.names(server.scheduler).collect();
    let _ = write!(line, "{}", Maybe("-b", (!flags.is_empty()).then(|| flags.join(","))));
    Ok(line)
}

fn real_server(command: &str, id: &VirtualServerId, server: &RealServer) -> Result<String, FormatError> {
    let (method, tunnel) = match server.forwarding {
        Forwarding::Masquerade => ("-m", String::new()),
        Forwarding::DirectRoute => ("-g", String::new()),
        Forwarding::Tunnel(tunnel) => ("-i", format!(" --tun-type {}", tunnel_options(tunnel)?)),
        Forwarding::Local | Forwarding::Bypass | Forwarding::Other(_) => {
            return Err(FormatError::Forwarding(server.forwarding));
        }
    };
    let [upper, lower] = [("-x", server.upper_threshold), ("-y", server.lower_threshold)]
        .map(|(option, threshold)| Maybe(option, (threshold != 0).then_some(threshold)));
    let (service, address, weight) = (service(id)?, server.socket_address(), server.weight);
    Ok(format!("{command} {service} -r {address} {method} -w {weight}{tunnel}{upper}{lower}"))
}

fn tunnel_options(tunnel: Tunnel) -> Result<String, FormatError> {
    Ok(match tunnel {
        Tunnel::IpIp => "ipip".to_owned(),
        Tunnel::Gue { port, checksum } => {
            let checksum = match checksum {
                GueChecksum::None => "--tun-nocsum",
                GueChecksum::Udp => "--tun-csum",
                GueChecksum::Remote => "--tun-remcsum",
            };
            format!("gue --tun-port {port} {checksum}")
        }
        Tunnel::Gre { checksum: false } => "gre --tun-nocsum".to_owned(),
        Tunnel::Gre { checksum: true } => "gre --tun-csum".to_owned(),
        Tunnel::Other { .. } => return Err(FormatError::Tunnel(tunnel)),
    })
}

fn sync_daemon(daemon: &SyncDaemon) -> String {
    let sync_id = Maybe("--syncid", (daemon.sync_id != 0).then_some(daemon.sync_id));
    let (length, group) = (Maybe("--sync-maxlen", daemon.max_length), Maybe("--mcast-group", daemon.group));
    let (port, ttl) = (Maybe("--mcast-port", daemon.port), Maybe("--mcast-ttl", daemon.ttl));
    let (role, interface) = (daemon.role, daemon.interface);
    format!("--start-daemon {role} --mcast-interface {interface}{sync_id}{length}{group}{port}{ttl}")
}
