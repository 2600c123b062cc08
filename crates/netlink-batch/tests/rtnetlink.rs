//! The sockets against the one netlink family that every kernel has.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::net::{IpAddr, Ipv4Addr};

use common::{EEXIST, ENODEV, LOOPBACK, NO_DEVICE, add_address, get_link};
use netlink_batch::protocols::NETLINK_ROUTE;
use netlink_batch::{BATCH_MESSAGES, Error, Received, Socket, Subscription};
use netlink_packet_core::{DecodeError, DefaultNla, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::neighbour::NeighbourMessage;
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

const RTNLGRP_IPV4_IFADDR: u32 = 5;

fn open() -> Socket {
    Socket::open(NETLINK_ROUTE).unwrap()
}

fn name(reply: &RouteNetlinkMessage) -> Option<&str> {
    let RouteNetlinkMessage::NewLink(link) = reply else { return None };
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

fn address(reply: &RouteNetlinkMessage) -> Option<IpAddr> {
    let RouteNetlinkMessage::NewAddress(message) = reply else { return None };
    message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    })
}

/// The IPv4 addresses other than loopback's own.
fn addresses(socket: &mut Socket) -> Vec<IpAddr> {
    let mut seen = Vec::new();
    let mut request = AddressMessage::default();
    request.header.family = AddressFamily::Inet;
    socket.dump(&RouteNetlinkMessage::GetAddress(request), |reply| seen.extend(address(&reply))).unwrap();
    seen.retain(|address| !address.is_loopback());
    seen
}

#[test]
fn a_request_gets_its_reply() {
    let mut names = Vec::new();
    open()
        .request(&get_link(LOOPBACK).into(), |reply: RouteNetlinkMessage| {
            names.extend(name(&reply).map(str::to_owned));
        })
        .unwrap();
    assert_eq!(names, ["lo"]);
}

#[test]
fn a_dump_lists_every_link() {
    let mut names = Vec::new();
    open().dump(&get_link(0), |reply: RouteNetlinkMessage| names.extend(name(&reply).map(str::to_owned))).unwrap();
    assert_eq!(names.iter().filter(|name| *name == "lo").count(), 1, "{names:?}");
}

#[test]
fn a_refusal_has_an_errno_and_the_socket_stays_usable() {
    let mut socket = open();
    let error = socket.request(&get_link(NO_DEVICE).into(), |_: RouteNetlinkMessage| ()).unwrap_err();
    assert_eq!(error.refusal().map(|refusal| refusal.errno), Some(ENODEV), "{error}");
    assert!(error.to_string().starts_with("No such device (os error 19)"), "{error}");
    socket.request(&get_link(LOOPBACK).into(), |_: RouteNetlinkMessage| ()).unwrap();
}

#[test]
fn a_refusal_has_the_attribute_and_the_kernels_message() {
    const RTA_OIF: u16 = 4;
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.attributes = vec![
        RouteAttribute::Destination(netlink_packet_route::route::RouteAddress::Inet(Ipv4Addr::LOCALHOST)),
        // One byte where a number of four is wanted.
        RouteAttribute::Other(DefaultNla::new(RTA_OIF, vec![1])),
    ];
    let get = RouteNetlinkMessage::GetRoute(message);
    let mut socket = open();
    let error = socket.request(&get.clone().into(), |_: RouteNetlinkMessage| ()).unwrap_err();
    let refusal = error.refusal().unwrap();
    assert_eq!((refusal.attribute, refusal.missing), (Some(RTA_OIF), None), "{error}");
    let words = refusal.message.clone().unwrap();
    assert!(error.to_string().ends_with(&format!(": {words} (attribute 4)")), "{error}");
    // In a batch the offset is that within its own message, not within the datagram.
    let results = socket.batch([get_link(NO_DEVICE).into(), get.into()]).unwrap();
    assert_eq!(results[1].as_ref().unwrap_err(), refusal);
}

#[test]
fn a_batch_of_any_length_has_one_result_per_request() {
    let mut socket = open();
    for length in [0, 1, BATCH_MESSAGES - 1, BATCH_MESSAGES, BATCH_MESSAGES + 1, 256, 257, 1000] {
        // Refusals are the replies that fill the receive buffer.
        let results = socket.batch((0..length).map(|_| get_link(NO_DEVICE).into())).unwrap();
        assert_eq!(results.len(), length);
        let refused = results.iter().filter(|result| matches!(result, Err(refusal) if refusal.errno == ENODEV));
        assert_eq!(refused.count(), length);
    }
    // No reply is left over for the next request.
    assert_eq!(socket.batch([get_link(LOOPBACK).into()]).unwrap(), [Ok(())]);
}

#[test]
fn opening_an_unknown_protocol_fails() {
    let error = Socket::open(31).unwrap_err();
    assert!(matches!(error, Error::Open { protocol: 31, .. }));
    assert!(error.to_string().starts_with("cannot open a netlink socket of protocol 31: "), "{error}");
    assert!(Subscription::open(31, &[1]).is_err());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn only_the_addresses_added_twice_are_refused() {
    lab::netns::isolate().unwrap();
    let mut socket = open();
    let unique: Vec<Ipv4Addr> = (0..1000_u32).map(|number| Ipv4Addr::from(0x0a60_0000 + number)).collect();
    let mut wanted = Vec::new();
    let mut doubled = Vec::new();
    for (number, address) in unique.iter().enumerate() {
        wanted.push(*address);
        doubled.push(false);
        if number % 7 == 3 {
            wanted.push(*address);
            doubled.push(true);
        }
    }
    let results = socket.batch(wanted.iter().map(|address| add_address(*address))).unwrap();
    let refused: Vec<bool> = results.iter().map(Result::is_err).collect();
    assert_eq!(refused, doubled);
    assert!(results.iter().filter_map(|result| result.as_ref().err()).all(|refusal| refusal.errno == EEXIST));

    // More than one datagram.
    let mut seen = addresses(&mut socket);
    seen.sort_unstable();
    assert_eq!(seen, unique.into_iter().map(IpAddr::from).collect::<Vec<_>>());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn an_undecodable_dump_does_not_block_the_next() {
    #[derive(Debug)]
    struct Unreadable;
    impl NetlinkDeserializable for Unreadable {
        type Error = DecodeError;
        fn deserialize(_: &NetlinkHeader, _: &[u8]) -> Result<Self, DecodeError> {
            Err("unreadable".into())
        }
    }
    lab::netns::isolate().unwrap();
    let mut socket = open();
    // Enough that the kernel is still dumping when the first reply is read.
    let count = 2000;
    for result in socket.batch((0..count).map(|number| add_address(Ipv4Addr::from(0x0a60_0000 + number)))).unwrap() {
        result.unwrap();
    }
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let error = socket.dump(&request, |_: Unreadable| ()).unwrap_err();
    assert_eq!(error.to_string(), "cannot decode a reply of the kernel: unreadable");
    assert_eq!(addresses(&mut socket).len(), count as usize);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn an_empty_dump_is_not_an_error() {
    lab::netns::isolate().unwrap();
    let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    let mut count = 0;
    open().dump(&request, |_: RouteNetlinkMessage| count += 1).unwrap();
    assert_eq!(count, 0);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_subscription_receives_every_change_after_it_is_opened() {
    lab::netns::isolate().unwrap();
    let mut subscription = Subscription::open(NETLINK_ROUTE, &[RTNLGRP_IPV4_IFADDR]).unwrap();
    let added = [Ipv4Addr::new(10, 96, 0, 1), Ipv4Addr::new(10, 96, 0, 2)];
    for result in open().batch(added.map(add_address)).unwrap() {
        result.unwrap();
    }
    let mut seen = Vec::new();
    while seen.len() < added.len() {
        let received = subscription.receive(|reply: RouteNetlinkMessage| seen.extend(address(&reply))).unwrap();
        assert_eq!(received, Received::Notifications);
    }
    assert_eq!(seen, added.map(IpAddr::from));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_subscription_reports_an_overrun_once_and_then_misses_nothing() {
    lab::netns::isolate().unwrap();
    let mut subscription = Subscription::open(NETLINK_ROUTE, &[RTNLGRP_IPV4_IFADDR]).unwrap();
    let mut socket = open();
    for result in socket.batch((0..2000).map(|number| add_address(Ipv4Addr::from(0x0a60_0000 + number)))).unwrap() {
        result.unwrap();
    }
    assert_eq!(subscription.receive(|_: RouteNetlinkMessage| ()).unwrap(), Received::Overrun);
    // After that, no old notification is left and no new one is dropped.
    let late = Ipv4Addr::new(10, 97, 0, 1);
    socket.batch([add_address(late)]).unwrap().remove(0).unwrap();
    let mut seen = Vec::new();
    assert_eq!(
        subscription.receive(|reply: RouteNetlinkMessage| seen.extend(address(&reply))).unwrap(),
        Received::Notifications
    );
    assert_eq!(seen, [IpAddr::from(late)]);
}

/// Users of this crate may have their own message types.
#[test]
fn a_message_may_have_an_empty_payload() {
    struct Noop;
    impl NetlinkSerializable for Noop {
        fn message_type(&self) -> u16 {
            1
        }
        fn buffer_len(&self) -> usize {
            0
        }
        fn serialize(&self, _: &mut [u8]) {}
    }
    // The kernel acknowledges control messages without looking at them.
    open().request(&Noop.into(), |_: RouteNetlinkMessage| ()).unwrap();
}
