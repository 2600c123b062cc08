//! The addresses of the node's interfaces, and their changes at once.
//!
//! kube-proxy reads them anew at each sync; with thousands of VIPs that took most of its time. Here the kernel tells of
//! each change, and only a notification that was lost causes another reading.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use netlink_batch::protocols::NETLINK_ROUTE;
use netlink_batch::{Error, Received, Socket, Subscription};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};

use crate::kernel::DEVICE;
use crate::linux::address_of;

/// Multicast groups of rtnetlink (`linux/rtnetlink.h`).
const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_IPV4_IFADDR: u32 = 5;
const RTNLGRP_IPV6_IFADDR: u32 = 9;

/// What a wait ended with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// The addresses of interfaces other than `kube-ipvs0` are no longer the same.
    pub addresses: bool,
    /// `kube-ipvs0` was deleted: not by this agent, which never does.
    pub device_lost: bool,
}

/// The addresses of all interfaces but `kube-ipvs0`.
#[derive(Debug)]
pub struct LocalAddresses {
    subscription: Subscription,
    /// Interfaces named `kube-ipvs0`: at most one, but a renaming may overlap.
    ours: HashSet<u32>,
    interfaces: HashMap<u32, HashSet<IpAddr>>,
}

impl LocalAddresses {
    /// Subscribes, then reads all: no change between the two is missed.
    pub fn open() -> Result<Self, Error> {
        let subscription =
            Subscription::open(NETLINK_ROUTE, &[RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR])?;
        let mut this = Self { subscription, ours: HashSet::new(), interfaces: HashMap::new() };
        this.read()?;
        Ok(this)
    }

    /// The addresses as they are now.
    pub fn current(&self) -> BTreeSet<IpAddr> {
        self.interfaces
            .iter()
            .filter(|(index, _)| !self.ours.contains(index))
            .flat_map(|(_, addresses)| addresses.iter().copied())
            .collect()
    }

    /// Waits for notifications and takes them in.
    pub fn wait(&mut self) -> Result<Changed, Error> {
        let mut notifications = Vec::new();
        let received = self.subscription.receive(|message: RouteNetlinkMessage| notifications.push(message))?;
        if received == Received::Overrun {
            self.interfaces.clear();
            self.ours.clear();
            self.read()?;
            return Ok(Changed { addresses: true, device_lost: self.ours.is_empty() });
        }
        let mut changed = Changed::default();
        for message in notifications {
            let one = self.take_in(message);
            changed.addresses |= one.addresses;
            changed.device_lost |= one.device_lost;
        }
        Ok(changed)
    }

    fn read(&mut self) -> Result<(), Error> {
        let mut socket = Socket::open(NETLINK_ROUTE)?;
        let mut messages = Vec::new();
        let mut collect = |message: RouteNetlinkMessage| messages.push(message);
        socket.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()), &mut collect)?;
        socket.dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()), &mut collect)?;
        for message in messages {
            self.take_in(message);
        }
        Ok(())
    }

    fn take_in(&mut self, message: RouteNetlinkMessage) -> Changed {
        let mut changed = Changed::default();
        match message {
            RouteNetlinkMessage::NewLink(link) => {
                let index = link.header.index;
                let is_ours =
                    link.attributes.iter().any(|a| matches!(a, LinkAttribute::IfName(name) if name == DEVICE));
                let was_ours = if is_ours { !self.ours.insert(index) } else { self.ours.remove(&index) };
                // A renaming makes its addresses count, or no longer count.
                changed.addresses = is_ours != was_ours && self.interfaces.contains_key(&index);
            }
            RouteNetlinkMessage::DelLink(link) => {
                let index = link.header.index;
                changed.device_lost = self.ours.remove(&index);
                changed.addresses = self.interfaces.remove(&index).is_some() && !changed.device_lost;
            }
            RouteNetlinkMessage::NewAddress(message) => {
                if let Some(address) = address_of(&message) {
                    let index = message.header.index;
                    let is_new = self.interfaces.entry(index).or_default().insert(address);
                    changed.addresses = is_new && !self.ours.contains(&index);
                }
            }
            RouteNetlinkMessage::DelAddress(message) => {
                if let Some(address) = address_of(&message) {
                    let index = message.header.index;
                    let was_held = self.interfaces.get_mut(&index).is_some_and(|held| held.remove(&address));
                    changed.addresses = was_held && !self.ours.contains(&index);
                }
            }
            _ => {}
        }
        changed
    }
}
