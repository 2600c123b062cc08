//! Confirmation of deletions: a list that lacks most of the known objects is read a second time before they are
//! deleted. An API server that was restored from an old backup, or whose storage fails, may return such a list. The own
//! Node is confirmed too, since it is not deleted while its node runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::model::Change;

/// The delay before the list is read again.
pub(super) const CONFIRMATION_DELAY: Duration = Duration::from_secs(5);
/// Below this number of known objects, a deletion needs no confirmation.
const MIN_OBJECTS: usize = 10;

/// What the node already serves when the agent starts, to compare the first list with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExistingState {
    /// The number of addresses that have virtual servers. Services have at least as many, and there are usually as many
    /// endpoints.
    pub vips: usize,
}

/// Decides whether the current list needs a confirmation.
#[derive(Debug, Default)]
pub(super) struct MassDeletionCheck {
    /// Whether mass deletions are confirmed at all.
    enabled: bool,
    /// How many entries the node had before the first list.
    before: usize,
    /// How many entries the current list has.
    listed: usize,
    /// The last list, or a deletion, needed a confirmation: this list is accepted.
    is_confirming: bool,
    /// Whether the node serves anything before the first list.
    has_existing_state: bool,
    relist_requested: Arc<AtomicBool>,
}

/// A list that lacks most entries: how many there were before, and how many remain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MassDeletion {
    pub(super) before: usize,
    pub(super) remaining: usize,
}

impl MassDeletionCheck {
    /// `before` is the number of entries that the node had before the first list.
    pub(super) fn new(before: usize) -> Self {
        Self { enabled: true, before, ..Self::default() }
    }

    /// For Nodes. What the node serves does not say how many there are, but that it has been one of them.
    pub(super) fn for_nodes(existing: ExistingState) -> Self {
        Self { has_existing_state: existing.vips > 0, ..Self::new(0) }
    }

    /// Set when the list must be read again.
    pub(super) fn relist_requested(&self) -> Arc<AtomicBool> {
        self.relist_requested.clone()
    }

    /// Called at the start of a list.
    pub(super) fn begin_list(&mut self) {
        self.listed = 0;
    }

    /// Counts an object of the list.
    pub(super) fn count(&mut self, change: &Change) {
        self.listed += match change {
            Change::Service(it) => it.cluster_ips.len() + it.external_ips.len() + it.load_balancer_ips.len(),
            Change::Slice(it) => it.endpoints.len(),
            _ => 0,
        };
    }

    /// Whether the deletion of an object that is never deleted in ordinary operation needs a confirmation. If so, a list is read
    /// soon.
    pub(super) fn doubts_deletion(&mut self) -> bool {
        self.is_confirming = self.enabled;
        self.relist_requested.store(self.enabled, Ordering::Relaxed);
        self.enabled
    }

    /// Called at the end of a list that lacks an object that is never deleted in ordinary operation. Whether nothing must be deleted
    /// before another list confirms it.
    pub(super) fn doubts_absence(&mut self, has_been_there: bool) -> bool {
        let has_existing_state = std::mem::take(&mut self.has_existing_state);
        if self.is_confirming || !(has_been_there || has_existing_state) {
            return false;
        }
        self.doubts_deletion()
    }

    /// Called at the end of a list that lacks `deleted` of `known` objects; before the first list, `known` is 0. If
    /// this returns a mass deletion, nothing must be deleted before another list confirms it.
    pub(super) fn finish(&mut self, known: usize, deleted: usize) -> Option<MassDeletion> {
        let before = std::mem::take(&mut self.before);
        let (before, remaining) = if known > 0 { (known, known - deleted) } else { (before, self.listed) };
        let is_suspicious = self.enabled && !self.is_confirming && before >= MIN_OBJECTS && remaining * 2 < before;
        self.is_confirming = is_suspicious;
        self.relist_requested.store(is_suspicious, Ordering::Relaxed);
        is_suspicious.then_some(MassDeletion { before, remaining })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_that_lacks_most_of_many_objects_is_confirmed_once() {
        for (known, deleted, is_suspicious) in
            [(9, 9, false), (10, 10, true), (10, 5, false), (10, 6, true), (1000, 1000, true)]
        {
            let mut check = MassDeletionCheck::new(0);
            assert_eq!(check.finish(known, deleted).is_some(), is_suspicious, "{deleted} of {known}");
            assert_eq!(check.relist_requested().load(Ordering::Relaxed), is_suspicious);
            assert_eq!(check.finish(known, deleted), None, "the second list is accepted");
            assert!(!check.relist_requested().load(Ordering::Relaxed));
            assert_eq!(
                check.finish(known, deleted).is_some(),
                is_suspicious,
                "the next one needs a confirmation again"
            );
        }
        assert_eq!(MassDeletionCheck::default().finish(1000, 1000), None, "it is off by default");
    }

    #[test]
    fn the_absence_of_the_own_node_is_confirmed_once() {
        let existing = |vips| MassDeletionCheck::for_nodes(ExistingState { vips });
        for (mut check, has_been_there, is_doubted) in [
            (existing(0), true, true),
            (existing(0), false, false),
            (existing(1), false, true),
            (MassDeletionCheck::default(), true, false),
        ] {
            assert_eq!(check.doubts_absence(has_been_there), is_doubted);
            assert_eq!(check.relist_requested().load(Ordering::Relaxed), is_doubted);
            assert!(!check.doubts_absence(false), "the second list is accepted");
            assert_eq!(check.finish(0, 0), None);
            assert!(!check.doubts_absence(false), "what the node served at its start counts once");
        }
        let mut check = existing(0);
        assert!(check.doubts_deletion() && !check.doubts_absence(true));
        assert_eq!(check.finish(1, 1), None);
        assert!(check.doubts_absence(true), "the next one needs a confirmation again");
        assert!(!MassDeletionCheck::default().doubts_deletion());
    }

    #[test]
    fn the_first_list_is_compared_with_what_the_node_serves() {
        assert_eq!(MassDeletionCheck::new(20).finish(0, 0), Some(MassDeletion { before: 20, remaining: 0 }));
        assert_eq!(MassDeletionCheck::new(9).finish(0, 0), None);
        assert_eq!(MassDeletionCheck::new(0).finish(0, 0), None, "a node without state needs no confirmation");
    }
}
