//! The instance lock: one agent for each network namespace. Two agents would each repair what the other writes, for
//! ever.
//!
//! The lock is a socket with a name in the abstract namespace of `AF_UNIX` (`unix(7)`). Such names are per network
//! namespace, as is everything that the agent programs; a name that is in use cannot be bound again; and the kernel
//! releases it when the process ends, in whichever way.

use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};

use anyhow::{Context as _, Result, bail};
use rustix::process::geteuid;
use tokio::net::UnixStream;
use tokio::net::unix::UCred;
use tracing::warn;

const SOCKET_NAME: &str = "kube-ipvs";

/// The right to program this network namespace. It is held until this value is dropped.
#[derive(Debug)]
pub(crate) struct InstanceLock(#[expect(dead_code, reason = "it is held, not read")] Option<UnixListener>);

impl InstanceLock {
    /// Fails if another agent holds the lock.
    pub(crate) fn acquire() -> Result<Self> {
        let name = SocketAddr::from_abstract_name(SOCKET_NAME).context("cannot name a socket")?;
        match UnixListener::bind_addr(&name) {
            Ok(listener) => Ok(Self(Some(listener))),
            Err(error) if error.kind() == ErrorKind::AddrInUse && may_be_agent(&name) => bail!(
                "another kube-ipvs programs this network namespace (`ss -xlp` shows it as @{SOCKET_NAME}): stop that one first, or \
                 leave the node to it. Nothing was changed"
            ),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                warn!(
                    "a process without an agent's privileges has the name @{SOCKET_NAME} (`ss -xlp`): another kube-ipvs would not \
                     be noticed"
                );
                Ok(Self(None))
            }
            Err(error) => {
                warn!("cannot find out whether another kube-ipvs runs here: {error}");
                Ok(Self(None))
            }
        }
    }
}

/// Whether the process that listens on the name may be an agent: it has our user id, or its user id cannot be read. Any
/// user can bind the name, and must not be able to prevent an agent from starting. Tokio reads the credentials, because
/// the standard library's `peer_cred` is not stable, and rustix cannot represent process id 0, which a peer in another
/// PID namespace has.
fn may_be_agent(name: &SocketAddr) -> bool {
    let peer = || -> std::io::Result<UCred> {
        let stream = std::os::unix::net::UnixStream::connect_addr(name)?;
        stream.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        runtime.block_on(async { UnixStream::from_std(stream)?.peer_cred() })
    };
    peer().map_or(true, |peer| peer.uid() == geteuid().as_raw())
}
