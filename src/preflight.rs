//! Checks before anything is programmed: that the kernel has what the agent needs, with a remedy in each error. Also
//! sets the limits of the process and the IPVS timeouts.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result, bail};
use ipvs_netlink::{Client, Family, Scheduler, Timeouts};
use reconciler::binding::VipBinding;
use reconciler::front_end::FrontEnd;
use reconciler::kernel::{Kernel as _, Scope};
use reconciler::linux::LinuxKernel;
use reconciler::policy::{DetectLocal, Families, Policy};
use rustix::process::{Resource, getrlimit, setrlimit};
use service_watch::ExistingState;
use tracing::{info, warn};

/// Connects to the kernel, and checks that IPVS, the scheduler, `nf_tables` and dummy devices exist and may be used.
pub(crate) fn connect(policy: &Policy) -> Result<LinuxKernel> {
    let scheduler = policy.scheduler;
    let mut kernel = LinuxKernel::connect(policy.families)?;
    // The first request that requires CAP_NET_ADMIN.
    let in_use = kernel.ipvs().virtual_servers()?;
    if !in_use.iter().any(|entry| entry.server.scheduler == scheduler) {
        check_scheduler(kernel.ipvs(), scheduler)?;
    }
    check_vip_ranges(&mut kernel, &policy.binding)?;
    kernel.probe_filter(policy)?;
    if policy.own_tables {
        kernel.own_tables()?;
    }
    kernel.ensure_device()?;
    Ok(kernel)
}

/// All addresses in a range of VIPs become local to the node, and those that are no VIP are refused. So a range must
/// not have an address of the node's interfaces.
fn check_vip_ranges(kernel: &mut LinuxKernel, binding: &VipBinding) -> Result<()> {
    if binding.ranges().is_empty() {
        return Ok(());
    }
    for address in kernel.dump(Scope::Interfaces)?.interfaces {
        if let Some(range) = binding.ranges().iter().find(|range| range.contains(&address)) {
            bail!(
                "--vip-ranges (kubeIPVS.vipRanges): {range} contains {address}, an address of an interface of this node: give ranges \
                 of ClusterIPs only, remove the address from the interface, or omit the range. Nothing was changed"
            );
        }
    }
    Ok(())
}

/// Fails if the kernel does not have the scheduler. The request makes the kernel load the scheduler's module.
fn check_scheduler(ipvs: &mut Client, scheduler: Scheduler) -> Result<()> {
    if !ipvs.has_scheduler(scheduler).context("cannot find out whether the kernel has the scheduler")? {
        bail!(
            "--ipvs-scheduler={scheduler}: this kernel has no such scheduler, and could not load its module. Load it with \
             `modprobe ip_vs_{scheduler}`, or choose another, such as rr. Nothing was changed"
        );
    }
    Ok(())
}

/// The address families that this node has.
pub(crate) fn detect_families() -> Families {
    let ipv6 = has_ipv6();
    if !ipv6 {
        info!("this node has no IPv6: only IPv4 is served");
    }
    Families { ipv4: true, ipv6 }
}

/// Whether this node has IPv6 at present.
pub(crate) fn has_ipv6() -> bool {
    let is_off =
        std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6").is_ok_and(|value| value.trim() == "1");
    Path::new("/proc/net/if_inet6").exists() && !is_off
}

/// Raises the limit of open files to the hard limit, because each health-check node port needs one. (Go's runtime does
/// the same.)
pub(crate) fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        info!("cannot raise the limit of open files: {error}");
    }
}

/// Sets the OOM score adjustment of this process. To lower it requires `CAP_SYS_RESOURCE`; a failure is only logged.
pub(crate) fn set_oom_score_adj(score: i32) {
    const PATH: &str = "/proc/self/oom_score_adj";
    const KUBELETS_CRITICAL_SCORE: i32 = -997;
    let current: Option<i32> = std::fs::read_to_string(PATH).ok().and_then(|value| value.trim().parse().ok());
    // kubelet gives -997 to pods of that class, which is as good.
    let is_set =
        current == Some(score) || (score < KUBELETS_CRITICAL_SCORE && current == Some(KUBELETS_CRITICAL_SCORE));
    if !is_set && let Err(error) = std::fs::write(PATH, score.to_string()) {
        info!(
            "cannot set {PATH} to {score} (--oom-score-adj): {error}; kubelet sets it for pods of priority class \
             system-node-critical"
        );
    }
}

/// Fails if `--cluster-cidr` has no range of a family that this node has: pods could not be recognised.
pub(crate) fn check_cluster_cidr(policy: &Policy) -> Result<()> {
    if let DetectLocal::ClusterCidr(ranges) = &policy.detect_local
        && !ranges.is_empty()
        && !ranges.iter().any(|range| policy.families.contains(Family::of(range.addr())))
    {
        bail!(
            "--cluster-cidr (clusterCIDR) has no range of an address family that this node has: add one, or enable that family \
             on the node"
        );
    }
    Ok(())
}

/// How many VIPs the node serves before the agent has listed any Service. 0 if that cannot be read.
pub(crate) fn served_vips(ipvs: &mut Client) -> ExistingState {
    let listed = ipvs.virtual_servers().inspect_err(|error| warn!("{error}")).unwrap_or_default();
    let front_ends = listed.iter().filter_map(|entry| FrontEnd::from_id(&entry.server.id));
    let vips: BTreeSet<IpAddr> = front_ends.map(|front_end| front_end.address).collect();
    ExistingState { vips: vips.len() }
}

/// Sets the IPVS timeouts that differ; 0 leaves the kernel's value. A failure is only logged.
pub(crate) fn set_ipvs_timeouts(ipvs: &mut Client, wanted: Timeouts) {
    if wanted == Timeouts::default() {
        return;
    }
    let result = ipvs.timeouts().and_then(|current| {
        let differs = |wanted: u32, current: u32| wanted != 0 && wanted != current;
        if differs(wanted.tcp, current.tcp)
            || differs(wanted.tcp_fin, current.tcp_fin)
            || differs(wanted.udp, current.udp)
        {
            ipvs.set_timeouts(wanted)?;
            let set = |seconds: u32| (seconds != 0).then_some(seconds);
            info!(tcp = set(wanted.tcp), tcp_fin = set(wanted.tcp_fin), udp = set(wanted.udp), "set IPVS timeouts");
        }
        Ok(())
    });
    if let Err(error) = result {
        warn!("{error}");
    }
}
