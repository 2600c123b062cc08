//! Bootstrap Services: the API server and DNS, on which everything else on a node depends. They are programmed first.

use service_watch::Service;

const DNS_PORT: u16 = 53;

/// Namespace and name of the Service whose endpoints are the API servers.
pub(crate) const API_SERVER: (&str, &str) = ("default", "kubernetes");

/// Whether a Service is the API server's or serves DNS.
pub(crate) fn is_bootstrap_service(service: &Service) -> bool {
    let is_api_server = (service.name.namespace(), service.name.name()) == API_SERVER;
    is_api_server || service.ports.iter().any(|port| port.port.get() == DNS_PORT)
}
