//! Structured logs on standard error, and errors as one line of them.
//!
//! * `escape`: what comes from outside stays within its line.
//! * `queue`: nobody who logs waits for whoever reads.

mod escape;
mod queue;

use std::io::{self, IsTerminal, Write as _};
use std::sync::LazyLock;
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing::warn;
use tracing_subscriber::Registry;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload::{Handle, Layer};
use tracing_subscriber::util::SubscriberInitExt;

use self::escape::{Format, escape};
use self::queue::LogQueue;
use crate::config::object::Logging;

/// How long the end of the process waits for the rest of the log to be read.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

static QUEUE: LazyLock<LogQueue> = LazyLock::new(LogQueue::default);

/// Changes the verbosity while the agent runs.
#[derive(Clone)]
pub(crate) struct VerbosityHandle(Handle<Targets, Registry>);

impl VerbosityHandle {
    pub(crate) fn set(&self, verbosity: u32) {
        // Fails only if the subscriber is gone.
        let _ = self.0.reload(targets(verbosity));
    }
}

/// Writes one event at a time to the queue.
#[derive(Clone, Copy)]
struct LineWriter(Format);

impl MakeWriter<'_> for LineWriter {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        *self
    }
}

impl io::Write for LineWriter {
    /// Takes an event as a whole, with its line end, as the formatter passes it.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let mut line = String::with_capacity(text.len());
        escape(text.strip_suffix('\n').unwrap_or(&text), self.0, &mut line);
        line.push('\n');
        QUEUE.push(line.as_bytes());
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How many lines were dropped because nobody read them.
pub(crate) fn dropped_lines() -> u64 {
    QUEUE.dropped()
}

/// Waits for a moment until what was logged is written: before the process ends or executes itself.
pub(crate) fn flush() {
    QUEUE.flush(FLUSH_TIMEOUT);
}

/// A text for a terminal, in which only line ends and styles have effects.
pub(crate) fn escape_lines(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        escape(line.trim_end_matches('\n'), Format::Text { is_colored: true }, &mut escaped);
        escaped.push_str(if line.ends_with('\n') { "\n" } else { "" });
    }
    escaped
}

/// Starts logging, as text or as JSON.
pub(crate) fn init(logging: &Logging) -> VerbosityHandle {
    let (filter, handle) = Layer::new(targets(logging.verbosity));
    let registry = tracing_subscriber::registry().with(filter);
    let is_colored = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let is_json = logging.format == "json";
    let writer = LineWriter(if is_json { Format::Json } else { Format::Text { is_colored } });
    let format = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(is_colored).with_target(false);
    let report = |lines| warn!(lines, "lines of the log were dropped: nobody read standard error, or its disk is full");
    if let Err(error) = QUEUE.write_to(io::stderr(), report) {
        // Without it there is no log. Nothing else will start then either.
        let _ = writeln!(io::stderr(), "cannot start the thread of the log: {error}");
    }
    if is_json {
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
