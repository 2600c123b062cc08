//! Errors of a netlink socket, and the kernel's refusal of a request.

use std::fmt;
use std::io;

use netlink_packet_core::{DecodeError, NLA_HEADER_SIZE, NlasIterator, parse_string, parse_u16, parse_u32};

/// TLVs of an extended ACK (`enum nlmsgerr_attrs` in `linux/netlink.h`).
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLMSGERR_ATTR_OFFS: u16 = 2;
const NLMSGERR_ATTR_MISS_TYPE: u16 = 5;

/// The kernel's error reply to one request (`NLMSG_ERROR`): an errno and, where the kernel gives it, an extended ACK.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refusal {
    /// The errno, positive, as in `errno.h`.
    pub errno: i32,
    /// The kernel's message (`NLMSGERR_ATTR_MSG`).
    pub message: Option<String>,
    /// The type of the attribute that caused the error (the one at `NLMSGERR_ATTR_OFFS`), without its flag bits.
    pub attribute: Option<u16>,
    /// The type of a required attribute that is missing (`NLMSGERR_ATTR_MISS_TYPE`).
    pub missing: Option<u16>,
}

impl Refusal {
    /// A refusal without an extended ACK.
    pub const fn new(errno: i32) -> Self {
        Self { errno, message: None, attribute: None, missing: None }
    }

    /// Reads the extended ACK in `tlvs`. `request` is the message it answers: the offset in the ACK points into it. A
    /// malformed extended ACK loses its details but keeps the errno.
    pub(crate) fn with_extended_ack(mut self, tlvs: &[u8], request: Option<&[u8]>) -> Self {
        for tlv in NlasIterator::new(tlvs).map_while(Result::ok) {
            match tlv.kind() {
                NLMSGERR_ATTR_MSG => self.message = parse_string(tlv.value()).ok(),
                NLMSGERR_ATTR_OFFS => {
                    let offset = parse_u32(tlv.value()).ok().and_then(|offset| usize::try_from(offset).ok());
                    self.attribute = offset.zip(request).and_then(|(offset, request)| attribute_at(request, offset));
                }
                NLMSGERR_ATTR_MISS_TYPE => {
                    self.missing = parse_u32(tlv.value()).ok().and_then(|kind| u16::try_from(kind).ok());
                }
                _ => {}
            }
        }
        self
    }
}

fn attribute_at(request: &[u8], offset: usize) -> Option<u16> {
    let header = request.get(offset..offset.checked_add(NLA_HEADER_SIZE)?)?;
    Some(parse_u16(&header[2..4]).ok()? & netlink_packet_core::NLA_TYPE_MASK)
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", io::Error::from_raw_os_error(self.errno))?;
        if let Some(message) = &self.message {
            write!(f, ": {message}")?;
        }
        if let Some(attribute) = self.attribute {
            write!(f, " (attribute {attribute})")?;
        }
        if let Some(missing) = self.missing {
            write!(f, " (attribute {missing} is missing)")?;
        }
        Ok(())
    }
}

impl std::error::Error for Refusal {}

/// Why a call on a [`Socket`](crate::Socket) failed. The text includes the cause, so `source` returns none: it would be
/// printed twice.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The socket could not be opened.
    #[error("cannot open a netlink socket of protocol {protocol}: {error}")]
    Open {
        /// The protocol, as in `NETLINK_ROUTE`.
        protocol: isize,
        /// The system's reason.
        error: io::Error,
    },
    /// `send` failed. None of the requests in the datagram was handled.
    #[error("cannot send to the kernel: {0}")]
    Send(io::Error),
    /// `recv` failed; `ENOBUFS` means that replies were lost. Requests may have been handled.
    #[error("cannot receive from the kernel: {0}")]
    Receive(io::Error),
    /// A reply could not be decoded.
    #[error("cannot decode a reply of the kernel: {0}")]
    Decode(DecodeError),
    /// Changes interrupted each attempt at a dump.
    #[error("the dumped table changed during each of {attempts} attempts to read it")]
    Interrupted {
        /// The number of attempts.
        attempts: u32,
    },
    /// The kernel refused the request.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl Error {
    /// The kernel's refusal, if that is the cause.
    #[must_use]
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }
}

impl From<DecodeError> for Error {
    fn from(error: DecodeError) -> Self {
        Self::Decode(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The header of an attribute.
    fn head(length: u16, kind: u16) -> Vec<u8> {
        [length.to_ne_bytes(), kind.to_ne_bytes()].concat()
    }

    /// A request of a 16-byte header and two attributes, of types 1 and 7, the second nested.
    fn request() -> Vec<u8> {
        [vec![0; 16], head(8, 1), vec![9; 4], head(8, 0x8007), vec![9; 4]].concat()
    }

    #[test]
    fn an_extended_ack_names_the_attribute_at_its_offset() {
        let mut tlvs = head(11, 1);
        tlvs.extend_from_slice(b"no way\0\0");
        tlvs.extend(head(8, 2));
        tlvs.extend(24_u32.to_ne_bytes());
        let refusal = Refusal::new(libc::EINVAL).with_extended_ack(&tlvs, Some(&request()));
        assert_eq!(refusal.attribute, Some(7));
        assert_eq!(refusal.to_string(), "Invalid argument (os error 22): no way (attribute 7)");
    }

    #[test]
    fn an_offset_outside_the_request_names_no_attribute() {
        for offset in [30_u32, 32, u32::MAX] {
            let mut tlvs = head(8, 2);
            tlvs.extend_from_slice(&offset.to_ne_bytes());
            assert_eq!(Refusal::new(1).with_extended_ack(&tlvs, Some(&request())).attribute, None);
        }
    }

    #[test]
    fn a_malformed_extended_ack_keeps_the_errno() {
        let refusal = Refusal::new(libc::EPERM).with_extended_ack(&[head(200, 1), vec![1]].concat(), None);
        assert_eq!(refusal, Refusal::new(libc::EPERM));
    }
}
