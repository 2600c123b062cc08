//! Side by side with ipvsadm, in the lab: what one writes, the other reads.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::process::{Command, Stdio};

use common::servers::{random, servers};
use common::{client, example, real, round_robin, run, run_with_input, tcp};
use ipvs_netlink::rules::{self, Rule};
use ipvs_netlink::{
    Client, Family, Forwarding, Message, Netmask, Persistence, Protocol, RealServer, Scheduler,
    SchedulerFlags as Flags, SyncDaemon, SyncRole, Timeouts, Tunnel, VirtualServer, VirtualServerId,
};

/// The messages that make all servers.
fn messages() -> Vec<Message> {
    let messages = |(server, reals): (VirtualServer, Vec<RealServer>)| {
        let reals = reals.into_iter().map(move |real| Message::AddRealServer(server.id, real));
        std::iter::once(Message::AddVirtualServer(server)).chain(reals)
    };
    servers().into_iter().flat_map(messages).collect()
}

/// The same without thresholds, which `ipvsadm -S` leaves out.
fn without_thresholds(message: Message) -> Message {
    match message {
        Message::AddRealServer(id, server) => {
            Message::AddRealServer(id, RealServer { upper_threshold: 0, lower_threshold: 0, ..server })
        }
        other => other,
    }
}

fn lines(messages: &[Message]) -> Vec<String> {
    messages.iter().map(|message| rules::format(message).unwrap()).collect()
}

fn text(messages: &[Message]) -> String {
    lines(messages).into_iter().map(|line| line + "\n").collect()
}

fn parsed(text: &str) -> Vec<Message> {
    rules::parse(text).map(|rule| rule.unwrap().message).collect()
}

fn apply(client: &mut Client, messages: &[Message]) {
    for result in client.apply(messages).unwrap() {
        result.unwrap();
    }
}

/// What would make everything that the kernel has.
fn dump(client: &mut Client) -> Vec<Message> {
    let mut messages = Vec::new();
    for entry in client.virtual_servers().unwrap() {
        let id = entry.server.id;
        messages.push(Message::AddVirtualServer(entry.server));
        let reals = client.real_servers(&id).unwrap();
        messages.extend(reals.into_iter().map(|entry| Message::AddRealServer(id, entry.server)));
    }
    messages
}

/// Compares lines, whatever their order.
fn assert_same(found: impl IntoIterator<Item = impl Debug>, wanted: impl IntoIterator<Item = impl Debug>) {
    let sorted = |found: Vec<String>| (found.len(), BTreeSet::from_iter(found));
    let (found_number, found) = sorted(found.into_iter().map(|item| format!("{item:?}")).collect());
    let (wanted_number, wanted) = sorted(wanted.into_iter().map(|item| format!("{item:?}")).collect());
    let missing: Vec<_> = wanted.difference(&found).take(5).collect();
    let surplus: Vec<_> = found.difference(&wanted).take(5).collect();
    assert!(missing.is_empty() && surplus.is_empty(), "missing: {missing:#?}\nsurplus: {surplus:#?}");
    assert_eq!(found_number, wanted_number);
}

fn assert_ipvsadm_reads(messages: &[Message]) {
    let without: Vec<_> = messages.iter().copied().map(without_thresholds).collect();
    let saved = run("ipvsadm -Sn");
    assert_same(saved.lines(), lines(&without));
    assert_same(parsed(&saved), &without);

    let listed = run("ipvsadm -Ln --thresholds");
    let rows = listed.lines().filter_map(|line| {
        let mut words = line.trim_start().strip_prefix("-> ")?.split_whitespace().map(str::to_owned);
        // The line of titles has no number there.
        Some((words.next()?, words.next()?.parse::<u32>().ok()?, words.next()?.parse::<u32>().ok()?))
    });
    let wanted = messages.iter().filter_map(|message| match message {
        Message::AddRealServer(_, real) => {
            Some((real.socket_address().to_string(), real.upper_threshold, real.lower_threshold))
        }
        _ => None,
    });
    // A mark's real servers have the addresses of others.
    assert_same(rows.collect::<BTreeSet<_>>(), wanted.collect::<BTreeSet<_>>());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn what_is_written_here_ipvsadm_reads() {
    let mut client = client();
    let messages = messages();
    assert!(messages.len() > 1000, "{}", messages.len());
    apply(&mut client, &messages);
    assert_ipvsadm_reads(&messages);
    assert_same(dump(&mut client), messages);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn what_ipvsadm_restores_from_rules_written_here_is_read_here() {
    let mut client = client();
    let messages = messages();
    run_with_input("ipvsadm -R", &text(&messages));
    assert_same(dump(&mut client), messages);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn what_is_changed_here_ipvsadm_reads() {
    let mut client = client();
    let wanted = messages();
    // First each as different as can be from what it is to become.
    let first = wanted.iter().map(|message| match *message {
        Message::AddVirtualServer(server) => Message::AddVirtualServer(VirtualServer {
            scheduler: Scheduler::WeightedRoundRobin,
            scheduler_flags: Flags::FLAG_2,
            persistence: Some(Persistence::new(77, server.id.family())),
            one_packet: !server.one_packet,
            ..round_robin(server.id)
        }),
        Message::AddRealServer(id, real) => Message::AddRealServer(
            id,
            RealServer {
                weight: 99,
                upper_threshold: 9,
                lower_threshold: 8,
                forwarding: Forwarding::Tunnel(Tunnel::IpIp),
                ..real
            },
        ),
        other => other,
    });
    let change = |message: &Message| match *message {
        Message::AddVirtualServer(server) => Message::SetVirtualServer(server),
        Message::AddRealServer(id, real) => Message::SetRealServer(id, real),
        other => other,
    };
    let first: Vec<_> = first.collect();
    let changes: Vec<_> = wanted.iter().map(change).collect();
    apply(&mut client, &first);
    apply(&mut client, &changes);
    assert_ipvsadm_reads(&wanted);
    assert_same(dump(&mut client), &wanted);

    // And ipvsadm, from the same rules.
    client.flush().unwrap();
    apply(&mut client, &first);
    run_with_input("ipvsadm -R", &text(&changes));
    assert_same(dump(&mut client), &wanted);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_save_example_matches_ipvsadm_and_restore_reads_both() {
    let mut client = client();
    let wanted = messages();
    apply(&mut client, &wanted);
    let (ours, theirs) = (run(&example("save")), run("ipvsadm -Sn"));
    assert_same(ours.lines().map(|line| line.split(" -x ").next()), theirs.lines().map(Some));
    assert_same(parsed(&ours), &wanted);

    // Replaced, or there already.
    run_with_input(&format!("{} --replace", example("restore")), &ours);
    assert_same(dump(&mut client), &wanted);
    client.flush().unwrap();
    run_with_input(&example("restore"), &theirs);
    assert_same(dump(&mut client), wanted.into_iter().map(without_thresholds));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn every_other_command_does_the_same_from_a_rule() {
    let mut client = client();
    lab::link::add_route_dev("224.0.0.0/4", "lo").unwrap();
    let web = tcp("10.96.0.1:80");
    let mark = VirtualServerId::firewall_mark(7, Family::Ipv6).unwrap();
    let other = real("10.1.0.8:80");
    let base = [
        Message::AddVirtualServer(round_robin(web)),
        Message::AddVirtualServer(round_robin(mark)),
        Message::AddRealServer(web, real("10.1.0.7:8080")),
        Message::AddRealServer(web, other),
    ];
    let lo = "lo".parse().unwrap();
    let daemon = SyncDaemon {
        sync_id: 7,
        max_length: 1400.try_into().ok(),
        group: "224.0.0.82".parse().ok(),
        port: 9000.try_into().ok(),
        ttl: 9.try_into().ok(),
        ..SyncDaemon::new(SyncRole::Master, lo)
    };
    let changes = [
        Message::DeleteVirtualServer(mark),
        Message::DeleteRealServer(web, other.socket_address()),
        Message::SetTimeouts(Timeouts { tcp: 901, tcp_fin: 0, udp: 2_678_400 }),
        Message::ZeroVirtualServer(web),
        Message::Zero,
        Message::StartSyncDaemon(daemon),
        Message::StartSyncDaemon(SyncDaemon::new(SyncRole::Backup, lo)),
    ];
    let state = |client: &mut Client| {
        (dump(client), client.timeouts().unwrap(), run("ipvsadm -L --daemon"), client.virtual_servers().unwrap())
    };
    let undo = [
        Message::StopSyncDaemon(SyncRole::Master),
        Message::StopSyncDaemon(SyncRole::Backup),
        Message::SetTimeouts(Timeouts { tcp: 900, tcp_fin: 120, udp: 300 }),
        Message::Flush,
    ];
    apply(&mut client, &base);
    apply(&mut client, &changes);
    let ours = state(&mut client);
    assert!(ours.2.contains("maxlen=1400, group=224.0.0.82, port=9000, ttl=9") && ours.0.len() == 2, "{ours:?}");
    run_with_input("ipvsadm -R", &text(&undo));
    let empty = state(&mut client);
    assert_eq!((empty.0.len(), empty.1.tcp, empty.2.as_str()), (0, 900, ""));
    run_with_input("ipvsadm -R", &text(&base));
    run_with_input("ipvsadm -R", &text(&changes));
    assert_eq!(state(&mut client), ours);
    apply(&mut client, &undo);
    assert_eq!(state(&mut client), empty);
}

/// Feeds a line to ipvsadm, and returns what it has to say against it.
fn ipvsadm(line: &str) -> String {
    let mut command = Command::new("ipvsadm");
    command.arg("-R").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), format!("{line}\n").as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stderr).unwrap() + &String::from_utf8(output.stdout).unwrap()
}

/// What lines are made of, right and wrong: mostly a command and its virtual server, then anything.
fn random_line(state: &mut u64) -> String {
    const COMMANDS: &[&str] = &["-A", "--add-service", "-E", "-D", "-a", "--add-server", "-e", "-d", "-Z", "-C", ""];
    const SERVERS: &[&str] = &[
        "-t 10.9.9.9:80",
        "-f 9",
        "-f9 -6",
        "--tcp-service=[fd00::9]:80",
        "-t 1.2.3.4:80",
        "-u 1.2.3.4:53",
        "--sctp-service 1.2.3.4:9",
        "-t fd00::1",
        "-t 1.2.3.4",
        "",
    ];
    const OPTIONS: &[&str] = &[
        "-s rr",
        "-s=sh",
        "-smh",
        "--scheduler wlc",
        "-p",
        "-p 77",
        "-p77",
        "-p=0",
        "--persistent=2678400",
        "-M 255.255.0.0",
        "-M 64",
        "--pe sip",
        "-o",
        "-b flag-1",
        "-b sh-port,flag-2",
        "-b mh-fallback",
        "-op",
        "-po",
        "-6",
    ];
    const REAL_OPTIONS: &[&str] = &[
        "-r 10.1.0.7:80",
        "-r 10.1.0.7",
        "-r [fd00:1::7]:80",
        "-r fd00:1::7",
        "-m",
        "-g",
        "-i",
        "-w 0",
        "-w=2147483647",
        "-w 2147483648",
        "-x10 -y5",
        "-x 5 -y 10",
        "--tun-type gue",
        "--tun-type=gre",
        "--tun-type ipip",
        "--tun-port 6080",
        "--tun-csum",
        "--tun-nocsum",
        "--tun-remcsum",
        "-im",
        "-gw5",
    ];
    let mut pick = |from: &[&'static str]| from[random(state) % from.len()];
    let command = pick(COMMANDS);
    let mut words = vec![pick(SERVERS)];
    let (options, most) = match command {
        "-a" | "--add-server" | "-e" | "-d" => {
            words.push(pick(&REAL_OPTIONS[..4]));
            (&REAL_OPTIONS[4..], ["", " ", "  "])
        }
        "-A" | "--add-service" | "-E" => (OPTIONS, ["", " ", "  "]),
        _ => (OPTIONS, ["", "", " "]),
    };
    words.extend(pick(&most).chars().map(|_| pick(options)));
    if pick(&["in order", "in order", "in order", "not"]) == "not" {
        words.reverse();
    }
    words.insert(0, command);
    words.join(" ")
}

/// What is read here means the same to ipvsadm, and what is refused here it refuses, but for what `rules` documents.
fn lines_by_chance_mean_the_same_to_ipvsadm_or_are_refused_by_both(seed: u64) {
    let mut client = client();
    let base = parsed(
        "-A -t 10.9.9.9:80\n-A -f 9\n-A -f 9 -6\n-A -t [fd00::9]:80\n-a -t 10.9.9.9:80 -r 10.1.0.7 -m\n-a -f 9 -r 10.1.0.7:80",
    );
    let (mut read, mut refused) = (0, 0);
    let mut state = seed;
    for _ in 0..140 {
        let line = random_line(&mut state);
        let Some(ours) = rules::parse(&line).next() else { continue };
        client.flush().unwrap();
        apply(&mut client, &base);
        let complaint = ipvsadm(&line);
        let after = dump(&mut client);
        match ours {
            Ok(Rule { message, .. }) => {
                client.flush().unwrap();
                apply(&mut client, &base);
                let result = client.apply(&[message]).unwrap().remove(0);
                assert_eq!(result.is_ok(), complaint.is_empty(), "{line}\n{message:?}\n{result:?}\n{complaint}");
                assert_same(dump(&mut client), after);
                read += 1;
            }
            Err(error) => {
                let error = error.to_string();
                let stricter = ["has to come after", "is no mask: for IPv4", "goes with persistence"];
                let stricter = stricter.iter().any(|reason| error.contains(reason));
                assert!(stricter || !complaint.is_empty(), "{line}\n{error}");
                refused += 1;
            }
        }
    }
    assert!(read > 30 && refused > 30, "{read} read, {refused} refused");
}

/// A test for each of these first states. For each line a program is run, so there are few lines in each.
macro_rules! lines_by_chance {
    ($($name:ident $seed:literal),+) => {
        mod lines_by_chance_mean_the_same_to_ipvsadm_or_are_refused_by_both {
            $(
                #[test]
                #[ignore = "needs a kernel with IPVS: cargo xtask test"]
                fn $name() {
                    super::lines_by_chance_mean_the_same_to_ipvsadm_or_are_refused_by_both($seed);
                }
            )+
        }
    };
}

lines_by_chance!(first 0x9e37_79b9_7f4a_7c15, second 0x7f4a_7c15_9e37_79b9, third 0x1234_5678_9abc_def1, fourth 0x0fed_cba9_8765_4321,
    fifth 0x5eed_0000_0000_0005);

/// Those limits of ipvsadm that `rules` documents: should a later one be without them, this test says so.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn what_ipvsadm_loses_or_refuses_of_its_own() {
    let mut client = client();
    let add = |server| Message::AddVirtualServer(server);
    let mark = VirtualServerId::firewall_mark(u32::MAX, Family::Ipv4).unwrap();
    let flagged =
        VirtualServer { scheduler_flags: Flags::FLAG_3, ..VirtualServer::new(mark, Scheduler::SourceHashing) };
    apply(&mut client, &[add(flagged)]);
    assert_eq!(run("ipvsadm -Sn"), "-A -f -1 -s sh -b \n");
    assert_eq!(run(&example("save")), "-A -f 4294967295 -s sh -b flag-3\n");
    assert_eq!(ipvsadm("-A -f -1 -s rr"), "invalid fwmark value `-1' specified\n");
    assert_eq!(parsed("-A -f -1 -s sh -b flag-3"), [add(flagged)]);

    client.flush().unwrap();
    let web = tcp("10.96.0.1:80");
    let bypass = RealServer { forwarding: Forwarding::Bypass, ..real("10.1.0.7:80") };
    let local = RealServer { forwarding: Forwarding::Local, ..real("10.1.0.8:80") };
    let reals = [bypass, local].map(|server| Message::AddRealServer(web, server));
    apply(&mut client, &[&[add(round_robin(web))], &reals[..]].concat());
    let saved = run("ipvsadm -Sn");
    assert!(saved.contains("-r 10.1.0.7:80 (null) -w 1\n") && saved.contains("-r 10.1.0.8:80 -g -w 1\n"), "{saved}");

    for (line, theirs) in [
        // The port of the virtual server.
        ("-a -t 10.96.0.1:80 -r 10.1.0.9:8080 -g", ""),
        // A mask of four parts, and one that is set back by the address.
        ("-A -t 1.2.3.4:80 -p -M 24", ""),
        ("-A -M 64 -t [fd00::1]:80 -p", ""),
        ("# a comment", "Try `ipvsadm -h' or 'ipvsadm --help' for more information.\n"),
    ] {
        assert_eq!(ipvsadm(line), theirs, "{line}");
    }
    let saved = run("ipvsadm -Sn");
    assert!(saved.contains("-r 10.1.0.9:80 -g"), "{saved}");
    assert!(saved.contains("-M 0.0.0.24\n") && saved.contains("-A -t [fd00::1]:80 -s wlc -p 360\n"), "{saved}");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn restore_names_the_line_that_the_kernel_refuses_or_that_cannot_be_read() {
    let mut client = client();
    let restore = |rules: &str| {
        let mut child = Command::new(example("restore")).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), rules.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    let refused = restore("-A -t 10.0.0.1:80\n\n# again\n-A -t 10.0.0.1:80\n-A -t 10.0.0.2:80\n");
    let exists = "restore: line 4: cannot add virtual server TCP 10.0.0.1:80: File exists (os error 17)\n";
    assert_eq!(refused, (false, format!("{exists}restore: 1 of 3 rules were refused\n")));
    assert_eq!(dump(&mut client).len(), 2);
    let (succeeded, errors) = restore("-C\n-A -t web:80\n-x\n");
    let lines: Vec<_> = errors.lines().collect();
    assert!(!succeeded && lines[0].starts_with("restore: line 2, column 7: \"web:80\" is not"), "{errors}");
    assert!(lines[1].starts_with("restore: line 3, column 1:") && lines[2] == "restore: nothing was carried out");
    assert_eq!(dump(&mut client).len(), 2);
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
    client.set_timeouts(Timeouts { tcp: 901, tcp_fin: 121, udp: 301 }).unwrap();
    assert_eq!(run("ipvsadm -Ln --timeout").trim(), "Timeout (tcp tcpfin udp): 901 121 301");
}

/// A tunnel can lead to the other family.
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
