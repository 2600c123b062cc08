//! IP addresses as Kubernetes reads them.

use std::net::IpAddr;

/// Reads an address as kube-proxy does (Go's old parser): leading zeros are decimal (`010.0.0.1` is `10.0.0.1`), and an
/// IPv4-mapped IPv6 address is the IPv4 address.
pub(crate) fn parse_ip(text: &str) -> Option<IpAddr> {
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

#[cfg(test)]
mod tests {
    use super::parse_ip;

    #[test]
    fn addresses_are_read_as_the_old_go_parser_does() {
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
