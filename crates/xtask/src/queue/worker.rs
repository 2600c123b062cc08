//! `cargo xtask guest-worker`, which people do not call: takes tasks from the queue inside the lab until none is left.
//!
//! The guests of a run share a directory of this machine. To take a task is to create a directory with its number: the file
//! system of this machine lets only one of them do so.

use std::fmt::Write as _;
use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use serde_json::Value;

use super::Queue;
use super::task::{Action, Outcome, Task};
use crate::{conformance, dataplane};

/// A task that takes longer hangs.
const TIME_LIMIT: Duration = Duration::from_secs(600);

/// Does tasks of a queue inside the lab.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many at a time
    at_once: usize,
    /// The directory of the queue
    dir: PathBuf,
}

/// The list of tasks, in a queue's directory.
pub(super) fn list(dir: &Path) -> PathBuf {
    dir.join("tasks.json")
}

/// Where it shows which tasks are taken.
pub(super) fn claimed_tasks(dir: &Path) -> PathBuf {
    dir.join("taken")
}

/// What shows that a guest does the tasks which need a kernel alone.
fn alone(dir: &Path) -> PathBuf {
    dir.join("alone")
}

/// Where outcomes are put.
pub(super) fn finished_tasks(dir: &Path) -> PathBuf {
    dir.join("outcomes")
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let text = fs::read(list(&args.dir)).context("cannot read the list of tasks")?;
    let Queue { tasks, alone, order } = serde_json::from_slice(&text).context("cannot understand the list of tasks")?;
    let take = |index: usize| -> Result<()> {
        let task = tasks.get(index).context("the list of tasks has no such task")?;
        if claim(&claimed_tasks(&args.dir).join(index.to_string()))? {
            put(&args.dir, &perform(index, task))?;
        }
        Ok(())
    };
    if !alone.is_empty() && claim(&self::alone(&args.dir))? {
        alone.into_iter().try_for_each(take)?;
    }
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        while let Some(&index) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            take(index)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..args.at_once).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| {
            worker.join().unwrap_or_else(|_| anyhow::bail!("a worker of the queue panicked; see above"))
        })
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Creates a directory that no other guest has created: whoever succeeds has what it stands for.
fn claim(directory: &Path) -> Result<bool> {
    match fs::create_dir(directory) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot create {}", directory.display())),
    }
}

/// Puts an outcome where this machine looks for it, whole or not at all.
fn put(dir: &Path, outcome: &Outcome) -> Result<()> {
    let path = finished_tasks(dir).join(format!("{}.json", outcome.index));
    let unfinished = path.with_extension("new");
    fs::write(&unfinished, serde_json::to_vec(outcome)?)
        .and_then(|()| fs::rename(&unfinished, &path))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn perform(index: usize, task: &Task) -> Outcome {
    let started = Instant::now();
    let result = match &task.action {
        Action::Test { executable, package_dir } => run_test(executable, package_dir, &task.name),
        Action::Conformance(case) => conformance::run_guest(case),
        Action::DataPlane(share) => dataplane::run_guest(share),
    };
    let seconds = started.elapsed().as_secs_f32();
    match result {
        Ok(Done { passed, output, value }) => Outcome { index, passed, seconds, output, value },
        Err(error) => {
            Outcome { index, passed: false, seconds, output: format!("error: {error:#}\n"), value: Value::Null }
        }
    }
}

/// What came of a task that was done to its end.
pub(crate) struct Done {
    pub(crate) passed: bool,
    pub(crate) output: String,
    pub(crate) value: Value,
}

/// Runs one test in a process of its own.
fn run_test(executable: &Path, package_dir: &Path, name: &str) -> Result<Done> {
    let mut command = Command::new(executable);
    command.args(["--exact", name, "--include-ignored", "--test-threads=1"]);
    command.current_dir(package_dir).env("CARGO_MANIFEST_DIR", package_dir);
    // Whatever has become of its name: for tests that make containers.
    command.env("KUBE_IPVS_XTASK", format!("/proc/{}/exe", std::process::id()));
    let (output, passed) = run_to_end(&mut command, TIME_LIMIT)?;
    // A name that no test has passes with `0 passed`.
    let has_run = output.contains("test result: ok. 1 passed");
    Ok(Done { passed: passed && has_run, output, value: Value::Null })
}

/// Runs a command with what it starts, and kills all of it at the limit. Returns its output, and whether it succeeded.
pub(crate) fn run_to_end(command: &mut Command, limit: Duration) -> Result<(String, bool)> {
    let program = command.get_program().to_string_lossy().into_owned();
    let (mut reader, writer) = std::io::pipe().context("cannot create a pipe")?;
    let errors = writer.try_clone().context("cannot duplicate a pipe")?;
    command.stdin(Stdio::null()).stdout(writer).stderr(errors).process_group(0);
    let mut child = command.spawn().with_context(|| format!("cannot run {program}"))?;
    // The command holds the other ends of the pipe, without which reading would never end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let group = Pid::from_child(&child);
    let (send, ended) = mpsc::channel();
    let (output, is_hung) = std::thread::scope(|scope| {
        scope.spawn(move || {
            // The process stays as it ended, so that its number, which is also the group's, is not given to another.
            let _ = waitid(WaitId::Pid(group), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
            let _ = send.send(());
            // What it started and did not end would hold the pipe.
            let _ = kill_process_group(group, Signal::KILL);
        });
        let watching = scope.spawn(move || {
            let is_hung = ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if is_hung {
                let _ = kill_process_group(group, Signal::KILL);
            }
            is_hung
        });
        let mut output = Vec::new();
        let read = reader.read_to_end(&mut output).with_context(|| format!("cannot read the output of {program}"));
        (read.map(|_| String::from_utf8_lossy(&output).into_owned()), watching.join().unwrap_or(false))
    });
    let status = child.wait().with_context(|| format!("cannot wait for {program}"))?;
    let mut output = output?;
    if is_hung {
        writeln!(output, "\nerror: killed after {} s: it hangs", limit.as_secs())?;
    } else if !status.success() {
        writeln!(output, "\nerror: {program}: {status}")?;
    }
    Ok((output, status.success()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_and_status_of_a_command_come_back() {
        let (output, passed) = run_to_end(&mut shell("echo out; echo err >&2"), TIME_LIMIT).unwrap();
        assert_eq!((output.as_str(), passed), ("out\nerr\n", true));
        let (output, passed) = run_to_end(&mut shell("echo out; exit 3"), TIME_LIMIT).unwrap();
        assert!(output.starts_with("out\n") && output.contains("exit status: 3") && !passed, "{output}");
    }

    #[test]
    fn a_command_that_hangs_is_killed_with_all_it_started() {
        let (output, passed) =
            run_to_end(&mut shell("echo begun; sleep 600 & sleep 600"), Duration::from_millis(200)).unwrap();
        assert!(output.starts_with("begun\n") && output.contains("it hangs") && !passed, "{output}");
    }

    #[test]
    fn what_a_command_leaves_running_does_not_hold_its_end() {
        let (output, passed) = run_to_end(&mut shell("sleep 600 & echo done"), TIME_LIMIT).unwrap();
        assert_eq!((output.as_str(), passed), ("done\n", true));
    }

    #[test]
    fn a_test_that_does_not_exist_has_not_passed() {
        let executable = std::env::current_exe().unwrap();
        let done = run_test(&executable, Path::new("/"), "no::such::test").unwrap();
        assert!(!done.passed, "{}", done.output);
    }
}
