//! Faults to order, for tests of what a process leaves and what it makes of a kernel that says no.
//!
//! - `NETLINK_KILL_AT=12-before` and `12-after` kill the process before or after its twelfth `send`, on whichever socket:
//!   nothing of it is finished or put in order.
//! - `NETLINK_REFUSE=5:12:/path` has every fifth request refused with the error 12, and not done, for as long as there is that
//!   file. A transaction counts as one.
//! - `NETLINK_FAIL=5:105:/path` has every fifth `send` fail with the error 105, as where a socket is closed.

use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Signal, getpid, kill_process};

use crate::error::Refusal;

/// How many `send`s have begun.
static BEGUN: AtomicU64 = AtomicU64::new(0);

/// A `send` begins. Returns its number.
pub(crate) fn begin() -> io::Result<u64> {
    static FAIL: OnceLock<Option<Errors>> = OnceLock::new();
    if let Some(errno) = FAIL.get_or_init(|| Errors::of("NETLINK_FAIL")).as_ref().and_then(Errors::next) {
        return Err(io::Error::from_raw_os_error(errno));
    }
    let number = BEGUN.fetch_add(1, Ordering::SeqCst) + 1;
    at(number, "before");
    Ok(number)
}

/// The `send` with this number has been done.
pub(crate) fn end(number: u64) {
    at(number, "after");
}

fn at(number: u64, moment: &str) {
    static FATAL: OnceLock<Option<String>> = OnceLock::new();
    let fatal = FATAL.get_or_init(|| std::env::var("NETLINK_KILL_AT").ok());
    if fatal.as_ref().is_some_and(|fatal| *fatal == format!("{number}-{moment}")) {
        let _ = kill_process(getpid(), Signal::KILL);
    }
}

/// What the next request is refused with, if it is.
pub(crate) fn refusal() -> Option<Refusal> {
    static REFUSE: OnceLock<Option<Errors>> = OnceLock::new();
    let errno = REFUSE.get_or_init(|| Errors::of("NETLINK_REFUSE")).as_ref()?.next()?;
    Some(Refusal::new(errno))
}

/// Takes out of requests what is refused, with its place.
pub(crate) fn withhold<M>(requests: impl IntoIterator<Item = M>) -> (Vec<M>, Vec<(usize, Refusal)>) {
    let (mut rest, mut refused) = (Vec::new(), Vec::new());
    for (place, request) in requests.into_iter().enumerate() {
        match refusal() {
            Some(refusal) => refused.push((place, refusal)),
            None => rest.push(request),
        }
    }
    (rest, refused)
}

/// An error again and again.
struct Errors {
    every: u64,
    errno: i32,
    during: PathBuf,
    count: AtomicU64,
}

impl Errors {
    fn of(variable: &str) -> Option<Self> {
        let text = std::env::var(variable).ok()?;
        let mut parts = text.splitn(3, ':');
        let (every, errno, during) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?.into());
        Some(Self { every, errno, during, count: AtomicU64::new(0) })
    }

    fn next(&self) -> Option<i32> {
        let is_due = self.during.exists() && (self.count.fetch_add(1, Ordering::SeqCst) + 1).is_multiple_of(self.every);
        is_due.then_some(self.errno)
    }
}
