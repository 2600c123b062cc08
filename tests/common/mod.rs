//! The agent as a process in a network namespace of its own, and the kernel's state as `ipvsadm` and `ip` show it.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::allow_attributes,
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests, of which every test file uses a part"
)]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long anything may take: far longer than it does.
const PATIENCE: Duration = Duration::from_secs(60);

pub const NODE: &str = r"
apiVersion: v1
kind: Node
metadata: {name: node-a}
status: {addresses: [{type: InternalIP, address: 192.168.1.1}]}
";

/// A Service with one TCP port 80 to 8080.
pub fn service(name: &str, cluster_ip: &str) -> String {
    format!(
        r"
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default}}
spec:
  clusterIP: {cluster_ip}
  clusterIPs: [{cluster_ip}]
  ports: [{{name: http, protocol: TCP, port: 80}}]
"
    )
}

/// A slice of ready endpoints on port 8080.
pub fn slice(name: &str, service: &str, addresses: &[&str]) -> String {
    let endpoints: Vec<String> = addresses
        .iter()
        .map(|address| format!("{{addresses: [\"{address}\"], conditions: {{ready: true}}}}"))
        .collect();
    format!(
        r"
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, namespace: default, labels: {{kubernetes.io/service-name: {service}}}}}
addressType: {family}
ports: [{{name: http, protocol: TCP, port: 8080}}]
endpoints: [{endpoints}]
",
        family = if addresses.first().is_some_and(|address| address.contains(':')) { "IPv6" } else { "IPv4" },
        endpoints = endpoints.join(", ")
    )
}

/// A directory of manifests, and the agents that follow it.
pub struct Manifests {
    dir: TempDir,
}

impl Manifests {
    pub fn new() -> Self {
        let manifests = Self { dir: TempDir::new().unwrap() };
        manifests.write("node.yaml", NODE);
        manifests
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Puts a file in place in one move.
    pub fn write(&self, name: &str, content: &str) -> &Self {
        let temporary = self.path().join(format!(".{name}"));
        fs::write(&temporary, content).unwrap();
        fs::rename(temporary, self.path().join(name)).unwrap();
        self
    }

    pub fn remove(&self, name: &str) {
        fs::remove_file(self.path().join(name)).unwrap();
    }

    /// Starts an agent on the directory, with periods short enough for tests.
    pub fn agent(&self, flags: &[&str]) -> Agent {
        let manifests = format!("--manifests={}", self.path().display());
        Agent::start(&[&[manifests.as_str(), "--ipvs-min-sync-period=0s"], flags].concat())
    }
}

/// The agent as a process.
pub struct Agent {
    process: Child,
    log: PathBuf,
    _dir: TempDir,
}

impl Agent {
    pub fn start(flags: &[&str]) -> Self {
        Self::start_command(Command::new(env!("CARGO_BIN_EXE_kube-ipvs")).arg("--hostname-override=node-a").args(flags))
    }

    pub fn start_command(command: &mut Command) -> Self {
        let dir = TempDir::new().unwrap();
        let log = dir.path().join("log");
        let output = fs::File::create(&log).unwrap();
        let process = command
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        Self { process, log, _dir: dir }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until the log has a text.
    pub fn says(&mut self, text: &str) -> &mut Self {
        self.until(&format!("say {text:?}"), |agent| agent.log().contains(text));
        self
    }

    /// Waits until the virtual servers are these lines of `ipvsadm -Sn`, in any order.
    pub fn has(&mut self, lines: &[&str]) -> &mut Self {
        let mut expected: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
        expected.sort();
        self.until(&format!("have {expected:#?}"), |_| ipvs() == expected);
        self
    }

    /// Waits until something holds.
    pub fn until(&mut self, what: &str, holds: impl FnMut(&mut Self) -> bool) {
        self.until_within(PATIENCE, what, holds);
    }

    /// The same, for what may take longer or must not.
    pub fn until_within(&mut self, patience: Duration, what: &str, mut holds: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !holds(self) {
            let ended = self.process.try_wait().unwrap();
            assert!(
                ended.is_none() && start.elapsed() < patience,
                "the agent ({ended:?}) did not {what}; there is {:#?}; its log:\n{}",
                ipvs(),
                self.log()
            );
            // The longer it may take the more seldom: other tests share the machine.
            std::thread::sleep(patience / 1500);
        }
    }

    /// SIGKILL: it has no chance to put anything in order.
    pub fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// How many bytes of memory it had at the most.
    pub fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    /// Does something while the agent is stopped.
    pub fn stop_while(&mut self, action: impl FnOnce()) {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        action();
        rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    }

    pub fn terminate(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    /// Waits until it has ended by itself.
    pub fn ends(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "the agent did not end; its log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The virtual servers as sorted lines of `ipvsadm -Sn`.
pub fn ipvs() -> Vec<String> {
    let mut lines: Vec<String> = run("ipvsadm -Sn").lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// The addresses on `kube-ipvs0`, sorted.
pub fn addresses() -> Vec<String> {
    let mut addresses: Vec<String> =
        run("ip -br address show dev kube-ipvs0").split_whitespace().skip(2).map(str::to_owned).collect();
    addresses.sort();
    addresses
}

/// Runs a command of the shell in this thread's namespace.
pub fn run(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// An answer over HTTP.
#[derive(Clone, Debug)]
pub struct HttpAnswer {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl HttpAnswer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

/// Asks for something over HTTP; `None` where nobody listens.
pub fn get(address: &str, path: &str) -> Option<HttpAnswer> {
    http("GET", address, path, "")
}

/// `None` also where the connection ends without an answer, as when a port is about to be closed.
pub fn http(method: &str, address: &str, path: &str, body: &str) -> Option<HttpAnswer> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}");
    stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let mut lines = head.lines();
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers = lines.map(|line| line.split_once(": ").unwrap());
    let headers = headers.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
    Some(HttpAnswer { status, headers, body: body.to_owned() })
}

/// The value of a metric, by its name with labels as it stands in the text.
pub fn metric(name: &str) -> Option<f64> {
    let text = get(METRICS, "/metrics")?.body;
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

/// Where the agent listens by default.
pub const HEALTH: &str = "127.0.0.1:10256";
pub const METRICS: &str = "127.0.0.1:10249";
