//! The operations that lead from what the kernel holds to the desired state, one key at a time.
//!
//! This is also where the weight of a real server is decided: 1 if it is wanted, 0 while it drains.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use ipvs_netlink::{Change, Family, RealServer, Scheduler};
use service_watch::Protocol;

use crate::binding::{self, VipBinding};
use crate::contribution::DesiredServer;
use crate::desired_state::DesiredState;
use crate::filter::ruleset::Ruleset;
use crate::filter::{FrontEndElements, FrontEndRule, SetElement, TableContents};
use crate::front_end::{FrontEnd, ServerConfig};
use crate::mirror::{Mirror, MirrorServer};
use crate::plan::{Key, Operation};

/// What is retained although no Service wants it.
#[derive(Clone, Copy, Debug)]
pub enum Retention<'a> {
    /// Virtual servers with an address in these ranges.
    ExcludedRanges(&'a [IpNet]),
    /// Everything, since the objects that want it may be missing from the source.
    Everything,
}

impl Retention<'_> {
    fn retains_server(self, front_end: &FrontEnd) -> bool {
        match self {
            Self::ExcludedRanges(ranges) => ranges.iter().any(|range| range.contains(&front_end.address)),
            Self::Everything => true,
        }
    }

    fn is_everything(self) -> bool {
        matches!(self, Self::Everything)
    }
}

/// What a diff depends on besides the mirror and the desired state.
#[derive(Clone, Copy)]
pub struct DiffContext<'a> {
    /// What is retained although no Service wants it.
    pub retention: Retention<'a>,
    /// The constant part of each family's table.
    pub rulesets: &'a [Arc<Ruleset>],
    /// How VIPs are bound to this node.
    pub binding: &'a VipBinding,
    /// Whether a real server has drained for as long as the timeout allows.
    pub is_overdue: &'a dyn Fn(&FrontEnd, SocketAddr) -> bool,
}

impl DiffContext<'_> {
    fn ruleset(&self, family: Family) -> Option<&Arc<Ruleset>> {
        self.rulesets.iter().find(|ruleset| ruleset.family() == family)
    }

    /// Whether the packet filter refuses connections to addresses in the ranges that are not VIPs.
    fn has_guard(&self, family: Family, mirror: &Mirror) -> bool {
        self.ruleset(family).is_some_and(|ruleset| mirror.ruleset(family) == Some(ruleset.fingerprint()))
    }
}

/// Appends the operations that a key needs. Returns whether it has draining real servers. They must be checked again later, since
/// only the kernel knows when their last connection has ended.
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
            // While everything is retained a table cannot be replaced: of its source ranges only fingerprints are known.
            let must_stay = retention.is_everything() && held.is_some();
            if let Some(ruleset) = ruleset
                && held != Some(ruleset.fingerprint())
                && !must_stay
            {
                // If Services are served already, the table is built with all its elements in one transaction. On a node without
                // virtual servers nothing has to be guarded yet, and bootstrap Services do not wait for the others.
                let is_cold = held.is_none() && !mirror.has_servers();
                let mut contents = if is_cold { TableContents::default() } else { desired.contents(*family) };
                // The elements prove that virtual servers are ours. They exist as long as those, even if the agent is killed.
                for front_end in mirror.owned(*family) {
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

/// The element of a VIP in the packet filter. It is added before the VIP is bound and deleted after. In a range with a route it is
/// added after the VIP is served and deleted before.
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
            out.push(Operation::RemoveRoutedVip(address));
        }
        (_, is_wanted) => diff_element(element, is_wanted, mirror, context.retention, out),
    }
}

/// The binding of a VIP. When the kind of binding changes, the new one is added first; the old one is deleted once the mirror has
/// the new one, which takes a second plan.
fn diff_binding(
    address: IpAddr,
    mirror: &Mirror,
    desired: &DesiredState,
    context: DiffContext<'_>,
    out: &mut Vec<Operation>,
) {
    let route = binding::host_range(address);
    let has_guard = || context.has_guard(Family::of(address), mirror);
    // Whether it should have an address, whether a route of its own, and whether any other binding may be deleted.
    let (is_address_wanted, is_route_wanted, may_delete) = match context.binding {
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
    if !is_address_wanted && may_delete && mirror.has_host_address(address) {
        out.push(Operation::UnbindAddress(address));
    }
    if !is_route_wanted && may_delete && mirror.has_route(&route) {
        out.push(Operation::RemoveRoute(route));
    }
}

/// The route of a range. It is added once the packet filter refuses connections to its other addresses, and deleted once each VIP in it
/// has another binding.
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
    let mut within = desired.vips().filter(|address| range.contains(address));
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
            let before = held.cloned().unwrap_or_default();
            // First what is right for the real servers before and after, then, once these have changed, the rest.
            let guarded = wanted.guarded_from(&before);
            if guarded != before {
                out.push(Operation::SetFrontEnd { front_end, before, after: guarded.clone() });
            }
            if guarded != wanted {
                out.push(Operation::SetFrontEnd { front_end, before: guarded, after: wanted });
            }
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
            if mirror.is_owned(&front_end) && !context.retention.retains_server(&front_end) {
                out.push(Operation::DeleteVirtualServer(front_end));
            }
        }
        (Some(held), Some(wanted)) => {
            let config = config_while_draining(front_end, held, wanted);
            if held.config != config {
                out.push(Operation::SetVirtualServer(front_end, config));
            }
            // What another scheduler replaces comes back once nothing drains any more.
            return diff_real_servers(front_end, held, wanted, context, out) || config != wanted.config;
        }
    }
    false
}

/// The configuration of a virtual server. While real servers drain, `dh` is replaced by `rr`: it hashes the VIP, so all connections go
/// to one real server, and are refused while that has weight 0 (`ip_vs_dh_schedule`). It has no fallback flag.
fn config_while_draining(front_end: FrontEnd, held: &MirrorServer, wanted: &DesiredServer) -> ServerConfig {
    let has_unwanted = || {
        let held = held.real_servers.addresses();
        held.iter().any(|address| wanted.real_servers.binary_search(address).is_err())
    };
    if wanted.config.scheduler == Scheduler::DestinationHashing && front_end.protocol == Protocol::Tcp && has_unwanted()
    {
        ServerConfig { scheduler: Scheduler::RoundRobin, ..wanted.config }
    } else {
        wanted.config
    }
}

fn diff_real_servers(
    front_end: FrontEnd,
    held: &MirrorServer,
    wanted: &DesiredServer,
    context: DiffContext<'_>,
    out: &mut Vec<Operation>,
) -> bool {
    if held.real_servers.matches(&wanted.real_servers) {
        return false;
    }
    let mut draining = false;
    let wanted = wanted.real_servers.iter().map(|address| RealServer::new((*address).into()));
    for change in Change::between(held.real_servers.iter().map(|held| held.server), wanted) {
        match change {
            Change::Add(server) => out.push(Operation::AddRealServer(front_end, server)),
            Change::Set(server) => out.push(Operation::SetRealServer(front_end, server)),
            // Weight 0 shows that its removal was decided before.
            Change::Surplus(server) if !context.retention.is_everything() || server.weight == 0 => {
                let address = server.socket_address();
                let is_drained = held.real_servers.get(address).is_some_and(|held| held.is_drained);
                let is_overdue = (context.is_overdue)(&front_end, address);
                draining |= remove_real_server(front_end, server, is_drained || is_overdue, out);
            }
            Change::Surplus(_) => {}
        }
    }
    draining
}

/// Drains or deletes a real server that is not wanted. Returns whether it drains.
///
/// At weight 0 TCP connections continue until they end. UDP and SCTP flows may never end, so their real servers are deleted at
/// once. Connection counts that were read before the weight was 0 do not justify a deletion: a new connection may have been made
/// since.
fn remove_real_server(front_end: FrontEnd, server: RealServer, may_be_deleted: bool, out: &mut Vec<Operation>) -> bool {
    if front_end.protocol != Protocol::Tcp || may_be_deleted {
        out.push(Operation::DeleteRealServer(front_end, server.socket_address()));
        return false;
    }
    if server.weight != 0 {
        out.push(Operation::DrainRealServer(front_end, RealServer { weight: 0, ..server }));
    }
    true
}
