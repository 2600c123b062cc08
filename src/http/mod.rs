//! What the agent answers over HTTP: whether it is healthy, what it measures, and what load balancers ask.
//!
//! * `health`: the port of `/healthz` and `/livez`.
//! * `metrics`: the port of `/metrics`, and of what people look at when something is wrong.
//! * `node_ports`: a port for each Service that load balancers ask about.
//! * `own`: opening the first two.
//!
//! Plain HTTP/1, as kube-proxy has it; of bodies only that of a PUT to `/debug/flags/v` is looked at. A handler is a
//! function and never waits.

pub(crate) mod health;
pub(crate) mod metrics;
pub(crate) mod node_ports;
pub(crate) mod own;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustix::net::sockopt::{set_ipv6_v6only, set_socket_reuseaddr};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::task::{AbortHandle, JoinSet};
use tracing::debug;

/// How long a connection may take, from its beginning to the end of the answer.
const PATIENCE: Duration = Duration::from_secs(10);
const BODY: usize = 1024;
const NOSNIFF: (HeaderName, HeaderValue) =
    (HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff"));

/// A request, as far as anybody looks at it.
pub(crate) struct Asked {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) body: Bytes,
}

pub(crate) type Response = hyper::Response<Full<Bytes>>;

/// What answers.
pub(crate) type Handler = Arc<dyn Fn(&Asked) -> Response + Send + Sync>;

pub(crate) fn text(status: StatusCode, text: impl Into<Bytes>) -> Response {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response.headers_mut().insert(NOSNIFF.0, NOSNIFF.1);
    response
}

pub(crate) fn json(status: StatusCode, value: &serde_json::Value) -> Response {
    let mut response = text(status, value.to_string());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

pub(crate) fn not_found() -> Response {
    text(StatusCode::NOT_FOUND, "404 page not found\n")
}

/// Which families a listener on an unspecified address is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Both, whichever of the two is named: that is how kube-proxy has it on its own ports.
    Both,
    /// The address's own.
    OneFamily,
}

/// Listens on an address.
pub(crate) fn listen(address: SocketAddr, reach: Reach) -> io::Result<TcpListener> {
    if reach == Reach::Both && address.ip() == IpAddr::V4(Ipv4Addr::UNSPECIFIED) {
        // On a node without IPv6 there is no such socket, or no such address.
        match open(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), address.port()), reach) {
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => {}
            result => return result,
        }
    }
    open(address, reach)
}

fn open(address: SocketAddr, reach: Reach) -> io::Result<TcpListener> {
    const BACKLOG: i32 = 1024;
    let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    // What is left of old connections is no reason not to listen.
    set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        set_ipv6_v6only(&socket, reach == Reach::OneFamily)?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(TcpListener::from(socket))
}

/// The connections of one or several ports. Where there are too many the oldest is ended: whoever holds many and says
/// nothing keeps nobody else from being answered.
#[derive(Clone)]
pub(crate) struct Connections(Arc<Mutex<VecDeque<AbortHandle>>>, usize);

impl Connections {
    /// At most so many at a time.
    pub(crate) fn new(most: usize) -> Self {
        Self(Arc::default(), most)
    }

    fn add(&self, connection: AbortHandle) {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|connection| !connection.is_finished());
        while open.len() >= self.1 {
            open.pop_front().inspect(AbortHandle::abort);
        }
        open.push_back(connection);
    }
}

/// Serves until the task is dropped, or returns why it cannot.
pub(crate) async fn serve(listener: TcpListener, connections: Connections, handler: Handler) -> io::Error {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return error,
    };
    // They end with the task: a port that is closed is closed.
    let mut own = JoinSet::new();
    loop {
        while own.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Too many open files, or a client that gave up: neither is a reason to stop.
                debug!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let handler = handler.clone();
        connections.add(own.spawn(async move {
            let service = service_fn(|request| answer(request, &handler));
            // One request each: nobody asks so often that it matters, and nobody stays.
            let connection = http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), service);
            match tokio::time::timeout(PATIENCE, connection).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => debug!("a connection ended: {error}"),
                Err(_) => debug!("a connection took too long"),
            }
        }));
    }
}

async fn answer(request: Request<Incoming>, handler: &Handler) -> Result<Response, Infallible> {
    let (parts, body) = request.into_parts();
    let Ok(body) = Limited::new(body, BODY).collect().await else {
        return Ok(text(StatusCode::BAD_REQUEST, "a body that is too long, or does not come\n"));
    };
    let asked = Asked { method: parts.method, path: parts.uri.path().to_owned(), body: body.to_bytes() };
    Ok(handler(&asked))
}
