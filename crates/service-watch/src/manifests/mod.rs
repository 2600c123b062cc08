//! A directory of manifests as a source: what `kubectl get -o yaml` prints, kept in files.
//!
//! All files `*.yaml`, `*.yml` and `*.json` directly in the directory count, except hidden ones. A file may hold
//! several documents and lists. A file that does not parse, or cannot be read, keeps what it said before; a file that
//! is gone takes its objects away. Where two files have the same object, the file that sorts first wins.

mod follow;
mod read;
mod shelf;

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use self::follow::Follower;
use self::shelf::Shelf;
use crate::error::Error;
use crate::model::Change;
use crate::report::{Counters, Message, Outlet, Subject};

/// How often a directory that has vanished is looked for.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Services, EndpointSlices and Nodes from the files of a directory.
#[derive(Debug)]
pub struct Manifests {
    directory: PathBuf,
    node: Arc<str>,
    counters: Arc<Counters>,
}

impl Manifests {
    /// The manifests in `directory`; of Nodes, only the one named `node` counts.
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
        while !outlet.closed() {
            let changed = follower.changed().await;
            let mut names = changed.names;
            if changed.all {
                // What was there before and is no longer must be read too: that is how it is taken away.
                names.extend(files.names());
                names.extend(settled(&directory, &mut follower, changed.lost, &mut outlet).await);
                outlet.listed();
            }
            files.read(names, &mut outlet);
        }
        Ok(())
    }
}

/// Lists the directory, waiting for it to exist (again).
async fn settled<F: FnMut(Message) -> ControlFlow<()>>(
    directory: &Path,
    follower: &mut Follower,
    mut lost: bool,
    outlet: &mut Outlet<F>,
) -> BTreeSet<OsString> {
    loop {
        let listed = if lost { follower.watch(directory).and_then(|()| list(directory)) } else { list(directory) };
        match listed {
            Ok(names) => {
                outlet.well(Subject::File(directory.to_owned()));
                return names;
            }
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
