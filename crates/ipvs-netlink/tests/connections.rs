//! Connections through virtual servers, in the lab, as the kernel's files tell them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use std::{fs, thread};

use common::{client, real, round_robin, run_with_input, tcp};
use ipvs_netlink::{
    Client, Connection, ConnectionState as State, Connections, Family, Forwarding, Message, Origin, Protocol,
    RealServer, SyncDaemon, SyncRole, Totals, Tunnel, VirtualServer, VirtualServerId,
};
use lab::link;
use lab::netns::{End, Namespace, isolate};
use lab::wait::LIMIT;
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketType, ipproto};

/// The whole table, which has to be understood.
fn table() -> Vec<Connection> {
    Connections::of_this_namespace().unwrap().collect::<Result<_, _>>().unwrap()
}

/// The table as soon as it is as wanted.
fn table_with(wanted: impl Fn(&[Connection]) -> bool) -> Vec<Connection> {
    let until = Instant::now() + LIMIT;
    loop {
        let table = table();
        if wanted(&table) {
            // With `--nocapture` one sees it: `tests/proc.rs` has its lines from here.
            eprintln!("{}", fs::read_to_string("/proc/thread-self/net/ip_vs_conn").unwrap());
            return table;
        }
        assert!(Instant::now() < until, "{table:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn only(table: &[Connection]) -> &Connection {
    assert_eq!(table.len(), 1, "{table:?}");
    &table[0]
}

fn templates(table: &[Connection]) -> Vec<&Connection> {
    table.iter().filter(|connection| connection.template().is_some()).collect()
}

fn add_addresses(addresses: &[IpAddr]) {
    for address in addresses {
        link::add_address("lo", &address.to_string()).unwrap();
    }
}

/// Addresses of the two, on this host, and the real server in the virtual server, which is made.
fn serve(client: &mut Client, server: &VirtualServer, virtual_address: SocketAddr, real: RealServer) {
    add_addresses(&[virtual_address.ip(), real.address]);
    client.add_virtual_server(server).unwrap();
    client.add_real_server(&server.id, &real).unwrap();
}

fn udp(address: &str) -> VirtualServerId {
    VirtualServerId::address(Protocol::Udp, address.parse().unwrap())
}

/// One packet there, from any port.
fn send(near: &str, to: &str, data: &[u8]) -> UdpSocket {
    let socket = UdpSocket::bind(near).unwrap();
    socket.connect(to).unwrap();
    socket.send(data).unwrap();
    socket
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn tcp_connections_are_told_with_their_addresses_and_states() {
    let mut client = client();
    assert_eq!(table(), []);
    for (virtual_address, real_address) in [("10.96.0.1:80", "10.1.0.7:8080"), ("[fd00:96::1]:80", "[fd00:1::7]:8080")]
    {
        serve(&mut client, &round_robin(tcp(virtual_address)), virtual_address.parse().unwrap(), real(real_address));
        let listener = TcpListener::bind(real_address).unwrap();
        let near = TcpStream::connect(virtual_address).unwrap();
        let (far, _) = listener.accept().unwrap();
        let here = near.local_addr().unwrap();

        let established =
            |table: &[Connection]| table.iter().any(|c| c.client == here && c.state == State::Established);
        let table = table_with(established);
        let connection = table.iter().find(|connection| connection.client == here).unwrap();
        assert_eq!(connection.protocol, Protocol::Tcp);
        assert_eq!(connection.virtual_address, virtual_address.parse().unwrap());
        assert_eq!(connection.real_address, real_address.parse().unwrap());
        assert!((890..=900).contains(&connection.expires.as_secs()), "{connection:?}");
        assert_eq!((connection.origin, &connection.persistence), (None, &None));
        assert_eq!(connection.template(), None);

        drop(near);
        table_with(|table| table.iter().any(|c| c.client == here && c.state == State::CloseWait));
        drop(far);
        table_with(|table| table.iter().any(|c| c.client == here && c.state == State::TimeWait));
    }
    assert_eq!(table().len(), 2);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_table_is_that_of_the_threads_own_network_namespace() {
    let mut client = client();
    serve(&mut client, &round_robin(udp("10.96.0.1:80")), "10.96.0.1:80".parse().unwrap(), real("10.1.0.7:8080"));
    send("10.96.0.1:0", "10.96.0.1:80", &[1]);
    assert_eq!(only(&table()).state, State::Udp);
    thread::spawn(|| {
        assert_eq!(table().len(), 1);
        isolate().unwrap();
        assert_eq!(table(), []);
        assert_eq!(Totals::of_this_namespace().unwrap().stats.connections, 0);
    })
    .join()
    .unwrap();
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_template_is_assured_by_a_reply_and_invalidated_with_its_server() {
    let mut client = client();
    for (virtual_address, near, here, there) in [
        ("10.96.0.1:80", "10.96.0.1:0", "10.1.0.7:8080", "10.1.0.8:8080"),
        ("[fd00:96::1]:80", "[fd00:96::1]:0", "[fd00:1::7]:8080", "[fd00:1::8]:8080"),
    ] {
        let id = udp(virtual_address);
        serve(&mut client, &round_robin(id).persistent(60), virtual_address.parse().unwrap(), real(here));
        let far = UdpSocket::bind(here).unwrap();
        let socket = send(near, virtual_address, &[1; 50]);
        let mine = |connection: &&Connection| connection.virtual_address.ip() == socket.local_addr().unwrap().ip();

        let both = table();
        let both: Vec<_> = both.iter().filter(mine).collect();
        assert_eq!(both.len(), 2, "{both:?}");
        let template = both.iter().find(|connection| connection.client.port() == 0).unwrap();
        assert_eq!((template.state, template.protocol), (State::None, Protocol::Udp));
        assert_eq!(template.client.ip(), socket.local_addr().unwrap().ip());
        assert_eq!(template.virtual_address, virtual_address.parse().unwrap());
        assert_eq!(template.real_address, here.parse().unwrap());
        let known = template.template().unwrap();
        assert_eq!(
            (known.assured, known.invalidated, known.every_port, known.firewall_mark),
            (false, false, false, None)
        );
        let flow = both.iter().find(|connection| connection.client.port() != 0).unwrap();
        assert_eq!((flow.state, flow.template()), (State::Udp, None));

        let (_, from) = far.recv_from(&mut [0; 50]).unwrap();
        far.send_to(&[2; 60], from).unwrap();
        socket.recv(&mut [0; 60]).unwrap();
        let assured = table();
        let assured = assured.iter().filter(mine).find_map(Connection::template).unwrap();
        assert!(assured.assured && !assured.invalidated);

        // The client's next flow finds out that its real server is gone.
        client.delete_real_server(&id, here.parse().unwrap()).unwrap();
        add_addresses(&[there.parse::<SocketAddr>().unwrap().ip()]);
        client.add_real_server(&id, &real(there)).unwrap();
        send(near, virtual_address, &[1; 50]);
        let table = table_with(|_| true);
        let told: Vec<_> = table.iter().filter(mine).filter_map(Connection::template).collect();
        assert_eq!(told.len(), 2, "{table:?}");
        assert_eq!(told.iter().filter(|template| template.invalidated).count(), 1, "{table:?}");
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_template_of_a_firewall_mark_tells_the_mark() {
    let mut client = client();
    let chain = "type route hook output priority mangle\nudp dport { 80, 90 } meta mark set 0x70007";
    run_with_input("nft -f -", &format!("table inet marks {{\nchain output {{\n{chain}\n}}\n}}\n"));
    for (family, virtual_address, near, real_address) in [
        (Family::Ipv4, "10.96.0.1:80", "10.96.0.1:0", "10.1.0.7:0"),
        (Family::Ipv6, "[fd00:96::1]:90", "[fd00:96::1]:0", "[fd00:1::7]:0"),
    ] {
        let id = VirtualServerId::firewall_mark(0x7_0007, family).unwrap();
        let address: SocketAddr = virtual_address.parse().unwrap();
        serve(&mut client, &round_robin(id).persistent(60), address, real(real_address));
        send(near, virtual_address, &[1]);
        let table = table_with(|table| table.iter().any(|connection| connection.virtual_address == address));
        let templates = templates(&table);
        let template = templates.iter().find(|template| template.client.is_ipv4() == address.is_ipv4()).unwrap();
        assert_eq!(template.protocol, Protocol::Other(0));
        assert_eq!(template.real_address, real_address.parse().unwrap());
        let known = template.template().unwrap();
        assert_eq!(known.firewall_mark.map(u32::from), Some(0x7_0007));
        assert!(known.every_port && !known.assured);
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_template_has_the_data_of_its_persistence_engine() {
    let mut client = client();
    let id = udp("10.96.0.1:5060");
    let engine = Some("sip".parse().unwrap());
    let server = VirtualServer { engine, one_packet: true, ..round_robin(id).persistent(60) };
    serve(&mut client, &server, "10.96.0.1:5060".parse().unwrap(), real("10.1.0.7:5060"));
    let invite = b"INVITE sip:a@b SIP/2.0\r\nCall-ID: 7~%[{?}]@10.96.0.1\r\nCSeq: 1 INVITE\r\n\r\n";
    send("10.96.0.1:0", "10.96.0.1:5060", invite);
    let table = table_with(|table| !templates(table).is_empty());
    let data = templates(&table)[0].persistence.as_ref().unwrap();
    assert_eq!(data.engine.as_str(), "sip");
    assert_eq!(data.data, b"7~%[{?}]@10.96.0.1");
}

/// A socket of SCTP at an address.
fn sctp_socket(near: &str) -> OwnedFd {
    let socket = net::socket(AddressFamily::INET, SocketType::STREAM, Some(ipproto::SCTP)).unwrap();
    net::bind(&socket, &near.parse::<SocketAddr>().unwrap()).unwrap();
    socket
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn sctp_has_states_of_its_own() {
    let mut client = client();
    let address: SocketAddr = "10.96.0.1:80".parse().unwrap();
    let id = VirtualServerId::address(Protocol::Sctp, address);
    serve(&mut client, &round_robin(id), address, real("10.1.0.7:8080"));
    let near = sctp_socket("10.96.0.1:5001");
    assert_eq!(net::connect(&near, &address), Err(Errno::CONNREFUSED));
    assert_eq!(only(&table_with(|_| true)).state, State::Rejected);
    let far = sctp_socket("10.1.0.7:8080");
    net::listen(&far, 1).unwrap();
    let near = sctp_socket("10.96.0.1:5002");
    net::connect(&near, &address).unwrap();
    let table = table_with(|table| table.iter().any(|connection| connection.state == State::Established));
    let connection = table.iter().find(|connection| connection.client.port() == 5002).unwrap();
    assert_eq!((connection.protocol, connection.state), (Protocol::Sctp, State::Established));
    drop(near);
    table_with(|table| table.iter().any(|c| c.client.port() == 5002 && c.state != State::Established));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_real_server_at_the_end_of_a_tunnel_may_be_of_the_other_family() {
    let mut client = client();
    link::add_dummy("dummy0", &["192.168.7.1/24", "fd07::1/64"]).unwrap();
    for (virtual_address, near, real_address) in
        [("10.96.0.1:80", "10.96.0.1:0", "[fd07::9]:80"), ("[fd00:96::1]:80", "[fd00:96::1]:0", "192.168.7.9:80")]
    {
        let id = udp(virtual_address);
        let address: SocketAddr = virtual_address.parse().unwrap();
        add_addresses(&[address.ip()]);
        client.add_virtual_server(&round_robin(id)).unwrap();
        let real = RealServer { forwarding: Forwarding::Tunnel(Tunnel::IpIp), ..real(real_address) };
        client.add_real_server(&id, &real).unwrap();
        send(near, virtual_address, &[1]);
        let table = table_with(|table| table.iter().any(|connection| connection.virtual_address == address));
        let connection = table.iter().find(|connection| connection.virtual_address == address).unwrap();
        assert_eq!(connection.real_address, real_address.parse().unwrap());
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_node_takes_over_the_connections_that_another_tells_it() {
    let mut client = client();
    let (here, there) = (Namespace::own().unwrap(), Namespace::new().unwrap());
    Namespace::connect(
        End { namespace: &here, device: "eth0", addresses: &["192.168.7.1/24"] },
        End { namespace: &there, device: "eth0", addresses: &["192.168.7.2/24"] },
    )
    .unwrap();
    let daemon = |role| SyncDaemon::new(role, "eth0".parse().unwrap());
    there
        .run(|| {
            let mut client = Client::connect().unwrap();
            let started = client.apply(&[Message::StartSyncDaemon(daemon(SyncRole::Backup))]).unwrap();
            assert!(started[0].is_ok(), "{started:?}");
        })
        .unwrap();
    let started = client.apply(&[Message::StartSyncDaemon(daemon(SyncRole::Master))]).unwrap();
    assert!(started[0].is_ok(), "{started:?}");

    serve(&mut client, &round_robin(tcp("10.96.0.1:80")), "10.96.0.1:80".parse().unwrap(), real("10.1.0.7:8080"));
    let listener = TcpListener::bind("10.1.0.7:8080").unwrap();
    let mut near = TcpStream::connect("10.96.0.1:80").unwrap();
    let (mut far, _) = listener.accept().unwrap();
    for _ in 0..5 {
        near.write_all(&[1]).unwrap();
        far.read_exact(&mut [0]).unwrap();
    }
    let with_origin = || Connections::of_this_namespace_with_origin().unwrap().collect::<Result<Vec<_>, _>>().unwrap();
    let mine = with_origin();
    assert_eq!((only(&mine).origin, only(&mine).state), (Some(Origin::Local), State::Established));
    let theirs = there
        .run(|| {
            let until = Instant::now() + LIMIT;
            loop {
                let theirs = with_origin();
                if !theirs.is_empty() {
                    eprintln!("{}", fs::read_to_string("/proc/thread-self/net/ip_vs_conn_sync").unwrap());
                    return theirs;
                }
                assert!(Instant::now() < until, "it was told nothing");
                thread::sleep(Duration::from_millis(50));
            }
        })
        .unwrap();
    let theirs = only(&theirs);
    assert_eq!(theirs.origin, Some(Origin::Synchronized));
    assert_eq!((theirs.client, theirs.real_address), (near.local_addr().unwrap(), "10.1.0.7:8080".parse().unwrap()));
    for (namespace, role) in [(&here, SyncRole::Master), (&there, SyncRole::Backup)] {
        namespace.run(|| Client::connect().unwrap().apply(&[Message::StopSyncDaemon(role)]).unwrap()).unwrap();
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn totals_are_those_of_all_virtual_servers_gone_or_not() {
    let mut client = client();
    let empty = Totals::of_this_namespace().unwrap();
    assert_eq!((empty.stats.connections, empty.cpus.as_slice()), (0, [].as_slice()));
    for virtual_address in ["10.96.0.1:80", "10.96.0.2:80"] {
        let id = udp(virtual_address);
        let address: SocketAddr = virtual_address.parse().unwrap();
        serve(&mut client, &round_robin(id), address, real(&format!("10.1.0.{}:8080", address.port() + 1)));
        send("127.0.0.1:0", virtual_address, &[1; 50]);
        client.delete_virtual_server(&id).unwrap();
        link::delete_address("lo", "10.1.0.81/32").unwrap();
    }
    let until = Instant::now() + LIMIT;
    let totals = loop {
        let totals = Totals::of_this_namespace_by_cpu().unwrap();
        if totals.stats.connections == 2 && totals.stats.incoming_byte_rate > 0 {
            break totals;
        }
        assert!(Instant::now() < until, "{totals:?}");
        thread::sleep(Duration::from_millis(50));
    };
    for file in ["ip_vs_stats", "ip_vs_stats_percpu"] {
        eprintln!("{}", fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap());
    }
    // 20 bytes of IP header and 8 of UDP.
    assert_eq!((totals.stats.incoming_packets, totals.stats.incoming_bytes), (2, 2 * 78));
    assert_eq!(totals.cpus.iter().map(|cpu| cpu.connections).sum::<u64>(), 2);
    assert_eq!(totals.cpus.iter().map(|cpu| cpu.incoming_bytes).sum::<u64>(), 2 * 78);
    assert!(client.apply(&[Message::Zero]).unwrap()[0].is_ok());
    let zeroed = Totals::of_this_namespace_by_cpu().unwrap();
    assert_eq!((zeroed.stats.connections, zeroed.stats.incoming_bytes), (0, 0));
    assert_eq!(zeroed.cpus, totals.cpus);
}
