//! Devices, addresses and routes of the calling thread's network namespace, as `ip link`, `ip address` and `ip route` make
//! them, without running a program.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};

use futures_util::TryStreamExt;
use rtnetlink::packet_core::ErrorMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope, CacheInfo};
use rtnetlink::packet_route::link::{InfoData, InfoKind, InfoVeth};
use rtnetlink::packet_route::neighbour::NeighbourMessage;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::{
    AddressMessageBuilder, Handle, LinkBridge, LinkDummy, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
};

use crate::error::{Context, Error, Result};

/// Adds a dummy device that is up and has these addresses, each with its prefix length.
pub fn add_dummy(device: &str, addresses: &[&str]) -> Result<()> {
    run("add the device", device, async |handle| {
        handle.link().add(LinkDummy::new(device).up().build()).execute().await
    })?;
    add_addresses(device, addresses)
}

/// Adds a pair of devices, with the second in another network namespace if one is given. Both are down.
pub fn add_veth(device: &str, peer: &str, peer_namespace: Option<&impl AsFd>) -> Result<()> {
    let mut far = LinkUnspec::new_with_name(peer);
    if let Some(namespace) = peer_namespace {
        far = far.setns_by_fd(namespace.as_fd().as_raw_fd());
    }
    let pair = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
        .name(device)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(far.build())))
        .build();
    run("add the device", device, async |handle| handle.link().add(pair).execute().await)
}

/// Adds a bridge that is up.
pub fn add_bridge(device: &str) -> Result<()> {
    run("add the device", device, async |handle| {
        handle.link().add(LinkBridge::new(device).up().build()).execute().await
    })
}

/// Makes a device a port of a bridge.
pub fn set_master(device: &str, bridge: &str) -> Result<()> {
    run("change the device", device, async |handle| {
        let port = LinkUnspec::new_with_index(index(handle, device).await?);
        let port = port.controller(index(handle, bridge).await?);
        handle.link().change(port.build()).execute().await
    })
}

/// Deletes a device.
pub fn delete(device: &str) -> Result<()> {
    run("delete the device", device, async |handle| {
        let index = index(handle, device).await?;
        handle.link().del(index).execute().await
    })
}

/// Sets a device up.
pub fn set_up(device: &str) -> Result<()> {
    change("set up the device", device, LinkMessageBuilder::<LinkUnspec>::up)
}

/// Sets a device down.
pub fn set_down(device: &str) -> Result<()> {
    change("set down the device", device, LinkMessageBuilder::<LinkUnspec>::down)
}

/// Gives a device another name. Before Linux 6.2 it has to be down.
pub fn rename(device: &str, name: &str) -> Result<()> {
    change("rename the device", device, |link| link.name(name))
}

fn change(
    action: &'static str,
    device: &str,
    change: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
) -> Result<()> {
    run(action, device, async |handle| {
        let index = index(handle, device).await?;
        handle.link().change(change(LinkUnspec::new_with_index(index)).build()).execute().await
    })
}

/// Whether there is a device with this name.
pub fn exists(device: &str) -> Result<bool> {
    run("look for the device", device, async |handle| match index(handle, device).await {
        Ok(_) => Ok(true),
        Err(error) if errno(&error) == Some(rustix::io::Errno::NODEV) => Ok(false),
        Err(error) => Err(error),
    })
}

/// The addresses of a device with their prefix lengths, sorted; none if there is no such device.
pub fn addresses(device: &str) -> Result<Vec<String>> {
    if !exists(device)? {
        return Ok(Vec::new());
    }
    let found: Vec<AddressMessage> = run("list the addresses of", device, async |handle| {
        let index = index(handle, device).await?;
        handle.address().get().set_link_index_filter(index).execute().try_collect().await
    })?;
    let mut addresses: Vec<String> = found.iter().filter_map(text).collect();
    addresses.sort();
    Ok(addresses)
}

/// `IFA_LOCAL` is the own address; on links that are no point-to-point links `IFA_ADDRESS` is the same, and IPv6 has only that.
fn text(message: &AddressMessage) -> Option<String> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(address),
        _ => None,
    });
    let address = local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(address),
            _ => None,
        })
    })?;
    Some(format!("{address}/{}", message.header.prefix_len))
}

/// Adds an address to a device. An IPv6 address is usable at once: nobody is asked whether it has it already.
pub fn add_address(device: &str, address: &str) -> Result<()> {
    add_address_with(device, address, None)
}

/// Adds an address that is no source of new connections, as the kernel chooses them.
pub fn add_deprecated_address(device: &str, address: &str) -> Result<()> {
    let mut lifetimes = CacheInfo::default();
    (lifetimes.ifa_preferred, lifetimes.ifa_valid) = (0, u32::MAX);
    add_address_with(device, address, Some(lifetimes))
}

fn add_address_with(device: &str, address: &str, lifetimes: Option<CacheInfo>) -> Result<()> {
    let (address, length) = parse(address)?;
    run("add an address to", device, async |handle| {
        let index = index(handle, device).await?;
        let mut request = handle.address().add(index, address, length);
        let message = request.message_mut();
        message.attributes.retain(|attribute| !matches!(attribute, AddressAttribute::Broadcast(_)));
        message.attributes.extend(lifetimes.map(AddressAttribute::CacheInfo));
        if address.is_ipv6() {
            message.header.flags |= AddressHeaderFlags::Nodad;
        }
        if address.is_loopback() {
            // As `ip address` does: the kernel takes no other scope beside 127.0.0.1/8.
            message.header.scope = AddressScope::Host;
        }
        request.execute().await
    })
}

/// Adds several addresses to a device.
pub fn add_addresses(device: &str, addresses: &[&str]) -> Result<()> {
    addresses.iter().try_for_each(|address| add_address(device, address))
}

/// Deletes an address of a device.
pub fn delete_address(device: &str, address: &str) -> Result<()> {
    let (address, length) = parse(address)?;
    run("delete an address of", device, async |handle| {
        let index = index(handle, device).await?;
        let message = match address {
            IpAddr::V4(address) => {
                AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(address, length).build()
            }
            IpAddr::V6(address) => {
                AddressMessageBuilder::<Ipv6Addr>::new().index(index).address(address, length).build()
            }
        };
        handle.address().del(message).execute().await
    })
}

/// The destinations of the routes of a table, by their protocol and device, as `ip route` shows them; both families.
pub fn routes(table: u8, protocol: u8, device: &str) -> Result<Vec<String>> {
    if !exists(device)? {
        return Ok(Vec::new());
    }
    let found: Vec<RouteMessage> = run("list the routes of", device, async |handle| {
        let index = index(handle, device).await?;
        let mut found = Vec::new();
        for query in [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()] {
            let mut routes = handle.route().get(query).execute();
            while let Some(route) = routes.try_next().await? {
                let is_of_device = route.attributes.contains(&RouteAttribute::Oif(index));
                let header = &route.header;
                if is_of_device && header.table == table && u8::from(header.protocol) == protocol {
                    found.push(route);
                }
            }
        }
        Ok(found)
    })?;
    Ok(found.iter().filter_map(destination).collect())
}

fn destination(route: &RouteMessage) -> Option<String> {
    let destination: IpAddr = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some((*address).into()),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some((*address).into()),
        _ => None,
    })?;
    let full = if destination.is_ipv4() { 32 } else { 128 };
    Some(match route.header.destination_prefix_length {
        length if length == full => destination.to_string(),
        length => format!("{destination}/{length}"),
    })
}

/// Adds a route to a prefix by way of a gateway.
pub fn add_route_via(prefix: &str, gateway: &str) -> Result<()> {
    let gateway = gateway.parse().map_err(|_| not("an address", gateway))?;
    add_route(prefix, async |_, route| Ok(route.gateway(gateway).map_err(|error| invalid(&error))?))
}

/// Adds a route to a prefix by way of a device.
pub fn add_route_dev(prefix: &str, device: &str) -> Result<()> {
    // IPv4 takes such a route for one to somebody on the link only if it is told, as `ip route` does.
    add_route(prefix, async |handle: &Handle, route: RouteMessageBuilder<IpAddr>| {
        let index = index(handle, device).await?;
        let route = route.output_interface(index);
        let is_v4 = prefix_is_v4(prefix);
        Ok(if is_v4 { route.scope(RouteScope::Link) } else { route })
    })
}

/// The table `local`.
const LOCAL: u32 = 255;

/// Adds a route to the table `local`, which makes a prefix the node's own.
pub fn add_local_route(prefix: &str, device: &str, protocol: u8) -> Result<()> {
    let of_device = async |handle: &Handle, route: RouteMessageBuilder<IpAddr>| {
        let route = local(route).protocol(protocol.into()).scope(RouteScope::Host);
        Ok(route.output_interface(index(handle, device).await?))
    };
    add_route(prefix, of_device)
}

/// Deletes a route from the table `local`, whoever added it.
pub fn delete_local_route(prefix: &str, device: &str) -> Result<()> {
    let (destination, length) = parse(prefix)?;
    run("delete a route to", prefix, async |handle| {
        let route = RouteMessageBuilder::<IpAddr>::new();
        let route = route.destination_prefix(destination, length).map_err(|error| invalid(&error))?;
        // Any protocol and scope.
        let route = local(route).protocol(RouteProtocol::Unspec).scope(RouteScope::NoWhere);
        handle.route().del(route.output_interface(index(handle, device).await?).build()).execute().await
    })
}

fn local(route: RouteMessageBuilder<IpAddr>) -> RouteMessageBuilder<IpAddr> {
    route.table_id(LOCAL).kind(RouteType::Local)
}

/// Forgets who on a link has which address, and who did not answer.
pub fn flush_neighbours(device: &str) -> Result<()> {
    run("flush the neighbours of", device, async |handle| {
        let index = index(handle, device).await?;
        let all: Vec<NeighbourMessage> = handle.neighbours().get().execute().try_collect().await?;
        for neighbour in all.into_iter().filter(|neighbour| neighbour.header.ifindex == index) {
            match handle.neighbours().del(neighbour).execute().await {
                // It has gone by itself.
                Err(error) if errno(&error) == Some(rustix::io::Errno::NOENT) => {}
                result => result?,
            }
        }
        Ok(())
    })
}

fn prefix_is_v4(prefix: &str) -> bool {
    !prefix.contains(':')
}

fn add_route(
    prefix: &str,
    finish: impl AsyncFnOnce(&Handle, RouteMessageBuilder<IpAddr>) -> Result<RouteMessageBuilder<IpAddr>, rtnetlink::Error>,
) -> Result<()> {
    let (destination, length) = parse(prefix)?;
    run("add a route to", prefix, async |handle| {
        let route = RouteMessageBuilder::<IpAddr>::new();
        let route = route.destination_prefix(destination, length).map_err(|error| invalid(&error))?;
        let route = finish(handle, route).await?;
        handle.route().add(route.build()).execute().await
    })
}

fn invalid(error: &impl std::fmt::Display) -> rtnetlink::Error {
    rtnetlink::Error::InvalidNla(error.to_string())
}

async fn index(handle: &Handle, device: &str) -> Result<u32, rtnetlink::Error> {
    let link = handle.link().get().match_name(device).execute().try_next().await?;
    link.map(|link| link.header.index).ok_or(rtnetlink::Error::RequestFailed)
}

/// An address, or a prefix, with its length; without one it is a single address.
fn parse(text: &str) -> Result<(IpAddr, u8)> {
    let wrong = || not("an address with a prefix length", text);
    let (address, length) = text.split_once('/').map_or((text, None), |(address, length)| (address, Some(length)));
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    let full = if address.is_ipv4() { 32 } else { 128 };
    Ok((address, length.map_or(Ok(full), str::parse).map_err(|_| wrong())?))
}

fn not(what: &str, text: &str) -> Error {
    Error::Usage(format!("`{text}` is not {what}"))
}

fn errno(error: &rtnetlink::Error) -> Option<rustix::io::Errno> {
    match error {
        rtnetlink::Error::NetlinkError(ErrorMessage { code: Some(code), .. }) => {
            Some(rustix::io::Errno::from_raw_os_error(-code.get()))
        }
        _ => None,
    }
}

/// Does something over a socket of this thread's network namespace.
fn run<T>(
    action: &'static str,
    object: &str,
    work: impl AsyncFnOnce(&Handle) -> Result<T, rtnetlink::Error>,
) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().context("start", "a runtime")?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().context("open", "a netlink socket")?;
        tokio::spawn(connection);
        work(&handle).await.map_err(|error| {
            let error = errno(&error).map_or_else(|| std::io::Error::other(error.to_string()), Into::into);
            Error::Io { action, object: object.to_owned(), error }
        })
    })
}
