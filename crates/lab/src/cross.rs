//! A compiler for other architectures: rustup's own if it has the target, or else Debian's, which is fetched and unpacked
//! but not installed. Linkers and libraries of C are packages of this machine.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::build::BuildTree;
use crate::error::{Context, Error, Result};
use crate::packages;
use crate::progress::Progress;
use crate::source::{self, Apt};

/// The architectures that were tried.
const TARGETS: [Target; 2] = [
    Target {
        triple: "aarch64-unknown-linux-gnu",
        debian: "arm64",
        linker: "aarch64-linux-gnu-gcc",
        packages: ["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"],
        emulator: "qemu-aarch64",
    },
    Target {
        triple: "s390x-unknown-linux-gnu",
        debian: "s390x",
        linker: "s390x-linux-gnu-gcc",
        packages: ["gcc-s390x-linux-gnu", "libc6-dev-s390x-cross"],
        emulator: "qemu-s390x",
    },
];

/// The releases of Debian to look in. In testing, a package has the same version on all architectures.
const RELEASES: [&str; 3] = ["testing", "sid", "stable"];

/// To be raised when what is unpacked changes.
const RECIPE: u32 = 1;

/// Runs Debian's compiler with its own C library, which may be newer than this machine's. What the compiler starts, such as
/// a linker, gets this machine's.
const WRAPPER: &str = r#"#!/bin/sh
root=${0%/*}/root
libraries=$root/usr/lib/x86_64-linux-gnu
exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$root/usr/bin/rustc" "$@"
"#;

struct Target {
    triple: &'static str,
    debian: &'static str,
    linker: &'static str,
    /// The linker, and the C library with its static one.
    packages: [&'static str; 2],
    emulator: &'static str,
}

/// What cargo needs to know to build for another architecture.
#[derive(Debug)]
pub struct CrossCompiler {
    /// Names and values of environment variables.
    environment: Vec<(String, PathBuf)>,
}

impl CrossCompiler {
    /// Finds a compiler for a target, which must be at least of a version; fetches it if it is not there.
    pub fn prepare(triple: &str, oldest: &str) -> Result<Self> {
        let target = TARGETS.iter().find(|target| target.triple == triple);
        let mut environment = Vec::new();
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        if !has_target(Path::new(&rustc), triple) {
            let target = target.ok_or_else(|| unknown(triple))?;
            environment.push(("RUSTC".into(), debian_compiler(target, oldest)?));
        }
        let linker = format!("{}_LINKER", cargo_prefix(triple));
        if let Some(target) = target.filter(|_| std::env::var_os(&linker).is_none()) {
            packages::ensure(&target.packages)?;
            environment.push((linker, target.linker.into()));
        }
        Ok(Self { environment })
    }

    /// Makes cargo use it.
    pub fn configure(&self, cargo: &mut Command) {
        cargo.envs(self.environment.iter().map(|(name, value)| (name, value)));
    }
}

/// The program that runs static executables of an architecture on this one, and the variable that makes cargo use it.
pub fn emulator(triple: &str) -> Result<(String, &'static str)> {
    let target = TARGETS.iter().find(|target| target.triple == triple).ok_or_else(|| unknown(triple))?;
    packages::ensure_programs(&[(target.emulator, "qemu-user")])?;
    Ok((format!("{}_RUNNER", cargo_prefix(triple)), target.emulator))
}

fn unknown(triple: &str) -> Error {
    let known = TARGETS.map(|target| target.triple).join(", ");
    Error::Usage(format!(
        "no compiler for {triple} is known: `rustup target add {triple}` may have one, or use {known}"
    ))
}

/// `CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU`
fn cargo_prefix(triple: &str) -> String {
    format!("CARGO_TARGET_{}", triple.to_uppercase().replace(['-', '.'], "_"))
}

/// Whether a compiler has the standard library for a target.
fn has_target(rustc: &Path, triple: &str) -> bool {
    let directory = Command::new(rustc).args(["--print", "target-libdir", "--target", triple]).output();
    let Ok(directory) = directory.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()) else {
        return false;
    };
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().as_encoded_bytes().starts_with(b"libstd-"))
}

/// Debian's compiler, from the cache or else from Debian.
fn debian_compiler(target: &Target, oldest: &str) -> Result<PathBuf> {
    if !cfg!(target_arch = "x86_64") {
        return Err(Error::Usage(format!(
            "Debian's compiler is used on x86-64 machines only: `rustup target add {}`",
            target.triple
        )));
    }
    let cache = crate::kernel::Cache::open()?;
    let dir = cache.dir().join(format!("rust-{}-{oldest}-{RECIPE}", target.triple));
    let compiler = dir.join("rustc");
    if !dir.is_dir() {
        let _lock = cache.lock()?;
        if !dir.is_dir() {
            let work = BuildTree::create(cache.dir())?;
            let ready = fetch(target, oldest, work.path())?;
            fs::rename(&ready, &dir).context("move the compiler to", dir.display())?;
        }
    }
    Ok(compiler)
}

/// Fetches the compiler of the first release that has one which is new enough.
fn fetch(target: &Target, oldest: &str, work: &Path) -> Result<PathBuf> {
    let foreign = format!("libstd-rust-dev:{}", target.debian);
    let mut reasons = Vec::new();
    for mirror in source::debian_mirrors() {
        for release in RELEASES {
            let progress = Progress::start(format_args!("looking for Rust {oldest} in Debian {release}"));
            let dir = work.join(release);
            let found = Apt::foreign(&mirror, release, &dir, target.debian).map(|apt| {
                let versions = ["rustc", "libstd-rust-dev", &foreign].map(|package| apt.candidate(package));
                (apt, usable(&versions, oldest))
            });
            match found {
                Ok((apt, Ok(version))) => {
                    progress.done();
                    return unpack(&apt, &version, &foreign, work);
                }
                Ok((_, Err(reason))) => reasons.push(format!("Debian {release}: {reason}")),
                Err(error) => reasons.push(error.to_string()),
            }
        }
    }
    let reasons = if reasons.is_empty() { "this is not Debian".into() } else { reasons.join("; ") };
    Err(Error::Usage(format!(
        "neither rustup nor Debian has Rust {oldest} with {}: try `rustup target add {}` ({reasons})",
        target.triple, target.triple
    )))
}

/// The version of a compiler and its standard libraries, if they have the same and it is new enough.
fn usable(versions: &[Option<String>], oldest: &str) -> Result<String, String> {
    let Some(Some(version)) = versions.first() else { return Err("there is no rustc".into()) };
    if versions.iter().any(|other| other.as_ref() != Some(version)) {
        return Err(format!("the standard libraries are not of version {version}"));
    }
    let numbers =
        |text: &str| text.split(['.', '+', '-', '~']).map_while(|part| part.parse().ok()).collect::<Vec<u32>>();
    if numbers(version) < numbers(oldest) { Err(format!("it has {version}")) } else { Ok(version.clone()) }
}

/// Downloads the compiler, and the libraries it is linked with, and unpacks them.
fn unpack(apt: &Apt, version: &str, foreign: &str, work: &Path) -> Result<PathBuf> {
    let progress = Progress::start(format_args!("fetching Rust {version} of Debian, some 150 MB"));
    let (download, ready) = (work.join("download"), work.join("ready"));
    let root = ready.join("root");
    fs::create_dir_all(&download).context("create", download.display())?;
    for name in ["bin", "lib", "lib64", "sbin"] {
        fs::create_dir_all(root.join("usr").join(name)).context("create", root.join("usr").join(name).display())?;
        symlink(Path::new("usr").join(name), root.join(name)).context("create", root.join(name).display())?;
    }
    // The compiler itself is a library, on whose package the standard library depends.
    let dependencies = packages::checked(apt.command("apt-cache").args(["depends", "--important", "libstd-rust-dev"]))?;
    let library = dependencies.lines().find_map(|line| line.trim().strip_prefix("Depends: libstd-rust-"));
    let library = library.ok_or_else(|| Error::Usage("libstd-rust-dev does not depend on the compiler".into()))?;
    let library = format!("libstd-rust-{library}");
    let plan = packages::checked(apt.command("apt-get").args(["--simulate", "install", &library]))?;
    let mut names = planned(&plan);
    names.extend(["rustc", "libstd-rust-dev", foreign]);
    // apt checks what it downloads against the signed list of the release.
    packages::checked(apt.command("apt-get").args(["--quiet", "download"]).args(&names).current_dir(&download))?;
    for entry in fs::read_dir(&download).context("read", download.display())?.flatten() {
        packages::checked(Command::new("dpkg-deb").arg("--extract").args([&entry.path(), &root]))?;
    }
    let wrapper = ready.join("rustc");
    fs::write(&wrapper, WRAPPER).context("write", wrapper.display())?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).context("make executable", wrapper.display())?;
    packages::checked(Command::new(&wrapper).arg("--version"))?;
    progress.done();
    Ok(ready)
}

/// The packages that apt would install.
fn planned(plan: &str) -> Vec<&str> {
    plan.lines().filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compiler_must_be_new_enough_and_its_libraries_of_its_version() {
        let versions = |all: [&str; 3]| all.map(|version| Some(version.to_owned()));
        let same = versions(["1.97.1+dfsg1-1"; 3]);
        assert_eq!(usable(&same, "1.89").unwrap(), "1.97.1+dfsg1-1");
        assert_eq!(usable(&same, "1.97.1").unwrap(), "1.97.1+dfsg1-1");
        assert!(usable(&same, "1.98").is_err());
        assert!(usable(&versions(["1.97.1+dfsg1-1", "1.97.1+dfsg1-1", "1.97.0+dfsg1-3"]), "1.89").is_err());
        assert!(usable(&[Some("1.97.1".into()), None], "1.89").is_err());
        assert!(usable(&[None, None], "1.89").is_err());
    }

    #[test]
    fn what_apt_plans_to_install_is_what_is_downloaded() {
        let plan = "The following NEW packages will be installed:\n  libz3-4\nInst libz3-4 (4.13.3-1.1 Debian [amd64])\n\
                    Inst libllvm22 (1:22.1.8-3 Debian [amd64]) []\nConf libz3-4 (4.13.3-1.1 Debian [amd64])\n";
        assert_eq!(planned(plan), ["libz3-4", "libllvm22"]);
    }

    #[test]
    fn cargo_is_told_of_a_target_as_it_expects() {
        assert_eq!(cargo_prefix("s390x-unknown-linux-gnu"), "CARGO_TARGET_S390X_UNKNOWN_LINUX_GNU");
    }
}
