//! The command line, spelled as kube-proxy spells it.

#![expect(clippy::doc_markdown, reason = "comments of flags are the text of --help")]

mod fields;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};

use self::fields::FieldFlags;
use crate::config::{self, Configuration, Problem, Problems, Read, Settings};
use crate::go;

/// Makes Kubernetes Services work with IPVS, the kernel's own load balancer.
///
/// Takes the flags of `kube-proxy --proxy-mode=ipvs`, and its configuration file (--config). Services and EndpointSlices
/// come from an API server (--kubeconfig, --master, or the service account of a pod) or from a directory of manifests
/// (--manifests).
#[derive(Clone, Debug, Parser)]
#[command(name = "kube-ipvs", version, args_override_self = true, after_long_help = AFTER_HELP)]
pub(crate) struct Flags {
    /// A KubeProxyConfiguration of kubeproxy.config.k8s.io/v1alpha1, YAML or JSON. With a file, of the flags that have a field
    /// in it only --hostname-override, those of logging, and what kube-proxy does not have still count; a changed file is
    /// taken up by starting anew
    #[arg(long, value_name = "FILE", value_parser = path)]
    pub(crate) config: Option<PathBuf>,

    /// Write the configuration that would be in effect to a file, and exit
    #[arg(long, value_name = "FILE", value_parser = path)]
    pub(crate) write_config_to: Option<PathBuf>,

    /// Do what takes more than CAP_NET_ADMIN (kernel settings, modules), and exit: for an init container
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value = "false", hide_default_value = true, value_parser = go::boolean)]
    pub(crate) init_only: bool,

    /// Remove what kube-ipvs made and what kube-proxy left, and exit
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value = "false", hide_default_value = true, value_parser = go::boolean)]
    pub(crate) cleanup: bool,

    /// The URL of the API server, in place of the kubeconfig's
    #[arg(long, value_name = "URL", help_heading = "The API server")]
    pub(crate) master: Option<String>,

    /// A directory of YAML and JSON manifests to take Services, EndpointSlices and the Node from, instead of an API server
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kubeconfig", "master"],
        help_heading = "What kube-proxy does not have")]
    pub(crate) manifests: Option<PathBuf>,

    /// Sync once, then exit: with status 0 if the kernel took everything. Waits for a source that does not answer
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
          once kube-proxy has stopped: adopt what it programmed, and remove what else it left
  kube-ipvs --config=config.conf --write-config-to=/dev/stdout
          see what a file comes to

Signals:
  SIGTERM and SIGINT end the agent and leave everything in the kernel as it is, so that traffic goes on.

Exit status:
  0 after a signal, and where a command or --once did all it was asked; 1 after any error.

See also:
  docs/flags.md of the project (every flag with its field in the file), docs/operations.md (what to look at when a Service \
                          does not work), ipvsadm(8), nft(8)";

/// What to do instead of serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub(crate) enum Command {
    /// Remove what kube-ipvs made: virtual servers of VIPs, kube-ipvs0, the tables of the packet filter. Tells what it
    /// leaves. Needs no API server, and may be repeated
    Cleanup {
        /// Remove the tables of the packet filter alone: for the way back to kube-proxy, once that runs and has taken
        /// virtual servers and addresses over
        #[arg(long)]
        filter_only: bool,
    },
    /// Take a node over from kube-proxy: sync once, with the flags of the agent, and once everything is in place remove
    /// what kube-proxy left (KUBE-* chains of iptables, its ipsets, its tables of nf_tables). May be repeated
    Takeover,
}

/// Flags of fields that count beside a file. (Those without a field do anyway.)
const BESIDE_FILE: [&str; 15] = [
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
    "v",
    "vip-binding",
    "vip-ranges",
    "vmodule",
    "watch-all-nodes",
];

/// These have no field to themselves: they are part of addresses that have.
const PORTS: [&str; 2] = ["healthz-port", "metrics-port"];

/// Reads a command line, with `_` for `-` in names allowed. The last of several values counts; lists add up.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Flags, clap::Error> {
    let mut arguments: Vec<OsString> = arguments.into_iter().map(with_dashes).collect();
    // kube-proxy's has values.
    for argument in &mut arguments {
        if argument == "--version=true" || argument == "--version=raw" {
            *argument = "--version".into();
        }
    }
    // It takes the agent's flags, which for the parser stand before it.
    if arguments.get(1).is_some_and(|argument| argument == "takeover") {
        let takeover = arguments.remove(1);
        arguments.push(takeover);
    }
    let matches = Flags::command().try_get_matches_from(arguments)?;
    let mut flags = Flags::from_arg_matches(&matches)?;
    // Empty is as good as not given: a variable, most likely, that was not set.
    flags.config = flags.config.filter(|path| !path.as_os_str().is_empty());
    flags.write_config_to = flags.write_config_to.filter(|path| !path.as_os_str().is_empty());
    flags.master = flags.master.filter(|url| !url.is_empty());
    flags.given = given(&matches);
    Ok(flags)
}

/// Empty ones too.
#[expect(clippy::unnecessary_wraps, reason = "the parser's form")]
fn path(text: &str) -> Result<PathBuf, String> {
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
fn given(matches: &ArgMatches) -> Vec<String> {
    let command = Flags::command();
    let is_given = |flag: &&Arg| matches.value_source(flag.get_id().as_str()) == Some(ValueSource::CommandLine);
    command.get_arguments().filter(is_given).filter_map(Arg::get_long).map(str::to_owned).collect()
}

/// Whether a flag is taken and changes nothing, which its help begins with.
fn is_without_effect(flag: &Arg) -> bool {
    flag.get_help().is_some_and(|help| help.to_string().starts_with("No effect"))
}

/// What is in effect, and what is to be said about it.
#[derive(Clone, Debug)]
pub(crate) struct Effective {
    pub(crate) configuration: Configuration,
    pub(crate) settings: Settings,
    pub(crate) warnings: Vec<String>,
}

impl Flags {
    /// What the file says, or the flags where there is none, with all defaults.
    pub(crate) fn effective(&self) -> Result<Effective, Problems> {
        let (configuration, warnings, mut problems) = match &self.config {
            Some(path) => self.beside_file(path)?,
            None => self.alone(),
        };
        let host = rustix::system::uname();
        match Settings::new(&configuration, &host.nodename().to_string_lossy()) {
            Ok(settings) if problems.is_empty() => Ok(Effective { configuration, settings, warnings }),
            result => {
                problems.extend(result.err().into_iter().flatten());
                Err(match &self.config {
                    Some(path) => Problems::of_file(path, problems),
                    None => Problems::of_flags(problems),
                })
            }
        }
    }

    /// Flags that were given and change nothing.
    pub(crate) fn without_effect(&self) -> Vec<&str> {
        let command = Flags::command();
        let names: BTreeSet<&str> =
            command.get_arguments().filter(|flag| is_without_effect(flag)).filter_map(Arg::get_long).collect();
        let given = self.given.iter().map(String::as_str);
        given.filter(|name| names.contains(name) && self.is_heeded(name)).collect()
    }

    fn is_heeded(&self, name: &str) -> bool {
        let is_of_file = PORTS.contains(&name) || config::FLAGS_OF_FIELDS.iter().any(|(flag, _)| *flag == name);
        self.config.is_none() || !is_of_file || BESIDE_FILE.contains(&name)
    }

    fn beside_file(&self, path: &Path) -> Result<(Configuration, Vec<String>, Vec<Problem>), Problems> {
        let Read { mut configuration, warnings, problems } = config::load(path)?;
        let mut warnings: Vec<String> =
            warnings.into_iter().map(|warning| format!("{}: {warning}", path.display())).collect();
        let unheeded: Vec<&str> = self.given.iter().map(String::as_str).filter(|name| !self.is_heeded(name)).collect();
        if !unheeded.is_empty() {
            let names = unheeded.join(" --");
            warnings.push(format!("--{names}: not heeded beside --config, as in kube-proxy; write it in the file"));
        }
        self.fields.clone().beside_file().apply(&mut configuration);
        Ok((configuration, warnings, problems))
    }

    fn alone(&self) -> (Configuration, Vec<String>, Vec<Problem>) {
        let mut configuration = Configuration::default();
        configuration.complete();
        // On the command line it has the default of another mode.
        configuration.ipvs.min_sync_period = go::Duration::from_secs(1);
        self.fields.clone().apply(&mut configuration);
        self.fields.apply_ports(&mut configuration);
        configuration.name_modes();
        let mut problems = Vec::new();
        // A variable that was empty, most likely.
        if self.fields.has_empty_cluster_cidr() && configuration.detect_local_mode == "ClusterCIDR" {
            let what = "\"\" is no range of addresses; leave the flag out where pods have no range of their own";
            problems.push(Problem::new("clusterCIDR", what));
        }
        (configuration, Vec::new(), problems)
    }
}
