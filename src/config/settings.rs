//! What the agent goes by, from a configuration that may be wrong in any of its fields.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr as _;
use std::time::Duration;

use ipnet::IpNet;
use ipvs_netlink::{Family, Scheduler, Timeouts};
use reconciler::Policy;
use reconciler::binding::{self, VipBinding, VipRanges};
use reconciler::policy::{DetectLocal, NodePortAddresses};
use reconciler::run::Periods;
use service_watch::{parse_ip, parse_range};

use super::Problem;
use super::object::Configuration;
use crate::go;

/// The version before the one whose behaviour this is: the only one whose hidden metrics may be asked for.
const PREVIOUS_VERSION: &str = "1.35";
/// The longest name the kernel lets an interface have, in bytes.
const INTERFACE_NAME: usize = 15;
/// More than this kube-proxy does not derive from the number of processors.
const MOST_CONNECTIONS: u64 = 1 << 20;
/// The only feature gate with a meaning here.
const EXTERNAL_IPS_GATE: &str = "AllowServiceExternalIPs";

/// A configuration in which everything makes sense.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a setting of its own")]
pub(crate) struct Settings {
    /// Its families are both: which of them the node has is found out at the start.
    pub(crate) policy: Policy,
    pub(crate) periods: Periods,
    /// 0 leaves one as it is.
    pub(crate) timeouts: Timeouts,
    pub(crate) strict_arp: bool,
    /// Whether the kernel is to sum up counters and rates; `None` leaves it as it is.
    pub(crate) estimation: Option<bool>,
    /// Whether a list that lacks most of what there was is read again before it is believed.
    pub(crate) confirm_disappearance: bool,
    pub(crate) conntrack: Conntrack,
    /// Where to tell about health; `None`: nowhere.
    pub(crate) healthz: Option<SocketAddr>,
    /// Where to serve metrics; `None`: nowhere.
    pub(crate) metrics: Option<SocketAddr>,
    /// Whether it is fatal that one of these addresses cannot be listened on.
    pub(crate) bind_hard_fail: bool,
    pub(crate) profiling: bool,
    pub(crate) oom_score_adj: i32,
    pub(crate) kubeconfig: Option<PathBuf>,
    pub(crate) watch_all_nodes: bool,
    /// Feature gates that have no meaning here.
    pub(crate) ignored_gates: Vec<String>,
}

/// Limits of connection tracking. 0 leaves one as it is.
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
        // The minimum does not lift the cap: that is how kube-proxy has it.
        (self.max_per_core > 0)
            .then(|| if scaled > MOST_CONNECTIONS { MOST_CONNECTIONS } else { scaled.max(self.min.into()) })
    }
}

impl Settings {
    /// Checks every field of a configuration whose defaults are filled in; `host` is the host's name.
    pub(crate) fn new(configuration: &Configuration, host: &str) -> Result<Self, Vec<Problem>> {
        let mut check = Check::default();
        let c = configuration;

        check.that(matches!(c.mode.as_str(), "ipvs"), "mode", || match c.mode.as_str() {
            "iptables" | "nftables" => {
                format!("{:?}: kube-ipvs is a proxy of mode ipvs only; for this mode run kube-proxy", c.mode)
            }
            mode => format!("{mode:?}: the only mode is ipvs"),
        });
        check.that(c.client_connection.burst >= 0, "clientConnection.burst", || {
            format!("{}: must not be less than 0", c.client_connection.burst)
        });
        let qps = c.client_connection.qps;
        check.that(qps.is_finite(), "clientConnection.qps", || format!("{qps} is no number"));
        let hidden = &c.show_hidden_metrics_for_version;
        check.that(hidden.is_empty() || hidden == PREVIOUS_VERSION, "showHiddenMetricsForVersion", || {
            format!("{hidden:?}: leave it empty, or give {PREVIOUS_VERSION:?}")
        });
        check.that(matches!(c.logging.format.as_str(), "text" | "json"), "logging.format", || {
            format!("{:?}: give text or json", c.logging.format)
        });
        let config_sync = c.config_sync_period;
        check.that(config_sync > go::Duration::ZERO, "configSyncPeriod", || {
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
            estimation: c.own.estimation,
            confirm_disappearance: c.own.confirm_disappearance.unwrap_or(true),
            conntrack: conntrack(c, &mut check),
            healthz: check.listen("healthzBindAddress", &c.healthz_bind_address),
            metrics: check.listen("metricsBindAddress", &c.metrics_bind_address),
            bind_hard_fail: c.bind_address_hard_fail,
            profiling: c.enable_profiling,
            oom_score_adj: check.within("oomScoreAdj", c.oom_score_adj, -1000..=1000),
            kubeconfig: Some(&c.client_connection.kubeconfig).filter(|path| !path.is_empty()).map(PathBuf::from),
            watch_all_nodes: c.own.watch_all_nodes,
            ignored_gates: c.feature_gates.keys().filter(|name| *name != EXTERNAL_IPS_GATE).cloned().collect(),
        };
        if check.problems.is_empty() { Ok(settings) } else { Err(check.problems) }
    }
}

fn policy(c: &Configuration, host: &str, check: &mut Check) -> Policy {
    let is_blank = !c.hostname_override.is_empty() && c.hostname_override.trim().is_empty();
    check.that(!is_blank, "hostnameOverride", || "must not be blank".to_owned());
    let name = if c.hostname_override.is_empty() { host } else { &c.hostname_override };

    let bind_address = parse_ip(&c.bind_address);
    check.that(bind_address.is_some(), "bindAddress", || format!("{:?} is no IP address", c.bind_address));
    let scheduler = if c.ipvs.scheduler.is_empty() { "rr" } else { &c.ipvs.scheduler };
    let scheduler = Scheduler::from_str(scheduler).unwrap_or_else(|error| {
        check.problem("ipvs.scheduler", error.to_string());
        Scheduler::RoundRobin
    });
    let drain_timeout = check.duration("kubeIPVS.drainTimeout", c.own.drain_timeout);
    let detect_local = detect_local(c, check);
    Policy {
        binding: vip_binding(c, &detect_local, check),
        scheduler,
        exclude: check.ranges("ipvs.excludeCIDRs", &c.ipvs.exclude_cidrs),
        node_port_addresses: node_port_addresses(c, check),
        bind_address: bind_address.filter(|address| !address.is_unspecified()),
        external_ips: c.feature_gates.get(EXTERNAL_IPS_GATE).copied().unwrap_or(true),
        // As in kube-proxy, what is masqueraded stands in the stanza of iptables whatever the mode is.
        masquerade_all: c.iptables.masquerade_all,
        masquerade_bit: check.within("iptables.masqueradeBit", c.iptables.masquerade_bit, 0..=31),
        detect_local,
        drain_timeout: Some(drain_timeout).filter(|timeout| !timeout.is_zero()),
        ..Policy::new(name.trim().to_lowercase())
    }
}

/// What does not depend on the node.
fn vip_binding(c: &Configuration, pods: &DetectLocal, check: &mut Check) -> VipBinding {
    let path = "kubeIPVS.vipRanges";
    let is_route = match c.own.vip_binding.as_str() {
        "" | "address" => false,
        "route" => true,
        other => {
            check.problem("kubeIPVS.vipBinding", format!("{other:?}: give address or route"));
            return VipBinding::Addresses;
        }
    };
    let ranges = check.ranges(path, &c.own.vip_ranges);
    check.that(is_route || c.own.vip_ranges.is_empty(), path, || {
        "takes kubeIPVS.vipBinding (--vip-binding) to be route".to_owned()
    });
    for (index, range) in ranges.iter().enumerate() {
        if let Err(problem) = binding::check_range(range) {
            check.problem(
                &format!("{path}[{index}]"),
                format!(
                    "{range} {problem}; give the ranges of ClusterIPs, as --service-cluster-ip-range of the API server"
                ),
            );
        }
        if let DetectLocal::ClusterCidr(pods) = pods
            && let Some(pods) = pods.iter().find(|pods| binding::overlaps(pods, range))
        {
            check.problem(
                &format!("{path}[{index}]"),
                format!("{range} has addresses of pods, whose range is {pods}: they could not be reached"),
            );
        }
    }
    if is_route { VipBinding::Routes(VipRanges::new(&ranges).unwrap_or_default()) } else { VipBinding::Addresses }
}

fn periods(c: &Configuration, check: &mut Check) -> Periods {
    let (sync, min) = (c.ipvs.sync_period, c.ipvs.min_sync_period);
    check.that(sync > go::Duration::ZERO, "ipvs.syncPeriod", || format!("{sync}: must be more than 0"));
    check.that(min <= sync, "ipvs.syncPeriod", || {
        format!("{sync}: must not be less than ipvs.minSyncPeriod, which is {min}")
    });
    Periods { audit: sync.to_std(), min: check.duration("ipvs.minSyncPeriod", min) }
}

fn conntrack(c: &Configuration, check: &mut Check) -> Conntrack {
    let c = &c.conntrack;
    let or_none = |duration: Option<go::Duration>| duration.unwrap_or_default();
    Conntrack {
        max_per_core: check.within("conntrack.maxPerCore", c.max_per_core, 0..=i32::MAX),
        min: check.within("conntrack.min", c.min, 0..=i32::MAX),
        tcp_timeout_established: check.duration("conntrack.tcpEstablishedTimeout", or_none(c.tcp_established_timeout)),
        tcp_timeout_close_wait: check.duration("conntrack.tcpCloseWaitTimeout", or_none(c.tcp_close_wait_timeout)),
        tcp_be_liberal: c.tcp_be_liberal,
        udp_timeout: check.duration("conntrack.udpTimeout", c.udp_timeout),
        udp_timeout_stream: check.duration("conntrack.udpStreamTimeout", c.udp_stream_timeout),
    }
}

fn node_port_addresses(c: &Configuration, check: &mut Check) -> NodePortAddresses {
    let path = "nodePortAddresses";
    match c.node_port_addresses.as_slice() {
        [] => NodePortAddresses::All,
        [only] if only == "primary" => NodePortAddresses::Primary,
        ranges if ranges.iter().any(|range| range == "primary") => {
            check.problem(path, "is either `primary` alone or a list of ranges".to_owned());
            NodePortAddresses::All
        }
        ranges => NodePortAddresses::Within(check.ranges(path, ranges)),
    }
}

/// As in kube-proxy, what belongs to other modes is not looked at.
fn detect_local(c: &Configuration, check: &mut Check) -> DetectLocal {
    match c.detect_local_mode.as_str() {
        "ClusterCIDR" => {
            if c.cluster_cidr.is_empty() {
                return DetectLocal::ClusterCidr(Vec::new());
            }
            let texts: Vec<String> = c.cluster_cidr.split(',').map(str::to_owned).collect();
            let ranges = check.ranges("clusterCIDR", &texts);
            let has_one_of_each = matches!(ranges.as_slice(), [a, b] if Family::of(a.addr()) != Family::of(b.addr()));
            check.that(texts.len() == 1 || ranges.len() != texts.len() || has_one_of_each, "clusterCIDR", || {
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
            let what = format!("{mode:?}: give ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix");
            check.problem("detectLocalMode", what);
            DetectLocal::ClusterCidr(Vec::new())
        }
    }
}

/// Gathers what is wrong. A value that is wrong is replaced by something of its type, and the settings are not used.
#[derive(Default)]
struct Check {
    problems: Vec<Problem>,
}

impl Check {
    fn problem(&mut self, path: &str, what: String) {
        self.problems.push(Problem::new(path, what));
    }

    fn that(&mut self, holds: bool, path: &str, what: impl FnOnce() -> String) {
        if !holds {
            self.problem(path, what());
        }
    }

    fn within<T: TryFrom<i32> + Default>(
        &mut self,
        path: &str,
        number: Option<i32>,
        range: std::ops::RangeInclusive<i32>,
    ) -> T {
        // Those that are not there have been filled in.
        let number = number.unwrap_or_default();
        let what = || match *range.end() {
            i32::MAX => format!("{number}: must not be less than {}", range.start()),
            end => format!("{number}: must be within {} and {end}", range.start()),
        };
        self.that(range.contains(&number), path, what);
        T::try_from(number).unwrap_or_default()
    }

    fn duration(&mut self, path: &str, duration: go::Duration) -> Duration {
        self.that(!duration.is_negative(), path, || format!("{duration}: must not be less than 0"));
        duration.to_std()
    }

    /// IPVS counts whole seconds; fractions are cut off, as kube-proxy does.
    fn whole_seconds(&mut self, path: &str, duration: go::Duration) -> u32 {
        u32::try_from(self.duration(path, duration).as_secs()).unwrap_or(u32::MAX)
    }

    fn ranges(&mut self, path: &str, texts: &[String]) -> Vec<IpNet> {
        let mut ranges = Vec::new();
        for (index, text) in texts.iter().enumerate() {
            match parse_range(text) {
                Some(range) => ranges.push(range),
                None => self.problem(
                    &format!("{path}[{index}]"),
                    format!("{text:?} is no range of addresses such as 10.0.0.0/8 or fd00::/64"),
                ),
            }
        }
        ranges
    }

    fn interface(&mut self, path: &str, mode: &str, name: &str) -> String {
        self.that(!name.is_empty(), path, || format!("must be given with detectLocalMode {mode}"));
        self.that(name.len() <= INTERFACE_NAME, path, || {
            format!("{name:?} is longer than the {INTERFACE_NAME} bytes that a name of an interface has")
        });
        name.to_owned()
    }

    /// An address and a port; nothing is nowhere.
    fn listen(&mut self, path: &str, text: &str) -> Option<SocketAddr> {
        if text.is_empty() {
            return None;
        }
        let parts = text.rsplit_once(':').and_then(|(address, port)| {
            let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
            let address: IpAddr = parse_ip(bare)?;
            Some(SocketAddr::new(address, port.parse().ok().filter(|port| *port > 0)?))
        });
        self.that(parts.is_some(), path, || {
            format!("{text:?} is no address with a port such as 0.0.0.0:10256 or [::]:10256")
        });
        parts
    }
}
