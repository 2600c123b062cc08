//! Plays cells: many at a time, but those of one virtual server one after another, or clients that take turns could
//! each be given the same backend by the scheduler every time.

use std::collections::BTreeMap;
use std::sync::Mutex;

use anyhow::{Context, Result};
use lab::netns::Namespace;
use serde_json::Value;

use super::compare::{Actual, CONNECTED, Expected, Home, Names, is_another_choice};
use super::deviations::{self, Circumstances};
use super::network::Network;
use super::objects::Objects;
use super::probe::{self, Try};
use super::recording::{Cell, Question};
use super::results::{Played, Recorded, Verdict};

/// Tries wait more than they compute, so that many at a time go faster even on one processor.
const AT_ONCE: usize = 24;
const TRIES: usize = 6;
/// After so many, a cell where nothing has connected is given up.
const GIVE_UP: usize = 2;
/// How often a cell is played until it is called different: the cells beside it may have kept the machine busy.
const ROUNDS: usize = 3;
/// More than so many are no matter of chance, and are played once.
const FEW: usize = 100;

/// What cells are played on and compared under.
pub(crate) struct Table<'a> {
    pub(crate) network: &'a Network,
    pub(crate) objects: &'a Objects,
    pub(crate) flags: &'a [String],
    pub(crate) names: Names,
}

/// A cell that can be played.
struct Playable<'a> {
    index: usize,
    cell: Cell,
    question: Question,
    client: &'a Namespace,
    recorded: Expected,
    /// The rule of deviation that is about the cell, and what it wants.
    wanted: Option<(&'static str, Expected)>,
}

/// Plays all cells and returns what came of each, in their order.
pub(crate) fn play(table: &Table<'_>, recorded: &[Recorded]) -> Vec<Played> {
    let mut results: Vec<Played> = recorded.iter().map(Recorded::not_played).collect();
    let mut groups: BTreeMap<Question, Vec<Playable<'_>>> = BTreeMap::new();
    for (index, recorded) in recorded.iter().enumerate() {
        match table.prepare(index, &recorded.value) {
            Ok(playable) => groups.entry(playable.question).or_default().push(playable),
            Err(error) => results[index].got = format!("could not be played: {error:#}"),
        }
    }
    for round in 0..ROUNDS {
        for (index, got, verdict) in table.round(&groups) {
            results[index].verdict = verdict;
            results[index].symbol = symbol(&got);
            results[index].got = got.describe(&table.names);
        }
        for group in groups.values_mut() {
            group.retain(|playable| {
                let result = &mut results[playable.index];
                playable.label(result, &table.names);
                result.verdict == Verdict::Differs
            });
        }
        groups.retain(|_, group| !group.is_empty());
        match groups.values().map(Vec::len).sum() {
            1..=FEW if round + 1 < ROUNDS => eprintln!("some cells differ and are played again"),
            _ => break,
        }
    }
    results
}

impl<'a> Table<'a> {
    fn prepare(&self, index: usize, value: &Value) -> Result<Playable<'a>> {
        let mut cell: Cell = serde_json::from_value(value.clone()).context("its keys cannot be understood")?;
        let question = cell.question()?;
        let client = self.network.namespace(cell.client.as_deref().context("the cell has no client")?)?;
        let recorded = Expected::new(&cell, &self.names)?;
        if let (None, Question::Tcp(target) | Question::Udp(target)) = (&cell.service, question) {
            let service = self.objects.service_at(target.ip());
            cell.service = service.and_then(|service| service["metadata"]["name"].as_str()).map(str::to_owned);
        }
        let at = Circumstances { flags: self.flags, objects: self.objects, names: &self.names };
        let wanted = deviations::wanted(&cell, &recorded, &at);
        Ok(Playable { index, cell, question, client, recorded, wanted })
    }

    /// Plays each cell once.
    fn round(&self, groups: &BTreeMap<Question, Vec<Playable<'_>>>) -> Vec<(usize, Actual, Verdict)> {
        let queue = Mutex::new(groups.values());
        let next = || queue.lock().map_or(None, |mut queue| queue.next());
        let results = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE.min(groups.len()) {
                scope.spawn(|| {
                    while let Some(group) = next() {
                        let played: Vec<_> = group.iter().map(|playable| self.play_one(playable)).collect();
                        if let Ok(mut results) = results.lock() {
                            results.extend(played);
                        }
                    }
                });
            }
        });
        results.into_inner().unwrap_or_default()
    }

    fn play_one(&self, playable: &Playable<'_>) -> (usize, Actual, Verdict) {
        let Playable { client, recorded, .. } = playable;
        let ask = |ask: &(dyn Fn() -> Actual + Sync)| {
            client.run(ask).unwrap_or_else(|error| Actual::outcome(error.to_string()))
        };
        let mut got = ask(&|| tries(playable.question));
        if let Question::Udp(target) = playable.question {
            let is_unreachable = recorded.outcomes.iter().any(|word| word.ends_with("unreachable"));
            if recorded.is("timeout") && got.backends().iter().eq(["host"]) {
                // Whether a client takes an answer from another address is no matter of the agent's.
                got = ask(&|| all(|| probe::udp_from_anywhere(target)));
            } else if is_unreachable && got.outcomes.keys().eq(["timeout"]) {
                // Routers say so to connections and datagrams alike, but not every datagram socket listens.
                got = ask(&|| all(|| probe::tcp(target)));
            }
        }
        let verdict = self.judge(playable, &got);
        (playable.index, got, verdict)
    }

    fn judge(&self, playable: &Playable<'_>, got: &Actual) -> Verdict {
        let Playable { recorded, wanted, cell, .. } = playable;
        if recorded.admits(got) || self.is_chosen_otherwise(cell, recorded, got) {
            return Verdict::AsRecorded { unlike: wanted.as_ref().map(|(rule, _)| (*rule).to_owned()) };
        }
        match wanted {
            Some((rule, wanted)) if wanted.admits(got) && deviations::is_documented(rule) => {
                Verdict::OnPurpose { rule: (*rule).to_owned() }
            }
            _ => Verdict::Differs,
        }
    }

    /// Whether the scheduler was free to choose another backend than in the recording, and did.
    fn is_chosen_otherwise(&self, cell: &Cell, recorded: &Expected, got: &Actual) -> bool {
        let (Some(name), Some(client)) = (&cell.service, &cell.client) else { return false };
        let is_ipv6 = cell.is_ipv6();
        let home = Home { names: &self.names, endpoints: self.objects.endpoints(name, is_ipv6), is_ipv6 };
        self.objects.service(name).is_some_and(|service| service["spec"]["sessionAffinity"] == "ClientIP")
            && is_another_choice(recorded, got, client, &home)
    }
}

impl Playable<'_> {
    /// Says what was expected, and what could not be compared.
    fn label(&self, result: &mut Played, names: &Names) {
        let wanted = self.wanted.as_ref().map(|(rule, wanted)| format!(" ({rule}: {})", wanted.describe(names)));
        result.expected = self.recorded.describe(names) + &wanted.unwrap_or_default();
        result.not_compared = self.cell.others.keys().cloned().collect();
        result.service.clone_from(&self.cell.service);
    }
}

/// The tries of a cell, in the calling thread's namespace.
fn tries(question: Question) -> Actual {
    match question {
        Question::Tcp(target) => all(|| probe::tcp(target)),
        Question::Udp(target) => all(|| probe::udp(target)),
        Question::Ping(address) => Actual::outcome(probe::ping(address)),
    }
}

fn all(mut once: impl FnMut() -> Try) -> Actual {
    let mut got = Actual::default();
    for count in 1..=TRIES {
        got.add(once());
        if count == GIVE_UP && !got.outcomes.contains_key(CONNECTED) {
            break;
        }
    }
    got
}

/// How a cell looks in the picture.
fn symbol(got: &Actual) -> char {
    let mut words = got.outcomes.keys().map(String::as_str);
    match (words.next(), words.next()) {
        (Some(CONNECTED | "reply"), None) => '●',
        (Some("refused"), None) => '×',
        (Some("timeout"), None) => '~',
        (Some("not permitted"), None) => 'p',
        (Some("network unreachable" | "host unreachable"), None) => 'u',
        (Some(CONNECTED), Some(_)) => '◐',
        _ => '?',
    }
}
