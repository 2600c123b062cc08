//! The configuration: kube-proxy's file and flags, parsed as kube-proxy parses them, and the settings that follow from
//! them.
//!
//! * `object`: `KubeProxyConfiguration`, all its fields and their defaults.
//! * `parse`: from the text of a file to that object.
//! * `settings`: from the object to the typed settings of the agent; all values are checked there, and all errors are
//!   reported together.
//! * `file_watcher`: notices that a file has changed.
//! * `go_syntax`: durations and booleans as Go writes them.
//!
//! With `--config` a flag has an effect only if kube-proxy does not have it, or uses it beside a file too.

pub(crate) mod file_watcher;
pub(crate) mod go_syntax;
pub(crate) mod object;
mod parse;
pub(crate) mod settings;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::Path;

pub(crate) use self::object::Configuration;
pub(crate) use self::parse::ParsedFile;
pub(crate) use self::settings::Settings;

/// Reads and parses a file. [`Settings`] checks its values.
pub(crate) fn load(path: &Path) -> Result<ParsedFile, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| ConfigError::in_file(path, vec![FieldError::new("", format!("cannot be read: {error}"))]))?;
    parse(&text).map_err(|problems| ConfigError::in_file(path, problems))
}

/// Parses the text of a file, and fills in the defaults of fields that it leaves out.
pub(crate) fn parse(text: &str) -> Result<ParsedFile, Vec<FieldError>> {
    let mut file = parse::parse(text)?;
    file.configuration.apply_defaults();
    Ok(file)
}

/// What is wrong with one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FieldError {
    /// The path of the field, as in `ipvs.syncPeriod`; empty for the file itself.
    path: String,
    message: String,
}

impl FieldError {
    pub(crate) fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: path.into(), message: message.into() }
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let field = self.path.split('[').next().unwrap_or_default();
        match (field, flag_for_field(field)) {
            ("", _) => f.write_str(&self.message),
            (_, None) => write!(f, "KubeProxyConfiguration.{}: {}", self.path, self.message),
            (_, Some(flag)) => write!(f, "KubeProxyConfiguration.{} (--{flag}): {}", self.path, self.message),
        }
    }
}

/// Everything that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConfigError {
    /// The file; empty for flags.
    file: String,
    fields: Vec<FieldError>,
}

impl ConfigError {
    pub(crate) fn in_file(path: &Path, fields: Vec<FieldError>) -> Self {
        Self { file: path.display().to_string(), fields }
    }

    pub(crate) fn in_flags(fields: Vec<FieldError>) -> Self {
        Self { file: String::new(), fields }
    }
}

impl fmt::Display for ConfigError {
    /// One line for each error, if there are several.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let separator = if self.file.is_empty() { "" } else { ": " };
        match self.fields.as_slice() {
            [one] => write!(f, "{}{separator}{one}", self.file),
            all => {
                write!(f, "{}{separator}{} settings are wrong:", self.file, all.len())?;
                all.iter().try_for_each(|error| write!(f, "\n  {error}"))
            }
        }
    }
}

impl std::error::Error for ConfigError {}

/// The flags that set a field of the file, each with that field.
pub(crate) const FLAG_FIELDS: &[(&str, &str)] = &[
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
    ("allow-pod-addresses", "kubeIPVS.allowPodAddresses"),
    ("vip-binding", "kubeIPVS.vipBinding"),
    ("vip-ranges", "kubeIPVS.vipRanges"),
    ("ipvs-estimation", "kubeIPVS.estimation"),
    ("confirm-disappearance", "kubeIPVS.confirmDisappearance"),
    ("own-tables", "kubeIPVS.ownTables"),
    ("service-budget-front-ends", "kubeIPVS.serviceBudget.frontEnds"),
    ("service-budget-real-servers", "kubeIPVS.serviceBudget.realServers"),
];

fn flag_for_field(field: &str) -> Option<&'static str> {
    FLAG_FIELDS.iter().find(|(_, path)| *path == field).map(|(flag, _)| *flag)
}
