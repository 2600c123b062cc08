//! The rules of each chain.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use ipvs_netlink::Family;
use netlink_packet_netfilter::nftables::{MetaKey, Register};
use service_watch::Protocol;

use super::{BaseChain, Chain, HAIRPIN, HEALTH_CHECK_PORTS, PodMatch, Rule, Ruleset, SOURCE_RANGES, VIPS};
use crate::filter::expression::{
    ConntrackKey, Expression, Field, ROUTE_LOCAL, STATE_NEW, STATUS_DESTINATION_TRANSLATED, Verdict, bitwise, compare,
    immediate, is_in, is_not_in, load, load_conntrack, load_meta, load_source_type, lookup_map, masquerade, octets,
    port_unreachable, protocol_number, register, reset, set_mark, translate_destination, verdict,
};
use crate::filter::set;

/// The port to which the node's own packets are redirected that must not reach a front end. No Service and no socket has it.
const NO_PORT: [u8; 2] = [0; 2];

const LOOPBACK_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8);
const LOOPBACK_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128);
/// The loopback device has this index in every network namespace.
const LOOPBACK_DEVICE: u32 = 1;
/// `IFNAMSIZ`: interface names are compared in full, padded with zeros.
const INTERFACE_NAME_BYTES: usize = 16;

// linux/netfilter.h
const PREROUTING: u32 = 0;
const INPUT: u32 = 1;
const FORWARD: u32 = 2;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;

/// Before the NAT of other programs at −100 and 100: a CNI's hostPort must not capture connections to a Service.
const BEFORE_DNAT: i32 = -110;
const BEFORE_SNAT: i32 = 90;
const FILTER: i32 = 0;

impl Ruleset {
    /// The chains with their rules.
    pub(crate) fn chains(&self) -> Vec<Chain> {
        let base = |name: &str, kind, hook, priority, rules| Chain {
            name: name.to_owned(),
            base: Some(BaseChain { kind, hook, priority }),
            rules,
        };
        let chain = |name: &str, rules| Chain { name: name.to_owned(), base: None, rules };
        vec![
            chain("nat-masquerade", vec![self.mark(), self.keep_destination()]),
            chain("nat-cluster-ip", self.cluster_ip()),
            chain("nat-keep", vec![self.keep_destination()]),
            chain("nat-closed", self.redirect_to_nowhere()),
            chain("nat-services", self.nat_services()),
            chain("refuse", self.refuse()),
            chain("insiders", self.pods_and_node_only()),
            base("nat-prerouting", "nat", PREROUTING, BEFORE_DNAT, self.nat_entry()),
            base("nat-output", "nat", OUTPUT, BEFORE_DNAT, self.nat_entry()),
            base("nat-postrouting", "nat", POSTROUTING, BEFORE_SNAT, self.nat_postrouting()),
            base("filter-input", "filter", INPUT, FILTER, self.filter_input()),
            base("filter-forward", "filter", FORWARD, FILTER, self.filter_forward()),
        ]
    }

    /// Loads destination, protocol and destination port into the first registers, as in the key of a front end.
    fn load_front_end(&self) -> Vec<Expression> {
        let words = self.address_words();
        vec![
            load(Field::destination(self.family), register(0)),
            load_meta(MetaKey::L4Proto, register(words)),
            load(Field::destination_port(), register(words + 1)),
        ]
    }

    /// A register that no key uses.
    fn scratch() -> Register {
        register(12)
    }

    /// Matches front ends in a set.
    fn is_front_end(&self, set: u32) -> Vec<Expression> {
        [self.load_front_end(), vec![is_in(set::name(set), register(0))]].concat()
    }

    fn is_from_the_node() -> Vec<Expression> {
        let scratch = Self::scratch();
        vec![load_source_type(scratch), compare(scratch, true, &ROUTE_LOCAL.to_ne_bytes())]
    }

    fn is_new() -> Vec<Expression> {
        let scratch = Self::scratch();
        vec![
            load_conntrack(ConntrackKey::State, scratch),
            bitwise(scratch, &STATE_NEW.to_ne_bytes(), &[0; 4]),
            compare(scratch, false, &[0; 4]),
        ]
    }

    fn is_protocol(protocol: Protocol) -> Vec<Expression> {
        vec![load_meta(MetaKey::L4Proto, Self::scratch()), compare(Self::scratch(), true, &[protocol_number(protocol)])]
    }

    fn is_source_in(&self, range: &IpNet) -> Vec<Expression> {
        Self::is_in_range(Field::source(self.family), range)
    }

    fn is_in_range(field: Field, range: &IpNet) -> Vec<Expression> {
        let (mask, network) = (octets(range.netmask()), octets(range.network()));
        let zeros = vec![0; mask.len()];
        vec![load(field, register(0)), bitwise(register(0), &mask, &zeros), compare(register(0), true, &network)]
    }

    /// Matches packets to addresses in the routed ranges that are not VIPs.
    fn to_non_vips(&self, comment: &str, statement: &[Expression]) -> impl Iterator<Item = Rule> {
        let destination = Field::destination(self.family);
        self.ranges.iter().map(move |range| {
            let is_no_vip = vec![load(destination, register(0)), is_not_in(VIPS, register(0))];
            Rule::new(comment, [Self::is_in_range(destination, range), is_no_vip, statement.to_vec()])
        })
    }

    /// Matches packets to the node's addresses in the routed ranges, which are not VIPs but stay reachable.
    fn to_node_addresses(&self, to_verdict: &Verdict) -> impl Iterator<Item = Rule> {
        let destination = Field::destination(self.family);
        self.node_addresses.iter().map(move |address| {
            let is_destination = vec![load(destination, register(0)), compare(register(0), true, &octets(*address))];
            Rule::new("the node's own", [is_destination, vec![verdict(to_verdict)]])
        })
    }

    /// Matches packets from pods; `None` if they cannot be matched.
    fn is_from_pod(&self) -> Option<Vec<Expression>> {
        let interface = |name: &[u8]| vec![load_meta(MetaKey::Iifname, register(0)), compare(register(0), true, name)];
        match &self.pods {
            PodMatch::Unknown => None,
            PodMatch::Range(range) => Some(self.is_source_in(range)),
            PodMatch::Interface(name) => {
                let mut padded = name.as_bytes().to_vec();
                padded.resize(INTERFACE_NAME_BYTES, 0);
                Some(interface(&padded))
            }
            PodMatch::InterfacePrefix(prefix) => Some(interface(prefix.as_bytes())),
        }
    }

    fn goto(chain: &str) -> Vec<Expression> {
        vec![verdict(&Verdict::Goto(chain.to_owned()))]
    }

    fn mark(&self) -> Rule {
        let scratch = Self::scratch();
        Rule::new(
            "to be masqueraded",
            [vec![
                load_meta(MetaKey::Mark, scratch),
                bitwise(scratch, &(!self.mark).to_ne_bytes(), &self.mark.to_ne_bytes()),
                set_mark(scratch),
            ]],
        )
    }

    /// Translates the destination to itself. Then no later NAT rule can translate it, such as that of a CNI's hostPort, which
    /// matches every local address and so every VIP.
    fn keep_destination(&self) -> Rule {
        Rule::new(
            "a Service's, not a hostPort's",
            [vec![
                load(Field::destination(self.family), register(0)),
                translate_destination(self.family, register(0), None),
            ]],
        )
    }

    /// Redirects the node's own packets that its source ranges exclude to where `filter-input` drops them. There is a rule for each
    /// protocol, since nft's language has no port without one.
    fn redirect_to_nowhere(&self) -> Vec<Rule> {
        let port = register(self.address_words());
        let redirect = || {
            vec![
                immediate(&self.loopback(), register(0)),
                immediate(&NO_PORT, port),
                translate_destination(self.family, register(0), Some(port)),
            ]
        };
        let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter();
        protocols.map(|protocol| Rule::new("to nowhere", [Self::is_protocol(protocol), redirect()])).collect()
    }

    fn loopback(&self) -> Vec<u8> {
        octets(match self.family {
            Family::Ipv4 => Ipv4Addr::LOCALHOST.into(),
            Family::Ipv6 => Ipv6Addr::LOCALHOST.into(),
        })
    }

    fn cluster_ip(&self) -> Vec<Rule> {
        let from_elsewhere = Rule::new("from elsewhere", [Self::goto("nat-masquerade")]);
        if self.masquerades_all {
            return vec![from_elsewhere];
        }
        let from_the_node = |it| Rule::new("from the node", [it, Self::goto("nat-masquerade")]);
        // The node's source address may be one that it uses towards pods, which may lie in the range of the pods.
        let mut rules: Vec<Rule> =
            (!self.has_vip_sources).then(|| from_the_node(Self::is_from_the_node())).into_iter().collect();
        if let Some(is_from_pod) = self.is_from_pod() {
            rules.extend([Rule::new("from a pod", [is_from_pod, self.keep_destination().expressions]), from_elsewhere]);
            return rules;
        }
        // If pods cannot be matched, only the node's own connections with a VIP as source are masqueraded.
        if self.has_vip_sources {
            rules.push(from_the_node(vec![load(Field::source(self.family), register(0)), is_in(VIPS, register(0))]));
        }
        rules.push(self.keep_destination());
        rules
    }

    fn nat_entry(&self) -> Vec<Rule> {
        let loopback = match self.family {
            Family::Ipv4 => IpNet::V4(LOOPBACK_V4),
            Family::Ipv6 => IpNet::V6(LOOPBACK_V6),
        };
        vec![
            Rule::new("from loopback", [self.is_source_in(&loopback), vec![verdict(&Verdict::Return)]]),
            Rule::new("to a front end", [vec![verdict(&Verdict::Jump("nat-services".to_owned()))]]),
        ]
    }

    fn nat_services(&self) -> Vec<Rule> {
        let words = self.address_words();
        let redirect = vec![
            immediate(&NO_PORT, register(words)),
            translate_destination(self.family, register(0), Some(register(words))),
        ];
        let to = |comment, set, chain| Rule::new(comment, [self.is_front_end(set), Self::goto(chain)]);
        let from_the_node = |comment, set, chain| {
            Rule::new(comment, [self.is_front_end(set), Self::is_from_the_node(), Self::goto(chain)])
        };
        let mut rules = vec![
            from_the_node("closed to the node", set::CLOSED_TO_NODE, "nat-closed"),
            to("ClusterIP", set::MASQUERADE_OUTSIDERS, "nat-cluster-ip"),
            to("policy Cluster", set::MASQUERADE_EVERYBODY, "nat-masquerade"),
            to("policy Local", set::MASQUERADE_NOBODY, "nat-keep"),
            from_the_node("no local endpoint", set::MASQUERADE_NODE, "nat-masquerade"),
            to("no local endpoint", set::MASQUERADE_NODE, "nat-keep"),
            Rule::new(
                "no endpoint",
                [
                    Self::is_protocol(Protocol::Udp),
                    self.is_front_end(set::UDP_REFUSED_TO_NODE),
                    Self::is_from_the_node(),
                    redirect,
                ],
            ),
            to("no endpoint", set::UDP_REFUSED_TO_NODE, "nat-keep"),
        ];
        // A hostPort matches every local address, and so every address of a routed range.
        rules.extend(self.to_node_addresses(&Verdict::Return));
        rules.extend(self.to_non_vips("to no VIP", &self.keep_destination().expressions));
        rules
    }

    fn nat_postrouting(&self) -> Vec<Rule> {
        let words = self.address_words();
        let scratch = Self::scratch();
        vec![
            Rule::new(
                "from a pod to itself",
                [vec![
                    load(Field::source(self.family), register(0)),
                    load(Field::destination(self.family), register(words)),
                    load_meta(MetaKey::L4Proto, register(words * 2)),
                    load(Field::destination_port(), register(words * 2 + 1)),
                    is_in(HAIRPIN, register(0)),
                    masquerade(false),
                ]],
            ),
            Rule::new(
                "marked",
                [vec![
                    load_meta(MetaKey::Mark, scratch),
                    bitwise(scratch, &self.mark.to_ne_bytes(), &[0; 4]),
                    compare(scratch, true, &self.mark.to_ne_bytes()),
                    load_meta(MetaKey::Mark, scratch),
                    bitwise(scratch, &(!self.mark).to_ne_bytes(), &[0; 4]),
                    set_mark(scratch),
                    masquerade(true),
                ]],
            ),
        ]
    }

    fn filter_input(&self) -> Vec<Rule> {
        let words = self.address_words();
        let scratch = Self::scratch;
        let is_from_loopback =
            || vec![load_meta(MetaKey::Iif, scratch()), compare(scratch(), true, &LOOPBACK_DEVICE.to_ne_bytes())];
        let is_to_nowhere = || {
            vec![
                load(Field::destination_port(), scratch()),
                compare(scratch(), true, &NO_PORT),
                load_conntrack(ConntrackKey::Status, scratch()),
                bitwise(scratch(), &STATUS_DESTINATION_TRANSLATED.to_ne_bytes(), &[0; 4]),
                compare(scratch(), false, &[0; 4]),
            ]
        };
        let is_to_loopback =
            vec![load(Field::destination(self.family), register(0)), compare(register(0), true, &self.loopback())];
        // First, since a VIP of a routed range is local before and after it is served. Its front ends are served while it is in the
        // set.
        let mut rules: Vec<Rule> = self.to_node_addresses(&Verdict::Accept).collect();
        rules.extend(self.to_non_vips("to no VIP", &Self::goto("refuse")));
        rules.extend([
            Rule::new(
                "source ranges",
                [self.load_front_end(), vec![lookup_map(SOURCE_RANGES, register(0), Register::Verdict)]],
            ),
            Rule::new("to an open front end", [self.is_front_end(set::OPEN), vec![verdict(&Verdict::Accept)]]),
            Rule::new("no local endpoint", [self.is_front_end(set::OPEN_TO_INSIDERS), Self::goto("insiders")]),
            Rule::new("no endpoint", [self.is_front_end(set::REFUSED), Self::goto("refuse")]),
            Rule::new(
                "health checks",
                [
                    Self::is_protocol(Protocol::Tcp),
                    vec![
                        load(Field::destination_port(), register(words)),
                        is_in(HEALTH_CHECK_PORTS, register(words)),
                        verdict(&Verdict::Accept),
                    ],
                ],
            ),
            Rule::new(
                "from the node, closed to it",
                [is_from_loopback(), is_to_loopback, is_to_nowhere(), vec![verdict(&Verdict::Drop)]],
            ),
            Rule::new(
                "from the node, no endpoint",
                [is_from_loopback(), Self::is_protocol(Protocol::Udp), is_to_nowhere(), Self::goto("refuse")],
            ),
            Rule::new(
                "to a VIP, but to no front end",
                [
                    vec![load(Field::destination(self.family), register(0)), is_in(VIPS, register(0))],
                    Self::goto("refuse"),
                ],
            ),
        ]);
        rules
    }

    fn pods_and_node_only(&self) -> Vec<Rule> {
        let accept = || vec![verdict(&Verdict::Accept)];
        let mut rules = vec![Rule::new("from the node", [Self::is_from_the_node(), accept()])];
        match self.is_from_pod() {
            Some(is_from_pod) => {
                rules.push(Rule::new("from a pod", [is_from_pod, accept()]));
                rules.push(Rule::new("from elsewhere", [Self::goto("refuse")]));
            }
            None => rules.push(Rule::new("pods cannot be told from others", [accept()])),
        }
        rules
    }

    /// Refuses new connections only: connections to an endpoint that drains continue. TCP is reset, since the kernel limits the rate of
    /// ICMP errors to one peer (`icmp_ratelimit`), and a client without an answer waits.
    fn refuse(&self) -> Vec<Rule> {
        vec![
            Rule::new("TCP", [Self::is_new(), Self::is_protocol(Protocol::Tcp), vec![reset()]]),
            Rule::new("others", [Self::is_new(), vec![port_unreachable(self.family)]]),
        ]
    }

    /// Drops packets to VIPs that are not bound yet. They would leave by the default route, and connection tracking would record
    /// connections that IPVS does not translate.
    fn filter_forward(&self) -> Vec<Rule> {
        let is_to_vip = vec![load(Field::destination(self.family), register(0)), is_in(VIPS, register(0))];
        let drop = || vec![verdict(&Verdict::Drop)];
        let mut rules = vec![Rule::new("to a VIP that is not bound yet", [is_to_vip, drop()])];
        let destination = Field::destination(self.family);
        rules.extend(self.ranges.iter().map(|range| {
            Rule::new("to a range that has no route yet", [Self::is_in_range(destination, range), drop()])
        }));
        rules
    }
}
