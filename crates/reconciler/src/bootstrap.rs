//! Services that everything else on a node waits for: they go first when a cold node starts.

use service_watch::Service;

const DNS_PORT: u16 = 53;

/// Namespace and name of the Service whose endpoints are the API servers.
pub(crate) const API_SERVER: (&str, &str) = ("default", "kubernetes");

/// The API server and DNS.
pub(crate) fn is_bootstrap_service(service: &Service) -> bool {
    let is_api_server = (service.name.namespace(), service.name.name()) == API_SERVER;
    is_api_server || service.ports.iter().any(|port| port.port.get() == DNS_PORT)
}
