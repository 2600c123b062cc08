//! The record of a soak: what is counted and measured, and which of it is a failure.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use crate::workload::record::{TrafficLog, TrafficRecord, lock};

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
    /// What clients did.
    #[serde(flatten)]
    pub(crate) clients: TrafficRecord,
    /// How often the kernel was compared with what a fresh start makes.
    pub(crate) comparisons: u64,
    /// Where it differed, and what of others was touched.
    pub(crate) differences: Vec<String>,
    /// What the agent needed.
    pub(crate) samples: Vec<Sample>,
}

/// How drift of one kind was repaired.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Repairs {
    pub(crate) made: u64,
    pub(crate) repaired: u64,
    /// Seconds.
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

/// From this many seconds on growth can be told from chance.
const MIN_SECONDS_FOR_GROWTH: u64 = 3600;
/// Bytes an hour: a tenth of what the agent has.
const MAX_GROWTH: f64 = 1_048_576.0;
/// Connections come and go.
const FILE_TOLERANCE: usize = 5;

impl SoakRecord {
    /// Everything that makes the soak fail.
    pub(crate) fn failures(&self) -> Vec<String> {
        let mut failures = self.differences.clone();
        failures.extend(self.clients.failures());
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
    pub(crate) traffic: TrafficLog,
    record: Mutex<SoakRecord>,
}

impl Recorder {
    pub(crate) fn new(seconds: u64, seed: u64) -> Self {
        Self { traffic: TrafficLog::new(), record: Mutex::new(SoakRecord { seconds, seed, ..SoakRecord::default() }) }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, SoakRecord> {
        lock(&self.record)
    }

    /// All that was counted, with what clients did.
    pub(crate) fn result(&self) -> SoakRecord {
        SoakRecord { clients: self.traffic.lock().clone(), ..self.lock().clone() }
    }

    pub(crate) fn changed(&self, kind: &str) {
        *self.lock().changes.entry(kind.to_owned()).or_default() += 1;
    }

    pub(crate) fn disruption(&self, kind: &str) {
        *self.lock().disruptions.entry(kind.to_owned()).or_default() += 1;
        self.traffic.note(kind);
    }

    pub(crate) fn differs(&self, what: &str) {
        let line = format!("{:.1} s: {what}", self.traffic.start.elapsed().as_secs_f64());
        eprintln!("DIFFERS at {line}");
        self.lock().differences.push(line);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

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
        assert!(recorder.result().failures().is_empty());
        recorder.traffic.lost("client", Instant::now(), "refused");
        assert_eq!(recorder.result().failures().len(), 2);
        recorder.lock().drifts.insert("weight".into(), Repairs { made: 2, repaired: 1, longest: 1.0 });
        assert_eq!(recorder.result().failures().len(), 3);
    }
}
