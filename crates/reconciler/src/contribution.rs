//! What one Service contributes to the desired state: a pure function of the Service, its slices, the node and the policy.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use foldhash::HashMap;
use ipnet::IpNet;
use ipvs_netlink::{Family, Persistence};
use litemap::LiteMap;
use service_watch::{Endpoint, EndpointSlice, Hints, Protocol, Service, ServiceKind, ServicePort, TrafficPolicy};

use crate::bootstrap::{API_SERVER, CONTROL_PLANE_NAMESPACE};
use crate::budget::{LeftOut, Spending};
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
    /// What the budget leaves out.
    pub left_out: Option<LeftOut>,
    /// About how many operations it takes to write all of it: front ends, their real servers, and elements.
    pub size: usize,
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

impl AddressKind {
    fn origin(self) -> AddressOrigin {
        match self {
            Self::ClusterIp | Self::NodePort => AddressOrigin::Cluster,
            Self::LoadBalancer => AddressOrigin::LoadBalancer,
            Self::External => AddressOrigin::Request,
        }
    }
}

impl Contribution {
    /// Computes the contribution. It is empty while the Service itself is not known. It takes time and memory in proportion to the
    /// objects and the Service's budget, whatever their ports, addresses and endpoints multiply to.
    pub fn new(entry: &ServiceEntry, node: &NodeView, policy: &Policy) -> Self {
        let mut contribution = Self::default();
        let Some(service) = &entry.service else { return contribution };
        let mut spending = Spending::new(policy.service_budget);
        let slices = SlicesByPort::new(entry, service.ports.len());
        // The families are independent: each has its own front ends, endpoints, hints and fallbacks.
        let mut families = Vec::with_capacity(1);
        for family in policy.families.iter() {
            let Some(vips) = Vips::new(service, &entry.other_pods, family, node, policy) else { continue };
            contribution.refused_vips.extend(&vips.refused);
            let ranges = service.source_ranges.as_ref().and_then(|ranges| SourceRanges::of_family(ranges, family));
            let node_ip = node.node_ips.iter().find(|ip| Family::of(**ip) == family);
            let is_closed_to_node =
                ranges.as_ref().is_some_and(|ranges| !node_ip.is_some_and(|ip| ranges.contains(*ip)));
            let mut ports = Vec::with_capacity(service.ports.len());
            for port in &service.ports {
                let endpoints = endpoints(slices.of(port), family, policy, &mut spending);
                ports.push(endpoints.map(|endpoints| {
                    contribution.count_without_local(service, port, &vips, &endpoints);
                    let local = endpoints.iter().filter(|candidate| candidate.is_local);
                    let hairpins = local.map(|it| SetElement::Hairpin(it.address.into(), port.protocol));
                    contribution.elements.extend(hairpins);
                    PortServers::new(service, port, &vips, &endpoints, node, policy)
                }));
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
            let restriction = ranges.is_some().then_some(is_closed_to_node);
            if !vips.load_balancer.is_empty()
                && let Some(ranges) = ranges
            {
                contribution.source_ranges.insert(family, ranges);
            }
            families.push(FamilyServers { vips, ports, restriction });
        }
        contribution.add_front_ends(service, &families, node, policy, &mut spending);
        contribution.vips.sort_unstable();
        contribution.vips.dedup();
        contribution.elements.sort_unstable();
        contribution.elements.dedup();
        contribution.size = spending.spent() + contribution.elements.len();
        contribution.left_out = spending.left_out();
        // It is stored until the Service changes, so no memory is left unused.
        contribution.vips.shrink_to_fit();
        contribution.elements.shrink_to_fit();
        contribution
    }

    /// Adds the front ends of all ports, as far as the budget reaches: first those that the cluster allocated.
    fn add_front_ends(
        &mut self,
        service: &Service,
        families: &[FamilyServers],
        node: &NodeView,
        policy: &Policy,
        spending: &mut Spending,
    ) {
        // Many Services have as many as this, and the others not much less.
        let addresses = families.iter().map(|family| family.vips.len()).sum::<usize>();
        let mut servers =
            Vec::with_capacity(spending.front_ends_left().min(addresses.saturating_mul(service.ports.len())));
        for kind in [AddressKind::ClusterIp, AddressKind::NodePort, AddressKind::LoadBalancer, AddressKind::External] {
            for family in families {
                let addresses = family.vips.of_kind(kind);
                if addresses.is_empty() {
                    continue;
                }
                let config = ServerConfig {
                    scheduler: policy.scheduler,
                    scheduler_flags: policy.scheduler_flags(),
                    persistence: service.affinity_seconds.map(|timeout| Persistence::new(timeout, family.vips.family)),
                    engine: None,
                    one_packet: false,
                };
                for (port, of_port) in service.ports.iter().zip(&family.ports) {
                    let number = if kind == AddressKind::NodePort { port.node_port } else { Some(port.port) };
                    let Some(number) = number else { continue };
                    let Some(of_port) = of_port else {
                        spending.leave_out(addresses.len());
                        continue;
                    };
                    let (wanted, rule) =
                        if kind == AddressKind::ClusterIp { &of_port.inside } else { &of_port.outside };
                    let mut rule = rule.clone();
                    if kind == AddressKind::LoadBalancer
                        && let Some(is_closed_to_node) = family.restriction
                    {
                        rule.source_ranges = Some(service.name.clone());
                        rule.is_closed_to_node = is_closed_to_node;
                    }
                    for (index, address) in addresses.iter().enumerate() {
                        let Some(real_servers) = spending.spend(wanted) else {
                            spending.leave_out(addresses.len() - index);
                            break;
                        };
                        let front_end = FrontEnd { address: *address, port: number.get(), protocol: port.protocol };
                        let (origin, rule) = (kind.origin(), rule.clone());
                        servers.push((front_end, DesiredServer { config, real_servers, rule, origin }));
                        // A VIP that another interface has is not bound again.
                        if kind == AddressKind::ClusterIp
                            || (origin != AddressOrigin::Cluster && !node.interface_addresses.contains(address))
                        {
                            self.vips.push(*address);
                        }
                    }
                }
            }
        }
        // To sort all of them at once is linear where they are sorted, and to insert them one by one is not.
        servers.sort_by_key(|(front_end, _)| *front_end);
        servers.dedup_by(|(later, server), (first, held)| {
            let is_same = later == first;
            // The first is of the origin that takes precedence.
            // An address may be both an external IP and a load-balancer IP. Then the source ranges apply.
            if is_same && server.rule.source_ranges.is_some() {
                held.rule.source_ranges = server.rule.source_ranges.take();
                held.rule.is_closed_to_node = server.rule.is_closed_to_node;
            }
            is_same
        });
        servers.shrink_to_fit();
        self.servers = LiteMap::from_sorted_store_unchecked(servers);
    }

    /// Records the traffic policies `Local` of a port that find no local endpoint although there are others.
    fn count_without_local(&mut self, service: &Service, port: &ServicePort, vips: &Vips, endpoints: &[Candidate<'_>]) {
        let internal_local = service.internal_policy == TrafficPolicy::Local;
        let external_local = external_policy_is_local(service);
        // As in kube-proxy, a Service counts if it has a virtual server with the policy Local.
        let has_external = || {
            !vips.external.is_empty()
                || !vips.load_balancer.is_empty()
                || (port.node_port.is_some() && !vips.node_port_addresses.is_empty())
        };
        let is_counted = (internal_local && vips.cluster_ip.is_some()) || (external_local && has_external());
        if is_counted
            && local_endpoints(endpoints).is_empty()
            && endpoints.iter().any(|it| it.endpoint.ready || is_draining(it))
        {
            let local = [(internal_local, TrafficDirection::Internal), (external_local, TrafficDirection::External)];
            let local = local.into_iter().filter(|(is_local, _)| *is_local);
            self.without_local.extend(local.map(|(_, direction)| (direction, vips.family)));
        }
    }
}

/// What a Service has of one family.
struct FamilyServers {
    vips: Vips,
    /// The real servers of each port of the Service; `None` if the budget did not reach so far.
    ports: Vec<Option<PortServers>>,
    /// Whether there are source ranges, and then whether they exclude the node.
    restriction: Option<bool>,
}

/// The real servers of a Service port with the rule of the front ends that have them.
struct PortServers {
    /// Those of the ClusterIP.
    inside: (Arc<[RealServerAddress]>, FrontEndRule),
    /// Those of all other addresses.
    outside: (Arc<[RealServerAddress]>, FrontEndRule),
}

impl PortServers {
    fn new(
        service: &Service,
        port: &ServicePort,
        vips: &Vips,
        endpoints: &[Candidate<'_>],
        node: &NodeView,
        policy: &Policy,
    ) -> Self {
        let is_external = vips.is_external || port.node_port.is_some();
        let internal_local = service.internal_policy == TrafficPolicy::Local;
        let external_local = external_policy_is_local(service);

        let uses_cluster = !internal_local || is_external;
        let uses_local = internal_local || (is_external && external_local);
        let cluster: Arc<[RealServerAddress]> =
            if uses_cluster { cluster_endpoints(endpoints, node, policy).into() } else { Arc::default() };
        let local: Arc<[RealServerAddress]> =
            if uses_local { local_endpoints(endpoints).into() } else { Arc::default() };
        let has_local = !local.is_empty();

        let rule = |masquerade, access, is_empty: bool| match (is_empty, port.protocol) {
            (false, _) => FrontEndRule { masquerade, access, ..FrontEndRule::OPEN },
            (true, protocol) => FrontEndRule {
                masquerade: if protocol == Protocol::Udp { Masquerade::NodeIsRefused } else { Masquerade::Nobody },
                access: Access::Refused,
                ..FrontEndRule::OPEN
            },
        };
        let inside = if internal_local { local.clone() } else { cluster.clone() };
        // Without a local endpoint the external policy falls back to those of the policy Cluster, for pods and the node. The internal
        // policy does not: without a local endpoint it refuses clients.
        let outside = if external_local && has_local { local } else { cluster };
        let (masquerade, access) = match (external_local, has_local) {
            (false, _) => (Masquerade::Everybody, Access::Open),
            (true, true) => (Masquerade::Nobody, Access::Open),
            (true, false) => (Masquerade::Node, Access::Insiders),
        };
        let inside_rule = rule(Masquerade::Outsiders, Access::Open, inside.is_empty());
        let outside_rule = rule(masquerade, access, outside.is_empty());
        Self { inside: (inside, inside_rule), outside: (outside, outside_rule) }
    }
}

/// The addresses of front ends by where they come from, in the order in which the budget is spent on them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum AddressKind {
    ClusterIp,
    NodePort,
    LoadBalancer,
    External,
}

/// The VIPs of a Service in one family.
struct Vips {
    family: Family,
    /// The ClusterIP, if it is served.
    cluster_ip: Option<IpAddr>,
    /// The addresses of the node on which NodePorts listen: no VIPs, but addresses of front ends too.
    node_port_addresses: Vec<IpAddr>,
    /// Sorted, without duplicates.
    external: Vec<IpAddr>,
    /// Sorted, without duplicates.
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
            // A list may name an address many times.
            vips.sort_unstable();
            vips.dedup();
        }
        // ClusterIPs are allocated by the cluster, whereas the addresses of other Nodes are reported by their kubelets. No kubelet
        // may disable a ClusterIP, so only the addresses of this Node count.
        let is_node_address = node.node_addresses.contains(&cluster_ip);
        refused.extend(is_node_address.then_some((cluster_ip, AddressOwner::Node)));
        let cluster_ip = (!is_node_address).then_some(cluster_ip);
        let has_node_ports = service.ports.iter().any(|port| port.node_port.is_some());
        let node_port_addresses = node.node_port_addresses.iter().copied();
        let node_port_addresses =
            node_port_addresses.filter(|address| has_node_ports && Family::of(*address) == family).collect();
        Some(Self { family, cluster_ip, node_port_addresses, external, load_balancer, is_external, refused })
    }

    /// How many addresses there are of all kinds.
    fn len(&self) -> usize {
        usize::from(self.cluster_ip.is_some())
            + self.node_port_addresses.len()
            + self.load_balancer.len()
            + self.external.len()
    }

    fn of_kind(&self, kind: AddressKind) -> &[IpAddr] {
        match kind {
            AddressKind::ClusterIp => self.cluster_ip.as_slice(),
            AddressKind::NodePort => &self.node_port_addresses,
            AddressKind::LoadBalancer => &self.load_balancer,
            AddressKind::External => &self.external,
        }
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
    let is_endpoint =
        || other_pods.binary_search(&vip).is_ok() && (origin == AddressOrigin::Request || !knows_ranges());
    node.pod_cidrs.iter().chain(ranges).any(is_in) || is_endpoint()
}

/// `externalTrafficPolicy` applies only if the Service is reachable from outside, in whichever family.
fn external_policy_is_local(service: &Service) -> bool {
    service.external_policy == TrafficPolicy::Local
        && (service.kind != ServiceKind::ClusterIp || !service.external_ips.is_empty())
}

/// An endpoint of one Service port.
#[derive(Clone, Copy)]
struct Candidate<'a> {
    address: RealServerAddress,
    endpoint: &'a Endpoint,
    is_local: bool,
}

impl Candidate<'_> {
    /// Of an address that is listed several times, the endpoint with the highest rank is used.
    fn rank(&self) -> (bool, bool, bool, bool) {
        let Endpoint { ready, serving, terminating, .. } = *self.endpoint;
        (ready, !terminating, serving, self.is_local)
    }
}

/// The slices of a Service, each with the port on which its endpoints serve a Service port.
enum SlicesByPort<'a> {
    /// A few ports look at all slices.
    Few(&'a ServiceEntry),
    /// Many ports have an index, since each would look at all ports of all slices.
    Many(HashMap<(&'a str, Protocol), Vec<(&'a EndpointSlice, NonZeroU16)>>),
}

impl<'a> SlicesByPort<'a> {
    fn new(entry: &'a ServiceEntry, ports: usize) -> Self {
        const FEW: usize = 4;
        if ports <= FEW {
            return Self::Few(entry);
        }
        let mut by_port: HashMap<_, Vec<_>> = HashMap::default();
        for slice in entry.slices.values() {
            for port in &slice.ports {
                by_port.entry((&*port.name, port.protocol)).or_default().push((slice, port.port));
            }
        }
        Self::Many(by_port)
    }

    /// The slices with a port of the same name and protocol, in the order of their names.
    fn of<'b>(&'b self, port: &'b ServicePort) -> impl Iterator<Item = (&'a EndpointSlice, NonZeroU16)> + use<'a, 'b> {
        let (few, many) = match self {
            Self::Few(entry) => (Some(*entry), None),
            Self::Many(by_port) => (None, by_port.get(&(&*port.name, port.protocol))),
        };
        let few = few.into_iter().flat_map(|entry| entry.slices.values()).flat_map(move |slice| {
            let same = slice.ports.iter().filter(move |it| it.name == port.name && it.protocol == port.protocol);
            same.map(move |it| (slice, it.port))
        });
        few.chain(many.into_iter().flatten().copied())
    }
}

/// The endpoints of a Service port from all slices: those of the slice ports with the same name and protocol, sorted. `None` if
/// the budget is spent.
///
/// If an address is listed several times, a ready endpoint takes precedence, then one that is not terminating, one that is serving, and
/// one on this node; among equals the last slice by name.
fn endpoints<'a>(
    slices: impl Iterator<Item = (&'a EndpointSlice, NonZeroU16)>,
    family: Family,
    policy: &Policy,
    spending: &mut Spending,
) -> Option<Vec<Candidate<'a>>> {
    let mut merged = Vec::new();
    for (slice, port) in slices {
        let considered = spending.consider(slice.endpoints.len());
        if considered == 0 && !slice.endpoints.is_empty() && merged.is_empty() {
            return None;
        }
        let of_family = slice.endpoints[..considered].iter().filter(|endpoint| Family::of(endpoint.address) == family);
        merged.reserve(considered);
        merged.extend(of_family.map(|endpoint| Candidate {
            address: (endpoint.address, port.get()),
            endpoint,
            is_local: endpoint.node.as_deref() == Some(policy.node_name.as_str()),
        }));
        if considered < slice.endpoints.len() {
            spending.leave_out(1);
            break;
        }
    }
    merged.sort_by_key(|candidate| candidate.address);
    merged.dedup_by(|later, held| {
        let is_same = later.address == held.address;
        if is_same && later.rank() >= held.rank() {
            *held = *later;
        }
        is_same
    });
    Some(merged)
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
