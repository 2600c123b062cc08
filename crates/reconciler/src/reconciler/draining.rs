//! The virtual servers that have real servers draining. There may be thousands, for hours: what is asked at each sync is
//! answered without going over them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use crate::backoff::Backoff;
use crate::front_end::FrontEnd;

#[derive(Debug)]
struct Drain {
    again: Backoff,
    /// How many of its real servers drain.
    count: usize,
}

/// When each of them is to be looked at, and how many real servers drain.
#[derive(Debug, Default)]
pub(super) struct Draining {
    servers: BTreeMap<FrontEnd, Drain>,
    /// The same by the time of the next look.
    looks: BTreeSet<(Instant, FrontEnd)>,
    /// The sum of all.
    count: usize,
}

impl Draining {
    pub(super) fn contains(&self, front_end: &FrontEnd) -> bool {
        self.servers.contains_key(front_end)
    }

    pub(super) fn again(&self, front_end: &FrontEnd) -> Option<&Backoff> {
        self.servers.get(front_end).map(|drain| &drain.again)
    }

    /// Sets when to look again. How many real servers drain stays; at first it is none.
    pub(super) fn insert(&mut self, front_end: FrontEnd, again: Backoff) {
        let count = self.take(&front_end);
        self.looks.insert((again.due, front_end));
        self.servers.insert(front_end, Drain { again, count });
    }

    pub(super) fn remove(&mut self, front_end: &FrontEnd) {
        self.count -= self.take(front_end);
    }

    /// Sets how many real servers drain, where any do.
    pub(super) fn set_count(&mut self, front_end: &FrontEnd, count: usize) {
        if let Some(drain) = self.servers.get_mut(front_end) {
            self.count = self.count - drain.count + count;
            drain.count = count;
        }
    }

    /// How many real servers drain in all.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn front_ends(&self) -> impl Iterator<Item = &FrontEnd> {
        self.servers.keys()
    }

    /// Those whose time has come.
    pub(super) fn due(&self, now: Instant) -> impl Iterator<Item = FrontEnd> {
        self.looks.iter().take_while(move |(due, _)| *due <= now).map(|(_, front_end)| *front_end)
    }

    /// When the time of the next one comes.
    pub(super) fn next_check(&self) -> Option<Instant> {
        self.looks.first().map(|(due, _)| *due)
    }

    /// Takes one out of both lists, and leaves the sum alone.
    fn take(&mut self, front_end: &FrontEnd) -> usize {
        let Some(Drain { again, count }) = self.servers.remove(front_end) else { return 0 };
        self.looks.remove(&(again.due, *front_end));
        count
    }
}
