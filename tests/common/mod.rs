//! The agent as a process in a network namespace of its own, and the kernel's state as `ipvsadm` and `ip` show it: read over
//! netlink, because in the lab to run a program costs more than most tests do otherwise.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::allow_attributes,
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests, of which every test file uses a part"
)]

pub mod cluster;

use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, ExitStatus};

use ipvs_netlink::{Client, Message, rules};
use lab::http::Metrics;
use lab::link;
use lab::objects::{self, with};
use netlink_batch::Socket;
use netlink_batch::protocols::NETLINK_NETFILTER;
use reconciler::filter::ObservedFilter;
use reconciler::linux::filter::read;
use reconciler::policy::Families;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The Node that agents are told to be.
pub fn node() -> Value {
    objects::node("node-a", &["192.168.1.1"])
}

/// A Service with one TCP port 80 to 8080.
pub fn service(name: &str, cluster_ip: &str) -> Value {
    objects::service(name, &[cluster_ip], &[objects::port("http", "TCP", 80)])
}

/// The same with a NodePort.
pub fn service_with_node_port(name: &str, cluster_ip: &str, node_port: u16) -> Value {
    let port = with(objects::port("http", "TCP", 80), json!({"nodePort": node_port}));
    objects::service(name, &[cluster_ip], &[port])
}

/// A slice of ready endpoints on port 8080.
pub fn slice(name: &str, service: &str, addresses: &[&str]) -> Value {
    objects::slice(name, service, &[objects::port("http", "TCP", 8080)], &objects::ready(addresses))
}

/// A directory of manifests, and the agents that follow it.
pub struct Manifests {
    files: lab::manifests::Manifests,
    _dir: TempDir,
}

impl Manifests {
    pub fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let manifests = Self { files: lab::manifests::Manifests::at(dir.path()).unwrap(), _dir: dir };
        manifests.write("node.yaml", &node());
        manifests
    }

    pub fn path(&self) -> &Path {
        self.files.path()
    }

    /// Puts a file in place in one move: an object, or a text.
    pub fn write(&self, name: &str, content: &(impl ToString + ?Sized)) -> &Self {
        self.files.write(name, content).unwrap();
        self
    }

    pub fn contains(&self, name: &str) -> bool {
        self.files.contains(name)
    }

    pub fn remove(&self, name: &str) {
        self.files.remove(name).unwrap();
    }

    /// Starts an agent on the directory, with periods short enough for tests.
    pub fn agent(&self, flags: &[&str]) -> Agent {
        let manifests = format!("--manifests={}", self.path().display());
        Agent::start(&[&[manifests.as_str(), "--ipvs-min-sync-period=0s"], flags].concat())
    }
}

/// The agent as a process. What does not happen fails the test, with the end of the log.
pub struct Agent(lab::agent::Agent);

impl Agent {
    /// The command that is an agent of [`node`].
    pub fn command() -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kube-ipvs"));
        command.arg("--hostname-override=node-a");
        command
    }

    pub fn start(flags: &[&str]) -> Self {
        Self::start_command(Self::command().args(flags))
    }

    pub fn start_command(command: &mut Command) -> Self {
        Self(lab::agent::Agent::spawn(command).unwrap())
    }

    pub fn log(&self) -> String {
        self.0.log()
    }

    /// Waits until the log has a text.
    pub fn says(&mut self, text: &str) -> &mut Self {
        self.until(&format!("say {text:?}"), |agent| agent.log().contains(text));
        self
    }

    /// Waits until the log has a text in a line that comes after this many.
    pub fn says_after(&mut self, lines: usize, text: &str) {
        self.until(&format!("say {text:?} after line {lines}"), |agent| {
            agent.lines_from(lines).iter().any(|line| line.text.contains(text))
        });
    }

    /// The process.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// How many lines it has logged so far.
    pub fn lines(&self) -> usize {
        self.0.line_count()
    }

    /// Waits until so many audits have begun and ended from now on. The agent needs a short `--ipvs-sync-period`.
    pub fn audits(&mut self, count: usize) {
        let audits = || metric("kube_ipvs_sync_duration_seconds_count{kind=\"audit\"}").unwrap_or(0.0);
        let before = audits();
        // One may be under way.
        let wanted = before + f64::from(u32::try_from(count + 1).unwrap());
        self.until(&format!("audit {count} times"), |_| audits() >= wanted);
    }

    /// Waits until the virtual servers are these lines of `ipvsadm -Sn`, in any order.
    pub fn has(&mut self, lines: &[&str]) -> &mut Self {
        let mut expected: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
        expected.sort();
        self.until(&format!("have {expected:#?}"), |_| ipvs() == expected);
        self
    }

    /// Waits until `kube-ipvs0` has exactly these addresses, sorted. VIPs are bound after their real servers are added.
    pub fn binds(&mut self, expected: &[&str]) -> &mut Self {
        self.until(&format!("bind {expected:?}"), |_| addresses() == expected);
        self
    }

    /// Waits until something holds.
    pub fn until(&mut self, what: &str, holds: impl FnMut(&mut lab::agent::Agent) -> bool) {
        if let Err(error) = self.0.until(what, holds) {
            panic!("{error}\nthere is {:#?}", ipvs());
        }
    }

    /// SIGKILL: it has no chance to put anything in order.
    pub fn kill(mut self) {
        self.0.kill();
    }

    /// How many bytes of memory it had at the most.
    pub fn peak_memory(&self) -> u64 {
        self.0.usage().unwrap().peak
    }

    /// Does something while the agent is stopped.
    pub fn stop_while(&mut self, action: impl FnOnce()) {
        self.0.stop_while(action).unwrap();
    }

    pub fn terminate(&mut self) {
        self.0.terminate().unwrap();
    }

    /// Waits until it has ended by itself.
    pub fn ends(&mut self) -> ExitStatus {
        self.0.wait().unwrap_or_else(|error| panic!("{error}"))
    }
}

/// The virtual servers as sorted lines of `ipvsadm -Sn`.
pub fn ipvs() -> Vec<String> {
    let mut lines = Vec::new();
    let mut client = Client::connect().unwrap();
    for entry in client.servers().unwrap() {
        let (server, real_servers) = entry.unwrap().into_configuration();
        lines.push(line(&Message::AddVirtualServer(server)));
        lines.extend(real_servers.into_iter().map(|it| line(&Message::AddRealServer(server.id, it))));
    }
    lines.sort();
    lines
}

/// What no rule can say does not fail the test by itself.
fn line(message: &Message) -> String {
    rules::format(message).unwrap_or_else(|error| format!("{message:?}: {error}"))
}

/// Changes IPVS, with lines as `ipvsadm -R` reads them.
pub fn ipvsadm(lines: &str) {
    let messages: Vec<Message> = rules::parse(lines).map(|rule| rule.unwrap().message).collect();
    for result in Client::connect().unwrap().apply(&messages).unwrap() {
        result.unwrap();
    }
}

/// The addresses on `kube-ipvs0`, sorted.
pub fn addresses() -> Vec<String> {
    link::addresses("kube-ipvs0").unwrap()
}

/// The device `eth0` with the address that [`node`] has.
pub fn eth0() {
    link::add_dummy("eth0", &["192.168.1.1/24"]).unwrap();
}

/// Our tables of the packet filter as the agent reads them: quickly, but rules by their fingerprints alone.
pub fn observed_filter() -> ObservedFilter {
    read::read(&mut Socket::open(NETLINK_NETFILTER).unwrap(), Families::BOTH, false).unwrap()
}

/// Whether there are tables of ours.
pub fn has_tables() -> bool {
    observed_filter() != ObservedFilter::default()
}

/// Whether the packet filter knows a Service at this address.
pub fn filter_knows(address: &str) -> bool {
    let address: IpAddr = address.parse().unwrap();
    observed_filter().front_ends.keys().any(|front_end| front_end.address == address)
}

/// Our tables of the packet filter, all of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Filter {
    observed: ObservedFilter,
    listed: Vec<String>,
}

impl Filter {
    pub fn read() -> Self {
        Self { observed: observed_filter(), listed: listed_filter() }
    }

    /// Whether the tables are like this. What is read without running a program is read first.
    pub fn is_again(&self) -> bool {
        observed_filter() == self.observed && listed_filter() == self.listed
    }
}

/// The words of our tables of the packet filter, sorted, whichever order sets have their elements in; none without tables.
pub fn listed_filter() -> Vec<String> {
    let mut words = Vec::new();
    let mut is_ours = false;
    for line in run("nft list ruleset").lines() {
        // A table with an owner has the owner's name after its own, and a line of flags, both only while the owner runs.
        let is_head = line.starts_with("table ");
        if is_head {
            is_ours = line.split_whitespace().nth(2) == Some("kube-ipvs");
        }
        let line = if is_head { line.split('#').next().unwrap_or_default() } else { line };
        if is_ours && !line.starts_with("\tflags ") {
            let all = line.split([',', '{', '}']).map(|word| word.trim().to_owned());
            words.extend(all.filter(|word| !word.is_empty()));
        }
    }
    words.sort();
    words
}

/// Runs a command in this thread's namespace: with a shell only where it needs one, since each process costs time.
pub fn run(command: &str) -> String {
    let output = if command.contains(|c: char| "|&;<>()$`\\\"'*?[]{}~#=\n".contains(c)) {
        Command::new("sh").args(["-c", command]).output().unwrap()
    } else {
        let mut words = command.split_whitespace();
        Command::new(words.next().unwrap()).args(words).output().unwrap()
    };
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[allow(unused_imports, reason = "not every test file asks over HTTP")]
pub use lab::http::{Answer, HEALTH, METRICS};

/// Asks for something over HTTP; `None` where nobody listens.
pub fn get(address: &str, path: &str) -> Option<Answer> {
    lab::http::get(address, path).ok()
}

/// `None` also where the connection ends without an answer, as when a port is about to be closed.
pub fn http(method: &str, address: &str, path: &str, body: &str) -> Option<Answer> {
    lab::http::request(method, address, path, body).ok()
}

/// The value of a metric, by its name with labels as it stands in the text.
pub fn metric(name: &str) -> Option<f64> {
    Metrics::read().ok()?.get(name)
}
