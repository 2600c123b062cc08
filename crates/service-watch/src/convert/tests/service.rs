//! Services.

use serde_json::{Value, json};

use super::endpoint_slice::slice;
use super::{convert, ips, patched, service_json};
use crate::convert::{Conversion, Converted, Converter, Object as _};
use crate::model::{Change, Service, ServiceKind, TrafficPolicy};
use crate::wire;

/// Converts the base Service with this patch; returns the Service and the problems.
fn service(patch: &Value) -> (Option<Service>, Vec<String>) {
    let converted = convert::<wire::Service>(&patched(service_json(), patch));
    match converted.conversion {
        Conversion::Serve(Change::Service(service)) => (Some(service), converted.problems),
        Conversion::Ignore => (None, converted.problems),
        other => panic!("{other:?} {:?}", converted.problems),
    }
}

fn good_service(patch: &Value) -> Service {
    let (service, problems) = service(patch);
    assert_eq!(problems, [""; 0], "{patch}");
    service.unwrap_or_else(|| panic!("ignored with {patch}"))
}

#[test]
fn a_plain_service_is_read() {
    let service = good_service(&json!({}));
    assert_eq!(service.name.to_string(), "default/web");
    assert_eq!(service.created, Some(1_767_323_045));
    assert_eq!(service.kind, ServiceKind::ClusterIp);
    assert_eq!(ips(&service.cluster_ips), ["10.96.0.10"]);
    assert_eq!((service.external_ips.len(), service.load_balancer_ips.len()), (0, 0));
    assert_eq!((service.affinity_seconds, service.ports.len()), (None, 1));
    let port = &service.ports[0];
    assert_eq!((&*port.name, port.port.get(), port.node_port), ("http", 80, None));
    assert_eq!((service.internal_policy, service.external_policy), (TrafficPolicy::Cluster, TrafficPolicy::Cluster));
}

#[test]
fn services_for_other_proxies_or_headless_are_ignored() {
    for patch in [
        json!({ "spec": { "clusterIP": "None", "clusterIPs": ["None"] } }),
        json!({ "spec": { "clusterIP": "", "clusterIPs": [] } }),
        json!({ "spec": { "clusterIP": null, "clusterIPs": null } }),
        json!({ "spec": { "clusterIP": null, "clusterIPs": ["None"] } }),
        json!({ "spec": { "type": "ExternalName", "externalName": "a.example" } }),
        json!({ "spec": null }),
        json!({ "metadata": { "labels": { "service.kubernetes.io/service-proxy-name": "other" } } }),
        json!({ "metadata": { "labels": { "service.kubernetes.io/service-proxy-name": "" } } }),
        json!({ "metadata": { "labels": { "service.kubernetes.io/service-proxy-name": true } } }),
    ] {
        assert_eq!(service(&patch), (None, vec![]), "{patch}");
    }
    // Other labels do not matter, even the slices' one.
    good_service(&json!({ "metadata": { "labels": { "service.kubernetes.io/headless": "", "app": 7 } } }));
}

#[test]
fn manifests_without_fields_an_api_server_sets_have_a_problem() {
    let mut converter = Converter::for_manifests("node-a".into());
    let mut read = |patch: &Value| {
        let object: wire::Service = serde_json::from_value(patched(service_json(), patch)).unwrap();
        let name = Converter::object_name(&object.metadata).unwrap();
        let Converted { conversion, problems } = object.convert(&name, &mut converter);
        assert_eq!(conversion, Conversion::Ignore, "{patch}");
        problems
    };
    for patch in [
        json!({ "spec": { "clusterIP": "", "clusterIPs": [] } }),
        json!({ "spec": { "clusterIP": null, "clusterIPs": null } }),
        json!({ "spec": { "type": "LoadBalancer", "clusterIP": null, "clusterIPs": null } }),
        json!({ "spec": null }),
    ] {
        let problems = read(&patch);
        assert!(problems.len() == 1 && problems[0].starts_with("has no spec.clusterIP"), "{patch} {problems:?}");
    }
    for patch in [
        json!({ "spec": { "clusterIP": "None", "clusterIPs": null } }),
        json!({ "spec": { "type": "ExternalName", "clusterIP": null, "clusterIPs": null } }),
        json!({ "spec": null, "metadata": { "labels": { "service.kubernetes.io/service-proxy-name": "x" } } }),
    ] {
        assert_eq!(read(&patch), [""; 0], "{patch}");
    }
}

#[test]
fn cluster_ips_match_the_families_at_their_index() {
    let v4 = "10.96.0.10";
    let v6 = "fd00:10:96::a";
    for (single, list, families, read) in [
        (json!(v4), json!([v4]), json!(["IPv4"]), vec![v4]),
        (json!(v4), json!([v4, v6]), json!(["IPv4", "IPv6"]), vec![v4, v6]),
        (json!(v6), json!([v6, v4]), json!(["IPv6", "IPv4"]), vec![v6, v4]),
        // Older servers and hand-written manifests.
        (json!(v4), Value::Null, Value::Null, vec![v4]),
        (json!(v6), Value::Null, Value::Null, vec![v6]),
        (json!(v6), json!([]), json!(["IPv6"]), vec![v6]),
        (Value::Null, json!([v4, v6]), Value::Null, vec![v4, v6]),
        (json!("010.096.0.10"), Value::Null, Value::Null, vec![v4]),
        (json!("::ffff:10.96.0.10"), Value::Null, json!(["IPv4"]), vec![v4]),
    ] {
        let patch = json!({ "spec": { "clusterIP": single, "clusterIPs": list, "ipFamilies": families } });
        assert_eq!(ips(good_service(&patch).cluster_ips), read, "{patch}");
    }
}

#[test]
fn an_invalid_cluster_ip_affects_its_family_only() {
    for (list, families, read) in [
        (json!(["10.96.0.10", "nonsense"]), json!(["IPv4", "IPv6"]), ["10.96.0.10"]),
        (json!([5, "fd00::1"]), json!(["IPv4", "IPv6"]), ["fd00::1"]),
        (json!(["10.96.0.10", "10.96.0.11"]), json!(["IPv4", "IPv6"]), ["10.96.0.10"]),
        (json!(["10.96.0.10", "fd00::1"]), json!(["IPv4"]), ["10.96.0.10"]),
    ] {
        let patch = json!({ "spec": { "clusterIPs": list, "ipFamilies": families } });
        let (service, problems) = service(&patch);
        assert_eq!(ips(service.unwrap().cluster_ips), read, "{patch}");
        assert_eq!(problems.len(), 1, "{patch} {problems:?}");
        assert!(problems[0].contains("spec.clusterIPs["), "{problems:?}");
    }
}

#[test]
fn a_service_without_a_usable_cluster_ip_or_spec_is_invalid() {
    for (patch, named) in [
        (json!({ "spec": { "clusterIP": "10.96.0", "clusterIPs": ["10.96.0"] } }), "10.96.0"),
        (json!({ "spec": { "clusterIP": 10 } }), "spec.clusterIP is the number 10, not text"),
        (json!({ "spec": { "clusterIPs": "10.96.0.10" } }), "spec.clusterIPs"),
        (json!({ "spec": ["ports"] }), "spec is a list, not a map"),
        (json!({ "spec": { "ipFamilies": ["IPv6"] } }), "IPv6"),
    ] {
        let read = convert::<wire::Service>(&patched(service_json(), &patch));
        assert_eq!(read.conversion, Conversion::Invalid, "{patch}");
        assert!(read.problems.iter().any(|problem| problem.contains(named)), "{:?}", read.problems);
    }
}

#[test]
fn invalid_ports_are_skipped_and_the_others_served() {
    let good = json!({ "name": "good", "port": 443, "protocol": "UDP", "nodePort": 30443 });
    for (bad, expected) in [
        (json!({ "name": "x", "port": 0 }), "spec.ports[1].port is 0: this port is not served"),
        (json!({ "name": "x" }), "spec.ports[1].port is 0"),
        (json!({ "name": "x", "port": 65536 }), "spec.ports[1].port is 65536"),
        (json!({ "name": "x", "port": -1 }), "spec.ports[1].port is -1"),
        (json!({ "name": "x", "port": "x" }), "spec.ports[1].port is the text \"x\", not a whole number"),
        (json!({ "name": "x", "port": 1.5 }), "spec.ports[1].port is the number 1.5, not a whole number"),
        (json!({ "name": "x", "port": { "a": [1, { "b": 2 }] } }), "spec.ports[1].port is a map"),
        (json!({ "name": 80, "port": 80 }), "spec.ports[1].name is the number 80, not text"),
        (json!({ "name": "x", "port": 80, "protocol": "DCCP" }), "give TCP, UDP or SCTP"),
        (json!({ "name": "x", "port": 80, "protocol": "tcp" }), "spec.ports[1].protocol is \"tcp\""),
        (json!({ "name": "x", "port": 80, "protocol": 6 }), "spec.ports[1].protocol is the number 6"),
        (json!("http"), "spec.ports[1] is the text \"http\", not a map"),
    ] {
        let (service, problems) = service(&json!({ "spec": { "ports": [good, bad, good] } }));
        let ports = service.unwrap().ports;
        assert_eq!(ports.len(), 2, "{bad}");
        assert_eq!(ports[0].node_port.map(u16::from), Some(30443));
        assert_eq!(problems.len(), 1, "{bad}: {problems:?}");
        assert!(problems[0].contains(expected), "{bad}: {problems:?}");
    }
}

#[test]
fn ports_have_defaults_and_an_invalid_node_port_is_skipped_alone() {
    let ports = |ports: Value| service(&json!({ "spec": { "ports": ports } }));
    let (service, problems) = ports(json!([{ "port": 53, "nodePort": 0 }, { "port": 5, "protocol": "SCTP" }]));
    let service = service.unwrap();
    assert_eq!(problems, [""; 0]);
    assert_eq!(format!("{:?}", service.ports[0].protocol), "Tcp");
    assert_eq!((&*service.ports[0].name, service.ports[0].node_port), ("", None));
    assert_eq!(format!("{:?}", service.ports[1].protocol), "Sctp");
    for wrong in [json!(70_000), json!("30080"), json!(-5)] {
        let (service, problems) = ports(json!([{ "port": 53, "nodePort": wrong }]));
        assert_eq!(service.unwrap().ports[0].node_port, None);
        assert!(problems[0].contains("nodePort") && problems[0].contains("served without NodePort"), "{problems:?}");
    }
}

#[test]
fn valid_external_and_load_balancer_addresses_are_used() {
    let (service, problems) = service(&json!({
        "spec": { "type": "LoadBalancer", "externalIPs": ["198.51.100.1", "fd00::7", "nonsense", "198.51.100.02", 5] },
        "status": { "loadBalancer": { "ingress": [
            { "ip": "203.0.113.1" }, { "ip": "203.0.113.2", "ipMode": "VIP" }, { "ip": "203.0.113.3", "ipMode": "Proxy" },
            { "hostname": "lb.example" }, { "ip": "", "hostname": "lb.example" }, { "ip": "fd00::8" }, { "ip": "no" },
            { "ip": 4 }, "203.0.113.9",
        ] } },
    }));
    let service = service.unwrap();
    assert_eq!(service.kind, ServiceKind::LoadBalancer);
    assert_eq!(ips(service.external_ips), ["198.51.100.1", "fd00::7", "198.51.100.2"]);
    assert_eq!(ips(service.load_balancer_ips), ["203.0.113.1", "203.0.113.2", "fd00::8"]);
    assert_eq!(problems.len(), 5, "{problems:?}");
    assert!(problems[0].starts_with("spec.externalIPs[2] \"nonsense\" is no IP address"), "{problems:?}");
    // Whatever the type is.
    let patch = json!({ "status": { "loadBalancer": { "ingress": [{ "ip": "203.0.113.1" }] } } });
    assert_eq!(good_service(&patch).load_balancer_ips.len(), 1);
}

#[test]
fn reserved_addresses_are_neither_vips_nor_endpoints() {
    for (address, word) in [
        ("0.0.0.0", "unspecified"),
        ("127.0.0.1", "loopback"),
        ("169.254.169.254", "link-local"),
        ("224.0.0.251", "multicast"),
        ("255.255.255.255", "broadcast"),
    ] {
        for patch in [
            json!({ "spec": { "externalIPs": [address, "203.0.113.1"] } }),
            json!({ "status": { "loadBalancer": { "ingress": [{ "ip": address }, { "ip": "203.0.113.1" }] } } }),
        ] {
            let (read, problems) = service(&patch);
            let read = read.unwrap();
            assert_eq!(ips(read.external_ips.iter().chain(&read.load_balancer_ips)), ["203.0.113.1"], "{patch}");
            assert!(
                problems.len() == 1 && problems[0].contains(&format!("{address} is a {word} address")),
                "{problems:?}"
            );
        }
        // Such a ClusterIP leaves nothing of the Service.
        let patch = json!({ "spec": { "clusterIP": address, "clusterIPs": [address] } });
        let converted = convert::<wire::Service>(&patched(service_json(), &patch));
        assert!(matches!(converted.conversion, Conversion::Invalid), "{converted:?}");

        let (read, problems) =
            slice(&json!({ "endpoints": [{ "addresses": [address] }, { "addresses": ["10.0.0.1"] }] }));
        let read = read.unwrap();
        assert_eq!(ips(read.endpoints.iter().map(|endpoint| endpoint.address)), ["10.0.0.1"]);
        assert_eq!(problems.len(), 1, "{problems:?}");
    }
}

#[test]
fn affinity_timeout_defaults_to_three_hours() {
    let with = |config: Value| json!({ "spec": { "sessionAffinity": "ClientIP", "sessionAffinityConfig": config } });
    for (patch, seconds, problems) in [
        (json!({ "spec": { "sessionAffinity": null } }), None, 0),
        (with(Value::Null), Some(10_800), 0),
        (with(json!({})), Some(10_800), 0),
        (with(json!({ "clientIP": {} })), Some(10_800), 0),
        (with(json!({ "clientIP": { "timeoutSeconds": 1 } })), Some(1), 0),
        (with(json!({ "clientIP": { "timeoutSeconds": 86_400 } })), Some(86_400), 0),
        (with(json!({ "clientIP": { "timeoutSeconds": 0 } })), Some(10_800), 1),
        (with(json!({ "clientIP": { "timeoutSeconds": 86_401 } })), Some(10_800), 1),
        (with(json!({ "clientIP": { "timeoutSeconds": "60" } })), Some(10_800), 1),
        (with(json!({ "clientIP": 60 })), Some(10_800), 1),
        (json!({ "spec": { "sessionAffinity": "Cookie" } }), None, 1),
    ] {
        let (service, found_problems) = service(&patch);
        assert_eq!(
            (service.unwrap().affinity_seconds, found_problems.len()),
            (seconds, problems),
            "{patch} {found_problems:?}"
        );
    }
}

#[test]
fn unknown_types_and_policies_have_defaults() {
    let local = good_service(&json!({ "spec": {
        "type": "NodePort", "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local",
    } }));
    assert_eq!(local.kind, ServiceKind::NodePort);
    assert_eq!((local.internal_policy, local.external_policy), (TrafficPolicy::Local, TrafficPolicy::Local));
    let (odd, problems) = service(&json!({ "spec": {
        "type": "Magic", "internalTrafficPolicy": "Near", "externalTrafficPolicy": 1,
    } }));
    let odd = odd.unwrap();
    assert_eq!((odd.kind, odd.internal_policy, odd.external_policy), Default::default());
    assert_eq!(problems.len(), 3, "{problems:?}");
}

#[test]
fn source_ranges_are_parsed_leniently_and_invalid_ones_allow_nobody() {
    for (ranges, read, problems) in [
        (Value::Null, None, 0),
        (json!([]), None, 0),
        (json!(["192.0.2.0/24"]), Some(vec!["192.0.2.0/24"]), 0),
        (
            json!([" 192.0.2.7/24 ", "010.0.0.1/08", "2001:DB8::1/32"]),
            Some(vec!["192.0.2.0/24", "10.0.0.0/8", "2001:db8::/32"]),
            0,
        ),
        // What it means is the reconciler's concern.
        (json!(["0.0.0.0/0", "::/0"]), Some(vec!["0.0.0.0/0", "::/0"]), 0),
        (json!(["192.0.2.0/24", "192.0.2.0/24"]), Some(vec!["192.0.2.0/24", "192.0.2.0/24"]), 0),
        (json!(["::ffff:192.0.2.0/120"]), Some(vec!["192.0.2.0/24"]), 0),
        (json!(["192.0.2.0/24", "192.0.2.9", "x"]), Some(vec!["192.0.2.0/24"]), 2),
        (json!(["192.0.2.9"]), Some(vec![]), 1),
        (json!(["192.0.2.0/33", "", null, 5, {}]), Some(vec![]), 5),
        (json!(["::ffff:192.0.2.0/24"]), Some(vec![]), 1),
        (json!("192.0.2.0/24"), Some(vec![]), 1),
        (json!({ "a": 1 }), Some(vec![]), 1),
    ] {
        let (service, found_problems) = service(&json!({ "spec": { "loadBalancerSourceRanges": ranges } }));
        let found = service.unwrap().source_ranges;
        assert_eq!(found.map(ips), read.map(ips), "{ranges}");
        assert_eq!(found_problems.len(), problems, "{ranges}: {found_problems:?}");
    }
    let (_, found_problems) = service(&json!({ "spec": { "loadBalancerSourceRanges": ["10.0.0.0/8", "192.0.2.9"] } }));
    assert_eq!(
        found_problems,
        [
            "spec.loadBalancerSourceRanges[1] \"192.0.2.9\" is no range of IP addresses: this entry allows nobody; write it \
             as in 192.0.2.0/24 or 2001:db8::/32"
        ]
    );
}

#[test]
fn an_invalid_health_check_node_port_is_skipped() {
    for (port, read, problems) in [
        (Value::Null, None, 0),
        (json!(0), None, 0),
        (json!(32000), Some(32000), 0),
        (json!(65_536), None, 1),
        (json!(-1), None, 1),
        (json!("32000"), None, 1),
        (json!({}), None, 1),
    ] {
        let (service, found_problems) = service(&json!({ "spec": { "healthCheckNodePort": port } }));
        assert_eq!(service.unwrap().health_check_node_port.map(u16::from), read, "{port}");
        assert_eq!(found_problems.len(), problems, "{port}: {found_problems:?}");
    }
}

#[test]
fn unused_fields_may_have_any_type() {
    let service = good_service(&json!({
        "metadata": { "creationTimestamp": 5, "annotations": 7, "ownerReferences": "x", "generation": "many" },
        "spec": { "selector": [1], "allocateLoadBalancerNodePorts": {}, "future": [[[]]] },
    }));
    assert_eq!(service.created, None);
}

#[test]
fn a_name_that_is_too_long_for_source_ranges_closes_load_balancer_ips() {
    let restricted = |namespace: usize, name: usize, ranges: Option<&str>| {
        let patch = json!({
            "metadata": { "namespace": "n".repeat(namespace), "name": "s".repeat(name) },
            "spec": {
                "type": "LoadBalancer", "loadBalancerSourceRanges": ranges.map(|range| vec![range]),
                "externalIPs": ["203.0.113.1", "203.0.113.2"],
            },
            "status": { "loadBalancer": { "ingress": [{ "ip": "203.0.113.1" }] } },
        });
        let (service, problems) = service(&patch);
        let service = service.unwrap();
        assert_eq!(ips(&service.cluster_ips), ["10.96.0.10"], "{namespace} {name}");
        let external = if service.load_balancer_ips.is_empty() { 1..2 } else { 0..2 };
        assert_eq!(ips(&service.external_ips), ["203.0.113.1", "203.0.113.2"][external], "{namespace} {name}");
        (service.load_balancer_ips.len(), problems)
    };
    for (namespace, name) in [(63, 63), (120, 126), (1, 245), (245, 1)] {
        assert_eq!(restricted(namespace, name, Some("10.0.0.0/8")), (1, vec![]), "{namespace} {name}");
    }
    for (namespace, name) in [(121, 126), (253, 253), (1, 246), (246, 1)] {
        assert_eq!(restricted(namespace, name, None), (1, vec![]), "{namespace} {name}: nothing restricts it");
        // An invalid range allows nobody: that is a restriction too.
        for ranges in ["10.0.0.0/8", "x"] {
            let (count, problems) = restricted(namespace, name, Some(ranges));
            let told = problems.iter().any(|problem| problem.contains("give it a shorter name, at most 247 bytes"));
            assert!(count == 0 && told, "{namespace} {name}: {problems:?}");
        }
    }
}
