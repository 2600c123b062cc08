//! Programs a directory of manifests into the kernel of this network namespace once, and exits.
//!
//! ```console
//! $ cargo build --example program_manifests
//! $ cargo xtask lab -- sh -c 'target/debug/examples/program_manifests examples/hello && ipvsadm -Ln'
//! ```

use std::error::Error;
use std::ops::ControlFlow;
use std::time::Instant;

use reconciler::linux::LinuxKernel;
use reconciler::{Policy, Reconciler};
use service_watch::{Manifests, Message};

const NODE: &str = "node-a";

fn main() -> Result<(), Box<dyn Error>> {
    let directory = std::env::args_os().nth(1).ok_or("usage: program_manifests DIRECTORY")?;
    let policy = Policy::new(NODE);
    let kernel = LinuxKernel::connect(policy.families)?;
    let mut reconciler = Reconciler::new(kernel, policy);

    // The source sends every object, then says that the initial list is complete. A program that goes on would pass
    // changes to `reconciler::run::run` on a thread of its own.
    let source = Manifests::new(std::path::PathBuf::from(directory), NODE);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(source.run(|message| {
        match message {
            Message::Change(change) => reconciler.apply(change),
            Message::Changes(changes) => changes.into_iter().for_each(|change| reconciler.apply(change)),
            Message::Report(report) => eprintln!("{report:?}"),
        }
        if reconciler.is_ready() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }))?;

    let report = reconciler.sync(Instant::now())?;
    println!("{} operations, {} failures", report.applied.total(), report.failures.len());
    for failure in &report.failures {
        eprintln!("{}", failure.error);
    }
    if report.failures.is_empty() { Ok(()) } else { Err("the kernel refused operations".into()) }
}
