//! What kube-proxy left on a node: finds it and takes it away.
//!
//! That is its chains in the tables of iptables-nft and iptables-legacy with the rules that lead to them, the tables
//! `kube-proxy` of its nftables mode, and its ipsets. What is its own shows by name: see `names.rs`. What kubelet and
//! anybody else made stays as it is, counters included.
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
//! All but iptables-legacy is done over netlink, in the network namespace of the calling thread, and takes
//! `CAP_NET_ADMIN`. Virtual servers and the device `kube-ipvs0` are not this crate's business.

#![forbid(unsafe_code)]

#[cfg(fuzzing)]
pub mod fuzzing;
mod ipset;
mod legacy;
mod names;
mod nf_tables;
mod nfnetlink;
mod report;
mod rules;

pub use report::{Backend, Error, Family, Iptables, Left, Object, Report};

/// Says what [`remove`] would remove and what it would leave, and changes nothing.
pub fn find() -> Report {
    clear(Mode::Find)
}

/// Removes what kube-proxy left: rules first, then the sets they use. What fails holds up nothing else, so it may be run
/// again; where there is nothing it does nothing, and the report is empty.
pub fn remove() -> Report {
    clear(Mode::Remove)
}

/// Whether to look or to act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Find,
    Remove,
}

fn clear(mode: Mode) -> Report {
    let mut report = Report::default();
    nf_tables::clear(mode, &mut report);
    legacy::clear(mode, &mut report);
    ipset::clear(mode, &mut report);
    report
}
