//! Reads what other programs have set up on this host that packets to Services meet: chains of `nf_tables` that drop, and
//! bridges.

use netlink_batch::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_batch::{Error, Socket};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};

use super::filter::read;

/// A hook of netfilter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ForeignHook {
    /// Packets to the node: IPVS takes those to Services after this hook's filters.
    Input,
    /// Packets through the node, such as answers of pods.
    Forward,
}

/// A chain of another program whose policy is drop.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DroppingChain {
    /// Where the kernel runs it.
    pub hook: ForeignHook,
    /// `ip`, `ip6` or `inet`.
    pub family: &'static str,
    /// Its table.
    pub table: String,
    /// Its name.
    pub chain: String,
}

/// Reads the host. It changes nothing.
#[derive(Debug)]
pub struct HostReader {
    netfilter: Socket,
    route: Socket,
}

impl HostReader {
    /// Opens the sockets.
    ///
    /// # Errors
    ///
    /// The kernel has no netlink of these families.
    pub fn open() -> Result<Self, Error> {
        Ok(Self { netfilter: Socket::open(NETLINK_NETFILTER)?, route: Socket::open(NETLINK_ROUTE)? })
    }

    /// The chains at the input and forward hooks whose policy is drop, in order. Those of iptables-legacy are not in
    /// `nf_tables`, and nobody tells of them.
    ///
    /// # Errors
    ///
    /// Of the socket, or the kernel's refusal.
    pub fn dropping_chains(&mut self) -> Result<Vec<DroppingChain>, Error> {
        let mut chains = read::dropping_chains(&mut self.netfilter)?;
        chains.sort();
        Ok(chains)
    }

    /// The names of bridges that have at least two ports, in order.
    ///
    /// # Errors
    ///
    /// Of the socket, or the kernel's refusal.
    pub fn bridges(&mut self) -> Result<Vec<String>, Error> {
        let (mut bridges, mut ports) = (Vec::new(), Vec::new());
        self.route.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()), |answer: RouteNetlinkMessage| {
            let RouteNetlinkMessage::NewLink(link) = answer else { return };
            let (mut name, mut is_bridge) = (String::new(), false);
            for attribute in link.attributes {
                match attribute {
                    LinkAttribute::IfName(text) => name = text,
                    LinkAttribute::Controller(index) => ports.push(index),
                    LinkAttribute::LinkInfo(infos) => is_bridge = infos.contains(&LinkInfo::Kind(InfoKind::Bridge)),
                    _ => {}
                }
            }
            if is_bridge {
                bridges.push((link.header.index, name));
            }
        })?;
        let has_ports = |index: u32| ports.iter().filter(|port| **port == index).count() >= 2;
        let mut names: Vec<String> =
            bridges.into_iter().filter(|(index, _)| has_ports(*index)).map(|(_, name)| name).collect();
        names.sort();
        Ok(names)
    }
}
