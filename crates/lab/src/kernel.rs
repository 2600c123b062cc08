//! The guest's kernel: which release it is, and the cache that built kernels are kept in.
//!
//! A kernel's name in the cache says what it was made of (the release, the configuration, and how it is built), so a
//! kernel that is there is used, and a change to any of them builds another.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use crate::build;
use crate::error::{Context, Error, Result};
use crate::kernel_config;
use crate::progress::Progress;
use crate::scratch::lock_file;
use crate::source;
use crate::stock::{self, StockKernel};
use crate::version::{Kernel, Version};

/// The kernel that everything was tried on and that is the quickest: a system call needs no ptrace(2).
const QUICKEST: Version = Version::new(7, 2);

/// To be raised when the way a kernel is built changes what comes out.
const BUILD_REVISION: u32 = 2;

/// A kernel that is there.
#[derive(Clone, Debug)]
pub(crate) enum Bootable {
    /// An executable.
    Uml(PathBuf),
    /// For QEMU.
    Stock(StockKernel),
}

/// The guest's kernel, ready to boot; the first time this takes some minutes.
pub(crate) fn prepare() -> Result<Bootable> {
    if let Some(kernel) = std::env::var_os("KUBE_IPVS_LAB_KERNEL") {
        let kernel = PathBuf::from(kernel);
        fs::metadata(&kernel).context("use the kernel of KUBE_IPVS_LAB_KERNEL,", kernel.display())?;
        return Ok(Bootable::Uml(kernel));
    }
    if !cfg!(target_arch = "x86_64") {
        return Err(Error::Usage(
            "the guest needs an x86-64 machine; elsewhere the lab works only as root on a kernel that has IPVS".into(),
        ));
    }
    let cache = Cache::open()?;
    let wish = std::env::var("KUBE_IPVS_LAB_KERNEL_VERSION").unwrap_or_default();
    if wish.is_empty() {
        return cache.quickest().map(Bootable::Uml);
    }
    match wish.parse()? {
        Kernel::Uml(version) => cache.kernel(version).map(Bootable::Uml),
        Kernel::Debian(version) => cache.stock(version).map(Bootable::Stock),
    }
}

fn directory() -> Result<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("KUBE_IPVS_LAB_CACHE")
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("kube-ipvs-lab")))
        .or_else(|| Some(variable("HOME")?.join(".cache/kube-ipvs-lab")))
        .ok_or_else(|| Error::Usage("set KUBE_IPVS_LAB_CACHE: without HOME there is no place to cache a kernel".into()))
}

/// The directory with the kernels that were built, and what else takes long to make.
pub(crate) struct Cache(PathBuf);

impl Cache {
    pub(crate) fn open() -> Result<Self> {
        directory().map(Self)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.0
    }

    /// The kernel of this release.
    fn kernel(&self, version: Version) -> Result<PathBuf> {
        if let Some(kernel) = self.find(version) {
            return Ok(kernel);
        }
        let _lock = self.lock()?;
        self.find_or_build(version)
    }

    /// The quickest kernel, or where its source cannot be had, that of this distribution.
    fn quickest(&self) -> Result<PathBuf> {
        if let Some(kernel) = self.find(QUICKEST).or_else(|| self.find(self.fallback_version()?)) {
            return Ok(kernel);
        }
        let _lock = self.lock()?;
        // Who held the lock may have built either.
        if let Some(kernel) = self.find(QUICKEST).or_else(|| self.find(self.fallback_version()?)) {
            return Ok(kernel);
        }
        let reason = match self.find_or_build(QUICKEST) {
            Ok(kernel) => return Ok(kernel),
            Err(reason @ Error::Packages { .. }) => return Err(reason),
            Err(reason) => reason,
        };
        let own = source::own_version()?;
        let reason = reason.to_string();
        eprintln!("lab: using Linux {own}, slower than {QUICKEST}: {}", reason.lines().next().unwrap_or_default());
        let kernel = self.find_or_build(own)?;
        let file = self.fallback_file();
        fs::write(&file, own.to_string()).context("write", file.display())?;
        Ok(kernel)
    }

    /// The kernel of this release as Debian builds it.
    fn stock(&self, version: Version) -> Result<StockKernel> {
        let dir = self.0.join(format!("debian-{version}-{BUILD_REVISION}"));
        if !dir.is_dir() {
            let _lock = self.lock()?;
            if !dir.is_dir() {
                let work = build::BuildTree::create(&self.0)?;
                stock::fetch(version, work.path(), &dir)?;
            }
        }
        StockKernel::find(&dir)
    }

    fn find_or_build(&self, version: Version) -> Result<PathBuf> {
        if let Some(kernel) = self.find(version) {
            return Ok(kernel);
        }
        let kernel = self.path(version);
        build::build(version, &self.0, &kernel)?;
        Ok(kernel)
    }

    fn find(&self, version: Version) -> Option<PathBuf> {
        Some(self.path(version)).filter(|kernel| kernel.is_file())
    }

    fn path(&self, version: Version) -> PathBuf {
        self.0.join(format!(
            "linux-{version}-{:016x}",
            key(version, &kernel_config::settings(kernel_config::TEXT, version))
        ))
    }

    /// The release that was built because the quickest could not be had, so that not every start asks the network.
    fn fallback_version(&self) -> Option<Version> {
        fs::read_to_string(self.fallback_file()).ok()?.trim().parse().ok()
    }

    fn fallback_file(&self) -> PathBuf {
        self.0.join(format!("instead-of-{QUICKEST}"))
    }

    pub(crate) fn lock(&self) -> Result<File> {
        fs::create_dir_all(&self.0).context("create", self.0.display())?;
        let path = self.0.join("lock");
        let lock = lock_file(&path)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let waiting = Progress::start("waiting for another process that fills the cache");
                lock.lock().context("lock", path.display())?;
                waiting.done();
            }
            Err(TryLockError::Error(error)) => return Err(error).context("lock", path.display()),
        }
        Ok(lock)
    }
}

/// What the kernel is made of, as a number: FNV-1a, which no later version of anything changes.
fn key(version: Version, config: &str) -> u64 {
    let parts = [config, &version.to_string(), &BUILD_REVISION.to_string()];
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
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
    fn the_key_changes_with_everything_a_kernel_is_made_of() {
        let keys = [
            key(Version::new(6, 1), "CONFIG_IP_VS=y"),
            key(Version::new(6, 12), "CONFIG_IP_VS=y"),
            key(Version::new(6, 1), "CONFIG_IP_VS=n"),
            key(Version::new(6, 1), "CONFIG_IP_VS="),
        ];
        let different: std::collections::HashSet<u64> = keys.into_iter().collect();
        assert_eq!(different.len(), keys.len());
        assert_eq!(keys[0], key(Version::new(6, 1), "CONFIG_IP_VS=y"));
    }

    #[test]
    fn a_kernel_that_stands_in_for_the_quickest_is_used_until_that_is_there() {
        let dir = crate::Scratch::new().unwrap();
        let cache = Cache(dir.path().to_owned());
        let own = cache.path(Version::new(6, 1));
        fs::write(&own, "").unwrap();
        assert_eq!(cache.kernel(Version::new(6, 1)).unwrap(), own);
        fs::write(cache.fallback_file(), "6.1").unwrap();
        assert_eq!(cache.quickest().unwrap(), own);
        let quickest = cache.path(QUICKEST);
        fs::write(&quickest, "").unwrap();
        assert_eq!(cache.quickest().unwrap(), quickest);
    }

    #[test]
    fn the_end_of_a_log_is_its_last_lines() {
        assert_eq!(last_lines(b"a\nb\nc\n", 2), "b\nc");
        assert_eq!(last_lines(b"a", 2), "a");
        assert_eq!(last_lines(b"", 2), "");
    }
}
