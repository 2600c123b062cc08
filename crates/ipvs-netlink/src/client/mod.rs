//! The clients: one socket each, and a method for each thing one asks of IPVS.

#[cfg(feature = "tokio")]
mod awaited;
mod requests;

use std::collections::HashSet;
use std::fmt;
use std::net::SocketAddr;
use std::vec;

use netlink_batch::protocols::NETLINK_GENERIC;
use netlink_batch::{Request, Sent, Socket};
use netlink_packet_generic::GenlMessage;
use netlink_packet_generic::constants::GENL_ID_CTRL;
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};

#[cfg(feature = "tokio")]
pub use self::awaited::{AsyncClient, AsyncServers};
use crate::attributes::FAMILY_NAME;
use crate::changes::Table;
use crate::config::{Info, Timeouts};
use crate::error::{Error, ErrorKind};
use crate::id::VirtualServerId;
use crate::message::{Answer, Message};
use crate::real_server::{RealServer, RealServerEntry};
use crate::sync_daemon::{SyncDaemon, SyncRole};
use crate::virtual_server::{VirtualServer, VirtualServerEntry};

/// A connection to the IPVS of one network namespace, whose calls wait for the kernel.
pub struct Client {
    socket: Socket,
    family: u16,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("family", &self.family).finish_non_exhaustive()
    }
}

macro_rules! methods {
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $type:ty),*) -> $answer:ty = $run:ident($message:expr);)*) => {
        impl Client {
            $($(#[$doc])*
            pub fn $name(&mut self, $($argument: $type),*) -> Result<$answer, Error> {
                self.$run($message)
            })*
        }
    };
}
requests::requests!(methods);

impl Client {
    /// Connects to the IPVS of the calling thread's network namespace. Asking for the family makes the kernel load
    /// `ip_vs` where it is a module; [`ErrorKind::NotSupported`] where it has none.
    pub fn connect() -> Result<Self, Error> {
        let mut socket = Socket::open(NETLINK_GENERIC).map_err(Error::connecting)?;
        let mut family = None;
        socket
            .request(&ask_for_family(), |answer| family = family.or(family_in(&answer)))
            .map_err(Error::connecting)?;
        family.map(|family| Self { socket, family }).ok_or_else(no_family)
    }

    /// What was sent to the kernel so far.
    pub fn sent(&self) -> Sent {
        self.socket.sent()
    }

    /// Carries out messages in order, in few system calls; a failure does not stop the rest. A question is answered with
    /// success or failure alone.
    ///
    /// Returns one result for each message. An `Err` of the whole means that the socket failed, and that it is not known
    /// what was carried out. See [`netlink_batch::Socket::batch`] for how it works.
    pub fn apply(&mut self, messages: &[Message]) -> Result<Vec<Result<(), Error>>, Error> {
        let results = self.socket.batch(requests_of(messages, self.family));
        results_of(messages, results)
    }

    /// All virtual servers with their real servers, one after another: first the identities of all are read, then each by
    /// itself. One that goes before its turn is left out. Held are the identities and one virtual server.
    pub fn servers(&mut self) -> Result<Servers<'_>, Error> {
        let failed = |error| Error::new(&Message::ListVirtualServers, error);
        let mut ids = Identities::default();
        let stream = self.socket.stream(&wrap(Message::ListVirtualServers, self.family)).map_err(failed)?;
        for answer in stream {
            ids.push(&answer.map_err(failed)?);
        }
        Ok(Servers { client: self, ids: ids.listed.into_iter() })
    }

    /// Everything that is configured, to be compared with what is wanted.
    pub fn table(&mut self) -> Result<Table, Error> {
        self.servers()?.map(|server| server.map(ServerEntry::into_configuration)).collect()
    }

    fn tell(&mut self, message: Message) -> Result<(), Error> {
        self.request(message, |_| {})
    }

    fn ask<T: Answer>(&mut self, message: Message) -> Result<T, Error> {
        let mut found = None;
        self.request(message, |answer| found = T::of(answer))?;
        found.ok_or_else(|| unanswered(&message))
    }

    fn list<T: Answer>(&mut self, message: Message) -> Result<Vec<T>, Error> {
        let mut entries = Vec::new();
        self.socket
            .dump(&wrap(message, self.family), |answer: GenlMessage<Message>| entries.extend(T::of(answer.payload)))
            .map_err(|error| Error::new(&message, error))?;
        T::without_repeats(&mut entries);
        Ok(entries)
    }

    fn request(&mut self, message: Message, mut each: impl FnMut(Message)) -> Result<(), Error> {
        if let Some(fault) = message.fault() {
            return Err(Error::fault(&message, fault));
        }
        let request = wrap(message, self.family).into();
        let result = self.socket.request(&request, |answer: GenlMessage<Message>| each(answer.payload));
        outcome(&message, result)
    }

    /// For questions that [`Message`] is not made for.
    pub(crate) fn parts(&mut self) -> (&mut Socket, u16) {
        (&mut self.socket, self.family)
    }
}

/// A virtual server with its real servers, as the kernel lists them.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerEntry {
    /// The virtual server.
    pub virtual_server: VirtualServerEntry,
    /// Its real servers, in the kernel's order.
    pub real_servers: Vec<RealServerEntry>,
}

impl ServerEntry {
    /// What is configured of it.
    pub fn into_configuration(self) -> (VirtualServer, Vec<RealServer>) {
        (self.virtual_server.server, self.real_servers.into_iter().map(|entry| entry.server).collect())
    }
}

/// Virtual servers with their real servers, one after another: see [`Client::servers`].
#[derive(Debug)]
pub struct Servers<'a> {
    client: &'a mut Client,
    ids: vec::IntoIter<VirtualServerId>,
}

impl Iterator for Servers<'_> {
    type Item = Result<ServerEntry, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let id = self.ids.next()?;
            // In this order: of one that goes in between, the second says so.
            let real_servers = match self.client.real_servers(&id) {
                Ok(real_servers) => real_servers,
                Err(error) => return Some(Err(error)),
            };
            match self.client.virtual_server(&id) {
                Ok(virtual_server) => return Some(Ok(ServerEntry { virtual_server, real_servers })),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// The identities in a list of virtual servers, each once.
#[derive(Default)]
struct Identities {
    listed: Vec<VirtualServerId>,
    seen: HashSet<VirtualServerId>,
}

impl Identities {
    fn push(&mut self, answer: &GenlMessage<Message>) {
        if let Message::VirtualServer(entry) = &answer.payload
            && self.seen.insert(entry.server.id)
        {
            self.listed.push(entry.server.id);
        }
    }
}

fn ask_for_family() -> Request<GenlMessage<GenlCtrl>> {
    let name = GenlCtrlAttrs::FamilyName(FAMILY_NAME.to_owned());
    let mut ask = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![name] });
    ask.set_resolved_family_id(GENL_ID_CTRL);
    ask.into()
}

fn family_in(answer: &GenlMessage<GenlCtrl>) -> Option<u16> {
    answer.payload.nlas.iter().find_map(|attribute| match attribute {
        GenlCtrlAttrs::FamilyId(id) => Some(*id),
        _ => None,
    })
}

fn no_family() -> Error {
    Error::connecting(netlink_batch::Error::Decode("the answer names no family number".into()))
}

/// The requests of a batch: the kernel is not asked for what cannot be meant.
fn requests_of(messages: &[Message], family: u16) -> impl Iterator<Item = Request<GenlMessage<Message>>> {
    messages
        .iter()
        .filter(|message| message.fault().is_none())
        .map(move |message| Request::from(wrap(*message, family)))
}

/// One result for each message of a batch.
fn results_of(
    messages: &[Message],
    results: Result<Vec<Result<(), netlink_batch::Refusal>>, netlink_batch::Error>,
) -> Result<Vec<Result<(), Error>>, Error> {
    let mut results = results.map_err(|error| Error::batch(messages.len(), error))?.into_iter();
    Ok(messages
        .iter()
        .map(|message| match message.fault() {
            Some(fault) => Err(Error::fault(message, fault)),
            None => outcome(message, results.next().unwrap_or(Ok(())).map_err(Into::into)),
        })
        .collect())
}

fn outcome(message: &Message, result: Result<(), netlink_batch::Error>) -> Result<(), Error> {
    match result {
        Err(error) if Error::is_success_of(message, &error) => Ok(()),
        result => result.map_err(|error| Error::new(message, error)),
    }
}

pub(crate) fn wrap(message: Message, family: u16) -> GenlMessage<Message> {
    let mut message = GenlMessage::from_payload(message);
    message.set_resolved_family_id(family);
    message
}

fn unanswered(message: &Message) -> Error {
    Error::new(message, netlink_batch::Error::Decode("the kernel acknowledged without an answer".into()))
}
