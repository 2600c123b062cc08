//! The mirror: what the kernel holds, as far as known. Dumps fill it; acknowledged operations keep it up to date.

use std::collections::BTreeSet;
use std::net::IpAddr;

use foldhash::HashMap;
use ipnet::IpNet;
use ipvs_netlink::Family;
use service_watch::ObjectName;

use crate::binding;
use crate::filter::ruleset::Ruleset;
use crate::filter::{FrontEndElements, ObservedFilter, SetElement, TableContents};
use crate::front_end::{FrontEnd, ServerConfig};
use crate::kernel::{Observed, ObservedServer};
use crate::node::is_link_local_v6;
use crate::plan::{Key, Operation};
use crate::real_servers::{MirrorRealServer, RealServers};

/// A virtual server in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorServer {
    /// Its attributes.
    pub config: ServerConfig,
    /// Its real servers.
    pub real_servers: RealServers,
}

/// What the kernel holds.
#[derive(Clone, Debug, Default)]
pub struct Mirror {
    has_device: bool,
    /// Whether routes to the device can be added.
    accepts_routes: bool,
    servers: HashMap<FrontEnd, MirrorServer>,
    /// How many real servers there are in all.
    real_server_count: usize,
    /// The addresses on `kube-ipvs0`, and whether each is a /32 or /128, as this program adds them.
    addresses: HashMap<IpAddr, bool>,
    /// The local routes to `kube-ipvs0` that this program added.
    routes: BTreeSet<IpNet>,
    filter: ObservedFilter,
}

impl Mirror {
    /// Creates a mirror from a dump of everything.
    pub fn from_dump(observed: Observed) -> Self {
        let has_device = observed.device.is_some();
        let device = observed.device.unwrap_or_default();
        let mut mirror = Self {
            has_device,
            accepts_routes: device.accepts_routes,
            routes: device.routes.into_iter().collect(),
            filter: observed.filter,
            ..Self::default()
        };
        for (address, prefix) in device.addresses {
            // These are not VIPs: the kernel adds fe80:: addresses to a device that is up, and routes need a loopback address.
            if !address.is_loopback() && !is_link_local_v6(address) {
                mirror.addresses.insert(address, prefix == if address.is_ipv4() { 32 } else { 128 });
            }
        }
        mirror.servers.reserve(observed.servers.len());
        for server in observed.servers {
            mirror.insert_observed(server);
        }
        mirror
    }

    /// Takes over what another mirror knows of the real servers, after a dump without them. Returns the front ends that it does not
    /// know.
    pub(crate) fn take_real_servers(&mut self, mut other: Self) -> Vec<FrontEnd> {
        let mut unknown = Vec::new();
        for (front_end, server) in &mut self.servers {
            match other.servers.remove(front_end) {
                Some(known) => server.real_servers = known.real_servers,
                None => unknown.push(*front_end),
            }
            self.real_server_count += server.real_servers.len();
        }
        unknown
    }

    /// Updates the mirror from a dump of some virtual servers. Requested servers that are not in the dump do not exist.
    pub fn refresh(&mut self, requested: &[FrontEnd], observed: Observed) {
        for front_end in requested {
            self.remove(front_end);
        }
        for server in observed.servers {
            self.insert_observed(server);
        }
    }

    /// Updates the mirror from a dump of the packet filter.
    pub fn refresh_filter(&mut self, filter: ObservedFilter) {
        self.filter = filter;
    }

    /// The packet filter.
    pub fn filter(&self) -> &ObservedFilter {
        &self.filter
    }

    /// Whether `kube-ipvs0` exists.
    pub fn has_device(&self) -> bool {
        self.has_device
    }

    /// Whether routes to `kube-ipvs0` can be added.
    pub fn accepts_routes(&self) -> bool {
        self.accepts_routes
    }

    /// Whether there is a route that this program added.
    pub fn has_route(&self, range: &IpNet) -> bool {
        self.routes.contains(range)
    }

    /// Whether there is any such route.
    pub fn has_routes(&self) -> bool {
        !self.routes.is_empty()
    }

    /// The ranges of more than one address that have a route.
    pub fn routed_ranges(&self) -> impl Iterator<Item = &IpNet> {
        self.routes.iter().filter(|range| !binding::is_host_range(range))
    }

    /// Whether there is any virtual server.
    pub fn has_servers(&self) -> bool {
        !self.servers.is_empty()
    }

    /// How many virtual servers there are.
    pub fn server_count(&self) -> usize {
        self.servers.len()
    }

    /// How many real servers there are.
    pub fn real_server_count(&self) -> usize {
        self.real_server_count
    }

    /// The front ends of all virtual servers, in no particular order.
    pub fn front_ends(&self) -> impl Iterator<Item = &FrontEnd> {
        self.servers.keys()
    }

    /// The virtual server at a front end.
    pub fn server(&self, front_end: &FrontEnd) -> Option<&MirrorServer> {
        self.servers.get(front_end)
    }

    /// Whether an address is on `kube-ipvs0`, with whatever prefix.
    pub fn has_address(&self, address: IpAddr) -> bool {
        self.addresses.contains_key(&address)
    }

    /// Whether an address is on `kube-ipvs0` as a /32 or /128, as this program adds it.
    pub fn has_host_address(&self, address: IpAddr) -> bool {
        self.addresses.get(&address).copied().unwrap_or(false)
    }

    /// The fingerprint of the constant part of a family's table of the packet filter; `None` without a table.
    pub fn ruleset(&self, family: Family) -> Option<u64> {
        self.filter.rulesets.get(&family).copied()
    }

    /// Whether a virtual server is this program's, or kube-proxy's, which it replaces. The proof is an element of its front end in
    /// the packet filter, which is added before the virtual server and deleted after it. Without a table, as on the first start
    /// after kube-proxy, the proof is that the VIP is on `kube-ipvs0`, which no other program uses.
    pub fn is_owned(&self, front_end: &FrontEnd) -> bool {
        let is_inherited =
            || self.ruleset(Family::of(front_end.address)).is_none() && self.has_host_address(front_end.address);
        self.front_end(front_end).is_some() || is_inherited()
    }

    /// The front ends of a family's virtual servers that are provably this program's.
    pub fn owned(&self, family: Family) -> impl Iterator<Item = &FrontEnd> {
        self.servers.keys().filter(move |it| Family::of(it.address) == family && self.is_owned(it))
    }

    /// The virtual servers that are not provably this program's.
    pub fn unowned(&self) -> impl Iterator<Item = &FrontEnd> {
        self.servers.keys().filter(|front_end| !self.is_owned(front_end))
    }

    /// The packet filter's elements of a front end.
    pub fn front_end(&self, front_end: &FrontEnd) -> Option<&FrontEndElements> {
        self.filter.front_ends.get(front_end)
    }

    /// Whether a set of the packet filter has an element.
    pub fn has_element(&self, element: &SetElement) -> bool {
        self.filter.elements.contains(element)
    }

    /// The fingerprint of a Service's source ranges, if the packet filter has any.
    pub fn source_ranges(&self, service: &ObjectName, family: Family) -> Option<u64> {
        self.filter.source_ranges.get(&(service.clone(), family)).copied()
    }

    /// Every key the kernel holds something for.
    pub fn keys(&self) -> impl Iterator<Item = Key> {
        let front_ends = self.servers.keys().chain(self.filter.front_ends.keys()).copied().map(Key::VirtualServer);
        let addresses = self.addresses.keys().copied().map(Key::Vip);
        let elements = self.filter.elements.iter().map(|element| match element {
            SetElement::Vip(address) => Key::Vip(*address),
            element => Key::SetElement(*element),
        });
        let sources =
            self.filter.source_ranges.keys().map(|(service, family)| Key::SourceRanges(service.clone(), *family));
        let routes = self.routes.iter().map(Key::for_route);
        front_ends.chain(addresses).chain(routes).chain(elements).chain(sources)
    }

    /// Applies an operation that the kernel has carried out.
    pub fn acknowledge(&mut self, operation: &Operation) {
        match *operation {
            Operation::BuildTable { ref ruleset, ref contents, .. } => self.build_table(ruleset, contents),
            Operation::SetSourceRanges(ref service, family, ref ranges) => {
                self.filter.source_ranges.insert((service.clone(), family), ranges.fingerprint());
            }
            Operation::RemoveSourceRanges(ref service, family) => {
                self.filter.source_ranges.remove(&(service.clone(), family));
            }
            Operation::SetFrontEnd { front_end, ref after, .. } => {
                self.filter.front_ends.insert(front_end, after.clone());
            }
            Operation::RemoveFrontEnd(front_end, _) => {
                self.filter.front_ends.remove(&front_end);
            }
            Operation::AddElement(element) => {
                self.filter.elements.insert(element);
            }
            Operation::RemoveElement(element) => {
                self.filter.elements.remove(&element);
            }
            Operation::AddRoutedVip(address) => {
                self.filter.elements.insert(SetElement::Vip(address));
            }
            Operation::RemoveRoutedVip(address) => {
                self.filter.elements.remove(&SetElement::Vip(address));
            }
            Operation::DeleteUntranslatedFlows(..) | Operation::DeleteStaleFlows(..) => {}
            Operation::AddDevice => self.has_device = true,
            Operation::SetDeviceUp => self.accepts_routes = true,
            Operation::AddRoute(range) => {
                self.routes.insert(range);
            }
            Operation::RemoveRoute(range) => {
                self.routes.remove(&range);
            }
            Operation::BindAddress(address) => {
                self.addresses.insert(address, true);
            }
            Operation::UnbindAddress(address) => {
                self.addresses.remove(&address);
            }
            Operation::AddVirtualServer(front_end, config) => {
                self.insert(front_end, MirrorServer { config, real_servers: RealServers::default() });
            }
            Operation::SetVirtualServer(front_end, config) => {
                if let Some(server) = self.servers.get_mut(&front_end) {
                    server.config = config;
                }
            }
            Operation::DeleteVirtualServer(front_end) => {
                self.remove(&front_end);
            }
            Operation::AddRealServer(front_end, server)
            | Operation::SetRealServer(front_end, server)
            | Operation::DrainRealServer(front_end, server) => {
                if let Some(held) = self.servers.get_mut(&front_end) {
                    let real_server = MirrorRealServer { server, is_drained: false };
                    self.real_server_count += usize::from(held.real_servers.insert(real_server));
                }
            }
            Operation::DeleteRealServer(front_end, address) => {
                if let Some(held) = self.servers.get_mut(&front_end) {
                    self.real_server_count -= usize::from(held.real_servers.remove(address));
                }
            }
        }
    }

    /// Removes the device with its addresses and routes, after an operation found it deleted or down.
    pub fn forget_device(&mut self) {
        self.has_device = false;
        self.accepts_routes = false;
        self.addresses.clear();
        self.routes.clear();
    }

    fn build_table(&mut self, ruleset: &Ruleset, contents: &TableContents) {
        let (family, filter) = (ruleset.family(), &mut self.filter);
        filter.rulesets.insert(family, ruleset.fingerprint());
        filter.front_ends.retain(|front_end, _| Family::of(front_end.address) != family);
        filter.front_ends.extend(contents.front_ends.iter().map(|(front_end, rule)| (*front_end, rule.into())));
        filter.elements.retain(|element| element.family() != family);
        filter.elements.extend(&contents.elements);
        filter.source_ranges.retain(|(_, of), _| *of != family);
        let sources = contents.source_ranges.iter();
        filter.source_ranges.extend(sources.map(|(name, ranges)| ((name.clone(), family), ranges.fingerprint())));
    }

    fn insert_observed(&mut self, observed: ObservedServer) {
        let ObservedServer { front_end, config, real_servers } = observed;
        self.insert(front_end, MirrorServer { config, real_servers });
    }

    fn insert(&mut self, front_end: FrontEnd, server: MirrorServer) {
        self.remove(&front_end);
        self.real_server_count += server.real_servers.len();
        self.servers.insert(front_end, server);
    }

    fn remove(&mut self, front_end: &FrontEnd) {
        if let Some(server) = self.servers.remove(front_end) {
            self.real_server_count -= server.real_servers.len();
        }
    }
}
