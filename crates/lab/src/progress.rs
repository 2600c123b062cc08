//! Tells the user what takes so long: a line that updates itself on a terminal, a line now and then elsewhere.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// Between two lines when the output is not a terminal.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// The progress of one step.
pub(crate) struct Progress {
    step: String,
    started: Instant,
    last_line: Instant,
    terminal: bool,
    done: bool,
}

impl Progress {
    /// Announces a step.
    pub(crate) fn start(step: impl Display) -> Self {
        let progress = Self {
            step: step.to_string(),
            started: Instant::now(),
            last_line: Instant::now(),
            terminal: io::stderr().is_terminal(),
            done: false,
        };
        progress.print("...", !progress.terminal);
        progress
    }

    /// Says how far the step is.
    pub(crate) fn update(&mut self, detail: impl Display) {
        if self.terminal {
            self.print(&format!(": {detail}, {} s", self.started.elapsed().as_secs()), false);
        } else if self.last_line.elapsed() >= REPORT_INTERVAL {
            self.last_line = Instant::now();
            self.print(&format!(": {detail}, {} s", self.started.elapsed().as_secs()), true);
        }
    }

    /// Says that the step is done and how long it took.
    pub(crate) fn done(mut self) {
        self.done = true;
        self.print(&format!(": done in {:.1} s", self.started.elapsed().as_secs_f32()), true);
    }

    fn print(&self, text: &str, end_of_line: bool) {
        let start = if self.terminal { "\r\x1b[K" } else { "" };
        let end = if end_of_line { "\n" } else { "" };
        // Progress that cannot be shown is no reason to stop.
        let _ = write!(io::stderr(), "{start}lab: {}{text}{end}", self.step);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if !self.done && self.terminal {
            // The error that follows starts on a line of its own.
            let _ = writeln!(io::stderr());
        }
    }
}
