//! Objects that nobody means well with: they cost something, but they open nothing and harm no other Service.

use std::fmt::Write as _;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::{Agent, filter_knows, ipvs, metric, observed_filter, run};
use crate::network::{CLUSTER_CIDR, Network, masqueraded};
use crate::objects::{file, manifests, ready, service};
use crate::traffic::{PATIENCE, SILENCE, Server, tcp_within};
use crate::{finds_nothing_to_change, serving};

/// Lets some audits pass: nothing may be found otherwise than it was left.
fn comes_to_rest(agent: &mut Agent) {
    agent.audits(2);
    let before = agent.log();
    agent.audits(3);
    let log = agent.log();
    assert_eq!(log.lines().count(), before.lines().count(), "{}", &log[before.len()..]);
    assert!(!log.contains("somebody else"), "{log}");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_service_of_65535_ports_harms_no_other() {
    const WITH_ENDPOINTS: usize = 1000;
    let network = Network::new(1, 1);
    let client = &network.clients[0];
    let _server = Server::start(&network.pods[0].namespace, "web", 8080);
    let manifests = manifests(&[service("web", json!({"clusterIPs": ["10.96.0.10"]})), ready("web", ["10.244.1.1"])]);
    // An audit of so much takes its time.
    let mut agent = serving(&manifests, &[CLUSTER_CIDR, "--ipvs-sync-period=10m"]);
    let name = |port: usize| format!("p{port}");
    let ports = |count| -> Vec<Value> {
        (1..=count).map(|port| json!({"name": name(port), "protocol": "TCP", "port": port})).collect()
    };
    let many = |count| service("many", json!({"clusterIPs": ["10.96.0.11"], "ports": ports(count)}));
    let mut slice = ready("many", ["10.244.1.1"]);
    slice["ports"] = (0..WITH_ENDPOINTS)
        .map(|index| json!({"name": name(1 + index * 65), "protocol": "TCP", "port": 8080}))
        .collect();
    let start = Instant::now();
    manifests.write("many.json", &file(&[many(65535), slice.clone()]));
    let mut slowest = Duration::ZERO;
    agent.until("program it", |agent| {
        let asked = Instant::now();
        assert_eq!(client.tcp("10.96.0.10:80"), masqueraded("web", "10.96.0.10:80"));
        slowest = slowest.max(asked.elapsed());
        let log = agent.log();
        ["total=65537", "total=65536"].iter().any(|total| log.contains(total))
            && metric("kube_ipvs_keys_left") == Some(0.0)
    });
    println!("65,535 ports after {:?}; another Service's slowest answer meanwhile {slowest:?}", start.elapsed());
    // The slice may have come too late for that sync.
    agent.until("serve the endpoints", |_| client.tcp("10.96.0.11:64936").is_ok());
    // Those with an endpoint and those without.
    assert_eq!(client.tcp("10.96.0.11:66"), masqueraded("web", "10.96.0.11:66"));
    for refused in ["10.96.0.11:80", "10.96.0.11:65535"] {
        assert_eq!(
            client.tcp(refused).map_err(|word| word.replace("reset", "refused")),
            Err("refused".into()),
            "{refused}"
        );
    }
    let start = Instant::now();
    manifests.write("many.json", &file(&[many(1000), slice]));
    agent.until("forget most of them", |_| metric("kube_ipvs_virtual_servers") == Some(1002.0));
    agent.until("write that", |_| metric("kube_ipvs_keys_left") == Some(0.0));
    println!("all but 1000 gone after {:?}", start.elapsed());
    agent.kill();
    finds_nothing_to_change(&manifests);
    let mut agent = serving(&manifests, &[CLUSTER_CIDR, "--ipvs-sync-period=10m"]);
    assert_eq!(client.tcp("10.96.0.11:66"), masqueraded("web", "10.96.0.11:66"));
    manifests.remove("many.json");
    agent.until("forget all", |_| ipvs().len() == 4);
    agent.until("forget them in the filter", |_| !filter_knows("10.96.0.11"));
    assert_eq!(client.tcp("10.96.0.10:80"), masqueraded("web", "10.96.0.10:80"));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_thousand_source_ranges_of_every_kind_allow_only_their_clients() {
    let network = Network::new(3, 1);
    let _server = Server::start(&network.pods[0].namespace, "web", 8080);
    // No two of them touch, so that none can be left out.
    let mut ranges: Vec<String> = (0..1000).map(|n| format!("100.{}.{}.0/25", n / 250, n % 250)).collect();
    ranges.extend(
        [
            // The first client, in a range with host bits; and again, overlapping, as a whole and in parts.
            "192.168.1.77/24",
            "192.168.1.0/25",
            "192.168.1.2/32",
            // And as IPv6 writes it, which is the same range; but one that reaches beyond IPv4 is none.
            "::ffff:192.168.1.0/120",
            "::ffff:192.168.2.0/95",
            "::ffff:192.168.2.0/24",
            // What no client has, and what no range is.
            "224.0.0.0/4",
            "255.255.255.255/32",
            "192.168.2.0/33",
            "192.168.2.2",
            "not-a-range",
            "",
            // The third, by IPv6 alone.
            "fd00:192:3::dead:beef/64",
            "fd00:192:3::/65",
        ]
        .map(str::to_owned),
    );
    let ports: Vec<Value> =
        (1..=5).map(|n| json!({"name": format!("p{n}"), "protocol": "TCP", "port": 80 + n})).collect();
    let mut slice = ready("web", ["10.244.1.1"]);
    let mut slice_v6 = ready("web", ["fd00:244::1"]);
    for slice in [&mut slice, &mut slice_v6] {
        slice["ports"] = (1..=5).map(|n| json!({"name": format!("p{n}"), "protocol": "TCP", "port": 8080})).collect();
    }
    let spec = |ranges: &[String]| {
        json!({
            "type": "LoadBalancer",
            "clusterIPs": ["10.96.0.10", "fd00:96::10"],
            "loadBalancerIPs": ["203.0.113.10", "2001:db8::10"],
            "loadBalancerSourceRanges": ranges,
            "ports": ports,
        })
    };
    let other = service("other", json!({"clusterIPs": ["10.96.0.11"]}));
    let manifests = manifests(&[other, ready("other", ["10.244.1.1"])]);
    manifests.write("web.json", &file(&[service("web", spec(&ranges)), slice.clone(), slice_v6.clone()]));
    let mut agent = serving(&manifests, &[CLUSTER_CIDR, "--ipvs-sync-period=300ms"]);
    let [first, second, third] = &network.clients[..] else { unreachable!("three clients") };
    let check = |when: &str| {
        // At once, since each that is to hear nothing waits.
        thread::scope(|scope| {
            for (port, (client, name)) in
                [(81, (first, "first")), (85, (first, "first")), (81, (second, "second")), (83, (third, "third"))]
            {
                for (target, is_in) in [
                    (format!("203.0.113.10:{port}"), name == "first"),
                    (format!("[2001:db8::10]:{port}"), name == "third"),
                ] {
                    scope.spawn(move || {
                        let (right, patience) = if is_in {
                            (masqueraded("web", &target), PATIENCE)
                        } else {
                            (Err("timeout".to_owned()), SILENCE)
                        };
                        let result = client.run(|| tcp_within(patience, &target));
                        assert_eq!(result, right, "{name} to {target}, {when}");
                    });
                }
            }
        });
        assert_eq!(second.tcp("10.96.0.11:80"), masqueraded("web", "10.96.0.11:80"), "another Service, {when}");
    };
    check("at first");
    comes_to_rest(&mut agent);
    let listed = run("nft list chain ip kube-ipvs sources-default/web");
    assert!(listed.contains("100.3.249.0/25") && listed.contains("192.168.1.0/24"), "{listed}");
    // The same in another order and half of the rest.
    ranges.reverse();
    ranges.truncate(500);
    let before = observed_filter().source_ranges;
    manifests.write("web.json", &file(&[service("web", spec(&ranges)), slice, slice_v6]));
    agent.until("take in others", |_| observed_filter().source_ranges != before);
    let listed = run("nft list chain ip kube-ipvs sources-default/web");
    assert!(!listed.contains("100.0.1.0/25"), "{listed}");
    check("after a change");
    comes_to_rest(&mut agent);
    agent.kill();
    finds_nothing_to_change(&manifests);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn source_ranges_that_are_all_invalid_allow_nobody() {
    let network = Network::new(1, 1);
    let _server = Server::start(&network.pods[0].namespace, "web", 8080);
    let mut names = String::new();
    let mut objects = Vec::new();
    let lists = [json!(["nonsense"]), json!([""]), json!(["192.168.1.2"]), json!(["192.168.1.0/240"])];
    for (number, ranges) in lists.iter().enumerate() {
        let name = format!("web-{number}");
        let spec = json!({
            "type": "LoadBalancer",
            "clusterIPs": [format!("10.96.0.{}", number + 10)],
            "loadBalancerIPs": [format!("203.0.113.{}", number + 10)],
            "loadBalancerSourceRanges": ranges,
        });
        objects.extend([service(&name, spec), ready(&name, ["10.244.1.1"])]);
        writeln!(names, "{name}").unwrap();
    }
    let manifests = manifests(&objects);
    let agent = serving(&manifests, &[CLUSTER_CIDR]);
    // At once, since each waits.
    thread::scope(|scope| {
        for (number, ranges) in lists.iter().enumerate() {
            let client = &network.clients[0];
            scope.spawn(move || {
                let closed = format!("203.0.113.{}:80", number + 10);
                let result = client.run(|| tcp_within(SILENCE, &closed));
                assert!(result.is_err(), "{ranges}: {result:?}");
            });
        }
    });
    for (number, ranges) in lists.iter().enumerate() {
        assert!(network.clients[0].tcp(&format!("10.96.0.{}:80", number + 10)).is_ok(), "{ranges}");
        assert!(agent.log().contains(&format!("default/web-{number}")), "{ranges}: {}", agent.log());
    }
}
