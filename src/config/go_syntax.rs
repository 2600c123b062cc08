//! Go's syntax of durations (`1m30s`) and booleans, which kube-proxy's flags and configuration file have.

use std::fmt::{self, Write as _};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Go's `time.Duration`: a signed number of nanoseconds, at most some 292 years.
///
/// It is written as Go writes it: `30s`, `15m0s`, `1.5s`, `100ms`, `0s`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Duration(i64);

impl Duration {
    pub(crate) const ZERO: Self = Self(0);

    pub(crate) const fn from_secs(seconds: i64) -> Self {
        Self(seconds * 1_000_000_000)
    }

    pub(crate) const fn from_nanos(nanoseconds: i64) -> Self {
        Self(nanoseconds)
    }

    pub(crate) fn as_nanos(self) -> i64 {
        self.0
    }

    pub(crate) fn is_negative(self) -> bool {
        self.0 < 0
    }

    /// The same duration; a negative one becomes 0.
    pub(crate) fn to_std(self) -> std::time::Duration {
        std::time::Duration::from_nanos(u64::try_from(self.0).unwrap_or(0))
    }
}

impl FromStr for Duration {
    type Err = String;

    /// Parses what `time.ParseDuration` accepts, such as `1h30m`, `90500ms` or `0`.
    fn from_str(text: &str) -> Result<Self, String> {
        let invalid = || format!("{text:?} is not a duration: write it as in 30s, 1m30s or 500ms");
        let (is_negative, unsigned) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        if unsigned == "0" {
            return Ok(Self::ZERO);
        }
        if unsigned.is_empty() {
            return Err(invalid());
        }
        let mut nanoseconds: u128 = 0;
        let mut rest = unsigned;
        while !rest.is_empty() {
            let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(invalid)?;
            let (number, after) = rest.split_at(number_end);
            let unit_end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
            let (unit, after) = after.split_at(unit_end);
            let unit: u128 = match unit {
                "ns" => 1,
                "us" | "µs" | "μs" => 1_000,
                "ms" => 1_000_000,
                "s" => 1_000_000_000,
                "m" => 60_000_000_000,
                "h" => 3_600_000_000_000,
                _ => return Err(invalid()),
            };
            let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
            if whole.len() > 18 || fraction.contains('.') || (whole.is_empty() && fraction.is_empty()) {
                return Err(invalid());
            }
            let digits = |text: &str| if text.is_empty() { Some(0) } else { text.parse::<u128>().ok() };
            nanoseconds += digits(whole).ok_or_else(invalid)? * unit;
            // More than 18 digits of a fraction of an hour are below a nanosecond.
            let fraction = &fraction[..fraction.len().min(18)];
            let scale = 10_u128.pow(u32::try_from(fraction.len()).unwrap_or_default());
            nanoseconds += digits(fraction).ok_or_else(invalid)? * unit / scale;
            rest = after;
        }
        let nanoseconds = i64::try_from(nanoseconds).map_err(|_| format!("{text:?} is too long a duration"))?;
        Ok(Self(if is_negative { -nanoseconds } else { nanoseconds }))
    }
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.0.unsigned_abs();
        if self.is_negative() {
            f.write_char('-')?;
        }
        // Below a second Go uses the largest unit that is not larger than the duration.
        let (unit, name) = match total {
            0 => return f.write_str("0s"),
            1..1_000 => (1, "ns"),
            1_000..1_000_000 => (1_000, "µs"),
            1_000_000..1_000_000_000 => (1_000_000, "ms"),
            _ => (1_000_000_000, "s"),
        };
        let (mut whole, fraction) = (total / unit, total % unit);
        if name == "s" {
            let (hours, minutes) = (whole / 3600, whole / 60 % 60);
            if hours > 0 {
                write!(f, "{hours}h")?;
            }
            if whole >= 60 {
                write!(f, "{minutes}m")?;
            }
            whole %= 60;
        }
        write!(f, "{whole}")?;
        if fraction > 0 {
            let digits = format!("{:0width$}", fraction, width = unit.ilog10() as usize);
            write!(f, ".{}", digits.trim_end_matches('0'))?;
        }
        f.write_str(name)
    }
}

impl Serialize for Duration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Parses a boolean as Go's `strconv.ParseBool`.
pub(crate) fn parse_bool(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("{text:?} is neither true nor false")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_parse_as_in_go() {
        for (text, milliseconds) in [
            ("0", 0),
            ("0s", 0),
            ("30s", 30_000),
            ("1h2m3.5s", 3_723_500),
            ("90500ms", 90_500),
            (".5s", 500),
            ("1.s", 1_000),
            ("+2m", 120_000),
            ("-3s", -3_000),
            ("1000000us", 1_000),
        ] {
            assert_eq!(text.parse(), Ok(Duration(milliseconds * 1_000_000)), "{text}");
        }
        for text in ["", "5", "s", ".s", "5x", "-", "1 s", "1..2s", "9999999h", "1s2", "99999999999999999999s"] {
            assert!(text.parse::<Duration>().is_err(), "{text}");
        }
    }

    #[test]
    fn durations_are_written_as_in_go() {
        for text in [
            "0s",
            "1ns",
            "1.1µs",
            "100ms",
            "1.5s",
            "30s",
            "1m0s",
            "15m0s",
            "1h0m0s",
            "24h0m0s",
            "1h0m0.5s",
            "-2m1s",
            "2.000000001s",
        ] {
            assert_eq!(text.parse::<Duration>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn booleans_parse_as_in_go() {
        assert_eq!(parse_bool("T"), Ok(true));
        assert_eq!(parse_bool("0"), Ok(false));
        assert!(parse_bool("yes").is_err());
    }
}
