//! Requests byte by byte, against those of ipvsadm.

#![cfg(target_endian = "little")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use ipvs_netlink::{
    Family, Forwarding, Message, Netmask, Persistence, Protocol, RealServer, Scheduler, SchedulerFlags, Timeouts,
    Tunnel, VirtualServer, VirtualServerId,
};
use netlink_packet_core::{Emitable, NlasIterator};
use netlink_packet_generic::GenlFamily;

// IPVS_CMD_ATTR_SERVICE and _DEST, and IPVS_SVC_ATTR_FLAGS.
const SERVICE: u16 = 1;
const DEST: u16 = 2;
const FLAGS: u16 = 7;

// What ipvsadm sends beyond what the kernel needs: the rest of the virtual server where only its identity counts, the
// tunnel of a real server (the kernel's default is the same), and the rest of a real server that is to be deleted.
type LeftOut = &'static [(u16, u16)];
const REST_OF_SERVER: LeftOut = &[(SERVICE, 6), (SERVICE, 7), (SERVICE, 8), (SERVICE, 9)];
const TUNNEL: LeftOut = &[(DEST, 13), (DEST, 14), (DEST, 15)];
const REST_OF_REAL: LeftOut = &[(DEST, 3), (DEST, 4), (DEST, 5), (DEST, 6)];

/// What ipvsadm 1.31 was told, what of its message is left out here, and the message on a little-endian machine, from
/// the generic netlink header on, as strace shows it.
#[rustfmt::skip]
const CAPTURED: [(&str, &[LeftOut], &str); 21] = [
    ("-A -t 10.96.0.1:80 -s rr", &[], "010100005400018006000100020000000600020006000000140003000a600001000000000000000000000000060004000050000007000600727200000c00070000000000ffffffff080008000000000008000900ffffffff"),
    ("-A -u 10.96.0.1:53 -s sh -p 300 -M 255.255.255.0 -o -b flag-1,flag-2", &[], "010100005400018006000100020000000600020011000000140003000a600001000000000000000000000000060004000035000007000600736800000c0007001d000000ffffffff080008002c01000008000900ffffff00"),
    ("-A -t [fd00::1]:443 -s mh -p 600 -M 64 -b mh-fallback", &[], "0101000054000180060001000a000000060002000600000014000300fd0000000000000000000000000000010600040001bb0000070006006d6800000c00070009000000ffffffff08000800580200000800090040000000"),
    ("-A --sctp-service 10.96.0.1:99 -s wlc", &[], "010100005400018006000100020000000600020084000000140003000a600001000000000000000000000000060004000063000008000600776c63000c00070000000000ffffffff080008000000000008000900ffffffff"),
    ("-A -f 7 -s wrr", &[], "01010000380001800600010002000000080005000700000008000600777272000c00070000000000ffffffff080008000000000008000900ffffffff"),
    ("-A -f 7 -6 -s wrr", &[], "0101000038000180060001000a000000080005000700000008000600777272000c00070000000000ffffffff08000800000000000800090080000000"),
    ("-E -t 10.96.0.1:80 -s wrr", &[], "020100005400018006000100020000000600020006000000140003000a600001000000000000000000000000060004000050000008000600777272000c00070000000000ffffffff080008000000000008000900ffffffff"),
    ("-a -t 10.96.0.1:80 -r 10.1.0.7:8080 -m -w 5 -x 100 -y 50", &[REST_OF_SERVER, TUNNEL], "050100005400018006000100020000000600020006000000140003000a600001000000000000000000000000060004000050000005000600000000000c00070000000000ffffffff080008000000000008000900ffffffff6000028006000b0002000000140001000a010007000000000000000000000000060002001f9000000800030000000000080004000500000005000d000000000006000e000000000006000f000000000008000500640000000800060032000000"),
    ("-a -t [fd00::1]:443 -r [fd01::7]:443 -g -w 0", &[REST_OF_SERVER, TUNNEL], "0501000054000180060001000a000000060002000600000014000300fd0000000000000000000000000000010600040001bb000005000600000000000c00070000000000ffffffff080008000000000008000900800000006000028006000b000a00000014000100fd0100000000000000000000000000070600020001bb00000800030003000000080004000000000005000d000000000006000e000000000006000f000000000008000500000000000800060000000000"),
    ("-a -f 7 -r 10.1.0.8 -i -w 65535", &[REST_OF_SERVER, TUNNEL], "05010000380001800600010002000000080005000700000005000600000000000c00070000000000ffffffff080008000000000008000900ffffffff6000028006000b0002000000140001000a0100080000000000000000000000000600020000000000080003000200000008000400ffff000005000d000000000006000e000000000006000f000000000008000500000000000800060000000000"),
    ("-e -t 10.96.0.1:80 -r 10.1.0.7:8080 -m -w 6", &[REST_OF_SERVER, TUNNEL], "060100005400018006000100020000000600020006000000140003000a600001000000000000000000000000060004000050000005000600000000000c00070000000000ffffffff080008000000000008000900ffffffff6000028006000b0002000000140001000a010007000000000000000000000000060002001f9000000800030000000000080004000600000005000d000000000006000e000000000006000f000000000008000500000000000800060000000000"),
    ("-d -t 10.96.0.1:80 -r 10.1.0.7:8080", &[REST_OF_SERVER, TUNNEL, REST_OF_REAL], "070100005400018006000100020000000600020006000000140003000a600001000000000000000000000000060004000050000005000600000000000c00070000000000ffffffff080008000000000008000900ffffffff6000028006000b0002000000140001000a010007000000000000000000000000060002001f9000000800030003000000080004000100000005000d000000000006000e000000000006000f000000000008000500000000000800060000000000"),
    ("-D -t 10.96.0.1:80", &[REST_OF_SERVER], "030100005400018006000100020000000600020006000000140003000a600001000000000000000000000000060004000050000005000600000000000c00070000000000ffffffff080008000000000008000900ffffffff"),
    ("-Ln -t [fd00::1]:443", &[REST_OF_SERVER], "0401000054000180060001000a000000060002000600000014000300fd0000000000000000000000000000010600040001bb000005000600000000000c00070000000000ffffffff08000800000000000800090000000000"),
    ("-Ln, first", &[], "04010000"),
    ("-Ln, then", &[], "0801000030000180060001000a000000060002000600000014000300fd0000000000000000000000000000010600040001bb0000"),
    ("-Ln, for a mark", &[], "0801000014000180060001000a0000000800050007000000"),
    ("--set 901 121 301", &[], "0c01000008000400850300000800050079000000080006002d010000"),
    ("-Ln --timeout", &[], "0d010000"),
    ("-Ln, at the start", &[], "0f010000"),
    ("-C", &[], "11010000"),
];

/// The same requests.
fn requests() -> [Message; 21] {
    let http = tcp("10.96.0.1:80");
    let https = tcp("[fd00::1]:443");
    let dns = VirtualServer {
        scheduler_flags: SchedulerFlags::SH_FALLBACK.union(SchedulerFlags::SH_PORT),
        persistence: Some(Persistence {
            netmask: Netmask::V4([255, 255, 255, 0].into()),
            ..Persistence::new(300, Family::Ipv4)
        }),
        one_packet: true,
        ..VirtualServer::new(
            VirtualServerId::address(Protocol::Udp, socket_address("10.96.0.1:53")),
            Scheduler::SourceHashing,
        )
    };
    let maglev = VirtualServer {
        scheduler_flags: SchedulerFlags::MH_FALLBACK,
        persistence: Some(Persistence { netmask: Netmask::V6(64), ..Persistence::new(600, Family::Ipv6) }),
        ..VirtualServer::new(https, Scheduler::MaglevHashing)
    };
    let sctp = VirtualServerId::address(Protocol::Sctp, socket_address("10.96.0.1:99"));
    let pod = RealServer::new(socket_address("10.1.0.7:8080"));
    let limited = RealServer { weight: 5, upper_threshold: 100, lower_threshold: 50, ..pod };
    let routed = RealServer {
        forwarding: Forwarding::DirectRoute,
        weight: 0,
        ..RealServer::new(socket_address("[fd01::7]:443"))
    };
    let tunnel = RealServer {
        forwarding: Forwarding::Tunnel(Tunnel::IpIp),
        weight: 65_535,
        ..RealServer::new(socket_address("10.1.0.8:0"))
    };
    let [ipv4_mark, ipv6_mark] =
        [Family::Ipv4, Family::Ipv6].map(|family| VirtualServerId::firewall_mark(7, family).unwrap());
    let weighted = |id| VirtualServer::new(id, Scheduler::WeightedRoundRobin);
    [
        Message::AddVirtualServer(VirtualServer::new(http, Scheduler::RoundRobin)),
        Message::AddVirtualServer(dns),
        Message::AddVirtualServer(maglev),
        Message::AddVirtualServer(VirtualServer::new(sctp, Scheduler::WeightedLeastConnection)),
        Message::AddVirtualServer(weighted(ipv4_mark)),
        Message::AddVirtualServer(weighted(ipv6_mark)),
        Message::SetVirtualServer(weighted(http)),
        Message::AddRealServer(http, limited),
        Message::AddRealServer(https, routed),
        Message::AddRealServer(ipv4_mark, tunnel),
        Message::SetRealServer(http, RealServer { weight: 6, ..pod }),
        Message::DeleteRealServer(http, pod.socket_address()),
        Message::DeleteVirtualServer(http),
        Message::GetVirtualServer(https),
        Message::ListVirtualServers,
        Message::ListRealServers(https),
        Message::ListRealServers(ipv6_mark),
        Message::SetTimeouts(Timeouts { tcp: 901, tcp_fin: 121, udp: 301 }),
        Message::GetTimeouts,
        Message::GetInfo,
        Message::Flush,
    ]
}

#[test]
fn requests_are_what_ipvsadm_sends() {
    for ((command, left_out, hex), message) in CAPTURED.into_iter().zip(requests()) {
        let theirs = from_hex(hex);
        assert_eq!(theirs[..4], [message.command(), message.version(), 0, 0], "ipvsadm {command}");
        let mut ours = vec![0; message.buffer_len()];
        message.emit(&mut ours);
        let (ours, mut theirs) = (flatten(&ours), flatten(&theirs[4..]));
        // The mask of the flags that are meant: ipvsadm says all, even IP_VS_SVC_F_HASHED, which is the kernel's own.
        if let Some(flags) = theirs.get_mut(&(SERVICE, FLAGS)) {
            flags[4..].copy_from_slice(&0xffff_fffd_u32.to_le_bytes());
        }
        let left_out: BTreeSet<_> = left_out.concat().into_iter().collect();
        let surplus: BTreeSet<_> = theirs.keys().filter(|key| !ours.contains_key(*key)).copied().collect();
        assert_eq!(surplus, left_out, "ipvsadm {command}");
        theirs.retain(|key, _| !left_out.contains(key));
        assert_eq!(ours, theirs, "ipvsadm {command}");
    }
}

/// Every attribute by the kind of the one it is nested in, or 0, and its own. Order means nothing to the kernel.
fn flatten(bytes: &[u8]) -> BTreeMap<(u16, u16), Vec<u8>> {
    let mut all = BTreeMap::new();
    for outer in NlasIterator::new(bytes).map(Result::unwrap) {
        if !outer.nested_flag() {
            all.insert((0, outer.kind()), outer.value().to_vec());
            continue;
        }
        for inner in NlasIterator::new(outer.value()).map(Result::unwrap) {
            all.insert((outer.kind(), inner.kind()), inner.value().to_vec());
        }
    }
    all
}

fn from_hex(hex: &str) -> Vec<u8> {
    let pairs = hex.as_bytes().chunks(2).map(|pair| str::from_utf8(pair).unwrap());
    pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
}

fn tcp(address: &str) -> VirtualServerId {
    VirtualServerId::address(Protocol::Tcp, socket_address(address))
}

fn socket_address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}
