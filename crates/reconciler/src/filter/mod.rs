//! The packet filter: who is masqueraded, who is refused, and where.
//!
//! Two tables, one a family, both named [`TABLE`]: a constant [`ruleset`] over a few sets and maps, and elements that
//! follow the Services. [`crate::linux::filter`] writes them as `nf_tables` messages and reads them back. What a front end gets
//! follows from the sets it is in, its [`FrontEndRule`]; only source ranges have chains of their own, as they have no size.
//!
//! What this file has, and so what the Services want, is free of netlink.

pub(crate) mod expression;
pub(crate) mod inventory;
pub mod ruleset;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use ipvs_netlink::Family;
use service_watch::{ObjectName, Protocol};

use crate::front_end::FrontEnd;

/// The name of the tables. kube-proxy deletes the tables `kube-proxy` of either family when it starts in ipvs mode, so
/// that name is not to be had.
pub const TABLE: &str = "kube-ipvs";

/// From whom connections to a front end are masqueraded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Masquerade {
    /// Nobody: the real server sees the client.
    Nobody,
    /// Whoever is no pod, as far as `--detect-local-mode` tells: for ClusterIPs.
    Outsiders,
    /// Everybody: an answer to someone else than the node might not come back this way.
    Everybody,
    /// The node itself, whose source address would be the VIP.
    Node,
    /// Nobody, and what the node itself sends by UDP goes where it is refused: IPVS, finding no real server, would have
    /// `send` fail with `EPERM`.
    NodeIsRefused,
}

/// Who may connect to a front end, source ranges aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Everybody.
    Open,
    /// Whoever is inside the cluster. An answer to an outsider would come from nowhere: its policy is Local, and its only
    /// endpoints are on other nodes.
    Insiders,
    /// Nobody: there is no endpoint.
    Refuse,
}

/// What the packet filter does with connections to a front end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FrontEndRule {
    /// From whom they are masqueraded.
    pub masquerade: Masquerade,
    /// Who may make them.
    pub guard: Access,
    /// Whether the node itself may not: its address is in none of the source ranges.
    pub is_closed_to_node: bool,
    /// The Service whose source ranges they must come from.
    pub source_ranges: Option<ObjectName>,
}

impl FrontEndRule {
    /// Everybody may connect, and stays who they are.
    pub const OPEN: Self =
        Self { masquerade: Masquerade::Nobody, guard: Access::Open, is_closed_to_node: false, source_ranges: None };

    /// The sets the front end is in, one bit each.
    pub fn sets(&self) -> u32 {
        let masquerade = match self.masquerade {
            Masquerade::Nobody => set::MASQUERADE_NOBODY,
            Masquerade::Outsiders => set::MASQUERADE_OUTSIDERS,
            Masquerade::Everybody => set::MASQUERADE_EVERYBODY,
            Masquerade::Node => set::MASQUERADE_NODE,
            Masquerade::NodeIsRefused => set::UDP_REFUSED_TO_NODE,
        };
        let guard = match self.guard {
            Access::Open => set::OPEN,
            Access::Insiders => set::OPEN_TO_INSIDERS,
            Access::Refuse => set::REFUSED,
        };
        masquerade | guard | if self.is_closed_to_node { set::CLOSED_TO_NODE } else { 0 }
    }
}

/// The sets of front ends: a bit and a name for each.
pub(crate) mod set {
    pub(crate) const MASQUERADE_NOBODY: u32 = 1;
    pub(crate) const MASQUERADE_OUTSIDERS: u32 = 1 << 1;
    pub(crate) const MASQUERADE_EVERYBODY: u32 = 1 << 2;
    pub(crate) const MASQUERADE_NODE: u32 = 1 << 3;
    pub(crate) const UDP_REFUSED_TO_NODE: u32 = 1 << 4;
    pub(crate) const OPEN: u32 = 1 << 5;
    pub(crate) const OPEN_TO_INSIDERS: u32 = 1 << 6;
    pub(crate) const REFUSED: u32 = 1 << 7;
    pub(crate) const CLOSED_TO_NODE: u32 = 1 << 8;

    pub(crate) const NAMES: [(u32, &str); 9] = [
        (MASQUERADE_NOBODY, "masquerade-nobody"),
        (MASQUERADE_OUTSIDERS, "masquerade-outsiders"),
        (MASQUERADE_EVERYBODY, "masquerade-everybody"),
        (MASQUERADE_NODE, "masquerade-node"),
        (UDP_REFUSED_TO_NODE, "udp-refused-to-node"),
        (OPEN, "open"),
        (OPEN_TO_INSIDERS, "open-to-insiders"),
        (REFUSED, "refused"),
        (CLOSED_TO_NODE, "closed-to-node"),
    ];

    pub(crate) fn name(set: u32) -> &'static str {
        NAMES.iter().find(|(bit, _)| *bit == set).map_or("", |(_, name)| name)
    }
}

/// The elements of a front end in the sets and in the map `source-ranges`: those of a [`FrontEndRule`], or whatever another
/// program has put there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct FrontEndElements {
    /// The sets of front ends it is in, one bit each.
    pub sets: u32,
    /// Its element in the map `source-ranges`.
    pub source_ranges: SourceRangesElement,
}

/// The element of a front end in the map `source-ranges`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum SourceRangesElement {
    /// There is none: clients may connect from everywhere.
    #[default]
    Absent,
    /// Its verdict is a jump to the chain with the source ranges of this Service.
    Service(ObjectName),
    /// Its verdict is one that this program does not write.
    Foreign,
}

impl From<&FrontEndRule> for FrontEndElements {
    fn from(rule: &FrontEndRule) -> Self {
        Self {
            sets: rule.sets(),
            source_ranges: rule.source_ranges.clone().map_or(SourceRangesElement::Absent, SourceRangesElement::Service),
        }
    }
}

impl FrontEndElements {
    /// Whether these let in whom others kept out: then there must be somebody behind the door.
    pub(crate) fn is_wider_than(&self, before: &Self) -> bool {
        let is_narrow = |it: &Self| it.sets & (set::OPEN_TO_INSIDERS | set::REFUSED) != 0;
        is_narrow(before) && !is_narrow(self)
    }
}

/// A member of one of the plain sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetElement {
    /// A VIP on `kube-ipvs0`: what is no front end on it is refused, whatever listens on the node.
    Vip(IpAddr),
    /// An endpoint on this node: what its pod sends to itself by way of a VIP is masqueraded, or it would answer itself
    /// directly.
    Hairpin(SocketAddr, Protocol),
    /// A port on which load balancers ask after the node's health, of either family's table.
    HealthCheckPort(Family, u16),
}

impl SetElement {
    /// Of which family's table it is.
    pub fn family(&self) -> Family {
        match self {
            Self::Vip(address) => Family::of(*address),
            Self::Hairpin(endpoint, _) => Family::of(endpoint.ip()),
            Self::HealthCheckPort(family, _) => *family,
        }
    }
}

impl fmt::Display for SetElement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vip(address) => write!(f, "VIP {address}"),
            Self::Hairpin(endpoint, protocol) => write!(f, "local endpoint {endpoint} ({protocol:?})"),
            Self::HealthCheckPort(family, port) => write!(f, "health-check port {port} ({family})"),
        }
    }
}

/// The source ranges of a Service in one family: sorted, without overlap, none of them everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceRanges(Vec<IpNet>);

impl SourceRanges {
    /// Those of a family among ranges as they were written; `None` where they let everybody in.
    ///
    /// Overlaps and host bits are resolved here, so that the kernel, which refuses overlaps, sees none. A list without a
    /// range of the family lets nobody in: kube-proxy lets everybody in then, which nobody who restricts can mean.
    pub fn of_family(ranges: &[IpNet], family: Family) -> Option<Self> {
        let of_family: Vec<IpNet> = ranges.iter().filter(|range| Family::of(range.addr()) == family).copied().collect();
        let mut aggregated = IpNet::aggregate(&of_family);
        if aggregated.iter().any(|range| range.prefix_len() == 0) {
            return None;
        }
        aggregated.sort_unstable();
        Some(Self(aggregated))
    }

    /// The ranges.
    pub fn iter(&self) -> impl Iterator<Item = &IpNet> {
        self.0.iter()
    }

    /// Whether an address is in one of them.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.iter().any(|range| range.contains(&address))
    }

    /// A number that tells these ranges from others: what the kernel remembers of them in a rule's user data.
    pub fn fingerprint(&self) -> u64 {
        let mut fingerprint = Fingerprint::default();
        for range in &self.0 {
            fingerprint.add(range.to_string().as_bytes());
        }
        fingerprint.finish()
    }
}

/// Everything in the table of one family that follows the Services.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableContents {
    /// Front ends.
    pub front_ends: BTreeMap<FrontEnd, FrontEndRule>,
    /// Members of plain sets.
    pub elements: BTreeSet<SetElement>,
    /// Source ranges by Service.
    pub source_ranges: BTreeMap<ObjectName, SourceRanges>,
}

/// The tables as they were read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedFilter {
    /// The fingerprint of the constant part of each family's table; a family without a table has none.
    pub rulesets: BTreeMap<Family, u64>,
    /// Front ends.
    pub front_ends: BTreeMap<FrontEnd, FrontEndElements>,
    /// Members of plain sets.
    pub elements: BTreeSet<SetElement>,
    /// Fingerprints of source ranges, by Service and family.
    pub source_ranges: BTreeMap<(ObjectName, Family), u64>,
}

/// FNV-1a over words of 64 bits: tells what this program has written from what it would write now. It guards against neither malice
/// nor luck, and need not: who can write the tables needs no collision.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fingerprint(u64);

impl Default for Fingerprint {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fingerprint {
    /// Adds a part, whose end counts too.
    pub(crate) fn add(&mut self, part: &[u8]) {
        let mut mix = |word: u64| {
            let mixed = (self.0 ^ word).wrapping_mul(0x0100_0000_01b3);
            // Only upwards carries a product; what the upper bits know must reach the lower ones too.
            self.0 = mixed ^ (mixed >> 32);
        };
        let (words, rest) = part.as_chunks::<8>();
        for word in words {
            mix(u64::from_le_bytes(*word));
        }
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        mix(u64::from_le_bytes(last));
        mix(part.len() as u64);
    }

    pub(crate) fn finish(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn ranges_lose_overlaps_and_host_bits_and_nothing_else() {
        for (written, v4, v6) in [
            (&["10.0.0.0/8"][..], Some(&["10.0.0.0/8"][..]), Some(&[][..])),
            (&["10.1.2.3/8", "10.2.0.0/16", "10.1.2.3/32"], Some(&["10.0.0.0/8"]), Some(&[])),
            (&["192.0.2.0/25", "192.0.2.128/25", "fd00::1/64"], Some(&["192.0.2.0/24"]), Some(&["fd00::/64"])),
            (&["10.0.0.0/8", "0.0.0.0/0"], None, Some(&[])),
            (&["0.0.0.0/1", "128.0.0.0/1"], None, Some(&[])),
            (&["::ffff:10.0.0.0/104"], Some(&[]), Some(&["::ffff:10.0.0.0/104"])),
        ] {
            let written = ranges(written);
            let of = |family| SourceRanges::of_family(&written, family).map(|ranges| ranges.0);
            assert_eq!(of(Family::Ipv4), v4.map(ranges), "{written:?}");
            assert_eq!(of(Family::Ipv6), v6.map(ranges), "{written:?}");
        }
    }

    #[test]
    fn fingerprints_tell_lists_apart() {
        let of = |texts: &[&str]| SourceRanges::of_family(&ranges(texts), Family::Ipv4).unwrap().fingerprint();
        assert_eq!(of(&["10.0.0.0/8", "192.0.2.0/24"]), of(&["192.0.2.0/24", "10.0.0.0/8"]));
        assert_ne!(of(&["10.0.0.0/8"]), of(&["10.0.0.0/9"]));
        assert_ne!(of(&[]), of(&["10.0.0.0/8"]));
    }
}
