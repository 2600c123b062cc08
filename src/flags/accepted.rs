//! Flags of kube-proxy that have no meaning here, and those that have none yet.

use std::ffi::OsString;

/// Flags of kube-proxy that are taken and have no effect, and whether a value must follow.
const ACCEPTED: &[(&str, Takes)] = &[
    ("bind-address-hard-fail", Takes::Boolean),
    ("boot-id-file", Takes::Value),
    ("config-sync-period", Takes::Value),
    ("healthz-bind-address", Takes::Value),
    ("healthz-port", Takes::Value),
    ("iptables-localhost-nodeports", Takes::Boolean),
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
    ("metrics-bind-address", Takes::Value),
    ("metrics-port", Takes::Value),
    ("oom-score-adj", Takes::Value),
    ("profiling", Takes::Boolean),
    ("show-hidden-metrics-for-version", Takes::Value),
    ("vmodule", Takes::Value),
];

/// Flags of kube-proxy that would change what the program does, and are not there yet: they are refused, not ignored.
pub(super) const NOT_YET: [&str; 4] = ["cleanup", "config", "init-only", "write-config-to"];

/// What may follow a flag.
#[derive(Clone, Copy, PartialEq)]
enum Takes {
    /// `=VALUE`, or the next argument.
    Value,
    /// `=true` or `=false`, or nothing.
    Boolean,
}

/// Takes out the flags that have no effect, and spells the others with `-`.
pub(super) fn sort_out(arguments: impl IntoIterator<Item = OsString>) -> (Vec<OsString>, Vec<String>) {
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
