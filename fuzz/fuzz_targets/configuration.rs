//! A configuration file, whatever is in it: read without a panic; and what makes sense can be written, and read again as the
//! same.

#![no_main]
#![allow(dead_code, unreachable_pub, unused_imports, reason = "only a part of the program is here")]

#[path = "../../src/config/mod.rs"]
mod config;
#[path = "../../src/go.rs"]
mod go;

use libfuzzer_sys::fuzz_target;

use crate::config::{Settings, complete};

fuzz_target!(|text: &str| {
    let Ok(read) = complete(text) else { return };
    let settings = Settings::new(&read.configuration, "host");
    if let (true, Ok(settings)) = (read.problems.is_empty(), settings) {
        let written = read.configuration.to_yaml().expect("what was read can be written");
        let again = complete(&written).unwrap_or_else(|problems| panic!("{problems:?} in {written}"));
        assert!(again.problems.is_empty() && again.warnings.is_empty(), "{again:?} in {written}");
        assert_eq!(Settings::new(&again.configuration, "host"), Ok(settings), "{written}");
    }
});
