//! Command lines and what they mean.

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
    assert!(!flags.masquerade_all && !flags.watch_all_nodes);
    assert_eq!(flags.iptables_masquerade_bit, 14);
    assert_eq!(flags.detect_local(), Ok(DetectLocal::ClusterCidr(vec![])));
    assert_eq!(flags.drain_timeout(), None);
    let conntrack = &flags.conntrack;
    assert_eq!((conntrack.max_per_core, conntrack.min, conntrack.tcp_be_liberal), (32_768, 131_072, false));
    let timeouts = [
        conntrack.tcp_timeout_established,
        conntrack.tcp_timeout_close_wait,
        conntrack.udp_timeout,
        conntrack.udp_timeout_stream,
    ];
    assert_eq!(timeouts.map(|timeout| timeout.as_secs()), [86_400, 3600, 0, 0]);
}

#[test]
fn every_mode_of_telling_pods_takes_its_own_flag_and_ignores_the_others() {
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
        assert_eq!(parse_words(words).unwrap().detect_local(), Ok(detect), "{words:?}");
    }
}

#[test]
fn a_drain_timeout_of_0_is_none() {
    let timeout = |word: &str| parse_words(&[word]).unwrap().drain_timeout();
    assert_eq!(timeout("--ipvs-drain-timeout=0"), None);
    assert_eq!(timeout("--ipvs-drain-timeout=5m"), Some(Duration::from_secs(300)));
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
    let flags = parse_words(&["--masquerade-all", "--watch-all-nodes", "--conntrack-tcp-be-liberal"]).unwrap();
    assert!(flags.masquerade_all && flags.watch_all_nodes && flags.conntrack.tcp_be_liberal);
}

#[test]
fn flags_without_effect_are_taken_with_their_values() {
    let flags = parse_words(&[
        "--iptables-localhost-nodeports",
        "--kube-api-qps",
        "5",
        "--healthz_bind_address=0.0.0.0:1",
        "--profiling=false",
        "-v=4",
    ])
    .unwrap();
    assert_eq!(
        flags.without_effect,
        ["--iptables-localhost-nodeports", "--kube-api-qps", "--healthz-bind-address", "--profiling"]
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
        (&["--cluster-cidr=10.0.0.0/8,fd00::/64,fd01::/64"], "one of each family"),
        (&["--detect-local-mode=clustercidr"], "NodeCIDR"),
        (&["--detect-local-mode=BridgeInterface"], "needs --pod-bridge-interface"),
        (&["--detect-local-mode=InterfaceNamePrefix", "--pod-bridge-interface=x"], "needs --pod-interface-name-prefix"),
        (
            &["--detect-local-mode=BridgeInterface", "--pod-bridge-interface=abcdefghijklmnop"],
            "longer than the 15 bytes",
        ),
        (&["--iptables-masquerade-bit=32"], "0..=31"),
        (&["--iptables-masquerade-bit=-1"], "invalid value"),
        (&["--masquerade-all=perhaps"], "neither true nor false"),
        (&["--conntrack-max-per-core=-1"], "invalid value"),
        (&["--conntrack-min=many"], "invalid"),
        (&["--conntrack-udp-timeout=-1s"], "is no duration"),
        (&["--ipvs-drain-timeout=-1s"], "is no duration"),
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
