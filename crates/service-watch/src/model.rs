//! The data model of changes: plain values, without the types of a client library.
//!
//! A source (an API server, a directory of manifests) converts what it reads into [`Change`]s. All values are
//! validated: an address is an [`IpAddr`], a port is not zero, a name is not empty. Invalid input never becomes a
//! `Change`; the source reports it.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;

/// A transport protocol a Service port can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP, the default.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// The namespace and name of an object, as in `default/web`. Cheap to clone, since it is kept in many places.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ObjectName(Arc<str>);

impl ObjectName {
    /// Creates a name. Neither part may be empty, and the namespace must not contain `/`.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self([namespace, "/", name].concat().into())
    }

    /// The namespace; never empty.
    pub fn namespace(&self) -> &str {
        self.parts().0
    }

    /// The name; never empty.
    pub fn name(&self) -> &str {
        self.parts().1
    }

    fn parts(&self) -> (&str, &str) {
        self.0.split_once('/').unwrap_or(("default", &self.0))
    }
}

/// Ordered by namespace, then by name.
impl Ord for ObjectName {
    fn cmp(&self, other: &Self) -> Ordering {
        // The separator sorts before every character of a namespace.
        let rank = |byte| if byte == b'/' { 0 } else { byte };
        self.0.bytes().map(rank).cmp(other.0.bytes().map(rank))
    }
}

impl PartialOrd for ObjectName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `internalTrafficPolicy` or `externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TrafficPolicy {
    /// Any endpoint of the cluster.
    #[default]
    Cluster,
    /// Endpoints on this node.
    Local,
}

/// `spec.type`. Headless and `ExternalName` Services never become a [`Service`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ServiceKind {
    /// `ClusterIP`.
    #[default]
    ClusterIp,
    /// `NodePort`.
    NodePort,
    /// `LoadBalancer`.
    LoadBalancer,
}

/// A Service that has at least one ClusterIP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub name: ObjectName,
    /// `metadata.creationTimestamp` in seconds since 1970; `None` where the source has none. Of Services that
    /// claim the same front end, the oldest gets it.
    pub created: Option<i64>,
    /// `spec.type`.
    pub kind: ServiceKind,
    /// At most one ClusterIP of each family; never empty.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`, both families.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` whose `ipMode` is unset or `VIP`, both families.
    pub load_balancer_ips: Vec<IpAddr>,
    /// The ports, in the order of the object.
    pub ports: Vec<ServicePort>,
    /// Seconds of `ClientIP` affinity; `None` without affinity.
    pub affinity_seconds: Option<u32>,
    /// `spec.internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// `spec.loadBalancerSourceRanges`, both families: the clients that may connect to
    /// [`Service::load_balancer_ips`]. `None` allows all; an empty list allows none.
    pub source_ranges: Option<Vec<IpNet>>,
    /// `spec.healthCheckNodePort`: where load balancers ask whether the node has endpoints of the Service.
    pub health_check_node_port: Option<NonZeroU16>,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// The port's name; empty for the only port of a Service.
    pub name: Arc<str>,
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// The port on the VIPs.
    pub port: NonZeroU16,
    /// The port on the node's addresses, if any.
    pub node_port: Option<NonZeroU16>,
}

/// A slice of a Service's endpoints, all of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Namespace and name.
    pub name: ObjectName,
    /// The Service it belongs to (label `kubernetes.io/service-name`), in the slice's namespace.
    pub service: ObjectName,
    /// Whether `addressType` is `IPv6`, and not `IPv4`.
    pub is_ipv6: bool,
    /// The ports every endpoint of the slice listens on.
    pub ports: Vec<SlicePort>,
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
    /// The time of the change that led to this version of the slice (annotation
    /// `endpoints.kubernetes.io/last-change-trigger-time`, set by the EndpointSlice controller).
    pub trigger_time: Option<SystemTime>,
}

/// A port of an EndpointSlice; it serves the Service port of the same name and protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// The port's name; may be empty.
    pub name: Arc<str>,
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// The port the endpoints listen on.
    pub port: NonZeroU16,
}

/// An endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The first address of the endpoint, of the slice's family.
    pub address: IpAddr,
    /// `conditions.ready`; unset means ready.
    pub ready: bool,
    /// `conditions.serving`; unset means serving.
    pub serving: bool,
    /// `conditions.terminating`; unset means not terminating.
    pub terminating: bool,
    /// `nodeName`.
    pub node: Option<Arc<str>>,
    /// `hints`. Boxed to keep endpoints small: most have none.
    pub hints: Option<Box<Hints>>,
}

/// `hints` of an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// `hints.forZones`.
    pub zones: Vec<Arc<str>>,
    /// `hints.forNodes`.
    pub nodes: Vec<Arc<str>>,
}

/// This agent's Node object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// IP addresses of `status.addresses`: first those of type `InternalIP`, then `ExternalIP`.
    pub addresses: Vec<IpAddr>,
    /// Label `topology.kubernetes.io/zone`; `None` when unset or empty.
    pub zone: Option<Arc<str>>,
    /// `spec.podCIDRs`, or `spec.podCIDR` alone: the pod ranges of this node, at most one of each family.
    pub pod_cidrs: Vec<IpNet>,
    /// Whether the Node is being deleted, or about to be by the cluster autoscaler (taint
    /// `ToBeDeletedByClusterAutoscaler`).
    pub is_being_removed: bool,
}

/// A change that a source sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A Service is new or changed.
    Service(Service),
    /// A Service was deleted, or is no longer served by this proxy.
    ServiceDeleted(ObjectName),
    /// A slice is new or changed.
    Slice(EndpointSlice),
    /// A slice was deleted, or is no longer read by this proxy.
    SliceDeleted(ObjectName),
    /// This agent's Node is new or changed.
    Node(Node),
    /// This agent's Node was deleted.
    NodeDeleted,
    /// Another Node is new or changed: its name, and its addresses as in [`Node::addresses`].
    PeerNode(Arc<str>, Vec<IpAddr>),
    /// Another Node was deleted.
    PeerNodeDeleted(Arc<str>),
    /// Where this agent reaches the API server: addresses of the server's name, and peers of the agent's connections. Includes those
    /// of before. Sent before the objects of a response from a new address.
    ApiServerAddresses(BTreeSet<SocketAddr>),
    /// Whether there is input that never could be parsed, such as an invalid file at the start. While there is, missing
    /// objects may be in it, so nothing may be treated as deleted. Sent before `Synced` and when it changes; initially
    /// false.
    Incomplete(bool),
    /// Sent once, after all objects that existed at the start. Nothing may be programmed before.
    Synced,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_ordered_by_namespace_and_then_by_name() {
        let sorted = [("a", "z"), ("a-b", "a"), ("a.b", "a"), ("ab", "a"), ("ab", "a-b"), ("ab", "aa"), ("b", "a")]
            .map(|(namespace, name)| ObjectName::new(namespace, name));
        for (i, a) in sorted.iter().enumerate() {
            for (j, b) in sorted.iter().enumerate() {
                assert_eq!((a.cmp(b), a == b), (i.cmp(&j), i == j), "{a} {b}");
                let parts = |it: &ObjectName| (it.namespace().to_owned(), it.name().to_owned());
                assert_eq!(parts(a).cmp(&parts(b)), i.cmp(&j));
            }
        }
        assert_eq!(sorted[1].to_string(), "a-b/a");
    }
}
