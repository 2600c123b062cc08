//! EndpointSlices: from `wire` to the model.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use jiff::Timestamp;
use kube::api::ObjectMeta;

use super::problems::{Child, Index, Problems};
use super::{Conversion, Converter, IpFamily, OBJECT_SKIPPED, PORT_SKIPPED, TREATED_AS_UNSET, collect_exact, label};
use crate::lenient::Lenient;
use crate::model::{Endpoint, EndpointSlice, Hints, ObjectName, SlicePort};
use crate::wire;

/// A slice with this label, whatever its value, belongs to a headless Service.
const HEADLESS: &str = "service.kubernetes.io/headless";
/// The Service a slice belongs to.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
const ENDPOINT_SKIPPED: &str = "this endpoint gets no traffic";

impl Converter {
    pub(super) fn read_slice(
        &mut self,
        name: &ObjectName,
        object: &wire::EndpointSlice,
        problems: &Problems,
    ) -> Conversion<EndpointSlice> {
        if label(&object.metadata, HEADLESS).is_some() {
            return Conversion::Ignore;
        }
        let Some(service) = label(&object.metadata, SERVICE_NAME).filter(|service| !service.is_empty()) else {
            // On an API server, such a slice belongs to another controller.
            if self.for_manifests {
                problems.add(format_args!(
                    "has no label {SERVICE_NAME}, so it belongs to no Service: skipped; set it to the Service's name"
                ));
            }
            return Conversion::Ignore;
        };
        let Ok(address_type) = problems.field(&object.address_type, "addressType", OBJECT_SKIPPED) else {
            return Conversion::Invalid;
        };
        let family = match address_type.map_or("", |text| text) {
            "IPv4" => IpFamily::V4,
            "IPv6" => IpFamily::V6,
            "FQDN" => return Conversion::Ignore,
            other => {
                problems.unknown_value(other, "addressType", OBJECT_SKIPPED, "IPv4 or IPv6");
                return Conversion::Invalid;
            }
        };
        Conversion::Serve(EndpointSlice {
            name: name.clone(),
            service: ObjectName::new(name.namespace(), service),
            is_ipv6: family == IpFamily::V6,
            ports: collect_exact(
                problems
                    .items(&object.ports, "ports", "no port is served")
                    .filter_map(|(at, port)| self.slice_port(port, at, problems)),
            ),
            endpoints: collect_exact(
                problems
                    .items(&object.endpoints, "endpoints", "no endpoint gets traffic")
                    .filter_map(|(at, endpoint)| self.endpoint(endpoint, at, family, problems)),
            ),
            trigger_time: trigger_time(&object.metadata),
        })
    }

    fn slice_port(
        &mut self,
        port: &Lenient<wire::SlicePort>,
        at: Index<&str>,
        problems: &Problems,
    ) -> Option<SlicePort> {
        let port = problems.value(port, at, PORT_SKIPPED)?;
        // A port without number means all ports, which is for other consumers and no problem.
        let number = *problems.value(&port.port, Child(at, "port"), PORT_SKIPPED)?;
        let number = problems.port(number, Child(at, "port"), PORT_SKIPPED)?;
        let (name, protocol) = self.port_identity(&port.name, &port.protocol, at, problems)?;
        Some(SlicePort { name, protocol, port: number })
    }

    fn endpoint(
        &mut self,
        endpoint: &Lenient<wire::Endpoint>,
        at: Index<&str>,
        family: IpFamily,
        problems: &Problems,
    ) -> Option<Endpoint> {
        let endpoint = problems.value(endpoint, at, ENDPOINT_SKIPPED)?;
        let address = first_address(endpoint, at, family, problems)?;
        let unset = wire::Conditions::default();
        let conditions = problems.field(&endpoint.conditions, Child(at, "conditions"), ENDPOINT_SKIPPED).ok()?;
        let conditions = conditions.unwrap_or(&unset);
        let condition = |value: &Lenient<bool>, name: &'static str, unset: bool| {
            let value = problems.field(value, Child(Child(at, "conditions"), name), ENDPOINT_SKIPPED).ok()?;
            Some(value.copied().unwrap_or(unset))
        };
        let ready = condition(&conditions.ready, "ready", true)?;
        let serving = condition(&conditions.serving, "serving", true)?;
        let terminating = condition(&conditions.terminating, "terminating", false)?;
        let node = problems
            .value(&endpoint.node_name, Child(at, "nodeName"), TREATED_AS_UNSET)
            .filter(|node| !node.is_empty());
        let hints = problems.value(&endpoint.hints, Child(at, "hints"), TREATED_AS_UNSET);
        Some(Endpoint {
            address,
            ready,
            serving,
            terminating,
            node: node.map(|node| self.names.get(node)),
            hints: hints
                .map(|hints| Hints {
                    zones: self.hints(&hints.for_zones, Child(at, "hints.forZones"), problems),
                    nodes: self.hints(&hints.for_nodes, Child(at, "hints.forNodes"), problems),
                })
                .filter(|hints| *hints != Hints::default())
                .map(Box::new),
        })
    }

    fn hints(
        &mut self,
        names: &Lenient<Vec<Lenient<wire::Named>>>,
        at: Child<Index<&str>>,
        problems: &Problems,
    ) -> Vec<Arc<str>> {
        problems
            .items(names, at, TREATED_AS_UNSET)
            .filter_map(|(at, named)| {
                problems.value(&problems.value(named, at, TREATED_AS_UNSET)?.name, at, TREATED_AS_UNSET)
            })
            .map(|name| self.names.get(name))
            .collect()
    }
}

/// The time of the change that led to this slice. Only for metrics, so an unreadable one is ignored.
fn trigger_time(metadata: &ObjectMeta) -> Option<SystemTime> {
    let text = metadata.annotations.as_ref()?.get(wire::TRIGGER_TIME)?;
    text.parse::<Timestamp>().ok().map(SystemTime::from)
}

/// The first address. Further ones are alternatives for the same endpoint, which kube-proxy ignores too.
fn first_address(endpoint: &wire::Endpoint, at: Index<&str>, family: IpFamily, problems: &Problems) -> Option<IpAddr> {
    let addresses = problems.field(&endpoint.addresses, Child(at, "addresses"), ENDPOINT_SKIPPED).ok()?;
    let Some(first) = addresses.and_then(|addresses| addresses.first()) else {
        problems.add(format_args!("{at} has no address: {ENDPOINT_SKIPPED}; give it one"));
        return None;
    };
    let at = Child(at, "addresses[0]");
    let text = problems.field(first, at, ENDPOINT_SKIPPED).ok()?.map_or("", |text| text);
    let address = problems.usable_ip(text, at, ENDPOINT_SKIPPED)?;
    if IpFamily::of(address) != family {
        problems.add(format_args!(
            "{at} {address} is not {}, the slice's addressType: {ENDPOINT_SKIPPED}; put it into a slice of its own type",
            family.name()
        ));
        return None;
    }
    Some(address)
}
