//! Virtual servers: how one schedules and persists, and its attributes.

use std::fmt;
use std::net::Ipv4Addr;
use std::num::NonZeroU32;

use netlink_packet_core::{DecodeError, parse_u16, parse_u16_be, parse_u32};

use crate::attributes::{Encoder, each_attribute, service};
use crate::id::{Family, Protocol, VirtualServerId, decode_address};
use crate::name::{InvalidName, Name};
use crate::scheduler::{Scheduler, SchedulerFlags};
use crate::stats::Stats;

const IP_VS_SVC_F_PERSISTENT: u32 = 0x1;
const IP_VS_SVC_F_HASHED: u32 = 0x2;
const IP_VS_SVC_F_ONEPACKET: u32 = 0x4;

/// Which clients persistence treats as one: those equal under this mask. It has to be of the virtual server's family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Netmask {
    /// A mask of IPv4 addresses; the kernel takes any.
    V4(Ipv4Addr),
    /// A prefix length of IPv6 addresses, 1 to 128.
    V6(u8),
}

impl Netmask {
    /// Each client for itself.
    pub const fn host(family: Family) -> Self {
        match family {
            Family::Ipv4 => Self::V4(Ipv4Addr::BROADCAST),
            Family::Ipv6 => Self::V6(128),
        }
    }

    /// The clients that are equal in their first bits, of which an address of the family has 32 or 128; `None` where it
    /// has not so many, and for 0 bits of IPv6, which the kernel refuses.
    pub const fn prefix(family: Family, length: u8) -> Option<Self> {
        match (family, length) {
            (Family::Ipv4, 0) => Some(Self::V4(Ipv4Addr::UNSPECIFIED)),
            (Family::Ipv4, 1..=32) => Some(Self::V4(Ipv4Addr::from_bits(u32::MAX << (32 - length)))),
            (Family::Ipv6, 1..=128) => Some(Self::V6(length)),
            _ => None,
        }
    }

    /// The family whose addresses it is for.
    pub const fn family(self) -> Family {
        match self {
            Self::V4(_) => Family::Ipv4,
            Self::V6(_) => Family::Ipv6,
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

/// How clients stay with the real server that served them before (`IP_VS_SVC_F_PERSISTENT`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Persistence {
    /// Seconds for which a client stays after its last connection, at most [`Persistence::MAX_TIMEOUT`]. ipvsadm takes 1 to
    /// 2,678,400.
    pub timeout: u32,
    /// Which clients are treated as one.
    pub netmask: Netmask,
}

impl Persistence {
    /// The longest timeout that a client sends, in seconds: 48 days. The kernel counts in ticks of 32 bits, of which it has up
    /// to 1024 a second (`CONFIG_HZ`), and a longer timeout would wrap around: what it lists would never be what was set.
    pub const MAX_TIMEOUT: u32 = u32::MAX / 1024;

    /// Each client for itself.
    pub fn new(timeout: u32, family: Family) -> Self {
        Self { timeout, netmask: Netmask::host(family) }
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
    /// Whether, and how, clients stay with their real server.
    pub persistence: Option<Persistence>,
    /// What tells clients apart beside their addresses where they persist (`ipvsadm --pe`): `sip` is the one engine of the
    /// kernel's own, and takes the Call-ID of SIP over UDP. Without persistence it has an effect too: connections that real
    /// servers begin are taken (`ip_vs_new_conn_out`).
    pub engine: Option<Name>,
    /// Every UDP packet is scheduled by itself (`ipvsadm -o`).
    pub one_packet: bool,
}

impl VirtualServer {
    /// One without persistence or flags.
    pub const fn new(id: VirtualServerId, scheduler: Scheduler) -> Self {
        Self {
            id,
            scheduler,
            scheduler_flags: SchedulerFlags::NONE,
            persistence: None,
            engine: None,
            one_packet: false,
        }
    }

    /// With persistence of some seconds, for each client by itself.
    #[must_use]
    pub fn persistent(mut self, timeout: u32) -> Self {
        self.persistence = Some(Persistence::new(timeout, self.id.family()));
        self
    }

    /// What is wrong with it before any kernel has seen it.
    pub(crate) fn fault(&self) -> Option<&'static str> {
        let Persistence { timeout, netmask } = self.persistence?;
        if netmask.family() != self.id.family() {
            return Some("the netmask of its persistence is of the other address family");
        }
        (timeout > Persistence::MAX_TIMEOUT).then_some("the timeout of its persistence is longer than 4194303 s")
    }

    pub(crate) fn encode(&self, out: &mut Encoder<'_>) {
        self.id.encode(out);
        out.string(service::SCHED_NAME, self.scheduler.name());
        if let Some(engine) = self.engine {
            out.string(service::PE_NAME, engine.as_str());
        }
        let mut flags = self.scheduler_flags.bits();
        if self.persistence.is_some() {
            flags |= IP_VS_SVC_F_PERSISTENT;
        }
        if self.one_packet {
            flags |= IP_VS_SVC_F_ONEPACKET;
        }
        // struct ip_vs_flags: the flags, and the mask of those that are meant. IP_VS_SVC_F_HASHED is the kernel's own.
        let mut both = [0; 8];
        both[..4].copy_from_slice(&flags.to_ne_bytes());
        both[4..].copy_from_slice(&(!IP_VS_SVC_F_HASHED).to_ne_bytes());
        out.fixed(service::FLAGS, both);
        let persistence = self.persistence.unwrap_or_else(|| Persistence::new(0, self.id.family()));
        out.u32(service::TIMEOUT, persistence.timeout);
        match persistence.netmask {
            Netmask::V4(mask) => out.fixed(service::NETMASK, mask.octets()),
            // A plain number in the header's __be32.
            Netmask::V6(prefix) => out.u32(service::NETMASK, prefix.into()),
        }
    }
}

/// A virtual server as the kernel lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VirtualServerEntry {
    /// The configuration. The kernel keeps timeout and netmask of a virtual server without persistence too, where they mean
    /// nothing; they are not in here.
    pub server: VirtualServer,
    /// What has passed.
    pub stats: Stats,
}

impl VirtualServerEntry {
    /// Reads the attributes inside `IPVS_CMD_ATTR_SERVICE`.
    pub(crate) fn parse(buffer: &[u8]) -> Result<Self, DecodeError> {
        let (mut family, mut protocol, mut address, mut port, mut firewall_mark) = (None, None, None, None, None);
        let (mut scheduler, mut engine, mut flags, mut timeout, mut netmask) = (None, None, 0, 0, None);
        let (mut stats32, mut stats64) = (None, None);
        each_attribute(buffer, |kind, value| {
            match kind {
                service::AF => family = Some(Family::from_number(parse_u16(value)?)?),
                service::PROTOCOL => protocol = Some(Protocol::from_number(parse_u16(value)?)),
                service::ADDR => address = Some(*value.first_chunk::<16>().ok_or("a service's address is short")?),
                service::PORT => port = Some(parse_u16_be(value)?),
                service::FWMARK => firewall_mark = Some(parse_u32(value)?),
                service::SCHED_NAME => scheduler = Some(Name::parse(value)?),
                service::PE_NAME => engine = Some(Name::parse(value)?),
                service::FLAGS => {
                    // struct ip_vs_flags again.
                    let [a, b, c, d, ..] = *value.first_chunk::<8>().ok_or("a service's flags are short")?;
                    flags = u32::from_ne_bytes([a, b, c, d]);
                }
                service::TIMEOUT => timeout = parse_u32(value)?,
                service::NETMASK => netmask = Some(parse_u32(value)?),
                service::STATS => stats32 = Some(value),
                service::STATS64 => stats64 = Some(value),
                _ => {}
            }
            Ok(())
        })?;
        let family = family.ok_or("a service has no address family")?;
        let id = match (firewall_mark, protocol, address, port) {
            (Some(mark), ..) => VirtualServerId::FirewallMark {
                mark: NonZeroU32::new(mark).ok_or("a service's firewall mark is 0")?,
                family,
            },
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
        let is_persistent = flags & IP_VS_SVC_F_PERSISTENT != 0;
        Ok(Self {
            server: VirtualServer {
                id,
                scheduler: scheduler.as_str().parse().map_err(|error: InvalidName| error.to_string())?,
                scheduler_flags: SchedulerFlags::from_bits(flags),
                persistence: is_persistent.then_some(Persistence { timeout, netmask }),
                engine,
                one_packet: flags & IP_VS_SVC_F_ONEPACKET != 0,
            },
            stats: Stats::listed(stats64, stats32)?,
        })
    }
}
