//! Panics at points of the agent and of its libraries harm no more than what they concern, and the agent goes on.

#![cfg(feature = "fault-points")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::path::PathBuf;

use common::{Agent, HEALTH, METRICS, Manifests, get, ipvs, metric, node, service, slice};
use lab::netns::isolate;
use tempfile::TempDir;
use test_apiserver::Server;

const WEB: &str = "-A -t 10.96.0.10:80 -s rr";
const WEB_1: &str = "-a -t 10.96.0.10:80 -r 10.0.0.1:8080 -m -w 1";
const BAD: &str = "-A -t 10.96.0.66:80 -s rr";
const OTHER: &str = "-A -t 10.96.0.11:80 -s rr";

/// The places where agents panic.
struct Places(TempDir);

impl Places {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("places")
    }

    /// Panics at these lines from now on.
    fn set(&self, lines: &str) {
        fs::write(self.path(), lines).unwrap();
    }
}

fn manifests() -> Manifests {
    let manifests = Manifests::new();
    manifests.write("web.yaml", &service("web", "10.96.0.10"));
    manifests.write("slice.yaml", &slice("web-1", "web", &["10.0.0.1"]));
    manifests.write("bad.yaml", &service("bad", "10.96.0.66"));
    manifests
}

fn agent(manifests: &Manifests, places: &Places, flags: &[&str]) -> Agent {
    let directory = format!("--manifests={}", manifests.path().display());
    let mut command = Agent::command();
    command.env("PANIC_AT", places.path()).args([&directory, "--ipvs-min-sync-period=0s", "--ipvs-sync-period=300ms"]);
    Agent::start_command(command.args(flags))
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_panic_about_one_object_harms_no_other_and_removes_nothing() {
    for place in ["convert default/bad", "contribution default/bad"] {
        isolate().unwrap();
        let (manifests, places) = (manifests(), Places::new());
        let mut first = agent(&manifests, &places, &[]);
        first.has(&[WEB, WEB_1, BAD]);
        // While it runs ...
        places.set(place);
        manifests.write("bad.yaml", &service("bad", "10.96.0.67"));
        manifests.write("other.yaml", &service("other", "10.96.0.11"));
        first.has(&[WEB, WEB_1, BAD, OTHER]);
        first.says("internal error").says("default/bad");
        first.kill();
        // ... and from the start.
        let mut second = agent(&manifests, &places, &[]);
        second.says("audited").says("internal error");
        manifests.remove("other.yaml");
        second.audits(2);
        second.has(&[WEB, WEB_1, BAD]);
        assert!(metric("kube_ipvs_internal_errors_total").unwrap() >= 1.0);
        places.set("");
        manifests.write("bad.yaml", &service("bad", "10.96.0.68"));
        second.has(&[WEB, WEB_1, "-A -t 10.96.0.68:80 -s rr"]);
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_panic_about_one_file_of_manifests_leaves_the_others() {
    isolate().unwrap();
    let (manifests, places) = (manifests(), Places::new());
    let mut agent = agent(&manifests, &places, &[]);
    agent.has(&[WEB, WEB_1, BAD]);
    places.set(&format!("parse {}", manifests.path().join("bad.yaml").display()));
    manifests.write("bad.yaml", &service("bad", "10.96.0.67"));
    manifests.write("other.yaml", &service("other", "10.96.0.11"));
    agent.has(&[WEB, WEB_1, BAD, OTHER]);
    agent.says("bad.yaml").says("cannot be parsed: internal error");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_reconciler_that_panics_is_started_again_in_the_same_process() {
    isolate().unwrap();
    let (manifests, places) = (manifests(), Places::new());
    let mut agent = agent(&manifests, &places, &[]);
    agent.has(&[WEB, WEB_1, BAD]);
    places.set("sync now");
    manifests.write("other.yaml", &service("other", "10.96.0.11"));
    agent.says("the reconciler stopped by an internal error");
    assert_eq!(
        ipvs(),
        [BAD, WEB, WEB_1]
            .map(str::to_owned)
            .into_iter()
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .collect::<Vec<_>>()
    );
    // It recurs at the next start.
    let lines = agent.lines();
    agent.says_after(lines, "the reconciler stopped by an internal error");
    places.set("");
    agent.has(&[WEB, WEB_1, BAD, OTHER]);
    // A single sync ends with an error.
    places.set("sync now");
    let mut command = Agent::command();
    command.env("PANIC_AT", places.path()).arg(format!("--manifests={}", manifests.path().display())).arg("--once");
    agent.kill();
    let mut once = Agent::start_command(&mut command);
    assert!(!once.ends().success());
    assert!(once.log().contains("the reconciler stopped by an internal error"), "{}", once.log());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_panic_about_one_request_to_the_agent_leaves_its_ports() {
    isolate().unwrap();
    let (manifests, places) = (manifests(), Places::new());
    let mut agent = agent(&manifests, &places, &[]);
    agent.has(&[WEB, WEB_1, BAD]);
    agent.until("listen", |_| get(HEALTH, "/livez").is_some() && get(METRICS, "/metrics").is_some());
    places.set("http /proxyMode\nhttp /healthz");
    for _ in 0..3 {
        assert!(get(METRICS, "/proxyMode").is_none());
        assert!(get(HEALTH, "/healthz").is_none());
    }
    assert_eq!(get(HEALTH, "/livez").unwrap().status, 200);
    assert!(metric("kube_ipvs_internal_errors_total").unwrap() >= 6.0);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_client_of_the_api_server_that_panics_is_replaced() {
    for place in ["request services", "client /api/v1/services"] {
        isolate().unwrap();
        let (server, places) = (Server::new(), Places::new());
        let kubeconfig = places.0.path().join("kubeconfig");
        Server::write_kubeconfig(&kubeconfig, server.listen_in_thread().unwrap());
        server.apply(node());
        server.apply(service("web", "10.96.0.10"));
        places.set(place);
        let mut command = Agent::command();
        command.env("PANIC_AT", places.path()).arg(format!("--kubeconfig={}", kubeconfig.display()));
        let mut agent = Agent::start_command(command.arg("--ipvs-min-sync-period=0s"));
        agent.says("internal error");
        assert!(ipvs().is_empty());
        places.set("");
        agent.has(&[WEB]);
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_kubeconfig_that_the_client_panics_on_is_refused() {
    isolate().unwrap();
    let (server, places) = (Server::new(), Places::new());
    let kubeconfig = places.0.path().join("kubeconfig");
    let address = server.listen_in_thread().unwrap();
    server.apply(node());
    server.apply(service("web", "10.96.0.10"));
    let with_user = |user: &str| {
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: 'http://{address}'}}}}]\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\nusers: [{{name: u, user: {user}}}]\n"
        );
        fs::write(places.0.path().join("new"), text).unwrap();
        fs::rename(places.0.path().join("new"), &kubeconfig).unwrap();
    };
    let plugin = places.0.path().join("plugin");
    let credential =
        r#"{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"a\nb"}}"#;
    fs::write(&plugin, format!("#!/bin/sh\nprintf '%s' '{credential}'\n")).unwrap();
    fs::set_permissions(&plugin, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let exec = format!(
        "{{exec: {{apiVersion: client.authentication.k8s.io/v1, command: {}, interactiveMode: Never}}}}",
        plugin.display()
    );
    let provider = r#"{auth-provider: {name: oidc, config: {id-token: "a\u0000b"}}}"#;
    let bad = [r#"{token: "secret\nsecret"}"#, r#"{token: "a\tb\u007f"}"#, provider, &exec];
    with_user("{token: good}");
    let flag = format!("--kubeconfig={}", kubeconfig.display());
    let mut agent = Agent::start(&[&flag, "--ipvs-min-sync-period=0s"]);
    agent.has(&[WEB]);
    for user in bad {
        let lines = agent.lines();
        with_user(user);
        agent.says_after(lines, "has changed and is unusable; the agent continues with the old ones");
    }
    server.apply(service("other", "10.96.0.11"));
    agent.has(&[WEB, OTHER]);
    assert!(!agent.log().contains("secret"), "{}", agent.log());
    agent.kill();
    // A program may do better at the next request.
    for user in bad.into_iter().filter(|user| *user != exec) {
        with_user(user);
        let mut agent = Agent::start(&[&flag]);
        assert_eq!(agent.ends().code(), Some(1), "{user}: {}", agent.log());
        assert!(agent.log().contains("cannot set up the connection to the API server"), "{user}: {}", agent.log());
    }
}
