//! A Kubernetes API server as a source.
//!
//! One [`Feed`] per kind keeps a watch going whatever happens; here its events become changes, and what a new list no
//! longer has becomes gone.

mod connect;
mod doubt;
mod events;
mod feed;
mod patience;

use std::collections::HashSet;
use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;

use futures_util::stream::{self, StreamExt as _};
use kube::runtime::watcher::{self, Config};
use kube::{Api, Client};

pub use self::connect::Connection;
pub use self::doubt::Serving;
use self::doubt::{AGAIN, Doubt, Lacking};
pub use self::events::{Event, EventKind, EventSubject, Events};
use self::feed::{Feed, Step};
use crate::convert::{Converted, Converter, Object, Outcome, consequence};
use crate::error::Error;
use crate::model::{Change, ObjectName};
use crate::report::{Counters, Kind, Message, Outlet, Subject};
use crate::wire;

/// Services, EndpointSlices and Nodes from an API server.
pub struct ApiServer {
    client: Client,
    server: String,
    node: Arc<str>,
    all_nodes: bool,
    /// What the node serves already; `None` where every list is believed.
    serving: Option<Serving>,
    counters: Arc<Counters>,
}

impl fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiServer").field("server", &self.server).field("node", &self.node).finish_non_exhaustive()
    }
}

impl ApiServer {
    /// The API server that `connection` describes; `node` is the name of the own Node.
    ///
    /// Reads files but sends no request: a server that does not answer is reported and tried again while running.
    pub async fn connect(connection: &Connection, node: impl Into<Arc<str>>) -> Result<Self, Error> {
        let (client, server) = connect::client(connection).await?;
        Ok(Self::with_client(client, server, node))
    }

    /// An API server reached through `client`; `server` is what messages call it.
    pub fn with_client(client: Client, server: impl Into<String>, node: impl Into<Arc<str>>) -> Self {
        Self {
            client,
            server: server.into(),
            node: node.into(),
            all_nodes: false,
            serving: None,
            counters: Arc::default(),
        }
    }

    /// Whether to watch all Nodes, for [`Change::Neighbour`], instead of the own one alone. In a large cluster that is
    /// much: each Node is written every few minutes, and each write goes to every watcher.
    #[must_use]
    pub fn watch_all_nodes(mut self, all: bool) -> Self {
        self.all_nodes = all;
        self
    }

    /// Has lists that lack most of what there was read a second time, a few seconds later, before anything goes for their
    /// sake. `serving` is what the node serves already. Without this every list is believed.
    #[must_use]
    pub fn confirm_disappearance(mut self, serving: Serving) -> Self {
        self.serving = Some(serving);
        self
    }

    /// The client, for whoever has something to tell the API server.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// A way to post Kubernetes Events, as `kube-ipvs` on the own Node. Must be called on a tokio runtime.
    pub fn events(&self) -> Events {
        Events::new(self.client.clone(), self.node.clone())
    }

    /// The address of the API server.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// What has been counted so far.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// As [`Source::run`](crate::Source::run). There is no error that ends it.
    pub async fn run(self, sink: impl FnMut(Message) -> ControlFlow<()>) -> Result<(), Error> {
        let Self { client, server, node, all_nodes, serving, counters } = self;
        let mut outlet = Outlet::new(sink, counters);
        let mut converter = Converter::new(node.clone());
        let doubt = || serving.map_or_else(Doubt::default, |serving| Doubt::of(serving.vips));
        let mut services = Tracker { doubt: doubt(), ..Tracker::default() };
        let mut slices = Tracker { doubt: doubt(), ..Tracker::default() };
        let mut nodes = Tracker { only: (!all_nodes).then(|| node.clone()), ..Tracker::default() };

        // What kube-proxy asks for: nothing of other proxies, nothing headless.
        let services_wanted =
            Config::default().labels("!service.kubernetes.io/service-proxy-name").fields("spec.clusterIP!=None");
        let slices_wanted = Config::default().labels("!service.kubernetes.io/headless");
        let nodes_wanted =
            if all_nodes { Config::default() } else { Config::default().fields(&format!("metadata.name={node}")) };
        let feeds = stream::select(
            feed(&client, &server, services_wanted, &services).map(Said::Service),
            stream::select(
                feed(&client, &server, slices_wanted, &slices).map(Said::Slice),
                feed(&client, &server, nodes_wanted, &nodes).map(Said::Node),
            ),
        );
        let mut feeds = std::pin::pin!(feeds);
        let mut synced = false;
        while !outlet.closed() {
            match feeds.next().await {
                Some(Said::Service(step)) => services.take(step, &mut converter, &mut outlet),
                Some(Said::Slice(step)) => slices.take(step, &mut converter, &mut outlet),
                Some(Said::Node(step)) => nodes.take(step, &mut converter, &mut outlet),
                None => break,
            }
            outlet.incomplete([&services, &slices, &nodes].iter().any(|tracker| !tracker.obscure.is_empty()));
            if !synced && services.listed && slices.listed && nodes.listed {
                synced = true;
                outlet.change(Change::Synced);
            }
        }
        Ok(())
    }
}

/// A step of one of the feeds.
#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
enum Said {
    Service(Step<wire::Service>),
    Slice(Step<wire::EndpointSlice>),
    Node(Step<wire::Node>),
}

fn feed<K: Object>(
    client: &Client,
    server: &str,
    wanted: Config,
    tracker: &Tracker,
) -> impl stream::Stream<Item = Step<K>> + use<K> {
    let (client, heard) = patience::patient(client.clone());
    let feed = Feed::new(Api::<K>::all(client), server.to_owned(), wanted, heard, tracker.doubt.again());
    stream::unfold(feed, |mut feed| async {
        let step = feed.next().await;
        Some((step, feed))
    })
}

/// The names of the objects of a kind that have been said: all that is needed to say which are gone.
#[derive(Debug, Default)]
struct Tracker {
    known: HashSet<ObjectName>,
    /// Objects that make no sense and are not known.
    obscure: HashSet<ObjectName>,
    /// While a list is being read: what was in it so far.
    seen: Option<HashSet<ObjectName>>,
    /// A list has been read to its end.
    listed: bool,
    /// Only the object of this name counts.
    only: Option<Arc<str>>,
    doubt: Doubt,
}

impl Tracker {
    fn take<K: Object, F: FnMut(Message) -> ControlFlow<()>>(
        &mut self,
        step: Step<K>,
        converter: &mut Converter,
        outlet: &mut Outlet<F>,
    ) {
        let watch = Subject::Watch(K::KIND);
        match step {
            Step::Failed(problem) => return outlet.error(watch, problem),
            Step::Event(watcher::Event::Init) => {
                self.seen = Some(HashSet::new());
                self.doubt.begin();
                return;
            }
            Step::Well => {}
            Step::Event(watcher::Event::InitApply(object) | watcher::Event::Apply(object)) => {
                self.apply(&object, converter, outlet);
            }
            Step::Event(watcher::Event::Delete(object)) => {
                if let Some(name) = Converter::name(object.meta()) {
                    self.gone(K::KIND, &name, converter, outlet);
                }
            }
            Step::Event(watcher::Event::InitDone) => {
                let seen = self.seen.take().unwrap_or_default();
                let gone: Vec<ObjectName> = self.known.difference(&seen).cloned().collect();
                let known_before = if self.listed { self.known.len() } else { 0 };
                if let Some(Lacking { before, left }) = self.doubt.end(known_before, gone.len()) {
                    let again = AGAIN.as_secs();
                    return outlet.error(
                        watch,
                        format!(
                            "the list has {left} where there were {before}: it is read again in {again} s before anything goes; if \
                             so much was deleted, nothing need be done"
                        ),
                    );
                }
                for name in gone {
                    self.gone(K::KIND, &name, converter, outlet);
                }
                // Objects that never were good enough to be known.
                self.obscure.retain(|name| seen.contains(name));
                outlet.forget(|subject| {
                    matches!((K::KIND, subject),
                        (Kind::Service, Subject::Service(name)) | (Kind::EndpointSlice, Subject::EndpointSlice(name))
                            if !seen.contains(name))
                });
                self.listed = true;
                outlet.listed();
            }
        }
        outlet.well(watch);
    }

    fn apply<K: Object, F: FnMut(Message) -> ControlFlow<()>>(
        &mut self,
        object: &K,
        converter: &mut Converter,
        outlet: &mut Outlet<F>,
    ) {
        let Some(name) = Converter::name(object.meta()) else { return };
        if self.only.as_ref().is_some_and(|only| **only != *name.name()) {
            return;
        }
        let Converted { outcome, mut problems } = object.convert(&name, converter);
        if let Some(seen) = &mut self.seen {
            seen.insert(name.clone());
        }
        match outcome {
            Outcome::Serve(change) => {
                self.known.insert(name.clone());
                self.obscure.remove(&name);
                if self.seen.is_some() {
                    self.doubt.take(&change);
                }
                outlet.change(change);
            }
            Outcome::Ignore => self.gone(K::KIND, &name, converter, outlet),
            Outcome::Broken => {
                let before = self.known.contains(&name);
                problems.push(consequence(before));
                if !before {
                    self.obscure.insert(name.clone());
                }
            }
        }
        outlet.problems(Subject::object(K::KIND, name), problems);
    }

    fn gone<F: FnMut(Message) -> ControlFlow<()>>(
        &mut self,
        kind: Kind,
        name: &ObjectName,
        converter: &Converter,
        outlet: &mut Outlet<F>,
    ) {
        let subject = Subject::object(kind, name.clone());
        self.obscure.remove(name);
        if self.known.remove(name)
            && let Some(gone) = converter.gone(subject.clone())
        {
            outlet.change(gone);
        }
        outlet.well(subject);
    }
}
