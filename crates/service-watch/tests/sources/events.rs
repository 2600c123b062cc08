//! Kubernetes Events: against the test server, on paused time.

use std::time::Duration;

use kube::Client;
use serde_json::{Value, json};
use service_watch::{ApiServer, Event, EventObject, EventRecorder, EventType, ObjectName};
use test_apiserver::{Server, Verb};
use tokio::time::sleep;

use crate::common::service;

const MINUTE: Duration = Duration::from_secs(60);

fn events(server: &Server) -> EventRecorder {
    let client = Client::new(server.service(), "default");
    ApiServer::with_client(client, "https://test", "node-a").event_recorder()
}

fn about_web(note: &str) -> Event {
    Event {
        regarding: EventObject::Service(ObjectName::new("shop", "web")),
        event_type: EventType::Warning,
        reason: "AddressInUse".into(),
        action: "RefuseAddress".into(),
        note: note.into(),
    }
}

fn notes(server: &Server) -> Vec<String> {
    server.events().iter().map(|event| event["note"].as_str().unwrap_or_default().to_owned()).collect()
}

#[tokio::test(start_paused = true)]
async fn an_event_of_a_service_is_posted_with_its_uid_in_its_namespace() {
    let server = Server::new();
    for (namespace, uid) in [("default", "1-2-3"), ("shop", "4-5-6")] {
        let mut web = service("web", "10.96.0.1");
        web["metadata"]["namespace"] = json!(namespace);
        web["metadata"]["uid"] = json!(uid);
        server.apply(web);
    }
    events(&server).publish(about_web("10.0.0.1 is an address of the Node node-b"));
    sleep(MINUTE).await;
    let posted = server.events();
    assert_eq!(posted.len(), 1);
    let event = &posted[0];
    assert_eq!(
        event["regarding"],
        json!({ "apiVersion": "v1", "kind": "Service", "name": "web", "namespace": "shop", "uid": "4-5-6" })
    );
    assert_eq!(event["metadata"]["namespace"], "shop");
    for (field, value) in [
        ("type", "Warning"),
        ("reason", "AddressInUse"),
        ("action", "RefuseAddress"),
        ("note", "10.0.0.1 is an address of the Node node-b"),
        ("reportingController", "kube-ipvs"),
        ("reportingInstance", "node-a"),
    ] {
        assert_eq!(event[field], value, "{event}");
    }
    assert!(event["eventTime"].is_string(), "{event}");
}

#[tokio::test(start_paused = true)]
async fn an_event_of_the_node_is_posted_in_the_default_namespace() {
    let server = Server::new();
    let event = Event {
        regarding: EventObject::Node,
        event_type: EventType::Normal,
        reason: "Starting".into(),
        action: "StartKubeIpvs".into(),
        note: String::new(),
    };
    events(&server).publish(event);
    sleep(MINUTE).await;
    let posted = server.events();
    let uid_as_kubelet = json!({ "apiVersion": "v1", "kind": "Node", "name": "node-a", "uid": "node-a" });
    assert_eq!((&posted[0]["regarding"], &posted[0]["type"]), (&uid_as_kubelet, &json!("Normal")));
    assert_eq!(posted[0]["metadata"]["namespace"], "default");
}

#[tokio::test(start_paused = true)]
async fn equal_events_are_posted_once_in_ten_minutes_and_notes_differ() {
    let server = Server::new();
    let events = events(&server);
    for _ in 0..5 {
        events.publish(about_web("a"));
        events.clone().publish(about_web("b"));
        sleep(MINUTE).await;
    }
    assert_eq!(notes(&server), ["a", "b"]);
    sleep(6 * MINUTE).await;
    events.publish(about_web("a"));
    sleep(MINUTE).await;
    assert_eq!(notes(&server), ["a", "b", "a"]);
    assert!(server.events().iter().all(|event| event["series"] == Value::Null));
    assert_eq!(events.dropped(), 0);
}

#[tokio::test(start_paused = true)]
async fn many_events_are_rate_limited_and_too_many_are_dropped() {
    let server = Server::new();
    let events = events(&server);
    for i in 0..150 {
        events.publish(about_web(&format!("{i}")));
    }
    assert_eq!(events.dropped(), 50);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(notes(&server).len(), 10);
    sleep(MINUTE).await;
    assert_eq!(notes(&server).len(), 20);
    sleep(10 * MINUTE).await;
    assert_eq!(notes(&server).len(), 100);
    // What was dropped is news when it comes again.
    events.publish(about_web("149"));
    sleep(MINUTE).await;
    assert_eq!(notes(&server).last().map(String::as_str), Some("149"));
}

#[tokio::test(start_paused = true)]
async fn an_event_is_retried_during_a_short_outage() {
    let server = Server::new();
    server.refuse();
    let events = events(&server);
    events.publish(about_web("a"));
    sleep(MINUTE / 2).await;
    server.silence();
    sleep(MINUTE / 2).await;
    server.recover();
    sleep(2 * MINUTE).await;
    assert_eq!((notes(&server), events.dropped()), (vec!["a".to_owned()], 0));
    // But not for ever.
    server.refuse();
    events.publish(about_web("b"));
    sleep(5 * MINUTE).await;
    assert_eq!(events.dropped(), 1);
    server.recover();
    events.publish(about_web("b"));
    sleep(MINUTE).await;
    assert_eq!(notes(&server), ["a", "b"]);
}

#[tokio::test(start_paused = true)]
async fn a_forbidden_event_is_not_retried() {
    let server = Server::new();
    server.forbid(Some("events"));
    let events = events(&server);
    events.publish(about_web("a"));
    events.publish(about_web("b"));
    sleep(5 * MINUTE).await;
    assert_eq!((events.dropped(), server.count("events", Verb::Post)), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_long_note_is_truncated_between_characters() {
    let server = Server::new();
    events(&server).publish(about_web(&format!("x{}", "ä".repeat(1000))));
    sleep(MINUTE).await;
    assert_eq!(notes(&server)[0].len(), 1023);
}
