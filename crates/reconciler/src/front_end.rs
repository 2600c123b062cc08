//! Front ends: what clients connect to, and the attributes of the virtual server there.

use std::fmt;
use std::net::IpAddr;

use ipvs_netlink::{Name, Persistence, Scheduler, SchedulerFlags, VirtualServer, VirtualServerId};
use service_watch::Protocol;

/// What clients connect to. It identifies a virtual server of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontEnd {
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
}

/// How a Service came to a front end's address. Of Services with the same front end, the first in this order owns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AddressOrigin {
    /// The cluster allocated it: a ClusterIP, or a NodePort of an address of the node.
    Cluster,
    /// A load balancer's controller assigned it (`status.loadBalancer`). Users cannot write the status of a Service.
    LoadBalancer,
    /// Whoever wrote the Service requested it (`spec.externalIPs`).
    Request,
}

impl FrontEnd {
    /// The virtual server's id.
    pub fn id(&self) -> VirtualServerId {
        let protocol = match self.protocol {
            Protocol::Tcp => ipvs_netlink::Protocol::Tcp,
            Protocol::Udp => ipvs_netlink::Protocol::Udp,
            Protocol::Sctp => ipvs_netlink::Protocol::Sctp,
        };
        VirtualServerId::Address { protocol, address: self.address, port: self.port }
    }

    /// The front end of a virtual server; `None` for one with a firewall mark or another protocol, which no Service has. Such a
    /// virtual server is never this program's.
    pub fn from_id(id: &VirtualServerId) -> Option<Self> {
        let VirtualServerId::Address { protocol, address, port } = *id else { return None };
        let protocol = match protocol {
            ipvs_netlink::Protocol::Tcp => Protocol::Tcp,
            ipvs_netlink::Protocol::Udp => Protocol::Udp,
            ipvs_netlink::Protocol::Sctp => Protocol::Sctp,
            _ => return None,
        };
        Some(Self { address, port, protocol })
    }
}

impl fmt::Display for FrontEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id().fmt(f)
    }
}

/// The attributes of a virtual server besides its front end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerConfig {
    /// How it selects a real server.
    pub scheduler: Scheduler,
    /// Flags of the scheduler.
    pub scheduler_flags: SchedulerFlags,
    /// `ClientIP` affinity.
    pub persistence: Option<Persistence>,
    /// The persistence engine, which distinguishes clients by more than their addresses.
    pub engine: Option<Name>,
    /// Whether each UDP packet is scheduled on its own.
    pub one_packet: bool,
}

impl ServerConfig {
    /// The virtual server of this configuration at a front end.
    pub fn at(self, front_end: &FrontEnd) -> VirtualServer {
        VirtualServer {
            id: front_end.id(),
            scheduler: self.scheduler,
            scheduler_flags: self.scheduler_flags,
            persistence: self.persistence,
            engine: self.engine,
            one_packet: self.one_packet,
        }
    }
}

impl From<VirtualServer> for ServerConfig {
    fn from(server: VirtualServer) -> Self {
        Self {
            scheduler: server.scheduler,
            scheduler_flags: server.scheduler_flags,
            persistence: server.persistence,
            engine: server.engine,
            one_packet: server.one_packet,
        }
    }
}
