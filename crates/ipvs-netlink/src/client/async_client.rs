//! The asynchronous client, on tokio.

use std::fmt;
use std::net::SocketAddr;
use std::vec;

use netlink_batch::protocols::NETLINK_GENERIC;
use netlink_batch::{AsyncSocket, Sent};
use netlink_packet_generic::GenlMessage;

use super::union::{Listed, READINGS, Union};
use super::{
    Applied, Attempt, ServerEntry, check_result, family_id, family_request, interrupted, is_enoent, no_family,
    no_reply, refused_with_enoent, replace_with_unloaded, requests, to_requests, wrap,
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
        self.apply_partial(messages).await.into_result()
    }

    /// [`Client::apply_partial`](crate::Client::apply_partial), awaited.
    pub async fn apply_partial(&mut self, messages: &[Message]) -> Applied {
        let mut applied = self.batch(messages).await;
        let stale = refused_with_enoent(&applied.results);
        if !stale.is_empty() {
            match self.renew_family().await {
                Ok(false) => {}
                Ok(true) => {
                    let again: Vec<Message> = stale.iter().map(|index| messages[*index]).collect();
                    let again = self.batch(&again).await;
                    applied.replace(&stale, again);
                }
                Err(error) => replace_with_unloaded(&mut applied.results, &stale, messages, &error),
            }
        }
        applied
    }

    async fn batch(&mut self, messages: &[Message]) -> Applied {
        let results = self.socket.batch_partial(to_requests(messages, self.family)).await;
        Applied::of(messages, results)
    }

    /// [`Client::servers`](crate::Client::servers), awaited.
    pub async fn servers(&mut self) -> Result<AsyncServers<'_>, Error> {
        let ids: Union<VirtualServerId> = self.union(Message::ListVirtualServers, |_| false).await?;
        let ids: Vec<_> = ids.into_entries().map(|(id, _)| id).collect();
        Ok(AsyncServers { client: self, ids: ids.into_iter() })
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

    /// [`Client::all_virtual_servers`](crate::Client::all_virtual_servers), awaited.
    pub async fn all_virtual_servers(&mut self) -> Result<Vec<VirtualServerEntry>, Error> {
        let union: Union<VirtualServerEntry> = self.union(Message::ListVirtualServers, |_| false).await?;
        let mut entries = Vec::new();
        for (entry, is_listed) in union.into_entries() {
            if is_listed {
                entries.push(entry);
                continue;
            }
            match self.virtual_server(&entry.server.id).await {
                Ok(entry) => entries.push(entry),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(entries)
    }

    /// [`Client::all_real_servers`](crate::Client::all_real_servers), awaited.
    pub async fn all_real_servers(&mut self, id: &VirtualServerId) -> Result<Vec<RealServerEntry>, Error> {
        let union = self.union(Message::ListRealServers(*id), Union::is_of_one_look).await?;
        Ok(union.into_latest().collect())
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
        for _ in 0..READINGS {
            let mut entries = Vec::new();
            if !self.dump(message, |reply| entries.extend(T::from_message(reply))).await? {
                T::remove_duplicates(&mut entries);
                return Ok(entries);
            }
        }
        Err(interrupted(&message))
    }

    /// Reads a list until nothing is added, or until it is enough.
    async fn union<T: Listed>(
        &mut self,
        message: Message,
        is_enough: fn(&Union<T>) -> bool,
    ) -> Result<Union<T>, Error> {
        let mut union = Union::default();
        for _ in 0..READINGS {
            union.begin();
            let is_interrupted = self.dump(message, |reply| union.push(reply)).await?;
            if (union.end() || is_enough(&union)) && !is_interrupted {
                return Ok(union);
            }
        }
        Err(interrupted(&message))
    }

    async fn request(&mut self, message: Message, mut each: impl FnMut(Message)) -> Result<(), Error> {
        if let Some(fault) = message.fault() {
            return Err(Error::fault(&message, fault));
        }
        let result = match self.exchange(message, &mut each).await {
            Err(error) if is_enoent(&error) => match self.renew_family().await {
                Ok(true) => self.exchange(message, &mut each).await.map_err(Attempt::Failed),
                Ok(false) => Err(Attempt::Failed(error)),
                Err(renewal) => Err(Attempt::of_renewal(error, renewal)),
            },
            result => result.map_err(Attempt::Failed),
        };
        check_result(&message, result)
    }

    async fn exchange(&mut self, message: Message, each: &mut impl FnMut(Message)) -> Result<(), netlink_batch::Error> {
        let request = wrap(message, self.family).into();
        self.socket.request(&request, |reply: GenlMessage<Message>| each(reply.payload)).await
    }

    /// Passes each message of a list to `each` as it arrives.
    async fn dump(&mut self, message: Message, mut each: impl FnMut(Message)) -> Result<bool, Error> {
        let result = match self.dump_once(message, &mut each).await {
            Err(error) if is_enoent(&error) => match self.renew_family().await {
                Ok(true) => self.dump_once(message, &mut each).await.map_err(Attempt::Failed),
                Ok(false) => Err(Attempt::Failed(error)),
                Err(renewal) => Err(Attempt::of_renewal(error, renewal)),
            },
            result => result.map_err(Attempt::Failed),
        };
        check_result(&message, result)
    }

    async fn dump_once(
        &mut self,
        message: Message,
        each: &mut impl FnMut(Message),
    ) -> Result<bool, netlink_batch::Error> {
        let mut stream = self.socket.stream(&wrap(message, self.family)).await?;
        while let Some(reply) = stream.next().await {
            let reply: GenlMessage<Message> = reply?;
            each(reply.payload);
        }
        Ok(stream.is_interrupted())
    }

    /// As in [`Client`](crate::Client).
    async fn renew_family(&mut self) -> Result<bool, netlink_batch::Error> {
        let mut found = None;
        self.socket.request(&family_request(), |reply| found = found.or(family_id(&reply))).await?;
        let family = found.unwrap_or(self.family);
        let known = std::mem::replace(&mut self.family, family);
        Ok(known != self.family)
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
            let real_servers = match self.client.all_real_servers(&id).await {
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

#[cfg(test)]
mod tests {
    use super::super::tests::{STALE, is_in_own_namespace, web};
    use super::*;

    #[test]
    #[ignore = "needs a kernel with IPVS: cargo xtask test"]
    fn a_stale_family_number_is_asked_for_again() {
        if !is_in_own_namespace("client::async_client::tests::a_stale_family_number_is_asked_for_again") {
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut client = AsyncClient::connect().await.unwrap();
            client.family = STALE;
            client.add_virtual_server(&web()).await.unwrap();
            client.family = STALE;
            assert_eq!(client.table().await.unwrap().len(), 1);
            client.family = STALE;
            let results = client.apply(&[Message::DeleteVirtualServer(web().id)]).await.unwrap();
            assert!(results.iter().all(Result::is_ok));
            assert_eq!(client.virtual_servers().await.unwrap(), []);
        });
    }
}
