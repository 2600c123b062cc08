//! The kernel's settings that Services depend on: read first, and written where they differ.
//!
//! [`wanted`] says what they should be and [`apply`] makes it so. Settings of IPVS exist once the kernel has loaded it.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use tracing::{error, info, warn};

use crate::config::settings::Conntrack;

/// A setting and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    key: Key,
    value: Value,
    need: Need,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    /// Its path below /proc/sys.
    Sysctl(&'static str),
    /// Its path below /sys.
    Sysfs(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    Exactly(u64),
    AtLeast(u64),
}

/// What it means if a setting cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// Services would not work, or not as they should.
    Services,
    /// A table would be of another size, or a flow remembered for another time.
    ///
    /// kube-proxy does not start then. But Services work, and whoever runs it where these settings belong to somebody else
    /// (outside the initial network namespace they can only be read: as in kind, where a node is a container) would have
    /// to find out which flags switch them off before any Service works. So it is an error in the log and no more.
    Tuning,
    /// The kernel would do more, or less, than was asked for beside serving.
    Thrift,
}

/// A version of the kernel, as in 6.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct KernelVersion(u32, u32);

impl KernelVersion {
    /// What `uname -r` says, as in `6.1.0-28-amd64`.
    fn parse(release: &str) -> Option<Self> {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some(Self(numbers.next()?.ok()?, numbers.next()?.ok()?))
    }
}

/// How unlikely the kernel is to kill this process for want of memory. It takes `CAP_SYS_RESOURCE` to make it less likely,
/// and Services work without.
pub(crate) fn set_oom_score(score: i32) {
    const PATH: &str = "/proc/self/oom_score_adj";
    let is_set = fs::read_to_string(PATH).is_ok_and(|value| value.trim() == score.to_string());
    if !is_set && let Err(error) = fs::write(PATH, score.to_string()) {
        info!(
            "cannot set {PATH} to {score} (--oom-score-adj): {error}; kubelet sets it for pods of priority class \
             system-node-critical"
        );
    }
}

/// Makes all settings on the calling thread's network namespace. Returns a watch over those that Services depend on.
pub(crate) fn set(strict_arp: bool, estimation: Option<bool>, conntrack: &Conntrack) -> Result<Watch> {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let version = KernelVersion::parse(&release);
    match version {
        Some(version) if version >= REUSE_MODE => {}
        Some(_) => error!("kernel {release} is older than 4.1: clients that reuse a port soon may wait for a second"),
        None => warn!("cannot understand the kernel's version {release:?}: conn_reuse_mode stays as it is"),
    }
    let root = PathBuf::from("/");
    let settings = wanted(strict_arp, estimation, conntrack, version, cpus(&root));
    apply(&root, &settings)?;
    Ok(Watch::new(root, settings))
}

/// Looks whether settings that Services depend on are still as they were made: a script that brings up a network may switch
/// forwarding off, and nothing else tells of that. What is tuning is whoever's who changed it.
#[derive(Debug)]
pub(crate) struct Watch {
    root: PathBuf,
    settings: Vec<Setting>,
    /// Those that could not be set back, and that has been told.
    wrong: BTreeSet<Key>,
}

impl Watch {
    fn new(root: PathBuf, settings: Vec<Setting>) -> Self {
        let settings = settings.into_iter().filter(|setting| setting.need == Need::Services).collect();
        Self { root, settings, wrong: BTreeSet::new() }
    }

    /// Sets back what somebody has changed. Returns what is wrong since the last look and cannot be set back.
    pub(crate) fn look(&mut self) -> Vec<String> {
        let mut problems = Vec::new();
        for setting in &self.settings {
            match setting.apply(&self.root) {
                Ok(is_set) => {
                    if is_set || self.wrong.contains(&setting.key) {
                        warn!(
                            "somebody had changed {}, which Services depend on: it is {} again",
                            setting.key, setting.value
                        );
                    }
                    self.wrong.remove(&setting.key);
                }
                Err(problem) => {
                    if self.wrong.insert(setting.key) {
                        warn!("somebody has changed what Services depend on: {problem}");
                        problems.push(problem);
                    }
                }
            }
        }
        problems
    }

    /// How many settings are wrong.
    pub(crate) fn wrong(&self) -> usize {
        self.wrong.len()
    }
}

/// From this version on the kernel has `conn_reuse_mode`, and up to [`REUSE_FIXED`] it has to be off: it made the first
/// packet of a connection from a port that was just in use wait for a second.
const REUSE_MODE: KernelVersion = KernelVersion(4, 1);
const REUSE_FIXED: KernelVersion = KernelVersion(5, 9);

/// What the settings should be.
pub(crate) fn wanted(
    strict_arp: bool,
    estimation: Option<bool>,
    conntrack: &Conntrack,
    version: Option<KernelVersion>,
    cpus: u64,
) -> Vec<Setting> {
    let service = |path, value| Setting { key: Key::Sysctl(path), value: Value::Exactly(value), need: Need::Services };
    let tuning = |path, value| Setting { key: Key::Sysctl(path), value: Value::Exactly(value), need: Need::Tuning };
    let mut wanted = vec![
        // Replies are translated, and the packet filter sees connections.
        service("net/ipv4/vs/conntrack", 1),
        // Connections and clients with affinity do not stay with an endpoint that is gone.
        service("net/ipv4/vs/expire_nodest_conn", 1),
        service("net/ipv4/vs/expire_quiescent_template", 1),
        service("net/ipv4/ip_forward", 1),
    ];
    if version.is_some_and(|version| (REUSE_MODE..REUSE_FIXED).contains(&version)) {
        wanted.push(service("net/ipv4/vs/conn_reuse_mode", 0));
    }
    if strict_arp {
        wanted.push(service("net/ipv4/conf/all/arp_ignore", 1));
        wanted.push(service("net/ipv4/conf/all/arp_announce", 2));
    }
    // Who wrote what is found there cannot be told, so what was not asked for is left alone, also after it was asked for.
    if let Some(estimation) = estimation {
        let value = Value::Exactly(estimation.into());
        wanted.push(Setting { key: Key::Sysctl("net/ipv4/vs/run_estimation"), value, need: Need::Thrift });
    }
    if let Some(max) = conntrack.max(cpus) {
        wanted.push(tuning("net/netfilter/nf_conntrack_max", max));
        let hash_size = Key::Sysfs("module/nf_conntrack/parameters/hashsize");
        wanted.push(Setting { key: hash_size, value: Value::AtLeast(max / 4), need: Need::Tuning });
    }
    let timeouts = [
        ("net/netfilter/nf_conntrack_tcp_timeout_established", conntrack.tcp_timeout_established),
        ("net/netfilter/nf_conntrack_tcp_timeout_close_wait", conntrack.tcp_timeout_close_wait),
        ("net/netfilter/nf_conntrack_udp_timeout", conntrack.udp_timeout),
        ("net/netfilter/nf_conntrack_udp_timeout_stream", conntrack.udp_timeout_stream),
    ];
    // A fraction of a second is none: 0 would forget connections at once.
    let timeouts = timeouts.into_iter().filter(|(_, timeout)| *timeout >= Duration::from_secs(1));
    wanted.extend(timeouts.map(|(path, timeout)| tuning(path, timeout.as_secs())));
    if conntrack.tcp_be_liberal {
        wanted.push(tuning("net/netfilter/nf_conntrack_tcp_be_liberal", 1));
    }
    wanted
}

/// Makes the settings; fails if Services cannot do without one that cannot be made, and names all of them. `root` is `/`.
fn apply(root: &Path, settings: &[Setting]) -> Result<()> {
    let mut fatal = Vec::new();
    for setting in settings {
        match setting.apply(root) {
            Ok(_) => {}
            Err(problem) => match setting.need {
                Need::Services => fatal.push(problem),
                Need::Tuning => error!("{problem}"),
                Need::Thrift => warn!("{problem}"),
            },
        }
    }
    if !fatal.is_empty() {
        bail!("Services need settings of the kernel that cannot be made: {}", fatal.join("; "));
    }
    Ok(())
}

impl Setting {
    /// Makes it so; says whether it was otherwise.
    fn apply(self, root: &Path) -> Result<bool, String> {
        let path = self.key.path(root);
        let found = fs::read_to_string(&path);
        let found = match found {
            Ok(found) => found,
            // A kernel without the switch is as with it switched on.
            Err(error) if self.is_on_anyway() && error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(self.problem(None, &error)),
        };
        let found = found.trim();
        let is_right = found.parse().is_ok_and(|found: u64| match self.value {
            Value::Exactly(value) => found == value,
            Value::AtLeast(value) => found >= value,
        });
        if is_right {
            return Ok(false);
        }
        let (Value::Exactly(value) | Value::AtLeast(value)) = self.value;
        fs::write(&path, value.to_string()).map_err(|error| self.problem(Some(found), &error))?;
        info!(key = %self.key, old = %found, new = value, "set");
        Ok(true)
    }

    fn is_on_anyway(self) -> bool {
        self.need == Need::Thrift && self.value == Value::Exactly(1)
    }

    /// What is wrong and what to do.
    fn problem(self, found: Option<&str>, error: &io::Error) -> String {
        let Self { key, value, .. } = self;
        let (Value::Exactly(number) | Value::AtLeast(number)) = value;
        let command = match key {
            Key::Sysctl(_) => format!("`sysctl -w {key}={number}`"),
            Key::Sysfs(_) => format!("`echo {number} > {key}`"),
        };
        let mount = key.mount();
        match found {
            Some(found) => format!(
                "{key} must be {value}, is {found}, and cannot be written ({error}): run {command} on the node, or give the \
                 container a writable {mount}"
            ),
            None if error.kind() == ErrorKind::NotFound => {
                format!(
                    "{key} must be {value}, and this kernel or network namespace does not have it: load or build in what does"
                )
            }
            None => format!(
                "{key} must be {value}, and cannot be read ({error}): run {command} on the node, and let {mount} be read"
            ),
        }
    }
}

impl Key {
    fn mount(self) -> &'static str {
        match self {
            Self::Sysctl(_) => "/proc/sys",
            Self::Sysfs(_) => "/sys",
        }
    }

    fn path(self, root: &Path) -> PathBuf {
        let (Self::Sysctl(path) | Self::Sysfs(path)) = self;
        root.join(self.mount().trim_start_matches('/')).join(path)
    }
}

/// As people write it.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sysctl(path) => f.write_str(&path.replace('/', ".")),
            Self::Sysfs(path) => write!(f, "/sys/{path}"),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exactly(value) => write!(f, "{value}"),
            Self::AtLeast(value) => write!(f, "at least {value}"),
        }
    }
}

/// The processors of the machine: connections come from all of it, however few of them a cgroup leaves to us.
fn cpus(root: &Path) -> u64 {
    let online = fs::read_to_string(root.join("sys/devices/system/cpu/online")).ok().and_then(|list| count(&list));
    online.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, NonZero::get) as u64)
}

/// How many numbers a list such as `0-3,6` has.
fn count(list: &str) -> Option<u64> {
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let lengths = list.split(',').map(|range| {
        let (low, high) = range.split_once('-').unwrap_or((range, range));
        Some(number(high)?.checked_sub(number(low)?)? + 1)
    });
    lengths.sum()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

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
    fn what_services_need_is_always_wanted_and_the_rest_when_asked_for() {
        let modern = Some(KernelVersion(6, 1));
        assert_eq!(texts(&wanted(false, None, &conntrack(), modern, 4)), ALWAYS);
        let arp = ["net.ipv4.conf.all.arp_ignore=1", "net.ipv4.conf.all.arp_announce=2"];
        assert_eq!(texts(&wanted(true, None, &conntrack(), modern, 4)), [&ALWAYS[..], &arp[..]].concat());
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
            texts(&wanted(false, None, &all, modern, 8))[4..],
            [
                "net.netfilter.nf_conntrack_max=262144",
                "/sys/module/nf_conntrack/parameters/hashsize=at least 65536",
                "net.netfilter.nf_conntrack_tcp_timeout_established=86400",
                "net.netfilter.nf_conntrack_tcp_timeout_close_wait=3600",
                "net.netfilter.nf_conntrack_udp_timeout_stream=120",
                "net.netfilter.nf_conntrack_tcp_be_liberal=1",
            ]
        );
        let (needed, tuning): (Vec<Setting>, Vec<Setting>) =
            wanted(true, None, &all, modern, 8).into_iter().partition(|setting| setting.need == Need::Services);
        assert_eq!((needed.len(), tuning.len()), (6, 6));
    }

    #[test]
    fn estimation_is_switched_where_it_is_asked_for_and_no_obstacle_where_it_is_not_to_be_had() {
        const ESTIMATION: &str = "proc/sys/net/ipv4/vs/run_estimation";
        let wanted = |estimation| wanted(false, estimation, &conntrack(), None, 1);
        assert_eq!(texts(&wanted(None)), ALWAYS);
        assert_eq!(texts(&wanted(Some(false)))[4..], ["net.ipv4.vs.run_estimation=0"]);
        let needed = [(VS, "1"), (NODEST, "1"), (TEMPLATE, "1"), (FORWARD, "1")];
        for (found, asked, left) in [
            ("1", Some(false), "0"),
            ("0", Some(false), "0\n"),
            ("0", Some(true), "1"),
            ("0", None, "0\n"),
            ("1", None, "1\n"),
        ] {
            let root = root(&[&needed[..], &[(ESTIMATION, found)]].concat());
            apply(root.path(), &wanted(asked)).unwrap();
            assert_eq!(read(&root, ESTIMATION), left, "{found} {asked:?}");
        }
        let root = root(&needed);
        for asked in [Some(false), Some(true), None] {
            apply(root.path(), &wanted(asked)).unwrap();
        }
        assert!(!root.path().join(ESTIMATION).exists());
        let problem = |asked| wanted(asked).pop().unwrap().apply(root.path());
        assert!(problem(Some(false)).unwrap_err().contains("run_estimation must be 0, and this kernel"));
        assert_eq!(problem(Some(true)), Ok(false));
    }

    #[test]
    fn conn_reuse_mode_is_switched_off_where_it_does_harm() {
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
            let settings = texts(&wanted(false, None, &conntrack(), KernelVersion::parse(release), 1));
            assert_eq!(settings.contains(&"net.ipv4.vs.conn_reuse_mode=0".to_owned()), is_wanted, "{release}");
        }
    }

    #[test]
    fn the_number_of_tracked_connections_is_kube_proxys() {
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
            assert_eq!(count(list), number, "{list:?}");
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
    fn only_what_differs_is_written_and_a_larger_hash_table_stays() {
        let conntrack = Conntrack { max_per_core: 32_768, ..conntrack() };
        let settings = wanted(false, None, &conntrack, None, 1);
        for (hash, after) in [("16384\n", "32768"), ("32768\n", "32768\n"), ("65536\n", "65536\n")] {
            let hash = hash.trim();
            let root =
                root(&[(VS, "0"), (NODEST, "1"), (TEMPLATE, "0"), (FORWARD, "1"), (MAX, "262144"), (HASH, hash)]);
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
    fn all_that_cannot_be_made_is_named_at_once_with_what_to_do() {
        let root = root(&[(NODEST, "0"), (TEMPLATE, "1"), (FORWARD, "1")]);
        // A setting that nobody may write, not even root.
        fs::remove_file(root.path().join(NODEST)).unwrap();
        symlink("/proc/sys/kernel/ngroups_max", root.path().join(NODEST)).unwrap();
        let found = fs::read_to_string("/proc/sys/kernel/ngroups_max").unwrap();
        let error = apply(root.path(), &wanted(false, None, &conntrack(), None, 1)).unwrap_err().to_string();
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
    fn a_setting_that_cannot_be_set_back_is_told_once_until_it_is_right() {
        const CONNTRACK: &str = "proc/sys/net/ipv4/vs/conntrack";
        let root = root(&[(CONNTRACK, "1"), (NODEST, "1"), (TEMPLATE, "1"), (FORWARD, "1")]);
        let settings = wanted(false, None, &Conntrack { udp_timeout: Duration::from_secs(9), ..conntrack() }, None, 1);
        let mut watch = Watch::new(root.path().to_owned(), settings);
        assert_eq!((watch.look(), watch.wrong()), (vec![], 0), "and tuning is not looked at");
        // Somebody switches it off where it cannot be written, as in a container.
        fs::remove_file(root.path().join(FORWARD)).unwrap();
        symlink("/proc/sys/kernel/ngroups_max", root.path().join(FORWARD)).unwrap();
        let problems = watch.look();
        assert!(problems.len() == 1 && problems[0].contains("net.ipv4.ip_forward must be 1"), "{problems:?}");
        assert_eq!((watch.look(), watch.wrong()), (vec![], 1), "it is told once");
        fs::remove_file(root.path().join(FORWARD)).unwrap();
        fs::write(root.path().join(FORWARD), "1").unwrap();
        assert_eq!((watch.look(), watch.wrong()), (vec![], 0));
        // What can be written is set back, and nobody else need do anything.
        fs::write(root.path().join(NODEST), "0").unwrap();
        assert_eq!((watch.look(), watch.wrong()), (vec![], 0));
        assert_eq!(read(&root, NODEST), "1");
    }

    #[test]
    fn connection_tracking_that_belongs_to_others_does_not_stop_the_start() {
        let conntrack =
            Conntrack { max_per_core: 32_768, tcp_timeout_established: Duration::from_secs(86_400), ..conntrack() };
        let root = root(&[(VS, "0"), (NODEST, "1"), (TEMPLATE, "1"), (FORWARD, "1")]);
        apply(root.path(), &wanted(false, None, &conntrack, None, 1)).unwrap();
        assert_eq!(read(&root, VS), "1");
    }
}
