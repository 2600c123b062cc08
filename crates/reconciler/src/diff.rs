//! The operations that lead from what the kernel holds to what is desired, one key at a time.

use std::net::SocketAddr;

use ipnet::IpNet;
use ipvs_netlink::RealServer;
use service_watch::Protocol;

use crate::contribution::WantedServer;
use crate::desired::Desired;
use crate::mirror::{Mirror, MirrorRealServer, MirrorServer};
use crate::plan::{FrontEnd, Key, Operation};

/// What is kept although nobody wants it.
#[derive(Clone, Copy, Debug)]
pub enum Keeps<'a> {
    /// Virtual servers with an address in these ranges.
    Within(&'a [IpNet]),
    /// Everything: what seems not to be wanted may be in what could not be read.
    Everything,
}

impl Keeps<'_> {
    fn server(self, front_end: &FrontEnd) -> bool {
        match self {
            Self::Within(ranges) => ranges.iter().any(|range| range.contains(&front_end.address)),
            Self::Everything => true,
        }
    }

    fn is_everything(self) -> bool {
        matches!(self, Self::Everything)
    }
}

/// Appends the operations a key needs. Returns whether it has real servers that drain: they need another look later,
/// since only the kernel can tell when their last connection has ended.
pub fn diff(key: Key, mirror: &Mirror, desired: &Desired, keeps: Keeps<'_>, out: &mut Vec<Operation>) -> bool {
    match key {
        Key::Device => {
            if !mirror.has_device() {
                out.push(Operation::AddDevice);
            }
        }
        Key::Address(address) => match (mirror.has_address(address), desired.wants_address(address)) {
            (false, true) => out.push(Operation::BindAddress(address)),
            (true, false) if mirror.has_own_address(address) && !keeps.is_everything() => {
                out.push(Operation::UnbindAddress(address));
            }
            _ => {}
        },
        Key::Server(front_end) => match (mirror.server(&front_end), desired.server(&front_end)) {
            (None, None) => {}
            (None, Some(wanted)) => {
                out.push(Operation::AddVirtualServer(front_end, wanted.config));
                out.extend(
                    wanted
                        .real_servers
                        .iter()
                        .map(|address| Operation::AddRealServer(front_end, RealServer::new(*address))),
                );
            }
            (Some(_), None) => {
                if !keeps.server(&front_end) {
                    out.push(Operation::DeleteVirtualServer(front_end));
                }
            }
            (Some(held), Some(wanted)) => {
                if held.config != wanted.config {
                    out.push(Operation::SetVirtualServer(front_end, wanted.config));
                }
                return diff_real_servers(front_end, held, wanted, keeps, out);
            }
        },
    }
    false
}

fn diff_real_servers(
    front_end: FrontEnd,
    held: &MirrorServer,
    wanted: &WantedServer,
    keeps: Keeps<'_>,
    out: &mut Vec<Operation>,
) -> bool {
    let mut draining = false;
    // Both are sorted: one walk over the two.
    let mut wanted = wanted.real_servers.iter().copied().peekable();
    let add = |address: SocketAddr| Operation::AddRealServer(front_end, RealServer::new(address));
    for (address, real_server) in &held.real_servers {
        while let Some(missing) = wanted.next_if(|wanted| wanted < address) {
            out.push(add(missing));
        }
        if wanted.next_if_eq(address).is_some() {
            let as_wanted = RealServer::new(*address);
            if real_server.server != as_wanted {
                out.push(Operation::SetRealServer(front_end, as_wanted));
            }
        } else if !keeps.is_everything() || real_server.server.weight == 0 {
            // Weight 0 says that its removal was decided before.
            draining |= remove(front_end, real_server, out);
        }
    }
    out.extend(wanted.map(add));
    draining
}

/// A real server that is not wanted. Returns whether it drains.
///
/// TCP connections live on at weight 0 until they end. UDP and SCTP flows would never let go, so their real servers are
/// deleted at once. Nothing is deleted on the ground of connection counts read before its weight was 0: a connection may
/// have come since.
fn remove(front_end: FrontEnd, real_server: &MirrorRealServer, out: &mut Vec<Operation>) -> bool {
    let server = real_server.server;
    if front_end.protocol != Protocol::Tcp || real_server.is_drained {
        out.push(Operation::DeleteRealServer(front_end, server.socket_address()));
        return false;
    }
    if server.weight != 0 {
        out.push(Operation::DrainRealServer(front_end, RealServer { weight: 0, ..server }));
    }
    true
}
