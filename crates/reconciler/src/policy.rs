//! The operator's configuration, as far as it concerns Services.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use ipvs_netlink::{Family, Scheduler, SchedulerFlags};

use crate::binding::VipBinding;
use crate::budget::ServiceBudget;

/// The addresses of the node on which NodePorts listen (`--nodeport-addresses`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// All addresses.
    #[default]
    All,
    /// The addresses in these ranges; all addresses of a family without a range.
    Within(Vec<IpNet>),
    /// The node's IPs (`primary`).
    Primary,
    /// The node's IPs and the addresses in these ranges; all addresses of a family without either.
    PrimaryAndWithin(Vec<IpNet>),
    /// None.
    None,
}

/// The address families that the node can serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Families {
    /// IPv4.
    pub ipv4: bool,
    /// IPv6.
    pub ipv6: bool,
}

impl Families {
    /// Both families.
    pub const BOTH: Self = Self { ipv4: true, ipv6: true };

    /// Whether a family is one of them.
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

/// How packets from pods are recognized (`--detect-local-mode`). Traffic to ClusterIPs from elsewhere is masqueraded. If a front
/// end with traffic policy `Local` has no local endpoint, external clients are refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectLocal {
    /// By their source in the first of these ranges that has their family (`--cluster-cidr`). Without one, pods are not
    /// recognized.
    ClusterCidr(Vec<IpNet>),
    /// By their source in the Node's pod CIDRs.
    NodeCidr,
    /// By this bridge as the incoming interface (`--pod-bridge-interface`).
    BridgeInterface(String),
    /// By the prefix of the incoming interface's name (`--pod-interface-name-prefix`).
    InterfaceNamePrefix(String),
}

/// Whether external and load-balancer IPs may be addresses of pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodAddresses {
    /// They are refused. Pods have addresses in these ranges (`--cluster-cidr`, whichever way local pods are recognized); there are
    /// none if the ranges are not known.
    Refused(Vec<IpNet>),
    /// They are served.
    Allowed,
}

impl Default for PodAddresses {
    fn default() -> Self {
        Self::Refused(Vec::new())
    }
}

/// The operator's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The name of this Node. Endpoints with this `nodeName` are local.
    pub node_name: String,
    /// The scheduler of every virtual server (`--ipvs-scheduler`).
    pub scheduler: Scheduler,
    /// Virtual servers with an address in these ranges are never deleted (`--ipvs-exclude-cidrs`).
    pub exclude: Vec<IpNet>,
    /// `--nodeport-addresses`.
    pub node_port_addresses: NodePortAddresses,
    /// Replaces the node's IP of its family (`--bind-address`); `None` for the unspecified address.
    pub bind_address: Option<IpAddr>,
    /// The addresses of API servers that the configuration names.
    pub api_servers: Vec<IpAddr>,
    /// Whether external and load-balancer IPs may be addresses of pods (`--allow-pod-addresses`).
    pub pod_addresses: PodAddresses,
    /// Whether `spec.externalIPs` are served (feature gate `AllowServiceExternalIPs`).
    pub external_ips: bool,
    /// The families the node can serve.
    pub families: Families,
    /// Whether all traffic to ClusterIPs is masqueraded (`--masquerade-all`).
    pub masquerade_all: bool,
    /// The bit of the packet mark, 0 to 31, that marks connections to be masqueraded (`--iptables-masquerade-bit`).
    pub masquerade_bit: u8,
    /// How packets from pods are recognized.
    pub detect_local: DetectLocal,
    /// How long a real server may drain before it is deleted with its remaining connections (`--ipvs-drain-timeout`); `None` for
    /// no limit.
    pub drain_timeout: Option<Duration>,
    /// How VIPs are bound to this node (`--vip-binding`, `--vip-ranges`).
    pub binding: VipBinding,
    /// Whether no other program may change the tables of the packet filter, if the kernel can do that (`--own-tables`).
    pub own_tables: bool,
    /// How much one Service may have on this node (`kubeIPVS.serviceBudget`).
    pub service_budget: ServiceBudget,
}

impl Policy {
    /// The defaults of kube-proxy.
    pub fn new(node_name: impl Into<String>) -> Self {
        Self {
            node_name: node_name.into(),
            scheduler: Scheduler::RoundRobin,
            exclude: Vec::new(),
            node_port_addresses: NodePortAddresses::All,
            bind_address: None,
            api_servers: Vec::new(),
            pod_addresses: PodAddresses::default(),
            external_ips: true,
            families: Families::BOTH,
            masquerade_all: false,
            masquerade_bit: 14,
            detect_local: DetectLocal::ClusterCidr(Vec::new()),
            drain_timeout: None,
            binding: VipBinding::Addresses,
            own_tables: true,
            service_budget: ServiceBudget::default(),
        }
    }

    /// The scheduler flags of every virtual server. `mh` hashes the source port too, as in kube-proxy. `mh` and `sh` keep real servers
    /// of weight 0 in their tables: with the fallback flag they choose another one, and otherwise refuse the client.
    pub fn scheduler_flags(&self) -> SchedulerFlags {
        match self.scheduler {
            Scheduler::MaglevHashing => SchedulerFlags::MH_PORT.union(SchedulerFlags::MH_FALLBACK),
            Scheduler::SourceHashing => SchedulerFlags::SH_FALLBACK,
            _ => SchedulerFlags::NONE,
        }
    }
}
