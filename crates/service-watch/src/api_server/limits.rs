//! Limits of requests to the API server: timeout, rate, and size of responses.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, BodyStream, StreamBody};
use kube::Client;
use kube::client::Body;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use super::addresses::ServerAddresses;
use crate::panics::point;

/// The timeout for the head of a response. (The reflector has one for the body.)
const REQUEST_TIMEOUT: Duration = Duration::from_secs(50);
/// The minimum time between the starts of two watches. `watcher` restarts a watch that ended without a delay, so a
/// server or load balancer that ends every watch at once would be flooded.
const MIN_WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// The maximum of a `Retry-After` header that is respected: less than the reflector's idle timeout.
const MAX_RETRY_AFTER_SECONDS: u64 = 50;
/// The maximum size of a line of a watch, or of any other response, so that an endless one does not exhaust the memory.
/// A page of very large objects may exceed it: then the reflector requests smaller pages.
const MAX_RESPONSE_BYTES: usize = 64 << 20;

/// The error for a response that exceeds [`MAX_RESPONSE_BYTES`].
#[derive(Debug, thiserror::Error)]
#[error("the response exceeds {} MiB", MAX_RESPONSE_BYTES >> 20)]
pub(super) struct ResponseTooLarge;

impl ResponseTooLarge {
    /// Whether this is the cause of an error.
    pub(super) fn caused(error: &(dyn std::error::Error + 'static)) -> bool {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if error.is::<Self>() {
                return true;
            }
            cause = error.source();
        }
        false
    }
}

/// The error for a request that timed out.
#[derive(Debug, thiserror::Error)]
#[error("no response within {} s", REQUEST_TIMEOUT.as_secs())]
pub(super) struct RequestTimeout;

/// Wraps `client` with these limits. The receiver is notified of each successful response. The peers of the connections are
/// recorded in `addresses`.
pub(super) fn limited_client(client: Client, addresses: ServerAddresses) -> (Client, watch::Receiver<()>) {
    let (responded, responses) = watch::channel(());
    let shared = Arc::new((responded, Mutex::default(), addresses));
    let namespace = client.default_namespace().to_owned();
    let service = tower::service_fn(move |request| send(client.clone(), shared.clone(), request));
    (Client::new(service, namespace), responses)
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Shared = (watch::Sender<()>, Mutex<Throttle>, ServerAddresses);

/// State shared by the requests of a client.
#[derive(Clone, Copy, Debug, Default)]
struct Throttle {
    /// The start of the last watch.
    last_watch: Option<Instant>,
    /// The time before which the server wants no request (`Retry-After`).
    retry_at: Option<Instant>,
}

async fn send(
    client: Client,
    shared: Arc<Shared>,
    request: Request<Body>,
) -> Result<Response<UnsyncBoxBody<Bytes, BoxError>>, BoxError> {
    let (responded, throttle, addresses) = &*shared;
    let update = |update: &dyn Fn(&mut Throttle)| {
        if let Ok(mut throttle) = throttle.lock() {
            update(&mut throttle);
        }
    };
    let is_watch = request.uri().query().is_some_and(|query| query.split('&').any(|part| part == "watch=true"));
    let current = throttle.lock().map(|throttle| *throttle).unwrap_or_default();
    if let Some(until) = current.retry_at {
        sleep_until(until).await;
    }
    if let Some(last) = current.last_watch.filter(|_| is_watch) {
        sleep_until(last + MIN_WATCH_INTERVAL).await;
    }
    point("client", &request.uri().path());
    let response = timeout(REQUEST_TIMEOUT, client.send(request)).await.map_err(|_| RequestTimeout)??;
    addresses.record_peer(response.extensions());
    if matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        let after = response.headers().get(header::RETRY_AFTER).and_then(|after| after.to_str().ok()?.parse().ok());
        if let Some(seconds) = after.map(|seconds: u64| seconds.min(MAX_RETRY_AFTER_SECONDS)) {
            let until = Instant::now() + Duration::from_secs(seconds);
            update(&|throttle| throttle.retry_at = Some(until));
        }
    }
    if response.status().is_success() {
        if is_watch {
            let now = Instant::now();
            update(&|throttle| throttle.last_watch = Some(now));
        }
        let kind = response.headers().get(header::CONTENT_TYPE);
        if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/json")) {
            responded.send_replace(());
        }
    }
    // A successful watch is read line by line, any other response as a whole.
    let is_by_line = is_watch && response.status().is_success();
    Ok(response.map(|body| limit_body(body, is_by_line)))
}

/// Makes a body fail when it, or one of its lines, becomes too long.
fn limit_body(body: Body, is_by_line: bool) -> UnsyncBoxBody<Bytes, BoxError> {
    let mut length = 0;
    let frames = BodyStream::new(body).map(move |frame| {
        let frame = frame.map_err(BoxError::from)?;
        if let Some(data) = frame.data_ref() {
            let end = if is_by_line { data.iter().rposition(|byte| *byte == b'\n') } else { None };
            length = end.map_or(length + data.len(), |end| data.len() - end - 1);
        }
        if length > MAX_RESPONSE_BYTES { Err(ResponseTooLarge.into()) } else { Ok(frame) }
    });
    StreamBody::new(frames).boxed_unsync()
}
