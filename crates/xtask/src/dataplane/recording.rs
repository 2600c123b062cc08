//! The format of the recordings, read leniently: other files of the same kind may say more or less than those here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A file with what was recorded under some flags.
#[derive(Debug)]
pub(crate) struct Recording {
    /// The file's name without its ending.
    pub(crate) name: String,
    pub(crate) flags: Vec<String>,
    pub(crate) cells: Vec<Value>,
    pub(crate) events: Vec<Value>,
}

/// What went to one front end from one client, and what came of it.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Cell {
    pub(crate) case: Option<String>,
    pub(crate) service: Option<String>,
    pub(crate) front_end: Option<String>,
    pub(crate) family: Option<String>,
    pub(crate) protocol: Option<String>,
    pub(crate) client: Option<String>,
    /// An address with a port; of a ping, a name for people.
    pub(crate) target: Option<String>,
    pub(crate) address: Option<IpAddr>,
    pub(crate) port: Option<u16>,
    pub(crate) result: Option<Value>,
    pub(crate) backends: Option<BTreeSet<String>>,
    pub(crate) seen: Option<Vec<Seen>>,
    #[serde(flatten)]
    pub(crate) others: BTreeMap<String, Value>,
}

/// A backend that answered, and where it saw the connection come from.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Seen {
    pub(crate) backend: String,
    /// The name of the address.
    pub(crate) source: Option<String>,
    pub(crate) source_address: Option<IpAddr>,
}

/// A step of a sequence over time.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Event {
    pub(crate) case: String,
    pub(crate) family: String,
    pub(crate) client: String,
    /// What had just happened.
    pub(crate) after: String,
    pub(crate) service: Option<String>,
    pub(crate) target: Option<SocketAddr>,
    /// What was observed then.
    #[serde(flatten)]
    pub(crate) observed: BTreeMap<String, Value>,
}

/// What a cell asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Question {
    Tcp(SocketAddr),
    Udp(SocketAddr),
    Ping(IpAddr),
}

impl Cell {
    pub(crate) fn question(&self) -> Result<Question> {
        let target = self.target();
        let is = |word: &str| self.protocol.as_deref().is_some_and(|protocol| protocol.eq_ignore_ascii_case(word));
        match (target, self.address) {
            (Some(target), _) if is("TCP") => Ok(Question::Tcp(target)),
            (Some(target), _) if is("UDP") => Ok(Question::Udp(target)),
            (Some(_), _) => bail!("the protocol {:?} cannot be played", self.protocol),
            (None, Some(address)) if self.case.as_deref() == Some("ping") || is("ICMP") => Ok(Question::Ping(address)),
            (None, _) => bail!("the cell has neither a target with a port and a protocol, nor an address to ping"),
        }
    }

    /// The address and port, from whatever keys say it.
    fn target(&self) -> Option<SocketAddr> {
        let text = self.target.as_deref().unwrap_or_default();
        let without_brackets = || {
            let (address, port) = text.rsplit_once(':')?;
            Some(SocketAddr::new(address.trim_matches(['[', ']']).parse().ok()?, port.parse().ok()?))
        };
        let apart = || Some(SocketAddr::new(text.parse().ok().or(self.address)?, self.port?));
        text.parse().ok().or_else(apart).or_else(without_brackets)
    }

    pub(crate) fn is_ipv6(&self) -> bool {
        match self.question() {
            Ok(Question::Tcp(target) | Question::Udp(target)) => target.is_ipv6(),
            Ok(Question::Ping(address)) => address.is_ipv6(),
            Err(_) => self.family.as_deref() == Some("IPv6"),
        }
    }

    /// Where it stands in the picture: two words for the row.
    pub(crate) fn row(&self) -> [String; 2] {
        let word = |word: &Option<String>| word.clone().unwrap_or_default();
        if self.service.is_none() && self.front_end.is_none() {
            return [word(&self.case), word(&self.target)];
        }
        let words = [&self.service, &self.case].into_iter().flatten().map(String::as_str);
        [words.collect::<Vec<_>>().join(", "), word(&self.front_end)]
    }

    /// What the cell is called: nothing else of the same file is called so.
    pub(crate) fn name(&self) -> String {
        let address = self.address.map(|address| address.to_string());
        let port = self.port.map(|port| format!("port {port}"));
        let client = self.client.as_ref().map(|client| format!("from {client}"));
        let keys = [&self.case, &self.service, &self.front_end, &self.family, &self.protocol, &client];
        let to = [&self.target, &address, &port].into_iter().flatten().cloned().collect::<Vec<_>>().join(" ");
        let mut words: Vec<String> = keys.into_iter().flatten().cloned().collect();
        if !to.is_empty() {
            words.push(format!("to {to}"));
        }
        words.join(" ")
    }
}

impl Event {
    /// The sequence that the event belongs to.
    pub(crate) fn sequence(&self) -> String {
        format!("{}: {} {}", self.case, self.family, self.client)
    }

    pub(crate) fn name(&self) -> String {
        format!("{}: {}", self.sequence(), self.after)
    }
}

/// All recordings of a directory, or of the directory `dataplane` in it, and where they are.
pub(crate) fn find(dir: &Path) -> Result<(PathBuf, Vec<Recording>)> {
    let dir = dir.canonicalize().with_context(|| format!("cannot find the recordings {}", dir.display()))?;
    for dir in [dir.clone(), dir.join("dataplane")] {
        let recordings = if dir.is_dir() { read_all(&dir)? } else { Vec::new() };
        if !recordings.is_empty() {
            return Ok((dir, recordings));
        }
    }
    bail!("there is no recording in {}: each is a file with flags, and cells or events", dir.display())
}

fn read_all(dir: &Path) -> Result<Vec<Recording>> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    paths.sort();
    let mut recordings = Vec::new();
    for path in paths {
        let mut value = read_json(&path)?;
        if value.get("cells").or(value.get("events")).is_none() {
            continue;
        }
        let flags = value.get_mut("flags").map(Value::take);
        let flags = flags.with_context(|| format!("{} does not say under which flags", path.display()))?;
        let mut list = |key: &str| match value.get_mut(key).map(Value::take) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(list) => serde_json::from_value(list).with_context(|| format!("{}: {key}", path.display())),
        };
        recordings.push(Recording {
            name: path.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
            cells: list("cells")?,
            events: list("events")?,
            flags: serde_json::from_value(flags).with_context(|| format!("{}: flags", path.display()))?,
        });
    }
    Ok(recordings)
}

pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("cannot understand {}", path.display()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn question(cell: Value) -> Result<Question> {
        serde_json::from_value::<Cell>(cell).unwrap().question()
    }

    #[test]
    fn a_cell_says_what_it_asks_in_several_ways() {
        let six: SocketAddr = "[fd00::1]:80".parse().unwrap();
        let tcp = Question::Tcp(six);
        assert_eq!(question(json!({"target": "[fd00::1]:80", "protocol": "TCP"})).unwrap(), tcp);
        assert_eq!(question(json!({"target": "fd00::1:80", "protocol": "tcp"})).unwrap(), tcp);
        assert_eq!(question(json!({"target": "fd00::1", "port": 80, "protocol": "TCP"})).unwrap(), tcp);
        assert_eq!(question(json!({"address": "fd00::1", "port": 80, "protocol": "UDP"})).unwrap(), Question::Udp(six));
        let ping = json!({"case": "ping", "target": "ClusterIP", "address": "fd00::1", "extra": 1});
        assert_eq!(question(ping).unwrap(), Question::Ping(six.ip()));
        assert!(question(json!({"target": "10.0.0.1:80", "protocol": "SCTP"})).is_err());
        assert!(question(json!({"client": "node"})).is_err());
    }

    #[test]
    fn every_recording_of_this_repository_can_be_played() {
        let (_, recordings) = find(Path::new(super::super::RECORDINGS)).unwrap();
        let mut names = BTreeSet::new();
        for cell in recordings.iter().flat_map(|recording| &recording.cells) {
            let cell: Cell = serde_json::from_value(cell.clone()).unwrap();
            cell.question().unwrap();
            assert!(cell.others.is_empty() && cell.result.is_some() && cell.client.is_some(), "{cell:?}");
            assert!(names.insert(cell.name()), "{} is there twice", cell.name());
        }
        for event in recordings.iter().flat_map(|recording| &recording.events) {
            let event: Event = serde_json::from_value(event.clone()).unwrap();
            assert!(!event.observed.is_empty() && names.insert(event.name()), "{event:?}");
        }
        assert!(names.len() > 500, "{}", names.len());
    }
}
