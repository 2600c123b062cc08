//! A directory of manifests as a source: what `kubectl get -o yaml` prints, kept in files.
//!
//! All files `*.yaml`, `*.yml` and `*.json` directly in the directory count, except hidden ones. A file may hold
//! several documents and lists. A file that does not parse, or cannot be read, keeps what it said before; a file that
//! is gone takes its objects away. A directory that is lost keeps what it said, until there is one in its place with a
//! manifest in it: an empty one is a mount that failed rather than a wish. Where two files have the same object, the
//! file that sorts first wins.

mod follow;
pub(crate) mod read;
mod shelf;

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use self::follow::{Changed, Follower};
use self::shelf::Shelf;
use crate::error::Error;
use crate::model::Change;
use crate::report::{Counters, Message, Outlet, Subject};

/// How often a directory that has vanished is looked for.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How often all files are looked at: inotify says nothing of edits behind a symbolic link, nor of those that another
/// machine makes.
const LOOK: Duration = Duration::from_secs(30);
/// How soon after a look that found a file to differ it is looked at again.
const LOOK_SOON: Duration = Duration::from_secs(1);

const HOLLOW: &str = "the directory is back and empty: what was known stays; put a file there, an empty one if there is \
                      nothing to serve, or restart";

/// Services, EndpointSlices and Nodes from the files of a directory.
#[derive(Debug)]
pub struct Manifests {
    directory: PathBuf,
    node: Arc<str>,
    counters: Arc<Counters>,
}

impl Manifests {
    /// The manifests in `directory`; `node` is the name of the own Node.
    pub fn new(directory: impl Into<PathBuf>, node: impl Into<Arc<str>>) -> Self {
        Self { directory: directory.into(), node: node.into(), counters: Arc::default() }
    }

    /// What has been counted so far.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// As [`Source::run`](crate::Source::run). An error is a directory that cannot be read at the start; one that
    /// vanishes later is reported and looked for, and what it said stays.
    pub async fn run(self, sink: impl FnMut(Message) -> ControlFlow<()>) -> Result<(), Error> {
        let Self { directory, node, counters } = self;
        let mut outlet = Outlet::new(sink, counters);
        // Watched first and read then, so that nothing falls between.
        let mut follower = Follower::new(&directory)?;
        let names = list(&directory).map_err(|source| Error::Directory { path: directory.clone(), source })?;
        let mut files = Shelf::new(directory.clone(), node);
        files.read(names, &mut outlet);
        outlet.listed();
        outlet.change(Change::Synced);
        let mut next_look = Instant::now() + LOOK;
        // The directory was lost, and the one in its place has not had a manifest yet.
        let mut hollow = false;
        while !outlet.closed() {
            let mut changed = follower.changed(next_look).await;
            if Instant::now() >= next_look {
                let soon = look(&directory, &follower, &mut files, &mut changed);
                next_look = Instant::now() + if soon { LOOK_SOON } else { LOOK };
            }
            let mut names = changed.names;
            if changed.all || hollow {
                let (listed, lost) = settled(&directory, &mut follower, changed.lost, &mut outlet).await;
                // One that is still being written is no manifest yet.
                let filled = if changed.all { !listed.is_empty() } else { !listed.is_disjoint(&names) };
                hollow = (hollow || lost) && !filled && !files.is_empty();
                if hollow {
                    outlet.problems(Subject::File(directory.clone()), vec![HOLLOW.into()]);
                    continue;
                }
                outlet.well(Subject::File(directory.clone()));
                // What was there before and is no longer must be read too: that is how it is taken away.
                names.extend(files.names());
                names.extend(listed);
                outlet.listed();
            }
            files.read(names, &mut outlet);
        }
        Ok(())
    }
}

/// Adds to `changed` what inotify has not told. Says whether there is more to be found soon.
fn look(directory: &Path, follower: &Follower, files: &mut Shelf, changed: &mut Changed) -> bool {
    if follower.strayed() {
        changed.all = true;
        changed.lost = true;
        return false;
    }
    let Ok(names) = list(directory) else {
        changed.all = true;
        return false;
    };
    let (differing, soon) = files.look(&names);
    changed.names.extend(differing);
    soon
}

/// Lists the directory, waiting for it to exist (again); and says whether it was lost.
async fn settled<F: FnMut(Message) -> ControlFlow<()>>(
    directory: &Path,
    follower: &mut Follower,
    mut lost: bool,
    outlet: &mut Outlet<F>,
) -> (BTreeSet<OsString>, bool) {
    loop {
        let listed = if lost { follower.watch(directory).and_then(|()| list(directory)) } else { list(directory) };
        match listed {
            Ok(names) => return (names, lost),
            Err(error) => {
                lost = true;
                outlet.error(
                    Subject::File(directory.to_owned()),
                    format!("cannot be read: {error}; all that was in it stays as it was; bring the directory back"),
                );
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        }
    }
}

/// The names in a directory that count.
fn list(directory: &Path) -> io::Result<BTreeSet<OsString>> {
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(directory)? {
        let name = entry?.file_name();
        if counts(&name) {
            names.insert(name);
        }
    }
    Ok(names)
}

/// Whether a name in the directory is one of a manifest.
fn counts(name: &OsStr) -> bool {
    let extension = Path::new(name).extension().and_then(OsStr::to_str);
    !name.as_encoded_bytes().starts_with(b".") && matches!(extension, Some("yaml" | "yml" | "json"))
}
