//! A table of all fields and flags: their defaults, and values they accept and refuse.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;

use reconciler::policy::NodePortAddresses;
use serde_json::{Value, json};

use super::object::{API_VERSION, KIND};
use super::{Configuration, FLAG_FIELDS};
use crate::flags::{self, EffectiveConfig};

/// A field, the flag that sets it if there is one, and values.
struct Row {
    field: &'static str,
    flag: Option<&'static str>,
    /// In a file that does not mention it.
    default: Value,
    /// A valid value: as text of the flag, and in the file. Then other fields that it requires.
    accepts: (&'static str, Value, Value),
    /// Invalid values: as text of the flag, in the file, and a part of the error.
    rejects: Vec<(&'static str, Value, &'static str)>,
}

fn row(field: &'static str, default: Value, accepts: (&'static str, Value)) -> Row {
    let flag = FLAG_FIELDS.iter().find(|(_, path)| *path == field).map(|(flag, _)| *flag);
    Row { field, flag, default, accepts: (accepts.0, accepts.1, Value::Null), rejects: Vec::new() }
}

impl Row {
    fn rejects(mut self, flag: &'static str, file: impl Into<Value>, what: &'static str) -> Self {
        self.rejects.push((flag, file.into(), what));
        self
    }

    /// The value is valid only with this value of another field.
    fn requires(mut self, field: &str, value: &str) -> Self {
        self.accepts.2 = json!({ field: value });
        self
    }

    fn non_negative_duration(self) -> Self {
        self.rejects("-1s", "-1s", "-1s: must not be less than 0").rejects("5", "5", "is not a duration")
    }

    fn boolean(self) -> Self {
        self.rejects("perhaps", "perhaps", "")
    }
}

#[expect(clippy::too_many_lines, reason = "a table")]
fn rows() -> Vec<Row> {
    let yes = || ("true", json!(true));
    let not_a_range = "is not a range of addresses";
    vec![
        row("featureGates", Value::Null, ("AllowServiceExternalIPs=false", json!({"AllowServiceExternalIPs": false})))
            .rejects("AllowServiceExternalIPs", json!({"AllowServiceExternalIPs": "often"}), ""),
        row("clientConnection.kubeconfig", json!(""), ("/k", json!("/k"))),
        row("clientConnection.acceptContentTypes", json!(""), ("", json!("application/json"))),
        row(
            "clientConnection.contentType",
            json!("application/vnd.kubernetes.protobuf"),
            ("application/json", json!("application/json")),
        ),
        row("clientConnection.qps", json!(5.0), ("20.5", json!(20.5)))
            .rejects("many", "many", "")
            .rejects("NaN", "NaN", ""),
        row("clientConnection.burst", json!(10), ("20", json!(20))).rejects("-1", -1, "-1: must not be less than 0"),
        row("logging.format", json!("text"), ("json", json!("json"))).rejects("xml", "xml", "give text or json"),
        row("logging.flushFrequency", json!(5_000_000_000_u64), ("1s", json!(1_000_000_000)))
            .rejects("soon", "soon", ""),
        row("logging.verbosity", json!(0), ("4", json!(4))).rejects("-1", -1, ""),
        row("logging.vmodule", Value::Null, ("agent*=5", json!([{"filePattern": "agent*", "verbosity": 5}]))).rejects(
            "agent",
            json!([{"verbosity": "x"}]),
            "",
        ),
        row("logging.options.text.splitStream", Value::Null, yes()),
        row("logging.options.text.infoBufferSize", Value::Null, ("1Ki", json!("1Ki"))),
        row("logging.options.json.splitStream", Value::Null, yes()),
        row("logging.options.json.infoBufferSize", Value::Null, ("1Ki", json!("1Ki"))),
        row("hostnameOverride", json!(""), (" Node-A ", json!(" Node-A "))).rejects("  ", "  ", "must not be blank"),
        row("bindAddress", json!("0.0.0.0"), ("010.0.0.1", json!("010.0.0.1"))).rejects(
            "here",
            "here",
            "is not an IP address",
        ),
        row("healthzBindAddress", json!("0.0.0.0:10256"), ("[::1]:80", json!("[::1]:80")))
            .rejects("0.0.0.0:0", "0.0.0.0:0", "is not an address with a port")
            .rejects("0.0.0.0:65536", "0.0.0.0:65536", "is not an address with a port")
            .rejects("localhost:80", "localhost:80", "is not an address with a port"),
        row("metricsBindAddress", json!("127.0.0.1:10249"), ("0.0.0.0:1", json!("0.0.0.0:1"))).rejects(
            "everywhere",
            "everywhere",
            "is not an address with a port",
        ),
        row("bindAddressHardFail", json!(false), yes()).boolean(),
        row("enableProfiling", json!(false), yes()).boolean(),
        row("showHiddenMetricsForVersion", json!(""), ("1.35", json!("1.35"))).rejects(
            "1.34",
            "1.34",
            "leave it empty, or give \"1.35\"",
        ),
        row("mode", json!("ipvs"), ("ipvs", json!("ipvs")))
            .rejects("iptables", "iptables", "for this mode run kube-proxy")
            .rejects("nftables", "nftables", "for this mode run kube-proxy")
            .rejects("userspace", "userspace", "the only mode is ipvs"),
        row("iptables.masqueradeBit", json!(14), ("31", json!(31)))
            .rejects("32", 32, "32: must be within 0 and 31")
            .rejects("-1", -1, "-1: must be within 0 and 31"),
        row("iptables.masqueradeAll", json!(false), yes()).boolean(),
        row("iptables.localhostNodePorts", json!(true), ("false", json!(false))).boolean(),
        row("iptables.syncPeriod", json!("30s"), ("1m0s", json!("1m0s"))).rejects("x", "x", "is not a duration"),
        row("iptables.minSyncPeriod", json!("1s"), ("2s", json!("2s"))).rejects("x", "x", "is not a duration"),
        row("ipvs.syncPeriod", json!("30s"), ("1m0s", json!("1m0s")))
            .rejects("-1s", "-1s", "-1s: must be more than 0")
            .rejects("x", "x", "is not a duration"),
        row("ipvs.minSyncPeriod", json!("0s"), ("5s", json!("5s"))).non_negative_duration().rejects(
            "31s",
            "31s",
            "must not be less than ipvs.minSyncPeriod",
        ),
        row("ipvs.scheduler", json!(""), ("sh", json!("sh"))).rejects(
            "a-name-too-long-for-it",
            "a-name-too-long-for-it",
            "cannot be a name in IPVS",
        ),
        row("ipvs.excludeCIDRs", json!([]), ("10.0.0.0/8,fd00::/64", json!(["10.0.0.0/8", "fd00::/64"]))).rejects(
            "10.0.0.0/8,10.0.0.0/40",
            json!(["10.0.0.0/8", "10.0.0.0/40"]),
            not_a_range,
        ),
        row("ipvs.strictARP", json!(false), yes()).boolean(),
        row("ipvs.tcpTimeout", json!("0s"), ("15m0s", json!("15m0s"))).non_negative_duration(),
        row("ipvs.tcpFinTimeout", json!("0s"), ("2m0s", json!("2m0s"))).non_negative_duration(),
        row("ipvs.udpTimeout", json!("0s"), ("5m0s", json!("5m0s"))).non_negative_duration(),
        row("winkernel.networkName", json!(""), ("", json!("n"))),
        row("winkernel.sourceVip", json!(""), ("", json!("1.2.3.4"))),
        row("winkernel.enableDSR", json!(false), ("", json!(true))),
        row("winkernel.rootHnsEndpointName", json!(""), ("", json!("n"))),
        row("winkernel.forwardHealthCheckVip", json!(false), ("", json!(true))),
        row("nftables.masqueradeBit", json!(14), ("", json!(99))),
        row("nftables.masqueradeAll", json!(false), ("", json!(true))),
        row("nftables.syncPeriod", json!("30s"), ("", json!("1m0s"))),
        row("nftables.minSyncPeriod", json!("1s"), ("", json!("2s"))),
        row("detectLocalMode", json!("ClusterCIDR"), ("NodeCIDR", json!("NodeCIDR")))
            .rejects("clustercidr", "clustercidr", "give ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix")
            .rejects("BridgeInterface", "BridgeInterface", "must be given with detectLocalMode BridgeInterface")
            .rejects("InterfaceNamePrefix", "InterfaceNamePrefix", "must be given with detectLocalMode"),
        row("detectLocal.bridgeInterface", json!(""), ("cni0", json!("cni0")))
            .requires("detectLocalMode", "BridgeInterface"),
        row("detectLocal.interfaceNamePrefix", json!(""), ("veth", json!("veth")))
            .requires("detectLocalMode", "InterfaceNamePrefix"),
        row("clusterCIDR", json!(""), ("10.244.0.0/16,fd00::/56", json!("10.244.0.0/16,fd00::/56")))
            .rejects("10.0.0.0/8,10.1.0.0/16", "10.0.0.0/8,10.1.0.0/16", "one of each family")
            .rejects("10.0.0.0/8,fd00::/64,fd01::/64", "10.0.0.0/8,fd00::/64,fd01::/64", "one of each family")
            .rejects("10.0.0.0/8, fd00::/64", "10.0.0.0/8, fd00::/64", not_a_range),
        row("nodePortAddresses", json!([]), ("primary", json!(["primary"]))).rejects(
            "10.0.0.0",
            json!(["10.0.0.0"]),
            not_a_range,
        ),
        row("oomScoreAdj", json!(-999), ("-1000", json!(-1000))).rejects(
            "1001",
            1001,
            "1001: must be within -1000 and 1000",
        ),
        row("conntrack.maxPerCore", json!(32768), ("0", json!(0))).rejects("-1", -1, "-1: must not be less than 0"),
        row("conntrack.min", json!(131_072), ("1", json!(1)))
            .rejects("-1", -1, "-1: must not be less than 0")
            .rejects("many", "many", ""),
        row("conntrack.tcpEstablishedTimeout", json!("24h0m0s"), ("0s", json!("0s"))).non_negative_duration(),
        row("conntrack.tcpCloseWaitTimeout", json!("1h0m0s"), ("0s", json!("0s"))).non_negative_duration(),
        row("conntrack.tcpBeLiberal", json!(false), yes()).boolean(),
        row("conntrack.udpTimeout", json!("0s"), ("10s", json!("10s"))).non_negative_duration(),
        row("conntrack.udpStreamTimeout", json!("0s"), ("10s", json!("10s"))).non_negative_duration(),
        row("configSyncPeriod", json!("15m0s"), ("1h0m0s", json!("1h0m0s"))).rejects(
            "-1s",
            "-1s",
            "-1s: must be more than 0",
        ),
        row("portRange", json!(""), ("", json!("1-2"))),
        row("windowsRunAsService", json!(false), ("", json!(true))),
        row("kubeIPVS.drainTimeout", Value::Null, ("5m0s", json!("5m0s"))).non_negative_duration(),
        row("kubeIPVS.watchAllNodes", Value::Null, yes()).boolean(),
        row("kubeIPVS.allowPodAddresses", Value::Null, yes()).boolean(),
        row("kubeIPVS.serviceBudget.frontEnds", Value::Null, ("1000", json!(1000)))
            .rejects("0", 0, "0: must not be less than 1")
            .rejects("many", "many", ""),
        row("kubeIPVS.serviceBudget.realServers", Value::Null, ("1000", json!(1000)))
            .rejects("0", 0, "0: must not be less than 1")
            .rejects("many", "many", ""),
        row("kubeIPVS.vipBinding", Value::Null, ("route", json!("route"))).rejects(
            "routes",
            "routes",
            "give address or route",
        ),
        row("kubeIPVS.vipRanges", Value::Null, ("10.96.0.0/12,fd00::/108", json!(["10.96.0.0/12", "fd00::/108"])))
            .requires("kubeIPVS.vipBinding", "route")
            .rejects(
                "10.96.0.0/12",
                json!(["10.96.0.0/12"]),
                "requires kubeIPVS.vipBinding (--vip-binding) to be route",
            )
            .rejects("10.96.0.0", json!(["10.96.0.0"]), not_a_range)
            .rejects(
                "0.0.0.0/0",
                json!(["0.0.0.0/0"]),
                "0.0.0.0/0 contains every address: the node would keep all packets",
            )
            .rejects("fe80::/64", json!(["fe80::/64"]), "fe80::/64 overlaps fe80::/10, whose addresses cannot be VIPs"),
        row("kubeIPVS.estimation", Value::Null, ("false", json!(false))).boolean(),
        row("kubeIPVS.confirmDisappearance", Value::Null, ("false", json!(false))).boolean(),
        row("kubeIPVS.ownTables", Value::Null, ("false", json!(false))).boolean(),
    ]
}

fn with_flags(words: &[String]) -> Result<EffectiveConfig, String> {
    let words = ["kube-ipvs".to_owned()].into_iter().chain(words.iter().cloned()).map(OsString::from);
    let flags = flags::parse(words).map_err(|error| error.to_string())?;
    flags.effective().map_err(|problems| problems.to_string())
}

fn with_file(content: &str) -> Result<EffectiveConfig, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.conf");
    fs::write(&path, content).unwrap();
    with_flags(&[format!("--config={}", path.display())])
}

/// A file with a field in it, and perhaps one more.
fn file(field: &str, value: &Value, beside: &Value) -> String {
    let mut object = json!({"apiVersion": API_VERSION, "kind": KIND});
    let beside = beside.as_object().into_iter().flatten().map(|(field, value)| (field.as_str(), value));
    for (field, value) in [(field, value)].into_iter().chain(beside) {
        let place = field.split('.').fold(&mut object, |object, key| &mut object[key]);
        *place = value.clone();
    }
    object.to_string()
}

/// The flags of the fields that a value makes sense beside.
fn flags_beside(beside: &Value) -> impl Iterator<Item = String> {
    beside.as_object().into_iter().flatten().map(|(field, value)| {
        let flag = FLAG_FIELDS.iter().find(|(_, path)| path == field).unwrap().0;
        format!("--{flag}={}", value.as_str().unwrap())
    })
}

fn field<'a>(configuration: &'a Value, path: &str) -> &'a Value {
    configuration.pointer(&format!("/{}", path.replace('.', "/"))).unwrap_or(&Value::Null)
}

fn shown(configuration: &Configuration) -> Value {
    serde_json::to_value(configuration).unwrap()
}

#[test]
fn every_field_has_its_default() {
    let effective = with_file(&file("mode", &json!("ipvs"), &Value::Null)).unwrap();
    let configuration = shown(&effective.configuration);
    for row in rows() {
        assert_eq!(field(&configuration, row.field), &row.default, "{}", row.field);
    }
}

#[test]
fn every_field_and_its_flag_accept_a_value() {
    for row in rows() {
        let (text, value, beside) = &row.accepts;
        let effective = with_file(&file(row.field, value, beside)).unwrap();
        assert_eq!(field(&shown(&effective.configuration), row.field), value, "{} in a file", row.field);
        assert_eq!(effective.warnings, [""; 0], "{} in a file", row.field);
        let Some(flag) = row.flag else { continue };
        let mut words = vec![format!("--{flag}={text}")];
        words.extend(flags_beside(beside));
        let effective = with_flags(&words).unwrap();
        assert_eq!(field(&shown(&effective.configuration), row.field), value, "--{flag}");
        // As kube-proxy has it, names may have underscores.
        words[0] = format!("--{}={text}", flag.replace('-', "_"));
        assert_eq!(with_flags(&words).unwrap().configuration, effective.configuration, "--{flag}");
    }
}

#[test]
fn every_flag_beside_a_file_has_an_effect_or_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.conf");
    fs::write(&path, file("mode", &json!("ipvs"), &Value::Null)).unwrap();
    for row in rows() {
        let Some(flag) = row.flag else { continue };
        let mut words = vec![format!("--config={}", path.display()), format!("--{flag}={}", row.accepts.0)];
        words.extend(flags_beside(&row.accepts.2));
        let effective = with_flags(&words).unwrap();
        let has_effect = field(&shown(&effective.configuration), row.field) != &row.default;
        let named = effective.warnings.iter().filter_map(|warning| warning.split_once(": ignored because of --config"));
        let is_named = named.flat_map(|(flags, _)| flags.split(' ')).any(|named| named == format!("--{flag}"));
        assert_ne!(has_effect, is_named, "--{flag}: {:?}", effective.warnings);
    }
}

#[test]
fn an_invalid_value_is_rejected_with_the_name_of_its_field() {
    for row in rows() {
        for (text, value, what) in &row.rejects {
            let error = with_file(&file(row.field, value, &Value::Null)).expect_err(row.field);
            // Where two fields contradict each other, the error may name the other one.
            let is_named =
                error.contains(&format!("KubeProxyConfiguration.{}", row.field)) || error.contains(row.field);
            assert!(is_named || what.contains("detectLocalMode"), "{} = {value} in a file: {error}", row.field);
            assert!(error.contains(what), "{} = {value} in a file: {error}", row.field);
            if let Some(flag) = row.flag {
                let error = with_flags(&[format!("--{flag}={text}")]).expect_err(flag);
                assert!(error.contains(what), "--{flag}={text}: {error}");
            }
        }
    }
}

#[test]
fn the_table_has_every_flag_and_every_field() {
    fn leaves(path: &str, value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(object) if !object.is_empty() => {
                for (key, value) in object {
                    leaves(&format!("{path}{}{key}", if path.is_empty() { "" } else { "." }), value, found);
                }
            }
            _ => _ = found.insert(path.to_owned()),
        }
    }
    let table: BTreeSet<String> = rows().iter().map(|row| row.field.to_owned()).collect();
    let mut fields = BTreeSet::new();
    leaves("", &shown(&Configuration::default()), &mut fields);
    fields.retain(|field| !["apiVersion", "kind", "logging.options"].contains(&field.as_str()));
    assert_eq!(fields.difference(&table).collect::<Vec<_>>(), [""; 0], "fields that are not in the table");
    let flags: BTreeSet<String> = FLAG_FIELDS.iter().map(|(_, field)| (*field).to_owned()).collect();
    assert_eq!(flags.difference(&table).collect::<Vec<_>>(), [""; 0], "flags that are not in the table");
}

#[test]
fn all_errors_are_reported_together() {
    let error = with_file(
        "
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: ipvs
bindAddress: here
ipvs: {syncPeriod: 1s, minSyncPeriod: 2s, excludeCIDRs: [10.0.0.0/8, x]}
oomScoreAdj: 5000
",
    )
    .unwrap_err();
    for line in [
        "4 settings are wrong:",
        "\n  KubeProxyConfiguration.bindAddress (--bind-address): \"here\" is not an IP address",
        "\n  KubeProxyConfiguration.ipvs.syncPeriod (--ipvs-sync-period): 1s: must not be less than ipvs.minSyncPeriod",
        "\n  KubeProxyConfiguration.ipvs.excludeCIDRs[1] (--ipvs-exclude-cidrs): \"x\" is not a range",
        "\n  KubeProxyConfiguration.oomScoreAdj (--oom-score-adj): 5000: must be within",
    ] {
        assert!(error.contains(line), "{line}: {error}");
    }
    let error = with_file(&format!(
        "{{\"apiVersion\": \"{API_VERSION}\", \"kind\": \"{KIND}\", \"mode\": 1, \"ipvs\": {{\"strictARP\": \"x\", \"syncPeriod\": 5}}}}"
    ))
    .unwrap_err();
    for path in [
        "KubeProxyConfiguration.mode",
        "KubeProxyConfiguration.ipvs.strictARP",
        "KubeProxyConfiguration.ipvs.syncPeriod",
    ] {
        assert!(error.contains(path), "{path}: {error}");
    }
}

#[test]
fn a_value_of_the_wrong_type_does_not_hide_other_errors() {
    let error = with_file(&format!(
        "{{\"apiVersion\": \"{API_VERSION}\", \"kind\": \"{KIND}\", \"oomScoreAdj\": 2000, \"mode\": \"ipvs\", \"ipvs\": \
         {{\"syncPeriod\": 5, \"scheduler\": \"a-name-too-long-for-it\"}}, \"nodePortAddresses\": [1, \"a/b\"]}}"
    ))
    .unwrap_err();
    for path in ["ipvs.syncPeriod", "ipvs.scheduler", "oomScoreAdj", "nodePortAddresses"] {
        assert!(error.contains(&format!("KubeProxyConfiguration.{path}")), "{path}: {error}");
    }
}

#[test]
fn unknown_and_duplicate_fields_are_warnings() {
    let effective = with_file(
        "
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: ipvs
mode: ipvs
ipvs:
  scheduler: sh
  scheduler: lc
  colour: red
udpIdleTimeout: 250ms
clusterCIDR: null
",
    )
    .unwrap();
    let warnings = effective.warnings.join("\n");
    for text in ["\"mode\"", "\"ipvs.scheduler\"", "unknown field \"ipvs.colour\"", "unknown field \"udpIdleTimeout\""]
    {
        assert!(warnings.contains(text), "{text}: {warnings}");
    }
    assert_eq!(effective.configuration.ipvs.scheduler, "lc", "the last counts");
}

#[test]
fn documents_after_the_first_are_ignored_with_a_warning() {
    let base = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: ipvs\n";
    for (before, after, warnings) in [
        ("", "", &[][..]),
        ("---\n", "---\n", &[]),
        ("%YAML 1.2\n---\n", "...\n", &[]),
        ("# a comment\n---\n", "---\n# nothing\n---\n", &[]),
        ("", "---\nkind: KubeletConfiguration\n", &["another (KubeletConfiguration)"]),
        ("", "---\nmode: nftables\n", &["another after"]),
        ("", "---\n- a\n---\nkind: B\n", &["another after", "another (B)"]),
        ("", "---\n{ not: [yaml\n", &["another after"]),
    ] {
        let effective =
            with_file(&format!("{before}{base}{after}")).unwrap_or_else(|error| panic!("{after:?}: {error}"));
        assert_eq!(effective.warnings.len(), warnings.len(), "{after:?}: {:?}", effective.warnings);
        for (found, wanted) in effective.warnings.iter().zip(warnings) {
            assert!(found.contains(wanted), "{after:?}: {found}");
        }
        assert_eq!(effective.configuration.mode, "ipvs");
    }
    let error = with_file(&format!("kind: Other\n---\n{base}")).unwrap_err();
    assert!(error.contains("not of apiVersion"), "the first counts: {error}");
}

#[test]
fn whole_numbers_may_be_written_as_helm_writes_them() {
    for (field, text, value) in [
        ("conntrack.min", "1.048576e+06", json!(1_048_576)),
        ("conntrack.maxPerCore", "5.24288e+05", json!(524_288)),
        ("conntrack.min", "131072.0", json!(131_072)),
        ("oomScoreAdj", "-9.98e+02", json!(-998)),
        ("iptables.masqueradeBit", "1.5e+01", json!(15)),
        ("clientConnection.burst", "1e+01", json!(10)),
        ("logging.verbosity", "2.0", json!(2)),
    ] {
        let (object, name) = field.split_once('.').map_or((None, field), |(object, name)| (Some(object), name));
        let line = object.map_or_else(|| format!("{name}: {text}"), |object| format!("{object}: {{{name}: {text}}}"));
        let base = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
        let effective = with_file(&format!("{base}{line}\n")).unwrap_or_else(|error| panic!("{line}: {error}"));
        assert_eq!(*self::field(&shown(&effective.configuration), field), value, "{line}");
    }
    for text in ["1.5", "1e+30", ".nan"] {
        let file = format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nconntrack: {{min: {text}}}"
        );
        let error = with_file(&file).unwrap_err();
        assert!(error.contains("conntrack.min") || error.contains("non-finite float"), "{text}: {error}");
    }
}

#[test]
fn node_port_addresses_mix_ranges_and_words() {
    let range = || "10.0.0.0/8".parse().unwrap();
    for (words, expected, warns) in [
        ("", NodePortAddresses::All, false),
        ("all", NodePortAddresses::All, false),
        ("all,primary,10.0.0.0/8", NodePortAddresses::All, false),
        ("primary", NodePortAddresses::Primary, false),
        ("primary,10.0.0.0/8", NodePortAddresses::PrimaryAndWithin(vec![range()]), false),
        ("10.0.0.0/8", NodePortAddresses::Within(vec![range()]), false),
        ("localhost", NodePortAddresses::None, true),
        ("localhost,10.0.0.0/8", NodePortAddresses::Within(vec![range()]), true),
        ("primary,localhost", NodePortAddresses::Primary, true),
        ("localhost,all", NodePortAddresses::All, true),
    ] {
        let items: Vec<&str> = words.split(',').filter(|word| !word.is_empty()).collect();
        let by_file = with_file(&file("nodePortAddresses", &json!(items), &Value::Null)).unwrap();
        let by_flag = with_flags(&[format!("--nodeport-addresses={words}")]).unwrap();
        for effective in [by_file, by_flag] {
            assert_eq!(effective.settings.policy.node_port_addresses, expected, "{words}");
            assert_eq!(effective.warnings.join("").contains("not served yet"), warns, "{words}");
        }
    }
}

#[test]
fn the_gate_of_the_ipvs_mode_is_known() {
    let gates = |text: &str| with_flags(&[format!("--feature-gates={text}")]).unwrap();
    let effective = gates("KubeProxyIPVS=true,Other=true");
    assert_eq!((effective.settings.ignored_gates, effective.warnings), (vec!["Other".to_owned()], vec![]));
    let warnings = gates("KubeProxyIPVS=false").warnings;
    assert!(warnings[0].contains("which has no effect"), "{warnings:?}");
    assert!(gates("").settings.policy.external_ips);
}

#[test]
fn a_list_that_a_template_left_empty_is_no_error() {
    for flag in [
        "--feature-gates=",
        "--vmodule=",
        "--feature-gates= ",
        "--vmodule=a=1,",
        "--nodeport-addresses=",
        "--ipvs-exclude-cidrs=",
    ] {
        with_flags(&[flag.to_owned()]).unwrap_or_else(|error| panic!("{flag}: {error}"));
    }
}

#[test]
fn a_file_that_is_no_kube_proxy_configuration_is_rejected() {
    for (content, what) in [
        ("", "this is not an object"),
        ("- a", "this is not an object"),
        ("a: [", "neither YAML nor JSON"),
        ("kind: KubeletConfiguration\napiVersion: kubelet.config.k8s.io/v1beta1", "not of apiVersion kubeproxy"),
        ("mode: ipvs", "not of apiVersion kubeproxy"),
        ("kind: KubeProxyConfiguration\napiVersion: kubeproxy.config.k8s.io/v1", "not of apiVersion kubeproxy"),
        (
            "kind: KubeProxyConfiguration\napiVersion: kubeproxy.config.k8s.io/v1alpha2",
            "write kubeproxy.config.k8s.io/v1alpha1 with its fields",
        ),
    ] {
        let error = with_file(content).unwrap_err();
        assert!(error.contains(what) && error.contains("config.conf"), "{content:?}: {error}");
    }
    let error = with_flags(&["--config=/nowhere/config.conf".to_owned()]).unwrap_err();
    assert!(error.contains("/nowhere/config.conf: cannot be read"), "{error}");
}

#[test]
fn listen_addresses_follow_the_family_of_the_files_bind_address() {
    for (content, healthz, metrics) in [
        (json!({"bindAddress": "::"}), "[::]:10256", "[::1]:10249"),
        (json!({"bindAddress": "10.0.0.1"}), "0.0.0.0:10256", "127.0.0.1:10249"),
        (json!({"healthzBindAddress": "10.0.0.1", "metricsBindAddress": "::1"}), "10.0.0.1:10256", "[::1]:10249"),
    ] {
        let effective = with_file(&file("mode", &json!("ipvs"), &content)).unwrap();
        let addresses = (effective.settings.healthz.unwrap(), effective.settings.metrics.unwrap());
        assert_eq!((addresses.0.to_string(), addresses.1.to_string()), (healthz.to_owned(), metrics.to_owned()));
    }
}

#[test]
fn a_written_configuration_parses_as_the_same() {
    let effective = with_flags(&["--ipvs-scheduler=sh".to_owned(), "--ipvs-drain-timeout=5m".to_owned()]).unwrap();
    let written = effective.configuration.to_yaml().unwrap();
    let read = with_file(&written).unwrap();
    assert_eq!(read.configuration, effective.configuration, "{written}");
    assert_eq!(read.warnings, [""; 0], "{written}");
    let keys: Vec<&str> =
        written.lines().filter(|line| !line.starts_with(' ')).filter_map(|line| line.split(':').next()).collect();
    assert!(keys.is_sorted(), "{written}");
}

#[test]
fn files_of_kubeadm_kubespray_and_k3s_load_without_a_warning() {
    let kubeadm = with_file(include_str!("../../tests/configurations/kubeadm.conf")).unwrap();
    assert_eq!(kubeadm.warnings, [""; 0]);
    let mut plain = Configuration::default();
    plain.apply_defaults();
    plain.cluster_cidr = "10.244.0.0/16".to_owned();
    plain.client_connection.kubeconfig = "/var/lib/kube-proxy/kubeconfig.conf".to_owned();
    plain.logging.options.clone_from(&kubeadm.configuration.logging.options);
    assert_eq!(kubeadm.configuration, plain, "kubeadm writes fields without values");

    let kubespray = with_file(include_str!("../../tests/configurations/kubespray.conf")).unwrap();
    assert_eq!(kubespray.warnings, [""; 0]);
    assert_eq!(kubespray.settings.policy.node_name, "node1");
    assert!(kubespray.settings.strict_arp);

    let words = include_str!("../../tests/configurations/k3s.flags").lines().map(str::to_owned).collect::<Vec<_>>();
    let k3s = with_flags(&words).unwrap();
    assert_eq!(k3s.warnings, [""; 0]);
    let ports = [k3s.settings.healthz, k3s.settings.metrics].map(|address| address.unwrap().to_string());
    assert_eq!(ports, ["127.0.0.1:10256", "0.0.0.0:10249"]);
    assert_eq!(k3s.settings.conntrack.max(4), None);
}
