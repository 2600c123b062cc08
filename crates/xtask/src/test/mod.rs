//! `cargo xtask test`: every test of the workspace, those that need a kernel with IPVS in the lab.
//!
//! A test that needs the lab is an ignored one: `#[ignore = "needs a kernel with IPVS: cargo xtask test"]`. A target
//! named `boot` has tests of the lab itself, which boot guests and so run on this machine.

mod host;

use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use lab::{Location, Scratch};

use crate::cargo::{self, TestExecutable};
use crate::queue::task::{Action, Finished, Task};
use crate::queue::{self, Options};
use crate::{conformance, dataplane, image};

/// The target with the tests of what is in `deploy/`, which need the files of the image.
const DEPLOY: &str = "deploy";

/// How many of the slowest tasks are named.
const SLOWEST: usize = 10;

/// Runs all tests: those that need nothing on this machine, and beside them those that need a kernel with IPVS in the lab,
/// with the recorded runs and traffic of kube-proxy.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only what needs a kernel with IPVS
    #[arg(long, conflicts_with = "only_host")]
    only_lab: bool,
    /// Run only the tests that need nothing
    #[arg(long)]
    only_host: bool,
    /// Run each test in the lab so many times, to find out which do not always pass
    #[arg(long, value_name = "N", default_value_t = 1)]
    repeat: usize,
    /// Run so many tests at a time in each guest
    #[arg(long, value_name = "N")]
    at_once: Option<usize>,
    /// Record how long each test in the lab takes, so that the longest ones start first
    #[arg(long)]
    record_times: bool,
    /// Run only tests with this in their names
    filter: Option<String>,
}

/// How many tests passed and failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

/// What one part of the tests came to.
struct Part {
    name: &'static str,
    counts: Counts,
    error: Option<anyhow::Error>,
}

impl Part {
    fn new(name: &'static str, counts: Result<Counts>) -> Self {
        match counts {
            Ok(counts) => Self { name, counts, error: None },
            Err(error) => {
                eprintln!("error: {name}: {error:#}");
                Self { name, counts: Counts::default(), error: Some(error) }
            }
        }
    }

    fn passed(&self) -> bool {
        self.error.is_none() && self.counts.failed == 0
    }

    fn summary(&self) -> String {
        let Counts { passed, failed } = self.counts;
        let error = if self.error.is_some() { ", stopped by an error" } else { "" };
        format!("{}: {passed} passed, {failed} failed{error}", self.name)
    }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let started = Instant::now();
    let built = cargo::build_tests()?;
    let filter = args.filter.as_deref();
    let boots = !args.only_host && lab::prepare().context("cannot make the lab ready")? == Location::Guest;
    eprintln!("built, and the lab is ready, after {:.1} s", started.elapsed().as_secs_f32());
    // Tests in the lab mostly wait, so those on this machine run beside them.
    let parts = std::thread::scope(|scope| {
        let host = (!args.only_lab).then(|| scope.spawn(|| host::run(&built.executables, boots, filter)));
        let mut parts = if args.only_host { Vec::new() } else { lab_parts(args, &built)? };
        if let Some(host) = host {
            let results = host.join().unwrap_or_else(|_| bail!("a thread panicked"));
            let (host, boot) = match results {
                Ok(results) => (Ok(results.counts), Some(results.boot)),
                Err(error) => (Err(error), None),
            };
            parts.insert(0, Part::new("tests on this machine", host));
            if boots {
                parts.insert(1, Part::new("tests of the lab", boot.context("not run")));
            }
        }
        anyhow::Ok(parts)
    })?;
    let summary: Vec<String> = parts.iter().map(Part::summary).collect();
    let passed = parts.iter().all(Part::passed);
    let word = if passed { "passed" } else { "FAILED" };
    eprintln!("\n{word} in {:.0} s: {}", started.elapsed().as_secs_f32(), summary.join("; "));
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What needs a kernel with IPVS.
fn lab_parts(args: &Args, built: &cargo::Built) -> Result<Vec<Part>> {
    let filter = args.filter.as_deref();
    let mut options = Options { env: Vec::new(), at_once: args.at_once, record_times: args.record_times };
    let dir = Scratch::new()?;
    let tests = test_tasks(&built.executables, filter)?;
    if tests.is_empty() {
        match filter {
            None => bail!("not one test is marked `#[ignore]` to run in the lab: they must have got lost"),
            Some(filter) => eprintln!("no test in the lab has `{filter}` in its name"),
        }
    }
    if tests.iter().any(|task| task.suite == DEPLOY) {
        let root = dir.path().join("image");
        image::make_dynamic(&root, &built.agent)?;
        options.env.push(("KUBE_IPVS_IMAGE".into(), root.to_string_lossy().into_owned()));
    }
    options.env.push(("KUBE_IPVS_BIN".into(), built.agent.to_string_lossy().into_owned()));

    let mut groups: Vec<(&'static str, Conclude, Vec<Task>)> = vec![("tests in the lab", count, tests)];
    if filter.is_none() {
        let agent = &built.agent;
        let [manifests, api_server] = [false, true].map(|server| conformance::repository_tasks(agent, server));
        groups.push(("conformance, from manifests", conformance::conclude, manifests?));
        groups.push(("conformance, from an API server", conformance::conclude, api_server?));
        let [addresses, routes] = [false, true].map(|routes| dataplane::repository_tasks(agent, routes));
        groups.push(("data plane", dataplane::conclude, addresses?));
        groups.push(("data plane, VIPs by routes", dataplane::conclude, routes?));
    }
    let mut tasks = Vec::new();
    let mut ends = Vec::new();
    for (name, conclude, group) in groups {
        for _ in 0..args.repeat {
            tasks.extend(group.iter().cloned());
        }
        ends.push((name, conclude, tasks.len()));
    }
    let finished = queue::run(tasks, &options)?;
    let mut parts = Vec::new();
    let mut start = 0;
    for (name, conclude, end) in ends {
        let of_part: Vec<&Finished> = finished[start..end].iter().collect();
        parts.push(Part::new(name, conclude(&of_part)));
        start = end;
    }
    queue::print_slowest(&finished, SLOWEST);
    Ok(parts)
}

/// Makes counts of what came of a group of tasks.
type Conclude = fn(&[&Finished]) -> Result<Counts>;

fn count(finished: &[&Finished]) -> Result<Counts> {
    let passed = finished.iter().filter(|finished| finished.outcome.passed).count();
    Ok(Counts { passed: u32::try_from(passed)?, failed: u32::try_from(finished.len() - passed)? })
}

/// The ignored tests of all executables that match the filter, but those that boot guests.
fn test_tasks(executables: &[TestExecutable], filter: Option<&str>) -> Result<Vec<Task>> {
    let mut tasks = Vec::new();
    for executable in executables.iter().filter(|executable| executable.target != host::BOOT) {
        let mut command = Command::new(&executable.path);
        command.args(["--list", "--ignored", "--format=terse"]).args(filter).current_dir(&executable.package_dir);
        let output = command.output().with_context(|| format!("cannot run {}", executable.path.display()))?;
        if !output.status.success() {
            bail!("{} cannot list its tests: {}", executable.path.display(), output.status);
        }
        let listing = String::from_utf8_lossy(&output.stdout).into_owned();
        tasks.extend(listing.lines().filter_map(|line| line.strip_suffix(": test")).map(|name| Task {
            suite: executable.target.clone(),
            name: name.to_owned(),
            action: Action::Test { executable: executable.path.clone(), package_dir: executable.package_dir.clone() },
        }));
    }
    Ok(tasks)
}
