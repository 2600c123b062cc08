//! Opens the agent's health port and metrics port, and retries while another program has one: kube-proxy, for example,
//! while it is being replaced.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::anyhow;
use service_watch::Event;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::Sender;
use tracing::{debug, error, warn};

use super::connections::{ConnectionLimit, serve};
use super::{Handler, ListenFamilies, listen};
use crate::events;
use crate::panics::Supervisor;

/// How many connections one port has at a time: some 4 KiB each, for a second, if its client says nothing.
const MAX_CONNECTIONS: usize = 4096;
/// The interval of attempts to listen on a port.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Opens the agent's ports. If that fails it is tried again, or reported once to `hard_failure` if that is given.
pub(crate) fn listen_on(
    runtime: &Runtime,
    supervisor: &Supervisor,
    ports: [(Option<SocketAddr>, Handler, &'static str); 2],
    hard_failure: Option<&Sender<anyhow::Error>>,
    post_event: impl Fn(Event) + Clone + Send + 'static,
) {
    for (address, handler, reason) in ports {
        let Some(address) = address else { continue };
        let (hard_failure, post_event) = (hard_failure.cloned(), post_event.clone());
        supervisor.spawn(runtime, "the task of the health or metrics port", async move {
            let mut is_logged = false;
            let listener = loop {
                let problem = match listen(address, ListenFamilies::Both) {
                    Ok(listener) => break listener,
                    Err(error) => format!(
                        "cannot listen on {address}: {error}; another program uses it, perhaps kube-proxy: stop that, or choose \
                         another address (--healthz-bind-address, --metrics-bind-address)"
                    ),
                };
                post_event(events::agent_port_failed(reason, problem.clone()));
                if let Some(hard_failure) = hard_failure {
                    // Gives the Event time to be sent.
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    // Fails if the other port was reported first, and the agent is already exiting.
                    let _ = hard_failure.send(anyhow!(problem)).await;
                    return;
                }
                if !std::mem::replace(&mut is_logged, true) {
                    warn!("{problem}; trying again");
                }
                tokio::time::sleep(RETRY_INTERVAL).await;
            };
            debug!(%address, "listening");
            let error = serve(listener, ConnectionLimit::new(MAX_CONNECTIONS), handler).await;
            error!(%address, "stopped serving: {error}");
        });
    }
}
