//! The command line. Here are the flags without a field in the configuration file; [`fields`] has all others.

#![expect(clippy::doc_markdown, reason = "comments of flags are the text of --help")]

mod fields;
mod retired;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};

use self::fields::FieldFlags;
use crate::config::{self, ConfigError, Configuration, FieldError, ParsedFile, Settings, go_syntax};

/// Makes Kubernetes Services work with IPVS, the kernel's own load balancer.
///
/// Takes the flags of `kube-proxy --proxy-mode=ipvs`, and its configuration file (--config). Services and
/// EndpointSlices come from an API server (--kubeconfig, --master, or the service account of a pod) or from a directory
/// of manifests (--manifests).
#[derive(Clone, Debug, Parser)]
#[command(name = "kube-ipvs", version, args_override_self = true, after_long_help = AFTER_HELP)]
pub(crate) struct Flags {
    /// A KubeProxyConfiguration of kubeproxy.config.k8s.io/v1alpha1, YAML or JSON. With a file, flags that have a field
    /// in it are ignored, except --hostname-override, those of logging, and those that kube-proxy does not have. When
    /// the file changes, the agent restarts with it
    #[arg(long, value_name = "FILE", value_parser = parse_path)]
    pub(crate) config: Option<PathBuf>,

    /// Write the configuration that would be in effect to a file, and exit
    #[arg(long, value_name = "FILE", value_parser = parse_path)]
    pub(crate) write_config_to: Option<PathBuf>,

    /// Do what requires more than CAP_NET_ADMIN (kernel settings, modules), and exit: for an init container
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value = "false", hide_default_value = true, value_parser = go_syntax::parse_bool)]
    pub(crate) init_only: bool,

    /// Remove what kube-ipvs made and what kube-proxy left, and exit
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value = "false", hide_default_value = true, value_parser = go_syntax::parse_bool)]
    pub(crate) cleanup: bool,

    /// The URL of the API server, instead of the kubeconfig's
    #[arg(long, value_name = "URL", help_heading = "The API server")]
    pub(crate) master: Option<String>,

    /// A directory of YAML and JSON manifests to take Services, EndpointSlices and the Node from, instead of an API
    /// server
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kubeconfig", "master"],
        help_heading = "What kube-proxy does not have")]
    pub(crate) manifests: Option<PathBuf>,

    /// Sync once, then exit: with status 0 if the kernel accepted everything. Waits for a source that does not answer
    #[arg(long, help_heading = "What kube-proxy does not have")]
    pub(crate) once: bool,

    #[command(flatten)]
    fields: FieldFlags,

    /// Flags that were given, by name.
    #[arg(skip)]
    given: Vec<String>,

    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

const AFTER_HELP: &str = "\
Examples:
  kube-ipvs --config=/var/lib/kube-proxy/config.conf --hostname-override=worker-1
          as kubeadm starts kube-proxy
  kube-ipvs --manifests=/etc/services.d --once
          bring the kernel to what the files say, without a cluster
  kube-ipvs takeover --config=/var/lib/kube-proxy/config.conf
          after kube-proxy has stopped: adopt its virtual servers, and remove everything else it left
  kube-ipvs --config=config.conf --write-config-to=/dev/stdout
          show the configuration in effect, with all defaults

Signals:
  SIGTERM and SIGINT end the agent and leave everything in the kernel as it is, so that traffic goes on.

Exit status:
  0 after a signal, and if a command or --once succeeded; 1 after any error.

See also:
  docs/flags.md of the project (every flag with its field in the file), docs/operations.md (what to look at when a Service \
                          does not work), ipvsadm(8), nft(8)";

/// A command to run instead of serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub(crate) enum Command {
    /// Remove what kube-ipvs made: virtual servers of VIPs, kube-ipvs0, the tables of the packet filter. Logs what it
    /// leaves. Needs no API server, and may be repeated
    Cleanup {
        /// Remove only the tables of the packet filter: for the return to kube-proxy, once it runs and has adopted the
        /// virtual servers and addresses
        #[arg(long)]
        filter_only: bool,
    },
    /// Take a node over from kube-proxy: sync once, with the flags of the agent, and then remove what kube-proxy left
    /// (KUBE-* chains of iptables, its ipsets, its tables of nf_tables). May be repeated
    Takeover,
}

/// Flags with a field that have an effect even with `--config`. (Flags without a field always have.)
const FLAGS_BESIDE_FILE: [&str; 19] = [
    "allow-pod-addresses",
    "confirm-disappearance",
    "hostname-override",
    "ipvs-drain-timeout",
    "ipvs-estimation",
    "log-flush-frequency",
    "log-json-info-buffer-size",
    "log-json-split-stream",
    "log-text-info-buffer-size",
    "log-text-split-stream",
    "logging-format",
    "own-tables",
    "service-budget-front-ends",
    "service-budget-real-servers",
    "v",
    "vip-binding",
    "vip-ranges",
    "vmodule",
    "watch-all-nodes",
];

/// Flags that set only the port of an address, which has the field.
const PORT_FLAGS: [&str; 2] = ["healthz-port", "metrics-port"];

/// Parses a command line. Names may have `_` for `-`. Of several values the last one counts; lists are joined.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Flags, clap::Error> {
    let mut arguments: Vec<OsString> = arguments.into_iter().map(with_dashes).collect();
    // kube-proxy's --version takes a value.
    for argument in &mut arguments {
        if argument == "--version=true" || argument == "--version=raw" {
            *argument = "--version".into();
        }
    }
    // `takeover` accepts the agent's flags after it too; the parser knows them only before it.
    if arguments.get(1).is_some_and(|argument| argument == "takeover") {
        let takeover = arguments.remove(1);
        arguments.push(takeover);
    }
    let matches = Flags::command().try_get_matches_from(arguments).map_err(retired::explain)?;
    let mut flags = Flags::from_arg_matches(&matches)?;
    // An empty value counts as not given: most likely it comes from a variable that was not set.
    flags.config = flags.config.filter(|path| !path.as_os_str().is_empty());
    flags.write_config_to = flags.write_config_to.filter(|path| !path.as_os_str().is_empty());
    flags.master = flags.master.filter(|url| !url.is_empty());
    flags.given = given_flags(&matches);
    Ok(flags)
}

/// Accepts an empty path, which clap's own parser does not.
#[expect(clippy::unnecessary_wraps, reason = "clap's signature of a value parser")]
fn parse_path(text: &str) -> Result<PathBuf, String> {
    Ok(PathBuf::from(text))
}

/// `--ipvs_scheduler` is `--ipvs-scheduler`; values stay as they are.
fn with_dashes(argument: OsString) -> OsString {
    match argument.to_str().filter(|text| text.starts_with("--")).map(|text| (text, text.split_once('='))) {
        Some((_, Some((name, value)))) => format!("{}={value}", name.replace('_', "-")).into(),
        Some((name, None)) => name.replace('_', "-").into(),
        None => argument,
    }
}

/// The names of the flags that were given.
fn given_flags(matches: &ArgMatches) -> Vec<String> {
    let command = Flags::command();
    let is_given = |flag: &&Arg| matches.value_source(flag.get_id().as_str()) == Some(ValueSource::CommandLine);
    command.get_arguments().filter(is_given).filter_map(Arg::get_long).map(str::to_owned).collect()
}

/// Whether a flag is accepted and changes nothing. Its help begins with that.
fn is_without_effect(flag: &Arg) -> bool {
    flag.get_help().is_some_and(|help| help.to_string().starts_with("No effect"))
}

/// The configuration in effect, and warnings about it.
#[derive(Clone, Debug)]
pub(crate) struct EffectiveConfig {
    pub(crate) configuration: Configuration,
    pub(crate) settings: Settings,
    pub(crate) warnings: Vec<String>,
}

impl Flags {
    /// The configuration of the file, or without one of the flags, with all defaults filled in.
    pub(crate) fn effective(&self) -> Result<EffectiveConfig, ConfigError> {
        let (configuration, mut warnings, mut errors) = match &self.config {
            Some(path) => self.configuration_of_file(path)?,
            None => self.configuration_of_flags(),
        };
        warnings.extend(config::settings::warnings(&configuration));
        let host = rustix::system::uname();
        match Settings::new(&configuration, &host.nodename().to_string_lossy()) {
            Ok(settings) if errors.is_empty() => Ok(EffectiveConfig { configuration, settings, warnings }),
            result => {
                errors.extend(result.err().into_iter().flatten());
                Err(match &self.config {
                    Some(path) => ConfigError::in_file(path, errors),
                    None => ConfigError::in_flags(errors),
                })
            }
        }
    }

    /// The given flags that are accepted and change nothing.
    pub(crate) fn without_effect(&self) -> Vec<&str> {
        let command = Flags::command();
        let names: BTreeSet<&str> =
            command.get_arguments().filter(|flag| is_without_effect(flag)).filter_map(Arg::get_long).collect();
        let given = self.given.iter().map(String::as_str);
        given.filter(|name| names.contains(name) && self.takes_effect(name)).collect()
    }

    /// Whether a flag has an effect beside the file, if there is one.
    fn takes_effect(&self, name: &str) -> bool {
        let has_field = PORT_FLAGS.contains(&name) || config::FLAG_FIELDS.iter().any(|(flag, _)| *flag == name);
        self.config.is_none() || !has_field || FLAGS_BESIDE_FILE.contains(&name)
    }

    fn configuration_of_file(&self, path: &Path) -> Result<(Configuration, Vec<String>, Vec<FieldError>), ConfigError> {
        let ParsedFile { mut configuration, warnings, errors } = config::load(path)?;
        let mut warnings: Vec<String> =
            warnings.into_iter().map(|warning| format!("{}: {warning}", path.display())).collect();
        let ignored: Vec<&str> =
            self.given.iter().map(String::as_str).filter(|name| !self.takes_effect(name)).collect();
        if !ignored.is_empty() {
            let names = ignored.join(" --");
            warnings.push(format!("--{names}: ignored because of --config, as in kube-proxy; set it in the file"));
        }
        self.fields.clone().beside_file().apply(&mut configuration);
        Ok((configuration, warnings, errors))
    }

    fn configuration_of_flags(&self) -> (Configuration, Vec<String>, Vec<FieldError>) {
        let mut configuration = Configuration::default();
        configuration.apply_defaults();
        // As in kube-proxy, the flag has the default of --iptables-min-sync-period.
        configuration.ipvs.min_sync_period = go_syntax::Duration::from_secs(1);
        self.fields.clone().apply(&mut configuration);
        self.fields.apply_ports(&mut configuration);
        configuration.default_modes();
        let mut errors = Vec::new();
        // Most likely from a variable that was not set.
        if self.fields.has_empty_cluster_cidr() && configuration.detect_local_mode == "ClusterCIDR" {
            let message = "\"\" is not a range of addresses; leave the flag out if pods have no range of their own";
            errors.push(FieldError::new("clusterCIDR", message));
        }
        (configuration, Vec::new(), errors)
    }
}
