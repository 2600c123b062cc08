//! A model of the kernel in memory, for tests: IPVS, `kube-ipvs0`, the packet filter and connection tracking, with fault injection.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use ipvs_netlink::{Family, RealServer, Scheduler};

use crate::filter::{FrontEndElements, ObservedFilter, SetElement, SourceRangesElement};
use crate::front_end::{FrontEnd, ServerConfig};
use crate::kernel::{Cause, Kernel, KernelError, Observed, ObservedDevice, ObservedServer, Scope};
use crate::mirror::Mirror;
use crate::plan::{Operation, Plan};
use crate::real_servers::{RealServers, real_server_address};

/// A real server in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FakeRealServer {
    /// Its attributes.
    pub server: RealServer,
    /// How many connections it has. Tests set it.
    pub connections: u32,
}

/// A virtual server in the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FakeServer {
    /// Its attributes.
    pub config: ServerConfig,
    /// Its real servers.
    pub real_servers: BTreeMap<SocketAddr, FakeRealServer>,
}

/// How often a [`FakeKernel`] was called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Operations, carried out or refused.
    pub operations: usize,
    /// Plans applied.
    pub plans: usize,
    /// Dumps of everything.
    pub full_dumps: usize,
    /// Virtual servers that were read individually.
    pub servers_read: usize,
}

/// Decides whether an operation fails, and with which cause.
pub type Fault = Box<dyn FnMut(&Operation) -> Option<Cause> + Send>;

/// A kernel in memory.
#[derive(Default)]
pub struct FakeKernel {
    /// Virtual servers.
    pub servers: BTreeMap<FrontEnd, FakeServer>,
    /// Addresses on `kube-ipvs0` with their prefix lengths; `None` without the device.
    pub addresses: Option<BTreeMap<IpAddr, u8>>,
    /// Whether routes to the device can be added.
    pub accepts_routes: bool,
    /// The local routes to it that this program added.
    pub routes: BTreeSet<IpNet>,
    /// Addresses of the other interfaces.
    pub interfaces: BTreeSet<IpAddr>,
    /// Schedulers that this kernel does not have.
    pub missing_schedulers: BTreeSet<Scheduler>,
    /// The packet filter.
    pub filter: ObservedFilter,
    /// The flows in connection tracking: to which front end, and from which real server replies are expected.
    pub flows: BTreeSet<(FrontEnd, SocketAddr)>,
    /// How often it was called.
    pub counts: Counts,
    /// Every operation carried out, in order.
    pub log: Vec<Operation>,
    /// Called before each operation.
    pub fault: Option<Fault>,
}

impl fmt::Debug for FakeKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeKernel")
            .field("servers", &self.servers)
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

impl FakeKernel {
    fn apply_operation(&mut self, operation: &Operation) -> Result<(), Cause> {
        if let Some(cause) = self.fault.as_mut().and_then(|fault| fault(operation)) {
            return Err(cause);
        }
        if operation.filter_family().is_some() {
            self.apply_filter_operation(operation)?;
            self.log.push(operation.clone());
            return Ok(());
        }
        match *operation {
            Operation::DeleteUntranslatedFlows(front_end, ref alive)
            | Operation::DeleteStaleFlows(front_end, ref alive) => {
                self.flows.retain(|(to, from)| *to != front_end || alive.contains(&real_server_address(*from)));
            }
            Operation::AddDevice => {
                if self.addresses.is_some() {
                    return Err(Cause::Exists);
                }
                self.addresses = Some(BTreeMap::new());
                self.accepts_routes = false;
                self.routes.clear();
            }
            Operation::SetDeviceUp => {
                self.accepts_routes = self.addresses.as_ref().map(|_| true).ok_or(Cause::NoDevice)?;
            }
            Operation::AddRoute(range) => {
                if self.addresses.is_none() || !self.accepts_routes {
                    return Err(Cause::NoDevice);
                }
                if !self.routes.insert(range) {
                    return Err(Cause::Exists);
                }
            }
            Operation::RemoveRoute(range) => {
                let has_device = self.addresses.is_some();
                if !self.routes.remove(&range) {
                    return Err(if has_device { Cause::NotFound } else { Cause::NoDevice });
                }
            }
            Operation::BindAddress(address) => {
                let addresses = self.addresses.as_mut().ok_or(Cause::NoDevice)?;
                if addresses.contains_key(&address) {
                    return Err(Cause::Exists);
                }
                addresses.insert(address, if address.is_ipv4() { 32 } else { 128 });
            }
            Operation::UnbindAddress(address) => {
                self.addresses.as_mut().ok_or(Cause::NoDevice)?.remove(&address).ok_or(Cause::NotFound)?;
            }
            Operation::AddVirtualServer(front_end, config) => {
                if self.servers.contains_key(&front_end) {
                    return Err(Cause::Exists);
                }
                self.check(&config)?;
                self.servers.insert(front_end, FakeServer { config, real_servers: BTreeMap::new() });
            }
            Operation::SetVirtualServer(front_end, config) => {
                self.server(&front_end)?;
                self.check(&config)?;
                self.server(&front_end)?.config = config;
            }
            Operation::DeleteVirtualServer(front_end) => {
                self.servers.remove(&front_end).ok_or(Cause::NotFound)?;
            }
            Operation::AddRealServer(front_end, server) => {
                let real_servers = &mut self.server(&front_end)?.real_servers;
                if real_servers.contains_key(&server.socket_address()) {
                    return Err(Cause::Exists);
                }
                real_servers.insert(server.socket_address(), FakeRealServer { server, connections: 0 });
            }
            Operation::SetRealServer(front_end, server) | Operation::DrainRealServer(front_end, server) => {
                let real_servers = &mut self.server(&front_end)?.real_servers;
                real_servers.get_mut(&server.socket_address()).ok_or(Cause::NotFound)?.server = server;
            }
            Operation::DeleteRealServer(front_end, address) => {
                self.server(&front_end)?.real_servers.remove(&address).ok_or(Cause::NotFound)?;
            }
            _ => {}
        }
        self.log.push(operation.clone());
        Ok(())
    }

    /// Carries out an operation on the packet filter.
    fn apply_filter_operation(&mut self, operation: &Operation) -> Result<(), Cause> {
        match *operation {
            Operation::BuildTable { ref ruleset, replaces, ref contents } => {
                if self.filter.rulesets.contains_key(&ruleset.family()) != replaces {
                    return Err(if replaces { Cause::NotFound } else { Cause::Exists });
                }
                let mut mirror = Mirror::default();
                mirror.refresh_filter(std::mem::take(&mut self.filter));
                mirror.acknowledge(&Operation::BuildTable {
                    ruleset: ruleset.clone(),
                    replaces,
                    contents: contents.clone(),
                });
                self.filter = mirror.filter().clone();
            }
            Operation::SetSourceRanges(ref service, family, ref ranges) => {
                self.table(family)?.source_ranges.insert((service.clone(), family), ranges.fingerprint());
            }
            Operation::RemoveSourceRanges(ref service, family) => {
                let in_use = SourceRangesElement::Service(service.clone());
                let mut front_ends = self.filter.front_ends.iter();
                if front_ends.any(|(it, elements)| Family::of(it.address) == family && elements.source_ranges == in_use)
                {
                    // EBUSY
                    return Err(Cause::Refused);
                }
                self.filter.source_ranges.remove(&(service.clone(), family)).ok_or(Cause::NotFound)?;
            }
            Operation::SetFrontEnd { front_end, ref before, ref after } => {
                let family = Family::of(front_end.address);
                let filter = self.table(family)?;
                let held = filter.front_ends.get(&front_end).cloned().unwrap_or_default();
                if let SourceRangesElement::Service(service) = &after.source_ranges
                    && !filter.source_ranges.contains_key(&(service.clone(), family))
                {
                    return Err(Cause::NotFound);
                }
                if held != *before {
                    return Err(if held == FrontEndElements::default() { Cause::NotFound } else { Cause::Exists });
                }
                filter.front_ends.insert(front_end, after.clone());
            }
            Operation::RemoveFrontEnd(front_end, ref before) => {
                let held = self.filter.front_ends.get(&front_end).ok_or(Cause::NotFound)?;
                if held != before {
                    return Err(Cause::NotFound);
                }
                self.filter.front_ends.remove(&front_end);
            }
            Operation::AddElement(element) => {
                self.table(element.family())?.elements.insert(element);
            }
            Operation::AddRoutedVip(address) => {
                self.table(Family::of(address))?.elements.insert(SetElement::Vip(address));
            }
            Operation::RemoveRoutedVip(address) if !self.filter.elements.remove(&SetElement::Vip(address)) => {
                return Err(Cause::NotFound);
            }
            Operation::RemoveElement(element) if !self.filter.elements.remove(&element) => return Err(Cause::NotFound),
            _ => {}
        }
        Ok(())
    }

    fn table(&mut self, family: Family) -> Result<&mut ObservedFilter, Cause> {
        let exists = self.filter.rulesets.contains_key(&family);
        exists.then_some(&mut self.filter).ok_or(Cause::NotFound)
    }

    fn server(&mut self, front_end: &FrontEnd) -> Result<&mut FakeServer, Cause> {
        self.servers.get_mut(front_end).ok_or(Cause::NotFound)
    }

    fn check(&self, config: &ServerConfig) -> Result<(), Cause> {
        if self.missing_schedulers.contains(&config.scheduler) { Err(Cause::Refused) } else { Ok(()) }
    }
}

impl Kernel for FakeKernel {
    fn dump(&mut self, scope: Scope<'_>) -> Result<Observed, KernelError> {
        let observe = |(front_end, server): (&FrontEnd, &FakeServer)| ObservedServer {
            front_end: *front_end,
            config: server.config,
            real_servers: server.real_servers.values().map(|held| (held.server, held.connections == 0)).collect(),
        };
        Ok(match scope {
            Scope::All | Scope::WithoutRealServers => {
                let is_all = scope == Scope::All;
                let observe = |server| {
                    let mut observed = observe(server);
                    if !is_all {
                        observed.real_servers = RealServers::default();
                    }
                    observed
                };
                self.counts.full_dumps += 1;
                Observed {
                    interfaces: self.interfaces.clone(),
                    filter: self.filter.clone(),
                    servers: self.servers.iter().map(observe).collect(),
                    device: self.addresses.as_ref().map(|addresses| ObservedDevice {
                        accepts_routes: self.accepts_routes,
                        addresses: addresses.iter().map(|(address, prefix)| (*address, *prefix)).collect(),
                        routes: self.routes.iter().copied().collect(),
                    }),
                }
            }
            Scope::Servers(front_ends) => {
                self.counts.servers_read += front_ends.len();
                let servers = front_ends.iter().filter_map(|front_end| self.servers.get_key_value(front_end));
                Observed { servers: servers.map(observe).collect(), ..Observed::default() }
            }
            Scope::ServerConfigs(front_ends) => {
                let servers = front_ends.iter().filter_map(|it| Some((*it, self.servers.get(it)?.config)));
                let observe =
                    |(front_end, config)| ObservedServer { front_end, config, real_servers: RealServers::default() };
                Observed { servers: servers.map(observe).collect(), ..Observed::default() }
            }
            Scope::Filter => Observed { filter: self.filter.clone(), ..Observed::default() },
            Scope::Interfaces => Observed { interfaces: self.interfaces.clone(), ..Observed::default() },
        })
    }

    fn apply(&mut self, plan: &Plan) -> Vec<Result<(), KernelError>> {
        self.counts.plans += 1;
        self.counts.operations += plan.operations().len();
        plan.operations()
            .iter()
            .map(|operation| {
                self.apply_operation(operation)
                    .map_err(|cause| KernelError { cause, text: format!("cannot {operation}: {cause:?}") })
            })
            .collect()
    }
}
