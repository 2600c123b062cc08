//! The record of an attack: what was counted and measured, which of it breaks a promise, and the report.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::workload::record::{TrafficLog, TrafficRecord, lock};

/// The memory that deploy/ gives the agent, in bytes.
pub(crate) const MAX_MEMORY: u64 = 256 << 20;
/// How long an honest change may take, in seconds. The attackers, the agent, the API server and all clients share one processor.
const MAX_CHANGE: f64 = 10.0;
/// As kubelet waits for an answer, in seconds: `timeoutSeconds` in deploy/.
const MAX_PROBE: f64 = 5.0;
/// How long what was flushed may be gone, in seconds.
const MAX_REPAIR: f64 = 10.0;
/// How long an agent may take from its start until it is ready, in seconds, with all that is hostile there.
const MAX_START: f64 = 60.0;
/// How exactly standstills are measured.
const STALL_INTERVAL: Duration = Duration::from_millis(50);
/// At most this many failed probes are listed with their reasons.
const MAX_FAILED_PROBES_LISTED: u64 = 5;
const MIB: f64 = (1 << 20) as f64;

/// Everything that was counted in an attack.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct AttackRecord {
    pub(crate) seconds: u64,
    pub(crate) seed: u64,
    /// Attacks by kind.
    pub(crate) attacks: BTreeMap<String, u64>,
    /// Flushes by kind: those that took anything, until it was back.
    pub(crate) flushes: BTreeMap<String, Times>,
    /// What honest clients did.
    pub(crate) clients: TrafficRecord,
    /// Changes of honest Services by kind, until the kernel had them.
    pub(crate) changes: BTreeMap<String, Times>,
    /// Starts of the agent, until it was ready.
    pub(crate) starts: Times,
    /// From the deletion of all that was hostile until the kernel had what a fresh start makes.
    pub(crate) recovery: Times,
    /// Questions for /livez that were answered with 200.
    pub(crate) probes: Times,
    /// Those that were not.
    pub(crate) failed_probes: u64,
    /// Times in which the lab stood still: no thread could run. They do not count for the other times.
    pub(crate) stalls: Times,
    /// Bytes, of all lives of the agent.
    pub(crate) peak_memory: u64,
    /// Promises that were broken, other than by a count or a time.
    pub(crate) broken: Vec<String>,
}

/// How often something was done, and how long it took at the most.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Times {
    pub(crate) count: u64,
    /// Seconds.
    pub(crate) longest: f64,
}

impl Times {
    pub(crate) fn add(&mut self, took: Duration) {
        self.count += 1;
        self.longest = self.longest.max(took.as_secs_f64());
    }
}

impl AttackRecord {
    /// Everything that makes the attack a success for the attackers.
    pub(crate) fn failures(&self) -> Vec<String> {
        let mut failures = self.broken.clone();
        failures.extend(self.clients.failures());
        let mut limit = |what: &str, times: &Times, most: f64| {
            if times.longest > most {
                failures.push(format!("{what} took {:.1} s; the limit is {most:.0} s", times.longest));
            }
        };
        for (kind, times) in &self.changes {
            limit(kind, times, MAX_CHANGE);
        }
        for (kind, times) in &self.flushes {
            limit(&format!("the repair after {kind}"), times, MAX_REPAIR);
        }
        limit("an answer of /livez", &self.probes, MAX_PROBE);
        limit("a start of the agent", &self.starts, MAX_START);
        if self.failed_probes > 0 {
            failures.push(format!("{} questions for /livez were not answered with 200", self.failed_probes));
        }
        if self.peak_memory > MAX_MEMORY {
            failures.push(format!(
                "the agent needed {} of memory; the limit is {}",
                mib(self.peak_memory),
                mib(MAX_MEMORY)
            ));
        }
        failures
    }

    /// The report.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        let sum = self.clients.sum();
        let _ = writeln!(
            text,
            "{} minutes, --seed {}: {} honest connections, {} answers, **{} lost**, {} more while something was flushed.\n",
            self.seconds / 60,
            self.seed,
            sum.opened,
            sum.answered,
            sum.lost,
            sum.lost_in_flush
        );
        let _ = writeln!(text, "| Attack | Times |\n|---|--:|");
        for (kind, count) in &self.attacks {
            let _ = writeln!(text, "| {kind} | {count} |");
        }
        let _ = writeln!(text, "\n| Promise | Times | Longest |\n|---|--:|--:|");
        let changes = self.changes.iter().map(|(kind, times)| (kind.clone(), times));
        let flushes = self.flushes.iter().map(|(kind, times)| (format!("repair after {kind}"), times));
        let others = [
            ("start of the agent", &self.starts),
            ("all that was hostile gone", &self.recovery),
            ("answer of /livez", &self.probes),
            ("standstill of the lab", &self.stalls),
        ];
        let others = others.map(|(what, times)| (what.to_owned(), times));
        for (what, times) in changes.chain(flushes).chain(others) {
            let _ = writeln!(text, "| {what} | {} | {:.2} s |", times.count, times.longest);
        }
        let _ = writeln!(text, "| honest answer | {} | {:.2} s |", sum.answered, sum.longest);
        let _ = writeln!(text, "\nThe agent needed at most {} of memory.", mib(self.peak_memory));
        text
    }
}

fn mib(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "memory is not counted to 2^53 bytes")]
    let mib = bytes as f64 / MIB;
    format!("{mib:.1} MiB")
}

/// A record that all threads write to.
#[derive(Debug)]
pub(crate) struct Recorder {
    pub(crate) traffic: TrafficLog,
    record: Mutex<AttackRecord>,
    /// When each standstill of the lab was over, and how long it was.
    stalls: Mutex<Vec<(Instant, Duration)>>,
}

impl Recorder {
    pub(crate) fn new(seconds: u64, seed: u64) -> Self {
        Self {
            traffic: TrafficLog::new(),
            record: Mutex::new(AttackRecord { seconds, seed, ..AttackRecord::default() }),
            stalls: Mutex::default(),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, AttackRecord> {
        lock(&self.record)
    }

    /// All that was counted, with what clients did.
    pub(crate) fn result(&self) -> AttackRecord {
        AttackRecord { clients: self.traffic.lock().clone(), ..self.lock().clone() }
    }

    /// Finds out when the lab stands still, until it is over: its only processor is in a system call that takes long, or this
    /// machine has other work.
    pub(crate) fn watch_stalls(&self, is_over: impl Fn() -> bool) {
        while !is_over() {
            let start = Instant::now();
            thread::sleep(STALL_INTERVAL);
            let late = start.elapsed().saturating_sub(STALL_INTERVAL);
            if late > STALL_INTERVAL {
                lock(&self.stalls).push((Instant::now(), late));
                self.lock().stalls.add(late);
            }
        }
    }

    /// The time since then, but for that in which the lab stood still.
    pub(crate) fn elapsed(&self, since: Instant) -> Duration {
        // The last standstill may not be known yet.
        thread::sleep(STALL_INTERVAL * 2);
        let elapsed = since.elapsed();
        let stalls = lock(&self.stalls);
        let during = stalls.iter().map(|(end, length)| (*length).min(end.saturating_duration_since(since)));
        elapsed.saturating_sub(during.sum::<Duration>()).saturating_sub(STALL_INTERVAL * 2)
    }

    pub(crate) fn attacked(&self, kind: &str) {
        *self.lock().attacks.entry(kind.to_owned()).or_default() += 1;
        self.traffic.note(kind);
    }

    pub(crate) fn changed(&self, kind: &str, since: Instant) {
        let took = self.elapsed(since);
        self.lock().changes.entry(kind.to_owned()).or_default().add(took);
    }

    /// The first are told one by one.
    pub(crate) fn probe_failed(&self, why: &str) {
        let count = {
            let mut record = self.lock();
            record.failed_probes += 1;
            record.failed_probes
        };
        if count <= MAX_FAILED_PROBES_LISTED {
            self.broken(why);
        }
    }

    pub(crate) fn broken(&self, what: &str) {
        let line = format!("{:.1} s: {what}", self.traffic.start.elapsed().as_secs_f64());
        eprintln!("BROKEN at {line}");
        self.lock().broken.push(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_slow_large_or_broken_is_a_failure() {
        let recorder = Recorder::new(60, 1);
        let second = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        recorder.changed("endpoint changed", second(1));
        recorder.lock().peak_memory = MAX_MEMORY;
        assert_eq!(recorder.result().failures(), Vec::<String>::new());
        recorder.changed("endpoint changed", second(11));
        assert_eq!(recorder.result().failures(), ["endpoint changed took 11.0 s; the limit is 10 s"]);
        // Nothing could run for most of the time.
        lock(&recorder.stalls).push((Instant::now(), Duration::from_secs(50)));
        recorder.changed("Service made", second(55));
        assert_eq!(recorder.result().failures().len(), 1);
        recorder.lock().peak_memory += 1;
        recorder.lock().flushes.entry("a flush".into()).or_default().add(Duration::from_secs(60));
        recorder.broken("the agent has ended");
        assert_eq!(recorder.result().failures().len(), 4);
        assert!(recorder.result().text().contains("| endpoint changed | 2 | 11.0"));
    }
}
