//! A container of a pod on the host's network, made as a node's runtime makes one, and a program in it.
//!
//! The runtime's part is what a manifest leads to: an image under a writable layer, or a read-only one; mounts; which of
//! `/proc` and `/sys` can be written; capabilities, `no_new_privs`, a profile of system calls. What it does besides and
//! what makes no difference here is left out: namespaces of processes, users and cgroups, and the masking of files that
//! nothing here reads.

use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, mount_change,
    mount_remount, unmount,
};
use rustix::process::{chdir, pivot_root};
use rustix::thread::{
    CapabilitySet, CapabilitySets, UnshareFlags, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs,
};

use crate::error::{Context, Error, Result};
use crate::netns;
use crate::seccomp::Profile;

/// What a container is to be.
#[derive(Clone, Debug, Default)]
pub struct Container {
    /// The file system of its image; it is not changed.
    pub image: PathBuf,
    /// Files and directories of the host, and where they are in the container, where they can only be read.
    pub mounts: Vec<(PathBuf, PathBuf)>,
    /// `securityContext.readOnlyRootFilesystem`
    pub is_root_read_only: bool,
    /// `securityContext.privileged`: all capabilities, a writable `/proc/sys` and `/sys`, and no profile.
    pub is_privileged: bool,
    /// `securityContext.capabilities`, without `CAP_`, after all others were dropped.
    pub capabilities: Vec<String>,
    /// Whether `securityContext.allowPrivilegeEscalation` is false.
    pub has_no_new_privileges: bool,
    /// `securityContext.seccompProfile`
    pub seccomp: Option<PathBuf>,
    /// `command` and `args`, after the image's own.
    pub command: Vec<OsString>,
    /// All of its environment.
    pub env: Vec<(OsString, OsString)>,
}

/// What a runtime lets a container without privileges only read.
const READ_ONLY: [&str; 6] = ["proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger", "sys"];

impl Container {
    /// Makes the container around this process and executes its command. The process must have one thread and be root.
    pub fn exec(&self) -> Result<Infallible> {
        let Some((program, arguments)) = self.command.split_first() else {
            return Err(Error::Usage("a container without a command".into()));
        };
        // Read while it can be seen.
        let filter = match &self.seccomp {
            Some(path) => Some(Profile::read(path)?.compile(path)?),
            None => None,
        };
        self.enter_root()?;
        if !self.is_privileged {
            drop_capabilities(&self.capabilities)?;
        }
        if self.has_no_new_privileges {
            set_no_new_privs(true).context("set", "no_new_privs")?;
        }
        if let Some(filter) = filter {
            filter.load().context("load", "the profile")?;
        }
        // Nothing comes after this that the profile would have to allow for our sake.
        let error = Command::new(program).args(arguments).env_clear().envs(self.env.iter().cloned()).exec();
        Err(error).context("execute", program.to_string_lossy())
    }

    /// Makes the container's files this process's own, in a mount namespace of its own.
    fn enter_root(&self) -> Result<()> {
        netns::unshare(UnshareFlags::NEWNS)?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).context("make private the mounts under", "/")?;
        // Any directory that is there and has nothing in it that is mounted below will do.
        let base = Path::new("/sys");
        mount("tmpfs", base, "tmpfs", MountFlags::empty(), None).context("mount", "a file system in memory")?;
        for name in ["upper", "work", "root"] {
            fs::create_dir(base.join(name)).context("create", base.join(name).display())?;
        }
        let layers = format!("lowerdir={},upperdir=/sys/upper,workdir=/sys/work", self.image.display());
        let layers = CString::new(layers).map_err(std::io::Error::from).context("name", "the layers")?;
        let root = base.join("root");
        mount("overlay", &root, "overlay", MountFlags::empty(), layers.as_c_str())
            .context("mount", "a writable layer over the image")?;
        self.mount_system(&root)?;
        for (source, target) in &self.mounts {
            let target = root.join(target.strip_prefix("/").unwrap_or(target));
            make_mount_point(source, &target)?;
            mount_bind_recursive(source, &target).context("mount", target.display())?;
            read_only(&target)?;
        }
        if self.is_root_read_only {
            mount_remount(&root, MountFlags::RDONLY, c"").context("make read-only", root.display())?;
        }
        // The old root ends up on top of the new one and is then taken away.
        chdir(&root).context("enter", root.display())?;
        pivot_root(".", ".").context("change to", "the new root")?;
        unmount(".", UnmountFlags::DETACH).context("unmount", "the old root")?;
        chdir("/").context("enter", "the new root")
    }

    fn mount_system(&self, root: &Path) -> Result<()> {
        for name in ["proc", "sys", "dev"] {
            fs::create_dir_all(root.join(name)).context("create", root.join(name).display())?;
        }
        let none = MountFlags::empty();
        mount("proc", root.join("proc"), "proc", none, None).context("mount", "/proc")?;
        mount("sysfs", root.join("sys"), "sysfs", none, None).context("mount", "/sys")?;
        mount("tmpfs", root.join("dev"), "tmpfs", none, None).context("mount", "/dev")?;
        for name in ["null", "zero", "full", "random", "urandom"] {
            let (source, target) = (Path::new("/dev").join(name), root.join("dev").join(name));
            make_mount_point(&source, &target)?;
            mount_bind(&source, &target).context("mount", target.display())?;
        }
        if !self.is_privileged {
            for name in READ_ONLY.iter().map(|name| root.join(name)).filter(|path| path.exists()) {
                mount_bind(&name, &name).context("mount", name.display())?;
                read_only(&name)?;
            }
        }
        Ok(())
    }
}

fn make_mount_point(source: &Path, target: &Path) -> Result<()> {
    let found = fs::metadata(source).context("examine", source.display())?;
    let directory = if found.is_dir() { Some(target) } else { target.parent() };
    if let Some(directory) = directory {
        fs::create_dir_all(directory).context("create", directory.display())?;
    }
    if !found.is_dir() {
        File::options().create(true).append(true).open(target).context("create", target.display())?;
    }
    Ok(())
}

/// Lets a mount be read only, whatever else is mounted from there.
fn read_only(target: &Path) -> Result<()> {
    mount_remount(target, MountFlags::BIND | MountFlags::RDONLY, c"").context("make read-only", target.display())
}

/// Leaves these capabilities to the process and to what it executes.
fn drop_capabilities(kept: &[String]) -> Result<()> {
    let mut sets = CapabilitySet::empty();
    for name in kept {
        sets |= CapabilitySet::from_name(name)
            .ok_or_else(|| Error::Usage(format!("there is no capability {name}: see capabilities(7)")))?;
    }
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if sets.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel has no more.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(error).context("drop", format_args!("capability {bit}")),
        }
    }
    let sets = CapabilitySets { effective: sets, permitted: sets, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).context("drop", "capabilities")
}
