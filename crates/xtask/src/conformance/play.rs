//! Plays one case: a node in a network namespace of its own, the agent on it, and one step after the other.
//!
//! When has the agent caught up? The runner asks nothing of the agent but what it does anyway. A marker Service gets a new
//! port after each step: once its virtual server is there, the step's changes have been taken in. Then the runner gives
//! the marker a real server that nobody wants, and waits until an audit has removed it; what one audit began, the next
//! ones have finished. All trace of the marker is left out of the comparison.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ipvs_netlink::{Client, Protocol, RealServer, VirtualServerId};
use lab::agent::Agent;
use lab::manifests::Manifests;
use lab::netns::Namespace;
use lab::objects::{self, with};
use lab::{Scratch, link};
use serde_json::{Value, json};
use test_apiserver::Server;

use super::case::{Case, Expectation, Object, Step, VirtualServer};
use super::deviations::{self, Objects};
use super::state::{State, virtual_servers};
use super::{CaseResult, Failure};

const MARKER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 255, 250));
const MARKER_FILE: &str = "zz-marker.yaml";
const STRAY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 244, 255, 251)), 1);

const AUDITS: usize = 3;
const PERIOD: &str = "--ipvs-sync-period=150ms";

/// Where the agent takes objects from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A directory of manifests.
    Manifests,
    /// An API server.
    ApiServer,
}

/// The node of a case while it is played.
struct Node<'a> {
    case: &'a Case,
    agent: &'a Path,
    /// The manifests, or the kubeconfig.
    dir: Scratch,
    server: Option<Server>,
    process: Option<Agent>,
}

/// Plays all steps and puts what differs into `result`.
pub(crate) fn play(agent: &Path, case: &Case, source: Source, result: &mut CaseResult) -> Result<()> {
    let namespace = Namespace::new()?;
    namespace.run(|| {
        let server = (source == Source::ApiServer).then(Server::new);
        let mut node = Node { case, agent, dir: Scratch::new()?, server, process: None };
        node.set_up()?;
        let mut objects = Objects::default();
        objects.strangers = node.strangers()?;
        for (index, step) in case.steps.iter().enumerate() {
            let number = index + 1;
            objects.take_in(case, step)?;
            objects.strangers.extend(node.tamper(step)?);
            node.step(number, step).with_context(|| format!("step {number}"))?;
            let expected = case.expectation(step)?;
            result.not_compared.extend(expected.others.keys().cloned());
            compare(case, number, &expected, &objects, result)?;
        }
        Ok(())
    })?
}

/// Compares the kernel's state with what is expected, under a rule of deviation where it must be.
///
/// A listing of more than one datagram can miss a virtual server while another namespace of the same kernel deletes one
/// (`ip_vs_genl_dump_services` counts through one table for all), and cases run side by side: what differs is read again.
fn compare(case: &Case, step: usize, expected: &Expectation, objects: &Objects, result: &mut CaseResult) -> Result<()> {
    for is_last in [false, false, true] {
        let state = state(expected)?;
        let diff = state.diff(expected);
        if diff.is_empty() {
            break;
        }
        match deviations::explain(expected, &state, objects) {
            Some(rules) => {
                result.rules.extend(rules.into_iter().map(str::to_owned));
                break;
            }
            None if is_last => result.failures.push(Failure { case: case.name.clone(), step, diff }),
            None => std::thread::sleep(Duration::from_millis(200)),
        }
    }
    Ok(())
}

impl Node<'_> {
    /// Makes the interfaces and what existed before.
    fn set_up(&self) -> Result<()> {
        if !self.case.families.iter().any(|family| family == "IPv6") {
            fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").context("cannot switch IPv6 off")?;
        }
        // No interface gives itself a link-local address.
        let _ = fs::write("/proc/sys/net/ipv6/conf/default/addr_gen_mode", "1");
        for interface in &self.case.interfaces {
            let name = &interface.name;
            if name != "lo" {
                link::add_dummy(name, &[])?;
            }
            interface.addresses.iter().try_for_each(|address| link::add_address(name, address))?;
        }
        if let Some(addresses) = &self.case.preexisting.kube_ipvs0 {
            link::add_dummy("kube-ipvs0", &[])?;
            link::set_down("kube-ipvs0")?;
            addresses.iter().try_for_each(|address| link::add_address("kube-ipvs0", address))?;
        }
        if !self.case.preexisting.ipvsadm.is_empty() {
            restore(&self.case.preexisting.ipvsadm)?;
        }
        if let Some(server) = &self.server {
            let address = server.listen_in_thread().context("cannot start the API server")?;
            Server::write_kubeconfig(&self.kubeconfig(), address);
        }
        Ok(())
    }

    /// What there is by now that was no kube-proxy's: that has its VIPs on the device.
    fn strangers(&self) -> Result<Vec<VirtualServer>> {
        let on_device = self.case.preexisting.kube_ipvs0.iter().flatten();
        let vips: Vec<IpAddr> = on_device.filter_map(|it| it.split('/').next()?.parse().ok()).collect();
        let mut strangers = virtual_servers()?;
        strangers.retain(|it| it.address.is_none_or(|address| !vips.contains(&address)));
        Ok(strangers)
    }

    /// Does what somebody else does, and says which virtual servers are new.
    fn tamper(&mut self, step: &Step) -> Result<Vec<VirtualServer>> {
        if step.restart {
            self.process = None;
        }
        let before = virtual_servers()?;
        for command in &step.commands {
            shell(command)?;
        }
        let mut new = virtual_servers()?;
        new.retain(|it| !before.iter().any(|held| held.is_at_the_front_end_of(it)));
        Ok(new)
    }

    fn step(&mut self, number: usize, step: &Step) -> Result<()> {
        for object in &step.delete {
            self.delete(object)?;
        }
        for file in &step.apply {
            let content =
                fs::read_to_string(self.case.dir.join(file)).with_context(|| format!("cannot read {file}"))?;
            let name = Path::new(file).file_name().context("a manifest without a name")?;
            self.apply(&name.to_string_lossy(), &content)?;
        }
        let port = 1000 + u16::try_from(number)?;
        self.apply(MARKER_FILE, &marker(port))?;
        if self.process.is_none() {
            self.start()?;
        }
        self.wait(port)
    }

    fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    /// Creates or replaces the objects of a manifest.
    fn apply(&self, name: &str, content: &str) -> Result<()> {
        if let Some(server) = &self.server {
            let options = serde_saphyr::options! { strict_booleans: true };
            let objects: Vec<Value> = serde_saphyr::from_multiple_with_options(content, options)
                .with_context(|| format!("cannot understand {name}"))?;
            for object in objects {
                server.apply(object);
            }
            return Ok(());
        }
        Ok(self.manifests()?.write(name, content)?)
    }

    fn delete(&self, object: &Object) -> Result<()> {
        if let Some(server) = &self.server {
            server.delete(&object.kind, object.namespace.as_deref().unwrap_or_default(), &object.name);
            return Ok(());
        }
        Ok(self.manifests()?.remove(&object.file_name())?)
    }

    fn manifests(&self) -> Result<Manifests> {
        Ok(Manifests::at(self.dir.path())?)
    }

    fn start(&mut self) -> Result<()> {
        let mut command = Command::new(self.agent);
        match &self.server {
            None => command.arg("--manifests").arg(self.dir.path()),
            Some(_) => command.arg("--kubeconfig").arg(self.kubeconfig()),
        };
        command.arg(format!("--hostname-override={}", self.case.node_name)).args(&self.case.flags).args([
            "--ipvs-min-sync-period=0s",
            PERIOD,
            "-v=4",
        ]);
        self.process = Some(Agent::spawn(&mut command)?);
        Ok(())
    }

    /// Waits until the agent has caught up.
    fn wait(&mut self, port: u16) -> Result<()> {
        let agent = self.process.as_mut().context("there is no agent")?;
        let mut ipvs = Client::connect()?;
        let id = VirtualServerId::address(Protocol::Udp, SocketAddr::new(MARKER, port));
        agent.try_until("take in the step", |_| anyhow::Ok(!ipvs.real_servers(&id)?.is_empty()))?;
        for _ in 0..AUDITS {
            ipvs.add_real_server(&id, &RealServer::new(STRAY))?;
            agent.try_until("audit", |_| {
                anyhow::Ok(!ipvs.real_servers(&id)?.iter().any(|entry| entry.server.socket_address() == STRAY))
            })?;
        }
        Ok(())
    }
}

/// The kernel's state without the marker, as far as something is expected of it.
fn state(expected: &Expectation) -> Result<State> {
    let mut state = State::read(expected)?;
    state.virtual_servers.retain(|server| server.address != Some(MARKER));
    if let Some(addresses) = &mut state.kube_ipvs0 {
        addresses.remove(&format!("{MARKER}/32"));
    }
    Ok(state)
}

/// A Service and an endpoint that no case has, on a port that changes with each step.
fn marker(port: u16) -> String {
    let place = |object| with(object, json!({"metadata": {"namespace": "conformance"}}));
    let service = objects::service("marker", &[MARKER], &[objects::port("p", "UDP", port)]);
    let endpoints = objects::ready(["10.244.255.250"]);
    let objects = [
        with(place(service), json!({"spec": {"ipFamilies": ["IPv4"]}})),
        place(objects::slice("marker-1", "marker", &[objects::port("p", "UDP", 9)], &endpoints)),
    ];
    // As YAML has them.
    objects.map(|object| object.to_string()).join("\n---\n")
}

fn shell(command: &str) -> Result<()> {
    let output = Command::new("sh").args(["-c", command]).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot run `{command}`"))?;
    if !output.status.success() {
        bail!("`{command}` failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn restore(lines: &[String]) -> Result<()> {
    let mut child = Command::new("ipvsadm")
        .arg("-R")
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run ipvsadm")?;
    let mut input = child.stdin.take().context("ipvsadm has no input")?;
    input.write_all((lines.join("\n") + "\n").as_bytes()).context("cannot write to ipvsadm")?;
    drop(input);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("ipvsadm -R failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
