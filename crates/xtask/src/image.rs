//! `cargo xtask image`: the files of the container image, without a container engine.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::cargo;

/// Where in the image the agent is: the image's own entrypoint, and what kubeadm's `DaemonSet` of kube-proxy executes.
const AGENT: &str = "kube-ipvs";
const AS_KUBE_PROXY: &str = "usr/local/bin/kube-proxy";

/// Builds a static binary, and puts the files of the container image into a directory, which deploy/Containerfile copies.
///
/// What was in the directory before is removed.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The directory
    #[arg(long, value_name = "DIR", default_value = "target/image")]
    root: PathBuf,
    /// The target to build for, as in aarch64-unknown-linux-gnu; that of this machine if not said
    #[arg(long, value_name = "TRIPLE")]
    target: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let agent = cargo::static_agent(args.target.as_deref())?;
    let size = make(&args.root, &agent)?;
    eprintln!("image: {} has {size} bytes", args.root.display());
    Ok(ExitCode::SUCCESS)
}

/// Makes the files from an executable; says how many bytes they have.
pub(crate) fn make(root: &Path, agent: &Path) -> Result<u64> {
    match fs::remove_dir_all(root) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", root.display()));
        }
        _ => {}
    }
    let link = root.join(AS_KUBE_PROXY);
    let Some(directory) = link.parent() else { bail!("{} has no directory", link.display()) };
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let size = fs::copy(agent, root.join(AGENT)).with_context(|| format!("cannot copy {}", agent.display()))?;
    symlink(Path::new("/").join(AGENT), &link).with_context(|| format!("cannot create {}", link.display()))?;
    Ok(size)
}

/// Makes the files from the agent that tests are built with, which needs libraries, and adds those.
pub(crate) fn make_dynamic(root: &Path, agent: &Path) -> Result<()> {
    make(root, agent)?;
    let output = Command::new("ldd").arg(agent).output().context("cannot run ldd")?;
    if !output.status.success() {
        bail!("ldd does not say what {} needs: {}", agent.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    let output = String::from_utf8_lossy(&output.stdout).into_owned();
    // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)`, and the loader without an arrow.
    for library in output.split_whitespace().filter(|word| word.starts_with('/')).map(Path::new) {
        let target = root.join(library.strip_prefix("/").unwrap_or(library));
        let Some(directory) = target.parent() else { continue };
        fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
        fs::copy(library, &target).with_context(|| format!("cannot copy {}", library.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_image_has_only_the_agent_and_a_link_to_it() {
        let dir = lab::Scratch::new().unwrap();
        let (agent, root) = (dir.path().join("agent"), dir.path().join("image"));
        fs::write(&agent, "the agent").unwrap();
        fs::set_permissions(&agent, Permissions::from_mode(0o755)).unwrap();
        // What was there before is removed.
        fs::create_dir_all(root.join("etc")).unwrap();
        assert_eq!(make(&root, &agent).unwrap(), 9);
        let names = |directory: &Path| -> Vec<String> {
            let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
            let mut names: Vec<String> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&root), [AGENT, "usr"]);
        assert_eq!(names(&root.join("usr")), ["local"]);
        assert_eq!(names(&root.join("usr/local")), ["bin"]);
        assert_eq!(names(&root.join("usr/local/bin")), ["kube-proxy"]);
        assert_eq!(fs::read_link(root.join(AS_KUBE_PROXY)).unwrap(), Path::new("/kube-ipvs"));
        assert_eq!(fs::read(root.join(AGENT)).unwrap(), b"the agent");
        assert_eq!(fs::metadata(root.join(AGENT)).unwrap().permissions().mode() & 0o777, 0o755);
    }
}
