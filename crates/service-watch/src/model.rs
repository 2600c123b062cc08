//! The vocabulary of changes: plain values without a client library's types. Whoever acts on changes needs this and no more.
//!
//! A source (an API server, a directory of manifests) turns what it reads into [`Change`]s. Everything here is already
//! checked: an address is an [`IpAddr`], a port is not zero, a name is not empty. What could not be understood never
//! becomes a `Change`; the source reports it.

use std::cmp::Ordering;
use std::fmt;
use std::net::IpAddr;
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

/// Namespace and name of an object, as in `default/web`. Small, for each is kept in many places.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ObjectName(Arc<str>);

impl ObjectName {
    /// `namespace/name`. Neither is empty, and a namespace has no `/` in it.
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

/// By namespace, and then by name.
impl Ord for ObjectName {
    fn cmp(&self, other: &Self) -> Ordering {
        // What ends a namespace comes before all that may be in one.
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

/// What `internalTrafficPolicy` and `externalTrafficPolicy` say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TrafficPolicy {
    /// Any endpoint of the cluster.
    #[default]
    Cluster,
    /// Endpoints on this node.
    Local,
}

/// `spec.type`, as far as it matters to a proxy. Headless and `ExternalName` Services never become a [`Service`].
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
    /// Which Service.
    pub name: ObjectName,
    /// `metadata.creationTimestamp` in seconds since 1970; `None` where the source has none. Of two Services that
    /// claim one front end the older wins.
    pub created: Option<i64>,
    /// `spec.type`.
    pub kind: ServiceKind,
    /// At most one ClusterIP a family; never empty.
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
    /// `spec.loadBalancerSourceRanges`, both families: who may connect to [`Service::load_balancer_ips`]. `None` means
    /// everybody; a list in which nothing is left means nobody.
    pub source_ranges: Option<Vec<IpNet>>,
    /// `spec.healthCheckNodePort`: where the node tells load balancers whether it has endpoints of the Service.
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
    /// Which slice.
    pub name: ObjectName,
    /// The Service it belongs to (label `kubernetes.io/service-name`), in the slice's namespace.
    pub service: ObjectName,
    /// Whether `addressType` is `IPv6`, and not `IPv4`.
    pub is_ipv6: bool,
    /// The ports every endpoint of the slice listens on.
    pub ports: Vec<SlicePort>,
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
    /// When what the slice now says began to be so, as the controller that writes slices has it (annotation
    /// `endpoints.kubernetes.io/last-change-trigger-time`).
    pub triggered: Option<SystemTime>,
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
    /// `hints`. Boxed, since most endpoints have none and there may be very many.
    pub hints: Option<Box<Hints>>,
}

/// Who is to use an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// `hints.forZones`.
    pub zones: Vec<Arc<str>>,
    /// `hints.forNodes`.
    pub nodes: Vec<Arc<str>>,
}

/// The agent's own Node object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// IP addresses of `status.addresses`: first those of type `InternalIP`, then `ExternalIP`.
    pub addresses: Vec<IpAddr>,
    /// Label `topology.kubernetes.io/zone`; `None` when unset or empty.
    pub zone: Option<Arc<str>>,
    /// `spec.podCIDRs`, or `spec.podCIDR` alone: the ranges of the pods on this node, at most one a family.
    pub pod_cidrs: Vec<IpNet>,
    /// Whether it is to go: it is being deleted, or the cluster autoscaler has marked it (taint
    /// `ToBeDeletedByClusterAutoscaler`).
    pub is_leaving: bool,
}

/// What a source says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A Service is new or changed.
    Service(Service),
    /// A Service is gone, or no longer one a proxy serves.
    ServiceGone(ObjectName),
    /// A slice is new or changed.
    Slice(EndpointSlice),
    /// A slice is gone, or no longer one a proxy reads.
    SliceGone(ObjectName),
    /// The agent's own Node is new or changed.
    Node(Node),
    /// The agent's own Node is gone.
    NodeGone,
    /// Another Node is new or changed: its name, and its addresses as in [`Node::addresses`].
    Neighbour(Arc<str>, Vec<IpAddr>),
    /// Another Node is gone.
    NeighbourGone(Arc<str>),
    /// Whether there is something that could not be understood even once, such as a file that did not parse at the start.
    /// While there is, what is missing may be in it: nothing may be taken for gone. Said before `Synced` and when it changes;
    /// not said means no.
    Incomplete(bool),
    /// Said once: all that existed at the start has been said. Nothing is programmed before.
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
