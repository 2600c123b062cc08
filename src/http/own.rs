//! The agent's own two ports, which may be taken by another: by kube-proxy, while it is being replaced.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::anyhow;
use service_watch::Event;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::Sender;
use tracing::{debug, error, warn};

use super::{Connections, Handler, Reach, listen, serve};
use crate::events;

/// How many connections a port serves at a time.
const CONNECTIONS: usize = 64;
/// How soon a port that could not be listened on is tried again, as often as it takes.
const LISTEN_AGAIN: Duration = Duration::from_secs(5);

/// Opens the agent's own ports. One that cannot be had is tried again, unless there is somebody to tell of a hard
/// failure.
pub(crate) fn listen_on(
    runtime: &Runtime,
    wanted: [(Option<SocketAddr>, Handler, &'static str); 2],
    hard_failure: Option<&Sender<anyhow::Error>>,
    post: impl Fn(Event) + Clone + Send + 'static,
) {
    for (address, handler, reason) in wanted {
        let Some(address) = address else { continue };
        let (hard_failure, post) = (hard_failure.cloned(), post.clone());
        runtime.spawn(async move {
            let mut is_told = false;
            let listener = loop {
                let problem = match listen(address, Reach::Both) {
                    Ok(listener) => break listener,
                    Err(error) => format!(
                        "cannot listen on {address}: {error}; another program has it, kube-proxy perhaps: end that, or choose \
                         another address (--healthz-bind-address, --metrics-bind-address)"
                    ),
                };
                post(events::own_port(reason, problem.clone()));
                if let Some(hard_failure) = hard_failure {
                    // With time for the Event to go out.
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    // Nobody listens any more where the other port failed before.
                    let _ = hard_failure.send(anyhow!(problem)).await;
                    return;
                }
                if !std::mem::replace(&mut is_told, true) {
                    warn!("{problem}; trying again");
                }
                tokio::time::sleep(LISTEN_AGAIN).await;
            };
            debug!(%address, "listening");
            let problem = serve(listener, Connections::new(CONNECTIONS), handler).await;
            error!(%address, "cannot answer: {problem}");
        });
    }
}
