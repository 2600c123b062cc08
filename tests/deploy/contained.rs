//! The agent in its pod, on a real kernel: with the files of the image and nothing else, with the rights that the manifests
//! give it, and under the profile of system calls.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use crate::kube_proxy::{Iptables, install_recording, recording};
use k8s_openapi::api::rbac::v1::ClusterRole;
use lab::netns::isolate;
use serde_json::Value;
use test_apiserver::{Server, Streaming, TlsListener, Verb};

use crate::common::{HEALTH, METRICS, addresses, ipvs, metric, run, service, slice};
use crate::kustomize::{build, documents, find, merge};
use crate::pod::{Pod, TOKEN};
use crate::{deploy, kubeadm};

const WEB: &str = "-A -t 10.96.0.10:80 -s rr";
const WEB_1: &str = "-a -t 10.96.0.10:80 -r 10.0.0.1:8080 -m -w 1";
const WEB_2: &str = "-a -t 10.96.0.10:80 -r 10.0.0.2:8080 -m -w 1";

/// Limits of connection tracking belong to the host.
const NO_LIMITS: &str = "conntrack: {maxPerCore: 0}\n";

/// What a fresh network namespace has otherwise.
const NEEDED: [&str; 4] = [
    "net/ipv4/vs/conntrack",
    "net/ipv4/vs/expire_nodest_conn",
    "net/ipv4/vs/expire_quiescent_template",
    "net/ipv4/ip_forward",
];

/// A node whose kernel nobody has prepared, and an API server with a Service, which asks for the token of the service account.
fn node() -> (Server, TlsListener) {
    isolate().unwrap();
    for key in NEEDED {
        fs::write(format!("/proc/sys/{key}"), "0").unwrap();
    }
    let server = Server::new();
    server.require_token(TOKEN);
    for object in
        [crate::common::node(), service("web", "10.96.0.10"), slice("web-1", "web", &["10.0.0.1", "10.0.0.2"])]
    {
        server.apply(object);
    }
    let listener = server.listen_over_tls_in_thread().unwrap();
    (server, listener)
}

/// The pod of the base, with our profile, and what is to be filled in.
fn base(server: &TlsListener) -> Pod {
    let objects = build(&deploy().join("base"), &[deploy().join("components/seccomp")]);
    let mut pod = Pod::new(find(&objects, "DaemonSet", "kube-ipvs"), &objects, server);
    let address = pod.server();
    pod.configure("kube-ipvs-api-server", "KUBERNETES_SERVICE_HOST", |_| address.ip().to_string());
    pod.configure("kube-ipvs-api-server", "KUBERNETES_SERVICE_PORT", |_| address.port().to_string());
    pod.configure("kube-ipvs", "config.conf", |text| format!("{text}{NO_LIMITS}"));
    pod
}

/// Also while the agent begins anew, and ends a connection without an answer.
fn is_ok(address: &str, path: &str) -> bool {
    let mut answer = String::new();
    let asked = TcpStream::connect(address).and_then(|mut stream| {
        write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
        stream.read_to_string(&mut answer)
    });
    asked.is_ok() && answer.starts_with("HTTP/1.1 200")
}

/// The process of the agent in this thread's network namespace.
fn id() -> String {
    let own = fs::read_link("/proc/thread-self/ns/net").unwrap();
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    // Processes of others may end meanwhile.
    let mut ours = processes.filter(|path| {
        fs::read_link(path.join("ns/net")).is_ok_and(|namespace| namespace == own)
            && fs::read_link(path.join("exe")).is_ok_and(|executable| executable.ends_with("kube-ipvs"))
    });
    let found = ours.next().unwrap();
    assert_eq!(ours.next(), None, "another one");
    found.file_name().unwrap().to_string_lossy().into_owned()
}

/// A field of the agent's `/proc/PID/status`.
fn status(field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{}/status", id())).unwrap();
    text.lines().find_map(|line| line.strip_prefix(&format!("{field}:"))).unwrap().trim().to_owned()
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_base_pod_serves_with_one_capability_and_its_seccomp_profile() {
    let (server, listener) = node();
    let mut pod = base(&listener);
    // Without the container that prepares the kernel it says what it lacks: its /proc/sys is read-only.
    let mut early = pod.start("kube-ipvs");
    assert!(!early.ends().success());
    assert!(early.log().contains("net.ipv4.vs.conntrack must be 1, is 0, and cannot be written"), "{}", early.log());
    let log = pod.run("init");
    assert!(log.contains("the kernel is prepared"), "{log}");
    assert_eq!(NEEDED.map(|key| fs::read_to_string(format!("/proc/sys/{key}")).unwrap()), ["1\n"; 4]);
    assert_eq!(addresses(), [""; 0], "the device is there, and has none yet");

    let mut agent = pod.start("kube-ipvs");
    agent.has(&[WEB, WEB_1, WEB_2]).binds(&["10.96.0.10/32"]);
    assert!(run("nft list tables").contains("table ip kube-ipvs"));
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        // CAP_NET_ADMIN is the twelfth.
        assert_eq!(status(set), "0000000000001000", "{set}");
    }
    assert_eq!(["CapInh", "CapAmb"].map(status), ["0000000000000000"; 2]);
    // By a filter.
    assert_eq!([status("NoNewPrivs"), status("Seccomp")], ["1", "2"]);
    agent.until("answer", |_| is_ok(HEALTH, "/livez") && is_ok(HEALTH, "/healthz") && is_ok(METRICS, "/readyz"));
    assert_eq!(metric("kube_ipvs_virtual_servers"), Some(1.0));

    server.apply(slice("web-1", "web", &["10.0.0.1"]));
    agent.has(&[WEB, WEB_1]);
    // Kubelet swaps a link; the agent executes itself anew, with no more rights than before.
    let before = id();
    pod.configure("kube-ipvs", "config.conf", |text| text.replace("scheduler: rr", "scheduler: wlc"));
    agent.has(&["-A -t 10.96.0.10:80 -s wlc", WEB_1]);
    assert_eq!((id(), status("CapEff")), (before, "0000000000001000".to_owned()));
    assert_eq!(status("Seccomp"), "2");
    agent.until("answer again", |_| is_ok(HEALTH, "/livez") && is_ok(METRICS, "/readyz"));
    assert!(!agent.log().contains("ERROR"), "{}", agent.log());

    agent.terminate();
    assert!(agent.ends().success(), "{}", agent.log());
    assert_eq!(ipvs().len(), 2, "the kernel stays as it is");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_call_that_is_not_in_the_profile_is_refused() {
    let (_server, listener) = node();
    let mut pod = base(&listener);
    pod.run("init");
    let text = fs::read_to_string(deploy().join("seccomp/kube-ipvs.json")).unwrap();
    let without = text.replace("\"listen\", ", "");
    assert_ne!(text, without);
    let profile = pod.path().join("without-listen.json");
    fs::write(&profile, without).unwrap();
    pod.set_seccomp(profile);
    pod.start("kube-ipvs").says("cannot listen on 0.0.0.0:10256: Function not implemented").has(&[WEB, WEB_1, WEB_2]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn takeover_works_with_kubeadms_configuration_and_kubeconfig() {
    let (server, listener) = node();
    let overlay = build(&deploy().join("overlays/take-over-kubeadm"), &[deploy().join("components/seccomp")]);
    let theirs = documents(&kubeadm().join("config-map.yaml"));
    let mut pod = Pod::new(find(&overlay, "DaemonSet", "kube-ipvs"), &theirs, &listener);
    let address = pod.server();
    taken_over(&mut pod, &format!("https://{address}"), "kube-ipvs");
    assert!(server.count("services", Verb::List) + server.count("services", Verb::StreamingList) > 0);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn kube_proxys_daemon_set_runs_our_image_with_its_own_command() {
    let (server, listener) = node();
    let theirs = documents(&kubeadm().join("config-map.yaml"));
    let mut swapped = documents(&kubeadm().join("daemon-set.yaml")).remove(0);
    merge(&mut swapped, documents(&deploy().join("patches/kube-proxy-becomes-kube-ipvs.yaml")).remove(0), "");
    let mut pod = Pod::new(&swapped, &theirs, &listener);
    pod.set_seccomp(deploy().join("seccomp/kube-ipvs.json"));
    // By a name, which a static binary without any other file must be able to look up.
    let port = server.listen_in_thread().unwrap().port();
    taken_over(&mut pod, &format!("http://control-plane.example:{port}"), "kube-proxy");
}

/// Goes through the start of a pod that takes a node over, up to its container `name`.
fn taken_over(pod: &mut Pod, url: &str, name: &str) {
    install_recording(&recording("dualstack-nodeport"), Iptables::Nft);
    let kube_proxys = || (run("nft list ruleset").matches("KUBE-").count(), run("ipset list -n").lines().count());
    assert!(kube_proxys().0 > 20 && kube_proxys().1 > 10, "{:?}", kube_proxys());
    // All but the address: the token and the certificate are those of the service account.
    pod.configure("kube-proxy", "kubeconfig.conf", |text| text.replace("https://control-plane.example:6443", url));
    pod.configure("kube-proxy", "config.conf", |text| text.replace("maxPerCore: null", "maxPerCore: 0"));
    pod.run("init");
    let log = pod.run("takeover");
    assert!(log.contains("removed everything that kube-proxy left"), "{log}");
    assert_eq!(kube_proxys(), (0, 0));
    let here = [WEB, WEB_1, WEB_2];
    assert_eq!(ipvs(), here);
    let mut agent = pod.start(name);
    agent.says("audited, nothing to change").has(&here);
    agent.until("answer", |_| is_ok(HEALTH, "/livez") && is_ok(METRICS, "/readyz"));
    assert!(!agent.log().contains("ERROR"), "{}", agent.log());
    agent.terminate();
    assert!(agent.ends().success());
    // As at every later start.
    assert!(pod.run("takeover").contains("kube-proxy left nothing"));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_way_back_pod_removes_only_the_packet_filter() {
    let (_server, listener) = node();
    let pod = base(&listener);
    pod.run("init");
    let mut agent = pod.start("kube-ipvs");
    agent.has(&[WEB, WEB_1, WEB_2]);
    agent.terminate();
    agent.ends();
    let mut back = Pod::single(&documents(&deploy().join("way-back/pod.yaml"))[0], &listener);
    back.set_seccomp(deploy().join("seccomp/kube-ipvs.json"));
    back.run("cleanup");
    assert_eq!(run("nft list tables"), "");
    assert_eq!((ipvs().len(), addresses()), (3, vec!["10.96.0.10/32".to_owned()]));
    assert!(back.run("cleanup").contains("there was nothing to remove"));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_role_allows_exactly_the_agents_requests() {
    let (server, listener) = node();
    let pod = base(&listener);
    pod.run("init");
    // Once with lists in a stream, and once without; and something to tell of a Service.
    for streaming in [Streaming::Yes, Streaming::Refused(422)] {
        server.streaming(streaming);
        let mut agent = pod.start("kube-ipvs");
        agent.has(&[WEB, WEB_1, WEB_2]);
        server.apply(service("clash", "10.96.0.10"));
        agent.until("tell of two Services with one address", |_| {
            server.events().iter().any(|event| event["reason"] == "FrontEndTaken")
        });
        server.delete("Service", "default", "clash");
        agent.terminate();
        agent.ends();
    }
    let asked: BTreeSet<String> = server
        .requests()
        .iter()
        .map(|asked| {
            let verb = match asked.verb {
                Verb::List => "list",
                Verb::Watch | Verb::StreamingList => "watch",
                Verb::Post => "create",
            };
            format!("{verb} {}", asked.resource)
        })
        .collect();
    let objects: Vec<Value> = build(&deploy().join("base"), &[]);
    let role: ClusterRole = serde_json::from_value(find(&objects, "ClusterRole", "kube-ipvs").clone()).unwrap();
    let granted: BTreeSet<String> = role
        .rules
        .into_iter()
        .flatten()
        .flat_map(|rule| {
            let resources = rule.resources.into_iter().flatten();
            resources.flat_map(move |name| rule.verbs.clone().into_iter().map(move |verb| format!("{verb} {name}")))
        })
        .collect();
    assert_eq!(asked, granted);
    // An Event that is changed would be posted with a series.
    assert!(server.events().iter().all(|event| event["series"].is_null()));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_thousand_services_fit_in_half_of_the_memory_limit() {
    let (server, listener) = node();
    for number in 0..1000 {
        let name = format!("s{number}");
        let octets = format!("{}.{}", number / 250, number % 250 + 1);
        server.apply(service(&name, &format!("10.97.{octets}")));
        let endpoints: Vec<String> = (1..=10).map(|host| format!("10.{}.{octets}", 128 + host)).collect();
        server.apply(slice(&name, &name, &endpoints.iter().map(String::as_str).collect::<Vec<_>>()));
    }
    let pod = base(&listener);
    pod.run("init");
    let mut agent = pod.start("kube-ipvs");
    agent.until("serve all", |_| is_ok(METRICS, "/readyz") && metric("kube_ipvs_services") == Some(1001.0));
    let kilobytes = |field: &str| status(field).trim_end_matches(" kB").parse::<u64>().unwrap();
    let ticks = fs::read_to_string(format!("/proc/{}/stat", id())).unwrap();
    let ticks: u64 =
        ticks.rsplit_once(')').unwrap().1.split_whitespace().skip(11).take(2).map(|n| n.parse::<u64>().unwrap()).sum();
    let (peak, now) = (kilobytes("VmHWM"), kilobytes("VmRSS"));
    println!("memory: {peak} kB at most, {now} kB now; processor: {ticks} ticks so far");
    assert!(peak < 128 * 1024, "{peak} kB");
}
