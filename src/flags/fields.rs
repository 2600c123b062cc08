//! The flags that have a field in the configuration file: kube-proxy's, and at the end those only kube-ipvs has.

#![expect(clippy::doc_markdown, reason = "comments of flags are the text of --help")]

use std::str::FromStr as _;

use clap::Args;
use serde_json::Value;

use crate::config::go_syntax;
use crate::config::object::{Configuration, Vmodule, with_port};

/// `None` for a flag that was not given. The fields have the defaults.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct FieldFlags {
    /// How virtual servers choose real servers: rr, wrr, lc, wlc, lblc, lblcr, dh, sh, sed, nq, fo, ovf, mh or twos
    /// [default: rr]
    #[arg(long, value_name = "NAME", help_heading = "Services and their virtual servers")]
    ipvs_scheduler: Option<String>,

    /// The longest time between two audits, which compare everything in the kernel and repair it [default: 30s]
    #[arg(
        long,
        value_name = "DURATION",
        allow_hyphen_values = true,
        help_heading = "Services and their virtual servers"
    )]
    ipvs_sync_period: Option<go_syntax::Duration>,

    /// The shortest time from the end of a sync to the next one. Changes are gathered before for 20 ms, and up to 40 ms while more
    /// come [default: 1s; in a file 0s]
    #[arg(
        long,
        value_name = "DURATION",
        allow_hyphen_values = true,
        help_heading = "Services and their virtual servers"
    )]
    ipvs_min_sync_period: Option<go_syntax::Duration>,

    /// Ranges whose virtual servers are never deleted
    #[arg(long, value_name = "CIDR,...", value_delimiter = ',', help_heading = "Services and their virtual servers")]
    ipvs_exclude_cidrs: Option<Vec<String>>,

    /// Answer ARP requests only for addresses of the interface that received them. Required by load balancers that
    /// announce VIPs by ARP
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = go_syntax::parse_bool, help_heading = "Services and their virtual servers")]
    ipvs_strict_arp: Option<bool>,

    /// How long an idle TCP connection is kept, in whole seconds; 0s leaves the kernel's value [default: 0s]
    #[arg(
        long,
        value_name = "DURATION",
        allow_hyphen_values = true,
        help_heading = "Services and their virtual servers"
    )]
    ipvs_tcp_timeout: Option<go_syntax::Duration>,

    /// How long a TCP connection is kept after a FIN; 0s leaves the kernel's value [default: 0s]
    #[arg(
        long,
        value_name = "DURATION",
        allow_hyphen_values = true,
        help_heading = "Services and their virtual servers"
    )]
    ipvs_tcpfin_timeout: Option<go_syntax::Duration>,

    /// How long an idle UDP flow is kept; 0s leaves the kernel's value [default: 0s]
    #[arg(
        long,
        value_name = "DURATION",
        allow_hyphen_values = true,
        help_heading = "Services and their virtual servers"
    )]
    ipvs_udp_timeout: Option<go_syntax::Duration>,

    /// The node's addresses on which NodePorts listen: ranges, `primary` (its IPs), `all`, or several of them [default: all]
    #[arg(long, value_name = "CIDR,...", value_delimiter = ',', help_heading = "Services and their virtual servers")]
    nodeport_addresses: Option<Vec<String>>,

    /// Feature gates as NAME=true|false: only `AllowServiceExternalIPs` has an effect, others are ignored
    #[arg(long, value_name = "NAME=BOOL,...", value_delimiter = ',', value_parser = parse_optional_gate, help_heading = "Services and their virtual servers")]
    feature_gates: Option<Vec<Option<(String, bool)>>>,

    /// The proxy mode: only ipvs is supported [default: ipvs]
    #[arg(long, value_name = "MODE", help_heading = "Services and their virtual servers")]
    proxy_mode: Option<String>,

    /// Masquerade all traffic to ClusterIPs, that from pods too
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = go_syntax::parse_bool, help_heading = "Whose traffic is masqueraded")]
    masquerade_all: Option<bool>,

    /// The bit of a packet's mark, 0 to 31, by which packets to be masqueraded are marked [default: 14]
    #[arg(long, value_name = "BIT", allow_negative_numbers = true, help_heading = "Whose traffic is masqueraded")]
    iptables_masquerade_bit: Option<i32>,

    /// How to recognise traffic from pods, which is not masqueraded on its way to ClusterIPs: `ClusterCIDR`,
    /// `NodeCIDR`, `BridgeInterface` or `InterfaceNamePrefix` [default: ClusterCIDR]
    #[arg(long, value_name = "MODE", help_heading = "Whose traffic is masqueraded")]
    detect_local_mode: Option<String>,

    /// For `ClusterCIDR`, the range of pod addresses, one for each family; without one, pods are not recognised
    #[arg(long, value_name = "CIDR,...", help_heading = "Whose traffic is masqueraded")]
    cluster_cidr: Option<String>,

    /// For `BridgeInterface`, the bridge that pods of this node are connected to
    #[arg(long, value_name = "NAME", help_heading = "Whose traffic is masqueraded")]
    pod_bridge_interface: Option<String>,

    /// For `InterfaceNamePrefix`, the prefix of the names of all interfaces that lead to pods of this node
    #[arg(long, value_name = "PREFIX", help_heading = "Whose traffic is masqueraded")]
    pod_interface_name_prefix: Option<String>,

    /// The name of this node's Node object [default: the host's name]
    #[arg(long, value_name = "NAME", help_heading = "The node")]
    hostname_override: Option<String>,

    /// The address of this node, for its family; nothing listens on it [default: 0.0.0.0]
    #[arg(long, value_name = "IP", help_heading = "The node")]
    bind_address: Option<String>,

    /// The OOM score adjustment of this process, -1000 (never killed) to 1000 [default: -999]
    #[arg(long, value_name = "SCORE", allow_negative_numbers = true, help_heading = "The node")]
    oom_score_adj: Option<i32>,

    /// The limit of tracked connections for each processor; 0 leaves the kernel's limit [default: 32768]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, help_heading = "The node")]
    conntrack_max_per_core: Option<i32>,

    /// The smallest limit of tracked connections, unless --conntrack-max-per-core is 0 [default: 131072]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, help_heading = "The node")]
    conntrack_min: Option<i32>,

    /// How long an idle TCP connection is tracked, in whole seconds; 0s leaves the kernel's value [default: 24h]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true, help_heading = "The node")]
    conntrack_tcp_timeout_established: Option<go_syntax::Duration>,

    /// How long a TCP connection is tracked that the other side has closed; 0s leaves the kernel's value [default: 1h]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true, help_heading = "The node")]
    conntrack_tcp_timeout_close_wait: Option<go_syntax::Duration>,

    /// Let TCP packets outside the window pass; false leaves the kernel's value
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = go_syntax::parse_bool, help_heading = "The node")]
    conntrack_tcp_be_liberal: Option<bool>,

    /// How long a UDP flow is tracked that was not answered; 0s leaves the kernel's value [default: 0s]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true, help_heading = "The node")]
    conntrack_udp_timeout: Option<go_syntax::Duration>,

    /// How long an answered UDP flow is tracked; 0s leaves the kernel's value [default: 0s]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true, help_heading = "The node")]
    conntrack_udp_timeout_stream: Option<go_syntax::Duration>,

    /// The address on which to serve /healthz and /livez [default: 0.0.0.0:10256]
    #[arg(long, value_name = "IP:PORT", help_heading = "Health and metrics")]
    healthz_bind_address: Option<String>,

    /// The port of --healthz-bind-address if that has none; 0 disables it (deprecated: use --healthz-bind-address)
    #[arg(long, value_name = "PORT", help_heading = "Health and metrics")]
    healthz_port: Option<u16>,

    /// The address on which to serve metrics [default: 127.0.0.1:10249]
    #[arg(long, value_name = "IP:PORT", help_heading = "Health and metrics")]
    metrics_bind_address: Option<String>,

    /// The port of --metrics-bind-address if that has none; 0 disables it (deprecated: use --metrics-bind-address)
    #[arg(long, value_name = "PORT", help_heading = "Health and metrics")]
    metrics_port: Option<u16>,

    /// Exit if the agent cannot listen on one of these addresses, instead of trying again
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = go_syntax::parse_bool, help_heading = "Health and metrics")]
    bind_address_hard_fail: Option<bool>,

    /// Serve /debug on the metrics port
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = go_syntax::parse_bool, help_heading = "Health and metrics")]
    profiling: Option<bool>,

    /// No effect: no metric is hidden
    #[arg(long, value_name = "VERSION", help_heading = "Health and metrics")]
    show_hidden_metrics_for_version: Option<String>,

    /// The log level: 0 to 3 information, 4 each operation too, 6 everything [default: 0]
    #[arg(short = 'v', long = "v", value_name = "LEVEL", help_heading = "Logging")]
    verbosity: Option<u32>,

    /// text or json [default: text]
    #[arg(long, value_name = "FORMAT", help_heading = "Logging")]
    logging_format: Option<String>,

    /// No effect: --v applies to all modules
    #[arg(long, value_name = "PATTERN=LEVEL,...", value_delimiter = ',', value_parser = parse_optional_vmodule, help_heading = "Logging")]
    vmodule: Option<Vec<Option<Vmodule>>>,

    /// No effect: every line is written at once
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true, help_heading = "Logging")]
    log_flush_frequency: Option<go_syntax::Duration>,

    /// No effect: all logs go to standard error
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = go_syntax::parse_bool, help_heading = "Logging")]
    log_text_split_stream: Option<bool>,

    /// No effect: every line is written at once
    #[arg(long, value_name = "QUANTITY", help_heading = "Logging")]
    log_text_info_buffer_size: Option<String>,

    /// No effect: all logs go to standard error
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = go_syntax::parse_bool, help_heading = "Logging")]
    log_json_split_stream: Option<bool>,

    /// No effect: every line is written at once
    #[arg(long, value_name = "QUANTITY", help_heading = "Logging")]
    log_json_info_buffer_size: Option<String>,

    /// The kubeconfig of the API server
    #[arg(long, value_name = "FILE", help_heading = "The API server")]
    kubeconfig: Option<String>,

    /// No effect: objects are read as JSON
    #[arg(long, value_name = "TYPE", help_heading = "The API server")]
    kube_api_content_type: Option<String>,

    /// No effect: the agent sends few requests
    #[arg(long, value_name = "NUMBER", help_heading = "The API server")]
    kube_api_qps: Option<f32>,

    /// No effect: the agent sends few requests
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, help_heading = "The API server")]
    kube_api_burst: Option<i32>,

    /// No effect: there are no periodic resyncs from the API server
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true, help_heading = "The API server")]
    config_sync_period: Option<go_syntax::Duration>,

    /// No effect in this mode
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = go_syntax::parse_bool, help_heading = "Without effect")]
    iptables_localhost_nodeports: Option<bool>,

    /// No effect in this mode
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true, help_heading = "Without effect")]
    iptables_sync_period: Option<go_syntax::Duration>,

    /// No effect in this mode
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true, help_heading = "Without effect")]
    iptables_min_sync_period: Option<go_syntax::Duration>,

    /// No effect
    #[arg(long, value_name = "FILE", help_heading = "Without effect")]
    boot_id_file: Option<String>,

    /// No effect
    #[arg(long, value_name = "FILE", help_heading = "Without effect")]
    machine_id_file: Option<String>,

    /// How long a TCP endpoint that is being removed may keep its connections; then they are cut. 0s: as long as they
    /// last [default: 0s]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true, help_heading = "What kube-proxy does not have")]
    ipvs_drain_timeout: Option<go_syntax::Duration>,

    /// Watch all Nodes, to refuse VIPs that are an address of one of them: the API server then sends every status
    /// update of every Node
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = go_syntax::parse_bool, help_heading = "What kube-proxy does not have")]
    watch_all_nodes: Option<bool>,

    /// Serve external and load-balancer IPs that are addresses of pods: in the Node's podCIDRs, in --cluster-cidr, or of
    /// an endpoint of another Service. Otherwise they are refused, since this node could no longer reach the pod
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = go_syntax::parse_bool, help_heading = "What kube-proxy does not have")]
    allow_pod_addresses: Option<bool>,

    /// How VIPs are bound to this node: `address`, an address on kube-ipvs0 for each, or `route`, a local route for
    /// each, which costs less with thousands of VIPs [default: address]
    #[arg(long, value_name = "address|route", help_heading = "What kube-proxy does not have")]
    vip_binding: Option<String>,

    /// With --vip-binding=route, ranges that get one route instead of one for each VIP: the cluster's ranges of
    /// ClusterIPs. All addresses in them become local to the node; connections to those that are no VIP are refused
    #[arg(long, value_name = "CIDR,...", value_delimiter = ',', help_heading = "What kube-proxy does not have")]
    vip_ranges: Option<Vec<String>>,

    /// Whether the kernel sums up statistics and estimates rates of each virtual and real server, every 2 seconds:
    /// false saves that time, and `ipvsadm --stats` and `--rate` no longer change [default: as the kernel has it, which
    /// is true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = go_syntax::parse_bool, help_heading = "What kube-proxy does not have")]
    ipvs_estimation: Option<bool>,

    /// If a list of the API server lacks most of the known objects, read it again after 5 seconds before anything is
    /// removed because of it [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = go_syntax::parse_bool, help_heading = "What kube-proxy does not have")]
    confirm_disappearance: Option<bool>,

    /// Whether the tables of nf_tables belong to the agent while it runs, so that no other program can change or flush
    /// them. It requires Linux 6.9; before, the agent repairs such changes [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = go_syntax::parse_bool, help_heading = "What kube-proxy does not have")]
    own_tables: Option<bool>,

    /// How many virtual servers one Service may have on this node. Beyond that the rest of the Service is not served,
    /// and an Event says so [default: 100000]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, help_heading = "What kube-proxy does not have")]
    service_budget_front_ends: Option<i32>,

    /// How many real servers all virtual servers of one Service may have together on this node [default: 500000]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, help_heading = "What kube-proxy does not have")]
    service_budget_real_servers: Option<i32>,
}

impl FieldFlags {
    /// Those that have an effect beside a file: the ones that kube-proxy uses there, and those it does not have.
    pub(super) fn beside_file(self) -> Self {
        Self {
            hostname_override: self.hostname_override,
            verbosity: self.verbosity,
            logging_format: self.logging_format,
            vmodule: self.vmodule,
            log_flush_frequency: self.log_flush_frequency,
            log_text_split_stream: self.log_text_split_stream,
            log_text_info_buffer_size: self.log_text_info_buffer_size,
            log_json_split_stream: self.log_json_split_stream,
            log_json_info_buffer_size: self.log_json_info_buffer_size,
            ipvs_drain_timeout: self.ipvs_drain_timeout,
            watch_all_nodes: self.watch_all_nodes,
            allow_pod_addresses: self.allow_pod_addresses,
            vip_binding: self.vip_binding,
            vip_ranges: self.vip_ranges,
            ipvs_estimation: self.ipvs_estimation,
            service_budget_front_ends: self.service_budget_front_ends,
            service_budget_real_servers: self.service_budget_real_servers,
            confirm_disappearance: self.confirm_disappearance,
            own_tables: self.own_tables,
            ..Self::default()
        }
    }

    /// Whether `--cluster-cidr=` was given.
    pub(super) fn has_empty_cluster_cidr(&self) -> bool {
        self.cluster_cidr.as_deref() == Some("")
    }

    /// Applies the deprecated port flags. A port other than 0 counts only if the address has none, and the default
    /// address has one; 0 switches the server off.
    pub(super) fn apply_ports(&self, c: &mut Configuration) {
        for (address, port, default) in [
            (&mut c.healthz_bind_address, self.healthz_port, 10256),
            (&mut c.metrics_bind_address, self.metrics_port, 10249),
        ] {
            match port {
                Some(0) => address.clear(),
                _ => *address = with_port(address, port.unwrap_or(default)),
            }
        }
    }

    /// Overwrites fields of the configuration with the flags that were given.
    pub(super) fn apply(self, c: &mut Configuration) {
        set(&mut c.ipvs.scheduler, self.ipvs_scheduler);
        set(&mut c.ipvs.sync_period, self.ipvs_sync_period);
        set(&mut c.ipvs.min_sync_period, self.ipvs_min_sync_period);
        set(&mut c.ipvs.exclude_cidrs, self.ipvs_exclude_cidrs.map(without_empty));
        set(&mut c.ipvs.strict_arp, self.ipvs_strict_arp);
        set(&mut c.ipvs.tcp_timeout, self.ipvs_tcp_timeout);
        set(&mut c.ipvs.tcp_fin_timeout, self.ipvs_tcpfin_timeout);
        set(&mut c.ipvs.udp_timeout, self.ipvs_udp_timeout);
        set(&mut c.node_port_addresses, self.nodeport_addresses.map(without_empty));
        c.feature_gates.extend(self.feature_gates.into_iter().flatten().flatten());
        set(&mut c.mode, self.proxy_mode);
        set(&mut c.iptables.masquerade_all, self.masquerade_all);
        set_some(&mut c.iptables.masquerade_bit, self.iptables_masquerade_bit);
        set(&mut c.detect_local_mode, self.detect_local_mode);
        set(&mut c.cluster_cidr, self.cluster_cidr);
        set(&mut c.detect_local.bridge_interface, self.pod_bridge_interface);
        set(&mut c.detect_local.interface_name_prefix, self.pod_interface_name_prefix);
        set_unless_empty(&mut c.hostname_override, self.hostname_override);
        set_unless_empty(&mut c.bind_address, self.bind_address);
        set_some(&mut c.oom_score_adj, self.oom_score_adj);
        set_some(&mut c.conntrack.max_per_core, self.conntrack_max_per_core);
        set_some(&mut c.conntrack.min, self.conntrack_min);
        set_some(&mut c.conntrack.tcp_established_timeout, self.conntrack_tcp_timeout_established);
        set_some(&mut c.conntrack.tcp_close_wait_timeout, self.conntrack_tcp_timeout_close_wait);
        set(&mut c.conntrack.tcp_be_liberal, self.conntrack_tcp_be_liberal);
        set(&mut c.conntrack.udp_timeout, self.conntrack_udp_timeout);
        set(&mut c.conntrack.udp_stream_timeout, self.conntrack_udp_timeout_stream);
        set_unless_empty(&mut c.healthz_bind_address, self.healthz_bind_address);
        set_unless_empty(&mut c.metrics_bind_address, self.metrics_bind_address);
        set(&mut c.bind_address_hard_fail, self.bind_address_hard_fail);
        set(&mut c.enable_profiling, self.profiling);
        set(&mut c.show_hidden_metrics_for_version, self.show_hidden_metrics_for_version);
        set(&mut c.logging.verbosity, self.verbosity);
        set(&mut c.logging.format, self.logging_format);
        c.logging.vmodule.splice(0..0, self.vmodule.into_iter().flatten().flatten());
        set(&mut c.logging.flush_frequency.0, self.log_flush_frequency);
        set_option(c, "text", "splitStream", self.log_text_split_stream);
        set_option(c, "text", "infoBufferSize", self.log_text_info_buffer_size);
        set_option(c, "json", "splitStream", self.log_json_split_stream);
        set_option(c, "json", "infoBufferSize", self.log_json_info_buffer_size);
        set(&mut c.client_connection.kubeconfig, self.kubeconfig);
        set(&mut c.client_connection.content_type, self.kube_api_content_type);
        set(&mut c.client_connection.qps, self.kube_api_qps);
        set(&mut c.client_connection.burst, self.kube_api_burst);
        set(&mut c.config_sync_period, self.config_sync_period);
        set_some(&mut c.iptables.localhost_node_ports, self.iptables_localhost_nodeports);
        set(&mut c.iptables.sync_period, self.iptables_sync_period);
        set(&mut c.iptables.min_sync_period, self.iptables_min_sync_period);
        set(&mut c.kube_ipvs.drain_timeout, self.ipvs_drain_timeout);
        set(&mut c.kube_ipvs.watch_all_nodes, self.watch_all_nodes);
        set(&mut c.kube_ipvs.allow_pod_addresses, self.allow_pod_addresses);
        set(&mut c.kube_ipvs.vip_binding, self.vip_binding);
        set(&mut c.kube_ipvs.vip_ranges, self.vip_ranges.map(without_empty));
        set_some(&mut c.kube_ipvs.estimation, self.ipvs_estimation);
        set_some(&mut c.kube_ipvs.service_budget.front_ends, self.service_budget_front_ends);
        set_some(&mut c.kube_ipvs.service_budget.real_servers, self.service_budget_real_servers);
        set_some(&mut c.kube_ipvs.confirm_disappearance, self.confirm_disappearance);
        set_some(&mut c.kube_ipvs.own_tables, self.own_tables);
    }
}

fn set<T>(field: &mut T, flag: Option<T>) {
    if let Some(value) = flag {
        *field = value;
    }
}

fn set_some<T>(field: &mut Option<T>, flag: Option<T>) {
    if flag.is_some() {
        *field = flag;
    }
}

fn set_unless_empty(field: &mut String, flag: Option<String>) {
    set(field, flag.filter(|value| !value.is_empty()));
}

fn set_option(c: &mut Configuration, format: &str, name: &str, flag: Option<impl Into<Value>>) {
    if let Some(value) = flag {
        c.logging.options.entry(format.to_owned()).or_default().insert(name.to_owned(), value.into());
    }
}

/// Removes empty elements: `--flag=` is an empty list.
fn without_empty(mut list: Vec<String>) -> Vec<String> {
    list.retain(|entry| !entry.is_empty());
    list
}

fn parse_gate(text: &str) -> Result<(String, bool), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?} lacks =true or =false"))?;
    Ok((name.trim().to_owned(), go_syntax::parse_bool(value.trim())?))
}

/// An empty text, which a template may leave, gives none.
fn parse_optional_gate(text: &str) -> Result<Option<(String, bool)>, String> {
    if text.trim().is_empty() { Ok(None) } else { parse_gate(text).map(Some) }
}

/// As [`parse_optional_gate`].
fn parse_optional_vmodule(text: &str) -> Result<Option<Vmodule>, String> {
    if text.trim().is_empty() { Ok(None) } else { parse_vmodule(text).map(Some) }
}

fn parse_vmodule(text: &str) -> Result<Vmodule, String> {
    let (pattern, level) = text.split_once('=').unwrap_or((text, ""));
    let verbosity = u32::from_str(level).map_err(|_| format!("{text:?} lacks a number, as in agent*=5"))?;
    Ok(Vmodule { file_pattern: pattern.to_owned(), verbosity })
}
