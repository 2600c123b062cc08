//! Values as Go's flag library reads them: durations, truth values, and names with underscores.

use std::time::Duration;

/// Reads a duration such as `1h30m`, `90500ms` or `0`, as Go's `time.ParseDuration`. Negative ones are refused: no flag
/// has a use for them.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let invalid = || format!("{text:?} is no duration: write it as in 30s, 1m30s or 500ms");
    let unsigned = text.strip_prefix('+').unwrap_or(text);
    if unsigned == "0" {
        return Ok(Duration::ZERO);
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
        // Digits beyond a billionth of an hour are below a nanosecond.
        let fraction = &fraction[..fraction.len().min(18)];
        let scale = 10_u128.pow(u32::try_from(fraction.len()).unwrap_or_default());
        nanoseconds += digits(fraction).ok_or_else(invalid)? * unit / scale;
        rest = after;
    }
    // Go's limit is that of a signed 64-bit number of nanoseconds, about 292 years.
    let nanoseconds = i64::try_from(nanoseconds).map_err(|_| format!("{text:?} is too long a duration"))?;
    Ok(Duration::from_nanos(nanoseconds.unsigned_abs()))
}

/// Reads a truth value as Go's `strconv.ParseBool`.
pub(crate) fn boolean(text: &str) -> Result<bool, String> {
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
    fn durations_read_as_in_go() {
        for (text, milliseconds) in [
            ("0", 0),
            ("0s", 0),
            ("30s", 30_000),
            ("1h2m3.5s", 3_723_500),
            ("90500ms", 90_500),
            (".5s", 500),
            ("1.s", 1_000),
            ("+2m", 120_000),
            ("1000000us", 1_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in ["", "5", "s", ".s", "5x", "-3s", "1 s", "1..2s", "9999999h", "1s2", "99999999999999999999s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn truth_values_read_as_in_go() {
        assert_eq!(boolean("T"), Ok(true));
        assert_eq!(boolean("0"), Ok(false));
        assert!(boolean("yes").is_err());
    }
}
