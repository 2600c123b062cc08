//! The packet filter: which connections are masqueraded, and which are refused.
//!
//! There are two tables of `nf_tables`, one per family, both named [`TABLE`]. Each has a constant [`ruleset`] with a few sets and maps,
//! whose elements depend on the Services. [`crate::linux::filter`] writes them as netlink messages and reads them back. What happens
//! to connections to a front end, its [`FrontEndRule`], depends on the sets it is in. Only source ranges have chains of their own,
//! since their number is unlimited.
//!
//! This file, and so what Services need, does not depend on netlink.

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

/// The name of the tables. It cannot be `kube-proxy`: kube-proxy deletes those when it starts in ipvs mode.
pub const TABLE: &str = "kube-ipvs";

/// Which connections to a front end are masqueraded. The variants have the names of the sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Masquerade {
    /// None: the real server sees the client's address.
    Nobody,
    /// Those that are not from pods as recognized by `--detect-local-mode`: for ClusterIPs.
    Outsiders,
    /// All: otherwise replies might not come back through this node.
    Everybody,
    /// Those from the node itself, whose source address would be the VIP.
    Node,
    /// None, and UDP packets of the node itself are redirected to where they are refused. Otherwise IPVS, without a real server,
    /// would make `send` fail with `EPERM`.
    NodeIsRefused,
}

impl Masquerade {
    /// The bit of its set.
    pub fn set(self) -> u32 {
        match self {
            Self::Nobody => set::MASQUERADE_NOBODY,
            Self::Outsiders => set::MASQUERADE_OUTSIDERS,
            Self::Everybody => set::MASQUERADE_EVERYBODY,
            Self::Node => set::MASQUERADE_NODE,
            Self::NodeIsRefused => set::UDP_REFUSED_TO_NODE,
        }
    }
}

/// Who may connect to a front end, apart from source ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Everybody.
    Open,
    /// Pods and the node. Its traffic policy is `Local` and its only endpoints are on other nodes, so replies to external clients
    /// would have the wrong source.
    Insiders,
    /// Nobody, since there is no endpoint.
    Refused,
}

/// What the packet filter does with connections to a front end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FrontEndRule {
    /// Which of them are masqueraded.
    pub masquerade: Masquerade,
    /// Who may connect.
    pub access: Access,
    /// Whether the node itself may not connect, since the source ranges exclude its address.
    pub is_closed_to_node: bool,
    /// The Service whose source ranges apply.
    pub source_ranges: Option<ObjectName>,
}

impl FrontEndRule {
    /// Everybody may connect, and nothing is masqueraded.
    pub const OPEN: Self =
        Self { masquerade: Masquerade::Nobody, access: Access::Open, is_closed_to_node: false, source_ranges: None };

    /// The sets the front end is in, one bit each.
    pub fn sets(&self) -> u32 {
        let masquerade = self.masquerade.set();
        let access = match self.access {
            Access::Open => set::OPEN,
            Access::Insiders => set::OPEN_TO_INSIDERS,
            Access::Refused => set::REFUSED,
        };
        masquerade | access | if self.is_closed_to_node { set::CLOSED_TO_NODE } else { 0 }
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
    /// What a front end has while its real servers change, between `before` and these. It admits nobody whom one of the two refuses,
    /// and masquerades everybody whom one of the two masquerades: an endpoint on another node answers a client that is not
    /// masqueraded past this node, and the connection never gets an answer.
    pub(crate) fn guarded_from(&self, before: &Self) -> Self {
        let narrower = [set::REFUSED, set::OPEN_TO_INSIDERS, set::OPEN];
        let access = |it: &Self| narrower.into_iter().find(|bit| it.sets & bit != 0);
        // A front end that nobody could reach changes at once, and one that is refused has nothing else to guard.
        let Some(access_before) = access(before) else { return self.clone() };
        if access(self) == Some(set::REFUSED) {
            return self.clone();
        }
        if access_before == set::REFUSED {
            return before.clone();
        }
        let either = before.sets | self.sets;
        let access = access(self).map_or(0, |after| after.max(access_before));
        let opens =
            before.source_ranges != SourceRangesElement::Absent && self.source_ranges == SourceRangesElement::Absent;
        Self {
            sets: access | widest_masquerade(either) | either & set::CLOSED_TO_NODE,
            source_ranges: if opens { before } else { self }.source_ranges.clone(),
        }
    }

    /// Whether these admit clients that others refused, or do not masquerade clients that others masqueraded. They may be written only
    /// once the real servers are those that may serve such clients.
    pub(crate) fn is_wider_than(&self, before: &Self) -> bool {
        *self != self.guarded_from(before)
    }
}

/// The set of those in which a front end is masqueraded for most clients.
fn widest_masquerade(sets: u32) -> u32 {
    let both = set::MASQUERADE_OUTSIDERS | set::MASQUERADE_NODE;
    if sets & both == both {
        return set::MASQUERADE_EVERYBODY;
    }
    let widest = [
        set::MASQUERADE_EVERYBODY,
        set::MASQUERADE_OUTSIDERS,
        set::MASQUERADE_NODE,
        set::MASQUERADE_NOBODY,
        set::UDP_REFUSED_TO_NODE,
    ];
    widest.into_iter().find(|bit| sets & bit != 0).unwrap_or(0)
}

/// An element of one of the sets that are not about front ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetElement {
    /// A VIP that is bound to this node. Connections to its ports that are not front ends are refused, whatever listens on the
    /// node.
    Vip(IpAddr),
    /// An endpoint on this node. Connections of its pod to itself through a VIP are masqueraded; otherwise the pod would reply to
    /// itself directly.
    Hairpin(SocketAddr, Protocol),
    /// A port on which the node answers health checks of load balancers, in one family's table.
    HealthCheckPort(Family, u16),
}

impl SetElement {
    /// The family of its table.
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

/// The source ranges of a Service in one family: sorted, without overlaps, and without a range that contains everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceRanges(Vec<IpNet>);

impl SourceRanges {
    /// The ranges of a family among those of a Service; `None` if they admit everybody.
    ///
    /// Overlaps and host bits are resolved here, since the kernel refuses overlaps. A list without a range of the family admits
    /// nobody. kube-proxy admits everybody then, which nobody who restricts access can intend.
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

    /// Identifies the ranges. The kernel holds it in a rule's user data.
    pub fn fingerprint(&self) -> u64 {
        let mut fingerprint = Fingerprint::default();
        for range in &self.0 {
            fingerprint.add(range.to_string().as_bytes());
        }
        fingerprint.finish()
    }
}

/// All elements and source ranges of one family's table, which depend on the Services.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableContents {
    /// Front ends.
    pub front_ends: BTreeMap<FrontEnd, FrontEndRule>,
    /// Elements of the other sets.
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
    /// Elements of the other sets.
    pub elements: BTreeSet<SetElement>,
    /// Fingerprints of source ranges, by Service and family.
    pub source_ranges: BTreeMap<(ObjectName, Family), u64>,
}

/// FNV-1a over words of 64 bits. It compares what this program has written with what it would write now. It need not resist
/// attacks: whoever can write the tables needs no collision.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fingerprint(u64);

impl Default for Fingerprint {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fingerprint {
    /// Adds a part and its length.
    pub(crate) fn add(&mut self, part: &[u8]) {
        let mut mix = |word: u64| {
            let mixed = (self.0 ^ word).wrapping_mul(0x0100_0000_01b3);
            // A product only carries upwards, so the upper bits are mixed into the lower ones.
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
    fn source_ranges_are_aggregated_by_family() {
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
    fn fingerprints_differ_for_different_ranges() {
        let of = |texts: &[&str]| SourceRanges::of_family(&ranges(texts), Family::Ipv4).unwrap().fingerprint();
        assert_eq!(of(&["10.0.0.0/8", "192.0.2.0/24"]), of(&["192.0.2.0/24", "10.0.0.0/8"]));
        assert_ne!(of(&["10.0.0.0/8"]), of(&["10.0.0.0/9"]));
        assert_ne!(of(&[]), of(&["10.0.0.0/8"]));
    }

    #[test]
    fn a_front_end_is_guarded_while_its_real_servers_change() {
        use Access::{Insiders, Open, Refused};
        use Masquerade::{Everybody, Nobody, Node, NodeIsRefused, Outsiders};
        let elements = |(masquerade, access): (Masquerade, Access)| {
            FrontEndElements::from(&FrontEndRule { masquerade, access, ..FrontEndRule::OPEN })
        };
        for (before, after, guarded) in [
            // External policy Cluster, Local with and without a local endpoint, and no endpoint at all; in either direction.
            ((Everybody, Open), (Nobody, Open), (Everybody, Open)),
            ((Nobody, Open), (Everybody, Open), (Everybody, Open)),
            ((Everybody, Open), (Node, Insiders), (Everybody, Insiders)),
            ((Node, Insiders), (Everybody, Open), (Everybody, Insiders)),
            ((Nobody, Open), (Node, Insiders), (Node, Insiders)),
            ((Node, Insiders), (Nobody, Open), (Node, Insiders)),
            ((Everybody, Open), (Nobody, Refused), (Nobody, Refused)),
            ((Nobody, Refused), (Everybody, Open), (Nobody, Refused)),
            // UDP without an endpoint.
            ((Outsiders, Open), (NodeIsRefused, Refused), (NodeIsRefused, Refused)),
            ((NodeIsRefused, Refused), (Outsiders, Open), (NodeIsRefused, Refused)),
            // The front end of one Service becomes that of another.
            ((Outsiders, Open), (Node, Insiders), (Everybody, Insiders)),
            ((Outsiders, Open), (Nobody, Open), (Outsiders, Open)),
        ] {
            let (before, after, guarded) = (elements(before), elements(after), elements(guarded));
            assert_eq!(after.guarded_from(&before), guarded, "{before:?} to {after:?}");
            assert!(!guarded.is_wider_than(&before), "{before:?} to {after:?}");
            assert!(guarded == after || after.is_wider_than(&guarded), "{before:?} to {after:?}");
        }
        let new = elements((Everybody, Open));
        assert_eq!(new.guarded_from(&FrontEndElements::default()), new, "nobody could reach it");
    }

    #[test]
    fn source_ranges_go_after_the_real_servers_and_come_before() {
        let web = SourceRangesElement::Service(ObjectName::new("default", "web"));
        let elements = |source_ranges: &SourceRangesElement, is_closed_to_node| FrontEndElements {
            source_ranges: source_ranges.clone(),
            ..FrontEndElements::from(&FrontEndRule { is_closed_to_node, ..FrontEndRule::OPEN })
        };
        let (open, closed) = (elements(&SourceRangesElement::Absent, false), elements(&web, true));
        assert_eq!(closed.guarded_from(&open), closed);
        assert_eq!(open.guarded_from(&closed), closed);
    }
}
