//! The guest's kernel: built once from the distribution's source package and kept in a cache.
//!
//! A kernel's name in the cache says what it was made of (the configuration, the source package, and how it is built),
//! so a kernel that is there is the right one, and a change to any of them builds another.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use rustix::process::Signal;

use crate::error::{Context, Error, Result};
use crate::packages::{self, Source};
use crate::process;
use crate::progress::Progress;
use crate::scratch::lock_file;

/// The guest's kernel configuration.
const CONFIG: &str = include_str!("../guest/kernel.config");

/// To be raised when the way a kernel is built changes what comes out.
const RECIPE: u32 = 1;

/// What the build needs besides the source.
const BUILD_PACKAGES: [&str; 8] = ["gcc", "libc6-dev", "make", "flex", "bison", "bc", "xz-utils", "bzip2"];

/// How many files a build compiles, give or take a few from version to version.
const ABOUT: usize = 976;

/// Parts of the source that this configuration never compiles and that no other part includes: two fifths of it.
const NOT_EXTRACTED: [&str; 7] = [
    "*/tools/testing/*",
    "*/arch/*/boot/dts/*",
    "*/sound/*.[ch]",
    "*/drivers/gpu/*.[ch]",
    "*/drivers/media/*.[ch]",
    "*/drivers/net/ethernet/*.[ch]",
    "*/drivers/net/wireless/*.[ch]",
];

/// The guest's kernel, ready to boot; the first time this takes some minutes.
pub(crate) fn prepare() -> Result<PathBuf> {
    if let Some(kernel) = std::env::var_os("KUBE_IPVS_LAB_KERNEL") {
        let kernel = PathBuf::from(kernel);
        fs::metadata(&kernel).context("use the kernel of KUBE_IPVS_LAB_KERNEL,", kernel.display())?;
        return Ok(kernel);
    }
    if !cfg!(target_arch = "x86_64") {
        return Err(Error::Usage(
            "the guest needs an x86-64 machine; elsewhere the lab works only as root on a kernel that has IPVS".into(),
        ));
    }
    let source = packages::kernel_source()?;
    let cache = cache_directory()?;
    let name = format!("linux-{:016x}", key(CONFIG, &source));
    let kernel = cache.join(&name);
    if kernel.is_file() {
        return Ok(kernel);
    }
    fs::create_dir_all(&cache).context("create", cache.display())?;
    let lock = lock_file(&cache.join("lock"))?;
    if lock.try_lock().is_err() {
        let waiting = Progress::start("waiting for another process that builds the guest's kernel");
        lock.lock().context("lock", cache.join("lock").display())?;
        waiting.done();
    }
    if !kernel.is_file() {
        build(&source, &cache, &kernel)?;
    }
    Ok(kernel)
}

fn cache_directory() -> Result<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("KUBE_IPVS_LAB_CACHE")
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("kube-ipvs-lab")))
        .or_else(|| Some(variable("HOME")?.join(".cache/kube-ipvs-lab")))
        .ok_or_else(|| Error::Usage("set KUBE_IPVS_LAB_CACHE: without HOME there is no place to cache a kernel".into()))
}

/// What the kernel is made of, as a number: FNV-1a, which no later version of anything changes.
fn key(config: &str, source: &Source) -> u64 {
    let parts = [config, &source.package, &source.version, &RECIPE.to_string()];
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Builds the kernel in a directory of its own and moves it to its place when it is whole. The cache is locked.
fn build(source: &Source, cache: &Path, kernel: &Path) -> Result<()> {
    packages::ensure(&[&BUILD_PACKAGES[..], &[&source.package]].concat())?;
    let archive = source.archive().ok_or_else(|| {
        Error::Usage(format!("package {} has no archive of a kernel's source under /usr/src", source.package))
    })?;
    let tree = BuildTree::create(cache)?;
    let log = kernel.with_extension("log");
    let mut steps = Steps { tree: &tree.0, log: &log };
    File::create(&log).context("create", log.display())?;

    let mut tar = Command::new("tar");
    tar.arg("--extract").arg("--strip-components=1").arg("--file").arg(&archive);
    tar.args(NOT_EXTRACTED.map(|pattern| format!("--exclude={pattern}")));
    steps.run(&format!("extracting {} {}", source.package, source.version), &mut tar)?;

    let allconfig = tree.0.join("lab.config");
    fs::write(&allconfig, CONFIG).context("write", allconfig.display())?;
    steps.run("configuring the guest's kernel", make().arg("allnoconfig").env("KCONFIG_ALLCONFIG", &allconfig))?;
    let config_path = tree.0.join(".config");
    let config = fs::read_to_string(&config_path).context("read", config_path.display())?;
    let missing = missing_settings(CONFIG, &config);
    if !missing.is_empty() {
        return Err(Error::Config { source_package: source.package.clone(), missing });
    }

    let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    steps.run("compiling the guest's kernel (only this once)", make().arg(format!("-j{jobs}")).arg("linux"))?;
    steps.run("stripping the guest's kernel", Command::new("strip").args(["-o", "linux.stripped", "linux"]))?;

    let stripped = tree.0.join("linux.stripped");
    fs::set_permissions(&stripped, fs::Permissions::from_mode(0o755)).context("make executable", stripped.display())?;
    fs::rename(&stripped, kernel).context("move the kernel to", kernel.display())?;
    // Only the log of a failure is of use.
    let _ = fs::remove_file(&log);
    Ok(())
}

/// `make` for User-Mode Linux, with nothing in it that depends on who builds.
fn make() -> Command {
    let mut make = Command::new("make");
    make.arg("ARCH=um");
    for variable in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "CROSS_COMPILE", "KBUILD_OUTPUT", "O", "CC", "CFLAGS"] {
        make.env_remove(variable);
    }
    make.env("KBUILD_BUILD_USER", "lab").env("KBUILD_BUILD_HOST", "lab");
    make
}

/// The settings of `wanted` that `actual` does not have.
fn missing_settings(wanted: &str, actual: &str) -> Vec<String> {
    let actual: std::collections::HashSet<&str> = actual.lines().collect();
    let settings = wanted.lines().map(str::trim).filter(|line| line.starts_with("CONFIG_"));
    settings.filter(|setting| !actual.contains(setting)).map(str::to_owned).collect()
}

/// A directory for one build, removed afterwards; one that a killed build left behind is removed first.
struct BuildTree(PathBuf);

impl BuildTree {
    fn create(cache: &Path) -> Result<Self> {
        let path = cache.join("build");
        if path.exists() {
            fs::remove_dir_all(&path).context("remove the remains of an earlier build,", path.display())?;
        }
        fs::create_dir(&path).context("create", path.display())?;
        Ok(Self(path))
    }
}

impl Drop for BuildTree {
    fn drop(&mut self) {
        // What stays is removed before the next build.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs the steps of a build in its directory, showing progress and keeping a log.
struct Steps<'a> {
    tree: &'a Path,
    log: &'a Path,
}

impl Steps<'_> {
    fn run(&mut self, step: &str, command: &mut Command) -> Result<()> {
        let line = packages::describe(command);
        let mut log = File::options().append(true).open(self.log).context("open", self.log.display())?;
        let mut progress = Progress::start(step);
        let (output, writer) = std::io::pipe().context("create", "a pipe")?;
        let both = writer.try_clone().context("duplicate", "a pipe")?;
        command.current_dir(self.tree).env("LC_ALL", "C").stdin(Stdio::null()).stdout(writer).stderr(both);
        // Without us it would go on building in a directory that the next start removes.
        process::end_with_us(command, Signal::TERM);
        let mut child = command.spawn().context("run", &line)?;
        // The command holds the other end of the pipe; it must not outlive the child.
        command.stdout(Stdio::null()).stderr(Stdio::null());

        let (sender, lines) = mpsc::channel();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(std::result::Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut compiled = 0;
        loop {
            match lines.recv_timeout(Duration::from_secs(1)) {
                Ok(line) => {
                    log.write_all(&[line.as_slice(), b"\n"].concat()).context("write", self.log.display())?;
                    compiled += usize::from(is_compilation(&line));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if compiled > 0 {
                progress.update(format_args!("{compiled} of about {} files", ABOUT.max(compiled)));
            } else {
                progress.update("working");
            }
        }
        let status = child.wait().context("wait for", &line)?;
        // It ended with the channel.
        let _ = reader.join();
        if status.success() {
            progress.done();
            return Ok(());
        }
        drop(progress);
        let text = fs::read(self.log).context("read", self.log.display())?;
        Err(Error::Build {
            step: format!("{step}: {line}"),
            status: status.to_string(),
            log: self.log.to_owned(),
            tail: last_lines(&text, 30),
        })
    }
}

/// Whether the kernel's build system says with this line that it compiles something.
fn is_compilation(line: &[u8]) -> bool {
    let line = line.trim_ascii_start();
    line.starts_with(b"CC ") || line.starts_with(b"AS ")
}

/// The end of a log.
pub(crate) fn last_lines(text: &[u8], count: usize) -> String {
    let text = String::from_utf8_lossy(text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_must_be_in_the_final_configuration() {
        let wanted = "# text\nCONFIG_IP_VS=y\n  CONFIG_IPV6=y\n# CONFIG_BLOCK is not set\nCONFIG_IP_VS_TAB_BITS=12\n";
        let all = "CONFIG_IP_VS_TAB_BITS=12\nCONFIG_IPV6=y\nCONFIG_IP_VS=y\n";
        assert!(missing_settings(wanted, all).is_empty());
        assert_eq!(
            missing_settings(wanted, "CONFIG_IP_VS=m\n# CONFIG_IPV6 is not set\nCONFIG_IP_VS_TAB_BITS=12\n"),
            ["CONFIG_IP_VS=y", "CONFIG_IPV6=y"]
        );
        assert!(!missing_settings(CONFIG, "").is_empty());
    }

    #[test]
    fn the_key_changes_with_everything_a_kernel_is_made_of() {
        let source = |package: &str, version: &str| Source { package: package.into(), version: version.into() };
        let keys = [
            key("CONFIG_IP_VS=y", &source("linux-source-6.1", "6.1.192-2")),
            key("CONFIG_IP_VS=y", &source("linux-source-6.1", "6.1.193-1")),
            key("CONFIG_IP_VS=y", &source("linux-source-6.12", "6.1.192-2")),
            key("CONFIG_IP_VS=n", &source("linux-source-6.1", "6.1.192-2")),
            key("CONFIG_IP_VS=", &source("ylinux-source-6.1", "6.1.192-2")),
        ];
        let different: std::collections::HashSet<u64> = keys.into_iter().collect();
        assert_eq!(different.len(), keys.len());
        assert_eq!(keys[0], key("CONFIG_IP_VS=y", &source("linux-source-6.1", "6.1.192-2")));
    }

    #[test]
    fn compilations_are_counted_and_other_steps_are_not() {
        assert!(is_compilation(b"  CC      net/netfilter/ipvs/ip_vs_core.o"));
        assert!(is_compilation(b"  AS      arch/x86/um/setjmp_64.o"));
        assert!(!is_compilation(b"  CCOLD"));
        assert!(!is_compilation(b"  HOSTCC  scripts/basic/fixdep"));
        assert!(!is_compilation(b"  LD      vmlinux"));
    }

    #[test]
    fn the_end_of_a_log_is_its_last_lines() {
        assert_eq!(last_lines(b"a\nb\nc\n", 2), "b\nc");
        assert_eq!(last_lines(b"a", 2), "a");
        assert_eq!(last_lines(b"", 2), "");
    }
}
