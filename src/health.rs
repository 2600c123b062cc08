//! The node's health: whether its Services are programmed as they should be. Callers pass the time.
//!
//! An address family is unhealthy in three cases: after the first sync, a change is pending for more than two sync
//! periods; the kernel could not be read for as long; or another program changed something that was right, and it
//! cannot be repaired. A single Service that cannot be programmed does not make the node unhealthy: users who may
//! create Services must not be able to take nodes out of service.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use ipvs_netlink::Family;
use reconciler::policy::Families;

/// The state from which health is derived. The reconciler's observer and the source update it; HTTP handlers read it.
#[derive(Debug)]
pub(crate) struct Health {
    families: Families,
    /// How long a change may be pending, and how long reading the kernel may fail.
    tolerance: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// When the first pending change was received, and when the last one.
    pending: Option<(Instant, Instant)>,
    /// Since when the kernel cannot be read.
    unreadable_since: Option<Instant>,
    /// Families with drift that cannot be repaired.
    unrepaired: BTreeSet<Family>,
    /// `None` before the first sync.
    last_update: Option<SystemTime>,
    is_node_eligible: bool,
    /// Whether the node has lost IPv6 since the start: then it has only the health of IPv4, as after a restart.
    is_ipv6_off: bool,
    /// What other programs have set up that keeps Services from working.
    warnings: Vec<String>,
}

/// The health at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HealthStatus {
    /// Each served family, and whether it is healthy.
    pub(crate) families: Vec<(Family, bool)>,
    /// Whether this node's Node object is known and may receive traffic: it is not being deleted, for example.
    pub(crate) is_node_eligible: bool,
    /// Whether changes have been pending for too long without a first sync.
    pub(crate) is_first_sync_overdue: bool,
    /// When the last sync or audit ended.
    pub(crate) last_update: Option<SystemTime>,
    /// What other programs have set up that keeps Services from working. It does not make the node unhealthy.
    pub(crate) warnings: Vec<String>,
}

impl HealthStatus {
    /// Whether all families are healthy.
    pub(crate) fn is_healthy(&self) -> bool {
        self.families.iter().all(|(_, is_healthy)| *is_healthy)
    }
}

impl Health {
    pub(crate) fn new(families: Families, sync_period: Duration) -> Self {
        Self { families, tolerance: sync_period.saturating_mul(2), state: Mutex::default() }
    }

    /// A change was received from the source.
    pub(crate) fn change_received(&self, now: Instant) {
        let mut state = self.state();
        let first = state.pending.map_or(now, |(first, _)| first);
        state.pending = Some((first, now));
    }

    /// A sync has ended that dealt with every change received before `since`.
    pub(crate) fn synced(&self, since: Instant, unrepaired: &BTreeSet<Family>, now: SystemTime) {
        let mut state = self.state();
        // The first change that was received during the sync is not recorded; it came at `since` or later.
        state.pending = state.pending.filter(|(_, last)| *last > since).map(|(_, last)| (since, last));
        state.unreadable_since = None;
        state.unrepaired.clone_from(unrepaired);
        state.last_update = Some(now);
    }

    /// The kernel could not be read.
    pub(crate) fn kernel_unreadable(&self, now: Instant) {
        self.state().unreadable_since.get_or_insert(now);
    }

    /// Sets whether this node's Node object may receive traffic; `false` if there is none.
    pub(crate) fn set_node_eligible(&self, is_eligible: bool) {
        self.state().is_node_eligible = is_eligible;
    }

    /// Sets whether the node has lost IPv6 since the start.
    pub(crate) fn set_ipv6_off(&self, is_off: bool) {
        self.state().is_ipv6_off = is_off;
    }

    /// Sets what other programs have set up that keeps Services from working.
    pub(crate) fn set_warnings(&self, warnings: Vec<String>) {
        self.state().warnings = warnings;
    }

    /// Whether a sync has ended.
    pub(crate) fn has_synced(&self) -> bool {
        self.state().last_update.is_some()
    }

    /// The health at `now`.
    pub(crate) fn status(&self, now: Instant) -> HealthStatus {
        let state = self.state();
        let is_late = |since: Instant| now.saturating_duration_since(since) >= self.tolerance;
        let is_change_late = state.pending.is_some_and(|(first, _)| is_late(first));
        // Before the first sync the agent is still listing objects; a restart by the kubelet would not speed that up.
        let is_started = state.last_update.is_some();
        let is_behind = (is_started && is_change_late) || state.unreadable_since.is_some_and(is_late);
        HealthStatus {
            families: self
                .families
                .iter()
                .filter(|family| !(state.is_ipv6_off && *family == Family::Ipv6))
                .map(|family| (family, !is_behind && !state.unrepaired.contains(&family)))
                .collect(),
            is_node_eligible: state.is_node_eligible,
            is_first_sync_overdue: !is_started && is_change_late,
            last_update: state.last_update,
            warnings: state.warnings.clone(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name of a family in the Kubernetes API.
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
        health.status(now).is_healthy()
    }

    fn sync(health: &Health, since: Instant) {
        health.synced(since, &BTreeSet::new(), SystemTime::now());
    }

    #[test]
    fn before_any_change_all_families_are_healthy_and_the_node_is_unknown() {
        let (health, now) = health();
        assert!(is_healthy(&health, now + 600 * SECOND));
        assert!(!health.has_synced() && !health.status(now).is_node_eligible);
    }

    #[test]
    fn before_the_first_sync_a_pending_change_only_makes_it_overdue() {
        let (health, now) = health();
        health.change_received(now);
        let status = health.status(now + 60 * SECOND);
        assert!(status.is_healthy() && status.is_first_sync_overdue);
        assert!(!health.status(now + 59 * SECOND).is_first_sync_overdue);
        sync(&health, now + 61 * SECOND);
        assert!(!health.status(now + 62 * SECOND).is_first_sync_overdue);
    }

    #[test]
    fn a_change_may_be_pending_for_two_periods() {
        let (health, now) = health();
        sync(&health, now);
        health.change_received(now);
        health.change_received(now + 50 * SECOND);
        assert!(is_healthy(&health, now + 59 * SECOND));
        assert!(!is_healthy(&health, now + 60 * SECOND));
        sync(&health, now + 61 * SECOND);
        assert!(is_healthy(&health, now + 600 * SECOND));
    }

    #[test]
    fn a_change_during_a_sync_is_pending_from_its_start() {
        let (health, now) = health();
        sync(&health, now);
        health.change_received(now);
        health.change_received(now + 5 * SECOND);
        sync(&health, now + 2 * SECOND);
        assert!(is_healthy(&health, now + 61 * SECOND));
        assert!(!is_healthy(&health, now + 62 * SECOND));
    }

    #[test]
    fn a_kernel_that_is_unreadable_for_two_periods_is_unhealthy() {
        let (health, now) = health();
        sync(&health, now);
        health.kernel_unreadable(now + SECOND);
        health.kernel_unreadable(now + 31 * SECOND);
        assert!(is_healthy(&health, now + 60 * SECOND));
        assert!(!is_healthy(&health, now + 61 * SECOND));
        sync(&health, now + 62 * SECOND);
        assert!(is_healthy(&health, now + 600 * SECOND));
    }

    #[test]
    fn unrepaired_drift_makes_only_its_family_unhealthy() {
        let (health, now) = health();
        health.synced(now, &[Family::Ipv6].into(), SystemTime::now());
        assert_eq!(health.status(now).families, [(Family::Ipv4, true), (Family::Ipv6, false)]);
        sync(&health, now);
        assert!(is_healthy(&health, now));
    }
}
