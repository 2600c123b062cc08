//! The agent on the node: its manifests, its process, and how one knows that it has caught up.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ipvs_netlink::{Client, Protocol, RealServerEntry, VirtualServerId};
use lab::Scratch;
use lab::netns::Namespace;
use serde_json::{Value, json};

use super::objects::{Group, NODE, Objects};

/// How long the agent may take to catch up. It takes a fraction of a second, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);
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
    process: Option<Child>,
    /// How often it was started.
    starts: usize,
    /// The ports of the markers.
    markers: BTreeMap<String, u16>,
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        self.kill();
    }
}

impl<'a> Agent<'a> {
    /// Lays out the manifests, a file for each Service.
    pub(crate) fn new(executable: &Path, flags: &[String], node: &'a Namespace, objects: &Objects) -> Result<Self> {
        let (executable, flags, dir) = (executable.to_owned(), flags.to_vec(), Scratch::new()?);
        let mut agent = Self { executable, flags, node, dir, process: None, starts: 0, markers: BTreeMap::new() };
        fs::create_dir(agent.manifests()).context("cannot create a directory for the manifests")?;
        agent.write("others", &objects.others().collect::<Vec<_>>())?;
        for (name, group) in objects.groups() {
            agent.write_group(&name, &group, true)?;
        }
        Ok(agent)
    }

    /// Starts it and waits until it has looked at everything.
    pub(crate) fn start(&mut self) -> Result<()> {
        let log = fs::File::options().append(true).create(true).open(self.log()).context("cannot open the log")?;
        let mut command = Command::new(&self.executable);
        command
            .arg("--manifests")
            .arg(self.manifests())
            .arg(format!("--hostname-override={NODE}"))
            .args(&self.flags)
            .args(["--ipvs-min-sync-period=0s", "--conntrack-max-per-core=0"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let process = self.node.run(|| command.spawn())?;
        self.process = Some(process.with_context(|| format!("cannot start {}", self.executable.display()))?);
        self.starts += 1;
        let starts = self.starts;
        self.until("audit", |agent| Ok(agent.read_log().matches("audited").count() >= starts))
    }

    /// Kills it so that it can do nothing about it.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // One that has ended already is as dead.
            let _ = process.kill();
            let _ = process.wait();
        }
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
        self.until("take in the change", |agent| {
            let servers = agent.node.run(|| Client::connect()?.virtual_servers())??;
            let is_there = |port| servers.iter().any(|entry| entry.server.id == marker_id(port));
            Ok(is_there(new) && !old.is_some_and(is_there))
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
        let log = self.read_log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    fn manifests(&self) -> PathBuf {
        self.dir.path().join("manifests")
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    fn read_log(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
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

    fn until(&mut self, what: &str, mut done: impl FnMut(&Self) -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        while !done(self)? {
            let ended = self.process.as_mut().and_then(|process| process.try_wait().ok().flatten());
            if ended.is_some() || start.elapsed() > PATIENCE {
                let ended = ended.map(|status| format!(" ({status})")).unwrap_or_default();
                bail!(
                    "the agent did not {what} within {PATIENCE:?}{ended}; the end of its log:\n{}",
                    self.last_words()
                );
            }
            sleep(Duration::from_millis(5));
        }
        Ok(())
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
