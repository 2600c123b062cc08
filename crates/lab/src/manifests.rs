//! A directory of manifests, whose files are replaced as a whole: whoever reads one reads it all.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Context, Result};

/// A directory of manifests. It stays when this value is dropped.
#[derive(Clone, Debug)]
pub struct Manifests(PathBuf);

impl Manifests {
    /// The directory with this path, which is created unless it is there.
    pub fn at(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        fs::create_dir_all(&path).context("create", path.display())?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Puts a file in place in one move.
    pub fn write(&self, name: &str, content: &(impl ToString + ?Sized)) -> Result<()> {
        // The agent takes no file whose name begins with a dot for a manifest.
        let (temporary, path) = (self.0.join(format!(".{name}")), self.0.join(name));
        fs::write(&temporary, content.to_string()).context("write", temporary.display())?;
        fs::rename(&temporary, &path).context("put in place", path.display())
    }

    /// Whether there is a file.
    pub fn contains(&self, name: &str) -> bool {
        self.0.join(name).exists()
    }

    /// Removes a file.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.0.join(name);
        fs::remove_file(&path).context("remove", path.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scratch;

    #[test]
    fn files_are_written_replaced_and_removed() {
        let dir = Scratch::new().unwrap();
        let manifests = Manifests::at(dir.path().join("manifests")).unwrap();
        for content in ["one", "two"] {
            manifests.write("a.yaml", content).unwrap();
            assert_eq!(fs::read_to_string(manifests.path().join("a.yaml")).unwrap(), content);
        }
        assert_eq!(fs::read_dir(manifests.path()).unwrap().count(), 1);
        manifests.remove("a.yaml").unwrap();
        assert!(!manifests.contains("a.yaml") && manifests.remove("a.yaml").is_err());
    }
}
