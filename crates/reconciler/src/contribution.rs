//! What one Service contributes to the desired state: a pure function of the Service, its slices, the node and the policy.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use ipnet::IpNet;
use ipvs_netlink::{Family, Persistence};
use litemap::LiteMap;
use service_watch::{Endpoint, Hints, Protocol, Service, ServiceKind, ServicePort, TrafficPolicy};

use crate::bootstrap::{API_SERVER, CONTROL_PLANE_NAMESPACE};
use crate::filter::{Access, FrontEndRule, Masquerade, SetElement, SourceRanges};
use crate::front_end::{AddressOrigin, FrontEnd, ServerConfig};
use crate::node::NodeView;
use crate::policy::{PodAddresses, Policy};
use crate::real_servers::RealServerAddress;
use crate::table::ServiceEntry;

/// A virtual server with its real servers, each of weight 1 and with the forwarding method masquerading; and who may connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredServer {
    /// The attributes of the virtual server.
    pub config: ServerConfig,
    /// The addresses of the real servers, sorted. Most front ends of a Service port share them.
    pub real_servers: Arc<[RealServerAddress]>,
    /// What the packet filter does with connections to it.
    pub rule: FrontEndRule,
    /// How the Service came to the address.
    pub origin: AddressOrigin,
}

/// What a Service contributes to the desired state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contribution {
    /// Virtual servers by front end.
    pub servers: LiteMap<FrontEnd, DesiredServer>,
    /// VIPs to be bound, sorted, without duplicates.
    pub vips: Vec<IpAddr>,
    /// Elements of the packet filter's sets, except front ends and VIPs; sorted, without duplicates.
    pub elements: Vec<SetElement>,
    /// The source ranges of load-balancer IPs; none for a family without a restriction.
    pub source_ranges: BTreeMap<Family, SourceRanges>,
    /// VIPs that are not served, since the Service must not receive their owner's traffic.
    pub refused_vips: Vec<(IpAddr, AddressOwner)>,
    /// The health checks of load balancers that the node answers; at most one per family.
    pub health_checks: Vec<HealthCheck>,
    /// The traffic policies `Local`, by family, that find no local endpoint although there are others.
    pub without_local: BTreeSet<(TrafficDirection, Family)>,
}

/// The owner of an address that is not served as a VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AddressOwner {
    /// A Node. Bound here, its address would cut this node off from it.
    Node,
    /// The API server. Otherwise a Service could feed this node with Services.
    ApiServer,
    /// A pod. Bound here, its address would cut this node off from the pod, or give its connections to another.
    Pod,
}

impl AddressOwner {
    /// Completes "the address of …".
    fn description(self) -> &'static str {
        match self {
            Self::Node => "a Node",
            Self::ApiServer => "the API server",
            Self::Pod => "a pod, or in a range of pods",
        }
    }

    /// Why a VIP with this owner is not served, and what to do. For the log and for the Event on the Service.
    pub fn refusal(self, vip: IpAddr) -> String {
        let setting = match self {
            Self::Node | Self::ApiServer => "",
            Self::Pod => ", or set kubeIPVS.allowPodAddresses (--allow-pod-addresses)",
        };
        format!(
            "{vip} is the address of {} and is not served as a VIP, since nodes could no longer reach that: remove it from \
             spec.externalIPs, or have the load balancer assign another address{setting}",
            self.description()
        )
    }
}

/// A health check of load balancers that the node answers (`spec.healthCheckNodePort`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// The family of the addresses it listens on.
    pub family: Family,
    /// The port it listens on.
    pub port: NonZeroU16,
    /// The addresses it listens on; `None` for all of the family.
    pub addresses: Option<BTreeSet<IpAddr>>,
    /// How many ready endpoints the Service has on this node.
    pub local_endpoints: usize,
}

/// One of the two traffic policies of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TrafficDirection {
    /// `internalTrafficPolicy`.
    Internal,
    /// `externalTrafficPolicy`.
    External,
}

impl Contribution {
    /// Computes the contribution. It is empty while the Service itself is not known.
    pub fn new(entry: &ServiceEntry, node: &NodeView, policy: &Policy) -> Self {
        let mut contribution = Self::default();
        if let Some(service) = &entry.service {
            // The families are independent: each has its own front ends, endpoints, hints and fallbacks.
            for family in policy.families.iter() {
                let vips = Vips::new(service, &entry.other_pods, family, node, policy);
                let Some(vips) = vips else { continue };
                contribution.refused_vips.extend(&vips.refused);
                let ranges = service.source_ranges.as_ref().and_then(|ranges| SourceRanges::of_family(ranges, family));
                for port in &service.ports {
                    let endpoints = endpoints(entry, port, family, policy);
                    contribution.add_port(service, port, &vips, &endpoints, ranges.as_ref(), node, policy);
                    let local = endpoints.iter().filter(|candidate| candidate.is_local);
                    contribution.elements.extend(local.map(|it| SetElement::Hairpin(it.address.into(), port.protocol)));
                }
                if !vips.load_balancer.is_empty()
                    && let Some(ranges) = ranges
                {
                    contribution.source_ranges.insert(family, ranges);
                }
                if service.kind == ServiceKind::LoadBalancer
                    && external_policy_is_local(service)
                    && let Some(port) = service.health_check_node_port
                {
                    contribution.elements.push(SetElement::HealthCheckPort(family, port.get()));
                    contribution.health_checks.push(HealthCheck {
                        family,
                        port,
                        addresses: node.health_check_addresses.get(&family).cloned(),
                        local_endpoints: count_local_ready(entry, family, policy),
                    });
                }
            }
        }
        contribution.vips.sort_unstable();
        contribution.vips.dedup();
        contribution.elements.sort_unstable();
        contribution.elements.dedup();
        // It is stored until the Service changes, so no memory is left unused.
        let mut servers = std::mem::take(&mut contribution.servers).into_tuple_vec();
        servers.shrink_to_fit();
        contribution.servers = LiteMap::from_sorted_store_unchecked(servers);
        contribution.vips.shrink_to_fit();
        contribution.elements.shrink_to_fit();
        contribution
    }

    #[expect(clippy::too_many_arguments, reason = "all that a port's front ends depend on")]
    fn add_port(
        &mut self,
        service: &Service,
        port: &ServicePort,
        vips: &Vips,
        endpoints: &[Candidate<'_>],
        ranges: Option<&SourceRanges>,
        node: &NodeView,
        policy: &Policy,
    ) {
        let is_external = vips.is_external || port.node_port.is_some();
        let internal_local = service.internal_policy == TrafficPolicy::Local;
        let external_local = external_policy_is_local(service);

        let uses_cluster = !internal_local || is_external;
        let uses_local = internal_local || (is_external && external_local);
        let cluster: Arc<[RealServerAddress]> =
            if uses_cluster { cluster_endpoints(endpoints, node, policy).into() } else { Arc::default() };
        // Without a local endpoint the policy Local falls back to the endpoints of the policy Cluster.
        let local = uses_local.then(|| local_endpoints(endpoints)).filter(|local| !local.is_empty());
        let has_local = local.is_some();
        // As in kube-proxy, a Service counts if it has a virtual server with the policy Local.
        let has_external = || {
            let has_node_ports = || node.node_port_addresses.iter().any(|address| Family::of(*address) == vips.family);
            !vips.external.is_empty()
                || !vips.load_balancer.is_empty()
                || (port.node_port.is_some() && has_node_ports())
        };
        let is_counted = (internal_local && vips.cluster_ip.is_some()) || (external_local && has_external());
        if !has_local && is_counted && endpoints.iter().any(|it| it.endpoint.ready || is_draining(it)) {
            let local = [(internal_local, TrafficDirection::Internal), (external_local, TrafficDirection::External)];
            let local = local.into_iter().filter(|(is_local, _)| *is_local);
            self.without_local.extend(local.map(|(_, direction)| (direction, vips.family)));
        }
        let local: Arc<[RealServerAddress]> = local.map_or_else(|| cluster.clone(), Into::into);

        let rule = |masquerade, access, is_empty: bool| match (is_empty, port.protocol) {
            (false, _) => FrontEndRule { masquerade, access, ..FrontEndRule::OPEN },
            (true, protocol) => FrontEndRule {
                masquerade: if protocol == Protocol::Udp { Masquerade::NodeIsRefused } else { Masquerade::Nobody },
                access: Access::Refused,
                ..FrontEndRule::OPEN
            },
        };
        let from_inside = {
            let real_servers = if internal_local { &local } else { &cluster };
            (real_servers, rule(Masquerade::Outsiders, Access::Open, real_servers.is_empty()))
        };
        let from_outside = {
            let real_servers = if external_local { &local } else { &cluster };
            let (masquerade, access) = match (external_local, has_local) {
                (false, _) => (Masquerade::Everybody, Access::Open),
                (true, true) => (Masquerade::Nobody, Access::Open),
                (true, false) => (Masquerade::Node, Access::Insiders),
            };
            (real_servers, rule(masquerade, access, real_servers.is_empty()))
        };
        let mut add = |address: IpAddr,
                       number: NonZeroU16,
                       (real_servers, rule): (&Arc<[RealServerAddress]>, FrontEndRule),
                       origin: AddressOrigin| {
            let front_end = FrontEnd { address, port: number.get(), protocol: port.protocol };
            let server = self.servers.entry(front_end).or_insert_with(|| DesiredServer {
                config: ServerConfig {
                    scheduler: policy.scheduler,
                    scheduler_flags: policy.scheduler_flags(),
                    persistence: service.affinity_seconds.map(|timeout| Persistence::new(timeout, vips.family)),
                    engine: None,
                    one_packet: false,
                },
                real_servers: real_servers.clone(),
                rule: rule.clone(),
                origin,
            });
            server.origin = server.origin.min(origin);
            // An address may be both an external IP and a load-balancer IP. Then the source ranges apply.
            if rule.source_ranges.is_some() {
                (server.rule.source_ranges, server.rule.is_closed_to_node) =
                    (rule.source_ranges, rule.is_closed_to_node);
            }
        };
        if let Some(cluster_ip) = vips.cluster_ip {
            add(cluster_ip, port.port, from_inside, AddressOrigin::Cluster);
            self.vips.push(cluster_ip);
        }
        let mut restricted_rule = from_outside.1.clone();
        if let Some(ranges) = ranges {
            restricted_rule.source_ranges = Some(service.name.clone());
            let node_ip = node.node_ips.iter().find(|ip| Family::of(**ip) == vips.family);
            restricted_rule.is_closed_to_node = !node_ip.is_some_and(|ip| ranges.contains(*ip));
        }
        let external = vips.external.iter().map(|vip| (*vip, &from_outside.1, AddressOrigin::Request));
        let load_balancer = vips.load_balancer.iter().map(|vip| (*vip, &restricted_rule, AddressOrigin::LoadBalancer));
        for (vip, rule, origin) in external.chain(load_balancer) {
            add(vip, port.port, (from_outside.0, rule.clone()), origin);
            // A VIP that another interface has is not bound again.
            if !node.interface_addresses.contains(&vip) {
                self.vips.push(vip);
            }
        }
        if let Some(node_port) = port.node_port {
            for address in node.node_port_addresses.iter().filter(|address| Family::of(**address) == vips.family) {
                add(*address, node_port, from_outside.clone(), AddressOrigin::Cluster);
            }
        }
    }
}

/// The VIPs of a Service in one family.
struct Vips {
    family: Family,
    cluster_ip: Option<IpAddr>,
    external: Vec<IpAddr>,
    load_balancer: Vec<IpAddr>,
    /// Whether the Service has external or load-balancer IPs, served or refused.
    is_external: bool,
    /// VIPs that have another owner.
    refused: Vec<(IpAddr, AddressOwner)>,
}

impl Vips {
    /// `None` without a ClusterIP of the family: then the Service is not served in this family.
    fn new(service: &Service, other_pods: &[IpAddr], family: Family, node: &NodeView, policy: &Policy) -> Option<Self> {
        let of_family = |addresses: &[IpAddr]| -> Vec<IpAddr> {
            addresses.iter().copied().filter(|address| Family::of(*address) == family).collect()
        };
        let cluster_ip = of_family(&service.cluster_ips).first().copied()?;
        let mut external = if policy.external_ips { of_family(&service.external_ips) } else { Vec::new() };
        let mut load_balancer = of_family(&service.load_balancer_ips);
        let is_external = !external.is_empty() || !load_balancer.is_empty();
        let owner = |vip: &IpAddr, origin: AddressOrigin| {
            if node.node_addresses.contains(vip) || node.peer_node_addresses.contains(vip) {
                return Some(AddressOwner::Node);
            }
            // Services of the control plane may have the addresses of API servers.
            let (namespace, name) = (service.name.namespace(), service.name.name());
            let is_privileged = namespace == CONTROL_PLANE_NAMESPACE || (namespace, name) == API_SERVER;
            if node.api_servers.contains(vip) && !is_privileged {
                return Some(AddressOwner::ApiServer);
            }
            is_pod_address(*vip, origin, other_pods, node, policy).then_some(AddressOwner::Pod)
        };
        let mut refused = Vec::new();
        let origins = [(&mut external, AddressOrigin::Request), (&mut load_balancer, AddressOrigin::LoadBalancer)];
        for (vips, origin) in origins {
            vips.retain(|vip| {
                let owner = owner(vip, origin);
                refused.extend(owner.map(|owner| (*vip, owner)));
                owner.is_none()
            });
        }
        // ClusterIPs are allocated by the cluster, whereas the addresses of other Nodes are reported by their kubelets. No kubelet
        // may disable a ClusterIP, so only the addresses of this Node count.
        let is_node_address = node.node_addresses.contains(&cluster_ip);
        refused.extend(is_node_address.then_some((cluster_ip, AddressOwner::Node)));
        let cluster_ip = (!is_node_address).then_some(cluster_ip);
        Some(Self { family, cluster_ip, external, load_balancer, is_external, refused })
    }
}

/// Whether an external or load-balancer IP is an address of a pod: in a range of pods, or that of an endpoint of another Service that
/// names a node.
///
/// Users may write such endpoints. They do not count against an address that a load balancer assigned if the ranges of pods of
/// its family are known: otherwise a slice could take the address from its Service.
fn is_pod_address(vip: IpAddr, origin: AddressOrigin, other_pods: &[IpAddr], node: &NodeView, policy: &Policy) -> bool {
    let PodAddresses::Refused(ranges) = &policy.pod_addresses else { return false };
    // A range of all addresses says nothing about pods.
    let is_in = |range: &IpNet| range.prefix_len() > 0 && range.contains(&vip);
    let knows_ranges = || ranges.iter().any(|range| Family::of(range.addr()) == Family::of(vip));
    let is_endpoint = || other_pods.contains(&vip) && (origin == AddressOrigin::Request || !knows_ranges());
    node.pod_cidrs.iter().chain(ranges).any(is_in) || is_endpoint()
}

/// `externalTrafficPolicy` applies only if the Service is reachable from outside, in whichever family.
fn external_policy_is_local(service: &Service) -> bool {
    service.external_policy == TrafficPolicy::Local
        && (service.kind != ServiceKind::ClusterIp || !service.external_ips.is_empty())
}

/// An endpoint of one Service port.
struct Candidate<'a> {
    address: RealServerAddress,
    endpoint: &'a Endpoint,
    is_local: bool,
}

/// The endpoints of a Service port from all slices: those of the slice ports with the same name and protocol, sorted.
///
/// If several slices have the same address, an endpoint that is not terminating takes precedence; among equals the last slice
/// by name.
fn endpoints<'a>(entry: &'a ServiceEntry, port: &ServicePort, family: Family, policy: &Policy) -> Vec<Candidate<'a>> {
    let mut merged: BTreeMap<RealServerAddress, &Endpoint> = BTreeMap::new();
    for slice in entry.slices.values() {
        for slice_port in slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol) {
            for endpoint in slice.endpoints.iter().filter(|endpoint| Family::of(endpoint.address) == family) {
                let address = (endpoint.address, slice_port.port.get());
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

/// The endpoints for the policy Cluster: ready ones, selected by hints; if none is ready, those that serve while terminating.
fn cluster_endpoints(endpoints: &[Candidate<'_>], node: &NodeView, policy: &Policy) -> Vec<RealServerAddress> {
    let ready: Vec<&Candidate<'_>> = endpoints.iter().filter(|candidate| candidate.endpoint.ready).collect();
    if ready.is_empty() {
        return addresses(endpoints.iter().filter(|candidate| is_draining(candidate)));
    }
    let hinted = |names_this: &dyn Fn(&Endpoint) -> bool| {
        let chosen = addresses(ready.iter().copied().filter(|candidate| names_this(candidate.endpoint)));
        (!chosen.is_empty()).then_some(chosen)
    };
    let all = |has_hint: fn(&Endpoint) -> bool| ready.iter().all(|candidate| has_hint(candidate.endpoint));
    // Hints of a kind apply only if every ready endpoint has one and one of them names this node or zone. Nodes come before zones.
    let same_node = || {
        all(|endpoint| endpoint.hints.as_ref().is_some_and(|hints| !hints.nodes.is_empty()))
            .then(|| {
                let names_this = |hints: &Hints| hints.nodes.iter().any(|name| **name == *policy.node_name);
                hinted(&|endpoint| endpoint.hints.as_deref().is_some_and(names_this))
            })
            .flatten()
    };
    let same_zone = || {
        let zone = node.zone.as_ref()?;
        all(|endpoint| endpoint.hints.as_ref().is_some_and(|hints| !hints.zones.is_empty()))
            .then(|| hinted(&|endpoint| endpoint.hints.as_ref().is_some_and(|hints| hints.zones.contains(zone))))
            .flatten()
    };
    same_node().or_else(same_zone).unwrap_or_else(|| addresses(ready.iter().copied()))
}

/// The endpoints for the policy Local: local ready ones; if none is ready, local ones that serve while terminating. Hints do not
/// apply.
fn local_endpoints(endpoints: &[Candidate<'_>]) -> Vec<RealServerAddress> {
    let local = || endpoints.iter().filter(|candidate| candidate.is_local);
    let ready = addresses(local().filter(|candidate| candidate.endpoint.ready));
    if ready.is_empty() { addresses(local().filter(|candidate| is_draining(candidate))) } else { ready }
}

/// How many addresses of a family have a ready endpoint on this node, on whichever port.
fn count_local_ready(entry: &ServiceEntry, family: Family, policy: &Policy) -> usize {
    let slices = entry.slices.values().filter(|slice| !slice.ports.is_empty());
    let endpoints = slices.flat_map(|slice| &slice.endpoints);
    let local = endpoints.filter(|endpoint| {
        endpoint.ready
            && Family::of(endpoint.address) == family
            && endpoint.node.as_deref() == Some(policy.node_name.as_str())
    });
    local.map(|endpoint| endpoint.address).collect::<BTreeSet<_>>().len()
}

fn is_draining(candidate: &Candidate<'_>) -> bool {
    candidate.endpoint.serving && candidate.endpoint.terminating
}

fn addresses<'a>(candidates: impl Iterator<Item = &'a Candidate<'a>>) -> Vec<RealServerAddress> {
    candidates.map(|candidate| candidate.address).collect()
}
