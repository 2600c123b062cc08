//! Kills the process before or after a `send`, for tests of what it leaves: nothing of it is finished or put in order.
//!
//! The variable `NETLINK_KILL_AT` says when: `12-before` and `12-after` mean the twelfth `send` of the process, on whichever
//! socket.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Signal, getpid, kill_process};

const VARIABLE: &str = "NETLINK_KILL_AT";

/// How many have begun.
static BEGUN: AtomicU64 = AtomicU64::new(0);

/// A `send` begins. Returns its number.
pub(crate) fn begin() -> u64 {
    let number = BEGUN.fetch_add(1, Ordering::SeqCst) + 1;
    at(number, "before");
    number
}

/// The `send` with this number has been done.
pub(crate) fn end(number: u64) {
    at(number, "after");
}

fn at(number: u64, moment: &str) {
    static FATAL: OnceLock<Option<String>> = OnceLock::new();
    let fatal = FATAL.get_or_init(|| std::env::var(VARIABLE).ok());
    if fatal.as_ref().is_some_and(|fatal| *fatal == format!("{number}-{moment}")) {
        let _ = kill_process(getpid(), Signal::KILL);
    }
}
