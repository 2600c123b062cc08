//! Following a directory with inotify.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout, timeout_at};

use super::counts;
use crate::error::Error;

/// A change is read once nothing more has happened for this long: whoever writes one file often writes another.
const SETTLE: Duration = Duration::from_millis(10);
/// But no later than this.
const SETTLE_AT_MOST: Duration = Duration::from_millis(100);
/// The symbolic link that the kubelet swaps when a mounted ConfigMap changes: then all files have.
const CONFIG_MAP_LINK: &str = "..data";

/// Tells what changes in a directory.
#[derive(Debug)]
pub(super) struct Follower {
    directory: PathBuf,
    inotify: AsyncFd<OwnedFd>,
    watch: i32,
    /// Device and inode of the directory that is watched.
    identity: Option<(u64, u64)>,
}

/// What has changed.
#[derive(Debug, Default)]
pub(super) struct Changed {
    /// These files.
    pub(super) names: BTreeSet<OsString>,
    /// Possibly any file.
    pub(super) all: bool,
    /// And the directory is no longer there or no longer watched.
    pub(super) lost: bool,
}

impl Follower {
    pub(super) fn new(directory: &Path) -> Result<Self, Error> {
        let follow = |source: io::Error| Error::Follow { path: directory.to_owned(), source };
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).map_err(|e| follow(e.into()))?;
        #[expect(deprecated, reason = "sound for an OwnedFd, whose descriptor never changes; its successor is unsafe")]
        let inotify = AsyncFd::new(inotify).map_err(follow)?;
        let mut follower = Self { directory: directory.to_owned(), inotify, watch: -1, identity: None };
        match follower.watch(directory) {
            Ok(()) => Ok(follower),
            Err(source) if source.raw_os_error() == Some(Errno::NOSPC.raw_os_error()) => Err(follow(source)),
            Err(source) => Err(Error::Directory { path: directory.to_owned(), source }),
        }
    }

    /// Watches the directory anew; the path may mean another one now.
    pub(super) fn watch(&mut self, directory: &Path) -> io::Result<()> {
        let flags = WatchFlags::ONLYDIR
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::CREATE
            | WatchFlags::ATTRIB
            | WatchFlags::MOVE
            | WatchFlags::DELETE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF;
        let before = self.watch;
        // Asked for first: if the directory changes in between, the next look sees another one.
        self.identity = identity(directory);
        self.watch = inotify::add_watch(self.inotify.get_ref(), directory, flags)?;
        if before >= 0 && before != self.watch {
            // Gone already if the directory was deleted; still there if it was moved away.
            let _ = inotify::remove_watch(self.inotify.get_ref(), before);
        }
        Ok(())
    }

    /// Whether the path now leads to another directory than the watched one, or to none. Of a parent that is moved or
    /// a file system that is mounted over it, inotify says nothing.
    pub(super) fn strayed(&self) -> bool {
        identity(&self.directory) != self.identity
    }

    /// Waits until something changes, and then a little for more; or until `end`.
    pub(super) async fn changed(&mut self, end: Instant) -> Changed {
        let mut changed = Changed::default();
        while changed.names.is_empty() && !changed.all {
            if Instant::now() >= end || timeout_at(end, self.collect(&mut changed)).await.is_err() {
                return changed;
            }
        }
        let latest = Instant::now() + SETTLE_AT_MOST;
        while timeout(SETTLE, self.collect(&mut changed)).await.is_ok() && Instant::now() < latest {}
        changed
    }

    async fn collect(&self, changed: &mut Changed) {
        let Ok(mut ready) = self.inotify.readable().await else {
            // The runtime is shutting down.
            return std::future::pending().await;
        };
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = Reader::new(self.inotify.get_ref(), &mut buffer);
        loop {
            match events.next() {
                Ok(event) => self.note(&event, changed),
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        ready.clear_ready();
    }

    fn note(&self, event: &inotify::Event<'_>, changed: &mut Changed) {
        let what = event.events();
        if what.contains(ReadFlags::QUEUE_OVERFLOW) {
            changed.all = true;
            return;
        }
        if event.wd() != self.watch {
            // Left over from a directory that was here before.
            return;
        }
        if what.intersects(ReadFlags::IGNORED | ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::UNMOUNT) {
            changed.all = true;
            changed.lost = true;
            return;
        }
        let Some(name) = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes())) else { return };
        if name == CONFIG_MAP_LINK {
            changed.all = true;
        } else if counts(name) && (!what.contains(ReadFlags::CREATE) || self.whole(name)) {
            changed.names.insert(name.to_owned());
        }
    }

    /// Whether a name that has just appeared has its content already: links have. A file that is being written is
    /// read when it is closed.
    fn whole(&self, name: &OsStr) -> bool {
        std::fs::symlink_metadata(self.directory.join(name)).is_ok_and(|meta| meta.is_symlink() || meta.nlink() > 1)
    }
}

fn identity(directory: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(directory).ok().map(|meta| (meta.dev(), meta.ino()))
}
