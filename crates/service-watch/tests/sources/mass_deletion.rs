//! Confirmation of mass deletions.

use std::time::Duration;

use service_watch::{ApiServer, ExistingState, Source, Subject};
use test_apiserver::Server;
use tokio::time::Instant;

use crate::common::{Listener, listen, node, service, slice};

const SERVICES: u8 = 12;

fn source(server: &Server, serving: Option<ExistingState>) -> Source {
    let client = kube::Client::new(server.service(), "default");
    let source = ApiServer::with_client(client, "https://test", "node-a");
    Source::ApiServer(match serving {
        Some(serving) => source.confirm_disappearance(serving),
        None => source,
    })
}

fn fill(server: &Server) {
    for number in 0..SERVICES {
        server.apply(service(&format!("s{number:02}"), &format!("10.96.0.{number}")));
        server.apply(slice(&format!("s{number:02}-1"), &format!("s{number:02}"), &["10.0.0.1"]));
    }
    server.apply(node("node-a", "z"));
}

fn empty(server: &Server) {
    for number in 0..SERVICES {
        server.delete("Service", "default", &format!("s{number:02}"));
        server.delete("EndpointSlice", "default", &format!("s{number:02}-1"));
    }
}

/// A listener whose server lost all objects during an outage and was then relisted.
async fn after_first_empty_list(server: &Server, serving: Option<ExistingState>) -> Listener {
    fill(server);
    let mut listener = listen(source(server, serving));
    listener.synced().await;
    server.refuse();
    tokio::time::sleep(Duration::from_secs(1)).await;
    empty(server);
    server.compact();
    server.recover();
    listener
}

/// The number of deletions after a relist, which sends the Node again.
async fn deletions(listener: &mut Listener) -> usize {
    let changes = listener.changes(2 * usize::from(SERVICES) + 1).await;
    changes.iter().filter(|change| change.starts_with('-')).count()
}

#[tokio::test(start_paused = true)]
async fn objects_that_a_second_list_has_again_are_not_deleted() {
    let server = Server::new();
    let mut listener = after_first_empty_list(&server, Some(ExistingState::default())).await;
    assert_eq!(listener.change().await, "node z");
    loop {
        let report = listener.report().await;
        if report
            .problems
            .iter()
            .any(|problem| problem.contains("0 entries where there were 12: it is read again in 5 s"))
        {
            break;
        }
    }
    listener.unchanged(Duration::from_secs(1)).await;
    fill(&server);
    let changes = listener.changes(2 * usize::from(SERVICES)).await;
    assert!(!changes.iter().any(|change| change.starts_with('-')), "{changes:?}");
}

#[tokio::test(start_paused = true)]
async fn objects_that_a_second_list_lacks_too_are_deleted() {
    let server = Server::new();
    let mut listener = after_first_empty_list(&server, Some(ExistingState::default())).await;
    let start = Instant::now();
    assert_eq!(deletions(&mut listener).await, 2 * usize::from(SERVICES));
    assert!(start.elapsed() >= Duration::from_secs(5), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn without_confirmation_the_first_list_deletes() {
    let server = Server::new();
    let mut listener = after_first_empty_list(&server, None).await;
    assert_eq!(deletions(&mut listener).await, 2 * usize::from(SERVICES));
    let is_confirmation = |problem: &String| problem.contains("read again");
    assert!(!listener.reports.iter().any(|report| report.problems.iter().any(is_confirmation)));
}

#[tokio::test(start_paused = true)]
async fn an_empty_first_list_is_confirmed_if_the_node_serves_many_vips() {
    let server = Server::new();
    let start = Instant::now();
    let mut listener = listen(source(&server, Some(ExistingState { vips: 20 })));
    for _ in 0..2 {
        let report = listener.report().await;
        assert!(matches!(report.subject, Subject::Watch(_)), "{report:?}");
        assert!(report.problems[0].contains("0 entries where there were 20"), "{report:?}");
    }
    fill(&server);
    assert_eq!(listener.synced().await.len(), 2 * usize::from(SERVICES) + 1);
    assert!(start.elapsed() >= Duration::from_secs(5), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_few_deletions_need_no_confirmation() {
    let server = Server::new();
    fill(&server);
    let mut listener = listen(source(&server, Some(ExistingState { vips: 12 })));
    listener.synced().await;
    server.delete("Service", "default", "s00");
    assert_eq!(listener.change().await, "-s00");
}

/// How the own Node disappears: by an event of the watch, or from the list.
async fn lose_own_node(server: &Server, by_list: bool) -> Listener {
    server.apply(node("node-a", "z"));
    server.apply(node("node-b", "z"));
    let mut listener = listen(source(server, Some(ExistingState::default())));
    listener.synced().await;
    if by_list {
        server.refuse();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    server.delete("Node", "", "node-a");
    if by_list {
        server.compact();
        server.recover();
    }
    listener
}

#[tokio::test(start_paused = true)]
async fn the_own_node_stays_if_it_is_back_at_the_second_look() {
    for by_list in [false, true] {
        let server = Server::new();
        let mut listener = lose_own_node(&server, by_list).await;
        while !listener.report().await.problems.iter().any(|it| it.contains("this agent's Node has disappeared")) {}
        server.apply(node("node-a", "y"));
        assert_eq!(listener.change().await, "node y", "{by_list}");
        listener.unchanged(Duration::from_secs(20)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_own_node_is_gone_if_the_second_look_finds_none() {
    for by_list in [false, true] {
        let server = Server::new();
        let start = Instant::now();
        let mut listener = lose_own_node(&server, by_list).await;
        assert_eq!(listener.change().await, "-node", "{by_list}");
        assert!(start.elapsed() >= Duration::from_secs(5), "{:?}", start.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_first_list_without_the_own_node_is_confirmed_on_a_serving_node() {
    for (vips, delay) in [(0, 0), (1, 5)] {
        let server = Server::new();
        let start = Instant::now();
        let mut listener = listen(source(&server, Some(ExistingState { vips })));
        assert!(listener.synced().await.is_empty());
        assert_eq!(start.elapsed().as_secs(), delay, "{vips}");
    }
}
