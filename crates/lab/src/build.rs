//! Builds a kernel for the guest from its source.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use rustix::process::Signal;

use crate::error::{Context, Error, Result};
use crate::kernel::last_lines;
use crate::kernel_config;
use crate::packages;
use crate::process;
use crate::progress::Progress;
use crate::source;
use crate::version::Version;

/// What the build needs besides the source.
const BUILD_PACKAGES: [&str; 8] = ["gcc", "libc6-dev", "make", "flex", "bison", "bc", "xz-utils", "bzip2"];

/// How many files a build compiles, give or take a few from version to version.
const EXPECTED_COMPILATIONS: usize = 976;

/// Parts of the source that this configuration never compiles and that no other part includes: two fifths of it.
const NOT_EXTRACTED: [&str; 8] = [
    "*/Documentation/*/*",
    "*/tools/testing/*",
    "*/arch/*/boot/dts/*",
    "*/sound/*.[ch]",
    "*/drivers/gpu/*.[ch]",
    "*/drivers/media/*.[ch]",
    "*/drivers/net/ethernet/*.[ch]",
    "*/drivers/net/wireless/*.[ch]",
];

/// Builds the kernel in a directory of its own and moves it to its place when it is whole. The cache is locked.
pub(crate) fn build(version: Version, cache: &Path, kernel: &Path) -> Result<()> {
    packages::ensure(&BUILD_PACKAGES)?;
    let build = BuildTree::create(cache)?;
    let archive = source::archive(version, &build.0)?;
    let tree = build.0.join("linux");
    fs::create_dir(&tree).context("create", tree.display())?;
    let log = cache.join("build.log");
    let mut steps = Steps { tree: &tree, log: &log };
    File::create(&log).context("create", log.display())?;

    let mut tar = Command::new("tar");
    tar.arg("--extract").arg("--strip-components=1").arg("--file").arg(&archive);
    tar.args(NOT_EXTRACTED.map(|pattern| format!("--exclude={pattern}")));
    // The archive has blocks that can be unpacked at the same time.
    tar.env("XZ_OPT", "--threads=0");
    steps.run(&format!("extracting Linux {version}"), &mut tar)?;

    let allconfig = tree.join("lab.config");
    let wanted = kernel_config::settings(kernel_config::TEXT, version);
    fs::write(&allconfig, &wanted).context("write", allconfig.display())?;
    steps.run("configuring the guest's kernel", make().arg("allnoconfig").env("KCONFIG_ALLCONFIG", &allconfig))?;
    let config_path = tree.join(".config");
    let config = fs::read_to_string(&config_path).context("read", config_path.display())?;
    let missing = kernel_config::missing(&wanted, &config);
    if !missing.is_empty() {
        return Err(Error::Config { version, missing });
    }

    let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    steps.run("compiling the guest's kernel (only this once)", make().arg(format!("-j{jobs}")).arg("linux"))?;
    steps.run("stripping the guest's kernel", Command::new("strip").args(["-o", "linux.stripped", "linux"]))?;

    let stripped = tree.join("linux.stripped");
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

/// A directory for one build, removed afterwards; one that a killed build left behind is removed first.
pub(crate) struct BuildTree(PathBuf);

impl BuildTree {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn create(cache: &Path) -> Result<Self> {
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
                progress.update(format_args!("{compiled} of about {} files", EXPECTED_COMPILATIONS.max(compiled)));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compilations_are_counted_and_other_steps_are_not() {
        assert!(is_compilation(b"  CC      net/netfilter/ipvs/ip_vs_core.o"));
        assert!(is_compilation(b"  AS      arch/x86/um/setjmp_64.o"));
        assert!(!is_compilation(b"  CCOLD"));
        assert!(!is_compilation(b"  HOSTCC  scripts/basic/fixdep"));
        assert!(!is_compilation(b"  LD      vmlinux"));
    }
}
