//! The schedule of draining real servers: how many there are, when they are checked, and when their time is over. ([`crate::diff`]
//! decides which drain.)

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use service_watch::ObjectName;

use super::Reconciler;
use crate::backoff::Backoff;
use crate::front_end::FrontEnd;
use crate::kernel::Kernel;
use crate::plan::Key;
use crate::real_servers::{RealServerAddress, real_server_address};

/// The delay before draining real servers are checked for the first time. kube-proxy checks once a minute; most are idle much
/// sooner.
const FIRST_CHECK: Duration = Duration::from_millis(100);

#[derive(Debug)]
struct DrainingServer {
    backoff: Backoff,
    /// How many of its real servers drain.
    count: usize,
}

/// The virtual servers with real servers that drain. There may be thousands, for hours: each sync gets its answers without
/// iterating over them.
#[derive(Debug, Default)]
pub(super) struct Draining {
    servers: BTreeMap<FrontEnd, DrainingServer>,
    /// The same, by the time of the next check.
    by_due_time: BTreeSet<(Instant, FrontEnd)>,
    /// How many real servers drain in all.
    count: usize,
}

impl Draining {
    pub(super) fn contains(&self, front_end: &FrontEnd) -> bool {
        self.servers.contains_key(front_end)
    }

    fn backoff(&self, front_end: &FrontEnd) -> Option<&Backoff> {
        self.servers.get(front_end).map(|server| &server.backoff)
    }

    /// Sets the time of the next check. The number of draining real servers stays; it starts at 0.
    fn insert(&mut self, front_end: FrontEnd, backoff: Backoff) {
        let count = self.remove_server(&front_end);
        self.by_due_time.insert((backoff.due, front_end));
        self.servers.insert(front_end, DrainingServer { backoff, count });
    }

    fn remove(&mut self, front_end: &FrontEnd) {
        self.count -= self.remove_server(front_end);
    }

    /// Sets how many real servers of a virtual server drain, if it is here.
    fn set_count(&mut self, front_end: &FrontEnd, count: usize) {
        if let Some(server) = self.servers.get_mut(front_end) {
            self.count = self.count - server.count + count;
            server.count = count;
        }
    }

    /// How many real servers drain in all.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn front_ends(&self) -> impl Iterator<Item = &FrontEnd> {
        self.servers.keys()
    }

    /// The virtual servers whose check is due.
    pub(super) fn due(&self, now: Instant) -> impl Iterator<Item = FrontEnd> {
        self.by_due_time.iter().take_while(move |(due, _)| *due <= now).map(|(_, front_end)| *front_end)
    }

    /// When the next check is due.
    pub(super) fn next_check(&self) -> Option<Instant> {
        self.by_due_time.first().map(|(due, _)| *due)
    }

    /// Removes a virtual server and returns its count, which stays in the sum.
    fn remove_server(&mut self, front_end: &FrontEnd) -> usize {
        let Some(DrainingServer { backoff, count }) = self.servers.remove(front_end) else { return 0 };
        self.by_due_time.remove(&(backoff.due, *front_end));
        count
    }
}

impl<K: Kernel> Reconciler<K> {
    /// Sets when a virtual server is checked again: soon after it began to drain, then after growing delays, but not later than
    /// its drain timeout.
    pub(super) fn schedule_drain_check(
        &mut self,
        front_end: FrontEnd,
        is_draining: bool,
        has_begun: bool,
        now: Instant,
    ) {
        if !is_draining {
            self.draining.remove(&front_end);
            self.drain_since.remove(&front_end);
            return;
        }
        // If the kernel refused to set the weight to 0, draining has not begun, and an early check would not help.
        let has_begun = has_begun && !self.retries.contains_key(&Key::VirtualServer(front_end));
        let backoff = match self.draining.backoff(&front_end) {
            Some(backoff) if !has_begun && backoff.due > now => backoff.clone(),
            Some(backoff) if !has_begun => backoff.next(now),
            _ => Backoff::new(FIRST_CHECK, now),
        };
        let end = self.policy.drain_timeout.and_then(|timeout| self.drain_end(front_end, timeout, now));
        let due = end.map_or(backoff.due, |end| end.clamp(now, backoff.due));
        self.draining.insert(front_end, Backoff { due, ..backoff });
    }

    /// Counts the draining real servers of keys where something may have changed.
    pub(super) fn count_draining(&mut self, keys: &BTreeSet<Key>) {
        for key in keys {
            if let Key::VirtualServer(front_end) = key
                && self.draining.contains(front_end)
            {
                let count = self.unwanted_count(front_end);
                self.draining.set_count(front_end, count);
            }
        }
    }

    /// How many real servers a virtual server has that are not wanted.
    pub(super) fn unwanted_count(&self, front_end: &FrontEnd) -> usize {
        let Some(held) = self.mirror.as_ref().and_then(|mirror| mirror.server(front_end)) else { return 0 };
        let wanted = self.desired.real_servers(front_end);
        held.real_servers.addresses().iter().filter(|address| wanted.binary_search(address).is_err()).count()
    }

    /// Records since when the real servers of a front end drain whose endpoint is gone or terminating, and returns when the first of
    /// them reaches the timeout.
    fn drain_end(&mut self, front_end: FrontEnd, timeout: Duration, now: Instant) -> Option<Instant> {
        let held = self.mirror.as_ref()?.server(&front_end)?;
        let wanted = self.desired.real_servers(&front_end);
        let before = self.drain_since.remove(&front_end).unwrap_or_default();
        let unwanted = held.real_servers.addresses().iter().filter(|address| wanted.binary_search(address).is_err());
        let unwanted: Vec<RealServerAddress> = unwanted.copied().collect();
        let living = self.living_endpoints(&front_end, &unwanted);
        let since: BTreeMap<SocketAddr, Instant> = unwanted
            .into_iter()
            .filter(|address| !living.contains(address))
            .map(SocketAddr::from)
            .map(|address| (address, before.get(&address).copied().unwrap_or(now)))
            .collect();
        let first = since.values().min().map(|since| *since + timeout);
        self.drain_since.insert(front_end, since);
        first
    }

    /// Those of some real servers whose endpoint exists and is not terminating: it is not ready, or other endpoints are preferred. The
    /// addresses are sorted.
    fn living_endpoints(&self, front_end: &FrontEnd, addresses: &[RealServerAddress]) -> BTreeSet<RealServerAddress> {
        let entry = self.desired.owner(front_end).and_then(|owner| self.table.get(owner));
        let mut living = BTreeSet::new();
        for slice in entry.into_iter().flat_map(|entry| entry.slices.values()) {
            let of_protocol = slice.ports.iter().filter(|port| port.protocol == front_end.protocol);
            let ports: BTreeSet<u16> = of_protocol.map(|port| port.port.get()).collect();
            for endpoint in slice.endpoints.iter().filter(|endpoint| !endpoint.terminating) {
                let first = addresses.partition_point(|(ip, _)| *ip < endpoint.address);
                let same = addresses[first..].iter().take_while(|(ip, _)| *ip == endpoint.address);
                living.extend(same.filter(|(_, port)| ports.contains(port)));
            }
        }
        living
    }

    /// After the endpoints of a Service have changed: forgets the time of those that live again, and returns the front ends where the
    /// time of others may begin.
    pub(super) fn update_drains(&mut self, service: &ObjectName) -> Vec<Key> {
        if self.policy.drain_timeout.is_none() || self.draining.servers.is_empty() {
            return Vec::new();
        }
        let front_ends = self.desired.contribution(service).into_iter().flat_map(|it| it.servers.keys());
        let draining: Vec<FrontEnd> = front_ends.filter(|it| self.draining.contains(it)).copied().collect();
        for front_end in &draining {
            let Some(since) = self.drain_since.get(front_end) else { continue };
            let mut addresses: Vec<_> = since.keys().copied().map(real_server_address).collect();
            addresses.sort_unstable();
            let living = self.living_endpoints(front_end, &addresses);
            if let Some(since) = self.drain_since.get_mut(front_end) {
                since.retain(|address, _| !living.contains(&real_server_address(*address)));
            }
        }
        draining.into_iter().map(Key::VirtualServer).collect()
    }

    /// Whether a real server has drained for as long as the timeout allows.
    pub(super) fn is_overdue(&self, front_end: &FrontEnd, address: SocketAddr, now: Instant) -> bool {
        let since = self.drain_since.get(front_end).and_then(|since| since.get(&address));
        self.policy.drain_timeout.zip(since).is_some_and(|(timeout, since)| now >= *since + timeout)
    }
}
