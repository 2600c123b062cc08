//! `kube-ipvs cleanup`: takes away what was made, and says what it leaves.
//!
//! What is ours shows in the kernel: every front end is in the tables of the packet filter, or where there is none its VIP is on
//! `kube-ipvs0`. So no API server is needed, and what others made is not taken for ours.

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

use crate::agent::End;
use crate::alone::Alone;
use crate::takeover;

/// Removes everything of ours. What fails does not keep the rest from going; then the exit status is 1.
pub(crate) fn run() -> Result<End> {
    let _alone = Alone::new()?;
    let mut kernel = LinuxKernel::connect(Families::BOTH)?;
    let observed = kernel.dump(Scope::All)?;
    let (plan, left) = plan(observed);
    let mut tally = carry_out(&mut kernel, &plan);
    if tally.failed == 0 && left.addresses.is_empty() {
        tally.count_whole("device kube-ipvs0", kernel.delete_device());
    }
    // Last: what they refuse is refused for as long as there is a VIP, and by what is in them the rest is known to be ours.
    if tally.failed == 0 {
        tally.count_whole("the tables kube-ipvs of nf_tables", kernel.delete_filter());
    }
    for server in &left.servers {
        info!("left: virtual server {server}, which is not provably ours");
    }
    for address in &left.addresses {
        info!("left: address {address} on {DEVICE}, which kube-ipvs does not make, and the device");
    }
    info!("left: settings of the kernel (sysctls and IPVS timeouts)");
    let Tally { done, failed } = tally;
    if failed > 0 {
        bail!("{failed} things could not be removed: see above, and run it again");
    }
    info!(done, "{}", if done == 0 { "there was nothing of ours" } else { "all that was ours is gone" });
    Ok(End::Done)
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
            // Somebody was faster.
            Err(error) if matches!(error.cause, Cause::NotFound | Cause::NoDevice) => {}
            Err(error) => {
                error!("{error}");
                self.failed += 1;
            }
        }
    }

    /// The same for what says itself whether it was there.
    fn count_whole(&mut self, what: &str, result: Result<bool, KernelError>) {
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

/// Removes the tables of the packet filter, and before them the routes, which nobody else would guard: kube-proxy binds each
/// VIP by an address. Whoever serves the VIPs by now guards them too.
pub(crate) fn remove_filter() -> Result<End> {
    let _alone = Alone::new()?;
    let mut kernel = LinuxKernel::connect(Families::BOTH)?;
    let routes = kernel.dump(Scope::All)?.device.unwrap_or_default().routes;
    let Tally { done, failed } = carry_out(&mut kernel, &routes.into_iter().map(Operation::RemoveRoute).collect());
    if failed > 0 {
        bail!("{failed} routes could not be removed, so the tables that guard them stay: see above, and run it again");
    }
    match kernel.delete_filter()? {
        true => info!("done: delete the tables kube-ipvs of nf_tables"),
        false if done == 0 => info!("there was nothing of ours"),
        false => {}
    }
    Ok(End::Done)
}

/// `--cleanup`: what is ours, and what kube-proxy left. What fails of the one does not keep the other.
pub(crate) fn run_with_leftovers() -> Result<End> {
    let own = run();
    let remaining = takeover::remove_leftovers();
    if remaining > 0 {
        bail!("{remaining} things that kube-proxy left could not be removed: see above, and run it again");
    }
    own
}

/// What is not ours.
#[derive(Debug, Default, PartialEq, Eq)]
struct Left {
    servers: Vec<String>,
    addresses: Vec<String>,
}

fn plan(observed: Observed) -> (Plan, Left) {
    let mut left = Left::default();
    let servers: Vec<_> = observed.servers.iter().map(|server| server.front_end).collect();
    let device = observed.device.clone().unwrap_or_default();
    let on_device: Vec<(IpAddr, u8)> = device.addresses;
    let mirror = Mirror::from_dump(observed);
    let mut operations = Vec::new();
    for (address, prefix) in on_device {
        if mirror.has_host_address(address) {
            operations.push(Operation::UnbindAddress(address));
        } else if mirror.has_address(address) {
            left.addresses.push(format!("{address}/{prefix}"));
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
            left.servers.push(front_end.to_string());
        }
    }
    (operations.into_iter().collect(), left)
}
