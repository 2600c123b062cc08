//! The format of a case: what the node looks like, what happens, and what is expected.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::answers::{HealthCheck, NoLocalEndpoints};

/// `case.json`.
#[derive(Debug, Deserialize)]
pub(crate) struct Case {
    #[serde(skip)]
    pub(crate) dir: PathBuf,
    pub(crate) name: String,
    pub(crate) flags: Vec<String>,
    pub(crate) node_name: String,
    pub(crate) families: Vec<String>,
    pub(crate) interfaces: Vec<Interface>,
    #[serde(default)]
    pub(crate) preexisting: Preexisting,
    pub(crate) steps: Vec<Step>,
}

/// An interface of the node.
#[derive(Debug, Deserialize)]
pub(crate) struct Interface {
    pub(crate) name: String,
    pub(crate) addresses: Vec<String>,
}

/// What is there before the agent starts.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Preexisting {
    /// Lines for `ipvsadm -R`.
    pub(crate) ipvsadm: Vec<String>,
    /// Addresses on a `kube-ipvs0` that exists.
    pub(crate) kube_ipvs0: Option<Vec<String>>,
}

/// What happens before a state is compared.
#[derive(Debug, Deserialize)]
pub(crate) struct Step {
    #[serde(default)]
    pub(crate) restart: bool,
    #[serde(default)]
    pub(crate) commands: Vec<String>,
    #[serde(default)]
    pub(crate) delete: Vec<Object>,
    #[serde(default)]
    pub(crate) apply: Vec<String>,
    pub(crate) expect: String,
}

/// An object of the API.
#[derive(Debug, Deserialize)]
pub(crate) struct Object {
    pub(crate) kind: String,
    #[serde(default)]
    pub(crate) namespace: Option<String>,
    pub(crate) name: String,
}

impl Object {
    /// The file that holds the object: the same over all steps.
    pub(crate) fn file_name(&self) -> String {
        let namespace = self.namespace.as_ref().map(|namespace| format!("{namespace}-")).unwrap_or_default();
        format!("{}-{namespace}{}.yaml", self.kind.to_lowercase(), self.name)
    }
}

/// `expect-N.json`: the keys that are compared, and the names of the others.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Expectation {
    pub(crate) virtual_servers: Vec<VirtualServer>,
    pub(crate) kube_ipvs0: Option<BTreeSet<String>>,
    pub(crate) ipvs_timeouts: Option<Timeouts>,
    pub(crate) kube_ipvs0_link: Option<Link>,
    /// Values by their path below /proc/sys.
    #[serde(default)]
    pub(crate) sysctls: BTreeMap<String, String>,
    pub(crate) no_local_endpoints: Option<Vec<NoLocalEndpoints>>,
    pub(crate) health_check_node_ports: Option<Vec<HealthCheck>>,
    #[serde(flatten)]
    pub(crate) others: BTreeMap<String, Value>,
}

/// A virtual server. Fields that are not known are refused: nothing recorded may go uncompared.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(crate) struct VirtualServer {
    pub(crate) protocol: Option<String>,
    pub(crate) address: Option<IpAddr>,
    pub(crate) port: Option<u16>,
    pub(crate) fwmark: Option<u32>,
    pub(crate) family: Option<String>,
    pub(crate) scheduler: String,
    pub(crate) flags: BTreeSet<String>,
    pub(crate) persistence_timeout: u32,
    /// A dotted mask or a prefix length.
    #[serde(deserialize_with = "text")]
    pub(crate) netmask: String,
    pub(crate) real_servers: Vec<RealServer>,
}

impl VirtualServer {
    pub(crate) fn is_at_the_front_end_of(&self, other: &Self) -> bool {
        let front_end = |it: &Self| (it.protocol.clone(), it.address, it.port, it.fwmark, it.family.clone());
        front_end(self) == front_end(other)
    }
}

/// A real server.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(deny_unknown_fields)]
pub(crate) struct RealServer {
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    pub(crate) forward: String,
    pub(crate) weight: u32,
    #[serde(default)]
    pub(crate) upper_threshold: u32,
    #[serde(default)]
    pub(crate) lower_threshold: u32,
}

/// The IPVS timeouts, in seconds.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(crate) struct Timeouts {
    pub(crate) tcp: u32,
    pub(crate) tcp_fin: u32,
    pub(crate) udp: u32,
}

/// The device `kube-ipvs0`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(crate) struct Link {
    pub(crate) up: bool,
    pub(crate) arp: bool,
    pub(crate) mtu: u32,
}

impl Case {
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        Ok(Self { dir: dir.to_owned(), ..read(&dir.join("case.json"))? })
    }

    pub(crate) fn expectation(&self, step: &Step) -> Result<Expectation> {
        read(&self.dir.join(&step.expect))
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("cannot understand {}", path.display()))
}

fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(match Value::deserialize(deserializer)? {
        Value::String(text) => text,
        other => other.to_string(),
    })
}
