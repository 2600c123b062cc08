//! Runs a job where IPVS is: on this machine's own kernel, or in the guest.

use crate::error::{Error, Result};
use crate::job::{Job, Output, Status};
use crate::kernel::Bootable;
use crate::process::Sink;
use crate::{guest, host, kernel, packages};

/// Where jobs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// On the kernel of this machine, in fresh network and mount namespaces.
    Host,
    /// In a guest with a kernel of its own.
    Guest,
}

/// What tests look with, and what plays the part of others on a node: each program with the package that has it.
const PROGRAMS: [(&str, &str); 8] = [
    ("ip", "iproute2"),
    ("ipvsadm", "ipvsadm"),
    ("strace", "strace"),
    ("nft", "nftables"),
    ("iptables-nft", "iptables"),
    ("iptables-legacy", "iptables"),
    ("ipset", "ipset"),
    ("keepalived", "keepalived"),
];

/// Makes everything ready that [`run`] needs, and says where jobs will run. The first time this builds a kernel.
pub fn prepare() -> Result<Location> {
    Ok(match guest_kernel()? {
        None => Location::Host,
        Some(_) => Location::Guest,
    })
}

/// Makes everything ready; the guest's kernel if jobs run there.
fn guest_kernel() -> Result<Option<Bootable>> {
    packages::ensure_programs(&PROGRAMS)?;
    match location()? {
        Location::Host => Ok(None),
        Location::Guest => kernel::prepare().map(Some),
    }
}

/// Runs a job, its output going to ours as it comes.
pub fn run(job: &Job) -> Result<Status> {
    dispatch(job, [Sink::Stdout, Sink::Stderr]).map(|output| output.status)
}

/// Runs a job and returns its output.
pub fn output(job: &Job) -> Result<Output> {
    dispatch(job, [Sink::Memory; 2])
}

fn dispatch(job: &Job, sinks: [Sink; 2]) -> Result<Output> {
    match guest_kernel()? {
        None => host::run(job, sinks),
        Some(kernel) => guest::run(job, &kernel, sinks),
    }
}

fn location() -> Result<Location> {
    let wish = std::env::var("KUBE_IPVS_LAB").unwrap_or_default();
    match wish.as_str() {
        "guest" => Ok(Location::Guest),
        "host" => match host::unavailable_reason() {
            None => Ok(Location::Host),
            Some(reason) => Err(Error::Usage(format!("KUBE_IPVS_LAB=host, but {reason}"))),
        },
        "" => Ok(if host::unavailable_reason().is_none() { Location::Host } else { Location::Guest }),
        other => Err(Error::Usage(format!("KUBE_IPVS_LAB is `{other}`; it can be `guest` or `host`"))),
    }
}
