//! Watches for changes that other programs make to this program's tables of the packet filter, such as `nft flush ruleset`.
//!
//! Needed only where tables cannot be owned (before Linux 6.9): while anybody listens, the kernel also builds a notification of each
//! of our own changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use netlink_batch::protocols::NETLINK_NETFILTER;
use netlink_batch::{Error, Received, Subscription};
use netlink_packet_core::{DecodeError, NetlinkDeserializable, NetlinkHeader, NlasIterator, parse_string};

use crate::filter::TABLE;

// linux/netfilter/nfnetlink.h and nf_tables.h
const NFNLGRP_NFTABLES: u32 = 7;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWGEN: u16 = 15;
const NFGENMSG_BYTES: usize = 4;
/// `NFTA_TABLE_NAME`, `NFTA_CHAIN_TABLE`, `NFTA_RULE_TABLE`, `NFTA_SET_TABLE` and `NFTA_SET_ELEM_LIST_TABLE`.
const NFTA_TABLE: u16 = 1;

/// A notification of `nf_tables`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Notification {
    /// Whether it is about a table of this program.
    is_ours: bool,
    /// The port id of the socket that made the change.
    requester: u32,
}

impl NetlinkDeserializable for Notification {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let (subsystem, message) = (header.message_type >> 8, header.message_type & 0xff);
        let is_about_a_table = subsystem == NFNL_SUBSYS_NFTABLES && message < NFT_MSG_NEWGEN;
        let table = NlasIterator::new(payload.get(NFGENMSG_BYTES..).unwrap_or_default())
            .flatten()
            .take_while(|_| is_about_a_table)
            .find(|attribute| attribute.kind() == NFTA_TABLE)
            .and_then(|attribute| parse_string(attribute.value()).ok());
        Ok(Self { is_ours: table.as_deref() == Some(TABLE), requester: header.port_number })
    }
}

/// A watch of the tables of the packet filter.
#[derive(Debug)]
pub struct FilterWatch {
    subscription: Subscription,
    /// The port id of the socket through which this program changes its tables.
    own_port: Arc<AtomicU32>,
}

impl FilterWatch {
    pub(crate) fn open(own_port: Arc<AtomicU32>) -> Result<Self, Error> {
        Ok(Self { subscription: Subscription::open(NETLINK_NETFILTER, &[NFNLGRP_NFTABLES])?, own_port })
    }

    /// Waits for notifications. Returns whether another program changed a table of this one, or may have: notifications were lost.
    pub fn wait(&mut self) -> Result<bool, Error> {
        let own_port = self.own_port.load(Ordering::Relaxed);
        let mut is_changed = false;
        let received = self.subscription.receive(|notification: Notification| {
            is_changed |= notification.is_ours && notification.requester != own_port;
        })?;
        Ok(is_changed || received == Received::Overrun)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A notification about a table: `struct nfgenmsg`, then its name.
    fn decode(message: u16, table: &str) -> Notification {
        let mut header = NetlinkHeader::default();
        header.message_type = NFNL_SUBSYS_NFTABLES << 8 | message;
        header.port_number = 42;
        let length = u16::try_from(4 + table.len() + 1).unwrap();
        let mut payload = vec![2, 0, 0, 0];
        payload.extend(length.to_ne_bytes());
        payload.extend(NFTA_TABLE.to_ne_bytes());
        payload.extend(table.as_bytes());
        payload.resize(payload.len().next_multiple_of(4) + 4, 0);
        Notification::deserialize(&header, &payload).unwrap()
    }

    #[test]
    fn only_notifications_about_our_tables_count() {
        const NFT_MSG_DELTABLE: u16 = 2;
        let expected = |is_ours| Notification { is_ours, requester: 42 };
        assert_eq!(decode(NFT_MSG_DELTABLE, TABLE), expected(true));
        assert_eq!(decode(NFT_MSG_DELTABLE, "filter"), expected(false));
        assert_eq!(decode(NFT_MSG_NEWGEN, TABLE), expected(false));
        let header = NetlinkHeader::default();
        assert!(!Notification::deserialize(&header, &[]).unwrap().is_ours);
    }
}
