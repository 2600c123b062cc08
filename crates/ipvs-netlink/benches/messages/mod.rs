//! What the benchmarks and the test of allocations encode and decode: every request, and answers of a kernel.

#![allow(
    dead_code,
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "included by several targets, each of which uses a part and cannot go on without"
)]

use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU8, NonZeroU16};

use ipvs_netlink::{
    Family, Forwarding, GueChecksum, Message, Netmask, Persistence, Protocol, RealServer, Scheduler, SchedulerFlags,
    SyncDaemon, SyncRole, Timeouts, Tunnel, VirtualServer, VirtualServerId,
};
use netlink_packet_core::{Emitable, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};
use netlink_packet_generic::GenlMessage;

const HEADER_BYTES: usize = 16;

/// Any number will do: the kernel gives the family one when it starts.
const FAMILY: u16 = 0x14;

// What Linux 6.1 sent ipvsadm 1.31 on a little-endian machine, from the generic netlink header on, as
// `strace -e read=all -e trace=recvmsg ipvsadm -Sn` shows it. All counters are there twice, with 32 bits and with 64.
const VIRTUAL_SERVER_V4: &str = "010100005401010006000100020000000600020006000000140003000a600001000000000000000000000000060004000050000008000600777272000c00070003000000ffffffff080008002c01000008000900ffffffff60000a000800010003000000080002000300000008000300030000000c000400b40000000000000004000b000c0005007800000000000000080006000000000008000700000000000800080000000000080009001600000008000a000f000000a0000c000c000100030000000000000004000b000c000200030000000000000004000b000c000300030000000000000004000b000c000400b40000000000000004000b000c000500780000000000000004000b000c000600000000000000000004000b000c000700000000000000000004000b000c000800000000000000000004000b000c000900160000000000000004000b000c000a000f00000000000000";
const VIRTUAL_SERVER_V6: &str = "0101000054010100060001000a000000060002000600000014000300fd0000000000000000000000000000010600040001bb0000070006006d6800000c00070002000000ffffffff0800080000000000080009008000000060000a000800010000000000080002000000000008000300000000000c000400000000000000000004000b000c0005000000000000000000080006000000000008000700000000000800080000000000080009000000000008000a0000000000a0000c000c000100000000000000000004000b000c000200000000000000000004000b000c000300000000000000000004000b000c000400000000000000000004000b000c000500000000000000000004000b000c000600000000000000000004000b000c000700000000000000000004000b000c000800000000000000000004000b000c000900000000000000000004000b000c000a000000000000000000";
const REAL_SERVER_V4: &str = "050100007c010200140001000a010007000000000000000000000000060002001f9000000800030000000000080004000500000005000d000000000006000e000000000006000f00000000000800050064000000080006003200000008000700000000000800080003000000080009000100000006000b000200000064000a0008000100030000000800020003000000080003000300000004000b000c000400b40000000000000004000b000c0005007800000000000000080006000000000008000700000000000800080000000000080009001600000008000a000f000000a0000c000c000100030000000000000004000b000c000200030000000000000004000b000c000300030000000000000004000b000c000400b40000000000000004000b000c000500780000000000000004000b000c000600000000000000000004000b000c000700000000000000000004000b000c000800000000000000000004000b000c000900160000000000000004000b000c000a000f00000000000000";
const REAL_SERVER_V6: &str = "050100007c01020014000100fd0100000000000000000000000000070600020020fb00000800030000000000080004000100000005000d000000000006000e000000000006000f00000000000800050000000000080006000000000008000700000000000800080000000000080009000000000006000b000a00000064000a0008000100000000000800020000000000080003000000000004000b000c000400000000000000000004000b000c0005000000000000000000080006000000000008000700000000000800080000000000080009000000000008000a0000000000a0000c000c000100000000000000000004000b000c000200000000000000000004000b000c000300000000000000000004000b000c000400000000000000000004000b000c000500000000000000000004000b000c000600000000000000000004000b000c000700000000000000000004000b000c000800000000000000000004000b000c000900000000000000000004000b000c000a000000000000000000";
const SYNC_DAEMON: &str = "090100003c0003000800010001000000070002006c6f0000080003000700000006000400c00500000600070090220000050008000100000008000500e0000051";
const TIMEOUTS: &str = "0c01000008000400840300000800050078000000080006002c010000";
const INFO: &str = "0e01000008000100010201000800020000100000";

/// An answer of the kernel: its name, and its bytes behind the netlink header.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) name: &'static str,
    pub(crate) payload: Vec<u8>,
}

impl Answer {
    fn captured(name: &'static str, hex: &str) -> Self {
        let pairs = hex.as_bytes().chunks(2).map(|pair| str::from_utf8(pair).unwrap());
        Self { name, payload: pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect() }
    }

    /// The same without the counters of 64 bits, as kernels before 4.1 send it.
    fn narrow(name: &'static str, hex: &str) -> Self {
        const STATS64: u16 = 12;
        let Self { payload, .. } = Self::captured(name, hex);
        // The generic netlink header, and that of the one attribute all others are nested in.
        let (headers, mut rest) = payload.split_at(8);
        let mut narrow = headers.to_vec();
        while let [a, b, c, d, ..] = *rest {
            let length = usize::from(u16::from_ne_bytes([a, b])).next_multiple_of(4);
            let (attribute, others) = rest.split_at(length);
            if u16::from_ne_bytes([c, d]) != STATS64 {
                narrow.extend_from_slice(attribute);
            }
            rest = others;
        }
        let length = u16::try_from(narrow.len() - 4).unwrap();
        narrow[4..6].copy_from_slice(&length.to_ne_bytes());
        Self { name, payload: narrow }
    }

    /// What the message says: the way of the socket from a payload to a message.
    pub(crate) fn decode(&self) -> Message {
        let mut header = NetlinkHeader::default();
        header.message_type = FAMILY;
        GenlMessage::<Message>::deserialize(&header, &self.payload).unwrap().payload
    }
}

pub(crate) fn listed_virtual_server() -> Answer {
    Answer::captured("virtual server, IPv4", VIRTUAL_SERVER_V4)
}

pub(crate) fn listed_virtual_server_v6() -> Answer {
    Answer::captured("virtual server, IPv6", VIRTUAL_SERVER_V6)
}

pub(crate) fn narrow_virtual_server() -> Answer {
    Answer::narrow("virtual server, counters of 32 bits alone", VIRTUAL_SERVER_V4)
}

pub(crate) fn listed_real_server() -> Answer {
    Answer::captured("real server, IPv4", REAL_SERVER_V4)
}

pub(crate) fn listed_real_server_v6() -> Answer {
    Answer::captured("real server, IPv6", REAL_SERVER_V6)
}

pub(crate) fn narrow_real_server() -> Answer {
    Answer::narrow("real server, counters of 32 bits alone", REAL_SERVER_V4)
}

/// The two that a list consists of, in each form.
pub(crate) fn listed() -> [Answer; 6] {
    [
        listed_virtual_server(),
        listed_virtual_server_v6(),
        narrow_virtual_server(),
        listed_real_server(),
        listed_real_server_v6(),
        narrow_real_server(),
    ]
}

/// Every kind of answer.
pub(crate) fn answers() -> Vec<Answer> {
    let others = [("synchronization daemon", SYNC_DAEMON), ("timeouts", TIMEOUTS), ("info", INFO)];
    listed().into_iter().chain(others.map(|(name, hex)| Answer::captured(name, hex))).collect()
}

/// Appends a request to a datagram, as the sockets of netlink-batch do: the clients' way from a message to bytes.
pub(crate) fn append(datagram: &mut Vec<u8>, message: &Message) {
    let mut message = GenlMessage::from_payload(*message);
    message.set_resolved_family_id(FAMILY);
    let start = datagram.len();
    let length = HEADER_BYTES + NetlinkSerializable::buffer_len(&message);
    datagram.resize(start + length.next_multiple_of(4), 0);
    let mut header = NetlinkHeader::default();
    header.length = u32::try_from(length).unwrap_or(u32::MAX);
    header.message_type = message.message_type();
    header.flags = NLM_F_REQUEST;
    header.emit(&mut datagram[start..start + HEADER_BYTES]);
    message.serialize(&mut datagram[start + HEADER_BYTES..start + length]);
}

/// A datagram with room for any number of messages that is measured here.
pub(crate) fn empty_datagram() -> Vec<u8> {
    Vec::with_capacity(64 * 1024)
}

pub(crate) fn new_virtual_server() -> Message {
    Message::AddVirtualServer(VirtualServer::new(tcp("10.96.0.1:80"), Scheduler::RoundRobin))
}

pub(crate) fn new_virtual_server_v6() -> Message {
    Message::AddVirtualServer(VirtualServer::new(tcp("[fd00::1]:443"), Scheduler::RoundRobin))
}

pub(crate) fn new_real_server() -> Message {
    Message::AddRealServer(tcp("10.96.0.1:80"), real("10.1.0.7:8080"))
}

pub(crate) fn new_real_server_v6() -> Message {
    Message::AddRealServer(tcp("[fd00::1]:443"), real("[fd01::7]:8443"))
}

/// New virtual servers 10.96.x.y:80.
pub(crate) fn new_virtual_servers(count: u32) -> Vec<Message> {
    let new = |number| VirtualServer::new(numbered(number), Scheduler::RoundRobin);
    (0..count).map(|number| Message::AddVirtualServer(new(number))).collect()
}

/// The identity 10.96.x.y:80 of a number.
pub(crate) fn numbered(number: u32) -> VirtualServerId {
    let address = SocketAddr::new(IpAddr::V4((0x0a60_0000 + number).into()), 80);
    VirtualServerId::address(Protocol::Tcp, address)
}

/// Every kind of request, with all it can say.
pub(crate) fn requests() -> Vec<Message> {
    let http = tcp("10.96.0.1:80");
    let persistent = VirtualServer {
        scheduler_flags: SchedulerFlags::SH_FALLBACK,
        persistence: Some(Persistence { timeout: 300, netmask: Netmask::V4([255, 255, 255, 0].into()) }),
        engine: Some("sip".parse().unwrap()),
        one_packet: true,
        ..VirtualServer::new(http, Scheduler::SourceHashing)
    };
    let port = NonZeroU16::new(6080).unwrap();
    let tunnel = RealServer {
        forwarding: Forwarding::Tunnel(Tunnel::Gue { port, checksum: GueChecksum::Remote }),
        upper_threshold: 100,
        lower_threshold: 50,
        ..real("10.1.0.7:80")
    };
    let daemon = SyncDaemon {
        role: SyncRole::Master,
        interface: "lo".parse().unwrap(),
        sync_id: 7,
        max_length: NonZeroU16::new(1472),
        group: Some("224.0.0.81".parse().unwrap()),
        port: NonZeroU16::new(8848),
        ttl: NonZeroU8::new(1),
    };
    let mark = VirtualServerId::firewall_mark(7, Family::Ipv6).unwrap();
    vec![
        new_virtual_server(),
        new_virtual_server_v6(),
        Message::SetVirtualServer(persistent),
        Message::DeleteVirtualServer(mark),
        Message::GetVirtualServer(http),
        Message::ListVirtualServers,
        new_real_server(),
        new_real_server_v6(),
        Message::SetRealServer(http, tunnel),
        Message::DeleteRealServer(http, tunnel.socket_address()),
        Message::ListRealServers(http),
        Message::StartSyncDaemon(daemon),
        Message::StopSyncDaemon(SyncRole::Backup),
        Message::ListSyncDaemons,
        Message::GetTimeouts,
        Message::SetTimeouts(Timeouts { tcp: 901, tcp_fin: 121, udp: 301 }),
        Message::GetInfo,
        Message::ZeroVirtualServer(http),
        Message::Zero,
        Message::Flush,
    ]
}

fn tcp(address: &str) -> VirtualServerId {
    VirtualServerId::address(Protocol::Tcp, address.parse().unwrap())
}

fn real(address: &str) -> RealServer {
    RealServer::new(address.parse().unwrap())
}
