//! Health-check node ports (`spec.healthCheckNodePort`): load balancers ask there whether the node has endpoints of a
//! Service.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hyper::StatusCode;
use hyper::header::HeaderValue;
use ipvs_netlink::Family;
use reconciler::contribution::HealthCheck;
use serde_json::json;
use service_watch::ObjectName;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use super::connections::{ConnectionLimit, serve};
use super::{ListenFamilies, Request, Response, listen};
use crate::health::Health;

/// How many connections all ports together have at a time.
const MAX_CONNECTIONS: usize = 2048;
/// The interval of attempts to listen on a port.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// All health checks that a Service has from now on.
pub(crate) type PortUpdate = (ObjectName, Vec<HealthCheck>);

/// Identifies the port of a Service on one address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct PortKey {
    service: ObjectName,
    address: SocketAddr,
}

/// A port that is wanted, whether or not the agent can listen on it.
#[derive(Default)]
struct Port {
    local_endpoints: Arc<AtomicUsize>,
    /// `None` while the agent cannot listen on it.
    server: Option<JoinHandle<()>>,
    /// Since when listening fails.
    failing_since: Option<Instant>,
    /// Whether the failure has been reported.
    is_reported: bool,
}

impl Port {
    fn is_open(&self) -> bool {
        self.server.as_ref().is_some_and(|server| !server.is_finished())
    }

    /// Waits until the socket is closed, because another Service may have been given the same port.
    async fn close(mut self) {
        if let Some(server) = self.server.take() {
            server.abort();
            // An aborted task returns an error.
            let _ = server.await;
        }
    }
}

/// Opens and closes ports until the sender of updates is dropped. `on_failure` is called once for a port that the agent
/// cannot listen on for a while.
pub(crate) async fn run(
    mut updates: UnboundedReceiver<PortUpdate>,
    health: Arc<Health>,
    mut on_failure: impl FnMut(&ObjectName, String),
) {
    let mut ports: BTreeMap<PortKey, Port> = BTreeMap::new();
    // One limit for all ports: users who create Services decide how many ports there are.
    let connections = ConnectionLimit::new(MAX_CONNECTIONS);
    loop {
        let is_any_closed = ports.values().any(|port| !port.is_open());
        let mut received = tokio::select! {
            update = updates.recv() => match update {
                Some(update) => vec![update],
                None => return,
            },
            () = tokio::time::sleep(RETRY_INTERVAL), if is_any_closed => Vec::new(),
        };
        // All updates so far are applied together: a port may move from one Service to another.
        while let Ok(update) = updates.try_recv() {
            received.push(update);
        }
        for (service, checks) in received {
            for port in apply_update(&mut ports, &service, &checks) {
                port.close().await;
            }
        }
        for (key, port) in &mut ports {
            if !port.is_open() {
                open(key, port, &health, &connections, &mut on_failure);
            }
        }
    }
}

/// Sets the ports of a Service, and returns those that are no longer wanted.
fn apply_update(ports: &mut BTreeMap<PortKey, Port>, service: &ObjectName, checks: &[HealthCheck]) -> Vec<Port> {
    let wanted: BTreeMap<PortKey, usize> = checks
        .iter()
        .flat_map(|check| {
            let addresses = check
                .addresses
                .as_ref()
                .map_or_else(|| vec![unspecified(check.family)], |addresses| addresses.iter().copied().collect());
            addresses.into_iter().map(|address| {
                let address = SocketAddr::new(address, check.port.get());
                (PortKey { service: service.clone(), address }, check.local_endpoints)
            })
        })
        .collect();
    let is_unwanted = |key: &&PortKey| key.service == *service && !wanted.contains_key(key);
    let unwanted: Vec<PortKey> = ports.keys().filter(is_unwanted).cloned().collect();
    for (key, local_endpoints) in wanted {
        ports.entry(key).or_default().local_endpoints.store(local_endpoints, Ordering::Relaxed);
    }
    unwanted.iter().filter_map(|key| ports.remove(key)).collect()
}

fn unspecified(family: Family) -> IpAddr {
    match family {
        Family::Ipv4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::Ipv6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

fn open(
    key: &PortKey,
    port: &mut Port,
    health: &Arc<Health>,
    connections: &ConnectionLimit,
    on_failure: &mut impl FnMut(&ObjectName, String),
) {
    let (service, address) = (&key.service, key.address);
    let listener = match listen(address, ListenFamilies::OfAddress) {
        Ok(listener) => listener,
        Err(error) => {
            // Not reported at once: the port may be moving from one Service to another.
            let since = *port.failing_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= RETRY_INTERVAL && !std::mem::replace(&mut port.is_reported, true) {
                let message = format!(
                    "cannot listen on node port {} for health checks: {error}; another program or Service uses it: give \
                     spec.healthCheckNodePort another value, or stop that program",
                    address.port()
                );
                on_failure(service, message);
            }
            return;
        }
    };
    debug!(%service, %address, "serving health checks");
    let handler = {
        let (service, health, local_endpoints) = (service.clone(), health.clone(), port.local_endpoints.clone());
        Arc::new(move |_: &Request| response(&service, local_endpoints.load(Ordering::Relaxed), &health))
    };
    let service = service.clone();
    let connections = connections.clone();
    let server = tokio::spawn(async move {
        let error = serve(listener, connections, handler).await;
        warn!(%service, %address, "stopped serving health checks: {error}");
    });
    port.server = Some(server);
    port.failing_since = None;
    port.is_reported = false;
}

/// The same response for every path and method, as kube-proxy's.
fn response(service: &ObjectName, local_endpoints: usize, health: &Health) -> Response {
    let is_healthy = health.status(Instant::now()).is_healthy();
    let status = if local_endpoints > 0 && is_healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({
        "service": {"namespace": service.namespace(), "name": service.name()},
        "localEndpoints": local_endpoints,
        "serviceProxyHealthy": is_healthy,
    });
    let mut response = super::json(status, &body);
    let weight = HeaderValue::from(local_endpoints);
    response.headers_mut().insert("x-load-balancing-endpoint-weight", weight);
    response
}
