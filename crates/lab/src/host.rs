//! Runs a job on the kernel of this machine, in network and mount namespaces of its own.
//!
//! What the job does to the network is gone afterwards. What it writes to files is not: unlike the guest, the
//! machine's files are writable here.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::Signal;
use rustix::thread::UnshareFlags;

use crate::error::{Context, Error, Result};
use crate::job::{Job, Output, Status};
use crate::netns;
use crate::process::{self, Sink};

/// Why jobs cannot run on this machine's kernel, if they cannot.
pub(crate) fn unavailable_reason() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("it needs root".into());
    }
    if !has_ipvs() {
        // It may be a module that nothing has asked for yet; where there is none this fails, and that is the answer.
        let _ = Command::new("modprobe").arg("ip_vs").stdin(Stdio::null()).stderr(Stdio::null()).status();
        if !has_ipvs() {
            return Some("the kernel of this machine has no IPVS".into());
        }
    }
    // Root in a container usually may not.
    in_fresh_namespaces(|| Ok(())).err().map(|error| error.to_string())
}

fn has_ipvs() -> bool {
    Path::new("/proc/net/ip_vs").exists()
}

/// Runs the job and passes its output on.
pub(crate) fn run(job: &Job, sinks: [Sink; 2]) -> Result<Output> {
    in_fresh_namespaces(|| run_here(job, sinks))
}

fn run_here(job: &Job, sinks: [Sink; 2]) -> Result<Output> {
    let line = job.command_line();
    let mut command = Command::new(&job.program);
    command.args(&job.args).env_clear().envs(job.environment());
    if let Some(dir) = &job.cwd {
        command.current_dir(dir);
    }
    process::end_with_us(&mut command, Signal::KILL);
    let forwarding = if job.interactive {
        None
    } else {
        let (stdout, stdout_writer) = std::io::pipe().context("create", "a pipe")?;
        let (stderr, stderr_writer) = std::io::pipe().context("create", "a pipe")?;
        // A group of its own, so that the time limit ends all of it.
        command.stdin(Stdio::null()).stdout(stdout_writer).stderr(stderr_writer).process_group(0);
        Some([process::forward(stdout, sinks[0])?, process::forward(stderr, sinks[1])?])
    };
    let spawned = command.spawn();
    // The command holds the pipes' other ends, without which reading them would never end.
    drop(command);
    let ended = match spawned {
        Ok(mut child) => {
            let ended = process::wait(&mut child, job.time_limit);
            if !job.interactive {
                process::kill_all(&mut child);
            }
            ended?.map(process::shell_code)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("lab: {}: {error}", job.program.to_string_lossy());
            Some(127)
        }
        Err(error) => return Err(error).context("run", line),
    };
    let [stdout, stderr] = forwarding.map(|both| both.map(process::collect)).unwrap_or_default();
    match ended {
        Some(code) => Ok(Output { status: Status(code), stdout, stderr }),
        None => Err(Error::TimeLimit { command: line, limit: job.time_limit.unwrap_or_default() }),
    }
}

/// Does something on a thread with network and mount namespaces of its own, which children inherit.
fn in_fresh_namespaces<T: Send>(action: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    netns::on_own_thread(|| {
        netns::unshare(UnshareFlags::NEWNET | UnshareFlags::NEWNS)?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).context("make private the mounts under", "/")?;
        // /sys shows the network that was current when it was mounted.
        mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None).context("mount", "/sys")?;
        fs::create_dir_all(netns::NAMED).context("create", netns::NAMED)?;
        mount("tmpfs", netns::NAMED, "tmpfs", MountFlags::empty(), None).context("mount", netns::NAMED)?;
        netns::loopback_up()?;
        action()
    })
}
