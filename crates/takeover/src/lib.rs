//! Finds and removes what kube-proxy left on a node.
//!
//! That is its chains in the tables of iptables-nft and iptables-legacy with the rules that jump to them, the tables
//! `kube-proxy` of its nftables mode, and its ipsets, all identified by name (`kube_proxy_names.rs`). Objects of
//! kubelet and of other software are not changed, counters included.
//!
//! ```no_run
//! let report = takeover::remove();
//! for object in &report.objects {
//!     println!("removed: {object}");
//! }
//! for problem in &report.problems {
//!     eprintln!("{problem}");
//! }
//! ```
//!
//! Everything except iptables-legacy uses netlink, in the network namespace of the calling thread, and requires
//! `CAP_NET_ADMIN`. This crate does not handle virtual servers or the device `kube-ipvs0`.

#![forbid(unsafe_code)]

mod errno;
#[cfg(fuzzing)]
pub mod fuzzing;
mod ipset;
mod kube_proxy_names;
mod legacy;
mod nf_tables;
mod nfnetlink;
mod report;
mod rules;

pub use report::{Backend, Error, Family, Iptables, Kept, Object, Report};

/// Reports what [`remove`] would remove and keep, without changing anything.
pub fn find() -> Report {
    clean_up(Action::Find)
}

/// Removes what kube-proxy left: rules first, then the sets they use. An error does not stop the rest, and it may be
/// run again. If there is nothing to remove, the report is empty.
pub fn remove() -> Report {
    clean_up(Action::Remove)
}

/// What to do with the objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Find,
    Remove,
}

fn clean_up(action: Action) -> Report {
    let mut report = Report::default();
    nf_tables::clean_up(action, &mut report);
    legacy::clean_up(action, &mut report);
    ipset::clean_up(action, &mut report);
    report
}
