//! The task that reads Services, EndpointSlices and Nodes from an API server or from a directory of manifests.

use std::net::IpAddr;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use anyhow::Result;
use reconciler::policy::Families;
use service_watch::{ApiServer, Change, Connection, Counters, ExistingState, Manifests, Message, Source};
use tracing::info;

use crate::config::Settings;
use crate::events::{self, EventPublisher};
use crate::flags::Flags;
use crate::health::Health;
use crate::host::ServiceNeeds;
use crate::metrics;

/// Where Services come from.
#[derive(Clone)]
pub(super) enum SourceLocation {
    Manifests(PathBuf),
    ApiServer(Connection),
}

/// The location that the flags and the configuration name.
pub(super) fn location(flags: &Flags, settings: &Settings) -> SourceLocation {
    match &flags.manifests {
        Some(directory) => SourceLocation::Manifests(directory.clone()),
        None => SourceLocation::ApiServer(Connection {
            kubeconfig: settings.kubeconfig.clone(),
            master: flags.master.clone(),
            user_agent: Some(concat!("kube-ipvs/", env!("CARGO_PKG_VERSION")).to_owned()),
        }),
    }
}

impl SourceLocation {
    /// The address of the API server, if it is given as one.
    pub(super) fn server_address(&self) -> Option<IpAddr> {
        match self {
            Self::Manifests(_) => None,
            Self::ApiServer(connection) => connection.server_address(),
        }
    }
}

/// The counters of the source, once it is connected, and how many kinds of objects it lists at its start.
#[derive(Clone, Default)]
pub(super) struct SourceCounters(Arc<OnceLock<(Arc<Counters>, u64)>>);

impl SourceCounters {
    pub(super) fn get(&self) -> Option<(&Counters, u64)> {
        self.0.get().map(|(counters, kinds)| (counters.as_ref(), *kinds))
    }
}

/// Everything that the task needs.
pub(super) struct SourceTask {
    pub(super) location: SourceLocation,
    pub(super) node_name: String,
    pub(super) watch_all_nodes: bool,
    /// The VIPs that the node serves at the start; `None` if the disappearance of objects is not to be confirmed.
    pub(super) served_vips: Option<ExistingState>,
    pub(super) events: EventPublisher,
    pub(super) counters: SourceCounters,
}

impl SourceTask {
    /// Connects, then passes every message to `sink` until that breaks.
    pub(super) async fn run(self, sink: impl FnMut(Message) -> ControlFlow<()> + Send) -> Result<()> {
        let source = self.connect().await?;
        source.run(sink).await.map_err(anyhow::Error::from)
    }

    async fn connect(self) -> Result<Source> {
        let (source, kinds) = match self.location {
            SourceLocation::Manifests(directory) => {
                info!(directory = %directory.display(), "taking Services from manifests");
                (Source::Manifests(Manifests::new(directory, self.node_name.as_str())), 1)
            }
            SourceLocation::ApiServer(connection) => {
                let mut server = ApiServer::connect(&connection, self.node_name.as_str())
                    .await?
                    .watch_all_nodes(self.watch_all_nodes);
                if let Some(served_vips) = self.served_vips {
                    server = server.confirm_disappearance(served_vips);
                }
                info!(server = server.server(), "taking Services from an API server");
                self.events.connect(server.event_recorder());
                self.events.publish(events::starting());
                (Source::ApiServer(server), 3)
            }
        };
        self.counters.0.get_or_init(|| (source.counters(), kinds));
        Ok(source)
    }
}

/// Updates health and metrics for a change, before the reconciler receives it.
pub(super) fn record_change(
    change: &Change,
    now: Instant,
    health: &Health,
    families: Families,
    needs: &Mutex<ServiceNeeds>,
) {
    match change {
        Change::Service(_) | Change::ServiceDeleted(_) => {
            let mut needs = needs.lock().unwrap_or_else(PoisonError::into_inner);
            needs.apply(change);
            metrics::set_services_with_external_ips(needs.with_external_ips());
        }
        Change::Node(node) => health.set_node_eligible(!node.is_being_removed),
        Change::NodeDeleted => health.set_node_eligible(false),
        _ => {}
    }
    health.change_received(now);
    metrics::change_received(change, families);
}
