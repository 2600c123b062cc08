//! Rules, whatever is in them: read without a panic; and what was understood of a line, written and read again, is the same.

#![no_main]

use ipvs_netlink::rules;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    for rule in rules::parse(text) {
        match rule {
            Ok(rule) => {
                // Some of what is read no line can say, as a port 0 of a tunnel.
                if let Ok(line) = rules::format(&rule.message) {
                    let again = rules::parse(&line).next().and_then(Result::ok).map(|rule| rule.message);
                    assert_eq!(again, Some(rule.message), "{line}");
                }
            }
            Err(error) => drop(error.to_string()),
        }
    }
});
