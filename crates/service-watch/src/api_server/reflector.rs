//! Lists and watches one kind of object without end, like client-go's reflector.
//!
//! [`watcher()`] of `kube` lists, watches, and resumes a watch that ended. This module decides whether it may resume or must list again
//! (`can_resume`), and handles servers without streaming lists, idle timeouts, and the backoff between attempts.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::stream::{BoxStream, StreamExt as _};
use kube::runtime::watcher::{self, Config, DefaultBackoff, Event, InitialListStrategy, watcher};
use kube::{Api, Resource};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use super::limits::{RequestTimeout, ResponseTooLarge};
use super::mass_deletion::CONFIRMATION_DELAY;
use crate::convert::Object;
use crate::error::chain;
use crate::lenient::Truncated;
use crate::panics::{Panic, point};

/// The `timeoutSeconds` of a watch. `watcher` ends a silent watch 5 seconds after that.
const WATCH_TIMEOUT: Duration = Duration::from_secs(50);
/// The timeout between two events while a list is being read.
const LIST_IDLE_TIMEOUT: Duration = Duration::from_secs(55);

/// The page size after a page of the usual size was too large.
const SMALL_PAGE_SIZE: u32 = 40;

/// After an outage of this length, the objects are listed again. The server may have been replaced, or restored from a
/// backup: then its resource versions look valid but refer to another history.
const RELIST_AFTER_OUTAGE: Duration = Duration::from_secs(30);

/// A period of the connection, as it is.
#[cfg(not(feature = "fault-points"))]
pub(super) const fn period(period: Duration) -> Duration {
    period
}

/// A period of the connection, divided by what the environment says, so that tests need not wait for it.
#[cfg(feature = "fault-points")]
pub(super) fn period(period: Duration) -> Duration {
    static DIVISOR: std::sync::LazyLock<Option<u32>> =
        std::sync::LazyLock::new(|| std::env::var("API_SERVER_PERIODS_DIVIDED_BY").ok()?.parse().ok());
    DIVISOR.and_then(|divisor| period.checked_div(divisor)).unwrap_or(period)
}

/// Lists and watches one kind, and recovers from failures.
pub(super) struct Reflector<K> {
    api: Api<K>,
    server: String,
    config: Config,
    stream: Option<BoxStream<'static, watcher::Result<Event<K>>>>,
    phase: Phase,
    backoff: DefaultBackoff,
    /// The number of consecutive failures.
    failures: u32,
    /// The time of the first of them.
    failing_since: Option<Instant>,
    delay: Option<Duration>,
    responses: watch::Receiver<()>,
    /// Set when the list must be read again to confirm a mass deletion.
    relist_requested: Arc<AtomicBool>,
}

/// The phase of the current stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Starting,
    Listing,
    Watching,
}

/// An event of a [`Reflector`].
pub(super) enum ReflectorEvent<K> {
    /// An event of the watch or the list.
    Event(Event<K>),
    /// A request failed; it is retried.
    Failed(String),
    /// The client has stopped for good, because it panicked in a task of its own.
    ClientGone(String),
    /// The server responds again after a failure.
    Recovered,
}

impl<K: Object> Reflector<K> {
    pub(super) fn new(
        api: Api<K>,
        server: String,
        config: Config,
        responses: watch::Receiver<()>,
        relist_requested: Arc<AtomicBool>,
    ) -> Self {
        let watch_timeout = u32::try_from(period(WATCH_TIMEOUT).as_secs()).unwrap_or(u32::MAX);
        Self {
            api,
            server,
            config: config.timeout(watch_timeout).streaming_lists(),
            stream: None,
            phase: Phase::Starting,
            backoff: DefaultBackoff::default(),
            failures: 0,
            failing_since: None,
            delay: None,
            responses,
            relist_requested,
        }
    }

    pub(super) async fn next(&mut self) -> ReflectorEvent<K> {
        if self.relist_requested.swap(false, Ordering::Relaxed) {
            self.relist();
            self.delay = Some(CONFIRMATION_DELAY);
        }
        loop {
            if let Some(delay) = self.delay.take() {
                sleep(delay).await;
                if self.phase == Phase::Watching
                    && self.failing_since.is_some_and(|since| since.elapsed() >= period(RELIST_AFTER_OUTAGE))
                {
                    let outage = period(RELIST_AFTER_OUTAGE).as_secs();
                    debug!(kind = %K::plural(&()), "no response for {outage} s: relisting");
                    self.relist();
                }
            }
            let stream = self.stream.get_or_insert_with(|| watcher(self.api.clone(), self.config.clone()).boxed());
            let event = async {
                point("request", &K::plural(&()));
                if self.phase == Phase::Watching {
                    // `watcher` has the idle timeout of a watch, since it hides bookmarks.
                    Ok(stream.next().await)
                } else if let Some(event) = stream.next().now_or_never() {
                    // Most items of a list are available at once and need no timer.
                    Ok(event)
                } else {
                    timeout(LIST_IDLE_TIMEOUT, stream.next()).await
                }
            };
            let event = tokio::select! {
                event = AssertUnwindSafe(event).catch_unwind() => event,
                Ok(()) = self.responses.changed(), if self.failures > 0 && self.phase == Phase::Watching => {
                    self.reset_backoff();
                    return ReflectorEvent::Recovered;
                }
            };
            let step = match event {
                Ok(Ok(Some(Ok(event)))) => self.event(event),
                Ok(Ok(Some(Err(error)))) if is_client_gone(&error) => return ReflectorEvent::ClientGone(chain(&error)),
                Ok(Ok(Some(Err(error)))) => self.error(&error),
                Ok(Ok(None)) => {
                    self.relist();
                    None
                }
                // The client library, or decoding.
                Err(payload) => {
                    self.relist();
                    Some(self.failed(&Panic::from_payload(&*payload).to_string()))
                }
                Ok(Err(_)) => {
                    let silent = LIST_IDLE_TIMEOUT.as_secs();
                    let text = format!("no data received for {silent} s; check the network to the server and its load");
                    self.relist();
                    Some(self.failed(&text))
                }
            };
            if let Some(step) = step {
                return step;
            }
        }
    }

    fn event(&mut self, event: Event<K>) -> Option<ReflectorEvent<K>> {
        match event {
            Event::Init if self.phase == Phase::Listing && self.uses_streaming_lists() => {
                // The stream ended without the bookmark that ends a list: the server does not support streaming lists,
                // or needs longer than a watch lasts.
                self.fall_back_to_paging("the streaming list did not end");
                return None;
            }
            Event::Init => self.phase = Phase::Listing,
            Event::InitApply(_) => {}
            Event::InitDone => {
                self.phase = Phase::Watching;
                self.reset_backoff();
            }
            Event::Apply(_) | Event::Delete(_) => self.reset_backoff(),
        }
        Some(ReflectorEvent::Event(event))
    }

    fn error(&mut self, error: &watcher::Error) -> Option<ReflectorEvent<K>> {
        let code = status_code(error);
        let refused = matches!(code, Some(400..=499)) && !matches!(code, Some(401 | 403 | 408 | 410 | 429));
        if self.phase != Phase::Watching && self.uses_streaming_lists() && refused {
            self.fall_back_to_paging(&error.to_string());
            return None;
        }
        if !self.uses_streaming_lists() && ResponseTooLarge::caused(error) {
            // Then even objects of etcd's maximum size (1.5 MiB) fit.
            self.config.page_size = Some(SMALL_PAGE_SIZE);
        }
        // A list that failed must not delete anything, so it starts again.
        if self.phase != Phase::Watching || refused || !can_resume(error) {
            self.relist();
        }
        if code == Some(410) {
            debug!(kind = %K::plural(&()), "the resource version has expired: relisting");
            self.back_off();
            return None;
        }
        let text = describe::<K>(error, code);
        Some(self.failed(&text))
    }

    fn uses_streaming_lists(&self) -> bool {
        self.config.initial_list_strategy == InitialListStrategy::StreamingList
    }

    /// Uses paged lists from now on.
    fn fall_back_to_paging(&mut self, why: &str) {
        debug!(kind = %K::plural(&()), "streaming lists are not supported, using paged lists: {}", Truncated(why));
        self.config.initial_list_strategy = InitialListStrategy::ListWatch;
        self.relist();
    }

    /// Starts again with a list.
    fn relist(&mut self) {
        self.stream = None;
        self.phase = Phase::Starting;
    }

    fn reset_backoff(&mut self) {
        self.failures = 0;
        self.failing_since = None;
        self.backoff = DefaultBackoff::default();
    }

    fn failed(&mut self, text: &str) -> ReflectorEvent<K> {
        self.back_off();
        // Responses from before the failure do not count.
        self.responses.mark_unchanged();
        ReflectorEvent::Failed(format!(
            "{}: {text}; the last known state stays in use, and the request is retried",
            self.server
        ))
    }

    /// Sets the delay before the next attempt: short after the first failure, as most are transient, then exponential.
    fn back_off(&mut self) {
        let delay = self.backoff.next().unwrap_or(Duration::from_secs(30));
        if self.failures == 0 {
            self.delay = Some(delay / 8);
            self.backoff = DefaultBackoff::default();
        } else {
            self.delay = Some(delay);
        }
        self.failures = self.failures.saturating_add(1);
        self.failing_since.get_or_insert_with(Instant::now);
    }
}

/// The HTTP status code of an error, if it has one.
fn status_code(error: &watcher::Error) -> Option<u16> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => Some(status.code),
        _ => None,
    }
}

/// Whether the task that sends the client's requests has ended. It ends only if it panics, and answers nothing from then on.
fn is_client_gone(error: &watcher::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.is::<tower::buffer::error::Closed>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Whether `watcher` can resume without losing changes.
fn can_resume(error: &watcher::Error) -> bool {
    match error {
        // The resource version has expired or is unknown to the server: `watcher` would request the same one for ever.
        watcher::Error::WatchStartFailed(kube::Error::Api(status)) => {
            status.code != 410 && !status.message.contains("Too large resource version")
        }
        watcher::Error::WatchError(status) => status.code != 410,
        // The unreadable event may have been a change. (kube decodes any JSON object that is no event as a Status.)
        watcher::Error::WatchFailed(kube::Error::SerdeError(_) | kube::Error::Api(_))
        | watcher::Error::InitialListFailed(_)
        | watcher::Error::NoResourceVersion => false,
        watcher::Error::WatchStartFailed(_) | watcher::Error::WatchFailed(_) => true,
    }
}

/// The failure in words, and what to check.
fn describe<K: Resource<DynamicType = ()>>(error: &watcher::Error, code: Option<u16>) -> String {
    let kind = K::plural(&());
    let error: &kube::Error = match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => error,
        watcher::Error::WatchError(status) => {
            return format!("the watch of {kind} failed with status {}: {}", status.code, Truncated(&status.message));
        }
        watcher::Error::NoResourceVersion => {
            return format!(
                "the response to a request for {kind} has no metadata.resourceVersion; check that the address is an API server's"
            );
        }
    };
    match (error, code) {
        (kube::Error::Api(_), Some(0)) => not_kubernetes(&kind, "not a watch event"),
        (kube::Error::Api(status), Some(403)) => format!(
            "not allowed to list and watch {kind}: {}; give this agent's user or ServiceAccount the ClusterRole system:node-proxier",
            Truncated(&status.message)
        ),
        (kube::Error::Api(status), Some(401)) => format!(
            "the request for {kind} is not authenticated: {}; check the token or certificate in the kubeconfig or ServiceAccount",
            Truncated(&status.message)
        ),
        (kube::Error::Api(status), Some(code)) => format!(
            "the request for {kind} failed with status {code}: {}; check the API server, and that the address is an API server's",
            Truncated(&status.message)
        ),
        (kube::Error::SerdeError(error), _) => not_kubernetes(&kind, error),
        (kube::Error::Service(error), _) if error.is::<RequestTimeout>() => {
            format!("the request for {kind} failed: {error}; check the network to the server and its load")
        }
        (error, _) => format!(
            "the request for {kind} failed: {}; check the address, that the server runs, and the network to it",
            Truncated(&chain(error))
        ),
    }
}

fn not_kubernetes(kind: &str, what: impl std::fmt::Display) -> String {
    format!(
        "the response to the request for {kind} is not what an API server sends: {what}; check that the address is an API server's and that no proxy responds in its place"
    )
}
