//! `cargo xtask guest-tests`, which people do not call: runs test executables one after the other, inside the lab, so
//! that one boot is enough for all.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// Tests wait more than they compute, so a few at a time go faster even on one processor.
const AT_ONCE: &str = "--test-threads=4";

/// Runs the ignored tests of several executables inside the lab.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A directory with the list, where the results are written too
    dir: PathBuf,
}

/// What to run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct List {
    pub(crate) suites: Vec<Suite>,
    pub(crate) filter: Option<String>,
}

/// The ignored tests of one executable.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Suite {
    pub(crate) executable: PathBuf,
    pub(crate) package_dir: PathBuf,
    /// How many tests it is known to have that match the filter.
    pub(crate) expected: u32,
}

/// How many tests passed and failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
}

impl Counts {
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

impl List {
    fn path(dir: &Path) -> PathBuf {
        dir.join("list.json")
    }

    /// Leaves the list where [`run`] looks for it.
    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        fs::write(Self::path(dir), serde_json::to_vec(self)?).context("cannot write the list of tests")
    }
}

impl Counts {
    fn path(dir: &Path) -> PathBuf {
        dir.join("results.json")
    }

    /// What [`run`] found.
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        let text = fs::read(Self::path(dir)).context("the lab left no results")?;
        serde_json::from_slice(&text).context("cannot understand the results of the lab")
    }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let list = fs::read(List::path(&args.dir)).context("cannot read the list of tests")?;
    let list: List = serde_json::from_slice(&list).context("cannot understand the list of tests")?;
    let mut total = Counts::default();
    for suite in &list.suites {
        total.add(run_suite(suite, list.filter.as_deref())?);
    }
    fs::write(Counts::path(&args.dir), serde_json::to_vec(&total)?).context("cannot write the results")?;
    Ok(if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the ignored tests of one executable. Those that do not even get to run count as failed.
pub(crate) fn run_suite(suite: &Suite, filter: Option<&str>) -> Result<Counts> {
    let name = suite.executable.file_name().unwrap_or_default().to_string_lossy();
    println!("\n     Running {name} in {}", suite.package_dir.display());
    let mut command = Command::new(&suite.executable);
    command.args(["--ignored", AT_ONCE]).args(filter);
    command.current_dir(&suite.package_dir).env("CARGO_MANIFEST_DIR", &suite.package_dir);
    // Whatever has become of its name: for tests that make containers.
    command.env("KUBE_IPVS_XTASK", format!("/proc/{}/exe", std::process::id()));
    let (mut counts, success) = run_counting(&mut command)?;
    let unaccounted = suite.expected.saturating_sub(counts.passed + counts.failed);
    if unaccounted > 0 {
        println!("error: {unaccounted} of {} tests of {name} did not run to their end", suite.expected);
        counts.failed += unaccounted;
    } else if !success && counts.failed == 0 {
        println!("error: {name} failed although its tests passed");
        counts.failed += 1;
    }
    Ok(counts)
}

/// Runs something that prints results of tests, passes its output on, and counts; also says whether it succeeded.
pub(crate) fn run_counting(command: &mut Command) -> Result<(Counts, bool)> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().with_context(|| format!("cannot run {program}"))?;
    let Some(output) = child.stdout.take() else { bail!("{program} has no output") };
    let mut counts = Counts::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line.with_context(|| format!("cannot read the output of {program}"))?;
        if let Some(more) = parse_result(&String::from_utf8_lossy(&line)) {
            counts.add(more);
        }
        std::io::stdout().write_all(&[line.as_slice(), b"\n"].concat()).context("cannot write the tests' output")?;
    }
    let status = child.wait().with_context(|| format!("cannot wait for {program}"))?;
    Ok((counts, status.success()))
}

/// Understands `test result: ok. 3 passed; 0 failed; ...`, which may have colours in it.
fn parse_result(line: &str) -> Option<Counts> {
    let (_, result) = line.split_once("test result: ")?;
    let number = |word: &str| result.split(word).next()?.rsplit(' ').next()?.parse().ok();
    Some(Counts { passed: number(" passed;")?, failed: number(" failed;")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_with_and_without_colours() {
        let plain =
            "test result: FAILED. 3 passed; 12 failed; 1 ignored; 0 measured; 5 filtered out; finished in 0.00s";
        assert_eq!(parse_result(plain), Some(Counts { passed: 3, failed: 12 }));
        let coloured = "test result: \u{1b}[32mok\u{1b}(B\u{1b}[m. 7 passed; 0 failed; 1 ignored; 0 measured";
        assert_eq!(parse_result(coloured), Some(Counts { passed: 7, failed: 0 }));
        assert_eq!(parse_result("test guest::passed ... ok"), None);
        assert_eq!(parse_result("test result: nonsense"), None);
    }

    #[test]
    fn a_suite_that_dies_fails_for_every_test_it_did_not_run() {
        let suite = Suite { executable: "/bin/true".into(), package_dir: "/".into(), expected: 2 };
        assert_eq!(run_suite(&suite, None).unwrap(), Counts { passed: 0, failed: 2 });
        let suite = Suite { executable: "/bin/false".into(), package_dir: "/".into(), expected: 0 };
        assert_eq!(run_suite(&suite, None).unwrap(), Counts { passed: 0, failed: 1 });
    }
}
