//! `cargo xtask attack`: hostile Services, local users and flushes against the agent, beside honest Services with traffic.
//!
//! This file runs on this machine, [`guest`] runs in the lab. [`hostile`] writes the objects that [`objects`] makes up,
//! [`local_user`] is an unprivileged process on the node, [`flush`] is other software on the node, with root's rights.
//! [`honest`] changes honest Services and measures how long that takes. [`record`] says which promises were broken.

mod flush;
mod guest;
mod honest;
mod hostile;
pub(crate) mod local_user;
mod objects;
mod record;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab::{Job, Scratch};
use serde::{Deserialize, Serialize};

use crate::cargo;
pub(crate) use guest::{GuestArgs, run_guest};
use record::AttackRecord;

/// Attacks the agent in the lab at random, beside honest Services with traffic, and reports what came of it.
///
/// Attackers may write Services and EndpointSlices in a namespace of their own, or are unprivileged users of the node; root flushes
/// virtual servers, addresses, tables and connection tracking. The command fails if honest traffic is lost (but for a
/// moment after a flush), if an honest change takes too long, if /livez is anything but 200, if the agent needs more memory than
/// deploy/ gives it, if it panics or ends, or if anything hostile is left in the kernel afterwards.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long
    #[arg(long, value_name = "N", default_value_t = 30)]
    minutes: u64,
    /// What is attacked, and how, follows from this number; by default a random one, which is printed
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// Only these kinds of attack, by a part of their names; can be given several times
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Print the agent's log at the end, and when it has ended by itself
    #[arg(long)]
    show_log: bool,
    /// Pass this flag to the agent; can be given several times
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    agent_flag: Vec<String>,
    /// The agent, instead of the one built from this workspace
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
}

/// What a guest is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct AttackOptions {
    agent: PathBuf,
    agent_flags: Vec<String>,
    seconds: u64,
    seed: u64,
    only: Vec<String>,
    show_log: bool,
}

impl AttackOptions {
    /// Whether attacks of this kind were asked for.
    fn wants(&self, kind: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| kind.contains(part.as_str()))
    }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(1..1_000_000));
    eprintln!("attack: --seed {seed}");
    // As it is shipped: static, so that one file is all.
    let agent = match &args.agent {
        Some(agent) => agent.canonicalize().with_context(|| format!("cannot find {}", agent.display()))?,
        None => cargo::static_agent(None)?,
    };
    lab::prepare()?;
    let dir = Scratch::new()?;
    let (file, results) = (dir.path().join("options.json"), dir.path().join("record.json"));
    let options = AttackOptions {
        agent,
        agent_flags: args.agent_flag.clone(),
        seconds: args.minutes * 60,
        seed,
        only: args.only.clone(),
        show_log: args.show_log,
    };
    fs::write(&file, serde_json::to_vec(&options)?).context("cannot write the options")?;
    let job = Job::this_executable()
        .arg("guest-attack")
        .arg(&file)
        .arg(&results)
        .writable(dir.path())
        .memory_mib(4096)
        .time_limit(Duration::from_secs(options.seconds + 1200));
    let status = lab::run(&job)?;
    if !status.success() {
        bail!("the attack with --seed {seed} did not come to its end: exit code {}", status.code());
    }
    let record = fs::read(&results).context("cannot read what was counted")?;
    let record: AttackRecord = serde_json::from_slice(&record).context("this is not the record of an attack")?;
    println!("{}", record.text());
    let failures = record.failures();
    for failure in &failures {
        eprintln!("error: {failure}");
    }
    if failures.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("to run the same attacks again: cargo xtask attack --minutes {} --seed {seed}", args.minutes);
    Ok(ExitCode::FAILURE)
}
