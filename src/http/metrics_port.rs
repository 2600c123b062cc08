//! The metrics port: `/metrics`, and pages for diagnosis. Paths and texts are kube-proxy's; `/livez` and `/readyz` are
//! additions.

use std::fmt::Write as _;
use std::fs;
use std::sync::Arc;

use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, StatusCode};
use serde_json::Value;

use super::health_port::{Scope, health_response};
use super::{Handler, Request, Response, not_found, text};
use crate::health::Health;
use crate::logging::VerbosityHandle;

/// What the pages are made from.
pub(crate) struct MetricsPages {
    pub(crate) health: Arc<Health>,
    /// Renders the text of `/metrics`.
    pub(crate) render_metrics: Box<dyn Fn() -> String + Send + Sync>,
    /// The configuration in effect.
    pub(crate) configuration: Value,
    /// What `/debug/flags/v` sets; `None` disables all of `/debug`.
    pub(crate) debug: Option<VerbosityHandle>,
}

/// Handles requests to the metrics port.
pub(crate) fn handler(pages: MetricsPages) -> Handler {
    Arc::new(move |request: &Request| match (request.path.as_str(), &pages.debug) {
        ("/metrics", _) => {
            let mut response = text(StatusCode::OK, (pages.render_metrics)());
            let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            response.headers_mut().insert(CONTENT_TYPE, kind);
            response
        }
        ("/proxyMode", _) => text(StatusCode::OK, "ipvs"),
        ("/configz", _) => {
            super::json(StatusCode::OK, &serde_json::json!({"kubeproxy.config.k8s.io": pages.configuration}))
        }
        // Only says that the process answers. The health port has the health of the node.
        ("/healthz", _) => text(StatusCode::OK, "ok"),
        ("/livez", _) => health_response(&pages.health, Scope::Agent),
        ("/readyz", _) if pages.health.has_synced() => health_response(&pages.health, Scope::Agent),
        ("/readyz", _) => text(StatusCode::SERVICE_UNAVAILABLE, "not everything is in the kernel yet\n"),
        ("/debug/flags/v", Some(verbosity)) => set_verbosity(request, verbosity),
        ("/debug/threads", Some(_)) => text(StatusCode::OK, threads()),
        _ => not_found(),
    })
}

/// `curl -X PUT -d 4 .../debug/flags/v`, as with kube-proxy.
fn set_verbosity(request: &Request, verbosity: &VerbosityHandle) -> Response {
    if request.method != Method::PUT {
        return text(StatusCode::METHOD_NOT_ALLOWED, "use PUT with a number as the body\n");
    }
    let level = std::str::from_utf8(&request.body).ok().and_then(|text| text.trim().parse::<u32>().ok());
    let Some(level) = level else {
        return text(
            StatusCode::BAD_REQUEST,
            "not a number: give 0 to 3 for information, 4 for each operation too, 6 for everything\n",
        );
    };
    verbosity.set(level);
    text(StatusCode::OK, format!("successfully set klog.logging.verbosity to {level}"))
}

/// The processor time of each thread, in clock ticks (`utime` and `stime` of `proc(5)`).
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
