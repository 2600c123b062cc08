//! The reconciler: takes changes in, and brings the kernel to what they ask for. Synchronous, and without a clock of its
//! own: the caller says what time it is.

mod draining;
mod execute;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use ipnet::IpNet;
use ipvs_netlink::Family;
use service_watch::{Change, ObjectName, Protocol};

use crate::backoff::Backoff;
use crate::binding;
use crate::bootstrap::{API_SERVER, is_bootstrap_service};
use crate::contribution::{Contribution, TrafficDirection};
use crate::desired_state::DesiredState;
use crate::diff::{DiffContext, Retention, diff};
use crate::filter::ruleset::Ruleset;
use crate::front_end::FrontEnd;
use crate::kernel::{Kernel, KernelError, Scope};
use crate::mirror::Mirror;
use crate::node::NodeView;
use crate::plan::Key;
use crate::policy::{DetectLocal, NodePortAddresses, Policy};
use crate::report::{OperationCounts, SyncReport, Totals};
use crate::table::{Dirty, ServiceTable};
use draining::Draining;

/// A key whose last operation failed.
#[derive(Clone, Debug)]
struct Pending {
    again: Backoff,
    error: String,
    /// Whether it was as desired before, and somebody else changed it.
    is_drift: bool,
}

/// Brings a kernel to what Services ask for.
#[derive(Debug)]
pub struct Reconciler<K> {
    kernel: K,
    policy: Policy,
    /// The Service whose endpoints are API servers.
    api_server: ObjectName,
    table: ServiceTable,
    /// Addresses of all interfaces but `kube-ipvs0`, as they were last read.
    interfaces: BTreeSet<IpAddr>,
    /// Whether they have changed since.
    are_interfaces_stale: bool,
    node: NodeView,
    /// The constant part of the packet filter, one for each family.
    rulesets: Vec<Arc<Ruleset>>,
    /// Ranges that have a route and are to have none: they are guarded for as long as they have.
    stray_ranges: Vec<IpNet>,
    desired: DesiredState,
    /// `None` before the first dump, and after a failure that leaves open what the kernel holds.
    mirror: Option<Mirror>,
    dirty_services: BTreeSet<ObjectName>,
    is_node_dirty: bool,
    dirty: BTreeSet<Key>,
    pending: BTreeMap<Key, Pending>,
    draining: Draining,
    /// Since when real servers are known to drain, where there is a limit to it. After a restart it begins anew.
    drain_since: BTreeMap<FrontEnd, BTreeMap<SocketAddr, Instant>>,
    /// When the slices that changed since the last sync began to say what they say.
    triggers: Vec<(Family, SystemTime)>,
    bootstrap: Bootstrap,
}

/// What is done before the source has said everything.
#[derive(Debug, Default)]
struct Bootstrap {
    /// Urgent Services that changed.
    changed: BTreeSet<ObjectName>,
    /// Whether the kernel has been read: the first audit then compares with that.
    is_read: bool,
    applied: OperationCounts,
}

impl<K: Kernel> Reconciler<K> {
    /// One that knows nothing yet.
    pub fn new(kernel: K, policy: Policy) -> Self {
        let node = NodeView::default();
        Self {
            kernel,
            rulesets: rulesets(&policy, &node, &[]),
            stray_ranges: Vec::new(),
            policy,
            api_server: ObjectName::new(API_SERVER.0, API_SERVER.1),
            table: ServiceTable::default(),
            interfaces: BTreeSet::new(),
            are_interfaces_stale: false,
            node,
            desired: DesiredState::default(),
            mirror: None,
            dirty_services: BTreeSet::new(),
            is_node_dirty: true,
            dirty: BTreeSet::new(),
            pending: BTreeMap::new(),
            draining: Draining::default(),
            drain_since: BTreeMap::new(),
            triggers: Vec::new(),
            bootstrap: Bootstrap::default(),
        }
    }

    /// Takes in a change. Nothing reaches the kernel before the next sync.
    pub fn apply(&mut self, change: Change) {
        let trigger = match &change {
            Change::Slice(slice) => {
                let family = if slice.is_ipv6 { Family::Ipv6 } else { Family::Ipv4 };
                slice.trigger_time.map(|at| (family, at))
            }
            _ => None,
        };
        match self.table.apply(change) {
            Dirty::Services(names) => {
                self.triggers.extend(trigger.filter(|_| !names.is_empty()));
                if !self.table.is_synced() {
                    let bootstrap: Vec<_> = names.iter().filter(|name| self.is_bootstrap_name(name)).cloned().collect();
                    self.bootstrap.changed.extend(bootstrap);
                }
                self.is_node_dirty |= names.contains(&self.api_server);
                self.dirty_services.extend(names);
            }
            Dirty::Node => self.is_node_dirty = true,
            Dirty::All => {
                let held = self.mirror.iter().flat_map(Mirror::keys);
                self.dirty.extend(held);
            }
        }
    }

    /// Takes note that addresses of the node's interfaces have changed; the next sync reads them.
    pub fn interfaces_changed(&mut self) {
        self.are_interfaces_stale = true;
    }

    /// Whether enough is known to program anything: half a picture would delete what is right.
    pub fn is_ready(&self) -> bool {
        self.table.is_synced()
    }

    /// Whether the source has something it could not understand even once.
    pub fn is_incomplete(&self) -> bool {
        self.table.is_incomplete()
    }

    /// Whether a sync has changes to look at.
    pub fn is_dirty(&self) -> bool {
        self.is_node_dirty || self.are_interfaces_stale || !self.dirty_services.is_empty() || !self.dirty.is_empty()
    }

    /// When a failed operation or a draining real server is due for another look.
    pub fn next_check(&self) -> Option<Instant> {
        let pending = self.pending.values().map(|pending| pending.again.due);
        pending.chain(self.draining.next_check()).min()
    }

    /// Whether what is configured takes something of the own Node that is not known yet: its addresses for NodePorts, or
    /// the ranges of its pods.
    pub fn is_missing_node_data(&self) -> bool {
        let node = self.table.node();
        let needs_addresses =
            self.policy.node_port_addresses == NodePortAddresses::Primary && self.policy.bind_address.is_none();
        (needs_addresses && node.is_none_or(|node| node.addresses.is_empty()))
            || (self.policy.detect_local == DetectLocal::NodeCidr && node.is_none_or(|node| node.pod_cidrs.is_empty()))
    }

    /// The kernel, to be tampered with.
    pub fn kernel_mut(&mut self) -> &mut K {
        &mut self.kernel
    }

    /// Brings to the kernel what changed, what failed and is due again, and what has drained. Reads nothing but the
    /// virtual servers that drain. The first sync is an audit.
    pub fn sync(&mut self, now: Instant) -> Result<SyncReport, KernelError> {
        if self.mirror.is_none() || self.bootstrap.is_read {
            return self.audit(now);
        }
        let mut report = SyncReport::default();
        if self.are_interfaces_stale {
            let observed = self.kernel.dump(Scope::Interfaces)?;
            self.set_interfaces(observed.interfaces);
        }
        self.recompute_changed(&mut report);
        let mut keys = std::mem::take(&mut self.dirty);
        keys.extend(self.pending.iter().filter(|(_, pending)| pending.again.due <= now).map(|(key, _)| key.clone()));
        // What drains is read before it is looked at, when its time has come and when something else about it is due.
        let named = keys.iter().filter_map(|key| match key {
            Key::VirtualServer(front_end) if self.draining.contains(front_end) => Some(*front_end),
            _ => None,
        });
        let mut drained: Vec<FrontEnd> = named.chain(self.draining.due(now)).collect();
        drained.sort_unstable();
        drained.dedup();
        let looked = self.refresh(&drained);
        keys.extend(drained.into_iter().map(Key::VirtualServer));
        if let Err(error) = looked {
            // Unread, they would be planned from a stale mirror.
            self.dirty = keys;
            return Err(error);
        }
        self.execute(keys, PlanReason::Change, now, &mut report);
        self.finish_report(&mut report);
        Ok(report)
    }

    /// Serves the API server and DNS while the source is still saying what there is, which takes its time in a large
    /// cluster. Nothing is taken away for that: what is missing may come. `None` where there is nothing to be done.
    pub fn sync_bootstrap(&mut self, now: Instant) -> Result<Option<SyncReport>, KernelError> {
        if self.is_ready() || self.table.node().is_none() || self.is_missing_node_data() {
            return Ok(None);
        }
        let has_endpoints = |name: &ObjectName| {
            let entry = self.table.get(name).filter(|entry| entry.service.is_some());
            entry.is_some_and(|entry| entry.slices.values().any(|slice| slice.endpoints.iter().any(|it| it.ready)))
        };
        let names: BTreeSet<ObjectName> =
            self.bootstrap.changed.iter().filter(|name| has_endpoints(name)).cloned().collect();
        if names.is_empty() {
            return Ok(None);
        }
        self.bootstrap.changed.retain(|name| !names.contains(name));
        if self.mirror.is_none() {
            self.read()?;
            self.bootstrap.is_read = true;
        }
        self.update_node();
        if !self.can_bootstrap() {
            return Ok(None);
        }
        let mut report = SyncReport { applied: self.bootstrap.applied, ..SyncReport::default() };
        self.recompute(&names, &mut report);
        let mut keys = std::mem::take(&mut self.dirty);
        keys.extend(self.filters().chain([Key::Device]).chain(self.ranges()));
        self.execute(keys, PlanReason::Dump, now, &mut report);
        self.bootstrap.applied = report.applied;
        Ok(Some(report))
    }

    /// Whether one Service can be put in before the others are known: on a cold node, or beside tables that are as they should
    /// be. Where somebody is served without them, they come with all that belongs in them: a guarded range would refuse the rest.
    fn can_bootstrap(&self) -> bool {
        let Some(mirror) = &self.mirror else { return false };
        self.rulesets.iter().all(|ruleset| match mirror.ruleset(ruleset.family()) {
            None => !mirror.has_servers(),
            held => held == Some(ruleset.fingerprint()),
        })
    }

    /// Reads everything from the kernel.
    fn read(&mut self) -> Result<(), KernelError> {
        let mut observed = self.kernel.dump(Scope::All)?;
        self.set_interfaces(std::mem::take(&mut observed.interfaces));
        self.mirror = Some(Mirror::from_dump(observed));
        self.find_stray_ranges();
        Ok(())
    }

    /// Reads everything from the kernel and repairs what is otherwise than desired.
    pub fn audit(&mut self, now: Instant) -> Result<SyncReport, KernelError> {
        // A reading for those who were served ahead is as old as the listing is long.
        let is_read = std::mem::take(&mut self.bootstrap.is_read) && self.mirror.is_some();
        let is_first_audit = is_read || self.mirror.is_none();
        let applied = std::mem::take(&mut self.bootstrap).applied;
        let mut report = SyncReport { is_audit: true, is_first_audit, applied, ..SyncReport::default() };
        if !is_read {
            self.read()?;
        } else if self.are_interfaces_stale {
            let observed = self.kernel.dump(Scope::Interfaces)?;
            self.set_interfaces(observed.interfaces);
        }
        self.recompute_changed(&mut report);
        let mut changed = std::mem::take(&mut self.dirty);
        if is_first_audit {
            changed.clear();
        }
        let (mut keys, drifted_keys) = self.keys_to_repair(&changed, now);
        let first = if is_first_audit {
            let unowned = self.mirror.iter().flat_map(Mirror::unowned);
            report.foreign_servers = unowned.filter(|front_end| self.desired.owner(front_end).is_none()).count();
            // An agent that was killed may have deleted a real server and not its flows.
            let udp = self.desired.front_ends().filter(|front_end| front_end.protocol == Protocol::Udp);
            keys.extend(udp.copied().map(Key::Flows));
            let (bootstrap, rest) = keys.into_iter().partition(|key| self.is_bootstrap_service(key));
            keys = rest;
            (bootstrap, PlanReason::Dump)
        } else {
            report.drifted_keys = drifted_keys;
            (changed, PlanReason::Change)
        };
        self.execute(first.0, first.1, now, &mut report);
        // A socket that failed leaves the mirror open: the rest waits for the next reading.
        if self.mirror.is_some() {
            self.execute(keys, PlanReason::Dump, now, &mut report);
        }
        for key in &report.drifted_keys {
            if let Some(pending) = self.pending.get_mut(key) {
                pending.is_drift = true;
            }
        }
        self.finish_report(&mut report);
        Ok(report)
    }

    /// What is to be told when all is done.
    fn finish_report(&mut self, report: &mut SyncReport) {
        report.trigger_times = std::mem::take(&mut self.triggers);
        report.kernel_stats = self.kernel.take_stats();
        for (key, pending) in &self.pending {
            let is_node_wide = key.is_node_wide();
            if is_node_wide || pending.is_drift {
                report.unrepaired.extend(self.policy.families.iter().filter(|family| key.is_of_family(*family)));
            }
        }
        let draining = if self.mirror.is_some() { self.draining.count() } else { 0 };
        debug_assert_eq!(
            draining,
            self.draining.front_ends().map(|front_end| self.unwanted_count(front_end)).sum::<usize>()
        );
        let without_local =
            |direction| [Family::Ipv4, Family::Ipv6].map(|family| self.desired.without_local(direction, family));
        report.totals = Totals {
            services: self.desired.service_count(),
            virtual_servers: self.desired.server_count(),
            real_servers: self.mirror.as_ref().map_or(0, Mirror::real_server_count),
            vips: self.desired.vip_count(),
            draining,
            failing: self.pending.len(),
            internal_without_local: without_local(TrafficDirection::Internal),
            external_without_local: without_local(TrafficDirection::External),
        };
    }

    /// How many real servers a virtual server has that are not wanted.
    fn unwanted_count(&self, front_end: &FrontEnd) -> usize {
        let Some(held) = self.mirror.as_ref().and_then(|mirror| mirror.server(front_end)) else { return 0 };
        let wanted = self.desired.real_servers(front_end);
        held.real_servers.places().iter().filter(|address| wanted.binary_search(address).is_err()).count()
    }

    fn set_interfaces(&mut self, interfaces: BTreeSet<IpAddr>) {
        self.are_interfaces_stale = false;
        if self.interfaces != interfaces {
            self.interfaces = interfaces;
            self.is_node_dirty = true;
        }
    }

    /// Recomputes the contributions of all Services that changed.
    fn recompute_changed(&mut self, report: &mut SyncReport) {
        let mut names = std::mem::take(&mut self.dirty_services);
        if self.update_node() {
            // Beside those that are gone from the table.
            names.extend(self.table.names().cloned());
        }
        self.recompute(&names, report);
    }

    /// Takes in what is known of the node, and says whether that changed anything.
    fn update_node(&mut self) -> bool {
        if !std::mem::take(&mut self.is_node_dirty) {
            return false;
        }
        // Of the slices only the one that API servers write themselves, again and again: whoever may write slices in that
        // namespace could otherwise make anybody an API server.
        let kubernetes = self.table.get(&self.api_server).and_then(|entry| entry.slices.get(&self.api_server));
        let api_servers = kubernetes.into_iter().flat_map(|slice| slice.endpoints.iter().map(|it| it.address));
        let neighbours = self.table.neighbours();
        let node = NodeView::new(self.table.node(), neighbours, api_servers, &self.interfaces, &self.policy);
        if node == self.node {
            return false;
        }
        self.node = node;
        if self.rebuild_rulesets() {
            self.dirty.extend(self.policy.families.iter().map(Key::Table));
        }
        true
    }

    fn recompute(&mut self, names: &BTreeSet<ObjectName>, report: &mut SyncReport) {
        for name in names {
            let entry = self.table.get(name);
            let contribution = entry.map(|entry| Contribution::of(entry, &self.node, &self.policy)).unwrap_or_default();
            let service = entry.and_then(|entry| entry.service.as_deref());
            // What was told already is not told again.
            let (refused, told) = self
                .desired
                .contribution(name)
                .map_or((&[][..], &[][..]), |before| (before.refused_vips.as_slice(), before.health_checks.as_slice()));
            let new = contribution.refused_vips.iter().filter(|vip| !refused.contains(vip));
            report.refused_vips.extend(new.map(|(vip, holder)| (name.clone(), *vip, *holder)));
            if told != contribution.health_checks {
                report.health_checks.push((name.clone(), contribution.health_checks.clone()));
            }
            self.desired.update(name, service, contribution, &mut self.dirty, &mut report.conflicts);
        }
    }

    /// Whether the constant part of the packet filter is otherwise than before.
    fn rebuild_rulesets(&mut self) -> bool {
        let rulesets = rulesets(&self.policy, &self.node, &self.stray_ranges);
        let is_otherwise = rulesets != self.rulesets;
        if is_otherwise {
            self.rulesets = rulesets;
        }
        is_otherwise
    }

    /// Finds the ranges whose routes are to go. Returns whether the packet filter is to change with that.
    fn find_stray_ranges(&mut self) -> bool {
        let wanted = self.policy.binding.ranges();
        let held = self.mirror.iter().flat_map(Mirror::routed_ranges);
        self.stray_ranges = held.filter(|range| !wanted.contains(range)).copied().collect();
        self.rebuild_rulesets()
    }

    fn filters(&self) -> impl Iterator<Item = Key> {
        self.policy.families.iter().map(Key::Table)
    }

    /// The ranges that are to have routes.
    fn ranges(&self) -> impl Iterator<Item = Key> {
        let ranges = self.policy.binding.ranges().iter();
        ranges.filter(|range| self.policy.families.contains(binding::family(range))).copied().map(Key::VipRange)
    }

    fn refresh(&mut self, front_ends: &[FrontEnd]) -> Result<(), KernelError> {
        if let Some(mirror) = &mut self.mirror
            && !front_ends.is_empty()
        {
            mirror.refresh(front_ends, self.kernel.dump(Scope::Servers(front_ends))?);
        }
        Ok(())
    }

    /// Of everything that is held or desired, the keys that something is to be done about, or that are to be looked at
    /// anyway; and those of them that need operations although nothing changed them and nothing about them was pending.
    fn keys_to_repair(&self, changed: &BTreeSet<Key>, now: Instant) -> (BTreeSet<Key>, Vec<Key>) {
        let (mut keys, mut drifted_keys) = (Vec::new(), BTreeSet::new());
        let Some(mirror) = &self.mirror else { return (BTreeSet::new(), Vec::new()) };
        let is_overdue = |front_end: &FrontEnd, address| self.is_overdue(front_end, address, now);
        let retention = retention(PlanReason::Dump, &self.table, &self.policy);
        let (rulesets, binding) = (&self.rulesets, &self.policy.binding);
        let context = DiffContext { retention, rulesets, binding, is_overdue: &is_overdue };
        let mut operations = Vec::new();
        let whole = self.filters().chain([Key::Device]).chain(self.ranges());
        let surplus = mirror.keys().filter(|key| !self.desired.wants(key));
        // Of a draining virtual server that neither the kernel nor anybody has any more nothing else tells.
        let draining = self.draining.front_ends().copied().map(Key::VirtualServer);
        // Where a table, the device or a range is to change, what follows for all else shows only then.
        let mut is_all = false;
        for key in whole.chain(self.desired.keys()).chain(surplus).chain(draining) {
            if changed.contains(&key) {
                continue;
            }
            let is_node_wide = matches!(key, Key::Table(_) | Key::Device | Key::VipRange(_));
            let is_known = self.pending.contains_key(&key)
                || matches!(&key, Key::VirtualServer(front_end) if self.draining.contains(front_end));
            operations.clear();
            let is_draining = diff(&key, mirror, &self.desired, context, &mut operations);
            if !is_known && !operations.is_empty() {
                drifted_keys.insert(key.clone());
            }
            is_all |= is_node_wide && !operations.is_empty();
            if is_all || is_node_wide || is_known || is_draining || !operations.is_empty() {
                keys.push(key);
            }
        }
        // Sorted at once, which is quicker than one by one.
        (keys.into_iter().collect(), drifted_keys.into_iter().collect())
    }

    /// Whether a real server has drained for as long as it may.
    fn is_overdue(&self, front_end: &FrontEnd, address: SocketAddr, now: Instant) -> bool {
        let since = self.drain_since.get(front_end).and_then(|since| since.get(&address));
        self.policy.drain_timeout.zip(since).is_some_and(|(timeout, since)| now >= *since + timeout)
    }

    fn is_bootstrap_name(&self, name: &ObjectName) -> bool {
        self.table
            .get(name)
            .and_then(|entry| entry.service.as_ref())
            .is_some_and(|service| is_bootstrap_service(service))
    }

    fn is_bootstrap_service(&self, key: &Key) -> bool {
        let is_bootstrap_service = |name: &ObjectName| self.is_bootstrap_name(name);
        match key {
            Key::Device | Key::Table(_) => true,
            Key::VipRange(range) => self.policy.binding.ranges().contains(range),
            Key::SourceRanges(service, _) => is_bootstrap_service(service),
            Key::VirtualServer(front_end) => self.desired.owner(front_end).is_some_and(is_bootstrap_service),
            Key::Vip(address) => self.desired.claimants(*address).any(is_bootstrap_service),
            Key::SetElement(_) | Key::Flows(_) => false,
        }
    }
}

/// Why a key is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PlanReason {
    /// Something about it changed.
    Change,
    /// Everything was read from the kernel.
    Dump,
}

/// What is kept although nobody wants it: while a source could not understand everything, what was merely found in the
/// kernel may be in the rest. What a change took away was understood.
fn retention<'a>(reason: PlanReason, table: &ServiceTable, policy: &'a Policy) -> Retention<'a> {
    match reason {
        PlanReason::Dump if table.is_incomplete() || !table.is_synced() => Retention::Everything,
        PlanReason::Dump | PlanReason::Change => Retention::Within(&policy.exclude),
    }
}

fn rulesets(policy: &Policy, node: &NodeView, others: &[IpNet]) -> Vec<Arc<Ruleset>> {
    let of = |family| Arc::new(Ruleset::new(family, policy, node).guarding(others));
    policy.families.iter().map(of).collect()
}
