//! Runs Callgrind, and marks the code that it counts.

use std::env;
use std::process::Command;

/// Makes Callgrind count from the entry of this function to its return.
const TOGGLE_COLLECT: &str = "--toggle-collect=*counted_by_callgrind*";

/// Runs code whose instructions are counted; those outside are not.
pub fn count<T>(work: impl FnOnce() -> T) -> T {
    let (mut work, mut result) = (Some(work), None);
    counted_by_callgrind(&mut || result = work.take().map(|work| work()));
    result.unwrap_or_else(|| unreachable!("the function below calls what it is given"))
}

/// Not generic: there must be exactly one such function, under a name that Callgrind finds.
#[inline(never)]
fn counted_by_callgrind(work: &mut dyn FnMut()) {
    work();
}

/// How many instructions a process of this executable takes in [`count`].
pub(crate) fn run(arguments: &[&str]) -> Result<u64, String> {
    let executable = env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", TOGGLE_COLLECT])
        .arg(executable)
        .args(arguments)
        .output()
        .map_err(|error| format!("cannot run valgrind: {error}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    let collected = stderr.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok());
    match collected {
        Some(collected) if output.status.success() && collected > 0 => Ok(collected),
        Some(0) if output.status.success() => Err("nothing was counted: is the executable stripped?".into()),
        _ => Err(stderr.into_owned()),
    }
}
