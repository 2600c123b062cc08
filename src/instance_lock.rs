//! The instance lock: one agent for each network namespace. Two agents would each repair what the other writes, for
//! ever.
//!
//! [`reconciler::linux::instance`] says what the lock is: something that belongs to a netlink socket of this process, and
//! takes `CAP_NET_ADMIN`. When the agent executes itself, it passes the socket on as standard input, which it does not
//! use otherwise: so the lock is held all the time, and no child process inherits it.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};
use reconciler::linux::instance::{self, Claim, LOG_GROUP, TABLE};
use rustix::stdio::dup2_stdin;
use tracing::warn;

use crate::logging;

/// The right to program this network namespace. It is held until this value is dropped.
#[derive(Debug)]
pub(crate) struct InstanceLock(Option<OwnedFd>);

impl InstanceLock {
    /// Fails if another agent holds the lock.
    pub(crate) fn acquire() -> Result<Self> {
        match instance::claim(inherited()) {
            Claim::Ours(socket) => Ok(Self(Some(socket))),
            Claim::Taken { port } => {
                let port = port.map_or_else(String::new, |port| format!(" with the netlink port {port}"));
                bail!(
                    "another kube-ipvs programs this network namespace: a process{port} (`ss -f netlink -p` shows it) owns the table \
                     `ip {TABLE}` of nf_tables or the group {LOG_GROUP} of nfnetlink_log. Stop that one first, or leave the node to \
                     it. Nothing was changed"
                )
            }
            Claim::Unknown(problem) => {
                warn!("cannot find out whether another kube-ipvs programs this network namespace: {problem}");
                Ok(Self(None))
            }
        }
    }

    /// Replaces this process with the same program and arguments, which gets the lock. Returns only if that fails.
    ///
    /// kubelet would restart a container that exits too, but with an increasing delay.
    pub(crate) fn exec_self(self) -> std::io::Error {
        let mut arguments = std::env::args_os();
        let name = arguments.next().unwrap_or_default();
        // What waits in the log would be lost.
        logging::flush();
        let stdin = self.0.map_or_else(Stdio::null, Stdio::from);
        Command::new("/proc/self/exe").arg0(name).args(arguments).stdin(stdin).exec()
    }
}

/// The socket that the program passed on to itself, if it did.
fn inherited() -> Option<OwnedFd> {
    let socket = std::io::stdin().as_fd().try_clone_to_owned().ok()?;
    instance::port(&socket)?;
    // The duplicate is closed at an exec; standard input would be inherited by every child process.
    let null = File::open("/dev/null").ok()?;
    dup2_stdin(&null).ok()?;
    Some(socket)
}
