//! Requests of the route family, shared by the tests.

#![allow(dead_code, clippy::allow_attributes, reason = "helpers of tests, of which every test file uses a part")]

use std::net::Ipv4Addr;

use netlink_batch::Request;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

pub(crate) const EEXIST: i32 = 17;
pub(crate) const ENODEV: i32 = 19;

/// The loopback device, and an interface index that does not exist.
pub(crate) const LOOPBACK: u32 = 1;
pub(crate) const NO_DEVICE: u32 = 0x7fff_fff0;

pub(crate) fn get_link(index: u32) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    RouteNetlinkMessage::GetLink(message)
}

/// Gives the loopback device an address.
pub(crate) fn add_address(address: Ipv4Addr) -> Request<RouteNetlinkMessage> {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = 32;
    message.header.index = LOOPBACK;
    message.attributes = vec![AddressAttribute::Local(address.into()), AddressAttribute::Address(address.into())];
    Request { message: RouteNetlinkMessage::NewAddress(message), flags: NLM_F_CREATE | NLM_F_EXCL }
}
