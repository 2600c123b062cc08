//! Watches the addresses of the node's interfaces, and whether something of `kube-ipvs0` is deleted: the device, addresses, routes.
//!
//! kube-proxy reads all addresses at each sync, which takes most of its time with thousands of VIPs. Here addresses are read after
//! a notification from the kernel, and by each audit. The only state of the watch is the index of `kube-ipvs0`, and whether it is up.

use std::net::IpAddr;

use ipnet::IpNet;

use netlink_batch::protocols::NETLINK_ROUTE;
use netlink_batch::{Error, Received, Socket, Subscription};
use netlink_packet_core::{DecodeError, NetlinkDeserializable, NetlinkHeader, NlasIterator, parse_string, parse_u32};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};

use super::routes;
use crate::binding::VipBinding;
use crate::kernel::DEVICE;

// linux/rtnetlink.h
const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_IPV4_IFADDR: u32 = 5;
const RTNLGRP_IPV4_ROUTE: u32 = 7;
const RTNLGRP_IPV6_IFADDR: u32 = 9;
const RTNLGRP_IPV6_ROUTE: u32 = 11;
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_DELROUTE: u16 = 25;

// linux/if_link.h, linux/if_addr.h, linux/if.h: the layout of struct ifinfomsg and struct ifaddrmsg, and flags.
const IFLA_IFNAME: u16 = 3;
const IFINFOMSG_BYTES: usize = 16;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFADDRMSG_BYTES: usize = 8;
const IFF_UP: u32 = 1;
const AF_INET6: u8 = 10;
const RT_SCOPE_LINK: u8 = 253;

/// What changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceChanges {
    /// Addresses of interfaces other than `kube-ipvs0`.
    pub addresses: bool,
    /// `kube-ipvs0` was deleted, renamed or set down by another program, or lost the address that keeps its routes.
    pub device_lost: bool,
    /// Addresses that were deleted from `kube-ipvs0`, by whomever.
    pub addresses_deleted: Vec<IpAddr>,
    /// Routes of this program that were deleted, by whomever.
    pub routes_deleted: Vec<IpNet>,
}

/// A notification. Of the many attributes of a link only the name is decoded.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Notification {
    Link { index: u32, is_ours: bool, is_up: bool },
    LinkGone { index: u32 },
    AddressAdded { index: u32 },
    AddressDeleted { index: u32, address: Option<IpAddr> },
    OwnRouteDeleted(IpNet),
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
                let flags = parse_u32(payload.get(8..12).ok_or("a notification is short")?)?;
                Self::Link { index: index()?, is_ours: name.as_deref() == Some(DEVICE), is_up: flags & IFF_UP != 0 }
            }
            RTM_DELLINK => Self::LinkGone { index: index()? },
            // Every new pod interface gets an IPv6 link-local address. To read those at the next audit is soon enough.
            RTM_NEWADDR | RTM_DELADDR if payload.starts_with(&[AF_INET6]) && payload.get(3) == Some(&RT_SCOPE_LINK) => {
                Self::Other
            }
            RTM_NEWADDR => Self::AddressAdded { index: index()? },
            RTM_DELADDR => Self::AddressDeleted { index: index()?, address: address_of(payload) },
            RTM_DELROUTE => routes::own_range(payload)?.map_or(Self::Other, Self::OwnRouteDeleted),
            _ => Self::Other,
        })
    }
}

/// The address in a notification: `IFA_LOCAL`, which IPv6 does not have here, else `IFA_ADDRESS`.
fn address_of(payload: &[u8]) -> Option<IpAddr> {
    let mut found = None;
    for attribute in NlasIterator::new(payload.get(IFADDRMSG_BYTES..)?).flatten() {
        match attribute.kind() {
            IFA_LOCAL => return routes::address(attribute.value()),
            IFA_ADDRESS => found = routes::address(attribute.value()),
            _ => {}
        }
    }
    found
}

/// A watch of the addresses of the node's interfaces.
#[derive(Debug)]
pub struct InterfaceWatch {
    subscription: Subscription,
    /// `kube-ipvs0`.
    device: Option<Device>,
}

/// `kube-ipvs0` as it was last notified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Device {
    index: u32,
    is_up: bool,
}

impl InterfaceWatch {
    /// Opens the watch. It reports what happens from now on; routes only if VIPs are bound by them, since a router has many.
    pub fn open(binding: &VipBinding) -> Result<Self, Error> {
        let mut groups = vec![RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR];
        if matches!(binding, VipBinding::Routes(_)) {
            groups.extend([RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_ROUTE]);
        }
        let subscription = Subscription::open(NETLINK_ROUTE, &groups)?;
        Ok(Self { subscription, device: device()? })
    }

    /// Waits for a notification.
    pub fn wait(&mut self) -> Result<InterfaceChanges, Error> {
        let mut changed = InterfaceChanges::default();
        let known = &mut self.device;
        let is_device = |known: &Option<Device>, index| known.is_some_and(|device| device.index == index);
        let received = self.subscription.receive(|notification| match notification {
            Notification::Link { index, is_ours: true, is_up } => {
                // This program never sets it down.
                changed.device_lost |= is_device(known, index) && known.is_some_and(|device| device.is_up) && !is_up;
                *known = Some(Device { index, is_up });
            }
            Notification::Link { index, is_ours: false, .. } | Notification::LinkGone { index } => {
                if is_device(known, index) {
                    *known = None;
                    changed.device_lost = true;
                }
            }
            Notification::AddressDeleted { index, address } if is_device(known, index) => {
                // With it go IPv4 routes, of which the kernel does not notify.
                changed.device_lost |= address == Some(routes::ANCHOR_ADDRESS.into());
                changed.addresses_deleted.extend(address);
            }
            Notification::AddressAdded { index } | Notification::AddressDeleted { index, .. } => {
                changed.addresses |= !is_device(known, index);
            }
            Notification::OwnRouteDeleted(range) => changed.routes_deleted.push(range),
            Notification::Other => {}
        })?;
        if received == Received::Overrun {
            // For example when thousands of VIPs are bound, since the kernel sends a notification for each.
            let now = device()?;
            let before = std::mem::replace(&mut self.device, now);
            changed.addresses = true;
            changed.device_lost |= before
                .is_some_and(|before| now.is_none_or(|now| now.index != before.index || (before.is_up && !now.is_up)));
        }
        Ok(changed)
    }
}

/// `kube-ipvs0`; `None` where there is no such device.
fn device() -> Result<Option<Device>, Error> {
    let mut request = LinkMessage::default();
    request.attributes.push(LinkAttribute::IfName(DEVICE.to_owned()));
    let mut found = None;
    let result =
        Socket::open(NETLINK_ROUTE)?.request(&RouteNetlinkMessage::GetLink(request).into(), |answer: Notification| {
            if let Notification::Link { index, is_ours: true, is_up } = answer {
                found = Some(Device { index, is_up });
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
    fn index_name_and_state_of_a_link_are_decoded() {
        let mut link = vec![0; IFINFOMSG_BYTES];
        link[4..8].copy_from_slice(&7_u32.to_ne_bytes());
        link.extend(head(8, 99));
        link.extend([1, 2, 3, 4]);
        link.extend(head(15, 3));
        link.extend_from_slice(b"kube-ipvs0\0\0");
        let expected = |is_ours| Notification::Link { index: 7, is_ours, is_up: false };
        assert_eq!(decode(RTM_NEWLINK, &link).unwrap(), expected(true));
        // A truncated attribute is ignored.
        assert_eq!(decode(RTM_NEWLINK, &link[..20]).unwrap(), expected(false));
        assert!(decode(RTM_NEWLINK, &[0; 5]).is_err());
    }

    #[test]
    fn ipv6_link_local_addresses_are_ignored() {
        let address = |start: [u8; 4]| [start, 3_u32.to_ne_bytes()].concat();
        let (link_local, global) = (address([AF_INET6, 64, 0, RT_SCOPE_LINK]), address([AF_INET6, 64, 0, 0]));
        assert_eq!(decode(RTM_NEWADDR, &link_local).unwrap(), Notification::Other);
        assert_eq!(decode(RTM_DELADDR, &global).unwrap(), Notification::AddressDeleted { index: 3, address: None });
        let ipv4 = address([2, 16, 0, RT_SCOPE_LINK]);
        assert_eq!(decode(RTM_NEWADDR, &ipv4).unwrap(), Notification::AddressAdded { index: 3 });
    }

    #[test]
    fn a_deleted_address_is_decoded() {
        let attribute =
            |kind, value: &[u8]| [head(u16::try_from(4 + value.len()).unwrap(), kind), value.to_vec()].concat();
        let start = |family| [[family, 32, 0, 0], 3_u32.to_ne_bytes()].concat();
        let ipv4 = [start(2), attribute(IFA_ADDRESS, &[10, 0, 0, 1]), attribute(IFA_LOCAL, &[10, 0, 0, 2])].concat();
        let ipv6 = [start(AF_INET6), attribute(IFA_ADDRESS, &[7; 16])].concat();
        for (payload, address) in [(ipv4, IpAddr::from([10, 0, 0, 2])), (ipv6, IpAddr::from([7; 16]))] {
            let expected = Notification::AddressDeleted { index: 3, address: Some(address) };
            assert_eq!(decode(RTM_DELADDR, &payload).unwrap(), expected);
        }
    }
}
