//! A file of manifests, whatever is in it: read without a panic, and a second time as the first.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    for is_json in [false, true] {
        let read = service_watch::fuzzing::manifest_file(text, is_json);
        assert_eq!(read, service_watch::fuzzing::manifest_file(text, is_json));
    }
});
