//! The packet filter on a real kernel: what is written is what is read, and a transaction is all or nothing.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use ipnet::IpNet;
use ipvs_netlink::Family;
use lab::netns::{Namespace, isolate};
use netlink_batch::Socket;
use netlink_batch::protocols::NETLINK_NETFILTER;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use reconciler::Policy;
use reconciler::filter::ruleset::Ruleset;
use reconciler::filter::{
    Access, FrontEndElements, FrontEndRule, Masquerade, ObservedFilter, SetElement, SourceRanges, TableContents,
};
use reconciler::front_end::FrontEnd;
use reconciler::linux::filter::message::Transaction;
use reconciler::linux::filter::read;
use reconciler::node::NodeView;
use reconciler::policy::{DetectLocal, Families};
use service_watch::{ObjectName, Protocol};

fn commit(socket: &mut Socket, transaction: Transaction) -> Result<(), usize> {
    let (begin, end) = Transaction::begin_and_end();
    let result = socket.transaction(&begin, transaction.into_requests(), &end).unwrap();
    result.map_err(|(index, _)| index)
}

fn observe(socket: &mut Socket) -> ObservedFilter {
    read::read(socket, Families::BOTH, false).unwrap()
}

fn ruleset(family: Family, detect_local: DetectLocal) -> Ruleset {
    Ruleset::new(family, &Policy { detect_local, ..Policy::new("n") }, &NodeView::default())
}

fn shell(command: &str) {
    assert!(Command::new("sh").args(["-c", command]).status().unwrap().success(), "{command}");
}

fn address(family: Family, number: u16) -> IpAddr {
    match family {
        Family::Ipv4 => IpAddr::from([10, 96, u8::try_from(number >> 8).unwrap(), u8::try_from(number & 255).unwrap()]),
        Family::Ipv6 => IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, number]),
    }
}

fn name(number: u8) -> ObjectName {
    ObjectName::new("some-namespace", &format!("service-{number}"))
}

/// Contents of any kind; rules name only source ranges that are there.
fn contents(family: Family) -> impl Strategy<Value = TableContents> {
    let masquerade = prop_oneof![
        Just(Masquerade::Nobody),
        Just(Masquerade::Outsiders),
        Just(Masquerade::Everybody),
        Just(Masquerade::Node),
        Just(Masquerade::NodeIsRefused)
    ];
    let access = prop_oneof![Just(Access::Open), Just(Access::Insiders), Just(Access::Refused)];
    let protocol = prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Sctp)];
    let front_end = (0_u16..2000, any::<u16>(), protocol.clone()).prop_map(move |(number, port, protocol)| FrontEnd {
        address: address(family, number),
        port,
        protocol,
    });
    let range = (any::<u16>(), 1_u8..=32).prop_map(move |(number, length)| match family {
        Family::Ipv4 => IpNet::new(IpAddr::from([u8::try_from(number >> 8).unwrap(), 1, 2, 3]), length).unwrap(),
        Family::Ipv6 => IpNet::new(IpAddr::from([number, 0, 1, 0, 2, 0, 0, 3]), length * 4).unwrap(),
    });
    let ranges = proptest::collection::vec(range, 0..40)
        .prop_filter_map("everybody", move |ranges| SourceRanges::of_family(&ranges, family));
    let sources = proptest::collection::btree_map((0_u8..4).prop_map(name), ranges, 0..4);
    let element = prop_oneof![
        (0_u16..2000).prop_map(move |number| SetElement::Vip(address(family, number))),
        (0_u16..2000, any::<u16>(), protocol.clone()).prop_map(move |(number, port, protocol)| SetElement::Hairpin(
            (address(family, number), port).into(),
            protocol
        )),
        any::<u16>().prop_map(move |port| SetElement::HealthCheckPort(family, port)),
    ];
    let rule = (masquerade, access, any::<bool>(), proptest::option::of(any::<prop::sample::Index>()));
    let front_ends = proptest::collection::btree_map(front_end, rule, 0..60);
    (front_ends, proptest::collection::btree_set(element, 0..60), sources).prop_map(
        |(front_ends, elements, sources)| {
            let names: Vec<ObjectName> = sources.keys().cloned().collect();
            let front_ends =
                front_ends.into_iter().map(|(front_end, (masquerade, access, is_closed_to_node, index))| {
                    let source_ranges = index.filter(|_| !names.is_empty()).map(|index| index.get(&names).clone());
                    (front_end, FrontEndRule { masquerade, access, is_closed_to_node, source_ranges })
                });
            TableContents { front_ends: front_ends.collect(), elements, source_ranges: sources }
        },
    )
}

/// What should be read of contents that were written.
fn expected(rulesets: &[&Ruleset], contents: &[&TableContents]) -> ObservedFilter {
    let mut observed = ObservedFilter::default();
    for (ruleset, contents) in rulesets.iter().zip(contents) {
        let family = ruleset.family();
        observed.rulesets.insert(family, ruleset.fingerprint());
        observed.front_ends.extend(contents.front_ends.iter().map(|(front_end, rule)| (*front_end, rule.into())));
        observed.elements.extend(&contents.elements);
        let sources = contents.source_ranges.iter();
        observed.source_ranges.extend(sources.map(|(name, ranges)| ((name.clone(), family), ranges.fingerprint())));
    }
    observed
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn tables_read_back_as_written_and_after_incremental_changes() {
    isolate().unwrap();
    let socket = RefCell::new(Socket::open(NETLINK_NETFILTER).unwrap());
    let detect = DetectLocal::ClusterCidr(vec!["10.244.0.0/16".parse().unwrap(), "fd00:10::/56".parse().unwrap()]);
    let (v4, v6) = (ruleset(Family::Ipv4, detect), ruleset(Family::Ipv6, DetectLocal::BridgeInterface("br0".into())));
    let exists = Cell::new(false);
    let strategy = (contents(Family::Ipv4), contents(Family::Ipv6), contents(Family::Ipv4));
    // The guest's kernel takes minutes to gather entropy.
    let random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    TestRunner::new_with_rng(Config { cases: 60, ..Config::default() }, random)
        .run(&strategy, |(first, other, second)| {
            let socket = &mut *socket.borrow_mut();
            let mut transaction = Transaction::default();
            transaction.build(&v4, exists.get(), &first);
            transaction.build(&v6, exists.get(), &other);
            prop_assert_eq!(commit(socket, transaction), Ok(()));
            exists.set(true);
            prop_assert_eq!(observe(socket), expected(&[&v4, &v6], &[&first, &other]));
            // All at once: what goes, what comes, and what changes.
            let mut transaction = Transaction::default();
            let keys: BTreeSet<&FrontEnd> = first.front_ends.keys().chain(second.front_ends.keys()).collect();
            for key in keys {
                let of = |contents: &TableContents| {
                    contents.front_ends.get(key).map(FrontEndElements::from).unwrap_or_default()
                };
                transaction.set_front_end(*key, &of(&first), &of(&second));
            }
            first.elements.difference(&second.elements).for_each(|element| transaction.remove_element(*element));
            second.elements.difference(&first.elements).for_each(|element| transaction.add_element(*element));
            for (name, ranges) in &second.source_ranges {
                transaction.set_source_ranges(name, Family::Ipv4, ranges);
            }
            for name in first.source_ranges.keys().filter(|name| !second.source_ranges.contains_key(*name)) {
                transaction.remove_source_ranges(name, Family::Ipv4);
            }
            prop_assert_eq!(commit(socket, transaction), Ok(()));
            prop_assert_eq!(observe(socket), expected(&[&v4, &v6], &[&second, &other]));
            Ok(())
        })
        .unwrap();
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn thousands_of_elements_and_ranges_fit_in_one_transaction() {
    isolate().unwrap();
    let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
    let rulesets: Vec<Ruleset> =
        Families::BOTH.iter().map(|family| ruleset(family, DetectLocal::ClusterCidr(vec![]))).collect();
    let mut transaction = Transaction::default();
    let mut all = Vec::new();
    for ruleset in &rulesets {
        let family = ruleset.family();
        let ranges: Vec<IpNet> = (0..5000_u16).map(|number| IpNet::from(address(family, number * 2))).collect();
        let rule = FrontEndRule {
            masquerade: Masquerade::Everybody,
            access: Access::Open,
            is_closed_to_node: true,
            source_ranges: Some(name(1)),
        };
        let front_ends = (1..=10_000)
            .map(|port| (FrontEnd { address: address(family, 1), port, protocol: Protocol::Tcp }, rule.clone()));
        let contents = TableContents {
            front_ends: front_ends.collect(),
            elements: (0..5000).map(|number| SetElement::Vip(address(family, number))).collect(),
            source_ranges: [(name(1), SourceRanges::of_family(&ranges, family).unwrap())].into(),
        };
        transaction.build(ruleset, false, &contents);
        all.push(contents);
    }
    assert_eq!(commit(&mut socket, transaction), Ok(()));
    assert_eq!(observe(&mut socket), expected(&rulesets.iter().collect::<Vec<_>>(), &all.iter().collect::<Vec<_>>()));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_refused_transaction_has_no_effect_and_names_the_message() {
    isolate().unwrap();
    let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
    let v4 = ruleset(Family::Ipv4, DetectLocal::NodeCidr);
    let mut transaction = Transaction::default();
    transaction.build(&v4, false, &TableContents::default());
    assert_eq!(commit(&mut socket, transaction), Ok(()));
    let mut transaction = Transaction::default();
    transaction.add_element(SetElement::Vip(address(Family::Ipv4, 2)));
    transaction.remove_source_ranges(&name(1), Family::Ipv4);
    transaction.remove_source_ranges(&name(2), Family::Ipv4);
    assert_eq!(commit(&mut socket, transaction), Err(1), "there is no such chain");
    assert!(observe(&mut socket).elements.is_empty(), "nothing took effect");
    // The socket is as good as before.
    let mut transaction = Transaction::default();
    transaction.add_element(SetElement::Vip(address(Family::Ipv4, 2)));
    assert_eq!(commit(&mut socket, transaction), Ok(()));
    assert_eq!(observe(&mut socket).elements.len(), 1);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn more_refusals_than_the_socket_buffer_holds_do_not_hang() {
    isolate().unwrap();
    let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
    let ranges = SourceRanges::of_family(&["10.0.0.0/8".parse().unwrap()], Family::Ipv4).unwrap();
    let mut transaction = Transaction::default();
    for number in 0..200 {
        transaction.set_source_ranges(&name(number), Family::Ipv4, &ranges);
    }
    assert!(commit(&mut socket, transaction).is_err(), "there is no table");
    let mut transaction = Transaction::default();
    transaction.build(&ruleset(Family::Ipv4, DetectLocal::NodeCidr), false, &TableContents::default());
    assert_eq!(commit(&mut socket, transaction), Ok(()), "the socket is as good as before");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn names_of_maximum_length_fit() {
    isolate().unwrap();
    let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
    let v6 = ruleset(Family::Ipv6, DetectLocal::NodeCidr);
    let service = ObjectName::new(&"n".repeat(63), &"s".repeat(63));
    let rule = FrontEndRule {
        masquerade: Masquerade::Nobody,
        access: Access::Open,
        is_closed_to_node: true,
        source_ranges: Some(service.clone()),
    };
    let front_ends =
        (1..=3000).map(|port| FrontEnd { address: address(Family::Ipv6, 1), port, protocol: Protocol::Udp });
    let ranges = SourceRanges::of_family(&["fd00::/8".parse().unwrap()], Family::Ipv6).unwrap();
    let contents = TableContents {
        front_ends: front_ends.map(|front_end| (front_end, rule.clone())).collect(),
        source_ranges: [(service, ranges)].into(),
        ..TableContents::default()
    };
    let mut transaction = Transaction::default();
    transaction.build(&v6, false, &contents);
    assert_eq!(commit(&mut socket, transaction), Ok(()));
    assert_eq!(observe(&mut socket), expected(&[&v6], &[&contents]));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn nft_can_load_what_it_lists() {
    isolate().unwrap();
    let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
    for (family, detect) in [
        (Family::Ipv4, DetectLocal::ClusterCidr(vec!["10.244.0.0/16".parse().unwrap()])),
        (Family::Ipv6, DetectLocal::InterfaceNamePrefix("veth".into())),
    ] {
        let ranges = ["10.0.0.0/8", "192.0.2.1/32", "fd00::/8", "2001:db8::/32"].map(|text| text.parse().unwrap());
        let rule = FrontEndRule {
            masquerade: Masquerade::Outsiders,
            access: Access::Insiders,
            is_closed_to_node: true,
            source_ranges: Some(name(1)),
        };
        let front_end = FrontEnd { address: address(family, 1), port: 80, protocol: Protocol::Tcp };
        let contents = TableContents {
            front_ends: [(front_end, rule)].into(),
            elements: [
                SetElement::Vip(address(family, 1)),
                SetElement::Hairpin((address(family, 2), 8080).into(), Protocol::Tcp),
                SetElement::HealthCheckPort(family, 30000),
            ]
            .into(),
            source_ranges: [(name(1), SourceRanges::of_family(&ranges, family).unwrap())].into(),
        };
        let mut transaction = Transaction::default();
        transaction.build(&ruleset(family, detect), false, &contents);
        assert_eq!(commit(&mut socket, transaction), Ok(()));
    }
    shell(
        "nft list ruleset > first && nft flush ruleset && nft -f first && nft list ruleset > second && diff first second \
         && rm first second",
    );
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_table_that_vanishes_while_it_is_read_is_no_error() {
    const EACH: usize = 100;
    isolate().unwrap();
    let namespace = Namespace::own().unwrap();
    let (mut with_table, mut without) = (0, 0);
    let is_over = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            namespace
                .run(move || {
                    let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
                    while !is_over.load(Ordering::Relaxed) {
                        let mut built = Transaction::default();
                        built.build(&ruleset(Family::Ipv4, DetectLocal::NodeCidr), false, &TableContents::default());
                        commit(&mut socket, built).unwrap();
                        let mut deleted = Transaction::default();
                        deleted.delete_table(Family::Ipv4, "kube-ipvs");
                        commit(&mut socket, deleted).unwrap();
                    }
                })
                .unwrap();
        });
        let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
        while with_table < EACH || without < EACH {
            match read::read(&mut socket, Families::BOTH, false) {
                Ok(observed) if observed.rulesets.is_empty() => without += 1,
                Ok(_) => with_table += 1,
                Err(error) => {
                    is_over.store(true, Ordering::Relaxed);
                    panic!("{error}");
                }
            }
        }
        is_over.store(true, Ordering::Relaxed);
    });
    println!("{with_table} reads found the table, {without} did not");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn every_foreign_change_to_the_ruleset_is_detected() {
    isolate().unwrap();
    let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
    let v4 = ruleset(Family::Ipv4, DetectLocal::NodeCidr);
    let mut exists = false;
    for change in [
        "nft add rule ip kube-ipvs filter-input accept",
        "nft insert rule ip kube-ipvs refuse accept",
        "nft flush chain ip kube-ipvs nat-postrouting",
        "nft add chain ip kube-ipvs another",
        "nft add set ip kube-ipvs another '{ type ipv4_addr; }'",
        "nft add chain ip kube-ipvs filter-input '{ policy drop; }'",
        "nft add element ip kube-ipvs open '{ 10.96.0.1 . icmp . 1 }'",
        "nft add element ip kube-ipvs hairpin '{ 10.0.0.1 . 10.0.0.2 . tcp . 80 }'",
        "nft add table ip kube-ipvs '{ flags dormant; }'",
        "nft replace rule ip kube-ipvs nat-cluster-ip handle $(nft -a list chain ip kube-ipvs nat-cluster-ip \
         | sed -n 's/.*handle //p' | tail -n 1) accept",
    ] {
        let mut transaction = Transaction::default();
        transaction.build(&v4, exists, &TableContents::default());
        assert_eq!(commit(&mut socket, transaction), Ok(()));
        exists = true;
        assert_eq!(observe(&mut socket).rulesets[&Family::Ipv4], v4.fingerprint());
        shell(change);
        assert_ne!(observe(&mut socket).rulesets[&Family::Ipv4], v4.fingerprint(), "{change}");
    }
}
