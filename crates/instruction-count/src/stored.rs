//! The file of counts: one line for each work, and the toolchain they were made with.

use std::env::consts::ARCH;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Precedes the toolchain.
const TOOLCHAIN: &str = "# Instructions of ";
/// Separates a name from its count.
const SEPARATOR: &str = " = ";

/// Counts, and the toolchain they were made with.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Stored {
    toolchain: String,
    counts: Vec<(String, u64)>,
}

impl Stored {
    /// Counts made on this machine.
    pub(crate) fn of_here(counts: Vec<(String, u64)>) -> Self {
        Self { toolchain: toolchain(), counts }
    }

    /// A file that does not exist has no counts.
    pub(crate) fn read(path: &Path) -> Result<Self, String> {
        match fs::read_to_string(path) {
            Ok(text) => Self::parse(&text).map_err(|line| format!("{}: cannot read: {line}", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::of_here(Vec::new())),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    pub(crate) fn write(&self, path: &Path) -> Result<(), String> {
        fs::write(path, self.text()).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// What the counts were made with.
    pub(crate) fn toolchain(&self) -> &str {
        &self.toolchain
    }

    pub(crate) fn is_of_this_architecture(&self) -> bool {
        self.toolchain.split(',').next() == Some(ARCH)
    }

    pub(crate) fn count(&self, name: &str) -> Option<u64> {
        self.counts.iter().find(|(known, _)| known == name).map(|(_, count)| *count)
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.counts.iter().map(|(name, _)| name.as_str())
    }

    fn text(&self) -> String {
        let lines = self.counts.iter().map(|(name, count)| format!("{name}{SEPARATOR}{count}\n"));
        format!(
            "{TOOLCHAIN}{}. Checked and written by the benchmark `instructions`, as the crate instruction-count says.\n{}",
            self.toolchain,
            lines.collect::<String>()
        )
    }

    /// An `Err` is the line that is not understood.
    fn parse(text: &str) -> Result<Self, &str> {
        let mut stored = Self::default();
        for line in text.lines() {
            if let Some(head) = line.strip_prefix(TOOLCHAIN) {
                head.split(". ").next().unwrap_or(head).clone_into(&mut stored.toolchain);
            } else {
                let (name, count) = line.rsplit_once(SEPARATOR).ok_or(line)?;
                stored.counts.push((name.into(), count.parse().map_err(|_| line)?));
            }
        }
        Ok(stored)
    }
}

/// The architecture and the compiler of here.
pub(crate) fn toolchain() -> String {
    let output = Command::new("rustc").arg("--version").output().ok();
    let version = output.and_then(|output| String::from_utf8(output.stdout).ok());
    format!("{ARCH}, {}", version.as_deref().map_or("an unknown compiler", str::trim))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_file_can_be_read() {
        let stored = Stored::of_here(vec![("decode: a, b".into(), 7), ("c = d".into(), 1_000_000)]);
        assert_eq!(Stored::parse(&stored.text()), Ok(stored));
    }

    #[test]
    fn an_invalid_line_is_an_error() {
        assert_eq!(Stored::parse("a = 1\nb = many\n"), Err("b = many"));
        assert_eq!(Stored::parse("a\n"), Err("a"));
    }
}
