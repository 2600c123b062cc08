//! Structured logs on standard error, and errors as one line of them.

use std::io::IsTerminal;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::Registry;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload::{Handle, Layer};
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::object::Logging;

/// Changes the verbosity while the agent runs.
#[derive(Clone)]
pub(crate) struct VerbosityHandle(Handle<Targets, Registry>);

impl VerbosityHandle {
    pub(crate) fn set(&self, verbosity: u32) {
        // Fails only if the subscriber is gone.
        let _ = self.0.reload(targets(verbosity));
    }
}

/// Starts logging, as text or as JSON.
pub(crate) fn init(logging: &Logging) -> VerbosityHandle {
    let (filter, handle) = Layer::new(targets(logging.verbosity));
    let registry = tracing_subscriber::registry().with(filter);
    let is_colored =
        std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let format = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(is_colored).with_target(false);
    if logging.format == "json" {
        registry.with(format.json().flatten_event(true)).init();
    } else {
        registry.with(format).init();
    }
    crate::panics::install_hook();
    VerbosityHandle(handle)
}

/// The levels of kube-proxy's `-v`: from 4 on debugging output, from 6 on everything, libraries included. Below 4
/// libraries are silent, because the agent logs their errors itself.
fn targets(verbosity: u32) -> Targets {
    let (own, libraries) = match verbosity {
        0..4 => (LevelFilter::INFO, LevelFilter::OFF),
        4..6 => (LevelFilter::DEBUG, LevelFilter::WARN),
        6.. => (LevelFilter::TRACE, LevelFilter::DEBUG),
    };
    ["kube_ipvs", "reconciler", "service_watch", "ipvs_netlink", "takeover"]
        .into_iter()
        .fold(Targets::new().with_default(libraries), |filter, target| filter.with_target(target, own))
}

/// An error and its causes in one line. A cause whose text the line already has is left out: many errors include their
/// cause.
pub(crate) fn error_chain(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |mut line, cause| {
        let cause = cause.to_string();
        if !line.contains(&cause) {
            line += if line.is_empty() { "" } else { ": " };
            line += &cause;
        }
        line
    })
}
