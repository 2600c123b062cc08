//! One kind of object, watched without end.
//!
//! [`watcher()`] lists, watches and resumes. What it leaves to its users is here: a server without streaming lists, a
//! resource version that is too old to resume from, silence, and the pauses between attempts.

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

use super::doubt::AGAIN;
use super::patience::{NoAnswer, TooLong};
use crate::convert::Object;
use crate::error::chain;
use crate::lenient::Short;

/// The server is asked to end each watch after this many seconds; `watcher` gives up a silent one 5 seconds later.
const WATCH_SECONDS: u32 = 50;
/// While a list is being read, something must come at least this often.
const SILENCE: Duration = Duration::from_secs(55);

/// How many objects a page has where one of the usual size was too large.
const SMALL_PAGE: u32 = 40;

/// A server that did not answer for so long may be another one, or one that was restored from a backup: its versions look
/// like those known, and mean other things. So what there is is listed anew.
const ABSENCE: Duration = Duration::from_secs(30);

/// A watch that goes on.
pub(super) struct Feed<K> {
    api: Api<K>,
    server: String,
    config: Config,
    stream: Option<BoxStream<'static, watcher::Result<Event<K>>>>,
    phase: Phase,
    pauses: DefaultBackoff,
    /// Failures in a row.
    failures: u32,
    /// Since when.
    failing_since: Option<Instant>,
    pause: Option<Duration>,
    heard: watch::Receiver<()>,
    /// Set where the last list is doubted.
    again: Arc<AtomicBool>,
}

/// How far the stream has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Starting,
    Listing,
    Following,
}

/// What a feed says.
pub(super) enum Step<K> {
    /// Something happened to an object, or to the list of them.
    Event(Event<K>),
    /// A request failed; it is tried again.
    Failed(String),
    /// After a failure, the server answers again.
    Well,
}

impl<K: Object> Feed<K> {
    pub(super) fn new(
        api: Api<K>,
        server: String,
        wanted: Config,
        heard: watch::Receiver<()>,
        again: Arc<AtomicBool>,
    ) -> Self {
        Self {
            api,
            server,
            config: wanted.timeout(WATCH_SECONDS).streaming_lists(),
            stream: None,
            phase: Phase::Starting,
            pauses: DefaultBackoff::default(),
            failures: 0,
            failing_since: None,
            pause: None,
            heard,
            again,
        }
    }

    pub(super) async fn next(&mut self) -> Step<K> {
        if self.again.swap(false, Ordering::Relaxed) {
            self.rebuild();
            self.pause = Some(AGAIN);
        }
        loop {
            if let Some(pause) = self.pause.take() {
                sleep(pause).await;
                if self.phase == Phase::Following && self.failing_since.is_some_and(|since| since.elapsed() >= ABSENCE)
                {
                    debug!(kind = %K::plural(&()), "no answer for {} s: listing anew", ABSENCE.as_secs());
                    self.rebuild();
                }
            }
            let stream = self.stream.get_or_insert_with(|| watcher(self.api.clone(), self.config.clone()).boxed());
            let event = async {
                if self.phase == Phase::Following {
                    // Silence is `watcher`'s concern here, and bookmarks do not come out of it.
                    Ok(stream.next().await)
                } else if let Some(event) = stream.next().now_or_never() {
                    // Of a list most comes at once, and needs no timer of its own.
                    Ok(event)
                } else {
                    timeout(SILENCE, stream.next()).await
                }
            };
            let event = tokio::select! {
                event = event => event,
                Ok(()) = self.heard.changed(), if self.failures > 0 && self.phase == Phase::Following => {
                    self.well();
                    return Step::Well;
                }
            };
            let step = match event {
                Ok(Some(Ok(event))) => self.event(event),
                Ok(Some(Err(error))) => self.error(&error),
                Ok(None) => {
                    self.rebuild();
                    None
                }
                Err(_) => {
                    let silent = SILENCE.as_secs();
                    let text = format!("nothing came for {silent} s; check the network to the server and its load");
                    self.rebuild();
                    Some(self.failed(&text))
                }
            };
            if let Some(step) = step {
                return step;
            }
        }
    }

    fn event(&mut self, event: Event<K>) -> Option<Step<K>> {
        match event {
            Event::Init if self.phase == Phase::Listing && self.streaming() => {
                // The list ended before its end was marked: the server does not know streaming lists, or takes longer
                // than a watch lasts.
                self.fall_back("no end to the streaming list");
                return None;
            }
            Event::Init => self.phase = Phase::Listing,
            Event::InitApply(_) => {}
            Event::InitDone => {
                self.phase = Phase::Following;
                self.well();
            }
            Event::Apply(_) | Event::Delete(_) => self.well(),
        }
        Some(Step::Event(event))
    }

    fn error(&mut self, error: &watcher::Error) -> Option<Step<K>> {
        let code = code(error);
        let refused = matches!(code, Some(400..=499)) && !matches!(code, Some(401 | 403 | 408 | 410 | 429));
        if self.phase != Phase::Following && self.streaming() && refused {
            self.fall_back(&error.to_string());
            return None;
        }
        if !self.streaming() && TooLong::is_in(error) {
            // Objects as large as etcd takes them (1.5 MiB) fit then.
            self.config.page_size = Some(SMALL_PAGE);
        }
        // A list with a failure in it proves nothing about what is gone.
        if self.phase != Phase::Following || refused || !resumes(error) {
            self.rebuild();
        }
        if code == Some(410) {
            debug!(kind = %K::plural(&()), "changes since the last one seen are no longer there: listing anew");
            self.pause();
            return None;
        }
        let text = describe::<K>(error, code);
        Some(self.failed(&text))
    }

    fn streaming(&self) -> bool {
        self.config.initial_list_strategy == InitialListStrategy::StreamingList
    }

    /// Lists in pages from now on.
    fn fall_back(&mut self, why: &str) {
        debug!(kind = %K::plural(&()), "no streaming lists, listing in pages: {}", Short(why));
        self.config.initial_list_strategy = InitialListStrategy::ListWatch;
        self.rebuild();
    }

    /// Begins anew, with a list.
    fn rebuild(&mut self) {
        self.stream = None;
        self.phase = Phase::Starting;
    }

    fn well(&mut self) {
        self.failures = 0;
        self.failing_since = None;
        self.pauses = DefaultBackoff::default();
    }

    fn failed(&mut self, text: &str) -> Step<K> {
        self.pause();
        // Answers from before the failure say nothing.
        self.heard.mark_unchanged();
        Step::Failed(format!("{}: {text}; what is known stays, and it is tried again", self.server))
    }

    /// Before the next attempt: a moment after the first failure, for most are over at once, then longer and longer.
    fn pause(&mut self) {
        let pause = self.pauses.next().unwrap_or(Duration::from_secs(30));
        if self.failures == 0 {
            self.pause = Some(pause / 8);
            self.pauses = DefaultBackoff::default();
        } else {
            self.pause = Some(pause);
        }
        self.failures = self.failures.saturating_add(1);
        self.failing_since.get_or_insert_with(Instant::now);
    }
}

/// The HTTP status that an error comes from, if it comes from one.
fn code(error: &watcher::Error) -> Option<u16> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => Some(status.code),
        _ => None,
    }
}

/// Whether `watcher` can go on from where it was, with nothing lost.
fn resumes(error: &watcher::Error) -> bool {
    match error {
        // The server no longer has the changes since then, or has never had that version: `watcher` would ask for the
        // same for ever.
        watcher::Error::WatchStartFailed(kube::Error::Api(status)) => {
            status.code != 410 && !status.message.contains("Too large resource version")
        }
        watcher::Error::WatchError(status) => status.code != 410,
        // What could not be read may have been a change. (kube takes any JSON object that is no event for a Status.)
        watcher::Error::WatchFailed(kube::Error::SerdeError(_) | kube::Error::Api(_))
        | watcher::Error::InitialListFailed(_)
        | watcher::Error::NoResourceVersion => false,
        watcher::Error::WatchStartFailed(_) | watcher::Error::WatchFailed(_) => true,
    }
}

/// What went wrong and what to look at.
fn describe<K: Resource<DynamicType = ()>>(error: &watcher::Error, code: Option<u16>) -> String {
    let kind = K::plural(&());
    let error: &kube::Error = match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => error,
        watcher::Error::WatchError(status) => {
            return format!("the watch of {kind} failed with status {}: {}", status.code, Short(&status.message));
        }
        watcher::Error::NoResourceVersion => {
            return format!("{kind} came without metadata.resourceVersion; check that the address is an API server's");
        }
    };
    match (error, code) {
        (kube::Error::Api(_), Some(0)) => not_kubernetes(&kind, "no event of a watch"),
        (kube::Error::Api(status), Some(403)) => format!(
            "not allowed to list and watch {kind}: {}; give this agent's user or ServiceAccount the ClusterRole system:node-proxier",
            Short(&status.message)
        ),
        (kube::Error::Api(status), Some(401)) => format!(
            "not accepted as a user when asking for {kind}: {}; check the token or certificate in the kubeconfig or ServiceAccount",
            Short(&status.message)
        ),
        (kube::Error::Api(status), Some(code)) => format!(
            "status {code} when asking for {kind}: {}; check the API server, and that the address is its own",
            Short(&status.message)
        ),
        (kube::Error::SerdeError(error), _) => not_kubernetes(&kind, error),
        (kube::Error::Service(error), _) if error.is::<NoAnswer>() => {
            format!("asked for {kind}: {error}; check the network to the server and its load")
        }
        (error, _) => format!(
            "asked for {kind}: {}; check the address, that the server runs, and the network to it",
            Short(&chain(error))
        ),
    }
}

fn not_kubernetes(kind: &str, what: impl std::fmt::Display) -> String {
    format!(
        "asked for {kind}, what came is not what an API server sends: {what}; check that the address is an API server's and no proxy answers in its place"
    )
}
