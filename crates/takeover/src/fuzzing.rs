//! What a fuzz target sees of the inside: messages of `nf_tables` and ipset, and what `iptables-save` says.

use std::collections::BTreeSet;

use netlink_packet_core::{NetlinkDeserializable as _, NetlinkHeader};

use crate::nfnetlink::Attributes;
use crate::report::{Backend, Family, Iptables, Report};
use crate::{legacy, names, nf_tables};

/// Reads the payload of a message of nfnetlink.
pub fn read(payload: &[u8]) {
    let header = NetlinkHeader::default();
    let _ = nf_tables::Rule::deserialize(&header, payload);
    if let Ok(attributes) = Attributes::deserialize(&header, payload) {
        for kind in 0..8 {
            let _ = attributes.text(kind).is_some_and(|name| names::is_set(&name) || names::is_chain(&name));
        }
    }
}

/// Reads the output of `iptables-save`. Panics where a line that is to be deleted was not in it.
pub fn read_saved(saved: &str) {
    for table in legacy::parse(Iptables { backend: Backend::Legacy, family: Family::Ip }, saved) {
        let plan = table.plan(&BTreeSet::new());
        for jump in &plan.jumps {
            assert!(saved.lines().any(|line| line == jump.rule), "{:?} is in no line", jump.rule);
        }
        let _ = legacy::restore_input(&plan, &table.name);
        plan.report(&mut Report::default());
    }
}
