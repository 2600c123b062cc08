//! Services work beside the rules of Docker and of network plugins, made with either kind of `iptables` before or after the agent starts.

use serde_json::json;

use crate::common::{Agent, Manifests, filter_knows, run};
use crate::network::{CLUSTER_CIDR, Network, masqueraded};
use crate::objects::{file, manifests, ready, service};
use crate::serving;
use crate::traffic::{Server, Try, tcp, udp};

/// As Docker makes them; then what a network plugin adds, so that its pods are reached although forwarding is denied.
const DOCKER: &str = "
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
:FLANNEL-FWD - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER-USER -j RETURN
-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.244.0.0/16 -j ACCEPT
-A FLANNEL-FWD -d 10.244.0.0/16 -j ACCEPT
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
:FLANNEL-POSTRTG - [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
:CNI-DN-1 - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 10.244.0.0/16 -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully
-A DOCKER -i docker0 -j RETURN
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment \"dnat name: cbr0\" -m multiport --dports 80 -j CNI-DN-1
-A CNI-DN-1 -p tcp --dport 80 -j DNAT --to-destination 10.244.1.3:80
COMMIT
";

/// As Calico makes them, on top of a policy that denies forwarding.
const CALICO: &str = "
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:cali-FORWARD - [0:0]
:cali-from-wl-dispatch - [0:0]
:cali-to-wl-dispatch - [0:0]
:cali-fw-pod - [0:0]
:cali-tw-pod - [0:0]
:cali-INPUT - [0:0]
:cali-wl-to-host - [0:0]
-A INPUT -j cali-INPUT
-A FORWARD -j cali-FORWARD
-A FORWARD -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-INPUT -i pod+ -g cali-wl-to-host
-A cali-INPUT -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-wl-to-host -j cali-from-wl-dispatch
-A cali-wl-to-host -j ACCEPT
-A cali-FORWARD -j MARK --set-xmark 0x0/0xe0000
-A cali-FORWARD -i pod+ -j cali-from-wl-dispatch
-A cali-FORWARD -o pod+ -j cali-to-wl-dispatch
-A cali-from-wl-dispatch -i pod1 -g cali-fw-pod
-A cali-from-wl-dispatch -i pod2 -g cali-fw-pod
-A cali-from-wl-dispatch -i pod3 -g cali-fw-pod
-A cali-from-wl-dispatch -m comment --comment \"Unknown interface\" -j DROP
-A cali-to-wl-dispatch -o pod1 -g cali-tw-pod
-A cali-to-wl-dispatch -o pod2 -g cali-tw-pod
-A cali-to-wl-dispatch -o pod3 -g cali-tw-pod
-A cali-to-wl-dispatch -m comment --comment \"Unknown interface\" -j DROP
-A cali-fw-pod -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A cali-fw-pod -m conntrack --ctstate INVALID -j DROP
-A cali-fw-pod -j MARK --set-xmark 0x10000/0x10000
-A cali-tw-pod -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A cali-tw-pod -m conntrack --ctstate INVALID -j DROP
-A cali-tw-pod -j MARK --set-xmark 0x10000/0x10000
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:cali-POSTROUTING - [0:0]
:cali-nat-outgoing - [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A POSTROUTING -j cali-POSTROUTING
-A cali-POSTROUTING -j cali-nat-outgoing
-A cali-nat-outgoing -s 10.244.0.0/16 ! -d 10.244.0.0/16 -j MASQUERADE --random-fully
-A CNI-HOSTPORT-DNAT -p tcp --dport 80 -j DNAT --to-destination 10.244.1.3:80
COMMIT
";

const CLUSTER_IP: &str = "10.96.0.10:80";
const EXTERNAL_IP: &str = "203.0.113.10:80";

/// When the foreign rules are made: before or after the agent starts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Before,
    After,
}

/// Everybody reaches the endpoint of a Service and not the pod with the hostPort, and is seen as who they are or as the
/// node, whoever comes first. Then again when the agent has been restarted, and after a change.
fn assert_services_work(iptables: &str, rules: &str, turn: Turn) {
    let network = Network::new(1, 3);
    let (client, pod) = (&network.clients[0], &network.pods[1]);
    let _web = Server::start(&network.pods[0].namespace, "web", 8080);
    let _host_port = Server::start(&network.pods[2].namespace, "host-port", 80);
    let web = |external: &str| {
        file(&[
            service("web", json!({"clusterIPs": ["10.96.0.10"], "externalIPs": [external]})),
            ready("web", ["10.244.1.1"]),
        ])
    };
    let manifests = manifests(&[]);
    manifests.write("web.json", &web("203.0.113.10"));
    let install = || run(&format!("ip link add docker0 type bridge && {iptables}-restore -w <<'EOF'{rules}EOF"));
    let list = || run(&format!("{iptables}-save | grep -v '^#' | sed 's/\\[.*\\]//'"));
    if turn == Turn::Before {
        install();
    }
    let start = |manifests: &Manifests| -> Agent { serving(manifests, &[CLUSTER_CIDR]) };
    let agent = start(&manifests);
    if turn == Turn::After {
        install();
    }
    let installed = list();
    let check = |external: &str, when: &str| {
        let mut cases: Vec<(&str, Try, Try)> = vec![
            ("client to ClusterIP", client.tcp(CLUSTER_IP), masqueraded("web", CLUSTER_IP)),
            ("client to ClusterIP by UDP", client.udp(CLUSTER_IP), masqueraded("web", CLUSTER_IP)),
            ("client to external IP", client.tcp(external), masqueraded("web", external)),
            ("pod to ClusterIP", pod.tcp(CLUSTER_IP), pod.seen_by("web", CLUSTER_IP)),
            ("pod to ClusterIP by UDP", pod.udp(CLUSTER_IP), pod.seen_by("web", CLUSTER_IP)),
            ("pod to external IP", pod.tcp(external), masqueraded("web", external)),
            ("endpoint to itself", network.pods[0].tcp(CLUSTER_IP), masqueraded("web", CLUSTER_IP)),
            ("node to ClusterIP", tcp(CLUSTER_IP), masqueraded("web", CLUSTER_IP)),
            ("node to ClusterIP by UDP", udp(CLUSTER_IP), masqueraded("web", CLUSTER_IP)),
        ];
        // What is the others' stays theirs.
        cases.push(("client to hostPort", client.tcp("192.168.1.1:80"), client.seen_by("host-port", "192.168.1.1:80")));
        for (what, found, right) in cases {
            assert_eq!(found, right, "{what}, {when}");
        }
    };
    check(EXTERNAL_IP, "at first");
    agent.kill();
    let mut agent = start(&manifests);
    manifests.write("web.json", &web("203.0.113.11"));
    agent.until("take in a change", |_| filter_knows("203.0.113.11"));
    agent.until("serve it", |_| client.tcp("203.0.113.11:80").is_ok());
    check("203.0.113.11:80", "after a restart and a change");
    assert_eq!(list(), installed, "the rules of others have changed");
}

/// An accept in one table does not keep another from dropping, so this is for whoever has made such a chain to mend.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_rule_in_the_warning_fixes_a_forward_policy_of_drop() {
    for iptables in ["iptables-nft", "iptables-legacy"] {
        let network = Network::new(1, 2);
        let _web = Server::start(&network.pods[0].namespace, "web", 8080);
        let manifests =
            manifests(&[service("web", json!({"clusterIPs": ["10.96.0.10"]})), ready("web", ["10.244.1.1"])]);
        run(&format!("{iptables} -w -P FORWARD DROP"));
        let agent = serving(&manifests, &[CLUSTER_CIDR]);
        let (client, pod) = (&network.clients[0], &network.pods[1]);
        // Those of iptables-legacy show nowhere in nf_tables.
        let warns = agent.log().contains("drops forwarded packets");
        assert_eq!(warns, iptables == "iptables-nft", "{}", agent.log());
        run(&format!("{iptables} -w -I FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"));
        for answer in [client.tcp(CLUSTER_IP), client.udp(CLUSTER_IP), pod.tcp(CLUSTER_IP), pod.udp(CLUSTER_IP)] {
            assert!(answer.is_ok(), "{iptables}: {answer:?}");
        }
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn services_work_next_to_docker_with_iptables_nft() {
    assert_services_work("iptables-nft", DOCKER, Turn::Before);
    assert_services_work("iptables-nft", DOCKER, Turn::After);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn services_work_next_to_docker_with_iptables_legacy() {
    assert_services_work("iptables-legacy", DOCKER, Turn::Before);
    assert_services_work("iptables-legacy", DOCKER, Turn::After);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn services_work_next_to_calico_with_iptables_nft() {
    assert_services_work("iptables-nft", CALICO, Turn::Before);
    assert_services_work("iptables-nft", CALICO, Turn::After);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn services_work_next_to_calico_with_iptables_legacy() {
    assert_services_work("iptables-legacy", CALICO, Turn::Before);
    assert_services_work("iptables-legacy", CALICO, Turn::After);
}
