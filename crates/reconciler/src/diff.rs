//! The operations that lead from what the kernel holds to what is desired, one key at a time.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use ipvs_netlink::{Change, Family, RealServer};
use service_watch::Protocol;

use crate::binding::{self, VipBinding};
use crate::contribution::DesiredServer;
use crate::desired_state::DesiredState;
use crate::filter::ruleset::Ruleset;
use crate::filter::{FrontEndElements, FrontEndRule, SetElement, TableContents};
use crate::front_end::FrontEnd;
use crate::mirror::{Mirror, MirrorServer};
use crate::plan::{Key, Operation};

/// What is kept although nobody wants it.
#[derive(Clone, Copy, Debug)]
pub enum Retention<'a> {
    /// Virtual servers with an address in these ranges.
    ExcludedRanges(&'a [IpNet]),
    /// Everything: what seems not to be wanted may be in what could not be read.
    Everything,
}

impl Retention<'_> {
    fn server(self, front_end: &FrontEnd) -> bool {
        match self {
            Self::ExcludedRanges(ranges) => ranges.iter().any(|range| range.contains(&front_end.address)),
            Self::Everything => true,
        }
    }

    fn is_everything(self) -> bool {
        matches!(self, Self::Everything)
    }
}

/// What a diff depends on beside what is and what should be.
#[derive(Clone, Copy)]
pub struct DiffContext<'a> {
    /// What is kept although nobody wants it.
    pub retention: Retention<'a>,
    /// The constant part of each family's table.
    pub rulesets: &'a [Arc<Ruleset>],
    /// How the kernel learns that VIPs are this node's.
    pub binding: &'a VipBinding,
    /// Whether a real server has drained for as long as it may.
    pub is_overdue: &'a dyn Fn(&FrontEnd, SocketAddr) -> bool,
}

impl DiffContext<'_> {
    fn ruleset(&self, family: Family) -> Option<&Arc<Ruleset>> {
        self.rulesets.iter().find(|ruleset| ruleset.family() == family)
    }

    /// Whether the packet filter refuses what goes to no VIP of the ranges.
    fn has_guard(&self, family: Family, mirror: &Mirror) -> bool {
        self.ruleset(family).is_some_and(|ruleset| mirror.ruleset(family) == Some(ruleset.fingerprint()))
    }
}

/// Appends the operations a key needs. Returns whether it has real servers that drain: they need another look later,
/// since only the kernel can tell when their last connection has ended.
pub fn diff(
    key: &Key,
    mirror: &Mirror,
    desired: &DesiredState,
    context: DiffContext<'_>,
    out: &mut Vec<Operation>,
) -> bool {
    let retention = context.retention;
    match key {
        Key::Table(family) => {
            let ruleset = context.ruleset(*family);
            let held = mirror.ruleset(*family);
            // A table cannot be replaced while what is in it must be kept: of source ranges only a fingerprint is known.
            let must_stay = retention.is_everything() && held.is_some();
            if let Some(ruleset) = ruleset
                && held != Some(ruleset.fingerprint())
                && !must_stay
            {
                // Where Services are served already, the table comes with all that belongs in it, in one step. On a cold node
                // nothing is to be guarded yet, and who comes first is not to wait for the rest.
                let is_cold = held.is_none() && !mirror.has_servers();
                let mut contents = if is_cold { TableContents::default() } else { desired.contents(*family) };
                // That they are ours must be known as long as they are there, however soon the agent is killed.
                for front_end in mirror.own(*family) {
                    contents.front_ends.entry(*front_end).or_insert(FrontEndRule::OPEN);
                }
                let (ruleset, contents) = (ruleset.clone(), Arc::new(contents));
                out.push(Operation::BuildTable { ruleset, replaces: held.is_some(), contents });
            }
        }
        Key::SourceRanges(service, family) => {
            let held = mirror.source_ranges(service, *family);
            match desired.source_ranges(service, *family) {
                Some(ranges) if held != Some(ranges.fingerprint()) => {
                    out.push(Operation::SetSourceRanges(service.clone(), *family, ranges.clone()));
                }
                None if held.is_some() && !retention.is_everything() => {
                    out.push(Operation::RemoveSourceRanges(service.clone(), *family));
                }
                _ => {}
            }
        }
        Key::SetElement(element) => diff_element(*element, desired.wants_element(element), mirror, retention, out),
        Key::Device => {
            if !mirror.has_device() {
                out.push(Operation::AddDevice);
            }
            if context.binding.is_routes() && !mirror.accepts_routes() {
                out.push(Operation::SetDeviceUp);
            }
        }
        Key::Vip(address) => {
            diff_vip(*address, mirror, desired, context, out);
            diff_binding(*address, mirror, desired, context, out);
        }
        Key::VipRange(range) => diff_range(range, mirror, desired, context, out),
        Key::VirtualServer(front_end) => return diff_server(*front_end, mirror, desired, context, out),
        Key::Flows(front_end) => out.push(Operation::DeleteStaleFlows(*front_end, desired.real_servers(front_end))),
    }
    false
}

fn diff_element(
    element: SetElement,
    is_wanted: bool,
    mirror: &Mirror,
    retention: Retention<'_>,
    out: &mut Vec<Operation>,
) {
    match (mirror.has_element(&element), is_wanted) {
        (false, true) => out.push(Operation::AddElement(element)),
        (true, false) if !retention.is_everything() => out.push(Operation::RemoveElement(element)),
        _ => {}
    }
}

/// What the packet filter is to know of a VIP: before it is bound and after, or where its range has a route, last and first.
fn diff_vip(
    address: IpAddr,
    mirror: &Mirror,
    desired: &DesiredState,
    context: DiffContext<'_>,
    out: &mut Vec<Operation>,
) {
    let element = SetElement::Vip(address);
    let is_routed = || mirror.routed_ranges().any(|range| range.contains(&address));
    let is_to_be_routed =
        || context.binding.range_of(address).is_some() && context.has_guard(Family::of(address), mirror);
    match (mirror.has_element(&element), desired.wants_vip(address)) {
        (false, true) if is_routed() || is_to_be_routed() => out.push(Operation::AddRoutedVip(address)),
        (true, false) if is_routed() && !context.retention.is_everything() => {
            out.push(Operation::RemoveRoutedVip(address))
        }
        (_, is_wanted) => diff_element(element, is_wanted, mirror, context.retention, out),
    }
}

/// What makes a VIP this node's. It changes by way of being so twice: what is no longer needed goes once something else is
/// known to do, so it takes a second look.
fn diff_binding(
    address: IpAddr,
    mirror: &Mirror,
    desired: &DesiredState,
    context: DiffContext<'_>,
    out: &mut Vec<Operation>,
) {
    let route = binding::host_range(address);
    let has_guard = || context.has_guard(Family::of(address), mirror);
    // Whether it is to have an address, whether a route of its own, and whether what else it has may go.
    let (is_address_wanted, is_route_wanted, may_go) = match context.binding {
        _ if !desired.wants_vip(address) => (false, false, !context.retention.is_everything()),
        VipBinding::Addresses => (true, false, mirror.has_address(address)),
        VipBinding::Routes(_) => match context.binding.range_of(address) {
            Some(range) if mirror.has_route(range) => (false, false, true),
            Some(_) if has_guard() => (false, false, false),
            _ => (false, true, mirror.has_route(&route)),
        },
    };
    if is_address_wanted && !mirror.has_address(address) {
        out.push(Operation::BindAddress(address));
    }
    if is_route_wanted && !mirror.has_route(&route) {
        out.push(Operation::AddRoute(route));
    }
    if !is_address_wanted && may_go && mirror.has_host_address(address) {
        out.push(Operation::UnbindAddress(address));
    }
    if !is_route_wanted && may_go && mirror.has_route(&route) {
        out.push(Operation::RemoveRoute(route));
    }
}

/// The route of a range. It comes once the packet filter refuses what goes to no VIP in it, and goes once each VIP in it is
/// bound by something else.
fn diff_range(
    range: &IpNet,
    mirror: &Mirror,
    desired: &DesiredState,
    context: DiffContext<'_>,
    out: &mut Vec<Operation>,
) {
    if context.binding.ranges().contains(range) {
        if !mirror.has_route(range) && context.has_guard(binding::family(range), mirror) {
            out.push(Operation::AddRoute(*range));
        }
        return;
    }
    let is_bound = |address: IpAddr| match context.binding {
        VipBinding::Addresses => mirror.has_address(address),
        VipBinding::Routes(_) => {
            let other = context.binding.range_of(address);
            other.is_some_and(|other| mirror.has_route(other)) || mirror.has_route(&binding::host_range(address))
        }
    };
    let mut within = desired.addresses().filter(|address| range.contains(address));
    if mirror.has_route(range) && !context.retention.is_everything() && within.all(is_bound) {
        out.push(Operation::RemoveRoute(*range));
    }
}

fn diff_server(
    front_end: FrontEnd,
    mirror: &Mirror,
    desired: &DesiredState,
    context: DiffContext<'_>,
    out: &mut Vec<Operation>,
) -> bool {
    let wanted = desired.server(&front_end);
    match (mirror.front_end(&front_end), wanted.map(|wanted| FrontEndElements::from(&wanted.rule))) {
        (held, Some(wanted)) if held != Some(&wanted) => {
            out.push(Operation::SetFrontEnd { front_end, before: held.cloned().unwrap_or_default(), after: wanted });
        }
        (Some(held), None) if !context.retention.is_everything() => {
            out.push(Operation::RemoveFrontEnd(front_end, held.clone()));
        }
        _ => {}
    }
    match (mirror.server(&front_end), wanted) {
        (None, None) => {}
        (None, Some(wanted)) => {
            out.push(Operation::AddVirtualServer(front_end, wanted.config));
            let real_servers = wanted.real_servers.iter();
            out.extend(
                real_servers.map(|address| Operation::AddRealServer(front_end, RealServer::new((*address).into()))),
            );
        }
        (Some(_), None) => {
            if mirror.is_owned(&front_end) && !context.retention.server(&front_end) {
                out.push(Operation::DeleteVirtualServer(front_end));
            }
        }
        (Some(held), Some(wanted)) => {
            if held.config != wanted.config {
                out.push(Operation::SetVirtualServer(front_end, wanted.config));
            }
            return diff_real_servers(front_end, held, wanted, context, out);
        }
    }
    false
}

fn diff_real_servers(
    front_end: FrontEnd,
    held: &MirrorServer,
    wanted: &DesiredServer,
    context: DiffContext<'_>,
    out: &mut Vec<Operation>,
) -> bool {
    if held.real_servers.are(&wanted.real_servers) {
        return false;
    }
    let mut draining = false;
    let wanted = wanted.real_servers.iter().map(|address| RealServer::new((*address).into()));
    for change in Change::between(held.real_servers.iter().map(|held| held.server), wanted) {
        match change {
            Change::Add(server) => out.push(Operation::AddRealServer(front_end, server)),
            Change::Set(server) => out.push(Operation::SetRealServer(front_end, server)),
            // Weight 0 says that its removal was decided before.
            Change::Surplus(server) if !context.retention.is_everything() || server.weight == 0 => {
                let address = server.socket_address();
                let is_drained = held.real_servers.get(address).is_some_and(|held| held.is_drained);
                let is_overdue = (context.is_overdue)(&front_end, address);
                draining |= remove(front_end, server, is_drained || is_overdue, out);
            }
            Change::Surplus(_) => {}
        }
    }
    draining
}

/// A real server that is not wanted. Returns whether it drains.
///
/// TCP connections live on at weight 0 until they end. UDP and SCTP flows would never let go, so their real servers are
/// deleted at once. Nothing is deleted on the ground of connection counts read before its weight was 0: a connection may
/// have come since.
fn remove(front_end: FrontEnd, server: RealServer, is_over: bool, out: &mut Vec<Operation>) -> bool {
    if front_end.protocol != Protocol::Tcp || is_over {
        out.push(Operation::DeleteRealServer(front_end, server.socket_address()));
        return false;
    }
    if server.weight != 0 {
        out.push(Operation::DrainRealServer(front_end, RealServer { weight: 0, ..server }));
    }
    true
}
