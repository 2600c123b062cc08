//! The tests that run on this machine: those of every executable that are not ignored, those of the documentation, and those
//! that boot guests.

use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::Counts;
use crate::cargo::{self, TestExecutable};
use crate::queue::worker::run_to_end;

/// The target with the tests of the lab itself, which boot guests.
pub(super) const BOOT: &str = "boot";

/// How many executables run at a time.
const AT_ONCE: usize = 2;

/// How many tests of an executable run at a time: many wait.
const THREADS: &str = "--test-threads=8";

/// What takes longer hangs.
const TIME_LIMIT: Duration = Duration::from_secs(1200);

/// What came of all of them.
pub(super) struct Results {
    pub(super) counts: Counts,
    pub(super) boot: Counts,
}

struct Run<'a> {
    name: &'a str,
    command: Command,
    is_boot: bool,
}

/// Runs all, some at a time, and prints the output of those that fail.
pub(super) fn run(executables: &[TestExecutable], boots: bool, filter: Option<&str>) -> Result<Results> {
    let mut runs = vec![Run { name: "documentation", command: documentation(filter), is_boot: false }];
    for executable in executables {
        let run = |arguments: &[&str], is_boot| {
            let mut command = Command::new(&executable.path);
            command.args(arguments).args(filter);
            command.current_dir(&executable.package_dir).env("CARGO_MANIFEST_DIR", &executable.package_dir);
            Run { name: &executable.target, command, is_boot }
        };
        runs.push(run(&[THREADS], false));
        if boots && executable.target == BOOT {
            runs.push(run(&["--ignored"], true));
        }
    }
    let queue = Mutex::new(runs);
    let totals = Mutex::new(Results { counts: Counts::default(), boot: Counts::default() });
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(|| work(&queue, &totals))).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(|_| anyhow::bail!("a thread panicked")))
    })?;
    Ok(totals.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

fn documentation(filter: Option<&str>) -> Command {
    let mut command = cargo::cargo();
    command.args(["test", "--workspace", cargo::FEATURES, "--doc", "--no-fail-fast", "--quiet"]).args(filter);
    command
}

fn work(queue: &Mutex<Vec<Run<'_>>>, totals: &Mutex<Results>) -> Result<()> {
    loop {
        let Some(mut run) = queue.lock().ok().and_then(|mut queue| queue.pop()) else { return Ok(()) };
        let started = Instant::now();
        let (output, success) = run_to_end(&mut run.command, TIME_LIMIT)?;
        let mut counts = count(&output);
        if !success && counts.failed == 0 {
            counts.failed = 1;
        }
        if counts.failed > 0 {
            eprintln!("{output}");
        }
        let word = if counts.failed == 0 { "ok    " } else { "FAILED" };
        let (name, seconds) = (run.name, started.elapsed().as_secs_f32());
        eprintln!("{word} {seconds:6.1} s  on this machine: {name}, {} tests", counts.passed + counts.failed);
        if let Ok(mut totals) = totals.lock() {
            if run.is_boot { totals.boot.add(counts) } else { totals.counts.add(counts) }
        }
    }
}

/// Adds up the results that the test harness prints.
fn count(output: &str) -> Counts {
    let mut total = Counts::default();
    output.lines().filter_map(parse_result).for_each(|counts| total.add(counts));
    total
}

/// Understands `test result: ok. 3 passed; 0 failed; ...`.
fn parse_result(line: &str) -> Option<Counts> {
    let (_, result) = line.split_once("test result: ")?;
    let number = |word: &str| result.split(word).next()?.rsplit(' ').next()?.parse().ok();
    Some(Counts { passed: number(" passed;")?, failed: number(" failed;")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_all_test_harnesses_are_added_up() {
        let output = "\
test result: FAILED. 3 passed; 12 failed; 1 ignored; 0 measured; 5 filtered out; finished in 0.00s
test guest::passed ... ok
test result: nonsense
test result: ok. 7 passed; 0 failed; 1 ignored; 0 measured
";
        assert_eq!(count(output), Counts { passed: 10, failed: 12 });
    }
}
