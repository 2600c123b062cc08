//! The mirror's part about real servers: those of a virtual server as the kernel holds them, in little memory, since there may be
//! hundreds of thousands. [`crate::diff`] decides about their weights.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipvs_netlink::RealServer;

/// A real server in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MirrorRealServer {
    /// Its attributes.
    pub server: RealServer,
    /// Whether it was seen at weight 0 without a connection. After that, connections come only from clients with affinity, and
    /// only if the sysctl `expire_quiescent_template` is 0. That is one reason to read draining real servers again before each
    /// check.
    pub is_drained: bool,
}

impl MirrorRealServer {
    /// A real server with the attributes that this agent writes.
    fn with_default_attributes(at: SocketAddr) -> Self {
        Self { server: RealServer::new(at), is_drained: false }
    }
}

/// Address and port of a real server. A [`SocketAddr`] is half as large again.
pub type RealServerAddress = (IpAddr, u16);

/// The same as a [`RealServerAddress`].
pub fn real_server_address(at: SocketAddr) -> RealServerAddress {
    (at.ip(), at.port())
}

/// The real servers of a virtual server, sorted by address and port. Only attributes that differ from the default are stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RealServers {
    addresses: Vec<RealServerAddress>,
    /// Those whose attributes differ from the default. Boxed, since there is mostly none.
    #[expect(clippy::box_collection, reason = "it is seldom there")]
    exceptions: Option<Box<BTreeMap<RealServerAddress, MirrorRealServer>>>,
}

impl RealServers {
    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = MirrorRealServer> {
        self.addresses.iter().map(|address| self.at(*address))
    }

    /// Their addresses, in order.
    pub fn addresses(&self) -> &[RealServerAddress] {
        &self.addresses
    }

    /// The one at an address.
    pub fn get(&self, at: SocketAddr) -> Option<MirrorRealServer> {
        self.addresses.binary_search(&real_server_address(at)).ok().map(|index| self.at(self.addresses[index]))
    }

    /// Whether they are exactly these, all with default attributes. `wanted` is sorted.
    pub fn matches(&self, wanted: &[RealServerAddress]) -> bool {
        self.exceptions.is_none() && self.addresses == wanted
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.addresses.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }

    fn at(&self, address: RealServerAddress) -> MirrorRealServer {
        let exception = self.exceptions.as_ref().and_then(|exceptions| exceptions.get(&address));
        exception.copied().unwrap_or_else(|| MirrorRealServer::with_default_attributes(address.into()))
    }

    /// Adds or replaces a real server. Returns whether there was none at its address.
    pub(crate) fn insert(&mut self, real_server: MirrorRealServer) -> bool {
        let at = real_server.server.socket_address();
        self.set_exception(
            real_server_address(at),
            (real_server != MirrorRealServer::with_default_attributes(at)).then_some(real_server),
        );
        let Err(index) = self.addresses.binary_search(&real_server_address(at)) else { return false };
        // Grown by a quarter: if it doubled, a third of the memory would be unused.
        if self.addresses.len() == self.addresses.capacity() {
            self.addresses.reserve_exact((self.addresses.len() / 4).max(2));
        }
        self.addresses.insert(index, real_server_address(at));
        true
    }

    /// Removes a real server. Returns whether there was one.
    pub(crate) fn remove(&mut self, at: SocketAddr) -> bool {
        self.set_exception(real_server_address(at), None);
        let index = self.addresses.binary_search(&real_server_address(at));
        index.is_ok_and(|index| {
            self.addresses.remove(index);
            true
        })
    }

    /// Stores a real server whose attributes differ from the default; `None` for one whose do not.
    fn set_exception(&mut self, address: RealServerAddress, exception: Option<MirrorRealServer>) {
        if let Some(real_server) = exception {
            self.exceptions.get_or_insert_default().insert(address, real_server);
        } else if let Some(held) = &mut self.exceptions {
            held.remove(&address);
            if held.is_empty() {
                self.exceptions = None;
            }
        }
    }
}

/// Real servers as they were read, each with whether it has no connections.
impl FromIterator<(RealServer, bool)> for RealServers {
    fn from_iter<T: IntoIterator<Item = (RealServer, bool)>>(read: T) -> Self {
        let mut all = Self::default();
        for (server, is_idle) in read {
            let at = server.socket_address();
            let real_server = MirrorRealServer { server, is_drained: is_idle && server.weight == 0 };
            all.set_exception(
                real_server_address(at),
                (real_server != MirrorRealServer::with_default_attributes(at)).then_some(real_server),
            );
            all.addresses.push(real_server_address(at));
        }
        all.addresses.sort_unstable();
        all.addresses.dedup();
        all.addresses.shrink_to_fit();
        all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn real_server() -> impl Strategy<Value = MirrorRealServer> {
        (0..6_u8, any::<bool>(), 1..3_u16, 0..3_u32, any::<bool>()).prop_map(
            |(host, is_ipv6, port, weight, is_drained)| {
                let ip = if is_ipv6 {
                    IpAddr::from([0xfd, 0, 0, 0, 0, 0, 0, u16::from(host)])
                } else {
                    [10, 1, 0, host].into()
                };
                MirrorRealServer { server: RealServer { weight, ..RealServer::new((ip, port).into()) }, is_drained }
            },
        )
    }

    proptest! {
        #[test]
        fn real_servers_behave_like_a_sorted_map(steps in prop::collection::vec((any::<bool>(), real_server()), 0..60)) {
            let (mut all, mut model) = (RealServers::default(), BTreeMap::new());
            for (is_insert, real_server) in steps {
                let at = real_server.server.socket_address();
                if is_insert {
                    prop_assert_eq!(all.insert(real_server), model.insert(at, real_server).is_none());
                } else {
                    prop_assert_eq!(all.remove(at), model.remove(&at).is_some());
                }
                prop_assert_eq!(all.get(at), model.get(&at).copied());
                prop_assert!(all.iter().eq(model.values().copied()));
                                prop_assert_eq!((all.len(), all.is_empty()), (model.len(), model.is_empty()));
                let wanted: Vec<_> = model.keys().copied().map(real_server_address).collect();
                prop_assert_eq!(all.addresses(), &wanted);
                let are_default = model.iter().all(|(at, real_server)| *real_server == MirrorRealServer::with_default_attributes(*at));
                prop_assert_eq!(all.matches(&wanted), are_default);
                let read: RealServers = model.values().rev().map(|it| (it.server, it.is_drained)).collect();
                let are_drained_at_weight_0 = model.values().all(|it| !it.is_drained || it.server.weight == 0);
                prop_assert_eq!(read == all, are_drained_at_weight_0);
            }
        }
    }
}
