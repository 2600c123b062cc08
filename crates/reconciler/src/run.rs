//! The main loop of the reconciler: it receives inputs from a channel and decides when to sync and when to audit.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use service_watch::Change;
use service_watch::panics::point;
use tracing::{error, info, warn};

use crate::audit_requests::AuditRequests;
use crate::inbox::{Inbox, Nothing};
use crate::kernel::{Kernel, KernelError};
use crate::log;
use crate::reconciler::Reconciler;
use crate::report::{Failure, SyncReport};

/// The delay before the kernel is read again after an error, unless the minimum period is longer.
const READ_RETRY_DELAY: Duration = Duration::from_secs(1);

/// How often some virtual servers are read, to find out whether another program deleted them.
const PROBE_PERIOD: Duration = Duration::from_millis(500);

/// How long the first sync waits for the Node's data. kube-proxy waits as long for its addresses.
const NODE_WAIT_MAX: Duration = Duration::from_secs(30);

/// An input of the loop.
#[derive(Clone, Debug)]
pub enum Input {
    /// A change of a source, and when it was received.
    Change(Change, Instant),
    /// Addresses of the node's interfaces changed.
    InterfacesChanged,
    /// Another program deleted `kube-ipvs0`, or what its routes require.
    DeviceLost,
    /// These addresses were deleted from `kube-ipvs0`, by this program or another.
    AddressesDeleted(Vec<IpAddr>),
    /// These local routes to `kube-ipvs0` were deleted, by this program or another.
    RoutesDeleted(Vec<IpNet>),
    /// Another program changed a table of the packet filter.
    FilterChanged,
}

/// Receives the reports. Its methods must not block: the kernel is not programmed meanwhile.
pub trait Observer {
    /// A sync or an audit has ended. It includes all changes that were received before `start`.
    fn synced(&mut self, report: &SyncReport, start: Instant, changes: &ReceivedChanges);

    /// The kernel could not be read, so nothing was done.
    fn read_failed(&mut self, error: &KernelError);
}

/// The changes that were received since the last sync.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReceivedChanges {
    /// When each change was received that altered anything.
    pub received_at: Vec<Instant>,
    /// How long the first of them was gathered with others ([`crate::inbox::GATHERING`]).
    pub gathering: Duration,
    /// How many changes of Services there were, including those that altered nothing.
    pub services: usize,
    /// How many changes of EndpointSlices there were.
    pub slices: usize,
}

impl ReceivedChanges {
    fn count(&mut self, change: &Change, count: usize) {
        match change {
            Change::Service(_) | Change::ServiceDeleted(_) => self.services += count,
            Change::Slice(_) | Change::SliceDeleted(_) => self.slices += count,
            _ => {}
        }
    }
}

/// When syncs and audits start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Periods {
    /// The minimum time between the end of a sync and the start of the next (`--ipvs-min-sync-period`). Changes meanwhile are
    /// synced together.
    pub min: Duration,
    /// The maximum time between the end of an audit and the start of the next (`--ipvs-sync-period`).
    pub audit: Duration,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    Sync,
    Audit,
}

/// When to sync and when to audit. It reads no clock: the caller passes the time.
#[derive(Debug)]
struct Schedule {
    periods: Periods,
    /// No task starts before this.
    not_before: Option<Instant>,
    next_audit: Option<Instant>,
    requests: AuditRequests,
    node: NodeWait,
}

/// Whether the first sync waits for the Node's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NodeWait {
    /// It will wait if anything is missing.
    NotStarted,
    Until(Instant),
    /// The data has arrived, or the time is over: to serve Services is more important.
    Over,
}

impl Schedule {
    fn new(periods: Periods) -> Self {
        Self {
            periods,
            not_before: None,
            next_audit: None,
            requests: AuditRequests::default(),
            node: NodeWait::NotStarted,
        }
    }

    /// Until when the first sync waits for the Node's data; `None` if it does not wait.
    fn wait_for_node(&mut self, is_missing: bool, now: Instant) -> Option<Instant> {
        match self.node {
            NodeWait::NotStarted if is_missing => {
                info!(
                    "waiting up to {} s for the addresses or podCIDRs of this node's Node object, which the configuration \
                     requires; if they do not arrive, check that --hostname-override is the name of the Node",
                    NODE_WAIT_MAX.as_secs()
                );
                let deadline = now + NODE_WAIT_MAX;
                self.node = NodeWait::Until(deadline);
                Some(deadline)
            }
            NodeWait::Until(deadline) if is_missing && now < deadline => Some(deadline),
            NodeWait::Until(_) if is_missing => {
                warn!(
                    "this node's Node object is still unknown, or has no addresses or podCIDRs: until it has, NodePorts are \
                     served on all addresses, and pods are not distinguished from other clients; check that \
                     --hostname-override is the name of the Node"
                );
                self.node = NodeWait::Over;
                None
            }
            _ => None,
        }
    }

    /// The next task of a reconciler and its time, which may be in the past.
    fn due<K: Kernel>(&mut self, reconciler: &Reconciler<K>, now: Instant) -> (Task, Instant) {
        let node_wait = self.wait_for_node(reconciler.is_missing_node_data(), now);
        let (task, at) = self.next(reconciler.is_dirty(), reconciler.next_check(), now);
        (task, node_wait.map_or(at, |until| at.max(until)))
    }

    /// The same without the wait for the Node. `check` is when the reconciler retries or checks something.
    fn next(&self, is_dirty: bool, check: Option<Instant>, now: Instant) -> (Task, Instant) {
        let audit = self.next_audit.unwrap_or(now);
        let sync = if is_dirty { Some(now) } else { check };
        let (task, at) = match sync {
            Some(sync) if sync < audit => (Task::Sync, sync),
            _ => (Task::Audit, audit),
        };
        let at = self.not_before.map_or(at, |not_before| at.max(not_before));
        match self.requests.due() {
            // What others took away does not wait for the minimum period.
            Some(due) if due <= at => (Task::Audit, due),
            _ => (task, at),
        }
    }

    /// `is_unfinished` is whether parts of large changes are left. They continue without a delay.
    fn task_ended(&mut self, task: Task, is_success: bool, is_unfinished: bool, start: Instant, now: Instant) {
        if is_success {
            self.node = NodeWait::Over;
            self.not_before = (!is_unfinished).then(|| now + self.periods.min);
            if task == Task::Audit {
                self.next_audit = Some(now + self.periods.audit);
                self.requests.audited(start, now, self.periods.audit);
            }
        } else {
            let retry = now + self.periods.min.max(READ_RETRY_DELAY);
            self.not_before = Some(retry);
            self.requests.put_off(retry);
        }
    }
}

/// Runs until all senders of the channel are dropped, or with `once` until the first sync has ended. Returns the failures of the last
/// sync.
pub fn run<K: Kernel>(
    reconciler: &mut Reconciler<K>,
    inputs: &Inbox,
    periods: Periods,
    once: bool,
    observer: &mut impl Observer,
) -> Vec<Failure> {
    let mut schedule = Schedule::new(periods);
    let mut failures = Vec::new();
    let mut read_error = None;
    let mut changes = ReceivedChanges::default();
    let mut next_probe = Instant::now() + PROBE_PERIOD;
    // Whether parts of large changes are left.
    let mut is_unfinished = false;
    loop {
        let wait = reconciler.is_ready().then(|| {
            let now = Instant::now();
            let (_, at) = schedule.due(reconciler, now);
            at.min(next_probe).saturating_duration_since(now)
        });
        match inputs.receive(wait) {
            Ok(received) => {
                // All inputs that have been gathered by now are applied before the next sync.
                for received in received {
                    match received.input {
                        Input::Change(change, since) => {
                            changes.count(&change, received.count);
                            reconciler.apply(change);
                            // A change that alters nothing does not wait for a sync.
                            if reconciler.is_dirty() {
                                if changes.received_at.is_empty() {
                                    changes.gathering = since.elapsed();
                                }
                                changes.received_at.push(since);
                            }
                        }
                        Input::InterfacesChanged => reconciler.interfaces_changed(),
                        Input::DeviceLost | Input::FilterChanged => schedule.requests.request(Instant::now()),
                        Input::AddressesDeleted(addresses) if reconciler.has_bound_any(&addresses) => {
                            schedule.requests.request(Instant::now());
                        }
                        Input::RoutesDeleted(ranges) if reconciler.has_routed_any(&ranges) => {
                            schedule.requests.request(Instant::now());
                        }
                        Input::AddressesDeleted(_) | Input::RoutesDeleted(_) => {}
                    }
                }
            }
            Err(Nothing::Timeout) => {}
            Err(Nothing::Disconnected) => return failures,
        }
        if !reconciler.is_ready() {
            sync_bootstrap(reconciler, &changes);
            continue;
        }
        point("sync", &"now");
        let start = Instant::now();
        if start >= next_probe {
            if reconciler.probe() {
                schedule.requests.request(start);
            }
            next_probe = start + PROBE_PERIOD;
        }
        let (task, at) = schedule.due(reconciler, start);
        if at > start {
            continue;
        }
        let mut result = match task {
            Task::Sync => reconciler.sync_part(start),
            Task::Audit => reconciler.audit_part(start),
        };
        let end = Instant::now();
        let was_unfinished = std::mem::replace(&mut is_unfinished, reconciler.is_dirty());
        match &mut result {
            Ok(report) => {
                report.duration = end - start;
                reconciler.note_pace(report);
                if !was_unfinished {
                    failures.clear();
                }
                failures.extend_from_slice(&report.failures);
                read_error = None;
                log::report(report, changes.received_at.first().map(|first| (end - *first, changes.gathering)));
                observer.synced(report, start, &changes);
                changes = ReceivedChanges::default();
            }
            Err(error) => {
                if read_error.as_ref() != Some(error) {
                    error!("cannot read the state of the kernel, will try again: {error}");
                }
                read_error = Some(error.clone());
                observer.read_failed(error);
            }
        }
        schedule.task_ended(task, result.is_ok(), is_unfinished, start, end);
        if once && result.is_ok() && !is_unfinished {
            return failures;
        }
    }
}

/// Programs bootstrap Services before the initial list is complete.
fn sync_bootstrap<K: Kernel>(reconciler: &mut Reconciler<K>, changes: &ReceivedChanges) {
    match reconciler.release_api_server(Instant::now()) {
        Ok(None) => {}
        Ok(Some(report)) => {
            info!("unbound an address of the API server, which this node could not reach because of it");
            log::failures(&report);
        }
        Err(error) => warn!("cannot find out whether an address of the API server is bound to this node: {error}"),
    }
    let last = changes.received_at.last();
    match reconciler.sync_bootstrap(Instant::now()) {
        Ok(None) => {}
        Ok(Some(report)) => {
            let virtual_servers = log::counts(report.applied.servers_added, report.applied.servers_changed, 0);
            info!(
                virtual_servers,
                latency = last.map(|last| tracing::field::debug(last.elapsed())),
                "serving the API server and DNS before all other Services"
            );
            log::failures(&report);
        }
        Err(error) => warn!("cannot serve the API server and DNS before all other Services: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIN: Duration = Duration::from_secs(1);
    const AUDIT: Duration = Duration::from_secs(30);

    fn schedule() -> Schedule {
        Schedule::new(Periods { min: MIN, audit: AUDIT })
    }

    #[test]
    fn the_first_task_is_an_audit_without_delay() {
        let now = Instant::now();
        assert_eq!(schedule().next(true, None, now), (Task::Audit, now));
    }

    #[test]
    fn changes_within_the_minimum_period_wait_for_its_end() {
        let (mut schedule, start) = (schedule(), Instant::now());
        schedule.task_ended(Task::Audit, true, false, start, start);
        let soon = start + MIN / 2;
        assert_eq!(schedule.next(true, None, soon), (Task::Sync, start + MIN));
        let late = start + MIN * 3;
        assert_eq!(schedule.next(true, None, late), (Task::Sync, late));
    }

    #[test]
    fn parts_of_large_changes_follow_without_delay() {
        let (mut schedule, start) = (schedule(), Instant::now());
        schedule.task_ended(Task::Audit, true, true, start, start);
        assert_eq!(schedule.next(true, None, start), (Task::Sync, start));
        schedule.task_ended(Task::Sync, true, false, start, start);
        assert_eq!(schedule.next(true, None, start), (Task::Sync, start + MIN));
    }

    #[test]
    fn syncs_do_not_delay_the_audit() {
        let (mut schedule, start) = (schedule(), Instant::now());
        schedule.task_ended(Task::Audit, true, false, start, start);
        for second in 1..30 {
            schedule.task_ended(
                Task::Sync,
                true,
                false,
                start + Duration::from_secs(second),
                start + Duration::from_secs(second),
            );
        }
        assert_eq!(schedule.next(false, None, start + AUDIT), (Task::Audit, start + AUDIT));
        assert_eq!(schedule.next(true, None, start + AUDIT * 2).0, Task::Audit);
    }

    #[test]
    fn the_first_sync_waits_a_limited_time_for_the_node() {
        let (mut schedule, start) = (schedule(), Instant::now());
        let late = start + NODE_WAIT_MAX;
        assert_eq!(schedule.wait_for_node(true, start), Some(late));
        assert_eq!(schedule.wait_for_node(true, start + MIN), Some(late), "the time does not begin anew");
        assert_eq!(schedule.wait_for_node(false, start + MIN), None, "it has come");

        assert_eq!(schedule.wait_for_node(true, late), None, "it has not");
        assert_eq!(schedule.wait_for_node(true, late + MIN), None);

        let mut schedule = self::schedule();
        schedule.task_ended(Task::Audit, true, false, start, start);
        assert_eq!(
            schedule.wait_for_node(true, start + MIN),
            None,
            "after the first run nothing waits for it any more"
        );
    }

    #[test]
    fn a_check_is_a_sync_when_it_is_due() {
        let (mut schedule, start) = (schedule(), Instant::now());
        schedule.task_ended(Task::Audit, true, false, start, start);
        let check = start + MIN * 5;
        assert_eq!(schedule.next(false, Some(check), start), (Task::Sync, check));
    }

    #[test]
    fn a_failed_dump_is_retried_after_a_delay() {
        let (mut schedule, start) = (Schedule::new(Periods { min: Duration::ZERO, audit: AUDIT }), Instant::now());
        schedule.task_ended(Task::Audit, false, false, start, start);
        assert_eq!(schedule.next(true, None, start), (Task::Audit, start + READ_RETRY_DELAY));
    }

    #[test]
    fn a_requested_audit_does_not_wait_for_the_minimum_period() {
        let (mut schedule, start) = (schedule(), Instant::now());
        schedule.task_ended(Task::Audit, true, false, start, start);
        schedule.requests.request(start);
        assert_eq!(schedule.next(true, None, start), (Task::Audit, start));
        schedule.task_ended(Task::Audit, false, false, start, start);
        assert_eq!(schedule.next(true, None, start), (Task::Audit, start + READ_RETRY_DELAY));
    }
}
