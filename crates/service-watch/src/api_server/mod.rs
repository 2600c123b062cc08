//! A Kubernetes API server as a source.
//!
//! A [`Reflector`] for each kind lists and watches; here its events become changes, and objects that a new list lacks
//! become deletions.

mod addresses;
mod connect;
mod events;
mod limits;
mod mass_deletion;
mod reflector;

use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::sync::Arc;

use futures_util::stream::{self, StreamExt as _};
use kube::runtime::watcher::{self, Config};
use kube::{Api, Client};
use tokio::sync::watch;

use self::addresses::ServerAddresses;
pub use self::connect::Connection;
pub use self::events::{Event, EventObject, EventRecorder, EventType};
pub use self::mass_deletion::ExistingState;
use self::mass_deletion::{CONFIRMATION_DELAY, MassDeletion, MassDeletionCheck};
use self::reflector::{Reflector, ReflectorEvent};
use crate::convert::{Conversion, Converted, Converter, Object, invalid_object};
use crate::error::Error;
use crate::model::{Change, ObjectName};
use crate::report::{Counters, Emitter, Kind, Message, Subject};
use crate::wire;

/// Services, EndpointSlices and Nodes from an API server.
pub struct ApiServer {
    client: Client,
    server: String,
    /// The host and the port of the server's URL, to be looked up.
    name: Option<(String, u16)>,
    node: Arc<str>,
    all_nodes: bool,
    /// What the node already serves; `None` if mass deletions need no confirmation.
    existing: Option<ExistingState>,
    counters: Arc<Counters>,
}

impl fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiServer").field("server", &self.server).field("node", &self.node).finish_non_exhaustive()
    }
}

impl ApiServer {
    /// An API server as `connection` describes it; `node` is the name of this agent's Node.
    ///
    /// Reads files but sends no request: an unreachable server is reported and retried while the source runs.
    pub async fn connect(connection: &Connection, node: impl Into<Arc<str>>) -> Result<Self, Error> {
        let (client, server) = connect::client(connection, false).await?;
        let name = connect::host_and_port(&server);
        Ok(Self { name, ..Self::with_client(client, server, node) })
    }

    /// Whether [`connect`](Self::connect) would succeed and there would be credentials: if the kubeconfig names a program
    /// for them, it is run.
    pub async fn check(connection: &Connection) -> Result<(), Error> {
        connect::client(connection, true).await.map(drop)
    }

    /// An API server reached through `client`; messages call it `server`.
    pub fn with_client(client: Client, server: impl Into<String>, node: impl Into<Arc<str>>) -> Self {
        Self {
            client,
            server: server.into(),
            name: None,
            node: node.into(),
            all_nodes: false,
            existing: None,
            counters: Arc::default(),
        }
    }

    /// Whether to watch all Nodes, for [`Change::PeerNode`], instead of this agent's alone. This is expensive in a
    /// large cluster: each Node is written every few minutes, and each write goes to every watcher.
    #[must_use]
    pub fn watch_all_nodes(mut self, all: bool) -> Self {
        self.all_nodes = all;
        self
    }

    /// Confirms mass deletions: a list that lacks most of the known objects is read again, a few seconds later, before
    /// any of them is deleted. `existing` is what the node already serves.
    #[must_use]
    pub fn confirm_disappearance(mut self, existing: ExistingState) -> Self {
        self.existing = Some(existing);
        self
    }

    /// The client, for other requests to the API server.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// A recorder of Kubernetes Events, which reports as `kube-ipvs` on this Node. Must be called on a tokio runtime.
    pub fn event_recorder(&self) -> EventRecorder {
        EventRecorder::new(self.client.clone(), self.node.clone())
    }

    /// The address of the API server.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// The counters of this source.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// As [`Source::run`](crate::Source::run). Only a defect of the client library ends it.
    pub async fn run(self, sink: impl FnMut(Message) -> ControlFlow<()>) -> Result<(), Error> {
        let Self { client, server, name, node, all_nodes, existing, counters } = self;
        let mut emitter = Emitter::new(sink, counters);
        let mut converter = Converter::new(node.clone());
        let mass_deletion =
            || existing.map_or_else(MassDeletionCheck::default, |existing| MassDeletionCheck::new(existing.vips));
        let mut services = Tracker { mass_deletion: mass_deletion(), ..Tracker::default() };
        let mut slices = Tracker { mass_deletion: mass_deletion(), ..Tracker::default() };
        let mut nodes = Tracker {
            only_name: (!all_nodes).then(|| node.clone()),
            own_name: Some(node.clone()),
            mass_deletion: existing.map_or_else(MassDeletionCheck::default, MassDeletionCheck::for_nodes),
            ..Tracker::default()
        };
        let addresses = ServerAddresses::default();
        let mut new_addresses = addresses.subscribe();
        let lookups = addresses.clone();
        let mut lookups = std::pin::pin!(async move {
            match name {
                Some((host, port)) => lookups.follow_name(host, port).await,
                None => std::future::pending().await,
            }
        });

        // kube-proxy's selectors: no Services of other proxies, no headless ones.
        let services_config =
            Config::default().labels("!service.kubernetes.io/service-proxy-name").fields("spec.clusterIP!=None");
        let slices_config = Config::default().labels("!service.kubernetes.io/headless");
        let nodes_config =
            if all_nodes { Config::default() } else { Config::default().fields(&format!("metadata.name={node}")) };
        let events = stream::select(
            reflect(&client, &server, &addresses, services_config, &services).map(SourceEvent::Service),
            stream::select(
                reflect(&client, &server, &addresses, slices_config, &slices).map(SourceEvent::Slice),
                reflect(&client, &server, &addresses, nodes_config, &nodes).map(SourceEvent::Node),
            ),
        );
        let mut events = std::pin::pin!(events);
        let mut synced = false;
        while !emitter.is_closed() {
            let event = tokio::select! {
                // A new address is told before the objects that come from it.
                biased;
                Ok(()) = new_addresses.changed() => {
                    emitter.change(addresses_change(&mut new_addresses));
                    continue;
                }
                event = events.next() => event,
                () = &mut lookups => continue,
            };
            // The connection may have been made while the select waited for this event.
            if new_addresses.has_changed().unwrap_or(false) {
                emitter.change(addresses_change(&mut new_addresses));
            }
            match event {
                Some(
                    SourceEvent::Service(ReflectorEvent::ClientGone(problem))
                    | SourceEvent::Slice(ReflectorEvent::ClientGone(problem))
                    | SourceEvent::Node(ReflectorEvent::ClientGone(problem)),
                ) => return Err(Error::ClientGone { server, problem }),
                Some(SourceEvent::Service(event)) => services.handle(event, &mut converter, &mut emitter),
                Some(SourceEvent::Slice(event)) => slices.handle(event, &mut converter, &mut emitter),
                Some(SourceEvent::Node(event)) => nodes.handle(event, &mut converter, &mut emitter),
                None => break,
            }
            emitter.set_incomplete([&services, &slices, &nodes].iter().any(|tracker| !tracker.invalid.is_empty()));
            if !synced && services.has_synced && slices.has_synced && nodes.has_synced {
                synced = true;
                emitter.change(Change::Synced);
            }
        }
        Ok(())
    }
}

fn addresses_change(addresses: &mut watch::Receiver<VecDeque<SocketAddr>>) -> Change {
    Change::ApiServerAddresses(addresses.borrow_and_update().iter().copied().collect())
}

/// An event of one of the reflectors.
#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
enum SourceEvent {
    Service(ReflectorEvent<wire::Service>),
    Slice(ReflectorEvent<wire::EndpointSlice>),
    Node(ReflectorEvent<wire::Node>),
}

fn reflect<K: Object>(
    client: &Client,
    server: &str,
    addresses: &ServerAddresses,
    config: Config,
    tracker: &Tracker,
) -> impl stream::Stream<Item = ReflectorEvent<K>> + use<K> {
    let (client, responses) = limits::limited_client(client.clone(), addresses.clone());
    let reflector = Reflector::new(
        Api::<K>::all(client),
        server.to_owned(),
        config,
        responses,
        tracker.mass_deletion.relist_requested(),
    );
    stream::unfold(reflector, |mut reflector| async {
        let event = reflector.next().await;
        Some((event, reflector))
    })
}

/// The names of the known objects of a kind: enough to find which a new list lacks.
#[derive(Debug, Default)]
struct Tracker {
    known: HashSet<ObjectName>,
    /// Objects that are invalid as a whole and never were valid.
    invalid: HashSet<ObjectName>,
    /// While a list is being read: the names in it so far.
    current_list: Option<HashSet<ObjectName>>,
    /// Whether a list has been read to its end.
    has_synced: bool,
    /// If set, objects of other names are ignored.
    only_name: Option<Arc<str>>,
    /// If set, the object of this name is not deleted in ordinary operation.
    own_name: Option<Arc<str>>,
    mass_deletion: MassDeletionCheck,
}

impl Tracker {
    fn handle<K: Object, F: FnMut(Message) -> ControlFlow<()>>(
        &mut self,
        event: ReflectorEvent<K>,
        converter: &mut Converter,
        emitter: &mut Emitter<F>,
    ) {
        let watch = Subject::Watch(K::KIND);
        match event {
            ReflectorEvent::Failed(problem) => return emitter.error(watch, problem),
            ReflectorEvent::Event(watcher::Event::Init) => {
                self.current_list = Some(HashSet::new());
                self.mass_deletion.begin_list();
                return;
            }
            ReflectorEvent::Recovered | ReflectorEvent::ClientGone(_) => {}
            ReflectorEvent::Event(watcher::Event::InitApply(object) | watcher::Event::Apply(object)) => {
                self.apply(&object, converter, emitter);
            }
            ReflectorEvent::Event(watcher::Event::Delete(object)) => {
                if let Some(name) = Converter::object_name(object.meta()) {
                    if self.is_own(&name) && self.known.contains(&name) && self.mass_deletion.doubts_deletion() {
                        return emitter.error(watch, own_node_missing("the API server says that it was deleted"));
                    }
                    self.delete(K::KIND, &name, converter, emitter);
                }
            }
            ReflectorEvent::Event(watcher::Event::InitDone) => {
                let seen = self.current_list.take().unwrap_or_default();
                if self.own_name.is_some() && !seen.iter().any(|name| self.is_own(name)) {
                    let has_been_there = self.known.iter().any(|name| self.is_own(name));
                    if self.mass_deletion.doubts_absence(has_been_there) {
                        return emitter.error(watch, own_node_missing("the list lacks it"));
                    }
                }
                let deleted: Vec<ObjectName> = self.known.difference(&seen).cloned().collect();
                let known_before = if self.has_synced { self.known.len() } else { 0 };
                if let Some(MassDeletion { before, remaining }) = self.mass_deletion.finish(known_before, deleted.len())
                {
                    let again = CONFIRMATION_DELAY.as_secs();
                    return emitter.error(
                        watch,
                        format!(
                            "the list has {remaining} entries where there were {before}: it is read again in {again} s before anything is deleted; \
                             if so many were deleted on purpose, nothing need be done"
                        ),
                    );
                }
                for name in deleted {
                    self.delete(K::KIND, &name, converter, emitter);
                }
                // Objects that never were valid.
                self.invalid.retain(|name| seen.contains(name));
                emitter.resolve_matching(|subject| {
                    matches!((K::KIND, subject),
                        (Kind::Service, Subject::Service(name)) | (Kind::EndpointSlice, Subject::EndpointSlice(name))
                            if !seen.contains(name))
                });
                self.has_synced = true;
                emitter.count_list();
            }
        }
        emitter.resolve(watch);
    }

    fn is_own(&self, name: &ObjectName) -> bool {
        self.own_name.as_ref().is_some_and(|own| **own == *name.name())
    }

    fn apply<K: Object, F: FnMut(Message) -> ControlFlow<()>>(
        &mut self,
        object: &K,
        converter: &mut Converter,
        emitter: &mut Emitter<F>,
    ) {
        let Some(name) = Converter::object_name(object.meta()) else { return };
        if self.only_name.as_ref().is_some_and(|only| **only != *name.name()) {
            return;
        }
        let Converted { conversion, mut problems } = object.convert(&name, converter);
        if let Some(seen) = &mut self.current_list {
            seen.insert(name.clone());
        }
        match conversion {
            Conversion::Serve(change) => {
                self.known.insert(name.clone());
                self.invalid.remove(&name);
                if self.current_list.is_some() {
                    self.mass_deletion.count(&change);
                }
                emitter.change(change);
            }
            Conversion::Ignore => self.delete(K::KIND, &name, converter, emitter),
            Conversion::Invalid => {
                let before = self.known.contains(&name);
                problems.push(invalid_object(before));
                if !before {
                    self.invalid.insert(name.clone());
                }
            }
        }
        emitter.problems(Subject::object(K::KIND, name), problems);
    }

    fn delete<F: FnMut(Message) -> ControlFlow<()>>(
        &mut self,
        kind: Kind,
        name: &ObjectName,
        converter: &Converter,
        emitter: &mut Emitter<F>,
    ) {
        let subject = Subject::object(kind, name.clone());
        self.invalid.remove(name);
        if self.known.remove(name)
            && let Some(deleted) = converter.deletion(subject.clone())
        {
            emitter.change(deleted);
        }
        emitter.resolve(subject);
    }
}

/// The problem to report if the Node of this agent disappears while the agent runs on it.
fn own_node_missing(how: &str) -> String {
    let again = CONFIRMATION_DELAY.as_secs();
    format!(
        "this agent's Node has disappeared, {how}: the list is read again in {again} s before the Node is treated as deleted; check that \
         the kubelet registers it, and that --hostname-override is its name"
    )
}
