//! Hostile objects: what somebody writes who may write Services and EndpointSlices in a namespace of his own.
//!
//! They are what an API server accepts: ClusterIPs and NodePorts are the cluster's to allocate, so these are their own.
//! All endpoints are a pod that answers, with something else than honest pods do.

use fastrand::Rng;
use lab::objects::{self, State, port, with};
use serde_json::{Value, json};

use crate::bench::load::NODE;
use crate::workload::cluster::{CONTROL_PLANE, STRANGER};

/// The attacker's own namespace.
pub(crate) const NAMESPACE: &str = "hostile";
/// Where the attacker's pod listens.
pub(crate) const STRANGER_PORT: u16 = 6666;

/// Before all honest Services were made, and after.
const OLDER: &str = "2020-01-01T00:00:00Z";
const YOUNGER: &str = "2026-01-01T00:00:00Z";

/// How an address is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    ExternalIp,
    LoadBalancer,
}
use Way::{ExternalIp, LoadBalancer};

/// An address that is not the attacker's.
pub(crate) struct Claim {
    kind: &'static str,
    addresses: &'static [&'static str],
    /// Ports that are somebody's there; besides, the attacker takes others.
    ports: &'static [u16],
    ways: &'static [Way],
    /// Whether even an older Service has no right to it. Among equals the older Service has it: that is no attack.
    also_older: bool,
}

const ANY: &[Way] = &[ExternalIp, LoadBalancer];
/// The other Node is at the address of the client outside the cluster.
const CLAIMS: [Claim; 10] = [
    claim("the API server's address", &[CONTROL_PLANE], &[6443, 6444], ANY),
    claim("the ClusterIP of default/kubernetes", &["10.96.0.1"], &[443], ANY),
    claim("the ClusterIP of DNS", &["10.96.255.10"], &[53], ANY),
    claim("ClusterIPs of others", &["10.97.0.1", "10.97.0.2", "10.97.0.3", "10.97.0.6", "10.98.0.1"], &[80], ANY),
    claim("the node's address", &["192.168.1.1"], &[10250, 30080, 10256], ANY),
    claim("another node's address", &["192.168.1.2"], &[10250], ANY),
    claim("pods' addresses", &["10.244.1.1", "10.244.1.2", "10.244.2.1"], &[8080, 8087], ANY),
    claim("another's load balancer as an external IP", &["198.51.100.5"], &[80], &[ExternalIp]),
    Claim { also_older: false, ..claim("another's load balancer, younger", &["198.51.100.5"], &[80], &[LoadBalancer]) },
    Claim { also_older: false, ..claim("another's external IP, younger", &["203.0.113.4"], &[80], &[ExternalIp]) },
];

const fn claim(
    kind: &'static str,
    addresses: &'static [&'static str],
    ports: &'static [u16],
    ways: &'static [Way],
) -> Claim {
    Claim { kind, addresses, ports, ways, also_older: true }
}

/// What one Service is to the attacker: a number, from which all that must be unique follows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot(pub(crate) u16);

impl Slot {
    fn name(self) -> String {
        format!("hostile-{}", self.0)
    }

    fn service(self, ports: &[Value], spec: &Value) -> Value {
        let cluster_ip = format!("10.99.{}.{}", self.0 / 250, self.0 % 250 + 1);
        let service = with(objects::service(&self.name(), &[cluster_ip], ports), json!({"spec": spec}));
        with(service, json!({"metadata": {"namespace": NAMESPACE}}))
    }

    fn slice(self, number: usize, ports: &[Value], endpoints: &[Value]) -> Value {
        let name = format!("{}-{number}", self.name());
        with(objects::slice(&name, &self.name(), ports, endpoints), json!({"metadata": {"namespace": NAMESPACE}}))
    }

    /// A slice that leads all these ports to the attacker's pod.
    fn own_slice(self, ports: &[Value]) -> Value {
        let target = |port: &Value| with(port.clone(), json!({"port": STRANGER_PORT}));
        let endpoint = with(objects::endpoint(STRANGER, State::Ready), json!({"nodeName": NODE}));
        self.slice(0, &ports.iter().map(target).collect::<Vec<_>>(), &[endpoint])
    }
}

fn ports(count: u16, protocol: &str) -> Vec<Value> {
    (1..=count).map(|number| port(&format!("p{number}"), protocol, number)).collect()
}

/// Addresses that are nobody's, and differ.
fn addresses(count: usize, first: u8) -> Vec<String> {
    (0..count).map(|it| format!("{first}.{}.{}.{}", it / 62_500, it / 250 % 250, it % 250 + 1)).collect()
}

fn age(rng: &mut Rng, also_older: bool) -> Value {
    json!({"metadata": {"creationTimestamp": if also_older && rng.bool() { OLDER } else { YOUNGER }}})
}

/// A Service that asks for what is another's.
fn claiming(slot: Slot, rng: &mut Rng, claim: &Claim) -> Vec<Value> {
    let way = claim.ways[rng.usize(..claim.ways.len())];
    // One address, or all, among some of nobody.
    let mut wanted: Vec<String> = claim.addresses.iter().map(|&it| it.to_owned()).collect();
    if rng.bool() {
        wanted = vec![wanted.swap_remove(rng.usize(..wanted.len()))];
    }
    wanted.extend(addresses(rng.usize(..4), 20));
    rng.shuffle(&mut wanted);
    let mut numbers = claim.ports.to_vec();
    numbers.push(53);
    numbers.dedup();
    let ports: Vec<Value> = numbers
        .iter()
        .flat_map(|&number| {
            let name = if number == 53 { "dns".to_owned() } else { format!("p{number}") };
            [port(&name, "UDP", number), port(&format!("{name}-tcp"), "TCP", number)]
        })
        .collect();
    let (spec, status) = match way {
        ExternalIp => (json!({"externalIPs": wanted}), Value::Null),
        LoadBalancer => (
            json!({"type": "LoadBalancer", "externalTrafficPolicy": if rng.bool() { "Local" } else { "Cluster" },
                "loadBalancerSourceRanges": if rng.bool() { json!(["20.0.0.0/8"]) } else { Value::Null }}),
            objects::load_balancer(&wanted),
        ),
    };
    let service = with(slot.service(&ports, &spec), json!({"status": status}));
    vec![with(service, age(rng, claim.also_older)), slot.own_slice(&ports)]
}

/// How much an attack makes the agent do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weight {
    Light,
    /// Few of them at once: those who defend themselves by budgets need not be asked to hold any number.
    Heavy,
}

pub(crate) type Make = fn(Slot, &mut Rng) -> Vec<Value>;

/// Attacks by a Service and its slices, other than by a claim.
const KINDS: [(&str, Weight, Make); 14] = [
    ("1,000 ports x 200 external IPs", Weight::Heavy, |slot, _| {
        let ports = ports(1000, "TCP");
        vec![slot.service(&ports, &json!({"externalIPs": addresses(200, 21)})), slot.own_slice(&ports)]
    }),
    ("1,000 ports x 1,000 endpoints", Weight::Heavy, |slot, _| {
        let ports = ports(1000, "TCP");
        let endpoints = objects::ready(addresses(1000, 22));
        vec![slot.service(&ports, &json!({})), slot.slice(0, &ports, &endpoints)]
    }),
    ("65,535 ports", Weight::Heavy, |slot, _| {
        let ports = ports(u16::MAX, "UDP");
        vec![slot.service(&ports, &json!({})), slot.own_slice(&ports)]
    }),
    ("10 ports x 100 slices of 1,000 endpoints", Weight::Heavy, |slot, _| {
        let ports = ports(10, "TCP");
        let slices = addresses(100_000, 23);
        let slices = slices.chunks(1000).enumerate();
        let slices = slices.map(|(number, chunk)| slot.slice(number, &ports, &objects::ready(chunk)));
        std::iter::once(slot.service(&ports, &json!({}))).chain(slices).collect()
    }),
    ("100 ports x 100 slices of other ports", Weight::Heavy, |slot, _| {
        let others: Vec<Value> = (0..100).map(|it| port(&format!("o{it}"), "TCP", 1000 + it)).collect();
        let slices = (0..100).map(|number| slot.slice(number, &others, &objects::ready(addresses(10, 24))));
        std::iter::once(slot.service(&ports(100, "TCP"), &json!({}))).chain(slices).collect()
    }),
    ("thousands of source ranges", Weight::Heavy, |slot, rng| {
        let ranges: Vec<String> =
            addresses(rng.usize(1000..5000), 25).iter().map(|it| format!("{it}/{}", rng.u8(8..=32))).collect();
        let ports = ports(100, "TCP");
        let spec = json!({"type": "LoadBalancer", "loadBalancerSourceRanges": ranges});
        let status = objects::load_balancer(&addresses(2, 26));
        vec![with(slot.service(&ports, &spec), json!({"status": status})), slot.own_slice(&ports)]
    }),
    ("slices of wrong families", Weight::Light, |slot, rng| {
        let ports = ports(3, "TCP");
        let family = ["IPv6", "FQDN", "IPv4"][rng.usize(..3)];
        let wrong = ["::ffff:10.244.1.1", "fe80::1", "::1", "example.org", "010.244.001.001", "127.0.0.1", "10.97.0.1"];
        let endpoints: Vec<Value> = wrong.iter().map(|it| objects::endpoint(it, State::Ready)).collect();
        let wrong = with(slot.slice(1, &ports, &endpoints), json!({"addressType": family}));
        vec![slot.service(&ports, &json!({})), slot.own_slice(&ports), wrong]
    }),
    ("duplicate endpoints in several slices", Weight::Light, |slot, rng| {
        let ports = ports(5, "TCP");
        let states = [State::Ready, State::NotReady, State::Terminating];
        let mut slice = |number| {
            let endpoints = (0..200).map(|_| objects::endpoint(STRANGER, states[rng.usize(..3)]));
            slot.slice(number, &ports, &endpoints.collect::<Vec<_>>())
        };
        vec![slice(0), slice(1), slice(2), slot.service(&ports, &json!({}))]
    }),
    ("a slice that names another's Service", Weight::Light, |slot, rng| {
        let name = ["tcp", "kube-dns", "kubernetes", "still"][rng.usize(..4)];
        let ports = [port("a", "TCP", STRANGER_PORT), port("a", "UDP", STRANGER_PORT), port("https", "TCP", 6443)];
        let of = json!({"metadata": {"labels": {"kubernetes.io/service-name": name}}});
        vec![with(slot.own_slice(&ports), of)]
    }),
    ("names of maximum length", Weight::Light, |slot, _| {
        let ports: Vec<Value> = (0..50).map(|it| port(&format!("{it:a>63}"), "TCP", 1000 + it)).collect();
        let status = objects::load_balancer(&addresses(1, 27));
        let spec = json!({"type": "LoadBalancer", "loadBalancerSourceRanges": addresses(20, 28)});
        let long = format!("{:x>63}", slot.0);
        let service = with(slot.service(&ports, &spec), json!({"metadata": {"name": long}, "status": status}));
        let named =
            json!({"metadata": {"name": format!("{:x>253}", slot.0), "labels": {"kubernetes.io/service-name": long}}});
        vec![service, with(slot.own_slice(&ports), named)]
    }),
    ("affinity on or off", Weight::Light, |slot, rng| {
        let ports = ports(20, if rng.bool() { "TCP" } else { "UDP" });
        let seconds = [1, 10_800, 86_400][rng.usize(..3)];
        let timeout = json!({"clientIP": {"timeoutSeconds": seconds}});
        let spec = if rng.bool() {
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": timeout})
        } else {
            json!({"sessionAffinity": "None"})
        };
        vec![slot.service(&ports, &spec), slot.own_slice(&ports)]
    }),
    ("a NodePort for each of 50 ports", Weight::Light, |slot, rng| {
        let number = |it: u16| 30_100 + slot.0 % 30 * 50 + it;
        let with_node_port = |it| with(port(&format!("p{it}"), "TCP", 1 + it), json!({"nodePort": number(it)}));
        let ports: Vec<Value> = (0..50).map(with_node_port).collect();
        let policy = if rng.bool() { "Local" } else { "Cluster" };
        vec![
            slot.service(&ports, &json!({"type": "NodePort", "externalTrafficPolicy": policy})),
            slot.own_slice(&ports),
        ]
    }),
    ("a health-check port", Weight::Light, |slot, _| {
        let ports = ports(1, "TCP");
        let spec =
            json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32_000 + slot.0});
        let status = objects::load_balancer(&addresses(1, 29));
        vec![with(slot.service(&ports, &spec), json!({"status": status})), slot.own_slice(&ports)]
    }),
    ("addresses in odd forms", Weight::Light, |slot, rng| {
        let odd = ["::ffff:192.168.1.1", "192.168.001.001", "::ffff:10.97.0.1", "::ffff:c0a8:103", "192.168.1.003"];
        let ports = ports(2, "TCP");
        let wanted: Vec<&str> = odd.iter().copied().filter(|_| rng.bool()).collect();
        vec![with(slot.service(&ports, &json!({"externalIPs": wanted})), age(rng, true)), slot.own_slice(&ports)]
    }),
];

/// A kind of attack by objects.
pub(crate) enum Kind {
    Claim(Claim),
    Other(&'static str, Weight, Make),
}

impl Kind {
    /// All there are.
    pub(crate) fn all() -> Vec<Self> {
        let others = KINDS.map(|(name, weight, make)| Self::Other(name, weight, make));
        CLAIMS.map(Self::Claim).into_iter().chain(others).collect()
    }

    pub(crate) fn name(&self) -> String {
        match self {
            Self::Claim(claim) => format!("claim on {}", claim.kind),
            Self::Other(name, ..) => (*name).to_owned(),
        }
    }

    pub(crate) fn weight(&self) -> Weight {
        match self {
            Self::Claim(_) => Weight::Light,
            Self::Other(_, weight, _) => *weight,
        }
    }

    /// The objects of such an attack.
    pub(crate) fn objects(&self, slot: Slot, rng: &mut Rng) -> Vec<Value> {
        match self {
            Self::Claim(claim) => claiming(slot, rng, claim),
            Self::Other(_, _, make) => make(slot, rng),
        }
    }
}

/// A Service with all its fields at random, as of one that flips.
pub(crate) fn flipping(slot: Slot, rng: &mut Rng) -> Vec<Value> {
    let ports = ports(rng.u16(1..60), if rng.bool() { "TCP" } else { "UDP" });
    let policy = |rng: &mut Rng| if rng.bool() { "Local" } else { "Cluster" };
    let kind = ["ClusterIP", "LoadBalancer", "ExternalName"][rng.usize(..3)];
    let spec = json!({
        "sessionAffinity": if rng.bool() { "ClientIP" } else { "None" },
        "externalIPs": addresses(rng.usize(..20), 30),
        "internalTrafficPolicy": policy(rng),
        "externalTrafficPolicy": policy(rng),
        "type": kind,
        "loadBalancerSourceRanges": addresses(rng.usize(..20), 31),
    });
    let status = objects::load_balancer(&addresses(rng.usize(..5), 32));
    vec![with(slot.service(&ports, &spec), json!({"status": status})), slot.own_slice(&ports)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_object_is_in_the_attackers_namespace_and_takes_no_allocated_address() {
        let mut rng = Rng::with_seed(1);
        for kind in Kind::all() {
            for object in kind.objects(Slot(7), &mut rng) {
                assert_eq!(object["metadata"]["namespace"], NAMESPACE, "{}", kind.name());
                if object["kind"] == "Service" {
                    assert_eq!(object["spec"]["clusterIPs"], json!(["10.99.0.8"]), "{}", kind.name());
                }
            }
        }
    }

    #[test]
    fn the_same_seed_makes_the_same_objects() {
        let make = |seed| {
            let mut rng = Rng::with_seed(seed);
            Kind::all().iter().map(|kind| kind.objects(Slot(1), &mut rng)).collect::<Vec<_>>()
        };
        assert_eq!(make(5), make(5));
        assert_ne!(make(5), make(6));
    }
}
