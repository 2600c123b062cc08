//! Real servers: where they are, how packets reach them, and their attributes.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use netlink_packet_core::{DecodeError, parse_u8, parse_u16, parse_u16_be, parse_u32};

use crate::attributes::{Encoder, dest, each_attribute};
use crate::id::{Family, decode_address, encode_address};
use crate::stats::Stats;
use crate::wire::equal_as_written;

/// `IP_VS_CONN_F_FWD_MASK`: the forwarding method among the flags of a destination.
const FORWARDING_MASK: u32 = 0x7;

/// The packet around a packet that goes to a real server in a tunnel (`ipvsadm --tun-type`).
#[derive(Clone, Copy, Debug, Default)]
pub enum Tunnel {
    /// IP in IP (`IP_VS_CONN_F_TUNNEL_TYPE_IPIP`); the only one before Linux 5.2.
    #[default]
    IpIp,
    /// Generic UDP encapsulation (`IP_VS_CONN_F_TUNNEL_TYPE_GUE`), since Linux 5.2.
    Gue {
        /// The port to which the outer packets go.
        port: NonZeroU16,
        /// The checksum of the outer packets.
        checksum: GueChecksum,
    },
    /// Generic routing encapsulation (`IP_VS_CONN_F_TUNNEL_TYPE_GRE`), since Linux 5.3.
    Gre {
        /// Whether the outer packets have a checksum.
        checksum: bool,
    },
    /// Anything else: a type or flags that this crate does not know, set by somebody else.
    Other {
        /// `IPVS_DEST_ATTR_TUN_TYPE`
        kind: u8,
        /// `IPVS_DEST_ATTR_TUN_PORT`
        port: u16,
        /// `IPVS_DEST_ATTR_TUN_FLAGS`
        flags: u16,
    },
}

/// The checksum of packets encapsulated in UDP (`IP_VS_TUNNEL_ENCAP_FLAG_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GueChecksum {
    /// None (`--tun-nocsum`).
    #[default]
    None,
    /// That of UDP (`--tun-csum`).
    Udp,
    /// Remote checksum offload (`--tun-remcsum`).
    Remote,
}

const TUNNEL_TYPE_IPIP: u8 = 0;
pub(crate) const TUNNEL_TYPE_GUE: u8 = 1;
const TUNNEL_TYPE_GRE: u8 = 2;
const TUNNEL_FLAG_CSUM: u16 = 1;
const TUNNEL_FLAG_REMCSUM: u16 = 2;

equal_as_written!(Tunnel, it => it.parts());

impl Tunnel {
    /// Type, port and flags.
    fn parts(self) -> (u8, u16, u16) {
        match self {
            Self::IpIp => (TUNNEL_TYPE_IPIP, 0, 0),
            Self::Gue { port, checksum } => {
                let flags = match checksum {
                    GueChecksum::None => 0,
                    GueChecksum::Udp => TUNNEL_FLAG_CSUM,
                    GueChecksum::Remote => TUNNEL_FLAG_REMCSUM,
                };
                (TUNNEL_TYPE_GUE, port.get(), flags)
            }
            Self::Gre { checksum } => (TUNNEL_TYPE_GRE, 0, if checksum { TUNNEL_FLAG_CSUM } else { 0 }),
            Self::Other { kind, port, flags } => (kind, port, flags),
        }
    }

    fn from_parts(kind: u8, port: u16, flags: u16) -> Self {
        match (kind, NonZeroU16::new(port), flags) {
            (TUNNEL_TYPE_IPIP, None, 0) => Self::IpIp,
            (TUNNEL_TYPE_GUE, Some(port), 0) => Self::Gue { port, checksum: GueChecksum::None },
            (TUNNEL_TYPE_GUE, Some(port), TUNNEL_FLAG_CSUM) => Self::Gue { port, checksum: GueChecksum::Udp },
            (TUNNEL_TYPE_GUE, Some(port), TUNNEL_FLAG_REMCSUM) => Self::Gue { port, checksum: GueChecksum::Remote },
            (TUNNEL_TYPE_GRE, None, 0) => Self::Gre { checksum: false },
            (TUNNEL_TYPE_GRE, None, TUNNEL_FLAG_CSUM) => Self::Gre { checksum: true },
            _ => Self::Other { kind, port, flags },
        }
    }
}

/// How packets reach a real server (`IP_VS_CONN_F_*`).
#[derive(Clone, Copy, Debug, Default)]
pub enum Forwarding {
    /// Network address translation (`ipvsadm -m`); the only method that can change the port.
    #[default]
    Masquerade,
    /// To a process of this host. Packets to an address of the host's own go there whatever the method is, and the
    /// kernel goes on listing the method that was set.
    Local,
    /// In a tunnel (`ipvsadm -i`).
    Tunnel(Tunnel),
    /// By the link-layer address alone (`ipvsadm -g`).
    DirectRoute,
    /// Past the cache servers (`IP_VS_CONN_F_BYPASS`).
    Bypass,
    /// 5, 6 or 7, which mean nothing; the kernel takes them and forwards nothing.
    Other(u8),
}

equal_as_written!(Forwarding, it => (it.number(), it.tunnel()));

impl Forwarding {
    fn tunnel(self) -> Option<Tunnel> {
        if let Self::Tunnel(tunnel) = self { Some(tunnel) } else { None }
    }

    fn number(self) -> u32 {
        match self {
            Self::Masquerade => 0,
            Self::Local => 1,
            Self::Tunnel(_) => 2,
            Self::DirectRoute => 3,
            Self::Bypass => 4,
            Self::Other(number) => u32::from(number) & FORWARDING_MASK,
        }
    }

    fn from_number(number: u32, tunnel: Tunnel) -> Self {
        match number & FORWARDING_MASK {
            0 => Self::Masquerade,
            1 => Self::Local,
            2 => Self::Tunnel(tunnel),
            3 => Self::DirectRoute,
            4 => Self::Bypass,
            _ => Self::Other((number & FORWARDING_MASK) as u8),
        }
    }
}

impl fmt::Display for Forwarding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Masquerade => f.write_str("masquerade"),
            Self::Local => f.write_str("local"),
            Self::Tunnel(_) => f.write_str("tunnel"),
            Self::DirectRoute => f.write_str("direct-route"),
            Self::Bypass => f.write_str("bypass"),
            Self::Other(number) => write!(f, "method {number}"),
        }
    }
}

/// A real server as one configures it. Within its virtual server, address and port identify it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RealServer {
    /// The address. Only a tunnel can lead to another family than the virtual server's.
    pub address: IpAddr,
    /// The port. Only masquerade changes the port of packets: for every other method it has to be the virtual server's own.
    pub port: u16,
    /// How packets reach it.
    pub forwarding: Forwarding,
    /// Its share of new connections, 0 to 2,147,483,647; 0 takes none.
    pub weight: u32,
    /// At this many connections it takes no new ones; 0 for no limit. Linux 7.2, and stable releases of 2026, refuse more than
    /// 2,147,483,647.
    pub upper_threshold: u32,
    /// Below this many connections it takes new ones again; at most the upper threshold. 0 stands for three quarters of the
    /// upper one.
    pub lower_threshold: u32,
}

impl RealServer {
    /// One that is reached by masquerading, of weight 1, without thresholds.
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address: address.ip(),
            port: address.port(),
            forwarding: Forwarding::Masquerade,
            weight: 1,
            upper_threshold: 0,
            lower_threshold: 0,
        }
    }

    /// Address and port.
    pub fn socket_address(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }

    pub(crate) fn encode(&self, out: &mut Encoder<'_>) {
        encode_id(out, self.socket_address());
        out.u32(dest::FWD_METHOD, self.forwarding.number());
        out.u32(dest::WEIGHT, self.weight);
        out.u32(dest::U_THRESH, self.upper_threshold);
        out.u32(dest::L_THRESH, self.lower_threshold);
        // What is left out is 0. A kernel before 5.2 knows none of these, and makes any tunnel IP in IP.
        if let Forwarding::Tunnel(tunnel) = self.forwarding
            && tunnel != Tunnel::IpIp
        {
            let (kind, port, flags) = tunnel.parts();
            out.u8(dest::TUN_TYPE, kind);
            out.u16_be(dest::TUN_PORT, port);
            out.u16(dest::TUN_FLAGS, flags);
        }
    }
}

/// What identifies a real server within its virtual server.
pub(crate) fn encode_id(out: &mut Encoder<'_>, address: SocketAddr) {
    encode_address(out, dest::ADDR, address.ip());
    out.u16_be(dest::PORT, address.port());
    out.u16(dest::ADDR_FAMILY, Family::of(address.ip()).number());
}

/// A real server as the kernel lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RealServerEntry {
    /// The configuration.
    pub server: RealServer,
    /// Connections in a state that counts as active; for TCP, established ones.
    pub active_connections: u32,
    /// All other connections, such as TCP ones that are closing.
    pub inactive_connections: u32,
    /// Persistence templates that lead here.
    pub persistent_connections: u32,
    /// What has passed.
    pub stats: Stats,
}

impl RealServerEntry {
    /// Whether no connection leads here any more.
    pub fn is_idle(&self) -> bool {
        self.active_connections == 0 && self.inactive_connections == 0
    }

    /// Reads the attributes inside `IPVS_CMD_ATTR_DEST`. The address family is among them since Linux 3.18.
    pub(crate) fn parse(buffer: &[u8]) -> Result<Self, DecodeError> {
        let (mut family, mut address, mut port) = (None, None, None);
        let (mut method, mut weight, mut upper, mut lower) = (0, 0, 0, 0);
        let (mut tunnel_type, mut tunnel_port, mut tunnel_flags) = (0, 0, 0);
        let (mut active, mut inactive, mut persistent) = (0, 0, 0);
        let (mut stats32, mut stats64) = (None, None);
        each_attribute(buffer, |kind, value| {
            match kind {
                dest::ADDR => address = Some(*value.first_chunk::<16>().ok_or("a destination's address is short")?),
                dest::PORT => port = Some(parse_u16_be(value)?),
                dest::FWD_METHOD => method = parse_u32(value)?,
                dest::WEIGHT => weight = parse_u32(value)?,
                dest::U_THRESH => upper = parse_u32(value)?,
                dest::L_THRESH => lower = parse_u32(value)?,
                dest::ACTIVE_CONNS => active = parse_u32(value)?,
                dest::INACT_CONNS => inactive = parse_u32(value)?,
                dest::PERSIST_CONNS => persistent = parse_u32(value)?,
                dest::ADDR_FAMILY => family = Some(Family::from_number(parse_u16(value)?)?),
                dest::TUN_TYPE => tunnel_type = parse_u8(value)?,
                dest::TUN_PORT => tunnel_port = parse_u16_be(value)?,
                dest::TUN_FLAGS => tunnel_flags = parse_u16(value)?,
                dest::STATS => stats32 = Some(value),
                dest::STATS64 => stats64 = Some(value),
                _ => {}
            }
            Ok(())
        })?;
        let family = family.ok_or("a destination has no address family")?;
        let address = decode_address(family, &address.ok_or("a destination has no address")?)?;
        let port = port.ok_or("a destination has no port")?;
        let tunnel = Tunnel::from_parts(tunnel_type, tunnel_port, tunnel_flags);
        let forwarding = Forwarding::from_number(method, tunnel);
        Ok(Self {
            server: RealServer { address, port, forwarding, weight, upper_threshold: upper, lower_threshold: lower },
            active_connections: active,
            inactive_connections: inactive,
            persistent_connections: persistent,
            stats: Stats::listed(stats64, stats32)?,
        })
    }
}
