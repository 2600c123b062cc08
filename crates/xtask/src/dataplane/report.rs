//! What people and programs are told of the results.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use serde::Serialize;

use super::deviations;
use super::results::{Played, Verdict};

/// What `--json` writes.
#[derive(Serialize)]
pub(crate) struct Report<'a> {
    cells: usize,
    passed: usize,
    deviations: Vec<String>,
    failed: Vec<Failure<'a>>,
}

#[derive(Serialize)]
struct Failure<'a> {
    cell: String,
    expected: &'a str,
    got: &'a str,
}

fn full_name(played: &Played) -> String {
    format!("{}: {}", played.file, played.name)
}

impl<'a> Report<'a> {
    pub(crate) fn new(results: &'a [Played]) -> Self {
        let deviations = results.iter().filter(|played| matches!(played.verdict, Verdict::OnPurpose { .. }));
        let failed = results.iter().filter(|played| !played.passed());
        let failed = failed.map(|p| Failure { cell: full_name(p), expected: &p.expected, got: &p.got });
        Self {
            cells: results.len(),
            passed: results.iter().filter(|played| played.passed()).count(),
            deviations: deviations.map(full_name).collect(),
            failed: failed.collect(),
        }
    }
}

/// Everything that people are told.
pub(crate) fn text(results: &[Played]) -> String {
    let mut text = pictures(results);
    let report = Report::new(results);
    text += &differences(results);
    let not_compared: BTreeSet<&str> = results.iter().flat_map(|p| &p.not_compared).map(String::as_str).collect();
    if !not_compared.is_empty() {
        let keys = not_compared.into_iter().collect::<Vec<_>>().join(", ");
        let _ = writeln!(text, "keys of the recordings that were not compared: {keys}");
    }
    let mut rules: BTreeMap<&str, usize> = BTreeMap::new();
    let mut unlike: BTreeMap<&str, usize> = BTreeMap::new();
    for played in results {
        match &played.verdict {
            Verdict::OnPurpose { rule } => *rules.entry(rule).or_default() += 1,
            Verdict::AsRecorded { unlike: Some(rule) } => *unlike.entry(rule).or_default() += 1,
            _ => {}
        }
    }
    for (rule, count) in rules {
        let _ = writeln!(text, "deviates on purpose: {count} cells ({rule}; see docs/deviations.md)");
    }
    for (rule, count) in unlike {
        let _ = writeln!(text, "as recorded, although {rule} wants better: {count} cells");
    }
    let _ = writeln!(
        text,
        "dataplane: {} cells, {} passed ({} of them deviate on purpose), {} failed",
        report.cells,
        report.passed,
        report.deviations.len(),
        report.failed.len()
    );
    text
}

/// A line for each cell that differs.
fn differences(results: &[Played]) -> String {
    let failed: Vec<&Played> = results.iter().filter(|played| !played.passed()).collect();
    let width = |text: fn(&Played) -> &str| failed.iter().map(|played| text(played).chars().count()).max().unwrap_or(0);
    let (names, expected) = (width(|p| &p.name).min(80), width(|p| &p.expected).min(70));
    let mut lines = String::new();
    for file in files(&failed) {
        let _ = writeln!(lines, "\nDIFFERENT in {file}:");
        for played in failed.iter().filter(|played| played.file == file) {
            let Played { name, expected: wanted, got, .. } = played;
            let _ = writeln!(lines, "  {name:names$}  expected {wanted:expected$}  got {got}");
        }
    }
    if !lines.is_empty() {
        lines.push('\n');
    }
    lines
}

/// The outcomes of each file: a row for each front end, a column for each client, a sign for each family and protocol.
fn pictures(results: &[Played]) -> String {
    let all: Vec<&Played> = results.iter().collect();
    files(&all).into_iter().map(|file| picture(file, &all)).collect()
}

fn picture(file: &str, all: &[&Played]) -> String {
    let cells: Vec<&Played> = all.iter().copied().filter(|played| played.file == file).collect();
    let columns = in_order(cells.iter().map(|played| played.column.as_str()));
    let rows = in_order(cells.iter().map(|played| &played.row));
    let within = in_order(cells.iter().map(|played| played.within.as_str()));
    let in_cell = |row: &[String; 2], column: &str| -> String {
        let here = |within: &str| {
            let here = cells.iter().filter(move |p| p.row == *row && p.column == column && p.within == within);
            let signs: String = here.map(|played| sign(played)).collect();
            if signs.is_empty() { "·".to_owned() } else { signs }
        };
        let parts: Vec<String> = within.iter().map(|within| here(within)).collect();
        let is_narrow = parts.iter().all(|part| part.chars().count() == 1);
        parts.join(if is_narrow { "" } else { " " })
    };
    let table: Vec<Vec<String>> = rows
        .iter()
        .enumerate()
        .map(|(index, row)| {
            let is_same = index > 0 && rows[index - 1][0] == row[0];
            let first = if is_same { String::new() } else { row[0].clone() };
            [first, row[1].clone()].into_iter().chain(columns.iter().map(|column| in_cell(row, column))).collect()
        })
        .collect();
    let header: Vec<String> = [file, ""].into_iter().chain(columns.iter().copied()).map(str::to_owned).collect();
    let width = |column: usize| {
        let cells = table.iter().chain([&header]).map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut text = String::from("\n");
    for row in std::iter::once(&header).chain(&table) {
        let padded = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        let _ = writeln!(text, "{}", padded.collect::<Vec<_>>().join("  ").trim_end());
    }
    let legend = SIGNS.iter().filter(|(sign, _)| cells.iter().any(|played| self::sign(played) == *sign));
    let legend: Vec<String> = legend.map(|(sign, meaning)| format!("{sign} {meaning}")).collect();
    let _ = writeln!(text, "each cell: {}; {}", within.join(", "), legend.join("  "));
    text
}

const SIGNS: [(char, &str); 10] = [
    ('✓', "as recorded"),
    ('●', "connected"),
    ('×', "refused"),
    ('~', "timeout"),
    ('p', "not permitted"),
    ('u', "unreachable"),
    ('◐', "depends on the backend"),
    ('?', "other"),
    ('d', "on purpose not as recorded"),
    ('!', "DIFFERENT"),
];

fn sign(played: &Played) -> char {
    match played.verdict {
        Verdict::Differs => '!',
        Verdict::OnPurpose { .. } => 'd',
        Verdict::AsRecorded { .. } => played.symbol,
    }
}

fn files<'a>(results: &[&'a Played]) -> Vec<&'a str> {
    in_order(results.iter().map(|played| played.file.as_str()))
}

/// Each once, as they first come.
fn in_order<T: PartialEq>(items: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for item in items {
        if !found.contains(&item) {
            found.push(item);
        }
    }
    found
}

/// What a run of this repository's recordings must not have: rules that the document does not explain, and cells that
/// are no better than recorded although a rule says so.
pub(crate) fn faults(results: &[Played]) -> BTreeSet<String> {
    let fault = |played: &Played| match &played.verdict {
        Verdict::AsRecorded { unlike: Some(rule) } => Some(format!("{} is not as {rule} wants it", played.name)),
        Verdict::OnPurpose { rule } => {
            let service = played.service.as_deref().unwrap_or_default();
            let fault = || format!("docs/deviations.md does not name {service} under {rule}");
            (!deviations::is_named(rule, service)).then(fault)
        }
        _ => None,
    };
    results.iter().filter_map(fault).collect()
}
