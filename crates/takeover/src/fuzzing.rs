//! Entry points for fuzz targets: messages of `nf_tables` and ipset, and the output of `iptables-save`.

use std::collections::BTreeSet;

use netlink_packet_core::{NetlinkDeserializable as _, NetlinkHeader};

use crate::nfnetlink::Attributes;
use crate::report::{Backend, Family, Iptables, Report};
use crate::{kube_proxy_names, legacy, nf_tables};

/// Parses the payload of an nfnetlink message.
pub fn read_payload(payload: &[u8]) {
    let header = NetlinkHeader::default();
    let _ = nf_tables::Rule::deserialize(&header, payload);
    if let Ok(attributes) = Attributes::deserialize(&header, payload) {
        for kind in 0..8 {
            let _ = attributes
                .text(kind)
                .is_some_and(|name| kube_proxy_names::is_set(&name) || kube_proxy_names::is_chain(&name));
        }
    }
}

/// Parses the output of `iptables-save`. Panics if a rule to delete is not a line of it.
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
