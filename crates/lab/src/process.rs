//! Child processes that end with us, end in time, and whose output is passed on while they run.

use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::error::{Context, Result};

/// Has the child killed when the thread that starts it ends, however that happens. That thread must wait for it.
#[expect(unsafe_code, reason = "there is no safe way to run code in a child before it executes its program")]
pub(crate) fn end_with_us(command: &mut Command, signal: Signal) {
    // SAFETY: the closure makes one system call and nothing else: it neither allocates nor takes a lock, so it is safe
    // between fork and exec in a process with threads.
    unsafe {
        command.pre_exec(move || Ok(rustix::process::set_parent_process_death_signal(Some(signal))?));
    }
}

/// Waits until the child ends or the time is up: then `None`, and the child still runs.
pub(crate) fn wait(child: &mut Child, limit: Option<Duration>) -> Result<Option<ExitStatus>> {
    let Some(limit) = limit else {
        return child.wait().map(Some).context("wait for", format_args!("process {}", child.id()));
    };
    let deadline = Instant::now() + limit;
    let pid = pid(child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("watch", format_args!("process {}", child.id()))?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], timeout.as_ref()) {
            Ok(0) if left.is_zero() => return Ok(None),
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return child.wait().map(Some).context("wait for", format_args!("process {}", child.id())),
            Err(error) => return Err(error).context("wait for", format_args!("process {}", child.id())),
        }
    }
}

/// Kills the child and all of its process group, and waits for its end.
pub(crate) fn kill_all(child: &mut Child) -> Option<ExitStatus> {
    // The group may not exist (any more, or yet), and the child may have ended: both are what is wanted.
    let _ = kill_process_group(pid(child), Signal::KILL);
    let _ = child.kill();
    child.wait().ok()
}

pub(crate) fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// The status as a shell gives it.
pub(crate) fn shell_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Where the output of a child goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Sink {
    /// To our own standard output.
    Stdout,
    /// To our own standard error.
    Stderr,
    /// Into memory.
    Memory,
}

/// Copies everything that comes through the pipe until its last writer closes it; returns what [`Sink::Memory`] kept.
pub(crate) fn forward(mut from: PipeReader, to: Sink) -> Result<JoinHandle<Vec<u8>>> {
    let own = match to {
        Sink::Stdout => {
            let _ = io::stdout().flush();
            Some(io::stdout().as_fd().try_clone_to_owned().context("duplicate", "standard output")?)
        }
        Sink::Stderr => Some(io::stderr().as_fd().try_clone_to_owned().context("duplicate", "standard error")?),
        Sink::Memory => None,
    };
    let mut own = own.map(File::from);
    Ok(std::thread::spawn(move || {
        let mut kept = Vec::new();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match from.read(&mut buffer) {
                Ok(0) => return kept,
                Ok(count) if matches!(to, Sink::Memory) => kept.extend_from_slice(&buffer[..count]),
                Ok(count) => {
                    // When nobody reads our output any more the command must still be able to end.
                    if own.as_mut().is_some_and(|file| write_all(file, &buffer[..count]).is_err()) {
                        own = None;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return kept,
            }
        }
    }))
}

/// Writes everything, also to an output that someone made non-blocking.
fn write_all(file: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(file, PollFlags::OUT)], None)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What a thread of [`forward`] kept.
pub(crate) fn collect(forwarding: JoinHandle<Vec<u8>>) -> Vec<u8> {
    forwarding.join().unwrap_or_default()
}
