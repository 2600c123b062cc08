//! The log: what is in it stays in its line, and nobody waits for whoever should read it.

mod common;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::fd::AsFd as _;
use std::process::{Command, Stdio};

use common::{Agent, HEALTH, Manifests, eth0, get, ipvs, metric, node, service, slice};
use lab::netns::isolate;
use lab::objects::{self, with};
use lab::wait::until;
use serde_json::{Value, json};
use tempfile::TempDir;
use test_apiserver::Server;

/// A pipe of one page that nobody reads.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_log_that_nobody_reads_stops_nothing_and_losses_are_counted() {
    isolate().unwrap();
    let manifests = Manifests::new();
    manifests.write("web.yaml", &service("web", "10.96.0.10"));
    let (reader, writer) = std::io::pipe().unwrap();
    rustix::pipe::fcntl_setpipe_size(writer.as_fd(), 4096).unwrap();
    let mut command = Agent::command();
    command.arg("--ipvs-min-sync-period=0s").arg(format!("--manifests={}", manifests.path().display()));
    let mut agent = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(writer).spawn().unwrap();
    drop(command);
    // Each is a warning.
    let bad = |it: usize| {
        let spec = json!({"spec": {"ports": [{"port": 80, "protocol": "x".repeat(50)}]}});
        with(service(&format!("s{it}"), &format!("10.97.{}.{}", it / 250, it % 250)), spec)
    };
    let bad: Vec<Value> = (0..3000).map(bad).collect();
    manifests.write("bad.json", &json!({"apiVersion": "v1", "kind": "List", "items": bad}));
    let dropped = || metric("kube_ipvs_log_lines_dropped_total").unwrap_or(0.0);
    until("the agent drops lines", || dropped() > 0.0).unwrap();
    manifests.write("slice.yaml", &slice("web-1", "web", &["10.0.0.7"]));
    until("the endpoint is served", || ipvs().iter().any(|line| line.contains("10.0.0.7:8080"))).unwrap();
    assert_eq!(get(HEALTH, "/livez").unwrap().status, 200);
    // Once somebody reads, what was lost is told, and what comes after it is there.
    let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains("lines of the log were dropped")));
    // Nor does an end wait for a reader.
    rustix::process::kill_process(rustix::process::Pid::from_child(&agent), rustix::process::Signal::TERM).unwrap();
    until("the agent ends", || agent.try_wait().unwrap().is_some()).unwrap();
}

/// A line that could be one of the agent's, and what a terminal obeys.
const EVIL: &str =
    "a\n2026-01-01T00:00:00Z ERROR forged\n\u{1b}[2J\u{1b}]0;title\u{7}\r\0\u{202e}evil\u{2028}\u{9b}31m\u{200b}";

fn assert_is_clean(log: &str) {
    let bad = log.chars().find(|it| (it.is_control() && *it != '\n') || "\u{202e}\u{2028}\u{200b}".contains(*it));
    assert_eq!(bad, None, "{log}");
    assert!(!log.lines().any(|line| line.starts_with("2026-01-01")), "{log}");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn what_an_api_server_or_an_object_says_stays_within_its_line() {
    for format in ["text", "json"] {
        isolate().unwrap();
        let (server, dir) = (Server::new(), TempDir::new().unwrap());
        let kubeconfig = dir.path().join("kubeconfig");
        Server::write_kubeconfig(&kubeconfig, server.listen_in_thread().unwrap());
        server.apply(node());
        let port = json!({"name": EVIL, "port": 80, "protocol": EVIL});
        let spec = json!({"type": EVIL, "sessionAffinity": EVIL, "externalIPs": [EVIL], "ports": [port]});
        server.apply(with(service("web", "10.96.0.10"), json!({"spec": spec})));
        server.apply(slice("web-1", "web", &[EVIL]));
        let config = dir.path().join("config");
        let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: ipvs";
        let connection = format!("clientConnection: {{kubeconfig: {}}}", kubeconfig.display());
        let unknown = serde_json::to_string(EVIL).unwrap().replace('\u{9b}', "\\u009b");
        let logging = format!("logging: {{format: {format}}}");
        fs::write(&config, format!("{head}\n{connection}\n{logging}\n{unknown}: 1\n")).unwrap();
        let mut agent = Agent::start(&[&format!("--config={}", config.display())]);
        agent.says("audited").says("default/web");
        for status in [403, 401, 500] {
            let lines = agent.lines();
            let body = json!({"kind": "Status", "apiVersion": "v1", "code": status, "message": EVIL, "reason": EVIL});
            server.answer_with(None, status, "application/json", body.to_string());
            server.expire_watches();
            agent.says_after(lines, "forged");
            server.recover();
            agent.says_after(lines, "the problems are resolved");
        }
        let log = agent.log();
        assert_is_clean(&log);
        assert!(log.contains("\\u{202e}") || log.contains("\\u202e"), "{log}");
        if format == "json" {
            assert!(log.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{log}");
        }
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn names_of_files_and_arguments_stay_within_their_line() {
    isolate().unwrap();
    let manifests = Manifests::new();
    let name = format!("{}.yaml", EVIL.replace(['\0', '/'], ""));
    manifests.write(&name, "nonsense: [");
    let mut agent = manifests.agent(&[]);
    agent.says("audited").says("does not parse");
    assert_is_clean(&agent.log());
    agent.kill();
    let evil = EVIL.replace('\0', "");
    for argument in [format!("--{evil}"), format!("--config={evil}"), format!("--ipvs-scheduler={evil}"), evil.clone()]
    {
        let mut agent = Agent::start_command(Command::new(env!("CARGO_BIN_EXE_kube-ipvs")).arg(&argument));
        assert!(!agent.ends().success());
        let log = agent.log();
        let bad = log.chars().find(|it| (it.is_control() && *it != '\n') || "\u{202e}\u{2028}".contains(*it));
        assert_eq!(bad, None, "{log}");
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn thousands_of_clashes_are_a_few_lines() {
    isolate().unwrap();
    eth0();
    let manifests = Manifests::new();
    let ports: Vec<Value> = (1..=1000).map(|port| objects::port(&format!("p{port}"), "TCP", port)).collect();
    let claims = json!({"spec": {"externalIPs": ["203.0.113.1", "192.168.1.1"]}});
    let named = |name: String, address: String| with(objects::service(&name, &[&address], &ports), claims.clone());
    manifests.write("a.json", &named("a".to_owned(), "10.96.0.1".to_owned()));
    manifests.write("b.json", &named("b".to_owned(), "10.96.0.2".to_owned()));
    let few = &ports[..2];
    let many: Vec<Value> = (10..110)
        .map(|it| with(objects::service(&format!("c{it}"), &[&format!("10.96.0.{it}")], few), claims.clone()))
        .collect();
    manifests.write("c.json", &json!({"apiVersion": "v1", "kind": "List", "items": many}));
    let mut agent = manifests.agent(&[]);
    agent.says("audited");
    let log = agent.log();
    let about = |text: &str| log.lines().filter(|line| line.contains(" WARN ") && line.contains(text)).count();
    assert_eq!(about("default/b"), 2, "{log}");
    assert!(about(" and 991 more of this Service") == 1, "{log}");
    assert!(about("service=") <= 20 && about("of more Services are refused") == 1, "{log}");
    agent.until("count them", |_| metric("kube_ipvs_front_end_clashes_total") == Some(1000.0 + 200.0));
}
