//! Waits for whatever ends the agent: a signal, the end of the single sync, a changed configuration, or a failure. After
//! an internal error the agent executes itself again.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use reconciler::report::Failure;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tracing::{error, info, warn};

use super::reconciler_thread::SyncResult;
use crate::mode::{ExitReason, RunMode};

/// An agent that has run for less than this pauses before it executes itself after an internal error, so that one which
/// recurs at each start does not busy the node.
const SHORT_RUN: Duration = Duration::from_secs(60);
/// How long it pauses then. What is in the kernel stays and serves.
const PAUSE: Duration = Duration::from_secs(10);

/// What may go wrong while the agent runs.
pub(super) struct Failures {
    /// Errors that end the agent.
    pub(super) fatal: mpsc::Receiver<anyhow::Error>,
    /// The names of tasks and threads that have ended by a panic.
    pub(super) defects: mpsc::UnboundedReceiver<&'static str>,
    /// When the agent was started.
    pub(super) started: Instant,
}

/// Runs the source, and waits for the first event that ends the agent.
pub(super) async fn wait(
    reconciler: oneshot::Receiver<SyncResult>,
    mode: RunMode,
    source: impl Future<Output = Result<()>> + Send + 'static,
    restart: impl Future<Output = ()>,
    failures: Failures,
) -> Result<ExitReason> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let source = tokio::spawn(source);
    let Failures { mut fatal, mut defects, started } = failures;
    let fatal = async {
        match fatal.recv().await {
            Some(error) => error,
            // All senders are gone: this cannot happen any more.
            None => std::future::pending().await,
        }
    };
    let defect = tokio::select! {
        // The reconciler comes first, because the source ends as a consequence when the reconciler has ended.
        biased;
        result = reconciler => match result {
            Ok(result) => return single_sync_result(mode, &result),
            Err(_) => "the reconciler",
        },
        _ = terminate.recv() => return Ok(stopped("SIGTERM")),
        _ = interrupt.recv() => return Ok(stopped("SIGINT")),
        () = restart => return Ok(ExitReason::Restart),
        error = fatal => return Err(error),
        Some(name) = defects.recv() => name,
        result = source => match result {
            Ok(Ok(())) => return Err(anyhow!("the source of Services ended; the kernel stays as it is")),
            Ok(Err(error)) if matches!(error.downcast_ref(), Some(service_watch::Error::ClientGone { .. })) => {
                error!("{error}");
                "the client of the API server"
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => "the source of Services",
        }
    };
    if mode.is_one_shot() {
        return Err(anyhow!("{defect} stopped by an internal error: see above; the kernel stays as it is"));
    }
    let pause = if started.elapsed() < SHORT_RUN { PAUSE } else { Duration::ZERO };
    error!(
        "{defect} stopped by an internal error: see above; the agent executes itself again in {} s, and the kernel stays as it is",
        pause.as_secs()
    );
    tokio::select! {
        () = tokio::time::sleep(pause) => Ok(ExitReason::Restart),
        _ = terminate.recv() => Ok(stopped("SIGTERM")),
        _ = interrupt.recv() => Ok(stopped("SIGINT")),
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
