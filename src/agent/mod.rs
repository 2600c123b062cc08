//! The agent: prepares the kernel, then starts and connects all threads and tasks.
//!
//! * `source`: the task that reads Services from an API server or from manifests.
//! * `reconciler_thread`: the thread that programs the kernel, what is reported after each sync, and the thread that
//!   watches the node's interfaces.
//! * `servers`: the tasks that serve HTTP.
//! * `restart`: notices changes of the configuration and of credentials.
//! * `exit`: waits for whatever ends the agent.

mod exit;
mod reconciler_thread;
mod restart;
mod servers;
mod source;

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result};
use reconciler::inbox;
use service_watch::{Change, Message};
use tokio::sync::mpsc as channel;
use tracing::info;

use self::exit::Failures;
use self::reconciler_thread::SyncObserver;
use self::servers::Servers;
use self::source::{SourceCounters, SourceTask};
use crate::config::{Configuration, Settings};
use crate::events::EventPublisher;
use crate::flags::Flags;
use crate::health::Health;
use crate::host::{HostMonitor, ServiceNeeds};
use crate::logging::VerbosityHandle;
use crate::mode::{ExitReason, RunMode};
use crate::panics::Supervisor;
use crate::sysctl::SysctlMonitor;
use crate::{metrics, preflight, sysctl};

/// What the agent runs with.
pub(crate) struct AgentOptions {
    pub(crate) flags: Flags,
    pub(crate) configuration: Configuration,
    pub(crate) settings: Settings,
    pub(crate) verbosity: VerbosityHandle,
    pub(crate) mode: RunMode,
}

/// Checks and prepares the kernel, for the address families that the node has.
fn prepare(settings: &mut Settings) -> Result<(reconciler::linux::LinuxKernel, SysctlMonitor)> {
    settings.policy.families = preflight::detect_families();
    preflight::check_cluster_cidr(&settings.policy)?;
    preflight::set_oom_score_adj(settings.oom_score_adj);
    let mut kernel = preflight::connect(&settings.policy)?;
    // After connecting, which loads IPVS: its sysctls do not exist before.
    let monitor = sysctl::apply_all(settings.strict_arp, settings.estimation, &settings.conntrack)?;
    preflight::set_ipvs_timeouts(kernel.ipvs(), settings.timeouts);
    Ok((kernel, monitor))
}

/// `--init-only`: does everything that requires more than `CAP_NET_ADMIN`, so that the agent itself needs no more.
pub(crate) fn init(mut settings: Settings) -> Result<()> {
    prepare(&mut settings)?;
    info!("the kernel is prepared: an agent that starts from now on needs only CAP_NET_ADMIN");
    Ok(())
}

/// Runs until a signal or a change of the configuration, or in a one-shot mode until the first sync has ended.
pub(crate) fn run(options: AgentOptions) -> Result<ExitReason> {
    let (started, started_at) = (SystemTime::now(), Instant::now());
    let AgentOptions { flags, configuration, mut settings, verbosity, mode } = options;
    info!(
        version = env!("CARGO_PKG_VERSION"), node = settings.policy.node_name, scheduler = %settings.policy.scheduler,
        "starting"
    );
    preflight::raise_file_limit();
    let metrics_handle = metrics::install_recorder().context("cannot record metrics")?;
    let (mut kernel, sysctls) = prepare(&mut settings)?;
    let served_vips = settings.confirm_disappearance.then(|| preflight::served_vips(kernel.ipvs()));
    let location = source::location(&flags, &settings);
    let (mut policy, periods) = (settings.policy.clone(), settings.periods);
    policy.api_servers.extend(location.server_address());
    let (node_name, families) = (policy.node_name.clone(), policy.families);
    let health = Arc::new(Health::new(families, periods.audit));
    // One worker for the source and the servers, besides this thread, which waits for signals: a kubeconfig may name a
    // program that returns credentials, and running it blocks.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("cannot start tokio")?;

    let (inputs, inbox) = inbox::channel();
    let (supervisor, defects) = Supervisor::new();
    reconciler_thread::watch_interfaces(&policy.binding, inputs.clone(), supervisor.clone())?;
    if !kernel.owns_tables() {
        reconciler_thread::watch_filter(kernel.watch_filter()?, inputs.clone(), supervisor.clone())?;
    }
    let events = EventPublisher::default();
    let needs = Arc::new(Mutex::new(ServiceNeeds::default()));
    let mut host = HostMonitor::new(families, needs.clone(), health.clone(), events.clone());
    // What is there at the start is told before anything is programmed.
    host.check();
    if !mode.is_one_shot() {
        reconciler_thread::watch_host(host, supervisor.clone())?;
    }
    let (health_check_sender, health_check_updates) = channel::unbounded_channel();
    let observer = SyncObserver {
        health: health.clone(),
        families,
        started,
        sysctls,
        events: events.clone(),
        health_checks: health_check_sender,
    };
    let reconciler_ended = reconciler_thread::spawn(kernel, policy, inbox, periods, mode, observer)?;

    let counters = SourceCounters::default();
    let (fatal_sender, fatal) = channel::channel(1);
    if !mode.is_one_shot() {
        let servers = Servers {
            runtime: &runtime,
            supervisor: &supervisor,
            health: &health,
            events: &events,
            counters: &counters,
            metrics: metrics_handle,
            debug: settings.profiling.then_some(verbosity),
            hard_failure: settings.bind_hard_fail.then_some(&fatal_sender),
        };
        servers.start(&settings, &configuration, health_check_updates)?;
    }

    let record = move |change: &Change, now| source::record_change(change, now, &health, families, &needs);
    let sink = move |message| match message {
        Message::Change(change) => send_changes([change], &inputs, &record),
        Message::Changes(changes) => send_changes(changes, &inputs, &record),
        // The source has logged it.
        Message::Report(_) => ControlFlow::Continue(()),
    };
    let credentials = location.clone();
    let source =
        SourceTask { location, node_name, watch_all_nodes: settings.watch_all_nodes, served_vips, events, counters };
    let restart = async {
        tokio::select! {
            () = restart::configuration_changed(&flags, &configuration) => {}
            () = restart::credentials_changed(credentials) => {}
        }
    };
    let failures = Failures { fatal, defects, started: started_at };
    let result = runtime.block_on(exit::wait(reconciler_ended, mode, source.run(sink), restart, failures));
    // Does not wait for requests that are still running.
    runtime.shutdown_background();
    result
}

/// Passes changes that belong together to the reconciler, and each to `record`.
fn send_changes(
    changes: impl IntoIterator<Item = Change>,
    inputs: &inbox::Sender,
    record: impl Fn(&Change, Instant),
) -> ControlFlow<()> {
    let now = Instant::now();
    match inputs.send_changes(changes.into_iter().inspect(|change| record(change, now)), now) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    }
}
