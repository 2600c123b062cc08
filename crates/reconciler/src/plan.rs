//! Plans: operations on the kernel, in phases whose order keeps traffic right at every instant.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use ipvs_netlink::{Family, RealServer};
use service_watch::ObjectName;

use crate::binding;
use crate::filter::ruleset::Ruleset;
use crate::filter::{Contents, Elements, Entry, Ranges};
use crate::front_end::{FrontEnd, ServerConfig};
use crate::real_servers::Place;

/// One step of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Makes a family's table of the packet filter with these contents, in the place of one that is otherwise.
    BuildFilter {
        /// Sets, chains and rules.
        ruleset: Arc<Ruleset>,
        /// Whether there is a table to be replaced.
        replaces: bool,
        /// What follows the Services.
        contents: Arc<Contents>,
    },
    /// Makes or changes the source ranges of a Service.
    SetSources(ObjectName, Family, Ranges),
    /// Changes what the packet filter does with connections to a front end, from what is there.
    SetFrontEnd(FrontEnd, Elements, Elements),
    /// Adds a member to one of the packet filter's sets.
    AddEntry(Entry),
    /// Makes `kube-ipvs0`.
    AddDevice,
    /// Has `kube-ipvs0` take routes.
    RaiseDevice,
    /// Makes a virtual server.
    AddVirtualServer(FrontEnd, ServerConfig),
    /// Corrects the attributes of a virtual server.
    SetVirtualServer(FrontEnd, ServerConfig),
    /// Makes a real server.
    AddRealServer(FrontEnd, RealServer),
    /// Corrects the attributes of a real server that is wanted.
    SetRealServer(FrontEnd, RealServer),
    /// Deletes from connection tracking what was begun to a front end before it had a virtual server, but for what its real
    /// servers answer: nobody has translated that.
    ClearFlows(FrontEnd, Arc<[Place]>),
    /// Binds a VIP to `kube-ipvs0`, as /32 or /128.
    BindAddress(IpAddr),
    /// Makes a local route to `kube-ipvs0`, for a VIP or a range of them.
    AddRoute(IpNet),
    /// Sets the weight of a real server that is not wanted to 0: connections stay, new ones go elsewhere.
    DrainRealServer(FrontEnd, RealServer),
    /// Deletes a real server.
    DeleteRealServer(FrontEnd, SocketAddr),
    /// Takes a VIP from `kube-ipvs0`.
    UnbindAddress(IpAddr),
    /// Deletes a local route to `kube-ipvs0`.
    RemoveRoute(IpNet),
    /// Deletes a virtual server with its real servers.
    DeleteVirtualServer(FrontEnd),
    /// Deletes UDP flows to a front end from connection tracking, but for those that its real servers answer.
    FlushFlows(FrontEnd, Arc<[Place]>),
    /// Takes from the packet filter what it has for a front end.
    ForgetFrontEnd(FrontEnd, Elements),
    /// Takes a member from one of the packet filter's sets.
    RemoveEntry(Entry),
    /// Adds a VIP to the packet filter that is this node's already: its range has a route.
    OpenVip(IpAddr),
    /// Takes such a VIP from the packet filter.
    CloseVip(IpAddr),
    /// Deletes the source ranges of a Service.
    RemoveSources(ObjectName, Family),
}

/// When an operation's turn is. The order is that of the variants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Tables of the packet filter.
    FilterTables,
    /// What the packet filter is to know: a VIP is guarded before it can be reached.
    FilterIn,
    /// The device that carries the VIPs, or takes their routes.
    Device,
    /// Virtual servers in or changed.
    VirtualServersIn,
    /// Real servers in, or brought to their weight.
    RealServersIn,
    /// What clients tried before.
    FlowsIn,
    /// VIPs, as addresses or by routes, now that something answers behind them.
    AddressesIn,
    /// Real servers drained or out, now that their successors take connections.
    RealServersOut,
    /// Front ends opened, now that there is somebody behind them and nobody else.
    FilterWider,
    /// VIPs closed that stay this node's: who asks now is told that nobody is there.
    FilterNarrower,
    /// VIPs out: who asks now is told that nobody is there.
    AddressesOut,
    /// Virtual servers out.
    VirtualServersOut,
    /// UDP flows to real servers that are gone.
    FlowsOut,
    /// What the packet filter is to forget, last: a VIP is guarded for as long as it can be reached, and an agent that is
    /// killed meanwhile finds here whose flows it has to look after.
    FilterOut,
    /// Source ranges that nothing refers to any more.
    SourcesOut,
}

impl Operation {
    /// When its turn is.
    pub fn phase(&self) -> Phase {
        match self {
            Self::BuildFilter { .. } => Phase::FilterTables,
            Self::SetFrontEnd(_, before, after) if after.is_wider_than(before) => Phase::FilterWider,
            Self::OpenVip(_) => Phase::FilterWider,
            Self::CloseVip(_) => Phase::FilterNarrower,
            Self::SetSources(..) | Self::SetFrontEnd(..) | Self::AddEntry(_) => Phase::FilterIn,
            Self::ClearFlows(..) => Phase::FlowsIn,
            Self::FlushFlows(..) => Phase::FlowsOut,
            Self::ForgetFrontEnd(..) | Self::RemoveEntry(_) => Phase::FilterOut,
            Self::RemoveSources(..) => Phase::SourcesOut,
            Self::AddDevice | Self::RaiseDevice => Phase::Device,
            Self::AddVirtualServer(..) | Self::SetVirtualServer(..) => Phase::VirtualServersIn,
            Self::AddRealServer(..) | Self::SetRealServer(..) => Phase::RealServersIn,
            Self::BindAddress(_) | Self::AddRoute(_) => Phase::AddressesIn,
            Self::DrainRealServer(..) | Self::DeleteRealServer(..) => Phase::RealServersOut,
            Self::UnbindAddress(_) | Self::RemoveRoute(_) => Phase::AddressesOut,
            Self::DeleteVirtualServer(_) => Phase::VirtualServersOut,
        }
    }

    /// The family whose table of the packet filter the operation is about; `None` for other operations.
    pub fn filter_family(&self) -> Option<Family> {
        match self {
            Self::BuildFilter { ruleset, .. } => Some(ruleset.family()),
            Self::SetSources(_, family, _) | Self::RemoveSources(_, family) => Some(*family),
            Self::SetFrontEnd(front_end, ..) | Self::ForgetFrontEnd(front_end, _) => {
                Some(Family::of(front_end.address))
            }
            Self::AddEntry(entry) | Self::RemoveEntry(entry) => Some(entry.family()),
            Self::OpenVip(address) | Self::CloseVip(address) => Some(Family::of(*address)),
            _ => None,
        }
    }

    /// What the operation is about.
    pub fn key(&self) -> Key {
        match self {
            Self::BuildFilter { ruleset, .. } => Key::Filter(ruleset.family()),
            Self::SetSources(service, family, _) | Self::RemoveSources(service, family) => {
                Key::Sources(service.clone(), *family)
            }
            Self::ClearFlows(front_end, _) | Self::FlushFlows(front_end, _) => Key::Flows(*front_end),
            Self::AddDevice | Self::RaiseDevice => Key::Device,
            Self::AddEntry(Entry::Vip(address))
            | Self::RemoveEntry(Entry::Vip(address))
            | Self::OpenVip(address)
            | Self::CloseVip(address)
            | Self::BindAddress(address)
            | Self::UnbindAddress(address) => Key::Address(*address),
            Self::AddRoute(range) | Self::RemoveRoute(range) => Key::of_route(range),
            Self::AddEntry(entry) | Self::RemoveEntry(entry) => Key::Entry(*entry),
            Self::SetFrontEnd(front_end, ..)
            | Self::ForgetFrontEnd(front_end, _)
            | Self::AddVirtualServer(front_end, _)
            | Self::SetVirtualServer(front_end, _)
            | Self::AddRealServer(front_end, _)
            | Self::SetRealServer(front_end, _)
            | Self::DrainRealServer(front_end, _)
            | Self::DeleteRealServer(front_end, _)
            | Self::DeleteVirtualServer(front_end) => Key::Server(*front_end),
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuildFilter { ruleset, .. } => {
                write!(f, "make the {} table kube-ipvs of nf_tables", ruleset.family())
            }
            Self::SetSources(service, family, _) => write!(f, "set the {family} source ranges of Service {service}"),
            Self::SetFrontEnd(front_end, ..) => write!(f, "set the packet filter for {front_end}"),
            Self::AddEntry(entry) => write!(f, "add {entry} to the packet filter"),
            Self::ForgetFrontEnd(front_end, _) => write!(f, "clear the packet filter for {front_end}"),
            Self::RemoveEntry(entry) => write!(f, "delete {entry} from the packet filter"),
            Self::OpenVip(address) => write!(f, "add VIP {address} to the packet filter"),
            Self::CloseVip(address) => write!(f, "delete VIP {address} from the packet filter"),
            Self::RemoveSources(service, family) => write!(f, "delete the {family} source ranges of Service {service}"),
            Self::ClearFlows(front_end, _) => write!(f, "delete what was tracked of {front_end} before it was served"),
            Self::FlushFlows(front_end, _) => write!(f, "delete stale flows to {front_end}"),
            Self::AddDevice => write!(f, "add device kube-ipvs0"),
            Self::RaiseDevice => write!(f, "set kube-ipvs0 up"),
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

/// What is compared, planned and retried as one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// A family's table of the packet filter, but for what follows the Services.
    Filter(Family),
    /// The source ranges of a Service.
    Sources(ObjectName, Family),
    /// A member of one of the packet filter's sets; VIPs are part of their addresses.
    Entry(Entry),
    /// `kube-ipvs0` itself.
    Device,
    /// A virtual server with its real servers, and what the packet filter has for its front end.
    Server(FrontEnd),
    /// A VIP: its address or its own route, and its place in the packet filter.
    Address(IpAddr),
    /// The route of a range of VIPs; that of a single one is part of its address.
    Range(IpNet),
    /// What connection tracking knows of a front end.
    Flows(FrontEnd),
}

impl Key {
    /// That of a route.
    pub(crate) fn of_route(range: &IpNet) -> Self {
        if binding::is_single(range) { Self::Address(range.addr()) } else { Self::Range(*range) }
    }

    /// What kind of thing it is, in a word.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Filter(_) => "filter_table",
            Self::Sources(..) => "source_ranges",
            Self::Entry(_) => "filter_entry",
            Self::Device => "device",
            Self::Server(_) => "virtual_server",
            Self::Address(_) => "address",
            Self::Range(_) => "range",
            Self::Flows(_) => "flows",
        }
    }

    /// Whether all Services of a family depend on it, and not only one.
    pub fn is_whole(&self) -> bool {
        matches!(self, Self::Device | Self::Filter(_) | Self::Range(_))
    }

    /// Whether it is of a family; the device is of both.
    pub fn is_of(&self, family: Family) -> bool {
        match self {
            Self::Filter(of) | Self::Sources(_, of) => *of == family,
            Self::Entry(entry) => entry.family() == family,
            Self::Device => true,
            Self::Server(front_end) | Self::Flows(front_end) => Family::of(front_end.address) == family,
            Self::Address(address) => Family::of(*address) == family,
            Self::Range(range) => binding::family(range) == family,
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Filter(family) => write!(f, "{family} table kube-ipvs of nf_tables"),
            Self::Sources(service, family) => write!(f, "{family} source ranges of Service {service}"),
            Self::Entry(entry) => entry.fmt(f),
            Self::Flows(front_end) => write!(f, "flows to {front_end}"),
            Self::Device => f.write_str("device kube-ipvs0"),
            Self::Server(front_end) => write!(f, "virtual server {front_end}"),
            Self::Address(address) => write!(f, "address {address}"),
            Self::Range(range) => write!(f, "range {range}"),
        }
    }
}

/// Operations, sorted by phase.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    operations: Vec<Operation>,
}

impl Plan {
    /// Nothing to do?
    pub fn is_empty(&self) -> bool {
        self.operations.is_empty()
    }

    /// Splits off the operations from a phase on.
    #[must_use]
    pub fn split_off(&mut self, phase: Phase) -> Self {
        let place = self.operations.partition_point(|operation| operation.phase() < phase);
        Self { operations: self.operations.split_off(place) }
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
    /// Within a phase the order stays.
    fn from_iter<I: IntoIterator<Item = Operation>>(operations: I) -> Self {
        let mut operations: Vec<_> = operations.into_iter().collect();
        operations.sort_by_key(Operation::phase);
        Self { operations }
    }
}
