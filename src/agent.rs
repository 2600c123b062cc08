//! The parts wired together: a source of Services, the node's addresses, and the reconciler on its own thread.

use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use ipvs_netlink::Timeouts;
use reconciler::interface_watch::{Changed, InterfaceWatch};
use reconciler::outcome::Outcome;
use reconciler::run::{Input, Periods};
use reconciler::{Policy, Reconciler};
use service_watch::{ApiServer, Connection, Event, EventKind, EventSubject, Events, Manifests, Message, Source};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tracing::{debug, info, warn};

use crate::flags::{Flags, Origin};
use crate::{preflight, sysctl};

/// Runs until a signal, or with `--once` until the first sync has ended.
pub(crate) fn run(flags: &Flags) -> Result<ExitCode> {
    // Checked when they were parsed.
    let policy = Policy {
        scheduler: flags.ipvs_scheduler,
        exclude: flags.excluded().map_err(anyhow::Error::msg)?,
        node_port_addresses: flags.node_port_addresses().map_err(anyhow::Error::msg)?,
        bind_address: flags.bind_address(),
        external_ips: flags.allows_external_ips(),
        families: preflight::families(),
        masquerade_all: flags.masquerade_all,
        masquerade_bit: flags.iptables_masquerade_bit,
        detect_local: flags.detect_local().map_err(anyhow::Error::msg)?,
        drain_timeout: flags.drain_timeout(),
        ..Policy::new(flags.node_name())
    };
    info!(version = env!("CARGO_PKG_VERSION"), node = policy.node_name, scheduler = %policy.scheduler, "starting");
    tell_without_effect(flags);

    let mut kernel = preflight::kernel(&policy)?;
    // Only now: settings of IPVS exist once the kernel has loaded it.
    sysctl::set(flags.ipvs_strict_arp, &flags.conntrack)?;
    preflight::set_timeouts(
        kernel.ipvs(),
        Timeouts {
            tcp: whole_seconds(flags.ipvs_tcp_timeout),
            tcp_fin: whole_seconds(flags.ipvs_tcpfin_timeout),
            udp: whole_seconds(flags.ipvs_udp_timeout),
        },
    );

    let (inputs, inbox) = mpsc::channel();
    watch_interfaces(inputs.clone())?;
    let node_name = policy.node_name.clone();
    let once = flags.once;
    let periods = Periods { min: flags.ipvs_min_sync_period, audit: flags.ipvs_sync_period };
    // For whoever has something to tell an API server. Filled, if there is one, before the source says anything.
    let events: Arc<OnceLock<Events>> = Arc::default();
    let for_reports = events.clone();
    let report = move |outcome: &Outcome| publish(outcome, &for_reports);
    let (ended, end) = oneshot::channel();
    thread::Builder::new()
        .name("reconciler".to_owned())
        .spawn(move || {
            let mut reconciler = Reconciler::new(kernel, policy);
            let failed = reconciler::run::run(&mut reconciler, &inbox, periods, once, report);
            // Nobody is left to hear it where the process is already stopping.
            let _ = ended.send((failed, reconciler.is_incomplete()));
        })
        .context("cannot start a thread")?;

    // One thread for the source, and this one for signals: a kubeconfig may name a program for credentials, which blocks.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("cannot start tokio")?;
    let sink = move |message| match message {
        Message::Change(change) => match inputs.send(Input::Change(change)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        },
        // Said in the log by the source.
        Message::Report(_) => ControlFlow::Continue(()),
    };
    let (origin, all_nodes) = (flags.origin(), flags.watch_all_nodes);
    let follow = async move {
        let source = source(origin, &node_name, all_nodes, &events).await?;
        source.run(sink).await.map_err(anyhow::Error::from)
    };
    let result = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
        let follow = tokio::spawn(follow);
        tokio::select! {
            // Once the reconciler has ended, the source ends too: that is the effect, not the cause.
            biased;
            result = end => match result {
                Ok((0, false)) => Ok(ExitCode::SUCCESS),
                Ok((0, true)) => Err(anyhow!("not everything could be understood: see above; the rest is in the kernel")),
                Ok((failed, _)) => Err(anyhow!("the kernel refused {failed} operations")),
                Err(_) => Err(anyhow!("the reconciler stopped unexpectedly; the kernel stays as it is")),
            },
            _ = terminate.recv() => Ok(stopped("SIGTERM")),
            _ = interrupt.recv() => Ok(stopped("SIGINT")),
            result = follow => {
                result.context("the source of Services stopped unexpectedly; the kernel stays as it is")??;
                Err(anyhow!("the source of Services ended; the kernel stays as it is"))
            }
        }
    });
    // Not to wait for a source that is in the middle of something.
    runtime.shutdown_background();
    result
}

fn stopped(signal: &str) -> ExitCode {
    info!("{signal}: stopping; virtual servers and addresses stay as they are, and so does their traffic");
    ExitCode::SUCCESS
}

/// Tells the API server, where there is one, what the owners of Services should know.
fn publish(outcome: &Outcome, events: &OnceLock<Events>) {
    let Some(events) = events.get() else { return };
    for (service, vip) in &outcome.refused {
        events.publish(Event {
            subject: EventSubject::Service(service.clone()),
            kind: EventKind::Warning,
            reason: "AddressIsANodes".to_owned(),
            action: "RefuseAddress".to_owned(),
            note: format!("{vip} is the address of a Node and is not served: it would cut nodes off from that Node"),
        });
    }
}

async fn source(origin: Origin, node_name: &str, all_nodes: bool, events: &OnceLock<Events>) -> Result<Source> {
    Ok(match origin {
        Origin::Manifests(directory) => {
            info!(directory = %directory.display(), "taking Services from manifests");
            Source::Manifests(Manifests::new(directory, node_name))
        }
        Origin::ApiServer { kubeconfig, master } => {
            let user_agent = Some(concat!("kube-ipvs/", env!("CARGO_PKG_VERSION")).to_owned());
            let connection = Connection { kubeconfig, master, user_agent };
            let server = ApiServer::connect(&connection, node_name).await?.watch_all_nodes(all_nodes);
            info!(server = server.server(), "taking Services from an API server");
            let events = events.get_or_init(|| server.events());
            events.publish(Event {
                subject: EventSubject::Node,
                kind: EventKind::Normal,
                reason: "Starting".to_owned(),
                action: "StartKubeIpvs".to_owned(),
                note: concat!("kube-ipvs ", env!("CARGO_PKG_VERSION")).to_owned(),
            });
            Source::ApiServer(server)
        }
    })
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
                Changed { addresses: true, device_lost: false }
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

fn tell_without_effect(flags: &Flags) {
    let names = &flags.without_effect;
    if !names.is_empty() {
        info!("flags of kube-proxy without effect here: {}", names.join(" "));
    }
    let gates = flags.ignored_gates();
    if !gates.is_empty() {
        debug!("feature gates without a meaning here: {}", gates.join(" "));
    }
}

/// IPVS counts whole seconds; fractions are cut off, as kube-proxy does.
fn whole_seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}
