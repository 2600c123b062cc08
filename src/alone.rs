//! One agent for each network namespace: two would take what the other does for somebody's meddling, and never come to rest.
//!
//! The sign is a socket with a name in the abstract namespace of `AF_UNIX`. Those names are per network namespace, as what the
//! agent programs is; nobody else can have one that is in use; and it is gone with its process, however that ends
//! (`unix(7)`).

use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};

use anyhow::{Context as _, Result, bail};
use rustix::process::geteuid;
use tokio::net::UnixStream;
use tokio::net::unix::UCred;
use tracing::warn;

const NAME: &str = "kube-ipvs";

/// The right to program this network namespace, for as long as this value lives.
#[derive(Debug)]
pub(crate) struct Alone(#[expect(dead_code, reason = "it is there to be held")] Option<UnixListener>);

impl Alone {
    /// Fails where another agent has it.
    pub(crate) fn new() -> Result<Self> {
        let name = SocketAddr::from_abstract_name(NAME).context("cannot name a socket")?;
        match UnixListener::bind_addr(&name) {
            Ok(listener) => Ok(Self(Some(listener))),
            Err(error) if error.kind() == ErrorKind::AddrInUse && is_an_agents(&name) => bail!(
                "another kube-ipvs programs this network namespace (`ss -xlp` shows it as @{NAME}): stop that one first, or leave \
                 the node to it. Nothing was changed"
            ),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                warn!(
                    "somebody without the rights of an agent has the name @{NAME} (`ss -xlp`): another kube-ipvs would not be noticed"
                );
                Ok(Self(None))
            }
            // Hardly ever there is one.
            Err(error) => {
                warn!("cannot find out whether another kube-ipvs runs here: {error}");
                Ok(Self(None))
            }
        }
    }
}

/// Whether who has the name may be an agent: anybody can have one, and must not keep an agent from starting by that. Where it
/// cannot be found out it may be. Tokio asks: the standard library's `peer_cred` is not stable, and a peer in another PID
/// namespace has process 0, which rustix's type of its answer does not have.
fn is_an_agents(name: &SocketAddr) -> bool {
    let peer = || -> std::io::Result<UCred> {
        let stream = std::os::unix::net::UnixStream::connect_addr(name)?;
        stream.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        runtime.block_on(async { UnixStream::from_std(stream)?.peer_cred() })
    };
    peer().map_or(true, |peer| peer.uid() == geteuid().as_raw())
}
