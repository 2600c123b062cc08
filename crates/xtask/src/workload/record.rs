//! What clients did and lost, and what happened before a loss.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// At most this many losses are listed with their reasons.
const MAX_LOSSES_LISTED: usize = 50;
/// So much is remembered of what happened before a loss.
const HISTORY_LENGTH: usize = 40;
/// How long answers are counted together, in seconds.
pub(crate) const INTERVAL: u64 = 15;
/// A client may notice this much later what happened while something was flushed.
const NOTICE: Duration = Duration::from_secs(3);

/// What all clients did.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct TrafficRecord {
    /// By who and what.
    pub(crate) traffic: BTreeMap<String, Traffic>,
    /// What clients lost, the first of it.
    pub(crate) losses: Vec<String>,
    /// For each quarter of a minute: answers to clients, and losses.
    pub(crate) answers: Vec<(u64, u64)>,
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
    /// The same, while something was flushed and not yet repaired.
    #[serde(default)]
    pub(crate) lost_in_flush: u64,
    /// Seconds until an answer.
    pub(crate) longest: f64,
}

impl TrafficRecord {
    /// Over all clients.
    pub(crate) fn sum(&self) -> Traffic {
        self.traffic.values().fold(Traffic::default(), |sum, it| Traffic {
            opened: sum.opened + it.opened,
            answered: sum.answered + it.answered,
            lost: sum.lost + it.lost,
            lost_in_flush: sum.lost_in_flush + it.lost_in_flush,
            longest: sum.longest.max(it.longest),
        })
    }

    /// What was lost, as failures of the run.
    pub(crate) fn failures(&self) -> Vec<String> {
        let mut failures = self.losses.clone();
        let lost = self.sum().lost;
        if lost > 0 {
            failures.push(format!("{lost} connections or answers were lost"));
        }
        failures
    }
}

/// A record that all clients write to.
#[derive(Debug)]
pub(crate) struct TrafficLog {
    pub(crate) start: Instant,
    record: Mutex<TrafficRecord>,
    history: Mutex<VecDeque<String>>,
    /// When the consequences of each flush were over.
    flushes: Mutex<Vec<Option<Instant>>>,
}

impl TrafficLog {
    pub(crate) fn new() -> Self {
        Self { start: Instant::now(), record: Mutex::default(), history: Mutex::default(), flushes: Mutex::default() }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, TrafficRecord> {
        lock(&self.record)
    }

    /// Remembers what happened, for whom something is lost soon after.
    pub(crate) fn note(&self, what: &str) {
        let mut history = lock(&self.history);
        if history.len() == HISTORY_LENGTH {
            history.pop_front();
        }
        history.push_back(format!("{:.1} s: {what}", self.start.elapsed().as_secs_f64()));
    }

    /// From now on, until [`Self::repaired`], losses are those of a flush.
    pub(crate) fn flushed(&self) {
        lock(&self.flushes).push(None);
    }

    /// What was flushed is back.
    pub(crate) fn repaired(&self) {
        for over in lock(&self.flushes).iter_mut() {
            over.get_or_insert_with(|| Instant::now() + NOTICE);
        }
    }

    /// Whether something was flushed, and not yet back, at some time from then to now.
    fn is_in_flush(&self, since: Instant) -> bool {
        lock(&self.flushes).iter().any(|over| over.is_none_or(|over| since <= over))
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

    /// A request that began then has failed. Says whether that counts: not if it was because of a flush.
    pub(crate) fn lost(&self, who: &str, since: Instant, why: &str) -> bool {
        let at = self.start.elapsed().as_secs_f64();
        let mut record = self.lock();
        let traffic = record.traffic.entry(who.to_owned()).or_default();
        if self.is_in_flush(since) {
            traffic.lost_in_flush += 1;
            return false;
        }
        traffic.lost += 1;
        self.current_interval(&mut record).1 += 1;
        let line = format!("{at:.1} s: {who}: {why}");
        eprintln!("LOST at {line}");
        for it in lock(&self.history).drain(..) {
            eprintln!("  before that, {it}");
        }
        if record.losses.len() < MAX_LOSSES_LISTED {
            record.losses.push(line);
        }
        true
    }

    fn current_interval<'a>(&self, record: &'a mut TrafficRecord) -> &'a mut (u64, u64) {
        let place = usize::try_from(self.start.elapsed().as_secs() / INTERVAL).unwrap_or(usize::MAX);
        if record.answers.len() <= place {
            record.answers.resize(place + 1, (0, 0));
        }
        &mut record.answers[place]
    }
}

/// A thread that has panicked has left nothing half done here.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_a_failure_and_is_counted_in_its_interval() {
        let log = TrafficLog::new();
        log.answered("client", Duration::from_millis(1));
        assert!(log.lock().failures().is_empty());
        assert!(log.lost("client", Instant::now(), "refused"));
        assert_eq!(log.lock().failures().len(), 2);
        assert_eq!(log.lock().answers, [(1, 1)]);
    }

    #[test]
    fn a_loss_during_a_flush_is_no_failure_and_one_before_or_after_is() {
        let log = TrafficLog::new();
        assert!(log.lost("client", Instant::now(), "refused before"));
        let before = Instant::now();
        log.flushed();
        assert!(!log.lost("client", before, "it began before the flush, and broke in it"));
        log.repaired();
        assert!(!log.lost("client", Instant::now(), "noticed a little later"));
        assert!(log.lost("client", Instant::now() + NOTICE * 2, "refused after"));
        let sum = log.lock().sum();
        assert_eq!((sum.lost, sum.lost_in_flush), (2, 2));
    }
}
