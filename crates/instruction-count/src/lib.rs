//! Counts the instructions of benchmarks with Valgrind's Callgrind and compares the counts with those in a file, to detect that code
//! has become slower. Unlike a time, a count does not depend on how busy the machine is.
//!
//! ```console
//! $ cargo bench -p reconciler --bench instructions              # shows
//! $ cargo bench -p reconciler --bench instructions -- --check   # fails where a count is too high
//! $ cargo bench -p reconciler --bench instructions -- --record  # writes the file anew
//! ```
//!
//! Each work runs in a process of its own, and Callgrind counts only what runs inside [`count`]. The preparation before that, such as
//! creating 10,000 Services, does not affect the count. The crate Gungraun can do more, but needs a runner of exactly the same
//! version and a dozen packages.
//!
//! # How exact counts are
//! Code that neither hashes nor allocates has the same count in each run of an executable. The seeds of `HashMap` are random, and so
//! is the order of its entries; a work that visits a hundred of them varies by less than half a percent. Callgrind emulates a
//! processor much like the real one, for which the C library selects its functions that copy and compare memory: without AVX2,
//! works of the reconciler took from 5 % less to 8 % more. The tolerance of ten percent covers all that. Another compiler can
//! differ by more, so the file records the compiler. On another architecture counts are not compared with the file.

mod callgrind;
mod stored;

use std::env;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

pub use callgrind::count;
use stored::Stored;

/// The first argument of a process whose instructions are counted; the second is the index of the work.
const WORK_FLAG: &str = "--work";

/// By how many percent a count may differ from the stored count.
const TOLERANCE: u64 = 10;
/// By how many percent a work may differ from the same work on fewer objects.
const GROWTH_TOLERANCE: u64 = 20;

/// What is measured.
pub struct Work {
    name: String,
    /// How often the work is repeated inside [`count`]. The result is the count of one repetition.
    times: u64,
    run: Box<dyn FnOnce()>,
}

impl Work {
    /// A work that repeats what it measures this many times inside [`count`].
    pub fn new(name: impl Into<String>, times: u64, run: impl FnOnce() + 'static) -> Self {
        Self { name: name.into(), times, run: Box::new(run) }
    }
}

/// The works of a benchmark, and what their counts are compared with.
pub struct Suite {
    /// The works. Names contain no ` = `.
    pub works: Vec<Work>,
    /// The file with their counts.
    pub file: PathBuf,
    /// Pairs of names: a work on few objects and the same work on many, which must not take more instructions.
    pub steady: Vec<(String, String)>,
}

/// What the command line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Show,
    Check,
    Record,
}

impl Suite {
    /// The `main` of a benchmark without a harness.
    pub fn main(self) -> ExitCode {
        let arguments: Vec<String> = env::args().skip(1).collect();
        if let [first, index] = &arguments[..]
            && first == WORK_FLAG
        {
            let work = index.parse().ok().and_then(|index: usize| self.works.into_iter().nth(index));
            return work.map_or(ExitCode::FAILURE, |work| {
                (work.run)();
                ExitCode::SUCCESS
            });
        }
        let has = |wanted: &str| arguments.iter().any(|argument| argument == wanted);
        let mode = match (has("--bench"), has("--check"), has("--record")) {
            // `cargo test --benches` comes without.
            (false, ..) => return ExitCode::SUCCESS,
            (true, false, false) => Mode::Show,
            (true, true, false) => Mode::Check,
            (true, _, true) => Mode::Record,
        };
        match self.measure(mode) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        }
    }

    fn measure(&self, mode: Mode) -> Result<(), String> {
        let stored = if mode == Mode::Record { Stored::default() } else { Stored::read(&self.file)? };
        let mut counts = Vec::new();
        println!("| | instructions | stored |\n|---|--:|--:|");
        for (index, work) in self.works.iter().enumerate() {
            let count = callgrind::run(&[WORK_FLAG, &index.to_string()])? / work.times;
            let before = stored.count(&work.name).map_or_else(String::new, |count| count.to_string());
            println!("| {} | {count} | {before} |", work.name);
            counts.push((work.name.clone(), count));
        }
        let mut faults = differing_pairs(&counts, &self.steady);
        match mode {
            Mode::Show => return Ok(()),
            Mode::Record => Stored::of_here(counts).write(&self.file)?,
            Mode::Check => {
                if stored.is_of_this_architecture() {
                    let result = CheckResult::new(&counts, &stored);
                    faults.extend(result.faults);
                    if !result.better.is_empty() {
                        let better = result.better.join("\n");
                        println!("Fewer than stored, so store these with `-- --record`:\n{better}");
                    }
                } else {
                    println!("NOT checked against {}: its counts are of another architecture", self.file.display());
                }
            }
        }
        if faults.is_empty() {
            return Ok(());
        }
        let mut report = faults.join("\n");
        if mode == Mode::Check {
            let _ = write!(
                report,
                "\nThe stored counts were made with {}, these with {}.\nIf the change is intended, store the new counts with \
                 `-- --record` and give the reason in the commit.",
                stored.toolchain(),
                stored::toolchain()
            );
        }
        Err(report)
    }
}

/// The result of a check.
#[derive(Debug, PartialEq, Eq)]
struct CheckResult {
    faults: Vec<String>,
    /// Works that have become so much faster that the stored count no longer detects a regression.
    better: Vec<String>,
}

impl CheckResult {
    fn new(counts: &[(String, u64)], stored: &Stored) -> Self {
        let (mut faults, mut better) = (Vec::new(), Vec::new());
        for (name, count) in counts {
            match stored.count(name) {
                None => faults.push(format!("{name}: {count} instructions, and no stored count")),
                Some(before) if count * 100 > before * (100 + TOLERANCE) => {
                    faults.push(format!("{name}: {count} instructions, {before} stored"));
                }
                Some(before) if count * 100 < before * (100 - TOLERANCE) => {
                    better.push(format!("{name}: {count} instructions, {before} stored"));
                }
                Some(_) => {}
            }
        }
        let is_gone = |name: &&str| !counts.iter().any(|(known, _)| known == name);
        faults.extend(stored.names().filter(is_gone).map(|name| format!("{name}: stored, and not measured")));
        Self { faults, better }
    }
}

/// The pairs whose counts differ.
fn differing_pairs(counts: &[(String, u64)], steady: &[(String, String)]) -> Vec<String> {
    let count = |wanted: &String| counts.iter().find(|(name, _)| name == wanted).map(|(_, count)| *count);
    let compare = |(few, many): &(String, String)| match (count(few), count(many)) {
        (Some(first), Some(second)) if first.abs_diff(second) * 100 <= first * GROWTH_TOLERANCE => None,
        (Some(first), Some(second)) => {
            Some(format!("{many}: {second} instructions, and {few}: {first}; they must be the same"))
        }
        _ => Some(format!("{few} and {many} must be the same, but are not both measured")),
    };
    steady.iter().filter_map(compare).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(counts: &[(&str, u64)]) -> Vec<(String, u64)> {
        counts.iter().map(|(name, count)| ((*name).into(), *count)).collect()
    }

    #[test]
    fn a_count_may_be_ten_percent_higher() {
        let stored = Stored::of_here(counts(&[("a", 1000)]));
        for (count, faults, better) in [(1101, 1, 0), (1100, 0, 0), (1000, 0, 0), (900, 0, 0), (899, 0, 1)] {
            let result = CheckResult::new(&counts(&[("a", count)]), &stored);
            assert_eq!((result.faults.len(), result.better.len()), (faults, better), "{count}");
        }
    }

    #[test]
    fn missing_and_stale_entries_are_faults() {
        let stored = Stored::of_here(counts(&[("a", 1), ("gone", 1)]));
        let result = CheckResult::new(&counts(&[("a", 1), ("new", 1)]), &stored);
        assert_eq!(result.faults, ["new: 1 instructions, and no stored count", "gone: stored, and not measured"]);
    }

    #[test]
    fn a_steady_pair_may_differ_by_a_fifth() {
        let steady = [("few".to_owned(), "many".to_owned())];
        for (many, faults) in [(121, 1), (120, 0), (80, 0), (79, 1)] {
            assert_eq!(differing_pairs(&counts(&[("few", 100), ("many", many)]), &steady).len(), faults, "{many}");
        }
        assert_eq!(differing_pairs(&counts(&[("few", 100)]), &steady).len(), 1);
    }
}
