//! The files below `/proc`, whatever is in them: read without a panic, and to their end.

#![no_main]

use ipvs_netlink::{Connections, Totals};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let lines = data.split(|byte| *byte == b'\n').count();
    let mut found = 0;
    for connection in Connections::read(data) {
        found += 1;
        match connection {
            Ok(connection) => drop(format!("{connection:?} {:?}", connection.template())),
            Err(error) => drop(error.to_string()),
        }
    }
    assert!(found <= lines, "{found} of {lines} lines");
    let _ = Totals::read(data).map_err(|error| error.to_string());
});
