//! The operations that lead from what the kernel holds to what is desired, one key at a time.

use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;
use ipvs_netlink::{Change, RealServer};
use service_watch::Protocol;

use crate::contribution::WantedServer;
use crate::desired::Desired;
use crate::filter::ruleset::Ruleset;
use crate::filter::{Contents, Elements, Entry};
use crate::front_end::FrontEnd;
use crate::mirror::{Mirror, MirrorServer};
use crate::plan::{Key, Operation};

/// What is kept although nobody wants it.
#[derive(Clone, Copy, Debug)]
pub enum Keeps<'a> {
    /// Virtual servers with an address in these ranges.
    Within(&'a [IpNet]),
    /// Everything: what seems not to be wanted may be in what could not be read.
    Everything,
}

impl Keeps<'_> {
    fn server(self, front_end: &FrontEnd) -> bool {
        match self {
            Self::Within(ranges) => ranges.iter().any(|range| range.contains(&front_end.address)),
            Self::Everything => true,
        }
    }

    fn is_everything(self) -> bool {
        matches!(self, Self::Everything)
    }
}

/// What a diff depends on beside what is and what should be.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// What is kept although nobody wants it.
    pub keeps: Keeps<'a>,
    /// The constant part of each family's table.
    pub rulesets: &'a [Arc<Ruleset>],
    /// Whether a real server has drained for as long as it may.
    pub is_overdue: &'a dyn Fn(&FrontEnd, SocketAddr) -> bool,
}

/// Appends the operations a key needs. Returns whether it has real servers that drain: they need another look later,
/// since only the kernel can tell when their last connection has ended.
pub fn diff(key: &Key, mirror: &Mirror, desired: &Desired, context: Context<'_>, out: &mut Vec<Operation>) -> bool {
    let keeps = context.keeps;
    match key {
        Key::Filter(family) => {
            let ruleset = context.rulesets.iter().find(|ruleset| ruleset.family() == *family);
            let held = mirror.ruleset(*family);
            // A table cannot be replaced while what is in it must be kept: of source ranges only a fingerprint is known.
            let must_stay = keeps.is_everything() && held.is_some();
            if let Some(ruleset) = ruleset
                && held != Some(ruleset.fingerprint())
                && !must_stay
            {
                // Where Services are served already, the table comes with all that belongs in it, in one step. On a cold node
                // nothing is to be guarded yet, and who comes first is not to wait for the rest.
                let is_cold = held.is_none() && !mirror.has_servers();
                let contents = if is_cold { Contents::default() } else { desired.contents(*family) };
                let (ruleset, contents) = (ruleset.clone(), Arc::new(contents));
                out.push(Operation::BuildFilter { ruleset, replaces: held.is_some(), contents });
            }
        }
        Key::Sources(service, family) => {
            let held = mirror.sources(service, *family);
            match desired.sources(service, *family) {
                Some(ranges) if held != Some(ranges.fingerprint()) => {
                    out.push(Operation::SetSources(service.clone(), *family, ranges.clone()));
                }
                None if held.is_some() && !keeps.is_everything() => {
                    out.push(Operation::RemoveSources(service.clone(), *family));
                }
                _ => {}
            }
        }
        Key::Entry(entry) => diff_entry(*entry, desired.wants_entry(entry), mirror, keeps, out),
        Key::Device => {
            if !mirror.has_device() {
                out.push(Operation::AddDevice);
            }
        }
        Key::Address(address) => {
            diff_entry(Entry::Vip(*address), desired.wants_address(*address), mirror, keeps, out);
            match (mirror.has_address(*address), desired.wants_address(*address)) {
                (false, true) => out.push(Operation::BindAddress(*address)),
                (true, false) if mirror.has_own_address(*address) && !keeps.is_everything() => {
                    out.push(Operation::UnbindAddress(*address));
                }
                _ => {}
            }
        }
        Key::Server(front_end) => return diff_server(*front_end, mirror, desired, context, out),
        Key::Flows(front_end) => out.push(Operation::FlushFlows(*front_end, desired.real_servers(front_end))),
    }
    false
}

fn diff_entry(entry: Entry, is_wanted: bool, mirror: &Mirror, keeps: Keeps<'_>, out: &mut Vec<Operation>) {
    match (mirror.has_entry(&entry), is_wanted) {
        (false, true) => out.push(Operation::AddEntry(entry)),
        (true, false) if !keeps.is_everything() => out.push(Operation::RemoveEntry(entry)),
        _ => {}
    }
}

fn diff_server(
    front_end: FrontEnd,
    mirror: &Mirror,
    desired: &Desired,
    context: Context<'_>,
    out: &mut Vec<Operation>,
) -> bool {
    let wanted = desired.server(&front_end);
    match (mirror.front_end(&front_end), wanted.map(|wanted| Elements::from(&wanted.rule))) {
        (held, Some(wanted)) if held != Some(&wanted) => {
            out.push(Operation::SetFrontEnd(front_end, held.cloned().unwrap_or_default(), wanted));
        }
        (Some(held), None) if !context.keeps.is_everything() => {
            out.push(Operation::ForgetFrontEnd(front_end, held.clone()));
        }
        _ => {}
    }
    match (mirror.server(&front_end), wanted) {
        (None, None) => {}
        (None, Some(wanted)) => {
            out.push(Operation::AddVirtualServer(front_end, wanted.config));
            let real_servers = wanted.real_servers.iter();
            out.extend(real_servers.map(|address| Operation::AddRealServer(front_end, RealServer::new(*address))));
        }
        (Some(_), None) => {
            if !context.keeps.server(&front_end) {
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
    wanted: &WantedServer,
    context: Context<'_>,
    out: &mut Vec<Operation>,
) -> bool {
    let mut draining = false;
    let wanted = wanted.real_servers.iter().copied().map(RealServer::new);
    for change in Change::between(held.real_servers.iter().map(|held| held.server), wanted) {
        match change {
            Change::Add(server) => out.push(Operation::AddRealServer(front_end, server)),
            Change::Set(server) => out.push(Operation::SetRealServer(front_end, server)),
            // Weight 0 says that its removal was decided before.
            Change::Surplus(server) if !context.keeps.is_everything() || server.weight == 0 => {
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
