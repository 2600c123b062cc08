//! The agent's HTTP servers.
//!
//! * `health_port`: `/healthz` and `/livez`.
//! * `metrics_port`: `/metrics`, and pages for diagnosis.
//! * `health_check_node_ports`: `spec.healthCheckNodePort` of Services.
//! * `agent_ports`: opens the health port and the metrics port.
//!
//! * `connections`: accepts and limits connections.
//!
//! This file has what else they share: listening and responses. Plain HTTP/1, as in kube-proxy. A handler is a
//! function that does not block.

pub(crate) mod agent_ports;
mod connections;
pub(crate) mod health_check_node_ports;
pub(crate) mod health_port;
pub(crate) mod metrics_port;

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{Method, StatusCode};
use rustix::net::sockopt::{set_ipv6_v6only, set_socket_reuseaddr};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use service_watch::panics::point;

/// The longest body of a request. Only the PUT to `/debug/flags/v` needs one.
const MAX_BODY_BYTES: usize = 1024;
const NOSNIFF: (HeaderName, HeaderValue) =
    (HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff"));

/// The parts of a request that handlers use.
pub(crate) struct Request {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) body: Bytes,
}

pub(crate) type Response = hyper::Response<Full<Bytes>>;

/// Makes the response to a request.
pub(crate) type Handler = Arc<dyn Fn(&Request) -> Response + Send + Sync>;

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

/// For which address families a listener on an unspecified address accepts connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ListenFamilies {
    /// Both, whether the address is `0.0.0.0` or `::`. kube-proxy does so on its health and metrics ports.
    Both,
    /// Only that of the address.
    OfAddress,
}

/// Listens on an address.
pub(crate) fn listen(address: SocketAddr, families: ListenFamilies) -> io::Result<TcpListener> {
    if families == ListenFamilies::Both && address.ip() == IpAddr::V4(Ipv4Addr::UNSPECIFIED) {
        // Without IPv6 the kernel has no such socket or address; then 0.0.0.0 is used.
        match open(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), address.port()), families) {
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => {}
            result => return result,
        }
    }
    open(address, families)
}

fn open(address: SocketAddr, families: ListenFamilies) -> io::Result<TcpListener> {
    // The kernel has a limit of its own, net.core.somaxconn.
    const BACKLOG: i32 = 4096;
    let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    // Old connections in TIME_WAIT must not prevent listening.
    set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        set_ipv6_v6only(&socket, families == ListenFamilies::OfAddress)?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(TcpListener::from(socket))
}

async fn respond(request: hyper::Request<Incoming>, handler: &Handler) -> Result<Response, Infallible> {
    let (parts, body) = request.into_parts();
    point("http", &parts.uri.path());
    let Ok(body) = Limited::new(body, MAX_BODY_BYTES).collect().await else {
        return Ok(text(StatusCode::BAD_REQUEST, "the body is too long or incomplete\n"));
    };
    let request = Request { method: parts.method, path: parts.uri.path().to_owned(), body: body.to_bytes() };
    Ok(handler(&request))
}
