//! The command line, spelled as kube-proxy spells it.
//!
//! Flags that have a meaning here are fields of [`Flags`]. kube-proxy's other flags stand in [`accepted`]: they are taken,
//! so that a command line can be kept as it is, and named once in the log.

mod accepted;
mod conntrack;
mod detect_local;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use ipnet::IpNet;
use ipvs_netlink::Scheduler;
use reconciler::policy::{DetectLocal, NodePortAddresses};

use self::accepted::{NOT_YET, sort_out};
pub(crate) use self::conntrack::Conntrack;
use self::detect_local::DetectLocalFlags;
use crate::go;

/// Makes Kubernetes Services work with IPVS, the kernel's own load balancer.
///
/// Takes the flags of `kube-proxy --proxy-mode=ipvs`. Services and EndpointSlices come from an API server (--kubeconfig,
/// --master, or the service account of a pod) or from a directory of manifests (--manifests).
#[derive(Debug, Parser)]
#[command(name = "kube-ipvs", version, args_override_self = true)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
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

    /// Answer ARP only for addresses of the interface asked, as load balancers need that announce VIPs by ARP
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

    /// How long a TCP endpoint that is to go may keep its connections; then they are cut. 0s: as long as they last
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = go::duration)]
    ipvs_drain_timeout: Duration,

    /// Masquerade all traffic to ClusterIPs, that of pods too
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value = "false", hide_default_value = true, value_parser = go::boolean)]
    pub(crate) masquerade_all: bool,

    /// Which bit of a packet's mark, 0 to 31, says that it is to be masqueraded
    #[arg(long, value_name = "BIT", default_value = "14", value_parser = clap::value_parser!(u8).range(0..=31))]
    pub(crate) iptables_masquerade_bit: u8,

    #[command(flatten)]
    detect_local: DetectLocalFlags,

    /// Know the addresses of all Nodes, to refuse VIPs that are one of them: costs the API server each Node status update
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value = "false", hide_default_value = true, value_parser = go::boolean)]
    pub(crate) watch_all_nodes: bool,

    #[command(flatten)]
    pub(crate) conntrack: Conntrack,

    /// Switches as NAME=true|false: `AllowServiceExternalIPs` has a meaning here, others are ignored
    #[arg(long, value_name = "NAME=BOOL,...", value_delimiter = ',', value_parser = feature_gate)]
    feature_gates: Vec<(String, bool)>,

    /// How much to log: 0 to 3 what happens, 4 what is done about it, 6 everything
    #[arg(short = 'v', long = "v", value_name = "LEVEL", default_value_t = 0)]
    pub(crate) verbosity: u8,

    #[arg(skip)]
    pub(crate) without_effect: Vec<String>,

    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// What to do instead of serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub(crate) enum Command {
    /// Remove what kube-ipvs made: virtual servers of VIPs, kube-ipvs0, the tables of the packet filter. Tells what it
    /// leaves. Needs no API server, and may be repeated
    Cleanup,
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
        self.detect_local()?;
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

    /// How to tell that a packet comes from a pod.
    pub(crate) fn detect_local(&self) -> Result<DetectLocal, String> {
        self.detect_local.get()
    }

    /// `--ipvs-drain-timeout`, unless there is none.
    pub(crate) fn drain_timeout(&self) -> Option<Duration> {
        Some(self.ipvs_drain_timeout).filter(|timeout| !timeout.is_zero())
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

fn feature_gate(text: &str) -> Result<(String, bool), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?} lacks =true or =false"))?;
    Ok((name.trim().to_owned(), go::boolean(value.trim())?))
}
