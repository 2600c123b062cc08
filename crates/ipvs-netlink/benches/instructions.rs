//! How many instructions it takes to encode requests and to decode answers, as Valgrind counts them. Unlike a time this is
//! the same whenever one executable runs, and whatever else the machine does.
//!
//! ```console
//! $ cargo bench -p ipvs-netlink --bench instructions
//! ```
//!
//! Each work is done a number of times, and twice that number of times, by a process of its own under Callgrind: the
//! difference is what it takes, without the start of the process. Gungraun, which knows more, would take a runner of the
//! very same version and a dozen packages.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on stops")]

mod messages;

use std::env;
use std::hint::black_box;
use std::process::{Command, ExitCode};

use ipvs_netlink::Message;

/// As many as a client sends at once.
const BATCH: u32 = 128;

/// How often a work is done, and twice as often.
const TIMES: u64 = 1000;

/// The first argument of a process that is counted.
const MODE: &str = "--work";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let mut works = works();
    if let [mode, index, times] = &arguments[..]
        && mode == MODE
    {
        let work = &mut works[index.parse::<usize>().unwrap()].run;
        (0..times.parse().unwrap()).for_each(|_: u64| work());
        return ExitCode::SUCCESS;
    }
    // `cargo test --benches` comes without.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return ExitCode::SUCCESS;
    }
    println!("| | instructions a message |\n|---|--:|");
    for (index, work) in works.iter().enumerate() {
        match (instructions(index, TIMES), instructions(index, 2 * TIMES)) {
            (Ok(once), Ok(twice)) => {
                println!("| {} | {} |", work.name, (twice - once) / (TIMES * u64::from(work.messages)));
            }
            (Err(error), _) | (_, Err(error)) => {
                eprintln!("cannot run valgrind: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

struct Work {
    name: String,
    /// How many messages it is about.
    messages: u32,
    run: Box<dyn FnMut()>,
}

fn works() -> Vec<Work> {
    let single = [
        ("new virtual server, IPv4", messages::new_virtual_server()),
        ("new virtual server, IPv6", messages::new_virtual_server_v6()),
        ("new real server, IPv4", messages::new_real_server()),
        ("new real server, IPv6", messages::new_real_server_v6()),
    ];
    let encodings = single.map(|(name, message)| encoding(name, vec![message]));
    let batch = encoding("128 new virtual servers", messages::new_virtual_servers(BATCH));
    let decodings = messages::listed().map(|answer| Work {
        name: format!("decode: {}", answer.name),
        messages: 1,
        run: Box::new(move || {
            black_box(black_box(&answer).decode());
        }),
    });
    encodings.into_iter().chain([batch]).chain(decodings).collect()
}

/// Encodes messages into one datagram.
fn encoding(name: &str, messages: Vec<Message>) -> Work {
    let mut datagram = messages::empty_datagram();
    Work {
        name: format!("encode: {name}"),
        messages: u32::try_from(messages.len()).unwrap(),
        run: Box::new(move || {
            datagram.clear();
            for message in black_box(&messages) {
                messages::append(&mut datagram, message);
            }
            black_box(&mut datagram);
        }),
    }
}

/// Counts the instructions of a process that does a work some times.
fn instructions(index: usize, times: u64) -> Result<u64, String> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(env::current_exe().unwrap())
        .args([MODE, &index.to_string(), &times.to_string()])
        .output()
        .map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr);
    let collected = said.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok());
    collected.ok_or_else(|| said.into_owned())
}
