//! What the operator chose: the same for every Service of a run.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use ipvs_netlink::{Family, Scheduler, SchedulerFlags};

use crate::binding::VipBinding;

/// On which of the node's addresses NodePorts listen (`--nodeport-addresses`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// On all.
    #[default]
    All,
    /// On those within these ranges. A family without a range listens on all.
    Within(Vec<IpNet>),
    /// On the node's own IPs (`primary`).
    Primary,
}

/// Which address families the node can serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Families {
    /// IPv4.
    pub ipv4: bool,
    /// IPv6.
    pub ipv6: bool,
}

impl Families {
    /// Both.
    pub const BOTH: Self = Self { ipv4: true, ipv6: true };

    /// Whether a family is among them.
    pub fn contains(self, family: Family) -> bool {
        match family {
            Family::Ipv4 => self.ipv4,
            Family::Ipv6 => self.ipv6,
        }
    }

    /// The families, IPv4 first.
    pub fn iter(self) -> impl Iterator<Item = Family> {
        [Family::Ipv4, Family::Ipv6].into_iter().filter(move |family| self.contains(*family))
    }
}

/// How to tell that a packet comes from a pod (`--detect-local-mode`). Traffic to ClusterIPs from elsewhere is
/// masqueraded; an external client of a policy-Local front end is refused where no endpoint is local.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectLocal {
    /// Its source is in one of these ranges, the first of its family (`--cluster-cidr`). Without one nothing is told.
    ClusterCidr(Vec<IpNet>),
    /// Its source is in the Node's pod ranges.
    NodeCidr,
    /// It comes in by this bridge (`--pod-bridge-interface`).
    BridgeInterface(String),
    /// It comes in by an interface whose name begins so (`--pod-interface-name-prefix`).
    InterfaceNamePrefix(String),
}

/// What the operator chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The name of the own Node: endpoints with this `nodeName` are local.
    pub node_name: String,
    /// The scheduler of every virtual server (`--ipvs-scheduler`).
    pub scheduler: Scheduler,
    /// Virtual servers with an address in these ranges are never deleted (`--ipvs-exclude-cidrs`).
    pub exclude: Vec<IpNet>,
    /// `--nodeport-addresses`.
    pub node_port_addresses: NodePortAddresses,
    /// Takes the place of the node's IP of its family (`--bind-address`); `None` for the unspecified address.
    pub bind_address: Option<IpAddr>,
    /// Where the API server is, as far as that is known before it has said anything.
    pub api_servers: Vec<IpAddr>,
    /// Whether `spec.externalIPs` count (feature gate `AllowServiceExternalIPs`).
    pub external_ips: bool,
    /// The families the node can serve.
    pub families: Families,
    /// Whether all traffic to ClusterIPs is masqueraded (`--masquerade-all`).
    pub masquerade_all: bool,
    /// Which bit of the packet mark, 0 to 31, says that a connection is to be masqueraded (`--iptables-masquerade-bit`).
    pub masquerade_bit: u8,
    /// How to tell that a packet comes from a pod.
    pub detect_local: DetectLocal,
    /// How long a real server may drain before it is deleted with the connections it has (`--ipvs-drain-timeout`);
    /// `None` for as long as they last.
    pub drain_timeout: Option<Duration>,
    /// How the kernel learns that VIPs are this node's (`--vip-binding`, `--vip-ranges`).
    pub binding: VipBinding,
}

impl Policy {
    /// Everything as kube-proxy has it without flags.
    pub fn new(node_name: impl Into<String>) -> Self {
        Self {
            node_name: node_name.into(),
            scheduler: Scheduler::RoundRobin,
            exclude: Vec::new(),
            node_port_addresses: NodePortAddresses::All,
            bind_address: None,
            api_servers: Vec::new(),
            external_ips: true,
            families: Families::BOTH,
            masquerade_all: false,
            masquerade_bit: 14,
            detect_local: DetectLocal::ClusterCidr(Vec::new()),
            drain_timeout: None,
            binding: VipBinding::Addresses,
        }
    }

    /// The flags of every virtual server: kube-proxy hashes the source port with `mh`, and sets no other flag.
    pub fn scheduler_flags(&self) -> SchedulerFlags {
        match self.scheduler {
            Scheduler::MaglevHashing => SchedulerFlags::MH_PORT,
            _ => SchedulerFlags::NONE,
        }
    }
}
