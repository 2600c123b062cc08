//! The Linux kernel of this network namespace: IPVS over generic netlink, `kube-ipvs0` over rtnetlink, the packet filter and
//! connection tracking over nfnetlink.

pub(crate) mod conntrack;
pub mod filter;
pub mod interface_watch;
pub(crate) mod routes;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Instant;

use ipnet::IpNet;
use ipvs_netlink::{Client, ErrorKind, Message};
use netlink_batch::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_batch::{Refusal, Request, Sent, Socket};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::filter::ObservedFilter;
use crate::front_end::FrontEnd;
use crate::kernel::{
    Cause, ConntrackCleanup, DEVICE, Kernel, KernelError, KernelStats, Observed, ObservedDevice, ObservedServer, Scope,
    TimeSpent,
};
use crate::plan::{Operation, Plan};
use crate::policy::{Families, Policy};

// errno.h
const EPERM: i32 = 1;
const ESRCH: i32 = 3;
const EACCES: i32 = 13;
const EEXIST: i32 = 17;
const ENODEV: i32 = 19;
const EINVAL: i32 = 22;
const EOPNOTSUPP: i32 = 95;
const EAFNOSUPPORT: i32 = 97;
const EADDRNOTAVAIL: i32 = 99;
const ENETDOWN: i32 = 100;

/// So many operations are turned into messages at a time: some full batches.
const IPVS_OPERATIONS: usize = 8 * netlink_batch::BATCH_MESSAGES;

/// The kernel of one network namespace: that of the thread that connected.
#[derive(Debug)]
pub struct LinuxKernel {
    ipvs: Client,
    route: Socket,
    /// For reading routes alone.
    routes: Socket,
    netfilter: Socket,
    /// Which families have a table of the packet filter.
    families: Families,
    /// The index of `kube-ipvs0`, once it was seen.
    device: Option<u32>,
    /// What was sent before the last account was given.
    sent_at_last_take: Sent,
    /// What was sent on sockets that failed.
    sent_before: Sent,
    /// Since the last account.
    conntrack_cleanups: Vec<ConntrackCleanup>,
    /// Since the last account.
    time_spent: TimeSpent,
    /// Whether a socket failed: `ip_vs` may have been unloaded and loaded again, with another family number.
    is_broken: bool,
}

impl LinuxKernel {
    /// Connects to IPVS, rtnetlink and nfnetlink, for a node that serves these families.
    pub fn connect(families: Families) -> Result<Self, KernelError> {
        let ipvs = Client::connect().map_err(|error| refused(error.to_string()))?;
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

    /// Reads the packet filter, for who wants nothing else.
    pub fn filter(&mut self) -> Result<ObservedFilter, KernelError> {
        filter::client::observe(&mut self.netfilter, self.families)
    }

    /// The IPVS client, for what is no part of a plan: timeouts and the probing of schedulers.
    pub fn ipvs(&mut self) -> &mut Client {
        &mut self.ipvs
    }

    /// Makes `kube-ipvs0`, unless it exists. An interface of that name that is no dummy is refused.
    pub fn ensure_device(&mut self) -> Result<(), KernelError> {
        match self.find_device()? {
            Some((index, _)) => self.device = Some(index),
            None => self.add_device()?,
        }
        Ok(())
    }

    /// Finds out whether the kernel has what the packet filter needs, by making a table and taking it back in one
    /// transaction; asking makes it load its modules. Where there is a table already there is nothing to find out.
    pub fn probe_filter(&mut self, policy: &Policy) -> Result<(), KernelError> {
        filter::client::probe(&mut self.netfilter, policy)
    }

    /// Chains of others at the forward hook that drop what they do not accept.
    pub fn forward_drops(&mut self) -> Result<Vec<String>, KernelError> {
        let chains = filter::read::forward_drops(&mut self.netfilter);
        chains.map_err(|error| refused(format!("cannot read the packet filter of others: {error}")))
    }

    /// Deletes `kube-ipvs0`. Returns whether it was there; an interface of that name that is no dummy is refused.
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
                Some(EPERM) => (Cause::Refused, ": it takes CAP_NET_ADMIN"),
                _ => (Cause::Refused, ""),
            };
            KernelError { cause, text: format!("cannot add device {DEVICE}: {error}{hint}") }
        })?;
        self.device = self.find_device()?.map(|(index, _)| index);
        Ok(())
    }

    /// Has `kube-ipvs0` take routes: IPv6 lets none lead to a device that is down.
    fn set_device_up(&mut self) -> Result<(), KernelError> {
        let operation = Operation::SetDeviceUp;
        let Some(device) = self.device else { return Err(no_device(&operation)) };
        for request in routes::set_up_requests(device) {
            match self.route.request(&request, |_: RouteNetlinkMessage| {}) {
                Ok(()) => {}
                // Without IPv6 there is no link-local address to be kept away. The anchor may be there already.
                Err(error)
                    if error.refusal().is_some_and(|refusal| [EAFNOSUPPORT, EEXIST].contains(&refusal.errno)) => {}
                Err(error) => {
                    let refusal = error.refusal().ok_or_else(|| unknown(error.to_string()))?;
                    return Err(address_error(&operation, refusal));
                }
            }
        }
        Ok(())
    }

    /// The index of `kube-ipvs0`, and whether it is up.
    fn find_device(&mut self) -> Result<Option<(u32, bool)>, KernelError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(DEVICE.to_owned()));
        let mut found = None;
        let result = self.route.request(&RouteNetlinkMessage::GetLink(message).into(), |answer| {
            if let RouteNetlinkMessage::NewLink(link) = answer {
                let is_dummy = link.attributes.iter().any(|attribute| {
                    matches!(attribute, LinkAttribute::LinkInfo(info)
                        if info.contains(&LinkInfo::Kind(InfoKind::Dummy)))
                });
                let is_up = link.header.flags.contains(LinkFlags::Up);
                found = Some(((link.header.index, is_up), is_dummy));
            }
        });
        match (result, found) {
            (Err(error), _) if error.refusal().is_some_and(|refusal| refusal.errno == ENODEV) => Ok(None),
            (Err(error), _) => Err(refused(format!("cannot look up device {DEVICE}: {error}"))),
            (Ok(()), Some((_, false))) => Err(refused(format!(
                "the interface {DEVICE} is no dummy device: rename or delete it, it is in the place of ours"
            ))),
            (Ok(()), found) => Ok(found.map(|(device, _)| device)),
        }
    }

    /// Reads the addresses of all interfaces: those of `kube-ipvs0`, and the others.
    fn read_addresses(&mut self, observed: &mut Observed) -> Result<(), KernelError> {
        let device = self.find_device()?;
        self.device = device.map(|(index, _)| index);
        let mut on_device = Vec::new();
        let mut interfaces = BTreeSet::new();
        self.route
            .dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()), |answer| {
                if let RouteNetlinkMessage::NewAddress(message) = answer
                    && let Some(address) = address_of(&message)
                {
                    if Some(message.header.index) == self.device {
                        on_device.push((address, message.header.prefix_len));
                    } else {
                        interfaces.insert(address);
                    }
                }
            })
            .map_err(|error| refused(format!("cannot list the addresses of the node: {error}")))?;
        observed.device = device.map(|(_, is_up)| ObservedDevice {
            accepts_routes: is_up && on_device.iter().any(|(address, _)| *address == routes::ANCHOR_ADDRESS),
            addresses: on_device,
            routes: Vec::new(),
        });
        observed.interfaces = interfaces;
        Ok(())
    }

    fn observe(&mut self, server: ipvs_netlink::VirtualServer) -> Result<Option<ObservedServer>, KernelError> {
        let Some(front_end) = FrontEnd::from_id(&server.id) else { return Ok(None) };
        let real_servers = self.ipvs.real_servers(&server.id).map_err(|error| refused(error.to_string()))?;
        Ok(Some(ObservedServer {
            front_end,
            config: server.into(),
            real_servers: real_servers.into_iter().map(|entry| (entry.server, entry.is_idle())).collect(),
        }))
    }

    fn read(&mut self, scope: Scope<'_>) -> Result<Observed, KernelError> {
        let mut observed = Observed::default();
        match scope {
            Scope::All => {
                self.read_addresses(&mut observed)?;
                if let Some((index, device)) = self.device.zip(observed.device.as_mut()) {
                    device.routes = routes::read(&mut self.routes, index)
                        .map_err(|error| refused(format!("cannot list the routes to {DEVICE}: {error}")))?;
                }
                observed.filter = self.filter()?;
                for entry in self.ipvs.virtual_servers().map_err(|error| refused(error.to_string()))? {
                    observed.servers.extend(self.observe(entry.server)?);
                }
            }
            Scope::Filter => observed.filter = self.filter()?,
            Scope::Interfaces => self.read_addresses(&mut observed)?,
            Scope::Servers(front_ends) => {
                for front_end in front_ends {
                    match self.ipvs.virtual_server(&front_end.id()) {
                        Ok(entry) => observed.servers.extend(self.observe(entry.server)?),
                        Err(error) if error.kind() == ErrorKind::NotFound => {}
                        Err(error) => return Err(refused(error.to_string())),
                    }
                }
            }
        }
        Ok(observed)
    }

    fn apply_ipvs(&mut self, operations: &[Operation], results: &mut Vec<Result<(), KernelError>>) {
        // Not all at once: the messages of thousands of Services are more memory than the agent has for all else.
        for some in operations.chunks(IPVS_OPERATIONS) {
            self.apply_some_ipvs(some, results);
        }
    }

    fn apply_some_ipvs(&mut self, operations: &[Operation], results: &mut Vec<Result<(), KernelError>>) {
        let messages: Vec<Message> = operations.iter().filter_map(ipvs_message).collect();
        match self.ipvs.apply(&messages) {
            Ok(answers) => results.extend(answers.into_iter().map(|answer| answer.map_err(|error| ipvs_error(&error)))),
            Err(error) => {
                self.is_broken = true;
                let error = unknown(error.to_string());
                results.extend(operations.iter().map(|_| Err(error.clone())));
            }
        }
    }

    fn apply_filter(&mut self, operations: &[Operation], results: &mut Vec<Result<(), KernelError>>) {
        match filter::client::apply(&mut self.netfilter, operations) {
            Ok(answers) => results.extend(answers),
            Err(error) => {
                self.is_broken = true;
                let error = unknown(error.to_string());
                results.extend(operations.iter().map(|_| Err(error.clone())));
            }
        }
    }

    fn apply_flows(&mut self, operations: &[Operation], results: &mut Vec<Result<(), KernelError>>) {
        let flushed = conntrack::delete_stale_flows(&mut self.netfilter, operations, &mut self.conntrack_cleanups);
        if flushed.as_ref().is_err_and(|error| error.refusal().is_none()) {
            // Nothing the mirror knows of is at stake, so it stays; a new socket is made with the next reading.
            self.is_broken = true;
        }
        results.extend(operations.iter().map(|operation| {
            flushed.as_ref().copied().map_err(|error| refused(format!("cannot {operation}: {error}")))
        }));
    }

    fn apply_addresses(&mut self, operations: &[Operation], results: &mut Vec<Result<(), KernelError>>) {
        let Some(device) = self.device else {
            results.extend(operations.iter().map(|operation| Err(no_device(operation))));
            return;
        };
        let requests = operations.iter().filter_map(|operation| address_message(operation, device));
        match self.route.batch(requests) {
            Ok(answers) => results.extend(
                answers
                    .into_iter()
                    .zip(operations)
                    .map(|(answer, operation)| answer.map_err(|refusal| address_error(operation, &refusal))),
            ),
            Err(error) => {
                self.is_broken = true;
                let error = unknown(error.to_string());
                results.extend(operations.iter().map(|_| Err(error.clone())));
            }
        }
        if results.iter().any(|result| result.as_ref().is_err_and(|error| error.cause == Cause::NoDevice)) {
            self.device = None;
        }
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
        let mut results = Vec::with_capacity(plan.operations().len());
        // Neighbours in the plan that go to one socket go in one batch: batches keep their order.
        for run in plan.operations().chunk_by(|a, b| Target::of(a) == Target::of(b)) {
            let target = Target::of(&run[0]);
            let start = Instant::now();
            match target {
                Target::Device => results.extend(run.iter().map(|operation| match operation {
                    Operation::SetDeviceUp => self.set_device_up(),
                    _ => self.ensure_device(),
                })),
                Target::Filter => self.apply_filter(run, &mut results),
                Target::Flows => self.apply_flows(run, &mut results),
                Target::Ipvs => self.apply_ipvs(run, &mut results),
                Target::Addresses => self.apply_addresses(run, &mut results),
            }
            let time_spent = match target {
                Target::Device | Target::Addresses => &mut self.time_spent.addresses,
                Target::Filter => &mut self.time_spent.filter,
                Target::Flows => &mut self.time_spent.flows,
                Target::Ipvs => &mut self.time_spent.ipvs,
            };
            *time_spent += start.elapsed();
        }
        results
    }
}

/// Reads a link, an address or whatever else rtnetlink tells.
#[cfg(fuzzing)]
pub(crate) fn fuzz(header: &netlink_packet_core::NetlinkHeader, payload: &[u8]) {
    use netlink_packet_core::NetlinkDeserializable as _;
    if let Ok(RouteNetlinkMessage::NewAddress(message)) = RouteNetlinkMessage::deserialize(header, payload) {
        let _ = address_of(&message);
    }
}

/// Where an operation goes.
#[derive(PartialEq)]
enum Target {
    Filter,
    Flows,
    Device,
    Ipvs,
    Addresses,
}

impl Target {
    fn of(operation: &Operation) -> Self {
        match operation {
            operation if operation.filter_family().is_some() => Self::Filter,
            Operation::DeleteUntranslatedFlows(..) | Operation::DeleteStaleFlows(..) => Self::Flows,
            Operation::AddDevice | Operation::SetDeviceUp => Self::Device,
            Operation::BindAddress(_)
            | Operation::UnbindAddress(_)
            | Operation::AddRoute(_)
            | Operation::RemoveRoute(_) => Self::Addresses,
            _ => Self::Ipvs,
        }
    }
}

fn ipvs_message(operation: &Operation) -> Option<Message> {
    Some(match *operation {
        Operation::AddVirtualServer(front_end, config) => Message::AddVirtualServer(config.at(&front_end)),
        Operation::SetVirtualServer(front_end, config) => Message::SetVirtualServer(config.at(&front_end)),
        Operation::DeleteVirtualServer(front_end) => Message::DeleteVirtualServer(front_end.id()),
        Operation::AddRealServer(front_end, server) => Message::AddRealServer(front_end.id(), server),
        Operation::SetRealServer(front_end, server) | Operation::DrainRealServer(front_end, server) => {
            Message::SetRealServer(front_end.id(), server)
        }
        Operation::DeleteRealServer(front_end, address) => Message::DeleteRealServer(front_end.id(), address),
        _ => return None,
    })
}

fn address_message(operation: &Operation, device: u32) -> Option<Request<RouteNetlinkMessage>> {
    let (address, is_new) = match *operation {
        Operation::BindAddress(address) => (address, true),
        Operation::UnbindAddress(address) => (address, false),
        Operation::AddRoute(range) => return Some(routes::add(&range, device)),
        Operation::RemoveRoute(range) => return Some(routes::remove(&range, device)),
        _ => return None,
    };
    let mut message = AddressMessage::default();
    message.header.index = device;
    message.header.scope = AddressScope::Universe;
    (message.header.family, message.header.prefix_len) = match address {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    message.attributes.push(AddressAttribute::Local(address));
    message.attributes.push(AddressAttribute::Address(address));
    Some(if is_new {
        Request { message: RouteNetlinkMessage::NewAddress(message), flags: NLM_F_CREATE | NLM_F_EXCL }
    } else {
        RouteNetlinkMessage::DelAddress(message).into()
    })
}

/// The interface's own address: `IFA_LOCAL`, which differs from `IFA_ADDRESS` on point-to-point links, else that.
fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(wanted);
    find(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    })
    .or_else(|| {
        find(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

fn ipvs_error(error: &ipvs_netlink::Error) -> KernelError {
    let cause = match error.kind() {
        ErrorKind::Exists => Cause::Exists,
        ErrorKind::NotFound => Cause::NotFound,
        _ => Cause::Refused,
    };
    KernelError { cause, text: error.to_string() }
}

fn address_error(operation: &Operation, refusal: &Refusal) -> KernelError {
    let (cause, hint) = match (refusal.errno, operation) {
        (EEXIST, _) => (Cause::Exists, ""),
        (ENODEV | ENETDOWN, _) => (Cause::NoDevice, ""),
        (EADDRNOTAVAIL, Operation::UnbindAddress(_)) | (ESRCH, Operation::RemoveRoute(_)) => (Cause::NotFound, ""),
        (EADDRNOTAVAIL, _) => (Cause::Refused, ": no interface can have such an address; correct the Service"),
        (EPERM, _) => (Cause::Refused, ": it takes CAP_NET_ADMIN"),
        (EACCES | EINVAL, Operation::BindAddress(IpAddr::V6(_)) | Operation::AddRoute(IpNet::V6(_))) => (
            Cause::Refused,
            ": IPv6 is off on kube-ipvs0 (sysctl net.ipv6.conf.kube-ipvs0.disable_ipv6, or an MTU under 1280)",
        ),
        _ => (Cause::Refused, ""),
    };
    KernelError { cause, text: format!("cannot {operation}: {refusal}{hint}") }
}

fn no_device(operation: &Operation) -> KernelError {
    KernelError { cause: Cause::NoDevice, text: format!("cannot {operation}: the device does not exist") }
}

fn refused(text: String) -> KernelError {
    KernelError { cause: Cause::Refused, text }
}

fn unknown(text: String) -> KernelError {
    KernelError { cause: Cause::Unknown, text }
}
