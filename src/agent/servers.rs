//! Starts the HTTP servers: the health port, the metrics port and health-check node ports.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::{Sender, UnboundedReceiver};
use tracing::warn;

use super::source::SourceCounters;
use crate::config::{Configuration, Settings};
use crate::events::{self, EventPublisher};
use crate::health::Health;
use crate::http::health_check_node_ports::{self, PortUpdate};
use crate::http::metrics_port::MetricsPages;
use crate::http::{agent_ports, health_port, metrics_port};
use crate::logging::VerbosityHandle;
use crate::metrics;
use crate::panics::Supervisor;

/// How often recorded values are put into their histograms. The exporter keeps every single value until then.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// What the servers need.
pub(super) struct Servers<'a> {
    pub(super) runtime: &'a Runtime,
    pub(super) supervisor: &'a Supervisor,
    pub(super) health: &'a Arc<Health>,
    pub(super) events: &'a EventPublisher,
    pub(super) counters: &'a SourceCounters,
    pub(super) metrics: PrometheusHandle,
    /// `None` disables `/debug`.
    pub(super) debug: Option<VerbosityHandle>,
    /// Receives the error if the agent is to exit because it cannot listen on a port.
    pub(super) hard_failure: Option<&'a Sender<anyhow::Error>>,
}

impl Servers<'_> {
    /// Starts all servers as tasks of the runtime.
    pub(super) fn start(
        self,
        settings: &Settings,
        configuration: &Configuration,
        health_checks: UnboundedReceiver<PortUpdate>,
    ) -> Result<()> {
        let events = self.events.clone();
        let ports = health_check_node_ports::run(health_checks, self.health.clone(), move |service, problem| {
            warn!(%service, "{problem}");
            events.publish(events::health_check_port_failed(service, problem));
        });
        self.supervisor.spawn(self.runtime, "the task of health-check node ports", ports);
        let (events, hard_failure) = (self.events.clone(), self.hard_failure);
        let (runtime, supervisor, health) = (self.runtime, self.supervisor, self.health.clone());
        let ports = [
            (settings.healthz, health_port::handler(health), "FailedToStartProxierHealthcheck"),
            (settings.metrics, metrics_port::handler(self.metrics_pages(configuration)?), "FailedToStartMetricServer"),
        ];
        agent_ports::listen_on(runtime, supervisor, ports, hard_failure, move |event| events.publish(event));
        Ok(())
    }

    fn metrics_pages(self, configuration: &Configuration) -> Result<MetricsPages> {
        let upkeep = self.metrics.clone();
        self.supervisor.spawn(self.runtime, "the task of metrics", async move {
            loop {
                tokio::time::sleep(UPKEEP_INTERVAL).await;
                upkeep.run_upkeep();
            }
        });
        let (counters, events) = (self.counters.clone(), self.events.clone());
        Ok(MetricsPages {
            health: self.health.clone(),
            render_metrics: Box::new(move || {
                metrics::collect(counters.get(), events.dropped());
                self.metrics.run_upkeep();
                self.metrics.render()
            }),
            configuration: serde_json::to_value(configuration).context("cannot show the configuration")?,
            debug: self.debug,
        })
    }
}
