//! When to do something again.

use std::time::{Duration, Instant};

/// The longest wait between two tries, and between two looks.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Something to be done again, each time after twice the wait.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    pub(crate) due: Instant,
    pub(crate) wait: Duration,
}

impl Backoff {
    pub(crate) fn after(wait: Duration, now: Instant) -> Self {
        Self { due: now + wait, wait }
    }

    pub(crate) fn longer(&self, now: Instant) -> Self {
        Self::after((self.wait * 2).min(WAIT_MAX), now)
    }
}
