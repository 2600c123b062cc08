//! The agent under measurement: started, read through its log and its metrics, and looked at through /proc.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lab::agent::Usage;
use rustix::process::Signal;

use super::load::NODE;

/// A line of the log, and when it was read.
pub(crate) struct Line {
    pub(crate) at: Instant,
    pub(crate) text: String,
}

impl Line {
    /// Some values are quoted.
    fn of(line: &lab::agent::Line) -> Self {
        Self { at: line.at, text: line.text.replace('"', "") }
    }

    /// A field with a duration: `took=1.5ms`.
    pub(crate) fn duration(&self, field: &str) -> Option<Duration> {
        parse_duration(field_of(&self.text, field)?)
    }

    pub(crate) fn has(&self, text: &str) -> bool {
        self.text.contains(text)
    }
}

/// The agent, whose log is read line by line. It ends with this value.
pub(crate) struct Agent {
    process: lab::agent::Agent,
    pub(crate) started: Instant,
    /// The number of the next line.
    next: usize,
}

impl Agent {
    /// Starts it in the network namespace of this thread.
    pub(crate) fn start(executable: &Path, flags: &[String]) -> Result<Self> {
        Self::spawn(Command::new(executable).args(flags))
    }

    /// Starts a command that is the agent or runs it.
    pub(crate) fn spawn(command: &mut Command) -> Result<Self> {
        let process = lab::agent::Agent::spawn(as_of_node(command))?;
        Ok(Self { started: process.started(), process, next: 0 })
    }

    /// Lets it sync once, in the network namespace of this thread.
    pub(crate) fn run_once(executable: &Path, flags: &[String]) -> Result<()> {
        let mut command = Command::new(executable);
        let output = as_of_node(command.args(flags).arg("--once")).output().context("cannot start the agent")?;
        if !output.status.success() {
            bail!("a fresh start fails: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    /// Whether it has ended by itself.
    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        Ok(self.process.exit_status()?.is_some())
    }

    /// All it has written so far.
    pub(crate) fn log(&self) -> String {
        self.process.log()
    }

    /// The end of that, for messages.
    pub(crate) fn last_lines(&self) -> String {
        self.process.last_lines()
    }

    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        Ok(self.process.signal(signal)?)
    }

    /// The next line, whatever it says.
    pub(crate) fn line(&mut self) -> Result<Line> {
        self.until(|_| true)
    }

    /// The next line for which this holds.
    pub(crate) fn until(&mut self, holds: impl Fn(&Line) -> bool) -> Result<Line> {
        let (line, next) = self.process.wait_for_line(self.next, "log the next line", |line| holds(&Line::of(line)))?;
        self.next = next;
        Ok(Line::of(&line))
    }

    /// All lines there are by now.
    pub(crate) fn pending(&mut self) -> Vec<Line> {
        let lines = self.process.lines_from(self.next);
        self.next += lines.len();
        lines.iter().map(Line::of).collect()
    }

    /// What it has of memory and processor time.
    pub(crate) fn usage(&self) -> Result<Usage> {
        Ok(self.process.usage()?)
    }
}

/// The flags that every agent here has.
fn as_of_node(command: &mut Command) -> &mut Command {
    command.arg(format!("--hostname-override={NODE}"));
    command.args(["--conntrack-max-per-core=0", "--cluster-cidr=10.128.0.0/9"])
}

fn field_of<'a>(line: &'a str, field: &str) -> Option<&'a str> {
    line.split_whitespace().find_map(|word| word.strip_prefix(field)?.strip_prefix('='))
}

/// As `Debug` writes them.
fn parse_duration(text: &str) -> Option<Duration> {
    let unit = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(unit);
    let scale = match unit {
        "ns" => 1e-9,
        "µs" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        _ => return None,
    };
    Some(Duration::from_secs_f64(number.parse::<f64>().ok()? * scale))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_found_in_a_line_of_the_log() {
        let line = Line { at: Instant::now(), text: "INFO synced real_servers=+1 took=1.5ms latency=250.25µs".into() };
        assert_eq!(line.duration("took"), Some(Duration::from_micros(1500)));
        assert_eq!(line.duration("latency"), Some(Duration::from_nanos(250_250)));
        assert_eq!(line.duration("total"), None);
        assert_eq!(parse_duration("2s"), Some(Duration::from_secs(2)));
        assert_eq!(parse_duration("2min"), None);
    }
}
