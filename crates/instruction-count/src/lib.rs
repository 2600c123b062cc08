//! Counts the instructions that works take, as Valgrind's Callgrind does, and holds the counts against those in a file:
//! a guard against growing slower. Unlike a time, a count is the same however busy the machine is.
//!
//! ```console
//! $ cargo bench -p reconciler --bench instructions              # shows
//! $ cargo bench -p reconciler --bench instructions -- --check   # fails where a count is too high
//! $ cargo bench -p reconciler --bench instructions -- --record  # writes the file anew
//! ```
//!
//! Each work is done by a process of its own, of which Callgrind counts nothing but what goes through [`count`]. What comes
//! before, such as the making of 10,000 Services, makes the count no larger and no less exact. Gungraun, which knows
//! more, would take a runner of the very same version and a dozen packages.
//!
//! # How exact counts are
//! One executable gives one count for what neither hashes nor allocates. The seeds of `HashMap` are random, and so are the
//! places of its entries; a work that goes over a hundred of them stays within half a percent of itself. Callgrind
//! shows the program a processor much like the one there is, and the C library copies and compares memory as that one
//! does best: with what it does without AVX2, works of the reconciler took from 5 % less to 8 % more. A tolerance of
//! ten percent is above all that. Another compiler may be better or worse by more: the file says which one its counts are
//! of. Another architecture has other instructions, and nothing is held against the file there.

mod callgrind;
mod stored;

use std::env;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

pub use callgrind::count;
use stored::Stored;

/// The first argument of a process that is counted.
const WORK: &str = "--work";

/// By how many percent a count may differ from its stored figure.
const TOLERANCE: u64 = 10;
/// By how many percent a work may differ from the same work among fewer things.
const GROWTH: u64 = 20;

/// What is measured.
pub struct Work {
    name: String,
    /// How often what is counted is done: the figure is what it takes once.
    times: u64,
    run: Box<dyn FnOnce()>,
}

impl Work {
    /// A work that does so many times within [`count`] what it is to measure.
    pub fn new(name: impl Into<String>, times: u64, run: impl FnOnce() + 'static) -> Self {
        Self { name: name.into(), times, run: Box::new(run) }
    }
}

/// The works of a benchmark, and what is said of their counts.
pub struct Suite {
    /// The works. Names contain no ` = `.
    pub works: Vec<Work>,
    /// The file with their counts.
    pub file: PathBuf,
    /// Pairs of names: the first work among few things, and the second among many, which is to take no more.
    pub steady: Vec<(String, String)>,
}

/// What was asked for.
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
            && first == WORK
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
            let count = callgrind::run(&[WORK, &index.to_string()])? / work.times;
            let before = stored.count(&work.name).map_or_else(String::new, |count| count.to_string());
            println!("| {} | {count} | {before} |", work.name);
            counts.push((work.name.clone(), count));
        }
        let mut faults = grown(&counts, &self.steady);
        match mode {
            Mode::Show => return Ok(()),
            Mode::Record => Stored::of_here(counts).write(&self.file)?,
            Mode::Check => {
                if stored.is_of_this_architecture() {
                    let verdict = Verdict::of(&counts, &stored);
                    faults.extend(verdict.faults);
                    if !verdict.better.is_empty() {
                        let better = verdict.better.join("\n");
                        println!("Fewer than stored, so store these with `-- --record`:\n{better}");
                    }
                } else {
                    println!("NOT checked against {}: it is of another architecture", self.file.display());
                }
            }
        }
        if faults.is_empty() {
            return Ok(());
        }
        let mut said = faults.join("\n");
        if mode == Mode::Check {
            let _ = write!(
                said,
                "\nStored counts are of {}; these are of {}.\nIf it is to be so, say why in the commit that stores it: \
                 `-- --record` in the place of `-- --check`.",
                stored.toolchain(),
                stored::toolchain()
            );
        }
        Err(said)
    }
}

/// What a check finds.
#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    faults: Vec<String>,
    /// What has become so much faster that the stored count guards nothing any more.
    better: Vec<String>,
}

impl Verdict {
    fn of(counts: &[(String, u64)], stored: &Stored) -> Self {
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

/// The pairs of which the second takes more or less than the first.
fn grown(counts: &[(String, u64)], steady: &[(String, String)]) -> Vec<String> {
    let count = |wanted: &String| counts.iter().find(|(name, _)| name == wanted).map(|(_, count)| *count);
    let compare = |(few, many): &(String, String)| match (count(few), count(many)) {
        (Some(first), Some(second)) if first.abs_diff(second) * 100 <= first * GROWTH => None,
        (Some(first), Some(second)) => {
            Some(format!("{many}: {second} instructions, and {few}: {first}; they are to be the same"))
        }
        _ => Some(format!("{few} and {many} are to be the same, and are not both measured")),
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
            let verdict = Verdict::of(&counts(&[("a", count)]), &stored);
            assert_eq!((verdict.faults.len(), verdict.better.len()), (faults, better), "{count}");
        }
    }

    #[test]
    fn missing_and_stale_entries_are_faults() {
        let stored = Stored::of_here(counts(&[("a", 1), ("gone", 1)]));
        let verdict = Verdict::of(&counts(&[("a", 1), ("new", 1)]), &stored);
        assert_eq!(verdict.faults, ["new: 1 instructions, and no stored count", "gone: stored, and not measured"]);
    }

    #[test]
    fn a_steady_pair_may_differ_by_a_fifth() {
        let steady = [("few".to_owned(), "many".to_owned())];
        for (many, faults) in [(121, 1), (120, 0), (80, 0), (79, 1)] {
            assert_eq!(grown(&counts(&[("few", 100), ("many", many)]), &steady).len(), faults, "{many}");
        }
        assert_eq!(grown(&counts(&[("few", 100)]), &steady).len(), 1);
    }
}
