//! The guest's first process: sets up an ordinary Linux on the host's files, runs one command, and powers off.
//!
//! An executable that boots guests must call [`main`] at its start when [`is_init`] says so.

use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::OFlags;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{WaitOptions, pivot_root};
use rustix::system::{RebootCommand, reboot, sethostname};
use rustix::termios::{OptionalActions, Winsize, tcdrain, tcgetattr, tcsetattr, tcsetwinsize};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::netns;

/// The kernel argument that names the job directory; the kernel makes it an environment variable of its first process.
pub(crate) const JOB_DIRECTORY: &str = "lab_job";

/// The kernel argument, likewise, of a guest in QEMU: the directory of modules, or nothing.
pub(crate) const MODULES_DIRECTORY: &str = "lab_modules";

/// What QEMU calls the directories of the host: that of the job, that of the modules, and those that are writable.
pub(crate) const JOB_TAG: &str = "job";
pub(crate) const MODULES_TAG: &str = "modules";
pub(crate) fn writable_tag(index: usize) -> String {
    format!("writable{index}")
}

// The files of a job directory.
pub(crate) const TASK: &str = "task.json";
pub(crate) const STATUS: &str = "status";
pub(crate) const ERROR: &str = "error";

/// The most connections the guest tracks. The kernel's own choice, by memory, is too few for a load test.
const MAX_CONNECTIONS: &str = "262144";

/// What the guest is to do.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) program: OsString,
    pub(crate) args: Vec<OsString>,
    pub(crate) env: Vec<(OsString, OsString)>,
    pub(crate) cwd: OsString,
    pub(crate) writable: Vec<OsString>,
    pub(crate) terminal: Option<TerminalSize>,
}

/// The size of the terminal that the command gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TerminalSize {
    pub(crate) rows: u16,
    pub(crate) columns: u16,
}

/// Whether this process is the first one of a guest.
pub fn is_init() -> bool {
    std::process::id() == 1 && std::env::var_os(JOB_DIRECTORY).is_some()
}

/// Does the work of the guest's first process; does not return.
pub fn main() -> ! {
    let dir = PathBuf::from(std::env::var_os(JOB_DIRECTORY).unwrap_or_default());
    // First of all, so that what fails afterwards can be told.
    let outcome = mount_host(&dir, JOB_TAG).and_then(|()| work(&dir));
    if let Err(error) = outcome {
        eprintln!("lab: {error}");
        if let Err(error) = write_whole(&dir, ERROR, &error.to_string()) {
            eprintln!("lab: {error}");
        }
    }
    loop {
        rustix::fs::sync();
        // Nothing can be done about a guest that does not power off, except by the host's time limit.
        let _ = reboot(RebootCommand::PowerOff);
    }
}

fn work(dir: &Path) -> Result<()> {
    let task = fs::read(dir.join(TASK)).context("read", dir.join(TASK).display())?;
    let task: Task = serde_json::from_slice(&task).map_err(std::io::Error::from).context("decode", "the job")?;
    overlay_root()?;
    mount_host(dir, JOB_TAG)?;
    mount_system()?;
    for (index, writable) in task.writable.iter().enumerate() {
        mount_host(Path::new(writable), &writable_tag(index))?;
    }
    if let Some(modules) = modules() {
        fs::create_dir_all(&modules).context("create", modules.display())?;
        mount_host(&modules, MODULES_TAG)?;
    }
    netns::loopback_up()?;
    sethostname(b"lab").context("set", "the host name")?;
    let limit = "/proc/sys/net/netfilter/nf_conntrack_max";
    // A module brings it, where there are modules.
    if modules().is_none() || Path::new(limit).exists() {
        fs::write(limit, MAX_CONNECTIONS).context("write", limit)?;
    }
    let code = execute(&task)?;
    write_whole(dir, STATUS, &code.to_string())
}

/// The directory for the kernel's modules; none in User-Mode Linux, where all is built in.
fn modules() -> Option<PathBuf> {
    std::env::var_os(MODULES_DIRECTORY).map(PathBuf::from)
}

/// Mounts a directory of the host, writable, at the same path. User-Mode Linux finds it by its path, QEMU by a tag.
fn mount_host(dir: &Path, tag: &str) -> Result<()> {
    let (source, kind, options) = if modules().is_some() {
        (tag, "9p", CString::from(c"trans=virtio,version=9p2000.L,msize=512000"))
    } else {
        let path = CString::new(dir.as_os_str().as_encoded_bytes()).map_err(std::io::Error::from);
        ("none", "hostfs", path.context("mount", dir.display())?)
    };
    mount(source, dir, kind, MountFlags::empty(), options.as_c_str()).context("mount", dir.display())
}

/// The serial lines for the command's output and error output.
fn lines() -> [&'static str; 2] {
    if modules().is_some() { ["/dev/hvc0", "/dev/hvc1"] } else { ["/dev/ttyS0", "/dev/ttyS1"] }
}

/// Puts a file system in memory over the host's files, so that every write succeeds and none stays.
fn overlay_root() -> Result<()> {
    // Any directory that every host has will do to build on; this one is mounted over later anyway.
    let base = Path::new("/proc");
    mount("tmpfs", base, "tmpfs", MountFlags::empty(), None).context("mount", "a file system in memory")?;
    for name in ["upper", "work", "root"] {
        fs::create_dir(base.join(name)).context("create", base.join(name).display())?;
    }
    let root = base.join("root");
    mount("overlay", &root, "overlay", MountFlags::empty(), c"lowerdir=/,upperdir=/proc/upper,workdir=/proc/work")
        .context("mount", "the overlay over the host's files")?;
    // The old root ends up on top of the new one and is then taken away.
    rustix::process::chdir(&root).context("enter", root.display())?;
    pivot_root(".", ".").context("change to", "the new root")?;
    unmount(".", UnmountFlags::DETACH).context("unmount", "the old root")?;
    rustix::process::chdir("/").context("enter", "the new root")
}

/// Mounts what a running Linux has.
fn mount_system() -> Result<()> {
    let none = MountFlags::empty();
    mount("proc", "/proc", "proc", none, None).context("mount", "/proc")?;
    mount("sysfs", "/sys", "sysfs", none, None).context("mount", "/sys")?;
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", none, None).context("mount", "/sys/fs/cgroup")?;
    mount("devtmpfs", "/dev", "devtmpfs", none, None).context("mount", "/dev")?;
    for dir in ["/dev/pts", "/dev/shm"] {
        fs::create_dir_all(dir).context("create", dir)?;
    }
    mount("devpts", "/dev/pts", "devpts", none, c"ptmxmode=666").context("mount", "/dev/pts")?;
    mount("tmpfs", "/dev/shm", "tmpfs", none, None).context("mount", "/dev/shm")?;
    mount("tmpfs", "/run", "tmpfs", none, None).context("mount", "/run")?;
    for dir in ["/run/lock", netns::NAMED] {
        fs::create_dir_all(dir).context("create", dir)?;
    }
    for (name, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        let link = Path::new("/dev").join(name);
        symlink(format!("/proc/self/fd{target}"), &link).context("create", link.display())?;
    }
    Ok(())
}

/// Runs the command to its end, with its exit code as a shell gives it.
fn execute(task: &Task) -> Result<i32> {
    let mut command = Command::new(&task.program);
    command.args(&task.args).env_clear().envs(task.env.iter().cloned());
    if !Path::new(&task.cwd).is_dir() {
        return Err(Error::Directory(PathBuf::from(&task.cwd)));
    }
    command.current_dir(&task.cwd);
    let [stdin, stdout, mut stderr] = if let Some(size) = task.terminal {
        terminal(size)?
    } else {
        let null = File::open("/dev/null").context("open", "/dev/null")?;
        let [stdout, stderr] = lines();
        [null, serial_line(stdout)?, serial_line(stderr)?]
    };
    let duplicate = |file: &File| file.try_clone().map(Stdio::from).context("duplicate", "a file descriptor");
    command.stdin(stdin).stdout(duplicate(&stdout)?).stderr(duplicate(&stderr)?);
    let code = match command.spawn() {
        Ok(child) => wait_for(child.id())?,
        Err(error) => {
            // If it cannot be said, the exit code still says it.
            let _ = writeln!(stderr, "lab: {}: {error}", task.program.to_string_lossy());
            if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 }
        }
    };
    // What the host has not taken yet would be lost.
    for line in [&stdout, &stderr] {
        tcdrain(line).context("drain", "a serial line")?;
    }
    Ok(code)
}

/// Waits for one process, and buries all those that lost their parents.
fn wait_for(wanted: u32) -> Result<i32> {
    loop {
        let ended = match rustix::process::wait(WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => continue,
            ended => ended.context("wait for", "the command")?,
        };
        if let Some((pid, status)) = ended
            && pid.as_raw_nonzero().get().cast_unsigned() == wanted
        {
            let killed = status.terminating_signal().map_or(1, |signal| 128 + signal);
            return Ok(status.exit_status().unwrap_or(killed));
        }
    }
}

/// Opens a serial line that passes every byte unchanged.
fn serial_line(path: &str) -> Result<File> {
    let line = open_terminal(path)?;
    let mut settings = tcgetattr(&line).context("read the settings of", path)?;
    settings.make_raw();
    tcsetattr(&line, OptionalActions::Now, &settings).context("set up", path)?;
    Ok(line)
}

/// Makes the user's terminal the one that controls us, so that the command has job control.
fn terminal(size: TerminalSize) -> Result<[File; 3]> {
    let path = "/dev/tty1";
    let terminal = open_terminal(path)?;
    rustix::process::setsid().context("create", "a session")?;
    rustix::process::ioctl_tiocsctty(&terminal).context("take control of", path)?;
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&terminal, size).context("set the size of", path)?;
    let duplicate = || terminal.try_clone().context("duplicate", path);
    Ok([duplicate()?, duplicate()?, terminal])
}

fn open_terminal(path: &str) -> Result<File> {
    let no_control = OFlags::NOCTTY.bits().cast_signed();
    File::options().read(true).write(true).custom_flags(no_control).open(path).context("open", path)
}

/// Writes a file so that the host sees either all of it or none.
fn write_whole(dir: &Path, name: &str, text: &str) -> Result<()> {
    let unfinished = dir.join(format!("{name}.new"));
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&unfinished)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&unfinished, dir.join(name))
    };
    write().context("write", dir.join(name).display())
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn a_task_survives_its_encoding_whatever_bytes_it_has() {
        let strange = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
        let task = Task {
            program: strange(b"/a b/\xff\n$(c)"),
            args: vec![strange(b""), strange(b"'\"\\\x01\x80"), "-x=\u{1f980}".into()],
            env: vec![("A".into(), strange(b"1\n2\xfe=")), ("EMPTY".into(), OsString::new())],
            cwd: strange(b"/with space/\xf0"),
            writable: vec![strange(b"/w,\t")],
            terminal: Some(TerminalSize { rows: 24, columns: 80 }),
        };
        let encoded = serde_json::to_vec(&task).unwrap();
        assert_eq!(serde_json::from_slice::<Task>(&encoded).unwrap(), task);
    }
}
