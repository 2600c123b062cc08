//! `cargo xtask test`: every test of the workspace, those that need a kernel with IPVS in the lab.
//!
//! A test that needs the lab is an ignored one: `#[ignore = "needs a kernel with IPVS: cargo xtask test"]`. A target
//! named `boot` has tests of the lab itself, which boot guests and so run on this machine.

pub(crate) mod guest;

use std::io::{IsTerminal, stdout};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lab::{Job, Place, Scratch};

use self::guest::{Counts, List, Suite};
use crate::cargo::{self, TestExecutable};
use crate::conformance;
use crate::dataplane;
use crate::image;

/// The target with the tests of the lab itself.
const BOOT: &str = "boot";
/// The target with the tests of what is in `deploy/`, which need the files of the image.
const DEPLOY: &str = "deploy";

/// Runs all tests: `cargo test` on this machine, then those that need a kernel with IPVS in the lab.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only the tests that need a kernel with IPVS
    #[arg(long, conflicts_with = "only_host")]
    only_lab: bool,
    /// Run only the tests that need nothing
    #[arg(long)]
    only_host: bool,
    /// Stop the tests in the lab after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 1800)]
    time_limit: u64,
    /// Run only tests with this in their names
    filter: Option<String>,
}

/// What one part of the tests came to.
struct Part {
    name: &'static str,
    counts: Counts,
    error: Option<anyhow::Error>,
    duration: Duration,
}

impl Part {
    /// Does a part. One that fails does not keep the next from running.
    fn run(name: &'static str, action: impl FnOnce() -> Result<Counts>) -> Self {
        eprintln!("\n== {name}");
        let started = Instant::now();
        let (counts, error) = match action() {
            Ok(counts) => (counts, None),
            Err(error) => (Counts::default(), Some(error)),
        };
        if let Some(error) = &error {
            eprintln!("error: {error:#}");
        }
        Self { name, counts, error, duration: started.elapsed() }
    }

    fn passed(&self) -> bool {
        self.error.is_none() && self.counts.failed == 0
    }

    fn summary(&self) -> String {
        let Counts { passed, failed } = self.counts;
        let error = if self.error.is_some() { ", stopped by an error" } else { "" };
        format!("{}: {passed} passed, {failed} failed{error} ({:.1} s)", self.name, self.duration.as_secs_f32())
    }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let filter = args.filter.as_deref();
    let mut parts = Vec::new();
    if !args.only_lab {
        parts.push(Part::run("tests on this machine", || host_tests(filter)));
    }
    if !args.only_host {
        let place = lab::prepare().context("cannot make the lab ready")?;
        let (boot, other): (Vec<_>, Vec<_>) =
            cargo::test_executables()?.into_iter().partition(|executable| executable.target == BOOT);
        if place == Place::Guest {
            parts.push(Part::run("tests of the lab", || boot_tests(&boot, filter)));
        } else {
            eprintln!("\n== tests of the lab: left out, because this machine's kernel has IPVS and needs no guest");
        }
        parts.push(Part::run("tests in the lab", || lab_tests(&other, args)));
        if filter.is_none() {
            parts.push(Part::run("conformance, from manifests", || conformance::test(false)));
            parts.push(Part::run("conformance, from an API server", || conformance::test(true)));
            parts.push(Part::run("data plane", dataplane::test));
            parts.push(Part::run("data plane, VIPs by routes", dataplane::test_routes));
        }
    }
    let summary: Vec<String> = parts.iter().map(Part::summary).collect();
    let passed = parts.iter().all(Part::passed);
    eprintln!("\n{}: {}", if passed { "passed" } else { "FAILED" }, summary.join("; "));
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn host_tests(filter: Option<&str>) -> Result<Counts> {
    let mut command = cargo::cargo();
    command.args(["test", "--workspace", "--no-fail-fast"]).args(filter);
    if stdout().is_terminal() {
        // We are between the tests and the terminal.
        command.args(["--", "--color=always"]);
    }
    let (counts, success) = guest::run_counting(&mut command)?;
    if !success && counts.failed == 0 {
        bail!("`cargo test` failed");
    }
    Ok(counts)
}

fn boot_tests(executables: &[TestExecutable], filter: Option<&str>) -> Result<Counts> {
    let mut total = Counts::default();
    for suite in suites(executables, filter)? {
        total.add(guest::run_suite(&suite, filter)?);
    }
    Ok(total)
}

fn lab_tests(executables: &[TestExecutable], args: &Args) -> Result<Counts> {
    let suites = suites(executables, args.filter.as_deref())?;
    let expected: u32 = suites.iter().map(|suite| suite.expected).sum();
    match (expected, &args.filter) {
        (0, None) => bail!("not one test is marked `#[ignore]` to run in the lab: they must have got lost"),
        (0, Some(filter)) => {
            eprintln!("no test in the lab has `{filter}` in its name");
            return Ok(Counts::default());
        }
        _ => eprintln!("{expected} tests to run in the lab"),
    }
    let agent = cargo::agent()?;
    let dir = Scratch::new()?;
    let deploy = executables.iter().find(|executable| executable.target == DEPLOY);
    let image = match deploy.filter(|deploy| suites.iter().any(|suite| suite.executable == deploy.path)) {
        Some(_) => {
            let image = dir.path().join("image");
            image::make(&image, &cargo::static_agent(None, cargo::Build::Debug)?)?;
            Some(image)
        }
        None => None,
    };
    List { suites, filter: args.filter.clone() }.write(dir.path())?;
    let mut job = Job::this_executable()
        .arg("guest-tests")
        .arg(dir.path())
        .writable(dir.path())
        .time_limit(Duration::from_secs(args.time_limit));
    if let Some(agent) = agent {
        job = job.env("KUBE_IPVS_BIN", agent);
    }
    if let Some(image) = image {
        job = job.env("KUBE_IPVS_IMAGE", image);
    }
    lab::run(&job)?;
    Counts::read(dir.path())
}

/// The executables that have ignored tests which match the filter.
fn suites(executables: &[TestExecutable], filter: Option<&str>) -> Result<Vec<Suite>> {
    let mut suites = Vec::new();
    for executable in executables {
        let mut command = Command::new(&executable.path);
        command.args(["--list", "--ignored", "--format=terse"]).args(filter).current_dir(&executable.package_dir);
        let output = command.output().with_context(|| format!("cannot run {}", executable.path.display()))?;
        if !output.status.success() {
            bail!("{} cannot list its tests: {}", executable.path.display(), output.status);
        }
        let tests = String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.ends_with(": test")).count();
        if tests > 0 {
            suites.push(Suite {
                executable: executable.path.clone(),
                package_dir: executable.package_dir.clone(),
                expected: u32::try_from(tests).context("too many tests")?,
            });
        }
    }
    Ok(suites)
}
