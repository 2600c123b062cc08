//! EndpointSlices.

use serde_json::{Value, json};

use super::{convert, ips, patched};
use crate::convert::Conversion;
use crate::model::{Change, EndpointSlice};
use crate::wire;

fn slice_json() -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": { "name": "web-1", "namespace": "default", "labels": { "kubernetes.io/service-name": "web" } },
        "addressType": "IPv4",
        "ports": [{ "name": "http", "protocol": "TCP", "port": 8080 }],
        "endpoints": [{ "addresses": ["10.244.1.5", "10.244.1.6"], "conditions": { "ready": true }, "nodeName": "a" }],
    })
}

pub(super) fn slice(patch: &Value) -> (Option<EndpointSlice>, Vec<String>) {
    let converted = convert::<wire::EndpointSlice>(&patched(slice_json(), patch));
    match converted.conversion {
        Conversion::Serve(Change::Slice(slice)) => (Some(slice), converted.problems),
        Conversion::Ignore => (None, converted.problems),
        other => panic!("{other:?} {:?}", converted.problems),
    }
}

#[test]
fn a_plain_slice_is_read_whole_with_the_first_address_of_each_endpoint() {
    let (slice, problems) = slice(&json!({}));
    let slice = slice.unwrap();
    assert_eq!(problems, [""; 0]);
    assert_eq!((slice.name.to_string(), slice.service.to_string()), ("default/web-1".into(), "default/web".into()));
    assert_eq!((&*slice.ports[0].name, slice.ports[0].port.get()), ("http", 8080));
    assert_eq!(ips(slice.endpoints.iter().map(|endpoint| endpoint.address)), ["10.244.1.5"]);
    assert_eq!(slice.endpoints[0].node.as_deref(), Some("a"));
}

#[test]
fn slices_that_a_proxy_does_not_read_are_ignored_without_a_word() {
    for patch in [
        json!({ "metadata": { "labels": null } }),
        json!({ "metadata": { "labels": { "kubernetes.io/service-name": "" } } }),
        json!({ "metadata": { "labels": { "service.kubernetes.io/headless": "" } } }),
        json!({ "addressType": "FQDN", "endpoints": [{ "addresses": ["a.example"] }] }),
    ] {
        assert_eq!(slice(&patch), (None, vec![]), "{patch}");
    }
    // The proxy name is a matter of Services.
    let other = json!({ "metadata": { "labels": { "service.kubernetes.io/service-proxy-name": "other" } } });
    assert!(slice(&other).0.is_some());
}

#[test]
fn a_slice_of_unknown_type_stays_as_it_was() {
    for wrong in [json!("IPv5"), json!(4), json!("")] {
        let read = convert::<wire::EndpointSlice>(&patched(slice_json(), &json!({ "addressType": wrong })));
        assert_eq!((read.conversion, read.problems.len()), (Conversion::Invalid, 1), "{wrong}");
    }
}

#[test]
fn slice_ports_need_a_number_and_default_the_rest() {
    for (port, read, problems) in [
        (json!({ "name": "http", "port": 8080 }), Some(("http", 8080)), 0),
        (json!({ "name": "", "port": 8080 }), Some(("", 8080)), 0),
        (json!({ "port": 8080 }), Some(("", 8080)), 0),
        // All ports, to others.
        (json!({ "name": "http" }), None, 0),
        (json!({ "name": "http", "port": null }), None, 0),
        (json!({ "name": "http", "port": 0 }), None, 1),
        (json!({ "name": "http", "port": "8080" }), None, 1),
        (json!({ "name": "http", "port": 8080, "protocol": "ICMP" }), None, 1),
    ] {
        let (slice, found_problems) = slice(&json!({ "ports": [port] }));
        let ports = slice.unwrap().ports;
        assert_eq!(ports.first().map(|port| (&*port.name, port.port.get())), read, "{port}");
        assert_eq!(found_problems.len(), problems, "{port}: {found_problems:?}");
    }
}

#[test]
fn unset_conditions_mean_ready_serving_and_not_terminating() {
    for (conditions, read) in [
        (Value::Null, (true, true, false)),
        (json!({}), (true, true, false)),
        (json!({ "ready": null }), (true, true, false)),
        (json!({ "ready": false }), (false, true, false)),
        (json!({ "ready": false, "serving": true, "terminating": true }), (false, true, true)),
        (json!({ "ready": false, "serving": false, "terminating": false }), (false, false, false)),
    ] {
        let (slice, problems) =
            slice(&json!({ "endpoints": [{ "addresses": ["10.0.0.1"], "conditions": conditions }] }));
        let endpoint = &slice.unwrap().endpoints[0];
        assert_eq!((endpoint.ready, endpoint.serving, endpoint.terminating), read, "{conditions}");
        assert_eq!(problems, [""; 0]);
    }
}

#[test]
fn invalid_endpoints_are_skipped_and_the_others_served() {
    for (bad, expected) in [
        (json!({ "addresses": [] }), "endpoints[1] has no address"),
        (json!({}), "endpoints[1] has no address"),
        (json!({ "addresses": ["pod.example"] }), "\"pod.example\" is no IP address"),
        (json!({ "addresses": ["fd00::1"] }), "is not IPv4, the slice's addressType"),
        (json!({ "addresses": [7] }), "endpoints[1].addresses[0] is the number 7, not text"),
        (json!({ "addresses": "10.0.0.1" }), "endpoints[1].addresses is the text"),
        (json!({ "addresses": ["10.0.0.1"], "conditions": { "ready": "no" } }), "conditions.ready is the text \"no\""),
        (json!({ "addresses": ["10.0.0.1"], "conditions": true }), "endpoints[1].conditions is true, not a map"),
        (json!(["10.0.0.1"]), "endpoints[1] is a list, not a map"),
    ] {
        let good = |last: u8| json!({ "addresses": [format!("10.244.0.{last}")] });
        let (slice, problems) = slice(&json!({ "endpoints": [good(1), bad, good(2)] }));
        let endpoints = slice.unwrap().endpoints;
        assert_eq!(ips(endpoints.iter().map(|endpoint| endpoint.address)), ["10.244.0.1", "10.244.0.2"], "{bad}");
        assert_eq!(problems.len(), 1, "{bad}: {problems:?}");
        assert!(problems[0].contains(expected), "{bad}: {problems:?}");
    }
}

#[test]
fn endpoint_addresses_may_have_leading_zeros_or_be_ipv4_mapped() {
    for (family, address, read) in [
        ("IPv4", "010.244.001.005", "10.244.1.5"),
        ("IPv4", "::ffff:10.244.1.5", "10.244.1.5"),
        ("IPv6", "FD00:0::0005", "fd00::5"),
    ] {
        let (slice, problems) = slice(&json!({ "addressType": family, "endpoints": [{ "addresses": [address] }] }));
        assert_eq!(problems, [""; 0]);
        assert_eq!(ips(slice.unwrap().endpoints.iter().map(|endpoint| endpoint.address)), [read]);
    }
}

#[test]
fn invalid_hints_are_skipped() {
    let (slice, problems) = slice(&json!({ "endpoints": [
        { "addresses": ["10.0.0.1"], "hints": {
            "forZones": [{ "name": "z1" }, { "name": "z2" }], "forNodes": [{ "name": "n1" }],
        } },
        { "addresses": ["10.0.0.2"], "hints": { "forZones": [{ "name": 5 }, {}] }, "nodeName": "" },
    ] }));
    let endpoints = slice.unwrap().endpoints;
    let texts = |names: &[std::sync::Arc<str>]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(texts(&endpoints[0].hints.as_ref().unwrap().zones), ["z1", "z2"]);
    assert_eq!(texts(&endpoints[0].hints.as_ref().unwrap().nodes), ["n1"]);
    assert_eq!((&endpoints[1].hints, endpoints[1].node.as_ref()), (&None, None));
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].contains("endpoints[1].hints.forZones[0]"), "{problems:?}");
}

#[test]
fn the_trigger_time_of_a_slice_is_read_if_valid() {
    let at = |time: Value| {
        let annotations = json!({ "endpoints.kubernetes.io/last-change-trigger-time": time, "other": "x" });
        slice(&json!({ "metadata": { "annotations": annotations } })).0.unwrap().trigger_time
    };
    let time = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_767_225_600);
    assert_eq!(at(json!("2026-01-01T00:00:00Z")), Some(time));
    for time in [json!("yesterday"), json!(5), Value::Null] {
        assert_eq!(at(time.clone()), None, "{time}");
    }
}
