//! Reads the state of the kernel: `kube-ipvs0` with its addresses and routes, the addresses of all interfaces, virtual servers, and the
//! packet filter.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipvs_netlink::ErrorKind;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};

use super::errno::ENODEV;
use super::{LinuxKernel, refused, routes};
use crate::front_end::FrontEnd;
use crate::kernel::{DEVICE, KernelError, Observed, ObservedDevice, ObservedServer, Scope};
use crate::real_servers::RealServers;

impl LinuxKernel {
    /// The index of `kube-ipvs0`, and whether it is up.
    pub(super) fn find_device(&mut self) -> Result<Option<(u32, bool)>, KernelError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(DEVICE.to_owned()));
        let mut found = None;
        let result = self.route.request(&RouteNetlinkMessage::GetLink(message).into(), |answer| {
            if let RouteNetlinkMessage::NewLink(link) = answer {
                let is_dummy = link.attributes.iter().any(|attribute| {
                    matches!(attribute, LinkAttribute::LinkInfo(info)
                        if info.contains(&LinkInfo::Kind(InfoKind::Dummy)))
                });
                let is_up = link.header.flags.contains(LinkFlags::Up);
                found = Some(((link.header.index, is_up), is_dummy));
            }
        });
        match (result, found) {
            (Err(error), _) if error.refusal().is_some_and(|refusal| refusal.errno == ENODEV) => Ok(None),
            (Err(error), _) => Err(refused(format!("cannot look up device {DEVICE}: {error}"))),
            (Ok(()), Some((_, false))) => Err(refused(format!(
                "the interface {DEVICE} is not a dummy device: rename or delete it, since kube-ipvs needs a dummy device of that name"
            ))),
            (Ok(()), found) => Ok(found.map(|(device, _)| device)),
        }
    }

    /// Reads the addresses of all interfaces.
    fn read_addresses(&mut self, observed: &mut Observed) -> Result<(), KernelError> {
        let device = self.find_device()?;
        self.device = device.map(|(index, _)| index);
        let mut on_device = Vec::new();
        let mut interfaces = BTreeSet::new();
        self.route
            .dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()), |answer| {
                if let RouteNetlinkMessage::NewAddress(message) = answer
                    && let Some(address) = address_of(&message)
                {
                    if Some(message.header.index) == self.device {
                        on_device.push((address, message.header.prefix_len));
                    } else {
                        interfaces.insert(address);
                    }
                }
            })
            .map_err(|error| refused(format!("cannot list the addresses of the node: {error}")))?;
        observed.device = device.map(|(_, is_up)| ObservedDevice {
            accepts_routes: is_up && on_device.iter().any(|(address, _)| *address == routes::ANCHOR_ADDRESS),
            addresses: on_device,
            routes: Vec::new(),
        });
        observed.interfaces = interfaces;
        Ok(())
    }

    fn observe(&mut self, server: ipvs_netlink::VirtualServer) -> Result<Option<ObservedServer>, KernelError> {
        let Some(front_end) = FrontEnd::from_id(&server.id) else { return Ok(None) };
        // Other programs rarely add or delete real servers here, so one list is enough. If it lacks one nevertheless, that is added,
        // refused as existing, and read again.
        let real_servers = self.ipvs.real_servers(&server.id).map_err(|error| refused(error.to_string()))?;
        let real_servers = real_servers.into_iter().map(|entry| (entry.server, entry.is_idle())).collect();
        Ok(Some(ObservedServer { front_end, config: server.into(), real_servers }))
    }

    pub(super) fn read(&mut self, scope: Scope<'_>) -> Result<Observed, KernelError> {
        let mut observed = Observed::default();
        match scope {
            Scope::All | Scope::WithoutRealServers => {
                self.read_addresses(&mut observed)?;
                if let Some((index, device)) = self.device.zip(observed.device.as_mut()) {
                    device.routes = routes::read(&mut self.routes, index)
                        .map_err(|error| refused(format!("cannot list the routes to {DEVICE}: {error}")))?;
                }
                observed.filter = self.filter()?;
                // The kernel's list may lack servers that were there all the time, if others come and go meanwhile. If that does not
                // end, an incomplete list is better than none: what it lacks is added, refused as existing, and read again.
                let listed = match self.ipvs.all_virtual_servers() {
                    Err(error) if error.kind() == ErrorKind::Interrupted => self.ipvs.virtual_servers(),
                    listed => listed,
                };
                for entry in listed.map_err(|error| refused(error.to_string()))? {
                    let observed_server = match (scope, FrontEnd::from_id(&entry.server.id)) {
                        (Scope::WithoutRealServers, Some(front_end)) => {
                            Some(without_real_servers(front_end, entry.server))
                        }
                        _ => self.observe(entry.server)?,
                    };
                    observed.servers.extend(observed_server);
                }
            }
            Scope::Filter => observed.filter = self.filter()?,
            Scope::Interfaces => self.read_addresses(&mut observed)?,
            Scope::ServerConfigs(front_ends) => {
                for front_end in front_ends {
                    match self.ipvs.virtual_server(&front_end.id()) {
                        Ok(entry) => observed.servers.push(without_real_servers(*front_end, entry.server)),
                        Err(error) if error.kind() == ErrorKind::NotFound => {}
                        Err(error) => return Err(refused(error.to_string())),
                    }
                }
            }
            Scope::Servers(front_ends) => {
                for front_end in front_ends {
                    match self.ipvs.virtual_server(&front_end.id()) {
                        Ok(entry) => observed.servers.extend(self.observe(entry.server)?),
                        Err(error) if error.kind() == ErrorKind::NotFound => {}
                        Err(error) => return Err(refused(error.to_string())),
                    }
                }
            }
        }
        Ok(observed)
    }
}

fn without_real_servers(front_end: FrontEnd, server: ipvs_netlink::VirtualServer) -> ObservedServer {
    ObservedServer { front_end, config: server.into(), real_servers: RealServers::default() }
}

/// The interface's own address: `IFA_LOCAL`, which differs from `IFA_ADDRESS` on point-to-point links, or else `IFA_ADDRESS`.
fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(wanted);
    find(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    })
    .or_else(|| {
        find(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

/// Decodes a message of rtnetlink.
#[cfg(fuzzing)]
pub(crate) fn fuzz(header: &netlink_packet_core::NetlinkHeader, payload: &[u8]) {
    use netlink_packet_core::NetlinkDeserializable as _;
    if let Ok(RouteNetlinkMessage::NewAddress(message)) = RouteNetlinkMessage::deserialize(header, payload) {
        let _ = address_of(&message);
    }
}
