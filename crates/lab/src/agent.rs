//! The agent as a child process: its log as it comes, its end, and what it uses.

use std::collections::VecDeque;
use std::fmt::Display;
use std::fs;
use std::io::{BufRead, BufReader, PipeReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};

use crate::error::{Context, Error, Result};
use crate::process;
use crate::wait::{LIMIT, Pauses};

/// How long an agent may go on with its work, as its log shows, without what is waited for.
const LIMIT_WITH_PROGRESS: Duration = Duration::from_secs(300);

/// A line of the log.
#[derive(Clone, Debug)]
pub struct Line {
    /// When it was read.
    pub at: Instant,
    /// What it says.
    pub text: String,
}

/// The agent. It is killed when this value is dropped.
#[derive(Debug)]
pub struct Agent {
    process: Child,
    started: Instant,
    log: Arc<Log>,
    status: Option<ExitStatus>,
}

/// What the agent has written to its standard output and error.
#[derive(Debug, Default)]
struct Log {
    state: Mutex<LogState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct LogState {
    lines: Vec<Line>,
    is_complete: bool,
}

impl Log {
    fn state(&self) -> MutexGuard<'_, LogState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, from: PipeReader) {
        let mut from = BufReader::new(from);
        let mut bytes = Vec::new();
        while from.read_until(b'\n', &mut bytes).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(bytes.strip_suffix(b"\n").unwrap_or(&bytes)).into_owned();
            self.state().lines.push(Line { at: Instant::now(), text });
            self.changed.notify_all();
            bytes.clear();
        }
        self.state().is_complete = true;
        self.changed.notify_all();
    }

    /// Waits until there are more lines than `known`, the log is complete, or the time is up; returns how many there are.
    fn wait(&self, known: usize, timeout: Duration) -> usize {
        let waits = |state: &mut LogState| state.lines.len() == known && !state.is_complete;
        let waited = self.changed.wait_timeout_while(self.state(), timeout, waits);
        waited.unwrap_or_else(PoisonError::into_inner).0.lines.len()
    }
}

impl Agent {
    /// Starts a command that is the agent, or becomes it, in the network namespace of this thread.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let (reader, writer) = std::io::pipe().context("create", "a pipe")?;
        let second = writer.try_clone().context("duplicate", "a pipe")?;
        let started = Instant::now();
        command.env("NO_COLOR", "1").stdin(Stdio::null()).stdout(writer).stderr(second);
        let spawned = command.spawn().context("run", program);
        // The command holds the other end of the pipe, without which reading it would never end.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let log = Arc::<Log>::default();
        let thread = std::thread::Builder::new().name("log".into());
        let into = Arc::clone(&log);
        let mut agent = Self { process: spawned?, started, log, status: None };
        if let Err(error) = thread.spawn(move || into.read(reader)) {
            agent.kill();
            return Err(error).context("start", "a thread");
        }
        Ok(agent)
    }

    /// The process.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// When it was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// All it has written so far.
    pub fn log(&self) -> String {
        self.log.state().lines.iter().flat_map(|line| [line.text.as_str(), "\n"]).collect()
    }

    /// The end of the log, for messages.
    pub fn last_lines(&self) -> String {
        let mut last = VecDeque::new();
        for line in self.log.state().lines.iter().rev().take(40) {
            last.push_front(line.text.clone());
        }
        last.into_iter().collect::<Vec<_>>().join("\n")
    }

    /// How many lines it has written so far.
    pub fn line_count(&self) -> usize {
        self.log.state().lines.len()
    }

    /// The lines it has written so far, but for the first ones.
    pub fn lines_from(&self, first: usize) -> Vec<Line> {
        self.log.state().lines.iter().skip(first).cloned().collect()
    }

    /// Waits until the log has a text.
    pub fn wait_for_log(&mut self, text: &str) -> Result<()> {
        self.wait_for_line(0, format_args!("log {text:?}"), |line| line.text.contains(text)).map(drop)
    }

    /// Waits for the first line at or after `from` for which this holds; returns it and the number of the next line.
    pub fn wait_for_line(
        &mut self,
        from: usize,
        what: impl Display,
        holds: impl Fn(&Line) -> bool,
    ) -> Result<(Line, usize)> {
        let (mut next, mut found) = (from, None);
        self.until(what, |agent| {
            let state = agent.log.state();
            for line in &state.lines[next.min(state.lines.len())..] {
                next += 1;
                if holds(line) {
                    found = Some(line.clone());
                    break;
                }
            }
            found.is_some()
        })?;
        found.map(|line| (line, next)).ok_or_else(|| Error::Usage("the log has no such line".into()))
    }

    /// Waits until a condition holds. It is checked when the agent has logged something, and now and then. What is waited for
    /// completes the sentence "the agent did not ..." in the error.
    pub fn until(&mut self, what: impl Display, mut holds: impl FnMut(&mut Self) -> bool) -> Result<()> {
        self.try_until(what, |agent| Ok(holds(agent)))
    }

    /// The same, with a condition that can fail: its first error ends the wait.
    pub fn try_until<E: From<Error>>(
        &mut self,
        what: impl Display,
        mut holds: impl FnMut(&mut Self) -> Result<bool, E>,
    ) -> Result<(), E> {
        let start = Instant::now();
        let mut progress = start;
        let mut pauses = Pauses::default();
        loop {
            // What is logged or ends after this is an event that has not been looked at.
            let known = self.line_count();
            let ended = self.exit_status()?;
            if holds(self)? {
                return Ok(());
            }
            let is_hung = progress.elapsed() > LIMIT || start.elapsed() > LIMIT_WITH_PROGRESS;
            if ended.is_some() || is_hung {
                let how = match ended {
                    Some(status) => format!("it ended ({status})"),
                    None => format!("{:.0} s have passed", start.elapsed().as_secs_f32()),
                };
                return Err(Error::Agent { what: what.to_string(), how, log: self.last_lines() }.into());
            }
            if self.log.wait(known, pauses.next()) > known {
                progress = Instant::now();
                pauses = Pauses::default();
            }
        }
    }

    /// How it ended, if it has.
    pub fn exit_status(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.process.try_wait().context("wait for", "the agent")?;
            if self.status.is_some() {
                self.complete_log();
            }
        }
        Ok(self.status)
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        let Some(status) = process::wait(&mut self.process, Some(LIMIT_WITH_PROGRESS))? else {
            let how = format!("{} s have passed", LIMIT_WITH_PROGRESS.as_secs());
            return Err(Error::Agent { what: "end".into(), how, log: self.last_lines() });
        };
        self.status = Some(status);
        self.complete_log();
        Ok(status)
    }

    /// Waits for the rest of what it wrote. A process it left behind may hold the pipe: that one is not waited for.
    fn complete_log(&self) {
        let state = self.log.state();
        let waited = self.log.changed.wait_timeout_while(state, Duration::from_secs(5), |state| !state.is_complete);
        drop(waited);
    }

    /// SIGKILL: it cannot put anything in order.
    pub fn kill(&mut self) {
        if self.status.is_none() {
            // One that has ended by itself is as dead.
            let _ = self.process.kill();
            self.status = self.process.wait().ok();
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if self.status.is_some() {
            // Its number may be that of another process by now.
            return Err(Error::Usage("the agent has ended and takes no signal".into()));
        }
        kill_process(process::pid(&self.process), signal).context("send a signal to", "the agent")
    }

    /// SIGTERM: it stops by itself.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// Stops it, does something, and lets it go on.
    pub fn stop_while<T>(&self, action: impl FnOnce() -> T) -> Result<T> {
        self.signal(Signal::STOP)?;
        let result = action();
        self.signal(Signal::CONT)?;
        Ok(result)
    }

    /// What it has of memory and processor time.
    pub fn usage(&self) -> Result<Usage> {
        usage(self.id())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Memory and processor time of a process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Bytes of memory now.
    pub resident: u64,
    /// Bytes of memory at the most.
    pub peak: u64,
    /// Processor time of all its threads.
    pub cpu: Duration,
}

/// What a process has of memory and processor time.
pub fn usage(pid: u32) -> Result<Usage> {
    let read = |name: &str| {
        let path = format!("/proc/{pid}/{name}");
        fs::read_to_string(&path).context("read", path)
    };
    let status = read("status")?;
    let kib = |field: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    };
    let stat = read("stat")?;
    // After the name, which may have anything in it: field 3 and following; 14 and 15 are times in hundredths of seconds.
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let ticks: u64 = [11, 12].iter().filter_map(|place| fields.get(*place)?.parse::<u64>().ok()).sum();
    Ok(Usage { resident: kib("VmRSS:") << 10, peak: kib("VmHWM:") << 10, cpu: Duration::from_millis(ticks * 10) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Agent {
        Agent::spawn(Command::new("sh").args(["-c", script])).unwrap()
    }

    #[test]
    fn both_outputs_are_the_log_and_complete_when_the_process_has_ended() {
        let mut agent = shell("echo one; echo two >&2; printf three; exit 7");
        assert_eq!(agent.wait().unwrap().code(), Some(7));
        assert_eq!(agent.log(), "one\ntwo\nthree\n");
        assert_eq!(agent.lines_from(2)[0].text, "three");
    }

    #[test]
    fn a_line_that_is_logged_ends_the_wait() {
        let mut agent = shell("echo one; echo two; sleep 1000");
        let (_, next) = agent.wait_for_line(0, "log one", |line| line.text == "one").unwrap();
        agent.wait_for_line(next, "log two", |line| line.text == "two").unwrap();
        agent.wait_for_log("one").unwrap();
        assert_eq!(agent.exit_status().unwrap(), None);
    }

    #[test]
    fn an_agent_that_ends_is_not_waited_for_and_its_log_is_in_the_error() {
        let mut agent = shell("echo nothing works; exit 1");
        let error = agent.until("serve", |_| false).unwrap_err().to_string();
        assert!(error.contains("did not serve") && error.contains("exit status: 1"), "{error}");
        assert!(error.contains("nothing works"), "{error}");
        assert!(agent.terminate().is_err());
    }

    #[test]
    fn what_a_process_uses_is_read() {
        let usage = usage(std::process::id()).unwrap();
        assert!(usage.peak >= usage.resident && usage.resident > 1 << 20, "{usage:?}");
    }
}
