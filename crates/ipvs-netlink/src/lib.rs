//! A client for IPVS, the Linux kernel's load balancer, over generic netlink.
//!
//! IPVS balances connections to a *virtual server* over its *real servers*. The kernel's header calls them service and
//! destination, and this crate keeps those names where it speaks of commands and attributes of `linux/ip_vs.h`.
//!
//! ```no_run
//! use ipvs_netlink::{Client, Protocol, RealServer, Scheduler, VirtualServer, VirtualServerId};
//!
//! let mut ipvs = Client::connect()?;
//! let id = VirtualServerId::address(Protocol::Tcp, "10.0.0.1:80".parse()?);
//! ipvs.add_virtual_server(&VirtualServer::new(id, Scheduler::WeightedLeastConnection))?;
//! ipvs.add_real_server(&id, &RealServer::new("10.1.0.7:8080".parse()?))?;
//! for entry in ipvs.virtual_servers()? {
//!     println!("{} {}: {} connections", entry.server.id, entry.server.scheduler, entry.stats.connections);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! It requires `CAP_NET_ADMIN` in the initial user namespace. A client belongs to the network namespace of the thread that
//! connected it; IPVS is per namespace.
//!
//! # Where to find what
//!
//! * [`Client`] has a method for each command of the family; its calls wait for the kernel, which handles a request inside the
//!   system call that sends it. With the feature `tokio` there is `AsyncClient`, whose calls are awaited.
//! * [`Client::apply`] sends many [`Message`]s in few system calls and returns one result each. [`Message`] implements the
//!   traits of [`netlink_packet_generic`] and so travels over other sockets too.
//! * [`Table::changes_to`] makes the messages that lead from one configuration to another; [`Change::between`] is that for
//!   the real servers of one virtual server, for those who want to decide what becomes of surplus ones.
//! * [`Client::features`] asks the kernel what it can do.
//! * What netlink does not tell is read from `/proc`, which takes no capability: [`Connections`] and [`Totals`].
//! * [`rules`] reads and writes what `ipvsadm -S` saves and `ipvsadm -R` restores.
//! * [`Error::kind`] is what to match on; the text names the operation, the object and what to do.
//! * With the feature `fake` there is `fake::Ipvs`, an IPVS in memory with the kernel's rules, to test against.
//!
//! Attributes this crate does not know are skipped, so that a newer kernel can be read.

#![forbid(unsafe_code)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod attributes;
mod changes;
mod client;
mod config;
mod connections;
mod errno;
mod error;
#[cfg(feature = "fake")]
pub mod fake;
mod features;
mod id;
mod message;
mod name;
mod proc;
mod real_server;
pub mod rules;
mod scheduler;
mod stats;
mod sync_daemon;
mod totals;
mod virtual_server;
mod wire;

pub use changes::{Change, Table};
pub use client::{Applied, Client, ServerEntry, Servers};
#[cfg(feature = "tokio")]
pub use client::{AsyncClient, AsyncServers};
pub use config::{Info, Timeouts};
pub use connections::{Connection, ConnectionState, Connections, Origin, PersistenceData, Template};
pub use error::{Error, ErrorKind};
pub use features::{EstimationFeatures, Features, TunnelFeatures};
pub use id::{Family, Protocol, VirtualServerId};
pub use message::Message;
pub use name::{InvalidName, Name};
pub use netlink_batch::{Refusal, Sent};
pub use proc::ProcError;
pub use real_server::{Forwarding, GueChecksum, RealServer, RealServerEntry, Tunnel};
pub use scheduler::{Scheduler, SchedulerFlags};
pub use stats::{Stats, StatsWidth};
pub use sync_daemon::{SyncDaemon, SyncRole};
pub use totals::{CpuStats, Totals};
pub use virtual_server::{Netmask, Persistence, VirtualServer, VirtualServerEntry};
