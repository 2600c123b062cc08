//! Watches a directory with inotify.

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

use super::is_manifest_name;
use crate::error::Error;

/// Changes are reported once none has followed for this long, since several files are often written together.
const DEBOUNCE: Duration = Duration::from_millis(10);
/// The maximum delay by [`DEBOUNCE`].
const MAX_DEBOUNCE: Duration = Duration::from_millis(100);
/// The symbolic link that the kubelet replaces when a mounted ConfigMap changes: then any file may have changed.
const CONFIG_MAP_LINK: &str = "..data";

/// A watch on a directory.
#[derive(Debug)]
pub(super) struct DirectoryWatch {
    directory: PathBuf,
    inotify: AsyncFd<OwnedFd>,
    watch: i32,
    /// Device and inode of the watched directory.
    identity: Option<(u64, u64)>,
}

/// The changes since the last call.
#[derive(Debug, Default)]
pub(super) struct DirectoryEvents {
    /// Files that changed.
    pub(super) names: BTreeSet<OsString>,
    /// Any file may have changed.
    pub(super) all: bool,
    /// The directory no longer exists or is no longer watched.
    pub(super) lost: bool,
}

impl DirectoryWatch {
    pub(super) fn new(directory: &Path) -> Result<Self, Error> {
        let watch_error = |source: io::Error| Error::Watch { path: directory.to_owned(), source };
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).map_err(|e| watch_error(e.into()))?;
        #[expect(deprecated, reason = "sound for an OwnedFd, whose descriptor never changes; its successor is unsafe")]
        let inotify = AsyncFd::new(inotify).map_err(watch_error)?;
        let mut watch = Self { directory: directory.to_owned(), inotify, watch: -1, identity: None };
        match watch.watch(directory) {
            Ok(()) => Ok(watch),
            Err(source) if source.raw_os_error() == Some(Errno::NOSPC.raw_os_error()) => Err(watch_error(source)),
            Err(source) => Err(Error::Directory { path: directory.to_owned(), source }),
        }
    }

    /// Watches the directory at the path again, which may be another one now.
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
        // Before the watch is added: if the directory is replaced in between, the next poll detects it.
        self.identity = identity(directory);
        self.watch = inotify::add_watch(self.inotify.get_ref(), directory, flags)?;
        if before >= 0 && before != self.watch {
            // The old watch is gone if its directory was deleted, but not if it was moved.
            let _ = inotify::remove_watch(self.inotify.get_ref(), before);
        }
        Ok(())
    }

    /// Whether the path now leads to another directory than the watched one, or to none. inotify does not notify of a
    /// moved parent or a file system mounted over it.
    pub(super) fn is_replaced(&self) -> bool {
        identity(&self.directory) != self.identity
    }

    /// Waits for changes until `end`, and then a little for more of them.
    pub(super) async fn changed(&mut self, end: Instant) -> DirectoryEvents {
        let mut changed = DirectoryEvents::default();
        while changed.names.is_empty() && !changed.all {
            if Instant::now() >= end || timeout_at(end, self.collect(&mut changed)).await.is_err() {
                return changed;
            }
        }
        let latest = Instant::now() + MAX_DEBOUNCE;
        while timeout(DEBOUNCE, self.collect(&mut changed)).await.is_ok() && Instant::now() < latest {}
        changed
    }

    async fn collect(&self, changed: &mut DirectoryEvents) {
        let Ok(mut ready) = self.inotify.readable().await else {
            // The runtime is shutting down.
            return std::future::pending().await;
        };
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = Reader::new(self.inotify.get_ref(), &mut buffer);
        loop {
            match events.next() {
                Ok(event) => self.record(&event, changed),
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        ready.clear_ready();
    }

    fn record(&self, event: &inotify::Event<'_>, changed: &mut DirectoryEvents) {
        let what = event.events();
        if what.contains(ReadFlags::QUEUE_OVERFLOW) {
            changed.all = true;
            return;
        }
        if event.wd() != self.watch {
            // From the watch of an earlier directory.
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
        } else if is_manifest_name(name) && (!what.contains(ReadFlags::CREATE) || self.is_complete(name)) {
            changed.names.insert(name.to_owned());
        }
    }

    /// Whether a new name has its content already: links have. A file that is being written is read when it is closed.
    fn is_complete(&self, name: &OsStr) -> bool {
        std::fs::symlink_metadata(self.directory.join(name)).is_ok_and(|meta| meta.is_symlink() || meta.nlink() > 1)
    }
}

fn identity(directory: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(directory).ok().map(|meta| (meta.dev(), meta.ino()))
}
