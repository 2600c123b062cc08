//! The client against a kernel: in the lab, but for the one test that is about a kernel without IPVS.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU8, NonZeroU16};
use std::sync::mpsc::{self, TryRecvError};
use std::thread;

use common::{ExclusiveClient, client, real, round_robin, run, tcp};
use ipvs_netlink::{
    Client, Error, ErrorKind, EstimationFeatures, Family, Forwarding, GueChecksum, Message, Netmask, Persistence,
    Protocol, RealServer, Scheduler, SchedulerFlags, StatsWidth, SyncDaemon, SyncRole, Table, Timeouts, Tunnel,
    TunnelFeatures, VirtualServer, VirtualServerId,
};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

/// 10.96.x.y:80, one for each number.
fn numbered(number: u32) -> VirtualServerId {
    let address = SocketAddr::new(IpAddr::V4((0x0a60_0000 + number).into()), 80);
    VirtualServerId::address(Protocol::Tcp, address)
}

fn identities(client: &mut Client) -> Vec<VirtualServerId> {
    client.virtual_servers().unwrap().iter().map(|entry| entry.server.id).collect()
}

fn assert_error(error: &Error, kind: ErrorKind, text: &str) {
    assert_eq!(error.kind(), kind, "{error}");
    assert_eq!(error.to_string(), text);
}

#[test]
fn connecting_finds_ipvs_or_says_how_to_get_it() {
    match Client::connect() {
        Ok(_) => assert!(std::path::Path::new("/proc/net/ip_vs").exists(), "there is no IPVS to connect to"),
        Err(error) => assert_error(
            &error,
            ErrorKind::NotSupported,
            "cannot connect to IPVS: No such file or directory (os error 2): this kernel has no IPVS: load it with \
             `modprobe ip_vs` (CONFIG_IP_VS)",
        ),
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_version_and_the_size_of_the_table_are_those_ipvsadm_tells() {
    let info = client().info().unwrap();
    let (major, minor, patch) = info.version;
    let line = format!("IP Virtual Server version {major}.{minor}.{patch} (size={})", info.connection_table_size);
    assert_eq!(run("ipvsadm -Ln").lines().next(), Some(line.as_str()));
}

/// A client in a namespace that has had a virtual server: where tables can be resized, they are made with the first.
fn client_with_tables() -> ExclusiveClient {
    let mut client = client();
    client.add_virtual_server(&round_robin(tcp("10.96.0.1:80"))).unwrap();
    client.flush().unwrap();
    client
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_kernel_is_asked_what_it_can_do_and_nothing_of_it_stays() {
    let mut client = client_with_tables();
    let nosuch: Scheduler = "nosuch".parse().unwrap();
    let asked: Vec<Scheduler> = Scheduler::ALL.into_iter().chain([nosuch, "none".parse().unwrap()]).collect();
    let features = client.features(&asked).unwrap();
    assert_eq!(features.info, client.info().unwrap());
    // `twos` came with Linux 5.11, and Debian 12 does not build it.
    let optional = Scheduler::PowerOfTwoChoices;
    let missing =
        asked.into_iter().filter(|scheduler| !features.schedulers.contains(scheduler) && *scheduler != optional);
    assert_eq!(missing.collect::<Vec<_>>(), [nosuch]);
    assert!(client.has_scheduler(Scheduler::MaglevHashing).unwrap() && !client.has_scheduler(nosuch).unwrap());
    assert!(features.sip && features.ipv6);
    assert_eq!((features.stats, features.tunnels), (StatsWidth::Bits64, TunnelFeatures::GueAndGre));
    let has = |name: &str| std::path::Path::new("/proc/sys/net/ipv4/vs").join(name).exists();
    let estimation = match (has("run_estimation"), has("est_cpulist")) {
        (false, _) => EstimationFeatures::AlwaysOn,
        (true, false) => EstimationFeatures::Switch,
        (true, true) => EstimationFeatures::Threads,
    };
    assert_eq!((features.estimation, features.resizable_tables), (estimation, has("svc_lfactor")));
    assert_eq!(run("ipvsadm -Sn"), "");

    // Whatever schedulers are asked for.
    let others = client.features(&[nosuch]).unwrap();
    assert_eq!(others.schedulers, []);
    assert_eq!((others.sip, others.stats, others.tunnels), (true, StatsWidth::Bits64, TunnelFeatures::GueAndGre));

    // Also where there is a real server to look at, and the mark that would be taken is in use.
    for family in [Family::Ipv4, Family::Ipv6] {
        client.add_virtual_server(&round_robin(VirtualServerId::firewall_mark(u32::MAX, family).unwrap())).unwrap();
    }
    client.add_virtual_server(&round_robin(tcp("10.96.0.1:80"))).unwrap();
    client.add_real_server(&tcp("10.96.0.1:80"), &real("10.1.0.7:80")).unwrap();
    let table = client.table().unwrap();
    assert_eq!(client.features(&features.schedulers).unwrap(), features);
    assert_eq!(client.table().unwrap(), table);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_kernel_is_asked_what_it_can_do_while_others_ask_and_change_things() {
    let mut client = client_with_tables();
    let features = client.features(&Scheduler::ALL).unwrap();
    thread::scope(|scope| {
        let asking: Vec<_> = (0..2)
            .map(|_| {
                let features = &features;
                scope.spawn(move || {
                    let mut client = Client::connect().unwrap();
                    for _ in 0..100 {
                        assert_eq!(client.features(&Scheduler::ALL).unwrap(), *features);
                    }
                })
            })
            .collect();
        let (add, delete) = ([1, 2, 3].map(numbered).map(round_robin), [1, 2, 3].map(numbered));
        while !asking.iter().all(thread::ScopedJoinHandle::is_finished) {
            assert!(client.apply(&add.map(Message::AddVirtualServer)).unwrap().iter().all(Result::is_ok));
            assert!(client.apply(&delete.map(Message::DeleteVirtualServer)).unwrap().iter().all(Result::is_ok));
        }
    });
    assert_eq!(client.virtual_servers().unwrap(), []);
}

/// Never torn: with the real servers it had.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_virtual_server_that_is_deleted_while_it_is_read_is_left_out() {
    let mut client = client();
    let full: Table =
        (0..50).map(|number| (round_robin(numbered(number)), vec![real("10.1.0.7:80"), real("10.1.0.8:80")])).collect();
    let (make, unmake) = (Table::default().changes_to(&full), full.changes_to(&Table::default()));
    for _ in 0..50 {
        assert!(client.apply(&make).unwrap().iter().all(Result::is_ok));
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut other = Client::connect().unwrap();
                for message in &unmake {
                    other.apply(&[*message]).unwrap().remove(0).unwrap();
                }
            });
            for server in client.servers().unwrap() {
                assert_eq!(server.unwrap().real_servers.len(), 2);
            }
        });
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn servers_are_listed_one_by_one_with_their_real_servers() {
    let mut client = client();
    let wanted: Table = (0..300)
        .map(|number| {
            let hosts = (0..number % 13).map(|host| real(&format!("10.1.0.{}:80", host + 1)));
            (round_robin(numbered(number)), hosts.collect())
        })
        .collect();
    for result in client.apply(&Table::default().changes_to(&wanted)).unwrap() {
        result.unwrap();
    }
    assert_eq!(client.table().unwrap(), wanted);
    // One that goes before its turn is left out; all others come.
    let mut other = Client::connect().unwrap();
    let mut servers = client.servers().unwrap();
    let first = servers.next().unwrap().unwrap().virtual_server.server.id;
    let gone = (0..300).map(numbered).filter(|id| *id != first).take(100);
    let deletions: Vec<_> = gone.map(Message::DeleteVirtualServer).collect();
    assert!(other.apply(&deletions).unwrap().iter().all(Result::is_ok));
    assert_eq!(servers.map(Result::unwrap).count(), 199);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn synchronization_daemons_start_are_listed_and_stop() {
    let mut client = client();
    run("ip link set lo up multicast on");
    let lo = "lo".parse().unwrap();
    let master = SyncDaemon {
        sync_id: 7,
        group: Some("224.0.0.99".parse().unwrap()),
        port: NonZeroU16::new(9000),
        ttl: NonZeroU8::new(3),
        max_length: NonZeroU16::new(1400),
        ..SyncDaemon::new(SyncRole::Master, lo)
    };
    client.start_sync_daemon(&master).unwrap();
    client.start_sync_daemon(&SyncDaemon::new(SyncRole::Backup, lo)).unwrap();
    let daemons = client.sync_daemons().unwrap();
    assert_eq!(daemons[0], master);
    let backup = daemons[1];
    assert_eq!((backup.role, backup.interface.as_str(), backup.sync_id), (SyncRole::Backup, "lo", 0));
    // What the kernel chose; the length is what fits the interface.
    let chosen = (backup.group, backup.port.map(NonZeroU16::get), backup.ttl.map(NonZeroU8::get));
    assert_eq!(chosen, (Some("224.0.0.81".parse().unwrap()), Some(8848), Some(1)));
    let listed = run("ipvsadm -Ln --daemon");
    assert!(
        listed.contains("master sync daemon (mcast=lo, syncid=7, maxlen=1400, group=224.0.0.99, port=9000, ttl=3)"),
        "{listed}"
    );
    assert!(listed.contains("backup sync daemon (mcast=lo, syncid=0"), "{listed}");

    let error = client.start_sync_daemon(&master).unwrap_err();
    assert_error(
        &error,
        ErrorKind::Exists,
        "cannot start synchronization daemon master on lo: File exists (os error 17)",
    );
    let missing = SyncDaemon::new(SyncRole::Backup, "nosuch".parse().unwrap());
    assert_error(
        &client.start_sync_daemon(&missing).unwrap_err(),
        ErrorKind::NotFound,
        "cannot start synchronization daemon backup on nosuch: No such device (os error 19): this network namespace has no \
         such interface",
    );
    client.stop_sync_daemon(SyncRole::Master).unwrap();
    client.stop_sync_daemon(SyncRole::Backup).unwrap();
    assert_eq!(client.sync_daemons().unwrap(), []);
    assert_error(
        &client.stop_sync_daemon(SyncRole::Master).unwrap_err(),
        ErrorKind::NotFound,
        "cannot stop synchronization daemon master: No such process (os error 3): none runs",
    );
    lab::link::add_dummy("eth9", &[]).unwrap();
    let interface = "eth9".parse().unwrap();
    let ipv6 = SyncDaemon { group: Some("ff02::51".parse().unwrap()), ..SyncDaemon::new(SyncRole::Master, interface) };
    client.start_sync_daemon(&ipv6).unwrap();
    assert_eq!(client.sync_daemons().unwrap()[0].group, ipv6.group);
    client.stop_sync_daemon(SyncRole::Master).unwrap();
}

/// The kernel gives no answer when it stops a daemon whose thread has not begun.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_daemon_that_is_stopped_at_once_keeps_nobody_waiting() {
    let mut client = client();
    run("ip link set lo up multicast on");
    let daemon = SyncDaemon::new(SyncRole::Backup, "lo".parse().unwrap());
    let both = [Message::StartSyncDaemon(daemon), Message::StopSyncDaemon(SyncRole::Backup)];
    for _ in 0..20 {
        client.start_sync_daemon(&daemon).unwrap();
        client.stop_sync_daemon(SyncRole::Backup).unwrap();
        assert!(client.apply(&both).unwrap().iter().all(Result::is_ok));
        assert_eq!(client.sync_daemons().unwrap(), []);
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn tunnels_and_persistence_engines_are_kept_as_they_were_set() {
    let mut client = client();
    let dns = VirtualServerId::address(Protocol::Udp, "10.96.0.1:5060".parse().unwrap());
    let server = VirtualServer { engine: Some("sip".parse().unwrap()), ..round_robin(dns) };
    client.add_virtual_server(&server).unwrap();
    assert_eq!(client.virtual_server(&dns).unwrap().server, server);
    client.set_virtual_server(&server.persistent(60)).unwrap();
    assert_eq!(client.virtual_server(&dns).unwrap().server, server.persistent(60));
    // What is not wanted any more goes.
    client.set_virtual_server(&round_robin(dns).persistent(30)).unwrap();
    assert_eq!(client.virtual_server(&dns).unwrap().server, round_robin(dns).persistent(30));

    let port = NonZeroU16::new(6080).unwrap();
    let checksums = [GueChecksum::None, GueChecksum::Udp, GueChecksum::Remote];
    let tunnels = checksums
        .map(|checksum| Tunnel::Gue { port, checksum })
        .into_iter()
        .chain([true, false].map(|checksum| Tunnel::Gre { checksum }))
        .chain([Tunnel::IpIp, Tunnel::Other { kind: 9, port: 7, flags: 0x100 }]);
    client.add_real_server(&dns, &real("10.1.0.7:5060")).unwrap();
    for tunnel in tunnels {
        let wanted = RealServer { forwarding: Forwarding::Tunnel(tunnel), ..real("10.1.0.7:5060") };
        client.set_real_server(&dns, &wanted).unwrap();
        assert_eq!(client.real_servers(&dns).unwrap()[0].server, wanted);
    }
    // Of a real server without a tunnel nothing of it is left.
    client.set_real_server(&dns, &real("10.1.0.7:5060")).unwrap();
    assert_eq!(client.real_servers(&dns).unwrap()[0].server, real("10.1.0.7:5060"));
}

/// Before anything is sent, so that the kernel does not make of it what was not meant.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_netmask_of_the_other_family_is_refused_alone() {
    let mut client = client();
    let netmask = Netmask::host(Family::Ipv6);
    let wrong = VirtualServer {
        persistence: Some(Persistence { netmask, ..Persistence::new(60, Family::Ipv4) }),
        ..round_robin(tcp("10.96.0.1:80"))
    };
    let text =
        "cannot add virtual server TCP 10.96.0.1:80: the netmask of its persistence is of the other address family";
    assert_error(&client.add_virtual_server(&wrong).unwrap_err(), ErrorKind::Invalid, text);
    let others = [round_robin(numbered(1)), round_robin(numbered(2))].map(Message::AddVirtualServer);
    let wrong = Message::AddVirtualServer(wrong);
    let results =
        client.apply(&[others[0], wrong, others[0], Message::Timeouts(Timeouts::default()), others[1]]).unwrap();
    let kinds: Vec<_> = results.iter().map(|result| result.as_ref().err().map(Error::kind)).collect();
    assert_eq!(kinds, [None, Some(ErrorKind::Invalid), Some(ErrorKind::Exists), Some(ErrorKind::Invalid), None]);
    assert_eq!(identities(&mut client).len(), 2);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn of_several_causes_an_error_names_the_one_that_applies() {
    let mut client = client();
    let (web, web6) = (tcp("10.96.0.1:80"), tcp("[fd00:96::1]:80"));
    for id in [web, web6] {
        client.add_virtual_server(&round_robin(id)).unwrap();
    }
    run("ip address add 10.9.0.1/24 dev lo");
    let tunnel = |address: &str| RealServer { forwarding: Forwarding::Tunnel(Tunnel::IpIp), ..real(address) };
    let no_port = Forwarding::Tunnel(Tunnel::Other { kind: 1, port: 0, flags: 0 });
    let not_unicast = "the address is not a unicast address";
    let link_local = "a link-local address has to be one of this network namespace's own";
    let other_family = "only a tunnel leads to a real server of the other address family";
    for (id, server, hint) in [
        (web, real("224.0.0.1:80"), not_unicast),
        (web, real("0.0.0.0:80"), not_unicast),
        (web, real("255.255.255.255:80"), not_unicast),
        (web, real("10.9.0.255:80"), "the address is the broadcast address of a network here"),
        (web6, real("[::]:80"), not_unicast),
        (web6, real("[::ffff:10.1.0.7]:80"), not_unicast),
        (web6, real("[ff02::1]:80"), not_unicast),
        (web6, real("[fe80::8]:80"), link_local),
        (web, real("[fd00:1::7]:80"), other_family),
        (web, real("[ff02::1]:80"), other_family),
        (web, tunnel("[fe80::8]:80"), link_local),
        (web, RealServer { forwarding: no_port, ..real("10.1.0.7:80") }, "generic UDP encapsulation needs a port"),
        (web, RealServer { weight: 1 << 31, ..real("224.0.0.1:80") }, "a weight is at most 2147483647"),
        (web, RealServer { lower_threshold: 1, ..real("10.1.0.7:80") }, "the lower threshold is at most the upper one"),
    ] {
        let text = client.add_real_server(&id, &server).unwrap_err().to_string();
        let (_, found) = text.split_once("): ").unwrap();
        assert!(found.starts_with(hint), "{server:?}: {text}");
    }

    run("ip link set lo up multicast on");
    let daemon = |group: &str| SyncDaemon {
        group: group.parse().ok(),
        ..SyncDaemon::new(SyncRole::Backup, "lo".parse().unwrap())
    };
    let text = client.start_sync_daemon(&daemon("10.0.0.1")).unwrap_err().to_string();
    assert!(text.ends_with("): the group is not a multicast address"), "{text}");
    client.add_real_server(&web, &tunnel("[fd00:1::7]:80")).unwrap();
    let text = client.start_sync_daemon(&daemon("")).unwrap_err().to_string();
    assert!(
        text.ends_with("no daemon runs while a tunnel leads to a real server of the other address family"),
        "{text}"
    );
    client.delete_virtual_server(&web).unwrap();
    client.add_virtual_server(&round_robin(web)).unwrap();
    client.start_sync_daemon(&daemon("")).unwrap();
    let text = client.add_real_server(&web, &tunnel("[fd00:1::7]:80")).unwrap_err().to_string();
    assert!(
        text.ends_with("no tunnel leads to the other address family while a synchronization daemon runs"),
        "{text}"
    );
    client.stop_sync_daemon(SyncRole::Backup).unwrap();
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_persistence_timeout_is_listed_as_set_or_refused() {
    let mut client = client();
    let (web, longest) = (tcp("10.96.0.1:80"), Persistence::MAX_TIMEOUT);
    client.add_virtual_server(&round_robin(web)).unwrap();
    for timeout in [0, 1, 2_678_400, longest - 1, longest] {
        let wanted = round_robin(web).persistent(timeout);
        client.set_virtual_server(&wanted).unwrap();
        let wanted = Table::from_iter([(wanted, Vec::new())]);
        assert_eq!(client.table().unwrap().changes_to(&wanted), [], "{timeout} s");
    }
    // From 2^32 ticks on, of which there are 100 to 1024 a second, the kernel would keep another timeout.
    let refused = "TCP 10.96.0.1:80: the timeout of its persistence is longer than 4194303 s";
    for timeout in [longest + 1, 4_294_968, 42_949_673, u32::MAX] {
        let server = round_robin(web).persistent(timeout);
        let error = client.set_virtual_server(&server).unwrap_err();
        assert_error(&error, ErrorKind::Invalid, &format!("cannot change virtual server {refused}"));
        let error = client.apply(&[Message::AddVirtualServer(server)]).unwrap().remove(0).unwrap_err();
        assert_error(&error, ErrorKind::Invalid, &format!("cannot add virtual server {refused}"));
    }
    assert_eq!(client.virtual_server(&web).unwrap().server, round_robin(web).persistent(longest));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn servers_come_change_and_go() {
    let mut client = client();
    let (web, other) = (tcp("10.96.0.1:80"), tcp("10.96.0.2:80"));
    assert_eq!(client.virtual_servers().unwrap(), []);
    let server = VirtualServer {
        persistence: Some(Persistence {
            netmask: Netmask::V4([255, 0, 0, 0].into()),
            ..Persistence::new(60, Family::Ipv4)
        }),
        scheduler_flags: SchedulerFlags::FLAG_1,
        ..round_robin(web)
    };
    client.add_virtual_server(&server).unwrap();
    client.add_virtual_server(&round_robin(other)).unwrap();
    for address in ["10.1.0.7:80", "10.1.0.8:80"] {
        client.add_real_server(&web, &real(address)).unwrap();
    }

    // What is no longer wanted is taken away, not only what is wanted added.
    client.set_virtual_server(&round_robin(web)).unwrap();
    assert_eq!(client.virtual_server(&web).unwrap().server, round_robin(web));
    let heavy = RealServer { weight: 9, ..real("10.1.0.7:80") };
    client.set_real_server(&web, &heavy).unwrap();
    let reals = |client: &mut Client| {
        client.real_servers(&web).unwrap().into_iter().map(|entry| entry.server).collect::<BTreeSet<_>>()
    };
    assert_eq!(reals(&mut client), BTreeSet::from([heavy, real("10.1.0.8:80")]));
    client.delete_real_server(&web, heavy.socket_address()).unwrap();
    assert_eq!(reals(&mut client), BTreeSet::from([real("10.1.0.8:80")]));

    client.delete_virtual_server(&web).unwrap();
    assert_eq!(identities(&mut client), [other]);
    // With its real servers: a new one has none.
    client.add_virtual_server(&server).unwrap();
    assert_eq!(client.real_servers(&web).unwrap(), []);
    client.flush().unwrap();
    assert_eq!(client.virtual_servers().unwrap(), []);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn timeouts_of_0_stay_as_they_are() {
    let mut client = client();
    assert_eq!(client.timeouts().unwrap(), Timeouts { tcp: 900, tcp_fin: 120, udp: 300 });
    client.set_timeouts(Timeouts { tcp: 1000, tcp_fin: 0, udp: 0 }).unwrap();
    client.set_timeouts(Timeouts { tcp: 0, tcp_fin: 7, udp: 0 }).unwrap();
    client.set_timeouts(Timeouts { tcp: 0, tcp_fin: 0, udp: 31 * 86_400 }).unwrap();
    client.set_timeouts(Timeouts::default()).unwrap();
    assert_eq!(client.timeouts().unwrap(), Timeouts { tcp: 1000, tcp_fin: 7, udp: 31 * 86_400 });
    let error = client.set_timeouts(Timeouts { tcp: u32::MAX, tcp_fin: 0, udp: 0 }).unwrap_err();
    assert_error(
        &error,
        ErrorKind::Invalid,
        "cannot set the IPVS timeouts to TCP 4294967295 s, TCP after FIN 0 s, UDP 0 s: Invalid argument (os error 22): a \
         timeout is at most 2147483 s where the kernel has 1000 ticks a second",
    );
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn an_error_names_the_operation_the_object_and_the_reason() {
    let mut client = client();
    let (web, missing) = (tcp("10.96.0.1:80"), tcp("[fd00:96::1]:80"));
    let mark = VirtualServerId::firewall_mark(7, Family::Ipv6).unwrap();
    client.add_virtual_server(&round_robin(web)).unwrap();
    client.add_real_server(&web, &real("10.1.0.7:80")).unwrap();
    let not_found = "No such process (os error 3): there is no such virtual server";
    let no_real_server = "No such file or directory (os error 2): the virtual server has no such real server";
    let out_of_range = "Numerical result out of range (os error 34)";

    for (result, kind, text) in [
        (
            client.add_virtual_server(&round_robin(web)),
            ErrorKind::Exists,
            "add virtual server TCP 10.96.0.1:80: File exists (os error 17)".to_owned(),
        ),
        (
            client.add_real_server(&web, &real("10.1.0.7:80")),
            ErrorKind::Exists,
            "add real server 10.1.0.7:80 of TCP 10.96.0.1:80: File exists (os error 17)".to_owned(),
        ),
        (
            client.set_virtual_server(&round_robin(missing)),
            ErrorKind::NotFound,
            format!("change virtual server TCP [fd00:96::1]:80: {not_found}"),
        ),
        (
            client.delete_virtual_server(&mark),
            ErrorKind::NotFound,
            format!("delete virtual server FWM 7 (IPv6): {not_found}"),
        ),
        (
            client.virtual_server(&missing).map(drop),
            ErrorKind::NotFound,
            format!("read virtual server TCP [fd00:96::1]:80: {not_found}"),
        ),
        (
            client.add_real_server(&missing, &real("[fd00:1::7]:80")),
            ErrorKind::NotFound,
            format!("add real server [fd00:1::7]:80 of TCP [fd00:96::1]:80: {not_found}"),
        ),
        (
            client.set_real_server(&web, &real("10.1.0.8:80")),
            ErrorKind::NotFound,
            format!("change real server 10.1.0.8:80 of TCP 10.96.0.1:80: {no_real_server}"),
        ),
        (
            client.delete_real_server(&web, "10.1.0.8:80".parse().unwrap()),
            ErrorKind::NotFound,
            format!("delete real server 10.1.0.8:80 of TCP 10.96.0.1:80: {no_real_server}"),
        ),
        (
            client.add_virtual_server(&VirtualServer {
                persistence: Some(Persistence { netmask: Netmask::V6(0), ..Persistence::new(60, Family::Ipv6) }),
                ..round_robin(missing)
            }),
            ErrorKind::Invalid,
            "add virtual server TCP [fd00:96::1]:80: Invalid argument (os error 22): the netmask of persistence is for IPv6 a \
             prefix length from 1 to 128"
                .to_owned(),
        ),
        (
            client.add_real_server(&web, &real("224.0.0.1:80")),
            ErrorKind::Invalid,
            "add real server 224.0.0.1:80 of TCP 10.96.0.1:80: Invalid argument (os error 22): the address is not a \
             unicast address"
                .to_owned(),
        ),
        (
            client.set_real_server(&web, &RealServer { weight: 1 << 31, ..real("10.1.0.7:80") }),
            ErrorKind::Invalid,
            format!("change real server 10.1.0.7:80 of TCP 10.96.0.1:80: {out_of_range}: a weight is at most 2147483647"),
        ),
        (
            client.set_real_server(&web, &RealServer { lower_threshold: 1, ..real("10.1.0.7:80") }),
            ErrorKind::Invalid,
            format!(
                "change real server 10.1.0.7:80 of TCP 10.96.0.1:80: {out_of_range}: the lower threshold is at most the upper \
                 one"
            ),
        ),
    ] {
        let error = result.unwrap_err();
        assert_error(&error, kind, &format!("cannot {text}"));
        assert!(text.starts_with(&format!("{} {}", error.operation(), error.object())), "{error:?}");
        assert!(text.contains(&format!("(os error {})", error.refusal().unwrap().errno)), "{error:?}");
    }
    // That of a virtual server that does not exist is an empty list.
    assert_eq!(client.real_servers(&missing).unwrap(), []);
    // Nothing of this has changed anything.
    assert_eq!(run("ipvsadm -Sn").lines().count(), 2);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_scheduler_the_kernel_does_not_have_is_named_with_its_module() {
    let mut client = client();
    let server = VirtualServer::new(tcp("10.96.0.1:80"), "nosuch".parse().unwrap());
    let text = |operation| {
        format!(
            "cannot {operation} virtual server TCP 10.96.0.1:80: No such file or directory (os error 2): the kernel has \
             no scheduler \"nosuch\"; load it with `modprobe ip_vs_nosuch` or choose another"
        )
    };
    assert_error(&client.add_virtual_server(&server).unwrap_err(), ErrorKind::NoScheduler, &text("add"));
    client.add_virtual_server(&round_robin(server.id)).unwrap();
    assert_error(&client.set_virtual_server(&server).unwrap_err(), ErrorKind::NoScheduler, &text("change"));
    assert_eq!(client.virtual_server(&server.id).unwrap().server.scheduler, Scheduler::RoundRobin);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn without_the_capability_everything_is_refused() {
    let mut client = client();
    // Of this thread alone.
    let mut sets = capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::NET_ADMIN);
    set_capabilities(None, sets).unwrap();
    let reason = "Operation not permitted (os error 1): it requires CAP_NET_ADMIN in the initial user namespace";
    let web = tcp("10.96.0.1:80");
    for (result, operation) in [
        (client.virtual_servers().map(drop), "list the virtual servers"),
        (client.real_servers(&web).map(drop), "list the real servers of TCP 10.96.0.1:80"),
        (client.add_virtual_server(&round_robin(web)), "add virtual server TCP 10.96.0.1:80"),
        (client.info().map(drop), "read the version of IPVS"),
        (client.timeouts().map(drop), "read the IPVS timeouts"),
        (client.flush(), "delete all virtual servers"),
    ] {
        assert_error(&result.unwrap_err(), ErrorKind::PermissionDenied, &format!("cannot {operation}: {reason}"));
    }
    let results = client.apply(&[Message::AddVirtualServer(round_robin(web)), Message::Flush]).unwrap();
    assert!(
        results.iter().all(|result| result
            .as_ref()
            .is_err_and(|error| error.refusal().is_some_and(|refusal| refusal.errno == 1))),
        "{results:?}"
    );
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn of_a_thousand_mixed_operations_exactly_the_wrong_ones_fail() {
    let mut client = client();
    let mut operations: Vec<(Message, Option<ErrorKind>)> = Vec::new();
    for number in 0..125 {
        let (id, missing) = (numbered(number), numbered(10_000 + number));
        let server = round_robin(id);
        let address = real("10.1.0.7:80");
        operations.extend([
            (Message::AddVirtualServer(server), None),
            (Message::AddRealServer(id, address), None),
            (Message::AddRealServer(id, address), Some(ErrorKind::Exists)),
            (Message::SetRealServer(id, RealServer { weight: number, ..address }), None),
            (Message::SetRealServer(id, real("10.1.0.8:80")), Some(ErrorKind::NotFound)),
            (Message::SetVirtualServer(round_robin(missing)), Some(ErrorKind::NotFound)),
            (Message::SetVirtualServer(VirtualServer { scheduler: Scheduler::LeastConnection, ..server }), None),
            if number % 2 == 0 {
                (Message::DeleteVirtualServer(id), None)
            } else {
                (Message::AddVirtualServer(server), Some(ErrorKind::Exists))
            },
        ]);
    }
    let messages: Vec<Message> = operations.iter().map(|(message, _)| *message).collect();
    let results = client.apply(&messages).unwrap();
    assert_eq!(results.len(), 1000);
    for (index, (result, (message, wanted))) in results.iter().zip(&operations).enumerate() {
        assert_eq!(result.as_ref().err().map(Error::kind), *wanted, "{index}: {message:?}: {result:?}");
    }
    let error = results[2].as_ref().unwrap_err();
    assert_error(
        error,
        ErrorKind::Exists,
        "cannot add real server 10.1.0.7:80 of TCP 10.96.0.0:80: File exists (os error 17)",
    );

    let left: BTreeSet<_> = identities(&mut client).into_iter().collect();
    assert_eq!(left, (0..125).filter(|number| number % 2 == 1).map(numbered).collect());
    for number in (1..125).step_by(2) {
        assert_eq!(client.virtual_server(&numbered(number)).unwrap().server.scheduler, Scheduler::LeastConnection);
        assert_eq!(client.real_servers(&numbered(number)).unwrap()[0].server.weight, number);
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_batch_may_have_any_length_and_be_refused_as_a_whole() {
    let mut client = client();
    for length in [0, 1, 127, 128, 129, 256, 257] {
        let add: Vec<_> = (0..length).map(|number| Message::AddVirtualServer(round_robin(numbered(number)))).collect();
        let results = client.apply(&add).unwrap();
        assert_eq!(results.len(), add.len());
        assert!(results.iter().all(Result::is_ok), "{length}: {results:?}");
        assert_eq!(identities(&mut client).len(), add.len());
        let again = client.apply(&add).unwrap();
        let exist = again.iter().filter(|result| result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Exists));
        assert_eq!(exist.count(), add.len());
        assert!(client.apply(&[Message::Flush]).unwrap()[0].is_ok());
        assert_eq!(identities(&mut client), []);
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn thousands_of_servers_are_listed_completely() {
    let mut client = client();
    let add: Vec<_> = (0..3000).map(|number| Message::AddVirtualServer(round_robin(numbered(number)))).collect();
    assert!(client.apply(&add).unwrap().iter().all(Result::is_ok));
    let found = identities(&mut client);
    assert_eq!(found.len(), 3000);
    assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), (0..3000).map(numbered).collect());

    let id = numbered(1234);
    let host = |number: u32| RealServer::new(SocketAddr::new(IpAddr::V4((0x0a01_0000 + number).into()), 8080));
    let add: Vec<_> = (1..=500).map(|number| Message::AddRealServer(id, host(number))).collect();
    assert!(client.apply(&add).unwrap().iter().all(Result::is_ok));
    let found = client.real_servers(&id).unwrap();
    assert_eq!(found.len(), 500);
    let found: BTreeSet<_> = found.iter().map(|entry| entry.server).collect();
    assert_eq!(found, (1..=500).map(host).collect());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn listing_while_others_change_things_is_no_error() {
    let mut client = client();
    // These stay, and are enough for several datagrams.
    let add: Vec<_> = (0..500).map(|number| Message::AddVirtualServer(round_robin(numbered(number)))).collect();
    assert!(client.apply(&add).unwrap().iter().all(Result::is_ok));
    thread::scope(|scope| {
        // Gone as soon as this thread is done, or fails.
        let (listing, listing_ends) = mpsc::channel::<()>();
        let changing = scope.spawn(move || {
            let mut client = Client::connect().unwrap();
            let ids = || (1000..1100).map(numbered);
            let add: Vec<_> = ids().map(|id| Message::AddVirtualServer(round_robin(id))).collect();
            let delete: Vec<_> = ids().map(Message::DeleteVirtualServer).collect();
            let mut rounds = 0;
            while listing_ends.try_recv() == Err(TryRecvError::Empty) {
                for messages in [&add, &delete] {
                    assert!(client.apply(messages).unwrap().iter().all(Result::is_ok));
                }
                rounds += 1;
            }
            rounds
        });
        for _ in 0..100 {
            let ids = identities(&mut client);
            let count = ids.len();
            assert_eq!(ids.into_iter().collect::<BTreeSet<_>>().len(), count, "some are listed twice");
            client.real_servers(&numbered(1000)).unwrap();
        }
        drop(listing);
        let rounds = changing.join().unwrap();
        assert!(rounds > 10, "only {rounds} rounds of changes meanwhile");
    });
    assert_eq!(identities(&mut client).len(), 500);
}
