//! What to run in the lab, and what came of it.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Always the file a process was started from, whatever has become of its name.
pub(crate) const THIS_EXECUTABLE: &str = "/proc/self/exe";

/// A command to run in the lab, with the environment and the current directory of this process unless told otherwise.
///
/// In the guest the command sees the files of this machine, but what it writes is gone afterwards, except under
/// [`writable`](Job::writable) directories. `/run`, `/dev`, `/proc` and `/sys` are the guest's own. It has no input.
#[derive(Clone, Debug)]
pub struct Job {
    pub(crate) program: OsString,
    pub(crate) args: Vec<OsString>,
    pub(crate) env: Vec<(OsString, OsString)>,
    pub(crate) cwd: Option<PathBuf>,
    pub(crate) writable: Vec<PathBuf>,
    pub(crate) memory_mib: u32,
    pub(crate) time_limit: Option<Duration>,
    pub(crate) interactive: bool,
    pub(crate) init: Option<PathBuf>,
}

impl Job {
    /// A job that runs `program`, looked up in `PATH` if it has no slash.
    pub fn new(program: impl Into<OsString>) -> Self {
        Self {
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            cwd: None,
            writable: Vec::new(),
            memory_mib: 1024,
            time_limit: Some(Duration::from_secs(600)),
            interactive: false,
            init: None,
        }
    }

    /// A job that runs the executable of this process, even if the file was replaced since, as cargo does with `xtask`.
    pub fn this_executable() -> Self {
        // In the guest this is the executable of its first process, which is ours too.
        Self::new(THIS_EXECUTABLE)
    }

    /// One more argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// More arguments.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// One more environment variable, on top of those of this process.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// The directory to run in, instead of the current one.
    #[must_use]
    pub fn current_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cwd = Some(dir.into());
        self
    }

    /// A directory of this machine the command may write to, under the same path.
    #[must_use]
    pub fn writable(mut self, dir: impl Into<PathBuf>) -> Self {
        self.writable.push(dir.into());
        self
    }

    /// The guest's memory; 1 GiB if not said. What is not touched costs nothing.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// How long the command may take; ten minutes if not said.
    #[must_use]
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = Some(limit);
        self
    }

    /// Gives the command this process's terminal as input and output, and no time limit.
    #[must_use]
    pub fn interactive(mut self) -> Self {
        self.interactive = true;
        self.time_limit = None;
        self
    }

    /// The executable that is the guest's first process and calls [`crate::init::main`]: `xtask`. Needed only when the
    /// executable of this process does not do so.
    #[must_use]
    pub fn init(mut self, executable: impl Into<PathBuf>) -> Self {
        self.init = Some(executable.into());
        self
    }

    /// The command line as one would type it, for messages.
    pub(crate) fn command_line(&self) -> String {
        let words = std::iter::once(&self.program).chain(&self.args);
        words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    }

    /// The environment of the command: that of this process without what makes no sense in the lab, then its own.
    pub(crate) fn environment(&self) -> Vec<(OsString, OsString)> {
        let mut all: Vec<(OsString, OsString)> = std::env::vars_os()
            .filter(|(name, _)| !["TMPDIR", "XDG_RUNTIME_DIR", "OLDPWD", "PWD"].iter().any(|unwanted| name == unwanted))
            .collect();
        for (name, value) in &self.env {
            all.retain(|(known, _)| known != name);
            all.push((name.clone(), value.clone()));
        }
        match all.iter_mut().find(|(name, _)| name == "PATH") {
            Some((_, path)) => *path = with_system_directories(path),
            None => all.push(("PATH".into(), with_system_directories(OsStr::new("")))),
        }
        all
    }
}

/// `ip`, `nft` and `ipvsadm` live in directories that the `PATH` of an ordinary user often lacks.
fn with_system_directories(path: &OsStr) -> OsString {
    let mut dirs: Vec<PathBuf> = std::env::split_paths(path).filter(|dir| !dir.as_os_str().is_empty()).collect();
    for dir in ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"] {
        if !dirs.iter().any(|known| known == Path::new(dir)) {
            dirs.push(dir.into());
        }
    }
    // Joining fails only for a directory with a colon in its name, and splitting produced none.
    std::env::join_paths(dirs).unwrap_or_else(|_| path.to_owned())
}

/// How a command in the lab ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub(crate) i32);

impl Status {
    /// Whether the command exited with 0.
    pub fn success(self) -> bool {
        self.0 == 0
    }

    /// The exit code as a shell reports it: 128 plus the signal for a killed command, 127 for one that was not found.
    pub fn code(self) -> i32 {
        self.0
    }
}

/// What a command in the lab wrote, and how it ended.
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended.
    pub status: Status,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_of_a_job_overrides_that_of_the_process() {
        let job = Job::new("true").env("CARGO_MANIFEST_DIR", "/elsewhere").env("EMPTY", "").env("EMPTY", "no");
        let env = job.environment();
        let values = |name: &str| env.iter().filter(|(n, _)| n == name).map(|(_, v)| v.clone()).collect::<Vec<_>>();
        assert_eq!(values("CARGO_MANIFEST_DIR"), ["/elsewhere"]);
        assert_eq!(values("EMPTY"), ["no"]);
        assert!(values("TMPDIR").is_empty());
    }

    #[test]
    fn system_directories_follow_those_of_the_user() {
        assert_eq!(
            with_system_directories(OsStr::new("/home/me/bin:/usr/bin")),
            "/home/me/bin:/usr/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/sbin:/bin"
        );
        assert!(with_system_directories(OsStr::new("")).to_string_lossy().starts_with("/usr/local/sbin:"));
    }
}
