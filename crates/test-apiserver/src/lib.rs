//! For tests: a small Kubernetes API server in the process, with faults to order.
//!
//! It lists (with pages), watches (with resource versions, bookmarks and compaction) and streams lists of Services,
//! EndpointSlices and Nodes, with the label and field selectors that watchers send. It checks nothing: what is applied
//! is what comes out, so that wrong objects can be served too.
//!
//! [`Server::service`] is a tower service for `kube::Client::new`: no socket, and tests can run on paused time.
//! [`Server::listen`] and [`Server::listen_in_thread`] serve HTTP on 127.0.0.1, for a program under test, and
//! [`Server::listen_over_tls_in_thread`] does so over TLS.
//!
//! Events of `events.k8s.io` can be posted and patched, and are kept for [`Server::events`].
//!
//! A `Server` is a handle: clones are the same server. Its methods panic on what only a wrong test does.

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
pub use self::tls::TlsListener;

/// A test API server.
#[derive(Clone, Debug, Default)]
pub struct Server {
    state: Arc<Mutex<State>>,
}

/// A request as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// `services`, `endpointslices`, `nodes` or `events`.
    pub resource: String,
    /// Whether it was a list, a watch or a streaming list.
    pub verb: Verb,
    /// The query, decoded: `limit=500&labelSelector=!x`.
    pub query: String,
}

/// What a request was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// A list, or a page of one.
    List,
    /// A watch from a resource version.
    Watch,
    /// A watch that begins with all there is.
    StreamingList,
    /// Anything but GET.
    Post,
}

/// How the server takes `sendInitialEvents`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Streaming {
    /// It streams lists.
    #[default]
    Yes,
    /// It refuses with this status, as servers do that have it switched off (422).
    Refused(u16),
    /// It does not know the parameter: the end of the list is never marked.
    Unknown,
}

/// How a watch from a compacted resource version fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gone {
    /// With HTTP status 410.
    #[default]
    Status,
    /// With status 200 and an ERROR event of code 410.
    Event,
}

/// What every answer is while the server is out of order.
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
    gone: Gone,
    fault: Option<Fault>,
    asked: Vec<Asked>,
    events: Vec<Value>,
    token: Option<String>,
    drip: Option<Drip>,
    /// How many changes ago lists are of.
    stale_by: u64,
    /// How many bytes of no use each object of a list has.
    padding: usize,
    /// Whether each event comes twice, and after it the one before it again.
    stutters: bool,
}

/// How slowly answers come.
#[derive(Clone, Copy, Debug)]
struct Drip {
    bytes: usize,
    every: Duration,
}

impl Server {
    /// A server that has nothing.
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
        state.tell(&change);
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
        state.tell(&change);
    }

    /// Forgets how everything came to be: watches from before now are answered with 410.
    pub fn compact(&self) {
        self.state().store.compact();
    }

    /// Sets how streaming lists are taken.
    pub fn streaming(&self, streaming: Streaming) {
        self.state().streaming = streaming;
    }

    /// Sets how a watch from a compacted resource version fails.
    pub fn gone(&self, gone: Gone) {
        self.state().gone = gone;
    }

    /// Ends all watches, as a server that restarts.
    pub fn cut(&self) {
        self.state().watches.clear();
    }

    /// Ends all watches in mid-stream, as a broken connection.
    pub fn break_off(&self) {
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

    /// From now on nothing comes any more, neither on open watches (those stay silent for ever) nor as an answer.
    pub fn silence(&self) {
        let mut state = self.state();
        state.fault = Some(Fault::Silence);
        for watch in &mut state.watches {
            watch.silence();
        }
    }

    /// From now on answers begin and never go on.
    pub fn stall(&self) {
        self.state().fault = Some(Fault::Stall);
    }

    /// From now on requests are refused as if nobody listened; open watches break off.
    pub fn refuse(&self) {
        self.break_off();
        self.state().fault = Some(Fault::Refuse);
    }

    /// From now on requests for `resource` (all without) are forbidden.
    pub fn forbid(&self, resource: Option<&str>) {
        let body = status(403, "Forbidden", "User \"test\" cannot list resource at the cluster scope").to_string();
        self.answer_with(resource, 403, "application/json", body);
    }

    /// From now on requests for `resource` (all without) are answered with this.
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

    /// From now on requests are answered with status 429, as by a server that has too many of them, and that they may come
    /// again after so many seconds.
    pub fn too_many(&self, retry_after: u64) {
        self.break_off();
        self.state().fault = Some(Fault::TooMany { retry_after });
    }

    /// From now on answers are an object that never ends.
    pub fn endless(&self) {
        self.break_off();
        self.state().fault = Some(Fault::Endless);
    }

    /// From now on answers come so many bytes at a time, with pauses.
    pub fn drip(&self, bytes: usize, every: Duration) {
        self.state().drip = Some(Drip { bytes, every });
    }

    /// From now on lists are as they were so many changes ago. Watches that begin with them tell the rest.
    pub fn lists_are_stale_by(&self, changes: u64) {
        self.state().stale_by = changes;
    }

    /// From now on each object of a list has so many bytes that nobody reads.
    pub fn pad(&self, bytes: usize) {
        self.state().padding = bytes;
    }

    /// From now on each event of a watch comes twice, and then the one before it once more.
    pub fn stutter(&self) {
        self.state().stutters = true;
    }

    /// Sends on all watches what is no event.
    pub fn garble(&self) {
        for watch in &self.state().watches {
            watch.garble();
        }
    }

    /// Ends all faults; open watches that are silent stay so.
    pub fn recover(&self) {
        let mut state = self.state();
        state.fault = None;
        state.drip = None;
        state.stale_by = 0;
        state.stutters = false;
    }

    /// From now on requests need this bearer token.
    pub fn ask_for_token(&self, token: &str) {
        self.state().token = Some(token.to_owned());
    }

    /// Forgets every object, and begins to count anew: as a server that comes back from an old backup, or from none.
    pub fn begin_anew(&self) {
        self.break_off();
        self.state().store = Store::default();
    }

    /// All requests so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.state().asked.clone()
    }

    /// How many requests of this kind there were for a resource.
    pub fn count(&self, resource: &str, verb: Verb) -> usize {
        self.state().asked.iter().filter(|asked| asked.resource == resource && asked.verb == verb).count()
    }

    /// The Events that were posted, as they are now.
    pub fn events(&self) -> Vec<Value> {
        self.state().events.clone()
    }

    /// How many watches are open.
    pub fn watches(&self) -> usize {
        self.state().watches.iter().filter(|watch| watch.open()).count()
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
            wrong(&format!("cannot write {}: {error}", path.display()));
        }
    }
}

impl State {
    fn tell(&mut self, change: &store::Change) {
        self.watches.retain(Watch::open);
        let before = if self.stutters { self.store.before(change) } else { None };
        for watch in &self.watches {
            watch.change(change);
            if self.stutters {
                watch.change(change);
                before.as_ref().inspect(|before| watch.change(before));
                // What is told last is what is: a watch may repeat itself, and ends with the truth.
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
fn wrong(what: &str) -> ! {
    panic!("{what}")
}
