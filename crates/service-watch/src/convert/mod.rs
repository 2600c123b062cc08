//! Conversion of API objects to the model: kube-proxy's rules for what it serves, and validation that reports what is
//! skipped. One file for each kind; this one has what they share.

mod endpoint_slice;
mod node;
mod problems;
mod service;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use kube::api::ObjectMeta;
use serde::de::DeserializeOwned;

use self::node::peer_node;
use self::problems::{Child, Index, Interner, Problems};
use crate::lenient::Lenient;
use crate::model::{Change, EndpointSlice, Node, ObjectName, Protocol, Service};
use crate::panics::{caught, point};
use crate::report::{Kind, Subject};
use crate::wire;

/// Effects of a problem, as the end of a message.
const OBJECT_SKIPPED: &str = "the object cannot be used";
const PORT_SKIPPED: &str = "this port is not served";
const TREATED_AS_UNSET: &str = "treated as unset";

/// An API object of a kind that a proxy reads.
pub(crate) trait Object:
    kube::Resource<DynamicType = ()> + DeserializeOwned + Clone + fmt::Debug + Send + 'static
{
    const KIND: Kind;

    /// The conversion itself.
    fn convert_unguarded(&self, name: &ObjectName, converter: &mut Converter) -> Converted<Change>;

    /// What becomes of the object. One that the conversion panics on is invalid.
    fn convert(&self, name: &ObjectName, converter: &mut Converter) -> Converted<Change> {
        let converted = caught(|| {
            point("convert", name);
            self.convert_unguarded(name, converter)
        });
        converted
            .unwrap_or_else(|panic| Converted { conversion: Conversion::Invalid, problems: vec![panic.to_string()] })
    }
}

impl Object for wire::Service {
    const KIND: Kind = Kind::Service;

    fn convert_unguarded(&self, name: &ObjectName, converter: &mut Converter) -> Converted<Change> {
        converter.service(name, self).map(Change::Service)
    }
}

impl Object for wire::EndpointSlice {
    const KIND: Kind = Kind::EndpointSlice;

    fn convert_unguarded(&self, name: &ObjectName, converter: &mut Converter) -> Converted<Change> {
        converter.slice(name, self).map(Change::Slice)
    }
}

impl Object for wire::Node {
    const KIND: Kind = Kind::Node;

    fn convert_unguarded(&self, name: &ObjectName, converter: &mut Converter) -> Converted<Change> {
        if name.name() == &*converter.node_name {
            converter.node(self).map(Change::Node)
        } else {
            peer_node(self).map(|addresses| Change::PeerNode(name.name().into(), addresses))
        }
    }
}

/// The result of converting an object.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Converted<T> {
    pub(crate) conversion: Conversion<T>,
    /// What was skipped and why.
    pub(crate) problems: Vec<String>,
}

impl<T> Converted<T> {
    fn map<U>(self, f: impl FnOnce(T) -> U) -> Converted<U> {
        let conversion = match self.conversion {
            Conversion::Serve(value) => Conversion::Serve(f(value)),
            Conversion::Ignore => Conversion::Ignore,
            Conversion::Invalid => Conversion::Invalid,
        };
        Converted { conversion, problems: self.problems }
    }
}

/// What becomes of an object.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Conversion<T> {
    /// It is served.
    Serve(T),
    /// It is not for this proxy, such as a headless Service.
    Ignore,
    /// It is invalid as a whole: its last valid version stays in use.
    Invalid,
}

/// The problem to report for [`Conversion::Invalid`].
pub(crate) fn invalid_object(has_valid_version: bool) -> String {
    if has_valid_version {
        "is invalid: its last valid version stays in use until it is corrected".into()
    } else {
        "is invalid and has no earlier valid version: nothing is removed until it is corrected".into()
    }
}

/// Converts objects; interns strings that many of them have in common.
#[derive(Debug)]
pub(crate) struct Converter {
    /// The name of this agent's Node.
    node_name: Arc<str>,
    names: Interner,
    /// The objects are manifests: no API server sets defaults, and no other controller owns any of them.
    for_manifests: bool,
}

impl Converter {
    /// A converter for objects of an API server.
    pub(crate) fn new(node_name: Arc<str>) -> Self {
        Self { node_name, names: Interner::default(), for_manifests: false }
    }

    /// A converter for manifests, where a missing field that an API server would set is a problem.
    pub(crate) fn for_manifests(node_name: Arc<str>) -> Self {
        Self { for_manifests: true, ..Self::new(node_name) }
    }

    /// The change for a deleted object.
    pub(crate) fn deletion(&self, subject: Subject) -> Option<Change> {
        match subject {
            Subject::Service(name) => Some(Change::ServiceDeleted(name)),
            Subject::EndpointSlice(name) => Some(Change::SliceDeleted(name)),
            Subject::Node(name) if name == self.node_name => Some(Change::NodeDeleted),
            Subject::Node(name) => Some(Change::PeerNodeDeleted(name)),
            Subject::File(_) | Subject::Watch(_) => None,
        }
    }

    /// The namespace and name; a manifest without namespace means `default`. `None` if a name is not usable: the API
    /// allows at most 253 bytes of letters, digits, `-` and `.`, and other code relies on that.
    pub(crate) fn object_name(meta: &ObjectMeta) -> Option<ObjectName> {
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
        let conversion = self.read_service(name, object, &problems);
        problems.into_converted(conversion)
    }

    fn slice(&mut self, name: &ObjectName, object: &wire::EndpointSlice) -> Converted<EndpointSlice> {
        let problems = Problems::default();
        let conversion = self.read_slice(name, object, &problems);
        problems.into_converted(conversion)
    }

    fn node(&mut self, object: &wire::Node) -> Converted<Node> {
        let problems = Problems::default();
        let node = self.read_node(object, &problems);
        problems.into_converted(Conversion::Serve(node))
    }

    /// The name and protocol of a port: a Service's port and a slice's port match if both are equal.
    fn port_identity(
        &mut self,
        name: &Lenient<Box<str>>,
        protocol: &Lenient<Box<str>>,
        at: Index<&str>,
        problems: &Problems,
    ) -> Option<(Arc<str>, Protocol)> {
        // The API server makes an absent name "".
        let name = problems.field(name, Child(at, "name"), PORT_SKIPPED).ok()?.map_or("", |name| name);
        let protocol = match problems.field(protocol, Child(at, "protocol"), PORT_SKIPPED).ok()?.map_or("", |text| text)
        {
            "TCP" | "" => Protocol::Tcp,
            "UDP" => Protocol::Udp,
            "SCTP" => Protocol::Sctp,
            other => {
                problems.unknown_value(other, Child(at, "protocol"), PORT_SKIPPED, "TCP, UDP or SCTP");
                return None;
            }
        };
        Some((self.names.get(name), protocol))
    }
}

/// Collects without spare capacity, since the list is kept for as long as the object does not change.
fn collect_exact<T>(items: impl Iterator<Item = T>) -> Vec<T> {
    let mut items: Vec<T> = items.collect();
    items.shrink_to_fit();
    items
}

fn label<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    meta.labels.as_ref()?.get(key).map(String::as_str)
}

/// `v1.IPFamily` of Kubernetes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IpFamily {
    V4,
    V6,
}

impl IpFamily {
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
