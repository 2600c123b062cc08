//! What the agent says to the kernel over netlink, recorded by the kernel itself (nlmon), and said again.
//!
//! The recording is the floor: the same messages in the same batches from a program that does nothing else.

use std::collections::{BTreeMap, VecDeque};
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
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

/// The netlink protocols that the agent speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Family {
    Route,
    Netfilter,
    Generic,
}

impl Family {
    /// Those that a packet socket can ask for; to be told from the rest, which is rtnetlink: its number is 0, and that
    /// asks for nothing.
    const ASKED: [(Self, u16); 2] = [(Self::Netfilter, 12), (Self::Generic, 16)];

    fn number(self) -> u32 {
        Self::ASKED.iter().find(|(family, _)| *family == self).map_or(0, |(_, number)| u32::from(*number))
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
        let asked = Family::ASKED.map(|(family, number)| Ok((family, listen(number)?, VecDeque::new())));
        let asked = asked.into_iter().collect::<Result<Vec<_>>>()?;
        // ETH_P_ALL.
        let all = listen(3)?;
        let is_over = Arc::new(AtomicBool::new(false));
        let end = is_over.clone();
        let thread = std::thread::spawn(move || record(&all, asked, &end));
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

fn listen(number: u16) -> Result<OwnedFd> {
    let protocol = NonZero::new(u32::from(number.to_be())).map(Protocol::from_raw);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::PACKET, SocketType::DGRAM, flags, protocol)
        .context("cannot open a packet socket")?;
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 400 << 20)
        .context("cannot make a packet socket's buffer larger")?;
    Ok(socket)
}

/// Everything comes on the first socket in order; the others say of what protocol some of it is.
fn record(
    all: &OwnedFd,
    mut asked: Vec<(Family, OwnedFd, VecDeque<Vec<u8>>)>,
    is_over: &AtomicBool,
) -> Result<Vec<Datagram>> {
    let mut heard = Vec::new();
    let mut buffer = vec![0; 4 << 20];
    loop {
        let last = is_over.load(Ordering::Relaxed);
        let mut received = 0;
        while let Some(bytes) = receive(all, &mut buffer)? {
            received += 1;
            heard.push(bytes);
        }
        for (_, socket, queue) in &mut asked {
            while let Some(bytes) = receive(socket, &mut buffer)? {
                queue.push_back(bytes);
            }
        }
        if last && received == 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let datagrams = heard.into_iter().map(|bytes| {
        let found = asked.iter_mut().find_map(|(family, _, queue)| {
            let is_its = queue.front().is_some_and(|front| *front == bytes);
            is_its.then(|| {
                queue.pop_front();
                *family
            })
        });
        Datagram { family: found.unwrap_or(Family::Route), bytes }
    });
    Ok(datagrams.collect())
}

/// The next request, if there is one; what the kernel says is left out.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Result<Option<Vec<u8>>> {
    loop {
        match rustix::net::recv(socket, &mut *buffer, RecvFlags::empty()) {
            Ok((_, length)) => {
                let bytes = &buffer[..length.min(buffer.len())];
                let is_request = bytes.get(6..8).is_some_and(|it| u16::from_ne_bytes([it[0], it[1]]) & REQUEST != 0);
                if is_request {
                    return Ok(Some(bytes.to_vec()));
                }
            }
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot record what is said over netlink"),
        }
    }
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
                Ok((_, length)) => is_open = hear(&buffer[..length], is_open, &mut replayed.errors),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("cannot hear the kernel's answer"),
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
fn hear(bytes: &[u8], is_open: bool, errors: &mut BTreeMap<i32, usize>) -> bool {
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
