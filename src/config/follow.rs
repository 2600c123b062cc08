//! Notices that files have changed that were read at the start, whichever way: written in place, replaced, or behind a
//! symbolic link that points elsewhere, as kubelet updates a `ConfigMap`.

use std::path::PathBuf;
use std::time::Duration;

/// How often the files are read. They are small, and reading them is the only way that misses nothing: inotify tells neither
/// of a link that is swapped further up nor of what another machine writes.
const LOOK: Duration = Duration::from_secs(2);

/// Files whose contents are known.
#[derive(Debug)]
pub(crate) struct Files {
    paths: Vec<PathBuf>,
    contents: Contents,
}

/// One for each file; `None` for one that cannot be read.
type Contents = Vec<Option<Vec<u8>>>;

impl Files {
    /// The files as they are now.
    pub(crate) fn new(paths: Vec<PathBuf>) -> Self {
        let contents = paths.iter().map(|path| std::fs::read(path).ok()).collect();
        Self { paths, contents }
    }

    /// Waits until a file has another content. One that is gone or cannot be read has not changed yet, and those that are
    /// being written are given the time until they stay the same.
    pub(crate) async fn changed(&mut self) {
        let mut before = None;
        loop {
            tokio::time::sleep(LOOK).await;
            let now = self.look();
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

    /// What the files have; for one that cannot be read, what it had.
    fn look(&self) -> Contents {
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
    async fn a_swapped_link_is_a_change_and_a_file_that_is_gone_for_a_while_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("one")).unwrap();
        fs::create_dir(path("two")).unwrap();
        fs::write(path("one/config"), "1").unwrap();
        fs::write(path("two/config"), "2").unwrap();
        symlink("one", path("data")).unwrap();
        symlink("data/config", path("config")).unwrap();
        let mut files = Files::new(vec![path("config")]);
        let soon = Duration::from_secs(60);
        assert!(tokio::time::timeout(soon, files.changed()).await.is_err(), "nothing has changed");
        fs::remove_file(path("data")).unwrap();
        assert!(tokio::time::timeout(soon, files.changed()).await.is_err(), "it is gone and may come back");
        symlink("two", path("data")).unwrap();
        assert!(tokio::time::timeout(soon, files.changed()).await.is_ok());
        assert!(tokio::time::timeout(soon, files.changed()).await.is_err(), "once is enough");
    }
}
