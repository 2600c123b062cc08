//! The node, a client outside the cluster, a pod that is a client, pods that answer, and the honest Services.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use lab::link;
use lab::netns::{End, Namespace, isolate};
use lab::objects::{self, State, port, with};
use serde_json::{Value, json};

use crate::bench::load::NODE;

/// Addresses of pods that answer all along.
pub(crate) const STABLE_ENDPOINTS: [&str; 2] = ["10.244.1.1", "10.244.1.2"];
/// Addresses of pods that answer too, and are endpoints now and then.
pub(crate) const CHANGING_ENDPOINTS: [&str; 3] = ["10.244.1.3", "10.244.1.4", "10.244.1.5"];
/// The address of a pod that belongs to somebody else, and is an endpoint of no honest Service.
pub(crate) const STRANGER: &str = "10.244.1.66";
/// Every address that answers for honest Services.
pub(crate) fn all_servers() -> impl Iterator<Item = &'static str> {
    STABLE_ENDPOINTS.into_iter().chain(CHANGING_ENDPOINTS)
}

/// Each Service has a port of its own at its endpoints. Of two connections of one client from one port to one real server, by
/// way of two VIPs, the kernel keeps the second from being made, or finds the younger only: connection tracking has one entry for
/// what comes back (`__nf_conntrack_confirm`), and so has IPVS (`ip_vs_conn_out_get`). That is so whatever an agent does, and it is
/// no test of one.
pub(crate) const PORTS: [(&str, u16); 8] = [
    ("tcp", 8080),
    ("affinity", 8081),
    ("udp", 8082),
    ("ways", 8083),
    ("local", 8084),
    ("still", 8085),
    (DNS, 8086),
    // Of no Service: for whoever asks a pod by its own address.
    ("pod", POD_PORT),
];
/// The Service for DNS, which is in `kube-system`.
const DNS: &str = "kube-dns";
/// Where pods answer that are asked by their own address.
const POD_PORT: u16 = 8087;
/// Of honest Services: there are younger ones, and older ones.
const CREATED: &str = "2025-06-01T00:00:00Z";
/// The address of the control plane, beside the client's.
pub(crate) const CONTROL_PLANE: &str = "192.168.1.3";

fn target_port(service: &str) -> u16 {
    PORTS.iter().find(|(name, _)| *name == service).map_or(8080, |(_, port)| *port)
}

/// Services that somebody changes in the kernel.
pub(crate) const VICTIMS: usize = 10;

/// Network namespaces; the node's is that of the thread that makes this.
pub(crate) struct Cluster {
    pub(crate) node: Namespace,
    pub(crate) client: Namespace,
    pub(crate) pod: Namespace,
    pub(crate) servers: Namespace,
}

impl Cluster {
    pub(crate) fn new() -> Result<Self> {
        isolate()?;
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
        let cluster = Self {
            node: Namespace::own()?,
            client: Namespace::new()?,
            pod: Namespace::new()?,
            servers: Namespace::new()?,
        };
        let cable = |device: &str, near: &str, far: &Namespace, addresses: &[&str]| {
            Namespace::connect(
                End { namespace: &cluster.node, device, addresses: &[near] },
                End { namespace: far, device: "eth0", addresses },
            )
        };
        cable("eth0", "192.168.1.1/24", &cluster.client, &["192.168.1.2/24", &format!("{CONTROL_PLANE}/24")])?;
        cluster.client.run(|| link::add_route_via("0.0.0.0/0", "192.168.1.1"))??;
        let addresses: Vec<String> = all_servers().chain([STRANGER]).map(|it| format!("{it}/32")).collect();
        cable("servers", "10.244.0.1/32", &cluster.servers, &addresses.iter().map(String::as_str).collect::<Vec<_>>())?;
        cable("pod", "10.244.0.1/32", &cluster.pod, &["10.244.2.1/32"])?;
        cluster.node.run(|| {
            link::add_route_dev("10.244.1.0/24", "servers")?;
            link::add_route_dev("10.244.2.1", "pod")
        })??;
        for pod in [&cluster.servers, &cluster.pod] {
            pod.run(|| {
                link::add_route_dev("10.244.0.1", "eth0")?;
                link::add_route_via("0.0.0.0/0", "10.244.0.1")
            })??;
        }
        // What belongs to others, and is to stay.
        cluster.node.exec("ipvsadm -A -t 172.16.0.1:80 -s rr")?;
        cluster.node.exec("ipvsadm -a -t 172.16.0.1:80 -r 172.16.0.2:80 -m")?;
        cluster.node.exec("nft add table ip other")?;
        Ok(cluster)
    }
}

/// A network namespace with the node's addresses, and nothing around it.
pub(crate) fn namespace_like_node() -> Result<Namespace> {
    let namespace = Namespace::new()?;
    namespace.run(|| link::add_dummy("eth0", &["192.168.1.1/24", "10.244.0.1/32"]))??;
    Ok(namespace)
}

/// What a client asks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) name: &'static str,
    pub(crate) address: &'static str,
    /// Whether a client outside the cluster, a pod, and the node itself ask it.
    pub(crate) is_asked_by: [bool; 3],
}

impl Target {
    /// Its address and port.
    pub(crate) fn socket_address(&self) -> Result<SocketAddr> {
        self.address.parse().with_context(|| format!("`{}` is no address with a port", self.address))
    }
}

/// Where a connection is made again and again. Their endpoints come and go.
pub(crate) const TCP_TARGETS: [Target; 5] = [
    Target { name: "ClusterIP", address: "10.97.0.1:80", is_asked_by: [true; 3] },
    Target { name: "ClusterIP with affinity", address: "10.97.0.2:80", is_asked_by: [true; 3] },
    Target { name: "NodePort", address: "192.168.1.1:30080", is_asked_by: [true, true, false] },
    Target { name: "external IP", address: "203.0.113.4:80", is_asked_by: [true; 3] },
    Target { name: "load balancer, policy Local", address: "198.51.100.5:80", is_asked_by: [true; 3] },
];
/// Where connections stay open: its endpoints stay.
pub(crate) const LONG_LIVED: Target = Target { name: "open", address: "10.97.0.6:80", is_asked_by: [true; 3] };
/// By UDP; their endpoints stay.
pub(crate) const UDP_TARGETS: [Target; 2] = [
    Target { name: "UDP", address: "10.97.0.3:80", is_asked_by: [true; 3] },
    Target { name: "DNS", address: "10.96.255.10:53", is_asked_by: [true; 3] },
];

/// The Services that have traffic.
pub(crate) fn services() -> Vec<Value> {
    vec![
        service("tcp", "10.97.0.1", &json!({})),
        service("affinity", "10.97.0.2", &json!({"sessionAffinity": "ClientIP"})),
        service("udp", "10.97.0.3", &json!({"ports": [port("a", "UDP", 80)]})),
        service(
            "ways",
            "10.97.0.4",
            &json!({"type": "NodePort", "externalIPs": ["203.0.113.4"],
            "ports": [{"name": "a", "protocol": "TCP", "port": 80, "nodePort": 30080}]}),
        ),
        service("local", "10.97.0.5", &json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"})),
        service("still", "10.97.0.6", &json!({})),
        service(DNS, "10.96.255.10", &json!({"ports": [port("a", "UDP", 53)]})),
    ]
}

/// Which of them have endpoints that come and go.
pub(crate) const CHANGING_SERVICES: [&str; 4] = ["tcp", "affinity", "ways", "local"];

/// All but that for DNS are in one namespace.
fn place(name: &str, object: Value) -> Value {
    let namespace = if name == DNS { "kube-system" } else { "honest" };
    with(object, json!({"metadata": {"namespace": namespace, "creationTimestamp": CREATED}}))
}

pub(crate) fn service(name: &str, vip: &str, spec: &Value) -> Value {
    let service = with(objects::service(name, &[vip], &[port("a", "TCP", 80)]), json!({"spec": spec}));
    let status = (name == "local").then(|| objects::load_balancer(&["198.51.100.5"]));
    place(name, with(service, json!({"status": status})))
}

/// The slice of such a Service: with endpoints that are ready, and some that terminate.
pub(crate) fn slice(name: &str, ready: &[&str], terminating: &[&str]) -> Value {
    let endpoint = |address, state| with(objects::endpoint(address, state), json!({"nodeName": NODE}));
    let ready = ready.iter().map(|it| endpoint(it, State::Ready));
    let endpoints = ready.chain(terminating.iter().map(|it| endpoint(it, State::Terminating)));
    let protocol = if ["udp", DNS].contains(&name) { "UDP" } else { "TCP" };
    let ports = [port("a", protocol, target_port(name))];
    place(name, objects::slice(&format!("{name}-1"), name, &ports, &endpoints.collect::<Vec<_>>()))
}

/// The VIP of a Service that somebody changes in the kernel.
pub(crate) fn victim_vip(number: usize) -> String {
    format!("10.98.0.{}", number + 1)
}

/// That Service, with its slice of two endpoints that nobody asks.
pub(crate) fn victim(number: usize) -> [Value; 2] {
    let name = format!("victim-{number}");
    [service(&name, &victim_vip(number), &json!({})), slice(&name, &["10.245.0.1", "10.245.0.2"], &[])]
}
