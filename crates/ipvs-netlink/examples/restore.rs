//! Reads rules, as `ipvsadm -Sn` and the `save` example print them, from its input and carries them out.
//!
//! ```text
//! sudo cargo run -p ipvs-netlink --example restore -- [--replace] < rules
//! ```
//!
//! `--replace` deletes every virtual server first. Where a line cannot be read nothing is carried out; a line that the
//! kernel refuses does not stop those after it. Every such line is told with its number.

use std::io::{self, Read};
use std::process::ExitCode;

use ipvs_netlink::rules::{self, Rule};
use ipvs_netlink::{Client, Error, Message};

/// So many go to the kernel in few system calls, and their errors are told before the next.
const BATCH: usize = 1000;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let replace = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => false,
        ["--replace"] => true,
        _ => {
            eprintln!("restore: the one option is --replace");
            return ExitCode::from(2);
        }
    };
    let mut text = String::new();
    if let Err(error) = io::stdin().read_to_string(&mut text) {
        eprintln!("restore: cannot read: {error}");
        return ExitCode::FAILURE;
    }
    let (rules, errors): (Vec<_>, Vec<_>) = rules::parse(&text).partition(Result::is_ok);
    if !errors.is_empty() {
        for error in errors.into_iter().filter_map(Result::err) {
            eprintln!("restore: {error}");
        }
        eprintln!("restore: nothing was carried out");
        return ExitCode::FAILURE;
    }
    let rules: Vec<Rule> = rules.into_iter().flatten().collect();
    match restore(&rules, replace) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(refused) => {
            eprintln!("restore: {refused} of {} rules were refused", rules.len());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("restore: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Carries rules out, and counts those that the kernel refuses.
fn restore(rules: &[Rule], replace: bool) -> Result<usize, Error> {
    let mut client = Client::connect()?;
    if replace {
        client.flush()?;
    }
    let mut refused = 0;
    for batch in rules.chunks(BATCH) {
        let messages: Vec<Message> = batch.iter().map(|rule| rule.message).collect();
        for (rule, result) in batch.iter().zip(client.apply(&messages)?) {
            if let Err(error) = result {
                eprintln!("restore: line {}: {error}", rule.line);
                refused += 1;
            }
        }
    }
    Ok(refused)
}
