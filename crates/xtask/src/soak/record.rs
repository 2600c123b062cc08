//! The record of a soak: what is counted and measured, and which of it is a failure.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Everything that was counted in a soak.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct SoakRecord {
    pub(crate) seconds: u64,
    pub(crate) seed: u64,
    /// Changes of objects by kind.
    pub(crate) changes: BTreeMap<String, u64>,
    /// What happened to the agent, to the API server and to the kernel, by kind.
    #[serde(alias = "troubles")]
    pub(crate) disruptions: BTreeMap<String, u64>,
    /// What was changed in the kernel behind the agent's back, by kind.
    pub(crate) drifts: BTreeMap<String, Repairs>,
    /// What the agent's own count of drift says, over all its lives.
    pub(crate) drift_found: f64,
    /// What clients did, by who and what.
    pub(crate) traffic: BTreeMap<String, Traffic>,
    /// How often the kernel was compared with what a fresh start makes.
    pub(crate) comparisons: u64,
    /// Where it differed, and what of others was touched.
    pub(crate) differences: Vec<String>,
    /// What clients lost, the first of it.
    pub(crate) losses: Vec<String>,
    /// What the agent needed.
    pub(crate) samples: Vec<Sample>,
    /// For each quarter of a minute: answers to clients, and losses.
    pub(crate) answers: Vec<(u64, u64)>,
}

/// How drift of one kind was repaired.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Repairs {
    pub(crate) made: u64,
    pub(crate) repaired: u64,
    /// Seconds.
    pub(crate) longest: f64,
}

/// What one kind of client did.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Traffic {
    /// Connections, or sockets of UDP.
    pub(crate) opened: u64,
    /// Questions that were answered.
    pub(crate) answered: u64,
    /// Connections that failed or broke, questions without an answer.
    pub(crate) lost: u64,
    /// Seconds until an answer.
    pub(crate) longest: f64,
}

/// What the agent needed at one time.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// Seconds from the beginning.
    pub(crate) at: f64,
    /// How often the agent had been started.
    pub(crate) life: u64,
    /// Bytes.
    pub(crate) resident: u64,
    pub(crate) files: usize,
    pub(crate) threads: usize,
}

/// At most this many losses are listed with their reasons.
const MAX_LOSSES_LISTED: usize = 50;
/// So much is remembered of what happened before a loss.
const HISTORY_LENGTH: usize = 40;
/// From this many seconds on growth can be told from chance.
const MIN_SECONDS_FOR_GROWTH: u64 = 3600;
/// Bytes an hour: a tenth of what the agent has.
const MAX_GROWTH: f64 = 1_048_576.0;
/// Connections come and go.
const FILE_TOLERANCE: usize = 5;
/// How long answers are counted together, in seconds.
pub(crate) const INTERVAL: u64 = 15;

impl SoakRecord {
    /// Everything that makes the soak fail.
    pub(crate) fn failures(&self) -> Vec<String> {
        let mut failures = self.differences.clone();
        failures.extend(self.losses.iter().cloned());
        let lost: u64 = self.traffic.values().map(|it| it.lost).sum();
        if lost > 0 {
            failures.push(format!("{lost} connections or answers were lost"));
        }
        if self.seconds >= MIN_SECONDS_FOR_GROWTH {
            failures.extend(
                self.growth().filter(|it| *it > MAX_GROWTH).map(|it| format!("memory grows by {it:.0} bytes an hour")),
            );
            let files = |samples: &[Sample]| samples.iter().map(|it| it.files).max().unwrap_or(0);
            let (early, late) = self.settled().split_at(self.settled().len() / 2);
            if files(late) > files(early) + FILE_TOLERANCE {
                failures.push(format!("open files grow from {} to {}", files(early), files(late)));
            }
        }
        for (kind, repairs) in self.drifts.iter().filter(|(_, it)| it.repaired < it.made) {
            failures.push(format!("{kind}: {} of {} were not repaired", repairs.made - repairs.repaired, repairs.made));
        }
        failures
    }

    /// The samples of the agent that lived longest, but for the first fifth of its life.
    pub(crate) fn settled(&self) -> &[Sample] {
        let lives = self.samples.chunk_by(|a, b| a.life == b.life);
        let longest = lives.max_by_key(|life| life.len()).unwrap_or_default();
        &longest[longest.len() / 5..]
    }

    /// By how many bytes an hour it grows, as the line that fits best.
    pub(crate) fn growth(&self) -> Option<f64> {
        #[expect(clippy::cast_precision_loss, reason = "memory is not counted to 2^53 bytes")]
        let points: Vec<(f64, f64)> = self.settled().iter().map(|it| (it.at / 3600.0, it.resident as f64)).collect();
        #[expect(clippy::cast_precision_loss, reason = "nor are samples")]
        let count = points.len() as f64;
        let (x, y) = points.iter().fold((0.0, 0.0), |sum, it| (sum.0 + it.0 / count, sum.1 + it.1 / count));
        let (above, below) = points.iter().fold((0.0, 0.0), |sum, it| {
            let dx = it.0 - x;
            (sum.0 + dx * (it.1 - y), sum.1 + dx * dx)
        });
        (below > 0.0).then(|| above / below)
    }
}

/// A record that all threads write to.
#[derive(Debug)]
pub(crate) struct Recorder {
    pub(crate) start: Instant,
    record: Mutex<SoakRecord>,
    history: Mutex<VecDeque<String>>,
}

impl Recorder {
    pub(crate) fn new(seconds: u64, seed: u64) -> Self {
        Self {
            start: Instant::now(),
            record: Mutex::new(SoakRecord { seconds, seed, ..SoakRecord::default() }),
            history: Mutex::default(),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, SoakRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn changed(&self, kind: &str) {
        *self.lock().changes.entry(kind.to_owned()).or_default() += 1;
    }

    pub(crate) fn disruption(&self, kind: &str) {
        *self.lock().disruptions.entry(kind.to_owned()).or_default() += 1;
        self.note(kind);
    }

    /// Remembers what happened, for whom something is lost soon after.
    pub(crate) fn note(&self, what: &str) {
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        if history.len() == HISTORY_LENGTH {
            history.pop_front();
        }
        history.push_back(format!("{:.1} s: {what}", self.start.elapsed().as_secs_f64()));
    }

    pub(crate) fn opened(&self, who: &str) {
        self.lock().traffic.entry(who.to_owned()).or_default().opened += 1;
    }

    pub(crate) fn answered(&self, who: &str, after: Duration) {
        let mut record = self.lock();
        let traffic = record.traffic.entry(who.to_owned()).or_default();
        traffic.answered += 1;
        traffic.longest = traffic.longest.max(after.as_secs_f64());
        self.current_interval(&mut record).0 += 1;
    }

    pub(crate) fn lost(&self, who: &str, why: &str) {
        let at = self.start.elapsed().as_secs_f64();
        let mut record = self.lock();
        record.traffic.entry(who.to_owned()).or_default().lost += 1;
        self.current_interval(&mut record).1 += 1;
        let line = format!("{at:.1} s: {who}: {why}");
        eprintln!("LOST at {line}");
        for it in self.history.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            eprintln!("  before that, {it}");
        }
        if record.losses.len() < MAX_LOSSES_LISTED {
            record.losses.push(line);
        }
    }

    pub(crate) fn differs(&self, what: &str) {
        let line = format!("{:.1} s: {what}", self.start.elapsed().as_secs_f64());
        eprintln!("DIFFERS at {line}");
        self.lock().differences.push(line);
    }

    fn current_interval<'a>(&self, record: &'a mut SoakRecord) -> &'a mut (u64, u64) {
        let place = usize::try_from(self.start.elapsed().as_secs() / INTERVAL).unwrap_or(usize::MAX);
        if record.answers.len() <= place {
            record.answers.resize(place + 1, (0, 0));
        }
        &mut record.answers[place]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at: f64, life: u64, resident: u64) -> Sample {
        Sample { at, life, resident, files: 20, threads: 5 }
    }

    #[test]
    fn growth_is_that_of_the_longest_life_after_its_beginning() {
        let mut record =
            SoakRecord { samples: vec![sample(0.0, 1, 7_000_000), sample(1.0, 1, 9_000_000)], ..SoakRecord::default() };
        assert!(record.failures().is_empty());
        // A start that needs more, and then 36 bytes a second.
        record.samples.push(sample(2.0, 2, 90_000_000));
        record.samples.extend((1_u32..10).map(|it| sample(100.0 * f64::from(it), 2, 1_000_000 + 3600 * u64::from(it))));
        let growth = record.growth().unwrap();
        assert!((growth - 129_600.0).abs() < 1.0, "{growth}");
    }

    #[test]
    fn whatever_is_lost_or_not_repaired_is_a_failure() {
        let recorder = Recorder::new(60, 1);
        recorder.answered("client", Duration::from_millis(1));
        assert!(recorder.lock().failures().is_empty());
        recorder.lost("client", "refused");
        assert_eq!(recorder.lock().failures().len(), 2);
        recorder.lock().drifts.insert("weight".into(), Repairs { made: 2, repaired: 1, longest: 1.0 });
        assert_eq!(recorder.lock().failures().len(), 3);
        assert_eq!(recorder.lock().answers, [(1, 1)]);
    }
}
