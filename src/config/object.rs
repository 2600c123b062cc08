//! `KubeProxyConfiguration` of `kubeproxy.config.k8s.io/v1alpha1`: all fields of kube-proxy 1.36, and their defaults.
//!
//! Fields without a meaning in IPVS mode are kept too, to be shown by `/configz` and written by `--write-config-to`.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::go_syntax;

/// The `apiVersion` and `kind` that a file must have.
pub(crate) const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
pub(crate) const KIND: &str = "KubeProxyConfiguration";

/// The whole configuration. In a file an empty string, a missing number or a duration of 0 stands for the default,
/// which [`Configuration::apply_defaults`] fills in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Configuration {
    pub(crate) api_version: String,
    pub(crate) kind: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) feature_gates: BTreeMap<String, bool>,
    pub(crate) client_connection: ClientConnection,
    pub(crate) logging: Logging,
    pub(crate) hostname_override: String,
    pub(crate) bind_address: String,
    pub(crate) healthz_bind_address: String,
    pub(crate) metrics_bind_address: String,
    pub(crate) bind_address_hard_fail: bool,
    pub(crate) enable_profiling: bool,
    pub(crate) show_hidden_metrics_for_version: String,
    pub(crate) mode: String,
    pub(crate) iptables: Iptables,
    pub(crate) ipvs: Ipvs,
    pub(crate) winkernel: Winkernel,
    pub(crate) nftables: Nftables,
    pub(crate) detect_local_mode: String,
    pub(crate) detect_local: DetectLocal,
    #[serde(rename = "clusterCIDR")]
    pub(crate) cluster_cidr: String,
    pub(crate) node_port_addresses: Vec<String>,
    pub(crate) oom_score_adj: Option<i32>,
    pub(crate) conntrack: Conntrack,
    pub(crate) config_sync_period: go_syntax::Duration,
    pub(crate) port_range: String,
    pub(crate) windows_run_as_service: bool,
    /// Settings that kube-proxy does not have. It logs a warning about the field and ignores it.
    #[serde(rename = "kubeIPVS", skip_serializing_if = "KubeIpvs::is_default")]
    pub(crate) kube_ipvs: KubeIpvs,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ClientConnection {
    pub(crate) kubeconfig: String,
    pub(crate) accept_content_types: String,
    pub(crate) content_type: String,
    pub(crate) qps: f32,
    pub(crate) burst: i32,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Logging {
    pub(crate) format: String,
    pub(crate) flush_frequency: FlushFrequency,
    pub(crate) verbosity: u32,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) vmodule: Vec<Vmodule>,
    pub(crate) options: BTreeMap<String, BTreeMap<String, Value>>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Vmodule {
    pub(crate) file_pattern: String,
    pub(crate) verbosity: u32,
}

/// A duration that may also be given as a number of nanoseconds, and is serialized as one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FlushFrequency(pub(crate) go_syntax::Duration);

impl Serialize for FlushFrequency {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_i64(self.0.as_nanos())
    }
}

impl<'de> Deserialize<'de> for FlushFrequency {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a duration as in 5s, or a number of nanoseconds")]
        enum Either {
            Nanoseconds(i64),
            Duration(go_syntax::Duration),
        }
        Ok(match Either::deserialize(deserializer)? {
            Either::Nanoseconds(nanoseconds) => Self(go_syntax::Duration::from_nanos(nanoseconds)),
            Either::Duration(duration) => Self(duration),
        })
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Iptables {
    pub(crate) masquerade_bit: Option<i32>,
    pub(crate) masquerade_all: bool,
    pub(crate) localhost_node_ports: Option<bool>,
    pub(crate) sync_period: go_syntax::Duration,
    pub(crate) min_sync_period: go_syntax::Duration,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Ipvs {
    pub(crate) sync_period: go_syntax::Duration,
    pub(crate) min_sync_period: go_syntax::Duration,
    pub(crate) scheduler: String,
    #[serde(rename = "excludeCIDRs")]
    pub(crate) exclude_cidrs: Vec<String>,
    #[serde(rename = "strictARP")]
    pub(crate) strict_arp: bool,
    pub(crate) tcp_timeout: go_syntax::Duration,
    pub(crate) tcp_fin_timeout: go_syntax::Duration,
    pub(crate) udp_timeout: go_syntax::Duration,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Nftables {
    pub(crate) masquerade_bit: Option<i32>,
    pub(crate) masquerade_all: bool,
    pub(crate) sync_period: go_syntax::Duration,
    pub(crate) min_sync_period: go_syntax::Duration,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Winkernel {
    pub(crate) network_name: String,
    pub(crate) source_vip: String,
    #[serde(rename = "enableDSR")]
    pub(crate) enable_dsr: bool,
    pub(crate) root_hns_endpoint_name: String,
    pub(crate) forward_health_check_vip: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct DetectLocal {
    pub(crate) bridge_interface: String,
    pub(crate) interface_name_prefix: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Conntrack {
    pub(crate) max_per_core: Option<i32>,
    pub(crate) min: Option<i32>,
    pub(crate) tcp_established_timeout: Option<go_syntax::Duration>,
    pub(crate) tcp_close_wait_timeout: Option<go_syntax::Duration>,
    pub(crate) tcp_be_liberal: bool,
    pub(crate) udp_timeout: go_syntax::Duration,
    pub(crate) udp_stream_timeout: go_syntax::Duration,
}

/// Settings that only kube-ipvs has.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct KubeIpvs {
    /// How long a TCP real server that is being removed may keep its connections; 0 means as long as they last.
    pub(crate) drain_timeout: go_syntax::Duration,
    /// Whether to watch all Nodes, to know their addresses.
    pub(crate) watch_all_nodes: bool,
    /// Whether addresses of pods are served as external and load-balancer IPs.
    pub(crate) allow_pod_addresses: bool,
    /// How VIPs are bound to this node: `address` or `route`; empty means `address`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) vip_binding: String,
    /// Ranges of VIPs that are bound by one route each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) vip_ranges: Vec<String>,
    /// Whether the kernel estimates rates and sums up statistics; `None` leaves the kernel's setting.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) estimation: Option<bool>,
    /// Whether a list that lacks most known objects is read again before it is used; `None` means yes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) confirm_disappearance: Option<bool>,
    /// Whether other programs cannot change our tables of `nf_tables`, if the kernel can do that; `None` means yes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) own_tables: Option<bool>,
    /// How much one Service may have on this node.
    #[serde(skip_serializing_if = "ServiceBudget::is_default")]
    pub(crate) service_budget: ServiceBudget,
}

/// How much one Service may have on this node; `None` means the default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ServiceBudget {
    /// Virtual servers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) front_ends: Option<i32>,
    /// Real servers of all its virtual servers together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) real_servers: Option<i32>,
}

impl ServiceBudget {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl KubeIpvs {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Default for Configuration {
    /// An object without any field set.
    fn default() -> Self {
        Self {
            api_version: API_VERSION.to_owned(),
            kind: KIND.to_owned(),
            feature_gates: BTreeMap::new(),
            client_connection: ClientConnection::default(),
            logging: Logging::default(),
            hostname_override: String::new(),
            bind_address: String::new(),
            healthz_bind_address: String::new(),
            metrics_bind_address: String::new(),
            bind_address_hard_fail: false,
            enable_profiling: false,
            show_hidden_metrics_for_version: String::new(),
            mode: String::new(),
            iptables: Iptables::default(),
            ipvs: Ipvs::default(),
            winkernel: Winkernel::default(),
            nftables: Nftables::default(),
            detect_local_mode: String::new(),
            detect_local: DetectLocal::default(),
            cluster_cidr: String::new(),
            node_port_addresses: Vec::new(),
            oom_score_adj: None,
            conntrack: Conntrack::default(),
            config_sync_period: go_syntax::Duration::ZERO,
            port_range: String::new(),
            windows_run_as_service: false,
            kube_ipvs: KubeIpvs::default(),
        }
    }
}

impl Configuration {
    /// Fills in kube-proxy's defaults (`SetDefaults_KubeProxyConfiguration`). `ipvs.minSyncPeriod` has a default on the
    /// command line, and none in a file.
    pub(crate) fn apply_defaults(&mut self) {
        set_if_empty(&mut self.bind_address, "0.0.0.0");
        let is_v6 = service_watch::parse_ip(&self.bind_address).is_some_and(|address| address.is_ipv6());
        let [healthz, metrics] = if is_v6 { ["[::]", "[::1]"] } else { ["0.0.0.0", "127.0.0.1"] };
        set_if_empty(&mut self.healthz_bind_address, healthz);
        self.healthz_bind_address = with_port(&self.healthz_bind_address, 10256);
        set_if_empty(&mut self.metrics_bind_address, metrics);
        self.metrics_bind_address = with_port(&self.metrics_bind_address, 10249);
        self.default_modes();

        set_if_empty(&mut self.client_connection.content_type, "application/vnd.kubernetes.protobuf");
        if self.client_connection.qps == 0.0 {
            self.client_connection.qps = 5.0;
        }
        if self.client_connection.burst == 0 {
            self.client_connection.burst = 10;
        }
        set_if_empty(&mut self.logging.format, "text");
        if self.logging.flush_frequency.0 == go_syntax::Duration::ZERO {
            self.logging.flush_frequency.0 = go_syntax::Duration::from_secs(5);
        }

        self.iptables.masquerade_bit.get_or_insert(14);
        self.iptables.localhost_node_ports.get_or_insert(true);
        self.nftables.masquerade_bit.get_or_insert(14);
        self.oom_score_adj.get_or_insert(-999);
        let periods = [
            (&mut self.iptables.sync_period, 30),
            (&mut self.iptables.min_sync_period, 1),
            (&mut self.ipvs.sync_period, 30),
            (&mut self.nftables.sync_period, 30),
            (&mut self.nftables.min_sync_period, 1),
            (&mut self.config_sync_period, 15 * 60),
        ];
        for (period, default) in periods {
            if *period == go_syntax::Duration::ZERO {
                *period = go_syntax::Duration::from_secs(default);
            }
        }

        let conntrack = &mut self.conntrack;
        conntrack.max_per_core.get_or_insert(32 * 1024);
        conntrack.min.get_or_insert(128 * 1024);
        conntrack.tcp_established_timeout.get_or_insert(go_syntax::Duration::from_secs(24 * 3600));
        conntrack.tcp_close_wait_timeout.get_or_insert(go_syntax::Duration::from_secs(3600));
    }

    /// Fills in the modes that an empty string stands for.
    pub(crate) fn default_modes(&mut self) {
        set_if_empty(&mut self.mode, "ipvs");
        set_if_empty(&mut self.detect_local_mode, "ClusterCIDR");
    }

    /// The object as YAML, its fields in alphabetical order as kube-proxy writes them.
    pub(crate) fn to_yaml(&self) -> anyhow::Result<String> {
        Ok(serde_saphyr::to_string(&serde_json::to_value(self)?)?)
    }
}

fn set_if_empty(field: &mut String, default: &str) {
    if field.is_empty() {
        default.clone_into(field);
    }
}

/// Adds a port to an address that has none. Text that is not an address is returned as it is, to be refused by the
/// checks.
pub(crate) fn with_port(text: &str, port: u16) -> String {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    match service_watch::parse_ip(bare) {
        Some(std::net::IpAddr::V6(_)) => format!("[{bare}]:{port}"),
        Some(std::net::IpAddr::V4(_)) => format!("{bare}:{port}"),
        None => text.to_owned(),
    }
}
