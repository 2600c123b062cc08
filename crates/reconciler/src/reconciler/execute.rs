//! From keys to the kernel: plans, the order in which they are carried out, and what follows from their results.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipvs_netlink::Family;
use service_watch::Protocol;
use tracing::debug;

use super::guard::{Guard, PlanPart, PlanParts};
use super::parts::cut;
use super::{PlanReason, Reconciler, Retry, retention};
use crate::backoff::Backoff;
use crate::diff::{DiffContext, diff};
use crate::front_end::FrontEnd;
use crate::kernel::{Cause, Kernel, KernelError, Scope};
use crate::mirror::Mirror;
use crate::plan::{Key, Operation, Plan};
use crate::report::{Failure, PlanErrors, SyncReport};

/// The delay before a failed operation is retried for the first time.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// About how many keys one plan covers. Each plan costs a transaction of `nf_tables` and a dump of connection tracking, so the
/// number is not small either.
const KEYS_PER_PLAN: usize = 2000;

impl<K: Kernel> Reconciler<K> {
    /// Plans and applies, at most twice: the keys for which the mirror turns out to be wrong are read and planned again.
    pub(super) fn execute(
        &mut self,
        mut keys: BTreeSet<Key>,
        reason: PlanReason,
        now: Instant,
        report: &mut SyncReport,
    ) {
        for is_last_attempt in [false, true] {
            let mut errors = self.execute_once(keys, reason, now, report);
            if !self.unfinished_keys.is_empty() {
                for key in errors.failed.keys().chain(errors.stale.keys()) {
                    self.unfinished_keys.retain(|(unfinished, _)| unfinished != key);
                }
            }
            if is_last_attempt {
                errors.failed.append(&mut errors.stale);
            }
            for (key, error) in std::mem::take(&mut errors.failed) {
                self.record_failure(key, error.text, now, report);
            }
            self.defer_unfinished();
            if errors.stale.is_empty() || self.mirror.is_none() {
                return;
            }
            // Another program has changed it, and an audit finds it repaired.
            report.drifted_keys.extend(errors.stale.keys().cloned());
            match self.reread_stale(errors) {
                Ok(reread) => keys = self.defer_large(reread, reason),
                Err((stale, error)) => {
                    for key in stale {
                        self.record_failure(key, error.text.clone(), now, report);
                    }
                    return;
                }
            }
        }
    }

    /// Carries out the stages, and returns the errors of all of them.
    fn execute_once(
        &mut self,
        keys: BTreeSet<Key>,
        reason: PlanReason,
        now: Instant,
        report: &mut SyncReport,
    ) -> PlanErrors {
        // A table is rebuilt with all its elements, so what else is to be done is known only afterwards.
        let (tables, others): (BTreeSet<_>, BTreeSet<_>) =
            keys.into_iter().partition(|key| matches!(key, Key::Table(_)));
        let bindings = if self.may_be_bound_twice() { only_bindings(&others) } else { BTreeSet::new() };
        let others = self.split_by_address(others).into_iter().map(Stage::Others);
        let stages = std::iter::once(Stage::Tables(tables))
            .chain(others)
            .chain([Stage::SupersededBindings(bindings), Stage::StrayRangeGuards]);
        let mut errors = PlanErrors::default();
        for stage in stages {
            let Some(mut keys) = self.stage_keys(stage, &errors) else { continue };
            // After a failed socket nothing is known of the kernel: the remaining stages wait for the next dump.
            let Some(stage_errors) = self.apply_guarded(&mut keys, reason, now, &errors, report) else { break };
            for key in keys.iter().filter(|key| !stage_errors.contains(key)) {
                self.retries.remove(key);
            }
            self.count_draining(&keys);
            errors.extend(stage_errors);
        }
        errors
    }

    /// Splits keys into sets that are planned one after another, since the plan for a whole cluster would be larger than
    /// everything else the agent holds. Within a plan only operations on the same address depend on each other. What front
    /// ends refer to comes before all of them if it is added, and after all of them if it is deleted.
    fn split_by_address(&self, keys: BTreeSet<Key>) -> Vec<BTreeSet<Key>> {
        if keys.len() <= KEYS_PER_PLAN {
            return vec![keys];
        }
        let (mut first, mut last) = (BTreeSet::new(), BTreeSet::new());
        let mut by_address: BTreeMap<IpAddr, Vec<Key>> = BTreeMap::new();
        for key in keys {
            let is_wanted = match &key {
                Key::VirtualServer(FrontEnd { address, .. })
                | Key::Flows(FrontEnd { address, .. })
                | Key::Vip(address) => {
                    by_address.entry(*address).or_insert_with(|| Vec::with_capacity(2)).push(key);
                    continue;
                }
                Key::Table(_) | Key::Device => true,
                Key::SourceRanges(service, family) => self.desired.source_ranges(service, *family).is_some(),
                Key::SetElement(element) => self.desired.wants_element(element),
                Key::VipRange(range) => self.policy.binding.ranges().contains(range),
            };
            if is_wanted { &mut first } else { &mut last }.insert(key);
        }
        let mut sets = vec![first];
        for keys in by_address.into_values() {
            match sets.last_mut() {
                Some(set) if set.len() < KEYS_PER_PLAN => set.extend(keys),
                _ => sets.push(keys.into_iter().collect()),
            }
        }
        sets.push(last);
        sets
    }

    /// Whether VIPs may be bound both by an address and by a route.
    fn may_be_bound_twice(&self) -> bool {
        self.policy.binding.is_routes() || self.mirror.as_ref().is_some_and(Mirror::has_routes)
    }

    /// The keys of a stage; `None` if it has nothing to do.
    fn stage_keys(&mut self, stage: Stage, errors: &PlanErrors) -> Option<BTreeSet<Key>> {
        match stage {
            Stage::Tables(keys) | Stage::Others(keys) => Some(keys),
            Stage::SupersededBindings(mut keys) => {
                // What failed is retried after a delay of its own.
                keys.retain(|key| !errors.contains(key));
                (!keys.is_empty()).then_some(keys)
            }
            Stage::StrayRangeGuards => {
                let had_stray_ranges = !self.stray_ranges.is_empty();
                let is_changed = had_stray_ranges && self.mirror.is_some() && self.find_stray_ranges();
                is_changed.then(|| self.table_keys().filter(|table| !errors.contains(table)).collect())
            }
        }
    }

    /// Plans and applies once, in three parts. The rules of [`Guard`] withhold operations of a later part. `None` if nothing is
    /// known of the kernel.
    fn apply_guarded(
        &mut self,
        keys: &mut BTreeSet<Key>,
        reason: PlanReason,
        now: Instant,
        earlier: &PlanErrors,
        report: &mut SyncReport,
    ) -> Option<PlanErrors> {
        let PlanParts { guards, services, release } = self.plan(keys, reason, now)?.into();
        let is_missing = |table: &Key| earlier.failed.contains_key(table) || self.retries.contains_key(table);
        let families = [Family::Ipv4, Family::Ipv6].into_iter();
        let mut guard = Guard::new(families.filter(|family| is_missing(&Key::Table(*family))).collect());
        let parts = [(PlanPart::Guards, guards), (PlanPart::Services, services), (PlanPart::Release, release)];
        for (part, mut operations) in parts {
            guard.withhold(part, &mut operations);
            if !operations.is_empty() && self.mirror.is_some() {
                let results = self.kernel.apply(&operations);
                guard.errors.extend(self.record_results(&operations, results, report));
            }
        }
        Some(guard.errors)
    }

    /// The operations that keys need. Adds the device to the keys if VIPs need one that is missing, and sets when draining
    /// virtual servers are checked again.
    fn plan(&mut self, keys: &mut BTreeSet<Key>, reason: PlanReason, now: Instant) -> Option<Plan> {
        let mirror = self.mirror.as_ref()?;
        let has_device = if self.policy.binding.is_routes() { mirror.accepts_routes() } else { mirror.has_device() };
        if !has_device && keys.iter().any(|key| matches!(key, Key::Vip(_) | Key::VipRange(_))) {
            keys.insert(Key::Device);
        }
        let mut operations = Vec::new();
        let mut drains = Vec::new();
        let is_overdue = |front_end: &FrontEnd, address| self.is_overdue(front_end, address, now);
        let retention = retention(reason, &self.table, &self.undetermined, &self.policy);
        let (rulesets, binding) = (&self.rulesets, &self.policy.binding);
        let context = DiffContext { retention, rulesets, binding, is_overdue: &is_overdue };
        let mut unfinished = Vec::new();
        for key in &*keys {
            let start = operations.len();
            let is_draining = diff(key, mirror, &self.desired, context, &mut operations);
            if let Key::VirtualServer(front_end) = key {
                let held = || mirror.server(front_end).map_or(0, |held| held.real_servers.len());
                let wanted = || self.desired.server(front_end).map_or(0, |wanted| wanted.real_servers.len());
                if cut(&mut operations, start, self.part_operations, || held().max(wanted())) {
                    unfinished.push((key.clone(), reason));
                }
                let has_begun = operations[start..].iter().any(|o| matches!(o, Operation::DrainRealServer(..)));
                drains.push((*front_end, is_draining, has_begun));
                let live = || self.desired.real_servers(front_end);
                if operations[start..].iter().any(|o| matches!(o, Operation::AddVirtualServer(..))) {
                    operations.push(Operation::DeleteUntranslatedFlows(*front_end, live()));
                } else if leaves_stale_flows(front_end, &operations[start..], mirror) {
                    operations.push(Operation::DeleteStaleFlows(*front_end, live()));
                }
            }
        }
        if !self.unfinished_vips.is_empty() {
            operations.retain(|operation| {
                let is_binding = matches!(
                    operation,
                    Operation::BindAddress(_) | Operation::AddRoute(_) | Operation::AddRoutedVip(_)
                );
                !is_binding || !matches!(operation.key(), Key::Vip(address) if self.unfinished_vips.contains(&address))
            });
        }
        self.unfinished_keys.append(&mut unfinished);
        for (front_end, is_draining, has_begun) in drains {
            self.schedule_drain_check(front_end, is_draining, has_begun, now);
        }
        Some(operations.into_iter().collect())
    }

    /// Enters the results of a plan into the mirror and the report, and returns the errors.
    fn record_results(
        &mut self,
        plan: &Plan,
        results: Vec<Result<(), KernelError>>,
        report: &mut SyncReport,
    ) -> PlanErrors {
        let mut errors = PlanErrors::default();
        let Some(mirror) = &mut self.mirror else { return errors };
        for (operation, result) in plan.operations().iter().zip(results) {
            let error = match result {
                Ok(()) => {
                    debug!("done: {operation}");
                    mirror.acknowledge(operation);
                    report.applied.count(operation);
                    continue;
                }
                Err(error) => error,
            };
            match (operation, error.cause) {
                // Another program did the same first. (A virtual server is read again instead: the proof that it is ours is
                // deleted after it.)
                (Operation::AddDevice | Operation::BindAddress(_) | Operation::AddRoute(_), Cause::Exists)
                | (Operation::UnbindAddress(_) | Operation::RemoveRoute(_), Cause::NotFound | Cause::NoDevice) => {
                    mirror.acknowledge(operation);
                }
                // Adding an object does not fail because that object is missing, so the mirror is right.
                (
                    Operation::AddDevice
                    | Operation::SetDeviceUp
                    | Operation::BindAddress(_)
                    | Operation::AddRoute(_)
                    | Operation::BuildTable { .. },
                    Cause::NotFound,
                )
                | (_, Cause::Refused | Cause::Unknown) => {
                    errors.failed.entry(operation.key()).or_insert(error);
                }
                (_, Cause::Exists | Cause::NotFound | Cause::NoDevice) => {
                    let key = operation.key();
                    let is_filter = operation.filter_family().is_some();
                    errors.is_filter_stale |= is_filter;
                    errors.is_device_lost |= !is_filter && matches!(key, Key::Device | Key::Vip(_) | Key::VipRange(_));
                    errors.stale.entry(key).or_insert(error);
                }
            }
        }
        // The real servers of a virtual server that was refused fail for want of it: that says nothing about the mirror.
        errors.stale.retain(|key, _| !errors.failed.contains_key(key));
        if errors.failed.values().any(|error| error.cause == Cause::Unknown) {
            self.mirror = None;
        }
        errors
    }

    /// Reads again what the mirror is wrong about, and returns the keys to be planned again.
    fn reread_stale(&mut self, errors: PlanErrors) -> Result<BTreeSet<Key>, (BTreeSet<Key>, KernelError)> {
        let mut keys: BTreeSet<Key> = errors.stale.into_keys().collect();
        let front_ends: Vec<FrontEnd> = keys
            .iter()
            .filter_map(|key| match key {
                Key::VirtualServer(front_end) => Some(*front_end),
                _ => None,
            })
            .collect();
        if errors.is_filter_stale {
            let observed = match self.kernel.dump(Scope::Filter) {
                Ok(observed) => observed,
                Err(error) => return Err((keys, error)),
            };
            if let Some(mirror) = &mut self.mirror {
                mirror.refresh_filter(observed.filter);
            }
            keys.extend(self.table_keys());
            keys.extend(self.desired.keys());
        }
        if let Err(error) = self.reread_servers(&front_ends) {
            return Err((keys, error));
        }
        // Of the other keys only one thing can be stale: the device was deleted, and with it every address and route.
        if errors.is_device_lost
            && let Some(mirror) = &mut self.mirror
        {
            mirror.forget_device();
            keys.insert(Key::Device);
            keys.extend(self.desired.keys().filter(|key| matches!(key, Key::Vip(_))).chain(self.range_keys()));
        }
        Ok(keys)
    }

    /// Reports a failed key, and schedules its retry.
    fn record_failure(&mut self, key: Key, error: String, now: Instant, report: &mut SyncReport) {
        let before = self.retries.get(&key);
        let is_repeated = before.is_some_and(|retry| retry.error == error);
        let backoff = before.map_or_else(|| Backoff::new(RETRY_DELAY, now), |retry| retry.backoff.next(now));
        let service = match &key {
            Key::Device | Key::Table(_) | Key::VipRange(_) | Key::SetElement(_) => None,
            Key::SourceRanges(service, _) => Some(service.clone()),
            Key::VirtualServer(front_end) | Key::Flows(front_end) => self.desired.owner(front_end).cloned(),
            Key::Vip(address) => self.desired.claimants(*address).next().cloned(),
        };
        report.failures.push(Failure { key: key.clone(), service, error: error.clone(), is_repeated });
        let is_drift = before.is_some_and(|retry| retry.is_drift);
        self.retries.insert(key, Retry { backoff, error, is_drift });
    }
}

/// A set of keys that is planned and applied before the next set is planned.
enum Stage {
    /// Tables that may have to be rebuilt.
    Tables(BTreeSet<Key>),
    /// All other keys, or some of them.
    Others(BTreeSet<Key>),
    /// VIPs and ranges again: what bound them before goes once something else binds them.
    SupersededBindings(BTreeSet<Key>),
    /// Tables again: ranges whose routes are deleted need no guard any more.
    StrayRangeGuards,
}

fn only_bindings(keys: &BTreeSet<Key>) -> BTreeSet<Key> {
    keys.iter().filter(|key| matches!(key, Key::Vip(_) | Key::VipRange(_))).cloned().collect()
}

/// Whether operations on a virtual server leave UDP flows in connection tracking that lead to a deleted real server, or that
/// began while there was none.
fn leaves_stale_flows(front_end: &FrontEnd, operations: &[Operation], mirror: &Mirror) -> bool {
    let had_none = mirror.server(front_end).is_none_or(|held| held.real_servers.is_empty());
    front_end.protocol == Protocol::Udp
        && operations.iter().any(|operation| match operation {
            Operation::DeleteVirtualServer(_) | Operation::DeleteRealServer(..) | Operation::RemoveFrontEnd(..) => true,
            Operation::AddRealServer(..) => had_none,
            _ => false,
        })
}
