//! Virtual servers: what identifies one, how it schedules, and their attributes.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use netlink_packet_core::{DecodeError, parse_string, parse_u16, parse_u16_be, parse_u32};

use crate::attributes::{Encoder, each_attribute, service};
use crate::stats::Stats;

const IP_VS_SVC_F_PERSISTENT: u32 = 0x1;
const IP_VS_SVC_F_ONEPACKET: u32 = 0x4;
const IP_VS_SVC_F_SCHED_SHIFT: u32 = 3;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// `AF_INET`.
    Ipv4,
    /// `AF_INET6`.
    Ipv6,
}

impl Family {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::Ipv4 } else { Self::Ipv6 }
    }

    pub(crate) fn number(self) -> u16 {
        match self {
            Self::Ipv4 => 2,
            Self::Ipv6 => 10,
        }
    }

    pub(crate) fn from_number(number: u16) -> Result<Self, DecodeError> {
        match number {
            2 => Ok(Self::Ipv4),
            10 => Ok(Self::Ipv6),
            _ => Err(format!("address family {number} is neither IPv4 nor IPv6").into()),
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        })
    }
}

/// The transport protocol of a virtual server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
    /// Another number; the kernel takes any of 16 bits and balances only those above.
    Other(u16),
}

impl Protocol {
    fn number(self) -> u16 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
            Self::Other(number) => number,
        }
    }

    fn from_number(number: u16) -> Self {
        match number {
            6 => Self::Tcp,
            17 => Self::Udp,
            132 => Self::Sctp,
            _ => Self::Other(number),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp => f.write_str("TCP"),
            Self::Udp => f.write_str("UDP"),
            Self::Sctp => f.write_str("SCTP"),
            Self::Other(number) => write!(f, "protocol {number}"),
        }
    }
}

/// What identifies a virtual server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum VirtualServerId {
    /// By the address, port and protocol that clients connect to.
    Address {
        /// The protocol.
        protocol: Protocol,
        /// The address.
        address: IpAddr,
        /// The port; 0 takes every port of the address, for persistent servers.
        port: u16,
    },
    /// By a firewall mark that netfilter has put on packets.
    FirewallMark {
        /// The mark; never 0.
        mark: u32,
        /// The family of the packets.
        family: Family,
    },
}

impl VirtualServerId {
    /// A virtual server by address.
    pub fn address(protocol: Protocol, address: SocketAddr) -> Self {
        Self::Address { protocol, address: address.ip(), port: address.port() }
    }

    /// The family of the packets it takes.
    pub fn family(&self) -> Family {
        match self {
            Self::Address { address, .. } => Family::of(*address),
            Self::FirewallMark { family, .. } => *family,
        }
    }

    pub(crate) fn encode(&self, out: &mut Encoder<'_>) {
        out.u16(service::AF, self.family().number());
        match self {
            Self::Address { protocol, address, port } => {
                out.u16(service::PROTOCOL, protocol.number());
                encode_address(out, service::ADDR, *address);
                out.bytes(service::PORT, &[&port.to_be_bytes()]);
            }
            Self::FirewallMark { mark, .. } => out.u32(service::FWMARK, *mark),
        }
    }
}

impl fmt::Display for VirtualServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { protocol, address, port } => write!(f, "{protocol} {}", SocketAddr::new(*address, *port)),
            Self::FirewallMark { mark, family } => write!(f, "FWM {mark} ({family})"),
        }
    }
}

/// `union nf_inet_addr`: always 16 bytes.
pub(crate) fn encode_address(out: &mut Encoder<'_>, kind: u16, address: IpAddr) {
    match address {
        IpAddr::V4(address) => out.bytes(kind, &[&address.octets(), &[0; 12]]),
        IpAddr::V6(address) => out.bytes(kind, &[&address.octets()]),
    }
}

pub(crate) fn decode_address(family: Family, value: &[u8]) -> Result<IpAddr, DecodeError> {
    let invalid = || DecodeError::invalid_ip_address(value.len());
    Ok(match family {
        Family::Ipv4 => Ipv4Addr::from(*value.first_chunk::<4>().ok_or_else(invalid)?).into(),
        Family::Ipv6 => Ipv6Addr::from(*value.first_chunk::<16>().ok_or_else(invalid)?).into(),
    })
}

/// How a virtual server chooses a real server; the names are those of ipvsadm(8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Scheduler {
    /// `rr`
    RoundRobin,
    /// `wrr`
    WeightedRoundRobin,
    /// `lc`
    LeastConnection,
    /// `wlc`
    WeightedLeastConnection,
    /// `lblc`
    LocalityBasedLeastConnection,
    /// `lblcr`
    LocalityBasedLeastConnectionWithReplication,
    /// `dh`
    DestinationHashing,
    /// `sh`
    SourceHashing,
    /// `sed`
    ShortestExpectedDelay,
    /// `nq`
    NeverQueue,
    /// `fo`
    WeightedFailover,
    /// `ovf`
    WeightedOverflow,
    /// `mh`
    MaglevHashing,
    /// `twos`
    PowerOfTwoChoices,
    /// One that this crate does not know.
    Other(SchedulerName),
}

/// The name of a scheduler: 1 to 15 bytes (`IP_VS_SCHEDNAME_MAXLEN` less the terminating NUL).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SchedulerName {
    bytes: [u8; 15],
    length: u8,
}

impl SchedulerName {
    fn as_str(&self) -> &str {
        // Made from a str only, so it is UTF-8.
        str::from_utf8(&self.bytes[..self.length.into()]).unwrap_or_default()
    }
}

impl fmt::Debug for SchedulerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

/// Not a possible name of a scheduler.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} cannot be the name of a scheduler: 1 to 15 bytes are")]
pub struct InvalidScheduler(String);

impl Scheduler {
    /// The schedulers of Linux 6.1.
    pub const ALL: [Self; 14] = [
        Self::RoundRobin,
        Self::WeightedRoundRobin,
        Self::LeastConnection,
        Self::WeightedLeastConnection,
        Self::LocalityBasedLeastConnection,
        Self::LocalityBasedLeastConnectionWithReplication,
        Self::DestinationHashing,
        Self::SourceHashing,
        Self::ShortestExpectedDelay,
        Self::NeverQueue,
        Self::WeightedFailover,
        Self::WeightedOverflow,
        Self::MaglevHashing,
        Self::PowerOfTwoChoices,
    ];

    /// The name the kernel knows it by; its module is `ip_vs_` and this name.
    pub fn name(&self) -> &str {
        match self {
            Self::RoundRobin => "rr",
            Self::WeightedRoundRobin => "wrr",
            Self::LeastConnection => "lc",
            Self::WeightedLeastConnection => "wlc",
            Self::LocalityBasedLeastConnection => "lblc",
            Self::LocalityBasedLeastConnectionWithReplication => "lblcr",
            Self::DestinationHashing => "dh",
            Self::SourceHashing => "sh",
            Self::ShortestExpectedDelay => "sed",
            Self::NeverQueue => "nq",
            Self::WeightedFailover => "fo",
            Self::WeightedOverflow => "ovf",
            Self::MaglevHashing => "mh",
            Self::PowerOfTwoChoices => "twos",
            Self::Other(name) => name.as_str(),
        }
    }
}

impl fmt::Display for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Scheduler {
    type Err = InvalidScheduler;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        if let Some(known) = Self::ALL.into_iter().find(|scheduler| scheduler.name() == name) {
            return Ok(known);
        }
        let mut bytes = [0; 15];
        match bytes.get_mut(..name.len()) {
            Some(start) if !name.is_empty() && !name.contains('\0') => start.copy_from_slice(name.as_bytes()),
            _ => return Err(InvalidScheduler(name.to_owned())),
        }
        // At most 15, as it fitted.
        Ok(Self::Other(SchedulerName { bytes, length: u8::try_from(name.len()).unwrap_or_default() }))
    }
}

/// The three flags a scheduler may give a meaning to (`ipvsadm -b`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SchedulerFlags(u8);

impl SchedulerFlags {
    /// No flag.
    pub const NONE: Self = Self(0);
    /// `flag-1`
    pub const FLAG_1: Self = Self(1);
    /// `flag-2`
    pub const FLAG_2: Self = Self(2);
    /// `flag-3`
    pub const FLAG_3: Self = Self(4);
    /// `sh-fallback`: another real server where the one hashed to takes no connections.
    pub const SH_FALLBACK: Self = Self::FLAG_1;
    /// `sh-port`: the source port is hashed too.
    pub const SH_PORT: Self = Self::FLAG_2;
    /// `mh-fallback`: as `sh-fallback`.
    pub const MH_FALLBACK: Self = Self::FLAG_1;
    /// `mh-port`: as `sh-port`.
    pub const MH_PORT: Self = Self::FLAG_2;

    /// Both sets of flags.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all flags of `other` are set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Which clients persistence treats as one: those equal under this mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Netmask {
    /// A mask of IPv4 addresses; the kernel takes any.
    V4(Ipv4Addr),
    /// A prefix length of IPv6 addresses, 1 to 128.
    V6(u8),
}

impl Netmask {
    /// Each client for itself.
    pub fn host(family: Family) -> Self {
        match family {
            Family::Ipv4 => Self::V4(Ipv4Addr::BROADCAST),
            Family::Ipv6 => Self::V6(128),
        }
    }
}

impl fmt::Display for Netmask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::V4(mask) => mask.fmt(f),
            Self::V6(prefix) => prefix.fmt(f),
        }
    }
}

/// A virtual server as one configures it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VirtualServer {
    /// What identifies it.
    pub id: VirtualServerId,
    /// How it chooses a real server.
    pub scheduler: Scheduler,
    /// Flags of the scheduler.
    pub scheduler_flags: SchedulerFlags,
    /// Seconds for which a client stays with its real server after its last connection; `None` without persistence.
    pub persistence_timeout: Option<u32>,
    /// Which clients persistence treats as one. The kernel keeps it without persistence too.
    pub netmask: Netmask,
    /// Every UDP packet is scheduled by itself (`ipvsadm -o`).
    pub one_packet: bool,
}

impl VirtualServer {
    /// One without persistence or flags.
    pub fn new(id: VirtualServerId, scheduler: Scheduler) -> Self {
        Self {
            id,
            scheduler,
            scheduler_flags: SchedulerFlags::NONE,
            persistence_timeout: None,
            netmask: Netmask::host(id.family()),
            one_packet: false,
        }
    }

    pub(crate) fn encode(&self, out: &mut Encoder<'_>) {
        self.id.encode(out);
        out.bytes(service::SCHED_NAME, &[self.scheduler.name().as_bytes(), &[0]]);
        let mut flags = u32::from(self.scheduler_flags.0) << IP_VS_SVC_F_SCHED_SHIFT;
        if self.persistence_timeout.is_some() {
            flags |= IP_VS_SVC_F_PERSISTENT;
        }
        if self.one_packet {
            flags |= IP_VS_SVC_F_ONEPACKET;
        }
        // struct ip_vs_flags: the flags, and the mask of those that are meant. IP_VS_SVC_F_HASHED is the kernel's own.
        out.bytes(service::FLAGS, &[&flags.to_ne_bytes(), &(!IP_VS_SVC_F_HASHED).to_ne_bytes()]);
        out.u32(service::TIMEOUT, self.persistence_timeout.unwrap_or(0));
        match self.netmask {
            Netmask::V4(mask) => out.bytes(service::NETMASK, &[&mask.octets()]),
            // A plain number in the header's __be32.
            Netmask::V6(prefix) => out.u32(service::NETMASK, prefix.into()),
        }
    }
}

const IP_VS_SVC_F_HASHED: u32 = 0x2;

/// A virtual server as the kernel lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtualServerEntry {
    /// The configuration.
    pub server: VirtualServer,
    /// What has passed.
    pub stats: Stats,
}

impl VirtualServerEntry {
    /// Reads the attributes inside `IPVS_CMD_ATTR_SERVICE`.
    pub(crate) fn parse(buffer: &[u8]) -> Result<Self, DecodeError> {
        let (mut family, mut protocol, mut address, mut port, mut firewall_mark) = (None, None, None, None, None);
        let (mut scheduler, mut flags, mut timeout, mut netmask) = (None, 0, 0, None);
        let (mut stats32, mut stats64) = (None, None);
        each_attribute(buffer, |kind, value| {
            match kind {
                service::AF => family = Some(Family::from_number(parse_u16(value)?)?),
                service::PROTOCOL => protocol = Some(Protocol::from_number(parse_u16(value)?)),
                service::ADDR => address = Some(*value.first_chunk::<16>().ok_or("a service's address is short")?),
                service::PORT => port = Some(parse_u16_be(value)?),
                service::FWMARK => firewall_mark = Some(parse_u32(value)?),
                service::SCHED_NAME => scheduler = Some(parse_string(value)?),
                service::FLAGS => {
                    // struct ip_vs_flags again.
                    let [a, b, c, d, ..] = *value.first_chunk::<8>().ok_or("a service's flags are short")?;
                    flags = u32::from_ne_bytes([a, b, c, d]);
                }
                service::TIMEOUT => timeout = parse_u32(value)?,
                service::NETMASK => netmask = Some(parse_u32(value)?),
                service::STATS => stats32 = Some(Stats::parse(value)?),
                service::STATS64 => stats64 = Some(Stats::parse(value)?),
                _ => {}
            }
            Ok(())
        })?;
        let family = family.ok_or("a service has no address family")?;
        let id = match (firewall_mark, protocol, address, port) {
            (Some(mark), ..) => VirtualServerId::FirewallMark { mark, family },
            (None, Some(protocol), Some(address), Some(port)) => {
                VirtualServerId::Address { protocol, address: decode_address(family, &address)?, port }
            }
            _ => return Err("a service has neither a firewall mark nor a protocol, address and port".into()),
        };
        let scheduler = scheduler.ok_or("a service has no scheduler")?;
        let netmask = match (family, netmask) {
            (Family::Ipv4, Some(mask)) => Netmask::V4(Ipv4Addr::from(mask.to_ne_bytes())),
            (Family::Ipv6, Some(prefix)) => {
                Netmask::V6(u8::try_from(prefix).map_err(|_| format!("an IPv6 prefix of {prefix} is out of range"))?)
            }
            (_, None) => Netmask::host(family),
        };
        Ok(Self {
            server: VirtualServer {
                id,
                scheduler: scheduler.parse().map_err(|error: InvalidScheduler| error.to_string())?,
                scheduler_flags: SchedulerFlags((flags >> IP_VS_SVC_F_SCHED_SHIFT & 7) as u8),
                persistence_timeout: (flags & IP_VS_SVC_F_PERSISTENT != 0).then_some(timeout),
                netmask,
                one_packet: flags & IP_VS_SVC_F_ONEPACKET != 0,
            },
            stats: stats64.or(stats32).unwrap_or_default(),
        })
    }
}
