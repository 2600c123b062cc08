//! Messages of rtnetlink, nf_tables, connection tracking and ipset, whatever is in them: read without a panic. The first two
//! bytes are the type of the message.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Some((kind, payload)) = data.split_first_chunk() {
        reconciler::fuzzing::read(u16::from_ne_bytes(*kind), payload);
        takeover::fuzzing::read_payload(payload);
    }
});
