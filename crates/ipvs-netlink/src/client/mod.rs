//! The clients: one socket each, and a method for each request.

#[cfg(feature = "tokio")]
mod async_client;
mod requests;
mod union;

use std::fmt;
use std::net::SocketAddr;
use std::vec;

use netlink_batch::protocols::NETLINK_GENERIC;
use netlink_batch::{PartialBatch, Refusal, Request, Sent, Socket};
use netlink_packet_generic::GenlMessage;
use netlink_packet_generic::constants::GENL_ID_CTRL;
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};

#[cfg(feature = "tokio")]
pub use self::async_client::{AsyncClient, AsyncServers};
use self::union::{Listed, READINGS, Union};
use crate::attributes::FAMILY_NAME;
use crate::changes::Table;
use crate::config::{Info, Timeouts};
use crate::errno::ENOENT;
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
    /// what was carried out: [`Client::apply_partial`] tells what is known. See [`netlink_batch::Socket::batch`] for how it
    /// works.
    pub fn apply(&mut self, messages: &[Message]) -> Result<Vec<Result<(), Error>>, Error> {
        self.apply_partial(messages).into_result()
    }

    /// [`Client::apply`], which tells what is known where the socket fails.
    pub fn apply_partial(&mut self, messages: &[Message]) -> Applied {
        let mut applied = self.batch(messages);
        let stale = refused_with_enoent(&applied.results);
        if !stale.is_empty() {
            match self.renew_family() {
                Ok(false) => {}
                Ok(true) => {
                    let again: Vec<Message> = stale.iter().map(|index| messages[*index]).collect();
                    let again = self.batch(&again);
                    applied.replace(&stale, again);
                }
                Err(error) => replace_with_unloaded(&mut applied.results, &stale, messages, &error),
            }
        }
        applied
    }

    fn batch(&mut self, messages: &[Message]) -> Applied {
        let results = self.socket.batch_partial(to_requests(messages, self.family));
        Applied::of(messages, results)
    }

    /// All virtual servers with their real servers, one after another: first the identities of all are read, then each by
    /// itself. One that goes before its turn is left out. Held are the identities and one virtual server. None is missing that
    /// was there all the time: lists are read as for [`Client::all_virtual_servers`] and [`Client::all_real_servers`].
    pub fn servers(&mut self) -> Result<Servers<'_>, Error> {
        let ids: Union<VirtualServerId> = self.union(Message::ListVirtualServers, |_| false)?;
        let ids: Vec<_> = ids.into_entries().map(|(id, _)| id).collect();
        Ok(Servers { client: self, ids: ids.into_iter() })
    }

    /// Everything that is configured, to be compared with what is wanted: see [`Client::servers`].
    pub fn table(&mut self) -> Result<Table, Error> {
        self.servers()?.map(|server| server.map(ServerEntry::into_configuration)).collect()
    }

    /// All virtual servers, each once, with none missing that was there all the time.
    ///
    /// [`Client::virtual_servers`] is one list, which can lack some where others delete virtual servers, or the kernel resizes
    /// its table. This reads lists until one adds nothing, two as a rule, and then asks for each that the last one lacked.
    /// [`ErrorKind::Interrupted`] where each of 32 lists has something new.
    pub fn all_virtual_servers(&mut self) -> Result<Vec<VirtualServerEntry>, Error> {
        let union: Union<VirtualServerEntry> = self.union(Message::ListVirtualServers, |_| false)?;
        let mut entries = Vec::new();
        for (entry, is_listed) in union.into_entries() {
            if is_listed {
                entries.push(entry);
                continue;
            }
            match self.virtual_server(&entry.server.id) {
                Ok(entry) => entries.push(entry),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(entries)
    }

    /// All real servers of a virtual server, each once, with none missing that was there all the time: up to 8 take one list, more
    /// take two or more. [`ErrorKind::Interrupted`] where each of 32 lists has something new.
    pub fn all_real_servers(&mut self, id: &VirtualServerId) -> Result<Vec<RealServerEntry>, Error> {
        let union = self.union(Message::ListRealServers(*id), Union::is_of_one_look)?;
        Ok(union.into_latest().collect())
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
        for _ in 0..READINGS {
            let mut entries = Vec::new();
            if !self.dump(message, |reply| entries.extend(T::from_message(reply)))? {
                T::remove_duplicates(&mut entries);
                return Ok(entries);
            }
        }
        Err(interrupted(&message))
    }

    /// Reads a list until nothing is added, or until it is enough.
    fn union<T: Listed>(&mut self, message: Message, is_enough: fn(&Union<T>) -> bool) -> Result<Union<T>, Error> {
        let mut union = Union::default();
        for _ in 0..READINGS {
            union.begin();
            let is_interrupted = self.dump(message, |reply| union.push(reply))?;
            if (union.end() || is_enough(&union)) && !is_interrupted {
                return Ok(union);
            }
        }
        Err(interrupted(&message))
    }

    fn request(&mut self, message: Message, mut each: impl FnMut(Message)) -> Result<(), Error> {
        if let Some(fault) = message.fault() {
            return Err(Error::fault(&message, fault));
        }
        let result = self.with_family(|socket, family| {
            socket.request(&wrap(message, family).into(), |reply: GenlMessage<Message>| each(reply.payload))
        });
        check_result(&message, result)
    }

    /// Passes each message of a list to `each` as it arrives.
    /// Returns whether the kernel says that a change has interrupted it, which IPVS does not do so far.
    fn dump(&mut self, message: Message, mut each: impl FnMut(Message)) -> Result<bool, Error> {
        let result = self.with_family(|socket, family| {
            let mut stream = socket.stream(&wrap(message, family))?;
            for reply in stream.by_ref() {
                let reply: GenlMessage<Message> = reply?;
                each(reply.payload);
            }
            Ok(stream.is_interrupted())
        });
        check_result(&message, result)
    }

    /// Runs an exchange, and again if the family has another number since `ip_vs` was unloaded and loaded: the kernel answers
    /// `ENOENT` to the number of no family (`genl_rcv_msg`), as it does where an object is missing.
    fn with_family<T>(
        &mut self,
        mut exchange: impl FnMut(&mut Socket, u16) -> Result<T, netlink_batch::Error>,
    ) -> Result<T, Attempt> {
        match exchange(&mut self.socket, self.family) {
            Err(error) if is_enoent(&error) => match self.renew_family() {
                Ok(true) => exchange(&mut self.socket, self.family).map_err(Attempt::Failed),
                Ok(false) => Err(Attempt::Failed(error)),
                Err(renewal) => Err(Attempt::of_renewal(error, renewal)),
            },
            result => result.map_err(Attempt::Failed),
        }
    }

    /// Asks for the number of the family again; returns whether it is another one.
    fn renew_family(&mut self) -> Result<bool, netlink_batch::Error> {
        let mut found = None;
        self.socket.request(&family_request(), |reply| found = found.or(family_id(&reply)))?;
        let family = found.unwrap_or(self.family);
        let known = std::mem::replace(&mut self.family, family);
        Ok(known != self.family)
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
            let real_servers = match self.client.all_real_servers(&id) {
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

/// What became of a batch of messages.
#[derive(Debug)]
#[non_exhaustive]
pub struct Applied {
    /// The results of the first messages: of all, unless the socket failed.
    pub results: Vec<Result<(), Error>>,
    /// How many messages after those were sent and may or may not have been carried out. The rest was not sent.
    pub in_doubt: usize,
    /// Why the socket failed, if it did.
    pub failure: Option<Error>,
}

impl Applied {
    /// The results of all messages, or the failure of the socket.
    pub fn into_result(self) -> Result<Vec<Result<(), Error>>, Error> {
        match self.failure {
            None => Ok(self.results),
            Some(failure) => Err(failure),
        }
    }

    fn of(messages: &[Message], results: Result<Vec<Result<(), Refusal>>, Box<PartialBatch>>) -> Self {
        let (known, requests_in_doubt, failure) = match results {
            Ok(results) => (results, 0, None),
            Err(partial) => {
                let PartialBatch { results, in_doubt, error, .. } = *partial;
                (results, in_doubt, Some(Error::batch(messages.len(), error)))
            }
        };
        let has_failed = failure.is_some();
        let mut known = known.into_iter();
        let mut results = Vec::with_capacity(messages.len());
        for message in messages {
            if let Some(fault) = message.fault() {
                results.push(Err(Error::fault(message, fault)));
                continue;
            }
            results.push(match known.next() {
                Some(result) => check_result(message, result.map_err(|refusal| Attempt::Failed(refusal.into()))),
                None if has_failed => break,
                None => Ok(()),
            });
        }
        // Between those in doubt there are messages that were not sent for what is wrong with them.
        let mut left = requests_in_doubt;
        let in_doubt = messages[results.len()..].iter().take_while(|message| {
            let is_in_doubt = left > 0;
            left -= usize::from(is_in_doubt && message.fault().is_none());
            is_in_doubt
        });
        let in_doubt = in_doubt.count();
        Self { results, in_doubt, failure }
    }

    /// Puts in the results of messages that were sent again. Where that failed, nothing is known from the first on that has
    /// none.
    fn replace(&mut self, indices: &[usize], again: Self) {
        let known = again.results.len();
        for (index, result) in indices.iter().zip(again.results) {
            self.results[*index] = result;
        }
        if let Some(failure) = again.failure {
            let end = indices.get(known).copied().unwrap_or(self.results.len());
            self.in_doubt += self.results.len() - end;
            self.results.truncate(end);
            self.failure = Some(failure);
        }
    }
}

/// Each of many lists was interrupted by a change, or had something new.
fn interrupted(message: &Message) -> Error {
    Error::new(message, netlink_batch::Error::Interrupted { attempts: READINGS })
}

fn check_result<T: Default>(message: &Message, result: Result<T, Attempt>) -> Result<T, Error> {
    match result {
        Ok(result) => Ok(result),
        Err(Attempt::Failed(error)) if Error::is_success_of(message, &error) => Ok(T::default()),
        Err(Attempt::Failed(error)) => Err(Error::new(message, error)),
        Err(Attempt::Unloaded(error)) => Err(Error::unloaded(message, error)),
    }
}

/// Why an exchange failed.
enum Attempt {
    Failed(netlink_batch::Error),
    /// The kernel has no IPVS any more.
    Unloaded(netlink_batch::Error),
}

impl Attempt {
    /// `error` is that of the exchange, and `renewal` that of asking for the number of the family after it.
    fn of_renewal(error: netlink_batch::Error, renewal: netlink_batch::Error) -> Self {
        if is_enoent(&renewal) { Self::Unloaded(renewal) } else { Self::Failed(error) }
    }
}

impl From<netlink_batch::Error> for Attempt {
    fn from(error: netlink_batch::Error) -> Self {
        Self::Failed(error)
    }
}

fn is_enoent(error: &netlink_batch::Error) -> bool {
    error.refusal().is_some_and(|refusal| refusal.errno == ENOENT)
}

/// The indices of the messages of a batch that the number of no family would explain. All others were carried out, or
/// refused by IPVS.
fn refused_with_enoent(results: &[Result<(), Error>]) -> Vec<usize> {
    let is_refused = |result: &Result<(), Error>| {
        result.as_ref().is_err_and(|error| error.refusal().is_some_and(|refusal| refusal.errno == ENOENT))
    };
    (0..results.len()).filter(|index| is_refused(&results[*index])).collect()
}

fn replace_with_unloaded(
    results: &mut [Result<(), Error>],
    indices: &[usize],
    messages: &[Message],
    error: &netlink_batch::Error,
) {
    if is_enoent(error) {
        for index in indices {
            results[*index] = Err(Error::unloaded(&messages[*index], Refusal::new(ENOENT).into()));
        }
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

#[cfg(test)]
pub(crate) mod tests {
    use std::env;
    use std::process::Command;

    use super::*;
    use crate::id::Protocol;
    use crate::scheduler::Scheduler;

    /// The number of no family, as after `ip_vs` was unloaded and loaded.
    pub(super) const STALE: u16 = 0xfff0;

    /// Runs the test that calls this, by its name, in a process with a network namespace of its own, and returns whether this
    /// is that process. The package's own tests do not have the lab.
    pub(crate) fn is_in_own_namespace(test: &str) -> bool {
        const MARK: &str = "IPVS_NETLINK_TEST_IN_OWN_NAMESPACE";
        if env::var_os(MARK).is_some() {
            return true;
        }
        let mut command = Command::new("unshare");
        command.arg("--net").arg(env::current_exe().unwrap()).args(["--ignored", "--exact", test]).env(MARK, "1");
        let output = command.output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && stdout.contains("1 passed"), "{output:?}");
        false
    }

    pub(crate) fn web() -> VirtualServer {
        VirtualServer::new(
            VirtualServerId::address(Protocol::Tcp, SocketAddr::from(([10, 96, 0, 1], 80))),
            Scheduler::RoundRobin,
        )
    }

    #[test]
    fn a_failed_batch_tells_what_is_known_of_each_message() {
        let good = Message::AddVirtualServer(web());
        let wrong = Message::Timeouts(Timeouts::default());
        let messages = [good, wrong, good, good, wrong, good, wrong, good];
        let error = || netlink_batch::Error::Receive(std::io::Error::from_raw_os_error(105));
        for (known, in_doubt, wanted) in
            [(0, 0, (0, 0)), (1, 0, (2, 0)), (2, 2, (3, 3)), (3, 2, (5, 3)), (5, 0, (8, 0))]
        {
            let partial = PartialBatch::new(vec![Ok(()); known], in_doubt, error());
            let applied = Applied::of(&messages, Err(Box::new(partial)));
            assert_eq!((applied.results.len(), applied.in_doubt), wanted, "{known} known");
            assert!(applied.failure.is_some() && applied.into_result().is_err());
        }
        let applied = Applied::of(&messages, Ok(vec![Err(Refusal::new(17)), Ok(()), Ok(()), Ok(()), Ok(())]));
        let kinds = applied.into_result().unwrap().into_iter().map(|result| result.err().map(|error| error.kind()));
        let (exists, invalid) = (Some(ErrorKind::Exists), Some(ErrorKind::Invalid));
        assert_eq!(kinds.collect::<Vec<_>>(), [exists, invalid, None, None, invalid, None, invalid, None]);
    }

    #[test]
    #[ignore = "needs a kernel with IPVS: cargo xtask test"]
    fn a_stale_family_number_is_asked_for_again() {
        if !is_in_own_namespace("client::tests::a_stale_family_number_is_asked_for_again") {
            return;
        }
        let client = || Client { family: STALE, ..Client::connect().unwrap() };
        let (server, other) = (web(), VirtualServerId::firewall_mark(7, crate::Family::Ipv4).unwrap());
        client().add_virtual_server(&server).unwrap();
        assert_eq!(client().add_virtual_server(&server).unwrap_err().kind(), ErrorKind::Exists);
        assert_eq!(client().virtual_servers().unwrap().len(), 1);
        assert_eq!(client().virtual_server(&server.id).unwrap().server, server);
        assert_eq!(client().real_servers(&server.id).unwrap(), []);
        assert_eq!(client().table().unwrap().len(), 1);
        assert!(client().features(&[Scheduler::RoundRobin]).unwrap().ipv6);
        let messages = [
            Message::SetVirtualServer(server),
            Message::DeleteRealServer(server.id, SocketAddr::from(([10, 1, 0, 1], 80))),
            Message::DeleteVirtualServer(other),
            Message::DeleteVirtualServer(server.id),
        ];
        let mut stale = client();
        let results = stale.apply(&messages).unwrap();
        let errnos =
            results.into_iter().map(|result| result.err().and_then(|error| error.refusal().map(|it| it.errno)));
        assert_eq!(errnos.collect::<Vec<_>>(), [None, Some(ENOENT), Some(3), None]);
        // Once is enough, and what is really missing is still said.
        assert_ne!(stale.family, STALE);
        let unknown = VirtualServer { scheduler: "nosuch".parse().unwrap(), ..server };
        assert_eq!(client().add_virtual_server(&unknown).unwrap_err().kind(), ErrorKind::NoScheduler);
        assert_eq!(stale.add_virtual_server(&unknown).unwrap_err().kind(), ErrorKind::NoScheduler);
    }
}
