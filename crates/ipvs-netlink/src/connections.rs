//! The connection table, which the kernel tells in files of `/proc` alone: netlink has no command for it.

mod line;
mod state;

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::time::Duration;

pub use state::ConnectionState;

use crate::id::Protocol;
use crate::name::Name;
use crate::proc::{self, Lines, ProcError};

/// The connections of a network namespace and its persistence templates, one after the other as they are read, in no
/// particular order.
///
/// ```no_run
/// use ipvs_netlink::Connections;
///
/// for connection in Connections::of_this_namespace()? {
///     let connection = connection?;
///     if connection.virtual_address == "10.96.0.1:80".parse()? && connection.template().is_none() {
///         println!("{} is served by {}", connection.client, connection.real_address);
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// * Lines are read as they are asked for, and a connection takes memory of its own only where a persistence engine has
///   left data with it.
/// * A line that cannot be understood is an error of its own, after which the next line follows. After a failed read
///   nothing follows.
/// * It is no snapshot. The kernel writes some pages of the file at a time, and finds its place by counting through a
///   table it has for all namespaces: where connections come and go meanwhile, one may be missing or come twice.
#[derive(Debug)]
pub struct Connections<R> {
    lines: Lines<R>,
}

impl Connections<BufReader<File>> {
    /// Those of the calling thread's network namespace at the time of the call, from `/proc/thread-self/net/ip_vs_conn`
    /// (that of other processes' main threads is `/proc/PID/net/ip_vs_conn`). Reading it takes no capability.
    ///
    /// Fails with [`ProcError::Open`] where the kernel has no IPVS; unlike [`Client::connect`](crate::Client::connect),
    /// this loads no module.
    pub fn of_this_namespace() -> Result<Self, ProcError> {
        proc::open("/proc/thread-self/net/ip_vs_conn").map(Self::read)
    }

    /// The same with their [origin](Connection::origin) and without [persistence](Connection::persistence) data, from
    /// `/proc/thread-self/net/ip_vs_conn_sync`.
    pub fn of_this_namespace_with_origin() -> Result<Self, ProcError> {
        proc::open("/proc/thread-self/net/ip_vs_conn_sync").map(Self::read)
    }
}

impl<R: BufRead> Connections<R> {
    /// Those in the text of `ip_vs_conn` or `ip_vs_conn_sync`, with the line above them or without.
    pub fn read(reader: R) -> Self {
        Self { lines: Lines::new(reader) }
    }
}

impl<R: BufRead> Iterator for Connections<R> {
    type Item = Result<Connection, ProcError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.lines.next()? {
            Ok(line) if line::is_header(&line) => {}
            Ok(line) => return Some(line::parse(line)),
            Err(error) => return Some(Err(error)),
        }
        self.next()
    }
}

/// A connection, or a persistence template. What forwards its packets, its flags and the firewall mark by which it was
/// scheduled are not in the files.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub struct Connection {
    /// The protocol; `Other(0)`, which the file calls `IP`, for the templates of a virtual server by firewall mark.
    pub protocol: Protocol,
    /// The client's address and port. Of a template: the address under the netmask of the persistence, and 0.
    pub client: SocketAddr,
    /// What the client has connected to: address and port of the virtual server, or of another that it takes by
    /// firewall mark or with port 0. Of the same family as the client. What it is of a template tells
    /// [`Connection::template`].
    pub virtual_address: SocketAddr,
    /// The real server, of the other family where a tunnel leads to it.
    pub real_address: SocketAddr,
    /// Its state.
    pub state: ConnectionState,
    /// How long the kernel still keeps it unless a packet comes, in whole seconds, rounded down; a template on which
    /// connections still depend then gets another minute. The kernel counts milliseconds in 32 bits here: of times
    /// beyond 49 days it shows what is left after taking multiples of 4,294,967.296 s away.
    pub expires: Duration,
    /// Who has made it; `None` in `ip_vs_conn`, which does not tell.
    pub origin: Option<Origin>,
    /// What a persistence engine knows of a template's client; `None` of all else, and in `ip_vs_conn_sync`, which does
    /// not tell.
    pub persistence: Option<PersistenceData>,
}

/// Who has made a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// This kernel (`LOCAL`).
    Local,
    /// Another node's, which told the synchronization daemon of it (`SYNC`); it stays so when its packets come here.
    Synchronized,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Local => "LOCAL",
            Self::Synchronized => "SYNC",
        })
    }
}

/// What a persistence engine tells the client of a template by, beside the address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub struct PersistenceData {
    /// The engine, such as `sip`.
    pub engine: Name,
    /// What it goes by, such as the Call-ID: whatever the client has sent, up to 255 bytes, and up to its first NUL.
    pub data: Vec<u8>,
}

/// What can be known of a persistence template, which keeps a client at its real server.
///
/// That something is a template is a flag in the kernel (`IP_VS_CONN_F_TEMPLATE`) which its files do not show. They
/// show these signs of it, and [`Connection::template`] asks for both:
///
/// * The client's port is 0, as the kernel makes all templates. Alone it proves nothing: a packet can come from port 0,
///   and an FTP data connection has port 0 until its first packet tells the real one.
/// * The state is `NONE` or `ASSURED`. No connection has the second, and all leave the first with the packet that makes
///   them. So it is since Linux 4.19; before, templates of UDP read `UDP`, and are taken for connections here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Template {
    /// The mark, where it is of a virtual server by firewall mark. The virtual address is then none: it has the mark in
    /// its first 32 bits.
    pub firewall_mark: Option<NonZeroU32>,
    /// Whether it keeps the client for all ports of the virtual address, both its ports being 0: so it is with virtual
    /// servers of port 0, port 21 (FTP) and firewall marks.
    pub every_port: bool,
    /// Whether a connection of it was established, or a UDP flow of it answered (`IP_VS_CTPL_S_ASSURED`). Under memory
    /// pressure (sysctl `drop_entry`) those which are not may be dropped.
    pub assured: bool,
    /// Whether it keeps clients no more and only waits for its time to end: the kernel saw that its real server is
    /// gone, or of weight 0 with sysctl `expire_quiescent_template`, and set the real server's port to 65535; up to
    /// Linux 6.12, and in some later versions, the virtual one too. (Templates of real servers with port 65535 look the same.)
    pub invalidated: bool,
}

impl Connection {
    /// What it is as a template, if it is one.
    pub fn template(&self) -> Option<Template> {
        let assured = match self.state {
            ConnectionState::None => false,
            ConnectionState::Assured => true,
            _ => return None,
        };
        if self.client.port() != 0 {
            return None;
        }
        let ports = [self.virtual_address.port(), self.real_address.port()];
        Some(Template {
            firewall_mark: if self.protocol == Protocol::Other(0) { mark(self.virtual_address.ip()) } else { None },
            every_port: ports == [0; 2],
            assured,
            invalidated: self.real_address.port() == u16::MAX,
        })
    }
}

/// The mark in the first 32 bits of an address.
fn mark(address: IpAddr) -> Option<NonZeroU32> {
    NonZeroU32::new(match address {
        IpAddr::V4(address) => address.to_bits(),
        IpAddr::V6(address) => u32::try_from(address.to_bits() >> 96).unwrap_or_default(),
    })
}
