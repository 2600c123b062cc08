//! The agent with an API server instead of a directory, whatever the server does. (That the same objects give the same
//! kernel from either source is shown by `cargo xtask conformance`, with and without `--api-server`.)

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::path::PathBuf;

use common::{Agent, NODE, addresses, ipvs, service, slice};
use lab::netns::isolate;
use serde_json::Value;
use tempfile::TempDir;
use test_apiserver::{Server, Streaming};

const WEB: &str = "-A -t 10.96.0.10:80 -s rr";
const WEB_1: &str = "-a -t 10.96.0.10:80 -r 10.0.0.1:8080 -m -w 1";
const WEB_2: &str = "-a -t 10.96.0.10:80 -r 10.0.0.2:8080 -m -w 1";

/// An API server on the loopback device of this thread's namespace, and a kubeconfig for it.
struct Cluster {
    server: Server,
    dir: TempDir,
}

impl Cluster {
    fn new() -> Self {
        let (server, dir) = (Server::new(), TempDir::new().unwrap());
        let address = server.listen_in_thread().unwrap();
        Server::write_kubeconfig(&dir.path().join("kubeconfig"), address);
        Self { server, dir }
    }

    /// One with the Service `web` of two endpoints.
    fn with_web() -> Self {
        let cluster = Self::new();
        cluster.apply(NODE).apply(&service("web", "10.96.0.10"));
        cluster.apply(&slice("web-1", "web", &["10.0.0.1", "10.0.0.2"]));
        cluster
    }

    fn apply(&self, manifest: &str) -> &Self {
        let object: Value = serde_saphyr::from_str(manifest).unwrap();
        self.server.apply(object);
        self
    }

    fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    fn agent(&self, flags: &[&str]) -> Agent {
        let kubeconfig = format!("--kubeconfig={}", self.kubeconfig().display());
        Agent::start(&[&[kubeconfig.as_str(), "--ipvs-min-sync-period=0s"], flags].concat())
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn objects_of_an_api_server_become_virtual_servers_and_follow_changes() {
    isolate().unwrap();
    let cluster = Cluster::with_web();
    let mut agent = cluster.agent(&[]);
    agent.has(&[WEB, WEB_1, WEB_2]);
    cluster.apply(&slice("web-1", "web", &["10.0.0.1"]));
    agent.has(&[WEB, WEB_1]);
    cluster.server.delete("Service", "default", "web");
    agent.has(&[]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_start_is_an_event_of_the_node() {
    isolate().unwrap();
    let cluster = Cluster::with_web();
    let mut agent = cluster.agent(&[]);
    agent.has(&[WEB, WEB_1, WEB_2]);
    agent.until("post an Event", |_| !cluster.server.events().is_empty());
    let event = &cluster.server.events()[0];
    assert_eq!((&event["reason"], &event["regarding"]["name"]), (&"Starting".into(), &"node-a".into()), "{event}");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn all_nodes_are_watched_only_when_asked_for() {
    isolate().unwrap();
    let cluster = Cluster::with_web();
    for (flag, field) in [("--watch-all-nodes=false", true), ("--watch-all-nodes", false)] {
        let before = cluster.server.asked().len();
        cluster.agent(&["--once", flag]).ends();
        let asked = cluster.server.asked().split_off(before);
        let asked: Vec<_> = asked.into_iter().filter(|asked| asked.resource == "nodes").collect();
        assert!(!asked.is_empty() && asked.iter().all(|asked| asked.query.contains("metadata.name=node-a") == field));
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_server_without_streaming_lists_serves_as_well() {
    for streaming in [Streaming::Refused(422), Streaming::Refused(400)] {
        isolate().unwrap();
        let cluster = Cluster::with_web();
        cluster.server.streaming(streaming);
        cluster.agent(&[]).has(&[WEB, WEB_1, WEB_2]);
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn what_was_deleted_during_a_disconnection_goes() {
    isolate().unwrap();
    let cluster = Cluster::with_web();
    cluster.apply(&service("other", "10.96.0.11"));
    let mut agent = cluster.agent(&[]);
    agent.has(&[WEB, WEB_1, WEB_2, "-A -t 10.96.0.11:80 -s rr"]);
    cluster.server.refuse();
    cluster.server.delete("Service", "default", "other");
    cluster.apply(&slice("web-1", "web", &["10.0.0.2"]));
    cluster.server.compact();
    cluster.server.recover();
    agent.has(&[WEB, WEB_2]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_server_that_forbids_or_speaks_html_is_named_and_nothing_is_lost() {
    isolate().unwrap();
    let cluster = Cluster::with_web();
    cluster.agent(&[]).has(&[WEB, WEB_1, WEB_2]);
    cluster.server.forbid(Some("services"));
    let mut agent = cluster.agent(&[]);
    agent.says("watch of services").says("system:node-proxier");
    assert_eq!(ipvs().len(), 3, "nothing is programmed before all is known");
    cluster.server.answer_with(None, 200, "text/html", "<html>a proxy's login page</html>");
    agent.says("what came is not what an API server sends");
    assert_eq!((ipvs().len(), addresses()), (3, vec!["10.96.0.10/32".to_owned()]));
    cluster.server.recover();
    cluster.apply(&slice("web-1", "web", &["10.0.0.1"]));
    agent.has(&[WEB, WEB_1]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn an_unreadable_kubeconfig_is_named_and_nothing_is_lost() {
    isolate().unwrap();
    let cluster = Cluster::with_web();
    cluster.agent(&[]).has(&[WEB, WEB_1, WEB_2]);
    let mut agent = Agent::start(&["--kubeconfig=/nonexistent/kubeconfig"]);
    assert!(!agent.ends().success());
    assert!(agent.log().contains("cannot use the kubeconfig /nonexistent/kubeconfig"), "{}", agent.log());
    assert_eq!(ipvs().len(), 3);
}
