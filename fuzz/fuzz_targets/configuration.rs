//! Any text as a configuration file: parsing does not panic, and a valid configuration can be written and parsed again as the
//! same.

#![no_main]
#![allow(dead_code, unreachable_pub, unused_imports, reason = "only a part of the program is here")]

#[path = "../../src/config/mod.rs"]
mod config;

use libfuzzer_sys::fuzz_target;

use crate::config::{Settings, parse};

fuzz_target!(|text: &str| {
    let Ok(read) = parse(text) else { return };
    let settings = Settings::new(&read.configuration, "host");
    if let (true, Ok(settings)) = (read.errors.is_empty(), settings) {
        let written = read.configuration.to_yaml().expect("what was read can be written");
        let again = parse(&written).unwrap_or_else(|problems| panic!("{problems:?} in {written}"));
        assert!(again.errors.is_empty() && again.warnings.is_empty(), "{again:?} in {written}");
        assert_eq!(Settings::new(&again.configuration, "host"), Ok(settings), "{written}");
    }
});
