//! `cargo xtask bench`: what the agent needs, beside what the kernel itself needs.
//!
//! On this machine, this file and [`report`]; in the lab, [`guest`] measures one size at a time, each in a boot of its own.

pub(crate) mod agent;
mod figures;
mod guest;
pub(crate) mod load;
mod plot;
mod report;
mod wiretap;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use lab::{Job, Scratch};

use crate::cargo;
use figures::{Figure, Figures};
use guest::{BenchOptions, Measure};
pub(crate) use guest::{GuestArgs, run_guest};
use load::Size;
use report::Results;

/// Where the report goes.
const REPORT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/performance");

/// All sizes of the report; the last but for two is there to tell endpoints from Services.
const SIZES: [(usize, usize); 8] =
    [(100, 10), (1000, 10), (5000, 10), (10_000, 10), (20_000, 10), (10_000, 20), (1, 5000), (1000, 250)];

/// Measures the agent in the lab, beside what the kernel itself needs.
///
/// Prints each figure as it comes. Without --services, --endpoints and --filter it measures everything at all sizes, which
/// takes the better part of an hour, and renews the report in docs/performance.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many Services
    #[arg(long, value_name = "N")]
    services: Option<usize>,
    /// How many endpoints each has
    #[arg(long, value_name = "M")]
    endpoints: Option<usize>,
    /// Only this; may be given several times
    #[arg(long, value_name = "NAME")]
    filter: Vec<Measure>,
    /// Write all figures here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the report of figures that an earlier run has written, and measure nothing
    #[arg(long, value_name = "FILE", conflicts_with_all = ["services", "endpoints", "filter", "json"])]
    from: Option<PathBuf>,
    /// How many changes of each kind to time
    #[arg(long, value_name = "NUMBER", default_value_t = 1000)]
    changes: usize,
    /// How many changes to look for growth over
    #[arg(long, value_name = "NUMBER", default_value_t = 1_000_000)]
    many: usize,
    /// How many seconds to churn, and to wait for nothing
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    seconds: u64,
    /// A further flag for the agent; may be given several times
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    agent_flag: Vec<String>,
    /// The agent, instead of the one built from this workspace
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if let Some(file) = &args.from {
        let results = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let results: Results = serde_json::from_slice(&results).context("these are no figures")?;
        report::write(Path::new(REPORT), &results)?;
        return Ok(ExitCode::SUCCESS);
    }
    let start = Instant::now();
    // As it is shipped: static, so that one file is all.
    let agent = match &args.agent {
        Some(agent) => agent.canonicalize().with_context(|| format!("cannot find {}", agent.display()))?,
        None => cargo::static_agent(None)?,
    };
    let runner = if cfg!(debug_assertions) { cargo::release_xtask()? } else { std::env::current_exe()? };
    lab::prepare()?;
    let mut figures = Vec::new();
    for size in sizes(args) {
        let measures = measures(args, size);
        if measures.is_empty() {
            continue;
        }
        let mut own = Figures::new(size);
        if measures.contains(&Measure::Cold) {
            own.bytes("binary/size", fs::metadata(&agent).context("cannot examine the agent")?.len());
        }
        figures.extend(own.all);
        let options = BenchOptions {
            agent: agent.clone(),
            size,
            measures,
            changes: args.changes,
            seconds: args.seconds,
            many: args.many,
            flags: args.agent_flag.clone(),
        };
        figures.extend(measure(&runner, &options).with_context(|| format!("at {size}"))?);
    }
    let results = Results { machine: machine(), kernel: kernel()?, figures };
    if let Some(path) = &args.json {
        fs::write(path, serde_json::to_vec_pretty(&results)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let is_all = args.services.is_none() && args.endpoints.is_none() && args.filter.is_empty();
    if is_all && args.agent_flag.is_empty() {
        report::write(Path::new(REPORT), &results)?;
    }
    eprintln!("{} figures in {:.0} s", results.figures.len(), start.elapsed().as_secs_f64());
    Ok(ExitCode::SUCCESS)
}

/// The processor of this machine and how many there are.
fn machine() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    format!("{count} processors ({})", model.map_or("unknown", |(_, model)| model))
}

/// The version of the lab's kernel.
fn kernel() -> Result<String> {
    let output = lab::output(&Job::new("uname").arg("--kernel-release"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn sizes(args: &Args) -> Vec<Size> {
    if args.services.is_some() || args.endpoints.is_some() {
        return vec![Size { services: args.services.unwrap_or(1000), endpoints: args.endpoints.unwrap_or(10) }];
    }
    SIZES.map(|(services, endpoints)| Size { services, endpoints }).into()
}

/// What is measured at a size: what was asked for, or what is worth its time there.
fn measures(args: &Args, size: Size) -> BTreeSet<Measure> {
    let is_one_size = args.services.is_some() || args.endpoints.is_some();
    let all = Measure::value_variants().iter().copied();
    let wanted: BTreeSet<Measure> =
        if args.filter.is_empty() { all.collect() } else { args.filter.iter().copied().collect() };
    let is_worth = |measure: &Measure| match (measure, size.services, size.endpoints) {
        // Said of 10,000 x 10 as against this.
        (Measure::Cold, _, _) => true,
        (_, 10_000, 20) => false,
        (Measure::Growth, services, _) => services == 1000 && size.endpoints == 10,
        _ => true,
    };
    if is_one_size && !args.filter.is_empty() { wanted } else { wanted.into_iter().filter(is_worth).collect() }
}

/// Boots a guest for one size.
fn measure(runner: &Path, options: &BenchOptions) -> Result<Vec<Figure>> {
    let dir = Scratch::new()?;
    let (file, results) = (dir.path().join("options.json"), dir.path().join("results.json"));
    fs::write(&file, serde_json::to_vec(options)?).context("cannot write the options")?;
    let job = Job::new(runner)
        .arg("guest-bench")
        .arg(&file)
        .arg(&results)
        .writable(dir.path())
        .init(runner)
        .memory_mib(6144)
        .time_limit(Duration::from_secs(3600));
    let status = lab::run(&job)?;
    if !status.success() {
        bail!("the measurement did not come to its end: exit code {}", status.code());
    }
    serde_json::from_slice(&fs::read(&results).context("cannot read the results")?).context("cannot read the results")
}
