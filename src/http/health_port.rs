//! The health port: `/healthz` for load balancers, and `/livez` for kubelet. Status codes, bodies and headers are
//! kube-proxy's.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use hyper::StatusCode;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{Handler, Request, Response, not_found};
use crate::health::{Health, family_name};
use crate::metrics;

/// Handles requests to the health port.
pub(crate) fn handler(health: Arc<Health>) -> Handler {
    Arc::new(move |request: &Request| match request.path.as_str() {
        "/healthz" => {
            let response = health_response(&health, Scope::Node);
            metrics::count_health_request(metrics::HEALTHZ, response.status());
            response
        }
        "/livez" => {
            let response = health_response(&health, Scope::Agent);
            metrics::count_health_request(metrics::LIVEZ, response.status());
            response
        }
        _ => not_found(),
    })
}

/// What the response is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// The agent alone (`/livez`).
    Agent,
    /// Also whether the node should receive traffic (`/healthz`): its Node object is eligible, and its Services are
    /// served.
    Node,
}

/// The health as status code and JSON.
pub(super) fn health_response(health: &Health, scope: Scope) -> Response {
    let (now, status) = (SystemTime::now(), health.status(Instant::now()));
    let can_receive_traffic = status.is_node_eligible && !status.is_first_sync_overdue;
    let is_healthy = status.is_healthy() && (can_receive_traffic || scope == Scope::Agent);
    // As in kube-proxy: the present time if healthy, otherwise the time of the last sync.
    let last_update = status.last_update.unwrap_or(SystemTime::UNIX_EPOCH);
    let updated = |is_healthy: bool| rfc3339(if is_healthy { now } else { last_update });
    let families: Map<String, Value> = status
        .families
        .iter()
        .map(|(family, is_healthy)| {
            (family_name(*family).to_owned(), json!({"lastUpdated": updated(*is_healthy), "healthy": is_healthy}))
        })
        .collect();
    let mut body = json!({
        "lastUpdated": updated(is_healthy),
        "currentTime": rfc3339(now),
        "healthy": is_healthy,
        "status": families,
    });
    if scope == Scope::Node {
        body["nodeEligible"] = status.is_node_eligible.into();
        if !status.warnings.is_empty() {
            body["warnings"] = status.warnings.into();
        }
    }
    super::json(if is_healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, &body)
}

/// RFC 3339 with whole seconds, the format of times in the Kubernetes API.
fn rfc3339(time: SystemTime) -> String {
    Timestamp::try_from(time).map(|time| time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()).unwrap_or_default()
}
