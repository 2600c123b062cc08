//! The agent on the node: its manifests, its process, and how one knows that it has caught up.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use ipvs_netlink::{Client, Protocol, RealServerEntry, VirtualServerId};
use lab::Scratch;
use lab::manifests::Manifests;
use lab::netns::Namespace;
use lab::objects::{self, with};
use serde_json::{Value, json};

use super::objects::{Group, NODE, Objects};

/// How long after a sync the flows of what is gone may still be there.
const FLOWS: Duration = Duration::from_millis(100);

/// The address of Services that no recording has, one in each manifest. Its port changes along with all else there.
const MARKER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 255, 250));
const MARKER_PORT: u16 = 60_000;

/// The agent, which ends with this value.
pub(crate) struct Agent<'a> {
    executable: PathBuf,
    flags: Vec<String>,
    node: &'a Namespace,
    _dir: Scratch,
    manifests: Manifests,
    process: Option<lab::agent::Agent>,
    /// The ports of the markers.
    markers: BTreeMap<String, u16>,
}

impl<'a> Agent<'a> {
    /// Lays out the manifests, a file for each Service.
    pub(crate) fn new(executable: &Path, flags: &[String], node: &'a Namespace, objects: &Objects) -> Result<Self> {
        let (executable, flags, dir) = (executable.to_owned(), flags.to_vec(), Scratch::new()?);
        let manifests = Manifests::at(dir.path().join("manifests"))?;
        let mut agent = Self { executable, flags, node, _dir: dir, manifests, process: None, markers: BTreeMap::new() };
        agent.write("others", objects.others())?;
        for (name, group) in objects.groups() {
            agent.write_group(&name, &group, true)?;
        }
        Ok(agent)
    }

    /// Starts it and waits until it has looked at everything.
    pub(crate) fn start(&mut self) -> Result<()> {
        let mut command = Command::new(&self.executable);
        command
            .arg("--manifests")
            .arg(self.manifests.path())
            .arg(format!("--hostname-override={NODE}"))
            .args(&self.flags)
            .args(["--ipvs-min-sync-period=0s", "--conntrack-max-per-core=0"]);
        let process = self.node.run(|| lab::agent::Agent::spawn(&mut command))??;
        self.process.insert(process).wait_for_log("audited")?;
        Ok(())
    }

    /// Kills it so that it can do nothing about it.
    pub(crate) fn kill(&mut self) {
        self.process = None;
    }

    pub(crate) fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// Puts the objects of a Service in place of what its manifest had, and waits until the agent has done so too.
    /// Without the Service its slices stay, as when somebody deletes it.
    pub(crate) fn change(&mut self, name: &str, group: &Group, with_service: bool) -> Result<()> {
        let old = self.markers.get(name).copied();
        let new = self.write_group(name, group, with_service)?;
        // A manifest is taken in as a whole. The virtual servers that go are the last of its changes but for flows.
        let node = self.node;
        self.process.as_mut().context("there is no agent")?.try_until("take in the change", |_| {
            let servers = node.run(|| Client::connect()?.virtual_servers())??;
            let is_there = |port| servers.iter().any(|entry| entry.server.id == marker_id(port));
            anyhow::Ok(is_there(new) && !old.is_some_and(is_there))
        })?;
        sleep(FLOWS);
        Ok(())
    }

    /// The real servers of a virtual server.
    pub(crate) fn real_servers(&self, id: VirtualServerId) -> Result<Vec<RealServerEntry>> {
        self.node.run(|| Ok(Client::connect()?.real_servers(&id)?))?
    }

    /// The end of its log.
    pub(crate) fn last_log_lines(&self) -> String {
        self.process.as_ref().map(lab::agent::Agent::last_lines).unwrap_or_default()
    }

    /// Writes the manifest of a Service with a new marker; returns the port of that.
    fn write_group(&mut self, name: &str, group: &Group, with_service: bool) -> Result<u16> {
        let port = self.markers.values().max().map_or(MARKER_PORT, |port| port + 1);
        let marker = marker(name, port);
        let service = with_service.then_some(&group.service);
        self.write(name, service.into_iter().chain(&group.slices).chain(&marker))?;
        self.markers.insert(name.to_owned(), port);
        Ok(port)
    }

    fn write<'o>(&self, name: &str, objects: impl IntoIterator<Item = &'o Value>) -> Result<()> {
        Ok(self.manifests.write(&format!("{name}.json"), &objects::manifest(objects))?)
    }
}

fn marker_id(port: u16) -> VirtualServerId {
    VirtualServerId::address(Protocol::Tcp, SocketAddr::new(MARKER, port))
}

/// A Service with an endpoint, beside the one of this name.
fn marker(name: &str, port: u16) -> [Value; 2] {
    let name = format!("marker-{name}");
    let place = |object| with(object, json!({"metadata": {"namespace": "marker"}}));
    let service = objects::service(&name, &[MARKER], &[objects::port("p", "TCP", port)]);
    let endpoints = objects::ready(["10.244.255.250"]);
    [
        with(place(service), json!({"spec": {"ipFamilies": ["IPv4"]}})),
        place(objects::slice(&name, &name, &[objects::port("p", "TCP", 9)], &endpoints)),
    ]
}
