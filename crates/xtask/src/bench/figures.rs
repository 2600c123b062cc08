//! What was measured.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::load::Size;

/// What a value counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Unit {
    Seconds,
    Bytes,
    Count,
    /// Hundredths of something.
    Percent,
    /// So many times something else.
    Times,
}

/// One figure.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Figure {
    /// As in `cold start/total`.
    pub(crate) name: String,
    #[serde(flatten)]
    pub(crate) size: Size,
    pub(crate) value: f64,
    pub(crate) unit: Unit,
    /// What the kernel itself needs for the same.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) floor: Option<f64>,
}

/// The figures of one size.
#[derive(Debug)]
pub(crate) struct Figures {
    size: Size,
    pub(crate) all: Vec<Figure>,
}

impl Figures {
    pub(crate) fn new(size: Size) -> Self {
        Self { size, all: Vec::new() }
    }

    fn add(&mut self, name: &str, value: f64, unit: Unit) {
        let figure = Figure { name: name.to_owned(), size: self.size, value, unit, floor: None };
        println!("{:>16}  {figure}", self.size.to_string());
        self.all.push(figure);
    }

    pub(crate) fn time(&mut self, name: &str, value: Duration) {
        self.add(name, value.as_secs_f64(), Unit::Seconds);
    }

    pub(crate) fn seconds(&mut self, name: &str, value: f64) {
        self.add(name, value, Unit::Seconds);
    }

    #[expect(clippy::cast_precision_loss, reason = "nothing here is counted to 2^53")]
    pub(crate) fn bytes(&mut self, name: &str, value: u64) {
        self.add(name, value as f64, Unit::Bytes);
    }

    #[expect(clippy::cast_precision_loss, reason = "nothing here is counted to 2^53")]
    pub(crate) fn count(&mut self, name: &str, value: usize) {
        self.add(name, value as f64, Unit::Count);
    }

    /// A count that is an average.
    pub(crate) fn average(&mut self, name: &str, value: f64) {
        self.add(name, value, Unit::Count);
    }

    pub(crate) fn percent(&mut self, name: &str, value: f64) {
        self.add(name, value, Unit::Percent);
    }

    /// p50, p99 and the worst of some times.
    pub(crate) fn spread(&mut self, name: &str, mut times: Vec<Duration>) {
        times.sort_unstable();
        let at = |permille: usize| times.get((times.len() * permille / 1000).min(times.len().saturating_sub(1)));
        for (what, time) in [("p50", at(500)), ("p99", at(990)), ("max", times.last())] {
            if let Some(time) = time {
                self.time(&format!("{name}/{what}"), *time);
            }
        }
    }

    /// Says of a figure what the kernel itself needs.
    pub(crate) fn floor(&mut self, name: &str, floor: Duration) {
        let floor = floor.as_secs_f64();
        if let Some(figure) = self.all.iter_mut().find(|figure| figure.name == name) {
            figure.floor = Some(floor);
            println!("{:>16}  {figure}", self.size.to_string());
        }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<44} {:>12}", self.name, show(self.value, self.unit))?;
        if let Some(floor) = self.floor {
            write!(f, "  floor {:>10}  ({:.2} x)", show(floor, self.unit), self.value / floor)?;
        }
        Ok(())
    }
}

/// A value with its unit, for people.
pub(crate) fn show(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Seconds if value == 0.0 => "0".to_owned(),
        Unit::Seconds if value < 1e-3 => format!("{:.0} µs", value * 1e6),
        Unit::Seconds if value < 0.1 => format!("{:.2} ms", value * 1e3),
        Unit::Seconds if value < 1.0 => format!("{:.0} ms", value * 1e3),
        Unit::Seconds => format!("{value:.2} s"),
        Unit::Bytes if value < 10_000.0 => format!("{value:.0} B"),
        Unit::Bytes if value < 1024.0 * 1024.0 => format!("{:.1} KiB", value / 1024.0),
        Unit::Bytes => format!("{:.1} MiB", value / 1024.0 / 1024.0),
        Unit::Percent => format!("{value:.2} %"),
        Unit::Times => format!("{value:.2} x"),
        Unit::Count if value.fract() == 0.0 && value < 1e15 => super::load::grouped(whole(value)),
        Unit::Count => format!("{value:.2}"),
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
fn whole(value: f64) -> usize {
    value as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_shown_in_the_unit_that_fits() {
        for (value, unit, shown) in [
            (0.000_25, Unit::Seconds, "250 µs"),
            (0.0125, Unit::Seconds, "12.50 ms"),
            (2.0, Unit::Seconds, "2.00 s"),
            (48.0 * 1024.0 * 1024.0, Unit::Bytes, "48.0 MiB"),
            (1234.0, Unit::Count, "1,234"),
            (1.5, Unit::Count, "1.50"),
        ] {
            assert_eq!(show(value, unit), shown);
        }
    }
}
