//! The one seam to the kernel: reading what it holds, and carrying out plans.

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
    /// These virtual servers with their real servers.
    Servers(&'a [FrontEnd]),
    /// The addresses of the node's interfaces.
    Interfaces,
    /// The packet filter.
    Filter,
}

/// What was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Virtual servers that a Service could have.
    pub servers: Vec<ObservedServer>,
    /// `kube-ipvs0`, where it exists. Read with everything only.
    pub device: Option<ObservedDevice>,
    /// The addresses of all interfaces but `kube-ipvs0`. Read with everything, and alone.
    pub interfaces: BTreeSet<IpAddr>,
    /// The packet filter. Read with everything, and alone.
    pub filter: ObservedFilter,
}

/// `kube-ipvs0` as it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedDevice {
    /// Whether routes to it can be made and stay.
    pub accepts_routes: bool,
    /// The addresses on it with their prefix lengths.
    pub addresses: Vec<(IpAddr, u8)>,
    /// The local routes to it that this program has made.
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
    /// What was to be made exists.
    Exists,
    /// What was to be changed or deleted does not.
    NotFound,
    /// `kube-ipvs0` does not exist, or is down.
    NoDevice,
    /// The kernel said no for another reason; the mirror is right.
    Refused,
    /// The socket failed: it is not known what was carried out.
    Unknown,
}

/// A failed operation or reading.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct KernelError {
    /// What it means for the mirror.
    pub cause: Cause,
    /// The operation, the object, the kernel's reason, and what to do about it.
    pub text: String,
}

/// What a kernel was asked since the last account.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelStats {
    /// What was sent to it, of all that is written and read.
    pub sent: Sent,
    /// Readings of connection tracking for flows that lead nowhere.
    pub conntrack_cleanups: Vec<ConntrackCleanup>,
    /// Where the time went.
    pub time_spent: TimeSpent,
}

/// Time spent on what is said to the kernel and heard from it, by what it is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeSpent {
    /// Reading, whatever it is.
    pub reading: Duration,
    /// Writing the packet filter.
    pub filter: Duration,
    /// Writing virtual and real servers.
    pub ipvs: Duration,
    /// Binding VIPs, and the device they are on.
    pub addresses: Duration,
    /// Looking after flows in connection tracking.
    pub flows: Duration,
}

impl TimeSpent {
    /// All of it.
    pub fn total(&self) -> Duration {
        self.reading + self.filter + self.ipvs + self.addresses + self.flows
    }
}

/// One reading of a family's flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConntrackCleanup {
    /// The family.
    pub family: Family,
    /// How long it took.
    pub duration: Duration,
    /// How many flows were stale and are deleted.
    pub deleted: usize,
}

/// A kernel, or what stands in for one.
pub trait Kernel {
    /// What it was asked since it was last asked for this.
    fn take_stats(&mut self) -> KernelStats {
        KernelStats::default()
    }

    /// Reads what the kernel holds. A virtual server that is asked for and does not exist is left out.
    fn dump(&mut self, scope: Scope<'_>) -> Result<Observed, KernelError>;

    /// Carries out a plan in order and returns one result for each operation. A failure does not stop the rest.
    fn apply(&mut self, plan: &Plan) -> Vec<Result<(), KernelError>>;
}
