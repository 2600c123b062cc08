//! A list that lacks most of what there was is read a second time before it is believed: an API server that was restored from an
//! old backup, or whose store fails, may say in good faith that there is nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::model::Change;

/// How long until the list is read again.
pub(super) const AGAIN: Duration = Duration::from_secs(5);
/// Fewer may go at once: to lose them all is no reason to wait.
const MANY: usize = 10;

/// What the node serves when the agent starts: what was there before the first list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Serving {
    /// How many addresses have virtual servers. There are at least as many in Services, and mostly as many endpoints.
    pub vips: usize,
}

/// Whether the list at hand is to be believed.
#[derive(Debug, Default)]
pub(super) struct Doubt {
    /// Whether lists are doubted at all.
    is_on: bool,
    /// How much there was before the first list.
    before: usize,
    /// How much this list has of it.
    weight: usize,
    /// The last list was doubted: this one is believed.
    is_second: bool,
    again: Arc<AtomicBool>,
}

/// What a list was compared with, and what it has of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lacking {
    pub(super) before: usize,
    pub(super) left: usize,
}

impl Doubt {
    /// `before` is how much of what the first list is about the node serves already.
    pub(super) fn of(before: usize) -> Self {
        Self { is_on: true, before, ..Self::default() }
    }

    /// Set where the list is to be read again.
    pub(super) fn again(&self) -> Arc<AtomicBool> {
        self.again.clone()
    }

    /// A list begins.
    pub(super) fn begin(&mut self) {
        self.weight = 0;
    }

    /// The list has this.
    pub(super) fn take(&mut self, change: &Change) {
        self.weight += match change {
            Change::Service(it) => it.cluster_ips.len() + it.external_ips.len() + it.load_balancer_ips.len(),
            Change::Slice(it) => it.endpoints.len(),
            _ => 0,
        };
    }

    /// The list has ended. Of `known` objects it lacks `gone`; none are known before the first list. Where it is doubted, what it
    /// lacks stays until another one has come.
    pub(super) fn end(&mut self, known: usize, gone: usize) -> Option<Lacking> {
        let before = std::mem::take(&mut self.before);
        let (before, left) = if known > 0 { (known, known - gone) } else { (before, self.weight) };
        let is_doubted = self.is_on && !self.is_second && before >= MANY && left * 2 < before;
        self.is_second = is_doubted;
        self.again.store(is_doubted, Ordering::Relaxed);
        is_doubted.then_some(Lacking { before, left })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_doubted_once_and_only_where_it_lacks_most_of_many() {
        for (known, gone, is_doubted) in
            [(9, 9, false), (10, 10, true), (10, 5, false), (10, 6, true), (1000, 1000, true)]
        {
            let mut doubt = Doubt::of(0);
            assert_eq!(doubt.end(known, gone).is_some(), is_doubted, "{gone} of {known}");
            assert_eq!(doubt.again().load(Ordering::Relaxed), is_doubted);
            assert_eq!(doubt.end(known, gone), None, "the second list is believed");
            assert!(!doubt.again().load(Ordering::Relaxed));
            assert_eq!(doubt.end(known, gone).is_some(), is_doubted, "and the next one is not");
        }
        assert_eq!(Doubt::default().end(1000, 1000), None, "it can be switched off");
    }

    #[test]
    fn the_first_list_is_held_against_what_the_node_serves() {
        assert_eq!(Doubt::of(20).end(0, 0), Some(Lacking { before: 20, left: 0 }));
        assert_eq!(Doubt::of(9).end(0, 0), None);
        assert_eq!(Doubt::of(0).end(0, 0), None, "on a cold node there is nothing to lose");
    }
}
