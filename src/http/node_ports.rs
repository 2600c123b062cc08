//! Ports on which load balancers ask whether the node has endpoints of a Service (`spec.healthCheckNodePort`).

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

use super::{Asked, Connections, Reach, Response, listen, serve};
use crate::health::Health;

/// How many connections all ports serve at a time.
const CONNECTIONS: usize = 256;
/// How soon a port that could not be listened on is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// What a Service has from now on; nothing where the list is empty.
pub(crate) type News = (ObjectName, Vec<HealthCheck>);

/// A port of a Service on one address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    service: ObjectName,
    address: SocketAddr,
}

/// What is listened on, or ought to be.
#[derive(Default)]
struct Port {
    local_endpoints: Arc<AtomicUsize>,
    /// `None` while it cannot be listened on.
    server: Option<JoinHandle<()>>,
    /// Since when it cannot.
    failing_since: Option<Instant>,
    /// Whether somebody was told of that.
    is_told: bool,
}

impl Port {
    fn is_open(&self) -> bool {
        self.server.as_ref().is_some_and(|server| !server.is_finished())
    }

    /// Waits until nobody listens on it any more: somebody else may be about to.
    async fn close(mut self) {
        if let Some(server) = self.server.take() {
            server.abort();
            // It was aborted, which is an error.
            let _ = server.await;
        }
    }
}

/// Opens and closes ports as it is told, until nobody is left to tell. `complain` hears of a port of a Service that cannot be
/// listened on for a while, once until it can.
pub(crate) async fn run(
    mut news: UnboundedReceiver<News>,
    health: Arc<Health>,
    mut complain: impl FnMut(&ObjectName, String),
) {
    let mut ports: BTreeMap<Place, Port> = BTreeMap::new();
    // Of all ports together: how many there are is for those to say who make Services.
    let connections = Connections::new(CONNECTIONS);
    loop {
        let is_any_closed = ports.values().any(|port| !port.is_open());
        let mut told = tokio::select! {
            told = news.recv() => match told {
                Some(told) => vec![told],
                None => return,
            },
            () = tokio::time::sleep(AGAIN), if is_any_closed => Vec::new(),
        };
        // All that has come is dealt with together: a port may move from one Service to another.
        while let Ok(more) = news.try_recv() {
            told.push(more);
        }
        for (service, checks) in told {
            for port in update(&mut ports, &service, &checks) {
                port.close().await;
            }
        }
        for (place, port) in &mut ports {
            if !port.is_open() {
                open(place, port, &health, &connections, &mut complain);
            }
        }
    }
}

/// Returns the ports that are no longer wanted.
fn update(ports: &mut BTreeMap<Place, Port>, service: &ObjectName, checks: &[HealthCheck]) -> Vec<Port> {
    let wanted: BTreeMap<Place, usize> = checks
        .iter()
        .flat_map(|check| {
            let addresses = check
                .addresses
                .as_ref()
                .map_or_else(|| vec![all(check.family)], |addresses| addresses.iter().copied().collect());
            addresses.into_iter().map(|address| {
                let address = SocketAddr::new(address, check.port.get());
                (Place { service: service.clone(), address }, check.local_endpoints)
            })
        })
        .collect();
    let is_unwanted = |place: &&Place| place.service == *service && !wanted.contains_key(place);
    let unwanted: Vec<Place> = ports.keys().filter(is_unwanted).cloned().collect();
    for (place, local_endpoints) in wanted {
        ports.entry(place).or_default().local_endpoints.store(local_endpoints, Ordering::Relaxed);
    }
    unwanted.iter().filter_map(|place| ports.remove(place)).collect()
}

fn all(family: Family) -> IpAddr {
    match family {
        Family::Ipv4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::Ipv6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

fn open(
    place: &Place,
    port: &mut Port,
    health: &Arc<Health>,
    connections: &Connections,
    complain: &mut impl FnMut(&ObjectName, String),
) {
    let (service, address) = (&place.service, place.address);
    let listener = match listen(address, Reach::OneFamily) {
        Ok(listener) => listener,
        Err(error) => {
            // At first it may be on its way from one Service to another.
            let since = *port.failing_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= AGAIN && !std::mem::replace(&mut port.is_told, true) {
                let what = format!(
                    "node port {} cannot be listened on for health checks: {error}; another program or Service has it: \
                     give spec.healthCheckNodePort another value, or end that program",
                    address.port()
                );
                complain(service, what);
            }
            return;
        }
    };
    debug!(%service, %address, "answering load balancers");
    let handler = {
        let (service, health, local_endpoints) = (service.clone(), health.clone(), port.local_endpoints.clone());
        Arc::new(move |_: &Asked| answer(&service, local_endpoints.load(Ordering::Relaxed), &health))
    };
    let service = service.clone();
    let connections = connections.clone();
    let server = tokio::spawn(async move {
        let problem = serve(listener, connections, handler).await;
        warn!(%service, %address, "cannot answer load balancers: {problem}");
    });
    port.server = Some(server);
    port.failing_since = None;
    port.is_told = false;
}

/// Whatever is asked for, by whatever method.
fn answer(service: &ObjectName, local_endpoints: usize, health: &Health) -> Response {
    let is_healthy = health.report(Instant::now()).is_healthy();
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
