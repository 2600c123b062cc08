//! Large changes in parts: what belongs to a part, and what waits for the next one.
//!
//! A part takes a fraction of a second. Between two of them the main loop receives changes, and the smallest of these come first.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use foldhash::HashMap;
use service_watch::ObjectName;

use super::backlog::Part;
use super::{PlanReason, Reconciler};
use crate::budget::PART_OPERATIONS;
use crate::front_end::FrontEnd;
use crate::kernel::{Kernel, KernelError};
use crate::plan::{Key, Operation};
use crate::report::SyncReport;

/// About how much is computed at once: front ends and endpoints.
const PART_COMPUTED: usize = 100_000;

/// The kernel goes through the real servers of a virtual server before it adds one. From this many on that takes longer than everything
/// else.
const MANY_REAL_SERVERS: usize = 4000;

/// At least this many operations on one virtual server are carried out at once. Each may take tens of milliseconds.
const MIN_OPERATIONS: usize = 16;

/// A part that took longer than this is followed by smaller ones.
const PART_DURATION_MAX: Duration = Duration::from_millis(200);

/// How many operations on a virtual server with so many real servers are carried out at once, if a part has so many.
fn operations_at_once(part: usize, real_servers: usize) -> usize {
    (part / (1 + real_servers / MANY_REAL_SERVERS)).max(MIN_OPERATIONS)
}

/// How many operations the next part has. After a slow part as many as would have been in time, since the next may be as slow; after a
/// quick one twice as many. A quick change of a few operations that is all there was says nothing about many.
fn next_part_operations(part: usize, applied: usize, left: usize, took: Duration) -> usize {
    let is_slow = took > PART_DURATION_MAX;
    let next = match (is_slow, applied < MIN_OPERATIONS) {
        (false, true) if left == 0 => part,
        (false, _) => part * 2,
        // It may be what was read or computed that took so long.
        (true, true) => part / 2,
        (true, false) => {
            let in_time = applied as u128 * PART_DURATION_MAX.as_nanos() / took.as_nanos();
            usize::try_from(in_time).map_or(part, |in_time| in_time.min(part))
        }
    };
    next.clamp(MIN_OPERATIONS, PART_OPERATIONS)
}

/// Cuts off the operations on a virtual server that are too many for one plan: those of the last phases. Returns whether there are
/// any.
pub(super) fn cut(
    operations: &mut Vec<Operation>,
    start: usize,
    part: usize,
    real_servers: impl FnOnce() -> usize,
) -> bool {
    if operations.len() - start <= MIN_OPERATIONS {
        return false;
    }
    let limit = operations_at_once(part, real_servers());
    if operations.len() - start <= limit {
        return false;
    }
    operations[start..].sort_by_key(Operation::phase);
    operations.truncate(start + limit);
    true
}

impl<K: Kernel> Reconciler<K> {
    /// Fits the next parts to the pace of this one. What the kernel needs for an operation depends on much: it goes through 50,000
    /// recently deleted real servers before it adds one (`ip_vs_trash_get_dest`).
    pub(crate) fn note_pace(&mut self, report: &SyncReport) {
        let applied = report.applied.total();
        self.part_operations = next_part_operations(self.part_operations, applied, report.left, report.duration);
    }

    /// Takes the Services that are computed next: bootstrap Services, then the smallest.
    pub(super) fn take_dirty_services(&mut self) -> BTreeSet<ObjectName> {
        let names = std::mem::take(&mut self.dirty_services);
        if names.len() <= 1 {
            return names;
        }
        let ranked = names.into_iter().map(|name| (!self.is_bootstrap_name(&name), self.effort(&name), name));
        let mut ranked: Vec<_> = ranked.collect();
        ranked.sort_unstable();
        let (mut taken, mut sum) = (BTreeSet::new(), 0_usize);
        for (_, effort, name) in ranked {
            sum = sum.saturating_add(effort);
            if taken.is_empty() || sum <= PART_COMPUTED {
                taken.insert(name);
            } else {
                self.dirty_services.insert(name);
            }
        }
        taken
    }

    /// About how much it takes to compute a Service and to replace what it contributed before.
    fn effort(&self, name: &ObjectName) -> usize {
        let before = self.desired.contribution(name).map_or(0, |before| before.size);
        let Some(entry) = self.table.get(name) else { return before };
        let Some(service) = &entry.service else { return before };
        let endpoints: usize = entry.slices.values().map(|slice| slice.endpoints.len()).sum();
        let addresses = service.cluster_ips.len() + service.external_ips.len() + service.load_balancer_ips.len();
        service.ports.len().saturating_mul(1 + addresses + endpoints).saturating_add(before)
    }

    /// About how many operations a key takes.
    fn cost(&self, key: &Key) -> usize {
        let Key::VirtualServer(front_end) = key else { return 1 };
        let held = self.mirror.as_ref().and_then(|mirror| mirror.server(front_end));
        match (held, self.desired.server(front_end)) {
            (Some(held), Some(wanted)) if held.real_servers.matches(&wanted.real_servers) => 1,
            (held, wanted) => {
                let wanted = wanted.map_or(0, |wanted| wanted.real_servers.len());
                let real_servers = held.map_or(0, |held| held.real_servers.len()).max(wanted);
                let effort = 1 + real_servers / MANY_REAL_SERVERS;
                2 + (real_servers * effort).min(operations_at_once(PART_OPERATIONS, real_servers) * effort)
            }
        }
    }

    /// Adds keys to the job of a Service.
    pub(super) fn defer(&mut self, service: Option<ObjectName>, reason: PlanReason, keys: BTreeSet<Key>) {
        let is_urgent = service.as_ref().is_some_and(|name| self.is_bootstrap_name(name));
        let keys: Vec<_> = keys.into_iter().map(|key| (self.cost(&key), self.is_wanted(&key), key)).collect();
        let keys = keys.into_iter().map(|(cost, is_wanted, key)| (key, cost, is_wanted));
        self.backlog.push((service, reason), is_urgent, keys);
    }

    fn is_wanted(&self, key: &Key) -> bool {
        match key {
            Key::Table(_) | Key::Device => true,
            Key::VipRange(range) => self.policy.binding.ranges().contains(range),
            key => self.desired.wants(key),
        }
    }

    /// Defers the keys of large Services, and returns the others.
    pub(super) fn defer_large(&mut self, keys: BTreeSet<Key>, reason: PlanReason) -> BTreeSet<Key> {
        if !self.desired.has_large_services() {
            return keys;
        }
        let mut by_owner: HashMap<ObjectName, (usize, BTreeSet<Key>)> = HashMap::default();
        let mut others = BTreeSet::new();
        for key in keys {
            let owner = self.desired.owner_of(&key).cloned();
            match owner {
                None => _ = others.insert(key),
                Some(owner) => {
                    let cost = self.cost(&key);
                    let (sum, of_owner) = by_owner.entry(owner).or_default();
                    *sum += cost;
                    of_owner.insert(key);
                }
            }
        }
        for (owner, (cost, mut of_owner)) in by_owner {
            if cost > PART_OPERATIONS {
                self.defer(Some(owner), reason, of_owner);
            } else {
                others.append(&mut of_owner);
            }
        }
        others
    }

    /// The keys that failed and are due, up to a part.
    pub(super) fn due_retries(&self, now: Instant) -> Vec<Key> {
        let mut cost = 0;
        let due = self.retries.iter().filter(|(_, retry)| retry.backoff.due <= now).map(|(key, _)| key);
        let fits = |key: &&Key| {
            let is_first = cost < self.part_operations;
            cost += self.cost(key);
            is_first
        };
        due.take_while(fits).cloned().collect()
    }

    /// The draining virtual servers whose check is due, up to a part.
    pub(super) fn due_draining(&self, now: Instant) -> Vec<FrontEnd> {
        let mut cost = 0;
        let fits = |front_end: &FrontEnd| {
            let is_first = cost < self.part_operations;
            let held = self.mirror.as_ref().and_then(|mirror| mirror.server(front_end));
            cost += 4 + held.map_or(0, |held| held.real_servers.len() / 8);
            cost += self.cost(&Key::VirtualServer(*front_end));
            is_first
        };
        self.draining.due(now).take_while(fits).collect()
    }

    /// The next part of the backlog.
    pub(super) fn next_part(&mut self) -> Option<Part> {
        if self.backlog.is_empty() {
            return None;
        }
        let mut backlog = std::mem::take(&mut self.backlog);
        let part = backlog.take(self.part_operations, |key| self.cost(key));
        self.backlog = backlog;
        part
    }

    /// Carries out a part of the backlog.
    pub(super) fn execute_part(&mut self, part: Part, now: Instant, report: &mut SyncReport) {
        if self.mirror.is_none() {
            // The next audit plans everything.
            return;
        }
        self.unfinished_vips = part.unfinished_vips;
        self.execute(part.keys, part.reason, now, report);
        self.unfinished_vips.clear();
    }

    /// Defers what is left of keys that were cut. What failed is retried after a delay of its own.
    pub(super) fn defer_unfinished(&mut self) {
        for (key, reason) in std::mem::take(&mut self.unfinished_keys) {
            if !self.retries.contains_key(&key) {
                let owner = self.desired.owner_of(&key).cloned();
                self.defer(owner, reason, [key].into());
            }
        }
    }

    /// Carries out everything that is left.
    pub(super) fn finish_parts(&mut self, now: Instant, report: &mut SyncReport) -> Result<(), KernelError> {
        while self.is_dirty() && self.mirror.is_some() {
            self.sync_into(now, report)?;
        }
        Ok(())
    }

    /// How many keys and Services are left.
    pub(super) fn left(&self) -> usize {
        self.dirty_services.len() + self.backlog.len()
    }

    /// Whether a change of a Service is not in the kernel yet.
    pub(super) fn is_pending(&self, service: &ObjectName) -> bool {
        self.dirty_services.contains(service) || self.backlog.has_job(service)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_part_has_the_pace_of_the_last() {
        let next = |part, applied, left, ms| next_part_operations(part, applied, left, Duration::from_millis(ms));
        assert_eq!(next(4000, 4000, 9, 2000), 400, "a tenth of what took ten times as long");
        assert_eq!(next(4000, 1045, 9, 18_000), MIN_OPERATIONS, "not half, which would take as long as all others may");
        assert_eq!(next(64, 64, 9, 100_000), MIN_OPERATIONS);
        assert_eq!(next(400, 400, 9, 20), 800, "a quick one is followed by a larger one");
        assert_eq!(next(64, 10, 9, 20), 128, "it was a part of more, whatever came of it");
        assert_eq!(next(4000, 4000, 9, 20), PART_OPERATIONS);
        assert_eq!(next(64, 1, 0, 1), 64, "a small change says nothing about large ones");
        assert_eq!(next(4000, 0, 9, 900), 2000, "reading took long");
    }
}
