//! What is measured, and with what it is done.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ipvs_netlink::{Client, Message, RealServer, Scheduler, VirtualServer, VirtualServerId};
use nix::sys::resource::{Usage, UsageWho, getrusage};
use nix::sys::time::TimeVal;
use nlrs::genetlink::socket::{GenericNetlinkSocket, GenericRequestBuilder};
use nlrs::ipvs::destination::{
    DelDestinationMessageBuilder, GetDestinationMessageBuilder, IpvsForwardMethod, NewDestinationMessageBuilder,
};
use nlrs::ipvs::service::{DeleteServiceMessageBuilder, GetServiceMessageBuilder, NewServiceMessageBuilder};
use nlrs::ipvs::{IPVS_FAMILY, IpvsService, Protocol};
use nlrs::netlink::socket::{NlSocket, NlSocketType};
use nlrs::socket::NetlinkSocket;

use crate::messages;

/// The first argument of a process that does a work.
pub(crate) const MODE: &str = "--work";

/// The rules for `ipvsadm -R`.
const RULES: &str = "/tmp/ipvs-netlink-bench.rules";

/// A configuration.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    pub(crate) virtual_servers: u32,
    /// Of each.
    pub(crate) real_servers: u32,
}

const FEW: Size = Size { virtual_servers: 128, real_servers: 0 };
const MANY: Size = Size { virtual_servers: 10_000, real_servers: 10 };

impl Size {
    fn ids(self) -> impl Iterator<Item = VirtualServerId> {
        (0..self.virtual_servers).map(messages::numbered)
    }

    fn real_servers(self) -> impl Iterator<Item = RealServer> + Clone {
        (1..=self.real_servers)
            .map(|host| RealServer::new(SocketAddr::new(IpAddr::V4((0x0a01_0000 + host).into()), 8080)))
    }

    /// What makes the configuration.
    pub(crate) fn additions(self) -> Vec<Message> {
        self.ids()
            .flat_map(|id| {
                let add = Message::AddVirtualServer(VirtualServer::new(id, Scheduler::RoundRobin));
                let real_servers = self.real_servers().map(move |server| Message::AddRealServer(id, server));
                [add].into_iter().chain(real_servers)
            })
            .collect()
    }

    /// What takes it away, real servers by themselves.
    fn deletions(self) -> Vec<Message> {
        self.ids()
            .flat_map(|id| {
                let real_servers =
                    self.real_servers().map(move |server| Message::DeleteRealServer(id, server.socket_address()));
                real_servers.chain([Message::DeleteVirtualServer(id)])
            })
            .collect()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    AddFew,
    Add,
    Delete,
    List,
}

impl Work {
    pub(crate) const ALL: [Self; 4] = [Self::AddFew, Self::Add, Self::Delete, Self::List];

    pub(crate) fn of(name: &str) -> Self {
        Self::ALL.into_iter().find(|work| work.name() == name).unwrap()
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::AddFew => "add-few",
            Self::Add => "add",
            Self::Delete => "delete",
            Self::List => "list",
        }
    }

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::AddFew => "128 virtual servers are added",
            Self::Add => "10,000 virtual servers with 10 real servers each are added",
            Self::Delete => "10,000 virtual servers with 10 real servers each are deleted, one by one",
            Self::List => "10,000 virtual servers with 10 real servers each are listed",
        }
    }

    pub(crate) fn tools(self) -> &'static [Tool] {
        match self {
            Self::AddFew | Self::Add | Self::Delete => &[Tool::Apply, Tool::Methods, Tool::Nlrs, Tool::IpvsadmRestore],
            Self::List => &[Tool::Methods, Tool::Servers, Tool::Nlrs, Tool::IpvsadmSave, Tool::IpvsadmList],
        }
    }

    fn size(self) -> Size {
        if self == Self::AddFew { FEW } else { MANY }
    }

    /// How many processes do it, each in a namespace of its own. Deleted real servers stay with a namespace for a while, and
    /// the kernel looks among them for each that is added: many of them are not to be added twice.
    pub(crate) fn processes(self, tool: Tool) -> usize {
        match (self, tool) {
            (Self::AddFew, _) => 1,
            // It takes half a minute.
            (_, Tool::IpvsadmRestore) => 3,
            _ => 6,
        }
    }

    /// How often each process does it.
    pub(crate) fn rounds(self) -> usize {
        if self == Self::AddFew { 31 } else { 1 }
    }

    fn messages(self) -> Vec<Message> {
        match self {
            Self::AddFew | Self::Add => self.size().additions(),
            Self::Delete => self.size().deletions(),
            Self::List => Vec::new(),
        }
    }

    /// Makes what has to be there before.
    pub(crate) fn prepare(self, client: &mut Client) {
        if matches!(self, Self::Delete | Self::List) {
            apply(client, &self.size().additions());
        }
        fs::write(RULES, rules(&self.messages())).unwrap();
    }

    /// Checks what is there after.
    pub(crate) fn check(self, client: &mut Client) {
        let size = if self == Self::Delete { Size { virtual_servers: 0, real_servers: 0 } } else { self.size() };
        assert_eq!(client.virtual_servers().unwrap().len(), size.virtual_servers as usize);
        if let Some(last) = size.ids().last() {
            assert_eq!(client.real_servers(&last).unwrap().len(), size.real_servers as usize);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tool {
    Apply,
    Methods,
    Servers,
    Nlrs,
    IpvsadmRestore,
    IpvsadmSave,
    IpvsadmList,
}

impl Tool {
    const ALL: [Self; 7] = [
        Self::Apply,
        Self::Methods,
        Self::Servers,
        Self::Nlrs,
        Self::IpvsadmRestore,
        Self::IpvsadmSave,
        Self::IpvsadmList,
    ];

    pub(crate) fn of(name: &str) -> Self {
        Self::ALL.into_iter().find(|tool| tool.name() == name).unwrap()
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Apply => "apply",
            Self::Methods => "methods",
            Self::Servers => "servers",
            Self::Nlrs => "nlrs",
            Self::IpvsadmRestore => "ipvsadm-restore",
            Self::IpvsadmSave => "ipvsadm-save",
            Self::IpvsadmList => "ipvsadm-list",
        }
    }

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Apply => "`Client::apply`, a batch",
            Self::Methods => "`Client`, one request at a time",
            Self::Servers => "`Client::servers`",
            Self::Nlrs => "nlrs 0.2.3, one request at a time",
            Self::IpvsadmRestore => "`ipvsadm -R`",
            Self::IpvsadmSave => "`ipvsadm -Sn`",
            Self::IpvsadmList => "`ipvsadm -Ln`",
        }
    }

    /// Whose resources are looked at.
    fn who(self) -> UsageWho {
        match self {
            Self::Apply | Self::Methods | Self::Servers | Self::Nlrs => UsageWho::RUSAGE_SELF,
            Self::IpvsadmRestore | Self::IpvsadmSave | Self::IpvsadmList => UsageWho::RUSAGE_CHILDREN,
        }
    }
}

/// Does some rounds of a work and says how it went. What is timed begins on a connected socket, with the messages at hand;
/// of ipvsadm it is the whole process.
pub(crate) fn run(work: Work, tool: Tool, rounds: usize) {
    // A process that only waits for ipvsadm needs none.
    let messages = if tool.who() == UsageWho::RUSAGE_SELF { work.messages() } else { Vec::new() };
    for round in 0..rounds {
        if round > 0 {
            Client::connect().unwrap().flush().unwrap();
        }
        let result = match tool {
            Tool::Apply => {
                let mut client = Client::connect().unwrap();
                timed(tool, || {
                    apply(&mut client, &messages);
                    Ok(())
                })
            }
            Tool::Methods => {
                let mut client = Client::connect().unwrap();
                timed(tool, || {
                    for message in &messages {
                        request(&mut client, message);
                    }
                    if work == Work::List {
                        list(&mut client);
                    }
                    Ok(())
                })
            }
            Tool::Servers => {
                let mut client = Client::connect().unwrap();
                timed(tool, || {
                    assert!(client.servers().unwrap().all(|server| server.unwrap().real_servers.len() == 10));
                    Ok(())
                })
            }
            Tool::Nlrs => {
                let mut socket = nlrs_socket();
                timed(tool, || {
                    for message in &messages {
                        nlrs_request(&mut socket, message)?;
                    }
                    if work == Work::List { nlrs_list(&mut socket).map(drop) } else { Ok(()) }
                })
            }
            Tool::IpvsadmRestore => timed(tool, || ipvsadm("-R", File::open(RULES).unwrap().into())),
            Tool::IpvsadmSave => timed(tool, || ipvsadm("-Sn", Stdio::null())),
            Tool::IpvsadmList => timed(tool, || ipvsadm("-Ln", Stdio::null())),
        };
        if let Err(reason) = result {
            println!("cannot {reason}");
            return;
        }
    }
    println!("peak {}", usage(tool).max_rss());
}

fn usage(tool: Tool) -> Usage {
    getrusage(tool.who()).unwrap()
}

/// Does something between two marks, and prints the time it took.
fn timed(tool: Tool, action: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let before = usage(tool);
    mark();
    let start = Instant::now();
    let result = action();
    let time = start.elapsed();
    mark();
    let after = usage(tool);
    let spent = |before: TimeVal, after: TimeVal| {
        let time = after - before;
        Duration::from_micros(u64::try_from(time.tv_sec() * 1_000_000 + time.tv_usec()).unwrap()).as_nanos()
    };
    result?;
    let cpu = spent(before.user_time() + before.system_time(), after.user_time() + after.system_time());
    println!("round {} {cpu}", time.as_nanos());
    Ok(())
}

/// A system call that does nothing, to be found in what strace writes.
fn mark() {
    let _ = rustix::process::getppid();
}

fn apply(client: &mut Client, messages: &[Message]) {
    for result in client.apply(messages).unwrap() {
        result.unwrap();
    }
}

fn request(client: &mut Client, message: &Message) {
    match message {
        Message::AddVirtualServer(server) => client.add_virtual_server(server),
        Message::AddRealServer(id, server) => client.add_real_server(id, server),
        Message::DeleteRealServer(id, address) => client.delete_real_server(id, *address),
        Message::DeleteVirtualServer(id) => client.delete_virtual_server(id),
        other => unreachable!("{other:?}"),
    }
    .unwrap();
}

/// Reads as ipvsadm does: all virtual servers, and the real servers of each.
fn list(client: &mut Client) {
    let mut listed = Vec::new();
    for entry in client.virtual_servers().unwrap() {
        let real_servers = client.real_servers(&entry.server.id).unwrap();
        assert_eq!(real_servers.len(), 10);
        listed.push((entry, real_servers));
    }
}

type NlrsSocket = GenericNetlinkSocket<Vec<u8>, Vec<u8>, NlSocket>;

fn nlrs_socket() -> NlrsSocket {
    let socket = NetlinkSocket::new_vectored(NlSocketType::NETLINK_GENERIC).unwrap();
    GenericNetlinkSocket::from_netlink_socket(socket, IPVS_FAMILY.to_owned()).unwrap()
}

fn nlrs_service(id: &VirtualServerId) -> IpvsService {
    let VirtualServerId::Address { address, port, .. } = *id else { unreachable!() };
    IpvsService { service_address: SocketAddr::new(address, port), protocol: Protocol::TCP }
}

fn nlrs_request(socket: &mut NlrsSocket, message: &Message) -> Result<(), String> {
    match message {
        Message::AddVirtualServer(server) => {
            let mut builder: NewServiceMessageBuilder<'_, _> = socket.message_builder(nlrs_service(&server.id));
            builder.sched_name.clear();
            builder.sched_name.push_str(server.scheduler.name());
            builder.call()
        }
        Message::AddRealServer(id, server) => {
            let of = (nlrs_service(id), server.socket_address());
            let mut builder: NewDestinationMessageBuilder<'_, _> = socket.message_builder(of);
            builder.set_forwarding_method(IpvsForwardMethod::Masquerade);
            builder.call()
        }
        Message::DeleteRealServer(id, address) => {
            let builder: DelDestinationMessageBuilder<'_, _> = socket.message_builder((nlrs_service(id), *address));
            builder.call()
        }
        Message::DeleteVirtualServer(id) => {
            let builder: DeleteServiceMessageBuilder<'_, _> = socket.message_builder(nlrs_service(id));
            builder.call()
        }
        other => unreachable!("{other:?}"),
    }
    .map_err(|error| error.to_string())
}

fn nlrs_list(socket: &mut NlrsSocket) -> Result<usize, String> {
    let builder: GetServiceMessageBuilder<'_, _> = socket.message_builder(());
    let services = builder.call().map_err(|error| error.to_string())?;
    for service in &services {
        let id = IpvsService { service_address: service.service_address, protocol: service.protocol };
        let builder: GetDestinationMessageBuilder<'_, _> = socket.message_builder(id);
        builder.call().map_err(|error| error.to_string())?;
    }
    Ok(services.len())
}

/// How many virtual servers nlrs lists.
pub(crate) fn list_with_nlrs() -> Result<usize, String> {
    nlrs_list(&mut nlrs_socket())
}

fn ipvsadm(argument: &str, input: Stdio) -> Result<(), String> {
    let mut command = Command::new("ipvsadm");
    // cargo sets it, and the loader would look into each of its directories.
    command.env_remove("LD_LIBRARY_PATH").arg(argument).stdin(input).stdout(Stdio::null());
    let output = command.output();
    match output {
        // It goes on after a line it does not understand, and succeeds.
        Ok(output) if output.status.success() && output.stderr.is_empty() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err("there is no ipvsadm".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// The messages in the words of ipvsadm.
fn rules(messages: &[Message]) -> String {
    let mut rules = String::new();
    let at = |id: &VirtualServerId| nlrs_service(id).service_address;
    for message in messages {
        match message {
            Message::AddVirtualServer(server) => {
                writeln!(rules, "-A -t {} -s {}", at(&server.id), server.scheduler.name())
            }
            Message::AddRealServer(id, server) => {
                writeln!(rules, "-a -t {} -r {} -m -w {}", at(id), server.socket_address(), server.weight)
            }
            Message::DeleteRealServer(id, address) => writeln!(rules, "-d -t {} -r {address}", at(id)),
            Message::DeleteVirtualServer(id) => writeln!(rules, "-D -t {}", at(id)),
            other => unreachable!("{other:?}"),
        }
        .unwrap();
    }
    rules
}
