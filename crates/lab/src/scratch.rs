//! Directories that live as long as one run of the lab.
//!
//! A run that is killed cannot clean up after itself, so the next one does: each directory is locked by its owner, and
//! a directory without an owner is removed.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Context, Error, Result};

/// A directory that is removed when this value is dropped.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    _owned: File,
}

impl Scratch {
    /// Creates an empty directory, readable by this user alone, and removes those of runs that were killed.
    pub fn new() -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let base = base()?;
        // Held while a directory exists without its lock, so that no one takes it for abandoned.
        let creating = lock_file(&base.join("lock"))?;
        creating.lock().context("lock", base.join("lock").display())?;
        remove_abandoned(&base);

        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = base.join(format!("{}.{count}", std::process::id()));
        DirBuilder::new().mode(0o700).create(&path).context("create", path.display())?;
        let owned = lock_file(&path.join("lock"))?;
        owned.lock().context("lock", path.join("lock").display())?;
        Ok(Self { path, _owned: owned })
    }

    /// Where it is. The path has no white space.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // The next run tries again.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Where this user's directories are. The name has the boot in it because the guest sees the files of its host, but
/// not their locks: there, its host's directories must not look abandoned.
pub(crate) fn base() -> Result<PathBuf> {
    let temp = std::env::temp_dir();
    if !temp.is_absolute() || temp.to_string_lossy().contains(char::is_whitespace) {
        return Err(Error::Usage(format!(
            "the lab passes the name of its temporary directory on a kernel command line, so `{}` will not do: set TMPDIR to an absolute path without white space",
            temp.display()
        )));
    }
    let uid = rustix::process::geteuid().as_raw();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let base = temp.join(format!("kube-ipvs-lab-{uid}-{}", boot.get(..8).unwrap_or("unknown")));
    DirBuilder::new().mode(0o700).recursive(true).create(&base).context("create", base.display())?;
    let found = fs::symlink_metadata(&base).context("examine", base.display())?;
    if !found.is_dir() || found.uid() != uid {
        return Err(Error::Usage(format!("{} belongs to someone else: remove it or set TMPDIR", base.display())));
    }
    Ok(base)
}

/// Opens a file that exists only to be locked.
pub(crate) fn lock_file(path: &Path) -> Result<File> {
    File::options().create(true).write(true).truncate(false).open(path).context("open", path.display())
}

fn remove_abandoned(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let dir = entry.path();
        let abandoned = match File::open(dir.join("lock")) {
            Ok(lock) => lock.try_lock().is_ok(),
            Err(_) => dir.is_dir(),
        };
        if abandoned {
            let _ = fs::remove_dir_all(dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directories_without_an_owner_are_removed() {
        let first = Scratch::new().unwrap();
        let abandoned = first.path().with_file_name("abandoned");
        fs::create_dir_all(abandoned.join("deep")).unwrap();
        fs::write(abandoned.join("lock"), "").unwrap();

        let second = Scratch::new().unwrap();
        assert!(first.path().is_dir() && second.path().is_dir());
        assert!(!abandoned.exists());

        let path = second.path().to_owned();
        drop(second);
        assert!(!path.exists());
    }
}
