//! Bootstrap Services, which are programmed before the initial list of Services is complete.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Instant;

use service_watch::{ObjectName, Protocol};

use super::{PlanReason, Reconciler};
use crate::binding;
use crate::bootstrap::{allocated_part, is_bootstrap_service};
use crate::front_end::FrontEnd;
use crate::kernel::{Kernel, KernelError};
use crate::plan::Key;
use crate::report::{OperationCounts, SyncReport};

/// What is done before the initial list is complete.
#[derive(Debug, Default)]
pub(super) struct Bootstrap {
    /// Bootstrap Services that changed.
    changed: BTreeSet<ObjectName>,
    /// The addresses of the API server that were last looked at.
    released: BTreeSet<SocketAddr>,
    /// Whether everything was read from the kernel. The first audit then compares with that dump.
    pub(super) is_read: bool,
    /// The operations that were carried out.
    pub(super) applied: OperationCounts,
}

impl<K: Kernel> Reconciler<K> {
    /// Programs the ClusterIPs of the API server and DNS while the initial list is incomplete, which takes its time in a large
    /// cluster. Nothing is deleted, since what is missing may still be listed. Nothing that a Service requests is served, since who
    /// owns it is not known yet. `None` if there is nothing to do.
    pub fn sync_bootstrap(&mut self, now: Instant) -> Result<Option<SyncReport>, KernelError> {
        if self.is_ready() || self.table.node().is_none() || self.is_missing_node_data() {
            return Ok(None);
        }
        let has_endpoints = |name: &ObjectName| {
            let entry = self.table.get(name).filter(|entry| entry.service.is_some());
            entry.is_some_and(|entry| entry.slices.values().any(|slice| slice.endpoints.iter().any(|it| it.ready)))
        };
        let names: BTreeSet<ObjectName> =
            self.bootstrap.changed.iter().filter(|name| has_endpoints(name)).cloned().collect();
        if names.is_empty() {
            return Ok(None);
        }
        self.bootstrap.changed.retain(|name| !names.contains(name));
        if self.mirror.is_none() {
            self.read_all()?;
            self.bootstrap.is_read = true;
        }
        self.update_node();
        if !self.can_bootstrap() {
            return Ok(None);
        }
        let mut report = SyncReport { applied: self.bootstrap.applied, ..SyncReport::default() };
        // The first audit computes them in full, because they are still among the Services that changed.
        for name in &names {
            let Some(part) = self.table.get(name).map(allocated_part) else { continue };
            let Some(contribution) = self.compute(name, &part) else { continue };
            self.contribute(name, part.service.as_deref(), contribution, false, &mut report);
        }
        let mut keys = std::mem::take(&mut self.dirty_keys);
        keys.extend(self.table_keys().chain([Key::Device]).chain(self.range_keys()));
        self.execute(keys, PlanReason::Dump, now, &mut report);
        self.bootstrap.applied = report.applied;
        Ok(Some(report))
    }

    /// Unbinds addresses of the API server at whose port there is no virtual server, while the initial list is incomplete. An address
    /// that was bound for another port cuts this node off from the API server, so the list would never arrive. `None` if there is
    /// nothing to do.
    pub fn release_api_server(&mut self, now: Instant) -> Result<Option<SyncReport>, KernelError> {
        if self.is_ready() || self.bootstrap.released == *self.table.api_server_addresses() {
            return Ok(None);
        }
        if self.mirror.is_none() {
            self.read_all()?;
            self.bootstrap.is_read = true;
        }
        self.bootstrap.released.clone_from(self.table.api_server_addresses());
        let Some(mirror) = &self.mirror else { return Ok(None) };
        let is_cut_off = |address: &&SocketAddr| {
            let (ip, port) = (address.ip(), address.port());
            let is_bound = mirror.has_host_address(ip) || mirror.has_route(&binding::host_range(ip));
            let server = FrontEnd { address: ip, port, protocol: Protocol::Tcp };
            is_bound && mirror.server(&server).is_none() && !self.desired.wants_vip(ip)
        };
        let addresses = self.bootstrap.released.iter().filter(is_cut_off);
        let keys: BTreeSet<Key> = addresses.map(|address| Key::Vip(address.ip())).collect();
        if keys.is_empty() {
            return Ok(None);
        }
        let mut report = SyncReport { applied: self.bootstrap.applied, ..SyncReport::default() };
        self.execute(keys, PlanReason::Change, now, &mut report);
        self.bootstrap.applied = report.applied;
        Ok(Some(report))
    }

    /// Records which of some changed Services are bootstrap Services.
    pub(super) fn note_bootstrap_services(&mut self, names: &[ObjectName]) {
        let bootstrap: Vec<_> = names.iter().filter(|name| self.is_bootstrap_name(name)).cloned().collect();
        self.bootstrap.changed.extend(bootstrap);
    }

    /// Whether one Service can be programmed before the others are known: on a node without virtual servers, or if the tables
    /// are up to date. Tables that are missing beside virtual servers are built with all their elements at once: with fewer, a
    /// guarded range would refuse connections to the other Services.
    fn can_bootstrap(&self) -> bool {
        let Some(mirror) = &self.mirror else { return false };
        self.rulesets.iter().all(|ruleset| match mirror.ruleset(ruleset.family()) {
            None => !mirror.has_servers(),
            held => held == Some(ruleset.fingerprint()),
        })
    }

    pub(super) fn is_bootstrap_name(&self, name: &ObjectName) -> bool {
        let service = self.table.get(name).and_then(|entry| entry.service.as_ref());
        service.is_some_and(|service| is_bootstrap_service(service))
    }

    /// Whether a bootstrap Service depends on a key.
    pub(super) fn is_bootstrap_key(&self, key: &Key) -> bool {
        let is_bootstrap_name = |name: &ObjectName| self.is_bootstrap_name(name);
        match key {
            Key::Device | Key::Table(_) => true,
            Key::VipRange(range) => self.policy.binding.ranges().contains(range),
            Key::SourceRanges(service, _) => is_bootstrap_name(service),
            Key::VirtualServer(front_end) => self.desired.owner(front_end).is_some_and(is_bootstrap_name),
            Key::Vip(address) => self.desired.claimants(*address).any(is_bootstrap_name),
            Key::SetElement(_) | Key::Flows(_) => false,
        }
    }
}
