//! Notices that the configuration file has changed, whichever way: written in place, replaced, or behind a symbolic link
//! that points elsewhere, as kubelet updates a `ConfigMap`.

use std::path::PathBuf;
use std::time::Duration;

/// How often the file is read. It is small, and reading it is the only way that misses nothing: inotify tells neither of a
/// link that is swapped further up nor of what another machine writes.
const LOOK: Duration = Duration::from_secs(2);

/// A file whose content is known.
#[derive(Debug)]
pub(crate) struct File {
    path: PathBuf,
    content: Option<Vec<u8>>,
}

impl File {
    /// The file as it is now.
    pub(crate) fn new(path: PathBuf) -> Self {
        let content = std::fs::read(&path).ok();
        Self { path, content }
    }

    /// Waits until the file has another content. One that is gone or cannot be read has not changed yet, and one that is
    /// being written is given the time until it stays the same.
    pub(crate) async fn changed(&mut self) {
        let mut before = None;
        loop {
            tokio::time::sleep(LOOK).await;
            let Ok(now) = std::fs::read(&self.path) else { continue };
            if self.content.as_ref() == Some(&now) {
                before = None;
            } else if before.as_ref() == Some(&now) {
                self.content = Some(now);
                return;
            } else {
                before = Some(now);
            }
        }
    }
}
