//! An IPVS in memory, to test against what would need a kernel: deterministic, without privileges, on any system.
//!
//! [`Ipvs`] takes the same [`Message`]s as a kernel, with the same results: what each does, and which errno a wrong one
//! gets, are those of Linux 6.1, against which it is checked with random sequences. What the kernel has — schedulers, IPv6,
//! interfaces — and what goes through real servers is for the test to say.
//!
//! Here a controller drains real servers that are no longer wanted before it deletes them:
//!
//! ```
//! use std::net::SocketAddr;
//!
//! use ipvs_netlink::fake::Ipvs;
//! use ipvs_netlink::{Message, Protocol, RealServer, RealServerEntry, Scheduler, VirtualServer, VirtualServerId};
//!
//! fn drain(id: VirtualServerId, listed: &[RealServerEntry], wanted: &[SocketAddr]) -> Vec<Message> {
//!     let unwanted = listed.iter().filter(|entry| !wanted.contains(&entry.server.socket_address()));
//!     unwanted
//!         .map(|entry| match entry.is_idle() {
//!             true => Message::DeleteRealServer(id, entry.server.socket_address()),
//!             false => Message::SetRealServer(id, RealServer { weight: 0, ..entry.server }),
//!         })
//!         .collect()
//! }
//!
//! let mut ipvs = Ipvs::default();
//! let id = VirtualServerId::address(Protocol::Tcp, "10.0.0.1:80".parse()?);
//! let address = "10.1.0.7:8080".parse()?;
//! ipvs.add_virtual_server(&VirtualServer::new(id, Scheduler::RoundRobin))?;
//! ipvs.add_real_server(&id, &RealServer::new(address))?;
//!
//! // While there is a connection, the real server stays and takes no more.
//! ipvs.traffic_mut(&id, address).ok_or("gone")?.active_connections = 1;
//! let messages = drain(id, &ipvs.real_servers(&id), &[]);
//! assert!(ipvs.apply(&messages).iter().all(Result::is_ok));
//! assert_eq!(ipvs.real_servers(&id)[0].server.weight, 0);
//!
//! // Then it goes.
//! ipvs.traffic_mut(&id, address).ok_or("gone")?.active_connections = 0;
//! let messages = drain(id, &ipvs.real_servers(&id), &[]);
//! assert!(ipvs.apply(&messages).iter().all(Result::is_ok));
//! assert!(ipvs.real_servers(&id).is_empty());
//!
//! // What a kernel refuses, the fake refuses: real servers cannot be multicast addresses.
//! let refused = ipvs.add_real_server(&id, &RealServer::new("224.0.0.1:80".parse()?));
//! assert_eq!(refused.unwrap_err().refusal().map(|refusal| refusal.errno), Some(22));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What it does not have:
//!
//! * packets, and so connections of its own, rates, and thresholds that are reached;
//! * permissions (`EPERM`) and lack of memory (`ENOMEM`);
//! * threads: a kernel that is to stop a daemon whose thread has not begun stops it, but never answers;
//! * time: connections of deleted real servers stay until [`Ipvs::empty_trash`];
//! * routes and the state of interfaces, beyond what [`Kernel`] says;
//! * the hash table: virtual servers are listed in the order of their identities. Real servers are listed as the kernel
//!   does it, the latest first.

mod client;
mod daemons;
mod kernel;
mod servers;

use std::net::SocketAddr;

use netlink_batch::Refusal;
use netlink_packet_core::{Emitable, ParseableParametrized};
use netlink_packet_generic::{GenlFamily, GenlHeader};

use self::daemons::Daemons;
use self::servers::Servers;
use crate::config::{Info, Timeouts};
use crate::errno::EINVAL;
use crate::id::VirtualServerId;
use crate::message::Message;
use crate::stats::Stats;

pub use self::kernel::{Interface, Kernel};
pub use self::servers::Traffic;

/// `IP_VS_VERSION_CODE`: 1.2.1.
const VERSION: u32 = 0x01_02_01;

/// The IPVS of one network namespace, in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ipvs {
    /// What the kernel has.
    pub kernel: Kernel,
    servers: Servers,
    daemons: Daemons,
    timeouts: Timeouts,
}

impl Default for Ipvs {
    fn default() -> Self {
        Self::new(Kernel::default())
    }
}

impl Ipvs {
    /// One without virtual servers.
    pub fn new(kernel: Kernel) -> Self {
        Self {
            kernel,
            servers: Servers::default(),
            daemons: Daemons::default(),
            timeouts: Timeouts { tcp: 15 * 60, tcp_fin: 2 * 60, udp: 5 * 60 },
        }
    }

    /// Does what a message asks, and returns the kernel's answers: those of a list or a question; none otherwise.
    ///
    /// A message the client would not send is refused with `EINVAL` and the client's words.
    pub fn handle(&mut self, message: &Message) -> Result<Vec<Message>, Refusal> {
        if let Some(fault) = message.fault() {
            let mut refusal = Refusal::new(EINVAL);
            refusal.message = Some(fault.to_owned());
            return Err(refusal);
        }
        self.command(message).map_err(Refusal::new)
    }

    fn command(&mut self, message: &Message) -> Result<Vec<Message>, i32> {
        let Self { kernel, servers, daemons, timeouts } = self;
        match message {
            Message::AddVirtualServer(_) | Message::SetVirtualServer(_) => {
                let Message::VirtualServer(read) = read(message)? else { return Err(EINVAL) };
                match message {
                    Message::AddVirtualServer(_) => servers.add(kernel, &read.server)?,
                    _ => servers.set(kernel, &read.server)?,
                }
            }
            Message::AddRealServer(id, _) | Message::SetRealServer(id, _) => {
                let Message::RealServer(read) = read(message)? else { return Err(EINVAL) };
                let synchronized = daemons.is_any_running();
                match message {
                    Message::AddRealServer(..) => servers.add_real(kernel, id, &read.server, synchronized)?,
                    _ => servers.set_real(kernel, id, &read.server, synchronized)?,
                }
            }
            Message::DeleteVirtualServer(id) => servers.delete(kernel, id)?,
            Message::DeleteRealServer(id, address) => servers.delete_real(kernel, id, *address)?,
            Message::ZeroVirtualServer(id) => servers.zero(kernel, id)?,
            Message::Zero => servers.zero_all(),
            Message::Flush => servers.flush(),
            Message::StartSyncDaemon(daemon) => daemons.start(daemon, kernel, servers.has_mixed_families())?,
            Message::StopSyncDaemon(role) => daemons.stop(*role)?,
            Message::SetTimeouts(new) => set_timeouts(timeouts, new, kernel.max_timeout())?,
            Message::GetVirtualServer(id) => return Ok(vec![Message::VirtualServer(servers.get(kernel, id)?)]),
            Message::ListVirtualServers => return Ok(servers.list().map(Message::VirtualServer).collect()),
            Message::ListRealServers(id) => return Ok(servers.list_real(id).map(Message::RealServer).collect()),
            Message::ListSyncDaemons => return Ok(daemons.list().map(Message::SyncDaemon).collect()),
            Message::GetTimeouts => return Ok(vec![Message::Timeouts(*timeouts)]),
            Message::GetInfo => return Ok(vec![Message::Info(Info::new(VERSION, kernel.connection_table_size))]),
            // Not sent: see Message::fault.
            Message::VirtualServer(_)
            | Message::RealServer(_)
            | Message::SyncDaemon(_)
            | Message::Timeouts(_)
            | Message::Info(_) => return Err(EINVAL),
        }
        Ok(Vec::new())
    }

    /// The counters of a virtual server, for a test to set; `None` where there is none.
    pub fn stats_mut(&mut self, id: &VirtualServerId) -> Option<&mut Stats> {
        self.servers.stats_mut(id)
    }

    /// What goes through a real server, for a test to set; `None` where there is none.
    ///
    /// It outlives the real server: one that is deleted and comes again has its connections again, and unless its virtual
    /// server was deleted too its counters.
    pub fn traffic_mut(&mut self, id: &VirtualServerId, address: SocketAddr) -> Option<&mut Traffic> {
        self.servers.traffic_mut(id, address)
    }

    /// Forgets what went through deleted real servers, as the kernel does some minutes after the last of their connections.
    pub fn empty_trash(&mut self) {
        self.servers.empty_trash();
    }
}

/// `ip_vs_set_timeout`: all or none.
fn set_timeouts(timeouts: &mut Timeouts, new: &Timeouts, longest: u32) -> Result<(), i32> {
    if [new.tcp, new.tcp_fin, new.udp].into_iter().any(|seconds| seconds > longest) {
        return Err(EINVAL);
    }
    let or = |new: u32, old: u32| if new == 0 { old } else { new };
    *timeouts = Timeouts {
        tcp: or(new.tcp, timeouts.tcp),
        tcp_fin: or(new.tcp_fin, timeouts.tcp_fin),
        udp: or(new.udp, timeouts.udp),
    };
    Ok(())
}

/// What arrives of a message: values that are written alike are the same to a kernel, such as `Scheduler::RoundRobin` and
/// an `Other` named `rr`.
fn read(message: &Message) -> Result<Message, i32> {
    // Only what makes something can be read, and what changes it is written alike.
    let message = match *message {
        Message::SetVirtualServer(server) => Message::AddVirtualServer(server),
        Message::SetRealServer(id, server) => Message::AddRealServer(id, server),
        other => other,
    };
    let mut buffer = vec![0; message.buffer_len()];
    message.emit(&mut buffer);
    let header = GenlHeader { cmd: message.command(), version: message.version() };
    Message::parse_with_param(&buffer, header).map_err(|_| EINVAL)
}
