//! `kube-ipvs takeover`: removes what kube-proxy left, after the first sync has put our packet filter in place.
//!
//! kube-proxy's virtual servers and addresses are like ours, and the first sync adopts them. Its iptables chains,
//! ipsets and `nf_tables` tables would stay in effect beside our tables, even for Services that are deleted.

use tracing::{error, info, warn};

/// Removes what kube-proxy left, and returns how many objects could not be removed.
pub(crate) fn remove_leftovers() -> usize {
    let report = ::takeover::remove();
    for object in &report.objects {
        info!("done: delete {object}");
    }
    for kept in &report.kept {
        info!("left: {kept}");
    }
    // The tools of iptables-legacy, for example, which the agent's image does not have.
    for unseen in &report.unchecked {
        warn!("not checked: {unseen}");
    }
    for problem in &report.problems {
        error!("{problem}");
    }
    let (done, remaining) = (report.objects.len(), report.problems.len());
    if remaining > 0 {
        error!(
            done,
            remaining,
            "not everything that kube-proxy left could be removed: fix the errors above, then run `kube-ipvs takeover` again"
        );
    } else if done == 0 {
        info!("kube-proxy left nothing");
    } else {
        info!(done, "removed everything that kube-proxy left");
    }
    remaining
}
