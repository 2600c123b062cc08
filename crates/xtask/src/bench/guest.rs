//! Inside the lab: measures the agent at one size.
//!
//! Each measurement that begins with an empty kernel has a network namespace of its own, which is emptied before the
//! next begins: what one leaves must not cost another its time.

mod change;
mod cold;
mod idle;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use lab::Scratch;
use lab::netns::Namespace;
use serde::{Deserialize, Serialize};
use test_apiserver::Server;

use super::agent::Agent;
use super::figures::{Figure, Figures};
use super::load::Size;
use super::wiretap::run;

/// What to measure; names of the figures begin with these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Measure {
    /// From the start of the process until everything is in the kernel.
    Cold,
    /// The same state written by others: `ipvsadm --restore`, `ip -batch` and `nft --file`.
    Tools,
    /// A cold start from manifests.
    Manifests,
    /// System calls of a cold start.
    Syscalls,
    /// A start where nothing is to be done.
    Restart,
    /// One endpoint or one Service, in or out.
    Change,
    /// A hundred changes a second.
    Churn,
    /// Nothing happens.
    Steady,
    /// Reading everything.
    Audit,
    /// A million changes.
    Growth,
}

/// What a guest is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct BenchOptions {
    pub(crate) agent: PathBuf,
    pub(crate) size: Size,
    pub(crate) measures: BTreeSet<Measure>,
    /// How many changes of each kind.
    pub(crate) changes: usize,
    /// How long to churn, and how long to wait for nothing.
    pub(crate) seconds: u64,
    /// How many changes to look for growth over.
    pub(crate) many: usize,
    /// More flags for the agent.
    pub(crate) flags: Vec<String>,
}

/// Measures the agent inside the lab.
#[derive(clap::Args)]
pub(crate) struct GuestArgs {
    options: PathBuf,
    results: PathBuf,
}

pub(crate) fn run_guest(args: &GuestArgs) -> Result<ExitCode> {
    let options: BenchOptions = serde_json::from_slice(&fs::read(&args.options).context("cannot read the options")?)?;
    let figures = Bench::new(options)?.measure()?;
    fs::write(&args.results, serde_json::to_vec(&figures)?).context("cannot write the results")?;
    Ok(ExitCode::SUCCESS)
}

/// One size and what is measured at it.
struct Bench {
    options: BenchOptions,
    server: Server,
    dir: Scratch,
    figures: Figures,
}

impl Bench {
    fn new(options: BenchOptions) -> Result<Self> {
        let server = Server::new();
        for object in options.size.objects() {
            server.apply(object);
        }
        server.compact();
        let figures = Figures::new(options.size);
        Ok(Self { server, dir: Scratch::new()?, figures, options })
    }

    fn measure(mut self) -> Result<Vec<Figure>> {
        use Measure::{Audit, Change, Churn, Cold, Growth, Manifests, Restart, Steady, Syscalls, Tools};
        let wants = |wanted: &[Measure]| wanted.iter().any(|it| self.options.measures.contains(it));
        let (from_nothing, after, restarted) =
            (wants(&[Cold, Tools]), wants(&[Cold, Change, Churn, Steady, Growth]), wants(&[Restart, Audit]));
        if after || restarted {
            let namespace = Namespace::new()?;
            namespace.run(|| self.run_agent(after, restarted))??;
        }
        if from_nothing {
            self.floor()?;
        }
        if self.wants(Manifests) {
            self.cold_from_manifests()?;
        }
        if self.wants(Syscalls) {
            self.system_calls()?;
        }
        Ok(self.figures.all)
    }

    fn wants(&self, measure: Measure) -> bool {
        self.options.measures.contains(&measure)
    }

    /// All that is measured of an agent that has started with an empty kernel, and of the next ones on the same node.
    fn run_agent(&mut self, after: bool, restarted: bool) -> Result<()> {
        let flags = self.serve_api()?;
        let mut agent = self.cold_start(&flags)?;
        if after {
            if self.wants(Measure::Change) {
                self.changes(&mut agent)?;
            }
            if self.wants(Measure::Churn) {
                self.churn(&mut agent)?;
            }
            if self.wants(Measure::Steady) {
                self.steady(&mut agent)?;
            }
            if self.wants(Measure::Growth) {
                self.growth(&mut agent)?;
            }
        }
        agent.kill();
        if restarted {
            self.restarts(&flags)?;
        }
        clean_up();
        Ok(())
    }

    /// Flags of an agent that listens to the API server, which now listens in the namespace of this thread.
    fn serve_api(&self) -> Result<Vec<String>> {
        let address = self.server.listen_in_thread().context("cannot start the API server")?;
        let kubeconfig = self.dir.path().join("kubeconfig");
        Server::write_kubeconfig(&kubeconfig, address);
        let flags = [format!("--kubeconfig={}", kubeconfig.display()), "--ipvs-min-sync-period=0s".to_owned()];
        Ok(flags.into_iter().chain(self.options.flags.clone()).collect())
    }

    fn start(&self, flags: &[String]) -> Result<Agent> {
        Agent::start(&self.options.agent, flags)
    }

    fn in_namespace<T: Send>(&mut self, action: impl FnOnce(&mut Self) -> Result<T> + Send) -> Result<T> {
        let namespace = Namespace::new()?;
        let result = namespace.run(|| {
            let result = action(self);
            clean_up();
            result
        })?;
        drop(namespace);
        std::thread::sleep(Duration::from_millis(500));
        result
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.dir.path().join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

/// Empties the kernel in this network namespace.
fn clean_up() {
    for (program, arguments) in
        [("ipvsadm", &["-C"][..]), ("ip", &["link", "del", "kube-ipvs0"]), ("nft", &["flush", "ruleset"])]
    {
        // What is not there need not go.
        let _ = run(program, arguments);
    }
}

fn path_str(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}
