//! Servers that echo, and clients. A request without an answer is a loss, whatever happened meanwhile.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use lab::netns::Namespace;

use super::cluster::{Cluster, LONG_LIVED, PORTS, TCP_TARGETS, Target, UDP_TARGET};
use super::record::Recorder;

/// How long a client waits. One processor does everything here, and may be late.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a client of UDP waits before it asks again: a datagram may get lost.
const UDP_RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// Starts who answers at these addresses of a namespace, for as long as the process lives.
pub(crate) fn serve<'a>(namespace: &Namespace, addresses: impl Iterator<Item = &'a str>) -> Result<()> {
    for (address, port) in addresses.flat_map(|address| PORTS.map(|(_, port)| (address, port))) {
        // Not one socket for all: that one's datagrams would come from the first address.
        let open = || -> io::Result<_> { Ok((TcpListener::bind((address, port))?, UdpSocket::bind((address, port))?)) };
        let (listener, datagrams) = namespace.run(open)?.context("cannot listen")?;
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                thread::spawn(move || echo(&stream));
            }
        });
        thread::spawn(move || {
            let mut buffer = [0; 64];
            loop {
                if let Ok((length, from)) = datagrams.recv_from(&mut buffer) {
                    let _ = datagrams.send_to(&buffer[..length], from);
                }
            }
        });
    }
    Ok(())
}

fn echo(stream: &TcpStream) {
    let mut lines = BufReader::new(stream);
    let mut line = Vec::new();
    while matches!(lines.read_until(b'\n', &mut line), Ok(1..)) {
        if (&mut &*stream).write_all(&line).is_err() {
            return;
        }
        line.clear();
    }
}

/// Asks everything from everywhere until it is over.
pub(crate) fn start_clients<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    cluster: &'scope Cluster,
    recorder: &'scope Recorder,
    is_over: &Arc<AtomicBool>,
) {
    let places = [("client", &cluster.client), ("pod", &cluster.pod), ("node", &cluster.node)];
    let each = |target: Target, ask: fn(&Client<'scope>)| {
        for ((place, namespace), _) in places.into_iter().zip(target.is_asked_by).filter(|(_, is_asked)| *is_asked) {
            let who = format!("{place} to {}", target.name);
            let is_over = is_over.clone();
            let address: SocketAddr = SocketAddr::from(([0; 4], 0));
            let address = target.address.parse().unwrap_or(address);
            let client = Client { who, address, node: &cluster.node, recorder, is_over };
            scope.spawn(move || {
                if let Err(error) = namespace.run(|| ask(&client)) {
                    client.lost(&error.to_string());
                }
            });
        }
    };
    for target in TCP_TARGETS {
        each(target, Client::connect_repeatedly);
    }
    each(LONG_LIVED, Client::stay_connected);
    each(UDP_TARGET, Client::send_datagrams);
}

/// A client.
struct Client<'a> {
    who: String,
    address: SocketAddr,
    node: &'a Namespace,
    recorder: &'a Recorder,
    is_over: Arc<AtomicBool>,
}

impl Client<'_> {
    fn is_running(&self) -> bool {
        !self.is_over.load(Ordering::Relaxed)
    }

    fn lost(&self, why: &str) {
        self.recorder.lost(&self.who, why);
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
        self.recorder.opened(&self.who);
        Ok(BufReader::new(stream))
    }

    /// Asks for a line of text.
    fn ask(&self, stream: &mut BufReader<TcpStream>, start: Instant) -> io::Result<()> {
        let mut line = String::new();
        stream.get_mut().write_all(b"hello\n")?;
        stream.read_line(&mut line)?;
        if line != "hello\n" {
            return Err(io::Error::other("closed"));
        }
        self.recorder.answered(&self.who, start.elapsed());
        Ok(())
    }

    fn connect_repeatedly(&self) {
        while self.is_running() {
            let start = Instant::now();
            if let Err(error) = self.connect().and_then(|mut stream| self.ask(&mut stream, start)) {
                self.lost(&error.to_string());
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
                    Err(error) => self.lost(&error.to_string()),
                }
                // The first stays; of the others ten.
                if streams.len() > 11 {
                    streams.remove(1);
                }
            }
            streams.retain_mut(|stream| match self.ask(stream, Instant::now()) {
                Ok(()) => true,
                Err(error) => {
                    self.lost(&format!("an open connection: {error}"));
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
            self.recorder.opened(&self.who);
            Ok(socket)
        };
        let socket = match open() {
            Ok(socket) => socket,
            Err(error) => return self.lost(&error.to_string()),
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
                    Ok(_) => {}
                    Err(error) => last = error.to_string(),
                }
            }
            if buffer[..8] == number.to_be_bytes() {
                self.recorder.answered(&self.who, start.elapsed());
            } else {
                self.lost(&last);
            }
            thread::sleep(Duration::from_millis(400));
        }
    }
}
