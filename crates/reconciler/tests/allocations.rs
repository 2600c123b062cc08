//! How often one change allocates memory, on a kernel that costs nothing: as often among many Services as among few.

#[path = "../benches/cluster/mod.rs"]
mod cluster;

use allocation_counter::measure;
use cluster::{Cluster, ENDPOINTS, slice};
use service_watch::Change;

const FEW: u32 = 100;
const MANY: u32 = 5000;
/// Of so many Services one endpoint changes, one after the other.
const CHANGES: u32 = 100;

/// What `CHANGES` changes allocate among so many Services, each at another one.
fn allocations(services: u32, mut change: impl FnMut(&mut Cluster, u32) -> u64) -> u64 {
    let mut cluster = Cluster::with_services(services);
    (0..CHANGES).map(|it| change(&mut cluster, it * (services / CHANGES))).sum()
}

fn one_in(cluster: &mut Cluster, service: u32) -> u64 {
    let change = Change::Slice(slice(service, ENDPOINTS + 1));
    let mut added = 0;
    let info = measure(|| added = cluster.apply_and_sync(change).applied.real_servers_added);
    assert_eq!(added, 1);
    info.count_total
}

fn one_out(cluster: &mut Cluster, service: u32) -> u64 {
    let change = Change::Slice(slice(service, ENDPOINTS - 1));
    let (mut drained, mut deleted) = (0, 0);
    let out = measure(|| drained = cluster.apply_and_sync(change).applied.real_servers_drained);
    cluster.expect_look(service);
    let look = measure(|| deleted = cluster.look().applied.real_servers_deleted);
    assert_eq!((drained, deleted), (1, 1));
    out.count_total + look.count_total
}

/// `limit` is what a change may allocate: a tenth more than it does.
fn check(what: &str, limit: u64, change: fn(&mut Cluster, u32) -> u64) {
    let [few, many] = [FEW, MANY].map(|services| allocations(services, change));
    println!(
        "{what}, {CHANGES} times: {few} allocations among {FEW} Services, {many} among {MANY}; {} a change",
        few / u64::from(CHANGES)
    );
    assert!(few <= limit * u64::from(CHANGES), "{what}: {few} in {CHANGES} changes");
    // A tree or a map may grow by a node, or become a larger one.
    assert!(few.abs_diff(many) <= u64::from(CHANGES) / 10, "{what}: {few} among {FEW} Services, {many} among {MANY}");
}

#[test]
fn allocations_for_a_new_endpoint_do_not_grow_with_services() {
    check("one endpoint in", 24, one_in);
}

#[test]
fn allocations_for_a_deleted_endpoint_do_not_grow_with_services() {
    check("one endpoint drained and out", 36, one_out);
}
