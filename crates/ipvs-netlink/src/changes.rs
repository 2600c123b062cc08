//! What leads from one configuration to another.

use std::collections::BTreeMap;
use std::iter::Peekable;
use std::net::SocketAddr;

use crate::id::VirtualServerId;
use crate::message::Message;
use crate::real_server::RealServer;
use crate::virtual_server::VirtualServer;

/// A configuration: virtual servers, and their real servers.
///
/// ```no_run
/// use ipvs_netlink::{Client, Protocol, RealServer, Scheduler, Table, VirtualServer, VirtualServerId};
///
/// let id = VirtualServerId::address(Protocol::Tcp, "10.0.0.1:80".parse()?);
/// let web = VirtualServer::new(id, Scheduler::RoundRobin);
/// let wanted = Table::from_iter([(web, vec![RealServer::new("10.1.0.7:8080".parse()?)])]);
///
/// let mut ipvs = Client::connect()?;
/// let changes = ipvs.table()?.changes_to(&wanted);
/// for result in ipvs.apply(&changes)? {
///     result?;
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table(BTreeMap<VirtualServerId, (VirtualServer, BTreeMap<SocketAddr, RealServer>)>);

impl Table {
    /// How many virtual servers there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no virtual server.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The virtual servers with their real servers, both in order.
    pub fn iter(&self) -> impl Iterator<Item = (&VirtualServer, impl Iterator<Item = &RealServer>)> {
        self.0.values().map(|(server, real_servers)| (server, real_servers.values()))
    }

    /// Removes a virtual server, and returns whether it was there: what is to be left alone is removed from what is and
    /// from what is wanted.
    pub fn remove(&mut self, id: &VirtualServerId) -> bool {
        self.0.remove(id).is_some()
    }

    /// The messages that turn this configuration into another.
    ///
    /// Virtual servers are added and changed first, in the order of their identities, and of each one its real servers:
    /// those that come before those that go. Surplus virtual servers are deleted last. So no virtual server that had real
    /// servers, and will have some, is without in between.
    pub fn changes_to(&self, wanted: &Self) -> Vec<Message> {
        let mut messages = Vec::new();
        for (id, (server, real_servers)) in &wanted.0 {
            match self.0.get(id) {
                None => {
                    messages.push(Message::AddVirtualServer(*server));
                    messages.extend(real_servers.values().map(|real| Message::AddRealServer(*id, *real)));
                }
                Some((held, held_real)) => {
                    if held != server {
                        messages.push(Message::SetVirtualServer(*server));
                    }
                    let mut out = Vec::new();
                    for change in Change::between(held_real.values().copied(), real_servers.values().copied()) {
                        match change {
                            Change::Add(real) => messages.push(Message::AddRealServer(*id, real)),
                            Change::Set(real) => messages.push(Message::SetRealServer(*id, real)),
                            Change::Surplus(real) => out.push(Message::DeleteRealServer(*id, real.socket_address())),
                        }
                    }
                    messages.append(&mut out);
                }
            }
        }
        let surplus = self.0.keys().filter(|id| !wanted.0.contains_key(id));
        messages.extend(surplus.map(|id| Message::DeleteVirtualServer(*id)));
        messages
    }
}

impl Extend<(VirtualServer, Vec<RealServer>)> for Table {
    /// Of several virtual servers of one identity, and of several real servers of one address and port, the last counts.
    fn extend<T: IntoIterator<Item = (VirtualServer, Vec<RealServer>)>>(&mut self, servers: T) {
        self.0.extend(servers.into_iter().map(|(server, real_servers)| {
            let real_servers = real_servers.into_iter().map(|real| (real.socket_address(), real));
            (server.id, (server, real_servers.collect()))
        }));
    }
}

impl FromIterator<(VirtualServer, Vec<RealServer>)> for Table {
    fn from_iter<T: IntoIterator<Item = (VirtualServer, Vec<RealServer>)>>(servers: T) -> Self {
        let mut table = Self::default();
        table.extend(servers);
        table
    }
}

/// What is to be done about one real server of a virtual server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// To be added.
    Add(RealServer),
    /// To be changed to this.
    Set(RealServer),
    /// As it is there now, unwanted: to be deleted at once, or after its connections have ended.
    Surplus(RealServer),
}

impl Change {
    /// What is to be done about the real servers of a virtual server, in one walk over those that are there and those that
    /// are wanted. Both have to be sorted by address and port.
    pub fn between<H, W>(held: H, wanted: W) -> impl Iterator<Item = Self>
    where
        H: IntoIterator<Item = RealServer>,
        W: IntoIterator<Item = RealServer>,
    {
        Changes { held: held.into_iter().peekable(), wanted: wanted.into_iter().peekable() }
    }
}

struct Changes<H: Iterator, W: Iterator> {
    held: Peekable<H>,
    wanted: Peekable<W>,
}

impl<H, W> Iterator for Changes<H, W>
where
    H: Iterator<Item = RealServer>,
    W: Iterator<Item = RealServer>,
{
    type Item = Change;

    fn next(&mut self) -> Option<Change> {
        loop {
            let Some(held) = self.held.peek().copied() else { return self.wanted.next().map(Change::Add) };
            let at = held.socket_address();
            if let Some(wanted) = self.wanted.next_if(|wanted| wanted.socket_address() < at) {
                return Some(Change::Add(wanted));
            }
            self.held.next();
            match self.wanted.next_if(|wanted| wanted.socket_address() == at) {
                None => return Some(Change::Surplus(held)),
                Some(wanted) if wanted != held => return Some(Change::Set(wanted)),
                Some(_) => {}
            }
        }
    }
}
