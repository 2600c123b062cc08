//! Flags that kube-proxy once had: each is refused with a sentence about what to do instead.

use clap::CommandFactory as _;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::Flags;

/// What takes the place of something.
enum Instead {
    /// Nothing: the flag is to be left out.
    Nothing(&'static str),
    /// Other flags or commands.
    Other(&'static str),
}
use Instead::{Nothing, Other};

const LOGGING: Instead = Nothing("all logs go to standard error");
const WINDOWS: Instead = Nothing("it is for Windows");

/// Flags of kube-proxy before 1.36.
const RETIRED: &[(&str, Instead)] = &[
    ("add-dir-header", LOGGING),
    ("alsologtostderr", LOGGING),
    ("azure-container-registry-config", Nothing("no image is pulled")),
    (
        "cleanup-iptables",
        Nothing("the agent itself removes nothing of kube-proxy's: `kube-ipvs takeover` does, before the agent starts"),
    ),
    ("cleanup-ipvs", Nothing("the agent adopts the virtual servers that it finds")),
    ("conntrack-max", Other("--conntrack-max-per-core and --conntrack-min")),
    ("enable-dsr", WINDOWS),
    ("forward-healthcheck-vip", WINDOWS),
    ("google-json-key", Nothing("no cloud is asked")),
    ("housekeeping-interval", Nothing("it is a flag of the kubelet")),
    ("ipvs-masquerade-all", Other("--masquerade-all")),
    ("log-backtrace-at", LOGGING),
    ("log-cadvisor-usage", LOGGING),
    ("log-dir", LOGGING),
    ("log-file", LOGGING),
    ("log-file-max-size", LOGGING),
    ("logtostderr", LOGGING),
    ("network-name", WINDOWS),
    ("one-output", LOGGING),
    ("proxy-port-range", Nothing("no port of the node is opened for Services")),
    ("resource-container", Nothing("the container or the unit of systemd sets limits")),
    ("root-hnsendpoint-name", WINDOWS),
    ("skip-headers", LOGGING),
    ("skip-log-headers", LOGGING),
    ("source-vip", WINDOWS),
    ("stderrthreshold", LOGGING),
    ("udp-timeout", Other("--conntrack-udp-timeout and --ipvs-udp-timeout")),
    ("windows-service", WINDOWS),
];

/// Explains an error about a flag that was retired. No other unknown argument is answered with the tip to clean up, which
/// would take all Services from the node.
pub(super) fn explain(mut error: clap::Error) -> clap::Error {
    if !matches!(error.kind(), ErrorKind::UnknownArgument | ErrorKind::InvalidSubcommand) {
        return error;
    }
    let given = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(argument)) => argument.clone(),
        _ => String::new(),
    };
    let name = given.trim_start_matches('-').split('=').next().unwrap_or_default();
    if let Some((name, instead)) = RETIRED.iter().find(|(retired, _)| *retired == name) {
        let message = match instead {
            Nothing(why) => format!("--{name} is no flag any more: leave it out; {why}"),
            Other(flags) => format!("--{name} is no flag any more: use {flags} instead"),
        };
        return Flags::command().error(ErrorKind::UnknownArgument, message);
    }
    for kind in [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand, ContextKind::Suggested] {
        if error.get(kind).is_some_and(|value| value.to_string().contains("cleanup")) {
            error.remove(kind);
        }
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::parse;

    fn refusal(argument: &str) -> String {
        parse(["kube-ipvs", argument].map(Into::into)).unwrap_err().to_string()
    }

    #[test]
    fn a_retired_flag_is_refused_with_what_to_do() {
        for (name, _) in RETIRED {
            for argument in [format!("--{name}"), format!("--{name}=true"), format!("--{}", name.replace('-', "_"))] {
                let text = refusal(&argument);
                let says = text.contains("leave it out; ") || text.contains(" instead");
                assert!(says && !text.contains("tip") && !text.contains("--cleanup\'"), "{argument}: {text}");
            }
        }
    }

    #[test]
    fn no_mistake_is_answered_with_the_tip_to_clean_up() {
        for argument in
            ["--cleanup-all", "--clean", "--cleanups", "--cleanup-ipsets=true", "cleanu", "clean-up", "cleanupp"]
        {
            let text = refusal(argument);
            assert!(!text.contains("tip"), "{argument}: {text}");
        }
        assert!(refusal("--ipvs-schedular=rr").contains("--ipvs-scheduler"), "other tips remain");
    }
}
