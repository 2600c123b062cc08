//! Fault injection, for tests of what a killed process leaves behind and of how a program handles errors of the kernel.
//!
//! - `NETLINK_KILL_AT=12-before` and `12-after` kill the process before or after its twelfth `send`, counted over
//!   all sockets, without any cleanup.
//! - `NETLINK_REFUSE=5:12:/path` refuses every fifth request with the errno 12, without sending it, while the file
//!   `/path` exists. A transaction counts as one request.
//! - `NETLINK_FAIL=5:105:/path` fails every fifth `send` with the errno 105, as on a closed socket, while the file
//!   exists.

use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Signal, getpid, kill_process};

use crate::error::Refusal;

/// The number of `send`s that have begun.
static SENDS_STARTED: AtomicU64 = AtomicU64::new(0);

/// Called before each `send`; returns its number.
pub(crate) fn begin() -> io::Result<u64> {
    static FAIL: OnceLock<Option<Errors>> = OnceLock::new();
    if let Some(errno) = FAIL.get_or_init(|| Errors::from_env("NETLINK_FAIL")).as_ref().and_then(Errors::next) {
        return Err(io::Error::from_raw_os_error(errno));
    }
    let number = SENDS_STARTED.fetch_add(1, Ordering::SeqCst) + 1;
    at(number, "before");
    Ok(number)
}

/// Called after the `send` with this number.
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

/// The refusal of the next request, if one is due.
pub(crate) fn refusal() -> Option<Refusal> {
    static REFUSE: OnceLock<Option<Errors>> = OnceLock::new();
    let errno = REFUSE.get_or_init(|| Errors::from_env("NETLINK_REFUSE")).as_ref()?.next()?;
    Some(Refusal::new(errno))
}

/// Removes the requests that are to be refused; returns them by index.
pub(crate) fn take_refused<M>(requests: impl IntoIterator<Item = M>) -> (Vec<M>, Vec<(usize, Refusal)>) {
    let (mut rest, mut refused) = (Vec::new(), Vec::new());
    for (index, request) in requests.into_iter().enumerate() {
        match refusal() {
            Some(refusal) => refused.push((index, refusal)),
            None => rest.push(request),
        }
    }
    (rest, refused)
}

/// An errno to inject at every n-th call while a file exists.
struct Errors {
    every: u64,
    errno: i32,
    enabled_by: PathBuf,
    count: AtomicU64,
}

impl Errors {
    fn from_env(variable: &str) -> Option<Self> {
        let text = std::env::var(variable).ok()?;
        let mut parts = text.splitn(3, ':');
        let (every, errno, enabled_by) =
            (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?.into());
        Some(Self { every, errno, enabled_by, count: AtomicU64::new(0) })
    }

    fn next(&self) -> Option<i32> {
        let is_due =
            self.enabled_by.exists() && (self.count.fetch_add(1, Ordering::SeqCst) + 1).is_multiple_of(self.every);
        is_due.then_some(self.errno)
    }
}
