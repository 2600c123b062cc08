//! kube-ipvs: makes Kubernetes Services work with the kernel's own load balancer, IPVS.
//!
//! * `flags`: the command line, spelled as kube-proxy spells it.
//! * `preflight`: what the kernel has, and what to do where it lacks something.
//! * `sysctl`: the kernel's settings that Services depend on.
//! * `agent`: the parts wired together, from start to signal.
//! * `cleanup`: takes away what was made.
//!
//! What the agent does with Services is in the crate `reconciler`, where they come from in `service-watch`.

#![forbid(unsafe_code)]

mod agent;
mod cleanup;
mod flags;
mod go;
mod logging;
mod preflight;
mod sysctl;

use std::process::ExitCode;

use tracing::error;

use crate::flags::Command;

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
    logging::start(flags.verbosity);
    let result = match flags.command {
        Some(Command::Cleanup) => cleanup::run(),
        None => agent::run(&flags),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            error!("{}", in_one_line(&error));
            ExitCode::FAILURE
        }
    }
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
