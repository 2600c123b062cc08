//! Servers that echo, and clients. A request without an answer is a loss, whatever happened meanwhile.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use lab::netns::Namespace;

use super::cluster::{Cluster, LONG_LIVED, PORTS, Target, UDP_TARGETS, all_servers};
use super::record::TrafficLog;

/// How long a client waits. One processor does everything here, and may be late.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a client of UDP waits before it asks again: a datagram may get lost.
const UDP_RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// So often the state of the kernel is shown after a loss: that takes time, which others then wait for.
const MAX_LOSSES_SHOWN: u64 = 10;

/// Starts the endpoints of all Services, for as long as the process lives.
pub(crate) fn serve_services(cluster: &Cluster) -> Result<()> {
    for (address, port) in all_servers().flat_map(|address| PORTS.map(|(_, port)| (address, port))) {
        serve(&cluster.servers, address, port, |request| request)?;
    }
    Ok(())
}

/// Starts who answers each request at this address of a namespace, for as long as the process lives.
pub(crate) fn serve(namespace: &Namespace, address: &str, port: u16, answer: fn(&[u8]) -> &[u8]) -> Result<()> {
    // Not one socket for all: that one's datagrams would come from the first address.
    let open = || -> io::Result<_> { Ok((TcpListener::bind((address, port))?, UdpSocket::bind((address, port))?)) };
    let (listener, datagrams) =
        namespace.run(open)?.with_context(|| format!("cannot listen on port {port} of {address}"))?;
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || answer_lines(&stream, answer));
        }
    });
    thread::spawn(move || {
        let mut buffer = [0; 64];
        loop {
            if let Ok((length, from)) = datagrams.recv_from(&mut buffer) {
                let _ = datagrams.send_to(answer(&buffer[..length]), from);
            }
        }
    });
    Ok(())
}

fn answer_lines(stream: &TcpStream, answer: fn(&[u8]) -> &[u8]) {
    let mut lines = BufReader::new(stream);
    let mut line = Vec::new();
    while matches!(lines.read_until(b'\n', &mut line), Ok(1..)) {
        if (&mut &*stream).write_all(answer(&line)).is_err() {
            return;
        }
        line.clear();
    }
}

/// Asks everything from everywhere until it is over: these targets by one TCP connection after the other.
pub(crate) fn start_clients<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    cluster: &'scope Cluster,
    tcp_targets: impl IntoIterator<Item = Target>,
    log: &'scope TrafficLog,
    is_over: &Arc<AtomicBool>,
) {
    let places = [("client", &cluster.client), ("pod", &cluster.pod), ("node", &cluster.node)];
    let each = |target: Target, ask: fn(&Client<'scope>)| {
        for ((place, namespace), _) in places.into_iter().zip(target.is_asked_by).filter(|(_, is_asked)| *is_asked) {
            let who = format!("{place} to {}", target.name);
            let is_over = is_over.clone();
            let address: SocketAddr = SocketAddr::from(([0; 4], 0));
            let address = target.address.parse().unwrap_or(address);
            let client = Client { who, address, node: &cluster.node, log, is_over };
            scope.spawn(move || {
                if let Err(error) = namespace.run(|| ask(&client)) {
                    client.lost(log.start, &error.to_string());
                }
            });
        }
    };
    for target in tcp_targets {
        each(target, Client::connect_repeatedly);
    }
    each(LONG_LIVED, Client::stay_connected);
    for target in UDP_TARGETS {
        each(target, Client::send_datagrams);
    }
}

/// A client.
struct Client<'a> {
    who: String,
    address: SocketAddr,
    node: &'a Namespace,
    log: &'a TrafficLog,
    is_over: Arc<AtomicBool>,
}

impl Client<'_> {
    fn is_running(&self) -> bool {
        !self.is_over.load(Ordering::Relaxed)
    }

    /// A request that began then has failed.
    fn lost(&self, since: Instant, why: &str) {
        if !self.log.lost(&self.who, since, why) {
            return;
        }
        if self.log.lock().sum().lost > MAX_LOSSES_SHOWN {
            return;
        }
        // What whoever looks for the reason begins with.
        let vip = self.address.to_string();
        for command in ["ipvsadm -Ln", "ipvsadm -Lnc", "cat /proc/thread-self/net/stat/nf_conntrack"] {
            let shown = self.node.exec(command).unwrap_or_else(|error| error.to_string());
            let is_of_it = |line: &&str| command != "ipvsadm -Lnc" || line.contains(&vip);
            let lines: Vec<&str> = shown.lines().filter(is_of_it).take(60).collect();
            eprintln!("  $ {command}\n    {}", lines.join("\n    "));
        }
    }

    fn connect(&self) -> io::Result<BufReader<TcpStream>> {
        let stream = TcpStream::connect_timeout(&self.address, CLIENT_TIMEOUT)?;
        stream.set_read_timeout(Some(CLIENT_TIMEOUT))?;
        stream.set_nodelay(true)?;
        self.log.opened(&self.who);
        Ok(BufReader::new(stream))
    }

    /// Asks for a line of text.
    fn ask(&self, stream: &mut BufReader<TcpStream>, start: Instant) -> io::Result<()> {
        let mut line = String::new();
        stream.get_mut().write_all(b"hello\n")?;
        stream.read_line(&mut line)?;
        match line.as_str() {
            "hello\n" => {}
            "" => return Err(io::Error::other("closed")),
            other => return Err(io::Error::other(format!("somebody else answers: {other:?}"))),
        }
        self.log.answered(&self.who, start.elapsed());
        Ok(())
    }

    /// The same from now on, with the time at which it began where it fails.
    fn ask_now(&self, stream: &mut BufReader<TcpStream>) -> Result<(), (Instant, io::Error)> {
        let start = Instant::now();
        self.ask(stream, start).map_err(|error| (start, error))
    }

    fn connect_repeatedly(&self) {
        while self.is_running() {
            let start = Instant::now();
            if let Err(error) = self.connect().and_then(|mut stream| self.ask(&mut stream, start)) {
                self.lost(start, &error.to_string());
            }
            thread::sleep(Duration::from_millis(400));
        }
    }

    /// One connection from the beginning to the end, one that is renewed each minute, and so on.
    fn stay_connected(&self) {
        let mut streams = Vec::new();
        let (mut renewed, mut is_first) = (Instant::now(), true);
        while self.is_running() {
            if is_first || renewed.elapsed() > Duration::from_secs(60) {
                renewed = Instant::now();
                is_first = false;
                match self.connect() {
                    Ok(stream) => streams.push(stream),
                    Err(error) => self.lost(renewed, &error.to_string()),
                }
                // The first stays; of the others ten.
                if streams.len() > 11 {
                    streams.remove(1);
                }
            }
            streams.retain_mut(|stream| match self.ask_now(stream) {
                Ok(()) => true,
                Err((start, error)) => {
                    self.lost(start, &format!("an open connection: {error}"));
                    false
                }
            });
            thread::sleep(Duration::from_secs(1));
        }
    }

    fn send_datagrams(&self) {
        let open = || -> io::Result<UdpSocket> {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(self.address)?;
            socket.set_read_timeout(Some(UDP_RETRY_INTERVAL))?;
            self.log.opened(&self.who);
            Ok(socket)
        };
        let socket = match open() {
            Ok(socket) => socket,
            Err(error) => return self.lost(self.log.start, &error.to_string()),
        };
        let mut number = 0_u64;
        while self.is_running() {
            number += 1;
            let start = Instant::now();
            let mut buffer = [0; 64];
            let mut last = String::new();
            while start.elapsed() < CLIENT_TIMEOUT {
                let asked = socket.send(&number.to_be_bytes()).and_then(|_| socket.recv(&mut buffer));
                match asked {
                    // A late answer is one to what was asked before.
                    Ok(length) if buffer[..length] == number.to_be_bytes() => break,
                    Ok(length) if length != 8 => {
                        "somebody else answers".clone_into(&mut last);
                        break;
                    }
                    Ok(_) => {}
                    Err(error) => last = error.to_string(),
                }
            }
            if buffer[..8] == number.to_be_bytes() {
                self.log.answered(&self.who, start.elapsed());
            } else {
                self.lost(start, &last);
            }
            thread::sleep(Duration::from_millis(400));
        }
    }
}
