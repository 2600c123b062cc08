//! One agent for each network namespace: two would take what the other does for somebody's meddling, and never come to rest.
//!
//! The sign is a socket with a name in the abstract namespace of `AF_UNIX`. Those names are per network namespace, as what the
//! agent programs is; nobody else can have one that is in use; and it is gone with its process, however that ends
//! (`unix(7)`).

use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};

use anyhow::{Context as _, Result, bail};
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
            Err(error) if error.kind() == ErrorKind::AddrInUse => bail!(
                "another kube-ipvs programs this network namespace (`ss -xlp` shows it as @{NAME}): stop that one first, or leave \
                 the node to it. Nothing was changed"
            ),
            // Hardly ever there is one.
            Err(error) => {
                warn!("cannot find out whether another kube-ipvs runs here: {error}");
                Ok(Self(None))
            }
        }
    }
}
