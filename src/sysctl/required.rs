//! The settings that Services require, and the switch of IPVS's estimation (`--ipvs-estimation`).

use tracing::{error, warn};

use super::setting::{Importance, Setting};

/// A version of the kernel, such as 6.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct KernelVersion(u32, u32);

impl KernelVersion {
    /// Parses the release of `uname -r`, such as `6.1.0-28-amd64`.
    pub(super) fn parse(release: &str) -> Option<Self> {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some(Self(numbers.next()?.ok()?, numbers.next()?.ok()?))
    }
}

/// From [`REUSE_MODE_ADDED`] to before [`REUSE_MODE_FIXED`], `conn_reuse_mode` must be off: mode 1 delays the first
/// packet of a connection from a client's port that was used shortly before by a second.
const REUSE_MODE_ADDED: KernelVersion = KernelVersion(4, 1);
const REUSE_MODE_FIXED: KernelVersion = KernelVersion(5, 9);

/// The version of the running kernel. Logs what follows from an old or unknown one.
pub(super) fn running_kernel() -> Option<KernelVersion> {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let version = KernelVersion::parse(&release);
    match version {
        Some(version) if version >= REUSE_MODE_ADDED => {}
        Some(_) => error!("kernel {release} is older than 4.1: clients that reuse a port may wait for a second"),
        None => warn!("cannot parse the kernel's version {release:?}: conn_reuse_mode is not changed"),
    }
    version
}

/// The required settings.
pub(super) fn settings(strict_arp: bool, version: Option<KernelVersion>) -> Vec<Setting> {
    let required = |path, value| Setting::sysctl(path, value, Importance::Required);
    let mut settings = vec![
        // IPVS confirms connections in connection tracking, so that replies are translated and the packet filter sees
        // them.
        required("net/ipv4/vs/conntrack", 1),
        // Connections and clients with affinity leave an endpoint that is removed.
        required("net/ipv4/vs/expire_nodest_conn", 1),
        required("net/ipv4/vs/expire_quiescent_template", 1),
        required("net/ipv4/ip_forward", 1),
    ];
    if version.is_some_and(|version| (REUSE_MODE_ADDED..REUSE_MODE_FIXED).contains(&version)) {
        settings.push(required("net/ipv4/vs/conn_reuse_mode", 0));
    }
    if strict_arp {
        settings.push(required("net/ipv4/conf/all/arp_ignore", 1));
        settings.push(required("net/ipv4/conf/all/arp_announce", 2));
    }
    settings
}

/// The switch of estimation, if the configuration has it. Otherwise it is left alone, even if an earlier start of the
/// agent set it: nobody can tell who did.
pub(super) fn estimation(is_enabled: Option<bool>) -> Option<Setting> {
    is_enabled.map(|is_enabled| Setting::sysctl("net/ipv4/vs/run_estimation", is_enabled.into(), Importance::Optional))
}
