//! Constructors for the expressions of `nf_tables` that the rules consist of.
//!
//! `netlink-packet-netfilter` has types for some of them. `ct`, `fib`, `masq`, `nat` and `reject` are built here from their
//! attributes in `linux/netfilter/nf_tables.h`.

use std::net::IpAddr;

use ipvs_netlink::Family;
use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, ExpressionAttribute, Expressions, Immediate, ListAttribute, Lookup, Meta, MetaKey,
    Operator, Payload, Register, Verdict as VerdictCode, VerdictAttribute,
};
use service_watch::Protocol;

/// An expression in a rule.
pub(crate) type Expression = ListAttribute<ExpressionAttribute>;

/// The registers of 4 bytes, by number.
pub(crate) fn register(number: u32) -> Register {
    Register::from(8 + number)
}

fn expression(name: &str, data: Expressions) -> Expression {
    ListAttribute::Element(vec![ExpressionAttribute::Name(name.to_owned()), ExpressionAttribute::Data(data)])
}

fn raw_expression<const N: usize>(name: &str, attributes: [(u16, Vec<u8>); N]) -> Expression {
    let attributes = attributes.into_iter().map(|(kind, value)| DefaultNla::new(kind, value)).collect();
    expression(name, Expressions::Other { expression_type: name.to_owned(), attributes })
}

fn be32(value: u32) -> Vec<u8> {
    value.to_be_bytes().to_vec()
}

pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The IP protocol number.
pub(crate) fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

/// The position of a field in a packet.
#[derive(Clone, Copy)]
pub(crate) struct Field {
    base: u32,
    offset: u32,
    pub(crate) length: u32,
}

const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;

impl Field {
    pub(crate) fn source(family: Family) -> Self {
        match family {
            Family::Ipv4 => Self { base: NETWORK_HEADER, offset: 12, length: 4 },
            Family::Ipv6 => Self { base: NETWORK_HEADER, offset: 8, length: 16 },
        }
    }

    pub(crate) fn destination(family: Family) -> Self {
        match family {
            Family::Ipv4 => Self { base: NETWORK_HEADER, offset: 16, length: 4 },
            Family::Ipv6 => Self { base: NETWORK_HEADER, offset: 24, length: 16 },
        }
    }

    pub(crate) fn destination_port() -> Self {
        Self { base: TRANSPORT_HEADER, offset: 2, length: 2 }
    }
}

/// Loads a field of the packet.
pub(crate) fn load(field: Field, into: Register) -> Expression {
    expression(
        "payload",
        Expressions::Payload(vec![
            Payload::DestinationRegister(into),
            Payload::Base(field.base),
            Payload::Offset(field.offset),
            Payload::Len(field.length),
        ]),
    )
}

/// Loads metadata of the packet.
pub(crate) fn load_meta(key: MetaKey, into: Register) -> Expression {
    expression("meta", Expressions::Meta(vec![Meta::DestinationRegister(into), Meta::Key(key)]))
}

/// Sets the packet's mark.
pub(crate) fn set_mark(from: Register) -> Expression {
    expression("meta", Expressions::Meta(vec![Meta::Key(MetaKey::Mark), Meta::SourceRegister(from)]))
}

/// Matches if a register equals, or does not equal, this value.
pub(crate) fn compare(register: Register, is_equal: bool, value: &[u8]) -> Expression {
    expression(
        "cmp",
        Expressions::Cmp(vec![
            Cmp::SourceRegister(register),
            Cmp::Op(if is_equal { Operator::Equal } else { Operator::NotEqual }),
            Cmp::Data(DataAttribute::Value(value.to_vec())),
        ]),
    )
}

/// `register = register & mask ^ xor`.
pub(crate) fn bitwise(register: Register, mask: &[u8], xor: &[u8]) -> Expression {
    expression(
        "bitwise",
        Expressions::Bitwise(vec![
            Bitwise::SourceRegister(register),
            Bitwise::DestinationRegister(register),
            Bitwise::Length(u32::try_from(mask.len()).unwrap_or(u32::MAX)),
            Bitwise::Mask(DataAttribute::Value(mask.to_vec())),
            Bitwise::Xor(DataAttribute::Value(xor.to_vec())),
        ]),
    )
}

const NFT_LOOKUP_F_INV: u32 = 1;

/// Matches if the registers from this one on are in a set.
pub(crate) fn is_in(set: &str, from: Register) -> Expression {
    expression("lookup", Expressions::Lookup(vec![Lookup::Set(set.to_owned()), Lookup::SourceRegister(from)]))
}

/// Matches if the registers are not in a set.
pub(crate) fn is_not_in(set: &str, from: Register) -> Expression {
    expression(
        "lookup",
        Expressions::Lookup(vec![
            Lookup::Set(set.to_owned()),
            Lookup::SourceRegister(from),
            Lookup::Flags(NFT_LOOKUP_F_INV),
        ]),
    )
}

/// Matches if the registers are not in a set that is created in the same transaction.
pub(crate) fn is_not_in_anonymous(set: &str, id: u32, from: Register) -> Expression {
    expression(
        "lookup",
        Expressions::Lookup(vec![
            Lookup::Set(set.to_owned()),
            Lookup::SourceRegister(from),
            Lookup::SetId(id),
            Lookup::Flags(NFT_LOOKUP_F_INV),
        ]),
    )
}

/// Loads the data of a map for the registers, and matches if there is any. In the verdict register it becomes the rule's verdict.
pub(crate) fn lookup_map(map: &str, from: Register, into: Register) -> Expression {
    expression(
        "lookup",
        Expressions::Lookup(vec![
            Lookup::Set(map.to_owned()),
            Lookup::SourceRegister(from),
            Lookup::DestinationRegister(into),
        ]),
    )
}

/// A verdict on a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accept,
    Drop,
    Return,
    Goto(String),
    Jump(String),
}

// linux/netfilter.h
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;

impl Verdict {
    /// The attributes of the verdict, in a rule or in an element of a map.
    pub(crate) fn data(&self) -> DataAttribute {
        let (code, chain) = match self {
            Self::Accept => (VerdictCode::Other(NF_ACCEPT), None),
            Self::Drop => (VerdictCode::Other(NF_DROP), None),
            Self::Return => (VerdictCode::Return, None),
            Self::Goto(chain) => (VerdictCode::Goto, Some(chain)),
            Self::Jump(chain) => (VerdictCode::Jump, Some(chain)),
        };
        let chain = chain.map(|chain| VerdictAttribute::Chain(chain.clone()));
        DataAttribute::Verdict([VerdictAttribute::Code(code)].into_iter().chain(chain).collect())
    }
}

/// Issues a verdict on the packet.
pub(crate) fn verdict(verdict: &Verdict) -> Expression {
    expression(
        "immediate",
        Expressions::Immediate(vec![
            Immediate::DestinationRegister(Register::Verdict),
            Immediate::Data(verdict.data()),
        ]),
    )
}

/// A property of the packet's connection (`enum nft_ct_keys`), in the host's byte order.
#[derive(Clone, Copy)]
pub(crate) enum ConntrackKey {
    /// One bit per state.
    State,
    /// `IPS_*`.
    Status,
}

/// `NF_CT_STATE_BIT(IP_CT_NEW)`.
pub(crate) const STATE_NEW: u32 = 1 << 3;
/// `IPS_DST_NAT`.
pub(crate) const STATUS_DESTINATION_TRANSLATED: u32 = 1 << 5;

/// Loads a property of the packet's connection. A packet that is not tracked does not match.
pub(crate) fn load_conntrack(key: ConntrackKey, into: Register) -> Expression {
    const NFTA_CT_DREG: u16 = 1;
    const NFTA_CT_KEY: u16 = 2;
    let key = match key {
        ConntrackKey::State => 0,
        ConntrackKey::Status => 2,
    };
    raw_expression("ct", [(NFTA_CT_DREG, be32(into.into())), (NFTA_CT_KEY, be32(key))])
}

/// `RTN_LOCAL`: an address of this machine.
pub(crate) const ROUTE_LOCAL: u32 = 2;

/// Loads the type of the packet's source address in the routing table, in the host's byte order.
pub(crate) fn load_source_type(into: Register) -> Expression {
    const NFTA_FIB_DREG: u16 = 1;
    const NFTA_FIB_RESULT: u16 = 2;
    const NFTA_FIB_FLAGS: u16 = 3;
    const NFT_FIB_RESULT_ADDRTYPE: u32 = 3;
    const NFTA_FIB_F_SADDR: u32 = 1;
    raw_expression(
        "fib",
        [
            (NFTA_FIB_DREG, be32(into.into())),
            (NFTA_FIB_RESULT, be32(NFT_FIB_RESULT_ADDRTYPE)),
            (NFTA_FIB_FLAGS, be32(NFTA_FIB_F_SADDR)),
        ],
    )
}

/// Masquerades the connection, optionally with a random source port.
pub(crate) fn masquerade(has_random_port: bool) -> Expression {
    const NFTA_MASQ_FLAGS: u16 = 1;
    const NF_NAT_RANGE_PROTO_RANDOM_FULLY: u32 = 1 << 4;
    if has_random_port {
        raw_expression("masq", [(NFTA_MASQ_FLAGS, be32(NF_NAT_RANGE_PROTO_RANDOM_FULLY))])
    } else {
        raw_expression("masq", [])
    }
}

/// Translates the destination of the connection to the address, and the port, in these registers.
pub(crate) fn translate_destination(family: Family, address: Register, port: Option<Register>) -> Expression {
    const NFTA_NAT_TYPE: u16 = 1;
    const NFTA_NAT_FAMILY: u16 = 2;
    const NFTA_NAT_REG_ADDR_MIN: u16 = 3;
    const NFTA_NAT_REG_PROTO_MIN: u16 = 5;
    const NFT_NAT_DNAT: u32 = 1;
    let translation = [
        (NFTA_NAT_TYPE, be32(NFT_NAT_DNAT)),
        (NFTA_NAT_FAMILY, be32(u32::from(protocol_family(family)))),
        (NFTA_NAT_REG_ADDR_MIN, be32(address.into())),
    ];
    match port {
        None => raw_expression("nat", translation),
        Some(port) => {
            let [a, b, c] = translation;
            raw_expression("nat", [a, b, c, (NFTA_NAT_REG_PROTO_MIN, be32(port.into()))])
        }
    }
}

/// Loads a constant into a register.
pub(crate) fn immediate(value: &[u8], into: Register) -> Expression {
    expression(
        "immediate",
        Expressions::Immediate(vec![
            Immediate::DestinationRegister(into),
            Immediate::Data(DataAttribute::Value(value.to_vec())),
        ]),
    )
}

const NFTA_REJECT_TYPE: u16 = 1;
const NFTA_REJECT_ICMP_CODE: u16 = 2;

/// Rejects with a TCP reset.
pub(crate) fn reset() -> Expression {
    const NFT_REJECT_TCP_RST: u32 = 1;
    raw_expression("reject", [(NFTA_REJECT_TYPE, be32(NFT_REJECT_TCP_RST))])
}

/// Rejects with an ICMP error: port unreachable.
pub(crate) fn port_unreachable(family: Family) -> Expression {
    const NFT_REJECT_ICMP_UNREACH: u32 = 0;
    const ICMP_PORT_UNREACH: u8 = 3;
    const ICMPV6_PORT_UNREACH: u8 = 4;
    let code = match family {
        Family::Ipv4 => ICMP_PORT_UNREACH,
        Family::Ipv6 => ICMPV6_PORT_UNREACH,
    };
    raw_expression("reject", [(NFTA_REJECT_TYPE, be32(NFT_REJECT_ICMP_UNREACH)), (NFTA_REJECT_ICMP_CODE, vec![code])])
}

/// `NFPROTO_IPV4` or `NFPROTO_IPV6`.
pub(crate) fn protocol_family(family: Family) -> u8 {
    match family {
        Family::Ipv4 => 2,
        Family::Ipv6 => 10,
    }
}
