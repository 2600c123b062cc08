//! `cargo xtask guest-contained`, which people do not call: becomes a program in a container, for tests of manifests.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use lab::container::Container;

/// Executes a command in a container made for it. Its environment is this process's.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file system of the image
    #[arg(long, value_name = "DIR")]
    image: PathBuf,
    /// A file or directory, and where it is in the container
    #[arg(long = "mount", value_name = "SOURCE:TARGET", value_parser = mount)]
    mounts: Vec<(PathBuf, PathBuf)>,
    /// Let nothing be written
    #[arg(long)]
    read_only: bool,
    /// Leave all rights
    #[arg(long)]
    privileged: bool,
    /// A capability to leave, without CAP_
    #[arg(long = "capability", value_name = "NAME")]
    capabilities: Vec<String>,
    /// Let nothing be gained by executing programs
    #[arg(long)]
    no_new_privileges: bool,
    /// The profile of system calls
    #[arg(long, value_name = "FILE")]
    seccomp: Option<PathBuf>,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

fn mount(text: &str) -> Result<(PathBuf, PathBuf)> {
    let (source, target) = text.split_once(':').ok_or_else(|| anyhow!("SOURCE:TARGET is wanted"))?;
    Ok((source.into(), target.into()))
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let container = Container {
        image: args.image,
        mounts: args.mounts,
        is_root_read_only: args.read_only,
        is_privileged: args.privileged,
        capabilities: args.capabilities,
        has_no_new_privileges: args.no_new_privileges,
        seccomp: args.seccomp,
        command: args.command,
        env: std::env::vars_os().collect(),
    };
    match container.exec()? {}
}
