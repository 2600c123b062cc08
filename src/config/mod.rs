//! Configuration: kube-proxy's file and flags, read as kube-proxy reads them, and what they come to here.
//!
//! * `object`: `KubeProxyConfiguration`, field by field, with its defaults.
//! * `read`: from the text of a file to that object.
//! * `settings`: from the object to what the agent goes by; whatever is wrong is found there, all at once.
//! * `follow`: notices that a file has changed.
//!
//! A file is all there is: with `--config` only the flags count that kube-proxy heeds beside it, and those it does not have.

pub(crate) mod follow;
pub(crate) mod object;
mod read;
pub(crate) mod settings;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::Path;

pub(crate) use self::object::Configuration;
pub(crate) use self::read::Read;
pub(crate) use self::settings::Settings;

/// Reads a file. What is wrong with its values is for [`Settings`] to find.
pub(crate) fn load(path: &Path) -> Result<Read, Problems> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Problems::of_file(path, vec![Problem::new("", format!("cannot be read: {error}"))]))?;
    complete(&text).map_err(|problems| Problems::of_file(path, problems))
}

/// Reads the text of a file, and gives defaults to what it leaves out.
pub(crate) fn complete(text: &str) -> Result<Read, Vec<Problem>> {
    let mut read = read::read(text)?;
    read.configuration.complete();
    Ok(read)
}

/// Something that is wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// The path of the field, as in `ipvs.syncPeriod`; empty for the file itself.
    path: String,
    what: String,
}

impl Problem {
    pub(crate) fn new(path: impl Into<String>, what: impl Into<String>) -> Self {
        Self { path: path.into(), what: what.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let field = self.path.split('[').next().unwrap_or_default();
        match (field, flag_of(field)) {
            ("", _) => f.write_str(&self.what),
            (_, None) => write!(f, "KubeProxyConfiguration.{}: {}", self.path, self.what),
            (_, Some(flag)) => write!(f, "KubeProxyConfiguration.{} (--{flag}): {}", self.path, self.what),
        }
    }
}

/// All that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problems {
    /// The file; empty for flags.
    origin: String,
    problems: Vec<Problem>,
}

impl Problems {
    pub(crate) fn of_file(path: &Path, problems: Vec<Problem>) -> Self {
        Self { origin: path.display().to_string(), problems }
    }

    pub(crate) fn of_flags(problems: Vec<Problem>) -> Self {
        Self { origin: String::new(), problems }
    }
}

impl fmt::Display for Problems {
    /// A line for each, if there are several.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let separator = if self.origin.is_empty() { "" } else { ": " };
        match self.problems.as_slice() {
            [one] => write!(f, "{}{separator}{one}", self.origin),
            all => {
                write!(f, "{}{separator}{} settings are wrong:", self.origin, all.len())?;
                all.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
            }
        }
    }
}

impl std::error::Error for Problems {}

/// The flags that set fields, each with its field: what one may write in either place.
pub(crate) const FLAGS_OF_FIELDS: &[(&str, &str)] = &[
    ("feature-gates", "featureGates"),
    ("kubeconfig", "clientConnection.kubeconfig"),
    ("kube-api-content-type", "clientConnection.contentType"),
    ("kube-api-qps", "clientConnection.qps"),
    ("kube-api-burst", "clientConnection.burst"),
    ("hostname-override", "hostnameOverride"),
    ("bind-address", "bindAddress"),
    ("bind-address-hard-fail", "bindAddressHardFail"),
    ("healthz-bind-address", "healthzBindAddress"),
    ("metrics-bind-address", "metricsBindAddress"),
    ("profiling", "enableProfiling"),
    ("show-hidden-metrics-for-version", "showHiddenMetricsForVersion"),
    ("proxy-mode", "mode"),
    ("iptables-masquerade-bit", "iptables.masqueradeBit"),
    ("masquerade-all", "iptables.masqueradeAll"),
    ("iptables-localhost-nodeports", "iptables.localhostNodePorts"),
    ("iptables-sync-period", "iptables.syncPeriod"),
    ("iptables-min-sync-period", "iptables.minSyncPeriod"),
    ("ipvs-sync-period", "ipvs.syncPeriod"),
    ("ipvs-min-sync-period", "ipvs.minSyncPeriod"),
    ("ipvs-scheduler", "ipvs.scheduler"),
    ("ipvs-exclude-cidrs", "ipvs.excludeCIDRs"),
    ("ipvs-strict-arp", "ipvs.strictARP"),
    ("ipvs-tcp-timeout", "ipvs.tcpTimeout"),
    ("ipvs-tcpfin-timeout", "ipvs.tcpFinTimeout"),
    ("ipvs-udp-timeout", "ipvs.udpTimeout"),
    ("detect-local-mode", "detectLocalMode"),
    ("cluster-cidr", "clusterCIDR"),
    ("pod-bridge-interface", "detectLocal.bridgeInterface"),
    ("pod-interface-name-prefix", "detectLocal.interfaceNamePrefix"),
    ("nodeport-addresses", "nodePortAddresses"),
    ("oom-score-adj", "oomScoreAdj"),
    ("config-sync-period", "configSyncPeriod"),
    ("conntrack-max-per-core", "conntrack.maxPerCore"),
    ("conntrack-min", "conntrack.min"),
    ("conntrack-tcp-timeout-established", "conntrack.tcpEstablishedTimeout"),
    ("conntrack-tcp-timeout-close-wait", "conntrack.tcpCloseWaitTimeout"),
    ("conntrack-tcp-be-liberal", "conntrack.tcpBeLiberal"),
    ("conntrack-udp-timeout", "conntrack.udpTimeout"),
    ("conntrack-udp-timeout-stream", "conntrack.udpStreamTimeout"),
    ("v", "logging.verbosity"),
    ("vmodule", "logging.vmodule"),
    ("logging-format", "logging.format"),
    ("log-flush-frequency", "logging.flushFrequency"),
    ("log-text-split-stream", "logging.options.text.splitStream"),
    ("log-text-info-buffer-size", "logging.options.text.infoBufferSize"),
    ("log-json-split-stream", "logging.options.json.splitStream"),
    ("log-json-info-buffer-size", "logging.options.json.infoBufferSize"),
    ("ipvs-drain-timeout", "kubeIPVS.drainTimeout"),
    ("watch-all-nodes", "kubeIPVS.watchAllNodes"),
    ("vip-binding", "kubeIPVS.vipBinding"),
    ("vip-ranges", "kubeIPVS.vipRanges"),
    ("ipvs-estimation", "kubeIPVS.estimation"),
    ("confirm-disappearance", "kubeIPVS.confirmDisappearance"),
];

fn flag_of(field: &str) -> Option<&'static str> {
    FLAGS_OF_FIELDS.iter().find(|(_, path)| *path == field).map(|(flag, _)| *flag)
}
