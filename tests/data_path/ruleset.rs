//! The packet filter as `nft` lists it: what becomes of it over time, and of the tables of others.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use lab::netns::{Namespace, isolate};
use reconciler::filter::ObservedFilter;
use serde_json::{Value, json};

use crate::common::{Agent, Manifests, addresses, ipvs, observed_filter, run};
use crate::network::CLUSTER_CIDR;
use crate::objects::{file, manifests, ready, service};
use crate::{FLAGS, serving};

/// What stands on a node besides: a table of somebody's own, and rules of `iptables-nft`.
const OTHERS: &str = "
set -e
nft 'table inet foreign {
    set listed { type ipv4_addr; elements = { 10.96.0.1, 192.0.2.1 }; }
    chain forward { type filter hook forward priority 5; policy accept; ip daddr @listed counter drop; }
}'
iptables-nft-restore -w <<'EOF'
*filter
:FORWARD ACCEPT [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -s 192.0.2.7 -m comment --comment theirs -j DROP
COMMIT
EOF
";

/// The tables of the others, to the last byte.
fn others() -> String {
    run("nft -a list table inet foreign && nft -a list table ip filter")
}

/// Everything in our tables but handles, in an order of its own. Rules stay in theirs.
fn ours() -> Vec<String> {
    let mut lines = Vec::new();
    for family in ["ip", "ip6"] {
        let Some(listing) = try_run(&format!("nft -j list table {family} kube-ipvs")) else { continue };
        let listing: Value = serde_json::from_str(&listing).unwrap();
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        for object in listing["nftables"].as_array().unwrap() {
            if object.get("metainfo").is_some() {
                continue;
            }
            let mut object = object.clone();
            normalise(&mut object);
            // They say whether an agent owns the table just now.
            if let Some(table) = object.get_mut("table").and_then(Value::as_object_mut) {
                table.remove("flags");
            }
            let chain = object["rule"]["chain"].as_str().unwrap_or_default().to_owned();
            let place = places.entry(chain).or_default();
            *place += 1;
            let place = if object.get("rule").is_some() { *place } else { 0 };
            lines.push(format!("{family} {place} {object}"));
        }
    }
    lines.sort();
    lines
}

/// Takes handles away and sorts elements.
fn normalise(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.remove("handle");
            for (key, value) in fields {
                normalise(value);
                if let ("elem" | "set", Value::Array(elements)) = (key.as_str(), value) {
                    elements.sort_by_key(Value::to_string);
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(normalise),
        _ => {}
    }
}

fn try_run(command: &str) -> Option<String> {
    let output = std::process::Command::new("sh").args(["-c", command]).output().unwrap();
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
}

/// Numbers that look random and are the same each time: xorshift.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % limit
    }

    fn chance(&mut self, of: usize) -> bool {
        self.below(of) == 0
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }

    fn some<T: Clone>(&mut self, from: &[T]) -> Vec<T> {
        let count = self.below(from.len() + 1);
        (0..count).map(|_| self.pick(from)).collect()
    }
}

const RANGES: [&str; 9] = [
    "10.0.0.0/8",
    "10.1.2.3/16",
    "192.168.1.0/24",
    "192.168.1.2/32",
    "0.0.0.0/0",
    "fd00:192:1::/64",
    "fd00:192:1::2/128",
    "::/0",
    "::ffff:10.0.0.0/104",
];

/// A Service of any kind. Some share addresses or ports.
fn random_service(number: usize, numbers: &mut Numbers) -> Value {
    let kind = numbers.pick(&["ClusterIP", "NodePort", "LoadBalancer"]);
    let mut vips = vec![format!("10.96.0.{number}"), format!("fd00:96::{number}")];
    match numbers.below(4) {
        0 => vips.truncate(1),
        1 => vips.reverse(),
        _ => {}
    }
    let mut ports = Vec::new();
    for (index, protocol) in ["TCP", "UDP", "SCTP"].into_iter().enumerate() {
        if numbers.chance(2) || index == 0 {
            let mut port =
                json!({"name": protocol.to_lowercase(), "protocol": protocol, "port": 80 + numbers.below(3)});
            if kind != "ClusterIP" {
                port["nodePort"] = json!(30000 + numbers.below(60));
            }
            ports.push(port);
        }
    }
    let external: Vec<String> = (1..=20).flat_map(|n| [format!("203.0.113.{n}"), format!("2001:db8::{n}")]).collect();
    let policy = ["Cluster", "Local"];
    let mut spec = json!({
        "type": kind,
        "clusterIPs": vips,
        "ports": ports,
        "externalTrafficPolicy": numbers.pick(&policy),
        "internalTrafficPolicy": numbers.pick(&["Cluster", "Cluster", "Local"]),
        "sessionAffinity": numbers.pick(&["None", "None", "ClientIP"]),
    });
    if numbers.chance(4) {
        spec["externalIPs"] = json!([numbers.pick(&external)]);
    }
    if kind == "LoadBalancer" {
        spec["loadBalancerIPs"] = json!([numbers.pick(&external), numbers.pick(&external)]);
        spec["loadBalancerSourceRanges"] = json!(numbers.some(&RANGES));
        spec["healthCheckNodePort"] = json!(31000 + number);
    }
    service(&format!("service-{number}"), spec)
}

fn random_slice(number: usize, numbers: &mut Numbers) -> Value {
    let prefix = numbers.pick(&[format!("10.244.{number}."), format!("fd00:244::{number}:")]);
    let endpoints: Vec<String> = (0..numbers.below(4)).map(|last| format!("{prefix}{}", last + 1)).collect();
    let mut slice = ready(&format!("service-{number}"), endpoints);
    for endpoint in slice["endpoints"].as_array_mut().unwrap() {
        endpoint["nodeName"] = json!(numbers.pick(&["node-a", "node-b"]));
        if numbers.chance(4) {
            endpoint["conditions"] = json!({"ready": false, "serving": numbers.chance(2), "terminating": true});
        }
    }
    slice["metadata"]["name"] = json!(format!("service-{number}-{}", numbers.below(2)));
    slice["ports"].as_array_mut().unwrap().push(json!({"name": "sctp", "protocol": "SCTP", "port": 8080}));
    slice
}

/// One change of one file.
fn change(manifests: &Manifests, numbers: &mut Numbers) {
    let number = 1 + numbers.below(40);
    let name = format!("{}-{number}.json", numbers.pick(&["service", "slice"]));
    if numbers.chance(4) {
        if manifests.contains(&name) {
            manifests.remove(&name);
        }
    } else if name.starts_with("service") {
        manifests.write(&name, &file(&[random_service(number, numbers)]));
    } else {
        manifests.write(&name, &file(&[random_slice(number, numbers)]));
    }
}

/// The addresses of the node's interface, of which NodePorts follow.
fn interface() {
    lab::link::add_dummy("eth0", &["192.168.1.1/24", "fd00:192:1::1/64"]).unwrap();
}

/// What a new agent makes of the manifests where there is nothing yet.
fn from_nothing(manifests: &Manifests, flags: &[&str]) -> Found {
    Namespace::new()
        .unwrap()
        .run(|| {
            interface();
            let mut agent = manifests.agent(&[&FLAGS[..], flags, &["--once"]].concat());
            assert!(agent.ends().success(), "{}", agent.log());
            Found::read()
        })
        .unwrap()
}

/// What there is in the kernel.
#[derive(PartialEq)]
struct Found {
    observed: ObservedFilter,
    servers: Vec<String>,
    addresses: Vec<String>,
    listed: Vec<String>,
}

impl Found {
    fn read() -> Self {
        Self { observed: observed_filter(), servers: ipvs(), addresses: addresses(), listed: ours() }
    }

    /// Whether it is there. What is read without running a program is read first.
    fn is_there(&self) -> bool {
        observed_filter() == self.observed
            && ipvs() == self.servers
            && addresses() == self.addresses
            && *self == Self::read()
    }
}

/// The Service that changes with each batch of changes, so that one sees when a batch has been taken in.
fn last_of(batch: u16) -> (Value, String) {
    const VIP: &str = "10.96.255.250";
    let ports = json!([{"name": "tcp", "protocol": "TCP", "port": 1000 + batch}]);
    let object = service("last", json!({"clusterIPs": [VIP], "ports": ports}));
    (object, format!("-A -t {VIP}:{} -s rr", 1000 + batch))
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn after_1000_changes_the_ruleset_equals_that_of_a_fresh_start() {
    const CHANGES: usize = 1000;
    const SEED: u64 = 0x5eed_0000_0001;
    isolate().unwrap();
    interface();
    run(OTHERS);
    let before = others();
    let manifests = manifests(&[]);
    let mut agent = serving(&manifests, &[CLUSTER_CIDR]);
    let (mut numbers, mut left, mut batches) = (Numbers(SEED), CHANGES, 0);
    while left > 0 {
        let batch = (1 + numbers.below(30)).min(left);
        for _ in 0..batch {
            change(&manifests, &mut numbers);
        }
        (left, batches) = (left - batch, batches + 1);
        let (last, line) = last_of(batches);
        manifests.write("last.json", &last);
        agent.until("take in a batch", |_| ipvs().contains(&line));
    }
    let expected = from_nothing(&manifests, &[CLUSTER_CIDR]);
    assert!(expected.listed.iter().any(|line| line.contains("sources-default/")), "{:#?}", expected.listed);
    let waited = lab::wait::until("come to rest", || expected.is_there());
    let syncs = agent.log().matches("synced").count();
    if let Err(error) = waited {
        let found = Found::read();
        let lines =
            differences(&found.listed, &expected.listed) + "\n" + &differences(&found.servers, &expected.servers);
        panic!("{error}: {lines}\n{:?}\n{:?}", found.addresses, expected.addresses);
    }
    println!("{CHANGES} changes in {batches} batches and {syncs} syncs; {} lines", expected.listed.len());
    assert!(syncs >= usize::from(batches), "only {syncs} syncs");
    let log = agent.log();
    assert!(!log.contains("somebody else"), "{log}");
    assert!(!log.contains("will try again"), "{}", complaints(&log));
    assert_eq!(others(), before);
    no_kube_proxy();
    agent.terminate();
    agent.ends();
}

fn complaints(log: &str) -> String {
    log.lines().filter(|line| line.contains("will try again")).take(5).collect::<Vec<_>>().join("\n")
}

/// Lines that only one of two lists has.
fn differences(found: &[String], expected: &[String]) -> String {
    let mut text = String::new();
    for (sign, these, those) in [('+', found, expected), ('-', expected, found)] {
        for line in these.iter().filter(|line| !those.contains(line)) {
            writeln!(text, "{sign} {line}").unwrap();
        }
    }
    text
}

fn no_kube_proxy() {
    let tables = run("nft list tables");
    assert!(!tables.contains("kube-proxy"), "{tables}");
}

/// An agent that audits often, with the Services for which there is something to tamper with.
fn audited(manifests: &Manifests) -> Agent {
    serving(manifests, &[CLUSTER_CIDR, "--ipvs-sync-period=300ms", "--own-tables=false"])
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn foreign_changes_of_our_tables_are_repaired_and_reported() {
    /// How many audits may pass until all is as it was.
    const AUDITS: usize = 3;
    isolate().unwrap();
    interface();
    run(OTHERS);
    let before = others();
    let spec = json!({
        "type": "LoadBalancer",
        "clusterIPs": ["10.96.0.10", "fd00:96::10"],
        "loadBalancerIPs": ["203.0.113.10", "2001:db8::10"],
        "loadBalancerSourceRanges": ["192.168.1.0/24", "10.0.0.0/8"],
        "externalTrafficPolicy": "Local",
        "healthCheckNodePort": 31000,
    });
    let manifests = manifests(&[service("web", spec), ready("web", ["10.244.1.1"])]);
    let mut agent = audited(&manifests);
    let right = Found::read();
    for (tamper, named) in [
        ("nft delete element ip kube-ipvs vips '{ 10.96.0.10 }'", "address 10.96.0.10"),
        ("nft delete element ip kube-ipvs open '{ 10.96.0.10 . tcp . 80 }'", "virtual server TCP 10.96.0.10:80"),
        ("nft add element ip kube-ipvs refused '{ 10.9.9.9 . tcp . 80 }'", "virtual server TCP 10.9.9.9:80"),
        (
            "nft delete element ip kube-ipvs source-ranges '{ 203.0.113.10 . tcp . 80 }'",
            "virtual server TCP 203.0.113.10:80",
        ),
        (
            "nft delete element ip kube-ipvs hairpin '{ 10.244.1.1 . 10.244.1.1 . tcp . 8080 }'",
            "local endpoint 10.244.1.1:8080",
        ),
        ("nft delete element ip kube-ipvs health-check-ports '{ 31000 }'", "health-check port 31000"),
        ("nft add rule ip kube-ipvs filter-input accept", "IPv4 table"),
        ("nft insert rule ip kube-ipvs sources-default/web accept", "source ranges of Service default/web"),
        ("nft flush chain ip kube-ipvs nat-services", "IPv4 table"),
        ("nft flush chain ip kube-ipvs sources-default/web", "source ranges of Service default/web"),
        ("nft add chain ip6 kube-ipvs mine", "IPv6 table"),
        ("nft flush ruleset ip6", "IPv6 table"),
        ("nft add table ip kube-ipvs '{ flags dormant; }'", "IPv4 table"),
        ("nft delete table ip kube-ipvs", "IPv4 table"),
    ] {
        // While it looks away, so that what was done is seen before it is repaired.
        let (lines, log_before) = (agent.lines(), agent.log().len());
        agent.stop_while(|| {
            run(tamper);
            assert_ne!(observed_filter(), right.observed, "{tamper} changes nothing");
        });
        agent.says_after(lines, "somebody else changed");
        let mut audits = 0;
        while !right.is_there() {
            assert!(audits < AUDITS, "{tamper} is not repaired: {}", differences(&ours(), &right.listed));
            agent.audits(1);
            audits += 1;
        }
        let log = agent.log();
        let warning = log[log_before..].lines().find(|line| line.contains("somebody else changed"));
        let warning = warning.unwrap_or_else(|| panic!("{tamper}: no warning in\n{}", &log[log_before..]));
        assert!(warning.contains(named), "{tamper}: {warning}");
        assert!(!log[log_before..].contains("will try again"), "{tamper}: {}", &log[log_before..]);
    }
    assert_eq!(others(), before);
    no_kube_proxy();
}
