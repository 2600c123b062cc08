//! What other programs have set up on this host that keeps Services from working, and that is not the agent's to change:
//! it is told, once each, in the log, as an Event on the Node, as a metric and in the body of `/healthz`.
//!
//! What is read is facts; [`problems`] is a pure function of them and of what the Services need.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::num::NonZeroU16;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use reconciler::linux::host::{DroppingChain, ForeignHook, HostReader};
use reconciler::policy::Families;
use service_watch::{Change, ObjectName, Service};
use tracing::{info, warn};

use crate::events::{self, EventPublisher};
use crate::health::Health;
use crate::{metrics, preflight};

/// How often the host is looked at. (`nf_tables` would tell of changes, but for as long as anybody listens the kernel builds
/// a notification of each of our own changes too, and sysctls tell nobody.)
const PERIOD: Duration = Duration::from_secs(3);
/// Reading takes at most this part of the time, on hosts with very many chains.
const LARGEST_SHARE: u32 = 100;
/// The default range of NodePorts, for the text of remedies.
const NODE_PORTS: &str = "30000-32767";

/// What the Services need of the host.
#[derive(Debug, Default)]
pub(crate) struct ServiceNeeds {
    with_external_ips: HashSet<ObjectName>,
    with_ipv6: HashSet<ObjectName>,
    node_ports: HashMap<ObjectName, Vec<NonZeroU16>>,
}

impl ServiceNeeds {
    /// Takes in a change of a Service.
    pub(crate) fn apply(&mut self, change: &Change) {
        match change {
            Change::Service(service) => {
                let Service { name, external_ips, cluster_ips, ports, .. } = service;
                set_membership(&mut self.with_external_ips, name, !external_ips.is_empty());
                set_membership(&mut self.with_ipv6, name, cluster_ips.iter().any(std::net::IpAddr::is_ipv6));
                let node_ports: Vec<NonZeroU16> = ports.iter().filter_map(|port| port.node_port).collect();
                if node_ports.is_empty() {
                    self.node_ports.remove(name);
                } else {
                    self.node_ports.insert(name.clone(), node_ports);
                }
            }
            Change::ServiceDeleted(name) => {
                self.with_external_ips.remove(name);
                self.with_ipv6.remove(name);
                self.node_ports.remove(name);
            }
            _ => {}
        }
    }

    /// How many Services have external IPs.
    pub(crate) fn with_external_ips(&self) -> usize {
        self.with_external_ips.len()
    }
}

fn set_membership(names: &mut HashSet<ObjectName>, name: &ObjectName, is_member: bool) {
    if is_member {
        names.insert(name.clone());
    } else {
        names.remove(name);
    }
}

/// What is read of the host. What cannot be read counts as being in order.
#[derive(Clone, Debug, Default)]
struct Facts {
    dropping_chains: Vec<DroppingChain>,
    /// Bridges whose packets do not pass the packet filter.
    bypassing_bridges: Vec<String>,
    has_ipv6: bool,
    is_ipv6_forwarding_off: bool,
    /// The ports that the kernel gives to connections of programs on this node.
    local_ports: Option<RangeInclusive<u16>>,
    /// Those of them that it leaves out.
    reserved_ports: Vec<RangeInclusive<u16>>,
}

/// A kind of problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ProblemKind {
    InputDrop,
    ForwardDrop,
    Ipv6ForwardingOff,
    Ipv6SwitchedOff,
    BridgeBypass,
    NodePortsNotReserved,
}

impl ProblemKind {
    pub(crate) const ALL: [Self; 6] = [
        Self::InputDrop,
        Self::ForwardDrop,
        Self::Ipv6ForwardingOff,
        Self::Ipv6SwitchedOff,
        Self::BridgeBypass,
        Self::NodePortsNotReserved,
    ];

    /// The reason of the Event and the label of the metric.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::InputDrop => "DroppedAtInput",
            Self::ForwardDrop => "DroppedAtForward",
            Self::Ipv6ForwardingOff => "IPv6ForwardingOff",
            Self::Ipv6SwitchedOff => "IPv6SwitchedOff",
            Self::BridgeBypass => "BridgeBypassesFilter",
            Self::NodePortsNotReserved => "NodePortsNotReserved",
        }
    }
}

/// A problem, with what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Problem(String);

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What keeps Services from working. `families` are those that the agent serves.
fn problems(facts: &Facts, needs: &ServiceNeeds, families: Families) -> BTreeMap<ProblemKind, Problem> {
    let mut found = BTreeMap::new();
    for (hook, kind) in [(ForeignHook::Input, ProblemKind::InputDrop), (ForeignHook::Forward, ProblemKind::ForwardDrop)]
    {
        let chains: Vec<&DroppingChain> = facts.dropping_chains.iter().filter(|chain| chain.hook == hook).collect();
        if !chains.is_empty() {
            found.insert(kind, Problem(dropped(hook, &chains)));
        }
    }
    if families.ipv6 && !needs.with_ipv6.is_empty() {
        if !facts.has_ipv6 {
            let text = "IPv6 was switched off on this node while the agent runs: IPv6 Services are not served until it is on again \
                        (`sysctl net.ipv6.conf.all.disable_ipv6=0`); if it is to stay off, restart the agent";
            found.insert(ProblemKind::Ipv6SwitchedOff, Problem(text.to_owned()));
        } else if facts.is_ipv6_forwarding_off {
            let text = "IPv6 forwarding is off and there are IPv6 Services: their connections to pods stall; set \
                        `sysctl net.ipv6.conf.all.forwarding=1`, and `net.ipv6.conf.INTERFACE.accept_ra=2` first where the node's \
                        routes come from router advertisements, which the kernel ignores otherwise";
            found.insert(ProblemKind::Ipv6ForwardingOff, Problem(text.to_owned()));
        }
    }
    if let Some(bridge) = facts.bypassing_bridges.first() {
        let text = format!(
            "packets within the bridge {bridge} do not pass the packet filter: if pods are on it, their connections to Services with an \
             endpoint on the same bridge stall; `modprobe br_netfilter` and `sysctl net.bridge.bridge-nf-call-iptables=1 \
             net.bridge.bridge-nf-call-ip6tables=1` change that"
        );
        found.insert(ProblemKind::BridgeBypass, Problem(text));
    }
    if let Some(port) = unreserved_node_port(facts, needs) {
        let text = format!(
            "the NodePort {port} is among the ports that the kernel gives to connections of this node, which then fail: add the range of \
             NodePorts to net.ipv4.ip_local_reserved_ports, such as `sysctl net.ipv4.ip_local_reserved_ports={NODE_PORTS}`"
        );
        found.insert(ProblemKind::NodePortsNotReserved, Problem(text));
    }
    found
}

fn dropped(hook: ForeignHook, chains: &[&DroppingChain]) -> String {
    let names: Vec<String> =
        chains.iter().map(|chain| format!("{} {} {}", chain.family, chain.table, chain.chain)).collect();
    let names = names.join(", ");
    let rules: BTreeSet<String> = chains.iter().flat_map(|chain| rules(hook, chain)).collect();
    let rules = rules.into_iter().collect::<Vec<_>>().join(" and ");
    match hook {
        ForeignHook::Forward => format!(
            "a chain of another program drops forwarded packets that it does not accept itself ({names}); unless that program accepts \
             answers, connections to Services stall: {rules} accepts them"
        ),
        ForeignHook::Input => format!(
            "a chain of another program drops packets to this node that it does not accept itself ({names}); IPVS gets only what it \
             accepts, so it must accept VIPs, NodePorts and health-check node ports: {rules} accepts these, with the cluster's range of \
             ClusterIPs for SERVICE_CIDR; external and load-balancer IPs need such a rule too"
        ),
    }
}

/// The commands that make a chain accept what Services need.
fn rules(hook: ForeignHook, chain: &DroppingChain) -> Vec<String> {
    let DroppingChain { family, table, chain, .. } = chain;
    // The chains of iptables-nft have these names, and nft should not change them.
    let iptables = match *family {
        "ip" => Some("iptables"),
        "ip6" => Some("ip6tables"),
        _ => None,
    };
    let iptables = iptables.filter(|_| table == "filter" && matches!(chain.as_str(), "INPUT" | "FORWARD"));
    let ports = NODE_PORTS.replace('-', ":");
    match (hook, iptables) {
        (ForeignHook::Forward, Some(iptables)) => {
            vec![format!("`{iptables} -I FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT`")]
        }
        (ForeignHook::Forward, None) => {
            vec![format!("`nft insert rule {family} {table} {chain} ct state established,related accept`")]
        }
        (ForeignHook::Input, Some(iptables)) => vec![
            format!("`{iptables} -I INPUT -d SERVICE_CIDR -j ACCEPT`"),
            format!("`{iptables} -I INPUT -p tcp --dport {ports} -j ACCEPT`"),
            format!("`{iptables} -I INPUT -p udp --dport {ports} -j ACCEPT`"),
        ],
        (ForeignHook::Input, None) => {
            let word = if *family == "ip6" { "ip6" } else { "ip" };
            vec![
                format!("`nft insert rule {family} {table} {chain} {word} daddr SERVICE_CIDR accept`"),
                format!(
                    "`nft insert rule {family} {table} {chain} meta l4proto {{ tcp, udp }} th dport {NODE_PORTS} accept`"
                ),
            ]
        }
    }
}

/// The smallest NodePort that the kernel may give to another connection.
fn unreserved_node_port(facts: &Facts, needs: &ServiceNeeds) -> Option<u16> {
    let local = facts.local_ports.as_ref()?;
    let ports = needs.node_ports.values().flatten().map(|port| port.get());
    let is_unreserved =
        |port: &u16| local.contains(port) && !facts.reserved_ports.iter().any(|range| range.contains(port));
    ports.filter(is_unreserved).min()
}

/// Parses `ip_local_port_range`.
fn local_ports(text: &str) -> Option<RangeInclusive<u16>> {
    let mut numbers = text.split_whitespace().map(str::parse);
    Some(numbers.next()?.ok()?..=numbers.next()?.ok()?)
}

/// Parses `ip_local_reserved_ports`, such as `8080,30000-32767`.
fn reserved_ports(text: &str) -> Vec<RangeInclusive<u16>> {
    let ranges = text.trim().split(',').map(|item| {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    });
    ranges.flatten().collect()
}

/// Looks at the host again and again.
pub(crate) struct HostMonitor {
    reader: Option<HostReader>,
    needs: Arc<Mutex<ServiceNeeds>>,
    families: Families,
    health: Arc<Health>,
    events: EventPublisher,
    /// The problems that were told in the log.
    known: BTreeMap<ProblemKind, Problem>,
    /// Those of which there was an Event, too: the first come before there is an API server.
    published: BTreeMap<ProblemKind, Problem>,
}

impl HostMonitor {
    /// A monitor of the network namespace of the calling thread.
    pub(crate) fn new(
        families: Families,
        needs: Arc<Mutex<ServiceNeeds>>,
        health: Arc<Health>,
        events: EventPublisher,
    ) -> Self {
        let reader = HostReader::open();
        let reader = reader.inspect_err(|error| warn!("cannot look at the chains of other programs: {error}")).ok();
        Self { reader, needs, families, health, events, known: BTreeMap::new(), published: BTreeMap::new() }
    }

    /// Looks at the host again and again, and never ends.
    pub(crate) fn run(mut self) -> ! {
        loop {
            let start = Instant::now();
            self.check();
            std::thread::sleep(PERIOD.max(start.elapsed() * LARGEST_SHARE));
        }
    }

    /// Looks at the host once, and tells what is new.
    pub(crate) fn check(&mut self) {
        let facts = self.facts();
        self.health.set_ipv6_off(self.families.ipv6 && !facts.has_ipv6);
        let found = {
            let needs = self.needs.lock().unwrap_or_else(PoisonError::into_inner);
            problems(&facts, &needs, self.families)
        };
        for (kind, problem) in &found {
            if self.known.get(kind) != Some(problem) {
                warn!("{problem}");
            }
            if self.events.is_connected() && self.published.get(kind) != Some(problem) {
                self.events.publish(events::host_problem(kind.name(), problem.to_string()));
                self.published.insert(*kind, problem.clone());
            }
        }
        self.published.retain(|kind, _| found.contains_key(kind));
        for kind in self.known.keys().filter(|kind| !found.contains_key(kind)) {
            info!("this host no longer has the problem {}", kind.name());
        }
        if found != self.known {
            self.health.set_warnings(found.values().map(ToString::to_string).collect());
        }
        metrics::set_host_problems(|kind| found.contains_key(&kind));
        self.known = found;
    }

    fn facts(&mut self) -> Facts {
        let sysctl = |path: &str| std::fs::read_to_string(format!("/proc/sys/net/{path}")).ok();
        let is_on = |path: &str| sysctl(path).is_some_and(|value| value.trim() != "0");
        let chains = self.reader.as_mut().and_then(|reader| reader.dropping_chains().ok());
        let has_bridge_filter = is_on("bridge/bridge-nf-call-iptables");
        let bridges = self.reader.as_mut().filter(|_| !has_bridge_filter).and_then(|reader| reader.bridges().ok());
        Facts {
            dropping_chains: chains.unwrap_or_default(),
            bypassing_bridges: bridges.unwrap_or_default(),
            has_ipv6: preflight::has_ipv6(),
            is_ipv6_forwarding_off: sysctl("ipv6/conf/all/forwarding").is_some_and(|value| value.trim() == "0"),
            local_ports: sysctl("ipv4/ip_local_port_range").and_then(|text| local_ports(&text)),
            reserved_ports: sysctl("ipv4/ip_local_reserved_ports")
                .map(|text| reserved_ports(&text))
                .unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(hook: ForeignHook, family: &'static str, table: &str, chain: &str) -> DroppingChain {
        DroppingChain { hook, family, table: table.to_owned(), chain: chain.to_owned() }
    }

    fn needs(ipv6: bool, node_ports: &[u16]) -> ServiceNeeds {
        let name = ObjectName::new("default", "web");
        let mut needs = ServiceNeeds::default();
        set_membership(&mut needs.with_ipv6, &name, ipv6);
        let ports = node_ports.iter().filter_map(|port| NonZeroU16::new(*port)).collect();
        needs.node_ports.insert(name, ports);
        needs
    }

    fn good() -> Facts {
        Facts { has_ipv6: true, local_ports: Some(32768..=60999), ..Facts::default() }
    }

    #[test]
    fn each_problem_is_found_where_services_have_it() {
        use ForeignHook::{Forward, Input};
        use ProblemKind as Kind;
        let chains = |chains: &[DroppingChain]| Facts { dropping_chains: chains.to_vec(), ..good() };
        let forwarding_off = Facts { is_ipv6_forwarding_off: true, ..good() };
        let ipv6_off = Facts { has_ipv6: false, is_ipv6_forwarding_off: true, ..good() };
        let reserved = Facts { reserved_ports: reserved_ports("8080,30000-34000\n"), ..good() };
        let none: &[(Kind, &str)] = &[];
        for (facts, needs, expected) in [
            (good(), needs(true, &[30080]), none),
            (
                chains(&[chain(Input, "ip", "filter", "INPUT")]),
                needs(false, &[]),
                &[(Kind::InputDrop, "`iptables -I INPUT -p tcp --dport 30000:32767 -j ACCEPT`")],
            ),
            (
                chains(&[chain(Input, "inet", "filter", "in")]),
                needs(false, &[]),
                &[(
                    Kind::InputDrop,
                    "`nft insert rule inet filter in meta l4proto { tcp, udp } th dport 30000-32767 accept`",
                )],
            ),
            (
                chains(&[chain(Forward, "ip6", "filter", "FORWARD"), chain(Input, "ip6", "fw", "i")]),
                needs(false, &[]),
                &[(Kind::InputDrop, "ip6 daddr SERVICE_CIDR"), (Kind::ForwardDrop, "`ip6tables -I FORWARD")],
            ),
            (
                chains(&[chain(Forward, "inet", "f", "c")]),
                needs(false, &[]),
                &[(Kind::ForwardDrop, "`nft insert rule inet f c ct state established,related accept`")],
            ),
            (forwarding_off.clone(), needs(false, &[]), none),
            (forwarding_off, needs(true, &[]), &[(Kind::Ipv6ForwardingOff, "conf.all.forwarding=1")]),
            (ipv6_off.clone(), needs(false, &[]), none),
            (ipv6_off, needs(true, &[]), &[(Kind::Ipv6SwitchedOff, "disable_ipv6=0")]),
            (good(), needs(false, &[30080, 40000, 33000]), &[(Kind::NodePortsNotReserved, "NodePort 33000")]),
            (reserved.clone(), needs(false, &[33000]), none),
            (reserved, needs(false, &[34001]), &[(Kind::NodePortsNotReserved, "NodePort 34001")]),
            (
                Facts { bypassing_bridges: vec!["cni0".to_owned()], ..good() },
                needs(false, &[]),
                &[(Kind::BridgeBypass, "modprobe br_netfilter")],
            ),
        ] {
            let found = problems(&facts, &needs, Families::BOTH);
            assert!(found.keys().eq(expected.iter().map(|(kind, _)| kind)), "{facts:?}: {found:?}");
            for (kind, text) in expected {
                assert!(found[kind].0.contains(text), "{facts:?}: {}", found[kind]);
            }
        }
    }

    #[test]
    fn port_ranges_are_read_as_the_kernel_writes_them() {
        assert_eq!(local_ports("32768\t60999\n"), Some(32768..=60999));
        assert_eq!(local_ports(""), None);
        assert_eq!(reserved_ports("\n"), vec![]);
        assert_eq!(reserved_ports("1,3-5\n"), vec![1..=1, 3..=5]);
    }
}
