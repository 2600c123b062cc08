//! The reconciler: receives changes and brings the kernel to the state that they describe. It is synchronous and reads no
//! clock: the caller passes the time.

mod audit;
mod backlog;
mod bootstrap;
mod draining;
mod execute;
mod guard;
mod parts;
mod probe;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use ipnet::IpNet;
use ipvs_netlink::Family;
use service_watch::panics::{caught, point};
use service_watch::{Change, ObjectName, Service};
use tracing::error;

use crate::backoff::Backoff;
use crate::binding;
use crate::bootstrap::API_SERVER;
use crate::budget::PART_OPERATIONS;
use crate::contribution::Contribution;
use crate::desired_state::{DesiredState, FrontEndConflict};
use crate::diff::Retention;
use crate::filter::ruleset::Ruleset;
use crate::front_end::FrontEnd;
use crate::kernel::{Kernel, KernelError, Scope};
use crate::mirror::Mirror;
use crate::node::NodeView;
use crate::plan::Key;
use crate::policy::{DetectLocal, NodePortAddresses, PodAddresses, Policy};
use crate::report::SyncReport;
use crate::table::{Dirty, ServiceEntry, ServiceTable};
use backlog::Backlog;
use bootstrap::Bootstrap;
use draining::Draining;

/// How many trigger times are kept at most while their changes wait.
const MAX_TRIGGER_TIMES: usize = 10_000;

/// When a key whose last operation failed is planned again.
#[derive(Clone, Debug)]
struct Retry {
    backoff: Backoff,
    /// The error of the last attempt.
    error: String,
    /// Whether the key was as desired before another program changed it.
    is_drift: bool,
}

/// Brings a kernel to the state that Services describe.
#[derive(Debug)]
pub struct Reconciler<K> {
    kernel: K,
    policy: Policy,
    /// The Service whose endpoints are the API servers.
    api_server: ObjectName,
    table: ServiceTable,
    /// The addresses of all interfaces except `kube-ipvs0`, as last read.
    interfaces: BTreeSet<IpAddr>,
    /// Whether they have changed since then.
    are_interfaces_stale: bool,
    node: NodeView,
    /// The constant part of each family's table of the packet filter.
    rulesets: Vec<Arc<Ruleset>>,
    /// Ranges that have a route and should not have one. The packet filter guards them until the route is deleted.
    stray_ranges: Vec<IpNet>,
    desired: DesiredState,
    /// Services whose contribution is not known, because computing it panicked.
    undetermined: BTreeSet<ObjectName>,
    /// `None` before the first dump, and after an error that leaves the state of the kernel unknown.
    mirror: Option<Mirror>,
    dirty_services: BTreeSet<ObjectName>,
    is_node_dirty: bool,
    dirty_keys: BTreeSet<Key>,
    /// The keys of large changes.
    backlog: Backlog,
    /// Virtual servers whose real servers the audit has not read yet.
    unread: Vec<FrontEnd>,
    /// About how many operations the next part has.
    part_operations: usize,
    /// VIPs that are not bound yet in the plan that is being carried out, since it lacks some of their front ends.
    unfinished_vips: BTreeSet<IpAddr>,
    /// Keys of which a plan has carried out only a part, and why they were planned.
    unfinished_keys: Vec<(Key, PlanReason)>,
    retries: BTreeMap<Key, Retry>,
    draining: Draining,
    /// Since when real servers drain whose endpoint is gone or terminating, if there is a drain timeout. After a restart the time starts again.
    drain_since: BTreeMap<FrontEnd, BTreeMap<SocketAddr, Instant>>,
    /// Conflicts that are reported once all changed Services are computed, if they last.
    new_conflicts: Vec<FrontEndConflict>,
    /// The trigger times of the EndpointSlices whose change is not in the kernel yet, each with its Service.
    trigger_times: Vec<(ObjectName, Family, SystemTime)>,
    bootstrap: Bootstrap,
    /// The virtual servers that later probes read.
    to_probe: Vec<FrontEnd>,
}

impl<K: Kernel> Reconciler<K> {
    /// Creates a reconciler without any Services.
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
            undetermined: BTreeSet::new(),
            mirror: None,
            dirty_services: BTreeSet::new(),
            is_node_dirty: true,
            dirty_keys: BTreeSet::new(),
            backlog: Backlog::default(),
            unread: Vec::new(),
            part_operations: PART_OPERATIONS,
            unfinished_vips: BTreeSet::new(),
            unfinished_keys: Vec::new(),
            retries: BTreeMap::new(),
            draining: Draining::default(),
            drain_since: BTreeMap::new(),
            new_conflicts: Vec::new(),
            trigger_times: Vec::new(),
            bootstrap: Bootstrap::default(),
            to_probe: Vec::new(),
        }
    }

    /// Records a change. The kernel is not changed before the next sync.
    pub fn apply(&mut self, change: Change) {
        let trigger_time = match &change {
            Change::Slice(slice) => {
                let family = if slice.is_ipv6 { Family::Ipv6 } else { Family::Ipv4 };
                slice.trigger_time.map(|at| (slice.service.clone(), family, at))
            }
            _ => None,
        };
        match self.table.apply(change) {
            Dirty::Services(names) => {
                let is_measured = !names.is_empty() && self.trigger_times.len() < MAX_TRIGGER_TIMES;
                self.trigger_times.extend(trigger_time.filter(|_| is_measured));
                if !self.table.is_synced() {
                    self.note_bootstrap_services(&names);
                }
                self.is_node_dirty |= names.contains(&self.api_server);
                self.dirty_services.extend(names);
            }
            Dirty::Node => self.is_node_dirty = true,
            Dirty::All => {
                let held = self.mirror.iter().flat_map(Mirror::keys);
                self.dirty_keys.extend(held);
            }
        }
    }

    /// Records that addresses of the node's interfaces have changed. The next sync reads them.
    pub fn interfaces_changed(&mut self) {
        self.are_interfaces_stale = true;
    }

    /// Whether the initial list is complete. Before that, a sync would delete what is not listed yet.
    pub fn is_ready(&self) -> bool {
        self.table.is_synced()
    }

    /// Whether the source has objects that it has never been able to parse.
    pub fn is_incomplete(&self) -> bool {
        self.table.is_incomplete()
    }

    /// Whether there are changes for a sync.
    pub fn is_dirty(&self) -> bool {
        self.is_node_dirty
            || self.are_interfaces_stale
            || !self.dirty_services.is_empty()
            || !self.dirty_keys.is_empty()
            || !self.backlog.is_empty()
            || !self.unread.is_empty()
    }

    /// When the next failed operation is retried, or the next draining real server is checked.
    pub fn next_check(&self) -> Option<Instant> {
        let retries = self.retries.values().map(|retry| retry.backoff.due);
        retries.chain(self.draining.next_check()).min()
    }

    /// Whether the configuration needs something of this Node that is not known yet: its addresses for NodePorts, or its pod
    /// CIDRs.
    pub fn is_missing_node_data(&self) -> bool {
        let node = self.table.node();
        let has_primary = matches!(
            self.policy.node_port_addresses,
            NodePortAddresses::Primary | NodePortAddresses::PrimaryAndWithin(_)
        );
        let needs_addresses = has_primary && self.policy.bind_address.is_none();
        (needs_addresses && node.is_none_or(|node| node.addresses.is_empty()))
            || (self.policy.detect_local == DetectLocal::NodeCidr && node.is_none_or(|node| node.pod_cidrs.is_empty()))
    }

    /// The kernel. Tests change it.
    pub fn kernel_mut(&mut self) -> &mut K {
        &mut self.kernel
    }

    /// Programs what changed, retries what failed and is due, and deletes what has drained. It reads only the virtual servers
    /// that drain. The first sync is an audit. Large changes are carried out to their end; [`Reconciler::sync_part`] returns in
    /// between.
    pub fn sync(&mut self, now: Instant) -> Result<SyncReport, KernelError> {
        if self.mirror.is_none() || self.bootstrap.is_read {
            return self.audit(now);
        }
        let mut report = SyncReport::default();
        self.sync_into(now, &mut report)?;
        self.finish_parts(now, &mut report)?;
        self.finish_report(&mut report);
        Ok(report)
    }

    /// The same, but of large changes only a part: while [`Reconciler::is_dirty`] holds there are more parts. Small changes come first,
    /// so that a Service does not wait for larger ones.
    pub fn sync_part(&mut self, now: Instant) -> Result<SyncReport, KernelError> {
        if self.mirror.is_none() || self.bootstrap.is_read {
            return self.audit_part(now);
        }
        let mut report = SyncReport::default();
        self.sync_into(now, &mut report)?;
        self.finish_report(&mut report);
        Ok(report)
    }

    fn sync_into(&mut self, now: Instant, report: &mut SyncReport) -> Result<(), KernelError> {
        if self.are_interfaces_stale {
            let observed = self.kernel.dump(Scope::Interfaces)?;
            self.set_interfaces(observed.interfaces);
        }
        self.recompute_changed(report);
        let mut keys = std::mem::take(&mut self.dirty_keys);
        keys.extend(self.due_retries(now));
        let part = self.next_part();
        // A draining virtual server is read before it is planned: when its check is due, and when anything else about it is.
        let in_part = part.iter().flat_map(|part| &part.keys);
        let planned = keys.iter().chain(in_part).filter_map(|key| match key {
            Key::VirtualServer(front_end) if self.draining.contains(front_end) => Some(*front_end),
            _ => None,
        });
        let due = self.due_draining(now);
        let mut draining: Vec<FrontEnd> = planned.chain(due.iter().copied()).collect();
        draining.sort_unstable();
        draining.dedup();
        let read = self.reread_servers(&draining);
        keys.extend(due.into_iter().map(Key::VirtualServer));
        if let Err(error) = read {
            // Otherwise they would be planned from a stale mirror.
            self.dirty_keys = keys;
            if let Some(part) = part {
                self.defer(None, part.reason, part.keys);
            }
            return Err(error);
        }
        self.execute(keys, PlanReason::Change, now, report);
        if let Some(part) = part {
            self.execute_part(part, now, report);
        }
        if !self.unread.is_empty() && self.mirror.is_some() {
            self.audit_real_servers(now, report)?;
        }
        Ok(())
    }

    fn set_interfaces(&mut self, interfaces: BTreeSet<IpAddr>) {
        self.are_interfaces_stale = false;
        if self.interfaces != interfaces {
            self.interfaces = interfaces;
            self.is_node_dirty = true;
        }
    }

    /// Recomputes the contributions of Services that changed, the smallest first, until a part is full; of all Services if the node
    /// changed.
    fn recompute_changed(&mut self, report: &mut SyncReport) {
        self.note_changed_node();
        let names = self.take_dirty_services();
        self.recompute(&names, Extent::Part, report);
    }

    /// Recomputes the contributions of all Services that changed.
    fn recompute_all_changed(&mut self, report: &mut SyncReport) {
        self.note_changed_node();
        let names = std::mem::take(&mut self.dirty_services);
        self.recompute(&names, Extent::Everything, report);
    }

    fn note_changed_node(&mut self) {
        if self.policy.pod_addresses != PodAddresses::Allowed {
            self.dirty_services.extend(self.table.refresh_pods());
        }
        if self.update_node() {
            // In addition to those that were deleted from the table.
            self.dirty_services.extend(self.table.names().cloned());
        }
    }

    /// Derives the view of the node anew, and returns whether it changed.
    fn update_node(&mut self) -> bool {
        if !std::mem::take(&mut self.is_node_dirty) {
            return false;
        }
        let (known, connections) = (self.table.last_known(), self.table.api_server_addresses());
        let api_servers = known.api_servers().iter().copied().chain(connections.iter().map(SocketAddr::ip));
        let peers = self.table.peer_node_addresses();
        let mut node = NodeView::new(self.table.node(), peers, api_servers, &self.interfaces, &self.policy);
        node.node_addresses.extend(known.node());
        if node.node_addresses.is_empty() && !connections.is_empty() {
            // There is a Node, of which the API server says nothing (yet): its addresses are among these. ClusterIPs stay served.
            node.peer_node_addresses.extend(&self.interfaces);
        }
        if node == self.node {
            return false;
        }
        self.node = node;
        if self.rebuild_rulesets() {
            self.dirty_keys.extend(self.policy.families.iter().map(Key::Table));
        }
        true
    }

    fn recompute(&mut self, names: &BTreeSet<ObjectName>, extent: Extent, report: &mut SyncReport) {
        let mut size = 0;
        for name in names {
            let entry = self.table.get(name);
            let service = entry.and_then(|entry| entry.service.clone());
            let contribution = match entry {
                Some(entry) => self.compute(name, entry),
                None => Some(Contribution::default()),
            };
            match contribution {
                Some(contribution) => {
                    self.undetermined.remove(name);
                    let before = self.desired.contribution(name).map_or(0, |before| before.size);
                    let own = contribution.size.max(before);
                    let is_deferred =
                        extent == Extent::Part && (size + own > self.part_operations || self.backlog.has_job(name));
                    size += if is_deferred { 0 } else { own };
                    self.contribute(name, service.as_deref(), contribution, is_deferred, report);
                }
                None => {
                    self.undetermined.insert(name.clone());
                }
            }
        }
        // A conflict is none if the next Service gives up its front end in the same sync.
        if self.dirty_services.is_empty() && !self.new_conflicts.is_empty() {
            let conflicts = std::mem::take(&mut self.new_conflicts);
            report.conflicts.extend(self.desired.lasting_conflicts(conflicts));
        }
    }

    /// The contribution of a Service; `None` if computing it panics: a defect that one Service meets harms no other.
    fn compute(&self, name: &ObjectName, entry: &ServiceEntry) -> Option<Contribution> {
        let contribution = caught(|| {
            point("contribution", name);
            Contribution::new(entry, &self.node, &self.policy)
        });
        contribution
            .inspect_err(|panic| error!(service = %name, "{panic}; this Service stays as it is in the kernel"))
            .ok()
    }

    /// Replaces a Service's contribution, and reports what has not been reported before. Its keys are written next, or deferred.
    fn contribute(
        &mut self,
        name: &ObjectName,
        service: Option<&Service>,
        contribution: Contribution,
        is_deferred: bool,
        report: &mut SyncReport,
    ) {
        let before = self.desired.contribution(name);
        if !contribution.refused_vips.is_empty() {
            let refused: BTreeSet<_> = before.iter().flat_map(|before| &before.refused_vips).collect();
            let new = contribution.refused_vips.iter().filter(|vip| !refused.contains(vip));
            report.refused_vips.extend(new.map(|(vip, owner)| (name.clone(), *vip, *owner)));
        }
        if let Some(left_out) = contribution.left_out
            && before.and_then(|before| before.left_out) != Some(left_out)
        {
            report.over_budget.push((name.clone(), left_out));
        }
        if before.map_or(&[][..], |before| before.health_checks.as_slice()) != contribution.health_checks {
            report.health_checks.push((name.clone(), contribution.health_checks.clone()));
        }
        let mut deferred = BTreeSet::new();
        let keys = if is_deferred { &mut deferred } else { &mut self.dirty_keys };
        self.desired.update(name, service, contribution, keys, &mut self.new_conflicts);
        let drains = self.update_drains(name);
        if is_deferred { &mut deferred } else { &mut self.dirty_keys }.extend(drains);
        if is_deferred {
            self.defer(Some(name.clone()), PlanReason::Change, deferred);
        }
    }

    /// Derives the constant part of the packet filter anew, and returns whether it changed.
    fn rebuild_rulesets(&mut self) -> bool {
        let rulesets = rulesets(&self.policy, &self.node, &self.stray_ranges);
        let is_changed = rulesets != self.rulesets;
        if is_changed {
            self.rulesets = rulesets;
        }
        is_changed
    }

    /// Finds the ranges whose routes are to be deleted. Returns whether the packet filter changes with them.
    fn find_stray_ranges(&mut self) -> bool {
        let wanted = self.policy.binding.ranges();
        let held = self.mirror.iter().flat_map(Mirror::routed_ranges);
        self.stray_ranges = held.filter(|range| !wanted.contains(range)).copied().collect();
        self.rebuild_rulesets()
    }

    /// The tables of the packet filter, one for each family.
    fn table_keys(&self) -> impl Iterator<Item = Key> {
        self.policy.families.iter().map(Key::Table)
    }

    /// The ranges that should have routes.
    fn range_keys(&self) -> impl Iterator<Item = Key> {
        let ranges = self.policy.binding.ranges().iter();
        ranges.filter(|range| self.policy.families.contains(binding::family(range))).copied().map(Key::VipRange)
    }

    /// Reads some virtual servers again.
    fn reread_servers(&mut self, front_ends: &[FrontEnd]) -> Result<(), KernelError> {
        if let Some(mirror) = &mut self.mirror
            && !front_ends.is_empty()
        {
            mirror.refresh(front_ends, self.kernel.dump(Scope::Servers(front_ends))?);
        }
        Ok(())
    }
}

/// How much is computed at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extent {
    /// What fits into a part; the keys of what does not are deferred.
    Part,
    Everything,
}

/// Why keys are planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum PlanReason {
    /// A change concerned them.
    Change,
    /// A dump of everything found them.
    Dump,
}

/// What is retained although no Service wants it. While the source has objects that it cannot parse, or has not listed everything,
/// state that was merely found in the kernel may belong to one of the missing objects, or to a Service that is `undetermined`. What a
/// change removes is known to be unwanted.
fn retention<'a>(
    reason: PlanReason,
    table: &ServiceTable,
    undetermined: &BTreeSet<ObjectName>,
    policy: &'a Policy,
) -> Retention<'a> {
    match reason {
        PlanReason::Dump if table.is_incomplete() || !table.is_synced() || !undetermined.is_empty() => {
            Retention::Everything
        }
        PlanReason::Dump | PlanReason::Change => Retention::ExcludedRanges(&policy.exclude),
    }
}

fn rulesets(policy: &Policy, node: &NodeView, stray_ranges: &[IpNet]) -> Vec<Arc<Ruleset>> {
    let ruleset = |family| Arc::new(Ruleset::new(family, policy, node).with_ranges(stray_ranges));
    policy.families.iter().map(ruleset).collect()
}
