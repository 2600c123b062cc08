//! The thread that runs the reconciler, and what is reported after each sync: health, metrics, Events and health
//! checks. Also the thread that tells the reconciler about changes of the node's interfaces.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use reconciler::binding::VipBinding;
use reconciler::inbox::{Inbox, Sender};
use reconciler::kernel::KernelError;
use reconciler::linux::LinuxKernel;
use reconciler::linux::filter_watch::FilterWatch;
use reconciler::linux::interface_watch::{InterfaceChanges, InterfaceWatch};
use reconciler::policy::Families;
use reconciler::report::{Failure, SyncReport};
use reconciler::run::{Input, Observer, Periods, ReceivedChanges};
use reconciler::{Policy, Reconciler};
use tokio::sync::{mpsc as channel, oneshot};
use tracing::warn;

use crate::events::{self, EventPublisher};
use crate::health::Health;
use crate::host::HostMonitor;
use crate::http::health_check_node_ports::PortUpdate;
use crate::metrics;
use crate::mode::RunMode;
use crate::panics::Supervisor;
use crate::sysctl::SysctlMonitor;

/// The delay before a watch that failed is tried again.
const WATCH_RETRY_DELAY: Duration = Duration::from_secs(1);

/// What the reconciler returns when it ends, in a one-shot mode.
pub(super) struct SyncResult {
    pub(super) failures: Vec<Failure>,
    /// Whether the source could not parse everything.
    pub(super) is_incomplete: bool,
}

/// Starts the thread. The receiver gets the result when it ends.
pub(super) fn spawn(
    kernel: LinuxKernel,
    policy: Policy,
    inbox: Inbox,
    periods: Periods,
    mode: RunMode,
    mut observer: SyncObserver,
) -> Result<oneshot::Receiver<SyncResult>> {
    let (ended, receiver) = oneshot::channel();
    thread::Builder::new()
        .name("reconciler".to_owned())
        .spawn(move || {
            let mut reconciler = Reconciler::new(kernel, policy);
            let failures = reconciler::run::run(&mut reconciler, &inbox, periods, mode.is_one_shot(), &mut observer);
            // Fails if the agent is already exiting.
            let _ = ended.send(SyncResult { failures, is_incomplete: reconciler.is_incomplete() });
        })
        .context("cannot start a thread")?;
    Ok(receiver)
}

/// Reports the report of each sync and audit.
pub(super) struct SyncObserver {
    pub(super) health: Arc<Health>,
    pub(super) families: Families,
    pub(super) started: SystemTime,
    pub(super) sysctls: SysctlMonitor,
    pub(super) events: EventPublisher,
    pub(super) health_checks: channel::UnboundedSender<PortUpdate>,
}

impl Observer for SyncObserver {
    fn synced(&mut self, report: &SyncReport, since: Instant, received: &ReceivedChanges) {
        self.health.synced(since, &report.unrepaired, SystemTime::now());
        metrics::sync_ended(report, received, self.families, self.started);
        for event in events::of_sync(report) {
            self.events.publish(event);
        }
        // Not in the first audit, which comes right after the sysctls were applied.
        if report.is_audit && !report.is_first_audit {
            for problem in self.sysctls.restore() {
                self.events.publish(events::sysctl_changed(problem));
            }
            metrics::set_wrong_sysctls(self.sysctls.failing());
        }
        for update in &report.health_checks {
            // Fails in one-shot modes, which serve no ports.
            let _ = self.health_checks.send(update.clone());
        }
    }

    fn read_failed(&mut self, _: &KernelError) {
        self.health.kernel_unreadable(Instant::now());
        metrics::kernel_read_failed();
    }
}

/// Starts the thread that tells the reconciler when another program changes the tables of the packet filter.
pub(super) fn watch_filter(mut watch: FilterWatch, inputs: Sender, supervisor: Supervisor) -> Result<()> {
    let follow = move || {
        loop {
            let is_changed = watch.wait().unwrap_or_else(|error| {
                warn!("cannot watch the packet filter, will try again: {error}");
                thread::sleep(WATCH_RETRY_DELAY);
                // Changes may have been missed.
                true
            });
            if is_changed && inputs.send(Input::FilterChanged).is_err() {
                return;
            }
        }
    };
    let run = move || supervisor.run("the watch of the packet filter", follow);
    thread::Builder::new().name("packet-filter".to_owned()).spawn(run).context("cannot start a thread")?;
    Ok(())
}

/// Starts the thread that looks at what other programs have set up on this host.
pub(super) fn watch_host(host: HostMonitor, supervisor: Supervisor) -> Result<()> {
    let run = move || supervisor.run("the watch of the host", || host.run());
    thread::Builder::new().name("host".to_owned()).spawn(run).context("cannot start a thread")?;
    Ok(())
}

/// Starts the thread that tells the reconciler when the addresses of the node's interfaces change, and when something of
/// `kube-ipvs0` is deleted.
pub(super) fn watch_interfaces(binding: &VipBinding, inputs: Sender, supervisor: Supervisor) -> Result<()> {
    let mut watch = InterfaceWatch::open(binding).context("cannot watch the node's interfaces")?;
    let follow = move || {
        loop {
            let changed = watch.wait().unwrap_or_else(|error| {
                warn!("cannot watch the node's interfaces, will try again: {error}");
                thread::sleep(WATCH_RETRY_DELAY);
                // Changes may have been missed, so the addresses are read again.
                InterfaceChanges { addresses: true, ..InterfaceChanges::default() }
            });
            let events = [
                (changed.addresses, Input::InterfacesChanged),
                (changed.device_lost, Input::DeviceLost),
                (!changed.addresses_deleted.is_empty(), Input::AddressesDeleted(changed.addresses_deleted)),
                (!changed.routes_deleted.is_empty(), Input::RoutesDeleted(changed.routes_deleted)),
            ];
            for (_, input) in events.into_iter().filter(|(has_happened, _)| *has_happened) {
                if inputs.send(input).is_err() {
                    return;
                }
            }
        }
    };
    let run = move || supervisor.run("the watch of the node's interfaces", follow);
    thread::Builder::new().name("interfaces".to_owned()).spawn(run).context("cannot start a thread")?;
    Ok(())
}
