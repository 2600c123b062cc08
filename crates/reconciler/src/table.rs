//! The Service table: every Service with its EndpointSlices. It says which Services a change affects.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use foldhash::HashMap;
use litemap::LiteMap;
use service_watch::{Change, EndpointSlice, Node, ObjectName, Service};

use crate::bootstrap::API_SERVER;
use crate::last_known::LastKnown;
use crate::requested::RequestedAddresses;

/// A Service and its EndpointSlices, which may arrive in any order.
#[derive(Clone, Debug, Default)]
pub struct ServiceEntry {
    /// The Service, once it is known.
    pub service: Option<Arc<Service>>,
    /// Its slices by name, so that the result does not depend on the order in which they arrived.
    pub slices: LiteMap<ObjectName, EndpointSlice>,
    /// Those of the Service's external and load-balancer IPs that are addresses of pods of other Services.
    pub other_pods: Box<[IpAddr]>,
}

/// What must be recomputed after a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dirty {
    /// The contributions of these Services; of none if nothing changed.
    Services(Vec<ObjectName>),
    /// The contributions of all Services, since the node changed.
    Node,
    /// No contribution, but everything that the kernel holds is compared again.
    All,
}

/// Every Service and EndpointSlice, this Node and the addresses of the other Nodes.
#[derive(Clone, Debug, Default)]
pub struct ServiceTable {
    entries: HashMap<ObjectName, ServiceEntry>,
    /// The Service of each slice. A slice may move from one Service to another.
    owners: HashMap<ObjectName, ObjectName>,
    node: Option<Node>,
    /// The addresses of the other Nodes that are known.
    peer_nodes: HashMap<Arc<str>, Vec<IpAddr>>,
    /// Where this agent reaches the API server.
    api_server_addresses: BTreeSet<SocketAddr>,
    last_known: LastKnown,
    requested: RequestedAddresses,
    synced: bool,
    is_incomplete: bool,
}

impl ServiceTable {
    /// Applies a change and returns what must be recomputed: nothing for an object that did not change.
    pub fn apply(&mut self, change: Change) -> Dirty {
        let mut dirty = BTreeSet::new();
        match change {
            Change::Service(service) => {
                let entry = self.entries.entry(service.name.clone()).or_default();
                if entry.service.as_deref() != Some(&service) {
                    dirty.insert(service.name.clone());
                    self.requested.service_changed(&service.name, entry.service.as_deref(), Some(&service));
                    entry.service = Some(Arc::new(service));
                }
            }
            Change::ServiceDeleted(name) => {
                if let Some(entry) = self.entries.get_mut(&name)
                    && let Some(service) = entry.service.take()
                {
                    entry.other_pods = Box::default();
                    self.requested.service_changed(&name, Some(&service), None);
                    self.remove_if_empty(&name);
                    dirty.insert(name);
                }
            }
            Change::Slice(slice) => {
                let owner = slice.service.clone();
                if is_api_server(&slice.name) {
                    let is_owner = is_api_server(&owner);
                    let endpoints = slice.endpoints.iter().filter(|_| is_owner);
                    self.last_known.set_api_servers(endpoints.map(|endpoint| endpoint.address));
                }
                if let Some(before) = self.owners.insert(slice.name.clone(), owner.clone())
                    && before != owner
                {
                    self.remove_slice(&before, &slice.name);
                    dirty.insert(before);
                }
                let slices = &mut self.entries.entry(owner.clone()).or_default().slices;
                let before = slices.get(&slice.name);
                if before != Some(&slice) {
                    before.into_iter().chain([&slice]).for_each(|slice| self.requested.slice_changed(slice));
                    if slices.is_empty() {
                        // Mostly there is one slice. A vector would allocate room for four.
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
                    self.last_known.set_node(&node);
                    self.node = Some(node);
                    return Dirty::Node;
                }
            }
            // As if it had never been known, but for the owner of its addresses: what is programmed follows from the objects in
            // the API, not from their history.
            Change::NodeDeleted => {
                if self.node.take().is_some() {
                    return Dirty::Node;
                }
            }
            // Addresses that a Node lacks for a moment stay known: nobody else owns them.
            Change::PeerNode(name, addresses) if addresses.is_empty() && self.peer_nodes.contains_key(&name) => {}
            Change::PeerNode(name, addresses) => {
                if self.peer_nodes.get(&name) != Some(&addresses) {
                    self.peer_nodes.insert(name, addresses);
                    return Dirty::Node;
                }
            }
            Change::PeerNodeDeleted(name) => {
                if self.peer_nodes.remove(&name).is_some() {
                    return Dirty::Node;
                }
            }
            Change::ApiServerAddresses(addresses) => {
                if self.api_server_addresses != addresses {
                    self.api_server_addresses = addresses;
                    return Dirty::Node;
                }
            }
            Change::Incomplete(is_incomplete) => {
                let was_incomplete = std::mem::replace(&mut self.is_incomplete, is_incomplete);
                // What was retained for the missing objects may have to be deleted now.
                if was_incomplete && !is_incomplete {
                    return Dirty::All;
                }
            }
            Change::Synced => self.synced = true,
        }
        Dirty::Services(dirty.into_iter().collect())
    }

    /// Looks for pods at the external and load-balancer IPs of Services. Returns the Services of which the result has changed.
    pub fn refresh_pods(&mut self) -> Vec<ObjectName> {
        let mut changed = Vec::new();
        for name in self.requested.refresh(self.entries.iter()) {
            let Some(entry) = self.entries.get_mut(&name) else { continue };
            let service = entry.service.as_deref();
            let other_pods = service.map(|service| self.requested.of_other_pods(service)).unwrap_or_default();
            if entry.other_pods != other_pods {
                entry.other_pods = other_pods;
                changed.push(name);
            }
        }
        changed
    }

    /// A Service and its slices.
    pub fn get(&self, name: &ObjectName) -> Option<&ServiceEntry> {
        self.entries.get(name)
    }

    /// The names of all Services of which the Service or a slice is known.
    pub fn names(&self) -> impl Iterator<Item = &ObjectName> {
        self.entries.keys()
    }

    /// This Node, once it is known.
    pub fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    /// The addresses of this Node and of API servers, as they were known last.
    pub(crate) fn last_known(&self) -> &LastKnown {
        &self.last_known
    }

    /// The addresses of all other Nodes that are known.
    pub fn peer_node_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.peer_nodes.values().flatten().copied()
    }

    /// Where this agent reaches the API server; empty if Services do not come from one.
    pub fn api_server_addresses(&self) -> &BTreeSet<SocketAddr> {
        &self.api_server_addresses
    }

    /// Whether the initial list is complete.
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// Whether there are objects that have never been parsed. Then an object that is missing may not be taken as deleted.
    pub fn is_incomplete(&self) -> bool {
        self.is_incomplete
    }

    fn remove_slice(&mut self, owner: &ObjectName, slice: &ObjectName) {
        if let Some(entry) = self.entries.get_mut(owner) {
            if let Some(slice) = entry.slices.remove(slice) {
                self.requested.slice_changed(&slice);
            }
            self.remove_if_empty(owner);
        }
    }

    fn remove_if_empty(&mut self, name: &ObjectName) {
        if self.entries.get(name).is_some_and(|entry| entry.service.is_none() && entry.slices.is_empty()) {
            self.entries.remove(name);
        }
    }
}

/// Whether this is the name of the API server's Service, and of the slice that the API servers write themselves. Only that one counts,
/// since they overwrite it regularly: otherwise whoever may write slices in that namespace could declare any address an API server's.
fn is_api_server(name: &ObjectName) -> bool {
    (name.namespace(), name.name()) == API_SERVER
}
