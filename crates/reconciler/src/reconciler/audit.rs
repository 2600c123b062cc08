//! Audits: everything is read from the kernel, compared with the desired state and repaired.

use std::collections::BTreeSet;
use std::time::Instant;

use foldhash::HashSet;
use ipvs_netlink::Family;
use service_watch::Protocol;

use super::{PlanReason, Reconciler, retention};
use crate::contribution::TrafficDirection;
use crate::diff::{DiffContext, diff};
use crate::front_end::FrontEnd;
use crate::kernel::{Kernel, KernelError, Scope};
use crate::mirror::Mirror;
use crate::plan::Key;
use crate::report::{SyncReport, Totals};

/// So many virtual servers are read at once, which takes a fraction of a second. If there are more, audits read them in parts.
const READ_AT_ONCE: usize = 30_000;

impl<K: Kernel> Reconciler<K> {
    /// Reads everything from the kernel and repairs what differs from the desired state. Large changes are carried out to their end;
    /// [`Reconciler::audit_part`] returns before.
    pub fn audit(&mut self, now: Instant) -> Result<SyncReport, KernelError> {
        let mut report = self.audit_without_report(now)?;
        self.finish_parts(now, &mut report)?;
        self.finish_report(&mut report);
        Ok(report)
    }

    /// The same, but what large Services need is left for [`Reconciler::sync_part`].
    pub fn audit_part(&mut self, now: Instant) -> Result<SyncReport, KernelError> {
        let mut report = self.audit_without_report(now)?;
        self.finish_report(&mut report);
        Ok(report)
    }

    fn audit_without_report(&mut self, now: Instant) -> Result<SyncReport, KernelError> {
        // The bootstrap sync may have read everything; that dump is as old as the initial list took to arrive.
        let is_read = std::mem::take(&mut self.bootstrap.is_read) && self.mirror.is_some();
        let is_first_audit = is_read || self.mirror.is_none();
        let applied = std::mem::take(&mut self.bootstrap).applied;
        let mut report = SyncReport { is_audit: true, is_first_audit, applied, ..SyncReport::default() };
        if !is_first_audit && self.is_audit_large() {
            self.read_without_real_servers()?;
        } else if !is_read {
            self.read_all()?;
        } else if self.are_interfaces_stale {
            let observed = self.kernel.dump(Scope::Interfaces)?;
            self.set_interfaces(observed.interfaces);
        }
        if is_first_audit {
            // What a Service contributes that is not computed yet would count as unwanted.
            self.recompute_all_changed(&mut report);
            self.dirty_keys.clear();
            self.backlog.clear();
        } else {
            self.recompute_changed(&mut report);
        }
        let changed = std::mem::take(&mut self.dirty_keys);
        let deferred: HashSet<&Key> = self.backlog.keys().collect();
        let is_planned = |key: &Key| changed.contains(key) || deferred.contains(key);
        let (mut keys, drifted_keys) = self.keys_to_repair(self.all_keys(), is_planned, now);
        let first = if is_first_audit {
            let unowned = self.mirror.iter().flat_map(Mirror::unowned);
            report.foreign_servers = unowned.filter(|front_end| self.desired.owner(front_end).is_none()).count();
            // An agent that was killed may have deleted a real server and not its flows.
            let udp = self.desired.front_ends().filter(|front_end| front_end.protocol == Protocol::Udp);
            keys.extend(udp.copied().map(Key::Flows));
            let (bootstrap, rest) = keys.into_iter().partition(|key| self.is_bootstrap_key(key));
            keys = rest;
            (bootstrap, PlanReason::Dump)
        } else {
            report.drifted_keys = drifted_keys;
            (changed, PlanReason::Change)
        };
        self.execute(first.0, first.1, now, &mut report);
        // After a failed socket nothing is known of the kernel: the rest waits for the next dump.
        if self.mirror.is_some() {
            let keys = self.defer_large(keys, PlanReason::Dump);
            self.execute(keys, PlanReason::Dump, now, &mut report);
        }
        self.note_drift(&report.drifted_keys);
        Ok(report)
    }

    fn note_drift(&mut self, drifted_keys: &[Key]) {
        for key in drifted_keys {
            if let Some(retry) = self.retries.get_mut(key) {
                retry.is_drift = true;
            }
        }
    }

    /// Whether to read everything at once would keep changes waiting for too long.
    fn is_audit_large(&self) -> bool {
        let Some(mirror) = &self.mirror else { return false };
        mirror.server_count() + mirror.real_server_count() / 32 > READ_AT_ONCE
    }

    /// Reads everything from the kernel except real servers. These are read in parts, between which changes are synced; until then
    /// the mirror has what was known of them.
    fn read_without_real_servers(&mut self) -> Result<(), KernelError> {
        let mut observed = self.kernel.dump(Scope::WithoutRealServers)?;
        self.set_interfaces(std::mem::take(&mut observed.interfaces));
        let mut mirror = Mirror::from_dump(observed);
        let unknown = self.mirror.take().map(|before| mirror.take_real_servers(before)).unwrap_or_default();
        self.unread = mirror.front_ends().copied().collect();
        self.mirror = Some(mirror);
        self.find_stray_ranges();
        self.reread_servers(&unknown)
    }

    /// Reads the real servers of some virtual servers that the audit has left, and repairs what differs.
    pub(super) fn audit_real_servers(&mut self, now: Instant, report: &mut SyncReport) -> Result<(), KernelError> {
        let mut cost = 0;
        let mut front_ends = Vec::new();
        while cost < self.part_operations
            && let Some(front_end) = self.unread.pop()
        {
            let held = self.mirror.as_ref().and_then(|mirror| mirror.server(&front_end));
            cost += 4 + held.map_or(0, |held| held.real_servers.len() / 8);
            front_ends.push(front_end);
        }
        self.reread_servers(&front_ends)?;
        let keys = front_ends.into_iter().map(Key::VirtualServer);
        let (keys, drifted_keys) = self.keys_to_repair(keys, |key| self.backlog.contains(key), now);
        let keys = self.defer_large(keys, PlanReason::Dump);
        self.execute(keys, PlanReason::Dump, now, report);
        self.note_drift(&drifted_keys);
        report.drifted_keys.extend(drifted_keys);
        Ok(())
    }

    /// Reads everything from the kernel.
    pub(super) fn read_all(&mut self) -> Result<(), KernelError> {
        let mut observed = self.kernel.dump(Scope::All)?;
        self.set_interfaces(std::mem::take(&mut observed.interfaces));
        self.mirror = Some(Mirror::from_dump(observed));
        self.unread.clear();
        self.find_stray_ranges();
        Ok(())
    }

    /// All keys, held or desired.
    fn all_keys(&self) -> impl Iterator<Item = Key> + '_ {
        let node_wide = self.table_keys().chain([Key::Device]).chain(self.range_keys());
        let held = self.mirror.iter().flat_map(Mirror::keys);
        let surplus = held.filter(|key| !self.desired.wants(key));
        // A draining virtual server may be neither held nor desired any more.
        let draining = self.draining.front_ends().copied().map(Key::VirtualServer);
        node_wide.chain(self.desired.keys()).chain(surplus).chain(draining)
    }

    /// The keys that need operations or must be planned in any case, except those that are planned already; and those among them that
    /// need operations although neither a change nor a retry explains it.
    fn keys_to_repair(
        &self,
        all: impl Iterator<Item = Key>,
        is_planned: impl Fn(&Key) -> bool,
        now: Instant,
    ) -> (BTreeSet<Key>, Vec<Key>) {
        let (mut keys, mut drifted_keys) = (Vec::new(), BTreeSet::new());
        let Some(mirror) = &self.mirror else { return (BTreeSet::new(), Vec::new()) };
        let is_overdue = |front_end: &FrontEnd, address| self.is_overdue(front_end, address, now);
        let retention = retention(PlanReason::Dump, &self.table, &self.undetermined, &self.policy);
        let (rulesets, binding) = (&self.rulesets, &self.policy.binding);
        let context = DiffContext { retention, rulesets, binding, is_overdue: &is_overdue };
        let mut operations = Vec::new();
        // If a table, the device or a range changes, what the other keys need is known only afterwards.
        let mut needs_all = false;
        for key in all {
            if is_planned(&key) {
                continue;
            }
            let is_node_wide = key.is_node_wide();
            let is_known = self.retries.contains_key(&key)
                || matches!(&key, Key::VirtualServer(front_end) if self.draining.contains(front_end));
            operations.clear();
            let is_draining = diff(&key, mirror, &self.desired, context, &mut operations);
            if !is_known && !operations.is_empty() {
                drifted_keys.insert(key.clone());
            }
            needs_all |= is_node_wide && !operations.is_empty();
            if needs_all || is_node_wide || is_known || is_draining || !operations.is_empty() {
                keys.push(key);
            }
        }
        // To sort all of them at once is faster than to insert them one by one.
        (keys.into_iter().collect(), drifted_keys.into_iter().collect())
    }

    /// Completes the report after everything was carried out.
    pub(super) fn finish_report(&mut self, report: &mut SyncReport) {
        report.left = self.left();
        let times = std::mem::take(&mut self.trigger_times);
        let (pending, programmed): (Vec<_>, Vec<_>) =
            times.into_iter().partition(|(service, ..)| report.left > 0 && self.is_pending(service));
        self.trigger_times = pending;
        report.trigger_times = programmed.into_iter().map(|(_, family, at)| (family, at)).collect();
        report.kernel_stats = self.kernel.take_stats();
        for (key, retry) in &self.retries {
            if key.is_node_wide() || retry.is_drift {
                report.unrepaired.extend(self.policy.families.iter().filter(|family| key.is_of_family(*family)));
            }
        }
        let draining = if self.mirror.is_some() { self.draining.count() } else { 0 };
        debug_assert!(
            report.left > 0
                || draining
                    == self.draining.front_ends().map(|front_end| self.unwanted_count(front_end)).sum::<usize>()
        );
        let without_local =
            |direction| [Family::Ipv4, Family::Ipv6].map(|family| self.desired.without_local(direction, family));
        report.totals = Totals {
            services: self.desired.service_count(),
            virtual_servers: self.desired.server_count(),
            real_servers: self.mirror.as_ref().map_or(0, Mirror::real_server_count),
            vips: self.desired.vip_count(),
            over_budget: self.desired.over_budget_count(),
            draining,
            failing: self.retries.len(),
            internal_without_local: without_local(TrafficDirection::Internal),
            external_without_local: without_local(TrafficDirection::External),
        };
    }
}
