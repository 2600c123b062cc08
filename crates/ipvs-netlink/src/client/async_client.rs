//! The asynchronous client, on tokio.

use std::fmt;
use std::net::SocketAddr;
use std::vec;

use netlink_batch::protocols::NETLINK_GENERIC;
use netlink_batch::{AsyncSocket, Sent};
use netlink_packet_generic::GenlMessage;

use super::{
    ServerEntry, UniqueIds, check_result, family_id, family_request, no_family, no_reply, requests, to_requests,
    to_results, wrap,
};
use crate::changes::Table;
use crate::config::{Info, Timeouts};
use crate::error::{Error, ErrorKind};
use crate::id::VirtualServerId;
use crate::message::{Message, Reply};
use crate::real_server::{RealServer, RealServerEntry};
use crate::sync_daemon::{SyncDaemon, SyncRole};
use crate::virtual_server::{VirtualServer, VirtualServerEntry};

/// [`Client`](crate::Client) for asynchronous tasks: the same methods, except [`Client::features`](crate::Client::features), which
/// is needed only once.
///
/// The kernel handles a request inside the system call that sends it. Other tasks run between requests, between the datagrams of
/// a list and between the parts of a batch. A slow request therefore blocks its thread: stopping a synchronization daemon can take
/// two seconds, and so can loading the module of a scheduler. If a future is dropped, the client stays usable, but it is not known
/// whether its request was carried out.
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
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $type:ty),*) -> $reply:ty = $run:ident($message:expr);)*) => {
        impl AsyncClient {
            $($(#[$doc])*
            pub async fn $name(&mut self, $($argument: $type),*) -> Result<$reply, Error> {
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
        let request = family_request();
        socket.request(&request, |reply| family = family.or(family_id(&reply))).await.map_err(Error::connecting)?;
        family.map(|family| Self { socket, family }).ok_or_else(no_family)
    }

    /// What was sent to the kernel so far.
    pub fn sent(&self) -> Sent {
        self.socket.sent()
    }

    /// [`Client::apply`](crate::Client::apply), awaited.
    pub async fn apply(&mut self, messages: &[Message]) -> Result<Vec<Result<(), Error>>, Error> {
        let results = self.socket.batch(to_requests(messages, self.family)).await;
        to_results(messages, results)
    }

    /// [`Client::servers`](crate::Client::servers), awaited.
    pub async fn servers(&mut self) -> Result<AsyncServers<'_>, Error> {
        let failed = |error| Error::new(&Message::ListVirtualServers, error);
        let mut ids = UniqueIds::default();
        let mut stream = self.socket.stream(&wrap(Message::ListVirtualServers, self.family)).await.map_err(failed)?;
        while let Some(reply) = stream.next().await {
            ids.push(&reply.map_err(failed)?);
        }
        Ok(AsyncServers { client: self, ids: ids.ordered.into_iter() })
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

    async fn execute(&mut self, message: Message) -> Result<(), Error> {
        self.request(message, |_| {}).await
    }

    async fn get<T: Reply>(&mut self, message: Message) -> Result<T, Error> {
        let mut found = None;
        self.request(message, |reply| found = T::from_message(reply)).await?;
        found.ok_or_else(|| no_reply(&message))
    }

    async fn list<T: Reply>(&mut self, message: Message) -> Result<Vec<T>, Error> {
        let mut entries = Vec::new();
        self.socket
            .dump(&wrap(message, self.family), |reply: GenlMessage<Message>| {
                entries.extend(T::from_message(reply.payload));
            })
            .await
            .map_err(|error| Error::new(&message, error))?;
        T::remove_duplicates(&mut entries);
        Ok(entries)
    }

    async fn request(&mut self, message: Message, mut each: impl FnMut(Message)) -> Result<(), Error> {
        if let Some(fault) = message.fault() {
            return Err(Error::fault(&message, fault));
        }
        let request = wrap(message, self.family).into();
        let result = self.socket.request(&request, |reply: GenlMessage<Message>| each(reply.payload)).await;
        check_result(&message, result)
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
            // In this order: if the virtual server is deleted in between, the second request fails.
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
