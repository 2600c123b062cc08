//! Helpers for the tests of both sources.

use std::ops::ControlFlow;
use std::time::Duration;

use serde_json::{Value, json};
use service_watch::{Change, Error, Message, Report, Source, Subject};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinHandle;

/// A running source and its messages.
pub(crate) struct Listener {
    messages: UnboundedReceiver<Message>,
    pub(crate) task: JoinHandle<Result<(), Error>>,
    /// Reports met while waiting for changes.
    pub(crate) reports: Vec<Report>,
}

pub(crate) fn listen(source: Source) -> Listener {
    let (send, messages) = unbounded_channel();
    let task = tokio::spawn(source.run(move |message| {
        let messages = match message {
            Message::Changes(changes) => changes.into_iter().map(Message::Change).collect(),
            other => vec![other],
        };
        if messages.into_iter().all(|message| send.send(message).is_ok()) {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    }));
    Listener { messages, task, reports: Vec::new() }
}

impl Listener {
    pub(crate) async fn message(&mut self) -> Message {
        let message = tokio::time::timeout(Duration::from_secs(600), self.messages.recv()).await;
        message.expect("the source says something").expect("the source runs")
    }

    /// The next change, in short.
    pub(crate) async fn change(&mut self) -> String {
        loop {
            match self.message().await {
                Message::Report(report) => self.reports.push(report),
                Message::Change(change) => return short(&change),
                Message::Changes(_) => unreachable!("the sink has split them"),
            }
        }
    }

    /// The next changes, in short and sorted.
    pub(crate) async fn changes(&mut self, count: usize) -> Vec<String> {
        let mut changes = Vec::new();
        for _ in 0..count {
            changes.push(self.change().await);
        }
        changes.sort();
        changes
    }

    /// All changes up to and with `Synced`, sorted, without it.
    pub(crate) async fn synced(&mut self) -> Vec<String> {
        let mut changes = Vec::new();
        loop {
            match self.change().await.as_str() {
                "synced" => break,
                change => changes.push(change.to_owned()),
            }
        }
        changes.sort();
        changes
    }

    /// The next report.
    pub(crate) async fn report(&mut self) -> Report {
        if !self.reports.is_empty() {
            return self.reports.remove(0);
        }
        match self.message().await {
            Message::Report(report) => report,
            other => panic!("a report is due, not {other:?}"),
        }
    }

    /// Asserts that no change is sent for a while; keeps reports.
    pub(crate) async fn unchanged(&mut self, time: Duration) {
        let end = tokio::time::Instant::now() + time;
        while let Ok(message) = tokio::time::timeout_at(end, self.messages.recv()).await {
            match message {
                Some(Message::Report(report)) => self.reports.push(report),
                other => panic!("no change is due, not {other:?}"),
            }
        }
    }

    /// Asserts that no message is sent for a while.
    pub(crate) async fn quiet(&mut self, time: Duration) {
        if let Ok(message) = tokio::time::timeout(time, self.messages.recv()).await {
            panic!("nothing is due, not {message:?}");
        }
    }
}

/// A short text for a change.
pub(crate) fn short(change: &Change) -> String {
    match change {
        Change::Service(service) => format!("{} {}", service.name.name(), service.cluster_ips[0]),
        Change::ServiceDeleted(name) => format!("-{}", name.name()),
        Change::Slice(slice) => {
            let addresses: Vec<String> = slice.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
            format!("{} of {}: {}", slice.name.name(), slice.service.name(), addresses.join(","))
        }
        Change::SliceDeleted(name) => format!("-slice {}", name.name()),
        Change::Node(node) => format!("node {}", node.zone.as_deref().unwrap_or("-")),
        Change::NodeDeleted => "-node".into(),
        Change::PeerNode(name, _) => format!("peer {name}"),
        Change::PeerNodeDeleted(name) => format!("-peer {name}"),
        Change::ApiServerAddresses(addresses) => format!("at {addresses:?}"),
        Change::Incomplete(incomplete) => if *incomplete { "incomplete" } else { "complete" }.into(),
        Change::Synced => "synced".into(),
    }
}

pub(crate) fn service(name: &str, ip: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": name, "namespace": "default" },
        "spec": { "clusterIP": ip, "ports": [{ "port": 80 }] },
    })
}

pub(crate) fn slice(name: &str, service: &str, addresses: &[&str]) -> Value {
    let endpoints: Vec<Value> = addresses.iter().map(|address| json!({ "addresses": [address] })).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": name, "namespace": "default", "labels": { "kubernetes.io/service-name": service },
        },
        "addressType": "IPv4", "ports": [{ "name": "", "port": 8080 }], "endpoints": endpoints,
    })
}

pub(crate) fn node(name: &str, zone: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": name, "labels": { "topology.kubernetes.io/zone": zone } },
        "status": { "addresses": [{ "type": "InternalIP", "address": "192.168.10.11" }] },
    })
}

pub(crate) fn labelled(mut object: Value, label: &str, value: &str) -> Value {
    object["metadata"]["labels"][label] = json!(value);
    object
}

pub(crate) fn of_service(report: &Report, name: &str) -> bool {
    matches!(&report.subject, Subject::Service(subject) if subject.name() == name)
}
