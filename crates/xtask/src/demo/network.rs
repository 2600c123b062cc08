//! The demo's network: a client and three servers, each in a network namespace behind the node, as pods are.
//!
//! The servers answer every line with their name. They hang up after `goodbye`; the client leaves its end open until the
//! demo ends, so that the kernel forgets each connection after the FIN timeout and the table shows what goes on.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ipvs_netlink::{Client, Protocol, RealServerEntry, VirtualServer, VirtualServerId};
use lab::link;
use lab::netns::{End, Namespace};

/// The address and port of the Service.
pub(crate) const SERVICE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 80);

/// The servers; the third has no endpoint at first.
pub(crate) const BACKENDS: [Backend; 3] = [
    Backend { name: "backend-a", subnet: 1 },
    Backend { name: "backend-b", subnet: 2 },
    Backend { name: "backend-c", subnet: 3 },
];

/// The network; [`BACKENDS`] and [`SERVICE`] as one sees them.
pub(crate) const DRAWING: &str = "
                      ┌─ node ───────────────┐
  ┌─ client ───┐      │ kube-ipvs, the agent │      ┌─ backend-a ─────────────┐
  │ 10.244.9.2 ├──────┤                      ├──┬───┤ 10.244.1.2, port 8080   │
  └────────────┘      │ IPVS, in the kernel: │  │   └─────────────────────────┘
                      │ 10.96.0.10:80        │  │   ┌─ backend-b ─────────────┐
                      │ on kube-ipvs0        │  ├───┤ 10.244.2.2, port 8080   │
                      └──────────────────────┘  │   └─────────────────────────┘
                                                │   ┌─ backend-c ─────────────┐
                                                └───┤ 10.244.3.2, from step 3 │
                                                    └─────────────────────────┘
";

const CLIENT_SUBNET: u8 = 9;
const GOODBYE: &str = "goodbye";

/// How long one answer may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Backend {
    pub(crate) name: &'static str,
    subnet: u8,
}

impl Backend {
    /// Where it listens.
    pub(crate) const fn socket(self) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 244, self.subnet, 2)), 8080)
    }
}

/// The network, with servers that answer.
#[derive(Debug)]
pub(crate) struct Network {
    node: Namespace,
    client: Namespace,
    _backends: Vec<Namespace>,
    /// The client's ends of connections that the servers have ended.
    half_open: Mutex<Vec<Connection>>,
}

/// A connection of the client to whoever answers for the Service.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
    name: String,
}

impl Network {
    pub(crate) fn build() -> Result<Self> {
        let node = Namespace::new()?;
        // The address of the Node in examples/hello.
        node.run(|| link::add_address("lo", "192.168.10.11/32"))??;
        let client = pod(&node, "client", CLIENT_SUBNET)?;
        let mut namespaces = Vec::new();
        for backend in BACKENDS {
            let namespace = pod(&node, backend.name, backend.subnet)?;
            let listener = namespace.run(|| TcpListener::bind(backend.socket()))?;
            let listener = listener.with_context(|| format!("{} cannot listen", backend.name))?;
            // It ends with the process; a socket stays in the namespace where it was opened.
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    std::thread::spawn(move || answer(stream, backend.name));
                }
            });
            namespaces.push(namespace);
        }
        Ok(Self { node, client, _backends: namespaces, half_open: Mutex::default() })
    }

    pub(crate) fn node(&self) -> &Namespace {
        &self.node
    }

    /// One request of the client: who answers?
    pub(crate) fn ask(&self) -> Result<String> {
        let mut connection = self.connect()?;
        let name = connection.request(GOODBYE)?;
        connection.wait_for_close()?;
        if let Ok(mut half_open) = self.half_open.lock() {
            half_open.push(connection);
        }
        Ok(name)
    }

    /// A connection that stays.
    pub(crate) fn open_connection(&self) -> Result<Connection> {
        let mut connection = self.connect()?;
        connection.name = connection.request("hello")?;
        Ok(connection)
    }

    fn connect(&self) -> Result<Connection> {
        let stream = self.client.run(|| TcpStream::connect_timeout(&SERVICE, TIMEOUT))?;
        let stream = stream.with_context(|| format!("the client cannot connect to {SERVICE}"))?;
        stream.set_read_timeout(Some(TIMEOUT)).context("cannot set a timeout")?;
        Ok(Connection { stream: BufReader::new(stream), name: String::new() })
    }

    /// The virtual server of the Service.
    pub(crate) fn virtual_server(&self) -> Result<Option<VirtualServer>> {
        let servers = self.node.run(|| Client::connect()?.virtual_servers())??;
        Ok(servers.into_iter().map(|entry| entry.server).find(|server| server.id == service()))
    }

    /// The real servers of the Service; none where it has no virtual server.
    pub(crate) fn real_servers(&self) -> Result<Vec<RealServerEntry>> {
        if self.virtual_server()?.is_none() {
            return Ok(Vec::new());
        }
        Ok(self.node.run(|| Client::connect()?.real_servers(&service()))??)
    }

    /// One of the real servers.
    pub(crate) fn real_server(&self, backend: Backend) -> Result<Option<RealServerEntry>> {
        Ok(self.real_servers()?.into_iter().find(|entry| entry.server.socket_address() == backend.socket()))
    }
}

impl Connection {
    /// Who answered first.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Sends a line and returns the answer.
    pub(crate) fn request(&mut self, line: &str) -> Result<String> {
        let mut answer = String::new();
        let sent = self.stream.get_mut().write_all(format!("{line}\n").as_bytes());
        sent.and_then(|()| self.stream.read_line(&mut answer)).context("the client got no answer")?;
        if answer.is_empty() {
            bail!("the connection ended before the answer came");
        }
        Ok(answer.trim_end().to_owned())
    }

    /// Has the server end the connection; this end stays open until the value is dropped.
    pub(crate) fn close(&mut self) -> Result<()> {
        self.request(GOODBYE)?;
        self.wait_for_close()
    }

    fn wait_for_close(&mut self) -> Result<()> {
        let more = self.stream.read(&mut [0; 1]).context("the server did not close the connection")?;
        if more > 0 {
            bail!("the server sent more than its name");
        }
        Ok(())
    }
}

fn service() -> VirtualServerId {
    VirtualServerId::address(Protocol::Tcp, SERVICE)
}

/// A namespace behind the node, which is its only way out.
fn pod(node: &Namespace, name: &str, subnet: u8) -> Result<Namespace> {
    let namespace = Namespace::new()?;
    Namespace::connect(
        End { namespace: node, device: name, addresses: &[&format!("10.244.{subnet}.1/24")] },
        End { namespace: &namespace, device: "eth0", addresses: &[&format!("10.244.{subnet}.2/24")] },
    )?;
    namespace.run(|| link::add_route_via("0.0.0.0/0", &format!("10.244.{subnet}.1")))??;
    Ok(namespace)
}

/// A server's side of a connection.
fn answer(stream: TcpStream, name: &str) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    // A connection that breaks ends like one that is closed.
    while matches!(stream.read_line(&mut line), Ok(1..)) {
        if writeln!(stream.get_mut(), "{name}").is_err() || line.trim_end() == GOODBYE {
            return;
        }
        line.clear();
    }
}
