//! Waits for whatever ends the agent: a signal, the end of the single sync, a changed configuration, or a failure.

use anyhow::{Context, Result, anyhow};
use reconciler::report::Failure;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use super::reconciler_thread::SyncResult;
use crate::mode::{ExitReason, RunMode};

/// Runs the source, and waits for the first event that ends the agent.
pub(super) async fn wait(
    reconciler: oneshot::Receiver<SyncResult>,
    mode: RunMode,
    source: impl Future<Output = Result<()>> + Send + 'static,
    restart: impl Future<Output = ()>,
    mut fatal: mpsc::Receiver<anyhow::Error>,
) -> Result<ExitReason> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let source = tokio::spawn(source);
    let fatal = async {
        match fatal.recv().await {
            Some(error) => error,
            // All senders are gone: this cannot happen any more.
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        // The reconciler comes first, because the source ends as a consequence when the reconciler has ended.
        biased;
        result = reconciler => match result {
            Ok(result) => single_sync_result(mode, &result),
            Err(_) => Err(anyhow!("the reconciler stopped unexpectedly; the kernel stays as it is")),
        },
        _ = terminate.recv() => Ok(stopped("SIGTERM")),
        _ = interrupt.recv() => Ok(stopped("SIGINT")),
        () = restart => Ok(ExitReason::Restart),
        error = fatal => Err(error),
        result = source => {
            result.context("the source of Services stopped unexpectedly; the kernel stays as it is")??;
            Err(anyhow!("the source of Services ended; the kernel stays as it is"))
        }
    }
}

/// The result of a one-shot mode.
fn single_sync_result(mode: RunMode, result: &SyncResult) -> Result<ExitReason> {
    let SyncResult { failures, is_incomplete } = result;
    let concerns_one_service = |failure: &Failure| !failure.key.is_node_wide();
    if mode == RunMode::Takeover && !failures.is_empty() && failures.iter().all(concerns_one_service) {
        warn!("the kernel refused {} operations for single Services: see above; all others are done", failures.len());
    } else if !failures.is_empty() {
        return Err(anyhow!("the kernel refused {} operations", failures.len()));
    }
    if *is_incomplete {
        return Err(anyhow!("not everything could be parsed: see above; the rest is in the kernel"));
    }
    Ok(ExitReason::Completed)
}

fn stopped(signal: &str) -> ExitReason {
    info!("{signal}: stopping; virtual servers and addresses stay as they are, and so does their traffic");
    ExitReason::Stopped
}
