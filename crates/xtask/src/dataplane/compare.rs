//! What was expected of a cell, what came, and whether that is the same.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::network::Topology;
use super::objects::{NODE, Objects};
use super::probe::Try;
use super::recording::{Cell, Seen};

/// What the recordings call addresses.
#[derive(Clone, Debug)]
pub(crate) struct Names(BTreeMap<IpAddr, String>);

/// What a recording says of a cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Expected {
    /// The outcomes of its tries. How often each came is left to chance where they differ.
    pub(crate) outcomes: BTreeSet<String>,
    pub(crate) backends: Option<BTreeSet<String>>,
    /// Which backend saw which source.
    pub(crate) seen: Option<BTreeSet<(String, IpAddr)>>,
}

/// What came of the tries of a cell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Actual {
    pub(crate) outcomes: BTreeMap<String, usize>,
    pub(crate) seen: BTreeSet<(String, IpAddr)>,
}

pub(crate) const CONNECTED: &str = "connected";

impl Names {
    pub(crate) fn new(topology: &Topology, objects: &Objects) -> Self {
        let mut names: BTreeMap<IpAddr, String> =
            objects.vips().map(|(address, name)| (address, name.to_owned())).collect();
        for (name, addresses) in &topology.addresses {
            names.extend(addresses.iter().map(|address| (*address, name.clone())));
        }
        Self(names)
    }

    pub(crate) fn name(&self, address: IpAddr) -> String {
        self.0.get(&address).cloned().unwrap_or_else(|| address.to_string())
    }

    pub(crate) fn address(&self, name: &str, is_ipv6: bool) -> Option<IpAddr> {
        let mut matching = self.0.iter().filter(|(address, other)| address.is_ipv6() == is_ipv6 && *other == name);
        matching.next().map(|(address, _)| *address)
    }

    fn seen(&self, seen: &BTreeSet<(String, IpAddr)>) -> String {
        let each = seen.iter().map(|(backend, source)| format!("{backend} sees {}", self.name(*source)));
        each.collect::<Vec<_>>().join(", ")
    }
}

impl Expected {
    pub(crate) fn new(cell: &Cell, names: &Names) -> Result<Self> {
        let source = |seen: &Seen| {
            let by_name = || names.address(seen.source.as_ref()?, cell.is_ipv6());
            let source = seen.source_address.or_else(by_name);
            source.with_context(|| format!("nothing is known of the address {:?}", seen.source))
        };
        // A source that is not recorded cannot be compared.
        let has_sources = cell.seen.iter().flatten().all(|seen| seen.source.is_some() || seen.source_address.is_some());
        let backends =
            cell.backends.clone().or_else(|| Some(cell.seen.as_ref()?.iter().map(|s| s.backend.clone()).collect()));
        let seen = match &cell.seen {
            Some(seen) if has_sources => {
                Some(seen.iter().map(|seen| Ok((seen.backend.clone(), source(seen)?))).collect::<Result<_>>()?)
            }
            _ => None,
        };
        let result = cell.result.as_ref().context("the cell does not say what is expected")?;
        Ok(Self { outcomes: outcomes(result)?, backends, seen })
    }

    pub(crate) fn is(&self, outcome: &str) -> bool {
        self.outcomes.iter().eq([outcome])
    }

    /// Whether this is what came.
    pub(crate) fn admits(&self, got: &Actual) -> bool {
        self.outcomes.iter().eq(got.outcomes.keys())
            && self.backends.as_ref().is_none_or(|backends| *backends == got.backends())
            && self.seen.as_ref().is_none_or(|seen| *seen == got.seen)
    }

    pub(crate) fn describe(&self, names: &Names) -> String {
        let outcomes = self.outcomes.iter().map(String::as_str).collect::<Vec<_>>().join(" and ");
        match (&self.seen, &self.backends) {
            (Some(seen), _) if !seen.is_empty() => format!("{outcomes}: {}", names.seen(seen)),
            (None, Some(backends)) if !backends.is_empty() => {
                format!("{outcomes}: {}", backends.iter().map(String::as_str).collect::<Vec<_>>().join(", "))
            }
            _ => outcomes,
        }
    }
}

impl Actual {
    pub(crate) fn outcome(word: impl Into<String>) -> Self {
        Self { outcomes: BTreeMap::from([(word.into(), 1)]), seen: BTreeSet::new() }
    }

    pub(crate) fn add(&mut self, tried: Try) {
        let word = match tried {
            Ok(answer) => {
                self.seen.insert((answer.backend, answer.source));
                CONNECTED.to_owned()
            }
            Err(word) => word,
        };
        *self.outcomes.entry(word).or_default() += 1;
    }

    pub(crate) fn backends(&self) -> BTreeSet<String> {
        self.seen.iter().map(|(backend, _)| backend.clone()).collect()
    }

    pub(crate) fn describe(&self, names: &Names) -> String {
        let outcomes = match self.outcomes.len() {
            1 => self.outcomes.keys().cloned().collect(),
            _ => self.outcomes.iter().map(|(word, count)| format!("{count} {word}")).collect::<Vec<_>>().join(", "),
        };
        if self.seen.is_empty() { outcomes } else { format!("{outcomes}: {}", names.seen(&self.seen)) }
    }
}

/// A word, or a count for each of several.
fn outcomes(result: &Value) -> Result<BTreeSet<String>> {
    let words: BTreeSet<String> = match result {
        Value::String(text) => {
            let words = text.split([',', ';']).map(|part| {
                let is_word = |word: &&str| !word.chars().all(|c| c.is_ascii_digit() || "x:×=()".contains(c));
                part.split_whitespace().filter(is_word).collect::<Vec<_>>().join(" ").trim_end_matches(':').to_owned()
            });
            words.collect()
        }
        Value::Object(counts) => {
            counts.iter().filter(|(_, count)| count.as_u64() != Some(0)).map(|(word, _)| word.clone()).collect()
        }
        Value::Array(words) => words.iter().filter_map(|word| word.as_str().map(str::to_owned)).collect(),
        _ => BTreeSet::new(),
    };
    if words.is_empty() || words.contains("") {
        bail!("the result {result} cannot be understood");
    }
    Ok(words)
}

/// With affinity the scheduler chooses a backend for each client once, and it may choose another than it did for the
/// recording. Whether that is what came, and the source is right for it: the recorded one tells whether connections
/// are masqueraded.
pub(crate) fn is_another_choice(recorded: &Expected, got: &Actual, client: &str, home: &Home<'_>) -> bool {
    let only = |seen: &BTreeSet<(String, IpAddr)>| if seen.len() == 1 { seen.first().cloned() } else { None };
    let Some((chosen, saw)) = only(&got.seen) else { return false };
    let is_possible = recorded.outcomes.iter().eq(got.outcomes.keys())
        && recorded.backends.as_ref().is_some_and(|backends| backends.len() == 1)
        && home.endpoints.iter().any(|(address, _)| home.names.name(*address) == chosen);
    let own = home.address(client);
    let is_near = chosen == client || home.is_local(&chosen);
    let masqueraded = home.address(if is_near { "node-pod-side" } else { "node" });
    let sources = match recorded.seen.as_ref().map(only) {
        // Nothing was recorded of sources.
        None => return is_possible,
        Some(None) => return false,
        // Who reaches itself is masqueraded in any case.
        Some(Some(_)) if chosen == client => [masqueraded, None],
        Some(Some((backend, _))) if backend == client => [own, masqueraded],
        Some(Some((_, source))) if Some(source) == own => [own, None],
        Some(Some(_)) => [masqueraded, None],
    };
    is_possible && sources.contains(&Some(saw))
}

/// What is known of addresses and endpoints, for one Service and family.
pub(crate) struct Home<'a> {
    pub(crate) names: &'a Names,
    pub(crate) endpoints: BTreeSet<(IpAddr, String)>,
    pub(crate) is_ipv6: bool,
}

impl Home<'_> {
    fn address(&self, name: &str) -> Option<IpAddr> {
        self.names.address(name, self.is_ipv6)
    }

    /// Whether a backend is on the agent's node.
    fn is_local(&self, backend: &str) -> bool {
        self.endpoints.iter().any(|(address, node)| self.names.name(*address) == backend && node == NODE)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn results_are_words_or_counts() {
        let two = BTreeSet::from(["connected".to_owned(), "timeout".to_owned()]);
        assert_eq!(outcomes(&json!("timeout")).unwrap(), BTreeSet::from(["timeout".to_owned()]));
        assert_eq!(outcomes(&json!("not permitted")).unwrap(), BTreeSet::from(["not permitted".to_owned()]));
        assert_eq!(outcomes(&json!({"connected": 3, "timeout": 3, "refused": 0})).unwrap(), two);
        assert_eq!(outcomes(&json!("connected 3, timeout 3")).unwrap(), two);
        assert_eq!(outcomes(&json!("3x connected; 3x timeout")).unwrap(), two);
        assert!(outcomes(&json!(null)).is_err());
    }

    #[test]
    fn sources_and_backends_are_compared_as_sets() {
        let source: IpAddr = "10.244.1.6".parse().unwrap();
        let seen = BTreeSet::from([("pod-a".to_owned(), source)]);
        let expected = Expected { outcomes: ["connected".to_owned()].into(), backends: None, seen: Some(seen.clone()) };
        let mut got = Actual { outcomes: BTreeMap::from([("connected".to_owned(), 6)]), seen };
        assert!(expected.admits(&got));
        got.seen.insert(("remote-pod".to_owned(), source));
        assert!(!expected.admits(&got));
        got.outcomes.insert("timeout".to_owned(), 1);
        assert!(!Expected { seen: None, ..expected }.admits(&got));
    }

    #[test]
    fn another_choice_of_the_scheduler_needs_the_right_source() {
        let objects = Objects::new(json!([]), &[]).unwrap();
        let topology = json!({"addresses": {"pod-a": ["10.244.1.5"], "pod-b": ["10.244.1.6"],
            "remote-pod": ["10.244.2.6"], "node-pod-side": ["10.244.1.1"], "node": ["192.168.10.11"],
            "client": ["192.168.10.50"]}});
        let names = Names::new(&serde_json::from_value(topology).unwrap(), &objects);
        let address = |name: &str| names.address(name, false).unwrap();
        let endpoints = [(address("pod-a"), NODE.to_owned()), (address("remote-pod"), "node-b".to_owned())];
        let home = Home { names: &names, endpoints: endpoints.into(), is_ipv6: false };
        let admits = |client: &str, recorded: [&str; 2], got: [&str; 2]| {
            let seen = |[backend, source]: [&str; 2]| BTreeSet::from([(backend.to_owned(), address(source))]);
            let recorded = Expected {
                outcomes: [CONNECTED.to_owned()].into(),
                backends: Some([recorded[0].to_owned()].into()),
                seen: Some(seen(recorded)),
            };
            let got = Actual { outcomes: BTreeMap::from([(CONNECTED.to_owned(), 6)]), seen: seen(got) };
            is_another_choice(&recorded, &got, client, &home)
        };
        assert!(admits("client", ["remote-pod", "node"], ["pod-a", "node-pod-side"]));
        assert!(!admits("client", ["remote-pod", "node"], ["pod-a", "client"]));
        assert!(!admits("client", ["remote-pod", "node"], ["pod-b", "node-pod-side"]));
        assert!(admits("pod-b", ["pod-a", "pod-b"], ["remote-pod", "pod-b"]));
        assert!(!admits("pod-b", ["pod-a", "pod-b"], ["remote-pod", "node"]));
        assert!(admits("pod-a", ["remote-pod", "pod-a"], ["pod-a", "node-pod-side"]));
        assert!(!admits("pod-a", ["remote-pod", "pod-a"], ["pod-a", "pod-a"]));
    }
}
