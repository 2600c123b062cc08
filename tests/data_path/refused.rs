//! VIPs that are addresses of Nodes: they are not served, and whoever asked for them is told.

use serde_json::{Value, json};
use tempfile::TempDir;
use test_apiserver::Server as ApiServer;

use crate::common::{Agent, addresses, ipvs};
use crate::network::{CLUSTER_CIDR, Network, masqueraded, node};
use crate::objects::{manifests, ready, service};
use crate::traffic::Server;
use crate::{FLAGS, serving};

/// The second client's address: that of a Node.
fn other_node() -> Value {
    lab::objects::node("node-b", &["192.168.2.2"])
}

/// A Service that asks for this Node's address, for another's, and for one that is free.
fn greedy() -> [Value; 2] {
    let spec = json!({
        "type": "NodePort",
        "clusterIPs": ["10.96.0.10"],
        "externalIPs": ["192.168.1.1", "192.168.2.2", "203.0.113.10"],
        "ports": [{"name": "tcp", "protocol": "TCP", "port": 80, "nodePort": 30080}],
    });
    [service("greedy", spec), ready("greedy", ["10.244.1.1"])]
}

/// What is served of it, and what is not.
fn check(network: &Network, agent: &mut Agent) {
    agent.until("serve the VIPs", |_| addresses() == ["10.96.0.10/32", "203.0.113.10/32"]);
    let servers = ipvs();
    for address in ["192.168.1.1:80", "192.168.2.2:80"] {
        assert!(servers.iter().all(|line| !line.contains(&format!(" {address} "))), "{servers:#?}");
    }
    let client = &network.clients[0];
    for target in ["203.0.113.10:80", "192.168.1.1:30080", "10.96.0.10:80"] {
        assert_eq!(client.tcp(target), masqueraded("web", target), "{target}");
    }
    // Both Nodes are who they were.
    assert_eq!(client.tcp("192.168.1.1:80"), client.seen_by("node-a", "192.168.1.1:80"));
    assert_eq!(client.tcp("192.168.2.2:80"), client.seen_by("node-b", "192.168.2.2:80"));
    assert_eq!(client.udp("192.168.2.2:53"), Err("refused".to_owned()), "node-b answers for itself");
    // One line for all addresses of a Service.
    let log = agent.log();
    let refused: Vec<&str> = log.lines().filter(|line| line.contains("is the address of a Node")).collect();
    assert!(matches!(refused[..], [line] if line.contains("WARN") && line.contains("default/greedy")), "{log}");
    for vip in ["192.168.1.1", "192.168.2.2"] {
        assert!(refused[0].contains(vip), "{vip}: {}", refused[0]);
    }
}

fn servers(network: &Network) -> [Server; 3] {
    [
        Server::start(&network.pods[0].namespace, "web", 8080),
        Server::start(&lab::netns::Namespace::own().unwrap(), "node-a", 80),
        Server::start(&network.clients[1].namespace, "node-b", 80),
    ]
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn an_external_ip_of_a_node_is_refused_and_logged() {
    let network = Network::new(2, 1);
    let _servers = servers(&network);
    let manifests = manifests(&greedy());
    manifests.write("node-b.yaml", &other_node());
    let mut agent = serving(&manifests, &[CLUSTER_CIDR]);
    check(&network, &mut agent);
    // Once the other Node is gone its address is free; the own one never is.
    manifests.remove("node-b.yaml");
    agent.until("serve the address of a Node that is gone", |_| addresses().contains(&"192.168.2.2/32".to_owned()));
    assert!(!addresses().contains(&"192.168.1.1/32".to_owned()));
    // It comes again: whoever has it must be reached.
    manifests.write("node-b.yaml", &other_node());
    agent.until("give the address up", |_| !addresses().contains(&"192.168.2.2/32".to_owned()));
    let client = &network.clients[0];
    assert_eq!(client.tcp("192.168.2.2:80"), client.seen_by("node-b", "192.168.2.2:80"));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn an_external_ip_of_a_node_is_an_event_of_its_service() {
    let network = Network::new(2, 1);
    let _servers = servers(&network);
    let (server, dir) = (ApiServer::new(), TempDir::new().unwrap());
    let address = server.listen_in_thread().unwrap();
    let kubeconfig = dir.path().join("kubeconfig");
    ApiServer::write_kubeconfig(&kubeconfig, address);
    for node in [node(), other_node()] {
        server.apply(node);
    }
    for object in greedy() {
        server.apply(object);
    }
    let kubeconfig = format!("--kubeconfig={}", kubeconfig.display());
    let flags = [kubeconfig.as_str(), "--watch-all-nodes", "--ipvs-min-sync-period=0s", CLUSTER_CIDR];
    let mut agent = Agent::start(&[&FLAGS[..], &flags].concat());
    agent.says("audited");
    check(&network, &mut agent);
    let warnings = || {
        let events = server.events().into_iter().filter(|event| event["type"] == "Warning");
        events.collect::<Vec<Value>>()
    };
    agent.until("post an Event", |_| warnings().len() == 1);
    for event in warnings() {
        assert_eq!(event["regarding"]["kind"], "Service", "{event}");
        assert_eq!(event["regarding"]["name"], "greedy", "{event}");
        assert_eq!(event["regarding"]["namespace"], "default", "{event}");
    }
    let notes: Vec<String> = warnings().iter().map(|event| event["note"].to_string()).collect();
    for vip in ["192.168.1.1", "192.168.2.2"] {
        assert!(notes.iter().any(|note| note.contains(vip)), "{notes:?}");
    }
}
