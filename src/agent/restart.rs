//! When the agent restarts: the configuration file, the kubeconfig or a certificate has changed, and the new content is
//! usable. If it is not, that is logged and the agent continues as it is: exiting would leave the node without an
//! agent.

use anyhow::Context as _;
use service_watch::ApiServer;
use service_watch::panics::caught;
use tracing::{error, info};

use super::prepare;
use super::source::SourceLocation;
use crate::config::Configuration;
use crate::config::file_watcher::FileWatcher;
use crate::flags::Flags;
use crate::logging::error_chain;

/// Waits until the configuration file has another, valid content.
pub(super) async fn configuration_changed(flags: &Flags, configuration: &Configuration) {
    let Some(path) = &flags.config else { return std::future::pending().await };
    let mut watcher = FileWatcher::new(vec![path.clone()]);
    // The first comparison is made at once, because the file may have changed since the start.
    loop {
        let effective = caught(|| flags.effective()).map_err(|panic| panic.to_string());
        match effective.and_then(|effective| effective.map_err(|error| error.to_string())) {
            Ok(read) if read.configuration == *configuration => {}
            // Prepares the kernel as the start does, to restart only if that will succeed.
            Ok(mut read) => {
                let prepared = tokio::task::spawn_blocking(move || prepare(&mut read.settings).map(drop)).await;
                match prepared.context("stopped unexpectedly").flatten() {
                    Ok(()) => {
                        info!(file = %path.display(), "the configuration has changed: restarting with it");
                        return;
                    }
                    Err(problem) => error!(
                        "the configuration file has changed, and the kernel cannot be prepared for it; the agent continues with \
                         the old configuration: {}; if an init container has more privileges than the agent, delete the pod",
                        error_chain(&problem)
                    ),
                }
            }
            Err(problems) => error!(
                "the configuration file has changed and is invalid; the agent continues with the old configuration: {problems}"
            ),
        }
        watcher.changed().await;
    }
}

/// Waits until the kubeconfig or a file that it names has changed, and still gives a client. (kube-proxy continues with
/// what it read at its start.)
pub(super) async fn credentials_changed(location: SourceLocation) {
    let SourceLocation::ApiServer(connection) = location else { return std::future::pending().await };
    let mut watcher = FileWatcher::new(connection.files());
    loop {
        watcher.changed().await;
        match ApiServer::check(&connection).await {
            Ok(()) => {
                info!("the kubeconfig or a certificate of the API server has changed: restarting with it");
                return;
            }
            Err(error) => error!(
                "the kubeconfig or a certificate of the API server has changed and is unusable; the agent continues with the old \
                 ones: {error}"
            ),
        }
    }
}
