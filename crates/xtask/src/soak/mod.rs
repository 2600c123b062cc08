//! `cargo xtask soak`: the agent for an hour, with changes, kills, faults and traffic all at once.
//!
//! This file and [`report`] run on this machine, [`guest`] runs in the lab; [`disruption`] has what happens to the agent. The node,
//! its Services and the clients, which must not notice anything, are in [`workload`](crate::workload).

mod disruption;
mod guest;
mod record;
mod report;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab::{Job, Location, Scratch};
use serde::{Deserialize, Serialize};

use crate::cargo;
pub(crate) use guest::{GuestArgs, run_guest};
use record::SoakRecord;

/// Where the report goes.
const REPORT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/soak");
/// A shorter soak does not show whether memory grows, and so does not renew the report.
const MIN_REPORT_MINUTES: u64 = 60;

/// Runs the agent in the lab under churn, kills, faults and traffic, and reports the results.
///
/// Fails if a connection is lost, if something of somebody else's is touched, or if the kernel differs from what a fresh
/// start makes. From 60 minutes on it renews the report in docs/soak.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long
    #[arg(long, value_name = "N", default_value_t = 60)]
    minutes: u64,
    /// How many Services change all the time, beside those that have traffic
    #[arg(long, value_name = "N", default_value_t = 200)]
    services: usize,
    /// What happens follows from this number
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Write all that was counted here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the report of what an earlier run has written, and run nothing
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// The agent, instead of the one built from this workspace
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
}

/// What a guest is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct SoakOptions {
    agent: PathBuf,
    seconds: u64,
    services: usize,
    seed: u64,
    /// The guest's clock is its own.
    may_set_clock: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let record = match &args.from {
        Some(file) => fs::read(file).with_context(|| format!("cannot read {}", file.display()))?,
        None => soak(args)?,
    };
    if let Some(file) = &args.json {
        fs::write(file, &record).with_context(|| format!("cannot write {}", file.display()))?;
    }
    let record: SoakRecord = serde_json::from_slice(&record).context("this is not the record of a soak")?;
    println!("{}", report::text(&record));
    if record.seconds >= MIN_REPORT_MINUTES * 60 {
        report::write(Path::new(REPORT), &record)?;
    }
    let failures = record.failures();
    for failure in &failures {
        eprintln!("error: {failure}");
    }
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn soak(args: &Args) -> Result<Vec<u8>> {
    // As it is shipped: static, so that one file is all.
    let agent = match &args.agent {
        Some(agent) => agent.canonicalize().with_context(|| format!("cannot find {}", agent.display()))?,
        None => cargo::static_agent(None)?,
    };
    let may_set_clock = lab::prepare()? == Location::Guest;
    let dir = Scratch::new()?;
    let (file, results) = (dir.path().join("options.json"), dir.path().join("record.json"));
    let options =
        SoakOptions { agent, seconds: args.minutes * 60, services: args.services, seed: args.seed, may_set_clock };
    fs::write(&file, serde_json::to_vec(&options)?).context("cannot write the options")?;
    let job = Job::this_executable()
        .arg("guest-soak")
        .arg(&file)
        .arg(&results)
        .writable(dir.path())
        .memory_mib(4096)
        .time_limit(Duration::from_secs(options.seconds + 1200));
    let status = lab::run(&job)?;
    if !status.success() {
        bail!("the soak did not come to its end: exit code {}", status.code());
    }
    fs::read(&results).context("cannot read what was counted")
}
