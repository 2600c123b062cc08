//! How requests to the API server are sent: not for ever, and not in a rush.

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

/// A request that is not answered by then is given up. (The answer's body is the feed's concern.)
const ANSWER: Duration = Duration::from_secs(50);
/// From the start of a watch to the start of the next. A server or balancer that ends every watch at once would
/// otherwise be asked anew without a pause: `watcher` takes the end of a watch for normal.
const WATCH_AGAIN: Duration = Duration::from_secs(1);

/// The longest time to stay away that a server is obeyed in, in seconds: less than a feed waits for anything to come.
const MOST_PATIENCE: u64 = 50;
/// A line of a watch, or any other answer, is not longer than this: little enough that a server that never ends one does not
/// take all memory. A page may be, of objects as large as they can be; then there are smaller pages.
const LONGEST: usize = 64 << 20;

/// What an answer fails with that is longer.
#[derive(Debug, thiserror::Error)]
#[error("more than {} MiB came without an end", LONGEST >> 20)]
pub(super) struct TooLong;

impl TooLong {
    /// Whether an error comes from that.
    pub(super) fn is_in(error: &(dyn std::error::Error + 'static)) -> bool {
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

/// What a request that was given up fails with.
#[derive(Debug, thiserror::Error)]
#[error("no answer within {} s", ANSWER.as_secs())]
pub(super) struct NoAnswer;

/// A client that sends through `client`, with patience. The receiver sees a change with each good answer.
pub(super) fn patient(client: Client) -> (Client, watch::Receiver<()>) {
    let (answered, heard) = watch::channel(());
    let shared = Arc::new((answered, Mutex::default()));
    let namespace = client.default_namespace().to_owned();
    let service = tower::service_fn(move |request| send(client.clone(), shared.clone(), request));
    (Client::new(service, namespace), heard)
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Shared = (watch::Sender<()>, Mutex<Times>);

/// What is remembered from one request to the next.
#[derive(Clone, Copy, Debug, Default)]
struct Times {
    /// When the last watch began.
    watched: Option<Instant>,
    /// Until when the server wants to be left alone (`Retry-After`).
    closed_until: Option<Instant>,
}

async fn send(
    client: Client,
    shared: Arc<Shared>,
    request: Request<Body>,
) -> Result<Response<UnsyncBoxBody<Bytes, BoxError>>, BoxError> {
    let (answered, times) = &*shared;
    let remember = |remember: &dyn Fn(&mut Times)| {
        if let Ok(mut times) = times.lock() {
            remember(&mut times);
        }
    };
    let is_watch = request.uri().query().is_some_and(|query| query.split('&').any(|part| part == "watch=true"));
    let known = times.lock().map(|times| *times).unwrap_or_default();
    if let Some(until) = known.closed_until {
        sleep_until(until).await;
    }
    if let Some(last) = known.watched.filter(|_| is_watch) {
        sleep_until(last + WATCH_AGAIN).await;
    }
    let response = timeout(ANSWER, client.send(request)).await.map_err(|_| NoAnswer)??;
    if matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        let after = response.headers().get(header::RETRY_AFTER).and_then(|after| after.to_str().ok()?.parse().ok());
        if let Some(seconds) = after.map(|seconds: u64| seconds.min(MOST_PATIENCE)) {
            let until = Instant::now() + Duration::from_secs(seconds);
            remember(&|times| times.closed_until = Some(until));
        }
    }
    if response.status().is_success() {
        if is_watch {
            let now = Instant::now();
            remember(&|times| times.watched = Some(now));
        }
        let kind = response.headers().get(header::CONTENT_TYPE);
        if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/json")) {
            answered.send_replace(());
        }
    }
    // Of a watch that goes well each line is read by itself; all else is read as a whole.
    let is_by_line = is_watch && response.status().is_success();
    Ok(response.map(|body| bounded(body, is_by_line)))
}

/// A body that fails where it, or a line of it, becomes too long.
fn bounded(body: Body, is_by_line: bool) -> UnsyncBoxBody<Bytes, BoxError> {
    let mut length = 0;
    let frames = BodyStream::new(body).map(move |frame| {
        let frame = frame.map_err(BoxError::from)?;
        if let Some(data) = frame.data_ref() {
            let end = if is_by_line { data.iter().rposition(|byte| *byte == b'\n') } else { None };
            length = end.map_or(length + data.len(), |end| data.len() - end - 1);
        }
        if length > LONGEST { Err(TooLong.into()) } else { Ok(frame) }
    });
    StreamBody::new(frames).boxed_unsync()
}
