//! How many instructions it takes to encode requests and to decode answers, a message. The crate instruction-count says
//! how they are counted, checked against `instructions.txt`, and recorded there.
//!
//! ```console
//! $ cargo bench -p ipvs-netlink --bench instructions
//! ```

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on stops")]

mod messages;

use std::hint::black_box;
use std::path::Path;
use std::process::ExitCode;

use instruction_count::{Suite, Work, count};
use ipvs_netlink::Message;

/// As many as a client sends at once.
const BATCH: u32 = 128;

/// How often a work is done.
const TIMES: u64 = 1000;

fn main() -> ExitCode {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/instructions.txt");
    Suite { works: works(), file, steady: Vec::new() }.main()
}

fn works() -> Vec<Work> {
    let single = [
        ("new virtual server, IPv4", messages::new_virtual_server()),
        ("new virtual server, IPv6", messages::new_virtual_server_v6()),
        ("new real server, IPv4", messages::new_real_server()),
        ("new real server, IPv6", messages::new_real_server_v6()),
    ];
    let encodings = single.map(|(name, message)| encoding(name, vec![message]));
    let batch = encoding("128 new virtual servers", messages::new_virtual_servers(BATCH));
    let decodings = messages::listed().map(|answer| {
        Work::new(format!("decode: {}", answer.name), TIMES, move || {
            count(|| {
                for _ in 0..TIMES {
                    black_box(black_box(&answer).decode());
                }
            });
        })
    });
    encodings.into_iter().chain([batch]).chain(decodings).collect()
}

/// Encodes messages into one datagram.
fn encoding(name: &str, messages: Vec<Message>) -> Work {
    let length = u64::try_from(messages.len()).unwrap();
    Work::new(format!("encode: {name}"), TIMES * length, move || {
        let mut datagram = messages::empty_datagram();
        count(|| {
            for _ in 0..TIMES {
                datagram.clear();
                for message in black_box(&messages) {
                    messages::append(&mut datagram, message);
                }
                black_box(&mut datagram);
            }
        });
    })
}
