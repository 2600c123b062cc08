//! What a fuzz target sees of the inside: the payload of a message from the kernel, read as whatever it may be.

use netlink_packet_core::{NetlinkDeserializable as _, NetlinkHeader};

use crate::linux::{self, conntrack, filter, interface_watch, routes};

/// Reads a payload with every decoder of this crate. `kind` is the message type of its header.
pub fn read(kind: u16, payload: &[u8]) {
    let mut header = NetlinkHeader::default();
    header.message_type = kind;
    filter::read::fuzz(&header, payload);
    conntrack::fuzz(&header, payload);
    let _ = routes::Route::deserialize(&header, payload);
    let _ = interface_watch::Notification::deserialize(&header, payload);
    linux::fuzz(&header, payload);
}
