//! The agent under measurement: started, read through its log and its metrics, and looked at through /proc.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use rustix::process::{Pid, Signal, kill_process};

use super::load::NODE;

/// How long anything may take. It is for a hang, not for a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);
const METRICS: &str = "127.0.0.1:10249";

/// A line of the log, and when it was read.
pub(crate) struct Line {
    pub(crate) at: Instant,
    pub(crate) text: String,
}

impl Line {
    /// A field with a duration: `took=1.5ms`.
    pub(crate) fn duration(&self, field: &str) -> Option<Duration> {
        parse_duration(field_of(&self.text, field)?)
    }

    pub(crate) fn has(&self, text: &str) -> bool {
        self.text.contains(text)
    }
}

/// The agent, which ends with this value.
pub(crate) struct Agent {
    process: Child,
    pub(crate) started: Instant,
    lines: Receiver<Line>,
    /// The last lines, for whom something goes wrong.
    last: Vec<String>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Agent {
    /// Starts it in the network namespace of this thread.
    pub(crate) fn start(executable: &Path, flags: &[String]) -> Result<Self> {
        Self::spawn(Command::new(executable).args(flags))
    }

    /// Starts a command that is the agent or runs it.
    pub(crate) fn spawn(command: &mut Command) -> Result<Self> {
        let started = Instant::now();
        let mut process = command
            .arg(format!("--hostname-override={NODE}"))
            .args(["--conntrack-max-per-core=0", "--cluster-cidr=10.128.0.0/9"])
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start the agent")?;
        let log = process.stderr.take().context("the agent has no log")?;
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for text in BufReader::new(log).lines().map_while(Result::ok) {
                let at = Instant::now();
                // Some values are quoted.
                if send.send(Line { at, text: text.replace('"', "") }).is_err() {
                    return;
                }
            }
        });
        Ok(Self { process, started, lines, last: Vec::new() })
    }

    pub(crate) fn kill(&mut self) {
        // One that has ended already is as dead.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.process), signal).context("cannot send a signal to the agent")
    }

    /// The next line, whatever it says.
    pub(crate) fn line(&mut self) -> Result<Line> {
        self.next(PATIENCE)
    }

    fn next(&mut self, patience: Duration) -> Result<Line> {
        match self.lines.recv_timeout(patience) {
            Ok(line) => {
                self.last.push(line.text.clone());
                if self.last.len() > 30 {
                    self.last.remove(0);
                }
                Ok(line)
            }
            Err(RecvTimeoutError::Timeout) => {
                bail!("the agent says nothing; its last words:\n{}", self.last.join("\n"))
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the agent has ended:\n{}", self.last.join("\n")),
        }
    }

    /// The next line for which this holds.
    pub(crate) fn until(&mut self, holds: impl Fn(&Line) -> bool) -> Result<Line> {
        loop {
            let line = self.line()?;
            if holds(&line) {
                return Ok(line);
            }
        }
    }

    /// All lines there are by now.
    pub(crate) fn pending(&mut self) -> Vec<Line> {
        self.lines.try_iter().collect()
    }

    /// Its metrics, by name with labels: those of the agent in the network namespace of this thread.
    pub(crate) fn metrics() -> Result<Metrics> {
        let mut stream = TcpStream::connect(METRICS).context("cannot connect to the agent's metrics")?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("cannot read the agent's metrics")?;
        let lines = answer.lines().filter(|line| !line.starts_with('#'));
        let values = lines.filter_map(|line| line.rsplit_once(' '));
        Ok(Metrics(values.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect()))
    }

    /// What it has of memory and processor time.
    pub(crate) fn usage(&self) -> Result<Usage> {
        usage(self.process.id())
    }
}

/// Values by name with labels.
#[derive(Clone, Debug)]
pub(crate) struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    pub(crate) fn get(&self, name: &str) -> f64 {
        self.0.get(name).copied().unwrap_or(0.0)
    }

    /// The sum over all labels.
    pub(crate) fn sum(&self, name: &str) -> f64 {
        let with_labels = |key: &str| key == name || key.strip_prefix(name).is_some_and(|rest| rest.starts_with('{'));
        self.0.iter().filter(|(key, _)| with_labels(key)).map(|(_, value)| value).sum()
    }
}

/// Memory and processor time of a process.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// Bytes now.
    pub(crate) resident: u64,
    /// Bytes at the most.
    pub(crate) peak: u64,
    /// Of all its threads.
    pub(crate) cpu: Duration,
}

pub(crate) fn usage(pid: u32) -> Result<Usage> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("cannot read the agent's status")?;
    let kib = |field: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    };
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("cannot read the agent's stat")?;
    // After the name, which may have anything in it: field 3 and following; 14 and 15 are times in hundredths of seconds.
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let ticks: u64 = [11, 12].iter().filter_map(|place| fields.get(*place)?.parse::<u64>().ok()).sum();
    Ok(Usage { resident: kib("VmRSS:") << 10, peak: kib("VmHWM:") << 10, cpu: Duration::from_millis(ticks * 10) })
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
