//! Handling of requests.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, TryStreamExt as _, stream};
use http::{Method, Request, Response, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body as HttpBody, Frame};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::store::{Change, Selector, served};
use crate::{Expiry, Fault, RecordedRequest, Server, Streaming, Throttle, Verb, status};

/// The body of a response.
pub type Body = BoxBody<Bytes, io::Error>;

/// An open watch.
#[derive(Debug)]
pub(crate) struct Watch {
    resource: &'static str,
    wanted: Selector,
    bookmarks: bool,
    silent: bool,
    send: mpsc::UnboundedSender<io::Result<Bytes>>,
}

impl Watch {
    /// Whether the client still reads it.
    pub(crate) fn is_open(&self) -> bool {
        !self.send.is_closed()
    }

    pub(crate) fn silence(&mut self) {
        self.silent = true;
    }

    pub(crate) fn fail(self) {
        let _ = self.send.send(Err(io::Error::other("the connection broke")));
    }

    pub(crate) fn event(&self, kind: &str, object: &Value) {
        if !self.silent {
            let _ = self.send.send(Ok(event(kind, object).into()));
        }
    }

    /// Sends bytes that are not a watch event.
    pub(crate) fn send_garbage(&self) {
        let _ = self.send.send(Ok(Bytes::from_static(b"\x00\xff{\"type\": \"ADDED\", \"object\": [\n")));
    }

    /// Sends ADDED events for all these objects.
    fn added<'a>(&self, objects: impl Iterator<Item = &'a str>, padding: usize) {
        let mut some = String::new();
        for object in objects {
            if padding > 0 {
                let object = object.trim_start_matches('{');
                some += &event("ADDED", format_args!("{{\"padding\":\"{:padding$}\",{object}", ""));
            } else {
                some += &event("ADDED", object);
            }
            if some.len() > CHUNK {
                let _ = self.send.send(Ok(std::mem::take(&mut some).into()));
            }
        }
        let _ = self.send.send(Ok(some.into()));
    }

    pub(crate) fn bookmark(&self, version: u64, ends_list: bool) {
        if self.bookmarks
            && let Some((_, kind, api)) = served(self.resource)
        {
            let mut object =
                json!({ "apiVersion": api, "kind": kind, "metadata": { "resourceVersion": version.to_string() } });
            if ends_list {
                object["metadata"]["annotations"] = json!({ "k8s.io/initial-events-end": "true" });
            }
            self.event("BOOKMARK", &object);
        }
    }

    /// Sends a change. An object that starts to match the selector is ADDED; one that stops matching is DELETED.
    pub(crate) fn change(&self, change: &Change) {
        if change.resource != self.resource {
            return;
        }
        let matching = |object: &Option<Value>| object.clone().filter(|object| self.wanted.matches(object));
        match (matching(&change.before), matching(&change.after)) {
            (None, Some(after)) => self.event("ADDED", &after),
            (Some(_), Some(after)) => self.event("MODIFIED", &after),
            (Some(mut before), None) => {
                before["metadata"]["resourceVersion"] = json!(change.version.to_string());
                self.event("DELETED", &before);
            }
            (None, None) => {}
        }
    }
}

/// The approximate size of the chunks of a list, in bytes.
const CHUNK: usize = 64 << 10;

/// A line of a watch, with its fields in the order of a real API server, since clients may decode it incrementally.
fn event(kind: &str, object: impl std::fmt::Display) -> String {
    format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n")
}

impl Server {
    /// The server as a service: for `kube::Client::new`.
    pub fn service<B>(
        &self,
    ) -> impl tower::Service<Request<B>, Response = Response<Body>, Error = io::Error, Future: Send> + Clone + Send + use<B>
    where
        B: HttpBody<Data: Send, Error: Send> + Send + 'static,
    {
        let server = self.clone();
        tower::service_fn(move |request| server.clone().answer(request))
    }

    pub(crate) async fn answer<B>(self, request: Request<B>) -> io::Result<Response<Body>>
    where
        B: HttpBody<Data: Send, Error: Send> + Send,
    {
        let path = request.uri().path();
        let event = EventPath::new(path);
        let resource = if event.is_some() { "events" } else { path.rsplit('/').next().unwrap_or_default() }.to_owned();
        let query = Query::new(request.uri().query().unwrap_or_default());
        let verb = match (request.method() == Method::GET, query.get("watch"), query.get("sendInitialEvents")) {
            (false, _, _) => Verb::Post,
            (_, Some("true"), Some("true")) => Verb::StreamingList,
            (_, Some("true"), _) => Verb::Watch,
            _ => Verb::List,
        };
        let recorded = RecordedRequest { resource: resource.clone(), verb, query: query.text() };
        let given =
            request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let fault = {
            let mut state = self.state();
            state.requests.push(recorded);
            if state.token.as_deref().is_some_and(|token| given != Some(token)) {
                return json_answer(401, &status(401, "Unauthorized", "Unauthorized"));
            }
            state.fault.clone()
        };
        match fault {
            Some(Fault::TooMany { retry_after }) => {
                let mut response =
                    answer(429, "text/plain", "Too many requests, please try again later.\n".to_owned())?;
                response.headers_mut().insert(header::RETRY_AFTER, retry_after.into());
                return Ok(response);
            }
            Some(Fault::Endless) => {
                // A watch is read line by line, a list as a whole.
                let mut much = vec![b'a'; 1 << 20];
                much.push(if verb == Verb::List { b'\n' } else { b'a' });
                let much = Bytes::from(much);
                let start = stream::once(async { Ok(Bytes::from_static(b"{\"kind\": \"")) });
                let rest = stream::repeat_with(move || Ok(much.clone()));
                return respond(200, "application/json", stream_body(start.chain(rest)));
            }
            Some(Fault::Refuse) => return Err(io::ErrorKind::ConnectionRefused.into()),
            Some(Fault::Silence) => return std::future::pending().await,
            Some(Fault::Stall) => {
                let start = stream::once(async { Ok(Bytes::from_static(b" ")) });
                return respond(200, "application/json", stream_body(start.chain(stream::pending())));
            }
            Some(Fault::Answer { resource: only, status, content_type, body })
                if only.as_ref().is_none_or(|only| *only == resource) =>
            {
                return answer(status, content_type, body);
            }
            Some(Fault::Answer { .. }) | None => {}
        }
        if let Some(event) = event {
            let is_patch = request.method() == Method::PATCH;
            let body = request.into_body().collect().await.map_err(|_| io::Error::other("no body"))?.to_bytes();
            let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
            return if is_patch { self.patch_event(&event, &body) } else { self.create_event(&event, body) };
        }
        if verb == Verb::Post {
            return json_answer(201, &json!({}));
        }
        let Some(served) = served(&resource) else {
            return json_answer(404, &status(404, "NotFound", "the server could not find the requested resource"));
        };
        let response = if verb == Verb::List { self.list(served, &query) } else { self.watch(served.0, verb, &query) };
        let throttle = self.state().throttle;
        match throttle {
            Some(throttle) => response.map(|response| response.map(|body| throttled(body, throttle))),
            None => response,
        }
    }

    fn create_event(&self, event_path: &EventPath, mut event: Value) -> io::Result<Response<Body>> {
        let mut state = self.state();
        if event["metadata"]["name"].as_str().is_none_or(str::is_empty) {
            return json_answer(422, &status(422, "Invalid", "an Event without a name"));
        }
        event["metadata"]["namespace"] = json!(event_path.namespace);
        if state.events.iter().any(|other| other["metadata"] == event["metadata"]) {
            return json_answer(409, &status(409, "AlreadyExists", "there is an Event of this name"));
        }
        state.events.push(event.clone());
        json_answer(201, &event)
    }

    fn patch_event(&self, event_path: &EventPath, patch: &Value) -> io::Result<Response<Body>> {
        let mut state = self.state();
        let is_meant = |event: &&mut Value| {
            let metadata = &event["metadata"];
            metadata["namespace"] == event_path.namespace.as_str() && metadata["name"] == event_path.name.as_str()
        };
        let Some(event) = state.events.iter_mut().find(is_meant) else {
            return json_answer(404, &status(404, "NotFound", "there is no such Event"));
        };
        merge(event, patch);
        json_answer(200, event)
    }

    fn list(&self, (resource, kind, api): (&str, &str, &str), query: &Query) -> io::Result<Response<Body>> {
        let state = self.state();
        let past = (state.stale_by > 0).then(|| state.store.as_of(state.stale_by));
        let store = past.as_ref().unwrap_or(&state.store);
        let limit = query.get("limit").and_then(|limit| limit.parse().ok()).unwrap_or(0);
        let Some(mut page) = store.page(resource, &query.selector(), limit, query.get("continue")) else {
            return json_answer(410, &status(410, "Expired", "The provided continue parameter is too old"));
        };
        let mut metadata = json!({ "resourceVersion": store.version().to_string() });
        if let Some(next) = page.next {
            metadata["continue"] = json!(next);
        }
        if state.padding > 0 {
            page.items.iter_mut().for_each(|item| item["padding"] = " ".repeat(state.padding).into());
        }
        let kind = format!("{kind}List");
        json_answer(200, &json!({ "apiVersion": api, "kind": kind, "metadata": metadata, "items": page.items }))
    }

    fn watch(&self, resource: &'static str, verb: Verb, query: &Query) -> io::Result<Response<Body>> {
        let mut state = self.state();
        if let (Streaming::Refused(code), Verb::StreamingList) = (state.streaming, verb) {
            let message = "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled";
            return json_answer(code, &status(code, "Invalid", message));
        }
        let from: u64 = query.get("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
        let current = state.store.version();
        if from > current {
            let message = format!("Timeout: Too large resource version: {from}, current: {current}");
            return json_answer(504, &status(504, "Timeout", &message));
        }
        let (send, mut receive) = mpsc::unbounded_channel();
        let bookmarks = query.get("allowWatchBookmarks") == Some("true");
        let watch = Watch { resource, wanted: query.selector(), bookmarks, silent: false, send };
        if from == 0 {
            let past = (state.stale_by > 0).then(|| state.store.as_of(state.stale_by));
            let store = past.as_ref().unwrap_or(&state.store);
            watch.added(store.texts(resource, &watch.wanted), state.padding);
            if verb == Verb::StreamingList && state.streaming == Streaming::Yes {
                watch.bookmark(store.version(), true);
            }
            let _ = state.store.since(store.version(), |change| watch.change(change));
            state.watches.push(watch);
        } else if state.store.since(from, |change| watch.change(change)) {
            state.watches.push(watch);
        } else {
            let expired = status(410, "Expired", "too old resource version");
            match state.expiry {
                Expiry::Status => return json_answer(410, &expired),
                Expiry::Event => watch.event("ERROR", &expired),
            }
        }
        // The server ends each watch after the requested time, except while it is silent.
        let seconds = query.get("timeoutSeconds").and_then(|seconds| seconds.parse().ok()).unwrap_or(3600);
        let mut end = Some(Box::pin(tokio::time::sleep(Duration::from_secs(seconds))));
        let server = self.clone();
        let events = stream::poll_fn(move |context| {
            if let std::task::Poll::Ready(event) = receive.poll_recv(context) {
                return std::task::Poll::Ready(event);
            }
            let over = end.as_mut().is_some_and(|end| Pin::as_mut(end).poll(context).is_ready());
            if over {
                end = None;
                if !matches!(server.state().fault, Some(Fault::Silence)) {
                    return std::task::Poll::Ready(None);
                }
            }
            std::task::Poll::Pending
        });
        respond(200, "application/json", stream_body(events))
    }
}

/// The path of Events: `/apis/events.k8s.io/v1/namespaces/NAMESPACE/events`, with or without a name.
struct EventPath {
    namespace: String,
    name: String,
}

impl EventPath {
    fn new(path: &str) -> Option<Self> {
        let (namespace, rest) = path.strip_prefix("/apis/events.k8s.io/v1/namespaces/")?.split_once('/')?;
        let name = rest.strip_prefix("events")?.trim_start_matches('/');
        Some(Self { namespace: namespace.to_owned(), name: name.to_owned() })
    }
}

/// A JSON merge patch.
fn merge(value: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *value = patch.clone();
        return;
    };
    if !value.is_object() {
        *value = json!({});
    }
    for (key, patch) in patch {
        if patch.is_null() {
            value.as_object_mut().map(|object| object.remove(key));
        } else {
            merge(&mut value[key], patch);
        }
    }
}

/// Sends a body in small pieces.
fn throttled(body: Body, throttle: Throttle) -> Body {
    let pieces = body.into_data_stream().flat_map(move |chunk| {
        let mut pieces = Vec::new();
        match chunk {
            Ok(mut chunk) => {
                while !chunk.is_empty() {
                    pieces.push(Ok(chunk.split_to(throttle.bytes.min(chunk.len()))));
                }
            }
            Err(error) => pieces.push(Err(error)),
        }
        stream::iter(pieces)
    });
    stream_body(pieces.then(move |piece| async move {
        tokio::time::sleep(throttle.every).await;
        piece
    }))
}

fn stream_body(events: impl Stream<Item = io::Result<Bytes>> + Send + Sync + 'static) -> Body {
    BodyExt::boxed(StreamBody::new(events.map_ok(Frame::data)))
}

fn json_answer(status: u16, body: &Value) -> io::Result<Response<Body>> {
    answer(status, "application/json", body.to_string())
}

fn answer(status: u16, content_type: &str, body: String) -> io::Result<Response<Body>> {
    let body = Full::new(Bytes::from(body)).map_err(|never: Infallible| match never {});
    respond(status, content_type, body.boxed())
}

fn respond(status: u16, content_type: &str, body: Body) -> io::Result<Response<Body>> {
    let response = Response::builder().status(status).header(header::CONTENT_TYPE, content_type).body(body);
    response.map_err(io::Error::other)
}

/// A query string, decoded.
struct Query(Vec<(String, String)>);

impl Query {
    fn new(query: &str) -> Self {
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        Self(
            pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).map(|(k, v)| (decode(k), decode(v))).collect(),
        )
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|pair| pair.0 == key).map(|pair| pair.1.as_str())
    }

    fn selector(&self) -> Selector {
        let text = |key| self.get(key).unwrap_or_default().to_owned();
        Selector { labels: text("labelSelector"), fields: text("fieldSelector") }
    }

    fn text(&self) -> String {
        self.0.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join("&")
    }
}

/// Percent-decoding, with `+` for a space.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits: Vec<u8> = rest.by_ref().take(2).collect();
                let digits = std::str::from_utf8(&digits).unwrap_or_default();
                u8::from_str_radix(digits, 16).unwrap_or(b'?')
            }
            b'+' => b' ',
            byte => byte,
        });
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
