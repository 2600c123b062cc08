//! Notices a change of a file that was read at the start: written in place, replaced, or behind a symbolic link that
//! points elsewhere, which is how kubelet updates a `ConfigMap`.

use std::path::PathBuf;
use std::time::Duration;

/// How often the files are read. They are small, and only reading them misses nothing: inotify reports neither a link
/// that is replaced in a parent directory nor a write on another machine.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// Files and the contents they had when they were last read.
#[derive(Debug)]
pub(crate) struct FileWatcher {
    paths: Vec<PathBuf>,
    contents: Contents,
}

/// One element for each file; `None` for one that could not be read.
type Contents = Vec<Option<Vec<u8>>>;

impl FileWatcher {
    /// Watches the files from their present contents on.
    pub(crate) fn new(paths: Vec<PathBuf>) -> Self {
        let contents = paths.iter().map(|path| std::fs::read(path).ok()).collect();
        Self { paths, contents }
    }

    /// Waits until the content of a file has changed and then stayed the same for one interval, so that a write in
    /// progress is not read. A file that is missing or cannot be read counts as unchanged.
    pub(crate) async fn changed(&mut self) {
        let mut before = None;
        loop {
            tokio::time::sleep(POLL_INTERVAL).await;
            let now = self.read();
            if now == self.contents {
                before = None;
            } else if before.as_ref() == Some(&now) {
                self.contents = now;
                return;
            } else {
                before = Some(now);
            }
        }
    }

    /// The present contents; for a file that cannot be read, the last known one.
    fn read(&self) -> Contents {
        let files = self.paths.iter().zip(&self.contents);
        files.map(|(path, known)| std::fs::read(path).ok().or_else(|| known.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_replaced_symlink_is_a_change_and_a_missing_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("one")).unwrap();
        fs::create_dir(path("two")).unwrap();
        fs::write(path("one/config"), "1").unwrap();
        fs::write(path("two/config"), "2").unwrap();
        symlink("one", path("data")).unwrap();
        symlink("data/config", path("config")).unwrap();
        let mut watcher = FileWatcher::new(vec![path("config")]);
        let soon = Duration::from_secs(60);
        assert!(tokio::time::timeout(soon, watcher.changed()).await.is_err(), "nothing has changed");
        fs::remove_file(path("data")).unwrap();
        assert!(tokio::time::timeout(soon, watcher.changed()).await.is_err(), "a missing file may come back");
        symlink("two", path("data")).unwrap();
        assert!(tokio::time::timeout(soon, watcher.changed()).await.is_ok());
        assert!(tokio::time::timeout(soon, watcher.changed()).await.is_err(), "a change is reported once");
    }
}
