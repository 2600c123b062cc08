//! How QEMU boots a kernel of Debian, with the same first process and the same files as User-Mode Linux has.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use crate::error::{Error, Result};
use crate::guest::Lines;
use crate::init;
use crate::stock::StockKernel;

/// The command that boots the kernel. The processor is emulated: a kernel that is virtualized needs more than many
/// machines give, and what is looked at here is what the kernel does and not how quickly.
pub(crate) fn command(
    kernel: &StockKernel,
    dir: &Path,
    memory_mib: u32,
    lines: &Lines,
    writable: &[OsString],
) -> Result<Command> {
    if lines.terminal.is_some() {
        return Err(Error::Usage("a guest in QEMU has no terminal: say which command to run".into()));
    }
    let mut command = Command::new("/usr/bin/qemu-system-x86_64");
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.args(["-machine", "q35,accel=tcg", "-cpu", "max", "-smp", "2", "-m"]).arg(format!("{memory_mib}M"));
    command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(&kernel.initramfs);
    command.args(["-device", "virtio-serial-pci"]);
    // Appending, because a pipe cannot be truncated.
    for (id, fd) in [("console", lines.console), ("stdout", lines.stdout), ("stderr", lines.stderr)] {
        command.arg("-add-fd").arg(format!("fd={fd},set={fd}"));
        command.arg("-chardev").arg(format!("file,id={id},path=/dev/fdset/{fd},append=on"));
    }
    command.args(["-serial", "chardev:console"]);
    command.args(["-device", "virtconsole,chardev=stdout", "-device", "virtconsole,chardev=stderr"]);
    share(&mut command, "root", Path::new("/"), ",readonly=on");
    share(&mut command, init::JOB_TAG, dir, "");
    share(&mut command, init::MODULES_TAG, &kernel.modules, ",readonly=on");
    for (index, writable) in writable.iter().enumerate() {
        share(&mut command, &init::writable_tag(index), Path::new(writable), "");
    }
    let mut words = OsString::from("console=ttyS0 quiet panic=-1 oops=panic dummy.numdummies=0 fb_tunnels=none");
    for (name, value) in [(init::JOB_DIRECTORY, dir), ("lab_init", &dir.join("init"))] {
        words.push(format!(" {name}="));
        words.push(value);
    }
    words.push(format!(" {}=/lib/modules/{}", init::MODULES_DIRECTORY, kernel.release));
    command.arg("-append").arg(words).env_clear();
    Ok(command)
}

/// Gives the guest a directory under a name; a comma in its path is doubled.
fn share(command: &mut Command, tag: &str, dir: &Path, options: &str) {
    let dir = dir.to_string_lossy().replace(',', ",,");
    let device = format!("local,id={tag},path={dir},security_model=none,multidevs=remap{options}");
    command.arg("-fsdev").arg(device).arg("-device").arg(format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
}
