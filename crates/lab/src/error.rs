//! What can go wrong in the lab, each with what to do about it.

use std::fmt::Display;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::version::Version;

/// The result of everything in the lab.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the lab could not do what it was asked. A command that ran and failed is not an error: see [`crate::Status`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call failed.
    #[error("cannot {action} {object}: {error}")]
    Io {
        /// What was attempted, as a verb.
        action: &'static str,
        /// On what.
        object: String,
        /// The system's answer. It is part of the message, and so not a `source` that would be shown twice.
        error: io::Error,
    },

    /// The lab was asked for in a way it cannot serve.
    #[error("{0}")]
    Usage(String),

    /// Programs are missing and only an administrator can install them.
    #[error("the lab needs packages that are not installed; install them with: {command}")]
    Packages {
        /// The exact command.
        command: String,
    },

    /// A program the lab relies on failed.
    #[error("`{command}` failed ({status}): {stderr}")]
    Command {
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// What it said.
        stderr: String,
    },

    /// The guest's kernel could not be built.
    #[error("building the guest's kernel failed at: {step} ({status}). The end of {}:\n{tail}", log.display())]
    Build {
        /// The step that failed.
        step: String,
        /// How it ended.
        status: String,
        /// Where the whole log is.
        log: PathBuf,
        /// Its last lines.
        tail: String,
    },

    /// The kernel's build system dropped settings that the lab relies on.
    #[error(
        "Linux {version} does not accept these settings of crates/lab/guest/kernel.config: {}. Either a setting \
         it depends on is missing there, or this kernel version renamed it",
        missing.join(" ")
    )]
    Config {
        /// The release.
        version: Version,
        /// The settings that are not in the final configuration.
        missing: Vec<String>,
    },

    /// The command's directory is one that the guest does not share with its host.
    #[error(
        "the guest has no directory {}: it sees this machine's files, but has a /run, /dev, /proc and /sys of its own",
        .0.display()
    )]
    Directory(PathBuf),

    /// The guest could not prepare itself to run the command.
    #[error("the guest could not start the command: {0}")]
    GuestSetup(String),

    /// The guest's kernel panicked or ended without the command's exit status.
    #[error(
        "the guest died before the command ended (its kernel's process: {status}). The end of its console:\n{console}"
    )]
    GuestDied {
        /// How the guest's process ended.
        status: String,
        /// The last lines of its console.
        console: String,
    },

    /// The agent did not do what was waited for.
    #[error("the agent did not {what}: {how}; the end of its log:\n{log}")]
    Agent {
        /// What it should have done.
        what: String,
        /// Why nobody waits any longer.
        how: String,
        /// The last lines of its log.
        log: String,
    },

    /// Something that was waited for did not happen.
    #[error("it did not {what} within {} s", limit.as_secs())]
    Timeout {
        /// What should have happened.
        what: String,
        /// How long it was waited for.
        limit: Duration,
    },

    /// The command did not end in time.
    #[error("`{command}` did not end within {} s and was stopped", limit.as_secs())]
    TimeLimit {
        /// The command line.
        command: String,
        /// The time it had.
        limit: Duration,
    },
}

/// Says what was attempted when a system call fails.
pub(crate) trait Context<T> {
    /// `cannot ACTION OBJECT: ...`
    fn context(self, action: &'static str, object: impl Display) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, action: &'static str, object: impl Display) -> Result<T> {
        self.map_err(|error| Error::Io { action, object: object.to_string(), error: error.into() })
    }
}
