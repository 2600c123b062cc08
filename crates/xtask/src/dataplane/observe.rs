//! Looks at what comes of an event in a sequence, key by key.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ipvs_netlink::VirtualServerId;
use lab::netns::Namespace;
use serde_json::{Value, json};

use super::agent::Agent;
use super::compare::CONNECTED;
use super::objects::list;
use super::probe::{self, Connection, Flow, TIMEOUT, Try};
use super::recording::Event;
use super::results::{Played, Verdict, describe};

/// How long something that must come may take: a reset follows the next time that TCP sends again.
const OBSERVE_TIMEOUT: Duration = Duration::from_secs(15);
/// How long connections that were closed may count as active.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);
/// How many new connections or flows tell where they go.
const TRIES: usize = 6;

/// What a client keeps over a sequence.
pub(crate) enum Watched {
    Flow { flow: Flow, first: String },
    Connection { connection: Connection, first: String },
    Affinity { before: BTreeSet<String>, now: BTreeSet<String> },
}

/// Looks at things after an event.
pub(crate) struct Observer<'a> {
    pub(crate) client: &'a Namespace,
    pub(crate) target: SocketAddr,
    pub(crate) id: VirtualServerId,
    pub(crate) agent: &'a Agent<'a>,
    /// The backends that new connections may go to.
    pub(crate) alive: &'a BTreeSet<String>,
    pub(crate) watched: &'a mut Watched,
}

/// What was seen after an event, key by key.
#[derive(Default)]
pub(crate) struct Observation {
    got: BTreeMap<String, Value>,
    differs: bool,
    not_compared: BTreeSet<String>,
}

impl Watched {
    /// Opens what the case is about. Where it matters, by whom it is answered first is a matter of tries.
    pub(crate) fn start(
        event: &Event,
        client: &Namespace,
        target: SocketAddr,
        alive: &BTreeSet<String>,
    ) -> Result<Self> {
        if event.case.contains("affinity") {
            let now = new_connections(client, target)?.1;
            return Ok(Self::Affinity { before: now.clone(), now });
        }
        let keys = ["answer_from", "before", "answer"].iter().filter_map(|key| event.observed.get(*key)?.as_str());
        let wanted = keys.into_iter().find(|name| alive.contains(*name));
        for _ in 0..4 * TRIES {
            let (watched, answer) = client.run(|| Self::open(event, target))??;
            let first = answer.map_err(|word| anyhow::anyhow!("the first try came to: {word}"))?.backend;
            if wanted.is_none_or(|wanted| wanted == first) {
                return Ok(watched);
            }
        }
        bail!("{} never answered", wanted.unwrap_or("a backend"))
    }

    fn open(event: &Event, target: SocketAddr) -> Result<(Self, Try)> {
        let failed = |word| anyhow::anyhow!("the client cannot connect: {word}");
        let name = |answer: &Try| answer.as_ref().map(|answer| answer.backend.clone()).unwrap_or_default();
        Ok(if event.case.contains("udp") {
            let flow = Flow::open(target).map_err(failed)?;
            let answer = flow.ask();
            (Self::Flow { flow, first: name(&answer) }, answer)
        } else {
            let mut connection = Connection::open(target).map_err(failed)?;
            let answer = connection.ask(OBSERVE_TIMEOUT);
            (Self::Connection { connection, first: name(&answer) }, answer)
        })
    }

    /// The one endpoint that the client with affinity had at first.
    pub(crate) fn chosen(&self) -> Option<&str> {
        match self {
            Self::Affinity { before, .. } if before.len() == 1 => before.first().map(String::as_str),
            _ => None,
        }
    }
}

impl Observer<'_> {
    /// Looks at everything that was recorded.
    pub(crate) fn observe(&mut self, event: &Event) -> Result<Observation> {
        let mut seen = Observation::default();
        let recorded = |key: &str| event.observed.get(key);
        if let Watched::Flow { first, .. } | Watched::Connection { first, .. } = &*self.watched {
            for key in ["answer_from", "before"] {
                seen.compare(key, recorded(key).map(|recorded| (json!(first), *recorded == json!(first))));
            }
        }
        seen.compare("answer", recorded("answer").map(|recorded| self.answer(recorded)).transpose()?);
        seen.compare("answers", recorded("answers").map(|recorded| self.answers(recorded)).transpose()?);
        // Before there are new connections, which would count too.
        seen.compare("real_servers", recorded("real_servers").map(|list| self.real_servers(list)).transpose()?);
        if let Some(recorded) = recorded("new_connections") {
            let got = json!(new_connections(self.client, self.target)?.1);
            let is_same = set(recorded) == set(&got);
            seen.compare("new_connections", Some((got, is_same)));
        }
        if let Some(recorded) = recorded("new_connection") {
            let got = self.client.run(|| probe::tcp(self.target))?;
            let got = json!(got.map_or_else(|word| word, |_| CONNECTED.to_owned()));
            seen.compare("new_connection", Some((got.clone(), *recorded == got)));
        }
        self.affinity(event, &mut seen)?;
        seen.not_compared = event.observed.keys().filter(|key| !seen.got.contains_key(*key)).cloned().collect();
        Ok(seen)
    }

    /// What the connection that is open says.
    fn answer(&mut self, recorded: &Value) -> Result<(Value, bool)> {
        let Watched::Connection { connection, .. } = self.watched else { bail!("there is no connection to ask on") };
        let limit = if recorded == "timeout" { TIMEOUT } else { OBSERVE_TIMEOUT };
        let got = json!(connection.ask(limit).map_or_else(|word| word, |answer| answer.backend));
        Ok((got.clone(), *recorded == got))
    }

    /// What the flow is answered. Where it moves to is the scheduler's choice, but it moves to one place.
    fn answers(&mut self, recorded: &Value) -> Result<(Value, bool)> {
        let Watched::Flow { flow, .. } = self.watched else { bail!("there is no flow to send on") };
        let got = (0..list(recorded).len()).map(|_| flow.ask().map_or_else(|word| word, |answer| answer.backend));
        let got: Vec<String> = got.collect();
        let backends: BTreeSet<&str> = got.iter().map(String::as_str).collect();
        let is_moved = backends.len() == 1 && backends.iter().all(|backend| self.alive.contains(*backend));
        let may_move = list(recorded).iter().all(|name| name.as_str().is_some_and(|name| self.alive.contains(name)));
        let is_same = *recorded == json!(got) || (may_move && is_moved);
        Ok((json!(got), is_same))
    }

    /// The real servers, once what was closed no longer counts.
    fn real_servers(&self, recorded: &Value) -> Result<(Value, bool)> {
        let start = Instant::now();
        loop {
            let entries = self.agent.real_servers(self.id)?;
            let mut got: Vec<Value> = entries
                .iter()
                .map(|entry| {
                    json!({"address": entry.server.address, "port": entry.server.port, "weight": entry.server.weight,
                        "has_active_connections": entry.active_connections > 0})
                })
                .collect();
            got.sort_by_key(|server| server["address"].to_string());
            let mut wanted = list(recorded).to_vec();
            wanted.sort_by_key(|server| server["address"].to_string());
            if got == wanted || start.elapsed() > CLOSE_TIMEOUT {
                let is_same = got == wanted;
                return Ok((json!(got), is_same));
            }
            sleep(Duration::from_millis(50));
        }
    }

    /// Where a client with affinity goes. Which endpoint it was given first is the scheduler's choice.
    fn affinity(&mut self, event: &Event, seen: &mut Observation) -> Result<()> {
        let Watched::Affinity { before, now } = self.watched else { return Ok(()) };
        let recorded = |key: &str| event.observed.get(key);
        if let Some(recorded) = recorded("chosen_before") {
            seen.compare("chosen_before", Some((json!(before), before.len() == set(recorded).len())));
        }
        if recorded("removed").is_some() {
            let removed = before.first().filter(|_| before.len() == 1).context("no endpoint was removed")?;
            seen.compare("removed", Some((json!(removed), true)));
        }
        let (outcomes, backends) = new_connections(self.client, self.target)?;
        if let Some(recorded) = recorded("backends") {
            let is_same = backends.len() == set(recorded).len() && backends.is_subset(self.alive);
            seen.compare("backends", Some((json!(backends), is_same)));
        }
        if let Some(recorded) = recorded("result") {
            let got = outcomes.into_iter().collect::<Vec<_>>().join(" and ");
            seen.compare("result", Some((json!(got), *recorded == json!(got))));
        }
        if let Some(recorded) = recorded("sticks_to_new") {
            let got = json!(backends == *now);
            seen.compare("sticks_to_new", Some((got.clone(), *recorded == got)));
        }
        *now = backends;
        Ok(())
    }
}

impl Observation {
    fn compare(&mut self, key: &str, got: Option<(Value, bool)>) {
        if let Some((got, is_same)) = got {
            self.got.insert(key.to_owned(), got);
            self.differs |= !is_same;
        }
    }

    /// Puts it into the result of the event.
    pub(crate) fn record_in(self, result: &mut Played) {
        result.got = describe(&self.got);
        result.not_compared = self.not_compared;
        let nothing_compared = self.got.is_empty();
        if nothing_compared {
            result.got = "nothing that was recorded can be observed".into();
        }
        let differs = self.differs || nothing_compared;
        result.verdict = if differs { Verdict::Differs } else { Verdict::AsRecorded { unlike: None } };
        result.symbol = '✓';
    }
}

fn set(value: &Value) -> BTreeSet<String> {
    list(value).iter().filter_map(|name| name.as_str().map(str::to_owned)).collect()
}

/// What new connections come to, and who answers them.
fn new_connections(client: &Namespace, target: SocketAddr) -> Result<(BTreeSet<String>, BTreeSet<String>)> {
    let tries: Vec<Try> = client.run(|| (0..TRIES).map(|_| probe::tcp(target)).collect())?;
    let outcome = |tried: &Try| tried.as_ref().map_or_else(Clone::clone, |_| CONNECTED.to_owned());
    let backends = tries.iter().flatten().map(|answer| answer.backend.clone()).collect();
    Ok((tries.iter().map(outcome).collect(), backends))
}
