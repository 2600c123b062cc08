//! `/healthz` and `/livez`: what load balancers and kubelet ask of the node. Codes, bodies and headers are kube-proxy's.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use hyper::StatusCode;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{Asked, Handler, Response, not_found};
use crate::health::{Health, family_name};
use crate::metrics;

/// Answers on the health port.
pub(crate) fn handler(health: Arc<Health>) -> Handler {
    Arc::new(move |asked: &Asked| match asked.path.as_str() {
        "/healthz" => {
            let response = answer(&health, true);
            metrics::health_asked(metrics::HEALTHZ, response.status());
            response
        }
        "/livez" => {
            let response = answer(&health, false);
            metrics::health_asked(metrics::LIVEZ, response.status());
            response
        }
        _ => not_found(),
    })
}

/// `/livez` is about the agent alone; `/healthz` also says whether the Node is one to send traffic to: one that is to stay,
/// and whose Services are served.
pub(super) fn answer(health: &Health, is_about_node: bool) -> Response {
    let (now, report) = (SystemTime::now(), health.report(Instant::now()));
    let is_fit = report.is_node_eligible && !report.is_start_late;
    let is_well = report.is_healthy() && (is_fit || !is_about_node);
    // Who is well has just looked; who is not says since when.
    let since = report.last_update.unwrap_or(SystemTime::UNIX_EPOCH);
    let updated = |is_well: bool| time(if is_well { now } else { since });
    let families: Map<String, Value> = report
        .families
        .iter()
        .map(|(family, is_healthy)| {
            (family_name(*family).to_owned(), json!({"lastUpdated": updated(*is_healthy), "healthy": is_healthy}))
        })
        .collect();
    let mut body = json!({
        "lastUpdated": updated(is_well),
        "currentTime": time(now),
        "healthy": is_well,
        "status": families,
    });
    if is_about_node {
        body["nodeEligible"] = report.is_node_eligible.into();
    }
    super::json(if is_well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, &body)
}

/// RFC 3339, in whole seconds, as the API has times.
fn time(time: SystemTime) -> String {
    Timestamp::try_from(time).map(|time| time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()).unwrap_or_default()
}
