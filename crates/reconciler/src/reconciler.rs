//! The reconciler: takes changes in, and brings the kernel to what they ask for. Synchronous, and without a clock of its
//! own: the caller says what time it is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use service_watch::{Change, ObjectName};

use crate::contribution::Contribution;
use crate::desired::{Clash, Desired};
use crate::diff::{Keeps, diff};
use crate::kernel::{Cause, Kernel, KernelError, Scope};
use crate::mirror::Mirror;
use crate::node::NodeView;
use crate::plan::{FrontEnd, Key, Operation, Plan};
use crate::policy::Policy;
use crate::table::{Dirty, ServiceTable};
use crate::urgent::is_urgent;

/// A failed operation is tried again after this time, then after twice that, and so on.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// kube-proxy looks after draining real servers once a minute; the first looks come sooner, as most are idle by then.
const DRAIN_FIRST: Duration = Duration::from_millis(100);
/// The longest wait between two tries, and between two looks.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Something to be done again, each time after twice the wait.
#[derive(Clone, Debug)]
struct Again {
    due: Instant,
    wait: Duration,
}

impl Again {
    fn after(wait: Duration, now: Instant) -> Self {
        Self { due: now + wait, wait }
    }

    fn longer(&self, now: Instant) -> Self {
        Self::after((self.wait * 2).min(WAIT_MAX), now)
    }
}

/// A key whose last operation failed.
#[derive(Clone, Debug)]
struct Pending {
    again: Again,
    error: String,
}

/// Keys with the first error of each.
type Errors = BTreeMap<Key, KernelError>;

/// An operation that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What it was about.
    pub key: Key,
    /// The Service that wants it, where one does.
    pub service: Option<ObjectName>,
    /// The operation, the kernel's reason, and what to do.
    pub error: String,
    /// Whether it failed in the same way the last time.
    pub is_repeated: bool,
}

/// What a sync did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The operations the kernel carried out, by kind.
    pub done: Done,
    /// Those it did not.
    pub failures: Vec<Failure>,
    /// Keys that were found otherwise than this agent had left them.
    pub drifted: Vec<Key>,
    /// Front ends that two Services began to claim.
    pub clashes: Vec<Clash>,
    /// Whether everything was read from the kernel.
    pub audited: bool,
    /// Whether it was read without anything known of it before.
    pub is_first: bool,
}

/// How many operations of each kind were carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Virtual servers made.
    pub servers_added: usize,
    /// Virtual servers changed.
    pub servers_changed: usize,
    /// Virtual servers deleted.
    pub servers_deleted: usize,
    /// Real servers made.
    pub real_servers_added: usize,
    /// Real servers corrected, or taken back while they drained.
    pub real_servers_changed: usize,
    /// Real servers set to weight 0.
    pub real_servers_drained: usize,
    /// Real servers deleted.
    pub real_servers_deleted: usize,
    /// VIPs bound.
    pub addresses_bound: usize,
    /// VIPs taken from the device.
    pub addresses_unbound: usize,
    /// Whether the device was made.
    pub device_added: usize,
}

impl Done {
    /// How many operations in all.
    pub fn total(&self) -> usize {
        self.servers_added
            + self.servers_changed
            + self.servers_deleted
            + self.real_servers_added
            + self.real_servers_changed
            + self.real_servers_drained
            + self.real_servers_deleted
            + self.addresses_bound
            + self.addresses_unbound
            + self.device_added
    }

    fn count(&mut self, operation: &Operation) {
        *match operation {
            Operation::AddDevice => &mut self.device_added,
            Operation::AddVirtualServer(..) => &mut self.servers_added,
            Operation::SetVirtualServer(..) => &mut self.servers_changed,
            Operation::DeleteVirtualServer(_) => &mut self.servers_deleted,
            Operation::AddRealServer(..) => &mut self.real_servers_added,
            Operation::SetRealServer(..) => &mut self.real_servers_changed,
            Operation::DrainRealServer(..) => &mut self.real_servers_drained,
            Operation::DeleteRealServer(..) => &mut self.real_servers_deleted,
            Operation::BindAddress(_) => &mut self.addresses_bound,
            Operation::UnbindAddress(_) => &mut self.addresses_unbound,
        } += 1;
    }
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
    desired: Desired,
    /// `None` before the first dump, and after a failure that leaves open what the kernel holds.
    mirror: Option<Mirror>,
    dirty_services: BTreeSet<ObjectName>,
    is_node_dirty: bool,
    dirty: BTreeSet<Key>,
    pending: BTreeMap<Key, Pending>,
    draining: BTreeMap<FrontEnd, Again>,
}

impl<K: Kernel> Reconciler<K> {
    /// One that knows nothing yet.
    pub fn new(kernel: K, policy: Policy) -> Self {
        Self {
            kernel,
            policy,
            table: ServiceTable::default(),
            interfaces: BTreeSet::new(),
            are_interfaces_stale: false,
            node: NodeView::default(),
            desired: Desired::default(),
            mirror: None,
            dirty_services: BTreeSet::new(),
            is_node_dirty: true,
            dirty: BTreeSet::new(),
            pending: BTreeMap::new(),
            draining: BTreeMap::new(),
        }
    }

    /// Takes in a change. Nothing reaches the kernel before the next sync.
    pub fn apply(&mut self, change: Change) {
        match self.table.apply(change) {
            Dirty::Services(names) => self.dirty_services.extend(names),
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

    /// How many virtual servers are desired.
    pub fn server_count(&self) -> usize {
        self.desired.server_count()
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
        keys.extend(self.pending.iter().filter(|(_, pending)| pending.again.due <= now).map(|(key, _)| *key));
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
        let mut keys: BTreeSet<Key> = mirror.keys().chain(self.desired.keys()).chain([Key::Device]).collect();
        self.mirror = Some(mirror);
        let mut changed = std::mem::take(&mut self.dirty);
        let first = if is_first {
            changed.clear();
            let (urgent, rest) = keys.into_iter().partition(|key| self.is_urgent(*key));
            keys = rest;
            (urgent, Origin::Reading)
        } else {
            outcome.drifted = self.drifted(&keys, &changed);
            keys.retain(|key| !changed.contains(key));
            (changed, Origin::Change)
        };
        self.execute(first.0, first.1, now, &mut outcome);
        // A socket that failed leaves the mirror open: the rest waits for the next reading.
        if self.mirror.is_some() {
            self.execute(keys, Origin::Reading, now, &mut outcome);
        }
        Ok(outcome)
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
            let node = NodeView::new(self.table.node(), &self.interfaces, &self.policy);
            if node != self.node {
                self.node = node;
                // Beside those that are gone from the table.
                names.extend(self.table.names().cloned());
            }
        }
        for name in &names {
            let entry = self.table.get(name);
            let contribution = entry.map(|entry| Contribution::of(entry, &self.node, &self.policy)).unwrap_or_default();
            let service = entry.and_then(|entry| entry.service.as_deref());
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
    fn drifted(&self, keys: &BTreeSet<Key>, expected: &BTreeSet<Key>) -> Vec<Key> {
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
                diff(**key, mirror, &self.desired, keeps(Origin::Reading, &self.table, &self.policy), &mut operations);
                !operations.is_empty()
            })
            .copied()
            .collect()
    }

    fn is_urgent(&self, key: Key) -> bool {
        let is_urgent = |name: &ObjectName| {
            self.table.get(name).and_then(|entry| entry.service.as_ref()).is_some_and(|service| is_urgent(service))
        };
        match key {
            Key::Device => true,
            Key::Server(front_end) => self.desired.owner(&front_end).is_some_and(is_urgent),
            Key::Address(address) => self.desired.claimants(address).any(is_urgent),
        }
    }

    /// Plans and applies, at most twice: where the mirror turns out to be wrong about a key, that key is read and planned
    /// again.
    fn execute(&mut self, mut keys: BTreeSet<Key>, origin: Origin, now: Instant, outcome: &mut Outcome) {
        for is_last in [false, true] {
            let Some(plan) = self.plan(&mut keys, origin, now) else { return };
            let results = if plan.is_empty() { Vec::new() } else { self.kernel.apply(&plan) };
            let (mut failed, mut stale) = self.take_in(&plan, results, outcome);
            if is_last {
                failed.append(&mut stale);
            }
            for key in &keys {
                if !failed.contains_key(key) && !stale.contains_key(key) {
                    self.pending.remove(key);
                }
            }
            for (key, error) in failed {
                self.fail(key, error.text, now, outcome);
            }
            if stale.is_empty() || self.mirror.is_none() {
                return;
            }
            match self.reread(stale) {
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

    /// What the keys need, and when those that drain are to be looked at. Without a device, that is among the keys.
    fn plan(&mut self, keys: &mut BTreeSet<Key>, origin: Origin, now: Instant) -> Option<Plan> {
        let mirror = self.mirror.as_ref()?;
        let kept = keeps(origin, &self.table, &self.policy);
        if !mirror.has_device() {
            keys.insert(Key::Device);
        }
        let mut operations = Vec::new();
        for key in &*keys {
            let start = operations.len();
            let is_draining = diff(*key, mirror, &self.desired, kept, &mut operations);
            if let Key::Server(front_end) = key {
                let began = operations[start..].iter().any(|o| matches!(o, Operation::DrainRealServer(..)));
                reschedule(&mut self.draining, *front_end, is_draining, began, now);
            }
        }
        Some(operations.into_iter().collect())
    }

    /// Takes the results of a plan into the mirror. Returns the keys that failed, and those the mirror is wrong about.
    fn take_in(
        &mut self,
        plan: &Plan,
        results: Vec<Result<(), KernelError>>,
        outcome: &mut Outcome,
    ) -> (Errors, Errors) {
        let (mut failed, mut stale) = (Errors::new(), Errors::new());
        let Some(mirror) = &mut self.mirror else { return (failed, stale) };
        for (operation, result) in plan.operations().iter().zip(results) {
            let error = match result {
                Ok(()) => {
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
                (Operation::AddDevice | Operation::BindAddress(_), Cause::NotFound)
                | (_, Cause::Refused | Cause::Unknown) => {
                    failed.entry(operation.key()).or_insert(error);
                }
                (_, Cause::Exists | Cause::NotFound | Cause::NoDevice) => {
                    stale.entry(operation.key()).or_insert(error);
                }
            }
        }
        // The real servers of a virtual server that was refused are missing their virtual server: no news.
        stale.retain(|key, _| !failed.contains_key(key));
        if failed.values().any(|error| error.cause == Cause::Unknown) {
            self.mirror = None;
        }
        (failed, stale)
    }

    /// Corrects the mirror about some keys and returns the keys to be planned again.
    fn reread(&mut self, stale: Errors) -> Result<BTreeSet<Key>, (BTreeSet<Key>, KernelError)> {
        let mut keys: BTreeSet<Key> = stale.into_keys().collect();
        let servers: Vec<FrontEnd> = keys
            .iter()
            .filter_map(|key| match key {
                Key::Server(front_end) => Some(*front_end),
                Key::Device | Key::Address(_) => None,
            })
            .collect();
        if let Err(error) = self.refresh(&servers) {
            return Err((keys, error));
        }
        // Of the others only one thing can be stale: the device went away, and with it every address.
        if keys.iter().any(|key| matches!(key, Key::Device | Key::Address(_)))
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
        let service = match key {
            Key::Device => None,
            Key::Server(front_end) => self.desired.owner(&front_end).cloned(),
            Key::Address(address) => self.desired.claimants(address).next().cloned(),
        };
        outcome.failures.push(Failure { key, service, error: error.clone(), is_repeated });
        self.pending.insert(key, Pending { again, error });
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

/// When to look again at a virtual server: soon after it began to drain, then ever more rarely.
fn reschedule(
    draining: &mut BTreeMap<FrontEnd, Again>,
    front_end: FrontEnd,
    is_draining: bool,
    has_begun: bool,
    now: Instant,
) {
    if !is_draining {
        draining.remove(&front_end);
        return;
    }
    let again = match draining.get(&front_end) {
        Some(again) if !has_begun && again.due > now => return,
        Some(again) if !has_begun => again.longer(now),
        _ => Again::after(DRAIN_FIRST, now),
    };
    draining.insert(front_end, again);
}
