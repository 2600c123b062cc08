//! Packets through virtual servers, in the lab, and what the kernel counts.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use common::{client, local_service, round_robin};
use ipvs_netlink::{Client, Protocol, RealServerEntry, VirtualServerId};
use lab::wait::LIMIT;

/// Reads the only real server until it is as wanted: the kernel brings statistics up to date every two seconds.
fn wait_for(client: &mut Client, id: &VirtualServerId, wanted: impl Fn(&RealServerEntry) -> bool) -> RealServerEntry {
    let until = Instant::now() + LIMIT;
    loop {
        let entry = client.real_servers(id).unwrap()[0];
        if wanted(&entry) {
            return entry;
        }
        assert!(Instant::now() < until, "{entry:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn tcp_connections_are_counted_while_they_are_active_and_after() {
    let mut client = client();
    let served = [("10.96.0.1", "10.1.0.7"), ("fd00:96::1", "fd00:1::7")].map(|(virtual_ip, real_ip)| {
        let id = local_service(&mut client, Protocol::Tcp, virtual_ip, real_ip);
        assert!(client.real_servers(&id).unwrap()[0].is_idle());
        let listener = TcpListener::bind(SocketAddr::new(real_ip.parse().unwrap(), 8080)).unwrap();
        let connections: Vec<_> = (0..3)
            .map(|_| {
                let mut near = TcpStream::connect(SocketAddr::new(virtual_ip.parse().unwrap(), 80)).unwrap();
                let (mut far, _) = listener.accept().unwrap();
                near.write_all(&[1; 100]).unwrap();
                far.read_exact(&mut [0; 100]).unwrap();
                far.write_all(&[2; 200]).unwrap();
                near.read_exact(&mut [0; 200]).unwrap();
                (near, far)
            })
            .collect();
        (id, connections)
    });
    for (id, connections) in served {
        let counted = |entry: &RealServerEntry| entry.active_connections == 3 && entry.stats.connections == 3;
        let entry = wait_for(&mut client, &id, counted);
        assert_eq!(entry.inactive_connections, 0);
        assert!(!entry.is_idle());
        // At least the handshake and the data of each, with headers.
        assert!(entry.stats.incoming_packets >= 9 && entry.stats.incoming_bytes > 3 * 100, "{entry:?}");
        assert!(entry.stats.outgoing_packets >= 6 && entry.stats.outgoing_bytes > 3 * 200, "{entry:?}");
        assert!(entry.stats.outgoing_bytes > entry.stats.incoming_bytes, "{entry:?}");
        assert!(entry.stats.incoming_byte_rate > 0, "{entry:?}");
        let whole = client.virtual_server(&id).unwrap();
        assert_eq!(whole.stats.connections, 3);
        assert!(whole.stats.incoming_bytes >= entry.stats.incoming_bytes);

        drop(connections);
        let entry = wait_for(&mut client, &id, |entry| entry.active_connections == 0);
        assert_eq!(entry.inactive_connections, 3);
        assert!(!entry.is_idle());
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn flows_of_a_persistent_udp_server_are_counted_with_their_template() {
    let mut client = client();
    let id = local_service(&mut client, Protocol::Udp, "10.96.0.1", "10.1.0.7");
    client.set_virtual_server(&round_robin(id).persistent(60)).unwrap();
    let far = UdpSocket::bind("10.1.0.7:8080").unwrap();
    for _ in 0..2 {
        let near = UdpSocket::bind("10.96.0.1:0").unwrap();
        near.connect("10.96.0.1:80").unwrap();
        near.send(&[1; 50]).unwrap();
        let (_, from) = far.recv_from(&mut [0; 50]).unwrap();
        far.send_to(&[2; 60], from).unwrap();
        assert_eq!(near.recv(&mut [0; 100]).unwrap(), 60);
    }
    let entry = wait_for(&mut client, &id, |entry| entry.stats.connections > 0);
    assert_eq!((entry.active_connections, entry.inactive_connections, entry.persistent_connections), (0, 2, 1));
    let stats = entry.stats;
    assert_eq!((stats.connections, stats.incoming_packets, stats.outgoing_packets), (2, 2, 2));
    // 20 bytes of IP header and 8 of UDP.
    assert_eq!((stats.incoming_bytes, stats.outgoing_bytes), (2 * 78, 2 * 88));
    assert_eq!(client.virtual_server(&id).unwrap().stats.connections, 2);
}
