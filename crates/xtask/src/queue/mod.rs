//! One queue for all that runs in the lab: tests, recorded runs of kube-proxy, traffic.
//!
//! A guest has one processor and most tasks wait for something, so each of as many guests as this machine has processors does
//! several tasks at a time. The longest start first. A task that fails, hangs, or takes its guest down fails alone, apart
//! from those that were under way in the same guest.

pub(crate) mod task;
mod times;
pub(crate) mod worker;

use std::collections::BTreeMap;
use std::fs;
use std::io::{IsTerminal, Write as _, stderr};
use std::num::NonZero;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lab::{Job, Location, Scratch};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use task::{Finished, Outcome, Task};
use times::Times;

/// How many tasks a guest does at a time: more of them only make each other wait for its one processor.
const AT_ONCE: usize = 6;

/// The memory of a guest. What is not touched costs nothing.
const MEMORY_MIB: u32 = 4096;

/// No run takes this long: each task has a limit of its own.
const TIME_LIMIT: Duration = Duration::from_secs(4 * 3600);

/// How to do a list of tasks.
#[derive(Debug, Default)]
pub(crate) struct Options {
    /// What tests find in their environment.
    pub(crate) env: Vec<(String, String)>,
    /// How many tasks a guest does at a time, if not [`AT_ONCE`].
    pub(crate) at_once: Option<usize>,
    /// Whether to record how long each task took.
    pub(crate) record_times: bool,
}

/// What the workers read.
#[derive(Debug, Serialize, Deserialize)]
struct Queue {
    tasks: Vec<Task>,
    /// The places of tasks that one guest does one by one before any other.
    alone: Vec<usize>,
    /// The places of all others, in the order in which they are taken.
    order: Vec<usize>,
}

/// Does all tasks in the lab and returns them with what came of each, in the order of the list.
pub(crate) fn run(tasks: Vec<Task>, options: &Options) -> Result<Vec<Finished>> {
    let dir = Scratch::new()?;
    for subdirectory in [worker::claimed_tasks(dir.path()), worker::finished_tasks(dir.path())] {
        fs::create_dir(&subdirectory).with_context(|| format!("cannot create {}", subdirectory.display()))?;
    }
    let (alone, order) = Times::read().order(&tasks).into_iter().partition(|index| tasks[*index].needs_kernel_alone());
    let queue = Queue { tasks, alone, order };
    fs::write(worker::list(dir.path()), serde_json::to_vec(&queue)?).context("cannot write the list of tasks")?;
    let tasks = queue.tasks;
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    let at_once = options.at_once.unwrap_or(AT_ONCE);
    let (guests, at_once) = match lab::prepare().context("cannot make the lab ready")? {
        Location::Guest => (processors.min(tasks.len()), at_once),
        // One kernel, which has all processors.
        Location::Host => (1, at_once * processors),
    };
    let mut monitor = Monitor::new(dir.path(), &tasks);
    let failures = std::thread::scope(|scope| {
        let guests: Vec<_> = (0..guests).map(|_| scope.spawn(|| boot(dir.path(), at_once, &options.env))).collect();
        while !guests.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            monitor.collect();
            std::thread::sleep(Duration::from_millis(100));
        }
        let ended = guests.into_iter().map(|guest| guest.join().unwrap_or_else(|_| anyhow::bail!("a thread panicked")));
        ended.filter_map(Result::err).map(|error| format!("{error:#}")).collect::<Vec<_>>()
    });
    monitor.collect();
    let mut outcomes = monitor.end();
    for failure in &failures {
        eprintln!("error: {failure}");
    }
    let finished: Vec<Finished> = (0..)
        .zip(tasks)
        .map(|(index, task)| {
            let outcome = outcomes.remove(&index).unwrap_or_else(|| not_done(index, &failures));
            Finished { task, outcome }
        })
        .collect();
    if options.record_times {
        Times::record(&finished)?;
    }
    Ok(finished)
}

/// Boots a guest, which does tasks until none is left.
fn boot(dir: &Path, at_once: usize, env: &[(String, String)]) -> Result<()> {
    let job = Job::this_executable().arg("guest-worker").arg(at_once.to_string()).arg(dir).writable(dir);
    let job = env.iter().fold(job, |job, (name, value)| job.env(name, value));
    let status = lab::run(&job.memory_mib(MEMORY_MIB).time_limit(TIME_LIMIT))?;
    anyhow::ensure!(status.success(), "a guest's worker ended with exit code {}", status.code());
    Ok(())
}

fn not_done(index: usize, failures: &[String]) -> Outcome {
    let output = format!("not done to its end: {}\n", failures.join("; "));
    Outcome { index, passed: false, seconds: 0.0, output, value: Value::Null }
}

/// Prints the tasks that took longest.
pub(crate) fn print_slowest(finished: &[Finished], count: usize) {
    let mut by_time: Vec<&Finished> = finished.iter().collect();
    by_time.sort_by(|a, b| b.outcome.seconds.total_cmp(&a.outcome.seconds));
    eprintln!("\nthe slowest:");
    for Finished { task, outcome } in by_time.into_iter().take(count) {
        eprintln!("  {:6.1} s  {}", outcome.seconds, task.key());
    }
}

/// Shows what has been done, and keeps it.
struct Monitor<'a> {
    dir: &'a Path,
    tasks: &'a [Task],
    outcomes: BTreeMap<usize, Outcome>,
    failed: usize,
    started: Instant,
    is_terminal: bool,
}

impl<'a> Monitor<'a> {
    fn new(dir: &'a Path, tasks: &'a [Task]) -> Self {
        let is_terminal = stderr().is_terminal();
        Self { dir, tasks, outcomes: BTreeMap::new(), failed: 0, started: Instant::now(), is_terminal }
    }

    /// Takes in the outcomes that came since the last call. An outcome that cannot be read counts as none.
    fn collect(&mut self) {
        for entry in fs::read_dir(worker::finished_tasks(self.dir)).into_iter().flatten().flatten() {
            let path = entry.path();
            let index = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
            let Some(index) = index.filter(|index| !self.outcomes.contains_key(index)) else { continue };
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let outcome = fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Outcome>(&text).ok());
            let (Some(outcome), Some(task)) = (outcome, self.tasks.get(index)) else { continue };
            self.show(task, &outcome);
            self.outcomes.insert(index, outcome);
        }
        self.show_progress();
    }

    fn show(&mut self, task: &Task, outcome: &Outcome) {
        self.clear();
        let word = if outcome.passed { "ok    " } else { "FAILED" };
        eprintln!("{word} {:6.1} s  {}", outcome.seconds, task.key());
        if !outcome.passed {
            self.failed += 1;
            eprintln!("{}", outcome.output);
        }
    }

    /// One line that is overwritten, for whoever looks.
    fn show_progress(&self) {
        if !self.is_terminal {
            return;
        }
        let taken = fs::read_dir(worker::claimed_tasks(self.dir)).map_or(0, Iterator::count);
        let (done, all) = (self.outcomes.len(), self.tasks.len());
        let under_way = taken.saturating_sub(done);
        let failed = if self.failed > 0 { format!(", {} FAILED", self.failed) } else { String::new() };
        let elapsed = self.started.elapsed().as_secs();
        eprint!("\r\x1b[K{done} of {all} done, {under_way} under way{failed}, {elapsed} s");
        let _ = stderr().flush();
    }

    fn clear(&self) {
        if self.is_terminal {
            eprint!("\r\x1b[K");
        }
    }

    fn end(self) -> BTreeMap<usize, Outcome> {
        self.clear();
        self.outcomes
    }
}
