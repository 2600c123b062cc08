//! The Linux kernel of this network namespace: IPVS over generic netlink, `kube-ipvs0` over rtnetlink, the packet filter and
//! connection tracking over nfnetlink. `read` reads the state, `apply` carries out plans; this file has the sockets and what is done
//! outside of plans.

mod apply;
mod autoload;
pub(crate) mod conntrack;
mod errno;
pub mod filter;
pub mod interface_watch;
mod read;
pub(crate) mod routes;

use std::net::IpAddr;
use std::time::Instant;

use ipvs_netlink::{Client, ErrorKind};
use netlink_batch::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_batch::{Request, Sent, Socket};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};

use self::errno::{EEXIST, EOPNOTSUPP, EPERM};
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
        Ok(Self {
            ipvs,
            route,
            routes,
            netfilter,
            families,
            device: None,
            newly_bound: Vec::new(),
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

    /// Reads the packet filter only.
    pub fn filter(&mut self) -> Result<ObservedFilter, KernelError> {
        filter::client::observe(&mut self.netfilter, self.families)
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

    /// The chains of other programs at the forward hook whose policy is drop.
    pub fn forward_drops(&mut self) -> Result<Vec<String>, KernelError> {
        let chains = filter::read::forward_drops(&mut self.netfilter);
        chains.map_err(|error| refused(format!("cannot read the forward chains of other programs: {error}")))
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
            *self = Self {
                sent_at_last_take,
                sent_before,
                conntrack_cleanups,
                time_spent,
                ..Self::connect(self.families)?
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
