//! `kube-ipvs takeover`: takes away what kube-proxy left, once what takes its place is there.
//!
//! Virtual servers and addresses need no taking over: kube-proxy's are like ours, and the first sync finds them in place.
//! What is left are its chains of iptables, its ipsets and its tables of `nf_tables`, which go on doing what they did, beside
//! ours, and for Services that are long gone.

use anyhow::{Result, bail};
use tracing::{error, info, warn};

use crate::agent::End;

/// Removes what kube-proxy left. What cannot be removed keeps nothing else from going, and is an error.
pub(crate) fn remove_leftovers() -> Result<End> {
    let report = ::takeover::remove();
    for object in &report.objects {
        info!("done: delete {object}");
    }
    for left in &report.left {
        info!("left: {left}");
    }
    // An image that has nothing but the agent has no tools either. That is no reason to keep a node without an agent.
    for unseen in &report.unseen {
        warn!("not looked at: {unseen}");
    }
    for problem in &report.problems {
        error!("{problem}");
    }
    if !report.problems.is_empty() {
        bail!(
            "{} things that kube-proxy left could not be removed: see above, and run it again",
            report.problems.len()
        );
    }
    let done = report.objects.len();
    info!(done, "{}", if done == 0 { "kube-proxy left nothing" } else { "all that kube-proxy left is gone" });
    Ok(End::Done)
}
