//! From what the API has to what a proxy serves: kube-proxy's intake rules, and checks that say what they drop.

mod problems;
mod service;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;
use jiff::Timestamp;
use kube::api::ObjectMeta;
use serde::de::DeserializeOwned;

use self::problems::{In, Interner, Item, Problems, Told};
use self::service::{Given, affinity, cluster_ips, health_check_node_port, load_balancer_ips, policy, source_ranges};
use crate::lenient::Lenient;
use crate::model::{
    Change, Endpoint, EndpointSlice, Hints, Node, ObjectName, Protocol, Service, ServiceKind, ServicePort, SlicePort,
};
use crate::report::{Kind, Subject};
use crate::wire;

/// A Service with this label, whatever its value, belongs to another proxy.
const SERVICE_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// A slice with this label, whatever its value, is of a headless Service.
const HEADLESS: &str = "service.kubernetes.io/headless";
/// The Service a slice belongs to.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
const ZONE: &str = "topology.kubernetes.io/zone";
/// The taint of a Node that the cluster autoscaler is about to remove.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

const UNUSABLE: &str = "the object cannot be used";
const PORT_OUT: &str = "this port is not served";
const ADDRESS_OUT: &str = "not served on this address";
const ENDPOINT_OUT: &str = "this endpoint gets no traffic";
const UNSET: &str = "taken as unset";

/// An object as the API has it, of a kind that a proxy reads.
pub(crate) trait Object:
    kube::Resource<DynamicType = ()> + DeserializeOwned + Clone + fmt::Debug + Send + 'static
{
    const KIND: Kind;

    fn convert(&self, name: &ObjectName, converter: &mut Converter) -> Converted<Change>;
}

impl Object for wire::Service {
    const KIND: Kind = Kind::Service;

    fn convert(&self, name: &ObjectName, converter: &mut Converter) -> Converted<Change> {
        converter.service(name, self).map(Change::Service)
    }
}

impl Object for wire::EndpointSlice {
    const KIND: Kind = Kind::EndpointSlice;

    fn convert(&self, name: &ObjectName, converter: &mut Converter) -> Converted<Change> {
        converter.slice(name, self).map(Change::Slice)
    }
}

impl Object for wire::Node {
    const KIND: Kind = Kind::Node;

    fn convert(&self, name: &ObjectName, converter: &mut Converter) -> Converted<Change> {
        if name.name() == &*converter.own {
            converter.node(self).map(Change::Node)
        } else {
            neighbour(self).map(|addresses| Change::Neighbour(name.name().into(), addresses))
        }
    }
}

/// An object, read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Converted<T> {
    pub(crate) outcome: Outcome<T>,
    /// What had to be left out and why.
    pub(crate) problems: Vec<String>,
}

impl<T> Converted<T> {
    fn map<U>(self, f: impl FnOnce(T) -> U) -> Converted<U> {
        let outcome = match self.outcome {
            Outcome::Serve(value) => Outcome::Serve(f(value)),
            Outcome::Ignore => Outcome::Ignore,
            Outcome::Broken => Outcome::Broken,
        };
        Converted { outcome, problems: self.problems }
    }
}

/// What is to be done with an object.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome<T> {
    /// It is served.
    Serve(T),
    /// By its own words it is none of a proxy's business.
    Ignore,
    /// It makes no sense: what it was before stays.
    Broken,
}

/// What follows from [`Outcome::Broken`]; `before` says whether there is something it was before.
pub(crate) fn consequence(before: bool) -> String {
    let consequence = if before { "the object stays as it was" } else { "nothing it may have held is taken away" };
    format!("makes no sense as a whole: {consequence} until it is corrected")
}

/// Reads objects; shares the texts that many of them have in common.
#[derive(Debug)]
pub(crate) struct Converter {
    /// The name of the own Node.
    own: Arc<str>,
    names: Interner,
    /// There is no API server that completes objects, nor controllers with objects of their own.
    by_hand: bool,
}

impl Converter {
    /// For objects of an API server; `own` is the name of the own Node.
    pub(crate) fn new(own: Arc<str>) -> Self {
        Self { own, names: Interner::default(), by_hand: false }
    }

    /// For objects that nobody completes: what is left out of them was forgotten.
    pub(crate) fn by_hand(own: Arc<str>) -> Self {
        Self { by_hand: true, ..Self::new(own) }
    }

    /// What to say when an object is gone.
    pub(crate) fn gone(&self, subject: Subject) -> Option<Change> {
        match subject {
            Subject::Service(name) => Some(Change::ServiceGone(name)),
            Subject::EndpointSlice(name) => Some(Change::SliceGone(name)),
            Subject::Node(name) if name == self.own => Some(Change::NodeGone),
            Subject::Node(name) => Some(Change::NeighbourGone(name)),
            Subject::File(_) | Subject::Watch(_) => None,
        }
    }

    /// Namespace and name; a manifest without namespace means `default`. `None` without usable names: the API allows at
    /// most 253 bytes of letters, digits, `-` and `.`, and others trust in that.
    pub(crate) fn name(meta: &ObjectMeta) -> Option<ObjectName> {
        let is_usable =
            |name: &str| name.len() <= 253 && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
        let name = meta.name.as_deref().filter(|name| !name.is_empty())?;
        let namespace = meta.namespace.as_deref().filter(|namespace| !namespace.is_empty()).unwrap_or("default");
        if !is_usable(name) || !is_usable(namespace) {
            return None;
        }
        Some(ObjectName::new(namespace, name))
    }

    fn service(&mut self, name: &ObjectName, object: &wire::Service) -> Converted<Service> {
        let problems = Problems::default();
        let outcome = self.read_service(name, object, &problems);
        problems.with(outcome)
    }

    fn slice(&mut self, name: &ObjectName, object: &wire::EndpointSlice) -> Converted<EndpointSlice> {
        let problems = Problems::default();
        let outcome = self.read_slice(name, object, &problems);
        problems.with(outcome)
    }

    fn node(&mut self, object: &wire::Node) -> Converted<Node> {
        let problems = Problems::default();
        let node = self.read_node(object, &problems);
        problems.with(Outcome::Serve(node))
    }

    fn read_service(&mut self, name: &ObjectName, object: &wire::Service, problems: &Problems) -> Outcome<Service> {
        if label(&object.metadata, SERVICE_PROXY_NAME).is_some() {
            return Outcome::Ignore;
        }
        let spec = match problems.field(&object.spec, "spec", UNUSABLE) {
            Ok(Some(spec)) => spec,
            Ok(None) => return self.no_cluster_ip(problems),
            Err(_) => return Outcome::Broken,
        };
        let kind = match problems.value(&spec.r#type, "spec.type", "taken as ClusterIP").map_or("", |text| text) {
            "ExternalName" => return Outcome::Ignore,
            "NodePort" => ServiceKind::NodePort,
            "LoadBalancer" => ServiceKind::LoadBalancer,
            "ClusterIP" | "" => ServiceKind::ClusterIp,
            other => {
                problems.unknown(other, "spec.type", "taken as ClusterIP", "ClusterIP, NodePort or LoadBalancer");
                ServiceKind::ClusterIp
            }
        };
        let cluster_ips = match cluster_ips(spec, problems) {
            Ok(Given::Addresses(cluster_ips)) => cluster_ips,
            Ok(Given::Headless) => return Outcome::Ignore,
            Ok(Given::Nothing) => return self.no_cluster_ip(problems),
            Err(Told) => return Outcome::Broken,
        };
        Outcome::Serve(Service {
            name: name.clone(),
            created: object.metadata.creation_timestamp.as_ref().map(|time| time.0.as_second()),
            kind,
            cluster_ips,
            external_ips: problems
                .items(&spec.external_ips, "spec.externalIPs", ADDRESS_OUT)
                .filter_map(|(at, ip)| problems.ordinary_ip(problems.value(ip, at, ADDRESS_OUT)?, at, ADDRESS_OUT))
                .collect(),
            load_balancer_ips: load_balancer_ips(object, problems),
            ports: to_keep(
                problems
                    .items(&spec.ports, "spec.ports", "no port is served")
                    .filter_map(|(at, port)| self.service_port(port, at, problems)),
            ),
            affinity_seconds: affinity(spec, problems),
            internal_policy: policy(&spec.internal_traffic_policy, "spec.internalTrafficPolicy", problems),
            external_policy: policy(&spec.external_traffic_policy, "spec.externalTrafficPolicy", problems),
            source_ranges: source_ranges(spec, problems),
            health_check_node_port: health_check_node_port(spec, problems),
        })
    }

    /// From an API server, such a Service is being created and will get one.
    fn no_cluster_ip<T>(&self, problems: &Problems) -> Outcome<T> {
        if self.by_hand {
            problems.add(
                "has no spec.clusterIP, and no API server is there to assign one: skipped; set spec.clusterIP to an address",
            );
        }
        Outcome::Ignore
    }

    fn service_port(
        &mut self,
        port: &Lenient<wire::ServicePort>,
        at: Item<&str>,
        problems: &Problems,
    ) -> Option<ServicePort> {
        const WITHOUT: &str = "served without NodePort";
        let port = problems.value(port, at, PORT_OUT)?;
        let (name, protocol) = self.port_identity(&port.name, &port.protocol, at, problems)?;
        let number = problems.field(&port.port, In(at, "port"), PORT_OUT).ok()?.copied().unwrap_or(0);
        let number = problems.port(number, In(at, "port"), PORT_OUT)?;
        let node_port = match problems.value(&port.node_port, In(at, "nodePort"), WITHOUT) {
            None | Some(0) => None,
            Some(&node_port) => problems.port(node_port, In(at, "nodePort"), WITHOUT),
        };
        Some(ServicePort { name, protocol, port: number, node_port })
    }

    /// Name and protocol of a port of a Service or slice: what matches one to the other.
    fn port_identity(
        &mut self,
        name: &Lenient<Box<str>>,
        protocol: &Lenient<Box<str>>,
        at: Item<&str>,
        problems: &Problems,
    ) -> Option<(Arc<str>, Protocol)> {
        // The API server makes an absent name "".
        let name = problems.field(name, In(at, "name"), PORT_OUT).ok()?.map_or("", |name| name);
        let protocol = match problems.field(protocol, In(at, "protocol"), PORT_OUT).ok()?.map_or("", |text| text) {
            "TCP" | "" => Protocol::Tcp,
            "UDP" => Protocol::Udp,
            "SCTP" => Protocol::Sctp,
            other => {
                problems.unknown(other, In(at, "protocol"), PORT_OUT, "TCP, UDP or SCTP");
                return None;
            }
        };
        Some((self.names.get(name), protocol))
    }

    fn read_slice(
        &mut self,
        name: &ObjectName,
        object: &wire::EndpointSlice,
        problems: &Problems,
    ) -> Outcome<EndpointSlice> {
        if label(&object.metadata, HEADLESS).is_some() {
            return Outcome::Ignore;
        }
        let Some(service) = label(&object.metadata, SERVICE_NAME).filter(|service| !service.is_empty()) else {
            // From an API server, it is another controller's.
            if self.by_hand {
                problems.add(format_args!(
                    "has no label {SERVICE_NAME}, so it belongs to no Service: skipped; set it to the Service's name"
                ));
            }
            return Outcome::Ignore;
        };
        let Ok(address_type) = problems.field(&object.address_type, "addressType", UNUSABLE) else {
            return Outcome::Broken;
        };
        let family = match address_type.map_or("", |text| text) {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            "FQDN" => return Outcome::Ignore,
            other => {
                problems.unknown(other, "addressType", UNUSABLE, "IPv4 or IPv6");
                return Outcome::Broken;
            }
        };
        Outcome::Serve(EndpointSlice {
            name: name.clone(),
            service: ObjectName::new(name.namespace(), service),
            is_ipv6: family == Family::V6,
            ports: to_keep(
                problems
                    .items(&object.ports, "ports", "no port is served")
                    .filter_map(|(at, port)| self.slice_port(port, at, problems)),
            ),
            endpoints: to_keep(
                problems
                    .items(&object.endpoints, "endpoints", "no endpoint gets traffic")
                    .filter_map(|(at, endpoint)| self.endpoint(endpoint, at, family, problems)),
            ),
            triggered: triggered(&object.metadata),
        })
    }

    fn slice_port(
        &mut self,
        port: &Lenient<wire::SlicePort>,
        at: Item<&str>,
        problems: &Problems,
    ) -> Option<SlicePort> {
        let port = problems.value(port, at, PORT_OUT)?;
        // No number means all ports to other consumers; a proxy has no use for that, so it is nothing to report.
        let number = *problems.value(&port.port, In(at, "port"), PORT_OUT)?;
        let number = problems.port(number, In(at, "port"), PORT_OUT)?;
        let (name, protocol) = self.port_identity(&port.name, &port.protocol, at, problems)?;
        Some(SlicePort { name, protocol, port: number })
    }

    fn endpoint(
        &mut self,
        endpoint: &Lenient<wire::Endpoint>,
        at: Item<&str>,
        family: Family,
        problems: &Problems,
    ) -> Option<Endpoint> {
        let endpoint = problems.value(endpoint, at, ENDPOINT_OUT)?;
        let address = first_address(endpoint, at, family, problems)?;
        let unset = wire::Conditions::default();
        let conditions = problems.field(&endpoint.conditions, In(at, "conditions"), ENDPOINT_OUT).ok()?;
        let conditions = conditions.unwrap_or(&unset);
        let condition = |value: &Lenient<bool>, name: &'static str, unset: bool| {
            let value = problems.field(value, In(In(at, "conditions"), name), ENDPOINT_OUT).ok()?;
            Some(value.copied().unwrap_or(unset))
        };
        let ready = condition(&conditions.ready, "ready", true)?;
        let serving = condition(&conditions.serving, "serving", true)?;
        let terminating = condition(&conditions.terminating, "terminating", false)?;
        let node = problems.value(&endpoint.node_name, In(at, "nodeName"), UNSET).filter(|node| !node.is_empty());
        let hints = problems.value(&endpoint.hints, In(at, "hints"), UNSET);
        Some(Endpoint {
            address,
            ready,
            serving,
            terminating,
            node: node.map(|node| self.names.get(node)),
            hints: hints
                .map(|hints| Hints {
                    zones: self.hints(&hints.for_zones, In(at, "hints.forZones"), problems),
                    nodes: self.hints(&hints.for_nodes, In(at, "hints.forNodes"), problems),
                })
                .filter(|hints| *hints != Hints::default())
                .map(Box::new),
        })
    }

    fn hints(
        &mut self,
        names: &Lenient<Vec<Lenient<wire::Named>>>,
        at: In<Item<&str>>,
        problems: &Problems,
    ) -> Vec<Arc<str>> {
        problems
            .items(names, at, UNSET)
            .filter_map(|(at, named)| problems.value(&problems.value(named, at, UNSET)?.name, at, UNSET))
            .map(|name| self.names.get(name))
            .collect()
    }

    fn read_node(&mut self, object: &wire::Node, problems: &Problems) -> Node {
        let zone = label(&object.metadata, ZONE).filter(|zone| !zone.is_empty());
        Node {
            addresses: node_addresses(object, problems),
            zone: zone.map(|zone| self.names.get(zone)),
            pod_cidrs: pod_cidrs(object, problems),
            is_leaving: object.metadata.deletion_timestamp.is_some() || has_taint(object, TO_BE_DELETED),
        }
    }
}

/// When what a slice says began to be so. Of no consequence, so one that cannot be read is as good as none.
fn triggered(metadata: &ObjectMeta) -> Option<SystemTime> {
    let text = metadata.annotations.as_ref()?.get(wire::TRIGGER_TIME)?;
    text.parse::<Timestamp>().ok().map(SystemTime::from)
}

fn has_taint(object: &wire::Node, key: &str) -> bool {
    let Lenient::Given(spec) = &object.spec else { return false };
    let Lenient::Given(taints) = &spec.taints else { return false };
    taints
        .iter()
        .any(|taint| matches!(taint, Lenient::Given(wire::Taint { key: Lenient::Given(text) }) if **text == *key))
}

/// Of another Node only the addresses matter.
fn neighbour(object: &wire::Node) -> Converted<Vec<IpAddr>> {
    let problems = Problems::default();
    let addresses = node_addresses(object, &problems);
    problems.with(Outcome::Serve(addresses))
}

/// A list without room to spare: it lives as long as the object is as it is.
fn to_keep<T>(items: impl Iterator<Item = T>) -> Vec<T> {
    let mut items: Vec<T> = items.collect();
    items.shrink_to_fit();
    items
}

/// The internal addresses of a Node, and then its external ones.
fn node_addresses(object: &wire::Node, problems: &Problems) -> Vec<IpAddr> {
    const UNUSED: &str = "this address is not used";
    let status = problems.value(&object.status, "status", "the Node counts as without addresses");
    let mut internal = Vec::new();
    let mut external = Vec::new();
    for (at, address) in status
        .into_iter()
        .flat_map(|status| problems.items(&status.addresses, "status.addresses", "the Node counts as without"))
    {
        let Some(address) = problems.value(address, at, UNUSED) else { continue };
        let list = match problems.value(&address.r#type, In(at, "type"), UNUSED).map_or("", |text| text) {
            "InternalIP" => &mut internal,
            "ExternalIP" => &mut external,
            // Names, and types that others make up.
            _ => continue,
        };
        let text = problems.value(&address.address, In(at, "address"), UNUSED);
        list.extend(text.and_then(|text| problems.ip(text, In(at, "address"), UNUSED)));
    }
    internal.append(&mut external);
    internal
}

/// The ranges of a Node's pods, one a family. (The API server fills in both fields.)
fn pod_cidrs(object: &wire::Node, problems: &Problems) -> Vec<IpNet> {
    const UNUSED: &str = "this range is not used";
    const SINGLE: &str = "spec.podCIDR";
    let Some(spec) = problems.value(&object.spec, "spec", "the Node counts as without pod ranges") else {
        return Vec::new();
    };
    let mut ranges: Vec<IpNet> = Vec::new();
    let mut is_listed = false;
    for (at, text) in problems.items(&spec.pod_cidrs, "spec.podCIDRs", "the Node counts as without") {
        is_listed = true;
        let Some(text) = problems.value(text, at, UNUSED) else { continue };
        let Some(range) = problems.range(text, at, UNUSED) else { continue };
        let family = Family::of(range.addr());
        if ranges.iter().any(|other| Family::of(other.addr()) == family) {
            problems
                .add(format_args!("{at} {range} is a second one of {}: {UNUSED}; give one a family", family.name()));
        } else {
            ranges.push(range);
        }
    }
    if !is_listed {
        let single = problems.value(&spec.pod_cidr, SINGLE, UNUSED).filter(|text| !text.is_empty());
        ranges.extend(single.and_then(|text| problems.range(text, SINGLE, UNUSED)));
    }
    ranges
}

/// Only the first address counts: further ones are other addresses of the same endpoint.
fn first_address(endpoint: &wire::Endpoint, at: Item<&str>, family: Family, problems: &Problems) -> Option<IpAddr> {
    let addresses = problems.field(&endpoint.addresses, In(at, "addresses"), ENDPOINT_OUT).ok()?;
    let Some(first) = addresses.and_then(|addresses| addresses.first()) else {
        problems.add(format_args!("{at} has no address: {ENDPOINT_OUT}; give it one"));
        return None;
    };
    let at = In(at, "addresses[0]");
    let text = problems.field(first, at, ENDPOINT_OUT).ok()?.map_or("", |text| text);
    let address = problems.ordinary_ip(text, at, ENDPOINT_OUT)?;
    if Family::of(address) != family {
        problems.add(format_args!(
            "{at} {address} is not {}, the slice's addressType: {ENDPOINT_OUT}; put it into a slice of its own type",
            family.name()
        ));
        return None;
    }
    Some(address)
}

fn label<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    meta.labels.as_ref()?.get(key).map(String::as_str)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}
