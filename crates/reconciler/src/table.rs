//! The Service table: every Service with its EndpointSlices, and which Services a change concerns.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use foldhash::HashMap;
use litemap::LiteMap;
use service_watch::{Change, EndpointSlice, Node, ObjectName, Service};

/// A Service and the slices that name it. Either may come first.
#[derive(Clone, Debug, Default)]
pub struct ServiceEntry {
    /// The Service, once it is known.
    pub service: Option<Arc<Service>>,
    /// Its slices by name, so that what follows from them does not depend on the order they came in.
    pub slices: LiteMap<ObjectName, EndpointSlice>,
}

/// What a change makes necessary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dirty {
    /// The contributions of these Services; none, where nothing changed.
    Services(Vec<ObjectName>),
    /// Those of all Services: the node itself changed.
    Node,
    /// Everything in the kernel must be looked at.
    All,
}

/// Every Service and EndpointSlice, and the own Node.
#[derive(Clone, Debug, Default)]
pub struct ServiceTable {
    entries: HashMap<ObjectName, ServiceEntry>,
    /// Which Service a slice belongs to: a slice may move from one to another.
    owners: HashMap<ObjectName, ObjectName>,
    node: Option<Node>,
    /// The addresses of the other Nodes that are known.
    neighbours: HashMap<Arc<str>, Vec<IpAddr>>,
    synced: bool,
    is_incomplete: bool,
}

impl ServiceTable {
    /// Takes in a change and says what it makes dirty. An object that did not change makes nothing dirty.
    pub fn apply(&mut self, change: Change) -> Dirty {
        let mut dirty = BTreeSet::new();
        match change {
            Change::Service(service) => {
                let entry = self.entries.entry(service.name.clone()).or_default();
                if entry.service.as_deref() != Some(&service) {
                    dirty.insert(service.name.clone());
                    entry.service = Some(Arc::new(service));
                }
            }
            Change::ServiceDeleted(name) => {
                if let Some(entry) = self.entries.get_mut(&name)
                    && entry.service.take().is_some()
                {
                    self.forget_if_empty(&name);
                    dirty.insert(name);
                }
            }
            Change::Slice(slice) => {
                let owner = slice.service.clone();
                if let Some(before) = self.owners.insert(slice.name.clone(), owner.clone())
                    && before != owner
                {
                    self.remove_slice(&before, &slice.name);
                    dirty.insert(before);
                }
                let slices = &mut self.entries.entry(owner.clone()).or_default().slices;
                if slices.get(&slice.name) != Some(&slice) {
                    if slices.is_empty() {
                        // Mostly there is one; by itself a vector would begin with room for four.
                        *slices = LiteMap::with_capacity(1);
                    }
                    slices.insert(slice.name.clone(), slice);
                    dirty.insert(owner);
                }
            }
            Change::SliceDeleted(name) => {
                if let Some(owner) = self.owners.remove(&name) {
                    self.remove_slice(&owner, &name);
                    dirty.insert(owner);
                }
            }
            Change::Node(node) => {
                if self.node.as_ref() != Some(&node) {
                    self.node = Some(node);
                    return Dirty::Node;
                }
            }
            // As if it had never been known: what is programmed follows from what the API holds, not from its history.
            Change::NodeDeleted => {
                if self.node.take().is_some() {
                    return Dirty::Node;
                }
            }
            Change::PeerNode(name, addresses) => {
                if self.neighbours.get(&name) != Some(&addresses) {
                    self.neighbours.insert(name, addresses);
                    return Dirty::Node;
                }
            }
            Change::PeerNodeDeleted(name) => {
                if self.neighbours.remove(&name).is_some() {
                    return Dirty::Node;
                }
            }
            Change::Incomplete(is_incomplete) => {
                let was_incomplete = std::mem::replace(&mut self.is_incomplete, is_incomplete);
                // What was kept for its sake may have to go now.
                if was_incomplete && !is_incomplete {
                    return Dirty::All;
                }
            }
            Change::Synced => self.synced = true,
        }
        Dirty::Services(dirty.into_iter().collect())
    }

    /// A Service and its slices.
    pub fn get(&self, name: &ObjectName) -> Option<&ServiceEntry> {
        self.entries.get(name)
    }

    /// The names of all that has a Service or a slice.
    pub fn names(&self) -> impl Iterator<Item = &ObjectName> {
        self.entries.keys()
    }

    /// The own Node, once it is known.
    pub fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    /// The addresses of all other Nodes that are known.
    pub fn peer_node_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.neighbours.values().flatten().copied()
    }

    /// Whether all that existed at the start is in the table.
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// Whether there is something nobody could understand yet: then nothing may be taken for gone.
    pub fn is_incomplete(&self) -> bool {
        self.is_incomplete
    }

    fn remove_slice(&mut self, owner: &ObjectName, slice: &ObjectName) {
        if let Some(entry) = self.entries.get_mut(owner) {
            entry.slices.remove(slice);
            self.forget_if_empty(owner);
        }
    }

    fn forget_if_empty(&mut self, name: &ObjectName) {
        if self.entries.get(name).is_some_and(|entry| entry.service.is_none() && entry.slices.is_empty()) {
            self.entries.remove(name);
        }
    }
}
