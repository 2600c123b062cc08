//! How the kernel learns that VIPs are this node's: addresses on `kube-ipvs0`, or local routes to it.
//!
//! The kernel looks through all addresses of a device before it adds one more; routes it finds in a tree. So with thousands
//! of VIPs, and most of all with ranges of which each is one route, a start takes far less of it.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};
use ipvs_netlink::Family;
use service_watch::RESERVED;

/// How the kernel learns that packets to a VIP are for this node (`--vip-binding`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum VipBinding {
    /// Each VIP is an address on `kube-ipvs0`.
    #[default]
    Addresses,
    /// A local route leads to `kube-ipvs0` for each of these ranges, and for each VIP in none of them.
    Routes(VipRanges),
}

impl VipBinding {
    /// The ranges of which each is one route.
    pub fn ranges(&self) -> &[IpNet] {
        match self {
            Self::Addresses => &[],
            Self::Routes(ranges) => &ranges.0,
        }
    }

    /// Whether it takes routes.
    pub fn is_routes(&self) -> bool {
        matches!(self, Self::Routes(_))
    }

    /// The range that an address is in.
    pub(crate) fn range_of(&self, address: IpAddr) -> Option<&IpNet> {
        self.ranges().iter().find(|range| range.contains(&address))
    }
}

/// Ranges of VIPs (`--vip-ranges`): sorted, without overlap, of more than one address each, and of none that is never a VIP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VipRanges(Vec<IpNet>);

/// Why a range cannot be one of VIPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VipRangeError {
    /// It is everything.
    Everything,
    /// It has addresses in this range, which has a meaning of its own.
    Reserved(IpNet),
}

impl fmt::Display for VipRangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Everything => f.write_str("is everything: the node would keep all packets for itself"),
            Self::Reserved(range) => write!(f, "has addresses of {range}, none of which can be a VIP"),
        }
    }
}

/// What stands for IPv4, and more of that kind (RFC 4291).
const IPV4_EMBEDDED: IpNet = IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 8));

/// What is wrong with a range, if anything.
pub fn check_range(range: &IpNet) -> Result<(), VipRangeError> {
    if range.prefix_len() == 0 {
        return Err(VipRangeError::Everything);
    }
    let mut reserved = std::iter::once(IPV4_EMBEDDED).chain(RESERVED.map(|(reserved, _)| reserved));
    reserved
        .find(|reserved| overlaps(reserved, range))
        .map_or(Ok(()), |reserved| Err(VipRangeError::Reserved(reserved)))
}

/// Whether two ranges have an address in common.
pub fn overlaps(a: &IpNet, b: &IpNet) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

impl VipRanges {
    /// Takes ranges as they were written. A single address needs no range: as a VIP it has a route of its own.
    pub fn new(ranges: &[IpNet]) -> Result<Self, VipRangeError> {
        ranges.iter().try_for_each(check_range)?;
        let mut ranges = IpNet::aggregate(&ranges.to_vec());
        ranges.retain(|range| !is_host_range(range));
        ranges.sort_unstable();
        Ok(Self(ranges))
    }
}

/// The range of one address.
pub(crate) fn host_range(address: IpAddr) -> IpNet {
    IpNet::from(address)
}

/// Whether a range has one address.
pub(crate) fn is_host_range(range: &IpNet) -> bool {
    range.prefix_len() == range.max_prefix_len()
}

/// The family of a range.
pub(crate) fn family(range: &IpNet) -> Family {
    Family::of(range.addr())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn ranges_lose_overlaps_and_host_bits_and_single_addresses() {
        for (written, accepted) in [
            (&["10.96.0.0/12"][..], &["10.96.0.0/12"][..]),
            (&["fd00:96::1/112", "10.97.1.2/12", "10.96.0.0/16"], &["10.96.0.0/12", "fd00:96::/112"]),
            (&["10.96.0.0/25", "10.96.0.128/25"], &["10.96.0.0/24"]),
            (&["10.96.0.1/32", "fd00::1/128"], &[]),
            (&["240.0.0.0/8"], &["240.0.0.0/8"]),
            (&[], &[]),
        ] {
            assert_eq!(
                VipRanges::new(&ranges(written)).map(|accepted| accepted.0),
                Ok(ranges(accepted)),
                "{written:?}"
            );
        }
    }

    #[test]
    fn what_can_be_no_vip_is_in_no_range() {
        for (range, reserved) in [
            ("0.0.0.0/0", None),
            ("::/0", None),
            ("0.0.0.0/1", Some("0.0.0.0/8")),
            ("127.1.0.0/16", Some("127.0.0.0/8")),
            ("169.0.0.0/8", Some("169.254.0.0/16")),
            ("239.0.0.0/8", Some("224.0.0.0/4")),
            ("255.255.255.0/24", Some("255.255.255.255/32")),
            ("::1/128", Some("::/8")),
            ("::ffff:10.96.0.0/108", Some("::/8")),
            ("fe80::/64", Some("fe80::/10")),
            ("fc00::/6", Some("fe80::/10")),
            ("ff05::/16", Some("ff00::/8")),
        ] {
            let problem = match reserved {
                None => VipRangeError::Everything,
                Some(reserved) => VipRangeError::Reserved(reserved.parse().unwrap()),
            };
            assert_eq!(VipRanges::new(&ranges(&["10.96.0.0/12", range])), Err(problem), "{range}");
        }
    }
}
