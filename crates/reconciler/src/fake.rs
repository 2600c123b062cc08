//! A kernel in memory: IPVS and `kube-ipvs0` with the rules of the real ones, and with faults to order.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipvs_netlink::{RealServer, Scheduler};

use crate::kernel::{Cause, Kernel, KernelError, Observed, ObservedServer, Scope};
use crate::plan::{FrontEnd, Operation, Plan, ServerConfig};

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

/// What was asked of a [`FakeKernel`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Operations carried out or refused.
    pub operations: usize,
    /// Plans applied.
    pub plans: usize,
    /// Readings of everything.
    pub full_dumps: usize,
    /// Virtual servers read one by one.
    pub servers_read: usize,
}

/// Decides whether an operation fails, and how.
pub type Fault = Box<dyn FnMut(&Operation) -> Option<Cause> + Send>;

/// A kernel in memory.
#[derive(Default)]
pub struct FakeKernel {
    /// Virtual servers.
    pub servers: BTreeMap<FrontEnd, FakeServer>,
    /// Addresses on `kube-ipvs0` with their prefix lengths; `None` without the device.
    pub addresses: Option<BTreeMap<IpAddr, u8>>,
    /// Addresses of the other interfaces.
    pub interfaces: BTreeSet<IpAddr>,
    /// Schedulers this kernel lacks.
    pub missing_schedulers: BTreeSet<Scheduler>,
    /// What was asked so far.
    pub counts: Counts,
    /// Every operation carried out, in order.
    pub log: Vec<Operation>,
    /// Asked before each operation.
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
    fn carry_out(&mut self, operation: &Operation) -> Result<(), Cause> {
        if let Some(cause) = self.fault.as_mut().and_then(|fault| fault(operation)) {
            return Err(cause);
        }
        match *operation {
            Operation::AddDevice => match self.addresses {
                Some(_) => return Err(Cause::Exists),
                None => self.addresses = Some(BTreeMap::new()),
            },
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
        }
        self.log.push(*operation);
        Ok(())
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
            Scope::All => {
                self.counts.full_dumps += 1;
                Observed {
                    interfaces: self.interfaces.clone(),
                    servers: self.servers.iter().map(observe).collect(),
                    addresses: self
                        .addresses
                        .as_ref()
                        .map(|addresses| addresses.iter().map(|(address, prefix)| (*address, *prefix)).collect()),
                }
            }
            Scope::Servers(front_ends) => {
                self.counts.servers_read += front_ends.len();
                let servers = front_ends.iter().filter_map(|front_end| self.servers.get_key_value(front_end));
                Observed { servers: servers.map(observe).collect(), ..Observed::default() }
            }
            Scope::Interfaces => Observed { interfaces: self.interfaces.clone(), ..Observed::default() },
        })
    }

    fn apply(&mut self, plan: &Plan) -> Vec<Result<(), KernelError>> {
        self.counts.plans += 1;
        self.counts.operations += plan.operations().len();
        plan.operations()
            .iter()
            .map(|operation| {
                self.carry_out(operation)
                    .map_err(|cause| KernelError { cause, text: format!("cannot {operation}: {cause:?}") })
            })
            .collect()
    }
}
