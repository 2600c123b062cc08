//! Who answers: the backends, and a daemon of the node. Each says its name and the source address it sees.
//!
//! They are threads that end with the process; their sockets stay in the namespaces where they were opened.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use anyhow::{Context, Result};
use lab::netns::Namespace;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::network::Network;

/// The port of the backends.
const BACKEND: u16 = 8080;
/// The port of the node's daemon.
const HOST: u16 = 2222;

/// What clients say.
pub(crate) const HELLO: &str = "hello";
/// What a client says that takes an answer from another address than it asked. A daemon with one UDP socket for all
/// addresses gives such answers on a node with several addresses, and one with a socket for each does not.
pub(crate) const ANYWHERE: &str = "hello from anywhere";

/// Starts all of them.
pub(crate) fn start(network: &Network) -> Result<()> {
    for backend in ["pod-a", "remote-pod"] {
        serve(network.namespace(backend)?, backend, BACKEND, &[])?;
    }
    serve(network.node()?, "host", HOST, &network.addresses_of_node()?)
}

/// Listens on all addresses of both families, and for datagrams on some addresses by themselves.
fn serve(namespace: &Namespace, name: &'static str, port: u16, apart: &[IpAddr]) -> Result<()> {
    let all = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
    let open = || -> io::Result<(TcpListener, UdpSocket, Vec<UdpSocket>)> {
        let apart = apart.iter().map(|address| udp_socket(SocketAddr::new(*address, port)));
        Ok((TcpListener::bind(all)?, udp_socket(all)?, apart.collect::<io::Result<_>>()?))
    };
    let (tcp, udp, apart) = namespace.run(open)?.with_context(|| format!("{name} cannot listen"))?;
    for socket in apart {
        let anywhere = udp.try_clone()?;
        thread::spawn(move || answer_datagrams(&socket, &anywhere, name));
    }
    thread::spawn(move || answer_datagrams(&udp, &udp, name));
    thread::spawn(move || {
        for stream in tcp.incoming().flatten() {
            thread::spawn(move || answer(stream, name));
        }
    });
    Ok(())
}

/// A socket that others may share the port with.
fn udp_socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    Ok(socket.into())
}

fn answer_datagrams(socket: &UdpSocket, anywhere: &UdpSocket, name: &str) {
    let mut buffer = [0; 256];
    loop {
        // An error is about a datagram sent before.
        let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
        let reply = format!("{name} {}", peer.ip().to_canonical());
        if &buffer[..length] == ANYWHERE.as_bytes() {
            let peer = match peer.ip() {
                IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), peer.port()),
                IpAddr::V6(_) => peer,
            };
            let _ = anywhere.send_to(reply.as_bytes(), peer);
        } else {
            let _ = socket.send_to(reply.as_bytes(), peer);
        }
    }
}

/// A server's side of a connection. One that breaks ends like one that is closed.
fn answer(stream: TcpStream, name: &str) {
    let Ok(peer) = stream.peer_addr() else { return };
    let reply = format!("{name} {}\n", peer.ip().to_canonical());
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while matches!(stream.read_line(&mut line), Ok(1..)) {
        if stream.get_mut().write_all(reply.as_bytes()).is_err() {
            return;
        }
        line.clear();
    }
}
