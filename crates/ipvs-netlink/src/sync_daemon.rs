//! The daemons that tell the connections of one node's kernel to another's (`ipvsadm --start-daemon`).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::{NonZeroU8, NonZeroU16};

use netlink_packet_core::{DecodeError, parse_u8, parse_u16, parse_u32};

use crate::attributes::{Encoder, daemon, each_attribute};
use crate::name::Name;

/// Whether a daemon sends or receives. A network namespace has at most one of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SyncRole {
    /// It multicasts the connections of this kernel (`IP_VS_STATE_MASTER`).
    Master,
    /// It takes over connections that are multicast (`IP_VS_STATE_BACKUP`).
    Backup,
}

impl SyncRole {
    fn number(self) -> u32 {
        match self {
            Self::Master => 1,
            Self::Backup => 2,
        }
    }

    fn from_number(number: u32) -> Result<Self, DecodeError> {
        match number {
            1 => Ok(Self::Master),
            2 => Ok(Self::Backup),
            _ => Err(format!("a synchronization daemon's state {number} is neither master nor backup").into()),
        }
    }

    /// What stops a daemon.
    pub(crate) fn encode(self, out: &mut Encoder<'_>) {
        out.u32(daemon::STATE, self.number());
    }
}

impl fmt::Display for SyncRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Master => "master",
            Self::Backup => "backup",
        })
    }
}

/// A synchronization daemon. What is `None` the kernel chooses, and lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SyncDaemon {
    /// Whether it sends or receives.
    pub role: SyncRole,
    /// The interface it sends or receives on (`--mcast-interface`).
    pub interface: Name,
    /// The group of nodes that share connections (`--syncid`). A backup of 0 takes those of all. (The kernel keeps 32 bits,
    /// of which 8 are sent.)
    pub sync_id: u8,
    /// Bytes of payload of a datagram, at most (`--sync-maxlen`); for a backup at least 1024. Unless set, what fits the
    /// interface, or 1500 bytes for a master. Since Linux 4.3, as all that follows.
    pub max_length: Option<NonZeroU16>,
    /// The multicast address (`--mcast-group`); 224.0.0.81 unless set.
    pub group: Option<IpAddr>,
    /// The UDP port of the first thread (`--mcast-port`), further threads use those that follow; 8848 unless set.
    pub port: Option<NonZeroU16>,
    /// How many routers the datagrams may pass (`--mcast-ttl`); 1 unless set.
    pub ttl: Option<NonZeroU8>,
}

impl SyncDaemon {
    /// One on an interface, of group 0.
    pub const fn new(role: SyncRole, interface: Name) -> Self {
        Self { role, interface, sync_id: 0, max_length: None, group: None, port: None, ttl: None }
    }

    pub(crate) fn encode(&self, out: &mut Encoder<'_>) {
        self.role.encode(out);
        out.string(daemon::MCAST_IFN, self.interface.as_str());
        out.u32(daemon::SYNC_ID, self.sync_id.into());
        if let Some(length) = self.max_length {
            out.u16(daemon::SYNC_MAXLEN, length.get());
        }
        match self.group {
            Some(IpAddr::V4(group)) => out.fixed(daemon::MCAST_GROUP, group.octets()),
            Some(IpAddr::V6(group)) => out.fixed(daemon::MCAST_GROUP6, group.octets()),
            None => {}
        }
        if let Some(port) = self.port {
            // In the host's order, unlike all other ports of the family.
            out.u16(daemon::MCAST_PORT, port.get());
        }
        if let Some(ttl) = self.ttl {
            out.u8(daemon::MCAST_TTL, ttl.get());
        }
    }

    /// Reads the attributes inside `IPVS_CMD_ATTR_DAEMON`.
    pub(crate) fn parse(buffer: &[u8]) -> Result<Self, DecodeError> {
        let (mut role, mut interface, mut sync_id, mut group) = (None, None, 0, None);
        let (mut max_length, mut port, mut ttl) = (0, 0, 0);
        each_attribute(buffer, |kind, value| {
            match kind {
                daemon::STATE => role = Some(SyncRole::from_number(parse_u32(value)?)?),
                daemon::MCAST_IFN => interface = Some(Name::parse(value)?),
                daemon::SYNC_ID => [sync_id, ..] = parse_u32(value)?.to_le_bytes(),
                daemon::SYNC_MAXLEN => max_length = parse_u16(value)?,
                daemon::MCAST_GROUP => {
                    let octets = *value.first_chunk::<4>().ok_or("a multicast address is short")?;
                    group = Some(Ipv4Addr::from(octets).into());
                }
                daemon::MCAST_GROUP6 => {
                    let octets = *value.first_chunk::<16>().ok_or("a multicast address is short")?;
                    group = Some(Ipv6Addr::from(octets).into());
                }
                daemon::MCAST_PORT => port = parse_u16(value)?,
                daemon::MCAST_TTL => ttl = parse_u8(value)?,
                _ => {}
            }
            Ok(())
        })?;
        Ok(Self {
            role: role.ok_or("a synchronization daemon has no state")?,
            interface: interface.ok_or("a synchronization daemon has no interface")?,
            sync_id,
            max_length: NonZeroU16::new(max_length),
            group,
            port: NonZeroU16::new(port),
            ttl: NonZeroU8::new(ttl),
        })
    }
}
