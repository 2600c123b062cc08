//! Deletes stale entries from connection tracking: those to a front end whose replies are not expected from one of its real servers.
//!
//! A UDP flow continues while its client sends. When its real server is deleted IPVS selects another, but connection tracking still
//! expects replies from the old one and does not translate those of the new one, so the flow is broken until it pauses. Connections,
//! also of TCP, that began before there was a virtual server have an entry without a translation, and their next packet would not be
//! masqueraded.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use foldhash::HashMap;
use ipvs_netlink::Family;
use netlink_batch::{Error, Request, Socket};
use netlink_packet_core::{
    DecodeError, Emitable, NLA_F_NESTED, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable,
};
use netlink_packet_netfilter::conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Tuple};
use netlink_packet_netfilter::{NetfilterMessage, NetfilterMessageInner};
use service_watch::Protocol;
use tracing::debug;

use super::errno::ENOENT;
use super::filter::message::header;
use crate::filter::expression::protocol_number;
use crate::front_end::FrontEnd;
use crate::kernel::ConntrackCleanup;
use crate::plan::Operation;
use crate::real_servers::{RealServerAddress, real_server_address};

// linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h
const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// `CTA_FILTER_F_CTA_PROTO_NUM` and `CTA_FILTER_F_CTA_PROTO_DST_PORT` of `nf_internals.h`.
const FILTER_PROTOCOL: u32 = 1 << 3;
const FILTER_DESTINATION_PORT: u32 = 1 << 5;

/// The real servers of each front end, sorted.
type LiveServers<'a> = HashMap<FrontEnd, &'a Arc<[RealServerAddress]>>;

/// Deletes the stale flows of all front ends in operations, with one dump per family. Each dump is recorded in `cleanups`.
pub(crate) fn delete_stale_flows(
    socket: &mut Socket,
    operations: &[Operation],
    cleanups: &mut Vec<ConntrackCleanup>,
) -> Result<(), Error> {
    let mut wanted = LiveServers::default();
    for operation in operations {
        if let Operation::DeleteUntranslatedFlows(front_end, live) | Operation::DeleteStaleFlows(front_end, live) =
            operation
        {
            wanted.insert(*front_end, live);
        }
    }
    for family in [Family::Ipv4, Family::Ipv6] {
        let mut front_ends = wanted.keys().filter(|front_end| Family::of(front_end.address) == family);
        let Some(first) = front_ends.next() else { continue };
        let (mut has_one_protocol, mut has_one_port) = (true, true);
        for front_end in front_ends {
            has_one_protocol &= front_end.protocol == first.protocol;
            has_one_port &= front_end.port == first.port;
        }
        let protocol = has_one_protocol.then_some(first.protocol);
        let port = (has_one_protocol && has_one_port).then_some(first.port);
        let (start, mut stale) = (Instant::now(), Vec::new());
        for entry in socket.stream(&list_request(family, protocol, port))? {
            let ConntrackEntry(attributes) = entry?;
            if is_stale(&attributes, &wanted) {
                stale.push(delete(family, attributes));
            }
        }
        let found = stale.len();
        if found > 0 {
            let refused =
                socket.batch(stale)?.into_iter().filter_map(Result::err).find(|refusal| refusal.errno != ENOENT);
            if let Some(refusal) = refused {
                return Err(refusal.into());
            }
            debug!(flows = found, "deleted stale flows from connection tracking");
        }
        cleanups.push(ConntrackCleanup { family, duration: start.elapsed(), deleted: found });
    }
    Ok(())
}

/// An entry of connection tracking. One that cannot be decoded is empty, so that the others are still handled.
struct ConntrackEntry(Vec<ConntrackAttribute>);

impl NetlinkDeserializable for ConntrackEntry {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        // The library's decoder for other subsystems does not check all lengths.
        if header.message_type >> 8 != NFNL_SUBSYS_CTNETLINK {
            return Ok(Self(Vec::new()));
        }
        let message = NetfilterMessage::deserialize(header, payload).map(|message| message.inner);
        Ok(match message {
            Ok(NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes))) => Self(attributes),
            _ => Self(Vec::new()),
        })
    }
}

/// A request to list flows. The library has no type for the filter, whose attribute must be marked as nested.
struct ListRequest(Vec<u8>);

impl NetlinkSerializable for ListRequest {
    fn message_type(&self) -> u16 {
        const IPCTNL_MSG_CT_GET: u16 = 1;
        NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET
    }

    fn buffer_len(&self) -> usize {
        self.0.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.0);
    }
}

/// A request for the flows of a family, optionally of one protocol and to one port. Before Linux 5.8 the kernel ignores the filter, so
/// each entry is checked again.
fn list_request(family: Family, protocol: Option<Protocol>, port: Option<u16>) -> ListRequest {
    let header = header(family);
    let Some(protocol) = protocol else {
        let mut bytes = vec![0; header.buffer_len()];
        header.emit(&mut bytes);
        return ListRequest(bytes);
    };
    let mut proto = vec![ProtoTuple::Protocol(protocol_number(protocol).into())];
    proto.extend(port.map(ProtoTuple::DestinationPort));
    let flags = FILTER_PROTOCOL | if port.is_some() { FILTER_DESTINATION_PORT } else { 0 };
    let tuple = ConntrackAttribute::CtaTupleOrig(vec![Tuple::Proto(proto)]);
    let mut bytes = vec![0; header.buffer_len() + tuple.buffer_len()];
    header.emit(&mut bytes);
    tuple.emit(&mut bytes[header.buffer_len()..]);
    let mut put = |length: u16, kind: u16, value: Option<u32>| {
        bytes.extend(length.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value.map(u32::to_ne_bytes).into_iter().flatten());
    };
    put(20, CTA_FILTER | NLA_F_NESTED, None);
    put(8, CTA_FILTER_ORIG_FLAGS, Some(flags));
    put(8, CTA_FILTER_REPLY_FLAGS, Some(0));
    ListRequest(bytes)
}

/// Decodes an entry, checks whether it is stale, and encodes the request that deletes it.
#[cfg(fuzzing)]
pub(crate) fn fuzz(header: &NetlinkHeader, payload: &[u8]) {
    if let Ok(ConntrackEntry(attributes)) = ConntrackEntry::deserialize(header, payload) {
        let _ = is_stale(&attributes, &LiveServers::default());
        let Request { message, .. } = delete(Family::Ipv4, attributes);
        message.serialize(&mut vec![0; NetlinkSerializable::buffer_len(&message)]);
    }
}

fn is_stale(attributes: &[ConntrackAttribute], wanted: &LiveServers<'_>) -> bool {
    let find = |pick: fn(&ConntrackAttribute) -> Option<&Vec<Tuple>>| attributes.iter().find_map(pick);
    let original = find(|attribute| match attribute {
        ConntrackAttribute::CtaTupleOrig(tuple) => Some(tuple),
        _ => None,
    });
    let reply = find(|attribute| match attribute {
        ConntrackAttribute::CtaTupleReply(tuple) => Some(tuple),
        _ => None,
    });
    let Some((original, reply)) = original.zip(reply) else { return false };
    let front_end = protocol(original).zip(destination(original)).map(|(protocol, destination)| FrontEnd {
        address: destination.ip(),
        port: destination.port(),
        protocol,
    });
    let live = front_end.and_then(|front_end| wanted.get(&front_end));
    live.is_some_and(|live| source(reply).is_none_or(|from| live.binary_search(&real_server_address(from)).is_err()))
}

fn split_tuple(tuple: &[Tuple]) -> (&[IPTuple], &[ProtoTuple]) {
    let (mut addresses, mut ports): (&[IPTuple], &[ProtoTuple]) = (&[], &[]);
    for part in tuple {
        match part {
            Tuple::Ip(part) => addresses = part,
            Tuple::Proto(part) => ports = part,
            _ => {}
        }
    }
    (addresses, ports)
}

fn protocol(tuple: &[Tuple]) -> Option<Protocol> {
    let number = split_tuple(tuple).1.iter().find_map(|part| match part {
        ProtoTuple::Protocol(protocol) => Some(u8::from(*protocol)),
        _ => None,
    })?;
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|protocol| protocol_number(*protocol) == number)
}

fn destination(tuple: &[Tuple]) -> Option<SocketAddr> {
    let (addresses, ports) = split_tuple(tuple);
    let address = |part: &IPTuple| if let IPTuple::DestinationAddress(ip) = part { Some(*ip) } else { None };
    let port = |part: &ProtoTuple| if let ProtoTuple::DestinationPort(port) = part { Some(*port) } else { None };
    socket_address(addresses.iter().find_map(address), ports.iter().find_map(port))
}

fn source(tuple: &[Tuple]) -> Option<SocketAddr> {
    let (addresses, ports) = split_tuple(tuple);
    let address = |part: &IPTuple| if let IPTuple::SourceAddress(ip) = part { Some(*ip) } else { None };
    let port = |part: &ProtoTuple| if let ProtoTuple::SourcePort(port) = part { Some(*port) } else { None };
    socket_address(addresses.iter().find_map(address), ports.iter().find_map(port))
}

fn socket_address(address: Option<IpAddr>, port: Option<u16>) -> Option<SocketAddr> {
    Some(SocketAddr::new(address?, port?))
}

/// A request that deletes exactly this flow, by its original tuple and its zone.
fn delete(family: Family, attributes: Vec<ConntrackAttribute>) -> Request<NetfilterMessage> {
    let identity = attributes.into_iter().filter(|attribute| match attribute {
        ConntrackAttribute::CtaTupleOrig(_) => true,
        ConntrackAttribute::Other(other) => netlink_packet_core::Nla::kind(other) == CTA_ZONE,
        _ => false,
    });
    NetfilterMessage::new(header(family), ConntrackMessage::Delete(identity.collect())).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Found by fuzzing: the library does not check the length of an attribute of `nf_tables`.
    #[test]
    fn a_message_of_another_subsystem_is_ignored() {
        let payload = [
            0x02, 0x00, 0x00, 0x01, 0x44, 0x00, 0x03, 0x00, 0x40, 0x00, 0x01, 0x00, 0x14, 0x00, 0x01, 0x00, 0x50, 0x00,
            0x01, 0x00, 0x0a, 0x60, 0x00, 0x01, 0x06, 0x00, 0x00, 0x00, 0x00, 0x50, 0x00, 0x00, 0x28, 0x00, 0x02, 0x00,
            0x24, 0x00, 0x02, 0x6f, 0x70, 0x65, 0x6e, 0x00, 0x08, 0x00, 0x01, 0x00, 0xff, 0xff, 0xff, 0xfd, 0x18, 0x00,
            0x02, 0x00, 0x73, 0x6f, 0x75, 0x72, 0x63, 0x65, 0x73, 0x2d, 0x64, 0x65, 0x66, 0x61, 0x00, 0x00, 0x07, 0x00,
            0x00, 0x00, 0x08, 0x00,
        ];
        let mut header = NetlinkHeader::default();
        header.message_type = 0x0a0c;
        assert!(ConntrackEntry::deserialize(&header, &payload).unwrap().0.is_empty());
    }
}
