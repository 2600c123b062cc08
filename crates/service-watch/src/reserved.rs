//! Reserved addresses, which can be neither a VIP nor an endpoint.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Reserved ranges and their names: those that the API server rejects for external IPs and endpoints
/// (`ValidateNonSpecialIP`), and all of "this network" (RFC 1122), multicast and broadcast.
pub const RESERVED: [(IpNet, &str); 9] = [
    v4([0, 0, 0, 0], 8, "unspecified"),
    v4([127, 0, 0, 0], 8, "loopback"),
    v4([169, 254, 0, 0], 16, "link-local"),
    v4([224, 0, 0, 0], 4, "multicast"),
    v4([255; 4], 32, "broadcast"),
    v6(0, 0, 128, "unspecified"),
    v6(0, 1, 128, "loopback"),
    v6(0xfe80, 0, 10, "link-local"),
    v6(0xff00, 0, 8, "multicast"),
];

const fn v4([a, b, c, d]: [u8; 4], length: u8, word: &str) -> (IpNet, &str) {
    (IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length)), word)
}

const fn v6(first: u16, last: u16, length: u8, word: &str) -> (IpNet, &str) {
    (IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, last), length)), word)
}

/// The name of the reserved range that an address is in, if any.
#[cfg(feature = "sources")]
pub(crate) fn reserved(address: std::net::IpAddr) -> Option<&'static str> {
    RESERVED.iter().find_map(|(range, word)| range.contains(&address).then_some(*word))
}

#[cfg(all(test, feature = "sources"))]
mod tests {
    use super::reserved;
    use crate::address::parse_ip;

    #[test]
    fn reserved_addresses_are_recognized() {
        for (text, word) in [
            ("0.0.0.0", Some("unspecified")),
            ("0.1.2.3", Some("unspecified")),
            ("::", Some("unspecified")),
            ("127.0.0.1", Some("loopback")),
            ("127.255.255.254", Some("loopback")),
            ("::1", Some("loopback")),
            ("::ffff:127.0.0.1", Some("loopback")),
            ("169.254.169.254", Some("link-local")),
            ("fe80::1", Some("link-local")),
            ("febf::1", Some("link-local")),
            ("224.0.0.1", Some("multicast")),
            ("239.255.255.255", Some("multicast")),
            ("ff02::1", Some("multicast")),
            ("255.255.255.255", Some("broadcast")),
            ("10.96.0.1", None),
            ("100.64.0.1", None),
            ("169.253.255.255", None),
            ("1.0.0.0", None),
            ("::2", None),
            ("64:ff9b::192.0.2.1", None),
            ("fd00::1", None),
            ("fec0::1", None),
            ("2001:db8::1", None),
        ] {
            assert_eq!(parse_ip(text).and_then(reserved), word, "{text}");
        }
    }
}
