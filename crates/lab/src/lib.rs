//! A kernel with IPVS for tests and demonstrations, on machines whose own kernel has none.
//!
//! [`run`] runs a command where IPVS is: right here, in a fresh network namespace, when the kernel of this machine has
//! IPVS and we are root; otherwise in a guest. The guest is User-Mode Linux: a Linux kernel that is an ordinary
//! program, needs no privileges, boots in a fraction of a second and sees the files of this machine read-only. Its
//! kernel is built once, from a source package of Debian or its relatives, and kept in a cache.
//!
//! Inside the lab, [`netns`] gives each test a network of its own and [`link`] what is in it; [`agent`] runs the agent there,
//! [`http`] asks it, and [`wait`] waits for what it does.
//!
//! ```no_run
//! # fn main() -> Result<(), lab::Error> {
//! let status = lab::run(&lab::Job::new("ipvsadm").arg("-Ln"))?;
//! assert!(status.success());
//! # Ok(())
//! # }
//! ```
//!
//! What the environment says: `KUBE_IPVS_LAB=guest` or `host` decides where commands run, `KUBE_IPVS_LAB_CACHE` names
//! the cache directory, `KUBE_IPVS_LAB_KERNEL_VERSION` the release of Linux that the guest is (`6.1`, or Debian's own
//! in QEMU: `debian-6.1`), and
//! `KUBE_IPVS_LAB_KERNEL` a User-Mode Linux to use as it is instead of building one.

pub mod agent;
mod build;
pub mod container;
pub mod cross;
mod error;
mod guest;
mod host;
pub mod http;
pub mod init;
mod job;
mod kernel;
mod kernel_config;
pub mod link;
pub mod manifests;
pub mod netns;
pub mod objects;
mod packages;
mod process;
mod progress;
mod qemu;
mod run;
mod scratch;
pub mod seccomp;
mod source;
mod stock;
mod version;
pub mod wait;

pub use error::{Error, Result};
pub use job::{Job, Output, Status};
pub use run::{Location, output, prepare, run};
pub use scratch::Scratch;
pub use version::{Kernel, Version};
