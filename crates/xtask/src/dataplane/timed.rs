//! Plays the sequences over time: connections and flows that stay while their Service changes.
//!
//! An event says in words what has just happened; its other keys are what was observed then. This file makes things
//! happen, [`observe`](super::observe) looks at what comes of them.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail};
use ipvs_netlink::{Protocol, VirtualServerId};
use serde_json::{Value, json};

use super::agent::Agent;
use super::compare::Names;
use super::network::Network;
use super::objects::{Group, Objects, list};
use super::observe::{Observer, Watched};
use super::recording::Event;
use super::results::{NOT_PLAYED, Played, Recorded};

/// What sequences are played on.
pub(crate) struct SequencePlayer<'a, 'b> {
    pub(crate) network: &'a Network,
    pub(crate) objects: &'a Objects,
    pub(crate) names: &'a Names,
    pub(crate) agent: &'a mut Agent<'b>,
}

/// A Service whose endpoints come and go.
struct Subject {
    name: String,
    /// As it is while nothing happens.
    whole: Group,
    is_ipv6: bool,
    target: SocketAddr,
    protocol: Protocol,
}

/// Plays the events of all sequences and returns what came of each.
pub(crate) fn play(player: &mut SequencePlayer<'_, '_>, recorded: &[Recorded]) -> Vec<Played> {
    let mut results: Vec<Played> = recorded.iter().map(Recorded::not_played).collect();
    let mut events = Vec::new();
    for (result, recorded) in results.iter_mut().zip(recorded) {
        match serde_json::from_value::<Event>(recorded.value.clone()) {
            Ok(event) => events.push((result, event)),
            Err(error) => result.got = format!("could not be played: its keys cannot be understood: {error}"),
        }
    }
    for sequence in events.chunk_by_mut(|(_, a), (_, b)| a.sequence() == b.sequence()) {
        let name = sequence[0].1.sequence();
        let outcome = player.sequence(sequence);
        if let Err(error) = outcome {
            // Whoever comes after the event that went wrong was not played.
            if let Some((result, _)) = sequence.iter_mut().find(|(result, _)| result.got == NOT_PLAYED) {
                result.got = format!("could not be played: {error:#}");
            }
        }
        let is_as_recorded = sequence.iter().all(|(result, _)| result.passed());
        eprintln!("{} {name}", if is_as_recorded { "ok    " } else { "DIFFERS" });
    }
    results
}

impl SequencePlayer<'_, '_> {
    fn sequence(&mut self, sequence: &mut [(&mut Played, Event)]) -> Result<()> {
        let subject = self.subject(&sequence[0].1)?;
        let played = self.events(&subject, sequence);
        // The next sequence finds everything as it was.
        if !self.agent.is_running() {
            self.agent.start()?;
        }
        self.agent.change(&subject.name, &subject.whole, true)?;
        played
    }

    fn events(&mut self, subject: &Subject, sequence: &mut [(&mut Played, Event)]) -> Result<()> {
        let client = self.network.namespace(&sequence[0].1.client)?;
        let mut alive = self.backends(subject, &subject.whole);
        let mut watched = Watched::start(&sequence[0].1, client, subject.target, &alive)?;
        for (result, event) in sequence {
            if let Some(backends) = self.trigger(subject, &event.after, &watched)? {
                alive = backends;
            }
            let id = VirtualServerId::address(subject.protocol, subject.target);
            let (target, agent) = (subject.target, &*self.agent);
            let mut observer = Observer { client, target, id, agent, alive: &alive, watched: &mut watched };
            observer.observe(event)?.record_in(result);
        }
        Ok(())
    }

    fn subject(&self, event: &Event) -> Result<Subject> {
        let is_affinity = event.case.contains("affinity");
        let default = if is_affinity { "sticky" } else { "cluster" };
        let name = event.service.clone().unwrap_or_else(|| default.to_owned());
        let whole = self.objects.groups().remove(&name).with_context(|| format!("there is no Service {name}"))?;
        let is_ipv6 = event.family == "IPv6";
        let protocol = if event.case.contains("udp") { Protocol::Udp } else { Protocol::Tcp };
        let address = list(&whole.service["spec"]["clusterIPs"])
            .iter()
            .filter_map(|ip| ip.as_str()?.parse::<IpAddr>().ok())
            .find(|ip| ip.is_ipv6() == is_ipv6)
            .with_context(|| format!("{name} has no ClusterIP of {}", event.family))?;
        let ports = list(&whole.service["spec"]["ports"]);
        let port =
            ports.iter().find(|port| port["protocol"] == protocol.to_string()).and_then(|port| port["port"].as_u64());
        let port = u16::try_from(port.with_context(|| format!("{name} has no port of {protocol}"))?)?;
        let target = event.target.unwrap_or(SocketAddr::new(address, port));
        Ok(Subject { name, whole, is_ipv6, target, protocol })
    }

    /// Makes happen what the words say. Returns the backends that are ready then, if that may have changed.
    fn trigger(&mut self, subject: &Subject, after: &str, watched: &Watched) -> Result<Option<BTreeSet<String>>> {
        let backend = |end: &str| after.strip_suffix(end);
        let mut group = subject.whole.clone();
        match after {
            "start" => return Ok(None),
            "kube-proxy killed" => {
                self.agent.kill();
                return Ok(None);
            }
            "kube-proxy started again" => {
                self.agent.start()?;
                return Ok(None);
            }
            "Service deleted and synced" => {
                self.agent.change(&subject.name, &group, false)?;
                return Ok(None);
            }
            "no endpoints" => edit(&mut group, |_| false),
            "the chosen endpoint was removed" => {
                let chosen = watched.chosen().context("the client has no endpoint of its own")?;
                self.remove(&mut group, chosen);
            }
            "both endpoints back" | "it came back" | "Service made again" => {}
            _ => {
                if let Some(backend) = backend("'s endpoint removed and synced") {
                    self.remove(&mut group, backend);
                } else if let Some((backend, _)) = after.split_once(" serving and terminating") {
                    edit(&mut group, |endpoint| {
                        if self.is(endpoint, backend) {
                            endpoint["conditions"] = json!({"ready": false, "serving": true, "terminating": true});
                        }
                        true
                    });
                } else if backend("'s endpoint back").or_else(|| backend(" ready again")).is_none() {
                    bail!("nobody knows how to make this happen: {after}");
                }
            }
        }
        self.agent.change(&subject.name, &group, true)?;
        Ok(Some(self.backends(subject, &group)))
    }

    fn remove(&self, group: &mut Group, backend: &str) {
        edit(group, |endpoint| !self.is(endpoint, backend));
    }

    fn is(&self, endpoint: &Value, backend: &str) -> bool {
        let address = endpoint["addresses"][0].as_str().and_then(|address| address.parse::<IpAddr>().ok());
        address.is_some_and(|address| self.names.name(address) == backend)
    }

    /// The ready backends of a Service in the family of the sequence.
    fn backends(&self, subject: &Subject, group: &Group) -> BTreeSet<String> {
        let endpoints = group.slices.iter().flat_map(|slice| list(&slice["endpoints"]));
        endpoints
            .filter(|endpoint| endpoint["conditions"]["ready"] != false)
            .filter_map(|endpoint| endpoint["addresses"][0].as_str()?.parse::<IpAddr>().ok())
            .filter(|address| address.is_ipv6() == subject.is_ipv6)
            .map(|address| self.names.name(address))
            .collect()
    }
}

/// Changes the endpoints of all slices, or takes those away that are not to stay.
fn edit(group: &mut Group, mut stays: impl FnMut(&mut Value) -> bool) {
    for endpoints in group.slices.iter_mut().filter_map(|slice| slice["endpoints"].as_array_mut()) {
        endpoints.retain_mut(&mut stays);
    }
}
