//! kube-ipvs: makes Kubernetes Services work with IPVS, the kernel's load balancer.
//!
//! Where to find what:
//!
//! | Question | File |
//! |---|---|
//! | Where is a flag read? | `flags/fields.rs` if the configuration file has a field for it, else `flags/mod.rs` |
//! | Where is the configuration file parsed? | `config/parse.rs`, into the object of `config/object.rs` |
//! | Where is a value checked? | `config/settings.rs` |
//! | Where is a metric named? | `metrics.rs` |
//! | Where is an Event made? | `events.rs` |
//! | Where are the node's sysctls set? | `sysctl/`; which ones: `sysctl/required.rs` and `sysctl/conntrack.rs` |
//! | What is checked before the first write? | `preflight.rs` |
//! | What do other programs do that keeps Services from working? | `host.rs` |
//! | How are the threads and tasks connected? | `agent/` |
//! | What is served over HTTP? | `http/`; whether the node is healthy: `health.rs` |
//! | What do `cleanup` and `takeover` do? | `cleanup.rs`, `takeover.rs` |
//! | What happens after a panic? | `panics.rs` |
//! | Why does a second agent not start? | `instance_lock.rs` |
//!
//! What is programmed for a Service is decided in the crate `reconciler`; Services are read by the crate
//! `service-watch`.

#![forbid(unsafe_code)]

mod agent;
mod cleanup;
mod config;
mod events;
mod flags;
mod health;
mod host;
mod http;
mod instance_lock;
mod logging;
mod metrics;
mod mode;
mod panics;
mod preflight;
mod sysctl;
mod takeover;

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use tracing::{debug, error, info, warn};

use crate::agent::AgentOptions;
use crate::config::object::Logging;
use crate::flags::{Command, EffectiveConfig, Flags};
use crate::instance_lock::InstanceLock;
use crate::mode::{ExitReason, RunMode};

fn main() -> ExitCode {
    let flags = match flags::parse(std::env::args_os()) {
        Ok(flags) => flags,
        Err(error) => {
            // clap returns the texts of --help and --version as errors too.
            let is_error = error.use_stderr();
            if is_error {
                print_error(&error);
                return ExitCode::FAILURE;
            }
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
    };
    let code = match run(flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{}", logging::error_chain(&error));
            ExitCode::FAILURE
        }
    };
    logging::flush();
    code
}

/// Prints an error about the command line, which may repeat any argument.
fn print_error(error: &clap::Error) {
    let mut stderr = std::io::stderr();
    let text = error.render();
    let text = if stderr.is_terminal() { text.ansi().to_string() } else { text.to_string() };
    // Nobody may be there to read it.
    let _ = stderr.write_all(logging::escape_lines(&text).as_bytes());
}

fn run(flags: Flags) -> Result<()> {
    // `cleanup` needs no configuration, and must not fail because of a bad one.
    if let Some(Command::Cleanup { filter_only }) = flags.command {
        logging::init(&Logging::default());
        return if filter_only { cleanup::remove_packet_filter() } else { cleanup::run() };
    }
    let effective = flags.effective();
    let logging = effective.as_ref().map(|effective| effective.configuration.logging.clone());
    let verbosity = logging::init(&logging.unwrap_or_default());
    let EffectiveConfig { configuration, settings, warnings } = effective?;
    for warning in &warnings {
        warn!("{warning}");
    }
    let without_effect = flags.without_effect();
    if !without_effect.is_empty() {
        info!("flags of kube-proxy without effect here: --{}", without_effect.join(" --"));
    }
    if !settings.ignored_gates.is_empty() {
        debug!("ignored feature gates: {}", settings.ignored_gates.join(" "));
    }
    if let Some(path) = &flags.write_config_to {
        let text = configuration.to_yaml()?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
        info!(file = %path.display(), "wrote the configuration");
        return Ok(());
    }
    if flags.cleanup {
        return cleanup::run_with_kube_proxy();
    }
    if flags.init_only {
        return agent::init(settings);
    }
    let mode = match flags.command {
        Some(Command::Takeover) => RunMode::Takeover,
        _ if flags.once => RunMode::Once,
        _ => RunMode::Serve,
    };
    let lock = InstanceLock::acquire()?;
    let reason = agent::run(AgentOptions { flags, configuration, settings, verbosity, mode })?;
    if reason == ExitReason::Restart {
        bail!("cannot restart: {}", lock.exec_self());
    }
    // kube-proxy's rules are removed only after our own are in place, so not where the sync failed or was stopped.
    if mode == RunMode::Takeover && reason == ExitReason::Completed {
        // What cannot be removed is logged. It must not keep the agent, which starts next, from the node.
        takeover::remove_leftovers();
    }
    Ok(())
}
