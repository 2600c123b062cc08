//! How requests to the API server are sent: not for ever, and not in a rush.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use http::{Request, Response, header};
use kube::Client;
use kube::client::Body;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

/// A request that is not answered by then is given up. (The answer's body is the feed's concern.)
const ANSWER: Duration = Duration::from_secs(50);
/// From the start of a watch to the start of the next. A server or balancer that ends every watch at once would
/// otherwise be asked anew without a pause: `watcher` takes the end of a watch for normal.
const WATCH_AGAIN: Duration = Duration::from_secs(1);

/// What a request that was given up fails with.
#[derive(Debug, thiserror::Error)]
#[error("no answer within {} s", ANSWER.as_secs())]
pub(super) struct NoAnswer;

/// A client that sends through `client`, with patience. The receiver sees a change with each good answer.
pub(super) fn patient(client: Client) -> (Client, watch::Receiver<()>) {
    let (answered, heard) = watch::channel(());
    let shared = Arc::new((answered, Mutex::new(None)));
    let namespace = client.default_namespace().to_owned();
    let service = tower::service_fn(move |request| send(client.clone(), shared.clone(), request));
    (Client::new(service, namespace), heard)
}

type Shared = (watch::Sender<()>, Mutex<Option<Instant>>);

async fn send(
    client: Client,
    shared: Arc<Shared>,
    request: Request<Body>,
) -> Result<Response<Body>, Box<dyn std::error::Error + Send + Sync>> {
    let (answered, last_watch) = &*shared;
    let is_watch = request.uri().query().is_some_and(|query| query.split('&').any(|part| part == "watch=true"));
    if is_watch {
        let last = last_watch.lock().ok().and_then(|last| *last);
        if let Some(last) = last {
            sleep_until(last + WATCH_AGAIN).await;
        }
    }
    let response = timeout(ANSWER, client.send(request)).await.map_err(|_| NoAnswer)??;
    if response.status().is_success() {
        if is_watch && let Ok(mut last) = last_watch.lock() {
            *last = Some(Instant::now());
        }
        let kind = response.headers().get(header::CONTENT_TYPE);
        if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/json")) {
            answered.send_replace(());
        }
    }
    Ok(response)
}
