//! An API server with every kind of fault: the state converges, and no existing object is deleted meanwhile.

use std::collections::BTreeMap;
use std::time::Duration;

use kube::Client;
use service_watch::{ApiServer, ExistingState, Kind, Source, Subject};
use test_apiserver::{Server, Streaming};
use tokio::time::Instant;

use crate::common::{Listener, listen, service, slice};

const MINUTE: Duration = Duration::from_secs(60);

fn running(server: &Server) -> Listener {
    for number in 0..20 {
        server.apply(service(&format!("s{number:02}"), &format!("10.96.0.{number}")));
        server.apply(slice(&format!("s{number:02}-1"), &format!("s{number:02}"), &["10.0.0.1"]));
    }
    listen(source(server))
}

fn source(server: &Server) -> Source {
    let client = Client::new(server.service(), "default");
    let source = ApiServer::with_client(client, "https://test", "node-a");
    Source::ApiServer(source.confirm_disappearance(ExistingState::default()))
}

/// The state after some changes, in short form.
#[derive(Debug, Default, PartialEq, Eq)]
struct Known(BTreeMap<String, String>);

impl Known {
    fn apply(&mut self, change: &str) {
        if let Some(gone) = change.strip_prefix('-') {
            let name = gone.strip_prefix("slice ").unwrap_or(gone);
            assert!(self.0.remove(name).is_some(), "{name} was deleted but not known");
        } else {
            let (name, _) = change.split_once(' ').unwrap_or((change, ""));
            self.0.insert(name.to_owned(), change.to_owned());
        }
    }

    async fn all(listener: &mut Listener) -> Self {
        let mut known = Self::default();
        listener.synced().await.iter().for_each(|change| known.apply(change));
        known
    }

    /// Applies changes until an object has this state; `None` if it is deleted.
    async fn until(&mut self, listener: &mut Listener, name: &str, last: Option<&str>) {
        while self.0.get(name).map(String::as_str) != last {
            let change = listener.change().await;
            self.apply(&change);
        }
    }
}

/// Services are created, changed and deleted while the server has a fault; then it recovers.
async fn converges_after_faults(streaming: Streaming, misbehave: impl Fn(&Server), duration: Duration) {
    let server = Server::new();
    server.streaming(streaming);
    let mut listener = running(&server);
    let mut known = Known::all(&mut listener).await;
    assert_eq!(known.0.len(), 40);
    misbehave(&server);
    for round in 0..3 {
        server.apply(service("s01", &format!("10.97.0.{round}")));
        server.delete("Service", "default", &format!("s1{round}"));
        server.apply(service(&format!("new{round}"), "10.96.1.1"));
        tokio::time::sleep(duration / 3).await;
    }
    server.recover();
    server.apply(service("s01", "10.97.0.9"));
    known.until(&mut listener, "s01", Some("s01 10.97.0.9")).await;
    known.until(&mut listener, "new2", Some("new2 10.96.1.1")).await;
    for gone in ["s10", "s11", "s12"] {
        known.until(&mut listener, gone, None).await;
    }
    // The state equals that of a new source.
    while let Ok(change) = tokio::time::timeout(5 * MINUTE, listener.change()).await {
        known.apply(&change);
    }
    let mut fresh = listen(source(&server));
    assert_eq!(known, Known::all(&mut fresh).await);
}

/// The name of a fault and how to cause it.
type FaultCase = (&'static str, fn(&Server));

const JSON: &str = "application/json";
const EMPTY: &str = r#"{"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "0"}, "items": []}"#;

const FAULTS: [FaultCase; 16] = [
    ("watches end", Server::end_watches),
    ("watches break off", Server::break_watches),
    ("watches expire", Server::expire_watches),
    ("watches are forgotten", |server| {
        server.break_watches();
        server.compact();
    }),
    ("events come twice, and old ones again", Server::repeat_events),
    ("what is no event", Server::send_garbage),
    ("stale lists", |server| {
        server.serve_stale_lists(5);
        server.compact();
        server.break_watches();
    }),
    ("stale lists with objects that are already known", |server| {
        server.serve_stale_lists(5);
        server.expire_watches();
    }),
    ("status 500", |server| {
        server.answer_with(None, 500, JSON, "{}");
        server.break_watches();
    }),
    ("status 429", |server| server.reject_with_429(2)),
    ("nonsense", |server| {
        server.answer_with(None, 200, JSON, "{\"kind\": [}");
        server.break_watches();
    }),
    ("another's page", |server| {
        server.answer_with(None, 200, "text/html", "<html>");
        server.break_watches();
    }),
    ("an empty list by error", |server| {
        server.answer_with(None, 200, JSON, EMPTY);
        server.expire_watches();
    }),
    ("slow drips", |server| {
        server.throttle(100, Duration::from_millis(500));
        server.expire_watches();
    }),
    ("silence", Server::silence),
    ("nobody listens", Server::refuse),
];

#[tokio::test(start_paused = true)]
async fn the_state_converges_after_every_kind_of_fault() {
    for (name, misbehave) in FAULTS {
        for streaming in [Streaming::Yes, Streaming::Refused(422)] {
            for duration in [Duration::from_secs(3), 3 * MINUTE] {
                println!("{name}, {streaming:?}, {duration:?}");
                converges_after_faults(streaming, misbehave, duration).await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn retry_after_is_respected_up_to_a_minute() {
    for (asked_for, at_least, at_most) in [(7, 7, 12), (3600, 50, 60)] {
        let server = Server::new();
        let mut listener = running(&server);
        listener.synced().await;
        server.reject_with_429(asked_for);
        // The first refusal is the answer to those who were cut off.
        while server.requests().iter().filter(|asked| asked.resource == "services").count() < 2 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let start = Instant::now();
        tokio::time::sleep(Duration::from_millis(500)).await;
        let asked = server.requests().len();
        while server.requests().len() == asked {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let left_alone = start.elapsed().as_secs();
        assert!((at_least - 1..at_most).contains(&left_alone), "{left_alone} s, asked for {asked_for}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_endless_response_is_aborted() {
    for streaming in [Streaming::Yes, Streaming::Refused(422)] {
        let server = Server::new();
        server.streaming(streaming);
        let mut listener = running(&server);
        listener.synced().await;
        server.respond_endlessly();
        server.compact();
        let report = loop {
            let report = listener.report().await;
            if report.subject == Subject::Watch(Kind::Service) && report.problems.iter().any(|it| it.contains("MiB")) {
                break report;
            }
        };
        assert!(report.problems[0].contains("the response exceeds 64 MiB"), "{report:?}");
        server.recover();
        server.apply(service("s01", "10.97.0.9"));
        while listener.change().await != "s01 10.97.0.9" {}
    }
}

/// Objects of about the maximum size that an API server accepts.
#[tokio::test(start_paused = true)]
async fn pages_of_very_large_objects_become_smaller() {
    let server = Server::new();
    server.streaming(Streaming::Refused(422));
    for number in 0..600 {
        server.apply(service(&format!("s{number:03}"), "10.96.0.1"));
    }
    server.pad(200_000);
    let mut listener = listen(source(&server));
    assert_eq!(listener.synced().await.len(), 600);
}
