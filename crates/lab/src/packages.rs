//! The packages of Debian and its relatives: which are installed, which could be, and installing them.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::{Context, Error, Result};
use crate::progress::Progress;

/// Installs those of the packages that are not installed; when only root can, says with which command.
pub(crate) fn ensure(packages: &[&str]) -> Result<()> {
    let mut arguments = vec!["-W", "-f=${db:Status-Abbrev}${Package}\n"];
    arguments.extend(packages);
    let listing = query("dpkg-query", arguments);
    let missing_ones: Vec<&str> =
        packages.iter().copied().filter(|name| !listing.lines().any(|line| is_installed(line, name))).collect();
    if missing_ones.is_empty() {
        return Ok(());
    }
    if !is_root() {
        return Err(missing(&missing_ones));
    }
    if missing_ones.iter().any(|name| candidate(name).is_none()) {
        update()?;
    }
    let progress = Progress::start(format_args!("installing {}", missing_ones.join(" ")));
    apt(["install", "--yes", "--no-install-recommends"].iter().chain(&missing_ones))?;
    progress.done();
    Ok(())
}

/// Makes sure that each program is there, by installing the package that has it.
pub(crate) fn ensure_programs(programs: &[(&str, &str)]) -> Result<()> {
    const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    let packages: Vec<&str> = programs
        .iter()
        .filter(|(program, _)| !DIRECTORIES.iter().any(|dir| Path::new(dir).join(program).exists()))
        .map(|(_, package)| *package)
        .collect();
    if packages.is_empty() { Ok(()) } else { ensure(&packages) }
}

fn is_installed(line: &str, name: &str) -> bool {
    line.strip_prefix("ii").is_some_and(|rest| rest.trim_start() == name)
}

/// The version that apt would install.
fn candidate(package: &str) -> Option<String> {
    parse_candidate(&query("apt-cache", ["policy", package]))
}

pub(crate) fn parse_candidate(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (version != "(none)").then(|| version.to_owned())
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn missing(packages: &[&str]) -> Error {
    let command = format!("sudo apt-get install --no-install-recommends {}", packages.join(" "));
    Error::Packages { command }
}

pub(crate) fn update() -> Result<()> {
    let progress = Progress::start("updating apt's list of packages");
    apt(["update"])?;
    progress.done();
    Ok(())
}

fn apt<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.arg("--quiet").args(arguments).env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
    checked(&mut command).map(drop)
}

/// What a program that only looks things up says; nothing if it fails, which for these means not found.
pub(crate) fn query<S: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>) -> String {
    let output = Command::new(program).args(arguments).env("LC_ALL", "C").stdin(Stdio::null()).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

/// Runs a command to its end; its output, or an error with what it complained about.
pub(crate) fn checked(command: &mut Command) -> Result<String> {
    let line = describe(command);
    let output = command.stdin(Stdio::null()).output().context("run", &line)?;
    if !output.status.success() {
        return Err(Error::Command {
            command: line,
            status: output.status.to_string(),
            stderr: String::from_utf8_lossy(&output.stderr).trim_end().to_owned(),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The command line as one would type it.
pub(crate) fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_that_were_removed_do_not_count() {
        assert!(is_installed("ii make", "make"));
        assert!(!is_installed("un make", "make"));
        assert!(!is_installed("ii makefs", "make"));
    }

    #[test]
    fn apt_says_what_it_would_install() {
        assert_eq!(
            parse_candidate("linux-source-6.12:\n  Installed: (none)\n  Candidate: 6.12.9-1\n"),
            Some("6.12.9-1".into())
        );
        assert_eq!(parse_candidate("x:\n  Installed: (none)\n  Candidate: (none)\n"), None);
        assert_eq!(parse_candidate(""), None);
    }
}
