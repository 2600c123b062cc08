//! The constant part of a family's table: sets, chains and rules. It depends on flags and the Node alone.
//!
//! ```text
//! prerouting, output (nat)  new connection ─▶ which sets have its front end? ─▶ mark it, protect it from other NAT rules
//! postrouting (nat)         marked, or from a pod to itself ─▶ masquerade
//! input (filter)            before IPVS: source ranges, front ends, health-check ports; refuse all else to a VIP
//! forward (filter)          to a VIP that is not bound yet ─▶ drop
//! ```
//!
//! IPVS handles packets in `LOCAL_IN` at priority 98 and in `LOCAL_OUT` at −99 (`ip_vs_core.c`), so the filter at input sees the
//! VIP, and nat at −110 comes before it. IPVS handles the node's own packets at output, where a dropped packet makes the sender's
//! call fail with `EPERM`. So packets that the node must not send are redirected to a port where they are dropped, or refused, at
//! input.
//!
//! The rules use only what nft's language can express, so that the output of `nft list ruleset` can be loaded again.

mod rules;

use std::net::IpAddr;
use std::sync::OnceLock;

use ipnet::IpNet;
use ipvs_netlink::Family;
use netlink_packet_core::Emitable;
use netlink_packet_netfilter::nftables::RuleAttribute;

use super::expression::Expression;
use super::inventory::Inventory;
use super::{Fingerprint, set};
use crate::binding;
use crate::node::NodeView;
use crate::policy::{DetectLocal, Policy};

/// A map from front ends to the chains with their source ranges.
pub(crate) const SOURCE_RANGES: &str = "source-ranges";
/// A set of VIPs that are bound to this node.
pub(crate) const VIPS: &str = "vips";
/// A set of local endpoints, each as source and as destination, with protocol and port.
pub(crate) const HAIRPIN: &str = "hairpin";
/// A set of ports on which the node answers health checks of load balancers.
pub(crate) const HEALTH_CHECK_PORTS: &str = "health-check-ports";
/// The prefix of the chains with source ranges; namespace and name of the Service follow.
pub(crate) const SOURCES_PREFIX: &str = "sources-";

/// The number of nft's type of addresses (`datatype.h`).
pub(crate) fn address_type(family: Family) -> u32 {
    match family {
        Family::Ipv4 => 7,
        Family::Ipv6 => 8,
    }
}

/// How packets from pods are matched.
#[derive(Clone, Debug, PartialEq, Eq)]
enum PodMatch {
    /// They cannot be matched.
    Unknown,
    Range(IpNet),
    Interface(String),
    InterfacePrefix(String),
}

/// The constant part of one family's table.
#[derive(Clone, Debug)]
pub struct Ruleset {
    family: Family,
    mark: u32,
    masquerades_all: bool,
    pods: PodMatch,
    /// Ranges of VIPs that are routed to this node as a whole, sorted. Connections to their other addresses are refused.
    ranges: Vec<IpNet>,
    /// Whether the node's own connections to a VIP have that VIP as their source.
    has_vip_sources: bool,
    /// The node's addresses in these ranges. At the start there are none; one that is added later must stay reachable.
    node_addresses: Vec<IpAddr>,
    /// Computed from the other fields on first use.
    fingerprint: OnceLock<u64>,
}

impl PartialEq for Ruleset {
    fn eq(&self, other: &Self) -> bool {
        let facts = |it: &Self| (it.family, it.mark, it.masquerades_all, it.has_vip_sources);
        let is_same =
            self.pods == other.pods && self.ranges == other.ranges && self.node_addresses == other.node_addresses;
        is_same && facts(self) == facts(other)
    }
}

impl Eq for Ruleset {}

/// A set or map.
pub(crate) struct Set {
    pub(crate) name: &'static str,
    /// The data type of its keys for `nft list`; see `nft describe`.
    pub(crate) key_type: u32,
    pub(crate) key_bytes: u32,
    /// Whether it is a map to verdicts.
    pub(crate) is_map: bool,
}

/// A chain.
pub(crate) struct Chain {
    pub(crate) name: String,
    pub(crate) base: Option<BaseChain>,
    pub(crate) rules: Vec<Rule>,
}

/// Type, hook and priority of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BaseChain {
    pub(crate) kind: &'static str,
    /// `NF_INET_*`.
    pub(crate) hook: u32,
    pub(crate) priority: i32,
}

/// A rule.
pub(crate) struct Rule {
    /// `nft list ruleset` shows it.
    pub(crate) comment: String,
    pub(crate) expressions: Vec<Expression>,
}

impl Rule {
    pub(crate) fn new(comment: impl Into<String>, expressions: impl IntoIterator<Item = Vec<Expression>>) -> Self {
        Self { comment: comment.into(), expressions: expressions.into_iter().flatten().collect() }
    }

    /// Identifies the rule as this program writes it, whatever representation the kernel returns.
    pub(crate) fn fingerprint(&self) -> u64 {
        let attribute = RuleAttribute::Expressions(self.expressions.clone());
        let mut bytes = vec![0; attribute.buffer_len()];
        attribute.emit(&mut bytes);
        let mut fingerprint = Fingerprint::default();
        fingerprint.add(self.comment.as_bytes());
        fingerprint.add(&bytes);
        fingerprint.finish()
    }
}

impl Ruleset {
    /// The constant part of a family's table on this node.
    pub fn new(family: Family, policy: &Policy, node: &NodeView) -> Self {
        let first_of = |ranges: &[IpNet]| {
            let range = ranges.iter().find(|range| Family::of(range.addr()) == family);
            range.map_or(PodMatch::Unknown, |range| PodMatch::Range(range.trunc()))
        };
        Self {
            ranges: policy.binding.ranges().iter().filter(|range| binding::family(range) == family).copied().collect(),
            // IPv6 selects only addresses on devices as sources.
            has_vip_sources: !(family == Family::Ipv6 && policy.binding.is_routes()),
            node_addresses: node
                .interface_addresses
                .iter()
                .filter(|address| policy.binding.range_of(**address).is_some())
                .copied()
                .collect(),
            family,
            mark: 1 << policy.masquerade_bit,
            masquerades_all: policy.masquerade_all,
            pods: match &policy.detect_local {
                DetectLocal::ClusterCidr(ranges) => first_of(ranges),
                DetectLocal::NodeCidr => first_of(&node.pod_cidrs),
                DetectLocal::BridgeInterface(name) => PodMatch::Interface(name.clone()),
                DetectLocal::InterfaceNamePrefix(prefix) => PodMatch::InterfacePrefix(prefix.clone()),
            },
            fingerprint: OnceLock::new(),
        }
    }

    /// The same for a node that has routes to other ranges too.
    #[must_use]
    pub fn with_ranges(mut self, ranges: &[IpNet]) -> Self {
        self.ranges.extend(ranges.iter().filter(|range| binding::family(range) == self.family));
        self.ranges.sort_unstable();
        self.ranges.dedup();
        self.fingerprint = OnceLock::new();
        self
    }

    /// The family of the table.
    pub fn family(&self) -> Family {
        self.family
    }

    /// Identifies the sets, chains and rules. A table that is up to date has the same fingerprint.
    pub fn fingerprint(&self) -> u64 {
        *self.fingerprint.get_or_init(|| self.inventory().fingerprint())
    }

    fn inventory(&self) -> Inventory {
        let mut whole = Inventory::default();
        whole.table(0);
        for set in self.sets() {
            whole.set(set.name, set.key_bytes, if set.is_map { VERDICT } else { 0 });
        }
        for chain in self.chains() {
            let rules: Vec<u64> = chain.rules.iter().map(Rule::fingerprint).collect();
            whole.chain(&chain.name, chain.base.map(|base| (base.kind, base.hook, base.priority)), &rules);
        }
        whole
    }

    fn address_words(&self) -> u32 {
        match self.family {
            Family::Ipv4 => 1,
            Family::Ipv6 => 4,
        }
    }

    pub(crate) fn sets(&self) -> Vec<Set> {
        // The numbers of nft's own types (`datatype.h`), six bits each in a concatenation.
        const INET_PROTO: u32 = 12;
        const INET_SERVICE: u32 = 13;
        let address = address_type(self.family);
        let words = self.address_words();
        let port = INET_PROTO << 6 | INET_SERVICE;
        let set = |name, key_type, key_bytes| Set { name, key_type, key_bytes, is_map: false };
        let front_ends = |name| set(name, address << 12 | port, (words + 2) * 4);
        let mut sets: Vec<Set> = set::NAMES.iter().map(|(_, name)| front_ends(*name)).collect();
        sets.push(Set { is_map: true, ..front_ends(SOURCE_RANGES) });
        sets.push(set(VIPS, address, words * 4));
        sets.push(set(HAIRPIN, address << 18 | address << 12 | port, (words * 2 + 2) * 4));
        sets.push(set(HEALTH_CHECK_PORTS, INET_SERVICE, 2));
        sets
    }
}

/// `NFT_DATA_VERDICT`.
pub(crate) const VERDICT: u32 = 0xffff_ff00;
