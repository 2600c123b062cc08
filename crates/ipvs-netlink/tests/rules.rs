//! Rules read and written, without a kernel.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::num::{NonZeroU8, NonZeroU16};

use ipvs_netlink::rules::{self, FormatError, ParseError};
use ipvs_netlink::{
    Family, Forwarding, GueChecksum, Message, Name, Netmask, Persistence, Protocol, RealServer, Scheduler,
    SchedulerFlags as Flags, SyncDaemon, SyncRole, Timeouts, Tunnel, VirtualServer, VirtualServerId,
};

fn parse(line: &str) -> Result<Message, ParseError> {
    rules::parse(line).next().expect(line).map(|rule| rule.message)
}

fn read(line: &str) -> Message {
    parse(line).expect(line)
}

fn refused(line: &str) -> String {
    parse(line).expect_err(line).to_string()
}

fn tcp(address: &str) -> VirtualServerId {
    VirtualServerId::address(Protocol::Tcp, address.parse().unwrap())
}

fn mark(mark: u32, family: Family) -> VirtualServerId {
    VirtualServerId::firewall_mark(mark, family).unwrap()
}

fn server(id: VirtualServerId) -> VirtualServer {
    VirtualServer::new(id, Scheduler::WeightedLeastConnection)
}

fn routed(address: &str) -> RealServer {
    RealServer { forwarding: Forwarding::DirectRoute, ..RealServer::new(address.parse().unwrap()) }
}

/// Lines that mean the same, the first of them as it is written, and the message.
fn assert_forms(message: Message, lines: &[&str]) {
    assert_eq!(rules::format(&message).as_deref(), Ok(lines[0]));
    for line in lines {
        assert_eq!(read(line), message, "{line:?}");
    }
}

#[test]
fn every_form_of_a_virtual_server_is_read_and_one_is_written() {
    let add = |server| Message::AddVirtualServer(server);
    let web = tcp("10.0.0.1:80");
    assert_forms(
        add(server(web)),
        &[
            "-A -t 10.0.0.1:80 -s wlc",
            "-A -t 10.0.0.1:80",
            "--add-service --tcp-service 10.0.0.1:80",
            "--add-service --tcp-service=10.0.0.1:80 --scheduler=wlc",
            "-A -t10.0.0.1:80 -swlc",
            "-A -t=10.0.0.1:80 -s=wlc",
            "-At 10.0.0.1:80",
            "-At10.0.0.1:80",
            "ipvsadm -A -s wlc -t 10.0.0.1:80",
            "\t-A \x0b -t\t10.0.0.1:080  \r",
            "-A -t 10.0.0.1:80 -M 255.255.0.0",
            "-A -t 10.0.0.1:80 --",
        ],
    );
    assert_forms(
        add(VirtualServer {
            one_packet: true,
            ..server(VirtualServerId::address(Protocol::Udp, "[fd00::1]:53".parse().unwrap()))
        }),
        &["-A -u [fd00::1]:53 -s wlc -o", "-Aou [fd00::1]:53", "--add-service --ops --udp-service=[fd00::1]:53"],
    );
    let sctp = VirtualServerId::address(Protocol::Sctp, "10.0.0.1:9".parse().unwrap());
    assert_forms(
        Message::SetVirtualServer(VirtualServer { scheduler: Scheduler::NeverQueue, ..server(sctp) }),
        &["-E --sctp-service 10.0.0.1:9 -s nq", "--edit-service --scheduler nq --sctp-service=10.0.0.1:9"],
    );
    assert_forms(add(server(mark(7, Family::Ipv4))), &["-A -f 7 -s wlc", "-Af7", "-A --fwmark-service=7"]);
    assert_forms(
        add(VirtualServer { one_packet: true, ..server(mark(u32::MAX, Family::Ipv6)) }),
        // The second as ipvsadm shows it.
        &["-A -f 4294967295 -6 -s wlc -o", "-A -f -1 -6 -s wlc -o", "-A -f 4294967295 --ipv6 --ops", "-A -f=-1 -6o"],
    );
    assert_eq!(read("-A -f -2147483648"), add(server(mark(1 << 31, Family::Ipv4))));
}

#[test]
fn every_form_of_persistence_is_read_and_one_is_written() {
    let web = tcp("10.0.0.1:80");
    let persistent = |id: VirtualServerId, timeout, netmask: Option<Netmask>, engine: Option<&str>| {
        let engine = engine.map(|engine| engine.parse().unwrap());
        let netmask = netmask.unwrap_or(Netmask::host(id.family()));
        Message::AddVirtualServer(VirtualServer {
            persistence: Some(Persistence { timeout, netmask }),
            engine,
            ..server(id)
        })
    };
    assert_forms(
        persistent(web, 360, None, None),
        &[
            "-A -t 10.0.0.1:80 -s wlc -p 360",
            "-A -t 10.0.0.1:80 -p",
            "-A -p -t 10.0.0.1:80",
            "-A -t 10.0.0.1:80 --persistent -s wlc",
            "-A -t 10.0.0.1:80 --persistent=360",
            "-A -t 10.0.0.1:80 --persistent 360",
            "-A -t 10.0.0.1:80 -p360",
            "-A -t 10.0.0.1:80 -p=360",
            "-A -t 10.0.0.1:80 -p -M 255.255.255.255",
        ],
    );
    let wide = Some(Netmask::V4([255, 255, 255, 0].into()));
    assert_forms(
        persistent(web, 1, wide, Some("sip")),
        &[
            "-A -t 10.0.0.1:80 -s wlc -p 1 -M 255.255.255.0 --pe sip",
            "-A --pe=sip -t 10.0.0.1:80 --netmask=255.255.255.0 -p1",
        ],
    );
    assert_forms(
        persistent(tcp("[fd00::1]:0"), 2_678_400, Some(Netmask::V6(64)), None),
        // Without brackets all is the address.
        &["-A -t [fd00::1]:0 -s wlc -p 2678400 -M 64", "-A -t fd00::1 -p 2678400 --netmask 064"],
    );
    assert_forms(
        persistent(mark(7, Family::Ipv6), 360, Some(Netmask::V6(1)), None),
        &["-A -f 7 -6 -s wlc -p 360 -M 1", "-A -f 7 -6p -M1"],
    );
    assert_forms(
        persistent(tcp("10.0.0.1:0"), 360, None, None),
        &["-A -t 10.0.0.1:0 -s wlc -p 360", "-A -t 10.0.0.1 -p"],
    );
}

#[test]
fn flags_have_the_names_of_their_scheduler() {
    let all = Flags::FLAG_1.union(Flags::FLAG_2).union(Flags::FLAG_3);
    for (scheduler, scheduler_flags, lines) in [
        (
            Scheduler::RoundRobin,
            Flags::FLAG_2,
            &["-A -f 1 -s rr -b flag-2", "-A -f 1 -s rr --sched-flags=,flag-2,"][..],
        ),
        (
            Scheduler::SourceHashing,
            all,
            &["-A -f 1 -s sh -b sh-fallback,sh-port,flag-3", "-A -f 1 -bflag-3,flag-2,flag-1 -s sh"],
        ),
        (Scheduler::MaglevHashing, Flags::MH_PORT, &["-A -f 1 -s mh -b mh-port", "-A -f 1 -b=flag-2 -s mh"]),
    ] {
        let server = VirtualServer { scheduler, scheduler_flags, ..server(mark(1, Family::Ipv4)) };
        assert_forms(Message::AddVirtualServer(server), lines);
    }
}

#[test]
fn every_form_of_a_real_server_is_read_and_one_is_written() {
    let web = tcp("10.0.0.1:80");
    let add = |server| Message::AddRealServer(web, server);
    assert_forms(
        add(routed("10.1.0.7:80")),
        &[
            "-a -t 10.0.0.1:80 -r 10.1.0.7:80 -g -w 1",
            "-a -t 10.0.0.1:80 -r 10.1.0.7",
            "--add-server --tcp-service=10.0.0.1:80 --real-server=10.1.0.7 --gatewaying --weight=1",
            "-at 10.0.0.1:80 -gr10.1.0.7 -w=+1 -x0 -y=0",
            "-a -r 10.1.0.7:80 -t 10.0.0.1:80",
        ],
    );
    assert_forms(
        add(RealServer {
            forwarding: Forwarding::Masquerade,
            weight: 0,
            upper_threshold: 2_147_483_647,
            lower_threshold: 5,
            ..routed("10.1.0.7:8080")
        }),
        &[
            "-a -t 10.0.0.1:80 -r 10.1.0.7:8080 -m -w 0 -x 2147483647 -y 5",
            "-a -mx2147483647 -y5 -w0 -t 10.0.0.1:80 -r 10.1.0.7:8080",
            "-a --masquerading --u-threshold 2147483647 --l-threshold=5 --weight=0 -t 10.0.0.1:80 -r=10.1.0.7:8080",
        ],
    );
    // The port as it is written, whatever ipvsadm makes of it.
    assert_forms(add(routed("10.1.0.7:8080")), &["-a -t 10.0.0.1:80 -r 10.1.0.7:8080 -g -w 1"]);
    let marked = mark(7, Family::Ipv6);
    assert_forms(
        Message::SetRealServer(marked, routed("[fd00:1::7]:0")),
        &["-e -f 7 -6 -r [fd00:1::7]:0 -g -w 1", "--edit-server -f 7 -6 -r fd00:1::7"],
    );
    assert_forms(
        Message::DeleteRealServer(web, "10.1.0.7:80".parse().unwrap()),
        &["-d -t 10.0.0.1:80 -r 10.1.0.7:80", "--delete-server --tcp-service 10.0.0.1:80 --real-server 10.1.0.7"],
    );
}

#[test]
fn every_form_of_a_tunnel_is_read_and_one_is_written() {
    let web = tcp("10.0.0.1:80");
    let port = NonZeroU16::new(6080).unwrap();
    let gue = |checksum| Tunnel::Gue { port, checksum };
    for (tunnel, options) in [
        (Tunnel::IpIp, &["-i -w 1 --tun-type ipip", "-i", "--ipip", "--tun-type=ipip -i"][..]),
        (
            gue(GueChecksum::None),
            &["-i -w 1 --tun-type gue --tun-port 6080 --tun-nocsum", "-i --tun-port=6080 --tun-type=gue"],
        ),
        (gue(GueChecksum::Udp), &["-i -w 1 --tun-type gue --tun-port 6080 --tun-csum"]),
        (gue(GueChecksum::Remote), &["-i -w 1 --tun-type gue --tun-port 6080 --tun-remcsum"]),
        (Tunnel::Gre { checksum: false }, &["-i -w 1 --tun-type gre --tun-nocsum", "-i --tun-type gre"]),
        (Tunnel::Gre { checksum: true }, &["-i -w 1 --tun-type gre --tun-csum"]),
    ] {
        for address in ["10.1.0.7:80", "[fd00::7]:80"] {
            let lines: Vec<_> =
                options.iter().map(|options| format!("-a -t 10.0.0.1:80 -r {address} {options}")).collect();
            let server = RealServer { forwarding: Forwarding::Tunnel(tunnel), ..routed(address) };
            assert_forms(Message::AddRealServer(web, server), &lines.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }
}

#[test]
fn every_other_command_is_read_and_written() {
    let web = tcp("10.0.0.1:80");
    assert_forms(
        Message::DeleteVirtualServer(web),
        &["-D -t 10.0.0.1:80", "--delete-service --tcp-service=10.0.0.1:80"],
    );
    assert_forms(Message::DeleteVirtualServer(mark(7, Family::Ipv6)), &["-D -f 7 -6"]);
    // Not to be made, but perhaps there.
    assert_forms(Message::DeleteVirtualServer(tcp("10.0.0.1:0")), &["-D -t 10.0.0.1:0", "-D -t 10.0.0.1"]);
    assert_forms(Message::Flush, &["-C", "--clear", "ipvsadm -C"]);
    assert_forms(Message::Zero, &["-Z", "--zero"]);
    assert_forms(Message::ZeroVirtualServer(web), &["-Z -t 10.0.0.1:80"]);
    assert_forms(
        Message::SetTimeouts(Timeouts { tcp: 901, tcp_fin: 0, udp: 2_678_400 }),
        &["--set 901 0 2678400", "--set -- 901 0 2678400"],
    );
    let lo: Name = "lo".parse().unwrap();
    let master = SyncDaemon::new(SyncRole::Master, lo);
    assert_forms(
        Message::StartSyncDaemon(master),
        &["--start-daemon master --mcast-interface lo", "--start-daemon=master --mcast-interface=lo --syncid=0"],
    );
    assert_forms(
        Message::StartSyncDaemon(SyncDaemon::new(SyncRole::Backup, "eth0".parse().unwrap())),
        &["--start-daemon backup --mcast-interface eth0", "--start-daemon backup"],
    );
    let all = |group: &str| {
        Message::StartSyncDaemon(SyncDaemon {
            sync_id: 255,
            max_length: NonZeroU16::new(65_507),
            group: Some(group.parse().unwrap()),
            port: NonZeroU16::new(9000),
            ttl: NonZeroU8::new(255),
            ..master
        })
    };
    for group in ["224.0.0.82", "ff02::82"] {
        let options = format!("--sync-maxlen 65507 --mcast-group {group} --mcast-port 9000 --mcast-ttl 255");
        let line = format!("--start-daemon master --mcast-interface lo --syncid 255 {options}");
        let other =
            format!("--start-daemon master {} --syncid=255 --mcast-interface=lo", options.replace("xlen ", "xlen="));
        assert_forms(all(group), &[&line, &other]);
    }
    assert_forms(Message::StopSyncDaemon(SyncRole::Backup), &["--stop-daemon backup", "--stop-daemon=backup"]);
    assert_forms(Message::StopSyncDaemon(SyncRole::Master), &["--stop-daemon master"]);
}

#[test]
fn blank_lines_and_comments_are_passed_over_and_lines_are_counted() {
    let text = "\n# a comment\n   \t\n-C\n  #another\r\nipvsadm\n-Z\r\nbad\n-C # no\n-Z";
    let (rules, errors): (Vec<_>, Vec<_>) = rules::parse(text).partition(Result::is_ok);
    let rules: Vec<_> = rules.into_iter().map(Result::unwrap).map(|rule| (rule.line, rule.message)).collect();
    let rule = |line, message| (line, message);
    assert_eq!(rules, [rule(4, Message::Flush), rule(7, Message::Zero), rule(10, Message::Zero)]);
    let errors: Vec<_> = errors.into_iter().map(Result::unwrap_err).collect();
    assert_eq!(
        errors.iter().map(|error| (error.line, error.column, error.word.as_str())).collect::<Vec<_>>(),
        [(8, 1, "bad"), (9, 4, "#"),]
    );
}

#[test]
fn an_error_says_where_what_and_what_would_be_right() {
    for (line, error) in [
        (
            "-t 1.2.3.4:80 -A",
            "column 1: \"-t\" is no command, with which a rule begins: -A, -E, -D, -a, -e, -d, -C, -Z, --set, --start-daemon or --stop-daemon",
        ),
        ("-C -Z", "column 4: \"-Z\" is a second command: each has a line of its own"),
        ("-A -t 1.2.3.4:80 --exact", "column 18: \"--exact\" is no option of a rule"),
        ("-A -oz", "column 6: \"-oz\" is no option of a rule"),
        ("--add-serv -t 1.2.3.4:80", "column 1: \"--add-serv\" is no option of a rule"),
        ("-A -t 1.2.3.4:80 -w 1", "column 18: \"-w\" does not go with --add-service"),
        ("-A -t 1.2.3.4:80 -s rr -s lc", "column 24: \"-s\" repeats or contradicts --scheduler"),
        ("-A -t 1.2.3.4:80 -f 1", "column 18: \"-f\" repeats or contradicts --tcp-service"),
        ("-A -u 1.2.3.4:80 --ops=1", "column 18: \"--ops=1\" takes no value"),
        ("-A -t", "column 4: \"-t\" needs a value: address:port"),
        ("-A -t 1.2.3.4:80 rr", "column 18: \"rr\" is neither an option nor the value of one"),
        ("-A -t 1.2.3.4:80 # web", "column 18: \"#\" is a comment where none can be: a comment has a line of its own"),
        (
            "  -A -s rr",
            "column 3: \"-A\" needs a virtual server: -t, -u or --sctp-service with address:port, or -f with a firewall mark",
        ),
        ("-a -t 1.2.3.4:80", "column 1: \"-a\" needs a real server: -r with address:port"),
        (
            "-A -M 64 -t [fd00::1]:80 -p",
            "column 4: \"-M\" has to come after the virtual server (-t, -u, --sctp-service or -f)",
        ),
        (
            "-a -mr 1.2.3.4 -t 1.2.3.4:80",
            "column 6: \"-mr\" has to come after the virtual server (-t, -u, --sctp-service or -f)",
        ),
        (
            "-A -t web:80",
            "column 7: \"web:80\" is not address:port, as in 10.0.0.1:80 or [fd00::1]:80, in numbers: names are not looked up (ipvsadm -Sn, with -n, writes none)",
        ),
        (
            "-A -t1.2.3.4:http",
            "column 6: \"1.2.3.4:http\" has a port that is no number from 0 to 65535: names are not looked up (ipvsadm -Sn, with -n, writes none)",
        ),
        (
            "-A -t [fd00::1] -p",
            "column 7: \"[fd00::1]\" has no port: an IPv6 address in brackets is followed by one, as in [fd00::1]:80",
        ),
        ("-A -f 1 -p 0", "column 12: \"0\" is no number from 1 to 2678400"),
        ("-A -f 0", "column 7: \"0\" is no firewall mark: a number from 1 to 4294967295"),
        ("-A -6 -f 1", "column 4: \"-6\" goes with -f, a firewall mark, and comes after it"),
        ("-A -t 1.2.3.4:80 -6", "column 18: \"-6\" goes with -f, a firewall mark, and comes after it"),
        (
            "-A -f 1 -s averyverylongname",
            "column 12: \"averyverylongname\" cannot be the name of a scheduler: 1 to 15 bytes, the first no hyphen",
        ),
        (
            "-A -f 1 -s sh -b sh-port,x",
            "column 26: \"x\" is no scheduler flag: flag-1, flag-2, flag-3; with sh sh-fallback, sh-port; with mh mh-fallback, mh-port",
        ),
        ("-A -f 1 -b mh-port", "column 12: \"mh-port\" is a flag of another scheduler than wlc"),
        ("-A -f 1 -p -M 24", "column 15: \"24\" is no mask: for IPv4 one has four parts, as in 255.255.255.0"),
        ("-A -f 1 -6 -p -M 129", "column 18: \"129\" is no mask: for IPv6 it is a prefix length from 1 to 128"),
        ("-A -t 1.2.3.4", "column 7: \"1.2.3.4\" has no port, or port 0, which takes persistence (-p)"),
        ("-A -t 1.2.3.4:80 -o", "column 18: \"-o\" is for UDP (-u) and firewall marks (-f)"),
        (
            "-a -t 1.2.3.4:80 -r [::1]:80 -m",
            "column 21: \"[::1]:80\" is of another address family than the virtual server, where only a tunnel (-i) leads",
        ),
        ("-a -f 1 -r 1.2.3.4 --tun-type gre", "column 20: \"--tun-type\" goes with a tunnel (-i)"),
        ("-a -f 1 -r 1.2.3.4 -i --tun-type GRE", "column 34: \"GRE\" is no tunnel type: ipip, gue or gre"),
        ("-a -f 1 -r 1.2.3.4 -i --tun-type gue", "column 34: \"gue\" needs a port: --tun-port"),
        ("-a -f 1 -r 1.2.3.4 -i --tun-csum", "column 23: \"--tun-csum\" does not go with the tunnel type ipip"),
        ("--start-daemon primary", "column 16: \"primary\" is neither master nor backup"),
        (
            "--start-daemon master --mcast-group 10.0.0.1",
            "column 37: \"10.0.0.1\" is no multicast address, as 224.0.0.81 or ff02::81",
        ),
        ("--set 1 2", "column 1: \"--set\" needs three timeouts in seconds: TCP, TCP after FIN, UDP"),
        ("--set 1 2 3 4", "column 13: \"4\" is neither an option nor the value of one"),
    ] {
        assert_eq!(refused(line), format!("line 1, {error}"), "{line:?}");
    }
}

#[test]
fn what_no_rule_can_say_is_not_written() {
    let web = tcp("10.0.0.1:80");
    let real = routed("10.1.0.7:80");
    let other = Tunnel::Other { kind: 9, port: 0, flags: 0 };
    for (message, error) in [
        (Message::ListVirtualServers, FormatError::NoChange),
        (
            Message::DeleteVirtualServer(VirtualServerId::address(Protocol::Other(1), "10.0.0.1:80".parse().unwrap())),
            FormatError::Protocol(Protocol::Other(1)),
        ),
        (
            Message::AddRealServer(web, RealServer { forwarding: Forwarding::Local, ..real }),
            FormatError::Forwarding(Forwarding::Local),
        ),
        (
            Message::AddRealServer(web, RealServer { forwarding: Forwarding::Bypass, ..real }),
            FormatError::Forwarding(Forwarding::Bypass),
        ),
        (
            Message::AddRealServer(web, RealServer { forwarding: Forwarding::Tunnel(other), ..real }),
            FormatError::Tunnel(other),
        ),
    ] {
        assert_eq!(rules::format(&message), Err(error));
    }
    // What only ipvsadm refuses, for the reason it would have.
    let persistent = |timeout, netmask| VirtualServer {
        persistence: Some(Persistence { netmask, ..Persistence::new(timeout, Family::Ipv4) }),
        ..server(web)
    };
    let mask = Netmask::host(Family::Ipv4);
    for (message, reason) in [
        (Message::AddVirtualServer(server(tcp("10.0.0.1:0"))), "or port 0"),
        (Message::AddVirtualServer(VirtualServer { one_packet: true, ..server(web) }), "is for UDP"),
        (Message::AddVirtualServer(persistent(0, mask)), "\"0\" is no number from 1 to 2678400"),
        (Message::AddVirtualServer(persistent(1, Netmask::V6(64))), "\"64\" is no mask"),
        (Message::SetRealServer(web, RealServer { weight: 1 << 31, ..real }), "is no number from 0 to 2147483647"),
        (Message::AddRealServer(web, RealServer { address: "::1".parse().unwrap(), ..real }), "another address family"),
        (Message::SetTimeouts(Timeouts { tcp: u32::MAX, tcp_fin: 0, udp: 0 }), "\"4294967295\" is no number"),
    ] {
        let error = rules::format(&message).unwrap_err().to_string();
        assert!(error.starts_with("ipvsadm takes no such rule: \"") && error.contains(reason), "{error}");
    }
    // Names in which there is more than a name.
    let dns = VirtualServerId::address(Protocol::Udp, "10.0.0.1:53".parse().unwrap());
    let named = |name: &str| VirtualServer { scheduler: name.parse().unwrap(), ..server(dns) };
    for name in ["r r", " ", "\n", "-b", "rr\n-C"] {
        let error = rules::format(&Message::AddVirtualServer(named(name)));
        assert!(matches!(error, Err(FormatError::Value(_))), "{name:?}: {error:?}");
    }
    let line = "-A -u 10.0.0.1:53 -s rr -o".to_owned();
    assert_eq!(rules::format(&Message::AddVirtualServer(named("rr -o"))), Err(FormatError::Ambiguous(line)));
}
