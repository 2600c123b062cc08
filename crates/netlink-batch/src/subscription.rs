//! Notifications of the kernel's multicast groups.

use netlink_packet_core::{NLMSG_ERROR, NLMSG_NOOP, NLMSG_OVERRUN, NetlinkDeserializable};
use netlink_sys::{Socket as RawSocket, SocketAddr};

use crate::error::Error;
use crate::exchange::{RECEIVE_BYTES, decode, next_message};
use crate::socket::receive;

/// The result of waiting for notifications.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// One or more notifications.
    Notifications,
    /// The receive buffer overran (`ENOBUFS`): notifications were lost, and the queued ones were discarded. The state
    /// they were about must be read again. Later notifications are not affected.
    Overrun,
}

/// A socket that receives the notifications of some multicast groups of a protocol.
#[derive(Debug)]
pub struct Subscription {
    raw: RawSocket,
    incoming: Vec<u8>,
}

impl Subscription {
    /// Joins the groups, by number as in `RTNLGRP_LINK`, in the network namespace of the calling thread. Every change
    /// after this call is notified.
    pub fn open(protocol: isize, groups: &[u32]) -> Result<Self, Error> {
        let open = || {
            let mut raw = RawSocket::new(protocol)?;
            raw.bind_auto()?;
            raw.connect(&SocketAddr::new(0, 0))?;
            for group in groups {
                raw.add_membership(*group)?;
            }
            Ok(raw)
        };
        let raw = open().map_err(|error| Error::Open { protocol, error })?;
        Ok(Self { raw, incoming: vec![0; RECEIVE_BYTES] })
    }

    /// Waits for notifications and passes each to `each`.
    pub fn receive<R: NetlinkDeserializable>(&mut self, mut each: impl FnMut(R)) -> Result<Received, Error> {
        let mut rest = match receive(&self.raw, &mut self.incoming) {
            Ok(datagram) => datagram,
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(Received::Overrun),
            Err(error) => return Err(Error::Receive(error)),
        };
        while let Some((header, payload)) = next_message(&mut rest)? {
            match header.message_type {
                NLMSG_NOOP | NLMSG_ERROR => {}
                NLMSG_OVERRUN => return Ok(Received::Overrun),
                _ => each(decode(&header, payload)?),
            }
        }
        Ok(Received::Notifications)
    }
}
