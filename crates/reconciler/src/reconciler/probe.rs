//! Looks whether what this program wrote is still there, without reading everything: IPVS tells nobody when another program
//! changes its tables.

use std::net::IpAddr;

use ipnet::IpNet;

use super::Reconciler;
use crate::front_end::FrontEnd;
use crate::kernel::{Kernel, Scope};

/// How many virtual servers a probe reads. One would do to find that all were deleted (`ipvsadm -C`).
const SERVERS_PER_PROBE: usize = 4;

impl<K: Kernel> Reconciler<K> {
    /// Reads some virtual servers, others each time. Returns whether one differs from what this program wrote, or cannot be read.
    pub fn probe(&mut self) -> bool {
        let Some(mirror) = &self.mirror else { return false };
        if self.to_probe.is_empty() {
            self.to_probe.extend(mirror.front_ends().filter(|front_end| mirror.is_owned(front_end)));
        }
        let from = self.to_probe.len().saturating_sub(SERVERS_PER_PROBE);
        let mut front_ends = self.to_probe.split_off(from);
        front_ends.retain(|front_end| mirror.server(front_end).is_some());
        if front_ends.is_empty() {
            return false;
        }
        let Ok(observed) = self.kernel.dump(Scope::ServerConfigs(&front_ends)) else { return true };
        let is_unchanged = |front_end: &FrontEnd| {
            let held = mirror.server(front_end).map(|server| server.config);
            held == observed.servers.iter().find(|server| server.front_end == *front_end).map(|server| server.config)
        };
        !front_ends.iter().all(is_unchanged)
    }

    /// Whether one of these addresses is on `kube-ipvs0` as far as this program knows. If it was just deleted, another program did it.
    pub fn has_bound_any(&self, addresses: &[IpAddr]) -> bool {
        self.mirror.iter().any(|mirror| addresses.iter().any(|address| mirror.has_address(*address)))
    }

    /// The same for local routes to `kube-ipvs0`.
    pub fn has_routed_any(&self, ranges: &[IpNet]) -> bool {
        self.mirror.iter().any(|mirror| ranges.iter().any(|range| mirror.has_route(range)))
    }
}
