//! Sets the node's sysctls: reads each setting, and writes it if it differs.
//!
//! * `required`: the settings that Services require.
//! * `conntrack`: the limits and timeouts of connection tracking.
//! * `setting`: reads, compares and writes one setting.
//! * `monitor`: restores required settings that another program changes.
//!
//! The settings of IPVS exist only after the kernel has loaded IPVS.

mod conntrack;
mod monitor;
mod required;
mod setting;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use tracing::{error, warn};

pub(crate) use self::monitor::SysctlMonitor;
use self::required::KernelVersion;
use self::setting::{Importance, Setting};
use crate::config::settings::Conntrack;

/// Applies all settings in the network namespace of the calling thread. Returns a monitor of the required ones.
pub(crate) fn apply_all(strict_arp: bool, estimation: Option<bool>, conntrack: &Conntrack) -> Result<SysctlMonitor> {
    let root = PathBuf::from("/");
    let settings = desired(strict_arp, estimation, conntrack, required::running_kernel(), conntrack::cpus(&root));
    apply(&root, &settings)?;
    Ok(SysctlMonitor::new(root, settings))
}

/// All settings that the agent applies.
fn desired(
    strict_arp: bool,
    estimation: Option<bool>,
    conntrack: &Conntrack,
    version: Option<KernelVersion>,
    cpus: u64,
) -> Vec<Setting> {
    let mut settings = required::settings(strict_arp, version);
    settings.extend(required::estimation(estimation));
    settings.extend(conntrack::settings(conntrack, cpus));
    settings
}

/// Applies the settings. Fails if required ones cannot be applied, with all of them in the error. `root` is `/`, except
/// in tests.
fn apply(root: &Path, settings: &[Setting]) -> Result<()> {
    let mut fatal = Vec::new();
    for setting in settings {
        match setting.apply(root) {
            Ok(_) => {}
            Err(problem) => match setting.importance {
                Importance::Required => fatal.push(problem),
                Importance::Tuning => error!("{problem}"),
                Importance::Optional => warn!("{problem}"),
            },
        }
    }
    if !fatal.is_empty() {
        bail!("kernel settings that Services require cannot be set: {}", fatal.join("; "));
    }
    Ok(())
}
