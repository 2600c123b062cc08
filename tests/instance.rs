//! One agent for each network namespace, whatever others do who have no right to program it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::{Child, Command, Stdio};

use common::{Agent, Manifests, addresses, ipvs, run, service};
use lab::netns::isolate;
use rustix::process::Uid;
use rustix::thread::set_thread_uid;
use tempfile::TempDir;

const WEB: &str = "-A -t 10.96.0.10:80 -s rr";
const TAKEN: &str = "another kube-ipvs programs this network namespace";

fn web() -> Manifests {
    let manifests = Manifests::new();
    manifests.write("web.yaml", &service("web", "10.96.0.10"));
    manifests
}

/// A second agent of any kind, with nothing to serve, which would take away everything. It must end by itself.
fn second_agents_are_refused() {
    let before = (ipvs(), addresses());
    for flags in [&[][..], &["--once"], &["cleanup"], &["cleanup", "--filter-only"], &["--cleanup"], &["takeover"]] {
        let empty = Manifests::new();
        let mut command = Agent::command();
        if flags.first() != Some(&"cleanup") {
            command.arg(format!("--manifests={}", empty.path().display()));
        }
        let mut second = Agent::start_command(command.args(flags));
        assert!(!second.ends().success(), "{flags:?}: {}", second.log());
        assert!(second.log().contains(TAKEN), "{flags:?}: {}", second.log());
    }
    assert_eq!((ipvs(), addresses()), before);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_second_agent_exits_and_the_first_continues() {
    isolate().unwrap();
    let manifests = web();
    let mut agent = manifests.agent(&[]);
    agent.has(&[WEB]);
    second_agents_are_refused();
    manifests.write("other.yaml", &service("other", "10.96.0.11"));
    agent.has(&[WEB, "-A -t 10.96.0.11:80 -s rr"]);
    // Nobody else ends its claim.
    run("nft flush ruleset");
    second_agents_are_refused();
    // Once the first is gone, however that was, the next may start.
    agent.kill();
    let mut next = manifests.agent(&["--once"]);
    assert!(next.ends().success(), "{}", next.log());
}

/// The table's handle, a number that the kernel never gives twice.
fn handle() -> String {
    let listed = run("nft -a list table ip kube-ipvs-instance");
    listed.split("handle ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned()
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn an_agent_that_executes_itself_is_the_only_one_all_the_while() {
    isolate().unwrap();
    let manifests = web();
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("config.conf");
    let configure = |scheduler: &str| {
        let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: ipvs\n";
        fs::write(dir.path().join("new"), format!("{head}ipvs: {{scheduler: {scheduler}}}\n")).unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
    };
    configure("rr");
    let flags = [format!("--config={}", path.display()), format!("--manifests={}", manifests.path().display())];
    let mut agent = Agent::start(&flags.each_ref().map(String::as_str));
    agent.has(&[WEB]);
    let before = handle();
    for scheduler in ["lc", "wrr"] {
        configure(scheduler);
        agent.has(&[&format!("-A -t 10.96.0.10:80 -s {scheduler}")]);
        // The table has been there all the time, and the socket is no longer standard input.
        assert_eq!(handle(), before);
        let id = agent.id();
        assert_eq!(fs::read_link(format!("/proc/{id}/fd/0")).unwrap().to_str(), Some("/dev/null"));
        let mut second = web().agent(&["--once"]);
        assert!(!second.ends().success() && second.log().contains(TAKEN), "{}", second.log());
    }
    agent.kill();
    let mut next = manifests.agent(&["--once"]);
    assert!(next.ends().success(), "{}", next.log());
}

/// A process that goes on until this is dropped.
struct Stranger(Child);

impl Stranger {
    /// Keeps `nft` open after it was told to make the table that an agent has, and to keep it.
    fn with_nft(program: &str, arguments: &[&str]) -> Self {
        let script = "{ echo 'add table ip kube-ipvs-instance { flags owner; }'; sleep 1000; } | nft -i";
        let mut command = Command::new(program);
        command.args(arguments).args(["sh", "-c", script]).stdin(Stdio::null()).stdout(Stdio::null());
        Self(command.stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A listener on the abstract name that shows up as the agent's own in old versions, with a full backlog.
fn full_listener(name: &str, uid: Option<u32>) -> (UnixListener, Vec<std::os::unix::net::UnixStream>) {
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let listener = std::thread::spawn(move || {
        if let Some(uid) = uid {
            // Of this thread alone.
            set_thread_uid(Uid::from_raw(uid)).unwrap();
        }
        UnixListener::bind_addr(&address).unwrap()
    });
    let listener = listener.join().unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let clients = vec![std::os::unix::net::UnixStream::connect_addr(&address).unwrap()];
    (listener, clients)
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn nobody_without_the_right_to_program_the_node_stops_an_agent() {
    for strangers in 0..4 {
        isolate().unwrap();
        let without_capability = ["--bounding-set=-net_admin", "--inh-caps=-net_admin"];
        let _socket = (strangers == 0).then(|| full_listener("kube-ipvs", Some(65_534)));
        let _root_socket = (strangers == 1).then(|| full_listener("kube-ipvs", None));
        let _nft = match strangers {
            2 => Some(Stranger::with_nft("setpriv", &without_capability)),
            3 => Some(Stranger::with_nft("unshare", &["--user", "--map-root-user"])),
            _ => None,
        };
        // Also in the namespace next door, where they may do everything.
        let _elsewhere = Stranger::with_nft("unshare", &["--user", "--map-root-user", "--net"]);
        let manifests = web();
        let mut once = manifests.agent(&["--once"]);
        assert!(once.ends().success(), "{strangers}: {}", once.log());
        assert_eq!(ipvs(), [WEB]);
        let mut agent = manifests.agent(&[]);
        agent.says("audited");
        assert!(!agent.log().contains("WARN"), "{strangers}: {}", agent.log());
        agent.kill();
        let mut cleanup = Agent::start_command(Command::new(env!("CARGO_BIN_EXE_kube-ipvs")).arg("cleanup"));
        assert!(cleanup.ends().success(), "{strangers}: {}", cleanup.log());
    }
}
