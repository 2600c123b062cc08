//! kube-ipvs: makes Kubernetes Services work with the kernel's own load balancer, IPVS.
//!
//! * `flags` and `config`: the command line and the configuration file, spelled as kube-proxy spells them.
//! * `alone`: that there is no other agent on this node.
//! * `preflight`: what the kernel has, and what to do where it lacks something.
//! * `sysctl`: the kernel's settings that Services depend on.
//! * `agent`: the parts wired together, from start to signal.
//! * `health`, `metrics`, `events`: what is to be known of it, and `http`: where one asks.
//! * `cleanup`: takes away what was made. `takeover`: takes a node over from kube-proxy.
//!
//! What the agent does with Services is in the crate `reconciler`, where they come from in `service-watch`.

#![forbid(unsafe_code)]

mod agent;
mod alone;
mod cleanup;
mod config;
mod events;
mod flags;
mod go;
mod health;
mod http;
mod logging;
mod metrics;
mod preflight;
mod sysctl;
mod takeover;

use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use tracing::{debug, error, info, warn};

use crate::agent::{End, Mode, Start};
use crate::config::object::Logging;
use crate::flags::{Command, Effective, Flags};

fn main() -> ExitCode {
    let flags = match flags::parse(std::env::args_os()) {
        Ok(flags) => flags,
        Err(error) => {
            // clap's own answers to --help and --version come this way too, and are no errors.
            let is_error = error.use_stderr();
            let _ = error.print();
            return if is_error { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    match run(flags) {
        Ok(End::Done | End::Stopped) => ExitCode::SUCCESS,
        Ok(End::Restart) => {
            error!("cannot start anew: {}", restart());
            ExitCode::FAILURE
        }
        Err(error) => {
            error!("{}", in_one_line(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(flags: Flags) -> Result<End> {
    // Needs no configuration, and is not to fail for the want of one.
    if let Some(Command::Cleanup { filter_only }) = flags.command {
        logging::start(&Logging::default());
        return if filter_only { cleanup::remove_filter() } else { cleanup::run() };
    }
    let effective = flags.effective();
    let logging = effective.as_ref().map(|effective| effective.configuration.logging.clone());
    let verbosity = logging::start(&logging.unwrap_or_default());
    let Effective { configuration, settings, warnings } = effective?;
    for warning in &warnings {
        warn!("{warning}");
    }
    let without_effect = flags.without_effect();
    if !without_effect.is_empty() {
        info!("flags of kube-proxy without effect here: --{}", without_effect.join(" --"));
    }
    if !settings.ignored_gates.is_empty() {
        debug!("feature gates without a meaning here: {}", settings.ignored_gates.join(" "));
    }
    if let Some(path) = &flags.write_config_to {
        let text = configuration.to_yaml()?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
        info!(file = %path.display(), "wrote the configuration");
        return Ok(End::Done);
    }
    if flags.cleanup {
        return cleanup::run_with_leftovers();
    }
    if flags.init_only {
        return agent::init(settings);
    }
    let mode = match flags.command {
        Some(Command::Takeover) => Mode::Takeover,
        _ if flags.once => Mode::Once,
        _ => Mode::Serve,
    };
    let end = agent::run(Start { flags, configuration, settings, verbosity, mode })?;
    // Only what is in place can take the place of something: where the sync failed or was stopped, everything stays.
    if mode == Mode::Takeover && end == End::Done {
        // What remains is told, and is no reason to keep the agent, which comes next, from a node.
        takeover::remove_leftovers();
    }
    Ok(end)
}

/// Starts the same program with the same arguments in the place of this process. Returns only where that fails.
///
/// A process that ended would be started again too, but by a kubelet that waits longer each time.
fn restart() -> std::io::Error {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    std::process::Command::new("/proc/self/exe").arg0(name).args(arguments).exec()
}

/// An error with its causes; many errors say their cause themselves, and once is enough.
fn in_one_line(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |mut line, cause| {
        let cause = cause.to_string();
        if !line.contains(&cause) {
            line += if line.is_empty() { "" } else { ": " };
            line += &cause;
        }
        line
    })
}
