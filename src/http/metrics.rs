//! The metrics port: `/metrics`, and what people look at when something is wrong. Paths and texts are kube-proxy's where it
//! has them; `/livez` and `/readyz` are ours.

use std::fmt::Write as _;
use std::fs;
use std::sync::Arc;

use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, StatusCode};
use serde_json::Value;

use super::{Asked, Handler, Response, not_found, text};
use crate::health::Health;
use crate::logging::Verbosity;

/// What the port shows.
pub(crate) struct Shown {
    pub(crate) health: Arc<Health>,
    /// The text of `/metrics`.
    pub(crate) metrics: Box<dyn Fn() -> String + Send + Sync>,
    /// The configuration in effect.
    pub(crate) configuration: Value,
    /// What is under `/debug`, unless it is to be hidden.
    pub(crate) debug: Option<Verbosity>,
}

/// Answers on the metrics port.
pub(crate) fn handler(shown: Shown) -> Handler {
    Arc::new(move |asked: &Asked| match (asked.path.as_str(), &shown.debug) {
        ("/metrics", _) => {
            let mut response = text(StatusCode::OK, (shown.metrics)());
            let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            response.headers_mut().insert(CONTENT_TYPE, kind);
            response
        }
        ("/proxyMode", _) => text(StatusCode::OK, "ipvs"),
        ("/configz", _) => {
            super::json(StatusCode::OK, &serde_json::json!({"kubeproxy.config.k8s.io": shown.configuration}))
        }
        // That the process answers; how the node does is asked on the health port.
        ("/healthz", _) => text(StatusCode::OK, "ok"),
        ("/livez", _) => super::health::answer(&shown.health, false),
        ("/readyz", _) if shown.health.has_synced() => super::health::answer(&shown.health, false),
        ("/readyz", _) => text(StatusCode::SERVICE_UNAVAILABLE, "not everything is in the kernel yet\n"),
        ("/debug/flags/v", Some(verbosity)) => set_verbosity(asked, verbosity),
        ("/debug/threads", Some(_)) => text(StatusCode::OK, threads()),
        _ => not_found(),
    })
}

/// `curl -X PUT -d 4 .../debug/flags/v`, as with kube-proxy.
fn set_verbosity(asked: &Asked, verbosity: &Verbosity) -> Response {
    if asked.method != Method::PUT {
        return text(StatusCode::METHOD_NOT_ALLOWED, "put a number here\n");
    }
    let level = std::str::from_utf8(&asked.body).ok().and_then(|text| text.trim().parse::<u32>().ok());
    let Some(level) = level else {
        return text(
            StatusCode::BAD_REQUEST,
            "this is no number: 0 to 3 what happens, 4 what is done about it, 6 everything\n",
        );
    };
    verbosity.set(level);
    text(StatusCode::OK, format!("successfully set klog.logging.verbosity to {level}"))
}

/// The processor time of each thread, in ticks of the kernel's clock.
fn threads() -> String {
    let mut list = String::from("thread\tuser\tsystem\n");
    for task in fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let Ok(stat) = fs::read_to_string(task.path().join("stat")) else { continue };
        let Some((before, after)) = stat.rsplit_once(')') else { continue };
        let name = before.split_once('(').map_or("", |(_, name)| name);
        let mut times = after.split_whitespace().skip(11);
        let _ = writeln!(list, "{name}\t{}\t{}", times.next().unwrap_or("?"), times.next().unwrap_or("?"));
    }
    list
}
