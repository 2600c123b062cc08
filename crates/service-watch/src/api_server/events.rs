//! Kubernetes Events: what `kubectl describe` and `kubectl events` show of the agent's doings.
//!
//! Whoever has something to tell hands it over and goes on; a task posts it when it can. An Event is news for people and
//! nothing depends on it: too many, or without an API server that takes them, they are dropped and counted.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kube::api::{ListParams, ObjectMeta};
use kube::runtime::events::{self, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, warn};

use crate::error::chain;
use crate::lenient::Short;
use crate::model::ObjectName;
use crate::wire;

const CONTROLLER: &str = "kube-ipvs";
/// How many may wait to be posted.
const WAITING: usize = 100;
/// So many are posted in a row, and then one in each [`PACE`]: there is an agent on every node, and all have the same news.
const BURST: u32 = 10;
const PACE: Duration = Duration::from_secs(6);
/// What was said is not said again for this long. Longer than [`Recorder`] would make one series of it.
const REPEAT: Duration = Duration::from_secs(600);
/// An API server that cannot take an Event now is asked again, so often and with this pause.
const TRIES: u32 = 12;
const PAUSE: Duration = Duration::from_secs(10);
const ANSWER: Duration = Duration::from_secs(30);
/// What the API allows a note to have, in bytes.
const NOTE: usize = 1024;

/// Something to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What it is about.
    pub subject: EventSubject,
    /// Whether somebody should do something about it.
    pub kind: EventKind,
    /// Why, in one word of at most 128 characters: `AddressIsANodes`.
    pub reason: String,
    /// What was done, in one word of at most 128 characters: `RefuseAddress`.
    pub action: String,
    /// What happened, and what to do. What is beyond 1024 bytes is cut off.
    pub note: String,
}

/// What an [`Event`] is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum EventSubject {
    /// A Service.
    Service(ObjectName),
    /// The agent's own Node.
    Node,
}

/// Whether somebody should do something about an [`Event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// No.
    Normal,
    /// Yes.
    Warning,
}

/// Posts Events. Clones post through the same queue; it ends with the last of them.
#[derive(Clone, Debug)]
pub struct Events {
    queue: mpsc::Sender<Event>,
    ledger: Arc<Ledger>,
}

/// What makes two Events the same: subject, reason and note.
type Key = (EventSubject, String, String);

#[derive(Debug, Default)]
struct Ledger {
    /// When it was said. Small: no more can be said in [`REPEAT`] than the queue and the pace let through.
    said: Mutex<HashMap<Key, Instant>>,
    dropped: AtomicU64,
}

impl Events {
    /// Must be called on a tokio runtime, which does the posting.
    pub(super) fn new(client: Client, node: Arc<str>) -> Self {
        let (queue, waiting) = mpsc::channel(WAITING);
        let ledger = Arc::new(Ledger::default());
        tokio::spawn(Poster { client, node, ledger: ledger.clone(), complained: HashSet::new() }.run(waiting));
        Self { queue, ledger }
    }

    /// Posts an Event, unless the same was said within the last 10 minutes. Never waits, and may be called on any thread.
    pub fn publish(&self, event: Event) {
        let now = Instant::now();
        let key = event.key();
        let mut said = self.ledger.said();
        said.retain(|_, at| now < *at + REPEAT);
        if said.contains_key(&key) {
            return;
        }
        match self.queue.try_send(event) {
            Ok(()) => {
                said.insert(key, now);
            }
            Err(error) => {
                let (mpsc::error::TrySendError::Full(event) | mpsc::error::TrySendError::Closed(event)) = error;
                debug!(reason = event.reason, "too many Events are waiting: dropped one");
                self.ledger.drop_one();
            }
        }
    }

    /// How many Events were not posted: because too many were waiting, or the API server did not take them.
    pub fn dropped(&self) -> u64 {
        self.ledger.dropped.load(Ordering::Relaxed)
    }
}

impl Ledger {
    fn said(&self) -> MutexGuard<'_, HashMap<Key, Instant>> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drop_one(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

impl Event {
    fn key(&self) -> Key {
        (self.subject.clone(), self.reason.clone(), self.note.clone())
    }
}

struct Poster {
    client: Client,
    node: Arc<str>,
    ledger: Arc<Ledger>,
    /// Reasons whose Events failed since one was posted: the next failure is only worth a line for debugging.
    complained: HashSet<String>,
}

/// Why an Event was not posted.
enum Failure {
    /// It may be otherwise in a moment.
    ForNow(String),
    ForGood(String),
}

impl Poster {
    async fn run(mut self, mut waiting: mpsc::Receiver<Event>) {
        let mut pace = Pace { left: BURST, since: Instant::now() };
        while let Some(event) = waiting.recv().await {
            pace.wait().await;
            match self.deliver(&event).await {
                Ok(()) => self.complained.clear(),
                Err(problem) => {
                    self.ledger.drop_one();
                    // The next time it comes up it is news again.
                    self.ledger.said().remove(&event.key());
                    let problem = Short(&problem);
                    if self.complained.insert(event.reason.clone()) {
                        warn!(reason = event.reason, "cannot post an Event: {problem}");
                    } else {
                        debug!(reason = event.reason, "cannot post an Event: {problem}");
                    }
                }
            }
        }
    }

    async fn deliver(&self, event: &Event) -> Result<(), String> {
        for tries in 1.. {
            match self.post(event).await {
                Ok(()) => return Ok(()),
                Err(Failure::ForNow(problem)) if tries < TRIES => {
                    debug!(reason = event.reason, "cannot post an Event yet: {}", Short(&problem));
                    sleep(PAUSE).await;
                }
                Err(Failure::ForNow(problem) | Failure::ForGood(problem)) => return Err(problem),
            }
        }
        Ok(())
    }

    async fn post(&self, event: &Event) -> Result<(), Failure> {
        let regarding = match &event.subject {
            EventSubject::Service(name) => {
                let metadata = ObjectMeta {
                    name: Some(name.name().to_owned()),
                    namespace: Some(name.namespace().to_owned()),
                    uid: self.uid(name).await,
                    ..ObjectMeta::default()
                };
                wire::Service { metadata, ..wire::Service::default() }.object_ref(&())
            }
            EventSubject::Node => {
                let name = Some(self.node.to_string());
                // As kubelet and kube-proxy have it: what asks for a Node's Events asks for this too.
                let metadata = ObjectMeta { name: name.clone(), uid: name, ..ObjectMeta::default() };
                wire::Node { metadata, ..wire::Node::default() }.object_ref(&())
            }
        };
        let published = events::Event {
            type_: match event.kind {
                EventKind::Normal => EventType::Normal,
                EventKind::Warning => EventType::Warning,
            },
            reason: event.reason.clone(),
            note: Some(cut(&event.note).to_owned()),
            action: event.action.clone(),
            secondary: None,
        };
        // A new one each time: what a recorder remembers makes a series of Events whose notes differ, under the first's
        // note. The same note does not come twice, so nothing is lost by forgetting.
        let reporter = Reporter { controller: CONTROLLER.into(), instance: Some(self.node.to_string()) };
        let recorder = Recorder::new(self.client.clone(), reporter);
        match timeout(ANSWER, recorder.publish(&published, &regarding)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(kube::Error::Api(status))) if status.code == 403 => Err(Failure::ForGood(format!(
                "not allowed to create events of events.k8s.io: {}; give this agent's user or ServiceAccount the ClusterRole \
                 system:node-proxier",
                status.message
            ))),
            Ok(Err(kube::Error::Api(status)))
                if (400..500).contains(&status.code) && !matches!(status.code, 408 | 429) =>
            {
                Err(Failure::ForGood(format!("status {}: {}", status.code, status.message)))
            }
            Ok(Err(error)) => Err(Failure::ForNow(chain(&error))),
            Err(_) => Err(Failure::ForNow(format!("no answer within {} s", ANSWER.as_secs()))),
        }
    }

    /// The uid of a Service. `kubectl describe` shows only Events that have it; one without is better than none.
    async fn uid(&self, name: &ObjectName) -> Option<String> {
        let fields = format!("metadata.name={},metadata.namespace={}", name.name(), name.namespace());
        let services = Api::<wire::Service>::all(self.client.clone());
        // Of any age: from the server's cache.
        let wanted = ListParams::default().fields(&fields).match_any();
        let list = timeout(ANSWER, services.list_metadata(&wanted)).await;
        list.ok()?.ok()?.items.pop()?.metadata.uid
    }
}

fn cut(note: &str) -> &str {
    let end = (0..=NOTE.min(note.len())).rev().find(|end| note.is_char_boundary(*end));
    &note[..end.unwrap_or(0)]
}

/// Lets [`BURST`] through, and then one in each [`PACE`].
struct Pace {
    left: u32,
    /// Up to here what was earned has been counted.
    since: Instant,
}

impl Pace {
    async fn wait(&mut self) {
        while self.left < BURST && self.since + PACE <= Instant::now() {
            self.left += 1;
            self.since += PACE;
        }
        if self.left == BURST {
            self.since = Instant::now();
        }
        if self.left == 0 {
            self.since += PACE;
            sleep_until(self.since).await;
        } else {
            self.left -= 1;
        }
    }
}
