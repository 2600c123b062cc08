//! A thread and a clock for the reconciler: takes inputs from a channel and decides when to sync and when to audit.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use service_watch::Change;
use tracing::{error, info, warn};

use crate::kernel::{Kernel, KernelError};
use crate::log;
use crate::reconciler::Reconciler;
use crate::report::{Failure, SyncReport};

/// How long after a failed reading of the kernel it is read again, unless the minimum period is longer.
const READ_RETRY_DELAY: Duration = Duration::from_secs(1);

/// How long the first sync waits for what it takes of the Node. kube-proxy waits as long for its addresses.
const NODE_WAIT_MAX: Duration = Duration::from_secs(30);

/// While the source is saying what there is, more is waited for so long: to be woken for each object would cost more than to
/// take it in.
const BATCH_DELAY: Duration = Duration::from_millis(1);

/// What the thread is told.
#[derive(Clone, Debug)]
pub enum Input {
    /// A source says so, since then.
    Change(Change, Instant),
    /// Addresses of the node's interfaces changed.
    InterfacesChanged,
    /// Somebody deleted `kube-ipvs0`.
    DeviceLost,
}

/// Who is told what the thread does. Nothing here may wait: the kernel does meanwhile.
pub trait Observer {
    /// A sync or an audit has ended. What had been said before `since` is in it.
    fn done(&mut self, report: &SyncReport, since: Instant, changes: &ReceivedChanges);

    /// The state of the kernel could not be read, so nothing was done.
    fn failed(&mut self, error: &KernelError);
}

/// What a sync took in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReceivedChanges {
    /// When each change was heard of that made a difference.
    pub received_at: Vec<Instant>,
    /// How many changes of Services there were, whether they made one or not.
    pub services: usize,
    /// How many of EndpointSlices.
    pub slices: usize,
}

impl ReceivedChanges {
    fn count(&mut self, change: &Change) {
        match change {
            Change::Service(_) | Change::ServiceDeleted(_) => self.services += 1,
            Change::Slice(_) | Change::SliceDeleted(_) => self.slices += 1,
            _ => {}
        }
    }
}

/// How often to sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Periods {
    /// From the end of a sync to the start of the next at least this (`--ipvs-min-sync-period`); changes within it are
    /// synced together.
    pub min: Duration,
    /// From the end of an audit to the start of the next at most this (`--ipvs-sync-period`).
    pub audit: Duration,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    Sync,
    Audit,
}

/// When to do what. Free of clocks: it is told the time.
#[derive(Debug)]
struct Schedule {
    periods: Periods,
    /// Before this nothing is done.
    not_before: Option<Instant>,
    next_audit: Option<Instant>,
    node: NodeWait,
}

/// Whether the first sync waits for what it takes of the Node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NodeWait {
    /// If anything is lacking.
    NotStarted,
    Until(Instant),
    /// It has come, or been waited for long enough: Services come before perfection.
    Over,
}

impl Schedule {
    fn new(periods: Periods) -> Self {
        Self { periods, not_before: None, next_audit: None, node: NodeWait::NotStarted }
    }

    /// Until when nothing is done for the want of what is lacking of the Node.
    fn hold(&mut self, is_lacking: bool, now: Instant) -> Option<Instant> {
        match self.node {
            NodeWait::NotStarted if is_lacking => {
                info!(
                    "waiting up to {} s for what the configuration needs of the own Node: its addresses or podCIDRs; is \
                     --hostname-override the name of the Node?",
                    NODE_WAIT_MAX.as_secs()
                );
                let deadline = now + NODE_WAIT_MAX;
                self.node = NodeWait::Until(deadline);
                Some(deadline)
            }
            NodeWait::Until(deadline) if is_lacking && now < deadline => Some(deadline),
            NodeWait::Until(_) if is_lacking => {
                warn!(
                    "the own Node is still not known, or lacks addresses or podCIDRs: going on without; NodePorts listen on \
                     all addresses and pods are not told from others until it is"
                );
                self.node = NodeWait::Over;
                None
            }
            _ => None,
        }
    }

    /// The next task of a reconciler and its time, which may have passed.
    fn due<K: Kernel>(&mut self, reconciler: &Reconciler<K>, now: Instant) -> (Task, Instant) {
        let hold = self.hold(reconciler.is_missing_node_data(), now);
        let (task, at) = self.next(reconciler.is_dirty(), reconciler.next_check(), now);
        (task, hold.map_or(at, |hold| at.max(hold)))
    }

    /// `look` is when the reconciler wants to look at something.
    fn next(&self, is_dirty: bool, look: Option<Instant>, now: Instant) -> (Task, Instant) {
        let audit = self.next_audit.unwrap_or(now);
        let sync = if is_dirty { Some(now) } else { look };
        let (task, at) = match sync {
            Some(sync) if sync < audit => (Task::Sync, sync),
            _ => (Task::Audit, audit),
        };
        (task, self.not_before.map_or(at, |not_before| at.max(not_before)))
    }

    fn ended(&mut self, task: Task, is_success: bool, now: Instant) {
        if is_success {
            self.node = NodeWait::Over;
            self.not_before = Some(now + self.periods.min);
            if task == Task::Audit {
                self.next_audit = Some(now + self.periods.audit);
            }
        } else {
            self.not_before = Some(now + self.periods.min.max(READ_RETRY_DELAY));
        }
    }
}

/// Runs until the senders of the channel are gone, or with `once` until the first sync has ended. Returns what failed in the
/// last sync.
pub fn run<K: Kernel>(
    reconciler: &mut Reconciler<K>,
    inputs: &Receiver<Input>,
    periods: Periods,
    once: bool,
    observer: &mut impl Observer,
) -> Vec<Failure> {
    let mut schedule = Schedule::new(periods);
    let mut failed = Vec::new();
    let mut unreadable = None;
    let mut changes = ReceivedChanges::default();
    loop {
        let wait = reconciler.is_ready().then(|| {
            let now = Instant::now();
            let (_, at) = schedule.due(reconciler, now);
            at.saturating_duration_since(now)
        });
        let received = match wait {
            Some(wait) => inputs.recv_timeout(wait),
            None => inputs.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match received {
            Ok(input) => {
                if !reconciler.is_ready() {
                    std::thread::sleep(BATCH_DELAY);
                }
                // All that has come by now is one change of state, not many.
                for input in std::iter::once(input).chain(inputs.try_iter()) {
                    match input {
                        Input::Change(change, since) => {
                            changes.count(&change);
                            reconciler.apply(change);
                            // What changes nothing waits for no sync.
                            if reconciler.is_dirty() {
                                changes.received_at.push(since);
                            }
                        }
                        Input::InterfacesChanged => reconciler.interfaces_changed(),
                        Input::DeviceLost => schedule.next_audit = None,
                    }
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return failed,
        }
        if !reconciler.is_ready() {
            sync_bootstrap(reconciler, &changes);
            continue;
        }
        let start = Instant::now();
        let (task, at) = schedule.due(reconciler, start);
        if at > start {
            continue;
        }
        let mut result = match task {
            Task::Sync => reconciler.sync(start),
            Task::Audit => reconciler.audit(start),
        };
        let end = Instant::now();
        match &mut result {
            Ok(report) => {
                report.duration = end - start;
                failed.clone_from(&report.failures);
                unreadable = None;
                log::report(report, changes.received_at.first().map(|first| end - *first));
                observer.done(report, start, &changes);
                changes = ReceivedChanges::default();
            }
            Err(error) => {
                if unreadable.as_ref() != Some(error) {
                    error!("cannot read the state of the kernel, will try again: {error}");
                }
                unreadable = Some(error.clone());
                observer.failed(error);
            }
        }
        schedule.ended(task, result.is_ok(), end);
        if once && result.is_ok() {
            return failed;
        }
    }
}

/// What everything waits for is served before all else is known.
fn sync_bootstrap<K: Kernel>(reconciler: &mut Reconciler<K>, changes: &ReceivedChanges) {
    let last = changes.received_at.last();
    match reconciler.sync_bootstrap(Instant::now()) {
        Ok(None) => {}
        Ok(Some(report)) => {
            let virtual_servers = log::counts(report.applied.servers_added, report.applied.servers_changed, 0);
            info!(
                virtual_servers,
                latency = last.map(|last| tracing::field::debug(last.elapsed())),
                "serving the API server and DNS, ahead of the rest"
            );
            log::failures(&report);
        }
        Err(error) => warn!("cannot serve the API server and DNS ahead of the rest: {error}"),
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
    fn the_first_run_is_an_audit_and_is_not_delayed() {
        let now = Instant::now();
        assert_eq!(schedule().next(true, None, now), (Task::Audit, now));
    }

    #[test]
    fn changes_within_the_minimum_period_wait_for_its_end() {
        let (mut schedule, start) = (schedule(), Instant::now());
        schedule.ended(Task::Audit, true, start);
        let soon = start + MIN / 2;
        assert_eq!(schedule.next(true, None, soon), (Task::Sync, start + MIN));
        let late = start + MIN * 3;
        assert_eq!(schedule.next(true, None, late), (Task::Sync, late));
    }

    #[test]
    fn syncs_do_not_put_off_the_audit() {
        let (mut schedule, start) = (schedule(), Instant::now());
        schedule.ended(Task::Audit, true, start);
        for second in 1..30 {
            schedule.ended(Task::Sync, true, start + Duration::from_secs(second));
        }
        assert_eq!(schedule.next(false, None, start + AUDIT), (Task::Audit, start + AUDIT));
        assert_eq!(schedule.next(true, None, start + AUDIT * 2).0, Task::Audit);
    }

    #[test]
    fn the_first_run_waits_for_what_it_needs_of_the_node_and_not_for_ever() {
        let (mut schedule, start) = (schedule(), Instant::now());
        let late = start + NODE_WAIT_MAX;
        assert_eq!(schedule.hold(true, start), Some(late));
        assert_eq!(schedule.hold(true, start + MIN), Some(late), "the time does not begin anew");
        assert_eq!(schedule.hold(false, start + MIN), None, "it has come");

        assert_eq!(schedule.hold(true, late), None, "it has not");
        assert_eq!(schedule.hold(true, late + MIN), None);

        let mut schedule = self::schedule();
        schedule.ended(Task::Audit, true, start);
        assert_eq!(schedule.hold(true, start + MIN), None, "after the first run nothing waits for it any more");
    }

    #[test]
    fn a_look_is_a_sync_at_its_time() {
        let (mut schedule, start) = (schedule(), Instant::now());
        schedule.ended(Task::Audit, true, start);
        let look = start + MIN * 5;
        assert_eq!(schedule.next(false, Some(look), start), (Task::Sync, look));
    }

    #[test]
    fn a_failed_reading_is_tried_again_soon_but_not_at_once() {
        let (mut schedule, start) = (Schedule::new(Periods { min: Duration::ZERO, audit: AUDIT }), Instant::now());
        schedule.ended(Task::Audit, false, start);
        assert_eq!(schedule.next(true, None, start), (Task::Audit, start + READ_RETRY_DELAY));
    }
}
