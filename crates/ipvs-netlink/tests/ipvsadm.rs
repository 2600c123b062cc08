//! Side by side with ipvsadm, in the lab: what one writes, the other reads.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::SocketAddr;

use common::{client, real, round_robin, run, run_with_input, tcp};
use ipvs_netlink::{
    Client, Family, Forwarding, Message, Netmask, Persistence, Protocol, RealServer, Scheduler,
    SchedulerFlags as Flags, Tunnel, VirtualServer, VirtualServerId,
};

/// Virtual servers with everything that both ipvsadm and this crate can express, and their real servers.
fn servers() -> Vec<(VirtualServer, Vec<RealServer>)> {
    let mut servers: Vec<(VirtualServer, Vec<RealServer>)> = Vec::new();
    for family in [Family::Ipv4, Family::Ipv6] {
        let mut number = 0;
        let mut address = |protocol| {
            number += 1;
            let text = match family {
                Family::Ipv4 => format!("10.96.0.{number}:80"),
                Family::Ipv6 => format!("[fd00:96::{number}]:80"),
            };
            VirtualServerId::address(protocol, text.parse().unwrap())
        };
        let mut add = |server| servers.push((server, Vec::new()));
        for scheduler in Scheduler::ALL {
            add(VirtualServer::new(address(Protocol::Tcp), scheduler));
        }
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            add(round_robin(address(protocol)));
        }
        let all = Flags::FLAG_1.union(Flags::FLAG_2).union(Flags::FLAG_3);
        for (scheduler, scheduler_flags) in [
            (Scheduler::RoundRobin, Flags::FLAG_1),
            (Scheduler::RoundRobin, Flags::FLAG_2),
            (Scheduler::RoundRobin, Flags::FLAG_3),
            (Scheduler::RoundRobin, Flags::FLAG_1.union(Flags::FLAG_3)),
            (Scheduler::RoundRobin, all),
            (Scheduler::SourceHashing, Flags::SH_FALLBACK),
            (Scheduler::SourceHashing, Flags::SH_PORT),
            (Scheduler::SourceHashing, Flags::SH_FALLBACK.union(Flags::SH_PORT)),
            (Scheduler::MaglevHashing, Flags::MH_FALLBACK),
            (Scheduler::MaglevHashing, Flags::MH_PORT),
        ] {
            add(VirtualServer { scheduler, scheduler_flags, ..round_robin(address(Protocol::Tcp)) });
        }
        let netmasks = match family {
            Family::Ipv4 => [[255; 4], [255, 255, 255, 0], [128, 0, 0, 0]].map(|mask| Netmask::V4(mask.into())),
            Family::Ipv6 => [128, 64, 1].map(Netmask::V6),
        };
        // The last one is the longest that ipvsadm takes.
        for (netmask, timeout) in netmasks.into_iter().zip([1, 10_800, 31 * 86_400]) {
            let persistence = Some(Persistence { netmask, ..Persistence::new(timeout, family) });
            add(VirtualServer { persistence, ..round_robin(address(Protocol::Tcp)) });
        }
        let one_packet = VirtualServer { one_packet: true, ..round_robin(address(Protocol::Udp)) };
        add(one_packet);
        add(VirtualServer {
            one_packet: true,
            persistence: Some(Persistence::new(60, family)),
            scheduler_flags: all,
            ..round_robin(address(Protocol::Udp))
        });
        // ipvsadm shows larger ones as negative.
        for mark in [1, 0x7fff_ffff] {
            add(round_robin(VirtualServerId::firewall_mark(mark, family).unwrap()));
        }

        let host = |number: u32| match family {
            Family::Ipv4 => format!("10.1.0.{number}"),
            Family::Ipv6 => format!("[fd00:1::{number}]"),
        };
        let limits = [(0, 0), (1, 0), (100, 50), (65_535, 65_535)];
        let reals = (1..).zip(limits).flat_map(|(number, (upper_threshold, lower_threshold))| {
            [
                (Forwarding::Masquerade, 8080, 0),
                (Forwarding::Masquerade, 80, 1),
                (Forwarding::Tunnel(Tunnel::IpIp), 80, 65_535),
                (Forwarding::DirectRoute, 80, 7),
            ]
            .into_iter()
            .zip(1..)
            .map(|((forwarding, port, weight), method)| RealServer {
                forwarding,
                weight,
                upper_threshold,
                lower_threshold,
                ..real(&format!("{}:{port}", host(10 * number + method)))
            })
            .collect::<Vec<_>>()
        });
        servers.push((round_robin(address(Protocol::Tcp)), reals.collect()));
        let mark = VirtualServerId::firewall_mark(5, family).unwrap();
        servers.push((round_robin(mark), vec![real(&format!("{}:0", host(1)))]));
    }
    servers
}

/// A virtual server as ipvsadm names it.
fn option(id: &VirtualServerId) -> String {
    match *id {
        VirtualServerId::Address { protocol, address, port } => {
            let option = match protocol {
                Protocol::Tcp => "-t",
                Protocol::Udp => "-u",
                _ => "--sctp-service",
            };
            format!("{option} {}", SocketAddr::new(address, port))
        }
        VirtualServerId::FirewallMark { mark, family: Family::Ipv4 } => format!("-f {mark}"),
        VirtualServerId::FirewallMark { mark, family: Family::Ipv6 } => format!("-f {mark} -6"),
    }
}

/// The line of `ipvsadm -Sn` for a virtual server.
fn server_line(server: &VirtualServer) -> String {
    let mut line = format!("-A {} -s {}", option(&server.id), server.scheduler);
    if let Some(persistence) = server.persistence {
        let _ = write!(line, " -p {}", persistence.timeout);
        if persistence.netmask != Netmask::host(server.id.family()) {
            let _ = write!(line, " -M {}", persistence.netmask);
        }
    }
    if server.one_packet {
        line += " -o";
    }
    let names = match server.scheduler {
        Scheduler::SourceHashing => ["sh-fallback", "sh-port", "flag-3"],
        Scheduler::MaglevHashing => ["mh-fallback", "mh-port", "flag-3"],
        _ => ["flag-1", "flag-2", "flag-3"],
    };
    let flags = [Flags::FLAG_1, Flags::FLAG_2, Flags::FLAG_3];
    let set = flags.into_iter().zip(names).filter(|(flag, _)| server.scheduler_flags.contains(*flag));
    let set: Vec<&str> = set.map(|(_, name)| name).collect();
    if !set.is_empty() {
        let _ = write!(line, " -b {}", set.join(","));
    }
    line
}

/// The command for a real server; the line of `ipvsadm -Sn` is the same but for the thresholds, which it leaves out.
fn real_line(id: &VirtualServerId, server: &RealServer) -> String {
    let method = match server.forwarding {
        Forwarding::Masquerade => "-m",
        Forwarding::Tunnel(_) => "-i",
        _ => "-g",
    };
    let mut line = format!("-a {} -r {} {method} -w {}", option(id), server.socket_address(), server.weight);
    for (option, threshold) in [("-x", server.upper_threshold), ("-y", server.lower_threshold)] {
        if threshold != 0 {
            let _ = write!(line, " {option} {threshold}");
        }
    }
    if matches!(server.forwarding, Forwarding::Tunnel(_)) {
        line += " --tun-type ipip";
    }
    line
}

/// The commands for all servers, as one writes them for `ipvsadm -R`.
fn commands() -> Vec<String> {
    servers()
        .iter()
        .flat_map(|(server, reals)| {
            let reals = reals.iter().map(|real| real_line(&server.id, real));
            std::iter::once(server_line(server)).chain(reals).collect::<Vec<_>>()
        })
        .collect()
}

fn assert_ipvsadm_reads_all() {
    let saved = run("ipvsadm -Sn");
    let wanted = commands().into_iter().map(|line| match line.split_once(" -x ") {
        Some((start, _)) if line.contains("--tun-type") => format!("{start} --tun-type ipip"),
        Some((start, _)) => start.to_owned(),
        None => line,
    });
    assert_same(saved.lines().map(|line| line.trim_end().to_owned()), wanted);

    let listed = run("ipvsadm -Ln --thresholds");
    let rows = listed.lines().filter_map(|line| {
        let mut words = line.trim_start().strip_prefix("-> ")?.split_whitespace().map(str::to_owned);
        // The line of titles has no number there.
        Some((words.next()?, words.next()?.parse::<u32>().ok()?, words.next()?.parse::<u32>().ok()?))
    });
    let reals = servers().into_iter().flat_map(|(_, reals)| reals);
    let wanted = reals.map(|real| (real.socket_address().to_string(), real.upper_threshold, real.lower_threshold));
    assert_same(rows, wanted);
}

fn assert_same<T: Ord + std::fmt::Debug>(found: impl IntoIterator<Item = T>, wanted: impl IntoIterator<Item = T>) {
    let (found, wanted): (Vec<T>, BTreeSet<T>) = (found.into_iter().collect(), wanted.into_iter().collect());
    assert_eq!(found.len(), wanted.len());
    let found = found.into_iter().collect::<BTreeSet<_>>();
    let (missing, surplus): (Vec<_>, Vec<_>) =
        (wanted.difference(&found).collect(), found.difference(&wanted).collect());
    assert!(missing.is_empty() && surplus.is_empty(), "missing: {missing:#?}\nsurplus: {surplus:#?}");
}

fn assert_reads_all(client: &mut Client) {
    let servers = servers();
    let found = client.virtual_servers().unwrap();
    assert_same(found.iter().map(|entry| entry.server), servers.iter().map(|(server, _)| *server));
    for (server, reals) in &servers {
        assert_eq!(client.virtual_server(&server.id).unwrap().server, *server);
        let found = client.real_servers(&server.id).unwrap();
        assert_same(found.iter().map(|entry| entry.server), reals.iter().copied());
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn what_is_written_here_ipvsadm_reads() {
    let mut client = client();
    for (server, reals) in servers() {
        client.add_virtual_server(&server).unwrap();
        for real in reals {
            client.add_real_server(&server.id, &real).unwrap();
        }
    }
    assert_ipvsadm_reads_all();
    assert_reads_all(&mut client);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn what_ipvsadm_writes_is_read_here() {
    let mut client = client();
    run_with_input("ipvsadm -R", &(commands().join("\n") + "\n"));
    assert_reads_all(&mut client);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn what_is_changed_here_ipvsadm_reads() {
    let mut client = client();
    let servers = servers();
    // First each as different as can be from what it is to become.
    let mut messages = Vec::new();
    for (server, reals) in &servers {
        let first = VirtualServer {
            scheduler: Scheduler::WeightedRoundRobin,
            scheduler_flags: Flags::FLAG_2,
            persistence: Some(Persistence::new(77, server.id.family())),
            one_packet: !server.one_packet,
            ..round_robin(server.id)
        };
        messages.push(Message::AddVirtualServer(first));
        for real in reals {
            let first =
                RealServer { weight: 99, upper_threshold: 9, forwarding: Forwarding::Tunnel(Tunnel::IpIp), ..*real };
            messages.push(Message::AddRealServer(server.id, RealServer { lower_threshold: 8, ..first }));
        }
    }
    for (server, reals) in &servers {
        messages.push(Message::SetVirtualServer(*server));
        messages.extend(reals.iter().map(|real| Message::SetRealServer(server.id, *real)));
    }
    for result in client.apply(&messages).unwrap() {
        result.unwrap();
    }
    assert_ipvsadm_reads_all();
    assert_reads_all(&mut client);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn ipvsadm_lists_what_was_written_here() {
    let mut client = client();
    let web = tcp("10.96.0.1:80");
    let dns = VirtualServerId::address(Protocol::Udp, "[fd00:96::1]:53".parse().unwrap());
    let mark = VirtualServerId::firewall_mark(7, Family::Ipv6).unwrap();
    for server in [
        VirtualServer {
            scheduler: Scheduler::SourceHashing,
            scheduler_flags: Flags::SH_PORT,
            persistence: Some(Persistence {
                netmask: Netmask::V4([255, 255, 255, 0].into()),
                ..Persistence::new(300, Family::Ipv4)
            }),
            ..round_robin(web)
        },
        VirtualServer { one_packet: true, ..round_robin(dns) },
        round_robin(mark),
    ] {
        client.add_virtual_server(&server).unwrap();
    }
    // ipvsadm has no name for it.
    let bypass = RealServer { forwarding: Forwarding::Bypass, ..real("10.1.0.5:80") };
    let local = RealServer { forwarding: Forwarding::Local, ..real("10.1.0.6:80") };
    let limited = RealServer { upper_threshold: 10, lower_threshold: 5, weight: 3, ..real("10.1.0.7:8080") };
    for server in [bypass, local, limited] {
        client.add_real_server(&web, &server).unwrap();
        assert!(client.real_servers(&web).unwrap().iter().any(|entry| entry.server == server));
    }
    let tidy = |listing: String| {
        let lines = listing.lines().skip(3).map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
        lines.collect::<Vec<_>>().join("\n")
    };
    assert_eq!(
        tidy(run("ipvsadm -Ln")),
        "TCP 10.96.0.1:80 sh (sh-port) persistent 300 mask 255.255.255.0\n\
         -> 10.1.0.5:80 (null) 1 0 0\n\
         -> 10.1.0.6:80 Local 1 0 0\n\
         -> 10.1.0.7:8080 Masq 3 0 0\n\
         UDP [fd00:96::1]:53 rr ops\n\
         FWM 7 IPv6 rr"
    );
    assert!(tidy(run("ipvsadm -Ln --thresholds")).contains("-> 10.1.0.7:8080 10 5 0 0"));
    client.set_timeouts(ipvs_netlink::Timeouts { tcp: 901, tcp_fin: 121, udp: 301 }).unwrap();
    assert_eq!(run("ipvsadm -Ln --timeout").trim(), "Timeout (tcp tcpfin udp): 901 121 301");
}

/// A tunnel can lead to the other family; ipvsadm cannot name such a real server of a firewall mark.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_tunnel_to_the_other_family_is_listed_with_its_own() {
    let mut client = client();
    for (id, address) in [(tcp("10.96.0.1:80"), "[fd00:1::7]:80"), (tcp("[fd00:96::1]:80"), "10.1.0.7:80")] {
        client.add_virtual_server(&round_robin(id)).unwrap();
        let tunnel = RealServer { forwarding: Forwarding::Tunnel(Tunnel::IpIp), ..real(address) };
        client.add_real_server(&id, &tunnel).unwrap();
        let found = client.real_servers(&id).unwrap();
        assert_eq!(found.iter().map(|entry| entry.server).collect::<Vec<_>>(), [tunnel]);
        client.delete_real_server(&id, tunnel.socket_address()).unwrap();
        assert_eq!(client.real_servers(&id).unwrap(), []);
    }
}
