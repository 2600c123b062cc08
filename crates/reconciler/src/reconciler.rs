//! The reconciler: takes changes in, and brings the kernel to what they ask for. Synchronous, and without a clock of its
//! own: the caller says what time it is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ipvs_netlink::Family;
use service_watch::{Change, ObjectName, Protocol};
use tracing::debug;

use crate::again::Again;
use crate::contribution::{Contribution, Direction, HealthCheck};
use crate::desired::Desired;
use crate::diff::{Context, Keeps, diff};
use crate::filter::Elements;
use crate::filter::ruleset::Ruleset;
use crate::front_end::FrontEnd;
use crate::kernel::{Cause, Kernel, KernelError, Scope};
use crate::mirror::Mirror;
use crate::node::NodeView;
use crate::outcome::{Failure, Findings, Outcome, Totals};
use crate::plan::{Key, Operation, Phase, Plan};
use crate::policy::{DetectLocal, NodePortAddresses, Policy};
use crate::table::{Dirty, ServiceTable};
use crate::urgent::is_urgent;

/// A failed operation is tried again after this time, then after twice that, and so on.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// kube-proxy looks after draining real servers once a minute; the first looks come sooner, as most are idle by then.
const DRAIN_FIRST: Duration = Duration::from_millis(100);

/// A key whose last operation failed.
#[derive(Clone, Debug)]
struct Pending {
    again: Again,
    error: String,
    /// Whether it was as desired before, and somebody else changed it.
    is_drift: bool,
}

/// Brings a kernel to what Services ask for.
#[derive(Debug)]
pub struct Reconciler<K> {
    kernel: K,
    policy: Policy,
    table: ServiceTable,
    /// Addresses of all interfaces but `kube-ipvs0`, as they were last read.
    interfaces: BTreeSet<IpAddr>,
    /// Whether they have changed since.
    are_interfaces_stale: bool,
    node: NodeView,
    /// The constant part of the packet filter, one for each family.
    rulesets: Vec<Arc<Ruleset>>,
    desired: Desired,
    /// `None` before the first dump, and after a failure that leaves open what the kernel holds.
    mirror: Option<Mirror>,
    dirty_services: BTreeSet<ObjectName>,
    is_node_dirty: bool,
    dirty: BTreeSet<Key>,
    pending: BTreeMap<Key, Pending>,
    draining: BTreeMap<FrontEnd, Again>,
    /// Since when real servers are known to drain, where there is a limit to it. After a restart it begins anew.
    drain_since: BTreeMap<FrontEnd, BTreeMap<SocketAddr, Instant>>,
    /// VIPs that were reported as refused.
    refused: BTreeMap<ObjectName, Vec<IpAddr>>,
    /// What load balancers are told; Services without such a port are not here.
    health_checks: BTreeMap<ObjectName, Vec<HealthCheck>>,
    /// When the slices that changed since the last sync began to say what they say.
    triggers: Vec<(Family, SystemTime)>,
}

impl<K: Kernel> Reconciler<K> {
    /// One that knows nothing yet.
    pub fn new(kernel: K, policy: Policy) -> Self {
        let node = NodeView::default();
        Self {
            kernel,
            rulesets: rulesets(&policy, &node),
            policy,
            table: ServiceTable::default(),
            interfaces: BTreeSet::new(),
            are_interfaces_stale: false,
            node,
            desired: Desired::default(),
            mirror: None,
            dirty_services: BTreeSet::new(),
            is_node_dirty: true,
            dirty: BTreeSet::new(),
            pending: BTreeMap::new(),
            draining: BTreeMap::new(),
            drain_since: BTreeMap::new(),
            refused: BTreeMap::new(),
            health_checks: BTreeMap::new(),
            triggers: Vec::new(),
        }
    }

    /// Takes in a change. Nothing reaches the kernel before the next sync.
    pub fn apply(&mut self, change: Change) {
        let trigger = match &change {
            Change::Slice(slice) => {
                let family = slice.endpoints.first().map(|endpoint| Family::of(endpoint.address));
                family.zip(slice.triggered)
            }
            _ => None,
        };
        match self.table.apply(change) {
            Dirty::Services(names) => {
                self.triggers.extend(trigger.filter(|_| !names.is_empty()));
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
    pub fn next_look(&self) -> Option<Instant> {
        let pending = self.pending.values().map(|pending| pending.again.due);
        pending.chain(self.draining.values().map(|again| again.due)).min()
    }

    /// Whether what is configured takes something of the own Node that is not known yet: its addresses for NodePorts, or
    /// the ranges of its pods.
    pub fn lacks_node(&self) -> bool {
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
    pub fn sync(&mut self, now: Instant) -> Result<Outcome, KernelError> {
        if self.mirror.is_none() {
            return self.audit(now);
        }
        let mut outcome = Outcome::default();
        if self.are_interfaces_stale {
            let observed = self.kernel.dump(Scope::Interfaces)?;
            self.set_interfaces(observed.interfaces);
        }
        self.recompute(&mut outcome);
        let mut keys = std::mem::take(&mut self.dirty);
        keys.extend(self.pending.iter().filter(|(_, pending)| pending.again.due <= now).map(|(key, _)| key.clone()));
        // What drains is read before it is looked at, when its time has come and when something else about it is due.
        let is_due = |front_end: &FrontEnd, again: &Again| again.due <= now || keys.contains(&Key::Server(*front_end));
        let drained: Vec<FrontEnd> =
            self.draining.iter().filter(|(key, again)| is_due(key, again)).map(|(key, _)| *key).collect();
        let looked = self.refresh(&drained);
        keys.extend(drained.into_iter().map(Key::Server));
        if let Err(error) = looked {
            // Unread, they would be planned from a stale mirror.
            self.dirty = keys;
            return Err(error);
        }
        self.execute(keys, Origin::Change, now, &mut outcome);
        self.conclude(&mut outcome);
        Ok(outcome)
    }

    /// Reads everything from the kernel and repairs what is otherwise than desired.
    pub fn audit(&mut self, now: Instant) -> Result<Outcome, KernelError> {
        let is_first = self.mirror.is_none();
        let mut outcome = Outcome { audited: true, is_first, ..Outcome::default() };
        let mut observed = self.kernel.dump(Scope::All)?;
        self.set_interfaces(std::mem::take(&mut observed.interfaces));
        self.recompute(&mut outcome);
        let mirror = Mirror::from_dump(observed);
        let whole = self.policy.families.iter().map(Key::Filter).chain([Key::Device]);
        let mut keys: BTreeSet<Key> = mirror.keys().chain(self.desired.keys()).chain(whole).collect();
        self.mirror = Some(mirror);
        let mut changed = std::mem::take(&mut self.dirty);
        let first = if is_first {
            changed.clear();
            // An agent that was killed may have deleted a real server and not its flows.
            let udp = self.desired.front_ends().filter(|front_end| front_end.protocol == Protocol::Udp);
            keys.extend(udp.copied().map(Key::Flows));
            let (urgent, rest) = keys.into_iter().partition(|key| self.is_urgent(key));
            keys = rest;
            (urgent, Origin::Reading)
        } else {
            outcome.drifted = self.drifted(&keys, &changed, now);
            keys.retain(|key| !changed.contains(key));
            (changed, Origin::Change)
        };
        self.execute(first.0, first.1, now, &mut outcome);
        // A socket that failed leaves the mirror open: the rest waits for the next reading.
        if self.mirror.is_some() {
            self.execute(keys, Origin::Reading, now, &mut outcome);
        }
        for key in &outcome.drifted {
            if let Some(pending) = self.pending.get_mut(key) {
                pending.is_drift = true;
            }
        }
        self.conclude(&mut outcome);
        Ok(outcome)
    }

    /// What is to be told when all is done.
    fn conclude(&mut self, outcome: &mut Outcome) {
        outcome.triggers = std::mem::take(&mut self.triggers);
        outcome.account = self.kernel.account();
        for (key, pending) in &self.pending {
            let is_whole = matches!(key, Key::Device | Key::Filter(_));
            if is_whole || pending.is_drift {
                outcome.unrepaired.extend(self.policy.families.iter().filter(|family| key.is_of(*family)));
            }
        }
        let without_local =
            |direction| [Family::Ipv4, Family::Ipv6].map(|family| self.desired.without_local(direction, family));
        outcome.totals = Totals {
            services: self.desired.service_count(),
            virtual_servers: self.desired.server_count(),
            real_servers: self.mirror.as_ref().map_or(0, Mirror::real_server_count),
            vips: self.desired.address_count(),
            draining: self.draining.keys().map(|front_end| self.unwanted_count(front_end)).sum(),
            failing: self.pending.len(),
            internal_without_local: without_local(Direction::Internal),
            external_without_local: without_local(Direction::External),
        };
    }

    /// How many real servers a virtual server has that are not wanted.
    fn unwanted_count(&self, front_end: &FrontEnd) -> usize {
        let Some(held) = self.mirror.as_ref().and_then(|mirror| mirror.server(front_end)) else { return 0 };
        let wanted = self.desired.real_servers(front_end);
        held.real_servers.keys().filter(|address| wanted.binary_search(address).is_err()).count()
    }

    fn set_interfaces(&mut self, interfaces: BTreeSet<IpAddr>) {
        self.are_interfaces_stale = false;
        if self.interfaces != interfaces {
            self.interfaces = interfaces;
            self.is_node_dirty = true;
        }
    }

    /// Recomputes the contributions of all Services that changed.
    fn recompute(&mut self, outcome: &mut Outcome) {
        let mut names = std::mem::take(&mut self.dirty_services);
        if std::mem::take(&mut self.is_node_dirty) {
            let node = NodeView::new(self.table.node(), self.table.neighbours(), &self.interfaces, &self.policy);
            if node != self.node {
                self.node = node;
                let rulesets = rulesets(&self.policy, &self.node);
                if rulesets != self.rulesets {
                    self.rulesets = rulesets;
                    self.dirty.extend(self.policy.families.iter().map(Key::Filter));
                }
                // Beside those that are gone from the table.
                names.extend(self.table.names().cloned());
            }
        }
        for name in &names {
            let entry = self.table.get(name);
            let contribution = entry.map(|entry| Contribution::of(entry, &self.node, &self.policy)).unwrap_or_default();
            let service = entry.and_then(|entry| entry.service.as_deref());
            let before = self.refused.remove(name).unwrap_or_default();
            let new = contribution.refused.iter().filter(|vip| !before.contains(vip));
            outcome.refused.extend(new.map(|vip| (name.clone(), *vip)));
            if !contribution.refused.is_empty() {
                self.refused.insert(name.clone(), contribution.refused.clone());
            }
            let told = self.health_checks.get(name).map(Vec::as_slice).unwrap_or_default();
            if told != contribution.health_checks.as_slice() {
                outcome.health_checks.push((name.clone(), contribution.health_checks.clone()));
                if contribution.health_checks.is_empty() {
                    self.health_checks.remove(name);
                } else {
                    self.health_checks.insert(name.clone(), contribution.health_checks.clone());
                }
            }
            self.desired.update(name, service, contribution, &mut self.dirty, &mut outcome.clashes);
        }
    }

    fn refresh(&mut self, front_ends: &[FrontEnd]) -> Result<(), KernelError> {
        if let Some(mirror) = &mut self.mirror
            && !front_ends.is_empty()
        {
            mirror.refresh(front_ends, self.kernel.dump(Scope::Servers(front_ends))?);
        }
        Ok(())
    }

    /// The keys that need operations although nothing changed them and nothing about them was pending.
    fn drifted(&self, keys: &BTreeSet<Key>, expected: &BTreeSet<Key>, now: Instant) -> Vec<Key> {
        let Some(mirror) = &self.mirror else { return Vec::new() };
        let is_known = |key: &Key| {
            expected.contains(key)
                || self.pending.contains_key(key)
                || matches!(key, Key::Server(front_end) if self.draining.contains_key(front_end))
        };
        let mut operations = Vec::new();
        keys.iter()
            .filter(|key| !is_known(key))
            .filter(|key| {
                operations.clear();
                let is_overdue = |front_end: &FrontEnd, address| self.is_overdue(front_end, address, now);
                let keeps = keeps(Origin::Reading, &self.table, &self.policy);
                let context = Context { keeps, rulesets: &self.rulesets, is_overdue: &is_overdue };
                diff(key, mirror, &self.desired, context, &mut operations);
                !operations.is_empty()
            })
            .cloned()
            .collect()
    }

    /// Whether a real server has drained for as long as it may.
    fn is_overdue(&self, front_end: &FrontEnd, address: SocketAddr, now: Instant) -> bool {
        let since = self.drain_since.get(front_end).and_then(|since| since.get(&address));
        self.policy.drain_timeout.zip(since).is_some_and(|(timeout, since)| now >= *since + timeout)
    }

    fn is_urgent(&self, key: &Key) -> bool {
        let is_urgent = |name: &ObjectName| {
            self.table.get(name).and_then(|entry| entry.service.as_ref()).is_some_and(|service| is_urgent(service))
        };
        match key {
            Key::Device | Key::Filter(_) => true,
            Key::Sources(service, _) => is_urgent(service),
            Key::Server(front_end) => self.desired.owner(front_end).is_some_and(is_urgent),
            Key::Address(address) => self.desired.claimants(*address).any(is_urgent),
            Key::Entry(_) | Key::Flows(_) => false,
        }
    }

    /// Plans and applies, at most twice: where the mirror turns out to be wrong about a key, that key is read and planned
    /// again.
    fn execute(&mut self, mut keys: BTreeSet<Key>, origin: Origin, now: Instant, outcome: &mut Outcome) {
        for is_last in [false, true] {
            // A table that is made anew has all that belongs in it: what else is to be done shows afterwards.
            let (tables, others) = keys.into_iter().partition(|key| matches!(key, Key::Filter(_)));
            let mut findings = Findings::default();
            for mut keys in [tables, others] {
                // After a socket that failed it is open what the kernel holds: the rest waits for the next reading.
                let Some(found) = self.carry_out(&mut keys, origin, now, &findings, outcome) else { break };
                for key in keys.iter().filter(|key| !found.concern(key)) {
                    self.pending.remove(key);
                }
                findings.extend(found);
            }
            if is_last {
                findings.failed.append(&mut findings.stale);
            }
            for (key, error) in std::mem::take(&mut findings.failed) {
                self.fail(key, error.text, now, outcome);
            }
            if findings.stale.is_empty() || self.mirror.is_none() {
                return;
            }
            match self.reread(findings) {
                Ok(again) => keys = again,
                Err((stale, error)) => {
                    for key in stale {
                        self.fail(key, error.text.clone(), now, outcome);
                    }
                    return;
                }
            }
        }
    }

    /// Plans and applies once: first what the packet filter must know, then what it guards, and last what it may forget.
    /// Nothing is opened whose guard failed, and no guard is taken from what could not be closed; what was open is kept
    /// right all the same. Where a family's table could not be built, nothing of the family is even tried.
    fn carry_out(
        &mut self,
        keys: &mut BTreeSet<Key>,
        origin: Origin,
        now: Instant,
        before: &Findings,
        outcome: &mut Outcome,
    ) -> Option<Findings> {
        let mut guards = self.plan(keys, origin, now)?;
        // Keys whose guard is not even tried.
        let mut hopeless = BTreeSet::new();
        guards.retain(|operation| {
            let table = operation.filter_family().map(Key::Filter).filter(|table| *table != operation.key());
            let is_hopeless =
                table.is_some_and(|table| before.failed.contains_key(&table) || self.pending.contains_key(&table));
            if is_hopeless {
                hopeless.insert(operation.key());
            }
            !is_hopeless
        });
        let mut rest = guards.split_off(Phase::Device);
        let mut last = rest.split_off(Phase::FilterOut);
        let mut findings = Findings::default();
        if !guards.is_empty() {
            let results = self.kernel.apply(&guards);
            findings = self.take_in(&guards, results, outcome);
        }
        let is_unguarded = |key: &Key| findings.concern(key) || hopeless.contains(key);
        let mut closed = BTreeSet::new();
        rest.retain(|operation| match operation {
            Operation::BindAddress(_) => !is_unguarded(&operation.key()),
            Operation::AddVirtualServer(front_end, _) if is_unguarded(&operation.key()) => {
                closed.insert(*front_end);
                false
            }
            Operation::AddRealServer(front_end, _) | Operation::ClearFlows(front_end, _) => !closed.contains(front_end),
            _ => true,
        });
        if !rest.is_empty() && self.mirror.is_some() {
            let results = self.kernel.apply(&rest);
            findings.extend(self.take_in(&rest, results, outcome));
        }
        let mut kept = BTreeSet::new();
        last.retain(|operation| {
            let is_kept = findings.concern(&operation.key());
            if let Operation::ForgetFrontEnd(_, Elements { sources: Some(Some(service)), .. }) = operation
                && is_kept
            {
                kept.insert(service.clone());
            }
            !is_kept && !matches!(operation, Operation::RemoveSources(service, _) if kept.contains(service))
        });
        if !last.is_empty() && self.mirror.is_some() {
            let results = self.kernel.apply(&last);
            findings.extend(self.take_in(&last, results, outcome));
        }
        Some(findings)
    }

    /// What the keys need, and when those that drain are to be looked at. Without a device, that is among the keys.
    fn plan(&mut self, keys: &mut BTreeSet<Key>, origin: Origin, now: Instant) -> Option<Plan> {
        let mirror = self.mirror.as_ref()?;
        if !mirror.has_device() && keys.iter().any(|key| matches!(key, Key::Address(_))) {
            keys.insert(Key::Device);
        }
        let mut operations = Vec::new();
        let mut drains = Vec::new();
        let is_overdue = |front_end: &FrontEnd, address| self.is_overdue(front_end, address, now);
        let kept = keeps(origin, &self.table, &self.policy);
        let context = Context { keeps: kept, rulesets: &self.rulesets, is_overdue: &is_overdue };
        for key in &*keys {
            let start = operations.len();
            let is_draining = diff(key, mirror, &self.desired, context, &mut operations);
            if let Key::Server(front_end) = key {
                let began = operations[start..].iter().any(|o| matches!(o, Operation::DrainRealServer(..)));
                drains.push((*front_end, is_draining, began));
                let alive = || self.desired.real_servers(front_end);
                if operations[start..].iter().any(|o| matches!(o, Operation::AddVirtualServer(..))) {
                    operations.push(Operation::ClearFlows(*front_end, alive()));
                } else if moves_flows(front_end, &operations[start..], mirror) {
                    operations.push(Operation::FlushFlows(*front_end, alive()));
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
        let again = match self.draining.get(&front_end) {
            Some(again) if !has_begun && again.due > now => again.clone(),
            Some(again) if !has_begun => again.longer(now),
            _ => Again::after(DRAIN_FIRST, now),
        };
        let end = self.policy.drain_timeout.and_then(|timeout| self.drain_end(front_end, timeout, now));
        let due = end.map_or(again.due, |end| end.clamp(now, again.due));
        self.draining.insert(front_end, Again { due, ..again });
    }

    /// Notes since when the real servers of a front end drain, and says when the first of them has done so for too long.
    fn drain_end(&mut self, front_end: FrontEnd, timeout: Duration, now: Instant) -> Option<Instant> {
        let held = self.mirror.as_ref()?.server(&front_end)?;
        let wanted = self.desired.real_servers(&front_end);
        let before = self.drain_since.remove(&front_end).unwrap_or_default();
        let draining = held.real_servers.keys().filter(|address| wanted.binary_search(address).is_err());
        let since: BTreeMap<SocketAddr, Instant> =
            draining.map(|address| (*address, before.get(address).copied().unwrap_or(now))).collect();
        let first = since.values().min().map(|since| *since + timeout);
        self.drain_since.insert(front_end, since);
        first
    }

    /// Takes the results of a plan into the mirror.
    fn take_in(&mut self, plan: &Plan, results: Vec<Result<(), KernelError>>, outcome: &mut Outcome) -> Findings {
        let mut findings = Findings::default();
        let Some(mirror) = &mut self.mirror else { return findings };
        for (operation, result) in plan.operations().iter().zip(results) {
            let error = match result {
                Ok(()) => {
                    debug!("done: {operation}");
                    mirror.acknowledge(operation);
                    outcome.done.count(operation);
                    continue;
                }
                Err(error) => error,
            };
            match (operation, error.cause) {
                // Somebody was faster, to the same end.
                (Operation::AddDevice | Operation::BindAddress(_), Cause::Exists)
                | (Operation::UnbindAddress(_), Cause::NotFound | Cause::NoDevice)
                | (Operation::DeleteVirtualServer(_), Cause::NotFound) => mirror.acknowledge(operation),
                // Making a device or an address does not fail for want of it.
                (Operation::AddDevice | Operation::BindAddress(_) | Operation::BuildFilter { .. }, Cause::NotFound)
                | (_, Cause::Refused | Cause::Unknown) => {
                    findings.failed.entry(operation.key()).or_insert(error);
                }
                (_, Cause::Exists | Cause::NotFound | Cause::NoDevice) => {
                    let key = operation.key();
                    let is_filter = operation.filter_family().is_some();
                    findings.is_filter_stale |= is_filter;
                    findings.is_device_lost |= !is_filter && matches!(key, Key::Device | Key::Address(_));
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
    fn reread(&mut self, findings: Findings) -> Result<BTreeSet<Key>, (BTreeSet<Key>, KernelError)> {
        let mut keys: BTreeSet<Key> = findings.stale.into_keys().collect();
        let servers: Vec<FrontEnd> = keys
            .iter()
            .filter_map(|key| match key {
                Key::Server(front_end) => Some(*front_end),
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
            keys.extend(self.policy.families.iter().map(Key::Filter));
            keys.extend(self.desired.keys());
        }
        if let Err(error) = self.refresh(&servers) {
            return Err((keys, error));
        }
        // Of the others only one thing can be stale: the device went away, and with it every address.
        if findings.is_device_lost
            && let Some(mirror) = &mut self.mirror
        {
            mirror.lose_device();
            keys.insert(Key::Device);
            keys.extend(self.desired.keys().filter(|key| matches!(key, Key::Address(_))));
        }
        Ok(keys)
    }

    fn fail(&mut self, key: Key, error: String, now: Instant, outcome: &mut Outcome) {
        let before = self.pending.get(&key);
        let is_repeated = before.is_some_and(|pending| pending.error == error);
        let again = before.map_or_else(|| Again::after(RETRY_FIRST, now), |pending| pending.again.longer(now));
        let service = match &key {
            Key::Device | Key::Filter(_) | Key::Entry(_) => None,
            Key::Sources(service, _) => Some(service.clone()),
            Key::Server(front_end) | Key::Flows(front_end) => self.desired.owner(front_end).cloned(),
            Key::Address(address) => self.desired.claimants(*address).next().cloned(),
        };
        outcome.failures.push(Failure { key: key.clone(), service, error: error.clone(), is_repeated });
        let is_drift = before.is_some_and(|pending| pending.is_drift);
        self.pending.insert(key, Pending { again, error, is_drift });
    }
}

/// Why a key is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// Something about it changed.
    Change,
    /// Everything was read from the kernel.
    Reading,
}

/// What is kept although nobody wants it: while a source could not understand everything, what was merely found in the
/// kernel may be in the rest. What a change took away was understood.
fn keeps<'a>(origin: Origin, table: &ServiceTable, policy: &'a Policy) -> Keeps<'a> {
    match origin {
        Origin::Reading if table.is_incomplete() => Keeps::Everything,
        Origin::Reading | Origin::Change => Keeps::Within(&policy.exclude),
    }
}

/// Whether operations on a virtual server leave UDP flows in connection tracking that lead to where nobody answers any
/// more, or that began when nobody did.
fn moves_flows(front_end: &FrontEnd, operations: &[Operation], mirror: &Mirror) -> bool {
    let had_none = mirror.server(front_end).is_none_or(|held| held.real_servers.is_empty());
    front_end.protocol == Protocol::Udp
        && operations.iter().any(|operation| match operation {
            Operation::DeleteVirtualServer(_) | Operation::DeleteRealServer(..) | Operation::ForgetFrontEnd(..) => true,
            Operation::AddRealServer(..) => had_none,
            _ => false,
        })
}

fn rulesets(policy: &Policy, node: &NodeView) -> Vec<Arc<Ruleset>> {
    policy.families.iter().map(|family| Arc::new(Ruleset::new(family, policy, node))).collect()
}
