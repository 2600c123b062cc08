//! The API's Services, EndpointSlices and Nodes, reduced to the fields that a proxy reads.
//!
//! Decoding never fails for a field of the wrong type ([`Lenient`]). Metadata is reduced too: managed fields and
//! annotations are often larger than the rest of the object. (An annotation that is needed must be added to
//! [`Metadata`].)

use std::borrow::Cow;
use std::collections::BTreeMap;

use kube::Resource;
use kube::api::ObjectMeta;
use kube::core::{ClusterResourceScope, NamespaceResourceScope};
use serde::{Deserialize, Deserializer};

use crate::lenient::{Lenient, lenient_structs};

type Text = Lenient<Box<str>>;
type List<T> = Lenient<Vec<Lenient<T>>>;

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Service {
    #[serde(deserialize_with = "metadata")]
    pub(crate) metadata: ObjectMeta,
    pub(crate) spec: Lenient<ServiceSpec>,
    pub(crate) status: Lenient<ServiceStatus>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct ServiceSpec {
    pub(crate) r#type: Text,
    #[serde(rename = "clusterIP")]
    pub(crate) cluster_ip: Text,
    #[serde(rename = "clusterIPs")]
    pub(crate) cluster_ips: List<Box<str>>,
    pub(crate) ip_families: List<Box<str>>,
    #[serde(rename = "externalIPs")]
    pub(crate) external_ips: List<Box<str>>,
    pub(crate) ports: List<ServicePort>,
    pub(crate) session_affinity: Text,
    pub(crate) session_affinity_config: Lenient<AffinityConfig>,
    pub(crate) internal_traffic_policy: Text,
    pub(crate) external_traffic_policy: Text,
    pub(crate) load_balancer_source_ranges: List<Box<str>>,
    pub(crate) health_check_node_port: Lenient<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct ServicePort {
    pub(crate) name: Text,
    pub(crate) protocol: Text,
    pub(crate) port: Lenient<i64>,
    pub(crate) node_port: Lenient<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct AffinityConfig {
    #[serde(rename = "clientIP")]
    pub(crate) client_ip: Lenient<ClientIpConfig>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct ClientIpConfig {
    pub(crate) timeout_seconds: Lenient<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct ServiceStatus {
    pub(crate) load_balancer: Lenient<LoadBalancer>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct LoadBalancer {
    pub(crate) ingress: List<Ingress>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Ingress {
    pub(crate) ip: Text,
    pub(crate) ip_mode: Text,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct EndpointSlice {
    #[serde(deserialize_with = "metadata")]
    pub(crate) metadata: ObjectMeta,
    pub(crate) address_type: Text,
    pub(crate) ports: List<SlicePort>,
    pub(crate) endpoints: List<Endpoint>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct SlicePort {
    pub(crate) name: Text,
    pub(crate) protocol: Text,
    pub(crate) port: Lenient<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Endpoint {
    pub(crate) addresses: List<Box<str>>,
    pub(crate) conditions: Lenient<Conditions>,
    pub(crate) node_name: Text,
    pub(crate) hints: Lenient<Hints>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Conditions {
    pub(crate) ready: Lenient<bool>,
    pub(crate) serving: Lenient<bool>,
    pub(crate) terminating: Lenient<bool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Hints {
    pub(crate) for_zones: List<Named>,
    pub(crate) for_nodes: List<Named>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Named {
    pub(crate) name: Text,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Node {
    #[serde(deserialize_with = "metadata")]
    pub(crate) metadata: ObjectMeta,
    pub(crate) spec: Lenient<NodeSpec>,
    pub(crate) status: Lenient<NodeStatus>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pub(crate) pod_cidr: Text,
    #[serde(rename = "podCIDRs")]
    pub(crate) pod_cidrs: List<Box<str>>,
    pub(crate) taints: List<Taint>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Taint {
    pub(crate) key: Text,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct NodeStatus {
    pub(crate) addresses: List<NodeAddress>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct NodeAddress {
    pub(crate) r#type: Text,
    pub(crate) address: Text,
}

/// The metadata that is used; the rest is not allocated.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Metadata {
    name: Text,
    namespace: Text,
    resource_version: Text,
    creation_timestamp: Text,
    deletion_timestamp: Text,
    labels: Lenient<BTreeMap<String, Label>>,
    annotations: Lenient<Annotations>,
}

/// The only annotation that is used.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Annotations {
    #[serde(rename = "endpoints.kubernetes.io/last-change-trigger-time")]
    trigger_time: Text,
}

/// The annotation with the time of the change that led to an EndpointSlice.
pub(crate) const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// A label's value. The API only has strings; in a manifest the quotes may be missing, and most labels count by their
/// presence alone.
type Label = Lenient<LabelText>;

#[derive(Clone, Debug)]
struct LabelText(String);

impl crate::lenient::LenientValue for LabelText {
    const EXPECTED: &'static str = "text";

    fn text(text: &str) -> Option<Self> {
        Some(Self(text.to_owned()))
    }

    fn number(number: i64) -> Option<Self> {
        Some(Self(number.to_string()))
    }

    fn boolean(boolean: bool) -> Option<Self> {
        Some(Self(boolean.to_string()))
    }
}

lenient_structs!(
    ServiceSpec,
    ServicePort,
    AffinityConfig,
    ClientIpConfig,
    ServiceStatus,
    LoadBalancer,
    Ingress,
    SlicePort,
    Endpoint,
    Conditions,
    Hints,
    Named,
    NodeSpec,
    Taint,
    NodeStatus,
    NodeAddress,
    Metadata,
    Annotations,
);

fn metadata<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    let Lenient::Present(slim) = Lenient::<Metadata>::deserialize(deserializer)? else {
        return Ok(ObjectMeta::default());
    };
    let text = |text: Text| match text {
        Lenient::Present(text) => Some(String::from(text)),
        Lenient::Absent | Lenient::Mismatch(_) => None,
    };
    // Only used to order Services that claim the same front end, so an unreadable time is ignored.
    let time = |text: Option<String>| text.and_then(|time| serde_json::from_value(time.into()).ok());
    let creation_timestamp = time(text(slim.creation_timestamp));
    let deletion_timestamp = time(text(slim.deletion_timestamp));
    let annotations = match slim.annotations {
        Lenient::Present(annotations) => {
            text(annotations.trigger_time).map(|time| [(TRIGGER_TIME.to_owned(), time)].into())
        }
        Lenient::Absent | Lenient::Mismatch(_) => None,
    };
    let labels = match slim.labels {
        Lenient::Present(labels) => Some(
            labels
                .into_iter()
                .map(|(key, value)| match value {
                    Lenient::Present(LabelText(value)) => (key, value),
                    Lenient::Absent | Lenient::Mismatch(_) => (key, String::new()),
                })
                .collect(),
        ),
        Lenient::Absent | Lenient::Mismatch(_) => None,
    };
    Ok(ObjectMeta {
        name: text(slim.name),
        namespace: text(slim.namespace),
        resource_version: text(slim.resource_version),
        creation_timestamp,
        deletion_timestamp,
        labels,
        annotations,
        ..ObjectMeta::default()
    })
}

macro_rules! resources {
    ($($object:ty: $group:literal, $kind:literal, $plural:literal, $scope:ty;)+) => {$(
        impl Resource for $object {
            type DynamicType = ();
            type Scope = $scope;

            fn kind((): &()) -> Cow<'_, str> {
                $kind.into()
            }

            fn group((): &()) -> Cow<'_, str> {
                $group.into()
            }

            fn version((): &()) -> Cow<'_, str> {
                "v1".into()
            }

            fn plural((): &()) -> Cow<'_, str> {
                $plural.into()
            }

            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    )+};
}

resources! {
    Service: "", "Service", "services", NamespaceResourceScope;
    EndpointSlice: "discovery.k8s.io", "EndpointSlice", "endpointslices", NamespaceResourceScope;
    Node: "", "Node", "nodes", ClusterResourceScope;
}
