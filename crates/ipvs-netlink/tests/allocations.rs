//! What allocates memory, and how often.

mod common;
#[path = "../benches/messages/mod.rs"]
mod messages;

use std::hint::black_box;

use allocation_counter::measure;
use common::{client, real, round_robin};
use ipvs_netlink::Message;
#[cfg(target_endian = "little")]
use ipvs_netlink::StatsWidth::{Bits32, Bits64};

/// As many as a client sends at once, and ten times as many.
const FEW: u32 = 128;
const MANY: u32 = 1280;

#[test]
fn encoding_a_request_allocates_nothing() {
    let mut datagram = messages::empty_datagram();
    for message in messages::requests() {
        let info = measure(|| {
            datagram.clear();
            messages::append(&mut datagram, black_box(&message));
        });
        assert_eq!(info.count_total, 0, "{message:?}");
    }
}

#[test]
fn encoding_a_batch_allocates_nothing() {
    let mut datagram = messages::empty_datagram();
    let batch = messages::new_virtual_servers(FEW);
    let info = measure(|| batch.iter().for_each(|message| messages::append(&mut datagram, message)));
    assert_eq!(info.count_total, 0);
}

#[test]
#[cfg(target_endian = "little")]
fn decoding_an_answer_allocates_nothing() {
    for answer in messages::answers() {
        let info = measure(|| {
            black_box(answer.decode());
        });
        assert_eq!(info.count_total, 0, "{}", answer.name);
    }
}

#[test]
#[cfg(target_endian = "little")]
fn answers_say_the_same_in_both_widths() {
    let stats = |answer: messages::Answer| match answer.decode() {
        Message::VirtualServer(entry) => (entry.stats.width, entry.stats.connections, entry.stats.incoming_bytes),
        Message::RealServer(entry) => (entry.stats.width, entry.stats.connections, entry.stats.incoming_bytes),
        other => unreachable!("{other:?}"),
    };
    assert_eq!(stats(messages::listed_virtual_server()), (Bits64, 3, 180));
    assert_eq!(stats(messages::narrow_virtual_server()), (Bits32, 3, 180));
    assert_eq!(stats(messages::listed_real_server()), (Bits64, 3, 180));
    assert_eq!(stats(messages::narrow_real_server()), (Bits32, 3, 180));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_request_allocates_nothing_once_the_client_has_sent_one_as_long() {
    let mut client = client();
    let id = messages::numbered(0);
    let server = round_robin(id);
    let mut requests = || {
        client.add_virtual_server(&server).unwrap();
        client.set_virtual_server(&server).unwrap();
        client.add_real_server(&id, &real("10.1.0.7:80")).unwrap();
        client.virtual_server(&id).unwrap();
        client.delete_virtual_server(&id).unwrap();
        client.timeouts().unwrap();
        client.info().unwrap();
    };
    requests();
    assert_eq!(measure(requests).count_total, 0);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_batch_allocates_for_its_results_and_not_for_its_messages() {
    let mut client = client();
    let [few, many] = [FEW, MANY].map(|count| {
        let additions = messages::new_virtual_servers(count);
        let deletions: Vec<_> =
            (0..count).map(|number| Message::DeleteVirtualServer(messages::numbered(number))).collect();
        let mut apply = |messages| assert!(client.apply(messages).unwrap().iter().all(Result::is_ok));
        apply(&additions);
        measure(|| apply(&deletions))
    });
    println!("a batch of {FEW}: {few:?}; of {MANY}: {many:?}");
    // Two lists of results, of which the one that is not returned doubles as results come.
    assert!(few.count_total <= 8, "{few:?}");
    assert!(many.count_total <= few.count_total + 4, "{few:?}, {many:?}");
    assert_eq!(many.count_current, 0, "{many:?}");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_list_allocates_as_it_grows_and_not_for_its_entries() {
    let mut client = client();
    let [few, many] = [FEW, MANY].map(|count| {
        client.flush().unwrap();
        let real_servers = (0..count).map(|number| {
            let address = format!("10.1.{}.{}:80", number / 250, number % 250);
            Message::AddRealServer(messages::numbered(0), real(&address))
        });
        let messages: Vec<_> = messages::new_virtual_servers(count).into_iter().chain(real_servers).collect();
        assert!(client.apply(&messages).unwrap().iter().all(Result::is_ok));
        let virtual_servers = measure(|| assert_eq!(client.virtual_servers().unwrap().len(), count as usize));
        let real_servers =
            measure(|| assert_eq!(client.real_servers(&messages::numbered(0)).unwrap().len(), count as usize));
        [virtual_servers, real_servers]
    });
    println!("lists of {FEW}: {few:?}; of {MANY}: {many:?}");
    for (few, many) in few.into_iter().zip(many) {
        // Two lists that double, that of the answers and that of the entries, and a set of what was seen.
        assert!(few.count_total <= 16, "{few:?}");
        assert!(many.count_total <= few.count_total + 8, "{few:?}, {many:?}");
        assert_eq!(many.count_current, 0, "{many:?}");
    }
}
