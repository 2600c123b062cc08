//! Which of the external and load-balancer IPs of Services are addresses of pods, as far as endpoints say it: those that name a node.
//! Only addresses that a Service has are looked for, since there are few of them and many endpoints.

use std::collections::BTreeSet;
use std::net::IpAddr;

use foldhash::HashMap;
use service_watch::{EndpointSlice, ObjectName, Service};

use crate::table::ServiceEntry;

/// The external and load-balancer IPs of all Services, and the pods that have them.
#[derive(Clone, Debug, Default)]
pub(crate) struct RequestedAddresses {
    addresses: HashMap<IpAddr, Requested>,
    /// Services whose addresses have changed.
    changed: BTreeSet<ObjectName>,
    /// Whether the pods must be looked for again.
    is_stale: bool,
}

/// Who has an address.
#[derive(Clone, Debug, Default)]
struct Requested {
    /// The Services that request it.
    services: Vec<ObjectName>,
    /// The Services with an endpoint there that names a node; sorted.
    pods: Vec<ObjectName>,
}

impl RequestedAddresses {
    /// Records that a Service has changed.
    pub(crate) fn service_changed(&mut self, name: &ObjectName, before: Option<&Service>, after: Option<&Service>) {
        let (before, after) = (before.map(addresses), after.map(addresses));
        let (before, after) = (before.unwrap_or_default(), after.unwrap_or_default());
        if before == after {
            return;
        }
        for address in before.difference(&after) {
            if let Some(requested) = self.addresses.get_mut(address) {
                requested.services.retain(|service| service != name);
                if requested.services.is_empty() {
                    self.addresses.remove(address);
                }
            }
        }
        for address in after.difference(&before) {
            let requested = self.addresses.entry(*address).or_insert_with(|| {
                self.is_stale = true;
                Requested { services: Vec::with_capacity(1), pods: Vec::new() }
            });
            requested.services.push(name.clone());
        }
        self.changed.insert(name.clone());
    }

    /// Records that a slice was added, changed or deleted.
    pub(crate) fn slice_changed(&mut self, slice: &EndpointSlice) {
        let is_requested = |address: &IpAddr| self.addresses.contains_key(address);
        if !self.is_stale && !self.addresses.is_empty() {
            self.is_stale = pods(slice).any(|address| is_requested(&address));
        }
    }

    /// Looks for the pods again if anything has changed. Returns the Services whose addresses may now be of pods, or no longer.
    pub(crate) fn refresh<'a>(
        &mut self,
        entries: impl Iterator<Item = (&'a ObjectName, &'a ServiceEntry)>,
    ) -> BTreeSet<ObjectName> {
        let mut affected = std::mem::take(&mut self.changed);
        if std::mem::take(&mut self.is_stale) {
            let before: HashMap<IpAddr, Vec<ObjectName>> = self
                .addresses
                .iter_mut()
                .filter(|(_, requested)| !requested.pods.is_empty())
                .map(|(address, requested)| (*address, std::mem::take(&mut requested.pods)))
                .collect();
            for (service, entry) in entries {
                for address in entry.slices.values().flat_map(pods) {
                    if let Some(requested) = self.addresses.get_mut(&address)
                        && requested.pods.last() != Some(service)
                    {
                        requested.pods.push(service.clone());
                    }
                }
            }
            for (address, requested) in &mut self.addresses {
                requested.pods.sort_unstable();
                if before.get(address).map_or(&[][..], Vec::as_slice) != requested.pods {
                    affected.extend(requested.services.iter().cloned());
                }
            }
        }
        affected
    }

    /// The addresses of a Service that are addresses of pods of other Services.
    pub(crate) fn of_other_pods(&self, service: &Service) -> Box<[IpAddr]> {
        let is_of_others = |address: &IpAddr| {
            let pods = self.addresses.get(address).map(|requested| requested.pods.as_slice());
            pods.is_some_and(|pods| pods.iter().any(|pod| *pod != service.name))
        };
        addresses(service).into_iter().filter(is_of_others).collect()
    }
}

/// The external and load-balancer IPs of a Service.
fn addresses(service: &Service) -> BTreeSet<IpAddr> {
    service.external_ips.iter().chain(&service.load_balancer_ips).copied().collect()
}

/// The addresses of pods in a slice. An endpoint that names no node may be anything.
fn pods(slice: &EndpointSlice) -> impl Iterator<Item = IpAddr> {
    slice.endpoints.iter().filter(|endpoint| endpoint.node.is_some()).map(|endpoint| endpoint.address)
}
