//! `kube-ipvs takeover`: takes away what kube-proxy left, once what takes its place is there.
//!
//! Virtual servers and addresses need no taking over: kube-proxy's are like ours, and the first sync finds them in place.
//! What is left are its chains of iptables, its ipsets and its tables of `nf_tables`, which go on doing what they did, beside
//! ours, and for Services that are long gone.

use tracing::{error, info, warn};

/// Removes what kube-proxy left, as far as it can. Returns how much of it could not be removed.
pub(crate) fn remove_leftovers() -> usize {
    let report = ::takeover::remove();
    for object in &report.objects {
        info!("done: delete {object}");
    }
    for kept in &report.kept {
        info!("left: {kept}");
    }
    // An image that has nothing but the agent has no tools either.
    for unchecked in &report.unchecked {
        warn!("not looked at: {unchecked}");
    }
    for problem in &report.problems {
        error!("{problem}");
    }
    let (done, remaining) = (report.objects.len(), report.problems.len());
    if remaining > 0 {
        error!(
            done,
            remaining, "not all that kube-proxy left is gone: run `kube-ipvs takeover` again once that is mended"
        );
    } else if done == 0 {
        info!("kube-proxy left nothing");
    } else {
        info!(done, "all that kube-proxy left is gone");
    }
    remaining
}
