//! Whether the node's Services are as they should be, as far as the agent can tell. Without a clock of its own.
//!
//! A family is unhealthy when, after the first sync, a change has waited for more than two sync periods, when the
//! kernel could not be read for as long, and when something was right, was changed by somebody else and cannot be
//! repaired. That one Service cannot be programmed says nothing about the node: whoever may make a Service must not be
//! able to take nodes out of service.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use ipvs_netlink::Family;
use reconciler::policy::Families;

/// Shared by those who know something of it and those who are asked.
#[derive(Debug)]
pub(crate) struct Health {
    families: Families,
    /// How long a change may wait, and a reading fail.
    patience: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The first change that is not in the kernel, and the last that was heard of.
    waiting: Option<(Instant, Instant)>,
    /// Since when the kernel cannot be read.
    unreadable: Option<Instant>,
    unrepaired: BTreeSet<Family>,
    /// `None` before the first sync.
    last_update: Option<SystemTime>,
    is_node_eligible: bool,
}

/// How it stands at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    /// Each family that is served, and whether it is healthy.
    pub(crate) families: Vec<(Family, bool)>,
    /// Whether the own Node is known and is to stay.
    pub(crate) is_node_eligible: bool,
    /// Whether there is something to be served that has waited for too long for the first sync of all.
    pub(crate) is_start_late: bool,
    /// When the kernel last was brought to what was asked for.
    pub(crate) last_update: Option<SystemTime>,
}

impl Report {
    /// Whether all families are.
    pub(crate) fn is_healthy(&self) -> bool {
        self.families.iter().all(|(_, is_healthy)| *is_healthy)
    }
}

impl Health {
    pub(crate) fn new(families: Families, sync_period: Duration) -> Self {
        Self { families, patience: sync_period.saturating_mul(2), state: Mutex::default() }
    }

    /// A change was heard of.
    pub(crate) fn change_heard(&self, now: Instant) {
        let mut state = self.state();
        let first = state.waiting.map_or(now, |(first, _)| first);
        state.waiting = Some((first, now));
    }

    /// Everything heard of before `since` has been dealt with.
    pub(crate) fn synced(&self, since: Instant, unrepaired: &BTreeSet<Family>, now: SystemTime) {
        let mut state = self.state();
        // When exactly the first of those that came meanwhile did is not known; not before this.
        state.waiting = state.waiting.filter(|(_, last)| *last > since).map(|(_, last)| (since, last));
        state.unreadable = None;
        state.unrepaired.clone_from(unrepaired);
        state.last_update = Some(now);
    }

    /// The kernel could not be read.
    pub(crate) fn unreadable(&self, now: Instant) {
        self.state().unreadable.get_or_insert(now);
    }

    /// What is known of the own Node: whether it is to stay; `false` where there is none.
    pub(crate) fn node(&self, is_eligible: bool) {
        self.state().is_node_eligible = is_eligible;
    }

    /// Whether everything has been dealt with once.
    pub(crate) fn has_synced(&self) -> bool {
        self.state().last_update.is_some()
    }

    pub(crate) fn report(&self, now: Instant) -> Report {
        let state = self.state();
        let is_late = |since: Instant| now.saturating_duration_since(since) >= self.patience;
        let is_change_late = state.waiting.is_some_and(|(first, _)| is_late(first));
        // An agent that still lists what there is would not come further by being started again.
        let is_started = state.last_update.is_some();
        let is_behind = (is_started && is_change_late) || state.unreadable.is_some_and(is_late);
        Report {
            families: self
                .families
                .iter()
                .map(|family| (family, !is_behind && !state.unrepaired.contains(&family)))
                .collect(),
            is_node_eligible: state.is_node_eligible,
            is_start_late: !is_started && is_change_late,
            last_update: state.last_update,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As in the API.
pub(crate) fn family_name(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "IPv4",
        Family::Ipv6 => "IPv6",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn health() -> (Health, Instant) {
        (Health::new(Families::BOTH, 30 * SECOND), Instant::now())
    }

    fn is_healthy(health: &Health, now: Instant) -> bool {
        health.report(now).is_healthy()
    }

    fn sync(health: &Health, since: Instant) {
        health.synced(since, &BTreeSet::new(), SystemTime::now());
    }

    #[test]
    fn before_anything_was_heard_all_is_well_but_the_node_is_not_known() {
        let (health, now) = health();
        assert!(is_healthy(&health, now + 600 * SECOND));
        assert!(!health.has_synced() && !health.report(now).is_node_eligible);
    }

    #[test]
    fn before_the_first_sync_a_change_that_waits_makes_nothing_unhealthy_but_the_start_late() {
        let (health, now) = health();
        health.change_heard(now);
        let report = health.report(now + 60 * SECOND);
        assert!(report.is_healthy() && report.is_start_late);
        assert!(!health.report(now + 59 * SECOND).is_start_late);
        sync(&health, now + 61 * SECOND);
        assert!(!health.report(now + 62 * SECOND).is_start_late);
    }

    #[test]
    fn a_change_may_wait_for_two_periods_from_the_first_one_on() {
        let (health, now) = health();
        sync(&health, now);
        health.change_heard(now);
        health.change_heard(now + 50 * SECOND);
        assert!(is_healthy(&health, now + 59 * SECOND));
        assert!(!is_healthy(&health, now + 60 * SECOND));
        sync(&health, now + 61 * SECOND);
        assert!(is_healthy(&health, now + 600 * SECOND));
    }

    #[test]
    fn a_change_that_came_during_a_sync_waits_since_then() {
        let (health, now) = health();
        sync(&health, now);
        health.change_heard(now);
        health.change_heard(now + 5 * SECOND);
        sync(&health, now + 2 * SECOND);
        assert!(is_healthy(&health, now + 61 * SECOND));
        assert!(!is_healthy(&health, now + 62 * SECOND));
    }

    #[test]
    fn a_kernel_that_cannot_be_read_for_two_periods_is_unhealthy_without_a_change() {
        let (health, now) = health();
        sync(&health, now);
        health.unreadable(now + SECOND);
        health.unreadable(now + 31 * SECOND);
        assert!(is_healthy(&health, now + 60 * SECOND));
        assert!(!is_healthy(&health, now + 61 * SECOND));
        sync(&health, now + 62 * SECOND);
        assert!(is_healthy(&health, now + 600 * SECOND));
    }

    #[test]
    fn what_cannot_be_repaired_concerns_its_family() {
        let (health, now) = health();
        health.synced(now, &[Family::Ipv6].into(), SystemTime::now());
        assert_eq!(health.report(now).families, [(Family::Ipv4, true), (Family::Ipv6, false)]);
        sync(&health, now);
        assert!(is_healthy(&health, now));
    }
}
