//! Panics as errors: what is done for one object, one file or one request is guarded, so that a defect of this program or
//! of a library that one of them meets harms no other.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A panic that was caught, with its message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Panic(String);

impl Panic {
    /// From what `catch_unwind` or a task that has ended returns.
    pub fn from_payload(payload: &(dyn Any + Send)) -> Self {
        let text =
            payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        Self(text.unwrap_or("no message").to_owned())
    }
}

impl fmt::Display for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "internal error: {}; please report it", self.0)
    }
}

/// Runs a function and returns its panic as an error. What the function changes must be usable after a panic in it.
pub fn caught<T>(function: impl FnOnce() -> T) -> Result<T, Panic> {
    catch_unwind(AssertUnwindSafe(function)).map_err(|payload| Panic::from_payload(&*payload))
}

/// Does nothing.
#[cfg(not(feature = "fault-points"))]
pub fn point(_: &str, _: &dyn fmt::Display) {}

/// For tests of what a panic harms.
///
/// # Panics
/// If the file that the environment variable `PANIC_AT` names has a line `PLACE SUBJECT`.
#[cfg(feature = "fault-points")]
pub fn point(place: &str, subject: &dyn fmt::Display) {
    static FILE: std::sync::OnceLock<Option<std::ffi::OsString>> = std::sync::OnceLock::new();
    let Some(file) = FILE.get_or_init(|| std::env::var_os("PANIC_AT")) else { return };
    let line = format!("{place} {subject}");
    let is_named = std::fs::read_to_string(file).is_ok_and(|lines| lines.lines().any(|it| it == line));
    assert!(!is_named, "at the fault point {line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_with_its_message() {
        assert_eq!(caught(|| 1), Ok(1));
        assert_eq!(caught(|| panic!("plain")), Err::<(), _>(Panic("plain".to_owned())));
        let number = std::hint::black_box(7);
        let error = caught(|| panic!("formatted {number}")).map(|(): ()| ()).unwrap_err();
        assert_eq!(error.to_string(), "internal error: formatted 7; please report it");
        assert_eq!(caught(|| std::panic::panic_any(7_u8)), Err::<(), _>(Panic("no message".to_owned())));
    }
}
