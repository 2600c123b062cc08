//! `cargo xtask reproduce`: the program that is shipped, built twice from what is committed, in two places: the same, byte by byte.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use lab::Scratch;

use crate::cargo;

/// Builds the agent twice, as it is shipped, in two directories from the last commit, and compares.
///
/// Prints the hash of what was built, for whoever wants to hold a published one against it.
#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_: &Args) -> Result<ExitCode> {
    let scratch = Scratch::new()?;
    // Of different lengths, since what depends on a path may depend on that. Side by side, since most of a build is one
    // optimization of the whole program, which has one thread.
    let places = ["a", "another-place"].map(|name| scratch.path().join(name));
    let [first, second] = std::thread::scope(|scope| {
        let builds = places.each_ref().map(|place| scope.spawn(|| build(place)));
        builds.map(|build| build.join().unwrap_or_else(|_| bail!("a thread panicked")))
    });
    let (first, second) = (first?, second?);
    if !is_static(&first)? {
        eprintln!("error: {} needs other files: it is linked dynamically", first.display());
        return Ok(ExitCode::FAILURE);
    }
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let (first_bytes, second_bytes) = (read(&first)?, read(&second)?);
    println!("{}  kube-ipvs ({} bytes)", hash(&first)?, first_bytes.len());
    if first_bytes != second_bytes {
        let at = first_bytes.iter().zip(&second_bytes).position(|(a, b)| a != b);
        eprintln!("error: the second is another: {}, from byte {at:?} on", hash(&second)?);
        return Ok(ExitCode::FAILURE);
    }
    println!("two builds in two places are the same");
    Ok(ExitCode::SUCCESS)
}

/// Builds the last commit in a directory.
fn build(directory: &Path) -> Result<PathBuf> {
    fs::create_dir(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let archive = directory.with_extension("tar");
    checked(Command::new("git").args(["archive", "--format=tar", "--output"]).arg(&archive).arg("HEAD"))?;
    checked(Command::new("tar").arg("--extract").arg("--file").arg(&archive).arg("--directory").arg(directory))?;
    cargo::static_agent_in(directory)
}

/// Whether an executable needs no loader and no libraries: it then runs in an image that has nothing else.
fn is_static(executable: &Path) -> Result<bool> {
    let output = Command::new("ldd").arg(executable).env("LC_ALL", "C").output().context("cannot run ldd")?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    Ok(text.contains("statically linked") || text.contains("not a dynamic executable"))
}

fn checked(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!("{} failed: {}", command.get_program().display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

fn hash(file: &Path) -> Result<String> {
    let output = String::from_utf8(checked(Command::new("sha256sum").arg(file))?)?;
    Ok(output.split_whitespace().next().unwrap_or_default().to_owned())
}
