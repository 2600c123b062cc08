//! Plans: operations on the kernel, in phases whose order keeps traffic correct at every instant.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use ipvs_netlink::{Family, RealServer};
use service_watch::ObjectName;

use crate::binding;
use crate::filter::ruleset::Ruleset;
use crate::filter::{FrontEndElements, SetElement, SourceRanges, TableContents};
use crate::front_end::{FrontEnd, ServerConfig};
use crate::real_servers::RealServerAddress;

/// An operation on the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Builds a family's table of the packet filter, in place of one that differs.
    BuildTable {
        /// Sets, chains and rules.
        ruleset: Arc<Ruleset>,
        /// Whether there is a table to be replaced.
        replaces: bool,
        /// Its elements and source ranges.
        contents: Arc<TableContents>,
    },
    /// Adds or changes the source ranges of a Service.
    SetSourceRanges(ObjectName, Family, SourceRanges),
    /// Replaces the packet filter's elements of a front end.
    SetFrontEnd {
        /// The front end.
        front_end: FrontEnd,
        /// The elements that the kernel holds.
        before: FrontEndElements,
        /// The elements that it is to hold.
        after: FrontEndElements,
    },
    /// Adds an element to one of the packet filter's sets.
    AddElement(SetElement),
    /// Adds `kube-ipvs0`.
    AddDevice,
    /// Sets `kube-ipvs0` up, so that routes to it can be added.
    SetDeviceUp,
    /// Adds a virtual server.
    AddVirtualServer(FrontEnd, ServerConfig),
    /// Sets the attributes of a virtual server.
    SetVirtualServer(FrontEnd, ServerConfig),
    /// Adds a real server.
    AddRealServer(FrontEnd, RealServer),
    /// Sets the attributes of a real server that is wanted.
    SetRealServer(FrontEnd, RealServer),
    /// Deletes flows to a front end from connection tracking that began before it had a virtual server, and so are not translated:
    /// all whose replies do not come from these real servers.
    DeleteUntranslatedFlows(FrontEnd, Arc<[RealServerAddress]>),
    /// Binds a VIP to `kube-ipvs0`, as /32 or /128.
    BindAddress(IpAddr),
    /// Adds a local route to `kube-ipvs0`, for a VIP or a range of VIPs.
    AddRoute(IpNet),
    /// Sets the weight of a real server that is not wanted to 0: its connections continue, new ones go to others.
    DrainRealServer(FrontEnd, RealServer),
    /// Deletes a real server.
    DeleteRealServer(FrontEnd, SocketAddr),
    /// Deletes a VIP from `kube-ipvs0`.
    UnbindAddress(IpAddr),
    /// Deletes a local route to `kube-ipvs0`.
    RemoveRoute(IpNet),
    /// Deletes a virtual server with its real servers.
    DeleteVirtualServer(FrontEnd),
    /// Deletes UDP flows to a front end from connection tracking whose replies do not come from these real servers.
    DeleteStaleFlows(FrontEnd, Arc<[RealServerAddress]>),
    /// Deletes the packet filter's elements of a front end.
    RemoveFrontEnd(FrontEnd, FrontEndElements),
    /// Deletes an element from one of the packet filter's sets.
    RemoveElement(SetElement),
    /// Adds the element of a VIP whose range is routed to this node already. From then on its front ends are served.
    AddRoutedVip(IpAddr),
    /// Deletes the element of such a VIP.
    RemoveRoutedVip(IpAddr),
    /// Deletes the source ranges of a Service.
    RemoveSourceRanges(ObjectName, Family),
}

/// When an operation is carried out. The order is that of the variants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Tables of the packet filter are built.
    BuildTables,
    /// Elements and chains are added to the packet filter: a VIP is guarded before it can be reached.
    AddToFilter,
    /// The device that carries the VIPs is added or set up.
    Device,
    /// Virtual servers are added or changed.
    AddVirtualServers,
    /// Real servers are added, or their attributes are set.
    AddRealServers,
    /// Connections that clients began before there was a virtual server are deleted from connection tracking.
    DeleteUntranslatedFlows,
    /// VIPs are bound, as addresses or by routes, now that real servers answer.
    BindVips,
    /// Real servers drain or are deleted, now that their successors accept connections.
    RemoveRealServers,
    /// Front ends admit more clients and masquerade fewer, now that only real servers are left that may serve them so.
    AdmitClients,
    /// VIPs in routed ranges are closed: new connections are refused.
    RemoveRoutedVips,
    /// VIPs are unbound: new connections are refused.
    UnbindVips,
    /// Virtual servers are deleted.
    DeleteVirtualServers,
    /// UDP flows to deleted real servers are deleted from connection tracking.
    DeleteStaleFlows,
    /// Elements are deleted from the packet filter. This comes late: a VIP is guarded while it can be reached, and an agent that
    /// is killed before finds here whose flows it has to delete.
    RemoveFromFilter,
    /// Chains with source ranges are deleted, now that no element refers to them.
    RemoveSourceRanges,
}

impl Operation {
    /// The phase in which it is carried out.
    pub fn phase(&self) -> Phase {
        match self {
            Self::BuildTable { .. } => Phase::BuildTables,
            Self::SetFrontEnd { before, after, .. } if after.is_wider_than(before) => Phase::AdmitClients,
            Self::AddRoutedVip(_) => Phase::AdmitClients,
            Self::RemoveRoutedVip(_) => Phase::RemoveRoutedVips,
            Self::SetSourceRanges(..) | Self::SetFrontEnd { .. } | Self::AddElement(_) => Phase::AddToFilter,
            Self::DeleteUntranslatedFlows(..) => Phase::DeleteUntranslatedFlows,
            Self::DeleteStaleFlows(..) => Phase::DeleteStaleFlows,
            Self::RemoveFrontEnd(..) | Self::RemoveElement(_) => Phase::RemoveFromFilter,
            Self::RemoveSourceRanges(..) => Phase::RemoveSourceRanges,
            Self::AddDevice | Self::SetDeviceUp => Phase::Device,
            Self::AddVirtualServer(..) | Self::SetVirtualServer(..) => Phase::AddVirtualServers,
            Self::AddRealServer(..) | Self::SetRealServer(..) => Phase::AddRealServers,
            Self::BindAddress(_) | Self::AddRoute(_) => Phase::BindVips,
            Self::DrainRealServer(..) | Self::DeleteRealServer(..) => Phase::RemoveRealServers,
            Self::UnbindAddress(_) | Self::RemoveRoute(_) => Phase::UnbindVips,
            Self::DeleteVirtualServer(_) => Phase::DeleteVirtualServers,
        }
    }

    /// The family whose table of the packet filter the operation changes; `None` for other operations.
    pub fn filter_family(&self) -> Option<Family> {
        match self {
            Self::BuildTable { ruleset, .. } => Some(ruleset.family()),
            Self::SetSourceRanges(_, family, _) | Self::RemoveSourceRanges(_, family) => Some(*family),
            Self::SetFrontEnd { front_end, .. } | Self::RemoveFrontEnd(front_end, _) => {
                Some(Family::of(front_end.address))
            }
            Self::AddElement(element) | Self::RemoveElement(element) => Some(element.family()),
            Self::AddRoutedVip(address) | Self::RemoveRoutedVip(address) => Some(Family::of(*address)),
            _ => None,
        }
    }

    /// The key to which the operation belongs.
    pub fn key(&self) -> Key {
        match self {
            Self::BuildTable { ruleset, .. } => Key::Table(ruleset.family()),
            Self::SetSourceRanges(service, family, _) | Self::RemoveSourceRanges(service, family) => {
                Key::SourceRanges(service.clone(), *family)
            }
            Self::DeleteUntranslatedFlows(front_end, _) | Self::DeleteStaleFlows(front_end, _) => {
                Key::Flows(*front_end)
            }
            Self::AddDevice | Self::SetDeviceUp => Key::Device,
            Self::AddElement(SetElement::Vip(address))
            | Self::RemoveElement(SetElement::Vip(address))
            | Self::AddRoutedVip(address)
            | Self::RemoveRoutedVip(address)
            | Self::BindAddress(address)
            | Self::UnbindAddress(address) => Key::Vip(*address),
            Self::AddRoute(range) | Self::RemoveRoute(range) => Key::for_route(range),
            Self::AddElement(element) | Self::RemoveElement(element) => Key::SetElement(*element),
            Self::SetFrontEnd { front_end, .. }
            | Self::RemoveFrontEnd(front_end, _)
            | Self::AddVirtualServer(front_end, _)
            | Self::SetVirtualServer(front_end, _)
            | Self::AddRealServer(front_end, _)
            | Self::SetRealServer(front_end, _)
            | Self::DrainRealServer(front_end, _)
            | Self::DeleteRealServer(front_end, _)
            | Self::DeleteVirtualServer(front_end) => Key::VirtualServer(*front_end),
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuildTable { ruleset, .. } => {
                write!(f, "create the {} table kube-ipvs of nf_tables", ruleset.family())
            }
            Self::SetSourceRanges(service, family, _) => {
                write!(f, "set the {family} source ranges of Service {service}")
            }
            Self::SetFrontEnd { front_end, .. } => write!(f, "set the packet filter for {front_end}"),
            Self::AddElement(element) => write!(f, "add {element} to the packet filter"),
            Self::RemoveFrontEnd(front_end, _) => write!(f, "delete {front_end} from the packet filter"),
            Self::RemoveElement(element) => write!(f, "delete {element} from the packet filter"),
            Self::AddRoutedVip(address) => write!(f, "add VIP {address} to the packet filter"),
            Self::RemoveRoutedVip(address) => write!(f, "delete VIP {address} from the packet filter"),
            Self::RemoveSourceRanges(service, family) => {
                write!(f, "delete the {family} source ranges of Service {service}")
            }
            Self::DeleteUntranslatedFlows(front_end, _) => {
                write!(f, "delete conntrack entries of {front_end} from before it was served")
            }
            Self::DeleteStaleFlows(front_end, _) => write!(f, "delete stale flows to {front_end}"),
            Self::AddDevice => write!(f, "add device kube-ipvs0"),
            Self::SetDeviceUp => write!(f, "set kube-ipvs0 up"),
            Self::AddVirtualServer(front_end, _) => write!(f, "add virtual server {front_end}"),
            Self::SetVirtualServer(front_end, _) => write!(f, "change virtual server {front_end}"),
            Self::AddRealServer(front_end, server) => {
                write!(f, "add real server {} of {front_end}", server.socket_address())
            }
            Self::SetRealServer(front_end, server) => {
                write!(f, "change real server {} of {front_end}", server.socket_address())
            }
            Self::BindAddress(address) => write!(f, "add address {address} to kube-ipvs0"),
            Self::AddRoute(range) => write!(f, "add local route {range} to kube-ipvs0"),
            Self::DrainRealServer(front_end, server) => {
                write!(f, "drain real server {} of {front_end}", server.socket_address())
            }
            Self::DeleteRealServer(front_end, address) => write!(f, "delete real server {address} of {front_end}"),
            Self::UnbindAddress(address) => write!(f, "delete address {address} of kube-ipvs0"),
            Self::RemoveRoute(range) => write!(f, "delete local route {range} to kube-ipvs0"),
            Self::DeleteVirtualServer(front_end) => write!(f, "delete virtual server {front_end}"),
        }
    }
}

/// The unit that is compared, planned and retried.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// The constant part of a family's table of the packet filter.
    Table(Family),
    /// The source ranges of a Service.
    SourceRanges(ObjectName, Family),
    /// An element of one of the packet filter's sets, except a VIP's.
    SetElement(SetElement),
    /// `kube-ipvs0` itself.
    Device,
    /// A virtual server with its real servers, and the packet filter's elements of its front end.
    VirtualServer(FrontEnd),
    /// A VIP: its address or route, and its element in the packet filter.
    Vip(IpAddr),
    /// The route of a range of VIPs.
    VipRange(IpNet),
    /// The flows to a front end in connection tracking.
    Flows(FrontEnd),
}

impl Key {
    /// The key of a route.
    pub(crate) fn for_route(range: &IpNet) -> Self {
        if binding::is_host_range(range) { Self::Vip(range.addr()) } else { Self::VipRange(*range) }
    }

    /// The kind of key, as a label for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Table(_) => "filter_table",
            Self::SourceRanges(..) => "source_ranges",
            Self::SetElement(_) => "filter_entry",
            Self::Device => "device",
            Self::VirtualServer(_) => "virtual_server",
            Self::Vip(_) => "address",
            Self::VipRange(_) => "range",
            Self::Flows(_) => "flows",
        }
    }

    /// Whether all Services of a family depend on it, and not only some.
    pub fn is_node_wide(&self) -> bool {
        matches!(self, Self::Device | Self::Table(_) | Self::VipRange(_))
    }

    /// Whether it belongs to a family. The device belongs to both.
    pub fn is_of_family(&self, family: Family) -> bool {
        match self {
            Self::Table(of) | Self::SourceRanges(_, of) => *of == family,
            Self::SetElement(element) => element.family() == family,
            Self::Device => true,
            Self::VirtualServer(front_end) | Self::Flows(front_end) => Family::of(front_end.address) == family,
            Self::Vip(address) => Family::of(*address) == family,
            Self::VipRange(range) => binding::family(range) == family,
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(family) => write!(f, "{family} table kube-ipvs of nf_tables"),
            Self::SourceRanges(service, family) => write!(f, "{family} source ranges of Service {service}"),
            Self::SetElement(element) => element.fmt(f),
            Self::Flows(front_end) => write!(f, "flows to {front_end}"),
            Self::Device => f.write_str("device kube-ipvs0"),
            Self::VirtualServer(front_end) => write!(f, "virtual server {front_end}"),
            Self::Vip(address) => write!(f, "address {address}"),
            Self::VipRange(range) => write!(f, "range {range}"),
        }
    }
}

/// Operations, sorted by phase.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    operations: Vec<Operation>,
}

impl Plan {
    /// Whether there are no operations.
    pub fn is_empty(&self) -> bool {
        self.operations.is_empty()
    }

    /// Splits off the operations from a phase on.
    #[must_use]
    pub fn split_off(&mut self, phase: Phase) -> Self {
        let index = self.operations.partition_point(|operation| operation.phase() < phase);
        Self { operations: self.operations.split_off(index) }
    }

    /// Keeps the operations for which this holds.
    pub fn retain(&mut self, keep: impl FnMut(&Operation) -> bool) {
        self.operations.retain(keep);
    }

    /// The operations in the order in which they are to be carried out.
    pub fn operations(&self) -> &[Operation] {
        &self.operations
    }
}

impl FromIterator<Operation> for Plan {
    /// Sorts by phase. The order within a phase is preserved.
    fn from_iter<I: IntoIterator<Item = Operation>>(operations: I) -> Self {
        let mut operations: Vec<_> = operations.into_iter().collect();
        operations.sort_by_key(Operation::phase);
        Self { operations }
    }
}
