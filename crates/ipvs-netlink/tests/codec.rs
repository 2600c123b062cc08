//! Messages as bytes, without a kernel.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU8, NonZeroU16, NonZeroU32};

use ipvs_netlink::{
    Family, Forwarding, GueChecksum, Message, Name, Netmask, Persistence, Protocol, RealServer, Scheduler,
    SchedulerFlags, Stats, SyncDaemon, SyncRole, Timeouts, Tunnel, VirtualServer, VirtualServerId,
};
use netlink_packet_core::{DecodeError, Emitable, NlasIterator, ParseableParametrized};
use netlink_packet_generic::GenlHeader;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};

// Commands and attributes of linux/ip_vs.h.
const NEW_SERVICE: u8 = 1;
const NEW_DEST: u8 = 5;
const NEW_DAEMON: u8 = 9;
const SET_CONFIG: u8 = 12;
const SET_INFO: u8 = 14;
const SERVICE: u16 = 1;
const DEST: u16 = 2;
const SCHED_NAME: u16 = 6;
const STATS: u16 = 10;
const STATS64: u16 = 12;

fn emit(message: Message) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}

fn parse(command: u8, bytes: &[u8]) -> Result<Message, DecodeError> {
    Message::parse_with_param(bytes, GenlHeader { cmd: command, version: 1 })
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap();
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The attributes of a buffer, in order.
fn attributes(bytes: &[u8]) -> Attributes {
    NlasIterator::new(bytes)
        .map(|attribute| attribute.map(|attribute| (attribute.kind(), attribute.value().to_vec())).unwrap())
        .collect()
}

fn join(attributes: &[(u16, Vec<u8>)]) -> Vec<u8> {
    attributes.iter().flat_map(|(kind, value)| attribute(*kind, value)).collect()
}

/// What is inside the one nested attribute of a kind.
fn inside(bytes: &[u8], nest: u16) -> Attributes {
    let (_, content) = attributes(bytes).into_iter().find(|(kind, _)| *kind == nest).unwrap();
    attributes(&content)
}

fn server(protocol: Protocol, address: &str, scheduler: Scheduler) -> VirtualServer {
    VirtualServer::new(id(protocol, address), scheduler)
}

fn id(protocol: Protocol, address: &str) -> VirtualServerId {
    VirtualServerId::address(protocol, address.parse().unwrap())
}

fn real(address: &str, forwarding: Forwarding, weight: u32) -> RealServer {
    RealServer { forwarding, weight, ..RealServer::new(address.parse().unwrap()) }
}

/// Kinds and values.
type Attributes = Vec<(u16, Vec<u8>)>;

/// A listed virtual and a listed real server: the command, the attribute around all, and the attributes inside, which
/// are those of requests.
fn listed() -> [(u8, u16, Attributes); 2] {
    let server = server(Protocol::Tcp, "10.96.0.1:80", Scheduler::RoundRobin);
    let real = real("10.1.0.7:8080", Forwarding::Masquerade, 1);
    [
        (NEW_SERVICE, SERVICE, inside(&emit(Message::AddVirtualServer(server)), SERVICE)),
        (NEW_DEST, DEST, inside(&emit(Message::AddRealServer(server.id, real)), DEST)),
    ]
}

fn any_protocol() -> impl Strategy<Value = Protocol> {
    any::<u8>().prop_map(|number| match number {
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        132 => Protocol::Sctp,
        other => Protocol::Other(other.into()),
    })
}

fn any_id() -> impl Strategy<Value = VirtualServerId> {
    let family = select(vec![Family::Ipv4, Family::Ipv6]);
    prop_oneof![
        (prop_oneof![Just(Protocol::Tcp), any_protocol()], any::<SocketAddr>())
            .prop_map(|(protocol, address)| VirtualServerId::address(protocol, address)),
        (any::<NonZeroU32>(), family).prop_map(|(mark, family)| VirtualServerId::FirewallMark { mark, family }),
    ]
}

fn any_name() -> impl Strategy<Value = Name> {
    "[a-z_]{1,15}".prop_map(|name| name.parse().unwrap())
}

fn any_server() -> impl Strategy<Value = VirtualServer> {
    let scheduler =
        prop_oneof![select(Scheduler::ALL.to_vec()), any_name().prop_map(|name| name.as_str().parse().unwrap()),];
    let flags = vec(select(vec![SchedulerFlags::FLAG_1, SchedulerFlags::FLAG_2, SchedulerFlags::FLAG_3]), 0..4)
        .prop_map(|flags| flags.into_iter().fold(SchedulerFlags::NONE, SchedulerFlags::union));
    let persistence = (option::of(any::<u32>()), option::of(any_name()));
    (any_id(), scheduler, flags, persistence, any::<u32>(), any::<bool>()).prop_map(
        |(id, scheduler, scheduler_flags, (persistence, engine), mask, one_packet)| VirtualServer {
            id,
            scheduler,
            scheduler_flags,
            persistence: persistence.map(|timeout| Persistence {
                timeout,
                netmask: match id.family() {
                    Family::Ipv4 => Netmask::V4(mask.into()),
                    Family::Ipv6 => Netmask::V6(mask.to_ne_bytes()[0]),
                },
            }),
            engine,
            one_packet,
        },
    )
}

fn any_tunnel() -> impl Strategy<Value = Tunnel> {
    let checksum = select(vec![GueChecksum::None, GueChecksum::Udp, GueChecksum::Remote]);
    prop_oneof![
        Just(Tunnel::IpIp),
        (any::<NonZeroU16>(), checksum).prop_map(|(port, checksum)| Tunnel::Gue { port, checksum }),
        any::<bool>().prop_map(|checksum| Tunnel::Gre { checksum }),
        // What none of the others is, whatever the rest.
        (3_u8.., any::<u16>(), any::<u16>()).prop_map(|(kind, port, flags)| Tunnel::Other { kind, port, flags }),
        (0_u8..3, 4_u16.., any::<u16>()).prop_map(|(kind, flags, port)| Tunnel::Other { kind, port, flags }),
    ]
}

fn any_daemon() -> impl Strategy<Value = SyncDaemon> {
    let role = select(vec![SyncRole::Master, SyncRole::Backup]);
    let numbers = (any::<Option<NonZeroU16>>(), any::<Option<NonZeroU16>>(), any::<Option<NonZeroU8>>());
    (role, any_name(), any::<u8>(), any::<Option<IpAddr>>(), numbers).prop_map(
        |(role, interface, sync_id, group, (max_length, port, ttl))| SyncDaemon {
            sync_id,
            max_length,
            group,
            port,
            ttl,
            ..SyncDaemon::new(role, interface)
        },
    )
}

fn any_real() -> impl Strategy<Value = RealServer> {
    use Forwarding::{Bypass, DirectRoute, Local, Masquerade};
    let forwarding =
        prop_oneof![select(vec![Masquerade, Local, DirectRoute, Bypass]), any_tunnel().prop_map(Forwarding::Tunnel),];
    (any::<SocketAddr>(), forwarding, any::<[u32; 3]>()).prop_map(|(address, forwarding, [weight, upper, lower])| {
        RealServer { forwarding, weight, upper_threshold: upper, lower_threshold: lower, ..RealServer::new(address) }
    })
}

fn any_request() -> impl Strategy<Value = Message> {
    prop_oneof![
        any_server().prop_map(Message::AddVirtualServer),
        any_server().prop_map(Message::SetVirtualServer),
        any_id().prop_map(Message::DeleteVirtualServer),
        any_id().prop_map(Message::GetVirtualServer),
        any_id().prop_map(Message::ListRealServers),
        (any_id(), any_real()).prop_map(|(id, real)| Message::AddRealServer(id, real)),
        (any_id(), any_real()).prop_map(|(id, real)| Message::SetRealServer(id, real)),
        (any_id(), any::<SocketAddr>()).prop_map(|(id, address)| Message::DeleteRealServer(id, address)),
        any::<[u32; 3]>().prop_map(|[tcp, tcp_fin, udp]| Message::SetTimeouts(Timeouts { tcp, tcp_fin, udp })),
        any_daemon().prop_map(Message::StartSyncDaemon),
        select(vec![SyncRole::Master, SyncRole::Backup]).prop_map(Message::StopSyncDaemon),
        any_id().prop_map(Message::ZeroVirtualServer),
        select(vec![
            Message::ListVirtualServers,
            Message::ListSyncDaemons,
            Message::GetTimeouts,
            Message::GetInfo,
            Message::Zero,
            Message::Flush,
        ]),
    ]
}

proptest! {
    #[test]
    fn a_virtual_server_comes_back_as_it_went(server in any_server()) {
        let Message::VirtualServer(entry) = parse(NEW_SERVICE, &emit(Message::AddVirtualServer(server))).unwrap()
        else { panic!("not a virtual server") };
        prop_assert_eq!(entry.server, server);
        prop_assert_eq!(entry.stats, Stats::default());
    }

    #[test]
    fn a_real_server_comes_back_as_it_went(id in any_id(), real in any_real()) {
        let Message::RealServer(entry) = parse(NEW_DEST, &emit(Message::AddRealServer(id, real))).unwrap()
        else { panic!("not a real server") };
        prop_assert_eq!(entry.server, real);
        prop_assert!(entry.is_idle() && entry.persistent_connections == 0);
    }

    #[test]
    fn a_synchronization_daemon_comes_back_as_it_went(daemon in any_daemon()) {
        let answer = parse(NEW_DAEMON, &emit(Message::StartSyncDaemon(daemon))).unwrap();
        prop_assert_eq!(answer, Message::SyncDaemon(daemon));
    }

    #[test]
    fn timeouts_come_back_as_they_went(tcp in any::<u32>(), tcp_fin in any::<u32>(), udp in any::<u32>()) {
        let timeouts = Timeouts { tcp, tcp_fin, udp };
        let answer = parse(SET_CONFIG, &emit(Message::SetTimeouts(timeouts))).unwrap();
        prop_assert_eq!(answer, Message::Timeouts(timeouts));
    }

    #[test]
    fn the_length_is_that_of_what_is_written_and_every_byte_is(request in any_request()) {
        let [zeros, ones] = [0, 0xff].map(|fill| {
            let mut bytes = vec![fill; request.buffer_len()];
            request.emit(&mut bytes);
            bytes
        });
        prop_assert_eq!(&zeros, &ones);
        let written: usize = attributes(&zeros).iter().map(|(_, value)| 4 + value.len().next_multiple_of(4)).sum();
        prop_assert_eq!(written, zeros.len());
    }

    #[test]
    fn arbitrary_bytes_are_decoded_or_refused(command in 0_u8..20, bytes in vec(any::<u8>(), 0..300)) {
        let _ = parse(command, &bytes);
    }

    /// Bytes that get past the first checks.
    #[test]
    fn damaged_messages_are_decoded_or_refused(
        request in any_request(),
        command in select(vec![NEW_SERVICE, NEW_DEST, NEW_DAEMON, SET_CONFIG, SET_INFO]),
        changes in vec((any::<Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = emit(request);
        for (index, value) in changes {
            if !bytes.is_empty() {
                let index = index.index(bytes.len());
                bytes[index] = value;
            }
        }
        let _ = parse(command, &bytes);
    }
}

#[test]
fn unknown_attributes_are_skipped() {
    for (command, nest, known) in listed() {
        let unknown = (999, vec![1, 2, 3]);
        let mut more = vec![unknown.clone(), (200, Vec::new())];
        more.extend(known.clone());
        more.push(unknown.clone());
        let bytes = join(&[unknown.clone(), (nest, join(&more)), unknown]);
        let plain = parse(command, &attribute(nest, &join(&known))).unwrap();
        assert_eq!(parse(command, &bytes).unwrap(), plain);
    }
}

#[test]
fn what_identifies_a_server_must_be_there() {
    for ((command, nest, all), mandatory) in listed().into_iter().zip([&[1, 2, 3, 4, SCHED_NAME][..], &[1, 2, 11]]) {
        for (left_out, _) in &all {
            let rest: Vec<_> = all.iter().filter(|(kind, _)| kind != left_out).cloned().collect();
            let parsed = parse(command, &attribute(nest, &join(&rest)));
            assert_eq!(parsed.is_err(), mandatory.contains(left_out), "{command}: {left_out}: {parsed:?}");
        }
        let error = parse(command, &[]).unwrap_err();
        assert_eq!(error.to_string(), format!("an answer lacks its attribute {nest}"));
    }
}

#[test]
fn a_short_value_is_an_error() {
    for (command, nest, all) in listed() {
        for (index, (kind, _)) in all.iter().enumerate() {
            let mut short = all.clone();
            short[index].1.pop();
            let parsed = parse(command, &attribute(nest, &join(&short)));
            // The kernel may leave out the NUL of a string.
            let may_be = (command, *kind) == (NEW_SERVICE, SCHED_NAME);
            assert_eq!(parsed.is_ok(), may_be, "{command}: {kind}: {parsed:?}");
        }
    }
}

#[test]
fn a_message_that_ends_early_is_an_error() {
    for (command, nest, all) in listed() {
        let bytes = attribute(nest, &join(&all));
        for end in 0..bytes.len() {
            assert!(parse(command, &bytes[..end]).is_err(), "{command}: {end} of {} bytes", bytes.len());
        }
    }
}

#[test]
fn values_that_no_kernel_lists_are_errors() {
    let [(_, _, service), (_, _, dest)] = listed();
    let changed = |all: &[(u16, Vec<u8>)], kind, value: &[u8]| {
        let mut all = all.to_vec();
        all.iter_mut().find(|(found, _)| *found == kind).unwrap().1 = value.to_vec();
        join(&all)
    };
    let family_7 = 7_u16.to_ne_bytes();
    let service_of = |kind, value: &[u8]| parse(NEW_SERVICE, &attribute(SERVICE, &changed(&service, kind, value)));
    let text = |result: Result<Message, DecodeError>| result.unwrap_err().to_string();
    assert_eq!(text(service_of(1, &family_7)), "address family 7 is neither IPv4 nor IPv6");
    assert!(text(service_of(SCHED_NAME, b"a_name_of_16_byt\0")).contains("cannot be a name in IPVS"));
    let ipv6_prefix = changed(&service, 9, &300_u32.to_ne_bytes());
    let ipv6 = [ipv6_prefix, attribute(1, &10_u16.to_ne_bytes())].concat();
    assert_eq!(text(parse(NEW_SERVICE, &attribute(SERVICE, &ipv6))), "an IPv6 prefix of 300 is out of range");
    let dest_of = |kind, value: &[u8]| parse(NEW_DEST, &attribute(DEST, &changed(&dest, kind, value)));
    assert_eq!(text(dest_of(11, &family_7)), "address family 7 is neither IPv4 nor IPv6");
    assert_eq!(text(parse(99, &[])), "command 99 is not known as an answer of IPVS");
}

/// `IPVS_STATS_ATTR_CONNS` and so on, counted up from `first`, with numbers of two widths.
fn stats(first: u64, wide: &[u16]) -> Vec<u8> {
    let numbers = (1..=10).zip(first..).flat_map(|(kind, number)| {
        if wide.contains(&kind) {
            // Padded to where a 64-bit number may stand.
            [attribute(11, &[]), attribute(kind, &number.to_ne_bytes())].concat()
        } else {
            attribute(kind, &u32::try_from(number).unwrap().to_ne_bytes())
        }
    });
    numbers.collect()
}

#[test]
fn statistics_are_read_in_64_bits_and_on_old_kernels_in_32() {
    const BIG: u64 = 1 << 40;
    let narrow = attribute(STATS, &stats(100, &[4, 5]));
    let wide = attribute(STATS64, &stats(BIG, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]));
    let [service, dest] = listed();
    for (extra, first) in
        [([&narrow[..], &wide[..]].concat(), BIG), ([&wide[..], &narrow[..]].concat(), BIG), (narrow.clone(), 100)]
    {
        let bytes = |nest, all: &[(u16, Vec<u8>)]| attribute(nest, &[join(all), extra.clone()].concat());
        let Message::VirtualServer(entry) = parse(NEW_SERVICE, &bytes(SERVICE, &service.2)).unwrap() else {
            panic!("not a virtual server")
        };
        let Message::RealServer(real) = parse(NEW_DEST, &bytes(DEST, &dest.2)).unwrap() else {
            panic!("not a real server")
        };
        assert_eq!(entry.stats, real.stats);
        let stats = entry.stats;
        let numbers = [
            stats.connections,
            stats.incoming_packets,
            stats.outgoing_packets,
            stats.incoming_bytes,
            stats.outgoing_bytes,
            stats.connection_rate,
            stats.incoming_packet_rate,
            stats.outgoing_packet_rate,
            stats.incoming_byte_rate,
            stats.outgoing_byte_rate,
        ];
        assert_eq!(numbers.to_vec(), (first..first + 10).collect::<Vec<_>>());
    }
}

#[test]
fn the_numbers_of_connections_are_read_each_from_its_own_attribute() {
    let [_, (_, _, mut dest)] = listed();
    dest.extend([(7, 70_u32), (8, 80), (9, 90)].map(|(kind, number)| (kind, number.to_ne_bytes().to_vec())));
    let Message::RealServer(entry) = parse(NEW_DEST, &attribute(DEST, &join(&dest))).unwrap() else {
        panic!("not a real server")
    };
    assert_eq!((entry.active_connections, entry.inactive_connections, entry.persistent_connections), (70, 80, 90));
    assert!(!entry.is_idle());
}

#[test]
fn the_version_is_read() {
    let bytes = [attribute(1, &0x01_02_03_u32.to_ne_bytes()), attribute(2, &4096_u32.to_ne_bytes())].concat();
    let Message::Info(info) = parse(SET_INFO, &bytes).unwrap() else { panic!("not about IPVS itself") };
    assert_eq!((info.version, info.connection_table_size), ((1, 2, 3), 4096));
}

#[test]
fn names_are_1_to_15_bytes_long() {
    for scheduler in Scheduler::ALL {
        assert_eq!(scheduler.name().parse(), Ok(scheduler));
    }
    let long: Scheduler = "a_name_of_15_by".parse().unwrap();
    assert_eq!(long.to_string(), "a_name_of_15_by");
    for invalid in ["", "a_name_of_16_byt", "r\0r"] {
        let error = invalid.parse::<Scheduler>().unwrap_err().to_string();
        assert_eq!(error, format!("{invalid:?} cannot be a name in IPVS: 1 to 15 bytes without NUL can"));
    }
}

#[test]
fn an_ipv6_address_that_maps_an_ipv4_one_stays_an_ipv6_address() {
    let mapped: IpAddr = "::ffff:10.0.0.1".parse().unwrap();
    let server = server(Protocol::Tcp, "[::ffff:10.0.0.1]:80", Scheduler::RoundRobin);
    let Message::VirtualServer(entry) = parse(NEW_SERVICE, &emit(Message::AddVirtualServer(server))).unwrap() else {
        panic!("not a virtual server")
    };
    assert!(matches!(entry.server.id, VirtualServerId::Address { address, .. } if address == mapped));
}
