//! `kube-ipvs cleanup`: removes everything that kube-ipvs made from the kernel, and logs what it leaves.
//!
//! The kernel shows what is ours: the front end of each of our virtual servers is in our tables of `nf_tables`, or if
//! there are none its VIP is on `kube-ipvs0`. So no API server is needed, and objects of other programs are left alone.

use std::fmt::Display;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Result, bail};
use reconciler::kernel::{Cause, DEVICE, Kernel as _, KernelError, Observed, Scope};
use reconciler::linux::LinuxKernel;
use reconciler::mirror::Mirror;
use reconciler::plan::{Operation, Plan};
use reconciler::policy::Families;
use service_watch::Protocol;
use tracing::{error, info};

use crate::instance_lock::InstanceLock;
use crate::takeover;

/// Removes everything of ours. If an operation fails the others are done all the same, and an error is returned.
pub(crate) fn run() -> Result<()> {
    let _lock = InstanceLock::acquire()?;
    let mut kernel = LinuxKernel::connect(Families::BOTH)?;
    let observed = kernel.dump(Scope::All)?;
    let (plan, foreign) = plan(observed);
    let mut tally = carry_out(&mut kernel, &plan);
    if tally.failed == 0 && foreign.addresses.is_empty() {
        tally.count_deletion("device kube-ipvs0", kernel.delete_device());
    }
    // Last: they refuse other ports of VIPs as long as there are VIPs, and their elements prove which virtual servers
    // are ours.
    if tally.failed == 0 {
        tally.count_deletion("the tables kube-ipvs of nf_tables", kernel.delete_filter());
    }
    for server in &foreign.servers {
        info!("left: virtual server {server}, which is not provably ours");
    }
    for address in &foreign.addresses {
        info!("left: address {address} on {DEVICE}, which kube-ipvs does not make, and the device");
    }
    info!("left: kernel settings (sysctls and IPVS timeouts)");
    let Tally { done, failed } = tally;
    if failed > 0 {
        bail!("{failed} objects could not be removed: see above, and run it again");
    }
    info!(done, "{}", if done == 0 { "there was nothing to remove" } else { "removed everything of kube-ipvs" });
    Ok(())
}

/// How much was done, and how much failed.
#[derive(Debug, Default)]
struct Tally {
    done: usize,
    failed: usize,
}

impl Tally {
    fn count(&mut self, what: &impl Display, result: Result<(), KernelError>) {
        match result {
            Ok(()) => {
                info!("done: {what}");
                self.done += 1;
            }
            // It is gone already.
            Err(error) if matches!(error.cause, Cause::NotFound | Cause::NoDevice) => {}
            Err(error) => {
                error!("{error}");
                self.failed += 1;
            }
        }
    }

    /// The same for a deletion that returns whether there was something to delete.
    fn count_deletion(&mut self, what: &str, result: Result<bool, KernelError>) {
        if let Some(result) = result.map(|was_there| was_there.then_some(())).transpose() {
            self.count(&format_args!("delete {what}"), result);
        }
    }
}

/// Carries out a plan.
fn carry_out(kernel: &mut LinuxKernel, plan: &Plan) -> Tally {
    let results = if plan.is_empty() { Vec::new() } else { kernel.apply(plan) };
    let mut tally = Tally::default();
    for (operation, result) in plan.operations().iter().zip(results) {
        tally.count(operation, result);
    }
    tally
}

/// Removes only the tables of the packet filter, and before them our routes. kube-proxy, which serves the VIPs by then,
/// binds them as addresses and filters traffic to them, but it does not know our routes.
pub(crate) fn remove_packet_filter() -> Result<()> {
    let _lock = InstanceLock::acquire()?;
    let mut kernel = LinuxKernel::connect(Families::BOTH)?;
    let routes = kernel.dump(Scope::All)?.device.unwrap_or_default().routes;
    let Tally { done, failed } = carry_out(&mut kernel, &routes.into_iter().map(Operation::RemoveRoute).collect());
    if failed > 0 {
        bail!("{failed} routes could not be removed, so the tables that guard them stay: see above, and run it again");
    }
    match kernel.delete_filter()? {
        true => info!("done: delete the tables kube-ipvs of nf_tables"),
        false if done == 0 => info!("there was nothing to remove"),
        false => {}
    }
    Ok(())
}

/// `--cleanup`: removes what is ours, and what kube-proxy left. An error in one does not prevent the other.
pub(crate) fn run_with_kube_proxy() -> Result<()> {
    let own = run();
    let remaining = takeover::remove_leftovers();
    if remaining > 0 {
        bail!("{remaining} objects that kube-proxy left could not be removed: see above, and run it again");
    }
    own
}

/// Objects that are not ours, as text.
#[derive(Debug, Default, PartialEq, Eq)]
struct Foreign {
    servers: Vec<String>,
    addresses: Vec<String>,
}

/// What to remove, and what is not ours.
fn plan(observed: Observed) -> (Plan, Foreign) {
    let mut foreign = Foreign::default();
    let servers: Vec<_> = observed.servers.iter().map(|server| server.front_end).collect();
    let device = observed.device.clone().unwrap_or_default();
    let on_device: Vec<(IpAddr, u8)> = device.addresses;
    let mirror = Mirror::from_dump(observed);
    let mut operations = Vec::new();
    for (address, prefix) in on_device {
        if mirror.has_host_address(address) {
            operations.push(Operation::UnbindAddress(address));
        } else if mirror.has_address(address) {
            foreign.addresses.push(format!("{address}/{prefix}"));
        }
    }
    operations.extend(device.routes.into_iter().map(Operation::RemoveRoute));
    for front_end in servers {
        if mirror.is_owned(&front_end) {
            operations.push(Operation::DeleteVirtualServer(front_end));
            if front_end.protocol == Protocol::Udp {
                operations.push(Operation::DeleteStaleFlows(front_end, Arc::default()));
            }
        } else {
            foreign.servers.push(front_end.to_string());
        }
    }
    (operations.into_iter().collect(), foreign)
}
