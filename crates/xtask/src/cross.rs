//! `cargo xtask cross`: the static agent for another architecture, and tests for it under emulation.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::cargo;

/// The crates that are tested.
const PACKAGES: [&str; 3] = ["ipvs-netlink", "netlink-batch", "reconciler"];

/// Their files in `tests/` that need nothing of the kernel. qemu-user knows few protocols of netlink.
const TESTS: [&str; 16] = [
    "allocations",
    "changes",
    "codec",
    "endpoint_selection",
    "fake",
    "golden",
    "histories",
    "packet_filter",
    "proc",
    "reconcile",
    "refused_operations",
    "rules",
    "rules_properties",
    "sync_report",
    "untrusted_services",
    "vip_binding",
];

/// Unit tests that open sockets of such protocols.
const SKIPPED: &str = "socket::tests::";

/// Builds the static agent for another architecture, with rustup's compiler if that has the target, or else with Debian's.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The target to build for: aarch64-unknown-linux-gnu, s390x-unknown-linux-gnu, or what rustup has installed
    #[arg(long, value_name = "TRIPLE", default_value = "aarch64-unknown-linux-gnu")]
    target: String,
    /// Run the tests of the libraries that need no kernel under qemu-user too
    #[arg(long)]
    test: bool,
    /// Run these tests only, and do not build the agent
    #[arg(long)]
    only_test: bool,
    /// Tests whose name has this in it
    #[arg(value_name = "FILTER")]
    filter: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if !args.only_test {
        let agent = cargo::static_agent(Some(&args.target))?;
        let size = agent.metadata().with_context(|| format!("cannot examine {}", agent.display()))?.len();
        println!("{} ({size} bytes)", agent.display());
        if args.test {
            let (_, emulator) = lab::cross::emulator(&args.target)?;
            let status = Command::new(emulator).arg(&agent).arg("--version").status();
            if !status.with_context(|| format!("cannot run {emulator}"))?.success() {
                bail!("the agent does not run under {emulator}");
            }
        }
    }
    if args.test || args.only_test {
        cargo::test_for(&args.target, &PACKAGES, &TESTS, SKIPPED, args.filter.as_deref())?;
    }
    Ok(ExitCode::SUCCESS)
}
