//! One try of a client: a connection, a datagram or a ping, and what came of it in the words of the recordings.

use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto};

use super::servers::{ANYWHERE, HELLO};

/// How long a client waits.
pub(crate) const TIMEOUT: Duration = Duration::from_millis(1200);

/// Who answered, and the source it saw; or the word for what happened instead.
pub(crate) type Try = Result<Answer, String>;

/// What a server says.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Answer {
    pub(crate) backend: String,
    pub(crate) source: IpAddr,
}

/// A connection that stays open.
#[derive(Debug)]
pub(crate) struct Connection(BufReader<TcpStream>);

/// A socket that sends datagrams from one port to one place.
#[derive(Debug)]
pub(crate) struct Flow(UdpSocket);

impl Connection {
    pub(crate) fn open(target: SocketAddr) -> Result<Self, String> {
        let stream = TcpStream::connect_timeout(&target, TIMEOUT).map_err(|error| word(&error))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Asks on the connection; the answer has this long to come.
    pub(crate) fn ask(&mut self, limit: Duration) -> Try {
        let mut line = String::new();
        let asked = self.0.get_ref().set_read_timeout(Some(limit)).and_then(|()| {
            self.0.get_mut().write_all(format!("{HELLO}\n").as_bytes())?;
            self.0.read_line(&mut line)
        });
        asked.map_err(|error| word(&error)).and_then(|_| parse(&line))
    }
}

impl Flow {
    pub(crate) fn open(target: SocketAddr) -> Result<Self, String> {
        let any = if target.is_ipv6() { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { Ipv4Addr::UNSPECIFIED.into() };
        let open = || -> io::Result<UdpSocket> {
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect(target)?;
            socket.set_read_timeout(Some(TIMEOUT))?;
            Ok(socket)
        };
        open().map(Self).map_err(|error| word(&error))
    }

    pub(crate) fn ask(&self) -> Try {
        self.say(HELLO)
    }

    fn say(&self, words: &str) -> Try {
        let mut buffer = [0; 256];
        let length = self.0.send(words.as_bytes()).and_then(|_| self.0.recv(&mut buffer));
        let length = length.map_err(|error| word(&error))?;
        parse(&String::from_utf8_lossy(&buffer[..length]))
    }
}

/// One connection that is closed again.
pub(crate) fn tcp(target: SocketAddr) -> Try {
    Connection::open(target)?.ask(TIMEOUT)
}

/// One datagram from a port of its own.
pub(crate) fn udp(target: SocketAddr) -> Try {
    Flow::open(target)?.ask()
}

/// One datagram whose answer may come from another address of whoever has it.
pub(crate) fn udp_from_anywhere(target: SocketAddr) -> Try {
    Flow::open(target)?.say(ANYWHERE)
}

/// One echo request: `reply`, or the word for what happened instead.
pub(crate) fn ping(address: IpAddr) -> String {
    // In a datagram socket of this kind the kernel fills in identifier and checksum, and sorts the replies.
    const REQUEST: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, 1];
    const REQUEST_V6: [u8; 8] = [128, 0, 0, 0, 0, 0, 0, 1];
    let (family, protocol, request) = match address {
        IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP, REQUEST),
        IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6, REQUEST_V6),
    };
    let ping = || -> io::Result<()> {
        let socket = rustix::net::socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(protocol))?;
        // Only a connected socket hears of refusals.
        rustix::net::connect(&socket, &SocketAddr::new(address, 0))?;
        let socket = UdpSocket::from(socket);
        socket.set_read_timeout(Some(TIMEOUT))?;
        socket.send(&request)?;
        socket.recv(&mut [0; 64]).map(|_| ())
    };
    ping().map_or_else(|error| word(&error), |()| "reply".to_owned())
}

fn parse(line: &str) -> Try {
    let answer = line.trim_end().split_once(' ').and_then(|(backend, source)| {
        let source: IpAddr = source.parse().ok()?;
        Some(Answer { backend: backend.to_owned(), source })
    });
    answer.ok_or_else(|| if line.is_empty() { "closed".to_owned() } else { format!("an answer of {line:?}") })
}

/// What the recordings call an error.
fn word(error: &io::Error) -> String {
    let word = match error.kind() {
        ErrorKind::ConnectionRefused => "refused",
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "reset",
        ErrorKind::TimedOut | ErrorKind::WouldBlock => "timeout",
        ErrorKind::PermissionDenied => "not permitted",
        ErrorKind::NetworkUnreachable => "network unreachable",
        ErrorKind::HostUnreachable => "host unreachable",
        _ => return error.to_string(),
    };
    word.to_owned()
}
