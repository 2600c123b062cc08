//! A kernel as Debian builds it, with its modules, for QEMU: fetched from the package, with a small first file system
//! that finds the files of this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Context, Error, Result};
use crate::packages;
use crate::source;
use crate::version::Version;

/// What runs the kernel, and what is in its first file system.
const PACKAGES: [&str; 4] = ["qemu-system-x86", "busybox-static", "kmod", "xz-utils"];

/// What the kernel needs before it sees the files of this machine: they and its serial lines are virtio devices.
const EARLY_MODULES: [&str; 5] = ["virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay"];

/// The first process of the first file system. The kernel gives it the words of its command line as variables.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
exec </dev/console >/dev/console 2>&1
for module in /modules/*; do /bin/busybox insmod $module || exit; done
/bin/busybox mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose root /root || exit
exec /bin/busybox switch_root /root $lab_init
";

/// A kernel with all its parts.
#[derive(Clone, Debug)]
pub(crate) struct StockKernel {
    pub(crate) image: PathBuf,
    pub(crate) initramfs: PathBuf,
    /// The directory that is `/lib/modules/RELEASE` in the guest.
    pub(crate) modules: PathBuf,
    pub(crate) release: String,
}

impl StockKernel {
    /// The kernel in a directory that [`fetch`] has filled.
    pub(crate) fn find(dir: &Path) -> Result<Self> {
        let modules = only_entry(&dir.join("modules"))?;
        let release = modules.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { image: dir.join("vmlinuz"), initramfs: dir.join("initramfs"), modules, release })
    }
}

/// Fetches the kernel of a release into `dir`, by way of `work`, which is on the same file system.
pub(crate) fn fetch(version: Version, work: &Path, dir: &Path) -> Result<()> {
    packages::ensure(&PACKAGES)?;
    let package = source::image(version, work)?;
    let ready = work.join("ready");
    fs::create_dir(&ready).context("create", ready.display())?;
    let image =
        fs::read_dir(package.join("boot")).context("read", package.display())?.filter_map(std::result::Result::ok);
    let image = image
        .map(|entry| entry.path())
        .find(|path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"vmlinuz-")));
    let image = image.ok_or_else(|| Error::Usage(format!("{} has no kernel", package.display())))?;
    fs::rename(&image, ready.join("vmlinuz")).context("move", image.display())?;
    // depmod(8) looks under lib/modules.
    let root = if package.join("lib/modules").is_dir() { package.clone() } else { package.join("usr") };
    let modules = only_entry(&root.join("lib/modules"))?;
    let release = modules.file_name().unwrap_or_default();
    packages::checked(Command::new("/sbin/depmod").arg("-b").arg(&root).arg(release))?;
    let initramfs = ready.join("initramfs");
    fs::write(&initramfs, archive(&modules)?).context("write", initramfs.display())?;
    fs::rename(root.join("lib/modules"), ready.join("modules")).context("move", modules.display())?;
    fs::rename(&ready, dir).context("move the kernel to", dir.display())
}

fn only_entry(dir: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(dir).context("read", dir.display())?.filter_map(std::result::Result::ok);
    match (entries.next(), entries.next()) {
        (Some(entry), None) => Ok(entry.path()),
        _ => Err(Error::Usage(format!("{} should have one entry", dir.display()))),
    }
}

/// The first file system: busybox, the modules in the order to load them, and a script.
fn archive(modules: &Path) -> Result<Vec<u8>> {
    let busybox = "/usr/bin/busybox";
    let busybox = if Path::new(busybox).exists() { busybox } else { "/bin/busybox" };
    let dependencies = modules.join("modules.dep");
    let dependencies = fs::read_to_string(&dependencies).context("read", dependencies.display())?;
    let mut archive = Archive::default();
    for name in ["bin", "dev", "root", "modules"] {
        archive.add(name, 0o040_755, &[]);
    }
    archive.add("init", 0o100_755, INIT.as_bytes());
    archive.add("bin/busybox", 0o100_755, &fs::read(busybox).context("read", busybox)?);
    for (index, file) in load_order(&dependencies, &EARLY_MODULES).iter().enumerate() {
        let path = modules.join(file);
        let bytes = if path.extension().is_some_and(|end| end == "xz") {
            let output = Command::new("xz").arg("--decompress").arg("--stdout").arg(&path).output();
            output.context("unpack", path.display())?.stdout
        } else {
            fs::read(&path).context("read", path.display())?
        };
        archive.add(&format!("modules/{index:02}"), 0o100_644, &bytes);
    }
    Ok(archive.finish())
}

/// The files of modules and of all that they need, each after what it needs. Modules that are built in have no file.
fn load_order<'a>(dependencies: &'a str, wanted: &[&str]) -> Vec<&'a str> {
    let mut order: Vec<&str> = Vec::new();
    for name in wanted {
        let needle = format!("/{name}.ko");
        let line = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(file, _)| file.rsplit_once(&needle).is_some_and(|(_, end)| end.is_empty() || end.starts_with('.')));
        let Some((file, needs)) = line else { continue };
        // What is named last is needed by those before it.
        for file in needs.split_whitespace().rev().chain([file]) {
            if !order.contains(&file) {
                order.push(file);
            }
        }
    }
    order
}

/// An archive in the format of `cpio --format=newc`, the one that the kernel reads.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        // inode, mode, uid, gid, links, mtime, size, device, device of a node, length of the name, checksum
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend(b"070701");
        self.bytes.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
        self.bytes.extend(name.bytes().chain([0]));
        self.pad();
        self.bytes.extend(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_after_what_they_need_and_once() {
        let dependencies = "kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko kernel/fs/netfs.ko\n\
                            kernel/net/9p/9pnet.ko:\nkernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko\n";
        assert_eq!(
            load_order(dependencies, &["9pnet_virtio", "9p", "built_in"]),
            ["kernel/net/9p/9pnet.ko", "kernel/net/9p/9pnet_virtio.ko.xz", "kernel/fs/netfs.ko", "kernel/fs/9p/9p.ko"]
        );
    }

    #[test]
    fn an_archive_is_one_that_the_kernel_reads() {
        let mut archive = Archive::default();
        archive.add("a", 0o100_644, b"12345");
        let bytes = archive.finish();
        assert!(bytes.starts_with(b"07070100000001000081a4"));
        assert_eq!(&bytes[110..112], b"a\0");
        assert_eq!(&bytes[112..120], b"12345\0\0\0");
        assert!(bytes[120..].starts_with(b"070701") && bytes.len().is_multiple_of(4));
    }
}
