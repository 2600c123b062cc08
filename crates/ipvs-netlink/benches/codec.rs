//! How long it takes to encode requests and to decode answers, without a kernel:
//!
//! ```console
//! $ cargo bench -p ipvs-netlink --bench codec
//! ```

mod messages;

use std::hint::black_box;

use criterion::{Criterion, Throughput};

/// As many as a client sends at once.
const BATCH: u32 = 128;

fn encode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("encode");
    let mut datagram = messages::empty_datagram();
    group.throughput(Throughput::Elements(1));
    for (name, message) in [
        ("new virtual server, IPv4", messages::new_virtual_server()),
        ("new virtual server, IPv6", messages::new_virtual_server_v6()),
        ("new real server, IPv4", messages::new_real_server()),
        ("new real server, IPv6", messages::new_real_server_v6()),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                datagram.clear();
                messages::append(&mut datagram, black_box(&message));
                black_box(&mut datagram);
            });
        });
    }

    let batch = messages::new_virtual_servers(BATCH);
    group.throughput(Throughput::Elements(BATCH.into()));
    group.bench_function("a batch of 128 new virtual servers", |bencher| {
        bencher.iter(|| {
            datagram.clear();
            for message in black_box(&batch) {
                messages::append(&mut datagram, message);
            }
            black_box(&mut datagram);
        });
    });
    group.finish();
}

fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    group.throughput(Throughput::Elements(1));
    for answer in messages::listed() {
        group.bench_function(answer.name, |bencher| bencher.iter(|| black_box(&answer).decode()));
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    encode(&mut criterion);
    decode(&mut criterion);
    criterion.final_summary();
}
