//! What a sync did: operations carried out and refused, drift found, and what people should know.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use ipvs_netlink::Family;
use service_watch::ObjectName;

use crate::contribution::{AddressOwner, HealthCheck};
use crate::desired_state::FrontEndConflict;
use crate::kernel::{KernelError, KernelStats};
use crate::plan::{Key, Operation};

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
pub struct SyncReport {
    /// The operations the kernel carried out, by kind.
    pub applied: OperationCounts,
    /// Those it did not.
    pub failures: Vec<Failure>,
    /// Keys that were found otherwise than this agent had left them.
    pub drifted_keys: Vec<Key>,
    /// Front ends that two Services began to claim.
    pub conflicts: Vec<FrontEndConflict>,
    /// Of the first audit: how many virtual servers it found that are not provably this program's, and so stay.
    pub foreign_servers: usize,
    /// VIPs that began to be refused, each with its Service and with whose address it is.
    pub refused_vips: Vec<(ObjectName, IpAddr, AddressOwner)>,
    /// What load balancers are to be told of a Service from now on; nothing is asked for it where the list is empty.
    pub health_checks: Vec<(ObjectName, Vec<HealthCheck>)>,
    /// When the EndpointSlices that changed began to say what they say.
    pub trigger_times: Vec<(Family, SystemTime)>,
    /// Families of which something is otherwise than desired, was so before, and cannot be repaired: the packet filter,
    /// the device, or what somebody else changed.
    pub unrepaired: BTreeSet<Family>,
    /// What there is after it.
    pub totals: Totals,
    /// How long it took.
    pub duration: Duration,
    /// What the kernel was asked for it.
    pub kernel_stats: KernelStats,
    /// Whether everything was read from the kernel.
    pub is_audit: bool,
    /// Whether it was read without anything known of it before.
    pub is_first_audit: bool,
}

/// What there is after a sync.
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
    /// Real servers that drain.
    pub draining: usize,
    /// Keys whose last operation failed.
    pub failing: usize,
    /// Services with an internal policy Local and no local endpoint although they have others: IPv4, IPv6.
    pub internal_without_local: [usize; 2],
    /// The same of the external policy.
    pub external_without_local: [usize; 2],
}

/// How many operations of each kind were carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OperationCounts {
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
    /// Local routes made, of VIPs and of ranges.
    pub routes_added: usize,
    /// Local routes deleted.
    pub routes_removed: usize,
    /// Devices made, or set up.
    pub device_added: usize,
    /// Tables of the packet filter made.
    pub filters_built: usize,
    /// What the packet filter learned.
    pub filter_added: usize,
    /// What it forgot.
    pub filter_removed: usize,
}

impl OperationCounts {
    /// How many operations in all.
    pub fn total(&self) -> usize {
        self.by_kind().into_iter().map(|(_, count)| count).sum()
    }

    /// The numbers with the names of their kinds.
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
            // Most of them find nothing to delete.
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

/// What did not go as planned.
#[derive(Debug, Default)]
pub(crate) struct PlanErrors {
    /// Keys with operations that were refused.
    pub(crate) failed: ErrorsByKey,
    /// Keys the mirror is wrong about.
    pub(crate) stale: ErrorsByKey,
    /// Whether it is wrong about the packet filter.
    pub(crate) is_filter_stale: bool,
    /// Whether `kube-ipvs0` went away, and with it every address.
    pub(crate) is_device_lost: bool,
}

impl PlanErrors {
    pub(crate) fn contains(&self, key: &Key) -> bool {
        self.failed.contains_key(key) || self.stale.contains_key(key)
    }

    /// What did not go well with one key holds up another: that is to be tried again as well.
    pub(crate) fn copy(&mut self, key: &Key, other: &Key) {
        for errors in [&mut self.failed, &mut self.stale] {
            if let Some(error) = errors.get(key).cloned() {
                errors.entry(other.clone()).or_insert(error);
            }
        }
    }

    pub(crate) fn extend(&mut self, more: Self) {
        self.failed.extend(more.failed);
        self.stale.extend(more.stale);
        self.is_filter_stale |= more.is_filter_stale;
        self.is_device_lost |= more.is_device_lost;
    }
}
