//! The interface to the kernel: reading its state and applying plans.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use ipvs_netlink::Family;
use netlink_batch::Sent;

use crate::filter::ObservedFilter;
use crate::front_end::{FrontEnd, ServerConfig};
use crate::plan::Plan;
use crate::real_servers::RealServers;

/// The name of the device that carries the VIPs.
pub const DEVICE: &str = "kube-ipvs0";

/// What to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope<'a> {
    /// Everything.
    All,
    /// Everything except real servers.
    WithoutRealServers,
    /// These virtual servers with their real servers.
    Servers(&'a [FrontEnd]),
    /// These virtual servers without their real servers.
    ServerConfigs(&'a [FrontEnd]),
    /// The addresses of the node's interfaces.
    Interfaces,
    /// The packet filter.
    Filter,
}

/// What was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The virtual servers, except those with a firewall mark or another protocol, which no Service has.
    pub servers: Vec<ObservedServer>,
    /// `kube-ipvs0`, if it exists. Read with [`Scope::All`].
    pub device: Option<ObservedDevice>,
    /// The addresses of all interfaces except `kube-ipvs0`. Read with [`Scope::All`] and [`Scope::Interfaces`].
    pub interfaces: BTreeSet<IpAddr>,
    /// The packet filter. Read with [`Scope::All`] and [`Scope::Filter`].
    pub filter: ObservedFilter,
}

/// `kube-ipvs0` as it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedDevice {
    /// Whether routes to it can be added and persist.
    pub accepts_routes: bool,
    /// The addresses on it with their prefix lengths.
    pub addresses: Vec<(IpAddr, u8)>,
    /// The local routes to it that this program added.
    pub routes: Vec<IpNet>,
}

/// A virtual server as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedServer {
    /// Its front end.
    pub front_end: FrontEnd,
    /// Its attributes.
    pub config: ServerConfig,
    /// Its real servers.
    pub real_servers: RealServers,
}

/// What a failed operation means for the mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The object to be added exists.
    Exists,
    /// The object to be changed or deleted does not exist.
    NotFound,
    /// `kube-ipvs0` does not exist, or is down.
    NoDevice,
    /// The kernel refused the operation for another reason. The mirror is right.
    Refused,
    /// The socket failed. It is not known what was carried out.
    Unknown,
}

/// A failed operation or dump.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct KernelError {
    /// What the error means for the mirror.
    pub cause: Cause,
    /// The operation, the object, the kernel's reason, and what to do about it.
    pub text: String,
}

/// Statistics of the exchange with the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelStats {
    /// What was sent, for writing and reading.
    pub sent: Sent,
    /// The dumps of connection tracking for stale flows.
    pub conntrack_cleanups: Vec<ConntrackCleanup>,
    /// The time it took.
    pub time_spent: TimeSpent,
}

/// The time that the exchange with the kernel took, by subject.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeSpent {
    /// All reading.
    pub reading: Duration,
    /// Writing the packet filter.
    pub filter: Duration,
    /// Writing virtual and real servers.
    pub ipvs: Duration,
    /// Writing VIPs and their device.
    pub addresses: Duration,
    /// Deleting flows from connection tracking.
    pub flows: Duration,
}

impl TimeSpent {
    /// The sum.
    pub fn total(&self) -> Duration {
        self.reading + self.filter + self.ipvs + self.addresses + self.flows
    }
}

/// One dump of a family's flows in connection tracking, and the deletion of stale ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConntrackCleanup {
    /// The family.
    pub family: Family,
    /// How long it took.
    pub duration: Duration,
    /// How many stale flows were deleted.
    pub deleted: usize,
}

/// A kernel, or a model of one.
pub trait Kernel {
    /// Returns the statistics since the last call.
    fn take_stats(&mut self) -> KernelStats {
        KernelStats::default()
    }

    /// Reads what the kernel holds. Requested virtual servers that do not exist are left out.
    fn dump(&mut self, scope: Scope<'_>) -> Result<Observed, KernelError>;

    /// Carries out a plan in order and returns a result for each operation. An error does not stop the others.
    fn apply(&mut self, plan: &Plan) -> Vec<Result<(), KernelError>>;
}
