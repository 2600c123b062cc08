//! The Linux kernel of this network namespace: IPVS over generic netlink, `kube-ipvs0` over rtnetlink, the packet filter and
//! connection tracking over nfnetlink.

mod autoload;
pub(crate) mod conntrack;
mod errno;
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

use self::errno::{EACCES, EADDRNOTAVAIL, EAFNOSUPPORT, EEXIST, EINVAL, ENETDOWN, ENODEV, EOPNOTSUPP, EPERM, ESRCH};
use crate::filter::ObservedFilter;
use crate::front_end::FrontEnd;
use crate::kernel::{
    Cause, ConntrackCleanup, DEVICE, Kernel, KernelError, KernelStats, Observed, ObservedDevice, ObservedServer, Scope,
    TimeSpent,
};
use crate::plan::{Operation, Plan};
use crate::policy::{Families, Policy};

/// How many operations are encoded at a time: some full batches.
const IPVS_OPERATIONS: usize = 8 * netlink_batch::BATCH_MESSAGES;

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
        chains.map_err(|error| refused(format!("cannot read the packet filter of others: {error}")))
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
                Some(EPERM) => (Cause::Refused, ": it takes CAP_NET_ADMIN"),
                _ => (Cause::Refused, ""),
            };
            KernelError { cause, text: format!("cannot add device {DEVICE}: {error}{hint}") }
        })?;
        self.device = self.find_device()?.map(|(index, _)| index);
        Ok(())
    }

    /// Sets `kube-ipvs0` up for routes: IPv6 allows none to a device that is down.
    fn set_device_up(&mut self) -> Result<(), KernelError> {
        let operation = Operation::SetDeviceUp;
        let Some(device) = self.device else { return Err(no_device(&operation)) };
        for request in routes::set_up_requests(device) {
            match self.route.request(&request, |_: RouteNetlinkMessage| {}) {
                Ok(()) => {}
                // Without IPv6 there is no link-local address to prevent. The anchor address may exist already.
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

    /// Reads the addresses of all interfaces.
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
        // In parts: the messages of thousands of Services take more memory than everything else in the agent.
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
            // The mirror does not include flows, so it stays valid. The next dump opens a new socket.
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
        // Consecutive operations on one subsystem are sent as one batch, which keeps their order.
        for run in plan.operations().chunk_by(|a, b| Subsystem::changed_by(a) == Subsystem::changed_by(b)) {
            let subsystem = Subsystem::changed_by(&run[0]);
            let start = Instant::now();
            match subsystem {
                Subsystem::Device => results.extend(run.iter().map(|operation| match operation {
                    Operation::SetDeviceUp => self.set_device_up(),
                    _ => self.ensure_device(),
                })),
                Subsystem::Filter => self.apply_filter(run, &mut results),
                Subsystem::Flows => self.apply_flows(run, &mut results),
                Subsystem::Ipvs => self.apply_ipvs(run, &mut results),
                Subsystem::Addresses => self.apply_addresses(run, &mut results),
            }
            let time_spent = match subsystem {
                Subsystem::Device | Subsystem::Addresses => &mut self.time_spent.addresses,
                Subsystem::Filter => &mut self.time_spent.filter,
                Subsystem::Flows => &mut self.time_spent.flows,
                Subsystem::Ipvs => &mut self.time_spent.ipvs,
            };
            *time_spent += start.elapsed();
        }
        results
    }
}

/// Decodes a message of rtnetlink.
#[cfg(fuzzing)]
pub(crate) fn fuzz(header: &netlink_packet_core::NetlinkHeader, payload: &[u8]) {
    use netlink_packet_core::NetlinkDeserializable as _;
    if let Ok(RouteNetlinkMessage::NewAddress(message)) = RouteNetlinkMessage::deserialize(header, payload) {
        let _ = address_of(&message);
    }
}

/// The subsystem of the kernel that an operation changes.
#[derive(PartialEq)]
enum Subsystem {
    Filter,
    Flows,
    Device,
    Ipvs,
    Addresses,
}

impl Subsystem {
    fn changed_by(operation: &Operation) -> Self {
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

/// The interface's own address: `IFA_LOCAL`, which differs from `IFA_ADDRESS` on point-to-point links, or else `IFA_ADDRESS`.
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
