//! Bootstrap Services: the API server and the cluster's DNS, on which everything else on a node depends. They are programmed first.

use service_watch::{Service, ServiceKind, ServicePort, TrafficPolicy};

use crate::table::ServiceEntry;

const DNS_PORT: u16 = 53;

/// Namespace and name of the Service whose endpoints are the API servers.
pub(crate) const API_SERVER: (&str, &str) = ("default", "kubernetes");

/// The namespace of the control plane. Only administrators may write its Services.
pub(crate) const CONTROL_PLANE_NAMESPACE: &str = "kube-system";

/// Whether a Service is the API server's, or serves DNS in the namespace of the control plane. In other namespaces, users may write
/// Services of port 53.
pub(crate) fn is_bootstrap_service(service: &Service) -> bool {
    let is_api_server = (service.name.namespace(), service.name.name()) == API_SERVER;
    let is_dns = || service.ports.iter().any(|port| port.port.get() == DNS_PORT);
    is_api_server || (service.name.namespace() == CONTROL_PLANE_NAMESPACE && is_dns())
}

/// The part of a bootstrap Service that is served before the initial list is complete: its ClusterIPs, which the cluster allocated.
/// The owner of any other address, and of a NodePort, may still be missing.
pub(crate) fn allocated_part(entry: &ServiceEntry) -> ServiceEntry {
    let service = entry.service.as_deref().map(|service| {
        let ports = service.ports.iter().map(|port| ServicePort { node_port: None, ..port.clone() });
        let service = Service {
            kind: ServiceKind::ClusterIp,
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            external_policy: TrafficPolicy::Cluster,
            source_ranges: None,
            health_check_node_port: None,
            ports: ports.collect(),
            ..service.clone()
        };
        service.into()
    });
    ServiceEntry { service, slices: entry.slices.clone(), ..ServiceEntry::default() }
}
