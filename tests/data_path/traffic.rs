//! Servers that say their name and the source they see, and clients that tell in one word what went wrong.

use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use lab::netns::Namespace;
use rustix::net::{Shutdown, shutdown};

/// How long a client waits for an answer or a refusal that must come. The tests share one processor, some keep it busy,
/// and the machine around them may stand still for seconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How long a client waits before it says that nothing came: time for three of its packets.
pub(crate) const SILENCE: Duration = Duration::from_secs(4);

/// Who answered, and the source it saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) backend: String,
    pub(crate) source: IpAddr,
}

/// An answer, or a word for what happened instead.
pub(crate) type Try = Result<Answer, String>;

/// Somebody who answers on one port, by TCP and UDP, until this value goes away.
pub(crate) struct Server {
    tcp: Arc<TcpListener>,
    udp: Arc<UdpSocket>,
    is_over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(namespace: &Namespace, name: &str, port: u16) -> Self {
        let all = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
        let open = || -> io::Result<_> { Ok((Arc::new(TcpListener::bind(all)?), Arc::new(UdpSocket::bind(all)?))) };
        let (tcp, udp) = namespace.run(open).unwrap().unwrap();
        let is_over = Arc::new(AtomicBool::new(false));
        let accept = {
            let (tcp, name, is_over) = (tcp.clone(), Arc::<str>::from(name), is_over.clone());
            move || {
                while !is_over.load(Ordering::Relaxed) {
                    let Ok((stream, peer)) = tcp.accept() else { continue };
                    let name = name.clone();
                    thread::spawn(move || answer(stream, peer, &name));
                }
            }
        };
        let answer_datagrams = {
            let (udp, name, is_over) = (udp.clone(), name.to_owned(), is_over.clone());
            move || {
                let mut buffer = [0; 64];
                while !is_over.load(Ordering::Relaxed) {
                    // An error is about a datagram sent before.
                    let Ok((length, peer)) = udp.recv_from(&mut buffer) else { continue };
                    let said = String::from_utf8_lossy(&buffer[..length]).into_owned();
                    let _ = udp.send_to(format!("{name} {} {said}", peer.ip().to_canonical()).as_bytes(), peer);
                }
            }
        };
        Self { tcp, udp, is_over, threads: vec![thread::spawn(accept), thread::spawn(answer_datagrams)] }
    }
}

impl Drop for Server {
    /// Connections that are open stay so.
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        // Both wake up who waits.
        let _ = shutdown(&self.tcp, Shutdown::Both);
        let own = self.udp.local_addr().map(|own| SocketAddr::new(Ipv6Addr::LOCALHOST.into(), own.port()));
        let _ = own.and_then(|own| self.udp.send_to(b"", own));
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A server's side of a connection: a line for each line.
fn answer(stream: TcpStream, peer: SocketAddr, name: &str) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while matches!(stream.read_line(&mut line), Ok(1..)) {
        let reply = format!("{name} {} {line}", peer.ip().to_canonical());
        if stream.get_mut().write_all(reply.as_bytes()).is_err() {
            return;
        }
        line.clear();
    }
}

/// A connection that stays open.
pub(crate) struct Connection(BufReader<TcpStream>);

impl Connection {
    pub(crate) fn open(target: &str, patience: Duration) -> Result<Self, String> {
        let stream = TcpStream::connect_timeout(&target.parse().unwrap(), patience).map_err(|error| word(&error))?;
        stream.set_read_timeout(Some(patience)).unwrap();
        stream.set_nodelay(true).unwrap();
        Ok(Self(BufReader::new(stream)))
    }

    pub(crate) fn ask(&mut self) -> Try {
        let mut line = String::new();
        let asked = self.0.get_mut().write_all(b"hello\n").and_then(|()| self.0.read_line(&mut line));
        asked.map_err(|error| word(&error)).and_then(|_| parse(&line))
    }
}

/// A socket that sends datagrams from one port to one place.
pub(crate) struct Flow(UdpSocket);

impl Flow {
    pub(crate) fn open(target: &str, patience: Duration) -> Result<Self, String> {
        let any = if target.contains('[') { "[::]:0" } else { "0.0.0.0:0" };
        let open = || -> io::Result<UdpSocket> {
            let socket = UdpSocket::bind(any)?;
            socket.connect(target)?;
            socket.set_read_timeout(Some(patience))?;
            Ok(socket)
        };
        open().map(Self).map_err(|error| word(&error))
    }

    pub(crate) fn ask(&self) -> Try {
        self.send("hello")?;
        self.hear()
    }

    pub(crate) fn send(&self, text: &str) -> Result<(), String> {
        self.0.send(text.as_bytes()).map(drop).map_err(|error| word(&error))
    }

    /// The next answer.
    pub(crate) fn hear(&self) -> Try {
        let mut buffer = [0; 128];
        let length = self.0.recv(&mut buffer).map_err(|error| word(&error))?;
        parse(&String::from_utf8_lossy(&buffer[..length]))
    }
}

/// One connection that is closed again.
pub(crate) fn tcp(target: &str) -> Try {
    tcp_within(PATIENCE, target)
}

pub(crate) fn tcp_within(patience: Duration, target: &str) -> Try {
    Connection::open(target, patience)?.ask()
}

/// One datagram from a port of its own.
pub(crate) fn udp(target: &str) -> Try {
    udp_within(PATIENCE, target)
}

pub(crate) fn udp_within(patience: Duration, target: &str) -> Try {
    Flow::open(target, patience)?.ask()
}

fn parse(line: &str) -> Try {
    let mut words = line.split_whitespace();
    let answer = words
        .next()
        .zip(words.next())
        .and_then(|(backend, source)| Some(Answer { backend: backend.to_owned(), source: source.parse().ok()? }));
    answer.ok_or_else(|| if line.is_empty() { "closed".to_owned() } else { format!("an answer of {line:?}") })
}

fn word(error: &io::Error) -> String {
    let word = match error.kind() {
        ErrorKind::ConnectionRefused => "refused",
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "reset",
        ErrorKind::TimedOut | ErrorKind::WouldBlock => "timeout",
        ErrorKind::PermissionDenied => "not permitted",
        ErrorKind::NetworkUnreachable | ErrorKind::HostUnreachable => "unreachable",
        _ => return error.to_string(),
    };
    word.to_owned()
}
