//! `cargo xtask lab`: one command, or a shell, where IPVS is.

use std::ffi::OsString;
use std::io::{IsTerminal, stdin, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use lab::{Job, Location};

/// Runs a command in the lab, where the kernel has IPVS, and passes on its output and exit status; without a command,
/// a shell.
///
/// The lab is this machine when its kernel has IPVS and we are root, and otherwise a guest whose kernel is built on
/// first use. The guest sees the files of this machine; what is written there is gone afterwards, except under
/// --writable directories. Exit status 124 means that the time was up, 125 that the lab itself failed.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Make the lab ready and run nothing
    #[arg(long, conflicts_with = "command")]
    prepare: bool,
    /// Stop the command after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    time_limit: u64,
    /// The guest's memory
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(64..))]
    memory: u32,
    /// A directory the command may write to; can be given several times
    #[arg(long, value_name = "DIR")]
    writable: Vec<PathBuf>,
    /// The command and its arguments
    #[arg(last = true)]
    command: Vec<OsString>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if args.prepare {
        let place = match lab::prepare()? {
            Location::Host => "this machine",
            Location::Guest => "a guest",
        };
        eprintln!("lab: ready; commands run on {place}");
        return Ok(ExitCode::SUCCESS);
    }
    let job = match args.command.split_first() {
        Some((program, rest)) => Job::new(program).args(rest).time_limit(Duration::from_secs(args.time_limit)),
        None if stdin().is_terminal() && stdout().is_terminal() => {
            // Without the user's start-up files, which in the guest may take seconds.
            Job::new("bash").arg("--norc").env("PS1", r"lab:\w\$ ").interactive()
        }
        None => bail!(
            "a shell needs a terminal, and there is none: say what to run, as in `cargo xtask lab -- ipvsadm -Ln`"
        ),
    };
    let job = args.writable.iter().fold(job.memory_mib(args.memory), Job::writable);
    let status = lab::run(&job)?;
    Ok(u8::try_from(status.code()).map_or(ExitCode::FAILURE, ExitCode::from))
}
