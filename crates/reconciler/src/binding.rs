//! How VIPs are bound to this node: as addresses on `kube-ipvs0`, or by local routes to it.
//!
//! The kernel iterates over all addresses of a device before it adds one; routes are in a tree. With thousands of VIPs a start is
//! much faster with routes, most of all with one route for a whole range.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};
use ipvs_netlink::Family;
use service_watch::RESERVED;

/// How VIPs are bound to this node (`--vip-binding`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum VipBinding {
    /// Each VIP is an address on `kube-ipvs0`.
    #[default]
    Addresses,
    /// Each of these ranges, and each VIP outside of them, is a local route to `kube-ipvs0`.
    Routes(VipRanges),
}

impl VipBinding {
    /// The ranges that are one route each.
    pub fn ranges(&self) -> &[IpNet] {
        match self {
            Self::Addresses => &[],
            Self::Routes(ranges) => &ranges.0,
        }
    }

    /// Whether VIPs are bound by routes.
    pub fn is_routes(&self) -> bool {
        matches!(self, Self::Routes(_))
    }

    /// The range that contains an address.
    pub(crate) fn range_of(&self, address: IpAddr) -> Option<&IpNet> {
        self.ranges().iter().find(|range| range.contains(&address))
    }
}

/// Ranges of VIPs (`--vip-ranges`): sorted, without overlaps, with more than one address each, and without reserved addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VipRanges(Vec<IpNet>);

/// Why a range cannot be a range of VIPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VipRangeError {
    /// It contains every address.
    Everything,
    /// It overlaps this reserved range.
    Reserved(IpNet),
}

impl fmt::Display for VipRangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Everything => f.write_str("contains every address: the node would keep all packets for itself"),
            Self::Reserved(range) => write!(f, "overlaps {range}, whose addresses cannot be VIPs"),
        }
    }
}

/// IPv6 addresses that embed IPv4 addresses, the loopback and the unspecified address (RFC 4291).
const IPV4_EMBEDDED: IpNet = IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 8));

/// Checks whether a range can be a range of VIPs.
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
    /// Normalizes ranges of the configuration. A range of one address is dropped: as a VIP it has a route of its own anyway.
    pub fn new(ranges: &[IpNet]) -> Result<Self, VipRangeError> {
        ranges.iter().try_for_each(check_range)?;
        let mut ranges = IpNet::aggregate(&ranges.to_vec());
        ranges.retain(|range| !is_host_range(range));
        ranges.sort_unstable();
        Ok(Self(ranges))
    }
}

/// The /32 or /128 of an address.
pub(crate) fn host_range(address: IpAddr) -> IpNet {
    IpNet::from(address)
}

/// Whether a range is a /32 or /128.
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
    fn ranges_are_aggregated_and_single_addresses_dropped() {
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
    fn ranges_with_reserved_addresses_are_rejected() {
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
