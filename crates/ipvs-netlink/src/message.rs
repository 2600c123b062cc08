//! The messages of the family: what one asks the kernel, and what it answers.

use std::collections::HashSet;
use std::net::SocketAddr;

use netlink_packet_core::{DecodeError, Emitable, ParseableParametrized, parse_u32};
use netlink_packet_generic::{GenlFamily, GenlHeader};

use crate::attributes::{Encoder, FAMILY_NAME, FAMILY_VERSION, command, each_attribute, top};
use crate::config::{Info, Timeouts};
use crate::id::VirtualServerId;
use crate::real_server::{RealServer, RealServerEntry, encode_id};
use crate::sync_daemon::{SyncDaemon, SyncRole};
use crate::virtual_server::{VirtualServer, VirtualServerEntry};

/// A message to or from the kernel.
///
/// It implements the traits of [`netlink_packet_generic`], so it also travels over any other socket of that family of
/// crates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Message {
    /// `IPVS_CMD_NEW_SERVICE`: fails with `EEXIST` where it exists.
    AddVirtualServer(VirtualServer),
    /// `IPVS_CMD_SET_SERVICE`: fails with `ESRCH` where it does not exist.
    SetVirtualServer(VirtualServer),
    /// `IPVS_CMD_DEL_SERVICE`: with all its real servers.
    DeleteVirtualServer(VirtualServerId),
    /// `IPVS_CMD_GET_SERVICE`: one virtual server.
    GetVirtualServer(VirtualServerId),
    /// `IPVS_CMD_GET_SERVICE` as a dump: all of them.
    ListVirtualServers,
    /// `IPVS_CMD_NEW_DEST`: fails with `EEXIST` where it exists, with `ESRCH` where the virtual server does not.
    AddRealServer(VirtualServerId, RealServer),
    /// `IPVS_CMD_SET_DEST`: fails with `ENOENT` where it does not exist.
    SetRealServer(VirtualServerId, RealServer),
    /// `IPVS_CMD_DEL_DEST`: its connections stay until they end or `expire_nodest_conn` ends them.
    DeleteRealServer(VirtualServerId, SocketAddr),
    /// `IPVS_CMD_GET_DEST` as a dump: the real servers of a virtual server; none where it does not exist.
    ListRealServers(VirtualServerId),
    /// `IPVS_CMD_NEW_DAEMON`: fails with `EEXIST` where one of its role runs, with `ENODEV` without its interface.
    StartSyncDaemon(SyncDaemon),
    /// `IPVS_CMD_DEL_DAEMON`: fails with `ESRCH` where none of the role runs.
    StopSyncDaemon(SyncRole),
    /// `IPVS_CMD_GET_DAEMON` as a dump: those that run.
    ListSyncDaemons,
    /// `IPVS_CMD_GET_CONFIG`.
    GetTimeouts,
    /// `IPVS_CMD_SET_CONFIG`.
    SetTimeouts(Timeouts),
    /// `IPVS_CMD_GET_INFO`.
    GetInfo,
    /// `IPVS_CMD_ZERO` of one virtual server: its counters and those of its real servers begin anew.
    ZeroVirtualServer(VirtualServerId),
    /// `IPVS_CMD_ZERO`: all counters begin anew.
    Zero,
    /// `IPVS_CMD_FLUSH`: every virtual server goes.
    Flush,
    /// The kernel lists a virtual server.
    VirtualServer(VirtualServerEntry),
    /// The kernel lists a real server.
    RealServer(RealServerEntry),
    /// The kernel lists a synchronization daemon.
    SyncDaemon(SyncDaemon),
    /// The kernel tells its timeouts.
    Timeouts(Timeouts),
    /// The kernel tells about itself.
    Info(Info),
}

impl Message {
    /// What the message does, as in "cannot … web:80".
    pub(crate) fn operation(&self) -> &'static str {
        match self {
            Self::AddVirtualServer(_) => "add virtual server",
            Self::SetVirtualServer(_) => "change virtual server",
            Self::DeleteVirtualServer(_) => "delete virtual server",
            Self::GetVirtualServer(_) | Self::VirtualServer(_) => "read virtual server",
            Self::ListVirtualServers => "list the virtual servers",
            Self::AddRealServer(..) => "add real server",
            Self::SetRealServer(..) => "change real server",
            Self::DeleteRealServer(..) => "delete real server",
            Self::RealServer(_) => "read real server",
            Self::ListRealServers(_) => "list the real servers of",
            Self::StartSyncDaemon(_) => "start synchronization daemon",
            Self::StopSyncDaemon(_) => "stop synchronization daemon",
            Self::ListSyncDaemons | Self::SyncDaemon(_) => "list the synchronization daemons",
            Self::GetTimeouts | Self::Timeouts(_) => "read the IPVS timeouts",
            Self::SetTimeouts(_) => "set the IPVS timeouts to",
            Self::GetInfo | Self::Info(_) => "read the version of IPVS",
            Self::ZeroVirtualServer(_) => "zero the counters of",
            Self::Zero => "zero all counters",
            Self::Flush => "delete all virtual servers",
        }
    }

    /// What the message is about; empty where the operation says it.
    pub(crate) fn object(&self) -> String {
        match self {
            Self::AddVirtualServer(server) | Self::SetVirtualServer(server) => server.id.to_string(),
            Self::VirtualServer(entry) => entry.server.id.to_string(),
            Self::DeleteVirtualServer(id)
            | Self::GetVirtualServer(id)
            | Self::ListRealServers(id)
            | Self::ZeroVirtualServer(id) => id.to_string(),
            Self::AddRealServer(id, server) | Self::SetRealServer(id, server) => {
                format!("{} of {id}", server.socket_address())
            }
            Self::DeleteRealServer(id, address) => format!("{address} of {id}"),
            Self::RealServer(entry) => entry.server.socket_address().to_string(),
            Self::StartSyncDaemon(daemon) => format!("{} on {}", daemon.role, daemon.interface),
            Self::StopSyncDaemon(role) => role.to_string(),
            Self::SetTimeouts(timeouts) => timeouts.to_string(),
            Self::ListVirtualServers
            | Self::ListSyncDaemons
            | Self::SyncDaemon(_)
            | Self::GetTimeouts
            | Self::Timeouts(_)
            | Self::GetInfo
            | Self::Info(_)
            | Self::Zero
            | Self::Flush => String::new(),
        }
    }

    /// What is wrong with a request before any kernel has seen it.
    pub(crate) fn fault(&self) -> Option<&'static str> {
        match self {
            Self::AddVirtualServer(server) | Self::SetVirtualServer(server) => server.fault(),
            Self::VirtualServer(_) | Self::RealServer(_) | Self::SyncDaemon(_) | Self::Timeouts(_) | Self::Info(_) => {
                Some("this is an answer of the kernel's, and no request")
            }
            _ => None,
        }
    }

    fn encode(&self, out: &mut Encoder<'_>) {
        match self {
            Self::AddVirtualServer(server) | Self::SetVirtualServer(server) => {
                out.nested(top::SERVICE, |out| server.encode(out));
            }
            Self::DeleteVirtualServer(id)
            | Self::GetVirtualServer(id)
            | Self::ListRealServers(id)
            | Self::ZeroVirtualServer(id) => out.nested(top::SERVICE, |out| id.encode(out)),
            Self::AddRealServer(id, server) | Self::SetRealServer(id, server) => {
                out.nested(top::SERVICE, |out| id.encode(out));
                out.nested(top::DEST, |out| server.encode(out));
            }
            Self::DeleteRealServer(id, address) => {
                out.nested(top::SERVICE, |out| id.encode(out));
                out.nested(top::DEST, |out| encode_id(out, *address));
            }
            Self::SetTimeouts(timeouts) => {
                for (kind, seconds) in [
                    (top::TIMEOUT_TCP, timeouts.tcp),
                    (top::TIMEOUT_TCP_FIN, timeouts.tcp_fin),
                    (top::TIMEOUT_UDP, timeouts.udp),
                ] {
                    out.u32(kind, seconds);
                }
            }
            Self::StartSyncDaemon(daemon) => out.nested(top::DAEMON, |out| daemon.encode(out)),
            Self::StopSyncDaemon(role) => out.nested(top::DAEMON, |out| role.encode(out)),
            // Requests without arguments, and answers, which nobody sends to the kernel.
            Self::ListVirtualServers
            | Self::ListSyncDaemons
            | Self::GetTimeouts
            | Self::GetInfo
            | Self::Zero
            | Self::Flush
            | Self::VirtualServer(_)
            | Self::RealServer(_)
            | Self::SyncDaemon(_)
            | Self::Timeouts(_)
            | Self::Info(_) => {}
        }
    }
}

/// A reply of the kernel to a request.
pub(crate) trait Reply: Sized {
    /// The reply in a message of this kind.
    fn from_message(message: Message) -> Option<Self>;

    /// Removes duplicates. If others add meanwhile, the kernel, which finds its place from one datagram of a list
    /// to the next by counting, lists some twice.
    fn remove_duplicates(_: &mut Vec<Self>) {}
}

impl Reply for VirtualServerEntry {
    fn from_message(message: Message) -> Option<Self> {
        if let Message::VirtualServer(entry) = message { Some(entry) } else { None }
    }

    fn remove_duplicates(list: &mut Vec<Self>) {
        let mut seen = HashSet::with_capacity(list.len());
        list.retain(|entry| seen.insert(entry.server.id));
    }
}

impl Reply for RealServerEntry {
    fn from_message(message: Message) -> Option<Self> {
        if let Message::RealServer(entry) = message { Some(entry) } else { None }
    }

    fn remove_duplicates(list: &mut Vec<Self>) {
        // So few fit the smallest datagram: they come from one look at the list.
        if list.len() > 8 {
            let mut seen = HashSet::with_capacity(list.len());
            list.retain(|entry| seen.insert(entry.server.socket_address()));
        }
    }
}

impl Reply for SyncDaemon {
    fn from_message(message: Message) -> Option<Self> {
        if let Message::SyncDaemon(daemon) = message { Some(daemon) } else { None }
    }
}

impl Reply for Timeouts {
    fn from_message(message: Message) -> Option<Self> {
        if let Message::Timeouts(timeouts) = message { Some(timeouts) } else { None }
    }
}

impl Reply for Info {
    fn from_message(message: Message) -> Option<Self> {
        if let Message::Info(info) = message { Some(info) } else { None }
    }
}

impl GenlFamily for Message {
    fn family_name() -> &'static str {
        FAMILY_NAME
    }

    fn command(&self) -> u8 {
        match self {
            Self::AddVirtualServer(_) | Self::VirtualServer(_) => command::NEW_SERVICE,
            Self::SetVirtualServer(_) => command::SET_SERVICE,
            Self::DeleteVirtualServer(_) => command::DEL_SERVICE,
            Self::GetVirtualServer(_) | Self::ListVirtualServers => command::GET_SERVICE,
            Self::AddRealServer(..) | Self::RealServer(_) => command::NEW_DEST,
            Self::SetRealServer(..) => command::SET_DEST,
            Self::DeleteRealServer(..) => command::DEL_DEST,
            Self::ListRealServers(_) => command::GET_DEST,
            Self::StartSyncDaemon(_) | Self::SyncDaemon(_) => command::NEW_DAEMON,
            Self::StopSyncDaemon(_) => command::DEL_DAEMON,
            Self::ListSyncDaemons => command::GET_DAEMON,
            Self::GetTimeouts => command::GET_CONFIG,
            Self::SetTimeouts(_) | Self::Timeouts(_) => command::SET_CONFIG,
            Self::GetInfo => command::GET_INFO,
            Self::Info(_) => command::SET_INFO,
            Self::ZeroVirtualServer(_) | Self::Zero => command::ZERO,
            Self::Flush => command::FLUSH,
        }
    }

    fn version(&self) -> u8 {
        FAMILY_VERSION
    }
}

impl Emitable for Message {
    fn buffer_len(&self) -> usize {
        let mut out = Encoder::counting();
        self.encode(&mut out);
        out.position()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.encode(&mut Encoder::writing(buffer));
    }
}

/// Answers bear the command that would make what they list.
impl ParseableParametrized<[u8], GenlHeader> for Message {
    fn parse_with_param(buffer: &[u8], header: GenlHeader) -> Result<Self, DecodeError> {
        match header.cmd {
            command::NEW_SERVICE => VirtualServerEntry::parse(nested(buffer, top::SERVICE)?).map(Self::VirtualServer),
            command::NEW_DEST => RealServerEntry::parse(nested(buffer, top::DEST)?).map(Self::RealServer),
            command::NEW_DAEMON => SyncDaemon::parse(nested(buffer, top::DAEMON)?).map(Self::SyncDaemon),
            command::SET_CONFIG => {
                let mut timeouts = Timeouts::default();
                each_attribute(buffer, |kind, value| {
                    match kind {
                        top::TIMEOUT_TCP => timeouts.tcp = parse_u32(value)?,
                        top::TIMEOUT_TCP_FIN => timeouts.tcp_fin = parse_u32(value)?,
                        top::TIMEOUT_UDP => timeouts.udp = parse_u32(value)?,
                        _ => {}
                    }
                    Ok(())
                })?;
                Ok(Self::Timeouts(timeouts))
            }
            command::SET_INFO => {
                let (mut version, mut table_size) = (0, 0);
                each_attribute(buffer, |kind, value| {
                    match kind {
                        top::INFO_VERSION => version = parse_u32(value)?,
                        top::INFO_CONN_TAB_SIZE => table_size = parse_u32(value)?,
                        _ => {}
                    }
                    Ok(())
                })?;
                Ok(Self::Info(Info::new(version, table_size)))
            }
            other => Err(format!("command {other} is not known as an answer of IPVS").into()),
        }
    }
}

/// The content of the one attribute of a kind that an answer holds.
fn nested(buffer: &[u8], wanted: u16) -> Result<&[u8], DecodeError> {
    let mut found = None;
    each_attribute(buffer, |kind, value| {
        if kind == wanted {
            found = Some(value);
        }
        Ok(())
    })?;
    found.ok_or_else(|| format!("an answer lacks its attribute {wanted}").into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Protocol;
    use crate::scheduler::Scheduler;
    use crate::stats::Stats;

    #[test]
    fn what_is_listed_again_is_left_out_and_the_order_stays() {
        let real = |host: u8| RealServerEntry {
            server: RealServer::new(SocketAddr::from(([10, 1, 0, host], 80))),
            active_connections: 0,
            inactive_connections: 0,
            persistent_connections: 0,
            stats: Stats::default(),
        };
        let hosts = [5, 4, 3, 2, 1, 9, 8, 7, 6];
        let mut list: Vec<_> = hosts.into_iter().chain([9, 5]).map(real).collect();
        RealServerEntry::remove_duplicates(&mut list);
        assert_eq!(list, hosts.map(real));

        let server = |host: u8| VirtualServerEntry {
            server: VirtualServer::new(
                VirtualServerId::address(Protocol::Tcp, SocketAddr::from(([10, 96, 0, host], 80))),
                Scheduler::RoundRobin,
            ),
            stats: Stats::default(),
        };
        let mut list = vec![server(2), server(1), server(2)];
        VirtualServerEntry::remove_duplicates(&mut list);
        assert_eq!(list, [server(2), server(1)]);
    }
}
