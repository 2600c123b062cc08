//! What was expected of a cell, what came, and whether that is the same.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::network::Topology;
use super::objects::Objects;
use super::probe::Try;
use super::recording::Cell;

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
pub(crate) struct Got {
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
        let seen = cell.seen.as_ref().map(|seen| {
            let each = seen.iter().map(|seen| {
                let address = || names.address(seen.source.as_ref()?, cell.is_ipv6());
                let source = seen.source_address.or_else(address);
                let source = source.with_context(|| format!("nothing is known of the address {:?}", seen.source))?;
                Ok((seen.backend.clone(), source))
            });
            each.collect::<Result<_>>()
        });
        let result = cell.result.as_ref().context("the cell does not say what is expected")?;
        Ok(Self { outcomes: outcomes(result)?, backends: cell.backends.clone(), seen: seen.transpose()? })
    }

    pub(crate) fn is(&self, outcome: &str) -> bool {
        self.outcomes.iter().eq([outcome])
    }

    /// Whether this is what came.
    pub(crate) fn admits(&self, got: &Got) -> bool {
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

impl Got {
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
/// recording: what is expected then of the one that it did choose. The recorded source tells whether the connection
/// was masqueraded.
pub(crate) fn of_another_choice(expected: &Expected, got: &Got, client: &str, home: &Home<'_>) -> Option<Expected> {
    let [(recorded, source)] = <[_; 1]>::try_from(expected.seen.as_ref()?.iter().collect::<Vec<_>>()).ok()?;
    let [(chosen, saw)] = <[_; 1]>::try_from(got.seen.iter().collect::<Vec<_>>()).ok()?;
    let own = home.address(client);
    let masqueraded = if *chosen == client || home.is_local(chosen) { "node-pod-side" } else { "node" };
    let masqueraded = home.address(masqueraded);
    let is_endpoint = home.endpoints.iter().any(|(address, _)| home.names.name(*address) == *chosen);
    let source_fits = if chosen == client {
        Some(*saw) == masqueraded
    } else if recorded == client {
        // It reached itself, which is always masqueraded and so tells nothing.
        [own, masqueraded].contains(&Some(*saw))
    } else if Some(*source) == own {
        Some(*saw) == own
    } else {
        Some(*saw) == masqueraded
    };
    (chosen != recorded && is_endpoint && source_fits).then(|| Expected {
        outcomes: expected.outcomes.clone(),
        backends: Some(got.backends()),
        seen: Some(got.seen.clone()),
    })
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
        self.endpoints
            .iter()
            .any(|(address, node)| self.names.name(*address) == backend && node == super::objects::NODE)
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
        let mut got = Got { outcomes: BTreeMap::from([("connected".to_owned(), 6)]), seen };
        assert!(expected.admits(&got));
        got.seen.insert(("remote-pod".to_owned(), source));
        assert!(!expected.admits(&got));
        got.outcomes.insert("timeout".to_owned(), 1);
        assert!(!Expected { seen: None, ..expected }.admits(&got));
    }
}
