//! Exponential backoff.

use std::time::{Duration, Instant};

/// The longest delay.
const DELAY_MAX: Duration = Duration::from_secs(60);

/// When to do something again; each delay is twice the last one.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    pub(crate) due: Instant,
    pub(crate) delay: Duration,
}

impl Backoff {
    /// Due after a first delay.
    pub(crate) fn new(delay: Duration, now: Instant) -> Self {
        Self { due: now + delay, delay }
    }

    /// Due after twice the last delay.
    pub(crate) fn next(&self, now: Instant) -> Self {
        Self::new((self.delay * 2).min(DELAY_MAX), now)
    }
}
