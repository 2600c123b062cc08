//! Before anything is programmed: what this kernel has, and what to do where it lacks something.

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

/// Connects to the kernel and checks that it has IPVS, the scheduler and dummy devices, and lets us use them.
pub(crate) fn kernel(policy: &Policy) -> Result<LinuxKernel> {
    let scheduler = policy.scheduler;
    let mut kernel = LinuxKernel::connect(policy.families)?;
    // The first request that takes a privilege.
    let in_use = kernel.ipvs().virtual_servers()?;
    if !in_use.iter().any(|entry| entry.server.scheduler == scheduler) {
        has_scheduler(kernel.ipvs(), scheduler)?;
    }
    ranges_have_no_own_address(&mut kernel, &policy.binding)?;
    kernel.probe_filter(policy)?;
    kernel.ensure_device()?;
    match kernel.forward_drops() {
        Ok(chains) if chains.is_empty() => {}
        // To accept a packet in one table keeps no other from dropping it, and others' tables are not ours to change.
        Ok(chains) => warn!(
            chains = chains.join(", "),
            "a chain of another program drops forwarded packets that it does not accept itself; unless that program accepts \
             answers, connections to Services stall: `iptables -I FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT` \
             accepts them"
        ),
        Err(error) => warn!("{error}"),
    }
    Ok(kernel)
}

/// In a range of VIPs everything else is refused: the node's own addresses, and whoever they lead to, are not to be among it.
fn ranges_have_no_own_address(kernel: &mut LinuxKernel, binding: &VipBinding) -> Result<()> {
    if binding.ranges().is_empty() {
        return Ok(());
    }
    for own in kernel.dump(Scope::Interfaces)?.interfaces {
        if let Some(range) = binding.ranges().iter().find(|range| range.contains(&own)) {
            bail!(
                "--vip-ranges (kubeIPVS.vipRanges): {range} has {own}, an address of an interface of this node: give ranges of \
                 ClusterIPs alone, take the address from the interface, or leave the range out. Nothing was changed"
            );
        }
    }
    Ok(())
}

/// Asking for a scheduler makes the kernel load its module, and changes nothing else.
fn has_scheduler(ipvs: &mut Client, scheduler: Scheduler) -> Result<()> {
    if !ipvs.has_scheduler(scheduler).context("cannot find out whether the kernel has the scheduler")? {
        bail!(
            "--ipvs-scheduler={scheduler}: this kernel has no such scheduler, and could not load its module. Load it with \
             `modprobe ip_vs_{scheduler}`, or choose another, such as rr. Nothing was changed"
        );
    }
    Ok(())
}

/// The address families this node can serve.
pub(crate) fn families() -> Families {
    let ipv6_is_off =
        std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6").is_ok_and(|value| value.trim() == "1");
    let ipv6 = Path::new("/proc/net/if_inet6").exists() && !ipv6_is_off;
    if !ipv6 {
        info!("this node has no IPv6: only IPv4 is served");
    }
    Families { ipv4: true, ipv6 }
}

/// Raises the limit of open files to what the process may have: each health-check node port is one. (Go's runtime does so
/// for every program.)
pub(crate) fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        info!("cannot raise the limit of open files: {error}");
    }
}

/// Whether pods can be told by their addresses at all.
pub(crate) fn pods_have_a_family(policy: &Policy) -> Result<()> {
    if let DetectLocal::ClusterCidr(ranges) = &policy.detect_local
        && !ranges.is_empty()
        && !ranges.iter().any(|range| policy.families.contains(Family::of(range.addr())))
    {
        bail!(
            "--cluster-cidr (clusterCIDR) names no range of a family that this node has: give one, or give the node the \
             family"
        );
    }
    Ok(())
}

/// What the node serves before anything is known of what it should. What cannot be read is nothing.
pub(crate) fn serving(ipvs: &mut Client) -> ExistingState {
    let listed = ipvs.virtual_servers().inspect_err(|error| warn!("{error}")).unwrap_or_default();
    let front_ends = listed.iter().filter_map(|entry| FrontEnd::from_id(&entry.server.id));
    let vips: BTreeSet<IpAddr> = front_ends.map(|front_end| front_end.address).collect();
    ExistingState { vips: vips.len() }
}

/// Sets the timeouts that differ; 0 leaves one as it is. A failure is no reason not to serve.
pub(crate) fn set_timeouts(ipvs: &mut Client, wanted: Timeouts) {
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
