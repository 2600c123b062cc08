//! Rules of any content, without a kernel: what is written is read as the same, and nothing panics.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU8, NonZeroU16, NonZeroU32};

use ipvs_netlink::rules;
use ipvs_netlink::{
    Family, Forwarding, GueChecksum, Message, Name, Netmask, Persistence, Protocol, RealServer, Scheduler,
    SchedulerFlags as Flags, SyncDaemon, SyncRole, Timeouts, Tunnel, VirtualServer, VirtualServerId,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

fn any_protocol() -> impl Strategy<Value = Protocol> {
    select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp, Protocol::Other(1)])
}

fn any_id() -> impl Strategy<Value = VirtualServerId> {
    let family = select(vec![Family::Ipv4, Family::Ipv6]);
    prop_oneof![
        3 => (any_protocol(), any::<(IpAddr, u16)>())
            .prop_map(|(protocol, address)| VirtualServerId::address(protocol, address.into())),
        1 => (any::<NonZeroU32>(), family).prop_map(|(mark, family)| VirtualServerId::FirewallMark { mark, family }),
    ]
}

/// Any name the kernel takes, most of them possible in a rule.
fn any_name() -> impl Strategy<Value = Name> {
    prop_oneof![4 => "[a-z_=#-]{1,15}", 1 => "[^\0]{1,3}"].prop_map(|name| name.parse().unwrap())
}

fn any_server() -> impl Strategy<Value = VirtualServer> {
    let scheduler =
        prop_oneof![select(Scheduler::ALL.to_vec()), any_name().prop_map(|name| name.as_str().parse().unwrap())];
    let flags = subsequence(vec![Flags::FLAG_1, Flags::FLAG_2, Flags::FLAG_3], 0..=3)
        .prop_map(|flags| flags.into_iter().fold(Flags::NONE, Flags::union));
    let persistence = option::of(prop_oneof![0_u32..2_678_402, any::<u32>()]);
    let mask = any::<(bool, u32)>();
    (any_id(), scheduler, flags, (persistence, option::of(any_name())), mask, any::<bool>()).prop_map(
        |(id, scheduler, scheduler_flags, (persistence, engine), (is_host, mask), one_packet)| VirtualServer {
            id,
            scheduler,
            scheduler_flags,
            persistence: persistence.map(|timeout| Persistence {
                timeout,
                netmask: match id.family() {
                    family if is_host => Netmask::host(family),
                    Family::Ipv4 => Netmask::V4(mask.into()),
                    Family::Ipv6 => Netmask::V6((mask % 130) as u8),
                },
            }),
            engine,
            one_packet,
        },
    )
}

fn any_real() -> impl Strategy<Value = RealServer> {
    let checksum = select(vec![GueChecksum::None, GueChecksum::Udp, GueChecksum::Remote]);
    let tunnel = prop_oneof![
        Just(Tunnel::IpIp),
        (any::<NonZeroU16>(), checksum).prop_map(|(port, checksum)| Tunnel::Gue { port, checksum }),
        any::<bool>().prop_map(|checksum| Tunnel::Gre { checksum }),
        Just(Tunnel::Other { kind: 3, port: 0, flags: 0 }),
    ];
    let forwarding = prop_oneof![
        2 => select(vec![Forwarding::Masquerade, Forwarding::DirectRoute]),
        2 => tunnel.prop_map(Forwarding::Tunnel),
        1 => select(vec![Forwarding::Local, Forwarding::Bypass, Forwarding::Other(7)]),
    ];
    let number = || prop_oneof![Just(0), 0..=i32::MAX as u32, any::<u32>()];
    (any::<(IpAddr, u16)>(), forwarding, number(), number(), number()).prop_map(
        |(address, forwarding, weight, upper_threshold, lower_threshold)| RealServer {
            forwarding,
            weight,
            upper_threshold,
            lower_threshold,
            ..RealServer::new(address.into())
        },
    )
}

fn any_daemon() -> impl Strategy<Value = SyncDaemon> {
    let role = select(vec![SyncRole::Master, SyncRole::Backup]);
    let group = option::of(prop_oneof![
        any::<IpAddr>(),
        any::<u32>().prop_map(|bits| IpAddr::V4((bits | 0xe000_0000).into())),
        any::<u128>().prop_map(|bits| IpAddr::V6((bits | 0xff << 120).into())),
    ]);
    let numbers = any::<(u8, Option<NonZeroU16>, Option<NonZeroU16>, Option<NonZeroU8>)>();
    (role, any_name(), group, numbers).prop_map(|(role, interface, group, (sync_id, max_length, port, ttl))| {
        SyncDaemon { sync_id, max_length, group, port, ttl, ..SyncDaemon::new(role, interface) }
    })
}

fn any_change() -> impl Strategy<Value = Message> {
    prop_oneof![
        3 => any_server().prop_map(Message::AddVirtualServer),
        1 => any_server().prop_map(Message::SetVirtualServer),
        1 => any_id().prop_map(Message::DeleteVirtualServer),
        3 => (any_id(), any_real()).prop_map(|(id, real)| Message::AddRealServer(id, real)),
        1 => (any_id(), any_real()).prop_map(|(id, real)| Message::SetRealServer(id, real)),
        1 => (any_id(), any::<(IpAddr, u16)>())
            .prop_map(|(id, address)| Message::DeleteRealServer(id, SocketAddr::from(address))),
        1 => (0..2_700_000_u32, any::<u32>(), 0..9_u32)
            .prop_map(|(tcp, tcp_fin, udp)| Message::SetTimeouts(Timeouts { tcp, tcp_fin, udp })),
        1 => any_daemon().prop_map(Message::StartSyncDaemon),
        1 => any_id().prop_map(Message::ZeroVirtualServer),
    ]
}

/// Words that lines are made of, right ones and wrong ones.
const WORDS: &[&str] = &[
    "-A",
    "-E",
    "-D",
    "-a",
    "-e",
    "-d",
    "-C",
    "-Z",
    "--set",
    "--start-daemon",
    "master",
    "--add-service",
    "-At",
    "-t",
    "1.2.3.4:80",
    "-u",
    "[fd00::1]:53",
    "fd00::1",
    "--sctp-service",
    "--sctp-service=1.2.3.4:9",
    "-f",
    "7",
    "-6",
    "-s",
    "rr",
    "-ssh",
    "-p",
    "-p=5",
    "--persistent",
    "300",
    "-M",
    "255.0.0.0",
    "64",
    "--pe",
    "sip",
    "-o",
    "-b",
    "flag-1,sh-port",
    "-r",
    "10.0.0.7:8080",
    "10.0.0.8",
    "-g",
    "-i",
    "-m",
    "-w",
    "5",
    "-x",
    "10",
    "-y",
    "--tun-type",
    "gue",
    "gre",
    "--tun-port",
    "--tun-csum",
    "--mcast-interface",
    "lo",
    "--syncid",
    "--",
    "-",
    "#",
    "=",
    "-op",
];

proptest! {
    #[test]
    fn what_is_written_is_read_as_the_same(message in any_change()) {
        if let Ok(line) = rules::format(&message) {
            let read = rules::parse(&line).collect::<Result<Vec<_>, _>>().unwrap();
            let read: Vec<_> = read.into_iter().map(|rule| (rule.line, rule.message)).collect();
            prop_assert_eq!(read, [(1, message)], "{}", line);
            prop_assert!(!line.contains('\n'));
        }
    }

    /// Nothing is refused without a reason.
    #[test]
    fn what_ipvsadm_can_say_is_written(
        address in any::<(IpAddr, u16)>(), scheduler in select(Scheduler::ALL.to_vec()), timeout in 1..2_678_401_u32,
        weight in 0..=i32::MAX as u32, real in any_real(),
    ) {
        let id = VirtualServerId::address(Protocol::Udp, address.into());
        let server = VirtualServer { one_packet: true, ..VirtualServer::new(id, scheduler).persistent(timeout) };
        prop_assert!(rules::format(&Message::AddVirtualServer(server)).is_ok());
        let real = RealServer {
            weight,
            upper_threshold: weight,
            lower_threshold: weight / 2,
            forwarding: Forwarding::Tunnel(Tunnel::IpIp),
            ..real
        };
        prop_assert!(rules::format(&Message::AddRealServer(id, real)).is_ok());
    }

    #[test]
    fn arbitrary_text_is_read_or_refused(text in any::<String>()) {
        let _ = rules::parse(&text).count();
    }

    #[test]
    fn arbitrary_words_are_read_and_written_as_read_or_refused_where_they_are(words in vec(select(WORDS), 1..9)) {
        let line = words.join(" ");
        for rule in rules::parse(&line) {
            match rule {
                Ok(rule) => {
                    let written = rules::format(&rule.message);
                    prop_assert!(written.is_ok(), "{line}: {written:?}");
                }
                Err(error) => {
                    let from: String = line.chars().skip(error.column - 1).collect();
                    let at = from.starts_with(&error.word) || line.contains(&error.word);
                    prop_assert!(error.line == 1 && at, "{line}: {error}");
                }
            }
        }
    }
}
