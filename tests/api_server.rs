//! The agent with an API server instead of a directory, whatever the server does. (That the same objects give the same
//! kernel from either source is shown by `cargo xtask conformance`, with and without `--api-server`.)

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use common::cluster::Cluster;
use common::{Agent, HEALTH, addresses, get, ipvs, metric, node, service, slice};
use lab::link;
use lab::netns::isolate;
use lab::objects::with;
use lab::wait::LIMIT;
use serde_json::{Value, json};
use test_apiserver::{Streaming, TlsListener};

const WEB: &str = "-A -t 10.96.0.10:80 -s rr";
const WEB_1: &str = "-a -t 10.96.0.10:80 -r 10.0.0.1:8080 -m -w 1";
const WEB_2: &str = "-a -t 10.96.0.10:80 -r 10.0.0.2:8080 -m -w 1";

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn services_of_an_api_server_become_virtual_servers() {
    isolate().unwrap();
    let cluster = Cluster::with_web();
    let mut agent = cluster.agent(&[]);
    agent.has(&[WEB, WEB_1, WEB_2]);
    cluster.apply(slice("web-1", "web", &["10.0.0.1"]));
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
fn all_nodes_are_watched_only_if_configured() {
    isolate().unwrap();
    let cluster = Cluster::with_web();
    for (flag, field) in [("--watch-all-nodes=false", true), ("--watch-all-nodes", false)] {
        let before = cluster.server.requests().len();
        cluster.agent(&["--once", flag]).ends();
        let asked = cluster.server.requests().split_off(before);
        let asked: Vec<_> = asked.into_iter().filter(|asked| asked.resource == "nodes").collect();
        assert!(!asked.is_empty() && asked.iter().all(|asked| asked.query.contains("metadata.name=node-a") == field));
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn an_api_server_without_streaming_lists_works_too() {
    for streaming in [Streaming::Refused(422), Streaming::Refused(400)] {
        isolate().unwrap();
        let cluster = Cluster::with_web();
        cluster.server.streaming(streaming);
        cluster.agent(&[]).has(&[WEB, WEB_1, WEB_2]);
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn objects_deleted_during_a_disconnection_are_removed() {
    isolate().unwrap();
    let cluster = Cluster::with_web();
    cluster.apply(service("other", "10.96.0.11"));
    let mut agent = cluster.agent(&[]);
    agent.has(&[WEB, WEB_1, WEB_2, "-A -t 10.96.0.11:80 -s rr"]);
    cluster.server.refuse();
    cluster.server.delete("Service", "default", "other");
    cluster.apply(slice("web-1", "web", &["10.0.0.2"]));
    cluster.server.compact();
    cluster.server.recover();
    agent.has(&[WEB, WEB_2]);
}

/// An agent starts on a node that serves twelve Services, and the API server, fresh from an old backup, knows of none.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn an_empty_list_at_the_start_is_confirmed_before_removals() {
    isolate().unwrap();
    let fill = |cluster: &Cluster| {
        for number in 10..22 {
            let name = format!("s{number}");
            cluster.apply(service(&name, &format!("10.96.0.{number}")));
            cluster.apply(slice(&format!("{name}-1"), &name, &["10.0.0.1"]));
        }
    };
    let cluster = Cluster::new();
    fill(cluster.apply(node()));
    assert!(cluster.agent(&["--once"]).ends().success());
    let before = (ipvs(), addresses());
    assert_eq!((before.0.len(), before.1.len()), (24, 12));

    // It was an error.
    let empty = Cluster::new();
    let mut agent = empty.apply(node()).agent(&[]);
    agent.says("0 entries where there were 12: it is read again in 5 s before anything is deleted");
    fill(&empty);
    agent.says("audited, nothing to change");
    assert_eq!((ipvs(), addresses()), before);
    agent.kill();

    // It was none.
    let empty = Cluster::new();
    let mut agent = empty.apply(node()).agent(&[]);
    agent.says("0 entries where there were 12");
    assert_eq!((ipvs(), addresses()), before);
    agent.has(&[]);
    assert_eq!(addresses(), [""; 0]);
    agent.kill();

    fill(&empty);
    assert!(empty.agent(&["--once"]).ends().success());
    let empty = Cluster::new();
    let mut agent = empty.apply(node()).agent(&["--confirm-disappearance=false"]);
    agent.has(&[]);
    assert!(!agent.log().contains("where there were"), "{}", agent.log());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn errors_and_html_of_an_api_server_are_logged_and_change_nothing() {
    isolate().unwrap();
    let cluster = Cluster::with_web();
    cluster.agent(&[]).has(&[WEB, WEB_1, WEB_2]);
    cluster.server.forbid(Some("services"));
    let mut agent = cluster.agent(&[]);
    agent.says("watch of services").says("system:node-proxier");
    assert_eq!(ipvs().len(), 3, "nothing is programmed before all is known");
    cluster.server.answer_with(None, 200, "text/html", "<html>a proxy's login page</html>");
    agent.says("is not what an API server sends");
    assert_eq!((ipvs().len(), addresses()), (3, vec!["10.96.0.10/32".to_owned()]));
    cluster.server.recover();
    cluster.apply(slice("web-1", "web", &["10.0.0.1"]));
    agent.has(&[WEB, WEB_1]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn an_unreadable_kubeconfig_is_named_and_changes_nothing() {
    isolate().unwrap();
    let cluster = Cluster::with_web();
    cluster.agent(&[]).has(&[WEB, WEB_1, WEB_2]);
    let mut agent = Agent::start(&["--kubeconfig=/nonexistent/kubeconfig"]);
    assert!(!agent.ends().success());
    assert!(agent.log().contains("cannot use the kubeconfig /nonexistent/kubeconfig"), "{}", agent.log());
    assert_eq!(ipvs().len(), 3);
}

/// An agent for a cluster whose Service `web` has an endpoint that answers, beside other virtual servers.
fn answering(cluster: &Cluster, others: &[&str], flags: &[&str]) -> (Agent, TcpListener) {
    link::add_addresses("lo", &["10.0.0.1", "10.0.0.2"]).unwrap();
    let listener = TcpListener::bind("0.0.0.0:8080").unwrap();
    cluster.apply(node()).apply(service("web", "10.96.0.10")).apply(slice("web-1", "web", &["10.0.0.1"]));
    let mut agent = cluster.agent(flags);
    agent.has(&[&[WEB, WEB_1], others].concat()).says("audited");
    agent.until("be healthy", |_| health() == Some((200, 200)));
    (agent, listener)
}

/// The status of `/healthz` and of `/livez`.
fn health() -> Option<(u16, u16)> {
    Some((get(HEALTH, "/healthz")?.status, get(HEALTH, "/livez")?.status))
}

/// Does something while clients connect to the Service without end. None may fail.
fn clients_go_on(listener: &TcpListener, action: impl FnOnce()) {
    let (is_over, begun) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            listener.set_nonblocking(true).unwrap();
            while !is_over.load(Ordering::Relaxed) {
                drop(listener.accept());
                thread::sleep(Duration::from_millis(1));
            }
        });
        let client = scope.spawn(|| {
            let mut failed = Vec::new();
            while !is_over.load(Ordering::Relaxed) {
                let address = "10.96.0.10:80".parse().unwrap();
                failed.extend(TcpStream::connect_timeout(&address, LIMIT).err());
                begun.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(20));
            }
            failed
        });
        let result = catch_unwind(AssertUnwindSafe(|| {
            action();
            lab::wait::until("connect", || begun.load(Ordering::Relaxed) > 10).unwrap();
        }));
        is_over.store(true, Ordering::Relaxed);
        let failed = client.join().unwrap();
        if let Err(panic) = result {
            resume_unwind(panic);
        }
        assert!(failed.is_empty(), "{} of {begun:?}: {failed:?}", failed.len());
    });
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_resource_forbidden_from_the_start_makes_the_node_unhealthy() {
    isolate().unwrap();
    let cluster = Cluster::with_web();
    cluster.server.forbid(Some("endpointslices"));
    let mut agent = cluster.agent(&["--ipvs-sync-period=2s"]);
    agent.says("watch of endpointslices").says("system:node-proxier");
    agent.until("be unhealthy, for a Service waits", |_| health() == Some((503, 200)));
    assert_eq!(ipvs().len(), 0);
    cluster.server.recover();
    agent.has(&[WEB, WEB_1, WEB_2]);
    agent.until("be healthy", |_| health() == Some((200, 200)));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_resource_that_becomes_forbidden_changes_nothing() {
    isolate().unwrap();
    let cluster = Cluster::new();
    let (mut agent, listener) = answering(&cluster, &[], &["--ipvs-sync-period=1s"]);
    clients_go_on(&listener, || {
        cluster.server.forbid(Some("services"));
        cluster.server.end_watches();
        agent.says("watch of services").says("system:node-proxier");
        // Other kinds go on.
        cluster.apply(slice("web-1", "web", &["10.0.0.1", "10.0.0.2"]));
        agent.has(&[WEB, WEB_1, WEB_2]);
        // A change that waits is unhealthy after two sync periods.
        agent.audits(3);
        assert_eq!((health(), ipvs().len()), (Some((200, 200)), 3), "nothing that is known waits");
        assert!(metric("kube_ipvs_watch_errors_total").unwrap() >= 1.0);
    });
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn objects_missing_from_the_list_after_a_410_are_removed() {
    isolate().unwrap();
    let cluster = Cluster::new();
    cluster.apply(service("other", "10.96.0.11"));
    let (mut agent, listener) = answering(&cluster, &["-A -t 10.96.0.11:80 -s rr"], &[]);
    clients_go_on(&listener, || {
        cluster.server.break_watches();
        cluster.server.delete("Service", "default", "other");
        cluster.server.compact();
        cluster.server.expire_watches();
        agent.has(&[WEB, WEB_1]);
    });
    assert!(metric("kube_ipvs_watch_restarts_total").unwrap() >= 1.0);
    assert_eq!(health(), Some((200, 200)));
}

/// The reasons of the Events of an object, once there are these.
fn told(agent: &mut Agent, cluster: &Cluster, kind: &str, name: &str, reason: &str) -> Value {
    let find = || {
        let events = cluster.server.events();
        events.into_iter().find(|event| {
            let regarding = &event["regarding"];
            regarding["kind"] == kind && regarding["name"] == name && event["reason"] == reason
        })
    };
    agent.until(&format!("say {reason} of {kind} {name}"), |_| find().is_some());
    find().unwrap()
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn clashes_taken_ports_and_repeated_failures_are_service_events() {
    isolate().unwrap();
    let cluster = Cluster::new();
    let taken = TcpListener::bind("0.0.0.0:31777").unwrap();
    cluster.apply(node());
    // `web` is first by name, and so has the address.
    cluster.apply(service("web", "10.96.0.10")).apply(service("zoo", "10.96.0.10"));
    let checked = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31777});
    cluster.apply(with(service("checked", "10.96.0.12"), json!({"spec": checked})));
    let mut agent = cluster.agent(&["--ipvs-sync-period=200ms"]);
    let clash = told(&mut agent, &cluster, "Service", "zoo", "FrontEndTaken");
    assert!(clash["note"].as_str().unwrap().contains("belongs to Service default/web"), "{clash}");
    let port = told(&mut agent, &cluster, "Service", "checked", "FailedToStartServiceHealthcheck");
    assert_eq!((&port["action"], &port["type"]), (&"Listen".into(), &"Warning".into()), "{port}");
    drop(taken);

    fs::write("/proc/sys/net/ipv6/conf/kube-ipvs0/disable_ipv6", "1").unwrap();
    cluster.apply(service("six", "fd00:96::10"));
    let failed = told(&mut agent, &cluster, "Service", "six", "ProgrammingFailed");
    assert!(failed["note"].as_str().unwrap().contains("fd00:96::10"), "{failed}");
    // That one Service fails does not make the node unhealthy.
    assert_eq!(health(), Some((200, 200)));
    assert!(metric("kube_ipvs_failing").unwrap() >= 1.0);
    assert!(metric("kube_ipvs_operation_failures_total{object=\"address\"}").unwrap() >= 2.0);
    // Not again and again.
    agent.audits(5);
    let events = cluster.server.events();
    let same = events.iter().filter(|event| event["reason"] == "ProgrammingFailed").count();
    assert_eq!(same, 1, "{events:#?}");
}

/// Of a list of 100 MB an object at a time is looked at, or a page of them.
fn a_list_of_100_mb_takes_little_memory(streaming: Streaming) {
    isolate().unwrap();
    let cluster = Cluster::with_web();
    cluster.server.streaming(streaming);
    for number in 0..8_000 {
        cluster.server.apply(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("s{number}"), "namespace": "many"},
            "spec": {"type": "ExternalName", "externalName": "example.org"},
        }));
    }
    cluster.server.pad(12_500);
    let mut agent = cluster.agent(&[]);
    agent.has(&[WEB, WEB_1, WEB_2]);
    let peak = agent.peak_memory();
    println!("{} MiB at the most", peak >> 20);
    assert!(peak < 64 << 20, "{} MiB", peak >> 20);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_list_of_100_mb_takes_no_more_memory_than_a_page_of_it() {
    a_list_of_100_mb_takes_little_memory(Streaming::Refused(422));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_streamed_list_of_100_mb_takes_no_more_memory_than_an_object() {
    a_list_of_100_mb_takes_little_memory(Streaming::Yes);
}

/// A watch that has been silent for the length of a watch and 5 s more is made anew. That this takes a minute is tested in
/// `crates/service-watch/tests/sources` with a clock that is put forward.
#[cfg(feature = "fault-points")]
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_silent_api_server_is_noticed_and_changes_nothing() {
    isolate().unwrap();
    let cluster = Cluster { is_impatient: true, ..Cluster::new() };
    let (mut agent, listener) = answering(&cluster, &[], &["--ipvs-sync-period=300ms"]);
    clients_go_on(&listener, || {
        cluster.server.silence();
        cluster.apply(slice("web-1", "web", &["10.0.0.1", "10.0.0.2"]));
        // A change that waits is unhealthy after two sync periods.
        agent.audits(3);
        assert_eq!((health(), ipvs().len()), (Some((200, 200)), 2), "nothing was heard of, so nothing waits");
        // Open watches stay silent; whoever asks anew is answered.
        cluster.server.recover();
        agent.until("hear of the other endpoint", |_| ipvs().len() >= 3);
    });
    agent.has(&[WEB, WEB_1, WEB_2]);
}

#[cfg(feature = "fault-points")]
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn an_api_server_restored_from_a_backup_is_followed_when_it_is_back() {
    isolate().unwrap();
    let cluster = Cluster { is_impatient: true, ..Cluster::new() };
    let (mut agent, listener) = answering(&cluster, &[], &["--ipvs-sync-period=300ms", "-v=4"]);
    // Its versions were far ahead.
    for _ in 0..100 {
        cluster.apply(node());
    }
    clients_go_on(&listener, || {
        cluster.server.refuse();
        // Each kind after some attempts.
        for kind in ["services", "endpointslices"] {
            agent.until(&format!("give up the versions of {kind}"), |agent| {
                agent.log().lines().any(|line| line.contains(": relisting") && line.contains(kind))
            });
        }
        agent.audits(3);
        assert_eq!((health(), ipvs().len()), (Some((200, 200)), 2), "{}", agent.log());
        cluster.server.reset();
        let endpoints = slice("web-9", "web", &["10.0.0.2", "10.0.0.1"]);
        cluster.apply(node()).apply(service("web", "10.96.0.10")).apply(endpoints);
        cluster.server.recover();
        agent.until("hear of the other endpoint", |_| ipvs().len() >= 3);
    });
    agent.has(&[WEB, WEB_1, WEB_2]);
    assert_eq!(health(), Some((200, 200)));
}

/// Tools write tokens with a line break at the end, and kubectl takes them.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_kubeconfig_rewritten_in_another_style_is_taken() {
    isolate().unwrap();
    let cluster = Cluster::new();
    cluster.apply(node()).apply(service("web", "10.96.0.10")).apply(slice("web-1", "web", &["10.0.0.1"]));
    cluster.server.require_token("secret");
    let text = fs::read_to_string(cluster.kubeconfig()).unwrap();
    let address = text.split("http://").nth(1).and_then(|rest| rest.split('"').next()).unwrap().to_owned();
    let write = |server: &str, user: &str| {
        let text = format!(
            "current-context: c\nclusters: [{{name: c, cluster: {{server: '{server}'}}}}]\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\nusers: [{{name: u, user: {user}}}]\n---\n"
        );
        fs::write(cluster.dir.path().join("new"), text).unwrap();
        fs::rename(cluster.dir.path().join("new"), cluster.kubeconfig()).unwrap();
    };
    write(&format!("http://{address}"), "{token: secret}");
    let mut agent = cluster.agent(&[]);
    agent.has(&[WEB, WEB_1]);
    for (server, user) in [
        (format!("http://{address}"), "{token: \"secret\\n\"}"),
        (address.clone(), "{token: \"secret\\r\\n\"}"),
        (format!("HTTP://{address}/"), "{token: wrong, tokenFile: token}"),
    ] {
        fs::write(cluster.dir.path().join("token"), "secret\n").unwrap();
        let lines = agent.lines();
        write(&server, user);
        agent.says_after(lines, "the kubeconfig or a certificate of the API server has changed: restarting with it");
        agent.says_after(lines, "taking Services from an API server");
        cluster.apply(slice("web-1", "web", &["10.0.0.1", "10.0.0.2"]));
        agent.has(&[WEB, WEB_1, WEB_2]);
        cluster.apply(slice("web-1", "web", &["10.0.0.1"]));
        agent.has(&[WEB, WEB_1]);
    }
    assert!(!agent.log().contains("secret"), "{}", agent.log());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_proxy_in_the_environment_is_not_for_this_machine() {
    isolate().unwrap();
    let cluster = Cluster::new();
    cluster.apply(node()).apply(service("web", "10.96.0.10"));
    cluster.server.listen_over_tls_in_thread().unwrap().write_kubeconfig(cluster.dir.path(), "any");
    let mut command = Agent::command();
    command.env("HTTPS_PROXY", "http://10.9.9.9:3128").env("http_proxy", "http://10.9.9.9:3128");
    command.arg(format!("--kubeconfig={}", cluster.kubeconfig().display()));
    let mut agent = Agent::start_command(&mut command);
    agent.has(&[WEB]);
}

/// A cluster whose API server wants TLS and a token, and an agent that follows it.
fn with_token() -> (Cluster, TlsListener, Agent) {
    isolate().unwrap();
    let cluster = Cluster::new();
    cluster.apply(node()).apply(service("web", "10.96.0.10")).apply(slice("web-1", "web", &["10.0.0.1"]));
    let tls = cluster.server.listen_over_tls_in_thread().unwrap();
    cluster.server.require_token("one");
    tls.write_kubeconfig(cluster.dir.path(), "one");
    let mut agent = cluster.agent(&[]);
    agent.has(&[WEB, WEB_1]);
    (cluster, tls, agent)
}

/// It is known by its file, so that nobody has to fail first.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_rotated_ca_certificate_is_used() {
    let (cluster, tls, mut agent) = with_token();
    tls.replace_ca();
    tls.write_kubeconfig(cluster.dir.path(), "one");
    cluster.server.break_watches();
    agent.says("the kubeconfig or a certificate of the API server has changed: restarting with it");
    cluster.apply(slice("web-1", "web", &["10.0.0.1", "10.0.0.2"]));
    agent.has(&[WEB, WEB_1, WEB_2]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_rotated_token_is_used_at_once() {
    let (cluster, tls, mut agent) = with_token();
    cluster.server.require_token("two");
    tls.write_kubeconfig(cluster.dir.path(), "two");
    cluster.server.break_watches();
    cluster.apply(slice("web-1", "web", &["10.0.0.2"]));
    agent.has(&[WEB, WEB_2]);
}
