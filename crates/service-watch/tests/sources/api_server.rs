//! An API server as a source: against the test server, mostly on paused time.

use std::time::Duration;

use serde_json::json;
use service_watch::{ApiServer, Kind, Report, Source, Subject};
use test_apiserver::{Expiry, Server, Streaming, Verb};
use tokio::time::{Instant, sleep};

use crate::common::{Listener, labelled, listen, node, of_service, service, slice};

const MINUTE: Duration = Duration::from_secs(60);

fn source(server: &Server) -> Source {
    Source::ApiServer(api_server(server))
}

fn api_server(server: &Server) -> ApiServer {
    let client = kube::Client::new(server.service(), "default");
    ApiServer::with_client(client, "https://test", "node-a")
}

/// A server with one object of each kind and a source that has read them.
async fn running(server: &Server) -> Listener {
    server.apply(service("a", "10.96.0.1"));
    server.apply(slice("a-1", "a", &["10.0.0.1"]));
    server.apply(node("node-a", "z"));
    let mut listener = listen(source(server));
    assert_eq!(listener.synced().await, ["a 10.96.0.1", "a-1 of a: 10.0.0.1", "node z"]);
    assert_eq!(listener.reports, []);
    listener
}

async fn failure(listener: &mut Listener, kind: Kind) -> String {
    let report = listener.report().await;
    assert_eq!(report.subject, Subject::Watch(kind), "{report:?}");
    assert_eq!(report.problems.len(), 1, "{report:?}");
    report.problems[0].clone()
}

fn resolved(kind: Kind) -> Report {
    Report { subject: Subject::Watch(kind), problems: vec![] }
}

#[tokio::test(start_paused = true)]
async fn all_objects_come_before_synced_with_one_streaming_list_per_kind() {
    let server = Server::new();
    running(&server).await;
    for resource in ["services", "endpointslices", "nodes"] {
        assert_eq!((server.count(resource, Verb::StreamingList), server.count(resource, Verb::List)), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn requests_have_kube_proxys_selectors_and_the_nodes_name() {
    let server = Server::new();
    server.streaming(Streaming::Refused(422));
    running(&server).await;
    for asked in server.requests() {
        for part in match asked.resource.as_str() {
            "services" => {
                ["labelSelector=!service.kubernetes.io/service-proxy-name", "fieldSelector=spec.clusterIP!=None"]
            }
            "endpointslices" => ["labelSelector=!service.kubernetes.io/headless", ""],
            _ => ["fieldSelector=metadata.name=node-a", ""],
        } {
            assert!(asked.query.contains(part), "{asked:?}");
        }
        if asked.verb != Verb::List {
            assert!(asked.query.contains("allowWatchBookmarks=true"), "{asked:?}");
        }
    }
    for verb in [Verb::StreamingList, Verb::List, Verb::Watch] {
        assert_eq!(server.count("services", verb), 1, "{verb:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_missing_node_does_not_delay_synced_and_is_watched() {
    let server = Server::new();
    server.apply(node("node-b", "z"));
    let mut listener = listen(source(&server));
    assert_eq!(listener.synced().await, [""; 0]);
    server.apply(node("node-b", "y"));
    server.apply(node("node-a", "x"));
    assert_eq!(listener.change().await, "node x");
    server.delete("Node", "", "node-a");
    assert_eq!(listener.change().await, "-node");
}

#[tokio::test(start_paused = true)]
async fn all_nodes_are_watched_if_requested_and_deletions_are_found() {
    for streaming in [Streaming::Yes, Streaming::Refused(422)] {
        let server = Server::new();
        server.streaming(streaming);
        for (name, zone) in [("node-a", "z"), ("node-b", "z"), ("node-c", "z")] {
            server.apply(node(name, zone));
        }
        let mut listener = listen(Source::ApiServer(api_server(&server).watch_all_nodes(true)));
        assert_eq!(listener.synced().await, ["node z", "peer node-b", "peer node-c"]);
        assert!(
            server.requests().iter().all(|asked| !asked.query.contains("metadata.name")),
            "{:?}",
            server.requests()
        );
        server.apply(node("node-d", "y"));
        assert_eq!(listener.change().await, "peer node-d");
        server.delete("Node", "", "node-b");
        assert_eq!(listener.change().await, "-peer node-b");
        // Also what went while nobody watched: those after the own Node and before it.
        server.refuse();
        server.delete("Node", "", "node-c");
        server.delete("Node", "", "node-a");
        server.apply(node("node-0", "y"));
        server.compact();
        server.recover();
        let changes = listener.changes(4).await;
        assert_eq!(changes, ["-node", "-peer node-c", "peer node-0", "peer node-d"], "{streaming:?}");
        server.apply(node("node-a", "x"));
        assert_eq!(listener.change().await, "node x");
    }
}

#[tokio::test(start_paused = true)]
async fn an_invalid_address_of_a_peer_node_is_reported_until_it_is_deleted() {
    let server = Server::new();
    let mut odd = node("node-b", "z");
    odd["status"]["addresses"][0]["address"] = json!("nonsense");
    server.apply(odd);
    let mut listener = listen(Source::ApiServer(api_server(&server).watch_all_nodes(true)));
    assert_eq!(listener.synced().await, ["peer node-b"]);
    let report = listener.report().await;
    assert_eq!(report.subject, Subject::Node("node-b".into()));
    assert!(report.problems[0].contains("\"nonsense\" is no IP address"), "{report:?}");
    server.refuse();
    server.delete("Node", "", "node-b");
    server.compact();
    server.recover();
    assert_eq!(listener.change().await, "-peer node-b");
    let resolved = Report { subject: Subject::Node("node-b".into()), problems: vec![] };
    while listener.report().await != resolved {}
}

#[tokio::test(start_paused = true)]
async fn changes_are_sent_as_they_happen() {
    let server = Server::new();
    let mut listener = running(&server).await;
    server.apply(service("b", "10.96.0.2"));
    assert_eq!(listener.change().await, "b 10.96.0.2");
    server.apply(slice("a-1", "a", &["10.0.0.1", "10.0.0.2"]));
    assert_eq!(listener.change().await, "a-1 of a: 10.0.0.1,10.0.0.2");
    server.delete("Service", "default", "a");
    assert_eq!(listener.change().await, "-a");
    server.delete("EndpointSlice", "default", "a-1");
    assert_eq!(listener.change().await, "-slice a-1");
    listener.quiet(10 * MINUTE).await;
}

#[tokio::test(start_paused = true)]
async fn an_object_that_is_no_longer_served_is_deleted() {
    let server = Server::new();
    let mut listener = running(&server).await;
    let service_a = service("a", "10.96.0.1");
    server.apply(labelled(service_a.clone(), "service.kubernetes.io/service-proxy-name", "other"));
    assert_eq!(listener.change().await, "-a");
    server.apply(service_a);
    assert_eq!(listener.change().await, "a 10.96.0.1");
    server.apply(service("a", "None"));
    assert_eq!(listener.change().await, "-a");
    // No selector keeps these away.
    let mut external = service("a", "10.96.0.1");
    server.apply(external.clone());
    assert_eq!(listener.change().await, "a 10.96.0.1");
    external["spec"]["type"] = json!("ExternalName");
    server.apply(external);
    assert_eq!(listener.change().await, "-a");
    server.apply(labelled(slice("a-1", "a", &[]), "kubernetes.io/service-name", ""));
    assert_eq!(listener.change().await, "-slice a-1");
    server.apply(slice("a-1", "a", &[]));
    assert_eq!(listener.change().await, "a-1 of a: ");
    server.apply(labelled(slice("a-1", "a", &[]), "service.kubernetes.io/headless", ""));
    assert_eq!(listener.change().await, "-slice a-1");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_refuses_streaming_lists_gets_paged_lists() {
    for refusal in [400, 422] {
        let server = Server::new();
        server.streaming(Streaming::Refused(refusal));
        for i in 0..1100 {
            server.apply(service(&format!("s{i:04}"), "10.96.0.1"));
        }
        let mut listener = listen(source(&server));
        assert_eq!(listener.synced().await.len(), 1100);
        assert_eq!((listener.reports.len(), server.count("services", Verb::List)), (0, 3));
        server.delete("Service", "default", "s0700");
        assert_eq!(listener.change().await, "-s0700");
        // Listed anew, without asking again for what was refused.
        server.delete("Service", "default", "s0701");
        assert_eq!(listener.change().await, "-s0701");
        server.refuse();
        server.delete("Service", "default", "s0702");
        server.compact();
        server.recover();
        assert_eq!(listener.changes(1098).await[0], "-s0702");
        assert_eq!((server.count("services", Verb::StreamingList), server.count("services", Verb::List)), (1, 6));
    }
}

#[tokio::test(start_paused = true)]
async fn missing_support_for_streaming_lists_is_detected_within_a_minute() {
    let server = Server::new();
    server.streaming(Streaming::Unknown);
    server.apply(service("a", "10.96.0.1"));
    let start = Instant::now();
    // Said twice: in the list that never ends, and in the one that does.
    assert_eq!(listen(source(&server)).synced().await, ["a 10.96.0.1", "a 10.96.0.1"]);
    assert!(start.elapsed() < MINUTE, "{:?}", start.elapsed());
    assert_eq!((server.count("nodes", Verb::StreamingList), server.count("nodes", Verb::List)), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn objects_deleted_while_disconnected_are_deleted_by_the_relist() {
    for (streaming, gone) in [
        (Streaming::Yes, Expiry::Status),
        (Streaming::Yes, Expiry::Event),
        (Streaming::Refused(422), Expiry::Status),
        (Streaming::Refused(422), Expiry::Event),
    ] {
        let server = Server::new();
        server.streaming(streaming);
        server.expiry(gone);
        let mut listener = running(&server).await;
        server.refuse();
        sleep(MINUTE).await;
        server.delete("Service", "default", "a");
        server.delete("EndpointSlice", "default", "a-1");
        server.delete("Node", "", "node-a");
        server.apply(service("b", "10.96.0.2"));
        server.compact();
        server.recover();
        assert_eq!(listener.changes(4).await, ["-a", "-node", "-slice a-1", "b 10.96.0.2"], "{streaming:?} {gone:?}");
        server.apply(service("b", "10.96.0.3"));
        assert_eq!(listener.change().await, "b 10.96.0.3");
        assert!(!listener.reports.iter().any(|report| report.problems.iter().any(|problem| problem.contains("410"))));
    }
}

#[tokio::test(start_paused = true)]
async fn an_expired_watch_is_relisted_without_a_report() {
    let server = Server::new();
    let mut listener = running(&server).await;
    let start = Instant::now();
    server.compact();
    server.expire_watches();
    server.delete("Service", "default", "a");
    assert_eq!(listener.changes(3).await, ["-a", "a-1 of a: 10.0.0.1", "node z"]);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    listener.quiet(5 * MINUTE).await;
}

#[tokio::test(start_paused = true)]
async fn an_ended_watch_is_resumed_at_once_without_losing_changes() {
    let server = Server::new();
    let mut listener = running(&server).await;
    for (i, break_off) in [Server::end_watches, Server::break_watches].into_iter().enumerate() {
        sleep(MINUTE / 2).await;
        let start = Instant::now();
        break_off(&server);
        server.delete("Service", "default", "a");
        server.apply(service("a", &format!("10.96.1.{i}")));
        assert_eq!(listener.change().await, "-a");
        assert_eq!(listener.change().await, format!("a 10.96.1.{i}"));
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    }
    assert_eq!((server.count("services", Verb::StreamingList), server.count("services", Verb::List)), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_silent_connection_times_out_within_a_minute() {
    let server = Server::new();
    let mut listener = running(&server).await;
    sleep(MINUTE / 6).await;
    let start = Instant::now();
    server.silence();
    server.apply(service("b", "10.96.0.2"));
    server.recover();
    assert_eq!(listener.change().await, "b 10.96.0.2");
    assert!(start.elapsed() < MINUTE, "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_unresponsive_server_is_reported_within_a_minute_and_retried() {
    let server = Server::new();
    server.silence();
    server.apply(service("a", "10.96.0.1"));
    let start = Instant::now();
    let mut listener = listen(source(&server));
    let kinds = [listener.report().await, listener.report().await, listener.report().await];
    assert!(start.elapsed() < MINUTE, "{:?}", start.elapsed());
    assert!(kinds.iter().all(|report| report.problems[0].contains("no response within 50 s")), "{kinds:?}");
    server.recover();
    assert_eq!(listener.synced().await, ["a 10.96.0.1"]);
}

#[tokio::test(start_paused = true)]
async fn a_list_that_stalls_times_out_within_a_minute() {
    for streaming in [Streaming::Yes, Streaming::Refused(422)] {
        let server = Server::new();
        server.streaming(streaming);
        let mut listener = running(&server).await;
        server.compact();
        server.expire_watches();
        server.stall();
        server.delete("Service", "default", "a");
        let start = Instant::now();
        sleep(MINUTE / 6).await;
        server.recover();
        assert_eq!(listener.changes(3).await[0], "-a");
        assert!(start.elapsed() < MINUTE, "{:?}", start.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn forbidden_is_reported_once_with_advice_and_resolved_when_allowed() {
    let server = Server::new();
    server.apply(service("a", "10.96.0.1"));
    server.forbid(Some("endpointslices"));
    let source = source(&server);
    let counters = source.counters();
    let mut listener = listen(source);
    let problem = failure_after_changes(&mut listener, Kind::EndpointSlice).await;
    for part in ["https://test", "not allowed to list and watch endpointslices", "system:node-proxier"] {
        assert!(problem.contains(part), "{problem}");
    }
    // It is retried repeatedly, reported once, and not synced.
    listener.quiet(5 * MINUTE).await;
    assert!(server.count("endpointslices", Verb::StreamingList) > 5);
    assert_eq!(counters.errors(), server.count("endpointslices", Verb::StreamingList) as u64);
    server.recover();
    assert_eq!(listener.synced().await, [""; 0]);
    assert_eq!(listener.reports, [resolved(Kind::EndpointSlice)]);
}

/// The next report, whatever changes come before it.
async fn failure_after_changes(listener: &mut Listener, kind: Kind) -> String {
    assert_eq!(listener.change().await, "a 10.96.0.1");
    failure(listener, kind).await
}

#[tokio::test(start_paused = true)]
async fn retries_back_off_exponentially() {
    let server = Server::new();
    server.refuse();
    let _listener = listen(source(&server));
    sleep(Duration::from_secs(5)).await;
    let early = server.requests().len();
    sleep(10 * MINUTE).await;
    let late = server.requests().len() - early;
    // Three kinds: a quick second attempt and some more at first, then one in 30 to 60 s.
    assert!((9..=18).contains(&early), "{early}");
    assert!((27..=63).contains(&late), "{late}");
}

#[tokio::test(start_paused = true)]
async fn an_error_never_deletes_known_objects() {
    let html = "<html><body>Welcome to the login page</body></html>";
    // Lists with something wrong in them, and then their end.
    let list_end = r#"{"type": "BOOKMARK", "object": {"kind": "Service", "apiVersion": "v1", "metadata":
        {"resourceVersion": "3", "annotations": {"k8s.io/initial-events-end": "true"}}}}"#;
    let list_end = list_end.replace('\n', " ");
    let garbled = format!("{}\n{list_end}\n", r#"{"type": "ADDED", "object": 7}"#);
    let failed = r#"{"type": "ERROR", "object": {"kind": "Status", "code": 500, "message": "no leader"}}"#;
    let failed = format!("{failed}\n{list_end}\n");
    for (status, kind, body) in [
        (200, "text/html", html),
        (502, "text/html", html),
        (200, "application/json", garbled.as_str()),
        (200, "application/json", failed.as_str()),
        (200, "application/json", "{}"),
        (200, "application/json", r#"{"items": [], "metadata": {}}"#),
        (500, "application/json", r#"{"kind": "Status", "code": 500, "message": "etcdserver: no leader"}"#),
        (401, "application/json", r#"{"kind": "Status", "code": 401, "message": "Unauthorized"}"#),
        (404, "text/plain", "404 page not found"),
        (429, "text/plain", "too many requests"),
        (504, "application/json", r#"{"kind": "Status", "code": 504, "message": "Too large resource version: 9"}"#),
    ] {
        for (streaming, end) in [
            (Streaming::Yes, Server::end_watches as fn(&Server)),
            (Streaming::Yes, Server::expire_watches),
            (Streaming::Refused(422), Server::end_watches),
            (Streaming::Refused(422), Server::expire_watches),
        ] {
            let server = Server::new();
            server.streaming(streaming);
            let mut listener = running(&server).await;
            end(&server);
            server.answer_with(None, status, kind, body);
            sleep(5 * MINUTE).await;
            server.delete("Service", "default", "a");
            server.recover();
            // Whether by a new list or by the rest of the watch: not a word that anything else was gone.
            loop {
                match listener.change().await.as_str() {
                    "-a" => break,
                    change => assert!(!change.starts_with('-'), "{status} {body}: {change}"),
                }
            }
            let named = listener.reports.iter().any(|report| {
                report.subject == Subject::Watch(Kind::Service)
                    && report.problems.iter().any(|p| p.contains("https://test") && p.contains("services"))
            });
            assert!(named, "{status} {body}: {:?}", listener.reports);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_unknown_resource_version_leads_to_a_relist() {
    // As after a server was restored from a backup.
    let server = Server::new();
    let mut listener = running(&server).await;
    let too_large =
        r#"{"kind": "Status", "code": 504, "message": "Timeout: Too large resource version: 9, current: 3"}"#;
    server.answer_with(Some("services"), 504, "application/json", too_large);
    server.end_watches();
    assert!(failure(&mut listener, Kind::Service).await.contains("504"));
    server.recover();
    assert_eq!(listener.change().await, "a 10.96.0.1");
    assert_eq!(server.count("services", Verb::StreamingList), 2);
}

#[tokio::test(start_paused = true)]
async fn an_html_response_is_reported_as_not_an_api_server() {
    let server = Server::new();
    server.streaming(Streaming::Refused(422));
    let mut listener = running(&server).await;
    server.compact();
    server.answer_with(Some("services"), 200, "text/html", "<html>\n<body>hello</body>\n</html>");
    server.end_watches();
    let problem = failure(&mut listener, Kind::Service).await;
    assert!(
        problem.contains("not what an API server sends") && problem.contains("check that the address"),
        "{problem}"
    );
    listener.quiet(5 * MINUTE).await;
}

#[tokio::test(start_paused = true)]
async fn a_refused_connection_and_its_recovery_are_reported() {
    let server = Server::new();
    let mut listener = running(&server).await;
    server.refuse();
    let mut kinds = Vec::new();
    while kinds.len() < 3 {
        let report = listener.report().await;
        let problem = report.problems.first().expect("it has not recovered");
        assert!(problem.contains("check the address") && problem.contains("https://test"), "{problem}");
        if problem.contains("refused") {
            kinds.push(report.subject);
        }
    }
    kinds.sort();
    assert_eq!(kinds, [Kind::Service, Kind::EndpointSlice, Kind::Node].map(Subject::Watch));
    listener.quiet(Duration::from_secs(5)).await;
    server.recover();
    let mut ended = vec![listener.report().await, listener.report().await, listener.report().await];
    ended.sort_by(|a, b| a.subject.cmp(&b.subject));
    assert_eq!(ended, [resolved(Kind::Service), resolved(Kind::EndpointSlice), resolved(Kind::Node)]);
    listener.quiet(5 * MINUTE).await;
}

#[tokio::test(start_paused = true)]
async fn a_long_outage_leads_to_a_relist() {
    let server = Server::new();
    let mut listener = running(&server).await;
    server.refuse();
    while server.count("endpointslices", Verb::Watch) == 0 {
        sleep(Duration::from_secs(1)).await;
    }
    sleep(MINUTE).await;
    // Its versions are not beyond those that are known, and nothing says that they mean other things.
    let lists = server.count("endpointslices", Verb::StreamingList);
    server.reset();
    server.apply(node("node-a", "z9"));
    server.recover();
    sleep(2 * MINUTE).await;
    assert!(server.count("endpointslices", Verb::StreamingList) > lists);
    while !listener.change().await.contains("z9") {}
}

#[tokio::test(start_paused = true)]
async fn bookmarks_avoid_a_relist() {
    let server = Server::new();
    let mut listener = running(&server).await;
    // Other objects move the version on; without a bookmark the watch would be resumed from before that.
    let mut version = 0;
    for i in 0..10 {
        version = server.apply(node("node-b", &format!("z{i}")));
    }
    server.bookmark();
    sleep(Duration::from_secs(1)).await;
    server.compact();
    server.end_watches();
    server.apply(service("b", "10.96.0.2"));
    assert_eq!(listener.change().await, "b 10.96.0.2");
    let resumed = server.requests().into_iter().rfind(|asked| asked.resource == "services").unwrap();
    assert!(resumed.query.contains(&format!("resourceVersion={version}")), "{resumed:?}");
    assert_eq!((server.count("services", Verb::StreamingList), server.count("services", Verb::List)), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_ends_every_watch_at_once_is_not_flooded() {
    let server = Server::new();
    let listener = running(&server).await;
    let before = server.count("services", Verb::Watch);
    let end = Instant::now() + Duration::from_secs(20);
    while Instant::now() < end {
        server.end_watches();
        sleep(Duration::from_millis(5)).await;
    }
    let asked = server.count("services", Verb::Watch) - before;
    assert!((15..=21).contains(&asked), "{asked} watches in 20 s");
    drop(listener);
}

#[tokio::test(start_paused = true)]
async fn an_invalid_object_does_not_affect_others() {
    let server = Server::new();
    let mut odd = service("odd", "10.96.0.9");
    odd["spec"]["ports"] = json!([{ "port": "x" }, { "port": 443 }]);
    server.apply(odd.clone());
    let mut broken = service("broken", "10.96.0.8");
    broken["spec"]["clusterIP"] = json!({});
    server.apply(broken);
    let mut listener = running_with(&server, &["a 10.96.0.1", "incomplete", "odd 10.96.0.9"]).await;
    listener.reports.sort_by(|a, b| a.subject.cmp(&b.subject));
    let reports = std::mem::take(&mut listener.reports);
    assert_eq!(reports.len(), 2, "{reports:?}");
    assert!(of_service(&reports[0], "broken") && of_service(&reports[1], "odd"), "{reports:?}");
    assert!(reports[0].problems[1].contains("nothing is removed"), "{reports:?}");
    assert!(reports[1].problems[0].contains("spec.ports[0].port is the text \"x\""), "{reports:?}");
    // Nothing is reported twice, and an object that becomes invalid keeps its last state, also after a new list.
    server.apply(odd.clone());
    assert_eq!(listener.change().await, "odd 10.96.0.9");
    odd["spec"]["clusterIP"] = json!("nonsense");
    server.apply(odd);
    let report = listener.report().await;
    assert!(
        of_service(&report, "odd") && report.problems.iter().any(|p| p.contains("last valid version stays in use")),
        "{report:?}"
    );
    server.compact();
    server.expire_watches();
    assert_eq!(listener.change().await, "a 10.96.0.1");
    listener.quiet(MINUTE).await;
    // With the object its report goes.
    server.delete("Service", "default", "odd");
    assert_eq!(listener.change().await, "-odd");
    assert_eq!(listener.report().await.problems, [""; 0]);
    server.refuse();
    server.delete("Service", "default", "broken");
    server.compact();
    server.recover();
    let mut resolved = false;
    loop {
        match listener.message().await {
            service_watch::Message::Report(report) if of_service(&report, "broken") => {
                assert_eq!(report.problems, [""; 0]);
                resolved = true;
            }
            service_watch::Message::Change(service_watch::Change::Incomplete(incomplete)) => {
                // With the last one that never made sense, nothing is missing any more.
                assert!(resolved && !incomplete);
                break;
            }
            _ => {}
        }
    }
}

async fn running_with(server: &Server, expected: &[&str]) -> Listener {
    server.apply(service("a", "10.96.0.1"));
    let mut listener = listen(source(server));
    assert_eq!(listener.synced().await, expected);
    listener
}

#[tokio::test(start_paused = true)]
async fn the_run_ends_when_the_sink_breaks() {
    let server = Server::new();
    server.apply(service("a", "10.96.0.1"));
    let Source::ApiServer(source) = source(&server) else { unreachable!() };
    let mut calls = 0;
    let run = source.run(|_| {
        calls += 1;
        std::ops::ControlFlow::Break(())
    });
    run.await.unwrap();
    assert_eq!(calls, 1);
}
