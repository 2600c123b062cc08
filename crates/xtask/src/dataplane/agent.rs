//! The agent on the node: its manifests, its process, and how one knows that it has caught up.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use ipvs_netlink::{Client, Protocol, RealServerEntry, VirtualServerId};
use lab::Scratch;
use lab::netns::Namespace;
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
    dir: Scratch,
    process: Option<lab::agent::Agent>,
    /// The ports of the markers.
    markers: BTreeMap<String, u16>,
}

impl<'a> Agent<'a> {
    /// Lays out the manifests, a file for each Service.
    pub(crate) fn new(executable: &Path, flags: &[String], node: &'a Namespace, objects: &Objects) -> Result<Self> {
        let (executable, flags, dir) = (executable.to_owned(), flags.to_vec(), Scratch::new()?);
        let mut agent = Self { executable, flags, node, dir, process: None, markers: BTreeMap::new() };
        fs::create_dir(agent.manifests()).context("cannot create a directory for the manifests")?;
        agent.write("others", &objects.others().collect::<Vec<_>>())?;
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
            .arg(self.manifests())
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
    pub(crate) fn last_words(&self) -> String {
        self.process.as_ref().map(lab::agent::Agent::last_lines).unwrap_or_default()
    }

    fn manifests(&self) -> PathBuf {
        self.dir.path().join("manifests")
    }

    /// Writes the manifest of a Service with a new marker; returns the port of that.
    fn write_group(&mut self, name: &str, group: &Group, with_service: bool) -> Result<u16> {
        let port = self.markers.values().max().map_or(MARKER_PORT, |port| port + 1);
        let marker = marker(name, port);
        let service = with_service.then_some(&group.service);
        self.write(name, &service.into_iter().chain(&group.slices).chain(&marker).collect::<Vec<_>>())?;
        self.markers.insert(name.to_owned(), port);
        Ok(port)
    }

    /// Replaces a manifest in one move, so that nobody reads half of it.
    fn write(&self, name: &str, objects: &[&Value]) -> Result<()> {
        let text: Vec<String> = objects.iter().map(ToString::to_string).collect();
        let temporary = self.dir.path().join("temporary");
        fs::write(&temporary, text.join("\n")).context("cannot write a manifest")?;
        fs::rename(&temporary, self.manifests().join(format!("{name}.json"))).context("cannot put a manifest in place")
    }
}

fn marker_id(port: u16) -> VirtualServerId {
    VirtualServerId::address(Protocol::Tcp, SocketAddr::new(MARKER, port))
}

/// A Service with an endpoint, beside the one of this name.
fn marker(name: &str, port: u16) -> [Value; 2] {
    let name = format!("marker-{name}");
    [
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "marker"}, "spec": {
            "clusterIP": MARKER, "clusterIPs": [MARKER], "ipFamilies": ["IPv4"],
            "ports": [{"name": "p", "protocol": "TCP", "port": port}],
        }}),
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": name, "namespace": "marker", "labels": {"kubernetes.io/service-name": name}},
            "ports": [{"name": "p", "protocol": "TCP", "port": 9}],
            "endpoints": [{"addresses": ["10.244.255.250"], "conditions": {"ready": true}}],
        }),
    ]
}
