//! The client that is awaited, on tokio.

use std::fmt;
use std::net::SocketAddr;
use std::vec;

use netlink_batch::protocols::NETLINK_GENERIC;
use netlink_batch::{AsyncSocket, Sent};
use netlink_packet_generic::GenlMessage;

use super::{
    Identities, ServerEntry, ask_for_family, family_in, no_family, outcome, requests, requests_of, results_of,
    unanswered, wrap,
};
use crate::changes::Table;
use crate::config::{Info, Timeouts};
use crate::error::{Error, ErrorKind};
use crate::id::VirtualServerId;
use crate::message::{Answer, Message};
use crate::real_server::{RealServer, RealServerEntry};
use crate::sync_daemon::{SyncDaemon, SyncRole};
use crate::virtual_server::{VirtualServer, VirtualServerEntry};

/// [`Client`](crate::Client) for tasks: the same methods, awaited, but for [`Client::features`](crate::Client::features), which
/// one asks once. The kernel handles a request inside the system call that
/// sends it; other tasks get their turn, by tokio's rules, between requests, the datagrams of a list and the parts of a
/// batch. So a request that takes long keeps the thread: to stop a synchronization daemon can take two seconds, and so can
/// loading the module of a scheduler. A future that is dropped leaves the client usable; whether what it asked for was carried out is not known then.
pub struct AsyncClient {
    socket: AsyncSocket,
    family: u16,
}

impl fmt::Debug for AsyncClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AsyncClient").field("family", &self.family).finish_non_exhaustive()
    }
}

macro_rules! methods {
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $type:ty),*) -> $answer:ty = $run:ident($message:expr);)*) => {
        impl AsyncClient {
            $($(#[$doc])*
            pub async fn $name(&mut self, $($argument: $type),*) -> Result<$answer, Error> {
                self.$run($message).await
            })*
        }
    };
}
requests::requests!(methods);

impl AsyncClient {
    /// [`Client::connect`](crate::Client::connect), awaited.
    pub async fn connect() -> Result<Self, Error> {
        let mut socket = AsyncSocket::open(NETLINK_GENERIC).map_err(Error::connecting)?;
        let mut family = None;
        let ask = ask_for_family();
        socket.request(&ask, |answer| family = family.or(family_in(&answer))).await.map_err(Error::connecting)?;
        family.map(|family| Self { socket, family }).ok_or_else(no_family)
    }

    /// What was sent to the kernel so far.
    pub fn sent(&self) -> Sent {
        self.socket.sent()
    }

    /// [`Client::apply`](crate::Client::apply), awaited.
    pub async fn apply(&mut self, messages: &[Message]) -> Result<Vec<Result<(), Error>>, Error> {
        let results = self.socket.batch(requests_of(messages, self.family)).await;
        results_of(messages, results)
    }

    /// [`Client::servers`](crate::Client::servers), awaited.
    pub async fn servers(&mut self) -> Result<AsyncServers<'_>, Error> {
        let failed = |error| Error::new(&Message::ListVirtualServers, error);
        let mut ids = Identities::default();
        let mut stream = self.socket.stream(&wrap(Message::ListVirtualServers, self.family)).await.map_err(failed)?;
        while let Some(answer) = stream.next().await {
            ids.push(&answer.map_err(failed)?);
        }
        Ok(AsyncServers { client: self, ids: ids.listed.into_iter() })
    }

    /// [`Client::table`](crate::Client::table), awaited.
    pub async fn table(&mut self) -> Result<Table, Error> {
        let mut servers = self.servers().await?;
        let mut table = Table::default();
        while let Some(server) = servers.next().await {
            table.extend([server?.into_configuration()]);
        }
        Ok(table)
    }

    async fn tell(&mut self, message: Message) -> Result<(), Error> {
        self.request(message, |_| {}).await
    }

    async fn ask<T: Answer>(&mut self, message: Message) -> Result<T, Error> {
        let mut found = None;
        self.request(message, |answer| found = T::of(answer)).await?;
        found.ok_or_else(|| unanswered(&message))
    }

    async fn list<T: Answer>(&mut self, message: Message) -> Result<Vec<T>, Error> {
        let mut entries = Vec::new();
        self.socket
            .dump(&wrap(message, self.family), |answer: GenlMessage<Message>| entries.extend(T::of(answer.payload)))
            .await
            .map_err(|error| Error::new(&message, error))?;
        T::without_repeats(&mut entries);
        Ok(entries)
    }

    async fn request(&mut self, message: Message, mut each: impl FnMut(Message)) -> Result<(), Error> {
        if let Some(fault) = message.fault() {
            return Err(Error::fault(&message, fault));
        }
        let request = wrap(message, self.family).into();
        let result = self.socket.request(&request, |answer: GenlMessage<Message>| each(answer.payload)).await;
        outcome(&message, result)
    }
}

/// Virtual servers with their real servers, one after another: see [`Client::servers`](crate::Client::servers).
#[derive(Debug)]
pub struct AsyncServers<'a> {
    client: &'a mut AsyncClient,
    ids: vec::IntoIter<VirtualServerId>,
}

impl AsyncServers<'_> {
    /// The next one; `None` after the last.
    pub async fn next(&mut self) -> Option<Result<ServerEntry, Error>> {
        loop {
            let id = self.ids.next()?;
            // In this order: of one that goes in between, the second says so.
            let real_servers = match self.client.real_servers(&id).await {
                Ok(real_servers) => real_servers,
                Err(error) => return Some(Err(error)),
            };
            match self.client.virtual_server(&id).await {
                Ok(virtual_server) => return Some(Ok(ServerEntry { virtual_server, real_servers })),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Some(Err(error)),
            }
        }
    }
}
