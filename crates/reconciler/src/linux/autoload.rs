//! Makes kernels before Linux 5.11 load `ip_vs`. They do not when somebody asks for the generic netlink family of IPVS, and
//! the agent runs no `modprobe`.
//!
//! The `ipvs` match of iptables depends on `ip_vs`, and `nft_compat` loads a match when it is asked for its revision.

use netlink_batch::protocols::NETLINK_NETFILTER;
use netlink_batch::{Error, Request, Socket};
use netlink_packet_core::{DecodeError, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};

// linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables_compat.h
const NFNL_SUBSYS_NFT_COMPAT: u16 = 11;
const NFNL_MSG_COMPAT_GET: u16 = 0;
const NFTA_COMPAT_NAME: u16 = 1;
const NFTA_COMPAT_REV: u16 = 2;
const NFTA_COMPAT_TYPE: u16 = 3;

/// Asks for the `ipvs` match. An error is that of a kernel that has none of this, which then has no IPVS either, or wants
/// it loaded by hand.
pub(super) fn request_ipvs() -> Result<(), Error> {
    let mut socket = Socket::open(NETLINK_NETFILTER)?;
    socket.request(&Request::from(GetRevision(message())), |_: Ignored| {})
}

/// The address family (IPv4), version and resource of nfnetlink, the name of the match, revision 0, and that it is no target.
fn message() -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0];
    for (kind, value) in [(NFTA_COMPAT_NAME, b"ipvs\0\0\0\0"), (NFTA_COMPAT_REV, &[0; 8]), (NFTA_COMPAT_TYPE, &[0; 8])]
    {
        // The name has a NUL at its end, the numbers 32 bits.
        let length: u16 = if kind == NFTA_COMPAT_NAME { 5 } else { 4 };
        bytes.extend((4 + length).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(&value[..usize::from(length).next_multiple_of(4)]);
    }
    bytes
}

struct GetRevision(Vec<u8>);

impl NetlinkSerializable for GetRevision {
    fn message_type(&self) -> u16 {
        NFNL_SUBSYS_NFT_COMPAT << 8 | NFNL_MSG_COMPAT_GET
    }

    fn buffer_len(&self) -> usize {
        self.0.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.0);
    }
}

/// The answer, of which only its coming matters.
struct Ignored;

impl NetlinkDeserializable for Ignored {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, _: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_what_iptables_sends_for_its_ipvs_match() {
        let attribute =
            |length: u16, kind: u16, value: &[u8]| [&length.to_ne_bytes(), &kind.to_ne_bytes(), value].concat();
        let name = attribute(9, 1, b"ipvs\0\0\0\0");
        let expected = [vec![2, 0, 0, 0], name, attribute(8, 2, &[0; 4]), attribute(8, 3, &[0; 4])].concat();
        assert_eq!(message(), expected);
    }
}
