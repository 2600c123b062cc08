//! The Linux kernel of this network namespace: IPVS over generic netlink, `kube-ipvs0` over rtnetlink, the packet filter and
//! connection tracking over nfnetlink. `read` reads the state, `apply` carries out plans; this file has the sockets and what is done
//! outside of plans.

mod apply;
mod autoload;
pub(crate) mod conntrack;
mod errno;
pub mod filter;
pub mod filter_watch;
pub mod host;
pub mod instance;
pub mod interface_watch;
mod read;
pub(crate) mod routes;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use ipvs_netlink::{Client, ErrorKind};
use netlink_batch::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_batch::{Request, Sent, Socket};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};

use self::errno::{EEXIST, EOPNOTSUPP, EPERM};
use self::filter_watch::FilterWatch;
#[cfg(fuzzing)]
pub(crate) use self::read::fuzz;
use crate::filter::ObservedFilter;
use crate::kernel::{Cause, ConntrackCleanup, DEVICE, Kernel, KernelError, KernelStats, Observed, Scope, TimeSpent};
use crate::plan::Plan;
use crate::policy::{Families, Policy};

/// Connects to IPVS, and where asking for it does not load the module tries once more in another way.
fn connect_ipvs() -> Result<Client, ipvs_netlink::Error> {
    let first = Client::connect();
    match &first {
        Err(error) if error.kind() == ErrorKind::NotSupported && autoload::request_ipvs().is_ok() => Client::connect(),
        _ => first,
    }
}

/// The kernel of one network namespace: that of the thread that connected.
#[derive(Debug)]
pub struct LinuxKernel {
    ipvs: Client,
    route: Socket,
    /// Only for reading routes.
    routes: Socket,
    netfilter: Socket,
    /// The families that have a table of the packet filter.
    families: Families,
    /// The index of `kube-ipvs0`, if it is known.
    device: Option<u32>,
    /// The IPv6 addresses that were bound to it within the last second, and when: the kernel adds their routes later.
    newly_bound: Vec<(IpAddr, Instant)>,
    /// Whether this program's tables belong to `netfilter`, so that no other program can change or flush them.
    owns_tables: bool,
    /// Whether the tables that an earlier agent left have been adopted.
    has_adopted_tables: bool,
    /// The port id of `netfilter`, for [`filter_watch`]: notifications name the socket that made a change.
    filter_port: Arc<AtomicU32>,
    /// What was sent until statistics were last taken.
    sent_at_last_take: Sent,
    /// What was sent on sockets that have failed.
    sent_before: Sent,
    /// Since statistics were last taken.
    conntrack_cleanups: Vec<ConntrackCleanup>,
    /// Since statistics were last taken.
    time_spent: TimeSpent,
    /// Whether a socket failed. `ip_vs` may have been unloaded and loaded again, with another family number.
    is_broken: bool,
}

impl LinuxKernel {
    /// Connects to IPVS, rtnetlink and nfnetlink, for a node that serves these families.
    pub fn connect(families: Families) -> Result<Self, KernelError> {
        let ipvs = connect_ipvs().map_err(|error| refused(error.to_string()))?;
        let route = Socket::open(NETLINK_ROUTE).map_err(|error| refused(error.to_string()))?;
        let routes = routes::open().map_err(|error| refused(error.to_string()))?;
        let netfilter = Socket::open(NETLINK_NETFILTER).map_err(|error| refused(error.to_string()))?;
        let filter_port = Arc::new(AtomicU32::new(netfilter.port_id()));
        Ok(Self {
            ipvs,
            route,
            routes,
            netfilter,
            families,
            device: None,
            newly_bound: Vec::new(),
            owns_tables: false,
            has_adopted_tables: false,
            filter_port,
            sent_at_last_take: Sent::default(),
            sent_before: Sent::default(),
            conntrack_cleanups: Vec::new(),
            time_spent: TimeSpent::default(),
            is_broken: false,
        })
    }

    /// What was sent since the first connection.
    fn sent(&self) -> Sent {
        self.sent_before + self.ipvs.sent() + self.route.sent() + self.routes.sent() + self.netfilter.sent()
    }

    /// From now on makes its tables of the packet filter such that no other program can change or flush them, if the kernel can do
    /// that (Linux 6.9). They outlive this program, and the next one can take possession of them. Returns whether it can.
    pub fn own_tables(&mut self) -> Result<bool, KernelError> {
        let supported = filter::client::supports_ownership(&mut self.netfilter);
        self.owns_tables = supported
            .map_err(|error| refused(format!("cannot find out whether the kernel has tables with owners: {error}")))?;
        Ok(self.owns_tables)
    }

    /// Whether no other program can change or flush its tables of the packet filter.
    pub fn owns_tables(&self) -> bool {
        self.owns_tables
    }

    /// Watches for changes that other programs make to the tables of the packet filter, from now on.
    pub fn watch_filter(&self) -> Result<FilterWatch, KernelError> {
        FilterWatch::open(self.filter_port.clone())
            .map_err(|error| refused(format!("cannot watch the packet filter: {error}")))
    }

    /// Reads the packet filter only.
    pub fn filter(&mut self) -> Result<ObservedFilter, KernelError> {
        if self.owns_tables && !self.has_adopted_tables {
            self.has_adopted_tables = filter::client::adopt(&mut self.netfilter, self.families)
                .map_err(|error| refused(format!("cannot own the tables of the packet filter: {error}")))?;
        }
        filter::client::observe(&mut self.netfilter, self.families, self.owns_tables)
    }

    /// The IPVS client, for what is not part of a plan: timeouts and the probing of schedulers.
    pub fn ipvs(&mut self) -> &mut Client {
        &mut self.ipvs
    }

    /// Adds `kube-ipvs0`, unless it exists. An interface of that name that is not a dummy is an error.
    pub fn ensure_device(&mut self) -> Result<(), KernelError> {
        match self.find_device()? {
            Some((index, _)) => self.device = Some(index),
            None => self.add_device()?,
        }
        Ok(())
    }

    /// Checks whether the kernel supports the packet filter, by creating and deleting a table in one transaction. That also makes the
    /// kernel load its modules. If there is a table already, nothing is checked.
    pub fn probe_filter(&mut self, policy: &Policy) -> Result<(), KernelError> {
        filter::client::probe(&mut self.netfilter, policy)
    }

    /// Deletes `kube-ipvs0`. Returns whether it existed. An interface of that name that is not a dummy is an error.
    pub fn delete_device(&mut self) -> Result<bool, KernelError> {
        let Some((index, _)) = self.find_device()? else { return Ok(false) };
        let mut message = LinkMessage::default();
        message.header.index = index;
        let deleted = self.route.request(&RouteNetlinkMessage::DelLink(message).into(), |_: RouteNetlinkMessage| {});
        deleted.map_err(|error| refused(format!("cannot delete device {DEVICE}: {error}")))?;
        self.device = None;
        Ok(true)
    }

    /// Deletes the tables of the packet filter. Returns whether there was one.
    pub fn delete_filter(&mut self) -> Result<bool, KernelError> {
        filter::client::delete(&mut self.netfilter, self.families)
    }

    fn add_device(&mut self) -> Result<(), KernelError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(DEVICE.to_owned()));
        message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Dummy)]));
        let request = Request { message: RouteNetlinkMessage::NewLink(message), flags: NLM_F_CREATE | NLM_F_EXCL };
        self.route.request(&request, |_: RouteNetlinkMessage| {}).map_err(|error| {
            let (cause, hint) = match error.refusal().map(|refusal| refusal.errno) {
                Some(EEXIST) => (Cause::Exists, ""),
                Some(EOPNOTSUPP) => {
                    (Cause::Refused, ": this kernel has no dummy devices; load them with `modprobe dummy`")
                }
                Some(EPERM) => (Cause::Refused, ": it requires CAP_NET_ADMIN"),
                _ => (Cause::Refused, ""),
            };
            KernelError { cause, text: format!("cannot add device {DEVICE}: {error}{hint}") }
        })?;
        self.device = self.find_device()?.map(|(index, _)| index);
        Ok(())
    }
}

impl Kernel for LinuxKernel {
    fn take_stats(&mut self) -> KernelStats {
        let sent = self.sent();
        let before = std::mem::replace(&mut self.sent_at_last_take, sent);
        KernelStats {
            sent: sent - before,
            conntrack_cleanups: std::mem::take(&mut self.conntrack_cleanups),
            time_spent: std::mem::take(&mut self.time_spent),
        }
    }

    fn dump(&mut self, scope: Scope<'_>) -> Result<Observed, KernelError> {
        if self.is_broken {
            let (sent_before, sent_at_last_take, time_spent) = (self.sent(), self.sent_at_last_take, self.time_spent);
            let conntrack_cleanups = std::mem::take(&mut self.conntrack_cleanups);
            let (owns_tables, filter_port) = (self.owns_tables, self.filter_port.clone());
            let connected = Self::connect(self.families)?;
            filter_port.store(connected.netfilter.port_id(), Ordering::Relaxed);
            // The old sockets are closed here, so that the new one can adopt the tables.
            *self = Self {
                owns_tables,
                filter_port,
                sent_at_last_take,
                sent_before,
                conntrack_cleanups,
                time_spent,
                ..connected
            };
        }
        let start = Instant::now();
        let observed = self.read(scope);
        self.time_spent.reading += start.elapsed();
        self.is_broken = observed.is_err();
        observed
    }

    fn apply(&mut self, plan: &Plan) -> Vec<Result<(), KernelError>> {
        self.apply_plan(plan)
    }
}

fn refused(text: String) -> KernelError {
    KernelError { cause: Cause::Refused, text }
}

fn unknown(text: String) -> KernelError {
    KernelError { cause: Cause::Unknown, text }
}
