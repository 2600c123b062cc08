//! The table of results in docs/kernels.md: a row for each kernel, kept when others are tried.

use std::fmt;

use anyhow::{Context, Result};
use lab::Kernel;

const BEGIN: &str = "<!-- cargo xtask kernels: begin -->";
const END: &str = "<!-- cargo xtask kernels: end -->";

/// What one part of the tests came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Suite {
    name: String,
    passed: u32,
    failed: u32,
    error: bool,
}

/// The results on one kernel, as a row of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    kernel: Kernel,
    /// The other cells by the heads of their columns.
    cells: Vec<(String, String)>,
    passed: bool,
}

impl Row {
    pub(super) fn new(kernel: Kernel, release: &str, boot: f32, suites: Vec<Suite>) -> Self {
        let passed = suites.iter().all(|suite| suite.failed == 0 && !suite.error);
        let mut cells = vec![("Tried".into(), release.into()), ("Boot".into(), format!("{boot:.2} s"))];
        for Suite { name, passed, failed, error } in suites {
            let result = match (failed, error) {
                (0, false) => format!("{passed} passed"),
                (_, false) => format!("{passed} passed, **{failed} failed**"),
                (_, true) => format!("{passed} passed, **stopped**"),
            };
            cells.push((name, result));
        }
        Self { kernel, cells, passed }
    }

    /// The row of a kernel that could not even be tried.
    pub(super) fn failed(kernel: Kernel, error: &anyhow::Error) -> Self {
        Self { kernel, cells: vec![("Tried".into(), error.to_string())], passed: false }
    }

    pub(super) fn passed(&self) -> bool {
        self.passed
    }
}

/// All rows, in the order of releases.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    columns: Vec<String>,
    rows: Vec<Row>,
}

impl Table {
    /// The table that a page has now.
    pub(super) fn of_page(page: &str) -> Result<Self> {
        let mut lines = between(page)?.1.lines().filter(|line| line.starts_with('|')).map(cells);
        let columns: Vec<String> = lines.next().unwrap_or_default().into_iter().skip(1).collect();
        let mut rows = Vec::new();
        for line in lines.skip(1) {
            let (kernel, rest) = line.split_first().context("a row without cells")?;
            let kernel = kernel.parse().with_context(|| format!("cannot understand the row {kernel}"))?;
            let named = columns.iter().cloned().zip(rest.iter().cloned());
            rows.push(Row { kernel, cells: named.filter(|(_, cell)| cell != "–").collect(), passed: true });
        }
        Ok(Self { columns, rows })
    }

    /// Puts a row in the place of an earlier one.
    pub(super) fn put(&mut self, row: Row) {
        for (column, _) in &row.cells {
            if !self.columns.contains(column) {
                self.columns.push(column.clone());
            }
        }
        self.rows.retain(|old| old.kernel != row.kernel);
        self.rows.push(row);
        self.rows.sort_by_key(|row| row.kernel);
    }

    /// The page with this table.
    pub(super) fn into_page(self, page: &str) -> Result<String> {
        let (before, _, after) = between(page)?;
        Ok(format!("{before}{BEGIN}\n{self}{END}{after}"))
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| Linux | {} |", self.columns.join(" | "))?;
        writeln!(f, "|---{}|", "|---".repeat(self.columns.len()))?;
        for row in &self.rows {
            let cell =
                |column: &String| row.cells.iter().find(|(name, _)| name == column).map_or("–", |(_, text)| text);
            let cells: Vec<&str> = self.columns.iter().map(cell).collect();
            writeln!(f, "| {} | {} |", row.kernel, cells.join(" | "))?;
        }
        Ok(())
    }
}

/// What is before, between and after the marks.
fn between(page: &str) -> Result<(&str, &str, &str)> {
    let parts = page.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?)));
    let (before, (table, after)) = parts.with_context(|| format!("docs/kernels.md lacks `{BEGIN}` or `{END}`"))?;
    Ok((before, table, after))
}

fn cells(line: &str) -> Vec<String> {
    line.trim().trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()
}

/// Understands the last line of `cargo xtask test`: `passed: NAME: 3 passed, 0 failed (1.0 s); NAME: …`.
pub(super) fn parse_summary(line: &str) -> Option<Vec<Suite>> {
    let parts = line.strip_prefix("passed: ").or_else(|| line.strip_prefix("FAILED: "))?;
    parts.split("; ").map(parse_part).collect()
}

fn parse_part(part: &str) -> Option<Suite> {
    let (name, result) = part.rsplit_once(": ")?;
    let number = |word: &str| result.split(word).next()?.rsplit(' ').next()?.parse().ok();
    let error = result.contains("stopped by an error");
    Some(Suite { name: name.to_owned(), passed: number(" passed")?, failed: number(" failed")?, error })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUMMARY: &str = "FAILED: tests in the lab: 213 passed, 2 failed (10.4 s); data plane, VIPs by routes: 0 \
                           passed, 0 failed, stopped by an error (1.0 s)";

    fn page(table: &str) -> String {
        format!("# Kernels\n{BEGIN}\n{table}{END}\nmore\n")
    }

    #[test]
    fn the_summary_of_the_tests_is_understood() {
        let suites = parse_summary(SUMMARY).unwrap();
        let suite = |name: &str, passed, failed, error| Suite { name: name.into(), passed, failed, error };
        let expected = [suite("tests in the lab", 213, 2, false), suite("data plane, VIPs by routes", 0, 0, true)];
        assert_eq!(suites, expected);
        assert_eq!(parse_summary("passed tests"), None);
        assert_eq!(parse_summary("passed: nothing"), None);
    }

    #[test]
    fn a_new_row_replaces_that_of_its_release_and_leaves_the_others() {
        let old = "| Linux | Tried | Boot | tests in the lab |\n|---|---|---|---|\n| 5.10 | 5.10.9 | 0.30 s | 7 passed |\n\
                   | 6.12 | 6.12.1 | 0.50 s | 213 passed |\n";
        let mut table = Table::of_page(&page(old)).unwrap();
        assert_eq!(table.to_string(), old);
        table.put(Row::new("6.12".parse().unwrap(), "6.12.2", 0.4, parse_summary(SUMMARY).unwrap()));
        table.put(Row::failed("7.2".parse().unwrap(), &anyhow::anyhow!("no kernel")));
        let new = "| Linux | Tried | Boot | tests in the lab | data plane, VIPs by routes |\n|---|---|---|---|---|\n\
                   | 5.10 | 5.10.9 | 0.30 s | 7 passed | – |\n\
                   | 6.12 | 6.12.2 | 0.40 s | 213 passed, **2 failed** | 0 passed, **stopped** |\n\
                   | 7.2 | no kernel | – | – | – |\n";
        assert_eq!(table.into_page(&page(old)).unwrap(), page(new));
    }

    #[test]
    fn the_page_has_a_table_that_is_understood() {
        let page = include_str!("../../../../docs/kernels.md");
        assert_eq!(Table::of_page(page).unwrap().into_page(page).unwrap(), page);
    }
}
