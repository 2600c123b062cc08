//! Structured logs on standard error.

use std::io::IsTerminal;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Starts logging. Verbosity counts as kube-proxy's: 4 and more show debugging output, 6 and more everything, that of
/// libraries included. Below 4 libraries are silent: what they complain about is in our own words once.
pub(crate) fn start(verbosity: u8) {
    let (ours, theirs) = match verbosity {
        0..4 => (LevelFilter::INFO, LevelFilter::OFF),
        4..6 => (LevelFilter::DEBUG, LevelFilter::WARN),
        6.. => (LevelFilter::TRACE, LevelFilter::DEBUG),
    };
    let filter = ["kube_ipvs", "reconciler", "service_watch", "ipvs_netlink"]
        .into_iter()
        .fold(Targets::new().with_default(theirs), |filter, target| filter.with_target(target, ours));
    let is_colored =
        std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let format = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(is_colored).with_target(false);
    tracing_subscriber::registry().with(filter).with(format).init();
}
