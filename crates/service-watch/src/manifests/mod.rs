//! A directory of manifests as a source: files with what `kubectl get -o yaml` prints.
//!
//! All files `*.yaml`, `*.yml` and `*.json` directly in the directory are read, except hidden ones. A file may have
//! several documents and lists. If a file cannot be read or parsed, its last valid content stays in use; deleting a
//! file deletes its objects. If the directory disappears, its content stays in use until there is a directory with a
//! manifest at its path: an empty one is more likely a failed mount. If two files define the same object, the file that
//! sorts first wins.

pub(crate) mod read;
mod store;
mod watch;

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use self::store::ManifestStore;
use self::watch::{DirectoryEvents, DirectoryWatch};
use crate::error::Error;
use crate::model::Change;
use crate::report::{Counters, Emitter, Message, Subject};

/// How often a missing directory is looked for.
const DIRECTORY_RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// How often all files are polled: inotify does not notify of edits behind a symbolic link or by other machines (NFS).
const POLL_INTERVAL: Duration = Duration::from_secs(30);
/// The interval to the next poll after one that found a changed file.
const FAST_POLL_INTERVAL: Duration = Duration::from_secs(1);

const DIRECTORY_EMPTY: &str = "the directory is back and empty: its last content stays in use; put a file there, an empty one if there is \
                      nothing to serve, or restart";

/// Services, EndpointSlices and Nodes from the files of a directory.
#[derive(Debug)]
pub struct Manifests {
    directory: PathBuf,
    node: Arc<str>,
    counters: Arc<Counters>,
}

impl Manifests {
    /// The manifests in `directory`; `node` is the name of this agent's Node.
    pub fn new(directory: impl Into<PathBuf>, node: impl Into<Arc<str>>) -> Self {
        Self { directory: directory.into(), node: node.into(), counters: Arc::default() }
    }

    /// The counters of this source.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// As [`Source::run`](crate::Source::run). Fails if the directory cannot be read at the start. If it disappears
    /// later, that is reported and retried, and its last content stays in use.
    pub async fn run(self, sink: impl FnMut(Message) -> ControlFlow<()>) -> Result<(), Error> {
        let Self { directory, node, counters } = self;
        let mut emitter = Emitter::new(sink, counters);
        // The watch starts before the files are read, so that no change is missed.
        let mut watch = DirectoryWatch::new(&directory)?;
        let names = list(&directory).map_err(|source| Error::Directory { path: directory.clone(), source })?;
        let mut store = ManifestStore::new(directory.clone(), node);
        store.read(names, &mut emitter);
        emitter.count_list();
        emitter.change(Change::Synced);
        let mut next_poll = Instant::now() + POLL_INTERVAL;
        // The directory was replaced, and the new one has had no manifest yet.
        let mut awaits_manifests = false;
        while !emitter.is_closed() {
            let mut changed = watch.changed(next_poll).await;
            if Instant::now() >= next_poll {
                let soon = poll(&directory, &watch, &mut store, &mut changed);
                next_poll = Instant::now() + if soon { FAST_POLL_INTERVAL } else { POLL_INTERVAL };
            }
            let mut names = changed.names;
            if changed.all || awaits_manifests {
                let (listed, lost) = list_or_wait(&directory, &mut watch, changed.lost, &mut emitter).await;
                // A file that is still being written does not count yet.
                let filled = if changed.all { !listed.is_empty() } else { !listed.is_disjoint(&names) };
                awaits_manifests = (awaits_manifests || lost) && !filled && !store.is_empty();
                if awaits_manifests {
                    emitter.problems(Subject::File(directory.clone()), vec![DIRECTORY_EMPTY.into()]);
                    continue;
                }
                emitter.resolve(Subject::File(directory.clone()));
                // Files that no longer exist are read too: that deletes their objects.
                names.extend(store.names());
                names.extend(listed);
                emitter.count_list();
            }
            store.read(names, &mut emitter);
        }
        Ok(())
    }
}

/// Adds the changes that inotify did not notify of. Returns whether to poll again soon.
fn poll(directory: &Path, watch: &DirectoryWatch, store: &mut ManifestStore, changed: &mut DirectoryEvents) -> bool {
    if watch.is_replaced() {
        changed.all = true;
        changed.lost = true;
        return false;
    }
    let Ok(names) = list(directory) else {
        changed.all = true;
        return false;
    };
    let (differing, soon) = store.changed_files(&names);
    changed.names.extend(differing);
    soon
}

/// Lists the directory, waiting until it exists. Also returns whether it was lost.
async fn list_or_wait<F: FnMut(Message) -> ControlFlow<()>>(
    directory: &Path,
    watch: &mut DirectoryWatch,
    mut lost: bool,
    emitter: &mut Emitter<F>,
) -> (BTreeSet<OsString>, bool) {
    loop {
        let listed = if lost { watch.watch(directory).and_then(|()| list(directory)) } else { list(directory) };
        match listed {
            Ok(names) => return (names, lost),
            Err(error) => {
                lost = true;
                emitter.error(
                    Subject::File(directory.to_owned()),
                    format!("cannot be read: {error}; its last content stays in use; restore the directory"),
                );
                tokio::time::sleep(DIRECTORY_RETRY_INTERVAL).await;
            }
        }
    }
}

/// The names of the manifests in a directory.
fn list(directory: &Path) -> io::Result<BTreeSet<OsString>> {
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(directory)? {
        let name = entry?.file_name();
        if is_manifest_name(&name) {
            names.insert(name);
        }
    }
    Ok(names)
}

/// Whether a file of this name is a manifest.
fn is_manifest_name(name: &OsStr) -> bool {
    let extension = Path::new(name).extension().and_then(OsStr::to_str);
    !name.as_encoded_bytes().starts_with(b".") && matches!(extension, Some("yaml" | "yml" | "json"))
}
