//! From keys to the kernel: plans, in the parts that are decided one after the other, and what comes of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use service_watch::Protocol;
use tracing::debug;

use super::{Pending, PlanReason, Reconciler, retention};
use crate::backoff::Backoff;
use crate::diff::{DiffContext, diff};
use crate::filter::FrontEndElements;
use crate::front_end::FrontEnd;
use crate::kernel::{Cause, Kernel, KernelError, Scope};
use crate::mirror::Mirror;
use crate::plan::{Key, Operation, Phase, Plan};
use crate::report::{Failure, PlanErrors, SyncReport};

/// A failed operation is tried again after this time, then after twice that, and so on.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// kube-proxy looks after draining real servers once a minute; the first looks come sooner, as most are idle by then.
const DRAIN_FIRST: Duration = Duration::from_millis(100);

/// About so many keys are planned together. Each part is a transaction of `nf_tables` and a look at connection tracking of its
/// own, so it is not small either.
const KEYS_PER_PLAN: usize = 2000;

impl<K: Kernel> Reconciler<K> {
    /// Plans and applies, at most twice: where the mirror turns out to be wrong about a key, that key is read and planned
    /// again.
    pub(super) fn execute(
        &mut self,
        mut keys: BTreeSet<Key>,
        reason: PlanReason,
        now: Instant,
        report: &mut SyncReport,
    ) {
        for is_last in [false, true] {
            // A table that is made anew has all that belongs in it: what else is to be done shows afterwards.
            let (tables, others): (BTreeSet<_>, BTreeSet<_>) =
                keys.into_iter().partition(|key| matches!(key, Key::Table(_)));
            let bindings = if self.may_be_bound_twice() { only_bindings(&others) } else { BTreeSet::new() };
            let mut findings = PlanErrors::default();
            let others = self.split_by_address(others).into_iter().map(Stage::Others);
            for part in std::iter::once(Stage::Tables(tables))
                .chain(others)
                .chain([Stage::Superseded(bindings), Stage::TablesAgain])
            {
                let Some(mut keys) = self.stage_keys(part, &findings) else { continue };
                // After a socket that failed it is open what the kernel holds: the rest waits for the next reading.
                let Some(found) = self.apply_guarded(&mut keys, reason, now, &findings, report) else { break };
                for key in keys.iter().filter(|key| !found.concern(key)) {
                    self.pending.remove(key);
                }
                self.count_drains(&keys);
                findings.extend(found);
            }
            if is_last {
                findings.failed.append(&mut findings.stale);
            }
            for (key, error) in std::mem::take(&mut findings.failed) {
                self.fail(key, error.text, now, report);
            }
            if findings.stale.is_empty() || self.mirror.is_none() {
                return;
            }
            match self.reread_stale(findings) {
                Ok(again) => keys = again,
                Err((stale, error)) => {
                    for key in stale {
                        self.fail(key, error.text.clone(), now, report);
                    }
                    return;
                }
            }
        }
    }

    /// What is planned at a time. The plan for a whole cluster would be larger than all the agent knows; and in a plan only
    /// what is said of one address depends on each other. What else front ends refer to comes before all of them, and goes
    /// after all of them.
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
                Key::SourceRanges(service, family) => self.desired.sources(service, *family).is_some(),
                Key::SetElement(element) => self.desired.wants_element(element),
                Key::VipRange(range) => self.policy.binding.ranges().contains(range),
            };
            if is_wanted { &mut first } else { &mut last }.insert(key);
        }
        let mut plans = vec![first];
        for keys in by_address.into_values() {
            match plans.last_mut() {
                Some(part) if part.len() < KEYS_PER_PLAN => part.extend(keys),
                _ => plans.push(keys.into_iter().collect()),
            }
        }
        plans.push(last);
        plans
    }

    /// Whether there may be VIPs that are bound by more than is wanted.
    fn may_be_bound_twice(&self) -> bool {
        self.policy.binding.is_routes() || self.mirror.as_ref().is_some_and(Mirror::has_routes)
    }

    /// What is to be looked at in a part; `None` where there is nothing to do.
    fn stage_keys(&mut self, part: Stage, findings: &PlanErrors) -> Option<BTreeSet<Key>> {
        match part {
            Stage::Tables(keys) | Stage::Others(keys) => Some(keys),
            Stage::Superseded(mut keys) => {
                // What failed has its own time.
                keys.retain(|key| !findings.concern(key));
                (!keys.is_empty()).then_some(keys)
            }
            Stage::TablesAgain => {
                let had_stray = !self.stray_ranges.is_empty();
                let is_otherwise = had_stray && self.mirror.is_some() && self.find_stray_ranges();
                is_otherwise.then(|| self.filters().filter(|table| !findings.concern(table)).collect())
            }
        }
    }

    /// Plans and applies once: first what the packet filter must know, then what it guards, and last what it may forget.
    /// Nothing is opened whose guard failed, and no guard is taken from what could not be closed; what was open is kept
    /// right all the same. Where a family's table could not be built, nothing of the family is even tried.
    fn apply_guarded(
        &mut self,
        keys: &mut BTreeSet<Key>,
        reason: PlanReason,
        now: Instant,
        before: &PlanErrors,
        report: &mut SyncReport,
    ) -> Option<PlanErrors> {
        let mut guards = self.plan(keys, reason, now)?;
        // Keys whose guard is not even tried.
        let mut hopeless = BTreeSet::new();
        guards.retain(|operation| {
            let table = operation.filter_family().map(Key::Table).filter(|table| *table != operation.key());
            let is_hopeless =
                table.is_some_and(|table| before.failed.contains_key(&table) || self.pending.contains_key(&table));
            if is_hopeless {
                hopeless.insert(operation.key());
            }
            !is_hopeless
        });
        let mut rest = guards.split_off(Phase::Device);
        let mut last = rest.split_off(Phase::FilterOut);
        let mut findings = PlanErrors::default();
        if !guards.is_empty() {
            let results = self.kernel.apply(&guards);
            findings = self.record_results(&guards, results, report);
        }
        let is_unguarded = |key: &Key| findings.concern(key) || hopeless.contains(key);
        let mut closed = BTreeSet::new();
        rest.retain(|operation| match operation {
            Operation::BindAddress(_) | Operation::AddRoute(_) => !is_unguarded(&operation.key()),
            Operation::AddVirtualServer(front_end, _) if is_unguarded(&operation.key()) => {
                closed.insert(*front_end);
                false
            }
            Operation::AddRealServer(front_end, _) | Operation::DeleteUntranslatedFlows(front_end, _) => {
                !closed.contains(front_end)
            }
            _ => true,
        });
        if !rest.is_empty() && self.mirror.is_some() {
            let results = self.kernel.apply(&rest);
            findings.extend(self.record_results(&rest, results, report));
        }
        // Source ranges wait for the front ends that refer to them, and are tried again with those.
        let (mut kept, mut held) = (BTreeMap::new(), Vec::new());
        last.retain(|operation| {
            let is_kept = findings.concern(&operation.key());
            match operation {
                Operation::RemoveFrontEnd(_, FrontEndElements { sources: Some(Some(service)), .. }) if is_kept => {
                    kept.insert(service.clone(), operation.key());
                }
                Operation::RemoveSourceRanges(service, _) => {
                    if let Some(front_end) = kept.get(service) {
                        held.push((operation.key(), front_end.clone()));
                        return false;
                    }
                }
                _ => {}
            }
            !is_kept
        });
        for (sources, front_end) in held {
            findings.share(&front_end, &sources);
        }
        if !last.is_empty() && self.mirror.is_some() {
            let results = self.kernel.apply(&last);
            findings.extend(self.record_results(&last, results, report));
        }
        Some(findings)
    }

    /// What the keys need, and when those that drain are to be looked at. Without a device, that is among the keys.
    fn plan(&mut self, keys: &mut BTreeSet<Key>, reason: PlanReason, now: Instant) -> Option<Plan> {
        let mirror = self.mirror.as_ref()?;
        let has_device = if self.policy.binding.is_routes() { mirror.accepts_routes() } else { mirror.has_device() };
        if !has_device && keys.iter().any(|key| matches!(key, Key::Vip(_) | Key::VipRange(_))) {
            keys.insert(Key::Device);
        }
        let mut operations = Vec::new();
        let mut drains = Vec::new();
        let is_overdue = |front_end: &FrontEnd, address| self.is_overdue(front_end, address, now);
        let retention = retention(reason, &self.table, &self.policy);
        let (rulesets, binding) = (&self.rulesets, &self.policy.binding);
        let context = DiffContext { retention, rulesets, binding, is_overdue: &is_overdue };
        for key in &*keys {
            let start = operations.len();
            let is_draining = diff(key, mirror, &self.desired, context, &mut operations);
            if let Key::VirtualServer(front_end) = key {
                let began = operations[start..].iter().any(|o| matches!(o, Operation::DrainRealServer(..)));
                drains.push((*front_end, is_draining, began));
                let alive = || self.desired.real_servers(front_end);
                if operations[start..].iter().any(|o| matches!(o, Operation::AddVirtualServer(..))) {
                    operations.push(Operation::DeleteUntranslatedFlows(*front_end, alive()));
                } else if leaves_stale_flows(front_end, &operations[start..], mirror) {
                    operations.push(Operation::DeleteStaleFlows(*front_end, alive()));
                }
            }
        }
        for (front_end, is_draining, began) in drains {
            self.reschedule(front_end, is_draining, began, now);
        }
        Some(operations.into_iter().collect())
    }

    /// When to look again at a virtual server: soon after it began to drain, then ever more rarely, but not later than the
    /// drain's end.
    fn reschedule(&mut self, front_end: FrontEnd, is_draining: bool, has_begun: bool, now: Instant) {
        if !is_draining {
            self.draining.remove(&front_end);
            self.drain_since.remove(&front_end);
            return;
        }
        // Where the kernel refused it, it has not begun, and would not sooner for being asked again at once.
        let has_begun = has_begun && !self.pending.contains_key(&Key::VirtualServer(front_end));
        let again = match self.draining.again(&front_end) {
            Some(again) if !has_begun && again.due > now => again.clone(),
            Some(again) if !has_begun => again.longer(now),
            _ => Backoff::after(DRAIN_FIRST, now),
        };
        let end = self.policy.drain_timeout.and_then(|timeout| self.drain_end(front_end, timeout, now));
        let due = end.map_or(again.due, |end| end.clamp(now, again.due));
        self.draining.insert(front_end, Backoff { due, ..again });
    }

    /// Counts the real servers that drain, at the keys where something may have changed.
    fn count_drains(&mut self, keys: &BTreeSet<Key>) {
        for key in keys {
            if let Key::VirtualServer(front_end) = key
                && self.draining.contains(front_end)
            {
                let count = self.unwanted_count(front_end);
                self.draining.set_count(front_end, count);
            }
        }
    }

    /// Notes since when the real servers of a front end drain, and says when the first of them has done so for too long.
    fn drain_end(&mut self, front_end: FrontEnd, timeout: Duration, now: Instant) -> Option<Instant> {
        let held = self.mirror.as_ref()?.server(&front_end)?;
        let wanted = self.desired.real_servers(&front_end);
        let before = self.drain_since.remove(&front_end).unwrap_or_default();
        let draining = held.real_servers.places().iter().filter(|address| wanted.binary_search(address).is_err());
        let since: BTreeMap<SocketAddr, Instant> = draining
            .map(|address| SocketAddr::from(*address))
            .map(|address| (address, before.get(&address).copied().unwrap_or(now)))
            .collect();
        let first = since.values().min().map(|since| *since + timeout);
        self.drain_since.insert(front_end, since);
        first
    }

    /// Takes the results of a plan into the mirror.
    fn record_results(
        &mut self,
        plan: &Plan,
        results: Vec<Result<(), KernelError>>,
        report: &mut SyncReport,
    ) -> PlanErrors {
        let mut findings = PlanErrors::default();
        let Some(mirror) = &mut self.mirror else { return findings };
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
                // Somebody was faster, to the same end. (Of a virtual server that is looked up: what proves that it is ours
                // goes after it.)
                (Operation::AddDevice | Operation::BindAddress(_) | Operation::AddRoute(_), Cause::Exists)
                | (Operation::UnbindAddress(_) | Operation::RemoveRoute(_), Cause::NotFound | Cause::NoDevice) => {
                    mirror.acknowledge(operation);
                }
                // Making a device, an address or a route does not fail for want of it.
                (
                    Operation::AddDevice
                    | Operation::SetDeviceUp
                    | Operation::BindAddress(_)
                    | Operation::AddRoute(_)
                    | Operation::BuildTable { .. },
                    Cause::NotFound,
                )
                | (_, Cause::Refused | Cause::Unknown) => {
                    findings.failed.entry(operation.key()).or_insert(error);
                }
                (_, Cause::Exists | Cause::NotFound | Cause::NoDevice) => {
                    let key = operation.key();
                    let is_filter = operation.filter_family().is_some();
                    findings.is_filter_stale |= is_filter;
                    findings.is_device_lost |=
                        !is_filter && matches!(key, Key::Device | Key::Vip(_) | Key::VipRange(_));
                    findings.stale.entry(key).or_insert(error);
                }
            }
        }
        // The real servers of a virtual server that was refused are missing their virtual server: no news.
        findings.stale.retain(|key, _| !findings.failed.contains_key(key));
        if findings.failed.values().any(|error| error.cause == Cause::Unknown) {
            self.mirror = None;
        }
        findings
    }

    /// Corrects the mirror about some keys and returns the keys to be planned again.
    fn reread_stale(&mut self, findings: PlanErrors) -> Result<BTreeSet<Key>, (BTreeSet<Key>, KernelError)> {
        let mut keys: BTreeSet<Key> = findings.stale.into_keys().collect();
        let servers: Vec<FrontEnd> = keys
            .iter()
            .filter_map(|key| match key {
                Key::VirtualServer(front_end) => Some(*front_end),
                _ => None,
            })
            .collect();
        if findings.is_filter_stale {
            let observed = match self.kernel.dump(Scope::Filter) {
                Ok(observed) => observed,
                Err(error) => return Err((keys, error)),
            };
            if let Some(mirror) = &mut self.mirror {
                mirror.refresh_filter(observed.filter);
            }
            keys.extend(self.policy.families.iter().map(Key::Table));
            keys.extend(self.desired.keys());
        }
        if let Err(error) = self.refresh(&servers) {
            return Err((keys, error));
        }
        // Of the others only one thing can be stale: the device went away, and with it every address.
        if findings.is_device_lost
            && let Some(mirror) = &mut self.mirror
        {
            mirror.forget_device();
            keys.insert(Key::Device);
            keys.extend(self.desired.keys().filter(|key| matches!(key, Key::Vip(_))).chain(self.ranges()));
        }
        Ok(keys)
    }

    fn fail(&mut self, key: Key, error: String, now: Instant, report: &mut SyncReport) {
        let before = self.pending.get(&key);
        let is_repeated = before.is_some_and(|pending| pending.error == error);
        let again = before.map_or_else(|| Backoff::after(RETRY_FIRST, now), |pending| pending.again.longer(now));
        let service = match &key {
            Key::Device | Key::Table(_) | Key::VipRange(_) | Key::SetElement(_) => None,
            Key::SourceRanges(service, _) => Some(service.clone()),
            Key::VirtualServer(front_end) | Key::Flows(front_end) => self.desired.owner(front_end).cloned(),
            Key::Vip(address) => self.desired.claimants(*address).next().cloned(),
        };
        report.failures.push(Failure { key: key.clone(), service, error: error.clone(), is_repeated });
        let is_drift = before.is_some_and(|pending| pending.is_drift);
        self.pending.insert(key, Pending { again, error, is_drift });
    }
}

/// What is looked at together, each part after the last.
enum Stage {
    Tables(BTreeSet<Key>),
    Others(BTreeSet<Key>),
    /// What bound VIPs before, now that something else does.
    Superseded(BTreeSet<Key>),
    /// Ranges whose routes are gone need no guard any more.
    TablesAgain,
}

fn only_bindings(keys: &BTreeSet<Key>) -> BTreeSet<Key> {
    keys.iter().filter(|key| matches!(key, Key::Vip(_) | Key::VipRange(_))).cloned().collect()
}

/// Whether operations on a virtual server leave UDP flows in connection tracking that lead to where nobody answers any
/// more, or that began when nobody did.
fn leaves_stale_flows(front_end: &FrontEnd, operations: &[Operation], mirror: &Mirror) -> bool {
    let had_none = mirror.server(front_end).is_none_or(|held| held.real_servers.is_empty());
    front_end.protocol == Protocol::Udp
        && operations.iter().any(|operation| match operation {
            Operation::DeleteVirtualServer(_) | Operation::DeleteRealServer(..) | Operation::RemoveFrontEnd(..) => true,
            Operation::AddRealServer(..) => had_none,
            _ => false,
        })
}
