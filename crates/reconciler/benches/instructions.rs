//! How many instructions the pure core takes, from changes to plans and to messages. The crate instruction-count says how
//! they are counted, checked against `instructions.txt`, and recorded there.
//!
//! ```console
//! $ cargo bench -p reconciler --bench instructions
//! ```
//!
//! A check also fails where a change takes more among 10,000 Services than among 1,000, or while others drain.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on stops")]

mod cluster;

use std::collections::BTreeSet;
use std::hint::black_box;
use std::net::IpAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use cluster::{Cluster, ENDPOINTS, cluster_ip, name, policy, service, slice, slice_of};
use instruction_count::{Suite, Work, count};
use netlink_packet_core::NetlinkSerializable;
use reconciler::binding::VipBinding;
use reconciler::contribution::Contribution;
use reconciler::desired_state::DesiredState;
use reconciler::diff::{DiffContext, Retention, diff};
use reconciler::filter::ruleset::Ruleset;
use reconciler::filter::{FrontEndElements, SetElement};
use reconciler::front_end::FrontEnd;
use reconciler::linux::filter::message::Transaction;
use reconciler::mirror::Mirror;
use reconciler::node::NodeView;
use reconciler::plan::{Key, Operation};
use reconciler::table::ServiceEntry;
use service_watch::{Change, EndpointSlice, Protocol};

/// As many as are not so few that hash maps make a difference, and not so many that it takes long.
const SERVICES: u32 = 1000;
/// Of so many Services one endpoint changes, one after the other.
const CHANGES: u32 = 100;
/// What does not depend on hashes is done so often.
const TIMES: u32 = 100;
/// What the API server puts in a slice.
const SLICE: u32 = 100;

fn main() -> ExitCode {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/instructions.txt");
    let contributions = [contribution(1, ENDPOINTS), contribution(10, SLICE)];
    let keys = [update(), diff_one(), diff_all(), cold_start(), transaction()];
    let changes = [100, 1000, 10_000].into_iter().flat_map(|services| [one_in(services), one_out(services)]);
    let works = contributions.into_iter().chain(keys).chain(changes).chain([one_in_beside_drains()]).collect();
    let sizes = [one_in_name, one_out_name].map(|name| (name(1000), name(10_000)));
    let steady = sizes.into_iter().chain([(one_in_name(10_000), ONE_IN_BESIDE_DRAINS.into())]).collect();
    Suite { works, file, steady }.main()
}

/// What a Service of so many slices with so many endpoints each wants.
fn contribution(slices: u32, endpoints: u32) -> Work {
    let name = format!("contribution: {slices} x {endpoints} endpoints");
    Work::new(name, TIMES.into(), move || {
        let address = |number: u32| IpAddr::V4((0x0a80_0000 + number).into());
        let slice = |it| slice_of(0, it, (it * endpoints..(it + 1) * endpoints).map(address));
        let entry = entry((0..slices).map(slice).collect());
        let (node, policy) = (NodeView::default(), policy());
        let last = count(|| {
            (1..TIMES).for_each(|_| drop(black_box(Contribution::new(black_box(&entry), &node, &policy))));
            Contribution::new(black_box(&entry), &node, &policy)
        });
        assert_eq!(last.servers.values().next().unwrap().real_servers.len(), (slices * endpoints) as usize);
    })
}

fn entry(slices: Vec<EndpointSlice>) -> ServiceEntry {
    let slices = slices.into_iter().map(|slice| (slice.name.clone(), slice));
    ServiceEntry { service: Some(Arc::new(service(0))), slices: slices.collect(), ..ServiceEntry::default() }
}

/// What is desired, and a kernel that has it.
struct Core {
    desired: DesiredState,
    mirror: Mirror,
    rulesets: Vec<Arc<Ruleset>>,
    keys: BTreeSet<Key>,
}

impl Core {
    fn new() -> Self {
        let policy = policy();
        let rulesets = policy.families.iter().map(|it| Arc::new(Ruleset::new(it, &policy, &NodeView::default())));
        let mut core = Self {
            desired: DesiredState::default(),
            mirror: Mirror::default(),
            rulesets: rulesets.collect(),
            keys: policy.families.iter().map(Key::Table).chain([Key::Device]).collect(),
        };
        (0..SERVICES).for_each(|it| drop(core.update(it, wanted(it, ENDPOINTS))));
        core.keys.extend(core.desired.keys());
        let mut operations = Vec::new();
        core.keys.iter().for_each(|key| core.diff(key, &mut operations));
        for operation in &operations {
            core.mirror.acknowledge(operation);
        }
        core
    }

    fn update(&mut self, number: u32, contribution: Contribution) -> BTreeSet<Key> {
        let (mut dirty, mut conflicts) = (BTreeSet::new(), Vec::new());
        self.desired.update(&name(number), Some(&service(number)), contribution, &mut dirty, &mut conflicts);
        dirty
    }

    fn diff(&self, key: &Key, operations: &mut Vec<Operation>) {
        let (retention, binding) = (Retention::ExcludedRanges(&[]), &VipBinding::Addresses);
        let context = DiffContext { retention, rulesets: &self.rulesets, binding, is_overdue: &|_, _| false };
        black_box(diff(key, &self.mirror, &self.desired, context, operations));
    }
}

/// What a Service wants with so many endpoints.
fn wanted(number: u32, endpoints: u32) -> Contribution {
    let slice = slice(number, endpoints);
    let slices = [(slice.name.clone(), slice)].into_iter().collect();
    Contribution::new(
        &ServiceEntry { service: Some(Arc::new(service(number))), slices, ..ServiceEntry::default() },
        &NodeView::default(),
        &policy(),
    )
}

/// Takes into the sum that a Service has one endpoint more.
fn update() -> Work {
    Work::new("desired: update by one endpoint", SERVICES.into(), || {
        let mut core = Core::new();
        for number in 0..SERVICES {
            let (name, service, wanted) = (name(number), service(number), wanted(number, ENDPOINTS + 1));
            let (mut dirty, mut conflicts) = (BTreeSet::new(), Vec::new());
            count(|| core.desired.update(&name, Some(&service), wanted, &mut dirty, &mut conflicts));
            assert_eq!(dirty.len(), 1);
        }
    })
}

/// Finds what is to be done for a key that has one endpoint more.
fn diff_one() -> Work {
    Work::new("diff: one endpoint more", SERVICES.into(), || {
        let mut core = Core::new();
        let dirty: Vec<Key> = (0..SERVICES).flat_map(|it| core.update(it, wanted(it, ENDPOINTS + 1))).collect();
        let mut operations = Vec::with_capacity(dirty.len());
        count(|| dirty.iter().for_each(|key| core.diff(key, &mut operations)));
        assert_eq!(operations.len(), SERVICES as usize);
    })
}

/// Finds that nothing is to be done.
fn diff_all() -> Work {
    Work::new(format!("diff: {SERVICES} x {ENDPOINTS}, nothing to change"), 1, || {
        let core = Core::new();
        let mut operations = Vec::new();
        count(|| core.keys.iter().for_each(|key| core.diff(key, &mut operations)));
        assert!(operations.is_empty());
    })
}

/// All that a start does but for what the kernel does.
fn cold_start() -> Work {
    Work::new(format!("cold start: {SERVICES} x {ENDPOINTS}"), 1, || {
        let changes = cluster::everything(SERVICES);
        // What is returned is dropped uncounted.
        black_box(count(|| Cluster::started(changes)));
    })
}

fn one_in_name(services: u32) -> String {
    format!("one endpoint in, {services} x {ENDPOINTS}")
}

fn one_in(services: u32) -> Work {
    Work::new(one_in_name(services), CHANGES.into(), move || {
        let mut cluster = Cluster::with_services(services);
        for number in (0..CHANGES).map(|it| it * (services / CHANGES)) {
            let change = Change::Slice(slice(number, ENDPOINTS + 1));
            let report = count(|| cluster.apply_and_sync(change));
            assert_eq!((report.applied.real_servers_added, report.applied.total()), (1, 1));
        }
    })
}

const ONE_IN_BESIDE_DRAINS: &str = "one endpoint in, 10000 x 10, of which 1000 drain";

fn one_in_beside_drains() -> Work {
    Work::new(ONE_IN_BESIDE_DRAINS, CHANGES.into(), || {
        let mut cluster = Cluster::with_services(10_000);
        cluster.drain(1000, 10_000);
        for number in (0..CHANGES).map(|it| it * 90) {
            let change = Change::Slice(slice(number, ENDPOINTS + 1));
            let report = count(|| cluster.apply_and_sync(change));
            assert_eq!((report.applied.real_servers_added, report.applied.total()), (1, 1));
        }
    })
}

fn one_out_name(services: u32) -> String {
    format!("one endpoint drained and out, {services} x {ENDPOINTS}")
}

fn one_out(services: u32) -> Work {
    Work::new(one_out_name(services), CHANGES.into(), move || {
        let mut cluster = Cluster::with_services(services);
        for number in (0..CHANGES).map(|it| it * (services / CHANGES)) {
            let change = Change::Slice(slice(number, ENDPOINTS - 1));
            let report = count(|| cluster.apply_and_sync(change));
            assert_eq!((report.applied.real_servers_drained, report.applied.total()), (1, 1));
            cluster.expect_look(number);
            let report = count(|| cluster.look());
            assert_eq!((report.applied.real_servers_deleted, report.applied.total()), (1, 1));
        }
    })
}

/// Makes and encodes what the packet filter is told of a new Service.
fn transaction() -> Work {
    Work::new("encode: nf_tables transaction of one Service", TIMES.into(), || {
        let front_end = FrontEnd { address: cluster_ip(0), port: 80, protocol: Protocol::Tcp };
        let elements = FrontEndElements::from(&wanted(0, ENDPOINTS).servers[&front_end].rule);
        let mut datagram = vec![0; 4096];
        count(|| {
            for _ in 0..TIMES {
                let mut transaction = Transaction::default();
                transaction.add_element(SetElement::Vip(black_box(front_end.address)));
                transaction.set_front_end(front_end, &FrontEndElements::default(), black_box(&elements));
                let (begin, end) = Transaction::begin_and_end();
                let requests = transaction.into_requests().into_iter().map(|request| request.message);
                let mut offset = 0;
                for message in [begin].into_iter().chain(requests).chain([end]) {
                    let length = message.buffer_len();
                    message.serialize(&mut datagram[offset..offset + length]);
                    offset += length;
                }
                black_box(&mut datagram);
            }
        });
    })
}
