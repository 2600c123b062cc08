//! Command lines and the settings they give. (For each flag with a field in the file see the tests of `config`.)

use std::fs;

use clap::{Args as _, CommandFactory as _};
use ipvs_netlink::Scheduler;
use reconciler::policy::{DetectLocal, NodePortAddresses};
use std::time::Duration;

use super::*;

fn parse_words(words: &[&str]) -> Result<Flags, clap::Error> {
    parse(["kube-ipvs"].iter().chain(words).map(OsString::from))
}

fn settings(words: &[&str]) -> Settings {
    parse_words(words).unwrap().effective().unwrap().settings
}

/// The error of a command line, from its syntax or its values.
fn error_of(words: &[&str]) -> String {
    match parse_words(words) {
        Ok(flags) => flags.effective().unwrap_err().to_string(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn clap_accepts_the_definition_of_the_command() {
    Flags::command().debug_assert();
}

#[test]
fn defaults_are_those_of_kube_proxy() {
    let settings = settings(&["--hostname-override=Node-A"]);
    let policy = &settings.policy;
    assert_eq!(policy.node_name, "node-a");
    assert_eq!(policy.scheduler, Scheduler::RoundRobin);
    assert_eq!((settings.periods.audit, settings.periods.min), (Duration::from_secs(30), Duration::from_secs(1)));
    assert_eq!(policy.node_port_addresses, NodePortAddresses::All);
    assert_eq!(policy.bind_address, None);
    assert!(policy.external_ips);
    assert!(!settings.strict_arp && !policy.masquerade_all && !settings.watch_all_nodes);
    assert_eq!(policy.masquerade_bit, 14);
    assert_eq!(policy.detect_local, DetectLocal::ClusterCidr(vec![]));
    assert_eq!(policy.drain_timeout, None);
    let conntrack = &settings.conntrack;
    assert_eq!((conntrack.max_per_core, conntrack.min, conntrack.tcp_be_liberal), (32_768, 131_072, false));
    let timeouts = [
        conntrack.tcp_timeout_established,
        conntrack.tcp_timeout_close_wait,
        conntrack.udp_timeout,
        conntrack.udp_timeout_stream,
    ];
    assert_eq!(timeouts.map(|timeout| timeout.as_secs()), [86_400, 3600, 0, 0]);
    let ports = [settings.healthz, settings.metrics].map(|address| address.unwrap().to_string());
    assert_eq!(ports, ["0.0.0.0:10256", "127.0.0.1:10249"]);
}

#[test]
fn each_detect_local_mode_reads_its_own_flag_and_ignores_the_others() {
    let bridge = DetectLocal::BridgeInterface("cni0".to_owned());
    let prefix = DetectLocal::InterfaceNamePrefix("abcdefghijklmno".to_owned());
    let ranges =
        |ranges: &[&str]| DetectLocal::ClusterCidr(ranges.iter().map(|range| range.parse().unwrap()).collect());
    for (words, detect) in [
        (&["--cluster-cidr=10.244.0.0/16"][..], ranges(&["10.244.0.0/16"])),
        (&["--detect-local-mode=", "--cluster-cidr=10.244.1.2/16,fd00::/56"], ranges(&["10.244.0.0/16", "fd00::/56"])),
        (&["--detect-local-mode=ClusterCIDR"], ranges(&[])),
        (&["--cluster-cidr=x", "--cluster-cidr=10.0.0.0/8"], ranges(&["10.0.0.0/8"])),
        (&["--detect-local-mode=NodeCIDR", "--cluster-cidr="], DetectLocal::NodeCidr),
        (&["--detect-local-mode=NodeCIDR", "--cluster-cidr=x,y,z"], DetectLocal::NodeCidr),
        (&["--detect_local_mode=BridgeInterface", "--pod_bridge_interface=cni0", "--cluster-cidr=x"], bridge),
        (&["--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=abcdefghijklmno"], prefix),
        (&["--pod-bridge-interface=a-name-that-is-too-long"], ranges(&[])),
    ] {
        assert_eq!(settings(words).policy.detect_local, detect, "{words:?}");
    }
}

#[test]
fn a_drain_timeout_of_0_is_none() {
    let timeout = |word: &str| settings(&[word]).policy.drain_timeout;
    assert_eq!(timeout("--ipvs-drain-timeout=0"), None);
    assert_eq!(timeout("--ipvs-drain-timeout=5m"), Some(Duration::from_secs(300)));
}

#[test]
fn underscores_in_names_are_dashes_and_in_values_are_kept() {
    let flags = parse_words(&["--ipvs_scheduler=wlc", "--ipvs_sync_period", "1m", "--hostname_override=a_b"]).unwrap();
    let settings = flags.effective().unwrap().settings;
    assert_eq!(settings.policy.scheduler, Scheduler::WeightedLeastConnection);
    assert_eq!(settings.periods.audit, Duration::from_secs(60));
    assert_eq!(settings.policy.node_name, "a_b");
}

#[test]
fn the_last_value_counts_and_lists_are_joined() {
    let settings = settings(&[
        "--ipvs-scheduler=wlc",
        "--ipvs-scheduler=sh",
        "--ipvs-exclude-cidrs=10.0.0.0/8,fd00::/64",
        "--ipvs-exclude-cidrs=172.16.0.0/12",
    ]);
    assert_eq!(settings.policy.scheduler, Scheduler::SourceHashing);
    assert_eq!(settings.policy.exclude.len(), 3);
}

#[test]
fn a_list_may_be_empty() {
    let settings = settings(&["--nodeport-addresses=", "--ipvs-exclude-cidrs="]);
    assert_eq!(settings.policy.node_port_addresses, NodePortAddresses::All);
    assert_eq!(settings.policy.exclude, vec![]);
}

#[test]
fn boolean_flags_need_no_value() {
    assert!(settings(&["--ipvs-strict-arp"]).strict_arp);
    assert!(!settings(&["--ipvs-strict-arp=false"]).strict_arp);
    let settings = settings(&["--masquerade-all", "--watch-all-nodes", "--conntrack-tcp-be-liberal", "--profiling"]);
    assert!(settings.policy.masquerade_all && settings.watch_all_nodes && settings.conntrack.tcp_be_liberal);
    assert!(settings.profiling);
}

#[test]
fn flags_without_effect_are_accepted_and_listed() {
    let flags = parse_words(&[
        "--iptables-localhost-nodeports",
        "--kube-api-qps",
        "5",
        "--healthz_bind_address=0.0.0.0:1",
        "--boot-id-file=x",
        "-v=4",
    ])
    .unwrap();
    assert_eq!(flags.effective().unwrap().configuration.logging.verbosity, 4);
    let mut names = flags.without_effect();
    names.sort_unstable();
    assert_eq!(names, ["boot-id-file", "iptables-localhost-nodeports", "kube-api-qps"]);
}

#[test]
fn port_flags_have_no_effect_except_0_which_disables() {
    let ports = |words: &[&str]| {
        let settings = settings(words);
        (settings.healthz.map(|address| address.to_string()), settings.metrics.map(|address| address.to_string()))
    };
    let usual = (Some("0.0.0.0:10256".to_owned()), Some("127.0.0.1:10249".to_owned()));
    assert_eq!(ports(&["--healthz-port=1", "--metrics-port=2"]), usual, "the default addresses have ports");
    assert_eq!(ports(&["--healthz-bind-address=", "--metrics-bind-address="]), usual);
    assert_eq!(ports(&["--healthz-port=0", "--metrics-port=0"]), (None, None));
    let given = ports(&["--healthz-bind-address=10.0.0.1", "--healthz-port=1", "--metrics-bind-address=::1"]);
    assert_eq!(given, (Some("10.0.0.1:1".to_owned()), Some("[::1]:10249".to_owned())));
    assert_eq!(ports(&["--bind-address=::"]), usual, "the flag --bind-address does not change them, as in kube-proxy");
}

#[test]
fn beside_a_file_most_flags_are_ignored_with_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.conf");
    fs::write(
        &path,
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nipvs: {scheduler: sh}\n\
         hostnameOverride: file\nlogging: {verbosity: 1, vmodule: [{filePattern: b, verbosity: 2}]}\n\
         kubeIPVS: {drainTimeout: 1m}\n",
    )
    .unwrap();
    let config = format!("--config={}", path.display());
    let words = [
        &config,
        "--ipvs-scheduler=lc",
        "--healthz-port=0",
        "--proxy-mode=iptables",
        "--hostname-override=flag",
        "-v=4",
        "--vmodule=a=1",
        "--ipvs-drain-timeout=2m",
        "--kube-api-qps=7",
    ];
    let flags = parse_words(&words).unwrap();
    let EffectiveConfig { configuration, settings, warnings } = flags.effective().unwrap();
    assert_eq!(settings.policy.scheduler, Scheduler::SourceHashing);
    assert_eq!(settings.policy.node_name, "flag");
    assert_eq!(settings.policy.drain_timeout, Some(Duration::from_secs(120)));
    assert_eq!(settings.periods.min, Duration::ZERO, "in a file there is no such default");
    assert!(settings.healthz.is_some());
    assert_eq!(configuration.logging.verbosity, 4);
    let patterns: Vec<&str> = configuration.logging.vmodule.iter().map(|it| it.file_pattern.as_str()).collect();
    assert_eq!(patterns, ["a", "b"], "the flag's come first");
    let warnings = warnings.join("\n");
    for flag in ["--ipvs-scheduler", "--healthz-port", "--proxy-mode", "--kube-api-qps"] {
        assert!(warnings.contains(flag), "{flag}: {warnings}");
    }
    for flag in ["--hostname-override", "--vmodule", "--ipvs-drain-timeout", "--v "] {
        assert!(!warnings.contains(flag), "{flag}: {warnings}");
    }
}

#[test]
fn takeover_accepts_the_flags_of_the_agent_before_and_after_it() {
    for words in [&["takeover", "--ipvs-scheduler=sh"][..], &["--ipvs-scheduler=sh", "takeover"]] {
        let flags = parse_words(words).unwrap();
        assert_eq!(flags.command, Some(Command::Takeover), "{words:?}");
        assert_eq!(flags.effective().unwrap().settings.policy.scheduler, Scheduler::SourceHashing, "{words:?}");
    }
}

#[test]
fn an_empty_value_counts_as_not_given() {
    let flags =
        parse_words(&["--config=", "--write-config-to=", "--master=", "--bind-address=", "--hostname-override="])
            .unwrap();
    assert_eq!((&flags.config, &flags.write_config_to, &flags.master), (&None, &None, &None));
    assert_eq!(flags.effective().unwrap().settings.policy.bind_address, None);
    for word in ["--version", "--version=true", "--version=raw"] {
        assert_eq!(parse_words(&[word]).unwrap_err().kind(), clap::error::ErrorKind::DisplayVersion, "{word}");
    }
}

#[test]
fn invalid_command_lines_are_rejected_with_the_reason() {
    for (words, reason) in [
        (&["--cluster-cidr="][..], "is not a range"),
        (&["--no-such-flag"], "--no-such-flag"),
        (&["word"], "word"),
        (&["--manifests=d", "--kubeconfig=k"], "cannot be used with"),
        (
            &["--pod-bridge-interface=abcdefghijklmnop", "--detect-local-mode=BridgeInterface"],
            "longer than the 15 bytes",
        ),
        (&["--detect-local-mode=InterfaceNamePrefix", "--pod-bridge-interface=x"], "--pod-interface-name-prefix"),
    ] {
        let error = error_of(words);
        assert!(error.contains(reason), "{words:?}: {error}");
    }
}

#[test]
fn the_feature_gate_of_external_ips_disables_them() {
    let settings = settings(&["--feature-gates=Other=true,AllowServiceExternalIPs=false"]);
    assert!(!settings.policy.external_ips);
    assert_eq!(settings.ignored_gates, ["Other"]);
}

#[test]
fn every_flag_with_an_effect_has_a_field_or_is_a_port() {
    let of_fields: Vec<&str> = config::FLAG_FIELDS.iter().map(|(flag, _)| *flag).collect();
    for flag in FieldFlags::augment_args(clap::Command::new("kube-ipvs")).get_arguments() {
        let name = flag.get_long().unwrap();
        assert!(of_fields.contains(&name) || PORT_FLAGS.contains(&name) || is_without_effect(flag), "--{name}");
    }
}

#[test]
fn docs_flags_md_has_every_flag_with_its_field_and_default() {
    let page = include_str!("../../docs/flags.md");
    for argument in Flags::command().get_arguments() {
        let Some(name) = argument.get_long() else { continue };
        let row = page.lines().find(|line| line.starts_with(&format!("| `--{name}`")));
        let row = row.expect(name);
        if let Some((_, field)) = config::FLAG_FIELDS.iter().find(|(flag, _)| *flag == name) {
            assert!(row.contains(&format!("| `{field}` |")), "--{name} sets {field}: {row}");
        }
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        if let Some((_, default)) = help.split_once("[default: ") {
            let default = default.trim_end_matches(']');
            assert!(row.contains(&format!("| {default} |")), "--{name} is {default} by default: {row}");
        }
    }
}
