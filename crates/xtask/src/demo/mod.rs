//! `cargo xtask demo`: shows kube-ipvs at work on a small network in the lab, and checks every fact that it shows.
//!
//! This file is the command; [`steps`] is what happens, on the network of [`network`], with kube-ipvs and its manifests
//! from [`agent`]; [`screen`] is what one sees.

mod agent;
mod network;
mod screen;
mod steps;

use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab::Job;

use crate::cargo;
use agent::{Agent, Manifests};
use network::Network;
use screen::Screen;
use steps::Demo;

/// The manifests that the demo starts from.
const MANIFESTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/hello");

/// Shows kube-ipvs at work on a small network, step by step, and checks what it shows.
///
/// Five network namespaces in the lab are a client, a node with kube-ipvs, and three servers. The Service comes from the
/// manifests in examples/hello. It scales up and down, keeps clients with their servers, and works on while the agent is
/// dead. Nothing outside the lab is touched. Exit status 0 means that every fact shown was checked and holds.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Rest this long after each step, for an audience
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=60))]
    pause: u64,
    /// The agent, instead of the one built from this workspace
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
}

/// Plays the demo inside the lab.
#[derive(clap::Args)]
pub(crate) struct GuestArgs {
    agent: PathBuf,
    manifests: PathBuf,
    #[arg(long)]
    pause: u64,
    #[arg(long)]
    color: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let agent = match &args.agent {
        Some(agent) => agent.canonicalize().with_context(|| format!("cannot find the agent {}", agent.display()))?,
        None => cargo::agent()?,
    };
    let manifests = Path::new(MANIFESTS).canonicalize().with_context(|| format!("cannot find {MANIFESTS}"))?;
    let is_colored =
        std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let job = Job::this_executable()
        .arg("guest-demo")
        .args([agent, manifests])
        .arg(format!("--pause={}", args.pause))
        .args(is_colored.then_some("--color"))
        .time_limit(Duration::from_secs(120 + 6 * args.pause));
    let status = lab::run(&job)?;
    match status.code() {
        0 => Ok(ExitCode::SUCCESS),
        // It said why.
        1 => Ok(ExitCode::FAILURE),
        code => bail!("the demo did not get to its end: exit code {code}"),
    }
}

/// Inside the lab.
pub(crate) fn run_guest(args: &GuestArgs) -> ExitCode {
    let mut screen = Screen::new(args.color, Duration::from_secs(args.pause));
    let outcome = play(args, &mut screen);
    // To standard output, as all that came before, so that nothing comes out of order.
    match outcome {
        Ok(()) => {
            screen.end();
            ExitCode::SUCCESS
        }
        Err(error) => {
            screen.failed(&error);
            ExitCode::FAILURE
        }
    }
}

fn play(args: &GuestArgs, screen: &mut Screen) -> Result<()> {
    let network = Network::build()?;
    let manifests = Manifests::copy(&args.manifests)?;
    let agent = Agent::new(&args.agent, &manifests);
    let mut demo = Demo { screen, network: &network, manifests: &manifests, agent };
    let played = demo.steps();
    if played.is_err() {
        let new_lines = demo.agent.new_log_lines();
        demo.screen.log("the rest of the log of the agent", &new_lines);
    }
    played
}

/// Reads a file of the example.
fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::agent::FLAGS;
    use super::network::{BACKENDS, SERVICE};
    use super::*;

    #[test]
    fn the_example_has_the_addresses_of_the_stage() {
        let parse = |file: &str| -> serde_json::Value {
            serde_saphyr::from_str(&read(&Path::new(MANIFESTS).join(file)).unwrap()).unwrap()
        };
        let service = parse("service.yaml");
        let port = &service["spec"]["ports"][0];
        assert_eq!(service["spec"]["clusterIP"], SERVICE.ip().to_string());
        assert_eq!(port["port"], SERVICE.port());
        let slice = parse("endpointslice.yaml");
        assert_eq!(slice["ports"][0]["port"], port["targetPort"]);
        for (backend, endpoint) in BACKENDS.iter().zip(slice["endpoints"].as_array().unwrap()) {
            assert_eq!(endpoint["addresses"][0], backend.socket().ip().to_string());
            assert_eq!(port["targetPort"], backend.socket().port());
        }
        assert_eq!(slice["endpoints"].as_array().unwrap().len(), 2);
        assert!(FLAGS.contains(
            &format!("--hostname-override={}", parse("node.yaml")["metadata"]["name"].as_str().unwrap()).as_str()
        ));
    }

    #[test]
    fn the_drawing_has_the_addresses_of_the_stage() {
        for address in
            BACKENDS.map(|backend| backend.socket().ip().to_string()).into_iter().chain([SERVICE.to_string()])
        {
            assert!(network::DRAWING.contains(&address), "{address}");
        }
    }
}
