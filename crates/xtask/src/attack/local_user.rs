//! An unprivileged user of the node, as a process of its own: it floods the agent's ports and takes names of sockets.

use std::collections::VecDeque;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;
use fastrand::Rng;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};

/// The user `nobody`.
const UID: u32 = 65_534;
/// The name by which agents of a node find each other.
const AGENTS_NAME: &[u8] = b"kube-ipvs";
/// How many connections the user holds open at once.
const MAX_HELD: usize = 900;
/// Connections a second.
const RATES: [u64; 3] = [100, 300, 1000];

/// Attacks the agent of this network namespace until it is killed.
#[derive(clap::Args)]
pub(crate) struct Args {
    attack: LocalAttack,
    seed: u64,
}

/// What a local user does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LocalAttack {
    /// Connections to the port for health that say nothing
    SilentHealth,
    /// Connections to the port for metrics that say nothing
    SilentMetrics,
    /// Connections to the port for health whose headers never end
    SlowHeaders,
    /// Bytes that are no HTTP, and long requests
    Garbage,
    /// The name of the agents' socket, with a full backlog
    TakenName,
    /// Connections to the agents' socket
    FullBacklog,
}

impl LocalAttack {
    /// Those that need no restart of the agent to have an effect.
    pub(crate) const WHILE_IT_RUNS: [Self; 5] =
        [Self::SilentHealth, Self::SilentMetrics, Self::SlowHeaders, Self::Garbage, Self::FullBacklog];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::SilentHealth => "silent connections to the port for health",
            Self::SilentMetrics => "silent connections to the port for metrics",
            Self::SlowHeaders => "connections whose headers never end",
            Self::Garbage => "connections that send garbage",
            Self::TakenName => "the name @kube-ipvs taken at a start, its backlog full",
            Self::FullBacklog => "the backlog of @kube-ipvs filled",
        }
    }

    /// Starts it as an unprivileged user, in the network namespace of this thread.
    pub(crate) fn start(self, rng: &mut Rng) -> Result<LocalUser> {
        let value = self.to_possible_value().context("an attack without a name")?;
        let mut command = Command::new("/proc/self/exe");
        command.args(["guest-local-user", value.get_name(), &rng.u64(..).to_string()]).uid(UID).gid(UID);
        Ok(LocalUser(command.spawn().context("cannot start a local user")?))
    }
}

/// The process of a local user. It is killed when this value is dropped.
#[derive(Debug)]
pub(crate) struct LocalUser(Child);

impl Drop for LocalUser {
    fn drop(&mut self) {
        // One that has ended by itself is as gone.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let mut rng = Rng::with_seed(args.seed);
    match args.attack {
        LocalAttack::SilentHealth => flood(10_256, &mut rng, |_, _| Ok(())),
        LocalAttack::SilentMetrics => flood(10_249, &mut rng, |_, _| Ok(())),
        LocalAttack::SlowHeaders => {
            flood(10_256, &mut rng, |stream, _| stream.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-A: "))
        }
        LocalAttack::Garbage => flood(10_256, &mut rng, |stream, rng| {
            let length = rng.usize(1..100_000);
            let garbage = if rng.bool() {
                std::iter::repeat_with(|| rng.u8(..)).take(length).collect()
            } else {
                [b"GET / HTTP/1.1\r\n", vec![b'A'; length].as_slice()].concat()
            };
            stream.write_all(&garbage)
        }),
        LocalAttack::TakenName => take_name(),
        LocalAttack::FullBacklog => fill_backlog(),
    }
}

/// Opens connections at a steady rate, says something on each, and holds the last of them.
fn flood(port: u16, rng: &mut Rng, say: fn(&mut TcpStream, &mut Rng) -> std::io::Result<()>) -> ! {
    let interval = Duration::from_micros(1_000_000 / RATES[rng.usize(..RATES.len())]);
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let mut held = VecDeque::new();
    let mut next = Instant::now();
    loop {
        // What is refused is tried again; so is what this process has no descriptors for.
        if let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(1)) {
            let _ = stream.set_write_timeout(Some(Duration::from_millis(50)));
            let _ = say(&mut stream, rng);
            held.push_back(stream);
        }
        if held.len() > MAX_HELD {
            held.pop_front();
        }
        next += interval;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

/// Takes the name as soon as it is free, and lets nobody get through.
fn take_name() -> Result<ExitCode> {
    let name = SocketAddrUnix::new_abstract_name(AGENTS_NAME).context("this is no name")?;
    let open = |flags| socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let socket = open(SocketFlags::CLOEXEC).context("cannot open a socket")?;
    while bind(&socket, &name).is_err() {
        thread::sleep(Duration::from_millis(1));
    }
    listen(&socket, 0).context("cannot listen")?;
    let mut waiting: Vec<OwnedFd> = Vec::new();
    loop {
        let next = open(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).context("cannot open a socket")?;
        match connect(&next, &name) {
            Ok(()) => waiting.push(next),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Connects to whoever has the name, and says nothing.
fn fill_backlog() -> ! {
    let mut held = VecDeque::new();
    loop {
        let stream = UnixAddr::from_abstract_name(AGENTS_NAME).and_then(|name| UnixStream::connect_addr(&name));
        match stream {
            Ok(stream) => held.push_back(stream),
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
        if held.len() > MAX_HELD {
            held.pop_front();
            thread::sleep(Duration::from_millis(5));
        }
    }
}
