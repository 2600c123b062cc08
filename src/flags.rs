//! The command line, spelled as kube-proxy spells it.
//!
//! Flags that have a meaning here are fields of [`Flags`]. kube-proxy's other flags stand in [`ACCEPTED`]: they are taken,
//! so that a command line can be kept as it is, and named once in the log.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser};
use ipnet::IpNet;
use ipvs_netlink::Scheduler;
use reconciler::policy::NodePortAddresses;

use crate::go;

/// Flags of kube-proxy that are taken and have no effect, and whether a value must follow.
const ACCEPTED: &[(&str, Takes)] = &[
    ("bind-address-hard-fail", Takes::Boolean),
    ("boot-id-file", Takes::Value),
    ("config-sync-period", Takes::Value),
    ("conntrack-max-per-core", Takes::Value),
    ("conntrack-min", Takes::Value),
    ("conntrack-tcp-be-liberal", Takes::Boolean),
    ("conntrack-tcp-timeout-close-wait", Takes::Value),
    ("conntrack-tcp-timeout-established", Takes::Value),
    ("conntrack-udp-timeout", Takes::Value),
    ("conntrack-udp-timeout-stream", Takes::Value),
    ("detect-local-mode", Takes::Value),
    ("healthz-bind-address", Takes::Value),
    ("healthz-port", Takes::Value),
    ("iptables-localhost-nodeports", Takes::Boolean),
    ("iptables-masquerade-bit", Takes::Value),
    ("iptables-min-sync-period", Takes::Value),
    ("iptables-sync-period", Takes::Value),
    ("kube-api-burst", Takes::Value),
    ("kube-api-content-type", Takes::Value),
    ("kube-api-qps", Takes::Value),
    ("log-flush-frequency", Takes::Value),
    ("log-json-info-buffer-size", Takes::Value),
    ("log-json-split-stream", Takes::Boolean),
    ("log-text-info-buffer-size", Takes::Value),
    ("log-text-split-stream", Takes::Boolean),
    ("logging-format", Takes::Value),
    ("machine-id-file", Takes::Value),
    ("masquerade-all", Takes::Boolean),
    ("metrics-bind-address", Takes::Value),
    ("metrics-port", Takes::Value),
    ("oom-score-adj", Takes::Value),
    ("pod-bridge-interface", Takes::Value),
    ("pod-interface-name-prefix", Takes::Value),
    ("profiling", Takes::Boolean),
    ("show-hidden-metrics-for-version", Takes::Value),
    ("vmodule", Takes::Value),
];

/// Flags of kube-proxy that would change what the program does, and are not there yet: they are refused, not ignored.
const NOT_YET: [&str; 4] = ["cleanup", "config", "init-only", "write-config-to"];

/// What may follow a flag.
#[derive(Clone, Copy, PartialEq)]
enum Takes {
    /// `=VALUE`, or the next argument.
    Value,
    /// `=true` or `=false`, or nothing.
    Boolean,
}

/// Makes Kubernetes Services work with IPVS, the kernel's own load balancer.
///
/// Takes the flags of `kube-proxy --proxy-mode=ipvs`. Services and EndpointSlices come from an API server (--kubeconfig,
/// --master, or the service account of a pod) or from a directory of manifests (--manifests).
#[derive(Debug, Parser)]
#[command(name = "kube-ipvs", version, args_override_self = true)]
pub(crate) struct Flags {
    /// What kind of proxy to be: only ipvs can be had here
    #[arg(long, value_name = "MODE", default_value = "ipvs", value_parser = proxy_mode)]
    proxy_mode: ProxyMode,

    /// A directory of YAML and JSON manifests to take Services, EndpointSlices and the Node from, instead of an API server
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kubeconfig", "master"])]
    pub(crate) manifests: Option<PathBuf>,

    /// Sync once, then exit: with status 0 if the kernel took everything. Waits for a source that does not answer
    #[arg(long)]
    pub(crate) once: bool,

    /// The kubeconfig to reach the API server with
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,

    /// The URL of the API server, in place of the kubeconfig's
    #[arg(long, value_name = "URL")]
    master: Option<String>,

    /// The name of the own Node [default: the host's name]
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    hostname_override: String,

    /// How virtual servers choose real servers: rr, wrr, lc, wlc, lblc, lblcr, dh, sh, sed, nq, fo, ovf, mh or twos
    #[arg(long, value_name = "NAME", default_value = "rr", value_parser = scheduler)]
    pub(crate) ipvs_scheduler: Scheduler,

    /// How often everything in the kernel is compared and repaired, at least
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = go::duration)]
    pub(crate) ipvs_sync_period: Duration,

    /// How long to gather changes after a sync before the next
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = go::duration)]
    pub(crate) ipvs_min_sync_period: Duration,

    /// Ranges whose virtual servers are never deleted
    #[arg(long, value_name = "CIDR,...", value_delimiter = ',')]
    ipvs_exclude_cidrs: Vec<String>,

    /// Answer ARP only for addresses of the interface asked: taken, and without effect in this version
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value = "false", hide_default_value = true, value_parser = go::boolean)]
    pub(crate) ipvs_strict_arp: bool,

    /// How long an idle TCP connection is kept, in whole seconds; 0s leaves the kernel's value
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = go::duration)]
    pub(crate) ipvs_tcp_timeout: Duration,

    /// How long a TCP connection is kept after a FIN; 0s leaves the kernel's value
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = go::duration)]
    pub(crate) ipvs_tcpfin_timeout: Duration,

    /// How long an idle UDP flow is kept; 0s leaves the kernel's value
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = go::duration)]
    pub(crate) ipvs_udp_timeout: Duration,

    /// The node's addresses on which NodePorts listen: ranges, or `primary` [default: all]
    #[arg(long, value_name = "CIDR,...", value_delimiter = ',')]
    nodeport_addresses: Vec<String>,

    /// An address to take for the node's own of its family; nothing listens on it
    #[arg(long, value_name = "IP", default_value = "0.0.0.0", value_parser = bind_address)]
    bind_address: IpAddr,

    /// The range of pod addresses, one a family: checked, and without effect in this version
    #[arg(long, value_name = "CIDR,...", value_parser = cluster_cidr)]
    pub(crate) cluster_cidr: Option<String>,

    /// Switches as NAME=true|false: `AllowServiceExternalIPs` has a meaning here, others are ignored
    #[arg(long, value_name = "NAME=BOOL,...", value_delimiter = ',', value_parser = feature_gate)]
    feature_gates: Vec<(String, bool)>,

    /// How much to log: 0 to 3 what happens, 4 what is done about it, 6 everything
    #[arg(short = 'v', long = "v", value_name = "LEVEL", default_value_t = 0)]
    pub(crate) verbosity: u8,

    #[arg(skip)]
    pub(crate) without_effect: Vec<String>,
}

/// What kind of proxy to be.
#[derive(Clone, Debug)]
enum ProxyMode {
    Ipvs,
}

/// Where Services come from.
#[derive(Debug)]
pub(crate) enum Origin {
    Manifests(PathBuf),
    ApiServer { kubeconfig: Option<PathBuf>, master: Option<String> },
}

/// Reads a command line, with `_` for `-` in names allowed. The last of several values counts; lists add up.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Flags, clap::Error> {
    let (arguments, without_effect) = sort_out(arguments);
    let mut command = Flags::command();
    let name = |argument: &OsString| Some(argument.to_str()?.strip_prefix("--")?.split('=').next()?.to_owned());
    if let Some(flag) = arguments.iter().filter_map(name).find(|name| NOT_YET.contains(&name.as_str())) {
        let problem =
            format!("--{flag} of kube-proxy is not part of this version; give flags instead of a config file");
        return Err(command.error(ErrorKind::UnknownArgument, problem));
    }
    let matches = command.try_get_matches_from_mut(arguments)?;
    let mut flags = Flags::from_arg_matches(&matches)?;
    flags.without_effect = without_effect;
    flags.check().map_err(|problem| command.error(ErrorKind::ValueValidation, problem))?;
    Ok(flags)
}

/// Takes out the flags that have no effect, and spells the others with `-`.
fn sort_out(arguments: impl IntoIterator<Item = OsString>) -> (Vec<OsString>, Vec<String>) {
    let (mut kept, mut without_effect) = (Vec::new(), Vec::new());
    let mut arguments = arguments.into_iter();
    kept.extend(arguments.next());
    while let Some(argument) = arguments.next() {
        let Some(flag) = argument.to_str().and_then(|text| text.strip_prefix("--")) else {
            kept.push(argument);
            continue;
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name.replace('_', "-"), Some(value)),
            None => (flag.replace('_', "-"), None),
        };
        if let Some((_, takes)) = ACCEPTED.iter().find(|(accepted, _)| *accepted == name) {
            if *takes == Takes::Value && value.is_none() {
                arguments.next();
            }
            without_effect.push(format!("--{name}"));
            continue;
        }
        kept.push(match value {
            Some(value) => format!("--{name}={value}").into(),
            None => format!("--{name}").into(),
        });
    }
    (kept, without_effect)
}

impl Flags {
    fn check(&self) -> Result<(), String> {
        if self.ipvs_sync_period.is_zero() {
            return Err("--ipvs-sync-period must be more than 0".to_owned());
        }
        if self.ipvs_min_sync_period > self.ipvs_sync_period {
            return Err("--ipvs-min-sync-period must not be more than --ipvs-sync-period".to_owned());
        }
        if !self.hostname_override.is_empty() && self.hostname_override.trim().is_empty() {
            return Err("--hostname-override must not be blank".to_owned());
        }
        self.excluded()?;
        self.node_port_addresses()?;
        Ok(())
    }

    /// Where Services come from.
    pub(crate) fn origin(&self) -> Origin {
        match &self.manifests {
            Some(directory) => Origin::Manifests(directory.clone()),
            None => Origin::ApiServer { kubeconfig: self.kubeconfig.clone(), master: self.master.clone() },
        }
    }

    /// The name of the own Node.
    pub(crate) fn node_name(&self) -> String {
        let uname = rustix::system::uname();
        let host = uname.nodename().to_string_lossy();
        let name = if self.hostname_override.is_empty() { &*host } else { &self.hostname_override };
        name.trim().to_lowercase()
    }

    /// The ranges of `--ipvs-exclude-cidrs`.
    pub(crate) fn excluded(&self) -> Result<Vec<IpNet>, String> {
        entries(&self.ipvs_exclude_cidrs).map(|range| cidr("--ipvs-exclude-cidrs", range)).collect()
    }

    /// What `--nodeport-addresses` says.
    pub(crate) fn node_port_addresses(&self) -> Result<NodePortAddresses, String> {
        match entries(&self.nodeport_addresses).collect::<Vec<_>>().as_slice() {
            [] => Ok(NodePortAddresses::All),
            ["primary"] => Ok(NodePortAddresses::Primary),
            ranges if ranges.contains(&"primary") => {
                Err("--nodeport-addresses is either `primary` alone or a list of ranges".to_owned())
            }
            ranges => {
                let ranges = ranges.iter().map(|range| cidr("--nodeport-addresses", range));
                Ok(NodePortAddresses::Within(ranges.collect::<Result<_, _>>()?))
            }
        }
    }

    /// `--bind-address`, unless it is the unspecified address.
    pub(crate) fn bind_address(&self) -> Option<IpAddr> {
        Some(self.bind_address).filter(|address| !address.is_unspecified())
    }

    /// Whether external IPs of Services count.
    pub(crate) fn allows_external_ips(&self) -> bool {
        let gates = self.feature_gates.iter().rev();
        gates.filter(|(name, _)| name == "AllowServiceExternalIPs").map(|(_, value)| *value).next().unwrap_or(true)
    }

    /// The feature gates that have no meaning here.
    pub(crate) fn ignored_gates(&self) -> Vec<&str> {
        let names = self.feature_gates.iter().map(|(name, _)| name.as_str());
        names.filter(|name| *name != "AllowServiceExternalIPs").collect()
    }
}

fn proxy_mode(mode: &str) -> Result<ProxyMode, String> {
    match mode {
        "ipvs" => Ok(ProxyMode::Ipvs),
        "iptables" | "nftables" | "" => {
            Err("kube-ipvs is a proxy of mode ipvs only; for iptables or nftables run kube-proxy".to_owned())
        }
        _ => Err("the only mode is ipvs".to_owned()),
    }
}

/// As kube-proxy, empty means rr. Whether the kernel has it is found out at the start.
fn scheduler(name: &str) -> Result<Scheduler, String> {
    if name.is_empty() {
        return Ok(Scheduler::RoundRobin);
    }
    name.parse().map_err(|error: ipvs_netlink::InvalidScheduler| error.to_string())
}

fn bind_address(text: &str) -> Result<IpAddr, String> {
    if text.is_empty() {
        return Ok(IpAddr::from([0, 0, 0, 0]));
    }
    text.parse().map_err(|_| format!("{text:?} is no IP address"))
}

fn cidr(flag: &str, text: &str) -> Result<IpNet, String> {
    text.trim()
        .parse()
        .map_err(|_| format!("{flag}: {text:?} is no range of addresses such as 10.0.0.0/8 or fd00::/64"))
}

/// The entries of a list; `--flag=` is an empty one.
fn entries(list: &[String]) -> impl Iterator<Item = &str> {
    list.iter().map(String::as_str).filter(|entry| !entry.is_empty())
}

/// One range, or one of each family.
fn cluster_cidr(text: &str) -> Result<String, String> {
    let ranges = text.split(',').map(|range| cidr("--cluster-cidr", range)).collect::<Result<Vec<_>, _>>()?;
    match ranges.as_slice() {
        [_] => {}
        [a, b] if a.addr().is_ipv4() != b.addr().is_ipv4() => {}
        _ => return Err("give one range, or one of each family".to_owned()),
    }
    Ok(text.to_owned())
}

fn feature_gate(text: &str) -> Result<(String, bool), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?} lacks =true or =false"))?;
    Ok((name.trim().to_owned(), go::boolean(value.trim())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(words: &[&str]) -> Result<Flags, clap::Error> {
        parse(["kube-ipvs"].iter().chain(words).map(OsString::from))
    }

    #[test]
    fn the_command_is_well_formed() {
        Flags::command().debug_assert();
    }

    #[test]
    fn defaults_are_those_of_kube_proxy() {
        let flags = parse_words(&[]).unwrap();
        assert_eq!(flags.ipvs_scheduler, Scheduler::RoundRobin);
        assert_eq!(flags.ipvs_sync_period, Duration::from_secs(30));
        assert_eq!(flags.ipvs_min_sync_period, Duration::from_secs(1));
        assert_eq!(flags.node_port_addresses(), Ok(NodePortAddresses::All));
        assert_eq!(flags.bind_address(), None);
        assert!(flags.allows_external_ips());
        assert!(!flags.ipvs_strict_arp);
    }

    #[test]
    fn names_may_be_spelled_with_underscores() {
        let flags = parse_words(&["--ipvs_scheduler=wlc", "--ipvs_sync_period", "1m"]).unwrap();
        assert_eq!(flags.ipvs_scheduler, Scheduler::WeightedLeastConnection);
        assert_eq!(flags.ipvs_sync_period, Duration::from_secs(60));
    }

    #[test]
    fn the_last_value_counts_and_lists_add_up() {
        let flags = parse_words(&[
            "--ipvs-scheduler=wlc",
            "--ipvs-scheduler=sh",
            "--ipvs-exclude-cidrs=10.0.0.0/8,fd00::/64",
            "--ipvs-exclude-cidrs=172.16.0.0/12",
        ])
        .unwrap();
        assert_eq!(flags.ipvs_scheduler, Scheduler::SourceHashing);
        assert_eq!(flags.excluded().unwrap().len(), 3);
    }

    #[test]
    fn a_list_may_be_empty() {
        let flags = parse_words(&["--nodeport-addresses=", "--ipvs-exclude-cidrs="]).unwrap();
        assert_eq!(flags.node_port_addresses(), Ok(NodePortAddresses::All));
        assert_eq!(flags.excluded(), Ok(vec![]));
    }

    #[test]
    fn truth_values_need_no_value() {
        assert!(parse_words(&["--ipvs-strict-arp"]).unwrap().ipvs_strict_arp);
        assert!(!parse_words(&["--ipvs-strict-arp=false"]).unwrap().ipvs_strict_arp);
    }

    #[test]
    fn flags_without_effect_are_taken_with_their_values() {
        let flags = parse_words(&[
            "--masquerade-all",
            "--conntrack-min",
            "5",
            "--healthz_bind_address=0.0.0.0:1",
            "--profiling=false",
            "-v=4",
        ])
        .unwrap();
        assert_eq!(
            flags.without_effect,
            ["--masquerade-all", "--conntrack-min", "--healthz-bind-address", "--profiling"]
        );
        assert_eq!(flags.verbosity, 4);
    }

    #[test]
    fn wrong_values_are_refused_with_the_reason() {
        for (words, reason) in [
            (&["--proxy-mode=iptables"][..], "run kube-proxy"),
            (&["--ipvs-sync-period=5"], "is no duration"),
            (&["--ipvs-sync-period=0s"], "must be more than 0"),
            (&["--ipvs-min-sync-period=1m"], "must not be more than"),
            (&["--ipvs-exclude-cidrs=10.0.0.0/40"], "--ipvs-exclude-cidrs"),
            (&["--nodeport-addresses=primary,10.0.0.0/8"], "alone"),
            (&["--cluster-cidr=10.0.0.0/8,10.1.0.0/16"], "one of each family"),
            (&["--cluster-cidr="], "is no range"),
            (&["--bind-address=here"], "is no IP address"),
            (&["--hostname-override= "], "blank"),
            (&["--ipvs-scheduler=a-name-too-long-for-it"], "cannot be the name of a scheduler"),
            (&["--no-such-flag"], "--no-such-flag"),
            (&["--config=/etc/c"], "--config of kube-proxy is not part of this version"),
            (&["word"], "word"),
            (&["--manifests=d", "--kubeconfig=k"], "cannot be used with"),
        ] {
            let error = parse_words(words).expect_err(reason).to_string();
            assert!(error.contains(reason), "{words:?}: {error}");
        }
    }

    #[test]
    fn the_external_ips_gate_closes() {
        let flags = parse_words(&["--feature-gates=Other=true,AllowServiceExternalIPs=false"]).unwrap();
        assert!(!flags.allows_external_ips());
        assert_eq!(flags.ignored_gates(), ["Other"]);
    }
}
