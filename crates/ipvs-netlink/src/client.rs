//! The client: one socket, and a method for each thing one asks of IPVS.

use std::collections::HashSet;
use std::fmt;
use std::net::SocketAddr;

use netlink_batch::protocols::NETLINK_GENERIC;
use netlink_batch::{Request, Sent, Socket};
use netlink_packet_generic::GenlMessage;
use netlink_packet_generic::constants::GENL_ID_CTRL;
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};

use crate::attributes::FAMILY_NAME;
use crate::config::{Info, Timeouts};
use crate::error::Error;
use crate::id::VirtualServerId;
use crate::message::Message;
use crate::real_server::{RealServer, RealServerEntry};
use crate::virtual_server::{VirtualServer, VirtualServerEntry};

/// A connection to the IPVS of one network namespace.
pub struct Client {
    socket: Socket,
    family: u16,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("family", &self.family).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects to the IPVS of the calling thread's network namespace. Asking for the family makes the kernel load
    /// `ip_vs` where it is a module.
    pub fn connect() -> Result<Self, Error> {
        let mut socket = Socket::open(NETLINK_GENERIC).map_err(Error::connecting)?;
        let ask =
            GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![GenlCtrlAttrs::FamilyName(FAMILY_NAME.to_owned())] };
        let mut ask = GenlMessage::from_payload(ask);
        ask.set_resolved_family_id(GENL_ID_CTRL);
        let mut family = None;
        socket
            .request(&ask.into(), |answer: GenlMessage<GenlCtrl>| {
                family = answer.payload.nlas.iter().find_map(|attribute| match attribute {
                    GenlCtrlAttrs::FamilyId(id) => Some(*id),
                    _ => None,
                });
            })
            .map_err(Error::connecting)?;
        let family = family.ok_or_else(|| {
            Error::connecting(netlink_batch::Error::Decode("the answer names no family number".into()))
        })?;
        Ok(Self { socket, family })
    }

    /// What was sent to the kernel so far.
    pub fn sent(&self) -> Sent {
        self.socket.sent()
    }

    /// The version of IPVS and the size of its connection table.
    pub fn info(&mut self) -> Result<Info, Error> {
        let mut info = None;
        self.ask(Message::GetInfo, |answer| {
            if let Message::Info(answer) = answer {
                info = Some(answer);
            }
        })?;
        info.ok_or_else(|| unanswered(&Message::GetInfo))
    }

    /// The timeouts of idle connections.
    pub fn timeouts(&mut self) -> Result<Timeouts, Error> {
        let mut timeouts = None;
        self.ask(Message::GetTimeouts, |answer| {
            if let Message::Timeouts(answer) = answer {
                timeouts = Some(answer);
            }
        })?;
        timeouts.ok_or_else(|| unanswered(&Message::GetTimeouts))
    }

    /// Sets the timeouts of idle connections; those that are 0 stay as they are.
    pub fn set_timeouts(&mut self, timeouts: Timeouts) -> Result<(), Error> {
        self.ask(Message::SetTimeouts(timeouts), |_| {})
    }

    /// All virtual servers, in the kernel's order.
    ///
    /// One may be missing where others, in any network namespace, delete virtual servers meanwhile: from one datagram of
    /// the list to the next the kernel finds its place by counting, in a table it has for all namespaces, and does not
    /// say when that went wrong.
    pub fn virtual_servers(&mut self) -> Result<Vec<VirtualServerEntry>, Error> {
        let mut entries = Vec::new();
        // For the same reason one may come again where others add.
        let mut seen = HashSet::new();
        self.dump(Message::ListVirtualServers, |answer| {
            if let Message::VirtualServer(entry) = answer
                && seen.insert(entry.server.id)
            {
                entries.push(entry);
            }
        })?;
        Ok(entries)
    }

    /// One virtual server; [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) where there is none.
    pub fn virtual_server(&mut self, id: &VirtualServerId) -> Result<VirtualServerEntry, Error> {
        let mut found = None;
        self.ask(Message::GetVirtualServer(*id), |answer| {
            if let Message::VirtualServer(entry) = answer {
                found = Some(entry);
            }
        })?;
        found.ok_or_else(|| unanswered(&Message::GetVirtualServer(*id)))
    }

    /// The real servers of a virtual server, in the kernel's order; none where there is no such virtual server.
    pub fn real_servers(&mut self, id: &VirtualServerId) -> Result<Vec<RealServerEntry>, Error> {
        let mut entries = Vec::new();
        self.dump(Message::ListRealServers(*id), |answer| {
            if let Message::RealServer(entry) = answer {
                entries.push(entry);
            }
        })?;
        Ok(entries)
    }

    /// Makes a virtual server.
    pub fn add_virtual_server(&mut self, server: &VirtualServer) -> Result<(), Error> {
        self.ask(Message::AddVirtualServer(*server), |_| {})
    }

    /// Changes everything about a virtual server but what identifies it; its connections stay.
    pub fn set_virtual_server(&mut self, server: &VirtualServer) -> Result<(), Error> {
        self.ask(Message::SetVirtualServer(*server), |_| {})
    }

    /// Deletes a virtual server and its real servers.
    pub fn delete_virtual_server(&mut self, id: &VirtualServerId) -> Result<(), Error> {
        self.ask(Message::DeleteVirtualServer(*id), |_| {})
    }

    /// Deletes every virtual server of the namespace.
    pub fn flush(&mut self) -> Result<(), Error> {
        self.ask(Message::Flush, |_| {})
    }

    /// Gives a virtual server one more real server.
    pub fn add_real_server(&mut self, id: &VirtualServerId, server: &RealServer) -> Result<(), Error> {
        self.ask(Message::AddRealServer(*id, *server), |_| {})
    }

    /// Changes everything about a real server but its address and port.
    pub fn set_real_server(&mut self, id: &VirtualServerId, server: &RealServer) -> Result<(), Error> {
        self.ask(Message::SetRealServer(*id, *server), |_| {})
    }

    /// Takes a real server from a virtual server.
    pub fn delete_real_server(&mut self, id: &VirtualServerId, address: SocketAddr) -> Result<(), Error> {
        self.ask(Message::DeleteRealServer(*id, address), |_| {})
    }

    /// Carries out messages that change something, in order, in few system calls; a failure does not stop the rest.
    ///
    /// Returns one result for each message. An `Err` of the whole means that the socket failed, and that it is not known
    /// what was carried out. See [`Socket::batch`] for how it works.
    pub fn apply(&mut self, messages: &[Message]) -> Result<Vec<Result<(), Error>>, Error> {
        let family = self.family;
        let sound = messages.iter().filter(|message| message.fault().is_none());
        let requests = sound.map(|message| Request::from(wrap(*message, family)));
        let results = self.socket.batch(requests).map_err(|error| Error::batch(messages.len(), error))?;
        let mut results = results.into_iter();
        Ok(messages
            .iter()
            .map(|message| match message.fault() {
                Some(fault) => Err(Error::fault(message, fault)),
                None => results.next().unwrap_or(Ok(())).map_err(|refusal| Error::new(message, refusal.into())),
            })
            .collect())
    }

    fn ask(&mut self, message: Message, mut each: impl FnMut(Message)) -> Result<(), Error> {
        if let Some(fault) = message.fault() {
            return Err(Error::fault(&message, fault));
        }
        self.socket
            .request(&wrap(message, self.family).into(), |answer: GenlMessage<Message>| each(answer.payload))
            .map_err(|error| Error::new(&message, error))
    }

    fn dump(&mut self, message: Message, mut each: impl FnMut(Message)) -> Result<(), Error> {
        self.socket
            .dump(&wrap(message, self.family), |answer: GenlMessage<Message>| each(answer.payload))
            .map_err(|error| Error::new(&message, error))
    }
}

fn wrap(message: Message, family: u16) -> GenlMessage<Message> {
    let mut message = GenlMessage::from_payload(message);
    message.set_resolved_family_id(family);
    message
}

fn unanswered(message: &Message) -> Error {
    Error::new(message, netlink_batch::Error::Decode("the kernel acknowledged without an answer".into()))
}
