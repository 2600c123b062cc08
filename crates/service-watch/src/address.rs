//! Parses IP addresses and CIDR ranges as Kubernetes does.

use std::net::IpAddr;

use ipnet::IpNet;

/// Parses an address as kube-proxy does (`netutils.ParseIPSloppy`, Go's parser before 1.17): leading zeros are decimal
/// (`010.0.0.1` is `10.0.0.1`), and an IPv4-mapped IPv6 address is the IPv4 address.
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(address.to_canonical());
    }
    let mut plain = String::with_capacity(text.len());
    let mut digits = text.chars().peekable();
    let mut in_number = false;
    while let Some(c) = digits.next() {
        let more = digits.peek().is_some_and(char::is_ascii_hexdigit);
        if c == '0' && !in_number && more {
            continue;
        }
        in_number = c.is_ascii_hexdigit();
        plain.push(c);
    }
    plain.parse::<IpAddr>().ok().map(|address| address.to_canonical())
}

/// Parses a range such as `10.0.0.0/8`, its address as [`parse_ip`] does. Bits beyond the prefix are cleared.
///
/// A range of IPv4-mapped addresses becomes the IPv4 range; one that includes other addresses is invalid.
pub fn parse_range(text: &str) -> Option<IpNet> {
    let (address_text, length) = text.split_once('/')?;
    if length.is_empty() || !length.bytes().all(|c| c.is_ascii_digit()) {
        return None;
    }
    let address = parse_ip(address_text)?;
    let length: u8 = length.parse().ok()?;
    let is_mapped = address.is_ipv4() && address_text.contains(':');
    let length = if is_mapped { length.checked_sub(96)? } else { length };
    IpNet::new(address, length).ok().map(|range| range.trunc())
}

#[cfg(test)]
mod tests {
    use super::{parse_ip, parse_range};

    #[test]
    fn ranges_may_have_leading_zeros_and_bits_beyond_the_prefix() {
        for (text, read) in [
            ("10.0.0.0/8", Some("10.0.0.0/8")),
            ("010.001.002.003/08", Some("10.0.0.0/8")),
            ("192.0.2.7/32", Some("192.0.2.7/32")),
            ("0.0.0.0/0", Some("0.0.0.0/0")),
            ("FD00::7/64", Some("fd00::/64")),
            ("::/0", Some("::/0")),
            ("::ffff:10.1.2.3/104", Some("10.0.0.0/8")),
            ("::ffff:10.1.2.3/96", Some("0.0.0.0/0")),
            ("::ffff:10.1.2.3/95", None),
            ("::ffff:10.1.2.3/8", None),
            ("::ffff:10.1.2.3/129", None),
            ("10.0.0.0", None),
            ("10.0.0.0/", None),
            ("10.0.0.0/33", None),
            ("10.0.0.0/264", None),
            ("10.0.0.0/+8", None),
            ("10.0.0.0/-1", None),
            ("10.0.0.0/8/8", None),
            ("10.0.0.0/255.0.0.0", None),
            ("10.0.0/8", None),
            ("fd00::/129", None),
            ("/8", None),
            ("", None),
        ] {
            assert_eq!(parse_range(text).map(|range| range.to_string()).as_deref(), read, "{text:?}");
        }
    }

    #[test]
    fn addresses_are_parsed_like_go_before_1_17() {
        for (text, read) in [
            ("10.96.0.10", Some("10.96.0.10")),
            ("010.096.000.010", Some("10.96.0.10")),
            ("0.0.0.0", Some("0.0.0.0")),
            ("00.0.0.00", Some("0.0.0.0")),
            ("::ffff:10.0.0.1", Some("10.0.0.1")),
            ("::ffff:010.0.0.1", Some("10.0.0.1")),
            ("FD00:0010::1", Some("fd00:10::1")),
            ("fd00:00010::1", Some("fd00:10::1")),
            ("::", Some("::")),
            ("::0", Some("::")),
            ("", None),
            ("None", None),
            ("10.0.0", None),
            ("10.0.0.256", None),
            ("10.0.0.1/32", None),
            ("0x10.0.0.1", None),
            ("10.0.0.a", None),
            ("10.0.0.1 ", None),
            ("fe80::1%eth0", None),
            ("backend.example", None),
        ] {
            assert_eq!(parse_ip(text).map(|ip| ip.to_string()).as_deref(), read, "{text:?}");
        }
    }
}
