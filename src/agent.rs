//! The parts wired together: a source of Services, the node's addresses, the reconciler on its own thread, and the ports
//! on which the agent answers.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow};
use metrics_exporter_prometheus::PrometheusHandle;
use reconciler::Reconciler;
use reconciler::kernel::KernelError;
use reconciler::linux::interface_watch::{InterfaceChanges, InterfaceWatch};
use reconciler::policy::Families;
use reconciler::report::{Failure, SyncReport};
use reconciler::run::{Input, Observer, ReceivedChanges};
use service_watch::{ApiServer, Change, Connection, Counters, EventRecorder, Manifests, Message, ExistingState, Source};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc as channel, oneshot};
use tracing::{error, info, warn};

use crate::alone::Alone;
use crate::config::follow::Files;
use crate::config::{Configuration, Settings};
use crate::flags::Flags;
use crate::health::Health;
use crate::http::{self, node_ports};
use crate::logging::Verbosity;
use crate::{events, in_one_line, metrics, preflight, sysctl};

/// How often what was measured is put in order; the exporter keeps every single value until then.
const UPKEEP: Duration = Duration::from_secs(5);

/// Why the agent ended, where that is no error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It did what it was to do.
    Done,
    /// It was told to stop.
    Stopped,
    /// The configuration has changed: it is to start anew.
    Restart,
}

/// Where Services come from.
#[derive(Clone)]
enum Origin {
    Manifests(PathBuf),
    ApiServer(Connection),
}

/// What to run with.
pub(crate) struct Start {
    pub(crate) flags: Flags,
    pub(crate) configuration: Configuration,
    pub(crate) settings: Settings,
    pub(crate) verbosity: Verbosity,
    pub(crate) mode: Mode,
}

/// What to run for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Serve until told otherwise.
    Serve,
    /// Sync once; what the kernel refused is an error.
    Once,
    /// Sync once, before something else is taken away. What the kernel refused for one Service it would refuse whoever asks,
    /// and whoever may make Services must not be able to keep a node from being taken over.
    Takeover,
}

/// Prepares the kernel, for the families the node has.
fn prepare(settings: &mut Settings) -> Result<(reconciler::linux::LinuxKernel, sysctl::Watch)> {
    settings.policy.families = preflight::families();
    preflight::pods_have_a_family(&settings.policy)?;
    sysctl::set_oom_score(settings.oom_score_adj);
    let mut kernel = preflight::kernel(&settings.policy)?;
    // Only now: settings of IPVS exist once the kernel has loaded it.
    let sysctls = sysctl::set(settings.strict_arp, settings.estimation, &settings.conntrack)?;
    preflight::set_timeouts(kernel.ipvs(), settings.timeouts);
    Ok((kernel, sysctls))
}

/// Does what takes more than `CAP_NET_ADMIN`, so that the agent needs no more.
pub(crate) fn init(mut settings: Settings) -> Result<End> {
    prepare(&mut settings)?;
    info!("the kernel is ready: an agent started from now on needs CAP_NET_ADMIN only");
    Ok(End::Done)
}

/// Runs until a signal, until the configuration changes, or where it is to sync once until the first sync has ended.
pub(crate) fn run(start: Start) -> Result<End> {
    let started = SystemTime::now();
    let Start { flags, configuration, mut settings, verbosity, mode } = start;
    let once = mode != Mode::Serve;
    info!(
        version = env!("CARGO_PKG_VERSION"), node = settings.policy.node_name, scheduler = %settings.policy.scheduler,
        "starting"
    );
    let _alone = Alone::new()?;
    preflight::raise_file_limit();
    let handle = metrics::install().context("cannot measure")?;
    let (mut kernel, sysctls) = prepare(&mut settings)?;
    let serving = settings.confirm_disappearance.then(|| preflight::serving(kernel.ipvs()));
    let origin = match &flags.manifests {
        Some(directory) => Origin::Manifests(directory.clone()),
        None => Origin::ApiServer(Connection {
            kubeconfig: settings.kubeconfig.clone(),
            master: flags.master.clone(),
            user_agent: Some(concat!("kube-ipvs/", env!("CARGO_PKG_VERSION")).to_owned()),
        }),
    };
    let (mut policy, periods) = (settings.policy.clone(), settings.periods);
    if let Origin::ApiServer(connection) = &origin {
        policy.api_servers.extend(connection.server_address());
    }
    let families = policy.families;
    let health = Arc::new(Health::new(families, periods.audit));
    // One thread for the source and the ports, and this one for signals: a kubeconfig may name a program for credentials,
    // which blocks.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("cannot start tokio")?;

    let (inputs, inbox) = mpsc::channel();
    watch_interfaces(inputs.clone())?;
    let posts = Posts::default();
    let (port_news, node_port_news) = channel::unbounded_channel();
    let mut witness =
        Witness { health: health.clone(), families, started, sysctls, posts: posts.clone(), node_ports: port_news };
    let (ended, end) = oneshot::channel();
    let node_name = policy.node_name.clone();
    thread::Builder::new()
        .name("reconciler".to_owned())
        .spawn(move || {
            let mut reconciler = Reconciler::new(kernel, policy);
            let failed = reconciler::run::run(&mut reconciler, &inbox, periods, once, &mut witness);
            // Nobody is left to hear it where the process is already stopping.
            let _ = ended.send((failed, reconciler.is_incomplete()));
        })
        .context("cannot start a thread")?;

    let counted = Counted::default();
    let (failed, hard_failure) = channel::channel(1);
    if !once {
        let complaints = posts.clone();
        runtime.spawn(node_ports::run(node_port_news, health.clone(), move |service, problem| {
            warn!(%service, "{problem}");
            complaints.post(events::health_check_port(service, problem));
        }));
        let debug = settings.profiling.then_some(verbosity);
        let shown = shown(&runtime, handle, &health, &configuration, debug, &counted, &posts)?;
        let wanted = [
            (settings.healthz, http::health::handler(health.clone()), "FailedToStartProxierHealthcheck"),
            (settings.metrics, http::metrics::handler(shown), "FailedToStartMetricServer"),
        ];
        let (posts, failed) = (posts.clone(), settings.bind_hard_fail.then_some(&failed));
        http::own::listen_on(&runtime, wanted, failed, move |event| posts.post(event));
    }

    let sink = move |message| match message {
        Message::Change(change) => {
            let now = Instant::now();
            take_note(&change, now, &health, families);
            match inputs.send(Input::Change(change, now)) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        }
        // Said in the log by the source.
        Message::Report(_) => ControlFlow::Continue(()),
    };
    let all_nodes = settings.watch_all_nodes;
    let credentials = origin.clone();
    let follow = async move {
        let source = source(origin, &node_name, all_nodes, serving, &posts, &counted).await?;
        source.run(sink).await.map_err(anyhow::Error::from)
    };
    let restart = async {
        tokio::select! {
            () = configuration_changed(&flags, &configuration) => {}
            () = credentials_changed(credentials) => {}
        }
    };
    let result = runtime.block_on(ended_by(end, mode, follow, restart, hard_failure));
    // Not to wait for a source that is in the middle of something.
    runtime.shutdown_background();
    result
}

/// What ends the agent, whichever comes first.
async fn ended_by(
    reconciler: oneshot::Receiver<(Vec<Failure>, bool)>,
    mode: Mode,
    source: impl Future<Output = Result<()>> + Send + 'static,
    restart: impl Future<Output = ()>,
    mut hard_failure: channel::Receiver<anyhow::Error>,
) -> Result<End> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let source = tokio::spawn(source);
    let hard_failure = async {
        match hard_failure.recv().await {
            Some(error) => error,
            // Nobody is left who could fail so.
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        // Once the reconciler has ended, the source ends too: that is the effect, not the cause.
        biased;
        result = reconciler => match result {
            Ok((failed, is_incomplete)) => synced_once(mode, &failed, is_incomplete),
            Err(_) => Err(anyhow!("the reconciler stopped unexpectedly; the kernel stays as it is")),
        },
        _ = terminate.recv() => Ok(stopped("SIGTERM")),
        _ = interrupt.recv() => Ok(stopped("SIGINT")),
        () = restart => Ok(End::Restart),
        error = hard_failure => Err(error),
        result = source => {
            result.context("the source of Services stopped unexpectedly; the kernel stays as it is")??;
            Err(anyhow!("the source of Services ended; the kernel stays as it is"))
        }
    }
}

fn synced_once(mode: Mode, failed: &[Failure], is_incomplete: bool) -> Result<End> {
    let is_of_one_service = |failure: &Failure| !failure.key.is_node_wide();
    if mode == Mode::Takeover && !failed.is_empty() && failed.iter().all(is_of_one_service) {
        warn!("the kernel refused {} operations, of some Services: see above; the others are in place", failed.len());
    } else if !failed.is_empty() {
        return Err(anyhow!("the kernel refused {} operations", failed.len()));
    }
    if is_incomplete {
        return Err(anyhow!("not everything could be understood: see above; the rest is in the kernel"));
    }
    Ok(End::Done)
}

fn stopped(signal: &str) -> End {
    info!("{signal}: stopping; virtual servers and addresses stay as they are, and so does their traffic");
    End::Stopped
}

/// Waits until the file says something else that makes sense. What makes none is told, and the agent goes on as it is: to
/// stop would leave the node without one.
async fn configuration_changed(flags: &Flags, configuration: &Configuration) {
    let Some(path) = &flags.config else { return std::future::pending().await };
    let mut file = Files::new(vec![path.clone()]);
    // It may have changed since it was read for the start, too.
    loop {
        match flags.effective() {
            Ok(read) if read.configuration == *configuration => {}
            // A start that failed would leave the node without an agent. This does what a start does to the kernel.
            Ok(mut read) => {
                let prepared = tokio::task::spawn_blocking(move || prepare(&mut read.settings).map(drop)).await;
                match prepared.context("stopped unexpectedly").flatten() {
                    Ok(()) => {
                        info!(file = %path.display(), "the configuration has changed: starting anew with it");
                        return;
                    }
                    Err(problem) => error!(
                        "the configuration file has changed and the kernel cannot be made ready for it, so that of the \
                         start stays: {}; where an init container has more rights than the agent, delete the pod",
                        in_one_line(&problem)
                    ),
                }
            }
            Err(problems) => {
                error!("the configuration file has changed and cannot be used, so that of the start stays: {problems}");
            }
        }
        file.changed().await;
    }
}

/// Waits until what leads to the API server has changed and still does, as far as can be told without asking. (kube-proxy
/// goes on with what it read at its start, until somebody restarts it.)
async fn credentials_changed(origin: Origin) {
    let Origin::ApiServer(connection) = origin else { return std::future::pending().await };
    let mut files = Files::new(connection.files());
    loop {
        files.changed().await;
        match ApiServer::connect(&connection, "").await {
            Ok(_) => {
                info!("the kubeconfig or a certificate of the API server has changed: starting anew with it");
                return;
            }
            Err(error) => {
                error!("what leads to the API server has changed and cannot be used, so the old stays: {error}");
            }
        }
    }
}

/// Posts Events, once there is an API server to post them to.
#[derive(Clone, Default)]
struct Posts(Arc<OnceLock<EventRecorder>>);

impl Posts {
    fn post(&self, event: service_watch::Event) {
        if let Some(events) = self.0.get() {
            events.publish(event);
        }
    }

    fn dropped(&self) -> u64 {
        self.0.get().map_or(0, EventRecorder::dropped)
    }
}

/// What the source counts, once there is one, and how many kinds of objects it lists at its start.
#[derive(Clone, Default)]
struct Counted(Arc<OnceLock<(Arc<Counters>, u64)>>);

/// Tells everybody who wants to know what the reconciler did.
struct Witness {
    health: Arc<Health>,
    families: Families,
    started: SystemTime,
    sysctls: sysctl::Watch,
    posts: Posts,
    node_ports: channel::UnboundedSender<node_ports::News>,
}

impl Observer for Witness {
    fn synced(&mut self, report: &SyncReport, since: Instant, received: &ReceivedChanges) {
        self.health.synced(since, &report.unrepaired, SystemTime::now());
        metrics::synced(report, received, self.families, self.started);
        for event in events::of(report) {
            self.posts.post(event);
        }
        // The first audit comes right after they were set.
        if report.is_audit && !report.is_first_audit {
            for problem in self.sysctls.look() {
                self.posts.post(events::setting(problem));
            }
            metrics::wrong_settings(self.sysctls.wrong());
        }
        for news in &report.health_checks {
            // Nobody listens where the agent syncs once.
            let _ = self.node_ports.send(news.clone());
        }
    }

    fn read_failed(&mut self, _: &KernelError) {
        self.health.unreadable(Instant::now());
        metrics::unreadable();
    }
}

/// What is to be known of a change before it is dealt with.
fn take_note(change: &Change, now: Instant, health: &Health, families: Families) {
    match change {
        Change::Node(node) => health.node(!node.is_being_removed),
        Change::NodeDeleted => health.node(false),
        _ => {}
    }
    health.change_heard(now);
    metrics::change_heard(change, families);
}

/// What the metrics port shows.
fn shown(
    runtime: &Runtime,
    handle: PrometheusHandle,
    health: &Arc<Health>,
    configuration: &Configuration,
    debug: Option<Verbosity>,
    counted: &Counted,
    posts: &Posts,
) -> Result<http::metrics::Shown> {
    let upkeep = handle.clone();
    runtime.spawn(async move {
        loop {
            tokio::time::sleep(UPKEEP).await;
            upkeep.run_upkeep();
        }
    });
    let (counted, posts) = (counted.clone(), posts.clone());
    Ok(http::metrics::Shown {
        health: health.clone(),
        metrics: Box::new(move || {
            let source = counted.0.get().map(|(counters, kinds)| (counters.as_ref(), *kinds));
            metrics::collect(source, posts.dropped());
            handle.run_upkeep();
            handle.render()
        }),
        configuration: serde_json::to_value(configuration).context("cannot show the configuration")?,
        debug,
    })
}

async fn source(
    origin: Origin,
    node_name: &str,
    all_nodes: bool,
    serving: Option<ExistingState>,
    posts: &Posts,
    counted: &Counted,
) -> Result<Source> {
    let (source, kinds) = match origin {
        Origin::Manifests(directory) => {
            info!(directory = %directory.display(), "taking Services from manifests");
            (Source::Manifests(Manifests::new(directory, node_name)), 1)
        }
        Origin::ApiServer(connection) => {
            let mut server = ApiServer::connect(&connection, node_name).await?.watch_all_nodes(all_nodes);
            if let Some(serving) = serving {
                server = server.confirm_disappearance(serving);
            }
            info!(server = server.server(), "taking Services from an API server");
            posts.0.get_or_init(|| server.event_recorder()).publish(events::starting());
            (Source::ApiServer(server), 3)
        }
    };
    counted.0.get_or_init(|| (source.counters(), kinds));
    Ok(source)
}

/// Tells the reconciler when the addresses of the node's interfaces change.
fn watch_interfaces(inputs: Sender<Input>) -> Result<()> {
    let mut watch = InterfaceWatch::open().context("cannot watch the node's interfaces")?;
    let follow = move || {
        loop {
            let changed = watch.wait().unwrap_or_else(|error| {
                warn!("cannot watch the node's interfaces, will try again: {error}");
                thread::sleep(Duration::from_secs(1));
                // What was missed is read.
                InterfaceChanges { addresses: true, device_lost: false }
            });
            let news = [(changed.addresses, Input::InterfacesChanged), (changed.device_lost, Input::DeviceLost)];
            for (_, input) in news.into_iter().filter(|(is_news, _)| *is_news) {
                if inputs.send(input).is_err() {
                    return;
                }
            }
        }
    };
    thread::Builder::new().name("interfaces".to_owned()).spawn(follow).context("cannot start a thread")?;
    Ok(())
}
