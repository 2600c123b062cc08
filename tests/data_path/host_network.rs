//! Endpoints on the node's own network: the kernel that forwards is the one that answers.

use std::net::IpAddr;

use lab::netns::Namespace;
use serde_json::json;

use crate::network::{CLUSTER_CIDR, Network};
use crate::objects::{manifests, ready, service};
use crate::serving;
use crate::traffic::{SILENCE, Server, tcp, tcp_within, udp, udp_within};

const OWN: &str = "192.168.1.1";
const LB: &str = "203.0.113.10:80";

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn source_ranges_do_not_drop_the_nodes_own_replies() {
    let network = Network::new(2, 1);
    let _server = Server::start(&Namespace::own().unwrap(), "host", 8080);
    let spec = json!({
        "type": "LoadBalancer",
        "clusterIPs": ["10.96.0.10"],
        "loadBalancerIPs": ["203.0.113.10"],
        "loadBalancerSourceRanges": ["192.168.1.2/32"],
    });
    let manifests = manifests(&[service("web", spec), ready("web", [OWN])]);
    let _agent = serving(&manifests, &[CLUSTER_CIDR]);
    for asked in [network.clients[0].tcp(LB), network.clients[0].udp(LB)] {
        assert_eq!(asked.map(|answer| answer.backend), Ok("host".to_owned()));
    }
    let silence = Err("timeout".to_owned());
    assert_eq!(network.clients[1].run(|| tcp_within(SILENCE, LB)), silence, "not in the ranges");
    assert_eq!(tcp_within(SILENCE, LB), silence, "neither is the node");
    assert_eq!(udp_within(SILENCE, LB), silence);
    assert!(tcp("10.96.0.10:80").is_ok(), "ranges are about load-balancer IPs");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_nodes_own_traffic_past_services_keeps_its_source() {
    let _network = Network::new(1, 1);
    // Another address comes first where the kernel chooses one to masquerade with.
    lab::link::add_dummy("first", &["172.30.0.1/24"]).unwrap();
    lab::link::add_address("lo", "172.30.0.2/32").unwrap();
    let _server = Server::start(&Namespace::own().unwrap(), "host", 9999);
    let _other = Server::start(&Namespace::own().unwrap(), "endpoint", 8080);
    let manifests = manifests(&[service("web", json!({"clusterIPs": ["10.96.0.10"]})), ready("web", [OWN])]);
    let _agent = serving(&manifests, &[CLUSTER_CIDR]);
    let own: IpAddr = OWN.parse().unwrap();
    assert_eq!(tcp("192.168.1.1:9999").map(|answer| answer.source), Ok(own));
    assert_eq!(udp("192.168.1.1:9999").map(|answer| answer.source), Ok(own));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn udp_to_a_port_without_endpoints_reaches_no_other_port() {
    let network = Network::new(1, 1);
    let _servers = [9, 8080].map(|port| Server::start(&network.pods[0].namespace, "pod", port));
    let _host = Server::start(&Namespace::own().unwrap(), "host", 9);
    let ports = json!([
        {"name": "none", "protocol": "UDP", "port": 53},
        {"name": "udp", "protocol": "UDP", "port": 9},
    ]);
    let spec = json!({"clusterIPs": ["10.96.0.10"], "ports": ports});
    let manifests = manifests(&[service("web", spec), ready("web", [network.pods[0].v4])]);
    let _agent = serving(&manifests, &[CLUSTER_CIDR]);
    assert!(udp("10.96.0.10:9").is_ok());
    assert_eq!(udp("10.96.0.10:53"), Err("refused".to_owned()));
}
