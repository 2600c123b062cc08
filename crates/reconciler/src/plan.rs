//! Plans: operations on the kernel, in phases whose order keeps traffic right at every instant.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipvs_netlink::{Netmask, RealServer, Scheduler, SchedulerFlags, VirtualServer, VirtualServerId};
use service_watch::Protocol;

/// What clients connect to: the identity of a virtual server of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontEnd {
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
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

    /// The front end of a virtual server; `None` for one that a Service cannot have, by firewall mark or of another
    /// protocol. Such a virtual server is never ours.
    pub fn of(id: &VirtualServerId) -> Option<Self> {
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

/// What a virtual server is beside its front end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerConfig {
    /// How it chooses a real server.
    pub scheduler: Scheduler,
    /// Flags of the scheduler.
    pub scheduler_flags: SchedulerFlags,
    /// Seconds of `ClientIP` affinity.
    pub persistence_timeout: Option<u32>,
    /// Which clients persistence treats as one.
    pub netmask: Netmask,
    /// Whether each UDP packet is scheduled by itself.
    pub one_packet: bool,
}

impl ServerConfig {
    /// The virtual server of this configuration at a front end.
    pub fn at(self, front_end: &FrontEnd) -> VirtualServer {
        VirtualServer {
            id: front_end.id(),
            scheduler: self.scheduler,
            scheduler_flags: self.scheduler_flags,
            persistence_timeout: self.persistence_timeout,
            netmask: self.netmask,
            one_packet: self.one_packet,
        }
    }
}

impl From<VirtualServer> for ServerConfig {
    fn from(server: VirtualServer) -> Self {
        Self {
            scheduler: server.scheduler,
            scheduler_flags: server.scheduler_flags,
            persistence_timeout: server.persistence_timeout,
            netmask: server.netmask,
            one_packet: server.one_packet,
        }
    }
}

/// One step of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Makes `kube-ipvs0`.
    AddDevice,
    /// Makes a virtual server.
    AddVirtualServer(FrontEnd, ServerConfig),
    /// Corrects the attributes of a virtual server.
    SetVirtualServer(FrontEnd, ServerConfig),
    /// Makes a real server.
    AddRealServer(FrontEnd, RealServer),
    /// Corrects the attributes of a real server that is wanted.
    SetRealServer(FrontEnd, RealServer),
    /// Binds a VIP to `kube-ipvs0`, as /32 or /128.
    BindAddress(IpAddr),
    /// Sets the weight of a real server that is not wanted to 0: connections stay, new ones go elsewhere.
    DrainRealServer(FrontEnd, RealServer),
    /// Deletes a real server.
    DeleteRealServer(FrontEnd, SocketAddr),
    /// Takes a VIP from `kube-ipvs0`.
    UnbindAddress(IpAddr),
    /// Deletes a virtual server with its real servers.
    DeleteVirtualServer(FrontEnd),
}

/// When an operation's turn is. The order is that of the variants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// The device that carries the VIPs.
    Device,
    /// Entries of the packet filter: a VIP is guarded before it can be reached.
    FilterIn,
    /// Virtual servers in or changed.
    VirtualServersIn,
    /// Real servers in, or brought to their weight.
    RealServersIn,
    /// VIPs, now that something answers behind them.
    AddressesIn,
    /// Real servers drained or out, now that their successors take connections.
    RealServersOut,
    /// VIPs out: who asks now is told that nobody is there.
    AddressesOut,
    /// Virtual servers out.
    VirtualServersOut,
    /// Entries of the packet filter out: a VIP is guarded for as long as it can be reached.
    FilterOut,
    /// UDP flows to real servers that are gone.
    FlowsOut,
}

impl Operation {
    /// When its turn is.
    pub fn phase(&self) -> Phase {
        match self {
            Self::AddDevice => Phase::Device,
            Self::AddVirtualServer(..) | Self::SetVirtualServer(..) => Phase::VirtualServersIn,
            Self::AddRealServer(..) | Self::SetRealServer(..) => Phase::RealServersIn,
            Self::BindAddress(_) => Phase::AddressesIn,
            Self::DrainRealServer(..) | Self::DeleteRealServer(..) => Phase::RealServersOut,
            Self::UnbindAddress(_) => Phase::AddressesOut,
            Self::DeleteVirtualServer(_) => Phase::VirtualServersOut,
        }
    }

    /// What the operation is about.
    pub fn key(&self) -> Key {
        match *self {
            Self::AddDevice => Key::Device,
            Self::BindAddress(address) | Self::UnbindAddress(address) => Key::Address(address),
            Self::AddVirtualServer(front_end, _)
            | Self::SetVirtualServer(front_end, _)
            | Self::AddRealServer(front_end, _)
            | Self::SetRealServer(front_end, _)
            | Self::DrainRealServer(front_end, _)
            | Self::DeleteRealServer(front_end, _)
            | Self::DeleteVirtualServer(front_end) => Key::Server(front_end),
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddDevice => write!(f, "add device kube-ipvs0"),
            Self::AddVirtualServer(front_end, _) => write!(f, "add virtual server {front_end}"),
            Self::SetVirtualServer(front_end, _) => write!(f, "change virtual server {front_end}"),
            Self::AddRealServer(front_end, server) => {
                write!(f, "add real server {} of {front_end}", server.socket_address())
            }
            Self::SetRealServer(front_end, server) => {
                write!(f, "change real server {} of {front_end}", server.socket_address())
            }
            Self::BindAddress(address) => write!(f, "add address {address} to kube-ipvs0"),
            Self::DrainRealServer(front_end, server) => {
                write!(f, "drain real server {} of {front_end}", server.socket_address())
            }
            Self::DeleteRealServer(front_end, address) => write!(f, "delete real server {address} of {front_end}"),
            Self::UnbindAddress(address) => write!(f, "delete address {address} of kube-ipvs0"),
            Self::DeleteVirtualServer(front_end) => write!(f, "delete virtual server {front_end}"),
        }
    }
}

/// What is compared, planned and retried as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// `kube-ipvs0` itself.
    Device,
    /// A virtual server with its real servers.
    Server(FrontEnd),
    /// A VIP.
    Address(IpAddr),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device => f.write_str("device kube-ipvs0"),
            Self::Server(front_end) => write!(f, "virtual server {front_end}"),
            Self::Address(address) => write!(f, "address {address}"),
        }
    }
}

/// Operations, sorted by phase.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    operations: Vec<Operation>,
}

impl Plan {
    /// Nothing to do?
    pub fn is_empty(&self) -> bool {
        self.operations.is_empty()
    }

    /// The operations in the order in which they are to be carried out.
    pub fn operations(&self) -> &[Operation] {
        &self.operations
    }
}

impl FromIterator<Operation> for Plan {
    /// Within a phase the order stays.
    fn from_iter<I: IntoIterator<Item = Operation>>(operations: I) -> Self {
        let mut operations: Vec<_> = operations.into_iter().collect();
        operations.sort_by_key(Operation::phase);
        Self { operations }
    }
}
