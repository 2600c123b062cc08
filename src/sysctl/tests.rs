//! Which settings are applied, and how, in a directory in place of `/`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;

use super::conntrack::{cpu_list_len, cpus};
use super::required::KernelVersion;
use super::setting::{Importance, Setting};
use super::{SysctlMonitor, apply, desired};
use crate::config::settings::Conntrack;

fn conntrack() -> Conntrack {
    Conntrack {
        max_per_core: 0,
        min: 131_072,
        tcp_timeout_established: Duration::ZERO,
        tcp_timeout_close_wait: Duration::ZERO,
        tcp_be_liberal: false,
        udp_timeout: Duration::ZERO,
        udp_timeout_stream: Duration::ZERO,
    }
}

/// The settings as `key=value`.
fn texts(settings: &[Setting]) -> Vec<String> {
    settings.iter().map(|setting| format!("{}={}", setting.key, setting.value)).collect()
}

const ALWAYS: [&str; 4] = [
    "net.ipv4.vs.conntrack=1",
    "net.ipv4.vs.expire_nodest_conn=1",
    "net.ipv4.vs.expire_quiescent_template=1",
    "net.ipv4.ip_forward=1",
];

#[test]
fn required_settings_are_always_applied_others_if_configured() {
    let modern = KernelVersion::parse("6.1");
    assert_eq!(texts(&desired(false, None, &conntrack(), modern, 4)), ALWAYS);
    let arp = ["net.ipv4.conf.all.arp_ignore=1", "net.ipv4.conf.all.arp_announce=2"];
    assert_eq!(texts(&desired(true, None, &conntrack(), modern, 4)), [&ALWAYS[..], &arp[..]].concat());
    let all = Conntrack {
        max_per_core: 32_768,
        tcp_timeout_established: Duration::from_secs(86_400),
        tcp_timeout_close_wait: Duration::from_millis(3_600_900),
        tcp_be_liberal: true,
        udp_timeout: Duration::from_millis(999),
        udp_timeout_stream: Duration::from_secs(120),
        ..conntrack()
    };
    assert_eq!(
        texts(&desired(false, None, &all, modern, 8))[4..],
        [
            "net.netfilter.nf_conntrack_max=262144",
            "/sys/module/nf_conntrack/parameters/hashsize=at least 65536",
            "net.netfilter.nf_conntrack_tcp_timeout_established=86400",
            "net.netfilter.nf_conntrack_tcp_timeout_close_wait=3600",
            "net.netfilter.nf_conntrack_udp_timeout_stream=120",
            "net.netfilter.nf_conntrack_tcp_be_liberal=1",
        ]
    );
    let (required, tuning): (Vec<Setting>, Vec<Setting>) = desired(true, None, &all, modern, 8)
        .into_iter()
        .partition(|setting| setting.importance == Importance::Required);
    assert_eq!((required.len(), tuning.len()), (6, 6));
}

#[test]
fn estimation_is_set_if_configured_and_a_missing_switch_is_no_error() {
    const ESTIMATION: &str = "proc/sys/net/ipv4/vs/run_estimation";
    let desired = |estimation| desired(false, estimation, &conntrack(), None, 1);
    assert_eq!(texts(&desired(None)), ALWAYS);
    assert_eq!(texts(&desired(Some(false)))[4..], ["net.ipv4.vs.run_estimation=0"]);
    let required = [(VS, "1"), (NODEST, "1"), (TEMPLATE, "1"), (FORWARD, "1")];
    for (found, configured, left) in [
        ("1", Some(false), "0"),
        ("0", Some(false), "0\n"),
        ("0", Some(true), "1"),
        ("0", None, "0\n"),
        ("1", None, "1\n"),
    ] {
        let root = root(&[&required[..], &[(ESTIMATION, found)]].concat());
        apply(root.path(), &desired(configured)).unwrap();
        assert_eq!(read(&root, ESTIMATION), left, "{found} {configured:?}");
    }
    let root = root(&required);
    for configured in [Some(false), Some(true), None] {
        apply(root.path(), &desired(configured)).unwrap();
    }
    assert!(!root.path().join(ESTIMATION).exists());
    let problem = |configured| desired(configured).pop().unwrap().apply(root.path());
    assert!(problem(Some(false)).unwrap_err().contains("run_estimation must be 0, and this kernel"));
    assert_eq!(problem(Some(true)), Ok(false));
}

#[test]
fn conn_reuse_mode_is_switched_off_from_4_1_to_5_8() {
    for (release, is_wanted) in [
        ("3.10.0-1160.el7.x86_64", false),
        ("4.0.9", false),
        ("4.1.0", true),
        ("4.18.0-553.el8_10.x86_64", true),
        ("5.8.18", true),
        ("5.9-rc1", false),
        ("5.10.0-28-amd64", false),
        ("6.1.192-um", false),
        ("10.0", false),
        ("unknown", false),
        ("6", false),
    ] {
        let settings = texts(&desired(false, None, &conntrack(), KernelVersion::parse(release), 1));
        assert_eq!(settings.contains(&"net.ipv4.vs.conn_reuse_mode=0".to_owned()), is_wanted, "{release}");
    }
}

#[test]
fn nf_conntrack_max_is_computed_as_in_kube_proxy() {
    for (max_per_core, min, cpus, max) in [
        (0, 131_072, 8, None),
        (32_768, 131_072, 1, Some(131_072)),
        (32_768, 131_072, 4, Some(131_072)),
        (32_768, 131_072, 8, Some(262_144)),
        (32_768, 131_072, 32, Some(1_048_576)),
        (32_768, 131_072, 33, Some(1_048_576)),
        (32_768, 2_000_000, 32, Some(2_000_000)),
        (32_768, 2_000_000, 33, Some(1_048_576)),
        (u32::MAX, 0, u64::from(u32::MAX), Some(1_048_576)),
        (1, 0, 2, Some(2)),
    ] {
        assert_eq!(Conntrack { max_per_core, min, ..conntrack() }.max(cpus), max, "{max_per_core} {min} {cpus}");
    }
}

#[test]
fn processors_are_counted() {
    for (list, number) in
        [("0\n", Some(1)), ("0-3\n", Some(4)), ("0,2-3,8-15\n", Some(11)), ("", None), ("3-1", None), ("x", None)]
    {
        assert_eq!(cpu_list_len(list), number, "{list:?}");
    }
    assert!(cpus(Path::new("/nonexistent")) >= 1);
}

/// A root directory with these settings in it.
fn root(settings: &[(&str, &str)]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, value) in settings {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{value}\n")).unwrap();
    }
    root
}

fn read(root: &TempDir, path: &str) -> String {
    fs::read_to_string(root.path().join(path)).unwrap()
}

const VS: &str = "proc/sys/net/ipv4/vs/conntrack";
const NODEST: &str = "proc/sys/net/ipv4/vs/expire_nodest_conn";
const TEMPLATE: &str = "proc/sys/net/ipv4/vs/expire_quiescent_template";
const FORWARD: &str = "proc/sys/net/ipv4/ip_forward";
const MAX: &str = "proc/sys/net/netfilter/nf_conntrack_max";
const HASH: &str = "sys/module/nf_conntrack/parameters/hashsize";

#[test]
fn only_differing_settings_are_written_and_a_larger_hashsize_stays() {
    let conntrack = Conntrack { max_per_core: 32_768, ..conntrack() };
    let settings = desired(false, None, &conntrack, None, 1);
    for (hash, after) in [("16384\n", "32768"), ("32768\n", "32768\n"), ("65536\n", "65536\n")] {
        let hash = hash.trim();
        let root = root(&[(VS, "0"), (NODEST, "1"), (TEMPLATE, "0"), (FORWARD, "1"), (MAX, "262144"), (HASH, hash)]);
        apply(root.path(), &settings).unwrap();
        // A written file has no newline.
        let found = [VS, NODEST, TEMPLATE, FORWARD, MAX, HASH].map(|path| read(&root, path));
        assert_eq!(found, ["1", "1\n", "1", "1\n", "131072", after]);
        let before = fs::metadata(root.path().join(VS)).unwrap().modified().unwrap();
        apply(root.path(), &settings).unwrap();
        assert_eq!(fs::metadata(root.path().join(VS)).unwrap().modified().unwrap(), before);
    }
}

#[test]
fn all_required_settings_that_fail_are_in_one_error_with_remedies() {
    let root = root(&[(NODEST, "0"), (TEMPLATE, "1"), (FORWARD, "1")]);
    // A setting that not even root may write.
    fs::remove_file(root.path().join(NODEST)).unwrap();
    symlink("/proc/sys/kernel/ngroups_max", root.path().join(NODEST)).unwrap();
    let found = fs::read_to_string("/proc/sys/kernel/ngroups_max").unwrap();
    let error = apply(root.path(), &desired(false, None, &conntrack(), None, 1)).unwrap_err().to_string();
    for part in [
        "net.ipv4.vs.conntrack must be 1, and this kernel or network namespace does not have it",
        &format!("net.ipv4.vs.expire_nodest_conn must be 1, is {}, and cannot be written", found.trim()),
        "run `sysctl -w net.ipv4.vs.expire_nodest_conn=1` on the node, or give the container a writable /proc/sys",
    ] {
        assert!(error.contains(part), "{error}");
    }
    assert!(!error.contains("expire_quiescent_template"), "{error}");
}

#[test]
fn a_setting_that_cannot_be_restored_is_reported_once() {
    const CONNTRACK: &str = "proc/sys/net/ipv4/vs/conntrack";
    let root = root(&[(CONNTRACK, "1"), (NODEST, "1"), (TEMPLATE, "1"), (FORWARD, "1")]);
    let settings = desired(false, None, &Conntrack { udp_timeout: Duration::from_secs(9), ..conntrack() }, None, 1);
    let mut monitor = SysctlMonitor::new(root.path().to_owned(), settings);
    assert_eq!((monitor.restore(), monitor.failing()), (vec![], 0), "tuning is not monitored");
    // Another program switches it off, and the agent cannot write it, as in a container.
    fs::remove_file(root.path().join(FORWARD)).unwrap();
    symlink("/proc/sys/kernel/ngroups_max", root.path().join(FORWARD)).unwrap();
    let problems = monitor.restore();
    assert!(problems.len() == 1 && problems[0].contains("net.ipv4.ip_forward must be 1"), "{problems:?}");
    assert_eq!((monitor.restore(), monitor.failing()), (vec![], 1), "it is reported once");
    fs::remove_file(root.path().join(FORWARD)).unwrap();
    fs::write(root.path().join(FORWARD), "1").unwrap();
    assert_eq!((monitor.restore(), monitor.failing()), (vec![], 0));
    // A setting that can be written is restored.
    fs::write(root.path().join(NODEST), "0").unwrap();
    assert_eq!((monitor.restore(), monitor.failing()), (vec![], 0));
    assert_eq!(read(&root, NODEST), "1");
}

#[test]
fn missing_conntrack_settings_do_not_stop_the_start() {
    let conntrack =
        Conntrack { max_per_core: 32_768, tcp_timeout_established: Duration::from_secs(86_400), ..conntrack() };
    let root = root(&[(VS, "0"), (NODEST, "1"), (TEMPLATE, "1"), (FORWARD, "1")]);
    apply(root.path(), &desired(false, None, &conntrack, None, 1)).unwrap();
    assert_eq!(read(&root, VS), "1");
}
