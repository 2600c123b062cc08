//! Local routes to `kube-ipvs0` over rtnetlink: what makes them ours, how they are written, and how they are read.

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

/// Says that a route is ours, and only such routes are touched: a number that neither `linux/rtnetlink.h` nor iproute2's
/// `rt_protos` gives to anybody.
const PROTOCOL: u8 = 105;

/// The routes that come with addresses have 0: so a VIP can have both while it changes from the one to the other.
const METRIC: u32 = 1024;

/// An address on `kube-ipvs0` that is there for as long as routes are. When the last IPv4 address leaves a device, the kernel
/// deletes all IPv4 routes to it (`fib_inetaddr_event`), as would be at the change from addresses to routes. A loopback
/// address is the node's anyway, and nobody else's.
pub(crate) const ANCHOR: Ipv4Addr = Ipv4Addr::new(127, 105, 112, 118);

// linux/rtnetlink.h: where things are in struct rtmsg.
const RTM_NEWROUTE: u16 = 24;
const RTMSG_BYTES: usize = 12;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_PRIORITY: u16 = 6;
const RTA_TABLE: u16 = 15;
const RTN_LOCAL: u8 = 2;
/// The table that is looked into first, for what is the node's own.
const LOCAL_TABLE: u8 = 255;

/// What has a device take routes, in order: no link-local address comes with it, it is up, and it has the anchor.
pub(crate) fn raise(device: u32) -> [Request<RouteNetlinkMessage>; 3] {
    let mut quiet = LinkMessage::default();
    quiet.header.index = device;
    let no_address = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    quiet.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![no_address])]));
    let mut up = LinkMessage::default();
    up.header.index = device;
    (up.header.flags, up.header.change_mask) = (LinkFlags::Up, LinkFlags::Up);
    let mut anchor = AddressMessage::default();
    anchor.header.index = device;
    anchor.header.family = AddressFamily::Inet;
    anchor.header.prefix_len = 32;
    anchor.header.scope = AddressScope::Host;
    anchor.attributes.push(AddressAttribute::Local(ANCHOR.into()));
    anchor.attributes.push(AddressAttribute::Address(ANCHOR.into()));
    [
        RouteNetlinkMessage::SetLink(quiet).into(),
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

/// Makes a route, beside one of somebody else for the same range.
pub(crate) fn add(range: &IpNet, device: u32) -> Request<RouteNetlinkMessage> {
    Request { message: RouteNetlinkMessage::NewRoute(route(range, device)), flags: NLM_F_CREATE | NLM_F_APPEND }
}

/// Deletes a route of ours.
pub(crate) fn remove(range: &IpNet, device: u32) -> Request<RouteNetlinkMessage> {
    RouteNetlinkMessage::DelRoute(route(range, device)).into()
}

/// A route as it was read: whose it is, and where from. Routes have attributes of countless kinds; few are looked at.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Route {
    range: Option<IpNet>,
    device: u32,
    is_ours: bool,
}

impl NetlinkDeserializable for Route {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let (range, device, is_ours) = (None, 0, false);
        let mut route = Self { range, device, is_ours };
        let Some(&[family, prefix, _, _, table, protocol, _, kind, ..]) = payload.get(..RTMSG_BYTES) else {
            return Err("a route is short".into());
        };
        if header.message_type != RTM_NEWROUTE || protocol != PROTOCOL || kind != RTN_LOCAL {
            return Ok(route);
        }
        let (mut table, mut metric) = (u32::from(table), 0);
        for attribute in NlasIterator::new(&payload[RTMSG_BYTES..]) {
            let attribute = attribute?;
            let value = attribute.value();
            match attribute.kind() {
                RTA_DST => route.range = destination(family, prefix, value),
                RTA_OIF => route.device = parse_u32(value)?,
                RTA_PRIORITY => metric = parse_u32(value)?,
                RTA_TABLE => table = parse_u32(value)?,
                _ => {}
            }
        }
        route.is_ours = table == u32::from(LOCAL_TABLE) && metric == METRIC;
        Ok(route)
    }
}

fn destination(family: u8, prefix: u8, value: &[u8]) -> Option<IpNet> {
    let address = match family {
        4.. if value.len() == 16 => IpAddr::from(<[u8; 16]>::try_from(value).ok()?),
        _ => IpAddr::from(<[u8; 4]>::try_from(value).ok()?),
    };
    IpNet::new(address, prefix).ok()
}

/// A socket to read with.
pub(crate) fn open() -> Result<Socket, Error> {
    let mut socket = Socket::open(netlink_batch::protocols::NETLINK_ROUTE)?;
    // Then the kernel looks for our routes itself (since Linux 4.20); before, it tells all of them.
    socket.enable_strict_checking();
    Ok(socket)
}

/// Reads our routes to a device, of both families.
pub(crate) fn read(socket: &mut Socket, device: u32) -> Result<Vec<IpNet>, Error> {
    let mut ranges = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut wanted = RouteMessage::default();
        wanted.header.address_family = family;
        wanted.header.table = LOCAL_TABLE;
        wanted.header.protocol = RouteProtocol::Other(PROTOCOL);
        wanted.header.kind = RouteType::Local;
        socket.dump(&RouteNetlinkMessage::GetRoute(wanted), |route: Route| {
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
    fn what_is_written_is_ours_when_it_is_read_and_nothing_else() {
        for text in ["10.96.0.0/12", "203.0.113.1/32", "fd00:96::/112", "fd00::1/128"] {
            let range: IpNet = text.parse().unwrap();
            let ours = route(&range, 7);
            assert_eq!(read(&ours), Route { range: Some(range), device: 7, is_ours: true });
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
    fn a_message_that_is_cut_off_is_an_error_and_no_panic() {
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
