//! For tests: a small in-process Kubernetes API server with fault injection.
//!
//! It lists (with pages), watches (with resource versions, bookmarks and compaction) and streams lists of Services,
//! EndpointSlices and Nodes, with the label and field selectors that clients send. It validates nothing: objects are
//! served as they were applied, so that tests can serve invalid ones.
//!
//! [`Server::service`] is a tower service for `kube::Client::new`: no socket, and tests can run on paused time.
//! [`Server::listen`] and [`Server::listen_in_thread`] serve HTTP on 127.0.0.1, for a program under test, and
//! [`Server::listen_over_tls_in_thread`] does so over TLS.
//!
//! Events of `events.k8s.io` can be posted and patched, and are kept for [`Server::events`].
//!
//! A `Server` is a handle: clones refer to the same server. Its methods panic on incorrect use by a test.

mod answer;
mod listen;
mod store;
mod tls;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};

pub use self::answer::Body;
use self::answer::Watch;
use self::store::Store;
pub use self::tls::{ServerCertificate, TlsListener};

/// A test API server.
#[derive(Clone, Debug, Default)]
pub struct Server {
    state: Arc<Mutex<State>>,
}

/// A request that the server has received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedRequest {
    /// `services`, `endpointslices`, `nodes` or `events`.
    pub resource: String,
    /// Whether it was a list, a watch or a streaming list.
    pub verb: Verb,
    /// The query, decoded: `limit=500&labelSelector=!x`.
    pub query: String,
}

/// The kind of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// A list, or a page of one.
    List,
    /// A watch from a resource version.
    Watch,
    /// A watch with `sendInitialEvents`: a streaming list.
    StreamingList,
    /// Anything but GET.
    Post,
}

/// How the server handles `sendInitialEvents`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Streaming {
    /// It streams lists.
    #[default]
    Yes,
    /// It responds with this status, as servers do that have the feature disabled (422).
    Refused(u16),
    /// It ignores the parameter: no bookmark ends the list.
    Unknown,
}

/// How a watch from a compacted resource version fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Expiry {
    /// With HTTP status 410.
    #[default]
    Status,
    /// With status 200 and an ERROR event of code 410.
    Event,
}

/// A fault that affects all responses.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fault {
    Answer { resource: Option<String>, status: u16, content_type: &'static str, body: String },
    TooMany { retry_after: u64 },
    Endless,
    Refuse,
    Silence,
    Stall,
}

#[derive(Debug, Default)]
struct State {
    store: Store,
    watches: Vec<Watch>,
    streaming: Streaming,
    expiry: Expiry,
    fault: Option<Fault>,
    requests: Vec<RecordedRequest>,
    events: Vec<Value>,
    token: Option<String>,
    throttle: Option<Throttle>,
    /// By how many changes lists are stale.
    stale_by: u64,
    /// How many bytes of padding each object of a list has.
    padding: usize,
    /// Whether watches repeat each event and the one before it.
    repeats_events: bool,
}

/// A limit of the rate of responses.
#[derive(Clone, Copy, Debug)]
struct Throttle {
    bytes: usize,
    every: Duration,
}

impl Server {
    /// A server without objects.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Creates or replaces an object; returns the new resource version.
    ///
    /// # Panics
    ///
    /// Without `kind` of a kind that is served, or without `metadata.name`.
    pub fn apply(&self, object: Value) -> u64 {
        let mut state = self.state();
        let change = state.store.apply(object);
        let version = change.version;
        state.notify_watches(&change);
        version
    }

    /// Deletes an object.
    ///
    /// # Panics
    ///
    /// If it does not exist.
    pub fn delete(&self, kind: &str, namespace: &str, name: &str) {
        let mut state = self.state();
        let change = state.store.delete(kind, namespace, name);
        state.notify_watches(&change);
    }

    /// Forgets the history: watches from an earlier resource version expire (410).
    pub fn compact(&self) {
        self.state().store.compact();
    }

    /// Sets how streaming lists are handled.
    pub fn streaming(&self, streaming: Streaming) {
        self.state().streaming = streaming;
    }

    /// Sets how a watch from a compacted resource version fails.
    pub fn expiry(&self, expiry: Expiry) {
        self.state().expiry = expiry;
    }

    /// Ends all watches, as a server does that restarts.
    pub fn end_watches(&self) {
        self.state().watches.clear();
    }

    /// Ends all watches with an error, as a broken connection does.
    pub fn break_watches(&self) {
        for watch in self.state().watches.drain(..) {
            watch.fail();
        }
    }

    /// Sends an ERROR event of code 410 on all watches and ends them.
    pub fn expire_watches(&self) {
        for watch in self.state().watches.drain(..) {
            watch.event("ERROR", &status(410, "Expired", "too old resource version"));
        }
    }

    /// Sends a bookmark on all watches that want them.
    pub fn bookmark(&self) {
        let state = self.state();
        let version = state.store.version();
        for watch in &state.watches {
            watch.bookmark(version, false);
        }
    }

    /// From now on the server sends nothing, neither on open watches (which stay silent) nor in response to requests.
    pub fn silence(&self) {
        let mut state = self.state();
        state.fault = Some(Fault::Silence);
        for watch in &mut state.watches {
            watch.silence();
        }
    }

    /// From now on responses start but never continue.
    pub fn stall(&self) {
        self.state().fault = Some(Fault::Stall);
    }

    /// From now on connections are refused; open watches break.
    pub fn refuse(&self) {
        self.break_watches();
        self.state().fault = Some(Fault::Refuse);
    }

    /// From now on requests for `resource`, or all, are forbidden.
    pub fn forbid(&self, resource: Option<&str>) {
        let body = status(403, "Forbidden", "User \"test\" cannot list resource at the cluster scope").to_string();
        self.answer_with(resource, 403, "application/json", body);
    }

    /// From now on requests for `resource`, or all, get this response.
    pub fn answer_with(
        &self,
        resource: Option<&str>,
        status: u16,
        content_type: &'static str,
        body: impl Into<String>,
    ) {
        let resource = resource.map(str::to_owned);
        self.state().fault = Some(Fault::Answer { resource, status, content_type, body: body.into() });
    }

    /// From now on requests get status 429 with a `Retry-After` of so many seconds.
    pub fn reject_with_429(&self, retry_after: u64) {
        self.break_watches();
        self.state().fault = Some(Fault::TooMany { retry_after });
    }

    /// From now on responses are an object without an end.
    pub fn respond_endlessly(&self) {
        self.break_watches();
        self.state().fault = Some(Fault::Endless);
    }

    /// From now on responses are sent so many bytes at a time, with pauses.
    pub fn throttle(&self, bytes: usize, every: Duration) {
        self.state().throttle = Some(Throttle { bytes, every });
    }

    /// From now on lists are stale by so many changes. Watches that start with them send the rest.
    pub fn serve_stale_lists(&self, changes: u64) {
        self.state().stale_by = changes;
    }

    /// From now on each object of a list has so many bytes of padding.
    pub fn pad(&self, bytes: usize) {
        self.state().padding = bytes;
    }

    /// From now on watches send each event twice, and the one before it again.
    pub fn repeat_events(&self) {
        self.state().repeats_events = true;
    }

    /// Sends bytes that are not a watch event on all watches.
    pub fn send_garbage(&self) {
        for watch in &self.state().watches {
            watch.send_garbage();
        }
    }

    /// Ends all faults; open watches that are silent stay so.
    pub fn recover(&self) {
        let mut state = self.state();
        state.fault = None;
        state.throttle = None;
        state.stale_by = 0;
        state.repeats_events = false;
    }

    /// From now on requests need this bearer token.
    pub fn require_token(&self, token: &str) {
        self.state().token = Some(token.to_owned());
    }

    /// Deletes all objects and restarts the resource versions, as a server does that was restored from a backup.
    pub fn reset(&self) {
        self.break_watches();
        self.state().store = Store::default();
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<RecordedRequest> {
        self.state().requests.clone()
    }

    /// How many requests of this kind there were for a resource.
    pub fn count(&self, resource: &str, verb: Verb) -> usize {
        self.state().requests.iter().filter(|it| it.resource == resource && it.verb == verb).count()
    }

    /// The Events that were posted, as they are now.
    pub fn events(&self) -> Vec<Value> {
        self.state().events.clone()
    }

    /// How many watches are open.
    pub fn watches(&self) -> usize {
        self.state().watches.iter().filter(|watch| watch.is_open()).count()
    }

    /// Writes a kubeconfig that leads to `address`, as returned by [`Server::listen`].
    ///
    /// # Panics
    ///
    /// If the file cannot be written.
    pub fn write_kubeconfig(path: &Path, address: std::net::SocketAddr) {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
            "clusters": [{ "name": "test", "cluster": { "server": format!("http://{address}") } }],
            "users": [{ "name": "test", "user": {} }],
        });
        if let Err(error) = std::fs::write(path, config.to_string()) {
            fail_test(&format!("cannot write {}: {error}", path.display()));
        }
    }
}

impl State {
    fn notify_watches(&mut self, change: &store::Change) {
        self.watches.retain(Watch::is_open);
        let before = if self.repeats_events { self.store.before(change) } else { None };
        for watch in &self.watches {
            watch.change(change);
            if self.repeats_events {
                watch.change(change);
                before.as_ref().inspect(|before| watch.change(before));
                // The last event must be the current state.
                watch.change(change);
            }
        }
    }
}

/// A Status object, as errors have it.
fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Status", "metadata": {},
        "status": "Failure", "code": code, "reason": reason, "message": message,
    })
}

#[expect(clippy::panic, reason = "a test is wrong, and should say so")]
fn fail_test(what: &str) -> ! {
    panic!("{what}")
}
