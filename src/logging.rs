//! Structured logs on standard error.

use std::io::IsTerminal;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::Registry;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload::{Handle, Layer};
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::object::Logging;

/// How much is logged, to be changed while the agent runs.
#[derive(Clone)]
pub(crate) struct Verbosity(Handle<Targets, Registry>);

impl Verbosity {
    pub(crate) fn set(&self, verbosity: u32) {
        // It fails only once nothing is logged any more.
        let _ = self.0.reload(targets(verbosity));
    }
}

/// Starts logging, a line for people or an object for programs.
pub(crate) fn start(logging: &Logging) -> Verbosity {
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
    Verbosity(handle)
}

/// Verbosity counts as kube-proxy's: 4 and more show debugging output, 6 and more everything, that of libraries included.
/// Below 4 libraries are silent: what they complain about is in our own words once.
fn targets(verbosity: u32) -> Targets {
    let (ours, theirs) = match verbosity {
        0..4 => (LevelFilter::INFO, LevelFilter::OFF),
        4..6 => (LevelFilter::DEBUG, LevelFilter::WARN),
        6.. => (LevelFilter::TRACE, LevelFilter::DEBUG),
    };
    ["kube_ipvs", "reconciler", "service_watch", "ipvs_netlink", "takeover"]
        .into_iter()
        .fold(Targets::new().with_default(theirs), |filter, target| filter.with_target(target, ours))
}
