//! The mirror: what the kernel holds, as far as known. Filled by dumps, kept by acknowledged operations.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};

use ipvs_netlink::RealServer;

use crate::kernel::{Observed, ObservedServer};
use crate::node::is_link_local_v6;
use crate::plan::{FrontEnd, Key, Operation, ServerConfig};

/// A virtual server in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorServer {
    /// Its attributes.
    pub config: ServerConfig,
    /// Its real servers.
    pub real_servers: BTreeMap<SocketAddr, MirrorRealServer>,
}

/// A real server in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MirrorRealServer {
    /// Its attributes.
    pub server: RealServer,
    /// Whether it was seen at weight 0 without a connection. None comes after that but from a client with affinity, and only
    /// where the sysctl `expire_quiescent_template` is 0; what drains is read again before each look for that reason too.
    pub is_drained: bool,
}

/// What the kernel holds.
#[derive(Clone, Debug, Default)]
pub struct Mirror {
    has_device: bool,
    servers: HashMap<FrontEnd, MirrorServer>,
    /// Addresses on `kube-ipvs0`, and whether each is one we would have bound: a /32 or /128.
    addresses: HashMap<IpAddr, bool>,
}

impl Mirror {
    /// What a dump of everything saw.
    pub fn from_dump(observed: Observed) -> Self {
        let mut mirror = Self { has_device: observed.addresses.is_some(), ..Self::default() };
        for (address, prefix) in observed.addresses.unwrap_or_default() {
            // Never ours: the kernel puts fe80:: addresses on a device that is up.
            if !address.is_loopback() && !is_link_local_v6(address) {
                mirror.addresses.insert(address, prefix == if address.is_ipv4() { 32 } else { 128 });
            }
        }
        mirror.servers.reserve(observed.servers.len());
        for server in observed.servers {
            mirror.see(server);
        }
        mirror
    }

    /// What a dump of some virtual servers saw: those asked for and not seen are gone.
    pub fn refresh(&mut self, asked: &[FrontEnd], observed: Observed) {
        for front_end in asked {
            self.servers.remove(front_end);
        }
        for server in observed.servers {
            self.see(server);
        }
    }

    /// Whether `kube-ipvs0` exists.
    pub fn has_device(&self) -> bool {
        self.has_device
    }

    /// The virtual server at a front end.
    pub fn server(&self, front_end: &FrontEnd) -> Option<&MirrorServer> {
        self.servers.get(front_end)
    }

    /// Whether an address is on `kube-ipvs0`, with whatever prefix.
    pub fn has_address(&self, address: IpAddr) -> bool {
        self.addresses.contains_key(&address)
    }

    /// Whether it is there as we would have bound it.
    pub fn has_own_address(&self, address: IpAddr) -> bool {
        self.addresses.get(&address).copied().unwrap_or(false)
    }

    /// Every key the kernel holds something for.
    pub fn keys(&self) -> impl Iterator<Item = Key> {
        self.servers.keys().copied().map(Key::Server).chain(self.addresses.keys().copied().map(Key::Address))
    }

    /// Takes in an operation that the kernel has carried out.
    pub fn acknowledge(&mut self, operation: &Operation) {
        match *operation {
            Operation::AddDevice => self.has_device = true,
            Operation::BindAddress(address) => {
                self.addresses.insert(address, true);
            }
            Operation::UnbindAddress(address) => {
                self.addresses.remove(&address);
            }
            Operation::AddVirtualServer(front_end, config) => {
                self.servers.insert(front_end, MirrorServer { config, real_servers: BTreeMap::new() });
            }
            Operation::SetVirtualServer(front_end, config) => {
                if let Some(server) = self.servers.get_mut(&front_end) {
                    server.config = config;
                }
            }
            Operation::DeleteVirtualServer(front_end) => {
                self.servers.remove(&front_end);
            }
            Operation::AddRealServer(front_end, server)
            | Operation::SetRealServer(front_end, server)
            | Operation::DrainRealServer(front_end, server) => {
                if let Some(held) = self.servers.get_mut(&front_end) {
                    let real_server = MirrorRealServer { server, is_drained: false };
                    held.real_servers.insert(server.socket_address(), real_server);
                }
            }
            Operation::DeleteRealServer(front_end, address) => {
                if let Some(held) = self.servers.get_mut(&front_end) {
                    held.real_servers.remove(&address);
                }
            }
        }
    }

    /// Forgets the device and what was on it: an operation found it gone.
    pub fn lose_device(&mut self) {
        self.has_device = false;
        self.addresses.clear();
    }

    fn see(&mut self, observed: ObservedServer) {
        let real_servers = observed
            .real_servers
            .into_iter()
            .map(|(server, is_idle)| {
                let is_drained = is_idle && server.weight == 0;
                (server.socket_address(), MirrorRealServer { server, is_drained })
            })
            .collect();
        self.servers.insert(observed.front_end, MirrorServer { config: observed.config, real_servers });
    }
}
