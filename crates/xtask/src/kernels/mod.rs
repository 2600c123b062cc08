//! `cargo xtask kernels`: the tests that need a kernel, on several releases of Linux.

mod table;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use lab::{Kernel, Version};

use self::table::{Row, Table};

/// Says to the lab which release the guest is, in this process and in all that it starts.
const CHOICE: &str = "KUBE_IPVS_LAB_KERNEL_VERSION";

/// The oldest release whose source Debian has, those of its stable releases, and the newest that was tried.
const USUAL: [Kernel; 4] = [uml(5, 10), uml(6, 1), uml(6, 12), uml(7, 2)];

const fn uml(major: u16, minor: u16) -> Kernel {
    Kernel::Uml(Version::new(major, minor))
}

/// The page with the table of results.
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/kernels.md");

/// Runs the tests that need a kernel with IPVS on several releases of Linux, each in a guest, and writes the results
/// into docs/kernels.md.
///
/// Kernels that are not in the lab's cache are built first, from the source packages of the releases of Debian that have
/// them.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print the results and leave docs/kernels.md as it is
    #[arg(long)]
    dry_run: bool,
    /// The releases, such as 6.1; all that the page is about if none is said
    kernels: Vec<Kernel>,
}

/// Whether the lab's guest is already this release.
pub(crate) fn is_chosen(kernel: Kernel) -> bool {
    std::env::var(CHOICE).is_ok_and(|chosen| chosen == kernel.to_string())
}

/// Runs this command again with another choice of the guest's kernel; returns only if that fails.
pub(crate) fn start_again(kernel: Option<Kernel>) -> Result<ExitCode> {
    let mut command = Command::new(std::env::current_exe().context("cannot tell the executable of this process")?);
    command.args(std::env::args_os().skip(1));
    command.env(CHOICE, kernel.map(|kernel| kernel.to_string()).unwrap_or_default());
    // A kernel can be chosen for a guest alone.
    command.env("KUBE_IPVS_LAB", "guest").env_remove("KUBE_IPVS_LAB_KERNEL");
    Err(command.exec()).context("cannot run this command again")
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let kernels = if args.kernels.is_empty() { &USUAL[..] } else { &args.kernels };
    let executable = own_copy()?;
    let mut rows = Vec::new();
    for &kernel in kernels {
        eprintln!("\n=== Linux {kernel}");
        let row = try_kernel(&executable.path, kernel);
        if let Err(error) = &row {
            eprintln!("error: {error:#}");
        }
        rows.push(row.unwrap_or_else(|error| Row::failed(kernel, &error)));
    }
    let page = std::fs::read_to_string(PAGE).with_context(|| format!("cannot read {PAGE}"))?;
    let mut table = Table::of_page(&page)?;
    let passed = rows.iter().all(Row::passed);
    for row in rows {
        table.put(row);
    }
    println!("\n{table}");
    if !args.dry_run {
        std::fs::write(PAGE, table.into_page(&page)?).with_context(|| format!("cannot write {PAGE}"))?;
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A copy of this executable, because cargo replaces the file when a test needs another build.
struct OwnCopy {
    path: PathBuf,
    _dir: lab::Scratch,
}

fn own_copy() -> Result<OwnCopy> {
    let dir = lab::Scratch::new()?;
    let path = dir.path().join("xtask");
    std::fs::copy("/proc/self/exe", &path).context("cannot copy this executable")?;
    Ok(OwnCopy { path, _dir: dir })
}

/// Runs everything on one release.
fn try_kernel(xtask: &std::path::Path, kernel: Kernel) -> Result<Row> {
    let command = |words: &[&str]| {
        let mut command = Command::new(xtask);
        command.args(["--kernel", &kernel.to_string()]).args(words).stdin(Stdio::null());
        command
    };
    let status = command(&["lab", "--prepare"]).status().context("cannot prepare the kernel")?;
    if !status.success() {
        bail!("no kernel: see above");
    }
    let mut boot = f32::INFINITY;
    let mut release = String::new();
    for _ in 0..3 {
        let started = Instant::now();
        let output = command(&["lab", "--", "uname", "-r"]).stderr(Stdio::inherit()).output().context("cannot boot")?;
        if !output.status.success() {
            bail!("does not boot: see above");
        }
        boot = boot.min(started.elapsed().as_secs_f32());
        String::from_utf8_lossy(&output.stdout).trim().clone_into(&mut release);
    }
    let mut tests = command(&["test", "--only-lab"]);
    let mut child = tests.stderr(Stdio::piped()).spawn().context("cannot run the tests")?;
    let Some(output) = child.stderr.take() else { bail!("the tests have no output") };
    let mut summary = None;
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("cannot read the output of the tests")?;
        // Only the last line that looks like it is the summary.
        summary = table::parse_summary(&String::from_utf8_lossy(&line)).or(summary);
        std::io::stderr().write_all(&[line.as_slice(), b"\n"].concat()).context("cannot write the tests' output")?;
    }
    child.wait().context("cannot wait for the tests")?;
    let suites = summary.context("the tests ended without a summary")?;
    Ok(Row::new(kernel, &release, boot, suites))
}
