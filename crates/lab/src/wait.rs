//! Waiting for what somebody else does. The limits are for hangs: no machine is too slow for them.

use std::fmt::Display;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// How long something may take that is not known to make progress.
pub const LIMIT: Duration = Duration::from_secs(90);

/// Waits until a condition holds. What is waited for completes the sentence "it did not ..." in the error.
pub fn until(what: impl Display, mut holds: impl FnMut() -> bool) -> Result<()> {
    try_until(what, || Ok(holds()))
}

/// The same, with a condition that can fail: its first error ends the wait.
pub fn try_until<E: From<Error>>(what: impl Display, mut holds: impl FnMut() -> Result<bool, E>) -> Result<(), E> {
    let start = Instant::now();
    let mut pauses = Pauses::default();
    while !holds()? {
        if start.elapsed() > LIMIT {
            return Err(Error::Timeout { what: what.to_string(), limit: LIMIT }.into());
        }
        sleep(pauses.next());
    }
    Ok(())
}

/// Pauses between looks at a condition that sends no event: short ones first, so that what happens soon is seen soon, then
/// longer ones, because whoever is waited for may need this processor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pauses(Duration);

impl Default for Pauses {
    fn default() -> Self {
        Self(Duration::from_millis(2))
    }
}

impl Pauses {
    pub(crate) fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (pause * 2).min(Duration::from_millis(100));
        pause
    }
}
