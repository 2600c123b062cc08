//! The clients against a kernel, beside `ipvsadm` and the crate `nlrs`: how long they take to write and to read
//! configurations, and what it costs in system calls, bytes, CPU time and memory. One command runs it in the lab and
//! prints tables in Markdown:
//!
//! ```console
//! $ cargo bench -p ipvs-netlink --bench kernel --config 'target."cfg(all())".runner = "cargo xtask lab --time-limit 3600 --"'
//! ```
//!
//! Every work is done by a process of its own in a fresh network namespace, in which another process has made what has to be
//! there before. It takes IPVS, `ipvsadm` and `strace`, and ten minutes; less with the name of a work behind `--`: `add-few`,
//! `add`, `delete` or `list`.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on stops")]

mod counted;
#[path = "../messages/mod.rs"]
mod messages;
mod work;

use std::env;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use ipvs_netlink::Client;

use crate::counted::Counts;
use crate::work::{Size, Tool, Work};

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let [mode, work, tool, rounds] = &arguments[..]
        && mode == work::MODE
    {
        work::run(Work::of(work), Tool::of(tool), rounds.parse().unwrap());
        return ExitCode::SUCCESS;
    }
    // `cargo test --benches` comes without.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return ExitCode::SUCCESS;
    }
    if let Err(error) = Client::connect() {
        eprintln!("{error}\nRun this in the lab: the command stands at the head of benches/kernel/main.rs.");
        return ExitCode::FAILURE;
    }
    println!(
        "Linux {}. A guest exaggerates system calls and page faults: its times compare within a table alone. Counts of \
         system calls and bytes are the same everywhere. CPU time is counted in ticks of 10 ms.",
        std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim()
    );
    let is_wanted = |work: &Work| arguments.len() == 1 || arguments.iter().any(|argument| argument == work.name());
    for work in Work::ALL.into_iter().filter(is_wanted) {
        println!("\n### {}\n", work.title());
        println!("| | minimum | median | mean CPU | system calls | sent | received | peak memory |");
        println!("|---|--:|--:|--:|--:|--:|--:|--:|");
        for tool in work.tools() {
            match measure(work, *tool) {
                Ok(measured) => println!("| {} | {measured} |", tool.title()),
                Err(reason) => println!("| {} | cannot: {reason} | | | | | | |", tool.title()),
            }
        }
    }
    if is_wanted(&Work::List) {
        match nlrs_limit() {
            Some(limit) => println!("\nnlrs lists up to {limit} virtual servers."),
            None => println!("\nnlrs lists {MOST} virtual servers and perhaps more."),
        }
    }
    ExitCode::SUCCESS
}

/// So many virtual servers nlrs is asked to list where no fewer are too many.
const MOST: u32 = 1000;

/// One round of a work.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Round {
    time: Duration,
    /// User and system time: a guest does not tell them apart.
    cpu: Duration,
}

/// All rounds of a work, the fastest first.
struct Measured {
    rounds: Vec<Round>,
    peak_kib: u32,
    counts: Counts,
}

impl std::fmt::Display for Measured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let milliseconds = |time: Duration| format!("{:.2} ms", time.as_secs_f64() * 1e3);
        let count = u32::try_from(self.rounds.len()).unwrap();
        let cpu = self.rounds.iter().map(|round| round.cpu).sum::<Duration>() / count;
        let Counts { calls, sent, received } = self.counts;
        write!(
            f,
            "{} | {} | {} | {calls} | {sent} B | {received} B | {:.1} MiB",
            milliseconds(self.rounds[0].time),
            milliseconds(self.rounds[self.rounds.len() / 2].time),
            milliseconds(cpu),
            f64::from(self.peak_kib) / 1024.0,
        )
    }
}

/// Measures a work, or says why it cannot be done.
fn measure(work: Work, tool: Tool) -> Result<Measured, String> {
    let mut rounds = Vec::new();
    let mut peak_kib = 0;
    for _ in 0..work.processes(tool) {
        let report = in_fresh_namespace(work, || report_of(&mut process(work, tool, work.rounds())))?;
        rounds.extend(report.rounds);
        peak_kib = peak_kib.max(report.peak_kib);
    }
    // The first warms up.
    rounds.remove(0);
    rounds.sort();
    let counts = in_fresh_namespace(work, || counts_of(&process(work, tool, 1)))?;
    Ok(Measured { rounds, peak_kib, counts })
}

/// Runs an action on a thread in a network namespace that is ready for a work, and checks afterwards what the work has left.
fn in_fresh_namespace<T: Send>(work: Work, action: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    let result = thread::scope(|scope| {
        scope
            .spawn(|| {
                lab::netns::isolate().unwrap();
                let mut client = Client::connect().unwrap();
                work.prepare(&mut client);
                let result = action()?;
                work.check(&mut client);
                Ok(result)
            })
            .join()
            .unwrap()
    });
    // The kernel takes the namespace away with all in it, on its own time.
    thread::sleep(Duration::from_secs(1));
    result
}

fn process(work: Work, tool: Tool, rounds: usize) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args([work::MODE, work.name(), tool.name(), &rounds.to_string()]);
    command
}

/// What a process that did some rounds of a work says about it.
struct Report {
    rounds: Vec<Round>,
    peak_kib: u32,
}

fn report_of(command: &mut Command) -> Result<Report, String> {
    let output = command.stdout(Stdio::piped()).output().unwrap();
    let mut report = Report { rounds: Vec::new(), peak_kib: 0 };
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let time_of = |word: &str| Duration::from_nanos(word.parse().unwrap());
        match words[..] {
            ["round", time, cpu] => report.rounds.push(Round { time: time_of(time), cpu: time_of(cpu) }),
            ["peak", kib] => report.peak_kib = kib.parse().unwrap(),
            _ => return Err(line.strip_prefix("cannot ").unwrap_or(line).to_owned()),
        }
    }
    if output.status.success() {
        Ok(report)
    } else {
        Err(String::from_utf8_lossy(&output.stderr).lines().next_back().unwrap_or("failed without a word").to_owned())
    }
}

/// Counts what a process does between two marks: see [`work::mark`].
fn counts_of(command: &Command) -> Result<Counts, String> {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-e", "raw=all", "-e", "signal=none"]).arg(command.get_program());
    let mut child = strace
        .args(command.get_args())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("strace: {error}"))?;
    let counts = Counts::of(BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap));
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success(), "{said}");
    Ok(counts)
}

/// How many virtual servers nlrs can list; `None` where no limit was found.
fn nlrs_limit() -> Option<u32> {
    thread::spawn(|| {
        lab::netns::isolate().unwrap();
        (1..=MOST).find(|count| {
            let size = Size { virtual_servers: *count, real_servers: 0 };
            // Nothing of it stays: nlrs takes for its socket the number that another of the process would have.
            let mut client = Client::connect().unwrap();
            assert!(client.apply(&size.additions()).unwrap().last().unwrap().is_ok());
            drop(client);
            work::list_with_nlrs() != Ok(*count as usize)
        })
    })
    .join()
    .unwrap()
    .map(|first_failed| first_failed - 1)
}
