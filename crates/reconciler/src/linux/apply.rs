//! Carries out the operations of a plan, each run of operations on one subsystem as one batch.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use ipvs_netlink::{ErrorKind, Message};
use netlink_batch::{Refusal, Request};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::errno::{EACCES, EADDRNOTAVAIL, EAFNOSUPPORT, EEXIST, EINVAL, ENETDOWN, ENODEV, EPERM, ESRCH};
use super::{LinuxKernel, conntrack, filter, refused, routes, unknown};
use crate::kernel::{Cause, KernelError};
use crate::plan::{Operation, Plan};

/// How many operations are encoded at a time: some full batches.
const IPVS_OPERATIONS: usize = 8 * netlink_batch::BATCH_MESSAGES;

/// How long the kernel may take to add the route of an IPv6 address. It takes about a millisecond.
const ROUTES_OF_ADDRESSES: Duration = Duration::from_secs(1);

impl LinuxKernel {
    pub(super) fn apply_plan(&mut self, plan: &Plan) -> Vec<Result<(), KernelError>> {
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

    fn apply_ipvs(&mut self, operations: &[Operation], results: &mut Vec<Result<(), KernelError>>) {
        // In parts: the messages of thousands of Services take more memory than everything else in the agent.
        for chunk in operations.chunks(IPVS_OPERATIONS) {
            self.apply_ipvs_chunk(chunk, results);
        }
    }

    fn apply_ipvs_chunk(&mut self, operations: &[Operation], results: &mut Vec<Result<(), KernelError>>) {
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
        match filter::client::apply(&mut self.netfilter, operations, self.owns_tables) {
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

    /// Waits until the kernel has its own routes for the IPv6 addresses that were bound a moment ago, if routes of ours that cover
    /// them are about to go.
    ///
    /// The kernel acknowledges a new address before it adds the local route, which a work queue does (`addrconf_dad_work`): without
    /// our route there would be an instant with neither. If the routes cannot be read, or do not come, ours go all the same.
    fn await_routes_of_addresses(&mut self, operations: &[Operation], device: u32) {
        self.newly_bound.retain(|(_, since)| since.elapsed() < ROUTES_OF_ADDRESSES);
        let removed: Vec<&IpNet> = operations
            .iter()
            .filter_map(|operation| match operation {
                Operation::RemoveRoute(range @ IpNet::V6(_)) => Some(range),
                _ => None,
            })
            .collect();
        if removed.is_empty() || self.newly_bound.is_empty() {
            return;
        }
        let single: BTreeSet<IpAddr> =
            removed.iter().filter(|range| range.prefix_len() == 128).map(|range| range.addr()).collect();
        // There are few ranges, but as many single addresses as VIPs.
        let ranges: Vec<&IpNet> = removed.into_iter().filter(|range| range.prefix_len() < 128).collect();
        let covered: BTreeSet<IpAddr> = self
            .newly_bound
            .iter()
            .map(|(address, _)| *address)
            .filter(|address| single.contains(address) || ranges.iter().any(|range| range.contains(address)))
            .collect();
        let deadline = Instant::now() + ROUTES_OF_ADDRESSES;
        while !covered.is_empty() && Instant::now() < deadline {
            match routes::read_kernels_ipv6(&mut self.routes, device) {
                Ok(routed) if !covered.is_subset(&routed) => std::thread::sleep(Duration::from_millis(1)),
                _ => return,
            }
        }
    }

    /// Remembers which IPv6 addresses were bound, since their routes come later.
    fn remember_bound(&mut self, operations: &[Operation], results: &[Result<(), KernelError>]) {
        let now = Instant::now();
        self.newly_bound.extend(operations.iter().zip(results).filter_map(|(operation, result)| match operation {
            Operation::BindAddress(address @ IpAddr::V6(_)) if result.is_ok() => Some((*address, now)),
            _ => None,
        }));
    }

    fn apply_addresses(&mut self, operations: &[Operation], results: &mut Vec<Result<(), KernelError>>) {
        let Some(device) = self.device else {
            results.extend(operations.iter().map(|operation| Err(no_device(operation))));
            return;
        };
        self.await_routes_of_addresses(operations, device);
        let requests = operations.iter().filter_map(|operation| address_message(operation, device));
        match self.route.batch(requests) {
            Ok(answers) => {
                let answers: Vec<_> = answers
                    .into_iter()
                    .zip(operations)
                    .map(|(answer, operation)| answer.map_err(|refusal| address_error(operation, &refusal)))
                    .collect();
                self.remember_bound(operations, &answers);
                results.extend(answers);
            }
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
        (EPERM, _) => (Cause::Refused, ": it requires CAP_NET_ADMIN"),
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
