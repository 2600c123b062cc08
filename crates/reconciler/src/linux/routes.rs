//! Local routes to `kube-ipvs0` over rtnetlink: how they are identified, written and read.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use ipvs_netlink::Family;
use netlink_batch::{Error, Request, Socket};
use netlink_packet_core::{
    DecodeError, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NetlinkDeserializable, NetlinkHeader, NlasIterator, parse_u32,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

/// Identifies the routes of this program; no others are changed. Neither `linux/rtnetlink.h` nor iproute2's `rt_protos` assigns
/// this number.
const PROTOCOL: u8 = 105;

/// The kernel's own routes for addresses have metric 0, so a VIP can have both while its binding changes.
const METRIC: u32 = 1024;

/// An address on `kube-ipvs0` while there are routes to it. When the last IPv4 address of a device is deleted, the kernel deletes all
/// IPv4 routes to it (`fib_inetaddr_event`), which would happen when the binding changes from addresses to routes. A loopback
/// address is local to the node anyway.
pub(crate) const ANCHOR_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 105, 112, 118);

// linux/rtnetlink.h: the layout of struct rtmsg.
const RTM_NEWROUTE: u16 = 24;
const RTMSG_BYTES: usize = 12;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_PRIORITY: u16 = 6;
const RTA_TABLE: u16 = 15;
const RTN_LOCAL: u8 = 2;
/// Of the routes that the kernel adds with an address.
const RTPROT_KERNEL: u8 = 2;
/// The table with local addresses, which is looked up first.
const LOCAL_TABLE: u8 = 255;

/// The requests that set a device up for routes, in order: without an IPv6 link-local address, up, and with the anchor address.
pub(crate) fn set_up_requests(device: u32) -> [Request<RouteNetlinkMessage>; 3] {
    let mut no_link_local = LinkMessage::default();
    no_link_local.header.index = device;
    let no_address = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    no_link_local.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![no_address])]));
    let mut up = LinkMessage::default();
    up.header.index = device;
    (up.header.flags, up.header.change_mask) = (LinkFlags::Up, LinkFlags::Up);
    let mut anchor = AddressMessage::default();
    anchor.header.index = device;
    anchor.header.family = AddressFamily::Inet;
    anchor.header.prefix_len = 32;
    anchor.header.scope = AddressScope::Host;
    anchor.attributes.push(AddressAttribute::Local(ANCHOR_ADDRESS.into()));
    anchor.attributes.push(AddressAttribute::Address(ANCHOR_ADDRESS.into()));
    [
        RouteNetlinkMessage::SetLink(no_link_local).into(),
        RouteNetlinkMessage::SetLink(up).into(),
        Request { message: RouteNetlinkMessage::NewAddress(anchor), flags: NLM_F_CREATE | NLM_F_EXCL },
    ]
}

fn route(range: &IpNet, device: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = match Family::of(range.addr()) {
        Family::Ipv4 => AddressFamily::Inet,
        Family::Ipv6 => AddressFamily::Inet6,
    };
    message.header.destination_prefix_length = range.prefix_len();
    message.header.table = LOCAL_TABLE;
    message.header.protocol = RouteProtocol::Other(PROTOCOL);
    message.header.scope = RouteScope::Host;
    message.header.kind = RouteType::Local;
    let network = match range.network() {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    };
    message.attributes =
        vec![RouteAttribute::Destination(network), RouteAttribute::Oif(device), RouteAttribute::Priority(METRIC)];
    message
}

/// Adds a route, beside any route of another program for the same range.
pub(crate) fn add(range: &IpNet, device: u32) -> Request<RouteNetlinkMessage> {
    Request { message: RouteNetlinkMessage::NewRoute(route(range, device)), flags: NLM_F_CREATE | NLM_F_APPEND }
}

/// Deletes a route of this program.
pub(crate) fn remove(range: &IpNet, device: u32) -> Request<RouteNetlinkMessage> {
    RouteNetlinkMessage::DelRoute(route(range, device)).into()
}

/// A route as it was read. Few of its many attributes are decoded.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Route {
    range: Option<IpNet>,
    device: u32,
    is_ours: bool,
    /// Whether the kernel added it with an address.
    is_kernels: bool,
}

impl NetlinkDeserializable for Route {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        if header.message_type == RTM_NEWROUTE { Self::decode(payload) } else { Ok(Self::default()) }
    }
}

/// The range of a route in a notification, if this program added it.
pub(crate) fn own_range(payload: &[u8]) -> Result<Option<IpNet>, DecodeError> {
    let route = Route::decode(payload)?;
    Ok(route.range.filter(|_| route.is_ours))
}

impl Route {
    fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut route = Self::default();
        let Some(&[_, prefix, _, _, table, protocol, _, kind, ..]) = payload.get(..RTMSG_BYTES) else {
            return Err("a route is short".into());
        };
        if ![PROTOCOL, RTPROT_KERNEL].contains(&protocol) || kind != RTN_LOCAL {
            return Ok(route);
        }
        let (mut table, mut metric) = (u32::from(table), 0);
        for attribute in NlasIterator::new(&payload[RTMSG_BYTES..]) {
            let attribute = attribute?;
            let value = attribute.value();
            match attribute.kind() {
                RTA_DST => route.range = address(value).and_then(|network| IpNet::new(network, prefix).ok()),
                RTA_OIF => route.device = parse_u32(value)?,
                RTA_PRIORITY => metric = parse_u32(value)?,
                RTA_TABLE => table = parse_u32(value)?,
                _ => {}
            }
        }
        let is_local = table == u32::from(LOCAL_TABLE);
        route.is_ours = is_local && protocol == PROTOCOL && metric == METRIC;
        route.is_kernels = is_local && protocol == RTPROT_KERNEL;
        Ok(route)
    }
}

/// The address in an attribute: its length tells its family.
pub(crate) fn address(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => Some(<[u8; 4]>::try_from(value).ok()?.into()),
        16 => Some(<[u8; 16]>::try_from(value).ok()?.into()),
        _ => None,
    }
}

/// Opens the socket that reads routes.
pub(crate) fn open() -> Result<Socket, Error> {
    let mut socket = Socket::open(netlink_batch::protocols::NETLINK_ROUTE)?;
    // Since Linux 4.20 the kernel then lists only the requested routes; older kernels list all of them.
    socket.enable_strict_checking();
    Ok(socket)
}

/// Reads for which IPv6 addresses of a device the kernel has added a local route.
pub(crate) fn read_kernels_ipv6(socket: &mut Socket, device: u32) -> Result<BTreeSet<IpAddr>, Error> {
    let mut addresses = BTreeSet::new();
    socket.dump(&list(AddressFamily::Inet6, RouteProtocol::Kernel), |route: Route| {
        if route.is_kernels && route.device == device {
            addresses.extend(route.range.map(|range| range.addr()));
        }
    })?;
    Ok(addresses)
}

/// The request for the local routes of a protocol.
fn list(family: AddressFamily, protocol: RouteProtocol) -> RouteNetlinkMessage {
    let mut wanted = RouteMessage::default();
    wanted.header.address_family = family;
    wanted.header.table = LOCAL_TABLE;
    wanted.header.protocol = protocol;
    wanted.header.kind = RouteType::Local;
    RouteNetlinkMessage::GetRoute(wanted)
}

/// Reads the routes of this program to a device, of both families.
pub(crate) fn read(socket: &mut Socket, device: u32) -> Result<Vec<IpNet>, Error> {
    let mut ranges = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        socket.dump(&list(family, RouteProtocol::Other(PROTOCOL)), |route: Route| {
            if route.is_ours && route.device == device {
                ranges.extend(route.range);
            }
        })?;
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::Emitable as _;

    use super::*;

    fn read(message: &RouteMessage) -> Route {
        let mut payload = vec![0; message.buffer_len()];
        message.emit(&mut payload);
        let mut header = NetlinkHeader::default();
        header.message_type = RTM_NEWROUTE;
        Route::deserialize(&header, &payload).unwrap()
    }

    #[test]
    fn only_routes_of_this_program_are_recognized() {
        for text in ["10.96.0.0/12", "203.0.113.1/32", "fd00:96::/112", "fd00::1/128"] {
            let range: IpNet = text.parse().unwrap();
            let ours = route(&range, 7);
            assert_eq!(read(&ours), Route { range: Some(range), device: 7, is_ours: true, is_kernels: false });
            let change: [fn(&mut RouteMessage); 4] = [
                |route| route.header.protocol = RouteProtocol::Kernel,
                |route| route.header.kind = RouteType::Unicast,
                |route| route.header.table = 254,
                |route| route.attributes.truncate(2),
            ];
            for change in change {
                let mut other = ours.clone();
                change(&mut other);
                assert!(!read(&other).is_ours, "{other:?}");
            }
        }
    }

    #[test]
    fn a_truncated_message_is_an_error() {
        let mut header = NetlinkHeader::default();
        header.message_type = RTM_NEWROUTE;
        let ours = route(&"10.96.0.0/12".parse().unwrap(), 7);
        let mut payload = vec![0; ours.buffer_len()];
        ours.emit(&mut payload);
        assert!((0..RTMSG_BYTES).all(|length| Route::deserialize(&header, &payload[..length]).is_err()));
        for length in RTMSG_BYTES..payload.len() {
            let _ = Route::deserialize(&header, &payload[..length]);
        }
    }
}
