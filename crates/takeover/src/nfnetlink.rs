//! Messages of nfnetlink, which `nf_tables` and ipset share: four bytes of header, then attributes
//! (`linux/netfilter/nfnetlink.h`).

use std::io;

use netlink_batch::protocols::NETLINK_NETFILTER;
use netlink_batch::{Error, Socket};
use netlink_packet_core::{
    DecodeError, NLA_TYPE_MASK, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable, parse_string,
};

use crate::errno::{EINVAL, ENOENT, EOPNOTSUPP, EPROTONOSUPPORT};

const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;

/// `NFPROTO_UNSPEC`.
pub(crate) const ANY_FAMILY: u8 = 0;

/// Opens a socket, unless the kernel has no nfnetlink.
pub(crate) fn open() -> Result<Option<Socket>, Error> {
    match Socket::open(NETLINK_NETFILTER) {
        Err(Error::Open { error, .. }) if is_unknown_protocol(&error) => Ok(None),
        socket => socket.map(Some),
    }
}

fn is_unknown_protocol(error: &io::Error) -> bool {
    error.raw_os_error() == Some(EPROTONOSUPPORT)
}

/// Whether the kernel lacks a subsystem and could not load it.
pub(crate) fn is_missing(error: &Error) -> bool {
    error.refusal().is_some_and(|refusal| matches!(refusal.errno, ENOENT | EINVAL | EOPNOTSUPP))
}

/// A message to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    kind: u16,
    bytes: Vec<u8>,
}

impl Message {
    pub(crate) fn new(subsystem: u8, command: u8, family: u8) -> Self {
        Self { kind: u16::from(subsystem) << 8 | u16::from(command), bytes: vec![family, 0, 0, 0] }
    }

    /// The message that begins a transaction of a subsystem, and the one that ends it.
    pub(crate) fn batch_begin_and_end(subsystem: u8) -> (Self, Self) {
        let message = |kind| Self { kind, bytes: vec![ANY_FAMILY, 0, 0, subsystem] };
        (message(NFNL_MSG_BATCH_BEGIN), message(NFNL_MSG_BATCH_END))
    }

    /// Appends an attribute.
    pub(crate) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        // No value here is that long; the kernel refuses an attribute with a wrong length.
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// Appends a text, with the zero that ends it.
    pub(crate) fn with_text(self, kind: u16, text: &str) -> Self {
        self.with(kind, &[text.as_bytes(), &[0]].concat())
    }
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.bytes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.bytes);
    }
}

/// The attributes of a message from the kernel.
#[derive(Debug)]
pub(crate) struct Attributes(Vec<u8>);

impl NetlinkDeserializable for Attributes {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        after_header(payload).map(|attributes| Self(attributes.to_vec()))
    }
}

impl Attributes {
    pub(crate) fn text(&self, kind: u16) -> Option<String> {
        text(&self.0, kind)
    }

    pub(crate) fn value(&self, kind: u16) -> Option<&[u8]> {
        attribute(&self.0, kind)
    }
}

/// What follows the header of nfnetlink.
pub(crate) fn after_header(payload: &[u8]) -> Result<&[u8], DecodeError> {
    payload.get(4..).ok_or_else(|| "a message of nfnetlink is short".into())
}

/// The value of the first attribute of a kind.
pub(crate) fn attribute(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    iter_attributes(attributes).find(|(it, _)| *it == kind).map(|(_, value)| value)
}

/// The first attribute of a kind as a text.
pub(crate) fn text(attributes: &[u8], kind: u16) -> Option<String> {
    parse_string(attribute(attributes, kind)?).ok()
}

/// All attributes, up to the first that is malformed. (The library's iterator keeps what it yields no longer than
/// itself.)
pub(crate) fn iter_attributes(attributes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = attributes;
    std::iter::from_fn(move || {
        let [a, b, c, d, ..] = *rest else { return None };
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([c, d]) & NLA_TYPE_MASK, value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_its_header_and_padded_attributes() {
        let message = Message::new(6, 3, 2).with(1, &[6]).with_text(2, "KUBE");
        assert_eq!(message.message_type(), 0x0603);
        let mut bytes = vec![0xff; message.buffer_len()];
        message.serialize(&mut bytes);
        let mut expected = vec![2, 0, 0, 0];
        expected.extend(5_u16.to_ne_bytes());
        expected.extend(1_u16.to_ne_bytes());
        expected.extend([6, 0, 0, 0]);
        expected.extend(9_u16.to_ne_bytes());
        expected.extend(2_u16.to_ne_bytes());
        expected.extend(b"KUBE\0\0\0\0");
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_transaction_says_whose_it_is_in_network_byte_order() {
        let (begin, end) = Message::batch_begin_and_end(10);
        assert_eq!((begin.message_type(), end.message_type()), (0x10, 0x11));
        assert_eq!(begin.bytes, [0, 0, 0, 10]);
    }

    #[test]
    fn attributes_are_found_by_kind_whatever_their_flags() {
        let nested = Message::new(0, 0, 0).with(1, &[1, 2, 3]).with(0x8000 | 4, &[9; 4]).with_text(2, "nat");
        let bytes = &nested.bytes[4..];
        assert_eq!(attribute(bytes, 4), Some(&[9; 4][..]));
        assert_eq!(text(bytes, 2).as_deref(), Some("nat"));
        assert_eq!(attribute(bytes, 5), None);
    }

    #[test]
    fn malformed_attributes_end_the_reading() {
        for bytes in [&[][..], &[1, 2, 3], &[0; 4], &[3, 0, 1, 0], &[200, 0, 1, 0, 7], &[0xff; 8]] {
            assert_eq!(iter_attributes(bytes).count(), 0, "{bytes:?}");
        }
        assert!(after_header(&[0; 3]).is_err());
    }
}
