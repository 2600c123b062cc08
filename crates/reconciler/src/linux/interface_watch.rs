//! Watches the addresses of the node's interfaces, and whether `kube-ipvs0` is deleted.
//!
//! kube-proxy reads all addresses at each sync, which takes most of its time with thousands of VIPs. Here addresses are read after
//! a notification from the kernel, and by each audit. The only state of the watch is the index of `kube-ipvs0`, whose own addresses
//! are ignored.

use netlink_batch::protocols::NETLINK_ROUTE;
use netlink_batch::{Error, Received, Socket, Subscription};
use netlink_packet_core::{DecodeError, NetlinkDeserializable, NetlinkHeader, NlasIterator, parse_string, parse_u32};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};

use crate::kernel::DEVICE;

// linux/rtnetlink.h
const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_IPV4_IFADDR: u32 = 5;
const RTNLGRP_IPV6_IFADDR: u32 = 9;
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;

// linux/if_link.h, linux/if_addr.h: the layout of struct ifinfomsg and struct ifaddrmsg.
const IFLA_IFNAME: u16 = 3;
const IFINFOMSG_BYTES: usize = 16;
const AF_INET6: u8 = 10;
const RT_SCOPE_LINK: u8 = 253;

/// What changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterfaceChanges {
    /// Addresses of interfaces other than `kube-ipvs0`.
    pub addresses: bool,
    /// `kube-ipvs0` was deleted or renamed by another program.
    pub device_lost: bool,
}

/// A notification. Of the many attributes of a link only the name is decoded.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Notification {
    Link { index: u32, is_ours: bool },
    LinkGone { index: u32 },
    Address { index: u32 },
    Other,
}

impl NetlinkDeserializable for Notification {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let index = || parse_u32(payload.get(4..8).ok_or("a notification is short")?);
        Ok(match header.message_type {
            RTM_NEWLINK => {
                let attributes = NlasIterator::new(payload.get(IFINFOMSG_BYTES..).unwrap_or_default());
                let name = attributes.flatten().find(|attribute| attribute.kind() == IFLA_IFNAME);
                let name = name.and_then(|name| parse_string(name.value()).ok());
                Self::Link { index: index()?, is_ours: name.as_deref() == Some(DEVICE) }
            }
            RTM_DELLINK => Self::LinkGone { index: index()? },
            // Every new pod interface gets an IPv6 link-local address. To read those at the next audit is soon enough.
            RTM_NEWADDR | RTM_DELADDR if payload.starts_with(&[AF_INET6]) && payload.get(3) == Some(&RT_SCOPE_LINK) => {
                Self::Other
            }
            RTM_NEWADDR | RTM_DELADDR => Self::Address { index: index()? },
            _ => Self::Other,
        })
    }
}

/// A watch of the addresses of the node's interfaces.
#[derive(Debug)]
pub struct InterfaceWatch {
    subscription: Subscription,
    /// The index of `kube-ipvs0`.
    device_index: Option<u32>,
}

impl InterfaceWatch {
    /// Opens the watch. It reports what happens from now on.
    pub fn open() -> Result<Self, Error> {
        let subscription =
            Subscription::open(NETLINK_ROUTE, &[RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR])?;
        Ok(Self { subscription, device_index: device()? })
    }

    /// Waits for a notification.
    pub fn wait(&mut self) -> Result<InterfaceChanges, Error> {
        let mut changed = InterfaceChanges::default();
        let device_index = &mut self.device_index;
        let received = self.subscription.receive(|notification| match notification {
            Notification::Link { index, is_ours: true } => *device_index = Some(index),
            Notification::Link { index, is_ours: false } | Notification::LinkGone { index } => {
                if *device_index == Some(index) {
                    *device_index = None;
                    changed.device_lost = true;
                }
            }
            Notification::Address { index } => changed.addresses |= *device_index != Some(index),
            Notification::Other => {}
        })?;
        if received == Received::Overrun {
            // For example when thousands of VIPs are bound, since the kernel sends a notification for each.
            let now = device()?;
            let before = std::mem::replace(&mut self.device_index, now);
            changed.addresses = true;
            changed.device_lost |= before.is_some() && before != now;
        }
        Ok(changed)
    }
}

/// The index of `kube-ipvs0`; `None` where there is no such device.
fn device() -> Result<Option<u32>, Error> {
    let mut request = LinkMessage::default();
    request.attributes.push(LinkAttribute::IfName(DEVICE.to_owned()));
    let mut found = None;
    let result =
        Socket::open(NETLINK_ROUTE)?.request(&RouteNetlinkMessage::GetLink(request).into(), |answer: Notification| {
            if let Notification::Link { index, is_ours: true } = answer {
                found = Some(index);
            }
        });
    match result {
        // A refusal of the kernel means that there is no such device.
        Err(error) if error.refusal().is_none() => Err(error),
        _ => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(kind: u16, payload: &[u8]) -> Result<Notification, DecodeError> {
        let mut header = NetlinkHeader::default();
        header.message_type = kind;
        Notification::deserialize(&header, payload)
    }

    fn head(length: u16, kind: u16) -> Vec<u8> {
        [length.to_ne_bytes(), kind.to_ne_bytes()].concat()
    }

    #[test]
    fn only_index_and_name_of_a_link_are_decoded() {
        let mut link = vec![0; IFINFOMSG_BYTES];
        link[4..8].copy_from_slice(&7_u32.to_ne_bytes());
        link.extend(head(8, 99));
        link.extend([1, 2, 3, 4]);
        link.extend(head(15, 3));
        link.extend_from_slice(b"kube-ipvs0\0\0");
        assert_eq!(decode(RTM_NEWLINK, &link).unwrap(), Notification::Link { index: 7, is_ours: true });
        // A truncated attribute is ignored.
        assert_eq!(decode(RTM_NEWLINK, &link[..20]).unwrap(), Notification::Link { index: 7, is_ours: false });
        assert!(decode(RTM_NEWLINK, &[0; 5]).is_err());
    }

    #[test]
    fn ipv6_link_local_addresses_are_ignored() {
        let address = |start: [u8; 4]| [start, 3_u32.to_ne_bytes()].concat();
        let (link_local, global) = (address([AF_INET6, 64, 0, RT_SCOPE_LINK]), address([AF_INET6, 64, 0, 0]));
        assert_eq!(decode(RTM_NEWADDR, &link_local).unwrap(), Notification::Other);
        assert_eq!(decode(RTM_DELADDR, &global).unwrap(), Notification::Address { index: 3 });
        let ipv4 = address([2, 16, 0, RT_SCOPE_LINK]);
        assert_eq!(decode(RTM_NEWADDR, &ipv4).unwrap(), Notification::Address { index: 3 });
    }
}
