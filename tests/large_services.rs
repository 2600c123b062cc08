//! Services whose parts multiply to very much: while one of them is being programmed the changes of other Services come first, the
//! agent is alive, and its memory stays below the limit of deploy/.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::time::{Duration, Instant};

use common::{Agent, HEALTH, Manifests, get, metric, service, slice};
use ipvs_netlink::{Client, Protocol, VirtualServerId};
use lab::netns::isolate;
use lab::objects::{self, with};
use serde_json::{Value, json};

/// `resources.limits.memory` of deploy/base.
const MEMORY_LIMIT: u64 = 256 << 20;

fn ports(count: usize) -> Vec<Value> {
    (1..=count).map(|it| json!({"name": format!("p{it}"), "protocol": "TCP", "port": it})).collect()
}

fn address(first: u8, index: usize) -> String {
    let [_, b, c, d] = u32::try_from(index).unwrap().to_be_bytes();
    format!("{first}.{b}.{c}.{d}")
}

fn addresses(first: u8, count: usize) -> Vec<String> {
    (1..=count).map(|index| address(first, index)).collect()
}

fn large(name: &str, cluster_ip: &str, ports_of: usize, spec: &Value) -> Value {
    with(objects::service(name, &[cluster_ip], &ports(ports_of)), json!({"spec": spec}))
}

/// Slices of up to a thousand endpoints each.
fn slices(service: &str, ports_of: usize, endpoints: usize) -> Vec<Value> {
    let endpoints = addresses(11, endpoints);
    let of = |(index, chunk): (usize, &[String])| {
        objects::slice(&format!("{service}-{index}"), service, &ports(ports_of), &objects::ready(chunk))
    };
    endpoints.chunks(1000).enumerate().map(of).collect()
}

/// How many real servers the Service has that somebody waits for, and the first of them.
fn real_servers_of_web(client: &mut Client) -> Vec<String> {
    let id = VirtualServerId::address(Protocol::Tcp, "10.96.0.10:80".parse().unwrap());
    let held = client.real_servers(&id).unwrap_or_default();
    held.into_iter().filter(|it| it.server.weight > 0).map(|it| it.server.socket_address().to_string()).collect()
}

struct Meanwhile {
    manifests: Manifests,
    agent: Agent,
    client: Client,
    changes: usize,
}

impl Meanwhile {
    /// An agent that serves a small Service.
    fn new(flags: &[&str]) -> Self {
        isolate().unwrap();
        let manifests = Manifests::new();
        manifests.write("web.json", &service("web", "10.96.0.10"));
        manifests.write("web-slice.json", &slice("web", "web", &["10.0.0.1"]));
        let mut agent = manifests.agent(flags);
        agent.says("audited");
        let mut client = Client::connect().unwrap();
        agent.until("serve it", |_| real_servers_of_web(&mut client) == ["10.0.0.1:8080"]);
        agent.until("listen", |_| get(HEALTH, "/livez").is_some());
        Self { manifests, agent, client, changes: 0 }
    }

    /// Changes the small Service's endpoint and returns how long it took until the kernel had it.
    fn change(&mut self) -> Duration {
        self.changes += 1;
        let endpoint = address(10, self.changes + 1);
        let start = Instant::now();
        self.manifests.write("web-slice.json", &slice("web", "web", &[endpoint.as_str()]));
        let (client, expected) = (&mut self.client, [format!("{endpoint}:8080")]);
        self.agent.until("serve the new endpoint", |_| real_servers_of_web(client) == expected);
        start.elapsed()
    }

    /// Lets a large change happen. Until it is done the small Service changes again and again, and that comes first.
    fn while_it_programs(&mut self, what: &str, virtual_servers: usize) {
        let wanted = f64::from(u32::try_from(virtual_servers + 1).unwrap());
        let (start, mut slowest, mut changes) = (Instant::now(), Duration::ZERO, 0);
        let is_done =
            || metric("kube_ipvs_virtual_servers") == Some(wanted) && metric("kube_ipvs_keys_left") == Some(0.0);
        // The change has not been noticed yet.
        let mut was_busy = false;
        loop {
            slowest = slowest.max(self.change());
            changes += 1;
            let live = get(HEALTH, "/livez").map(|answer| answer.status);
            assert_eq!(live, Some(200), "{what}");
            let is_done = is_done();
            was_busy |= !is_done;
            if is_done && (was_busy || start.elapsed() > Duration::from_secs(10)) {
                break;
            }
        }
        let (took, memory) = (start.elapsed(), self.agent.peak_memory());
        println!(
            "{what}: {took:.1?}; meanwhile {changes} changes of another Service, the slowest after {slowest:.1?}; {} MiB",
            memory >> 20
        );
        assert!(changes > 1, "{what}: nothing came before it");
        assert!(memory < MEMORY_LIMIT, "{what}: {memory} bytes");
    }

    /// Each object is a file: a file is read as a whole before its changes are known.
    fn write(&mut self, objects: &[Value]) {
        for object in objects {
            self.manifests.write(&file_of(object), object);
        }
    }

    fn remove(&mut self, objects: &[Value]) {
        for object in objects {
            self.manifests.remove(&file_of(object));
        }
    }
}

fn file_of(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap().to_lowercase();
    format!("{}-{}.json", text(&object["kind"]), text(&object["metadata"]["name"]))
}

fn check(what: &str, flags: &[&str], objects: &[Value], virtual_servers: usize) {
    let mut meanwhile = Meanwhile::new(flags);
    meanwhile.write(objects);
    meanwhile.while_it_programs(what, virtual_servers);
    meanwhile.remove(objects);
    meanwhile.while_it_programs(&format!("{what}: deleted"), 0);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_thousand_ports_of_200_external_ips_delay_no_other() {
    let spec = json!({"externalIPs": addresses(20, 200)});
    check("1,000 ports x 200 external IPs", &[], &[large("large", "10.96.0.11", 1000, &spec)], 100_000);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_thousand_ports_of_1000_endpoints_delay_no_other() {
    let mut objects = vec![large("large", "10.96.0.11", 1000, &json!({}))];
    objects.extend(slices("large", 1000, 1000));
    check("1,000 ports x 1,000 endpoints", &[], &objects, 500);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_service_of_every_port_delays_no_other() {
    check("65,535 ports", &[], &[large("large", "10.96.0.11", 65_535, &json!({}))], 65_535);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_port_of_20000_endpoints_delays_no_other() {
    let mut objects = vec![large("large", "10.96.0.11", 1, &json!({}))];
    objects.extend(slices("large", 1, 20_000));
    check("1 port x 20,000 endpoints", &[], &objects, 1);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn many_load_balancer_ips_ranges_and_affinity_delay_no_other() {
    let spec = json!({
        "type": "LoadBalancer",
        "sessionAffinity": "ClientIP",
        "loadBalancerSourceRanges": addresses(30, 5000).iter().map(|it| format!("{it}/32")).collect::<Vec<_>>(),
    });
    let service = large("large", "10.96.0.11", 300, &spec);
    let service = with(service, json!({"status": objects::load_balancer(&addresses(20, 100))}));
    check("300 ports x 100 load-balancer IPs x 5,000 ranges", &[], &[service], 300 * 101);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_hundred_services_at_their_budget_delay_no_other() {
    let flags = ["--service-budget-front-ends=500", "--service-budget-real-servers=5000"];
    let mut objects = Vec::new();
    for index in 0..100 {
        let name = format!("large-{index}");
        objects.push(large(&name, &address(12, index + 1), 700, &json!({})));
        objects.extend(slices(&name, 400, 12));
    }
    check("100 Services at their budget", &flags, &objects, 100 * 500);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_large_service_that_changes_all_the_time_delays_no_other() {
    let mut meanwhile = Meanwhile::new(&[]);
    let mut slowest = Duration::ZERO;
    for round in 0..10 {
        let mut objects = vec![large("large", "10.96.0.11", 1000 - round, &json!({}))];
        objects.extend(slices("large", 1000, 100 + 50 * (round % 2)));
        meanwhile.write(&objects);
        let end = Instant::now() + Duration::from_secs(1);
        while Instant::now() < end {
            slowest = slowest.max(meanwhile.change());
        }
        assert_eq!(get(HEALTH, "/livez").unwrap().status, 200);
    }
    println!("a large Service changes 10 times: the slowest change of another one meanwhile took {slowest:.1?}");
    meanwhile.while_it_programs("and comes to rest", 991);
}
