//! Posts Kubernetes Events, which `kubectl describe` and `kubectl events` show.
//!
//! Callers queue an Event without waiting, and a task posts it. Events are best effort, as with client-go: if too many
//! are queued, or the API server does not accept one, it is dropped and counted.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use kube::api::{ListParams, ObjectMeta};
use kube::runtime::events::{self, EventType as ApiEventType, Recorder, Reporter};
use kube::{Api, Client, Resource};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, warn};

use crate::error::chain;
use crate::lenient::Truncated;
use crate::model::ObjectName;
use crate::panics::Panic;
use crate::wire;

const CONTROLLER: &str = "kube-ipvs";
/// How many Events may be queued.
const QUEUE_LENGTH: usize = 100;
/// The burst of the rate limit; after it, one Event may be posted in each [`REFILL_INTERVAL`]. There is an agent on
/// every node, and all may post the same Event at once.
const BURST: u32 = 10;
const REFILL_INTERVAL: Duration = Duration::from_secs(6);
/// The same Event is not published again within this time. Longer than the time in which [`Recorder`] aggregates a
/// series.
const DEDUPLICATION_INTERVAL: Duration = Duration::from_secs(600);
/// How often posting an Event is attempted, and the delay in between.
const MAX_ATTEMPTS: u32 = 12;
const RETRY_DELAY: Duration = Duration::from_secs(10);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// The API's limit for a note.
const MAX_NOTE_BYTES: usize = 1024;

/// A Kubernetes Event to post.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The object it is about.
    pub regarding: EventObject,
    /// `Normal` or `Warning`.
    pub event_type: EventType,
    /// The reason, in CamelCase, of at most 128 characters: `AddressIsANodes`.
    pub reason: String,
    /// The action taken, in CamelCase, of at most 128 characters: `RefuseAddress`.
    pub action: String,
    /// What happened, and what to do about it. Truncated to 1024 bytes.
    pub note: String,
}

/// The object an [`Event`] is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum EventObject {
    /// A Service.
    Service(ObjectName),
    /// This agent's Node.
    Node,
}

/// The type of an [`Event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventType {
    /// No action is needed.
    Normal,
    /// Somebody should act on it.
    Warning,
}

/// Posts Events. Clones share one queue; the task that posts ends when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct EventRecorder {
    queue: mpsc::Sender<Event>,
    history: Arc<History>,
}

/// Identifies an Event for deduplication: object, reason and note.
type Key = (EventObject, String, String);

#[derive(Debug, Default)]
struct History {
    /// When each Event was published. Bounded by what the queue and the rate limit let through in
    /// [`DEDUPLICATION_INTERVAL`].
    published: Mutex<HashMap<Key, Instant>>,
    dropped: AtomicU64,
}

impl EventRecorder {
    /// Must be called on a tokio runtime: it spawns the task that posts.
    pub(super) fn new(client: Client, node: Arc<str>) -> Self {
        let (queue, waiting) = mpsc::channel(QUEUE_LENGTH);
        let history = Arc::new(History::default());
        tokio::spawn(Poster { client, node, history: history.clone(), warned_reasons: HashSet::new() }.run(waiting));
        Self { queue, history }
    }

    /// Queues an Event, unless the same one was published within the last 10 minutes. Never blocks, and may be called
    /// on any thread.
    pub fn publish(&self, event: Event) {
        let now = Instant::now();
        let key = event.key();
        let mut published = self.history.published();
        published.retain(|_, at| now < *at + DEDUPLICATION_INTERVAL);
        if published.contains_key(&key) {
            return;
        }
        match self.queue.try_send(event) {
            Ok(()) => {
                published.insert(key, now);
            }
            Err(error) => {
                let (mpsc::error::TrySendError::Full(event) | mpsc::error::TrySendError::Closed(event)) = error;
                debug!(reason = event.reason, "too many Events are queued: dropped one");
                self.history.count_dropped();
            }
        }
    }

    /// The number of Events that were dropped: the queue was full, or the API server did not accept them.
    pub fn dropped(&self) -> u64 {
        self.history.dropped.load(Ordering::Relaxed)
    }
}

impl History {
    fn published(&self) -> MutexGuard<'_, HashMap<Key, Instant>> {
        self.published.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count_dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

impl Event {
    fn key(&self) -> Key {
        (self.regarding.clone(), self.reason.clone(), self.note.clone())
    }
}

struct Poster {
    client: Client,
    node: Arc<str>,
    history: Arc<History>,
    /// Reasons whose Events failed since the last success: further failures are logged at debug level only.
    warned_reasons: HashSet<String>,
}

/// Why an Event was not posted.
enum Failure {
    /// A retry may succeed.
    Transient(String),
    Permanent(String),
}

impl Poster {
    async fn run(mut self, mut waiting: mpsc::Receiver<Event>) {
        let mut limiter = RateLimiter { tokens: BURST, refilled_at: Instant::now() };
        while let Some(event) = waiting.recv().await {
            limiter.wait().await;
            let posted = AssertUnwindSafe(self.post_with_retries(&event)).catch_unwind().await;
            match posted.unwrap_or_else(|payload| Err(Panic::from_payload(&*payload).to_string())) {
                Ok(()) => self.warned_reasons.clear(),
                Err(problem) => {
                    self.history.count_dropped();
                    // So that it is published when it occurs again.
                    self.history.published().remove(&event.key());
                    let problem = Truncated(&problem);
                    if self.warned_reasons.insert(event.reason.clone()) {
                        warn!(reason = event.reason, "cannot post an Event: {problem}");
                    } else {
                        debug!(reason = event.reason, "cannot post an Event: {problem}");
                    }
                }
            }
        }
    }

    async fn post_with_retries(&self, event: &Event) -> Result<(), String> {
        for attempt in 1.. {
            match self.post(event).await {
                Ok(()) => return Ok(()),
                Err(Failure::Transient(problem)) if attempt < MAX_ATTEMPTS => {
                    debug!(reason = event.reason, "cannot post an Event yet: {}", Truncated(&problem));
                    sleep(RETRY_DELAY).await;
                }
                Err(Failure::Transient(problem) | Failure::Permanent(problem)) => return Err(problem),
            }
        }
        Ok(())
    }

    async fn post(&self, event: &Event) -> Result<(), Failure> {
        let regarding = match &event.regarding {
            EventObject::Service(name) => {
                let metadata = ObjectMeta {
                    name: Some(name.name().to_owned()),
                    namespace: Some(name.namespace().to_owned()),
                    uid: self.uid(name).await,
                    ..ObjectMeta::default()
                };
                wire::Service { metadata, ..wire::Service::default() }.object_ref(&())
            }
            EventObject::Node => {
                let name = Some(self.node.to_string());
                // As kubelet and kube-proxy do: clients that query a Node's Events expect its name as uid.
                let metadata = ObjectMeta { name: name.clone(), uid: name, ..ObjectMeta::default() };
                wire::Node { metadata, ..wire::Node::default() }.object_ref(&())
            }
        };
        let event_body = events::Event {
            type_: match event.event_type {
                EventType::Normal => ApiEventType::Normal,
                EventType::Warning => ApiEventType::Warning,
            },
            reason: event.reason.clone(),
            note: Some(truncate(&event.note).to_owned()),
            action: event.action.clone(),
            secondary: None,
        };
        // A new recorder each time: one that is reused aggregates Events with different notes into a series that has
        // the first note. Events with equal notes are deduplicated already.
        let reporter = Reporter { controller: CONTROLLER.into(), instance: Some(self.node.to_string()) };
        let recorder = Recorder::new(self.client.clone(), reporter);
        match timeout(REQUEST_TIMEOUT, recorder.publish(&event_body, &regarding)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(kube::Error::Api(status))) if status.code == 403 => Err(Failure::Permanent(format!(
                "not allowed to create events of events.k8s.io: {}; give this agent's user or ServiceAccount the ClusterRole \
                 system:node-proxier",
                status.message
            ))),
            Ok(Err(kube::Error::Api(status)))
                if (400..500).contains(&status.code) && !matches!(status.code, 408 | 429) =>
            {
                Err(Failure::Permanent(format!("status {}: {}", status.code, status.message)))
            }
            Ok(Err(error)) => Err(Failure::Transient(chain(&error))),
            Err(_) => Err(Failure::Transient(format!("no response within {} s", REQUEST_TIMEOUT.as_secs()))),
        }
    }

    /// The uid of a Service, which `kubectl describe` selects Events by. Without it the Event is posted anyway.
    async fn uid(&self, name: &ObjectName) -> Option<String> {
        let fields = format!("metadata.name={},metadata.namespace={}", name.name(), name.namespace());
        let services = Api::<wire::Service>::all(self.client.clone());
        // Any resource version will do, so the server may use its cache.
        let wanted = ListParams::default().fields(&fields).match_any();
        let list = timeout(REQUEST_TIMEOUT, services.list_metadata(&wanted)).await;
        list.ok()?.ok()?.items.pop()?.metadata.uid
    }
}

fn truncate(note: &str) -> &str {
    let end = (0..=MAX_NOTE_BYTES.min(note.len())).rev().find(|end| note.is_char_boundary(*end));
    &note[..end.unwrap_or(0)]
}

/// A token bucket of [`BURST`] tokens, which gains one in each [`REFILL_INTERVAL`].
struct RateLimiter {
    tokens: u32,
    /// The time up to which tokens were added.
    refilled_at: Instant,
}

impl RateLimiter {
    async fn wait(&mut self) {
        while self.tokens < BURST && self.refilled_at + REFILL_INTERVAL <= Instant::now() {
            self.tokens += 1;
            self.refilled_at += REFILL_INTERVAL;
        }
        if self.tokens == BURST {
            self.refilled_at = Instant::now();
        }
        if self.tokens == 0 {
            self.refilled_at += REFILL_INTERVAL;
            sleep_until(self.refilled_at).await;
        } else {
            self.tokens -= 1;
        }
    }
}
