//! Checks every field of a configuration, and turns it into the typed [`Settings`] of the agent.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr as _;
use std::time::Duration;

use ipnet::IpNet;
use ipvs_netlink::{Family, Scheduler, Timeouts};
use reconciler::Policy;
use reconciler::binding::{self, VipBinding, VipRanges};
use reconciler::budget::ServiceBudget;
use reconciler::policy::{DetectLocal, NodePortAddresses, PodAddresses};
use reconciler::run::Periods;
use service_watch::{parse_ip, parse_range};

use super::object::Configuration;
use super::{FieldError, go_syntax};

/// The Kubernetes version before the one that kube-ipvs follows. `showHiddenMetricsForVersion` accepts no other.
const PREVIOUS_KUBERNETES_VERSION: &str = "1.35";
/// The longest name of an interface in bytes: `IFNAMSIZ` less the final NUL.
const MAX_INTERFACE_NAME: usize = 15;
/// The largest limit that kube-proxy derives from the number of processors.
const MAX_SCALED_CONNECTIONS: u64 = 1 << 20;
/// The only feature gate that has an effect here.
const EXTERNAL_IPS_GATE: &str = "AllowServiceExternalIPs";
/// The gate of kube-proxy's ipvs mode, which is always on here.
const IPVS_GATE: &str = "KubeProxyIPVS";
/// An item of `nodePortAddresses`: the loopback addresses.
const LOCALHOST: &str = "localhost";

/// The settings of a valid configuration.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a setting of its own")]
pub(crate) struct Settings {
    /// Has both address families. Pre-flight narrows that down to those of the node.
    pub(crate) policy: Policy,
    pub(crate) periods: Periods,
    /// IPVS timeouts; 0 leaves the kernel's value.
    pub(crate) timeouts: Timeouts,
    pub(crate) strict_arp: bool,
    /// Whether the kernel estimates rates and sums up statistics; `None` leaves the kernel's setting.
    pub(crate) estimation: Option<bool>,
    /// Whether a list that lacks most known objects is read again before it is used.
    pub(crate) confirm_disappearance: bool,
    pub(crate) conntrack: Conntrack,
    /// Where to serve `/healthz` and `/livez`; `None`: nowhere.
    pub(crate) healthz: Option<SocketAddr>,
    /// Where to serve `/metrics`; `None`: nowhere.
    pub(crate) metrics: Option<SocketAddr>,
    /// Whether the agent exits if it cannot listen on one of these addresses.
    pub(crate) bind_hard_fail: bool,
    pub(crate) profiling: bool,
    pub(crate) oom_score_adj: i32,
    pub(crate) kubeconfig: Option<PathBuf>,
    pub(crate) watch_all_nodes: bool,
    /// Feature gates without an effect here.
    pub(crate) ignored_gates: Vec<String>,
}

/// Limits and timeouts of connection tracking; 0 leaves the kernel's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Conntrack {
    pub(crate) max_per_core: u32,
    pub(crate) min: u32,
    pub(crate) tcp_timeout_established: Duration,
    pub(crate) tcp_timeout_close_wait: Duration,
    pub(crate) tcp_be_liberal: bool,
    pub(crate) udp_timeout: Duration,
    pub(crate) udp_timeout_stream: Duration,
}

impl Conntrack {
    /// How many connections to track; `None` leaves the kernel's limit.
    pub(crate) fn max(&self, cpus: u64) -> Option<u64> {
        let scaled = u64::from(self.max_per_core) * cpus;
        // As in kube-proxy, the cap applies even if the minimum is larger.
        (self.max_per_core > 0)
            .then(|| if scaled > MAX_SCALED_CONNECTIONS { MAX_SCALED_CONNECTIONS } else { scaled.max(self.min.into()) })
    }
}

impl Settings {
    /// Checks every field of a configuration whose defaults are filled in; `host` is the host's name.
    pub(crate) fn new(configuration: &Configuration, host: &str) -> Result<Self, Vec<FieldError>> {
        let mut check = Validator::default();
        let c = configuration;

        check.ensure(matches!(c.mode.as_str(), "ipvs"), "mode", || match c.mode.as_str() {
            "iptables" | "nftables" => {
                format!("{:?}: kube-ipvs has only the mode ipvs; for this mode run kube-proxy", c.mode)
            }
            mode => format!("{mode:?}: the only mode is ipvs"),
        });
        check.ensure(c.client_connection.burst >= 0, "clientConnection.burst", || {
            format!("{}: must not be less than 0", c.client_connection.burst)
        });
        let qps = c.client_connection.qps;
        check.ensure(qps.is_finite(), "clientConnection.qps", || format!("{qps} is not a number"));
        let hidden = &c.show_hidden_metrics_for_version;
        check.ensure(hidden.is_empty() || hidden == PREVIOUS_KUBERNETES_VERSION, "showHiddenMetricsForVersion", || {
            format!("{hidden:?}: leave it empty, or give {PREVIOUS_KUBERNETES_VERSION:?}")
        });
        check.ensure(matches!(c.logging.format.as_str(), "text" | "json"), "logging.format", || {
            format!("{:?}: give text or json", c.logging.format)
        });
        let config_sync = c.config_sync_period;
        check.ensure(config_sync > go_syntax::Duration::ZERO, "configSyncPeriod", || {
            format!("{config_sync}: must be more than 0")
        });

        let settings = Self {
            policy: policy(c, host, &mut check),
            periods: periods(c, &mut check),
            timeouts: Timeouts {
                tcp: check.whole_seconds("ipvs.tcpTimeout", c.ipvs.tcp_timeout),
                tcp_fin: check.whole_seconds("ipvs.tcpFinTimeout", c.ipvs.tcp_fin_timeout),
                udp: check.whole_seconds("ipvs.udpTimeout", c.ipvs.udp_timeout),
            },
            strict_arp: c.ipvs.strict_arp,
            estimation: c.kube_ipvs.estimation,
            confirm_disappearance: c.kube_ipvs.confirm_disappearance.unwrap_or(true),
            conntrack: conntrack(c, &mut check),
            healthz: check.socket_address("healthzBindAddress", &c.healthz_bind_address),
            metrics: check.socket_address("metricsBindAddress", &c.metrics_bind_address),
            bind_hard_fail: c.bind_address_hard_fail,
            profiling: c.enable_profiling,
            oom_score_adj: check.integer_in("oomScoreAdj", c.oom_score_adj, -1000..=1000),
            kubeconfig: Some(&c.client_connection.kubeconfig).filter(|path| !path.is_empty()).map(PathBuf::from),
            watch_all_nodes: c.kube_ipvs.watch_all_nodes,
            ignored_gates: c
                .feature_gates
                .keys()
                .filter(|name| ![EXTERNAL_IPS_GATE, IPVS_GATE].contains(&name.as_str()))
                .cloned()
                .collect(),
        };
        if check.errors.is_empty() { Ok(settings) } else { Err(check.errors) }
    }
}

fn policy(c: &Configuration, host: &str, check: &mut Validator) -> Policy {
    let is_blank = !c.hostname_override.is_empty() && c.hostname_override.trim().is_empty();
    check.ensure(!is_blank, "hostnameOverride", || "must not be blank".to_owned());
    let name = if c.hostname_override.is_empty() { host } else { &c.hostname_override };

    let bind_address = parse_ip(&c.bind_address);
    check.ensure(bind_address.is_some(), "bindAddress", || format!("{:?} is not an IP address", c.bind_address));
    let scheduler = if c.ipvs.scheduler.is_empty() { "rr" } else { &c.ipvs.scheduler };
    let scheduler = Scheduler::from_str(scheduler).unwrap_or_else(|error| {
        check.error("ipvs.scheduler", error.to_string());
        Scheduler::RoundRobin
    });
    let drain_timeout = check.duration("kubeIPVS.drainTimeout", c.kube_ipvs.drain_timeout);
    let detect_local = detect_local(c, check);
    Policy {
        binding: vip_binding(c, &detect_local, check),
        own_tables: c.kube_ipvs.own_tables.unwrap_or(true),
        scheduler,
        exclude: check.ranges("ipvs.excludeCIDRs", &c.ipvs.exclude_cidrs),
        node_port_addresses: node_port_addresses(c, check),
        bind_address: bind_address.filter(|address| !address.is_unspecified()),
        pod_addresses: pod_addresses(c),
        external_ips: c.feature_gates.get(EXTERNAL_IPS_GATE).copied().unwrap_or(true),
        // As in kube-proxy, the masquerade fields are those of `iptables`, whatever the mode is.
        masquerade_all: c.iptables.masquerade_all,
        masquerade_bit: check.integer_in("iptables.masqueradeBit", c.iptables.masquerade_bit, 0..=31),
        detect_local,
        service_budget: service_budget(c, check),
        drain_timeout: Some(drain_timeout).filter(|timeout| !timeout.is_zero()),
        ..Policy::new(name.trim().to_lowercase())
    }
}

fn service_budget(c: &Configuration, check: &mut Validator) -> ServiceBudget {
    let (given, default) = (&c.kube_ipvs.service_budget, ServiceBudget::default());
    let mut limit = |path: &str, given: Option<i32>, default: usize| {
        let Some(given) = given else { return default };
        check.integer_in::<u32>(path, Some(given), 1..=i32::MAX).try_into().unwrap_or(default)
    };
    ServiceBudget {
        front_ends: limit("kubeIPVS.serviceBudget.frontEnds", given.front_ends, default.front_ends),
        real_servers: limit("kubeIPVS.serviceBudget.realServers", given.real_servers, default.real_servers),
    }
}

/// How VIPs are bound. Whether a range has an address of the node is checked by pre-flight.
fn vip_binding(c: &Configuration, pods: &DetectLocal, check: &mut Validator) -> VipBinding {
    let path = "kubeIPVS.vipRanges";
    let is_route = match c.kube_ipvs.vip_binding.as_str() {
        "" | "address" => false,
        "route" => true,
        other => {
            check.error("kubeIPVS.vipBinding", format!("{other:?}: give address or route"));
            return VipBinding::Addresses;
        }
    };
    let ranges = check.ranges(path, &c.kube_ipvs.vip_ranges);
    check.ensure(is_route || c.kube_ipvs.vip_ranges.is_empty(), path, || {
        "requires kubeIPVS.vipBinding (--vip-binding) to be route".to_owned()
    });
    for (index, range) in ranges.iter().enumerate() {
        if let Err(problem) = binding::check_range(range) {
            check.error(
                &format!("{path}[{index}]"),
                format!(
                    "{range} {problem}; give the ranges of ClusterIPs, as --service-cluster-ip-range of the API server"
                ),
            );
        }
        if let DetectLocal::ClusterCidr(pods) = pods
            && let Some(pods) = pods.iter().find(|pods| binding::overlaps(pods, range))
        {
            check.error(
                &format!("{path}[{index}]"),
                format!("{range} overlaps the pods' range {pods}: pods with these addresses could not be reached"),
            );
        }
    }
    if is_route { VipBinding::Routes(VipRanges::new(&ranges).unwrap_or_default()) } else { VipBinding::Addresses }
}

fn periods(c: &Configuration, check: &mut Validator) -> Periods {
    let (sync, min) = (c.ipvs.sync_period, c.ipvs.min_sync_period);
    check.ensure(sync > go_syntax::Duration::ZERO, "ipvs.syncPeriod", || format!("{sync}: must be more than 0"));
    check.ensure(min <= sync, "ipvs.syncPeriod", || {
        format!("{sync}: must not be less than ipvs.minSyncPeriod, which is {min}")
    });
    Periods { audit: sync.to_std(), min: check.duration("ipvs.minSyncPeriod", min) }
}

fn conntrack(c: &Configuration, check: &mut Validator) -> Conntrack {
    let c = &c.conntrack;
    let or_none = |duration: Option<go_syntax::Duration>| duration.unwrap_or_default();
    Conntrack {
        max_per_core: check.integer_in("conntrack.maxPerCore", c.max_per_core, 0..=i32::MAX),
        min: check.integer_in("conntrack.min", c.min, 0..=i32::MAX),
        tcp_timeout_established: check.duration("conntrack.tcpEstablishedTimeout", or_none(c.tcp_established_timeout)),
        tcp_timeout_close_wait: check.duration("conntrack.tcpCloseWaitTimeout", or_none(c.tcp_close_wait_timeout)),
        tcp_be_liberal: c.tcp_be_liberal,
        udp_timeout: check.duration("conntrack.udpTimeout", c.udp_timeout),
        udp_timeout_stream: check.duration("conntrack.udpStreamTimeout", c.udp_stream_timeout),
    }
}

/// Ranges and the words of KEP-6032 in any mixture. `localhost` selects nothing here, which [`warnings`] tells.
fn node_port_addresses(c: &Configuration, check: &mut Validator) -> NodePortAddresses {
    let path = "nodePortAddresses";
    let has = |word: &str| c.node_port_addresses.iter().any(|item| item == word);
    let mut ranges = Vec::new();
    for (index, text) in c.node_port_addresses.iter().enumerate() {
        match text.as_str() {
            "all" | "primary" | LOCALHOST => {}
            text => match parse_range(text) {
                Some(range) => ranges.push(range),
                None => check.error(
                    &format!("{path}[{index}]"),
                    format!("{text:?} is not a range of addresses such as 10.0.0.0/8 or fd00::/64, primary or all"),
                ),
            },
        }
    }
    if has("all") || c.node_port_addresses.is_empty() {
        return NodePortAddresses::All;
    }
    match (has("primary"), has(LOCALHOST)) {
        (true, _) if ranges.is_empty() => NodePortAddresses::Primary,
        (true, _) => NodePortAddresses::PrimaryAndWithin(ranges),
        (false, true) if ranges.is_empty() => NodePortAddresses::None,
        (false, _) => NodePortAddresses::Within(ranges),
    }
}

/// What is accepted and does not do all that it says.
pub(crate) fn warnings(c: &Configuration) -> Vec<String> {
    let mut warnings = Vec::new();
    if c.node_port_addresses.iter().any(|item| item == LOCALHOST) {
        warnings.push(
            "nodePortAddresses (--nodeport-addresses) has localhost, on which NodePorts are not served yet: connect to an address \
             of the node instead"
                .to_owned(),
        );
    }
    if c.feature_gates.get(IPVS_GATE) == Some(&false) {
        warnings.push(format!(
            "the feature gate {IPVS_GATE} is false, which has no effect: kube-ipvs has only this mode; to use another, run kube-proxy"
        ));
    }
    warnings
}

/// How to recognise local pods. As in kube-proxy, the fields of other modes are not checked.
fn detect_local(c: &Configuration, check: &mut Validator) -> DetectLocal {
    match c.detect_local_mode.as_str() {
        "ClusterCIDR" => {
            if c.cluster_cidr.is_empty() {
                return DetectLocal::ClusterCidr(Vec::new());
            }
            let texts: Vec<String> = c.cluster_cidr.split(',').map(str::to_owned).collect();
            let ranges = check.ranges("clusterCIDR", &texts);
            let has_one_of_each = matches!(ranges.as_slice(), [a, b] if Family::of(a.addr()) != Family::of(b.addr()));
            check.ensure(texts.len() == 1 || ranges.len() != texts.len() || has_one_of_each, "clusterCIDR", || {
                format!("{:?}: give one range, or one of each family", c.cluster_cidr)
            });
            DetectLocal::ClusterCidr(ranges)
        }
        "NodeCIDR" => DetectLocal::NodeCidr,
        "BridgeInterface" => DetectLocal::BridgeInterface(check.interface(
            "detectLocal.bridgeInterface",
            "BridgeInterface",
            &c.detect_local.bridge_interface,
        )),
        "InterfaceNamePrefix" => DetectLocal::InterfaceNamePrefix(check.interface(
            "detectLocal.interfaceNamePrefix",
            "InterfaceNamePrefix",
            &c.detect_local.interface_name_prefix,
        )),
        mode => {
            let message = format!("{mode:?}: give ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix");
            check.error("detectLocalMode", message);
            DetectLocal::ClusterCidr(Vec::new())
        }
    }
}

/// Whether addresses of pods are served. Invalid ranges are reported by [`detect_local`], if its mode uses them.
fn pod_addresses(c: &Configuration) -> PodAddresses {
    if c.kube_ipvs.allow_pod_addresses {
        return PodAddresses::Allowed;
    }
    PodAddresses::Refused(c.cluster_cidr.split(',').filter_map(|text| parse_range(text.trim())).collect())
}

/// Collects the errors of all fields. For an invalid value a placeholder of its type is returned; the settings are then
/// not used.
#[derive(Default)]
struct Validator {
    errors: Vec<FieldError>,
}

impl Validator {
    fn error(&mut self, path: &str, message: String) {
        self.errors.push(FieldError::new(path, message));
    }

    fn ensure(&mut self, is_valid: bool, path: &str, message: impl FnOnce() -> String) {
        if !is_valid {
            self.error(path, message());
        }
    }

    fn integer_in<T: TryFrom<i32> + Default>(
        &mut self,
        path: &str,
        number: Option<i32>,
        range: std::ops::RangeInclusive<i32>,
    ) -> T {
        // Missing numbers have been replaced by defaults.
        let number = number.unwrap_or_default();
        let message = || match *range.end() {
            i32::MAX => format!("{number}: must not be less than {}", range.start()),
            end => format!("{number}: must be within {} and {end}", range.start()),
        };
        self.ensure(range.contains(&number), path, message);
        T::try_from(number).unwrap_or_default()
    }

    fn duration(&mut self, path: &str, duration: go_syntax::Duration) -> Duration {
        self.ensure(!duration.is_negative(), path, || format!("{duration}: must not be less than 0"));
        duration.to_std()
    }

    /// IPVS timeouts are whole seconds. Fractions are cut off, as in kube-proxy.
    fn whole_seconds(&mut self, path: &str, duration: go_syntax::Duration) -> u32 {
        u32::try_from(self.duration(path, duration).as_secs()).unwrap_or(u32::MAX)
    }

    fn ranges(&mut self, path: &str, texts: &[String]) -> Vec<IpNet> {
        let mut ranges = Vec::new();
        for (index, text) in texts.iter().enumerate() {
            match parse_range(text) {
                Some(range) => ranges.push(range),
                None => self.error(
                    &format!("{path}[{index}]"),
                    format!("{text:?} is not a range of addresses such as 10.0.0.0/8 or fd00::/64"),
                ),
            }
        }
        ranges
    }

    fn interface(&mut self, path: &str, mode: &str, name: &str) -> String {
        self.ensure(!name.is_empty(), path, || format!("must be given with detectLocalMode {mode}"));
        self.ensure(name.len() <= MAX_INTERFACE_NAME, path, || {
            format!("{name:?} is longer than the {MAX_INTERFACE_NAME} bytes that an interface name may have")
        });
        name.to_owned()
    }

    /// An address with a port; `None` if the text is empty.
    fn socket_address(&mut self, path: &str, text: &str) -> Option<SocketAddr> {
        if text.is_empty() {
            return None;
        }
        let parts = text.rsplit_once(':').and_then(|(address, port)| {
            let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
            let address: IpAddr = parse_ip(bare)?;
            Some(SocketAddr::new(address, port.parse().ok().filter(|port| *port > 0)?))
        });
        self.ensure(parts.is_some(), path, || {
            format!("{text:?} is not an address with a port such as 0.0.0.0:10256 or [::]:10256")
        });
        parts
    }
}
