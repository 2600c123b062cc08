//! Services: from `wire` to the model.

use std::net::IpAddr;
use std::num::NonZeroU16;

use ipnet::IpNet;

use super::problems::{Child, Index, InvalidField, Problems};
use super::{Conversion, Converter, IpFamily, OBJECT_SKIPPED, PORT_SKIPPED, TREATED_AS_UNSET, collect_exact, label};
use crate::lenient::{Lenient, Truncated};
use crate::model::{ObjectName, Service, ServiceKind, ServicePort, TrafficPolicy};
use crate::wire;

/// A Service with this label, whatever its value, is for another proxy.
const SERVICE_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
const ADDRESS_SKIPPED: &str = "not served on this address";
const NOT_ON_LOAD_BALANCERS: &str = "not served on any address of a load balancer";
/// The longest `NAMESPACE/NAME`, in bytes, of a Service with source ranges. They become a chain of `nf_tables`, named after the
/// Service; the kernel allows 255 bytes (`NFT_CHAIN_MAXNAMELEN`) with the prefix `sources-`. An API server allows 63 bytes for each part,
/// but manifests may have longer ones.
const MAX_NAME_WITH_RANGES: usize = 247;
/// The API's default timeout for `sessionAffinity: ClientIP`: three hours.
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;

impl Converter {
    pub(super) fn read_service(
        &mut self,
        name: &ObjectName,
        object: &wire::Service,
        problems: &Problems,
    ) -> Conversion<Service> {
        if label(&object.metadata, SERVICE_PROXY_NAME).is_some() {
            return Conversion::Ignore;
        }
        let spec = match problems.field(&object.spec, "spec", OBJECT_SKIPPED) {
            Ok(Some(spec)) => spec,
            Ok(None) => return self.no_cluster_ip(problems),
            Err(_) => return Conversion::Invalid,
        };
        let kind = match problems.value(&spec.r#type, "spec.type", "treated as ClusterIP").map_or("", |text| text) {
            "ExternalName" => return Conversion::Ignore,
            "NodePort" => ServiceKind::NodePort,
            "LoadBalancer" => ServiceKind::LoadBalancer,
            "ClusterIP" | "" => ServiceKind::ClusterIp,
            other => {
                problems.unknown_value(
                    other,
                    "spec.type",
                    "treated as ClusterIP",
                    "ClusterIP, NodePort or LoadBalancer",
                );
                ServiceKind::ClusterIp
            }
        };
        let cluster_ips = match cluster_ips(spec, problems) {
            Ok(ClusterIps::Addresses(cluster_ips)) => cluster_ips,
            Ok(ClusterIps::Headless) => return Conversion::Ignore,
            Ok(ClusterIps::Unset) => return self.no_cluster_ip(problems),
            Err(InvalidField) => return Conversion::Invalid,
        };
        let mut external_ips: Vec<IpAddr> = problems
            .items(&spec.external_ips, "spec.externalIPs", ADDRESS_SKIPPED)
            .filter_map(|(at, ip)| problems.usable_ip(problems.value(ip, at, ADDRESS_SKIPPED)?, at, ADDRESS_SKIPPED))
            .collect();
        let mut load_balancer_ips = load_balancer_ips(object, problems);
        let source_ranges = source_ranges(spec, problems);
        let length = name.namespace().len() + 1 + name.name().len();
        if source_ranges.is_some() && !load_balancer_ips.is_empty() && length > MAX_NAME_WITH_RANGES {
            // Without the ranges they would be open to everybody, also as external IPs.
            external_ips.retain(|address| !load_balancer_ips.contains(address));
            load_balancer_ips.clear();
            problems.add(format_args!(
                "its namespace and name have {length} bytes, with which the kernel cannot restrict clients to \
                 spec.loadBalancerSourceRanges: {NOT_ON_LOAD_BALANCERS}; give it a shorter name, at most {MAX_NAME_WITH_RANGES} \
                 bytes with its namespace"
            ));
        }
        Conversion::Serve(Service {
            name: name.clone(),
            created: object.metadata.creation_timestamp.as_ref().map(|time| time.0.as_second()),
            kind,
            cluster_ips,
            external_ips,
            load_balancer_ips,
            ports: collect_exact(
                problems
                    .items(&spec.ports, "spec.ports", "no port is served")
                    .filter_map(|(at, port)| self.service_port(port, at, problems)),
            ),
            affinity_seconds: affinity(spec, problems),
            internal_policy: policy(&spec.internal_traffic_policy, "spec.internalTrafficPolicy", problems),
            external_policy: policy(&spec.external_traffic_policy, "spec.externalTrafficPolicy", problems),
            source_ranges,
            health_check_node_port: health_check_node_port(spec, problems),
        })
    }

    /// A Service without ClusterIP. An API server is about to assign one; in a manifest it is a problem.
    fn no_cluster_ip<T>(&self, problems: &Problems) -> Conversion<T> {
        if self.for_manifests {
            problems.add(
                "has no spec.clusterIP, and no API server is there to assign one: skipped; set spec.clusterIP to an address",
            );
        }
        Conversion::Ignore
    }

    fn service_port(
        &mut self,
        port: &Lenient<wire::ServicePort>,
        at: Index<&str>,
        problems: &Problems,
    ) -> Option<ServicePort> {
        const WITHOUT: &str = "served without NodePort";
        let port = problems.value(port, at, PORT_SKIPPED)?;
        let (name, protocol) = self.port_identity(&port.name, &port.protocol, at, problems)?;
        let number = problems.field(&port.port, Child(at, "port"), PORT_SKIPPED).ok()?.copied().unwrap_or(0);
        let number = problems.port(number, Child(at, "port"), PORT_SKIPPED)?;
        let node_port = match problems.value(&port.node_port, Child(at, "nodePort"), WITHOUT) {
            None | Some(0) => None,
            Some(&node_port) => problems.port(node_port, Child(at, "nodePort"), WITHOUT),
        };
        Some(ServicePort { name, protocol, port: number, node_port })
    }
}

/// The ClusterIPs of a Service.
enum ClusterIps {
    /// At most one of each family.
    Addresses(Vec<IpAddr>),
    /// `clusterIP: None`.
    Headless,
    /// Not assigned.
    Unset,
}

/// The ClusterIPs, one of each family. With `ipFamilies`, the entry of a family is the one at its index in
/// `clusterIPs`; without, the address decides the family. (The API server sets both lists; a manifest may have
/// `clusterIP` alone.)
fn cluster_ips(spec: &wire::ServiceSpec, problems: &Problems) -> Result<ClusterIps, InvalidField> {
    let single = problems.field(&spec.cluster_ip, "spec.clusterIP", OBJECT_SKIPPED);
    let listed = problems.field(&spec.cluster_ips, "spec.clusterIPs", OBJECT_SKIPPED);
    let (single, listed) = (single?, listed?);
    let mut texts: Vec<&str> = listed
        .into_iter()
        .flatten()
        .enumerate()
        .map(|(i, ip)| problems.value(ip, Index("spec.clusterIPs", i), ADDRESS_SKIPPED).map_or("", |text| text))
        .collect();
    let single = single.map(|text| &**text);
    match single.or_else(|| texts.first().copied()).unwrap_or("") {
        "" => return Ok(ClusterIps::Unset),
        "None" => return Ok(ClusterIps::Headless),
        single if texts.is_empty() => texts.push(single),
        _ => {}
    }
    let families: Vec<&str> = problems
        .items(&spec.ip_families, "spec.ipFamilies", TREATED_AS_UNSET)
        .map(|(at, family)| problems.value(family, at, ADDRESS_SKIPPED).map_or("", |text| text))
        .collect();
    let mut ips: Vec<IpAddr> = Vec::new();
    for (index, text) in texts.into_iter().enumerate().filter(|(_, text)| !text.is_empty()) {
        let at = Index("spec.clusterIPs", index);
        let Some(address) = problems.usable_ip(text, at, ADDRESS_SKIPPED) else { continue };
        let family = IpFamily::of(address);
        let named = if families.is_empty() { Some(&family.name()) } else { families.get(index) };
        if named != Some(&family.name()) {
            let named = named.unwrap_or(&"");
            problems.add(format_args!(
                "{at} {address} is not of the family {:?} at its index in spec.ipFamilies: {ADDRESS_SKIPPED}; make the two lists agree",
                Truncated(named)
            ));
        } else if !ips.iter().any(|other| IpFamily::of(*other) == family) {
            ips.push(address);
        }
    }
    if ips.is_empty() {
        problems.add(format_args!(
            "no usable ClusterIP is left: {OBJECT_SKIPPED}; correct spec.clusterIP and spec.clusterIPs"
        ));
        return Err(InvalidField);
    }
    Ok(ClusterIps::Addresses(ips))
}

fn load_balancer_ips(object: &wire::Service, problems: &Problems) -> Vec<IpAddr> {
    let balancer = problems
        .value(&object.status, "status", NOT_ON_LOAD_BALANCERS)
        .and_then(|status| problems.value(&status.load_balancer, "status.loadBalancer", NOT_ON_LOAD_BALANCERS));
    let Some(balancer) = balancer else { return Vec::new() };
    problems
        .items(&balancer.ingress, "status.loadBalancer.ingress", NOT_ON_LOAD_BALANCERS)
        .filter_map(|(at, ingress)| {
            let ingress = problems.value(ingress, at, ADDRESS_SKIPPED)?;
            let mode = problems.field(&ingress.ip_mode, Child(at, "ipMode"), ADDRESS_SKIPPED).ok()?;
            if mode.is_some_and(|mode| &**mode != "VIP") {
                // With ipMode Proxy the load balancer sends to node or endpoint addresses, not to its own IP.
                return None;
            }
            // An ingress that has only a hostname has no IP.
            let text = problems.value(&ingress.ip, Child(at, "ip"), ADDRESS_SKIPPED).filter(|text| !text.is_empty())?;
            problems.usable_ip(text, Child(at, "ip"), ADDRESS_SKIPPED)
        })
        .collect()
}

/// The source ranges that may connect to the load balancer's IPs. An invalid entry allows nobody: a typo in a list that
/// restricts access must not open the Service to everybody.
fn source_ranges(spec: &wire::ServiceSpec, problems: &Problems) -> Option<Vec<IpNet>> {
    const AT: &str = "spec.loadBalancerSourceRanges";
    const UNUSED: &str = "this entry allows nobody";
    let Ok(list) = problems.field(&spec.load_balancer_source_ranges, AT, "no client may use its load balancer IPs")
    else {
        return Some(Vec::new());
    };
    let list = list.filter(|list| !list.is_empty())?;
    let ranges = list.iter().enumerate().filter_map(|(index, text)| {
        let at = Index(AT, index);
        let text = problems.field(text, at, UNUSED).ok()?.map_or("", |text| text);
        problems.range(text.trim(), at, UNUSED)
    });
    Some(ranges.collect())
}

fn health_check_node_port(spec: &wire::ServiceSpec, problems: &Problems) -> Option<NonZeroU16> {
    const AT: &str = "spec.healthCheckNodePort";
    const WITHOUT: &str = "load balancers cannot check the health of this node";
    match problems.value(&spec.health_check_node_port, AT, WITHOUT) {
        None | Some(0) => None,
        Some(&port) => problems.port(port, AT, WITHOUT),
    }
}

fn affinity(spec: &wire::ServiceSpec, problems: &Problems) -> Option<u32> {
    const AT: &str = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
    const DEFAULTED: &str = "treated as 10800";
    match problems.value(&spec.session_affinity, "spec.sessionAffinity", "treated as None").map_or("", |text| text) {
        "ClientIP" => {}
        "None" | "" => return None,
        other => {
            problems.unknown_value(other, "spec.sessionAffinity", "treated as None", "None or ClientIP");
            return None;
        }
    }
    let seconds = problems
        .value(&spec.session_affinity_config, "spec.sessionAffinityConfig", DEFAULTED)
        .and_then(|config| problems.value(&config.client_ip, "spec.sessionAffinityConfig.clientIP", DEFAULTED))
        .and_then(|config| problems.value(&config.timeout_seconds, AT, DEFAULTED));
    let Some(&seconds) = seconds else { return Some(DEFAULT_AFFINITY_SECONDS) };
    let valid = u32::try_from(seconds).ok().filter(|seconds| (1..=86_400).contains(seconds));
    if valid.is_none() {
        problems.add(format_args!("{AT} is {seconds}: {DEFAULTED}; give one from 1 to 86400"));
    }
    valid.or(Some(DEFAULT_AFFINITY_SECONDS))
}

fn policy(value: &Lenient<Box<str>>, at: &'static str, problems: &Problems) -> TrafficPolicy {
    match problems.value(value, at, "treated as Cluster").map_or("", |text| text) {
        "Local" => TrafficPolicy::Local,
        "Cluster" | "" => TrafficPolicy::Cluster,
        other => {
            problems.unknown_value(other, at, "treated as Cluster", "Cluster or Local");
            TrafficPolicy::Cluster
        }
    }
}
