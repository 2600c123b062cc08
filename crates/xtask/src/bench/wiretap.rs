//! What the agent says to the kernel over netlink, recorded by the kernel itself (nlmon), and said again.
//!
//! The recording is the floor: the same messages in the same batches from a program that does nothing else.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketAddrAny, SocketFlags, SocketType};

/// The netlink protocols that the agent speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Family {
    Route,
    Netfilter,
    Generic,
}

impl Family {
    const NUMBERS: [(Self, u16); 3] = [(Self::Route, 0), (Self::Netfilter, 12), (Self::Generic, 16)];

    fn number(self) -> u32 {
        Self::NUMBERS.iter().find(|(family, _)| *family == self).map_or(0, |(_, number)| u32::from(*number))
    }
}

/// What one system call has sent.
#[derive(Clone, Debug)]
pub(crate) struct Datagram {
    pub(crate) family: Family,
    pub(crate) bytes: Vec<u8>,
}

const REQUEST: u16 = 1;
/// `NLM_F_ROOT | NLM_F_MATCH`.
const DUMP: u16 = 0x300;
const HEADER: usize = 16;

impl Datagram {
    /// The type and flags of each message.
    pub(crate) fn messages(&self) -> impl Iterator<Item = (u16, u16)> {
        let mut rest = self.bytes.as_slice();
        std::iter::from_fn(move || {
            let header = rest.get(..HEADER)?;
            let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
            let kind = u16::from_ne_bytes([header[4], header[5]]);
            let flags = u16::from_ne_bytes([header[6], header[7]]);
            rest = rest.get(length.max(HEADER).next_multiple_of(4)..).unwrap_or_default();
            Some((kind, flags))
        })
    }

    /// Whether it asks for a list.
    pub(crate) fn is_dump(&self) -> bool {
        // Of modifiers of new objects two have the same bits: only those that ask read them as this.
        self.messages().any(|(kind, flags)| flags & DUMP == DUMP && self.reads(kind))
    }

    /// Whether it only asks.
    pub(crate) fn is_reading(&self) -> bool {
        self.is_dump() || self.messages().all(|(kind, _)| self.reads(kind))
    }

    fn reads(&self, kind: u16) -> bool {
        match self.family {
            // RTM_GET* are the third of four.
            Family::Route => kind & 3 == 2,
            // NFT_MSG_GET* are 1, 4, 7, 10, 13, 16, 19 and 22; of connection tracking, IPCTNL_MSG_CT_GET is 1.
            Family::Netfilter => match kind >> 8 {
                10 => matches!(kind & 0xff, 1 | 4 | 7 | 10 | 13 | 16 | 19 | 22),
                1 => kind & 0xff == 1,
                _ => false,
            },
            // The first byte after the header is the command. The controller is family 16: looking up a family.
            Family::Generic => kind == 16 || matches!(self.bytes.get(HEADER), Some(4 | 8 | 11 | 13 | 15)),
        }
    }
}

/// How much of what was sent.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) datagrams: usize,
    pub(crate) messages: usize,
    pub(crate) bytes: usize,
    pub(crate) dumps: usize,
}

pub(crate) fn count<'a>(datagrams: impl IntoIterator<Item = &'a Datagram>) -> Counts {
    let mut counts = Counts::default();
    for datagram in datagrams {
        counts.datagrams += 1;
        counts.messages += datagram.messages().count();
        counts.bytes += datagram.bytes.len();
        counts.dumps += usize::from(datagram.is_dump());
    }
    counts
}

/// A recording that goes on. It hears what is said in the network namespace it began in.
pub(crate) struct Wiretap {
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Datagram>>>,
}

impl Wiretap {
    pub(crate) fn start() -> Result<Self> {
        run("ip", &["link", "add", "nlmon0", "type", "nlmon"])?;
        run("ip", &["link", "set", "nlmon0", "up"])?;
        let socket = listen()?;
        let is_over = Arc::new(AtomicBool::new(false));
        let end = is_over.clone();
        let thread = std::thread::spawn(move || record(&socket, &end));
        Ok(Self { is_over, thread })
    }

    /// What was sent to the kernel, in order.
    pub(crate) fn stop(self) -> Result<Vec<Datagram>> {
        std::thread::sleep(Duration::from_millis(50));
        self.is_over.store(true, Ordering::Relaxed);
        let Ok(recorded) = self.thread.join() else { bail!("the recording failed") };
        run("ip", &["link", "del", "nlmon0"])?;
        recorded
    }
}

/// A socket that hears all that goes out by the devices of this namespace, which is what nlmon makes of netlink.
fn listen() -> Result<OwnedFd> {
    const ETH_P_ALL: u16 = 3;
    let protocol = NonZero::new(u32::from(ETH_P_ALL.to_be())).map(Protocol::from_raw);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::PACKET, SocketType::DGRAM, flags, protocol)
        .context("cannot open a packet socket")?;
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 1 << 30)
        .context("cannot make a packet socket's buffer larger")?;
    Ok(socket)
}

/// What is asked of the kernel until it is over; what the kernel says is left out.
fn record(socket: &OwnedFd, is_over: &AtomicBool) -> Result<Vec<Datagram>> {
    let mut recorded = Vec::new();
    let mut buffer = vec![0; 4 << 20];
    loop {
        let is_last = is_over.load(Ordering::Relaxed);
        loop {
            match rustix::net::recvfrom(socket, &mut *buffer, RecvFlags::empty()) {
                Ok((_, length, from)) => {
                    let bytes = &buffer[..length.min(buffer.len())];
                    let is_request =
                        bytes.get(6..8).is_some_and(|it| u16::from_ne_bytes([it[0], it[1]]) & REQUEST != 0);
                    if let (true, Some(family)) = (is_request, from.as_ref().and_then(family_of)) {
                        recorded.push(Datagram { family, bytes: bytes.to_vec() });
                    }
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("cannot record netlink messages"),
            }
        }
        if is_last {
            return Ok(recorded);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Of a `sockaddr_ll`, the protocol: for nlmon that is the netlink protocol (packet(7); rustix does not know the type).
#[expect(unsafe_code, reason = "an address of a family that rustix does not know can only be read as bytes")]
fn family_of(address: &SocketAddrAny) -> Option<Family> {
    // SAFETY: rustix keeps the address in this value, with as many bytes as it says.
    let bytes = unsafe { std::slice::from_raw_parts(address.as_ptr().cast::<u8>(), address.addr_len() as usize) };
    let protocol = bytes.get(2..4).map(|it| u16::from_be_bytes([it[0], it[1]]))?;
    Family::NUMBERS.iter().find(|(_, number)| *number == protocol).map(|(family, _)| *family)
}

/// What it took to say something again.
pub(crate) struct Replayed {
    pub(crate) took: Duration,
    /// By protocol.
    pub(crate) by_family: BTreeMap<Family, Duration>,
    /// Answers that are errors, the ACK (0) left out: by errno.
    pub(crate) errors: BTreeMap<i32, usize>,
}

/// Sends the datagrams and hears the answers without looking at more than errors. Reads lists to their ends.
pub(crate) fn replay(datagrams: &[Datagram]) -> Result<Replayed> {
    let mut sockets = BTreeMap::new();
    for family in [Family::Route, Family::Netfilter, Family::Generic] {
        let protocol = NonZero::new(family.number()).map(Protocol::from_raw);
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)
            .context("cannot open a netlink socket")?;
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 8 << 20)?;
        rustix::net::sockopt::set_socket_send_buffer_size_force(&socket, 8 << 20)?;
        sockets.insert(family, socket);
    }
    let mut buffer = vec![0; 256 << 10];
    let kernel = SocketAddrNetlink::new(0, 0);
    let mut replayed = Replayed { took: Duration::ZERO, by_family: BTreeMap::new(), errors: BTreeMap::new() };
    let start = Instant::now();
    for datagram in datagrams {
        let Some(socket) = sockets.get(&datagram.family) else { continue };
        let begun = Instant::now();
        rustix::net::sendto(socket, &datagram.bytes, SendFlags::empty(), &kernel)
            .context("cannot say again what was recorded")?;
        let mut is_open = datagram.is_dump();
        loop {
            let flags = if is_open { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
            match rustix::net::recv(socket, &mut *buffer, flags) {
                Ok((_, length)) => is_open = read_replies(&buffer[..length], is_open, &mut replayed.errors),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("cannot receive the reply of the kernel"),
            }
            if datagram.is_dump() && !is_open {
                break;
            }
        }
        *replayed.by_family.entry(datagram.family).or_default() += begun.elapsed();
    }
    replayed.took = start.elapsed();
    Ok(replayed)
}

/// Whether a list goes on after this part of it. Only the first and the last message are looked at.
fn read_replies(bytes: &[u8], is_open: bool, errors: &mut BTreeMap<i32, usize>) -> bool {
    const ERROR: u16 = 2;
    const DONE: u16 = 3;
    let mut rest = bytes;
    while let Some(header) = rest.get(..HEADER) {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        if kind == ERROR {
            let code = rest.get(16..20).map_or(0, |it| i32::from_ne_bytes([it[0], it[1], it[2], it[3]]));
            if code != 0 {
                *errors.entry(-code).or_default() += 1;
            }
            return false;
        }
        if kind == DONE {
            return false;
        }
        rest = rest.get(length.max(HEADER).next_multiple_of(4)..).unwrap_or_default();
    }
    is_open
}

/// Runs a program to its end.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        bail!("{program} {} failed: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
