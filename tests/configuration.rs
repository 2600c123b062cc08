//! The configuration file and the flags that go with it, to the process on a real kernel.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Agent, METRICS, Manifests, addresses, get, ipvs, service, slice};
use lab::netns::isolate;
use tempfile::TempDir;

const WEB: &str = "-A -t 10.96.0.10:80 -s rr";
const WEB_SH: &str = "-A -t 10.96.0.10:80 -s sh -b sh-fallback";
const WEB_1: &str = "-a -t 10.96.0.10:80 -r 10.0.0.1:8080 -m -w 1";

fn web() -> Manifests {
    let manifests = Manifests::new();
    manifests.write("service.yaml", &service("web", "10.96.0.10"));
    manifests.write("slice.yaml", &slice("web-1", "web", &["10.0.0.1"]));
    manifests
}

fn configuration(more: &str) -> String {
    format!("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: ipvs\n{more}\n")
}

/// A directory as kubelet makes one of a `ConfigMap`: the file is a link into a directory that is a link.
struct ConfigMap {
    dir: TempDir,
    version: u32,
}

impl ConfigMap {
    fn new(content: &str) -> Self {
        let mut map = Self { dir: TempDir::new().unwrap(), version: 0 };
        map.update(content);
        symlink("..data/config.conf", map.path()).unwrap();
        map
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("config.conf")
    }

    fn update(&mut self, content: &str) {
        self.version += 1;
        let name = format!("..{}", self.version);
        fs::create_dir(self.dir.path().join(&name)).unwrap();
        fs::write(self.dir.path().join(&name).join("config.conf"), content).unwrap();
        let link = self.dir.path().join("..data_tmp");
        symlink(&name, &link).unwrap();
        fs::rename(link, self.dir.path().join("..data")).unwrap();
        if self.version > 1 {
            fs::remove_dir_all(self.dir.path().join(format!("..{}", self.version - 1))).unwrap();
        }
    }

    fn agent(&self, manifests: &Manifests) -> Agent {
        let config = format!("--config={}", self.path().display());
        Agent::start(&[config.as_str(), &format!("--manifests={}", manifests.path().display())])
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_changed_config_map_takes_effect_only_if_it_is_valid() {
    isolate().unwrap();
    let manifests = web();
    let mut map = ConfigMap::new(&configuration("ipvs: {scheduler: rr}\nudpIdleTimeout: 250ms"));
    let mut agent = map.agent(&manifests);
    agent.has(&[WEB, WEB_1]);
    agent.says("unknown field \"udpIdleTimeout\"");
    map.update(&configuration("ipvs: {scheduler: sh, syncPeriod: soon}"));
    agent
        .says("is invalid; the agent continues with the old configuration")
        .says("KubeProxyConfiguration.ipvs.syncPeriod");
    agent.has(&[WEB, WEB_1]);
    map.update(&configuration("# only a comment\nipvs: {scheduler: rr}\nudpIdleTimeout: 250ms"));
    map.update(&configuration("ipvs: {scheduler: sh}"));
    agent.says("the configuration has changed: restarting with it");
    // The same process: nobody has to start it again.
    agent.has(&[WEB_SH, WEB_1]).binds(&["10.96.0.10/32"]);
    agent.until("serve the configuration in effect", |_| {
        get(METRICS, "/configz").is_some_and(|answer| answer.body.contains("\"scheduler\":\"sh\""))
    });
    agent.terminate();
    assert!(agent.ends().success());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn most_flags_are_ignored_beside_a_file_as_in_kube_proxy() {
    isolate().unwrap();
    let manifests = web();
    let map = ConfigMap::new(&configuration("ipvs: {scheduler: sh}\nhostnameOverride: another"));
    let config = format!("--config={}", map.path().display());
    let manifests_flag = format!("--manifests={}", manifests.path().display());
    let mut agent = Agent::start(&[&config, &manifests_flag, "--ipvs-scheduler=lc", "--once", "-v=4"]);
    assert!(agent.ends().success(), "{}", agent.log());
    assert!(ipvs().contains(&WEB_SH.to_owned()), "{:?}", ipvs());
    let log = agent.log();
    assert!(log.contains("--ipvs-scheduler: ignored because of --config"), "{log}");
    assert!(log.contains("node=\"node-a\""), "the flag's name counts: {log}");
}

fn kube_ipvs(flags: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_kube-ipvs")).args(flags).env("NO_COLOR", "1").output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn the_written_configuration_parses_again_without_a_kernel() {
    let dir = TempDir::new().unwrap();
    let write_to = |name: &str| format!("--write-config-to={}", dir.path().join(name).display());
    let kubeadm = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/configurations/kubeadm.conf");
    let config = format!("--config={}", kubeadm.display());
    let (ok, log) = kube_ipvs(&[&config, "--hostname-override=node-b", &write_to("one")]);
    assert!(ok && log.contains("wrote the configuration"), "{log}");
    let one = fs::read_to_string(dir.path().join("one")).unwrap();
    assert!(one.contains("hostnameOverride: node-b") && one.contains("masqueradeBit: 14"), "{one}");
    let (ok, log) = kube_ipvs(&[&format!("--config={}", dir.path().join("one").display()), &write_to("two")]);
    assert!(ok && !log.contains("WARN"), "{log}");
    assert_eq!(fs::read_to_string(dir.path().join("two")).unwrap(), one);
    let (ok, log) = kube_ipvs(&["--oom-score-adj=5000", "--iptables-masquerade-bit=32", &write_to("three")]);
    assert!(!ok && log.contains("2 settings are wrong") && !dir.path().join("three").exists(), "{log}");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn init_only_prepares_the_kernel_and_programs_nothing() {
    isolate().unwrap();
    let (ok, log) = kube_ipvs(&["--init-only", "--ipvs-udp-timeout=33s", "--conntrack-max-per-core=0"]);
    assert!(ok && log.contains("needs only CAP_NET_ADMIN"), "{log}");
    let setting = |key: &str| fs::read_to_string(format!("/proc/sys/net/ipv4/{key}")).unwrap();
    assert_eq!(["vs/conntrack", "ip_forward"].map(setting), ["1\n"; 2]);
    assert_eq!(ipvs_netlink::Client::connect().unwrap().timeouts().unwrap().udp, 33);
    assert_eq!((ipvs().len(), addresses().len()), (0, 0));
    // Without a right to anything but the network.
    let manifests = web();
    let flags = format!("--manifests={}", manifests.path().display());
    let mut agent = Agent::start_command(
        Command::new("setpriv")
            .args(["--bounding-set=-all,+net_admin", "--inh-caps=-all,+net_admin", "--no-new-privs"])
            .arg(env!("CARGO_BIN_EXE_kube-ipvs"))
            .args([&flags, "--hostname-override=node-a", "--conntrack-max-per-core=0"]),
    );
    agent.has(&[WEB, WEB_1]);
    assert!(!agent.log().contains("ERROR"), "{}", agent.log());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_change_that_needs_more_privileges_is_not_applied() {
    isolate().unwrap();
    let (ok, log) = kube_ipvs(&["--init-only", "--conntrack-max-per-core=0"]);
    assert!(ok, "{log}");
    let manifests = web();
    let conntrack = "conntrack: {maxPerCore: 0}";
    let mut map = ConfigMap::new(&configuration(conntrack));
    let mut agent = Agent::start_command(
        Command::new("unshare")
            .args(["--mount", "sh", "-c", "mount --bind -o ro /proc/sys /proc/sys && exec \"$@\"", "sh"])
            .arg(env!("CARGO_BIN_EXE_kube-ipvs"))
            .args([format!("--config={}", map.path().display()), format!("--manifests={}", manifests.path().display())])
            .arg("--hostname-override=node-a"),
    );
    agent.has(&[WEB, WEB_1]);
    map.update(&configuration(&format!("{conntrack}\nipvs: {{strictARP: true}}")));
    agent.says("the kernel cannot be prepared for it").says("arp_ignore").says("delete the pod");
    agent.has(&[WEB, WEB_1]);
    map.update(&configuration(&format!("{conntrack}\nipvs: {{scheduler: sh}}")));
    agent.has(&[WEB_SH, WEB_1]);
}
