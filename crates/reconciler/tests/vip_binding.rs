//! VIPs as addresses and by routes: what is made, in which order one takes the other's place, and what is repaired.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use common::{NODE, World, ip, name, ready, service, tcp};
use ipnet::IpNet;
use ipvs_netlink::Family;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use reconciler::Policy;
use reconciler::binding::{VipBinding, VipRanges};
use reconciler::fake::FakeKernel;
use reconciler::filter::SetElement;
use reconciler::kernel::{Cause, Observed, ObservedDevice};
use reconciler::mirror::Mirror;
use reconciler::plan::{Key, Operation, Phase};
use service_watch::{Change, Service};

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn routes(ranges: &[&str]) -> VipBinding {
    let ranges: Vec<IpNet> = ranges.iter().map(|range| net(range)).collect();
    VipBinding::Routes(VipRanges::new(&ranges).unwrap())
}

fn with(binding: VipBinding) -> Policy {
    Policy { binding, ..Policy::new(NODE) }
}

/// A Service with a VIP in the ranges of most tests, one of IPv6, and one in no range.
fn web() -> Vec<Change> {
    let mut web = service("web", &["10.96.0.10", "fd96::10"]);
    web.external_ips = vec![ip("203.0.113.1")];
    vec![Change::Service(web), Change::Slice(ready("web-1", "web", &["10.0.0.1"]))]
}

fn world(kernel: FakeKernel, binding: VipBinding) -> World {
    World::with(kernel, with(binding), web())
}

fn held(kernel: &FakeKernel) -> (Vec<String>, Vec<String>) {
    let addresses = kernel.addresses.iter().flatten().map(|(address, prefix)| format!("{address}/{prefix}"));
    (addresses.collect(), kernel.routes.iter().map(ToString::to_string).collect())
}

const VIPS: [&str; 3] = ["10.96.0.10/32", "203.0.113.1/32", "fd96::10/128"];
const RANGES: [&str; 2] = ["10.96.0.0/12", "fd96::/64"];

#[test]
fn each_vip_binding_adds_its_addresses_or_routes() {
    for (binding, addresses, held_routes) in [
        (VipBinding::Addresses, &VIPS[..], &[][..]),
        (routes(&[]), &[], &VIPS),
        (routes(&["10.96.0.0/12"]), &[], &["10.96.0.0/12", "203.0.113.1/32", "fd96::10/128"]),
        (routes(&RANGES), &[], &["10.96.0.0/12", "203.0.113.1/32", "fd96::/64"]),
    ] {
        let mut world = world(FakeKernel::default(), binding.clone());
        assert_eq!(held(world.kernel()), (strings(addresses), strings(held_routes)), "{binding:?}");
        for vip in ["10.96.0.10", "203.0.113.1", "fd96::10"] {
            assert!(world.kernel().filter.elements.contains(&SetElement::Vip(ip(vip))), "{vip} {binding:?}");
        }
        assert_eq!(world.audit().applied.total(), 0, "{binding:?}");
        assert_eq!(world.audit().drifted_keys, []);
        world.apply(Change::ServiceDeleted(name("web"))).settle();
        let ranges = held_routes.iter().filter(|route| RANGES.contains(route)).copied().collect::<Vec<_>>();
        assert_eq!(held(world.kernel()), (vec![], strings(&ranges)), "a range stays, whatever is in it");
        assert!(world.kernel().filter.elements.is_empty());
    }
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

/// What binds a VIP, as the kernel goes through the operations of a log.
#[derive(Default)]
struct Bound {
    addresses: BTreeSet<IpAddr>,
    routes: BTreeSet<IpNet>,
}

impl Bound {
    fn of(kernel: &FakeKernel) -> Self {
        Self {
            addresses: kernel.addresses.iter().flatten().map(|(it, _)| *it).collect(),
            routes: kernel.routes.clone(),
        }
    }

    fn apply(&mut self, operation: &Operation) {
        match operation {
            Operation::BindAddress(address) => _ = self.addresses.insert(*address),
            Operation::UnbindAddress(address) => _ = self.addresses.remove(address),
            Operation::AddRoute(range) => _ = self.routes.insert(*range),
            Operation::RemoveRoute(range) => _ = self.routes.remove(range),
            _ => {}
        }
    }

    fn has(&self, vip: IpAddr) -> bool {
        self.addresses.contains(&vip) || self.routes.iter().any(|range| range.contains(&vip))
    }
}

#[test]
fn a_vip_stays_bound_while_the_binding_changes() {
    let ways =
        [VipBinding::Addresses, routes(&[]), routes(&["10.96.0.0/12"]), routes(&RANGES), routes(&["10.96.0.0/24"])];
    for before in &ways {
        for after in &ways {
            let mut kernel = world(FakeKernel::default(), before.clone()).kill();
            kernel.log.clear();
            let mut bound = Bound::of(&kernel);
            let mut changed = world(kernel, after.clone());
            let log = std::mem::take(&mut changed.kernel().log);
            for operation in &log {
                bound.apply(operation);
                for vip in ["10.96.0.10", "203.0.113.1", "fd96::10"] {
                    assert!(bound.has(ip(vip)), "{vip} from {before:?} to {after:?} after {operation}: {log:#?}");
                }
            }
            let fresh = world(FakeKernel::default(), after.clone()).kill();
            assert_eq!(held(changed.kernel()), held(&fresh), "from {before:?} to {after:?}");
            assert_eq!(changed.kernel().filter, fresh.filter, "from {before:?} to {after:?}");
            let again = changed.audit();
            assert_eq!((again.applied.total(), again.drifted_keys), (0, vec![]), "from {before:?} to {after:?}");
        }
    }
}

#[test]
fn a_range_is_guarded_while_it_has_a_route() {
    let position = |log: &[Operation], wanted: &dyn Fn(&Operation) -> bool| log.iter().position(wanted).unwrap();
    let is_table = |operation: &Operation| {
        operation.filter_family() == Some(Family::Ipv4) && matches!(operation, Operation::BuildTable { .. })
    };
    let range = net("10.96.0.0/12");
    let mut one = world(FakeKernel::default(), routes(&["10.96.0.0/12"]));
    let log = std::mem::take(&mut one.kernel().log);
    assert!(position(&log, &is_table) < position(&log, &|it| *it == Operation::AddRoute(range)));
    let mut other = world(one.kill(), VipBinding::Addresses);
    let log = std::mem::take(&mut other.kernel().log);
    assert!(position(&log, &|it| *it == Operation::RemoveRoute(range)) < position(&log, &is_table), "{log:#?}");
    // Without the guard there is no route for the range, and each VIP has its own.
    let refuse = |operation: &Operation| matches!(operation, Operation::BuildTable { .. }).then_some(Cause::Refused);
    let kernel = FakeKernel { fault: Some(Box::new(refuse)), ..FakeKernel::default() };
    let mut unguarded = World::unsynced(kernel, with(routes(&["10.96.0.0/12"])));
    unguarded.apply_all(web());
    unguarded.apply(Change::Synced).sync();
    assert_eq!(held(unguarded.kernel()), (vec![], vec![]), "not even that, as nothing guards it");
    unguarded.kernel().fault = None;
    unguarded.wait(Duration::from_secs(5)).sync();
    unguarded.audit();
    assert_eq!(held(unguarded.kernel()).1, ["10.96.0.0/12", "203.0.113.1/32", "fd96::10/128"]);
}

#[test]
fn a_routed_vip_is_open_only_while_it_is_served() {
    let mut world = World::with(FakeKernel::default(), with(routes(&RANGES)), vec![]);
    world.kernel().log.clear();
    world.apply_all(web());
    world.settle().apply(Change::ServiceDeleted(name("web"))).settle();
    let log = std::mem::take(&mut world.kernel().log);
    let position = |wanted: &dyn Fn(&Operation) -> bool| log.iter().position(wanted).unwrap();
    let vip = ip("10.96.0.10");
    let served = position(&|it| matches!(it, Operation::AddRealServer(front_end, _) if front_end.address == vip));
    let gone = position(&|it| *it == Operation::DeleteVirtualServer(tcp("10.96.0.10", 80)));
    assert!(served < position(&|it| *it == Operation::AddRoutedVip(vip)), "{log:#?}");
    assert!(position(&|it| *it == Operation::RemoveRoutedVip(vip)) < gone, "{log:#?}");
    // One in no range is guarded from before to after it is bound.
    let (outside, route) = (SetElement::Vip(ip("203.0.113.1")), net("203.0.113.1/32"));
    assert!(position(&|it| *it == Operation::AddElement(outside)) < position(&|it| *it == Operation::AddRoute(route)));
    assert!(
        position(&|it| *it == Operation::RemoveRoute(route)) < position(&|it| *it == Operation::RemoveElement(outside))
    );
    assert!(Phase::AddRealServers < Phase::AdmitClients && Phase::RemoveRoutedVips < Phase::DeleteVirtualServers);
}

#[test]
fn an_audit_repairs_routes_and_a_device_that_is_down() {
    let mut world = world(FakeKernel::default(), routes(&["10.96.0.0/12"]));
    let all = held(world.kernel());
    world.kernel().routes.remove(&net("203.0.113.1/32"));
    world.kernel().routes.remove(&net("10.96.0.0/12"));
    world.kernel().routes.insert(net("192.0.2.7/32"));
    let report = world.audit();
    let drifted_keys = [Key::Vip(ip("192.0.2.7")), Key::Vip(ip("203.0.113.1")), Key::VipRange(net("10.96.0.0/12"))];
    assert_eq!(report.drifted_keys, drifted_keys);
    assert_eq!(held(world.kernel()), all);
    // Somebody set it down: the kernel has deleted routes with that.
    world.kernel().accepts_routes = false;
    world.kernel().routes.remove(&net("fd96::10/128"));
    assert_eq!(world.audit().drifted_keys, [Key::Device, Key::Vip(ip("fd96::10"))]);
    assert_eq!(held(world.kernel()), all);
    assert_eq!(world.audit().applied.total(), 0);
    // And without an audit, where the next route shows it.
    world.kernel().accepts_routes = false;
    let mut new = service("new", &["10.96.0.11"]);
    new.external_ips = vec![ip("203.0.113.2")];
    world.apply(Change::Service(new));
    assert_eq!(world.sync().failures, []);
    assert!(world.kernel().accepts_routes && world.kernel().routes.contains(&net("203.0.113.2/32")));
}

#[test]
fn a_failed_route_keeps_the_address_and_is_retried() {
    for refused in ["10.96.0.0/12", "203.0.113.1/32"] {
        let mut kernel = world(FakeKernel::default(), VipBinding::Addresses).kill();
        let range = net(refused);
        kernel.fault = Some(Box::new(move |it| (*it == Operation::AddRoute(range)).then_some(Cause::Refused)));
        let mut world = World::unsynced(kernel, with(routes(&["10.96.0.0/12"])));
        world.apply_all(web());
        let report = { world.apply(Change::Synced).sync() };
        assert_eq!(report.failures.len(), 1, "{refused}");
        let left: Vec<IpAddr> = world.kernel().addresses.as_ref().unwrap().keys().copied().collect();
        assert_eq!(left.len(), 1, "{refused}: {left:?}");
        assert!(range.contains(&left[0]));
        assert_eq!(report.unrepaired.is_empty(), refused == "203.0.113.1/32", "a range is everybody's");
        world.kernel().fault = None;
        world.settle();
        world.audit();
        assert_eq!(held(world.kernel()), (vec![], strings(&["10.96.0.0/12", "203.0.113.1/32", "fd96::10/128"])));
    }
}

#[test]
fn foreign_addresses_stay_with_routes() {
    let mut kernel = world(FakeKernel::default(), VipBinding::Addresses).kill();
    kernel.addresses.as_mut().unwrap().insert(ip("10.96.0.10"), 24);
    kernel.addresses.as_mut().unwrap().insert(ip("10.77.0.1"), 24);
    let mut world = world(kernel, routes(&RANGES));
    assert_eq!(held(world.kernel()).0, ["10.77.0.1/24", "10.96.0.10/24"]);
    assert_eq!(world.audit().applied.total(), 0);
}

#[test]
fn bindings_stay_while_an_object_cannot_be_parsed() {
    let kernel = world(FakeKernel::default(), routes(&RANGES)).kill();
    let before = held(&kernel).1;
    let changes = vec![Change::Incomplete(true)];
    let mut world = World::with(kernel, with(VipBinding::Addresses), changes);
    assert_eq!(held(world.kernel()).1, before, "the VIPs of what was not understood may be in it");
    world.apply_all(web());
    world.apply(Change::Incomplete(false)).settle();
    world.audit();
    assert_eq!(held(world.kernel()), (strings(&VIPS), vec![]));
}

#[test]
fn ranges_of_an_unserved_family_have_no_routes() {
    let mut policy = with(routes(&RANGES));
    policy.families.ipv6 = false;
    let mut world = World::with(FakeKernel::default(), policy, web());
    assert_eq!(held(world.kernel()).1, ["10.96.0.0/12", "203.0.113.1/32"]);
}

#[test]
fn a_loopback_address_on_the_device_is_ignored() {
    let addresses = vec![(ip("127.105.112.118"), 32), (ip("fe80::1"), 64)];
    let device = ObservedDevice { accepts_routes: true, addresses, routes: vec![net("10.96.0.0/12")] };
    let mirror = Mirror::from_dump(Observed { device: Some(device), ..Observed::default() });
    assert_eq!(mirror.keys().collect::<Vec<_>>(), [Key::VipRange(net("10.96.0.0/12"))]);
}

fn binding() -> impl Strategy<Value = VipBinding> {
    let ranges = subsequence(vec!["10.96.0.0/12", "10.96.0.0/31", "203.0.113.0/24", "fd96::/64", "fd96::/127"], 0..=3);
    prop_oneof![1 => Just(VipBinding::Addresses), 4 => ranges.prop_map(|ranges| routes(&ranges))]
}

/// A Service of few VIPs, that comes, or goes.
fn change() -> impl Strategy<Value = Change> {
    let vips = ["10.96.0.0", "10.96.0.1", "10.96.0.2", "203.0.113.1", "fd96::1", "fd96::2"];
    let named = select(vec!["a", "bb", "ccc"]);
    prop_oneof![
        3 => (named.clone(), subsequence(vips.to_vec(), 1..=3))
            .prop_map(|(named, vips)| {
                let cluster_ips = [format!("10.96.1.{}", named.len()), format!("fd96::1:{}", named.len())];
                let cluster_ips = cluster_ips.each_ref().map(String::as_str);
                let external_ips = vips.into_iter().map(ip).collect();
                Change::Service(Service { external_ips, ..service(named, &cluster_ips) })
            }),
        1 => named.prop_map(|named| Change::ServiceDeleted(name(named))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Restarts with other settings, kills in the middle, refusals: in the end all is as a fresh start would have it, and
    /// no VIP that stays wanted was without something that binds it, except where the kernel refused.
    #[test]
    fn any_state_before_a_restart_converges(
        runs in prop::collection::vec((binding(), prop::collection::vec(change(), 0..6), 0_usize..40), 1..5),
    ) {
        let mut kernel = FakeKernel::default();
        let mut objects: std::collections::BTreeMap<String, Change> = std::collections::BTreeMap::new();
        for (binding, changes, patience) in runs {
            // The run is killed after so many operations.
            let mut left = patience;
            kernel.fault = Some(Box::new(move |_| {
                left = left.saturating_sub(1);
                (left == 0).then_some(Cause::Unknown)
            }));
            let mut world = World::unsynced(kernel, with(binding.clone()));
            world.apply_all(objects.values().cloned().collect());
            world.apply(Change::Synced);
            let mut bound = Bound::of(world.kernel());
            let start = world.kernel().log.len();
            let wanted: BTreeSet<IpAddr> = objects.values().flat_map(vips_of).collect();
            let were: Vec<IpAddr> = wanted.into_iter().filter(|vip| bound.has(*vip)).collect();
            world.sync();
            let log = world.kernel().log[start..].to_vec();
            for operation in &log {
                bound.apply(operation);
                let lost: Vec<_> = were.iter().filter(|vip| !bound.has(**vip)).collect();
                prop_assert!(lost.is_empty(), "{:?} after {}: {:?}; {:?} {:?}", lost, operation, log, bound.addresses, bound.routes);
            }
            for change in changes {
                match &change {
                    Change::Service(service) => _ = objects.insert(service.name.to_string(), change.clone()),
                    Change::ServiceDeleted(name) => _ = objects.remove(&name.to_string()),
                    _ => {}
                }
                world.apply(change);
            }
            let _ = world.reconciler.sync(world.now);
            // The next agent, which nothing kills.
            let mut kernel_after = world.kill();
            kernel_after.fault = None;
            let mut next = World::with(kernel_after, with(binding.clone()), objects.values().cloned().collect());
            next.audit();
            let fresh = World::with(FakeKernel::default(), with(binding), objects.values().cloned().collect()).kill();
            prop_assert_eq!(held(next.kernel()), held(&fresh));
            prop_assert_eq!(&next.kernel().filter, &fresh.filter);
            let again = next.audit();
            prop_assert_eq!((again.applied.total(), again.drifted_keys), (0, vec![]));
            kernel = next.kill();
        }
    }
}

fn vips_of(change: &Change) -> Vec<IpAddr> {
    match change {
        Change::Service(service) => [&service.cluster_ips[..], &service.external_ips].concat(),
        _ => vec![],
    }
}
