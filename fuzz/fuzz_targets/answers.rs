//! What an API server sends, whatever it is: read without a panic.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| service_watch::fuzzing::api_response(data));
