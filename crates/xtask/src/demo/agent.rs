//! The demo's kube-ipvs: its manifests, its process, and what it says.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result, bail};
use lab::Scratch;

use super::network::{Backend, Network};
use super::read;

/// The agent's flags; it runs in the directory that has `hello`. How much connection tracking may hold is not for a node in
/// a namespace of its own to say.
pub(crate) const FLAGS: [&str; 5] = [
    "--manifests=hello",
    "--hostname-override=node-a",
    "--ipvs-min-sync-period=0s",
    "--ipvs-tcpfin-timeout=2s",
    "--conntrack-max-per-core=0",
];

const SLICE: &str = "endpointslice.yaml";
const SERVICE: &str = "service.yaml";

/// A copy of the example that can be edited.
#[derive(Debug)]
pub(crate) struct Manifests {
    dir: Scratch,
}

impl Manifests {
    pub(crate) fn copy(example: &Path) -> Result<Self> {
        let copy = Self { dir: Scratch::new()? };
        fs::create_dir(copy.path("")).context("cannot create a directory for the manifests")?;
        for file in ["node.yaml", SERVICE, SLICE] {
            let to = copy.path(file);
            fs::copy(example.join(file), &to)
                .with_context(|| format!("cannot copy {} to {}", example.join(file).display(), to.display()))?;
        }
        Ok(copy)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join("hello").join(file)
    }

    /// Adds an endpoint. This and the other changes return the lines that differ, as `diff` marks them.
    pub(crate) fn add(&self, backend: Backend) -> Result<Vec<String>> {
        let address = backend.socket().ip();
        let line = format!("- {{addresses: [{address}], conditions: {{ready: true}}, nodeName: node-a}}\n");
        self.edit(SLICE, |text| text.to_owned() + &line)
    }

    /// Removes an endpoint.
    pub(crate) fn remove(&self, backend: Backend) -> Result<Vec<String>> {
        let address = format!("[{}]", backend.socket().ip());
        self.edit(SLICE, |text| text.split_inclusive('\n').filter(|line| !line.contains(&address)).collect())
    }

    /// Switches session affinity on.
    pub(crate) fn set_affinity(&self) -> Result<Vec<String>> {
        self.edit(SERVICE, |text| text.replace("sessionAffinity: None", "sessionAffinity: ClientIP"))
    }

    fn edit(&self, file: &str, change: impl FnOnce(&str) -> String) -> Result<Vec<String>> {
        let old = read(&self.path(file))?;
        let new = change(&old);
        let difference = difference(&old, &new);
        if difference.is_empty() {
            bail!("{file} is not written as the demo expects: there is nothing in it to change");
        }
        lab::manifests::Manifests::at(self.path(""))?.write(file, &new)?;
        Ok(difference)
    }
}

/// The lines that only one of the texts has.
fn difference(old: &str, new: &str) -> Vec<String> {
    let only = |mark: char, a: &str, b: &str| -> Vec<String> {
        a.lines().filter(|line| !b.lines().any(|other| other == *line)).map(|line| format!("{mark} {line}")).collect()
    };
    [only('-', old, new), only('+', new, old)].concat()
}

/// The process, which ends with this value.
#[derive(Debug)]
pub(crate) struct Agent {
    executable: PathBuf,
    dir: PathBuf,
    process: Option<lab::agent::Agent>,
    /// How many of its lines were handed out.
    read_lines: usize,
    /// Lines of those before it that were not.
    unread: Vec<String>,
}

impl Agent {
    pub(crate) fn new(executable: &Path, manifests: &Manifests) -> Self {
        let dir = manifests.dir.path().to_owned();
        Self { executable: executable.to_owned(), dir, process: None, read_lines: 0, unread: Vec::new() }
    }

    /// Starts it on the node.
    pub(crate) fn start(&mut self, network: &Network) -> Result<()> {
        let mut command = Command::new(&self.executable);
        command.args(FLAGS).current_dir(&self.dir);
        self.process = Some(network.node().run(|| lab::agent::Agent::spawn(&mut command))??);
        self.read_lines = 0;
        Ok(())
    }

    /// Kills it with SIGKILL, so that it can do nothing about it.
    pub(crate) fn kill(&mut self) {
        self.unread = self.lines();
        self.process = None;
    }

    /// How it ended, if it did so by itself.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.process.as_mut().and_then(|process| process.exit_status().ok().flatten())
    }

    /// Whether it has logged these words since [`new_log_lines`](Self::new_log_lines) was last asked for.
    pub(crate) fn has_logged(&self, words: &str) -> bool {
        self.lines().iter().any(|line| line.contains(words))
    }

    /// What it has logged since the last call, without the time.
    pub(crate) fn new_log_lines(&mut self) -> Vec<String> {
        let new_lines = self.lines();
        self.read_lines += new_lines.len() - self.unread.len();
        self.unread.clear();
        new_lines.iter().map(|line| without_time(line).to_owned()).collect()
    }

    /// The lines that were not handed out.
    fn lines(&self) -> Vec<String> {
        let new = self.process.as_ref().map(|process| process.lines_from(self.read_lines)).unwrap_or_default();
        self.unread.iter().cloned().chain(new.into_iter().map(|line| line.text)).collect()
    }
}

/// A log line begins with the time, which has no meaning here; other output does not.
fn without_time(line: &str) -> &str {
    match line.split_once(' ') {
        Some((time, rest)) if time.ends_with('Z') && time.starts_with(|c: char| c.is_ascii_digit()) => {
            rest.trim_start()
        }
        _ => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_the_lines_of_one_side() {
        assert_eq!(difference("a\nb\nc\n", "a\nx\nc\nd\n"), ["- b", "+ x", "+ d"]);
        assert!(difference("a\n", "a\n").is_empty());
    }

    #[test]
    fn log_lines_lose_their_time() {
        assert_eq!(without_time("2026-01-02T03:04:05.678901Z  INFO audited total=1"), "INFO audited total=1");
        assert_eq!(without_time("thread 'main' panicked"), "thread 'main' panicked");
    }
}
