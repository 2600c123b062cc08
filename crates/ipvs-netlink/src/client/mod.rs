//! The clients: one socket each, and a method for each request.

#[cfg(feature = "tokio")]
mod async_client;
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
pub use self::async_client::{AsyncClient, AsyncServers};
use crate::attributes::FAMILY_NAME;
use crate::changes::Table;
use crate::config::{Info, Timeouts};
use crate::error::{Error, ErrorKind};
use crate::id::VirtualServerId;
use crate::message::{Message, Reply};
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
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $type:ty),*) -> $reply:ty = $run:ident($message:expr);)*) => {
        impl Client {
            $($(#[$doc])*
            pub fn $name(&mut self, $($argument: $type),*) -> Result<$reply, Error> {
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
        socket.request(&family_request(), |reply| family = family.or(family_id(&reply))).map_err(Error::connecting)?;
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
        let results = self.socket.batch(to_requests(messages, self.family));
        to_results(messages, results)
    }

    /// All virtual servers with their real servers, one after another: first the identities of all are read, then each by
    /// itself. One that goes before its turn is left out. Held are the identities and one virtual server.
    pub fn servers(&mut self) -> Result<Servers<'_>, Error> {
        let failed = |error| Error::new(&Message::ListVirtualServers, error);
        let mut ids = UniqueIds::default();
        let stream = self.socket.stream(&wrap(Message::ListVirtualServers, self.family)).map_err(failed)?;
        for reply in stream {
            ids.push(&reply.map_err(failed)?);
        }
        Ok(Servers { client: self, ids: ids.ordered.into_iter() })
    }

    /// Everything that is configured, to be compared with what is wanted.
    pub fn table(&mut self) -> Result<Table, Error> {
        self.servers()?.map(|server| server.map(ServerEntry::into_configuration)).collect()
    }

    fn execute(&mut self, message: Message) -> Result<(), Error> {
        self.request(message, |_| {})
    }

    fn get<T: Reply>(&mut self, message: Message) -> Result<T, Error> {
        let mut found = None;
        self.request(message, |reply| found = T::from_message(reply))?;
        found.ok_or_else(|| no_reply(&message))
    }

    fn list<T: Reply>(&mut self, message: Message) -> Result<Vec<T>, Error> {
        let mut entries = Vec::new();
        self.socket
            .dump(&wrap(message, self.family), |reply: GenlMessage<Message>| {
                entries.extend(T::from_message(reply.payload));
            })
            .map_err(|error| Error::new(&message, error))?;
        T::remove_duplicates(&mut entries);
        Ok(entries)
    }

    fn request(&mut self, message: Message, mut each: impl FnMut(Message)) -> Result<(), Error> {
        if let Some(fault) = message.fault() {
            return Err(Error::fault(&message, fault));
        }
        let request = wrap(message, self.family).into();
        let result = self.socket.request(&request, |reply: GenlMessage<Message>| each(reply.payload));
        check_result(&message, result)
    }

    /// For requests that [`Message`] does not cover.
    pub(crate) fn socket_and_family(&mut self) -> (&mut Socket, u16) {
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
            // In this order: if the virtual server is deleted in between, the second request fails.
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
struct UniqueIds {
    ordered: Vec<VirtualServerId>,
    seen: HashSet<VirtualServerId>,
}

impl UniqueIds {
    fn push(&mut self, reply: &GenlMessage<Message>) {
        if let Message::VirtualServer(entry) = &reply.payload
            && self.seen.insert(entry.server.id)
        {
            self.ordered.push(entry.server.id);
        }
    }
}

fn family_request() -> Request<GenlMessage<GenlCtrl>> {
    let name = GenlCtrlAttrs::FamilyName(FAMILY_NAME.to_owned());
    let mut request = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![name] });
    request.set_resolved_family_id(GENL_ID_CTRL);
    request.into()
}

fn family_id(reply: &GenlMessage<GenlCtrl>) -> Option<u16> {
    reply.payload.nlas.iter().find_map(|attribute| match attribute {
        GenlCtrlAttrs::FamilyId(id) => Some(*id),
        _ => None,
    })
}

fn no_family() -> Error {
    Error::connecting(netlink_batch::Error::Decode("the reply has no family number".into()))
}

/// The requests of a batch, without those that are invalid by themselves.
fn to_requests(messages: &[Message], family: u16) -> impl Iterator<Item = Request<GenlMessage<Message>>> {
    messages
        .iter()
        .filter(|message| message.fault().is_none())
        .map(move |message| Request::from(wrap(*message, family)))
}

/// One result for each message of a batch.
fn to_results(
    messages: &[Message],
    results: Result<Vec<Result<(), netlink_batch::Refusal>>, netlink_batch::Error>,
) -> Result<Vec<Result<(), Error>>, Error> {
    let mut results = results.map_err(|error| Error::batch(messages.len(), error))?.into_iter();
    Ok(messages
        .iter()
        .map(|message| match message.fault() {
            Some(fault) => Err(Error::fault(message, fault)),
            None => check_result(message, results.next().unwrap_or(Ok(())).map_err(Into::into)),
        })
        .collect())
}

fn check_result(message: &Message, result: Result<(), netlink_batch::Error>) -> Result<(), Error> {
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

fn no_reply(message: &Message) -> Error {
    Error::new(message, netlink_batch::Error::Decode("the kernel acknowledged the request without a reply".into()))
}
