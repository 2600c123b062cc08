//! The parts of a Service that take more than a look.

use std::net::IpAddr;
use std::num::NonZeroU16;

use ipnet::IpNet;

use super::problems::{In, Item, Problems, Told};
use super::{ADDRESS_OUT, Family, UNSET, UNUSABLE};
use crate::lenient::{Lenient, Short};
use crate::model::TrafficPolicy;
use crate::wire;

/// What `sessionAffinity: ClientIP` means where nothing else is said: three hours.
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;

/// What a Service says of its ClusterIPs.
pub(super) enum Given {
    /// These, one a family.
    Addresses(Vec<IpAddr>),
    /// That it has none.
    Headless,
    Nothing,
}

/// The ClusterIPs, one a family. With `ipFamilies`, a family's is the one at its index in `clusterIPs`; without, the
/// address itself says its family. (The API server fills in both lists; a manifest may have `clusterIP` alone.)
pub(super) fn cluster_ips(spec: &wire::ServiceSpec, problems: &Problems) -> Result<Given, Told> {
    let single = problems.field(&spec.cluster_ip, "spec.clusterIP", UNUSABLE);
    let listed = problems.field(&spec.cluster_ips, "spec.clusterIPs", UNUSABLE);
    let (single, listed) = (single?, listed?);
    let mut texts: Vec<&str> = listed
        .into_iter()
        .flatten()
        .enumerate()
        .map(|(i, ip)| problems.value(ip, Item("spec.clusterIPs", i), ADDRESS_OUT).map_or("", |text| text))
        .collect();
    let single = single.map(|text| &**text);
    match single.or_else(|| texts.first().copied()).unwrap_or("") {
        "" => return Ok(Given::Nothing),
        "None" => return Ok(Given::Headless),
        single if texts.is_empty() => texts.push(single),
        _ => {}
    }
    let families: Vec<&str> = problems
        .items(&spec.ip_families, "spec.ipFamilies", UNSET)
        .map(|(at, family)| problems.value(family, at, ADDRESS_OUT).map_or("", |text| text))
        .collect();
    let mut ips: Vec<IpAddr> = Vec::new();
    for (index, text) in texts.into_iter().enumerate().filter(|(_, text)| !text.is_empty()) {
        let at = Item("spec.clusterIPs", index);
        let Some(address) = problems.ordinary_ip(text, at, ADDRESS_OUT) else { continue };
        let family = Family::of(address);
        let named = if families.is_empty() { Some(&family.name()) } else { families.get(index) };
        if named != Some(&family.name()) {
            let named = named.unwrap_or(&"");
            problems.add(format_args!(
                "{at} {address} is not of the family {:?} at its place in spec.ipFamilies: {ADDRESS_OUT}; make the two lists agree",
                Short(named)
            ));
        } else if !ips.iter().any(|other| Family::of(*other) == family) {
            ips.push(address);
        }
    }
    if ips.is_empty() {
        problems
            .add(format_args!("no usable ClusterIP is left: {UNUSABLE}; correct spec.clusterIP and spec.clusterIPs"));
        return Err(Told);
    }
    Ok(Given::Addresses(ips))
}

pub(super) fn load_balancer_ips(object: &wire::Service, problems: &Problems) -> Vec<IpAddr> {
    const NONE: &str = "not served on any address of a load balancer";
    let balancer = problems
        .value(&object.status, "status", NONE)
        .and_then(|status| problems.value(&status.load_balancer, "status.loadBalancer", NONE));
    let Some(balancer) = balancer else { return Vec::new() };
    problems
        .items(&balancer.ingress, "status.loadBalancer.ingress", NONE)
        .filter_map(|(at, ingress)| {
            let ingress = problems.value(ingress, at, ADDRESS_OUT)?;
            let mode = problems.field(&ingress.ip_mode, In(at, "ipMode"), ADDRESS_OUT).ok()?;
            if mode.is_some_and(|mode| &**mode != "VIP") {
                // The load balancer delivers to addresses of nodes or endpoints itself.
                return None;
            }
            // One that is known by a host name only has no IP.
            let text = problems.value(&ingress.ip, In(at, "ip"), ADDRESS_OUT).filter(|text| !text.is_empty())?;
            problems.ordinary_ip(text, In(at, "ip"), ADDRESS_OUT)
        })
        .collect()
}

/// Who may connect to the load balancer's IPs. What cannot be understood lets nobody in: a slip of the pen in a list that
/// is there to keep people out must not open the Service to all.
pub(super) fn source_ranges(spec: &wire::ServiceSpec, problems: &Problems) -> Option<Vec<IpNet>> {
    const AT: &str = "spec.loadBalancerSourceRanges";
    const UNUSED: &str = "this entry lets nobody in";
    let Ok(list) = problems.field(&spec.load_balancer_source_ranges, AT, "nobody may use its load balancer IPs") else {
        return Some(Vec::new());
    };
    let list = list.filter(|list| !list.is_empty())?;
    let ranges = list.iter().enumerate().filter_map(|(index, text)| {
        let at = Item(AT, index);
        let text = problems.field(text, at, UNUSED).ok()?.map_or("", |text| text);
        problems.range(text.trim(), at, UNUSED)
    });
    Some(ranges.collect())
}

pub(super) fn health_check_node_port(spec: &wire::ServiceSpec, problems: &Problems) -> Option<NonZeroU16> {
    const AT: &str = "spec.healthCheckNodePort";
    const WITHOUT: &str = "load balancers get no answer about this node";
    match problems.value(&spec.health_check_node_port, AT, WITHOUT) {
        None | Some(0) => None,
        Some(&port) => problems.port(port, AT, WITHOUT),
    }
}

pub(super) fn affinity(spec: &wire::ServiceSpec, problems: &Problems) -> Option<u32> {
    const AT: &str = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
    const DEFAULTED: &str = "taken as 10800";
    match problems.value(&spec.session_affinity, "spec.sessionAffinity", "taken as None").map_or("", |text| text) {
        "ClientIP" => {}
        "None" | "" => return None,
        other => {
            problems.unknown(other, "spec.sessionAffinity", "taken as None", "None or ClientIP");
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

pub(super) fn policy(value: &Lenient<Box<str>>, at: &'static str, problems: &Problems) -> TrafficPolicy {
    match problems.value(value, at, "taken as Cluster").map_or("", |text| text) {
        "Local" => TrafficPolicy::Local,
        "Cluster" | "" => TrafficPolicy::Cluster,
        other => {
            problems.unknown(other, at, "taken as Cluster", "Cluster or Local");
            TrafficPolicy::Cluster
        }
    }
}
