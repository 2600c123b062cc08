//! What users request who may write Services in a namespace of their own, and a node with an API server beside it: the node keeps its
//! API server, and every other Service keeps what is its own.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::cluster::Cluster;
use common::{Agent, HEALTH, Manifests, addresses, get, ipvs, observed_filter};
use lab::link;
use lab::netns::{End, Namespace, isolate};
use lab::objects::{self, load_balancer, port, with};
use reconciler::filter::SourceRangesElement;
use serde_json::{Value, json};
use tempfile::TempDir;
use test_apiserver::{Server, Streaming};

/// The node, in the namespace of the test's thread.
const NODE: &str = "192.168.50.1";
/// The API server, in a namespace of its own.
const API_SERVER: &str = "192.168.50.7";
/// The name that agents know the API server by.
const API_SERVER_NAME: &str = "control-plane.test";

/// A node and an API server on one network.
struct Network {
    cluster: Cluster,
    api_server: SocketAddr,
    /// What the node resolves names with.
    hosts: TempDir,
    _control_plane: Namespace,
}

impl Network {
    /// A cluster of this Node, `default/kubernetes` and DNS.
    fn new() -> Self {
        isolate().unwrap();
        let control_plane = Namespace::new().unwrap();
        Namespace::connect(
            End { namespace: &Namespace::own().unwrap(), device: "eth0", addresses: &[&format!("{NODE}/24")] },
            End { namespace: &control_plane, device: "eth0", addresses: &[&format!("{API_SERVER}/24")] },
        )
        .unwrap();
        let server = Server::new();
        let address = SocketAddr::new(API_SERVER.parse().unwrap(), 0);
        let api_server = control_plane.run(|| server.listen_in_thread_at(address)).unwrap().unwrap();
        let cluster = Cluster { server, dir: TempDir::new().unwrap(), is_impatient: false };
        Server::write_kubeconfig(&cluster.kubeconfig(), api_server);
        cluster.apply(objects::node("node-a", &[NODE]));
        let https = |number| [port("https", "TCP", number)];
        cluster.apply(objects::service("kubernetes", &["10.96.0.1"], &https(443)));
        cluster.apply(kubernetes(&[API_SERVER]));
        let dns = [port("dns", "UDP", 53)];
        cluster.apply(in_namespace("kube-system", objects::service("kube-dns", &["10.96.0.10"], &dns)));
        let slice = objects::slice("kube-dns", "kube-dns", &dns, &objects::ready(["10.244.1.2"]));
        cluster.apply(in_namespace("kube-system", slice));
        let network = Self { cluster, api_server, hosts: TempDir::new().unwrap(), _control_plane: control_plane };
        network.resolve(&[API_SERVER]);
        network
    }

    /// From now on the API server's name has these addresses.
    fn resolve(&self, addresses: &[&str]) {
        let lines: Vec<String> = addresses.iter().map(|address| format!("{address} {API_SERVER_NAME}\n")).collect();
        // In place, because the file is mounted.
        fs::write(self.hosts_file(), lines.concat()).unwrap();
    }

    fn hosts_file(&self) -> impl AsRef<Path> {
        self.hosts.path().join("hosts")
    }

    /// An agent that knows the API server by its name.
    fn agent(&self, flags: &[&str]) -> Agent {
        let mut command = Command::new("unshare");
        let mount = "mount --bind \"$1\" /etc/hosts && shift && exec \"$@\"";
        command.args(["--mount", "sh", "-c", mount, "sh"]).arg(self.hosts_file().as_ref());
        command.arg(env!("CARGO_BIN_EXE_kube-ipvs")).args(["--hostname-override=node-a", "--ipvs-min-sync-period=0s"]);
        command.arg(format!("--master=http://{API_SERVER_NAME}:{}", self.api_server.port()));
        // Look-ups of the name, with fault points.
        command.env("API_SERVER_PERIODS_DIVIDED_BY", "10");
        Agent::start_command(command.args(flags))
    }

    /// Whether the node reaches the API server itself.
    fn reaches_api_server(&self) -> bool {
        TcpStream::connect_timeout(&self.api_server, Duration::from_secs(1)).is_ok()
    }
}

fn in_namespace(namespace: &str, object: Value) -> Value {
    with(object, json!({"metadata": {"namespace": namespace}}))
}

/// The slice that API servers write of themselves.
fn kubernetes(addresses: &[&str]) -> Value {
    let slice = objects::slice("kubernetes", "kubernetes", &[port("https", "TCP", 6443)], &objects::ready(addresses));
    with(slice, json!({"addressType": "IPv4"}))
}

/// A Service of a user, with one port, and its slice.
fn of_user(namespace: &str, name: &str, cluster_ip: &str, number: u16, endpoint: &str) -> [Value; 2] {
    let ports = [port("p", "TCP", number)];
    [
        in_namespace(namespace, objects::service(name, &[cluster_ip], &ports)),
        in_namespace(namespace, objects::slice(name, name, &ports, &objects::ready([endpoint]))),
    ]
}

/// The endpoints at a front end of TCP, as `ADDRESS:PORT`, that get new connections.
fn endpoints(front_end: &str) -> Vec<String> {
    let prefix = format!("-a -t {front_end} -r ");
    let lines = ipvs().into_iter().filter(|line| !line.ends_with("-w 0"));
    lines.filter_map(|line| Some(line.strip_prefix(&prefix)?.split(' ').next()?.to_owned())).collect()
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn nothing_requested_is_served_before_the_list_is_complete() {
    let network = Network::new();
    let requested = [API_SERVER, "10.96.0.1", "10.96.0.10", "203.0.113.1"];
    // By name it comes before all others.
    for object in of_user("aaa", "evil", "10.96.5.5", 53, "10.244.9.66") {
        network.cluster.apply(with(object, json!({"spec": {"externalIPs": requested}})));
    }
    // The whole list arrives, but not its end.
    network.cluster.server.streaming(Streaming::Unknown);
    let mut agent = network.agent(&[]);
    agent.binds(&["10.96.0.1/32", "10.96.0.10/32"]);
    let served = ipvs();
    assert!(!served.iter().any(|line| line.contains("10.244.9.66")), "{served:#?}");
    assert!(network.reaches_api_server());
    agent.kill();
    // Whatever the first one left, the next one starts with.
    let mut agent = network.agent(&[]);
    agent.says("before all other Services");
    network.cluster.server.end_watches();
    agent.says("audited");
    agent.binds(&["10.96.0.1/32", "10.96.0.10/32", "10.96.5.5/32", "203.0.113.1/32"]);
    assert!(network.reaches_api_server());
    assert_eq!(endpoints("203.0.113.1:53"), ["10.244.9.66:53"]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn an_older_service_takes_no_address_of_a_load_balancer() {
    const ADDRESS: &str = "203.0.113.7";
    let network = Network::new();
    let old = json!({"metadata": {"creationTimestamp": "2020-01-01T00:00:00Z"}});
    for object in of_user("aaa", "old", "10.96.5.5", 443, "10.244.9.66") {
        network.cluster.apply(with(object, old.clone()));
    }
    let restricted = json!({
        "metadata": {"creationTimestamp": "2025-01-01T00:00:00Z"},
        "spec": {"type": "LoadBalancer", "loadBalancerSourceRanges": ["198.51.100.0/24"]},
    });
    let [bank, slice] = of_user("bank", "web", "10.96.6.6", 443, "10.244.1.2");
    let bank = with(bank, restricted);
    // It has no address yet, and the older Service writes the one that it will get.
    network.cluster.apply(bank.clone());
    network.cluster.apply(slice);
    let [claims, _] = of_user("aaa", "old", "10.96.5.5", 443, "10.244.9.66");
    network.cluster.apply(with(with(claims, old), json!({"spec": {"externalIPs": [ADDRESS]}})));
    let mut agent = network.agent(&[]);
    agent.says("audited");
    agent.until("serve what nobody else has", |_| endpoints("203.0.113.7:443") == ["10.244.9.66:443"]);
    network.cluster.apply(with(bank, json!({"status": load_balancer(&[ADDRESS])})));
    agent.until("give it to whom the load balancer assigned it", |_| {
        endpoints("203.0.113.7:443") == ["10.244.1.2:443"] && has_source_ranges(ADDRESS, "bank/web")
    });
    agent.says("203.0.113.7:443 belongs to Service bank/web");
    agent.kill();
    let mut agent = network.agent(&["--ipvs-sync-period=100ms"]);
    agent.says("audited");
    agent.audits(2);
    assert_eq!(endpoints("203.0.113.7:443"), ["10.244.1.2:443"]);
    assert!(has_source_ranges(ADDRESS, "bank/web"));
}

/// Whether only the source ranges of a Service may connect to an address.
fn has_source_ranges(address: &str, service: &str) -> bool {
    let address: IpAddr = address.parse().unwrap();
    let (filter, mut names) = (observed_filter(), Vec::new());
    for (_, elements) in filter.front_ends.iter().filter(|(front_end, _)| front_end.address == address) {
        names.push(match &elements.source_ranges {
            SourceRangesElement::Service(name) => name.to_string(),
            other => format!("{other:?}"),
        });
    }
    names == [service]
}

/// Lets a user request external IPs, one of which nobody else has, and waits until that one is served.
fn request(network: &Network, agent: &mut Agent, name: &str, number: u16, addresses: &[&str]) {
    let index = name.bytes().map(u16::from).sum::<u16>() % 250;
    let free = format!("203.0.114.{index}");
    let requested = [addresses, &[free.as_str()]].concat();
    for object in of_user("aaa", name, &format!("10.96.5.{index}"), number, "10.244.9.66") {
        network.cluster.apply(with(object, json!({"spec": {"externalIPs": requested}})));
    }
    agent.until("serve what is nobody's", |_| !endpoints(&format!("{free}:{number}")).is_empty());
}

fn is_bound(address: &str) -> bool {
    addresses().contains(&format!("{address}/32"))
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_api_servers_addresses_stay_its_own_whatever_names_them() {
    const ENDPOINT: &str = "192.168.50.8";
    const BY_NAME: &str = "192.168.50.9";
    let network = Network::new();
    // Only the name says where the node reaches it: there is a load balancer between them.
    network.cluster.apply(kubernetes(&[ENDPOINT]));
    let mut agent = network.agent(&[]);
    agent.says("audited");
    let port = network.api_server.port();
    request(&network, &mut agent, "a", 8080, &[API_SERVER, ENDPOINT]);
    request(&network, &mut agent, "b", port, &[API_SERVER, ENDPOINT]);
    // One line for all addresses of a Service.
    agent.says("is the address of the API server").says(&format!("and so for {ENDPOINT}"));
    // The only API server stops in order, and so takes its endpoint away.
    network.cluster.apply(kubernetes(&[]));
    request(&network, &mut agent, "c", 8080, &[ENDPOINT]);
    network.cluster.server.delete("EndpointSlice", "default", "kubernetes");
    request(&network, &mut agent, "d", 8080, &[ENDPOINT]);
    assert!(!is_bound(ENDPOINT) && endpoints(&format!("{ENDPOINT}:8080")).is_empty());
    assert!(!is_bound(API_SERVER) && network.reaches_api_server());
    // Nobody has this address, until the name leads there.
    request(&network, &mut agent, "e", 8080, &[BY_NAME]);
    assert!(is_bound(BY_NAME));
    network.resolve(&[API_SERVER, BY_NAME]);
    agent.until("give it back", |_| !is_bound(BY_NAME) && endpoints(&format!("{BY_NAME}:8080")).is_empty());
    agent.says(&format!("{BY_NAME} is the address of the API server"));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_bound_address_that_hides_the_api_server_is_released_at_the_start() {
    let network = Network::new();
    let mut agent = network.agent(&[]);
    agent.says("audited");
    agent.kill();
    link::add_address("kube-ipvs0", &format!("{API_SERVER}/32")).unwrap();
    assert!(!network.reaches_api_server());
    let mut agent = network.agent(&[]);
    agent.says("unbound an address of the API server").says("audited");
    agent.binds(&["10.96.0.1/32", "10.96.0.10/32"]);
    assert!(network.reaches_api_server());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_nodes_ports_stay_its_own_without_a_node_object() {
    let kubelet = format!("{NODE}:10250");
    let network = Network::new();
    let mut agent = network.agent(&[]);
    agent.says("audited");
    network.cluster.server.delete("Node", "", "node-a");
    agent.says("this agent's Node has disappeared");
    request(&network, &mut agent, "a", 10250, &[NODE]);
    assert_eq!(endpoints(&kubelet), [""; 0]);
    agent.until("treat the Node as deleted", |_| get(HEALTH, "/healthz").is_some_and(|answer| answer.status == 503));
    request(&network, &mut agent, "b", 10250, &[NODE]);
    agent.says(&format!("{NODE} is the address of a Node"));
    assert_eq!(endpoints(&kubelet), [""; 0]);
    agent.kill();
    // This one has never seen the Node.
    let mut agent = network.agent(&[]);
    agent.says("audited").says(&format!("{NODE} is the address of a Node"));
    assert_eq!(endpoints(&kubelet), [""; 0]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_pods_address_stays_the_pods_and_is_refused_with_an_event() {
    const POD: &str = "10.244.1.2";
    const OTHER_POD: &str = "10.244.2.2";
    const BY_ENDPOINT: &str = "10.245.0.2";
    let network = Network::new();
    let pod = Namespace::new().unwrap();
    Namespace::connect(
        End { namespace: &Namespace::own().unwrap(), device: "pod0", addresses: &["10.244.1.1/24"] },
        End { namespace: &pod, device: "eth0", addresses: &[&format!("{POD}/24")] },
    )
    .unwrap();
    let listener = pod.run(|| TcpListener::bind((POD, 8080))).unwrap().unwrap();
    let reaches_pod = || TcpStream::connect_timeout(&listener.local_addr().unwrap(), Duration::from_secs(10)).is_ok();
    let node = with(objects::node("node-a", &[NODE]), json!({"spec": {"podCIDRs": ["10.244.1.0/24"]}}));
    network.cluster.apply(node);
    let [web, slice] = of_user("bank", "web", "10.96.6.6", 80, BY_ENDPOINT);
    let endpoints_of_web = json!([{"addresses": [BY_ENDPOINT], "nodeName": "node-b"}]);
    network.cluster.apply(web).apply(with(slice, json!({"endpoints": endpoints_of_web})));
    let mut agent = network.agent(&["--cluster-cidr=10.244.0.0/16"]);
    agent.says("audited");
    let pods = [POD, OTHER_POD, BY_ENDPOINT];
    request(&network, &mut agent, "evil", 443, &pods);
    agent.until("post an Event", |_| {
        network.cluster.server.events().iter().any(|event| event["reason"] == "AddressIsAPods")
    });
    agent.says("is the address of a pod").says(&format!("and so for {OTHER_POD}, {BY_ENDPOINT}"));
    for pod in pods {
        assert!(!is_bound(pod) && endpoints(&format!("{pod}:443")).is_empty(), "{pod}");
    }
    assert!(reaches_pod());
    agent.kill();
    let mut agent = network.agent(&["--cluster-cidr=10.244.0.0/16", "--allow-pod-addresses"]);
    agent.says("audited");
    agent.until("serve them if that is allowed", |_| pods.iter().all(|pod| is_bound(pod)));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn long_names_have_their_source_ranges_or_no_load_balancer_ips() {
    isolate().unwrap();
    let manifests = Manifests::new();
    let restricted = |namespace: usize, name: usize, number: u16| {
        let [service, slice] = of_user(
            &"n".repeat(namespace),
            &"s".repeat(name),
            &format!("10.96.5.{number}"),
            80,
            &format!("10.244.9.{number}"),
        );
        let patch = json!({
            "spec": {"type": "LoadBalancer", "loadBalancerSourceRanges": ["198.51.100.0/24"]},
            "status": load_balancer(&[format!("203.0.113.{number}")]),
        });
        objects::manifest(&[with(service, patch), slice])
    };
    let cases = [(63, 63, true), (120, 126, true), (121, 126, false), (253, 252, false), (253, 253, false)];
    for (number, (namespace, name, _)) in (1..).zip(cases) {
        manifests.write(&format!("{number}.json"), &restricted(namespace, name, number));
    }
    let mut agent = manifests.agent(&["--ipvs-sync-period=100ms"]);
    agent.says("audited").says("give it a shorter name");
    agent.audits(2);
    for (number, (namespace, name, is_served)) in (1..).zip(cases) {
        let endpoint = format!("10.244.9.{number}:80");
        assert_eq!(endpoints(&format!("10.96.5.{number}:80")), [endpoint.as_str()], "{number}");
        let of_balancer = endpoints(&format!("203.0.113.{number}:80"));
        assert_eq!(of_balancer, if is_served { vec![endpoint] } else { vec![] }, "{number}");
        let service = format!("{}/{}", "n".repeat(namespace), "s".repeat(name));
        assert_eq!(has_source_ranges(&format!("203.0.113.{number}"), &service), is_served, "{number}");
    }
    assert!(!agent.log().contains("will try again"), "{}", agent.log());
}
