//! Numbers of `linux/ip_vs.h` and the encoding of attributes.

use netlink_packet_core::{DecodeError, NLA_F_NESTED, NLA_HEADER_SIZE, NlasIterator};

/// `IPVS_GENL_NAME`.
pub(crate) const FAMILY_NAME: &str = "IPVS";
/// `IPVS_GENL_VERSION`.
pub(crate) const FAMILY_VERSION: u8 = 1;

/// `enum` of `IPVS_CMD_*`.
pub(crate) mod command {
    pub(crate) const NEW_SERVICE: u8 = 1;
    pub(crate) const SET_SERVICE: u8 = 2;
    pub(crate) const DEL_SERVICE: u8 = 3;
    pub(crate) const GET_SERVICE: u8 = 4;
    pub(crate) const NEW_DEST: u8 = 5;
    pub(crate) const SET_DEST: u8 = 6;
    pub(crate) const DEL_DEST: u8 = 7;
    pub(crate) const GET_DEST: u8 = 8;
    pub(crate) const NEW_DAEMON: u8 = 9;
    pub(crate) const DEL_DAEMON: u8 = 10;
    pub(crate) const GET_DAEMON: u8 = 11;
    pub(crate) const SET_CONFIG: u8 = 12;
    pub(crate) const GET_CONFIG: u8 = 13;
    pub(crate) const SET_INFO: u8 = 14;
    pub(crate) const GET_INFO: u8 = 15;
    pub(crate) const ZERO: u8 = 16;
    pub(crate) const FLUSH: u8 = 17;
}

/// `IPVS_CMD_ATTR_*`, and `IPVS_INFO_ATTR_*`, which stand at the same level.
pub(crate) mod top {
    pub(crate) const SERVICE: u16 = 1;
    pub(crate) const DEST: u16 = 2;
    pub(crate) const DAEMON: u16 = 3;
    pub(crate) const TIMEOUT_TCP: u16 = 4;
    pub(crate) const TIMEOUT_TCP_FIN: u16 = 5;
    pub(crate) const TIMEOUT_UDP: u16 = 6;
    pub(crate) const INFO_VERSION: u16 = 1;
    pub(crate) const INFO_CONN_TAB_SIZE: u16 = 2;
}

/// `IPVS_SVC_ATTR_*`.
pub(crate) mod service {
    pub(crate) const AF: u16 = 1;
    pub(crate) const PROTOCOL: u16 = 2;
    pub(crate) const ADDR: u16 = 3;
    pub(crate) const PORT: u16 = 4;
    pub(crate) const FWMARK: u16 = 5;
    pub(crate) const SCHED_NAME: u16 = 6;
    pub(crate) const FLAGS: u16 = 7;
    pub(crate) const TIMEOUT: u16 = 8;
    pub(crate) const NETMASK: u16 = 9;
    pub(crate) const STATS: u16 = 10;
    pub(crate) const PE_NAME: u16 = 11;
    pub(crate) const STATS64: u16 = 12;
}

/// `IPVS_DEST_ATTR_*`.
pub(crate) mod dest {
    pub(crate) const ADDR: u16 = 1;
    pub(crate) const PORT: u16 = 2;
    pub(crate) const FWD_METHOD: u16 = 3;
    pub(crate) const WEIGHT: u16 = 4;
    pub(crate) const U_THRESH: u16 = 5;
    pub(crate) const L_THRESH: u16 = 6;
    pub(crate) const ACTIVE_CONNS: u16 = 7;
    pub(crate) const INACT_CONNS: u16 = 8;
    pub(crate) const PERSIST_CONNS: u16 = 9;
    pub(crate) const STATS: u16 = 10;
    pub(crate) const ADDR_FAMILY: u16 = 11;
    pub(crate) const STATS64: u16 = 12;
    pub(crate) const TUN_TYPE: u16 = 13;
    pub(crate) const TUN_PORT: u16 = 14;
    pub(crate) const TUN_FLAGS: u16 = 15;
}

/// `IPVS_DAEMON_ATTR_*`.
pub(crate) mod daemon {
    pub(crate) const STATE: u16 = 1;
    pub(crate) const MCAST_IFN: u16 = 2;
    pub(crate) const SYNC_ID: u16 = 3;
    pub(crate) const SYNC_MAXLEN: u16 = 4;
    pub(crate) const MCAST_GROUP: u16 = 5;
    pub(crate) const MCAST_GROUP6: u16 = 6;
    pub(crate) const MCAST_PORT: u16 = 7;
    pub(crate) const MCAST_TTL: u16 = 8;
}

/// Writes attributes into a buffer, or, without one, counts the bytes: one description of a message serves both.
pub(crate) struct Encoder<'a> {
    buffer: Option<&'a mut [u8]>,
    position: usize,
}

impl<'a> Encoder<'a> {
    pub(crate) fn counting() -> Self {
        Self { buffer: None, position: 0 }
    }

    pub(crate) fn writing(buffer: &'a mut [u8]) -> Self {
        Self { buffer: Some(buffer), position: 0 }
    }

    pub(crate) fn position(&self) -> usize {
        self.position
    }

    /// A value of a length that is known: most are, and cost a few moves then.
    #[inline]
    pub(crate) fn fixed<const N: usize>(&mut self, kind: u16, value: [u8; N]) {
        let end = self.position + NLA_HEADER_SIZE + N.next_multiple_of(4);
        if let Some(out) = self.buffer.as_deref_mut().and_then(|buffer| buffer.get_mut(self.position..end)) {
            write_header(out, NLA_HEADER_SIZE + N, kind);
            out[NLA_HEADER_SIZE..NLA_HEADER_SIZE + N].copy_from_slice(&value);
            out[NLA_HEADER_SIZE + N..].fill(0);
        }
        self.position = end;
    }

    pub(crate) fn u8(&mut self, kind: u16, value: u8) {
        self.fixed(kind, [value]);
    }

    pub(crate) fn u16(&mut self, kind: u16, value: u16) {
        self.fixed(kind, value.to_ne_bytes());
    }

    pub(crate) fn u32(&mut self, kind: u16, value: u32) {
        self.fixed(kind, value.to_ne_bytes());
    }

    pub(crate) fn u16_be(&mut self, kind: u16, value: u16) {
        self.fixed(kind, value.to_be_bytes());
    }

    /// With a NUL at its end.
    pub(crate) fn string(&mut self, kind: u16, value: &str) {
        let length = NLA_HEADER_SIZE + value.len() + 1;
        let end = self.position + length.next_multiple_of(4);
        if let Some(out) = self.buffer.as_deref_mut().and_then(|buffer| buffer.get_mut(self.position..end)) {
            write_header(out, length, kind);
            out[NLA_HEADER_SIZE..length - 1].copy_from_slice(value.as_bytes());
            out[length - 1..].fill(0);
        }
        self.position = end;
    }

    pub(crate) fn nested(&mut self, kind: u16, content: impl FnOnce(&mut Self)) {
        let header = self.position;
        self.position += NLA_HEADER_SIZE;
        content(self);
        let length = self.position - header;
        if let Some(out) = self.buffer.as_deref_mut().and_then(|buffer| buffer.get_mut(header..)) {
            write_header(out, length, kind | NLA_F_NESTED);
        }
    }
}

/// `struct nlattr`; `length` is that of header and value, at most 104 in this family.
#[inline]
fn write_header(out: &mut [u8], length: usize, kind: u16) {
    let [a, b] = u16::try_from(length).unwrap_or(u16::MAX).to_ne_bytes();
    let [c, d] = kind.to_ne_bytes();
    out[..NLA_HEADER_SIZE].copy_from_slice(&[a, b, c, d]);
}

/// Calls `each` for every attribute in `buffer`, in order.
pub(crate) fn each_attribute<'a>(
    buffer: &'a [u8],
    mut each: impl FnMut(u16, &'a [u8]) -> Result<(), DecodeError>,
) -> Result<(), DecodeError> {
    for attribute in NlasIterator::new(buffer) {
        let attribute = attribute?;
        let (kind, length) = (attribute.kind(), attribute.value_length());
        // What value() would be, but for as long as the buffer lives.
        let value = attribute.into_inner().get(NLA_HEADER_SIZE..NLA_HEADER_SIZE + length);
        each(kind, value.unwrap_or_default())?;
    }
    Ok(())
}
