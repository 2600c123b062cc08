//! The report of a sync: operations carried out and refused, drift found, and what operators should know.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use ipvs_netlink::Family;
use service_watch::ObjectName;

use crate::budget::LeftOut;
use crate::contribution::{AddressOwner, HealthCheck};
use crate::desired_state::FrontEndConflict;
use crate::kernel::{KernelError, KernelStats};
use crate::plan::{Key, Operation};

/// An operation that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The key of the operation.
    pub key: Key,
    /// The Service that needs it, if any.
    pub service: Option<ObjectName>,
    /// The operation, the kernel's reason, and a hint.
    pub error: String,
    /// Whether the last attempt failed with the same error.
    pub is_repeated: bool,
}

/// The report of a sync or an audit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SyncReport {
    /// How many operations were carried out, by kind.
    pub applied: OperationCounts,
    /// The operations that failed.
    pub failures: Vec<Failure>,
    /// Keys that another program has changed.
    pub drifted_keys: Vec<Key>,
    /// New conflicts of two Services over a front end.
    pub conflicts: Vec<FrontEndConflict>,
    /// In the first audit: how many virtual servers are not provably this program's and stay.
    pub foreign_servers: usize,
    /// VIPs that are refused since this sync, each with its Service and the owner of the address.
    pub refused_vips: Vec<(ObjectName, IpAddr, AddressOwner)>,
    /// Services that exceed their budget since this sync, or by another number of front ends.
    pub over_budget: Vec<(ObjectName, LeftOut)>,
    /// Services whose health checks of load balancers have changed. An empty list ends them.
    pub health_checks: Vec<(ObjectName, Vec<HealthCheck>)>,
    /// The trigger times of the EndpointSlices that changed (annotation `endpoints.kubernetes.io/last-change-trigger-time`).
    pub trigger_times: Vec<(Family, SystemTime)>,
    /// Families in which something differs from the desired state and could not be repaired: the packet filter, the device, or what
    /// another program changed.
    pub unrepaired: BTreeSet<Family>,
    /// How many keys and Services are left for the next parts, since they belong to large changes.
    pub left: usize,
    /// Totals after the sync.
    pub totals: Totals,
    /// The duration of the sync.
    pub duration: Duration,
    /// Statistics of the exchange with the kernel.
    pub kernel_stats: KernelStats,
    /// Whether everything was read from the kernel.
    pub is_audit: bool,
    /// Whether it was the first audit, or the first after an error that left the state of the kernel unknown.
    pub is_first_audit: bool,
}

impl SyncReport {
    /// What is told about addresses and front ends that Services ask for in vain: one sentence for each Service and reason,
    /// however many there are.
    pub fn refused_claims(&self) -> Vec<RefusedClaim<'_>> {
        let mut claims: BTreeMap<(&ObjectName, Option<AddressOwner>), RefusedClaim<'_>> = BTreeMap::new();
        let mut add = |service, owner, name: &dyn fmt::Display, text: &dyn Fn() -> String| {
            let claim = claims.entry((service, owner));
            claim.and_modify(|claim| claim.add(name)).or_insert_with(|| RefusedClaim {
                service,
                owner,
                text: text(),
                others: Vec::new(),
                more: 0,
            });
        };
        for (service, vip, owner) in &self.refused_vips {
            add(service, Some(*owner), vip, &|| owner.refusal(*vip));
        }
        for conflict in &self.conflicts {
            add(&conflict.loser, None, &conflict.front_end, &|| conflict.to_string());
        }
        claims.into_values().collect()
    }
}

/// Addresses or front ends that a Service asks for in vain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedClaim<'a> {
    /// The Service.
    pub service: &'a ObjectName,
    /// Whose the addresses are; `None` if front ends belong to another Service.
    pub owner: Option<AddressOwner>,
    /// What is said of the first of them.
    pub text: String,
    /// The next of them.
    pub others: Vec<String>,
    /// How many more there are.
    pub more: usize,
}

impl RefusedClaim<'_> {
    /// How many are named besides the first.
    const OTHERS_MAX: usize = 8;

    fn add(&mut self, name: &dyn fmt::Display) {
        if self.others.len() < Self::OTHERS_MAX {
            self.others.push(name.to_string());
        } else {
            self.more += 1;
        }
    }
}

/// For the log and for the Event on the Service.
impl fmt::Display for RefusedClaim<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)?;
        if self.others.is_empty() {
            return Ok(());
        }
        write!(f, "; and so for {}", self.others.join(", "))?;
        match self.more {
            0 => Ok(()),
            more => write!(f, " and {more} more of this Service"),
        }
    }
}

/// Totals after a sync.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Services that are served.
    pub services: usize,
    /// Virtual servers that are desired.
    pub virtual_servers: usize,
    /// Real servers in the kernel.
    pub real_servers: usize,
    /// VIPs that are desired.
    pub vips: usize,
    /// Services that exceed their budget.
    pub over_budget: usize,
    /// Real servers that drain.
    pub draining: usize,
    /// Keys whose last operation failed.
    pub failing: usize,
    /// Services with `internalTrafficPolicy: Local` and no local endpoint although they have others: IPv4, IPv6.
    pub internal_without_local: [usize; 2],
    /// The same for `externalTrafficPolicy`.
    pub external_without_local: [usize; 2],
}

/// How many operations of each kind were carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OperationCounts {
    /// Virtual servers added.
    pub servers_added: usize,
    /// Virtual servers changed.
    pub servers_changed: usize,
    /// Virtual servers deleted.
    pub servers_deleted: usize,
    /// Real servers added.
    pub real_servers_added: usize,
    /// Real servers changed, among them those that are wanted again while they drain.
    pub real_servers_changed: usize,
    /// Real servers set to weight 0.
    pub real_servers_drained: usize,
    /// Real servers deleted.
    pub real_servers_deleted: usize,
    /// VIPs bound.
    pub addresses_bound: usize,
    /// VIPs unbound.
    pub addresses_unbound: usize,
    /// Local routes added, of VIPs and of ranges.
    pub routes_added: usize,
    /// Local routes deleted.
    pub routes_removed: usize,
    /// Devices added or set up.
    pub device_added: usize,
    /// Tables of the packet filter built.
    pub filters_built: usize,
    /// Elements and source ranges of the packet filter added or changed.
    pub filter_added: usize,
    /// Elements and source ranges of the packet filter deleted.
    pub filter_removed: usize,
}

impl OperationCounts {
    /// The sum.
    pub fn total(&self) -> usize {
        self.by_kind().into_iter().map(|(_, count)| count).sum()
    }

    /// The numbers with the kinds of operation, as labels for metrics.
    pub fn by_kind(&self) -> [(&'static str, usize); 15] {
        [
            ("add_virtual_server", self.servers_added),
            ("set_virtual_server", self.servers_changed),
            ("delete_virtual_server", self.servers_deleted),
            ("add_real_server", self.real_servers_added),
            ("set_real_server", self.real_servers_changed),
            ("drain_real_server", self.real_servers_drained),
            ("delete_real_server", self.real_servers_deleted),
            ("bind_address", self.addresses_bound),
            ("unbind_address", self.addresses_unbound),
            ("add_route", self.routes_added),
            ("remove_route", self.routes_removed),
            ("add_device", self.device_added),
            ("build_filter", self.filters_built),
            ("add_to_filter", self.filter_added),
            ("remove_from_filter", self.filter_removed),
        ]
    }

    pub(crate) fn count(&mut self, operation: &Operation) {
        *match operation {
            // Not counted, since most of them find nothing to delete.
            Operation::DeleteUntranslatedFlows(..) | Operation::DeleteStaleFlows(..) => return,
            Operation::BuildTable { .. } => &mut self.filters_built,
            Operation::SetSourceRanges(..)
            | Operation::SetFrontEnd { .. }
            | Operation::AddElement(_)
            | Operation::AddRoutedVip(_) => &mut self.filter_added,
            Operation::RemoveSourceRanges(..)
            | Operation::RemoveFrontEnd(..)
            | Operation::RemoveElement(_)
            | Operation::RemoveRoutedVip(_) => &mut self.filter_removed,
            Operation::AddDevice | Operation::SetDeviceUp => &mut self.device_added,
            Operation::AddVirtualServer(..) => &mut self.servers_added,
            Operation::SetVirtualServer(..) => &mut self.servers_changed,
            Operation::DeleteVirtualServer(_) => &mut self.servers_deleted,
            Operation::AddRealServer(..) => &mut self.real_servers_added,
            Operation::SetRealServer(..) => &mut self.real_servers_changed,
            Operation::DrainRealServer(..) => &mut self.real_servers_drained,
            Operation::DeleteRealServer(..) => &mut self.real_servers_deleted,
            Operation::BindAddress(_) => &mut self.addresses_bound,
            Operation::UnbindAddress(_) => &mut self.addresses_unbound,
            Operation::AddRoute(_) => &mut self.routes_added,
            Operation::RemoveRoute(_) => &mut self.routes_removed,
        } += 1;
    }
}

/// Keys with the first error of each.
pub(crate) type ErrorsByKey = BTreeMap<Key, KernelError>;

/// The errors of a plan.
#[derive(Debug, Default)]
pub(crate) struct PlanErrors {
    /// Keys with an operation that was refused.
    pub(crate) failed: ErrorsByKey,
    /// Keys for which the mirror is wrong.
    pub(crate) stale: ErrorsByKey,
    /// Whether the mirror is wrong about the packet filter.
    pub(crate) is_filter_stale: bool,
    /// Whether `kube-ipvs0` was deleted, and with it every address and route.
    pub(crate) is_device_lost: bool,
}

impl PlanErrors {
    /// Whether an operation of a key failed.
    pub(crate) fn contains(&self, key: &Key) -> bool {
        self.failed.contains_key(key) || self.stale.contains_key(key)
    }

    /// Copies the errors of one key to another that depends on it, so that both are retried.
    pub(crate) fn copy(&mut self, key: &Key, other: &Key) {
        for errors in [&mut self.failed, &mut self.stale] {
            if let Some(error) = errors.get(key).cloned() {
                errors.entry(other.clone()).or_insert(error);
            }
        }
    }

    /// Adds the errors of a later plan.
    pub(crate) fn extend(&mut self, more: Self) {
        self.failed.extend(more.failed);
        self.stale.extend(more.stale);
        self.is_filter_stale |= more.is_filter_stale;
        self.is_device_lost |= more.is_device_lost;
    }
}
