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
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::cargo;
use crate::queue::task::{Action, Finished, Task};
use crate::queue::worker::Done;
use crate::queue::{self, Options};
use crate::test::Counts;
use case::Case;
use play::Source;

/// The cases of this repository.
const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/conformance");

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

/// A case to play inside the lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct GuestCase {
    agent: PathBuf,
    api_server: bool,
    path: PathBuf,
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

/// All cases of the repository as a part of `cargo xtask test`.
pub(crate) fn repository_tasks(agent: &Path, api_server: bool) -> Result<Vec<Task>> {
    Ok(tasks(agent, api_server, &find(Path::new(CASES), &[])?))
}

/// What came of [`repository_tasks`].
pub(crate) fn conclude(finished: &[&Finished]) -> Result<Counts> {
    let results = results(finished)?;
    summarize(&results);
    if let Some(result) = results.iter().find(|result| !result.undocumented().is_empty()) {
        bail!("docs/deviations.md does not name {} under {}", result.name, result.undocumented().join(", "));
    }
    let failed = results.iter().filter(|result| !result.failures.is_empty()).count();
    Ok(Counts { passed: u32::try_from(results.len() - failed)?, failed: u32::try_from(failed)? })
}

fn tasks(agent: &Path, api_server: bool, cases: &[PathBuf]) -> Vec<Task> {
    let suite = if api_server { "conformance, from an API server" } else { "conformance, from manifests" };
    let task = |path: &PathBuf| Task {
        suite: suite.to_owned(),
        name: path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        action: Action::Conformance(GuestCase { agent: agent.to_owned(), api_server, path: path.clone() }),
    };
    cases.iter().map(task).collect()
}

/// The results of cases, by name. A case that was not played to its end has failed.
fn results(finished: &[&Finished]) -> Result<Vec<CaseResult>> {
    let mut results = finished.iter().map(|finished| finished.value()).collect::<Result<Vec<CaseResult>>>()?;
    results.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(results)
}

fn play_all(args: &Args) -> Result<Vec<CaseResult>> {
    let cases = find(&args.cases, &args.case)?;
    let agent = match &args.agent {
        Some(agent) => agent.canonicalize().with_context(|| format!("cannot find the agent {}", agent.display()))?,
        None => cargo::agent()?,
    };
    let finished = queue::run(tasks(&agent, args.api_server, &cases), &Options::default())?;
    let results = results(&finished.iter().collect::<Vec<_>>())?;
    if let Some(path) = &args.json {
        let report = serde_json::to_vec_pretty(&report(&results))?;
        fs::write(path, report).with_context(|| format!("cannot write {}", path.display()))?;
    }
    summarize(&results);
    Ok(results)
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

fn summarize(results: &[CaseResult]) {
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
        "conformance: {} cases, {} passed ({} of them deviate on purpose), {} failed",
        report.cases,
        report.passed,
        report.deviations.len(),
        report.cases - report.passed
    );
}

/// Inside the lab.
pub(crate) fn run_guest(case: &GuestCase) -> Result<Done> {
    let source = if case.api_server { Source::ApiServer } else { Source::Manifests };
    let result = play_one(&case.agent, &case.path, source);
    let mut output = String::new();
    for failure in &result.failures {
        writeln!(output, "{} step {}:\n{}", failure.case, failure.step, failure.diff)?;
    }
    Ok(Done { passed: result.failures.is_empty(), output, value: serde_json::to_value(&result)? })
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
