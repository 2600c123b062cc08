//! What one Service wants of the node: a pure function of the Service, its slices, the node and the policy.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;

use ipvs_netlink::{Family, Netmask};
use service_watch::{Endpoint, Service, ServiceKind, ServicePort, TrafficPolicy};

use crate::node::NodeView;
use crate::plan::{FrontEnd, ServerConfig};
use crate::policy::Policy;
use crate::table::Entry;

/// A virtual server with its real servers, each of weight 1 and reached by masquerading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedServer {
    /// The virtual server, beside its front end.
    pub config: ServerConfig,
    /// Addresses of the real servers, sorted. Front ends of one Service port mostly share them.
    pub real_servers: Arc<[SocketAddr]>,
}

/// What a Service wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contribution {
    /// Virtual servers by front end.
    pub servers: BTreeMap<FrontEnd, WantedServer>,
    /// VIPs to be bound to `kube-ipvs0`, sorted, each once.
    pub addresses: Vec<IpAddr>,
}

impl Contribution {
    /// Computes it. A Service that is not known wants nothing.
    pub fn of(entry: &Entry, node: &NodeView, policy: &Policy) -> Self {
        let mut contribution = Self::default();
        if let Some(service) = &entry.service {
            // The two families never meet: each has its own front ends, endpoints, hints and fallbacks.
            for family in policy.families.iter() {
                let cluster_ips = of_family(&service.cluster_ips, family);
                if let Some(cluster_ip) = cluster_ips.first() {
                    for port in &service.ports {
                        let endpoints = endpoints(entry, port, family, policy);
                        contribution.add_port(service, port, *cluster_ip, &endpoints, node, policy);
                    }
                }
            }
        }
        contribution.addresses.sort_unstable();
        contribution.addresses.dedup();
        contribution
    }

    fn add_port(
        &mut self,
        service: &Service,
        port: &ServicePort,
        cluster_ip: IpAddr,
        endpoints: &[Candidate<'_>],
        node: &NodeView,
        policy: &Policy,
    ) {
        let family = Family::of(cluster_ip);
        let external: Vec<IpAddr> = if policy.external_ips { of_family(&service.external_ips, family) } else { vec![] };
        let load_balancer = of_family(&service.load_balancer_ips, family);
        let is_external = !external.is_empty() || !load_balancer.is_empty() || port.node_port.is_some();
        let internal_local = service.internal_policy == TrafficPolicy::Local;
        let external_local = external_policy_is_local(service);

        let uses_cluster = !internal_local || is_external;
        let uses_local = internal_local || (is_external && external_local);
        let cluster: Arc<[SocketAddr]> =
            if uses_cluster { for_cluster(endpoints, node, policy).into() } else { Arc::default() };
        // Without a local endpoint the Local policy falls back to what the cluster set holds.
        let local = uses_local.then(|| for_local(endpoints)).filter(|local| !local.is_empty());
        let local: Arc<[SocketAddr]> = local.map_or_else(|| cluster.clone(), Into::into);

        let mut add = |address: IpAddr, port_number: NonZeroU16, is_local: bool| {
            let front_end = FrontEnd { address, port: port_number.get(), protocol: port.protocol };
            self.servers.entry(front_end).or_insert_with(|| WantedServer {
                config: ServerConfig {
                    scheduler: policy.scheduler,
                    scheduler_flags: policy.scheduler_flags(),
                    persistence_timeout: service.affinity_seconds,
                    netmask: Netmask::host(family),
                    one_packet: false,
                },
                real_servers: if is_local { local.clone() } else { cluster.clone() },
            });
        };
        add(cluster_ip, port.port, internal_local);
        self.addresses.push(cluster_ip);
        for vip in external.into_iter().chain(load_balancer) {
            add(vip, port.port, external_local);
            // A VIP that another interface has is reachable as it is.
            if !node.local.contains(&vip) {
                self.addresses.push(vip);
            }
        }
        if let Some(node_port) = port.node_port {
            for address in node.node_ports.iter().filter(|address| Family::of(**address) == family) {
                add(*address, node_port, external_local);
            }
        }
    }
}

/// `externalTrafficPolicy` means something only where the Service is reachable from outside, of whichever family.
fn external_policy_is_local(service: &Service) -> bool {
    service.external_policy == TrafficPolicy::Local
        && (service.kind != ServiceKind::ClusterIp || !service.external_ips.is_empty())
}

fn of_family(addresses: &[IpAddr], family: Family) -> Vec<IpAddr> {
    addresses.iter().copied().filter(|address| Family::of(*address) == family).collect()
}

/// An endpoint of one Service port.
struct Candidate<'a> {
    address: SocketAddr,
    endpoint: &'a Endpoint,
    is_local: bool,
}

/// The endpoints of a Service port over all slices: those of a slice port of the same name and protocol, sorted.
///
/// Where several slices hold the same address, one that is not terminating beats one that is; among equals the last
/// slice by name counts.
fn endpoints<'a>(entry: &'a Entry, port: &ServicePort, family: Family, policy: &Policy) -> Vec<Candidate<'a>> {
    let mut merged: BTreeMap<SocketAddr, &Endpoint> = BTreeMap::new();
    for slice in entry.slices.values() {
        for slice_port in slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol) {
            for endpoint in slice.endpoints.iter().filter(|endpoint| Family::of(endpoint.address) == family) {
                let address = SocketAddr::new(endpoint.address, slice_port.port.get());
                merged
                    .entry(address)
                    .and_modify(|held| {
                        if !endpoint.terminating {
                            *held = endpoint;
                        }
                    })
                    .or_insert(endpoint);
            }
        }
    }
    merged
        .into_iter()
        .map(|(address, endpoint)| Candidate {
            address,
            endpoint,
            is_local: endpoint.node.as_deref() == Some(policy.node_name.as_str()),
        })
        .collect()
}

/// Ready endpoints, as hints choose them; where none is ready, those that still serve while terminating.
fn for_cluster(endpoints: &[Candidate<'_>], node: &NodeView, policy: &Policy) -> Vec<SocketAddr> {
    let ready: Vec<&Candidate<'_>> = endpoints.iter().filter(|candidate| candidate.endpoint.ready).collect();
    if ready.is_empty() {
        return addresses(endpoints.iter().filter(|candidate| is_draining(candidate)));
    }
    let hinted = |names_us: &dyn Fn(&Endpoint) -> bool| {
        let chosen = addresses(ready.iter().copied().filter(|candidate| names_us(candidate.endpoint)));
        (!chosen.is_empty()).then_some(chosen)
    };
    let all = |has_hint: fn(&Endpoint) -> bool| ready.iter().all(|candidate| has_hint(candidate.endpoint));
    // A hint counts only where every ready endpoint has one of its kind and one of them names us; nodes before zones.
    let same_node = || {
        all(|endpoint| !endpoint.node_hints.is_empty())
            .then(|| hinted(&|endpoint| endpoint.node_hints.iter().any(|name| **name == *policy.node_name)))
            .flatten()
    };
    let same_zone = || {
        let zone = node.zone.as_ref()?;
        all(|endpoint| !endpoint.zone_hints.is_empty())
            .then(|| hinted(&|endpoint| endpoint.zone_hints.contains(zone)))
            .flatten()
    };
    same_node().or_else(same_zone).unwrap_or_else(|| addresses(ready.iter().copied()))
}

/// Local endpoints that are ready; where none is, local ones that still serve while terminating. Hints do not count.
fn for_local(endpoints: &[Candidate<'_>]) -> Vec<SocketAddr> {
    let local = || endpoints.iter().filter(|candidate| candidate.is_local);
    let ready = addresses(local().filter(|candidate| candidate.endpoint.ready));
    if ready.is_empty() { addresses(local().filter(|candidate| is_draining(candidate))) } else { ready }
}

fn is_draining(candidate: &Candidate<'_>) -> bool {
    candidate.endpoint.serving && candidate.endpoint.terminating
}

fn addresses<'a>(candidates: impl Iterator<Item = &'a Candidate<'a>>) -> Vec<SocketAddr> {
    candidates.map(|candidate| candidate.address).collect()
}
