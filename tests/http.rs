//! What the agent answers over HTTP, on a real kernel: health, health-check node ports, metrics, and what else is on that
//! port.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::VecDeque;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Agent, Answer, HEALTH, METRICS, Manifests, eth0, get, http, metric, service};
use lab::link;
use lab::netns::isolate;
use lab::objects::{self, State, with};
use serde_json::{Value, json};

/// The Node, with an address of IPv6 too.
fn node_v6() -> Value {
    objects::node("node-a", &["192.168.1.1", "fd00::1"])
}

/// A Service of type LoadBalancer that load balancers ask about, with a ClusterIP of each family.
fn load_balanced(port: u16) -> Value {
    load_balanced_at("web", &["10.96.0.10", "fd00:96::10"], port)
}

fn load_balanced_at(name: &str, cluster_ips: &[&str], port: u16) -> Value {
    let spec = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": port});
    with(objects::service(name, cluster_ips, &[objects::port("http", "TCP", 80)]), json!({"spec": spec}))
}

/// Endpoints of `web`, each on a node.
fn placed(name: &str, endpoints: &[(&str, &str, bool)]) -> Value {
    let endpoint = |(address, node, is_ready): &(&str, &str, bool)| {
        let state = if *is_ready { State::Ready } else { State::NotReady };
        with(objects::endpoint(address, state), json!({"nodeName": node}))
    };
    let endpoints: Vec<Value> = endpoints.iter().map(endpoint).collect();
    objects::slice(name, "web", &[objects::port("http", "TCP", 8080)], &endpoints)
}

fn serving(manifests: &Manifests, flags: &[&str]) -> Agent {
    let mut agent = manifests.agent(flags);
    agent.says("audited");
    agent.until("listen", |_| get(HEALTH, "/livez").is_some() && get(METRICS, "/metrics").is_some());
    agent
}

fn healthz() -> Answer {
    get(HEALTH, "/healthz").unwrap()
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn healthz_is_about_the_node_and_livez_about_the_agent() {
    isolate().unwrap();
    let manifests = Manifests::new();
    let mut agent = serving(&manifests, &[]);
    let answer = healthz();
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
    let body = answer.json().unwrap();
    assert_eq!((&body["healthy"], &body["nodeEligible"]), (&json!(true), &json!(true)), "{body}");
    assert_eq!(body["lastUpdated"], body["currentTime"], "{body}");
    for family in ["IPv4", "IPv6"] {
        assert_eq!(body["status"][family]["healthy"], json!(true), "{body}");
    }
    // In whole seconds, as the API has it.
    let time = body["currentTime"].as_str().unwrap();
    assert!(time.len() == 20 && time.ends_with('Z'), "{time}");

    let leaving = "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\nspec: {taints: [{key: X, effect: NoSchedule}, {key: \
                   ToBeDeletedByClusterAutoscaler, effect: PreferNoSchedule}]}\n";
    let deleted = "apiVersion: v1\nkind: Node\nmetadata: {name: node-a, deletionTimestamp: '2026-01-01T00:00:00Z'}\n";
    for node in [leaving, deleted] {
        manifests.write("node.yaml", node);
        agent.until("take the node out", |_| healthz().status == 503);
        let body = healthz().json().unwrap();
        assert_eq!((&body["healthy"], &body["nodeEligible"]), (&json!(false), &json!(false)), "{body}");
        let live = get(HEALTH, "/livez").unwrap();
        assert_eq!((live.status, live.json().unwrap().get("nodeEligible")), (200, None), "{}", live.body);
        manifests.write("node.yaml", &common::node());
        agent.until("take the node back", |_| healthz().status == 200);
    }
    // Unknown is not eligible either.
    manifests.remove("node.yaml");
    agent.until("miss the node", |_| healthz().status == 503);
    assert_eq!(get(HEALTH, "/elsewhere").unwrap().status, 404);
    let asked = metric("kubeproxy_proxy_healthz_total{code=\"503\"}").unwrap();
    assert!(asked >= 3.0 && metric("kubeproxy_proxy_livez_total{code=\"200\"}").unwrap() >= 2.0);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn unrepaired_drift_makes_its_family_unhealthy() {
    isolate().unwrap();
    let manifests = Manifests::new();
    manifests.write("node.yaml", &node_v6()).write("web.json", &load_balanced(31777));
    manifests.write("slice.json", &placed("web-1", &[("10.0.0.1", "node-a", true)]));
    let mut agent = serving(&manifests, &["--ipvs-sync-period=500ms"]);
    agent.binds(&["10.96.0.10/32", "fd00:96::10/128"]);
    // Takes every IPv6 address from the device, and refuses new ones.
    fs::write("/proc/sys/net/ipv6/conf/kube-ipvs0/disable_ipv6", "1").unwrap();
    agent.until("become unhealthy", |_| healthz().status == 503);
    let body = healthz().json().unwrap();
    assert_eq!(body["status"]["IPv4"]["healthy"], json!(true), "{body}");
    assert_eq!(body["status"]["IPv6"]["healthy"], json!(false), "{body}");
    assert_eq!(get(HEALTH, "/livez").unwrap().status, 503);
    let check = get("127.0.0.1:31777", "/").unwrap();
    assert_eq!((check.status, &check.json().unwrap()["serviceProxyHealthy"]), (503, &json!(false)), "{}", check.body);
    assert_eq!(metric("kube_ipvs_drift_unrepaired{ip_family=\"IPv6\"}"), Some(1.0));
    assert_eq!(metric("kube_ipvs_drift_unrepaired{ip_family=\"IPv4\"}"), Some(0.0));
    fs::write("/proc/sys/net/ipv6/conf/kube-ipvs0/disable_ipv6", "0").unwrap();
    agent.until("repair it", |_| healthz().status == 200);
    agent.binds(&["10.96.0.10/32", "fd00:96::10/128"]);
    assert!(metric("kube_ipvs_drift_found_total").unwrap() >= 1.0);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_change_that_is_pending_for_too_long_is_unhealthy() {
    isolate().unwrap();
    let manifests = Manifests::new();
    manifests.write("web.yaml", &service("web", "10.96.0.10"));
    // The first sync waits for the address of a Node that nobody knows.
    manifests.remove("node.yaml");
    let mut agent = manifests.agent(&["--nodeport-addresses=primary", "--ipvs-sync-period=1s"]);
    agent.says("waiting up to 30 s");
    manifests.write("node.yaml", "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\n");
    agent.until("be unhealthy", |_| {
        get(HEALTH, "/healthz")
            .is_some_and(|answer| answer.status == 503 && answer.body.contains("\"nodeEligible\":true"))
    });
    // To start it again would not help.
    assert_eq!(get(HEALTH, "/livez").unwrap().status, 200);
    assert_eq!(get(METRICS, "/readyz").unwrap().status, 503);
    manifests.write("node.yaml", &common::node());
    agent.until("be healthy", |_| get(HEALTH, "/healthz").is_some_and(|answer| answer.status == 200));
    assert_eq!(get(METRICS, "/readyz").unwrap().status, 200);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn health_check_ports_report_local_endpoints_and_follow_changes() {
    isolate().unwrap();
    let manifests = Manifests::new();
    manifests.write("node.yaml", &node_v6()).write("web.json", &load_balanced(31777));
    manifests.write(
        "v4.json",
        &placed(
            "web-4",
            &[
                ("10.0.0.1", "node-a", true),
                ("10.0.0.2", "node-a", true),
                ("10.0.0.3", "node-b", true),
                ("10.0.0.4", "node-a", false),
            ],
        ),
    );
    manifests.write("v6.json", &placed("web-6", &[("fd00:244::1", "node-b", true)]));
    let mut agent = serving(&manifests, &[]);
    agent.until("answer", |_| get("127.0.0.1:31777", "/").is_some() && get("[::1]:31777", "/").is_some());
    let v4 = http("POST", "127.0.0.1:31777", "/whatever", "x").unwrap();
    assert_eq!(v4.status, 200, "{}", v4.body);
    assert_eq!(v4.header("x-load-balancing-endpoint-weight"), Some("2"));
    assert_eq!(v4.header("content-type"), Some("application/json"));
    assert_eq!(v4.header("x-content-type-options"), Some("nosniff"));
    let expected = json!({
        "service": {"namespace": "default", "name": "web"}, "localEndpoints": 2, "serviceProxyHealthy": true,
    });
    assert_eq!(v4.json().unwrap(), expected);
    let v6 = get("[::1]:31777", "/").unwrap();
    assert_eq!((v6.status, v6.header("x-load-balancing-endpoint-weight")), (503, Some("0")), "{}", v6.body);

    manifests.write("web.json", &load_balanced(31999));
    agent.until("move", |_| get("127.0.0.1:31999", "/").is_some() && get("127.0.0.1:31777", "/").is_none());
    manifests.write("v4.json", &placed("web-4", &[("10.0.0.3", "node-b", true)]));
    agent.until("have none", |_| get("127.0.0.1:31999", "/").is_some_and(|answer| answer.status == 503));
    manifests.remove("web.json");
    agent.until("stop", |_| get("127.0.0.1:31999", "/").is_none() && get("[::1]:31999", "/").is_none());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn health_check_ports_that_move_between_services_answer_at_once() {
    isolate().unwrap();
    let manifests = Manifests::new();
    let named = |name: &str, port: u16, octet: u8| {
        load_balanced_at(name, &[&format!("10.96.0.{octet}"), &format!("fd00:96::{octet}")], port)
    };
    let write = |a: u16, b: u16| {
        manifests.write("services.json", &objects::manifest(&[named("a", a, 10), named("b", b, 11)]));
    };
    write(31777, 31778);
    let mut agent = serving(&manifests, &[]);
    let has = |port: u16, name: &str| {
        get(&format!("127.0.0.1:{port}"), "/").is_some_and(|answer| answer.json().unwrap()["service"]["name"] == name)
    };
    agent.until("answer", |_| has(31777, "a") && has(31778, "b"));
    for (a, b) in [(31778, 31777), (31777, 31778), (31778, 31777)] {
        write(a, b);
        agent.until("swap", |_| has(a, "a") && has(b, "b"));
    }
    assert!(!agent.log().contains("cannot listen on"), "{}", agent.log());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn health_check_ports_use_node_port_addresses_and_retry_if_taken() {
    isolate().unwrap();
    eth0();
    let taken = TcpListener::bind("192.168.1.1:31777").unwrap();
    let manifests = Manifests::new();
    manifests.write("web.json", &load_balanced(31777));
    manifests.write("v4.json", &placed("web-4", &[("10.0.0.1", "node-a", true)]));
    let mut agent = serving(&manifests, &["--nodeport-addresses=192.168.1.0/24"]);
    agent
        .says("cannot listen on node port 31777 for health checks")
        .says("give spec.healthCheckNodePort another value");
    assert!(get("127.0.0.1:31777", "/").is_none(), "it is not among the addresses");
    drop(taken);
    agent.until("have it", |_| get("192.168.1.1:31777", "/").is_some_and(|answer| answer.status == 200));
    // An address that the node gets is one that is listened on.
    link::add_address("eth0", "192.168.1.2/24").unwrap();
    agent.until("follow", |_| get("192.168.1.2:31777", "/").is_some());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_metrics_port_has_the_pages_of_kube_proxys() {
    isolate().unwrap();
    let manifests = Manifests::new();
    let mut agent = serving(&manifests, &["--ipvs-scheduler=sh"]);
    let mode = get(METRICS, "/proxyMode").unwrap();
    assert_eq!((mode.status, mode.body.as_str()), (200, "ipvs"));
    assert_eq!(get(METRICS, "/healthz").unwrap().body, "ok");
    for path in ["/livez", "/readyz"] {
        assert_eq!(get(METRICS, path).unwrap().status, 200, "{path}");
    }
    let configuration = get(METRICS, "/configz").unwrap().json().unwrap();
    let configuration = &configuration["kubeproxy.config.k8s.io"];
    assert_eq!(configuration["kind"], json!("KubeProxyConfiguration"));
    assert_eq!(configuration["ipvs"]["scheduler"], json!("sh"));
    for path in ["/debug/flags/v", "/debug/threads", "/nowhere"] {
        assert_eq!(get(METRICS, path).unwrap().status, 404, "{path}");
    }
    assert!(get("127.0.0.2:10249", "/").is_none(), "this device has the address, and nobody listens there");
    agent.terminate();
    agent.ends();

    let mut agent = serving(&manifests, &["--profiling", "--metrics-bind-address=0.0.0.0:10249"]);
    assert!(get(METRICS, "/debug/threads").unwrap().body.contains("reconciler"));
    assert_eq!(http("PUT", METRICS, "/debug/flags/v", "lots").unwrap().status, 400);
    assert_eq!(
        http("PUT", METRICS, "/debug/flags/v", "4").unwrap().body,
        "successfully set klog.logging.verbosity to 4"
    );
    manifests.write("web.yaml", &service("web", "10.96.0.10"));
    agent.says("DEBUG");
    // kube-proxy's wildcard is one of both families.
    assert!(get("[::1]:10249", "/metrics").is_some());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_taken_port_is_retried_or_fatal_as_configured() {
    isolate().unwrap();
    let taken = TcpListener::bind(HEALTH).unwrap();
    let manifests = Manifests::new();
    let mut agent = manifests.agent(&[]);
    agent.says("audited").says("cannot listen on 0.0.0.0:10256");
    drop(taken);
    agent.until("listen", |_| get(HEALTH, "/livez").is_some());
    agent.terminate();
    agent.ends();
    let _taken = TcpListener::bind(METRICS).unwrap();
    let mut agent = manifests.agent(&["--bind-address-hard-fail"]);
    assert!(!agent.ends().success());
    assert!(agent.log().contains("cannot listen on 127.0.0.1:10249"), "{}", agent.log());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn idle_clients_do_not_block_others() {
    // The agent ends their connections after 10 s: whoever had to wait for that would not be answered before. A slow machine has
    // several tries.
    const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
    isolate().unwrap();
    let manifests = Manifests::new();
    let _agent = serving(&manifests, &[]);
    lab::wait::until("answer while others are idle", || {
        let start = Instant::now();
        let silent: Vec<_> = (0..300).map(|_| TcpStream::connect(HEALTH).unwrap()).collect();
        // And one that asks for much and never reads.
        let mut greedy = TcpStream::connect(HEALTH).unwrap();
        greedy.write_all("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n".repeat(1000).as_bytes()).unwrap();
        assert_eq!(get(HEALTH, "/livez").unwrap().status, 200);
        drop(silent);
        start.elapsed() < CONNECTION_TIMEOUT
    })
    .unwrap();
}

/// What a client of a flood does with its connection.
#[derive(Clone, Copy, Debug)]
enum Flood {
    SaysNothing,
    BeginsARequest,
    AsksAndNeverReads,
    ClosesAtOnce,
}

/// Opens connections to the health port, at a rate that a port of 64 connections would not stand, until it is told to stop.
fn flood(kind: Flood, stop: &AtomicBool) -> usize {
    const RATE: u32 = 400;
    let (mut held, mut opened, start) = (VecDeque::new(), 0, Instant::now());
    while !stop.load(Ordering::Relaxed) {
        while start + Duration::from_secs(1) * u32::try_from(opened).unwrap() / RATE <= Instant::now() {
            opened += 1;
            let Ok(mut stream) = TcpStream::connect(HEALTH) else { continue };
            let request = match kind {
                Flood::SaysNothing | Flood::ClosesAtOnce => "",
                Flood::BeginsARequest => "GET /hea",
                Flood::AsksAndNeverReads => "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
            };
            // The agent may have closed it.
            let _ = stream.write_all(request.as_bytes());
            if !matches!(kind, Flood::ClosesAtOnce) {
                held.push_back(stream);
            }
            if held.len() > 400 {
                held.pop_front();
            }
        }
        thread::sleep(Duration::from_millis(2));
    }
    opened
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_flood_of_connections_keeps_no_probe_from_its_answer() {
    isolate().unwrap();
    let manifests = Manifests::new();
    let mut agent = serving(&manifests, &[]);
    for kind in [Flood::SaysNothing, Flood::BeginsARequest, Flood::AsksAndNeverReads, Flood::ClosesAtOnce] {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let flooding = scope.spawn(|| flood(kind, &stop));
            for _ in 0..10 {
                // Its request comes later than its connection, as over a slow network.
                let mut probe = TcpStream::connect(HEALTH).unwrap();
                thread::sleep(Duration::from_millis(50));
                probe.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
                let mut answer = String::new();
                probe.read_to_string(&mut answer).unwrap();
                assert!(answer.starts_with("HTTP/1.1 200"), "{kind:?}: {answer}");
            }
            stop.store(true, Ordering::Relaxed);
            assert!(flooding.join().unwrap() > 10, "{kind:?}");
        });
    }
    // Services are served meanwhile.
    manifests.write("web.yaml", &service("web", "10.96.0.10"));
    agent.has(&["-A -t 10.96.0.10:80 -s rr"]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_flood_of_connections_leaves_the_agent_file_descriptors() {
    const LIMIT: usize = 200;
    isolate().unwrap();
    let manifests = Manifests::new();
    let mut command = Command::new("sh");
    let agent = format!("exec {} --hostname-override=node-a -v=4", env!("CARGO_BIN_EXE_kube-ipvs"));
    command.args(["-c", &format!("ulimit -n {LIMIT}; {agent} --manifests={}", manifests.path().display())]);
    let mut agent = Agent::start_command(&mut command);
    agent.says("audited");
    agent.until("listen", |_| get(HEALTH, "/livez").is_some());
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let flooding = scope.spawn(|| flood(Flood::SaysNothing, &stop));
        let files = format!("/proc/{}/fd", agent.id());
        for _ in 0..30 {
            let open = fs::read_dir(&files).unwrap().count();
            assert!(open < LIMIT / 2, "{open}");
            thread::sleep(Duration::from_millis(50));
        }
        stop.store(true, Ordering::Relaxed);
        flooding.join().unwrap();
    });
    agent.until("answer again", |_| get(HEALTH, "/livez").is_some());
    assert!(!agent.log().contains("cannot accept"), "{}", agent.log());
}

/// A line of Prometheus's text format: the name of the sample, its labels in order, and the value.
fn sample(line: &str) -> (String, Vec<(String, String)>, f64) {
    let (series, value) = line.rsplit_once(' ').unwrap();
    let value = if value == "+Inf" { f64::INFINITY } else { value.parse().unwrap() };
    let Some((name, labels)) = series.split_once('{') else { return (series.to_owned(), Vec::new(), value) };
    let labels = labels.strip_suffix('}').unwrap().split("\",").map(|label| {
        let (name, value) = label.split_once("=\"").unwrap();
        (name.to_owned(), value.trim_end_matches('"').to_owned())
    });
    (name.to_owned(), labels.collect(), value)
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn metrics_under_load_are_well_formed_and_documented() {
    isolate().unwrap();
    let manifests = Manifests::new();
    let mut agent = serving(&manifests, &["--ipvs-sync-period=200ms"]);
    // Flows are looked for when a UDP Service gets its first endpoint.
    let port = |number| [objects::port("dns", "UDP", number)];
    manifests.write("dns.yaml", &objects::service("dns", &["10.96.0.11"], &port(80)));
    manifests.write("dns-1.yaml", &objects::slice("dns-1", "dns", &port(8080), &objects::ready(["10.0.0.3"])));
    thread::scope(|scope| {
        let load = scope.spawn(|| {
            for number in 0..60 {
                manifests.write("web.json", &load_balanced(31777));
                let endpoints = [("10.0.0.1", "node-a", true), ("10.0.0.2", "node-b", number % 2 == 0)];
                let changed = json!({"endpoints.kubernetes.io/last-change-trigger-time": now()});
                let annotated = with(placed("web-1", &endpoints), json!({"metadata": {"annotations": changed}}));
                manifests.write("slice.json", &annotated);
                thread::sleep(Duration::from_millis(20));
                manifests.write("other.yaml", &service("other", &format!("10.96.1.{number}")));
            }
        });
        while !load.is_finished() {
            well_formed(&get(METRICS, "/metrics").unwrap().body);
        }
    });
    agent.until("know it all", |_| metric("kube_ipvs_virtual_servers") == Some(4.0));
    let answer = get(METRICS, "/metrics").unwrap();
    assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let names = well_formed(&answer.body);
    let page = fs_read("docs/metrics.md");
    let documented = |name: &str| page.contains(&format!("| `{name}` |"));
    for name in &names {
        assert!(documented(name), "{name} is not documented");
    }
    // What kube-proxy has in this mode, as far as it means something here: see docs/metrics.md.
    for name in [
        "sync_proxy_rules_duration_seconds",
        "sync_proxy_rules_last_timestamp_seconds",
        "sync_proxy_rules_last_queued_timestamp_seconds",
        "network_programming_duration_seconds",
        "sync_proxy_rules_endpoint_changes_pending",
        "sync_proxy_rules_endpoint_changes_total",
        "sync_proxy_rules_service_changes_pending",
        "sync_proxy_rules_service_changes_total",
        "sync_proxy_rules_iptables_restore_failures_total",
        "sync_proxy_rules_no_local_endpoints_total",
        "proxy_healthz_total",
        "proxy_livez_total",
        "conntrack_reconciler_sync_duration_seconds",
        "conntrack_reconciler_deleted_entries_total",
    ] {
        let name = format!("kubeproxy_{name}");
        assert!(names.contains(&name), "{name} is missing");
    }
    assert!(metric("kubeproxy_sync_proxy_rules_service_changes_total").unwrap() >= 2.0);
    assert!(metric("kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"}").unwrap() >= 1.0);
    assert!(metric("kube_ipvs_operations_total{operation=\"add_virtual_server\"}").unwrap() >= 3.0);
    assert!(metric("kube_ipvs_change_duration_seconds_count").unwrap() >= 3.0);
    assert!(metric("kube_ipvs_netlink_messages_total") > metric("kube_ipvs_netlink_batches_total"));
}

fn now() -> String {
    jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).unwrap().to_string()
}

fn fs_read(path: &str) -> String {
    fs::read_to_string(path).unwrap()
}

/// Checks the text as `promtool check metrics` would, and returns the names of the metrics.
fn well_formed(text: &str) -> std::collections::BTreeSet<String> {
    use std::collections::{BTreeMap, BTreeSet};
    let (mut types, mut helps) = (BTreeMap::new(), BTreeSet::new());
    let (mut seen, mut found, mut last) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(help) = line.strip_prefix("# HELP ") {
            assert!(helps.insert(help.split(' ').next().unwrap().to_owned()), "two helps: {line}");
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert!(types.insert(name.to_owned(), kind.to_owned()).is_none(), "two types: {line}");
        } else {
            let (sample_name, labels, value) = sample(line);
            assert!(seen.insert((sample_name.clone(), labels.clone())), "twice: {line}");
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| {
                sample_name.strip_suffix(end).filter(|name| types.get(*name).is_some_and(|kind| kind == "histogram"))
            });
            let name = family.unwrap_or(&sample_name).to_owned();
            let kind = types.get(&name).unwrap();
            assert!(helps.contains(&name), "no help for {name}");
            assert!(!value.is_nan() && (kind == "gauge" || value >= 0.0), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total") && kind != "gauge", "{line}");
            if sample_name.ends_with("_bucket") && family.is_some() {
                // Cumulative, and in order.
                let series: Vec<_> = labels.iter().filter(|(name, _)| name != "le").cloned().collect();
                let before = last.insert((name.clone(), series), value).unwrap_or(0.0);
                assert!(value >= before, "{line}");
            }
            found.insert(name);
        }
    }
    found
}
