//! `cargo xtask dataplane`: sends traffic through a node with the agent, in the lab, and compares who connects, to which
//! backend, with which source address, with what was recorded of kube-proxy.
//!
//! `tests/dataplane/README.md` describes the recordings. Where traffic differs on purpose, a rule in [`deviations`]
//! says how, and `docs/deviations.md` says why.
//!
//! On this machine, this file and [`report`]; in the lab, [`cells`] and [`timed`] play on the [`network`].

mod agent;
mod cells;
mod compare;
mod deviations;
mod network;
mod objects;
mod observe;
mod probe;
mod recording;
mod report;
mod results;
mod servers;
mod timed;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cargo;
use crate::queue::task::{Action, Finished, Task};
use crate::queue::worker::Done;
use crate::queue::{self, Options};
use crate::test::Counts;
use agent::Agent;
use cells::Table;
use compare::Names;
use network::{Network, Topology};
use objects::Objects;
use recording::Recording;
use report::Report;
use results::{Played, Recorded};
use timed::SequencePlayer;

/// The recordings of this repository.
const RECORDINGS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/dataplane");

/// Sends traffic through a node with the agent and compares what comes of it with recordings of kube-proxy.
///
/// The network is made of namespaces in the lab: a node with two pods, another node with a pod, and a client outside
/// the cluster. Exit status 0 means that every cell is as recorded, or differs as docs/deviations.md says.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The directory of the recordings
    #[arg(long, value_name = "DIR", default_value = RECORDINGS, hide_default_value = true)]
    matrix: PathBuf,
    /// Write the results here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The agent, instead of the one built from this workspace
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// Give the agent this flag too; may be repeated
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    agent_flag: Vec<String>,
    /// Only cells, and sequences of events, with all of these in their file and name
    filter: Vec<String>,
}

/// Cells or events that were recorded under the same flags, and so are played on one network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Share {
    agent: PathBuf,
    flags: Vec<String>,
    /// What the agent is told beside what was recorded.
    more_flags: Vec<String>,
    topology: Value,
    objects: Value,
    cells: Vec<Recorded>,
    events: Vec<Recorded>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let results = play_all(args)?;
    Ok(if results.iter().all(Played::passed) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The recordings of the repository as a part of `cargo xtask test`; with `routes` a part of them, with VIPs that are bound by
/// routes.
pub(crate) fn repository_tasks(agent: &Path, routes: bool) -> Result<Vec<Task>> {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let (agent_flag, filter) = if routes {
        (words(&["--vip-binding=route", "--vip-ranges=10.96.0.0/12,fd00:10:96::/108"]), words(&["matrix-default"]))
    } else {
        (Vec::new(), Vec::new())
    };
    let agent = Some(agent.to_owned());
    let args = Args { matrix: RECORDINGS.into(), json: None, agent, agent_flag, filter };
    Ok(tasks(if routes { "data plane, VIPs by routes" } else { "data plane" }, shares(&args)?))
}

/// What came of [`repository_tasks`].
pub(crate) fn conclude(finished: &[&Finished]) -> Result<Counts> {
    let results = results(finished)?;
    eprint!("{}", report::text(&results));
    let faults = report::faults(&results);
    if !faults.is_empty() {
        bail!("{}", faults.into_iter().collect::<Vec<_>>().join("; "));
    }
    let failed = results.iter().filter(|result| !result.passed()).count();
    Ok(Counts { passed: u32::try_from(results.len() - failed)?, failed: u32::try_from(failed)? })
}

fn tasks(suite: &str, shares: Vec<Share>) -> Vec<Task> {
    let task = |share: Share| {
        let flags = if share.flags.is_empty() { "no flags".to_owned() } else { share.flags.join(" ") };
        let what = if share.events.is_empty() { "cells" } else { "events" };
        let (suite, name) = (suite.to_owned(), format!("{what}, {flags}"));
        Task { suite, name, action: Action::DataPlane(Box::new(share)) }
    };
    shares.into_iter().map(task).collect()
}

/// The results of all shares, in the order in which they were recorded.
fn results(finished: &[&Finished]) -> Result<Vec<Played>> {
    let results: Result<Vec<Vec<Played>>> = finished.iter().map(|finished| finished.value()).collect();
    Ok(results?.into_iter().flatten().collect())
}

fn play_all(args: &Args) -> Result<Vec<Played>> {
    let finished = queue::run(tasks("data plane", shares(args)?), &Options::default())?;
    let results = results(&finished.iter().collect::<Vec<_>>())?;
    if let Some(path) = &args.json {
        let report = serde_json::to_vec_pretty(&Report::new(&results))?;
        fs::write(path, report).with_context(|| format!("cannot write {}", path.display()))?;
    }
    eprint!("{}", report::text(&results));
    Ok(results)
}

/// The recordings by flags; those that change Services apart from those that do not.
fn shares(args: &Args) -> Result<Vec<Share>> {
    let (dir, recordings) = recording::find(&args.matrix)?;
    let own = |file: &str| {
        let path = dir.join(file);
        recording::read_json(&if path.is_file() { path } else { Path::new(RECORDINGS).join(file) })
    };
    let (topology, objects) = (own("topology.json")?, own("objects.json")?);
    let agent = match &args.agent {
        Some(agent) => agent.canonicalize().with_context(|| format!("cannot find the agent {}", agent.display()))?,
        None => cargo::agent()?,
    };
    let new = |flags: &[String], cells, events| Share {
        agent: agent.clone(),
        flags: flags.to_vec(),
        more_flags: args.agent_flag.clone(),
        topology: topology.clone(),
        objects: objects.clone(),
        cells,
        events,
    };
    let mut shares: Vec<Share> = Vec::new();
    for Recording { name, flags, cells, events } in recordings {
        let selected = |values: Vec<Value>| -> Vec<Recorded> {
            let all = values.into_iter().map(|value| Recorded { file: name.clone(), value });
            all.filter(|recorded| is_selected(recorded, &args.filter)).collect()
        };
        let (cells, events) = (selected(cells), selected(events));
        if !cells.is_empty() {
            match shares.iter_mut().find(|share| share.flags == flags && share.events.is_empty()) {
                Some(share) => share.cells.extend(cells),
                None => shares.push(new(&flags, cells, Vec::new())),
            }
        }
        if !events.is_empty() {
            match shares.iter_mut().find(|share| share.flags == flags && share.cells.is_empty()) {
                Some(share) => share.events.extend(events),
                None => shares.push(new(&flags, Vec::new(), events)),
            }
        }
    }
    if shares.is_empty() {
        bail!("no cell has {} in its name", args.filter.join(" and "));
    }
    Ok(shares)
}

fn is_selected(recorded: &Recorded, words: &[String]) -> bool {
    // The events of a sequence make no sense without each other.
    let name = recorded.event().map_or_else(|| recorded.name(), |event| event.sequence());
    words.iter().all(|word| recorded.file.contains(word.as_str()) || name.contains(word.as_str()))
}

/// Inside the lab. A share that cannot be played has results that say so.
pub(crate) fn run_guest(share: &Share) -> Result<Done> {
    let (results, output) = play(share).unwrap_or_else(|error| {
        let all = share.cells.iter().chain(&share.events);
        let failed = |recorded: &Recorded| {
            let got = format!("could not be played: {}", error.to_string().lines().next().unwrap_or_default());
            Played { got, ..recorded.not_played() }
        };
        (all.map(failed).collect(), format!("error: {error:#}\n"))
    });
    Ok(Done { passed: results.iter().all(Played::passed), output, value: serde_json::to_value(results)? })
}

/// The results, and what the agent said if not all passed.
fn play(share: &Share) -> Result<(Vec<Played>, String)> {
    let topology: Topology =
        serde_json::from_value(share.topology.clone()).context("cannot understand the topology")?;
    let objects = Objects::new(share.objects.clone(), topology.of("node")?)?;
    let names = Names::new(&topology, &objects);
    let network = Network::build(topology).context("cannot build the network")?;
    servers::start(&network)?;
    let flags = [&share.flags[..], &share.more_flags].concat();
    let mut agent = Agent::new(&share.agent, &flags, network.node()?, &objects)?;
    agent.start()?;
    let mut results = Vec::new();
    if !share.cells.is_empty() {
        let table = Table { network: &network, objects: &objects, flags: &flags, names: names.clone() };
        results.extend(cells::play(&table, &share.cells));
    }
    if !share.events.is_empty() {
        let mut player = SequencePlayer { network: &network, objects: &objects, names: &names, agent: &mut agent };
        results.extend(timed::play(&mut player, &share.events));
    }
    let output = if results.iter().all(Played::passed) {
        String::new()
    } else {
        format!("the end of the agent's log:\n{}\n", agent.last_log_lines())
    };
    Ok((results, output))
}
