//! The project's chores: `cargo xtask`.
//!
//! One file per subcommand. The executable is also the first process of the lab's guest.

mod attack;
mod bench;
mod cargo;
mod conformance;
mod contained;
mod cross;
mod dataplane;
mod demo;
mod image;
mod in_lab;
mod kernels;
mod queue;
mod reproduce;
mod soak;
mod test;
mod workload;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Chores of the kube-ipvs project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    /// The kernel of the guest: a release of Linux, such as 6.1, or debian-6.1 for Debian's own in QEMU
    #[arg(long, global = true, value_name = "VERSION")]
    kernel: Option<lab::Kernel>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Args),
    Test(test::Args),
    Conformance(conformance::Args),
    Dataplane(dataplane::Args),
    Bench(bench::Args),
    Soak(soak::Args),
    Attack(attack::Args),
    Lab(in_lab::Args),
    Kernels(kernels::Args),
    Image(image::Args),
    Cross(cross::Args),
    Reproduce(reproduce::Args),
    #[command(hide = true)]
    GuestAttack(attack::GuestArgs),
    #[command(hide = true)]
    GuestLocalUser(attack::local_user::Args),
    #[command(hide = true)]
    GuestBench(bench::GuestArgs),
    #[command(hide = true)]
    GuestContained(contained::Args),
    #[command(hide = true)]
    GuestDemo(demo::GuestArgs),
    #[command(hide = true)]
    GuestSoak(soak::GuestArgs),
    #[command(hide = true)]
    GuestWorker(queue::worker::Args),
}

fn main() -> ExitCode {
    if lab::init::is_init() {
        lab::init::main();
    }
    let cli = Cli::parse();
    let outcome = match cli.command {
        // The environment tells it to every process that this one starts, and can only be set for another.
        _ if cli.kernel.is_some_and(|kernel| !kernels::is_chosen(kernel)) => kernels::start_again(cli.kernel),
        Command::Bench(args) => bench::run(&args),
        Command::Soak(args) => soak::run(&args),
        Command::Attack(args) => attack::run(&args),
        Command::GuestAttack(args) => attack::run_guest(&args),
        Command::GuestLocalUser(args) => attack::local_user::run(&args),
        Command::GuestSoak(args) => soak::run_guest(&args),
        Command::GuestBench(args) => bench::run_guest(&args),
        Command::Lab(args) => in_lab::run(&args),
        Command::Kernels(args) => kernels::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Conformance(args) => conformance::run(&args),
        Command::Dataplane(args) => dataplane::run(&args),
        Command::Image(args) => image::run(&args),
        Command::Cross(args) => cross::run(&args),
        Command::Reproduce(args) => reproduce::run(&args),
        Command::GuestContained(args) => contained::run(args),
        Command::Demo(args) => demo::run(&args),
        Command::GuestDemo(args) => Ok(demo::run_guest(&args)),
        Command::GuestWorker(args) => queue::worker::run(&args),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        // As `timeout` and its like do: codes that a command hardly ever has.
        match error.downcast_ref::<lab::Error>() {
            Some(lab::Error::TimeLimit { .. }) => ExitCode::from(124),
            Some(_) => ExitCode::from(125),
            None => ExitCode::FAILURE,
        }
    })
}
