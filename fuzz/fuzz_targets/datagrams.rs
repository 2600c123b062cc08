//! A datagram from the kernel, whatever is in it: read without a panic, and to its end.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| netlink_batch::fuzzing::read(data));
