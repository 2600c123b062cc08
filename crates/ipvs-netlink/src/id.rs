//! What identifies a virtual server: address, port and protocol, or a firewall mark.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU32;

use netlink_packet_core::DecodeError;

use crate::attributes::{Encoder, service};
use crate::wire::equal_as_written;

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
        f.pad(match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        })
    }
}

/// The transport protocol of a virtual server.
#[derive(Clone, Copy, Debug)]
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

equal_as_written!(Protocol, it => it.number());

impl Protocol {
    /// The number, as in `IPPROTO_TCP`.
    pub const fn number(self) -> u16 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
            Self::Other(number) => number,
        }
    }

    /// The protocol of a number.
    pub const fn from_number(number: u16) -> Self {
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
        /// The mark.
        mark: NonZeroU32,
        /// The family of the packets.
        family: Family,
    },
}

impl VirtualServerId {
    /// A virtual server by address.
    pub fn address(protocol: Protocol, address: SocketAddr) -> Self {
        Self::Address { protocol, address: address.ip(), port: address.port() }
    }

    /// A virtual server by firewall mark; `None` where the mark is 0, which no marked packet has.
    pub fn firewall_mark(mark: u32, family: Family) -> Option<Self> {
        NonZeroU32::new(mark).map(|mark| Self::FirewallMark { mark, family })
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
                out.u16_be(service::PORT, *port);
            }
            Self::FirewallMark { mark, .. } => out.u32(service::FWMARK, mark.get()),
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
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            out.fixed(kind, [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        }
        IpAddr::V6(address) => out.fixed(kind, address.octets()),
    }
}

pub(crate) fn decode_address(family: Family, value: &[u8]) -> Result<IpAddr, DecodeError> {
    let invalid = || DecodeError::invalid_ip_address(value.len());
    Ok(match family {
        Family::Ipv4 => Ipv4Addr::from(*value.first_chunk::<4>().ok_or_else(invalid)?).into(),
        Family::Ipv6 => Ipv6Addr::from(*value.first_chunk::<16>().ok_or_else(invalid)?).into(),
    })
}
