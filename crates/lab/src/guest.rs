//! Boots the guest, has it run one command, and passes on what the command writes and how it ends.
//!
//! The guest's first process, [`crate::init`], finds what to do in a *job directory* that both sides can write. The
//! command's standard output and error are two of the guest's serial lines, connected to pipes of ours; the console,
//! where only a dying kernel has something to say, goes to a file.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use rustix::fs::StatVfsMountFlags;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::Signal;
use rustix::termios::{OptionalActions, tcgetattr, tcgetwinsize, tcsetattr};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::error::{Context, Error, Result};
use crate::init::{self, Task};
use crate::job::{Job, Output, Status, THIS_EXECUTABLE};
use crate::kernel::{Bootable, last_lines};
use crate::process::{self, Sink};
use crate::qemu;
use crate::scratch::{self, Scratch};

/// What the guest's kernel is told on its command line, apart from its connections to the host.
const KERNEL_ARGUMENTS: [&str; 10] = [
    "rootfstype=hostfs",
    "rootflags=/",
    "ro",
    "quiet",
    // A kernel that fails must end, or a test would wait for it until its time is up.
    "panic=-1",
    "oops=panic",
    "noreboot",
    // From 6.16 on, system calls come by way of a filter and a signal, not by ptrace(2): quicker. Others ignore it.
    "seccomp=auto",
    // A fresh network namespace holds `lo` and nothing else.
    "dummy.numdummies=0",
    "fb_tunnels=none",
];

/// Runs the job in a guest with this kernel.
pub(crate) fn run(job: &Job, kernel: &Bootable, sinks: [Sink; 2]) -> Result<Output> {
    let dir = Scratch::new()?;
    let dir = dir.path();
    let terminal = job.interactive.then(Terminal::open).transpose()?;
    let task = task(job, sinks, terminal.as_ref())?;
    let encoded = serde_json::to_vec(&task).map_err(std::io::Error::from).context("encode", "the job")?;
    fs::write(dir.join(init::TASK), encoded).context("write", dir.join(init::TASK).display())?;
    provide_init(job.init.as_deref(), &dir.join("init"))?;

    let (stdout, stdout_writer) = std::io::pipe().context("create", "a pipe")?;
    let (stderr, stderr_writer) = std::io::pipe().context("create", "a pipe")?;
    let console = File::create(dir.join("console")).context("create", dir.join("console").display())?;
    let boot = File::create(dir.join("boot")).context("create", dir.join("boot").display())?;
    let lines = Lines {
        console: console.as_raw_fd(),
        stdout: stdout_writer.as_raw_fd(),
        stderr: stderr_writer.as_raw_fd(),
        terminal: terminal.as_ref().map(|terminal| terminal.file.as_raw_fd()),
    };
    let mut command = match kernel {
        Bootable::Uml(kernel) => {
            let mut command = Command::new(kernel);
            command.args(command_line(dir, job.memory_mib, &lines));
            command.env_clear().env("TMPDIR", memory_directory(job.memory_mib)?);
            command
        }
        Bootable::Stock(kernel) => qemu::command(kernel, dir, job.memory_mib, &lines, &task.writable)?,
    };
    command.env("PATH", "/usr/bin:/bin");
    command.stdin(Stdio::null()).stdout(boot.try_clone().context("duplicate", "a file")?).stderr(boot);
    // On this signal the kernel takes its helper processes with it.
    process::end_with_us(&mut command, Signal::TERM);

    let cpu = Cpu::reserve()?;
    let inherited = [console.as_fd(), stdout_writer.as_fd(), stderr_writer.as_fd()];
    let mut child = spawn(&mut command, inherited.into_iter().chain(terminal.as_ref().map(|t| t.file.as_fd())))?;
    drop((console, stdout_writer, stderr_writer));
    let forwarding = [process::forward(stdout, sinks[0]), process::forward(stderr, sinks[1])];
    let ended = cpu.pin(&child).and_then(|()| process::wait(&mut child, job.time_limit));
    // Its kernel may end without them, and they hold our pipes.
    let last_status = process::kill_all(&mut child);
    drop(terminal);
    let [stdout, stderr] = forwarding;
    let [stdout, stderr] = [process::collect(stdout?), process::collect(stderr?)];

    let status = match (ended?, fs::read_to_string(dir.join(init::STATUS))) {
        (_, Ok(code)) => code.trim().parse().ok().map(Status),
        (None, Err(_)) => {
            return Err(Error::TimeLimit { command: job.command_line(), limit: job.time_limit.unwrap_or_default() });
        }
        (Some(_), Err(_)) => None,
    };
    if let Some(status) = status {
        return Ok(Output { status, stdout, stderr });
    }
    if let Ok(message) = fs::read_to_string(dir.join(init::ERROR)) {
        return Err(Error::GuestSetup(message));
    }
    let text = [fs::read(dir.join("boot")), fs::read(dir.join("console"))].map(Result::unwrap_or_default).concat();
    Err(Error::GuestDied {
        status: last_status.map_or_else(|| "unknown".into(), |status| status.to_string()),
        console: last_lines(&text, 40),
    })
}

/// Puts the executable of the guest's first process where the kernel command line says: a word without white space.
fn provide_init(chosen: Option<&Path>, path: &Path) -> Result<()> {
    let executable = match chosen {
        Some(executable) => executable.to_owned(),
        None => std::env::current_exe().context("find", "the executable of this process")?,
    };
    if chosen.is_some() || executable.is_file() {
        std::os::unix::fs::symlink(&executable, path).context("create", path.display())
    } else {
        // Cargo has put a newer one in its place; we go on with the one we are.
        fs::copy(THIS_EXECUTABLE, path).map(drop).context("copy this process's executable to", path.display())
    }
}

fn task(job: &Job, sinks: [Sink; 2], terminal: Option<&Terminal>) -> Result<Task> {
    let mut env = job.environment();
    if terminal.is_none() && !shown_on_terminal(sinks) {
        // A serial line looks like a terminal to the command, but nobody is looking.
        env.retain(|(name, _)| name != "TERM" && name != "NO_COLOR");
        env.push(("TERM".into(), "dumb".into()));
        env.push(("NO_COLOR".into(), "1".into()));
    }
    let cwd = match &job.cwd {
        Some(dir) => std::path::absolute(dir).context("find", dir.display())?,
        None => std::env::current_dir().context("find", "the current directory")?,
    };
    let mut writable = Vec::new();
    for dir in &job.writable {
        let dir = dir.canonicalize().context("find the writable directory", dir.display())?;
        if !dir.is_dir() || dir == Path::new("/") || dir.as_os_str().as_encoded_bytes().contains(&b',') {
            let reason = "it must be a directory other than / and without a comma in its path";
            return Err(Error::Usage(format!("cannot make `{}` writable: {reason}", dir.display())));
        }
        writable.push(dir.into());
    }
    Ok(Task {
        program: job.program.clone(),
        args: job.args.clone(),
        env,
        cwd: cwd.into(),
        writable,
        terminal: terminal.map(|terminal| terminal.size),
    })
}

fn shown_on_terminal(sinks: [Sink; 2]) -> bool {
    use std::io::IsTerminal;
    sinks.iter().all(|sink| match sink {
        Sink::Stdout => std::io::stdout().is_terminal(),
        Sink::Stderr => std::io::stderr().is_terminal(),
        Sink::Memory => false,
    })
}

/// The file descriptors that the guest's consoles are connected to.
pub(crate) struct Lines {
    pub(crate) console: RawFd,
    pub(crate) stdout: RawFd,
    pub(crate) stderr: RawFd,
    pub(crate) terminal: Option<RawFd>,
}

fn command_line(dir: &Path, memory_mib: u32, lines: &Lines) -> Vec<OsString> {
    let path = |prefix: &str, path: &Path| {
        let mut word = OsString::from(prefix);
        word.push(path);
        word
    };
    let mut words: Vec<OsString> = KERNEL_ARGUMENTS.map(OsString::from).into();
    words.push(format!("mem={memory_mib}M").into());
    words.push(path("init=", &dir.join("init")));
    words.push(path(&format!("{}=", init::JOB_DIRECTORY), dir));
    words.push(path("uml_dir=", dir));
    words.push("umid=guest".into());
    words.push("con=null".into());
    words.push(format!("con0=null,fd:{}", lines.console).into());
    words.push("ssl=null".into());
    words.push(format!("ssl0=null,fd:{}", lines.stdout).into());
    words.push(format!("ssl1=null,fd:{}", lines.stderr).into());
    if let Some(terminal) = lines.terminal {
        words.push(format!("con1=fd:{terminal}").into());
    }
    words
}

/// Starts the kernel with the given file descriptors under the numbers they have here.
fn spawn<'a>(
    command: &mut Command,
    inherited: impl Iterator<Item = std::os::fd::BorrowedFd<'a>> + Clone,
) -> Result<Child> {
    // Another guest started at the same moment must not inherit them too: it would keep our pipes open.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    for fd in inherited.clone() {
        fcntl_setfd(fd, FdFlags::empty()).context("pass on", "a file descriptor")?;
    }
    let child = command.spawn().context("boot the guest's kernel", command.get_program().to_string_lossy());
    for fd in inherited {
        fcntl_setfd(fd, FdFlags::CLOEXEC).context("keep", "a file descriptor")?;
    }
    child
}

/// A directory for the file that is the guest's memory: one that allows execution and has room.
fn memory_directory(mib: u32) -> Result<PathBuf> {
    for dir in ["/dev/shm", "/tmp", "/var/tmp"] {
        let Ok(found) = rustix::fs::statvfs(dir) else { continue };
        let room = found.f_bavail.saturating_mul(found.f_frsize) >> 20;
        if !found.f_flag.contains(StatVfsMountFlags::NOEXEC) && room >= u64::from(mib) {
            return Ok(dir.into());
        }
    }
    Err(Error::Usage(format!(
        "the guest's memory needs {mib} MiB of room in /dev/shm, /tmp or /var/tmp, on a file system mounted without \
         noexec, and there is none: make room or give the guest less memory"
    )))
}

/// A processor for one guest. Its kernel and the processes in it take turns, and taking turns across processors costs
/// several times as much; so each guest stays on one, and guests that run at the same time choose different ones.
struct Cpu {
    number: Option<usize>,
    _lock: Option<File>,
}

impl Cpu {
    fn reserve() -> Result<Self> {
        let Ok(allowed) = sched_getaffinity(None) else { return Ok(Self { number: None, _lock: None }) };
        let allowed: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|number| allowed.is_set(*number)).collect();
        let base = scratch::base()?;
        for &number in &allowed {
            let slot = scratch::lock_file(&base.join(format!("cpu-{number}.lock")))?;
            if slot.try_lock().is_ok() {
                return Ok(Self { number: Some(number), _lock: Some(slot) });
            }
        }
        // More guests than processors: spread them.
        let number = (std::process::id() as usize).checked_rem(allowed.len()).map(|index| allowed[index]);
        Ok(Self { number, _lock: None })
    }

    fn pin(&self, child: &Child) -> Result<()> {
        let Some(number) = self.number else { return Ok(()) };
        let mut set = CpuSet::new();
        set.set(number);
        match sched_setaffinity(Some(process::pid(child)), &set) {
            // A kernel that has ended already is reported later, with its reason.
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error).context("pin the guest to", format_args!("processor {number}")),
        }
    }
}

/// The user's terminal, lent to the guest and put back in order afterwards.
struct Terminal {
    file: File,
    settings: rustix::termios::Termios,
    size: init::TerminalSize,
}

impl Terminal {
    /// Opens it anew, because the kernel makes what it gets non-blocking and standard input is shared with the shell.
    fn open() -> Result<Self> {
        let file = File::options().read(true).write(true).open("/dev/tty").context("open", "the terminal")?;
        let settings = tcgetattr(&file).context("read the settings of", "the terminal")?;
        let size = tcgetwinsize(&file).context("read the size of", "the terminal")?;
        Ok(Self { file, settings, size: init::TerminalSize { rows: size.ws_row, columns: size.ws_col } })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // A terminal that is gone needs no order.
        let _ = tcsetattr(&self.file, OptionalActions::Drain, &self.settings);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_learns_its_lines_and_its_job_from_the_command_line() {
        let lines = Lines { console: 5, stdout: 6, stderr: 8, terminal: None };
        let words = command_line(Path::new("/tmp/lab/1.0"), 256, &lines);
        for expected in [
            "mem=256M",
            "init=/tmp/lab/1.0/init",
            "lab_job=/tmp/lab/1.0",
            "con0=null,fd:5",
            "ssl0=null,fd:6",
            "ssl1=null,fd:8",
            "fb_tunnels=none",
        ] {
            assert!(words.iter().any(|word| word == expected), "{expected} is not in {words:?}");
        }
        assert!(!words.iter().any(|word| word.to_string_lossy().starts_with("con1=")));
        let lines = Lines { terminal: Some(9), ..lines };
        assert!(command_line(Path::new("/tmp/x"), 256, &lines).iter().any(|word| word == "con1=fd:9"));
    }

    #[test]
    fn a_root_directory_is_not_made_writable() {
        let error = task(&Job::new("true").writable("/tmp/.."), [Sink::Memory; 2], None).unwrap_err();
        assert!(error.to_string().contains("other than /"), "{error}");
    }
}
