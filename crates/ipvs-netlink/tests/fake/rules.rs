//! The rules of the fake, without a kernel.

use std::net::SocketAddr;
use std::num::{NonZeroU8, NonZeroU16, NonZeroU32};

use ipvs_netlink::fake::{Interface, Ipvs, Kernel, Traffic};
use ipvs_netlink::{
    ErrorKind, Family, Forwarding, Message, Netmask, Persistence, Protocol, RealServer, Scheduler, SyncDaemon,
    SyncRole, Timeouts, Tunnel, VirtualServer, VirtualServerId,
};

use crate::common::{real, round_robin, tcp};
use crate::coverage::outcome;
use crate::operations::{ADDRESSES, INTERFACE};

const TUNNEL: Forwarding = Forwarding::Tunnel(Tunnel::IpIp);

fn daemon(role: SyncRole, interface: &str, group: &str) -> SyncDaemon {
    SyncDaemon { group: group.parse().ok(), ..SyncDaemon::new(role, interface.parse().unwrap()) }
}

fn scheduled(id: &str, scheduler: &str) -> VirtualServer {
    VirtualServer::new(tcp(id), Scheduler::Other(scheduler.parse().unwrap()))
}

fn persistent(id: &str, netmask: Netmask, engine: Option<&str>) -> VirtualServer {
    let engine = engine.map(|engine| engine.parse().unwrap());
    VirtualServer { persistence: Some(Persistence { timeout: 60, netmask }), engine, ..round_robin(tcp(id)) }
}

const WEB: &str = "10.96.0.1:80";
const WEB6: &str = "[fd00:96::1]:80";
const NONE: &str = "10.96.0.9:80";
const NONE6: &str = "[fd00:96::9]:80";

/// The messages that are applied before each case.
pub(crate) fn initial_messages() -> Vec<Message> {
    vec![
        Message::AddVirtualServer(round_robin(tcp(WEB))),
        Message::AddVirtualServer(round_robin(tcp(WEB6))),
        Message::AddRealServer(tcp(WEB), real("10.1.0.7:80")),
        Message::AddRealServer(tcp(WEB6), real("[fd00:1::7]:80")),
        Message::StartSyncDaemon(daemon(SyncRole::Backup, "lo", "")),
    ]
}

/// Messages, and what comes of them. Many are wrong in two ways: what is told is what is looked at first.
pub(crate) fn cases() -> Vec<(Message, &'static str)> {
    let (web, web6) = (tcp(WEB), tcp(WEB6));
    let host = Netmask::host;
    let mut cases = virtual_server_cases();
    let add = |address, wrong: fn(&mut RealServer)| {
        let mut server = real(address);
        wrong(&mut server);
        server
    };
    let mixed = |server: &mut RealServer| server.forwarding = TUNNEL;
    let heavy = |server: &mut RealServer| server.weight = 1 << 31;
    let low = |server: &mut RealServer| server.lower_threshold = 1;
    let no_port = |server: &mut RealServer| {
        server.forwarding = Forwarding::Tunnel(Tunnel::Other { kind: 1, port: 0, flags: 0 });
    };
    for (id, server, added, set) in [
        (web, add("10.1.0.8:80", |_| {}), "ok", "ENOENT"),
        (web, add("10.1.0.7:80", |_| {}), "EEXIST", "ok"),
        (web, add("10.1.0.7:80", |server| server.weight = i32::MAX.unsigned_abs()), "EEXIST", "ok"),
        (web, add("10.1.0.7:80", heavy), "ERANGE", "ERANGE"),
        (web, add("10.1.0.7:80", low), "ERANGE", "ERANGE"),
        (web, add("10.1.0.7:80", no_port), "EINVAL", "EINVAL"),
        (web, add("224.0.0.1:80", heavy), "ERANGE", "ERANGE"),
        (web, add("224.0.0.1:80", |_| {}), "EINVAL", "ENOENT"),
        (web, add("10.9.0.255:80", |_| {}), "EINVAL", "ENOENT"),
        (web, add("10.9.0.1:80", |_| {}), "ok", "ENOENT"),
        (web, add("240.0.0.1:80", |_| {}), "ok", "ENOENT"),
        (web6, add("[fd00:1::8]:80", |_| {}), "ok", "ENOENT"),
        (web6, add("[fe80::7]:80", |_| {}), "ok", "ENOENT"),
        (web6, add("[fe80::8]:80", |_| {}), "EINVAL", "ENOENT"),
        (web6, add("[::ffff:10.1.0.7]:80", |_| {}), "EINVAL", "ENOENT"),
        (web6, add("[::]:80", |_| {}), "EINVAL", "ENOENT"),
        // A daemon runs.
        (web, add("[fd00:1::7]:80", mixed), "EINVAL", "EINVAL"),
        (web, add("[fd00:1::7]:80", heavy), "EINVAL", "EINVAL"),
        (tcp(NONE), add("10.1.0.7:80", heavy), "ESRCH", "ESRCH"),
        (tcp(NONE6), add("10.1.0.7:80", mixed), "ESRCH", "ESRCH"),
    ] {
        cases.push((Message::AddRealServer(id, server), added));
        cases.push((Message::SetRealServer(id, server), set));
    }
    let delete = |id, address: &str| Message::DeleteRealServer(id, address.parse().unwrap());
    let timeouts = |tcp, tcp_fin, udp| Message::SetTimeouts(Timeouts { tcp, tcp_fin, udp });
    let start = |role, interface, group| Message::StartSyncDaemon(daemon(role, interface, group));
    cases.extend([
        (delete(web, "10.1.0.7:80"), "ok"),
        (delete(web, "10.1.0.7:81"), "ENOENT"),
        (delete(web, "224.0.0.1:80"), "ENOENT"),
        (delete(web, "[fd00:1::7]:80"), "ENOENT"),
        (delete(tcp(NONE), "10.1.0.7:80"), "ESRCH"),
        (Message::ZeroVirtualServer(web), "ok"),
        (Message::ZeroVirtualServer(tcp(NONE)), "ESRCH"),
        (Message::Zero, "ok"),
        (Message::Flush, "ok"),
        (timeouts(0, 0, 0), "ok"),
        (timeouts(1, 0, 2_147_483), "ok"),
        (timeouts(1, 21_474_837, 0), "EINVAL"),
        (timeouts(1, 0, u32::MAX), "EINVAL"),
        (start(SyncRole::Master, "lo", ""), "ok"),
        (start(SyncRole::Master, INTERFACE, "ff02::81"), "ok"),
        (start(SyncRole::Master, "lo", "ff02::81"), "ENETUNREACH"),
        (start(SyncRole::Master, "nosuch", "ff02::81"), "ENODEV"),
        (start(SyncRole::Backup, "nosuch", "10.0.0.1"), "EINVAL"),
        (start(SyncRole::Backup, "nosuch", "::ffff:224.0.0.1"), "EINVAL"),
        (start(SyncRole::Backup, "nosuch", ""), "ENODEV"),
        (start(SyncRole::Backup, "lo", ""), "EEXIST"),
        (Message::StopSyncDaemon(SyncRole::Master), "ESRCH"),
        // In a batch lists are no lists.
        (Message::ListVirtualServers, "EINVAL"),
        (Message::ListRealServers(web), "EOPNOTSUPP"),
        (Message::ListSyncDaemons, "EOPNOTSUPP"),
        (Message::GetTimeouts, "ok"),
        (Message::GetInfo, "ok"),
        // Answers that somebody sends.
        (Message::Timeouts(Timeouts { tcp: 1, tcp_fin: 1, udp: 1 }), "unsent"),
        (Message::SyncDaemon(daemon(SyncRole::Master, "lo", "")), "unsent"),
        (Message::Info(Ipvs::default().info()), "unsent"),
        (Message::AddVirtualServer(persistent(WEB6, host(Family::Ipv4), None)), "unsent"),
        (Message::SetVirtualServer(round_robin(web).persistent(Persistence::MAX_TIMEOUT + 1)), "unsent"),
    ]);
    cases
}

fn virtual_server_cases() -> Vec<(Message, &'static str)> {
    let prefix = Netmask::V6;
    let mut cases = Vec::new();
    for (server, added, set) in [
        (round_robin(tcp(NONE)), "ok", "ESRCH"),
        (round_robin(tcp(WEB)), "EEXIST", "ok"),
        (scheduled(WEB, "wrr"), "EEXIST", "ok"),
        (scheduled(WEB, "none"), "EEXIST", "ok"),
        (scheduled(WEB, "nosuch"), "EEXIST", "ENOENT"),
        (scheduled(NONE, "none"), "ok", "ESRCH"),
        (scheduled(NONE, "nosuch"), "ENOENT", "ESRCH"),
        (persistent(WEB6, prefix(0), Some("nosuch")), "EEXIST", "ENOENT"),
        (persistent(WEB6, prefix(0), Some("sip")), "EEXIST", "EINVAL"),
        (persistent(WEB6, prefix(128), Some("sip")), "EEXIST", "ok"),
        (persistent(NONE6, prefix(129), Some("nosuch")), "ENOENT", "ESRCH"),
        (persistent(NONE6, prefix(129), None), "EINVAL", "ESRCH"),
        (persistent(NONE6, prefix(0), None), "EINVAL", "ESRCH"),
        (persistent(NONE6, prefix(1), None), "ok", "ESRCH"),
        (persistent(NONE, Netmask::V4([1, 2, 3, 4].into()), None), "ok", "ESRCH"),
    ] {
        cases.push((Message::AddVirtualServer(server), added));
        cases.push((Message::SetVirtualServer(server), set));
    }
    let same = VirtualServerId::address(Protocol::Other(6), WEB.parse().unwrap());
    cases.extend([
        (Message::AddVirtualServer(round_robin(same)), "EEXIST"),
        (Message::DeleteVirtualServer(same), "ok"),
        (Message::DeleteVirtualServer(tcp(WEB6)), "ok"),
        (Message::DeleteVirtualServer(tcp(NONE)), "ESRCH"),
        (Message::GetVirtualServer(tcp(WEB)), "ok"),
        (Message::GetVirtualServer(tcp(NONE)), "ESRCH"),
    ]);
    cases
}

/// A kernel such as that of the lab, whose clock ticks a hundred times a second.
fn kernel() -> Kernel {
    let mut kernel = Kernel { ticks_per_second: NonZeroU32::new(100).unwrap(), ..Kernel::default() };
    kernel.addresses.extend(ADDRESSES.map(|(address, prefix)| (address.parse().unwrap(), prefix)));
    kernel.interfaces.insert(INTERFACE.parse().unwrap(), Interface { mtu: 1500, routes_ipv6_multicast: true });
    kernel
}

/// With one virtual server, and a real server that something goes through.
fn busy() -> (Ipvs, VirtualServerId, SocketAddr) {
    let mut ipvs = Ipvs::default();
    let (id, server) = (tcp(WEB), real("10.1.0.7:80"));
    ipvs.add_virtual_server(&round_robin(id)).unwrap();
    ipvs.add_real_server(&id, &server).unwrap();
    let traffic = ipvs.traffic_mut(&id, server.socket_address()).unwrap();
    *traffic = Traffic { active_connections: 2, ..Traffic::default() };
    traffic.stats.connections = 5;
    ipvs.stats_mut(&id).unwrap().connections = 5;
    (ipvs, id, server.socket_address())
}

#[test]
fn each_message_has_the_result_the_kernel_would_give() {
    let mut given_ipvs = Ipvs::new(kernel());
    for result in given_ipvs.apply(&initial_messages()) {
        result.unwrap();
    }
    for (message, expected) in cases() {
        let mut ipvs = given_ipvs.clone();
        assert_eq!(outcome(&ipvs.apply(&[message])[0]), expected, "{message:?}");
        assert!(expected == "ok" || ipvs == given_ipvs, "a refusal changed something: {message:?}");
    }
}

#[test]
fn without_ipv6_its_family_is_not_supported() {
    let mut ipvs = Ipvs::new(Kernel { ipv6: false, ..kernel() });
    ipvs.add_virtual_server(&round_robin(tcp(WEB))).unwrap();
    let tunnel = RealServer { forwarding: TUNNEL, ..real("[fd00:1::7]:80") };
    for message in [
        Message::AddVirtualServer(scheduled(WEB6, "nosuch")),
        Message::DeleteVirtualServer(tcp(WEB6)),
        Message::GetVirtualServer(tcp(WEB6)),
        Message::AddRealServer(tcp(WEB6), real("10.1.0.7:80")),
        Message::AddRealServer(tcp(WEB), tunnel),
        Message::DeleteRealServer(tcp(WEB), tunnel.socket_address()),
        Message::StartSyncDaemon(daemon(SyncRole::Backup, "lo", "ff02::81")),
    ] {
        let result = ipvs.apply(&[message]).remove(0);
        assert_eq!(outcome(&result), "EAFNOSUPPORT", "{message:?}");
        assert_eq!(result.unwrap_err().kind(), ErrorKind::NotSupported);
    }
    assert_eq!(ipvs.real_servers(&tcp(WEB6)), []);
}

#[test]
fn daemons_and_tunnels_to_the_other_family_exclude_each_other() {
    let mut ipvs = Ipvs::default();
    let (id, tunnel) = (tcp(WEB), RealServer { forwarding: TUNNEL, ..real("[fd00:1::7]:80") });
    let master = daemon(SyncRole::Master, "lo", "");
    ipvs.add_virtual_server(&round_robin(id)).unwrap();
    assert_eq!(outcome(&ipvs.add_real_server(&id, &real("[fd00:1::7]:80"))), "EINVAL");
    ipvs.add_real_server(&id, &tunnel).unwrap();
    assert_eq!(outcome(&ipvs.start_sync_daemon(&master)), "EINVAL");
    // Such a real server goes with its virtual server.
    ipvs.delete_virtual_server(&id).unwrap();
    ipvs.start_sync_daemon(&master).unwrap();
    ipvs.add_virtual_server(&round_robin(id)).unwrap();
    assert_eq!(outcome(&ipvs.add_real_server(&id, &tunnel)), "EINVAL");
    ipvs.stop_sync_daemon(SyncRole::Master).unwrap();
    ipvs.add_real_server(&id, &tunnel).unwrap();
}

#[test]
fn daemons_are_listed_with_what_the_kernel_chose() {
    let mut ipvs = Ipvs::new(kernel());
    ipvs.start_sync_daemon(&daemon(SyncRole::Backup, "lo", "")).unwrap();
    ipvs.start_sync_daemon(&daemon(SyncRole::Master, INTERFACE, "ff02::81")).unwrap();
    let listed = |daemon, group: &str, length| SyncDaemon {
        max_length: NonZeroU16::new(length),
        group: group.parse().ok(),
        port: NonZeroU16::new(8848),
        ttl: NonZeroU8::new(1),
        ..daemon
    };
    let master = listed(daemon(SyncRole::Master, INTERFACE, ""), "ff02::81", 1452);
    let backup = listed(daemon(SyncRole::Backup, "lo", ""), "224.0.0.81", 65_507);
    assert_eq!(ipvs.sync_daemons(), [master, backup]);
}

#[test]
fn values_are_listed_as_the_kernel_keeps_them() {
    let mut ipvs = Ipvs::new(kernel());
    let id = VirtualServerId::address(Protocol::Other(6), WEB.parse().unwrap());
    let server = VirtualServer { id, ..scheduled(WEB, "rr") }.persistent(Persistence::MAX_TIMEOUT);
    ipvs.add_virtual_server(&server).unwrap();
    let other = Forwarding::Other(10);
    ipvs.add_real_server(&id, &RealServer { forwarding: other, ..real("10.1.0.7:80") }).unwrap();
    ipvs.add_real_server(&id, &real("10.1.0.8:80")).unwrap();
    assert_eq!(ipvs.virtual_server(&id).unwrap().server, server);
    let listed: Vec<_> = ipvs.real_servers(&id).iter().map(|entry| entry.server).collect();
    assert_eq!(listed, [real("10.1.0.8:80"), RealServer { forwarding: TUNNEL, ..real("10.1.0.7:80") }]);
}

#[test]
fn a_request_is_answered_with_what_a_kernel_would_list() {
    let (mut ipvs, id, _) = busy();
    let (entry, reals) = (ipvs.virtual_server(&id).unwrap(), ipvs.real_servers(&id));
    for (request, answers) in [
        (Message::GetVirtualServer(id), vec![Message::VirtualServer(entry)]),
        (Message::ListVirtualServers, vec![Message::VirtualServer(entry)]),
        (Message::ListRealServers(id), vec![Message::RealServer(reals[0])]),
        (Message::ListRealServers(tcp(NONE)), vec![]),
        (Message::ListSyncDaemons, vec![]),
        (Message::GetTimeouts, vec![Message::Timeouts(Timeouts { tcp: 900, tcp_fin: 120, udp: 300 })]),
        (Message::GetInfo, vec![Message::Info(ipvs.info())]),
        (Message::Flush, vec![]),
    ] {
        assert_eq!(ipvs.handle(&request).unwrap(), answers);
    }
    assert_eq!(ipvs.info().version, (1, 2, 1));
    let fault = Message::AddVirtualServer(persistent(WEB, Netmask::V6(128), None));
    let refusal = ipvs.handle(&fault).unwrap_err();
    assert_eq!((refusal.errno, refusal.message.is_some()), (22, true));
}

#[test]
fn zeroing_begins_counters_anew_and_leaves_connections() {
    let (mut ipvs, id, address) = busy();
    let (mut all, mut one) = (ipvs.clone(), ipvs.clone());
    all.zero();
    one.zero_virtual_server(&id).unwrap();
    assert_eq!(all, one);
    assert_eq!(one.virtual_server(&id).unwrap().stats.connections, 0);
    assert_eq!(*one.traffic_mut(&id, address).unwrap(), Traffic { active_connections: 2, ..Traffic::default() });
    assert_ne!(ipvs.stats_mut(&id).unwrap().connections, 0);
}

#[test]
fn a_real_server_that_comes_again_has_its_connections_again() {
    let (ipvs, id, address) = busy();
    let again = |mut ipvs: Ipvs| {
        ipvs.add_real_server(&id, &RealServer::new(address)).unwrap();
        let entry = ipvs.real_servers(&id)[0];
        (entry.active_connections, entry.stats.connections)
    };
    let mut deleted = ipvs.clone();
    deleted.delete_real_server(&id, address).unwrap();
    assert_eq!(again(deleted.clone()), (2, 5));
    deleted.empty_trash();
    assert_eq!(again(deleted), (0, 0));
    // With a new virtual server counters begin anew.
    let mut deleted = ipvs;
    deleted.delete_virtual_server(&id).unwrap();
    deleted.add_virtual_server(&round_robin(id)).unwrap();
    assert_eq!(deleted.real_servers(&id), []);
    assert_eq!(again(deleted), (2, 0));
}
