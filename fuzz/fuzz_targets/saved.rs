//! What `iptables-save` says, whatever it is: read without a panic, and nothing is to be deleted that does not stand there.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| takeover::fuzzing::read_saved(text));
