//! `cargo xtask conformance`: plays recorded runs of kube-proxy to the agent, in the lab, and compares the kernel's state
//! after each step.
//!
//! A case is a node, flags, and steps of what the API held; `tests/conformance/README.md` describes the format. Where the
//! agent differs on purpose, a rule in [`deviations`] says how, and `docs/deviations.md` says why.

mod answers;
mod case;
mod deviations;
mod play;
mod state;

use std::collections::BTreeSet;
use std::fs;
use std::num::NonZero;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lab::{Job, Scratch};
use serde::{Deserialize, Serialize};

use crate::cargo;
use crate::test::guest::Counts;
use case::Case;
use play::Source;

/// The cases of this repository.
const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/conformance");

/// Cases wait more than they compute, so that many at a time go faster even on one processor.
const AT_ONCE: usize = 8;

/// Plays recorded runs of kube-proxy to the agent and compares what is in the kernel after each step.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The directory of the cases
    #[arg(long, value_name = "DIR", default_value = CASES, hide_default_value = true)]
    cases: PathBuf,
    /// Only the case of this name
    #[arg(long, value_name = "NAME")]
    case: Vec<String>,
    /// Write the results here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Serve the objects by an API server, instead of a directory of manifests
    #[arg(long)]
    api_server: bool,
    /// The agent, instead of the one built from this workspace
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
}

/// Plays cases inside the lab.
#[derive(clap::Args)]
pub(crate) struct GuestArgs {
    #[arg(long)]
    api_server: bool,
    agent: PathBuf,
    results: PathBuf,
    cases: Vec<PathBuf>,
}

/// A step whose state is not the recorded one.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Failure {
    case: String,
    step: usize,
    diff: String,
}

/// What came of one case.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct CaseResult {
    name: String,
    failures: Vec<Failure>,
    /// Rules of deviation without which a step would have failed.
    rules: BTreeSet<String>,
    /// Keys of the expectations that are not compared yet.
    not_compared: BTreeSet<String>,
}

impl CaseResult {
    /// Rules that excuse the case although the document does not name it under them.
    fn undocumented(&self) -> Vec<&str> {
        let rules = self.rules.iter().map(String::as_str);
        rules.filter(|rule| !deviations::is_documented(rule, &self.name)).collect()
    }
}

/// What `--json` writes.
#[derive(Serialize)]
struct Report<'a> {
    cases: usize,
    passed: usize,
    deviations: Vec<&'a str>,
    failed: Vec<&'a Failure>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let results = play_all(args)?;
    Ok(if results.iter().all(|result| result.failures.is_empty()) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All cases of the repository, as a part of `cargo xtask test`.
pub(crate) fn test(api_server: bool) -> Result<Counts> {
    let args = Args { cases: CASES.into(), case: Vec::new(), json: None, api_server, agent: None };
    let results = play_all(&args)?;
    if let Some(result) = results.iter().find(|result| !result.undocumented().is_empty()) {
        bail!("docs/deviations.md does not name {} under {}", result.name, result.undocumented().join(", "));
    }
    let failed = results.iter().filter(|result| !result.failures.is_empty()).count();
    Ok(Counts { passed: u32::try_from(results.len() - failed)?, failed: u32::try_from(failed)? })
}

fn play_all(args: &Args) -> Result<Vec<CaseResult>> {
    let started = Instant::now();
    let cases = find(&args.cases, &args.case)?;
    let agent = match &args.agent {
        Some(agent) => agent.canonicalize().with_context(|| format!("cannot find the agent {}", agent.display()))?,
        None => cargo::agent()?.context("this workspace has no agent to play the cases to")?,
    };
    // A guest has one processor: as many guests as this machine has share the cases.
    let guests = std::thread::available_parallelism().map_or(1, NonZero::get);
    let shares: Vec<Vec<PathBuf>> =
        (0..guests).map(|guest| cases.iter().skip(guest).step_by(guests).cloned().collect()).collect();
    lab::prepare()?;
    let results = std::thread::scope(|scope| {
        let shares = shares.iter().filter(|share| !share.is_empty());
        let played: Vec<_> = shares.map(|share| scope.spawn(|| play_share(&agent, args.api_server, share))).collect();
        played.into_iter().map(|share| share.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    let results: Result<Vec<Vec<CaseResult>>> = results;
    let mut results: Vec<CaseResult> = results?.into_iter().flatten().collect();
    results.sort_by(|a, b| a.name.cmp(&b.name));
    if results.len() != cases.len() {
        bail!("{} cases were to be played, and {} have results", cases.len(), results.len());
    }
    if let Some(path) = &args.json {
        let report = serde_json::to_vec_pretty(&report(&results))?;
        fs::write(path, report).with_context(|| format!("cannot write {}", path.display()))?;
    }
    summarize(&results, started.elapsed());
    Ok(results)
}

/// Plays some of the cases in a boot of their own.
fn play_share(agent: &Path, api_server: bool, cases: &[PathBuf]) -> Result<Vec<CaseResult>> {
    let dir = Scratch::new()?;
    let results = dir.path().join("results.json");
    let status = lab::run(
        &Job::this_executable()
            .arg("guest-conformance")
            .args(api_server.then_some("--api-server"))
            .arg(agent)
            .arg(&results)
            .args(cases)
            .writable(dir.path())
            .time_limit(Duration::from_secs(120 + 10 * cases.len() as u64)),
    )?;
    if !status.success() {
        bail!("the cases could not be played to their end: exit code {}", status.code());
    }
    serde_json::from_slice(&fs::read(&results).context("cannot read the results")?).context("cannot read the results")
}

/// The directories with a `case.json`, sorted by name. `--cases` may also name a directory that has them in `cases/`.
fn find(dir: &Path, wanted: &[String]) -> Result<Vec<PathBuf>> {
    let read = |dir: &Path| -> Result<Vec<PathBuf>> {
        let entries =
            fs::read_dir(dir).with_context(|| format!("cannot read the directory of cases {}", dir.display()))?;
        let mut cases = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        cases.retain(|path| path.join("case.json").is_file());
        cases.sort();
        Ok(cases)
    };
    let dir = dir.canonicalize().with_context(|| format!("cannot find the directory of cases {}", dir.display()))?;
    let mut cases = read(&dir)?;
    if cases.is_empty() && dir.join("cases").is_dir() {
        cases = read(&dir.join("cases"))?;
    }
    if !wanted.is_empty() {
        let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if let Some(missing) = wanted.iter().find(|wanted| !cases.iter().any(|path| name(path) == **wanted)) {
            bail!("there is no case `{missing}` in {}", dir.display());
        }
        cases.retain(|path| wanted.contains(&name(path)));
    }
    if cases.is_empty() {
        bail!("there is no case in {}: each is a directory with a case.json", dir.display());
    }
    Ok(cases)
}

fn report(results: &[CaseResult]) -> Report<'_> {
    let (failed, others): (Vec<&CaseResult>, Vec<&CaseResult>) =
        results.iter().partition(|result| !result.failures.is_empty());
    Report {
        cases: results.len(),
        passed: others.len(),
        deviations: others.iter().filter(|result| !result.rules.is_empty()).map(|r| r.name.as_str()).collect(),
        failed: failed.iter().flat_map(|result| &result.failures).collect(),
    }
}

fn summarize(results: &[CaseResult], took: Duration) {
    for failure in results.iter().flat_map(|result| &result.failures) {
        eprintln!("\nFAILED {} step {}:\n{}", failure.case, failure.step, failure.diff);
    }
    let not_compared: BTreeSet<&str> = results.iter().flat_map(|r| &r.not_compared).map(String::as_str).collect();
    if !not_compared.is_empty() {
        eprintln!("not compared yet: {}", not_compared.into_iter().collect::<Vec<_>>().join(", "));
    }
    for result in results.iter().filter(|result| result.failures.is_empty() && !result.rules.is_empty()) {
        let rules: Vec<&str> = result.rules.iter().map(String::as_str).collect();
        let named = if result.undocumented().is_empty() { "" } else { ", which does not name this case" };
        eprintln!("deviates on purpose: {} ({}; see docs/deviations.md{named})", result.name, rules.join(", "));
    }
    let report = report(results);
    eprintln!(
        "conformance: {} cases, {} passed ({} of them deviate on purpose), {} failed ({:.1} s)",
        report.cases,
        report.passed,
        report.deviations.len(),
        report.cases - report.passed,
        took.as_secs_f32()
    );
}

/// Inside the lab.
pub(crate) fn run_guest(args: &GuestArgs) -> Result<ExitCode> {
    let source = if args.api_server { Source::ApiServer } else { Source::Manifests };
    let queue = Mutex::new(args.cases.iter());
    let next = || queue.lock().map_or(None, |mut queue| queue.next());
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(args.cases.len()) {
            scope.spawn(|| {
                while let Some(path) = next() {
                    let result = play_one(&args.agent, path, source);
                    eprintln!("{} {}", if result.failures.is_empty() { "ok    " } else { "FAILED" }, result.name);
                    if let Ok(mut results) = results.lock() {
                        results.push(result);
                    }
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_default();
    fs::write(&args.results, serde_json::to_vec(&results)?).context("cannot write the results")?;
    Ok(ExitCode::SUCCESS)
}

fn play_one(agent: &Path, path: &Path, source: Source) -> CaseResult {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut result = CaseResult { name: name.clone(), ..CaseResult::default() };
    let played = Case::read(path).and_then(|case| play::play(agent, &case, source, &mut result));
    if let Err(error) = played {
        result.failures.push(Failure { case: name, step: 0, diff: format!("could not be played: {error:#}") });
    }
    result
}
