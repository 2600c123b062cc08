//! The packages of Debian and its relatives: which are installed, which could be, and installing them.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Context, Error, Result};
use crate::progress::Progress;

/// The kernel version that the guest's configuration was written for.
const PREFERRED: &str = "linux-source-6.1";

/// A package with the source of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) package: String,
    pub(crate) version: String,
}

impl Source {
    /// The archive, where Debian or where Ubuntu puts it; only once the package is installed.
    pub(crate) fn archive(&self) -> Option<PathBuf> {
        let name = &self.package;
        ["xz", "bz2", "gz"]
            .iter()
            .flat_map(|end| [format!("/usr/src/{name}.tar.{end}"), format!("/usr/src/{name}/{name}.tar.{end}")])
            .map(PathBuf::from)
            .find(|path| path.is_file())
    }
}

/// The kernel source to build the guest from: an installed one, or the one that would be installed.
pub(crate) fn kernel_source() -> Result<Source> {
    if !Path::new("/usr/bin/dpkg-query").exists() {
        return Err(Error::Usage(
            "the guest's kernel is built from a package of Debian or Ubuntu, and this is neither: set \
             KUBE_IPVS_LAB_KERNEL to a User-Mode Linux built with crates/lab/guest/kernel.config"
                .into(),
        ));
    }
    let listing = query("dpkg-query", ["-W", "-f=${db:Status-Abbrev}${Package} ${Version}\n", "linux-source-*"]);
    if let Some(source) = preferred(installed_sources(&listing).into_iter().filter(|source| source.archive().is_some()))
    {
        return Ok(source);
    }
    if let Some(source) = offered_source() {
        return Ok(source);
    }
    if !is_root() {
        return Err(missing(&[PREFERRED]));
    }
    update()?;
    offered_source().ok_or_else(|| {
        Error::Usage(format!(
            "no package {PREFERRED} or linux-source is known to apt: check the package sources of this machine, or set \
             KUBE_IPVS_LAB_KERNEL to a User-Mode Linux built with crates/lab/guest/kernel.config"
        ))
    })
}

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

fn installed_sources(listing: &str) -> Vec<Source> {
    listing
        .lines()
        .filter_map(|line| line.strip_prefix("ii")?.trim_start().split_once(' '))
        .map(|(package, version)| Source { package: package.into(), version: version.into() })
        .collect()
}

fn preferred(sources: impl Iterator<Item = Source>) -> Option<Source> {
    let mut sources: Vec<Source> = sources.collect();
    let best = sources.iter().position(|source| source.package == PREFERRED).unwrap_or(sources.len().saturating_sub(1));
    (!sources.is_empty()).then(|| sources.swap_remove(best))
}

fn offered_source() -> Option<Source> {
    let dependencies = query("apt-cache", ["depends", "--important", "linux-source"]);
    let package = if candidate(PREFERRED).is_some() { PREFERRED.into() } else { dependency(&dependencies)? };
    let version = candidate(&package)?;
    Some(Source { package, version })
}

/// The package that the package `linux-source` stands for.
fn dependency(listing: &str) -> Option<String> {
    let name = listing.lines().find_map(|line| line.trim().strip_prefix("Depends: "))?;
    name.starts_with("linux-source-").then(|| name.to_owned())
}

/// The version that apt would install.
fn candidate(package: &str) -> Option<String> {
    parse_candidate(&query("apt-cache", ["policy", package]))
}

fn parse_candidate(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (version != "(none)").then(|| version.to_owned())
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn missing(packages: &[&str]) -> Error {
    let command = format!("sudo apt-get install --no-install-recommends {}", packages.join(" "));
    Error::Packages { command }
}

fn update() -> Result<()> {
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
fn query<S: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>) -> String {
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

    fn source(package: &str, version: &str) -> Source {
        Source { package: package.into(), version: version.into() }
    }

    #[test]
    fn packages_that_were_removed_do_not_count() {
        let listing = "ii linux-source-6.1 6.1.192-2\nrc linux-source-5.10 5.10.1-1\nii  linux-source-6.12 6.12.9-1\n";
        let found = installed_sources(listing);
        assert_eq!(found, [source("linux-source-6.1", "6.1.192-2"), source("linux-source-6.12", "6.12.9-1")]);
        assert!(is_installed("ii make", "make"));
        assert!(!is_installed("un make", "make"));
        assert!(!is_installed("ii makefs", "make"));
    }

    #[test]
    fn the_kernel_the_configuration_was_written_for_is_preferred() {
        let both = [source("linux-source-6.1", "1"), source("linux-source-6.12", "2")];
        assert_eq!(preferred(both.clone().into_iter()), Some(both[0].clone()));
        assert_eq!(preferred(both[1..].iter().cloned()), Some(both[1].clone()));
        assert_eq!(preferred(std::iter::empty()), None);
    }

    #[test]
    fn apt_says_what_it_would_install() {
        assert_eq!(
            parse_candidate("linux-source-6.12:\n  Installed: (none)\n  Candidate: 6.12.9-1\n"),
            Some("6.12.9-1".into())
        );
        assert_eq!(parse_candidate("x:\n  Installed: (none)\n  Candidate: (none)\n"), None);
        assert_eq!(parse_candidate(""), None);
        assert_eq!(dependency("linux-source\n  Depends: linux-source-6.12\n"), Some("linux-source-6.12".into()));
    }
}
