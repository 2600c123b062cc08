//! Callgrind: what it counts, and how it is asked.

use std::env;
use std::process::Command;

/// Callgrind counts from when the function is entered until it returns, and that there is one such function of this name.
const COUNTED: &str = "--toggle-collect=*counted_by_callgrind*";

/// Does what is to be counted. What is around it is not.
pub fn count<T>(work: impl FnOnce() -> T) -> T {
    let (mut work, mut result) = (Some(work), None);
    counted_by_callgrind(&mut || result = work.take().map(|work| work()));
    result.unwrap_or_else(|| unreachable!("the function below calls what it is given"))
}

/// Not generic, since there must be one of it, under a name that Callgrind finds.
#[inline(never)]
fn counted_by_callgrind(work: &mut dyn FnMut()) {
    work();
}

/// How many instructions a process of this executable takes in [`count`].
pub(crate) fn run(arguments: &[&str]) -> Result<u64, String> {
    let executable = env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", COUNTED])
        .arg(executable)
        .args(arguments)
        .output()
        .map_err(|error| format!("cannot run valgrind: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let collected = said.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok());
    match collected {
        Some(collected) if output.status.success() && collected > 0 => Ok(collected),
        Some(0) if output.status.success() => Err("nothing was counted: is the executable stripped?".into()),
        _ => Err(said.into_owned()),
    }
}
