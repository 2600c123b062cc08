//! The real servers of a virtual server as the kernel holds them, kept small: there may be hundreds of thousands.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipvs_netlink::RealServer;

/// A real server in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MirrorRealServer {
    /// Its attributes.
    pub server: RealServer,
    /// Whether it was seen at weight 0 without a connection. None comes after that but from a client with affinity, and only
    /// where the sysctl `expire_quiescent_template` is 0; what drains is read again before each look for that reason too.
    pub is_drained: bool,
}

impl MirrorRealServer {
    /// One as this agent writes them.
    fn usual(at: SocketAddr) -> Self {
        Self { server: RealServer::new(at), is_drained: false }
    }
}

/// Address and port of a real server. A [`SocketAddr`] takes half as much again.
pub type RealServerAddress = (IpAddr, u16);

/// The place at an address.
pub fn real_server_address(at: SocketAddr) -> RealServerAddress {
    (at.ip(), at.port())
}

/// The real servers of a virtual server, sorted by address and port. What is the same of almost all is not kept for each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RealServers {
    places: Vec<RealServerAddress>,
    /// Those that are otherwise than this agent writes them; boxed, as there is mostly none.
    #[expect(clippy::box_collection, reason = "it is seldom there")]
    otherwise: Option<Box<BTreeMap<RealServerAddress, MirrorRealServer>>>,
}

impl RealServers {
    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = MirrorRealServer> {
        self.places.iter().map(|real_server_address| self.whole(*real_server_address))
    }

    /// Where they are, in order.
    pub fn addresses(&self) -> &[RealServerAddress] {
        &self.places
    }

    /// The one at an address.
    pub fn get(&self, at: SocketAddr) -> Option<MirrorRealServer> {
        self.places.binary_search(&real_server_address(at)).ok().map(|index| self.whole(self.places[index]))
    }

    /// Whether they are these, and each as this agent writes them. Both are sorted.
    pub fn are(&self, wanted: &[RealServerAddress]) -> bool {
        self.otherwise.is_none() && self.places == wanted
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    fn whole(&self, real_server_address: RealServerAddress) -> MirrorRealServer {
        let otherwise = self.otherwise.as_ref().and_then(|otherwise| otherwise.get(&real_server_address));
        otherwise.copied().unwrap_or_else(|| MirrorRealServer::usual(real_server_address.into()))
    }

    /// Puts one in its place, and says whether there was none at its address.
    pub(crate) fn insert(&mut self, real_server: MirrorRealServer) -> bool {
        let at = real_server.server.socket_address();
        self.note(real_server_address(at), (real_server != MirrorRealServer::usual(at)).then_some(real_server));
        let Err(index) = self.places.binary_search(&real_server_address(at)) else { return false };
        // By a quarter: doubled, a third of all would be room to spare.
        if self.places.len() == self.places.capacity() {
            self.places.reserve_exact((self.places.len() / 4).max(2));
        }
        self.places.insert(index, real_server_address(at));
        true
    }

    /// Takes one out, and says whether it was there.
    pub(crate) fn remove(&mut self, at: SocketAddr) -> bool {
        self.note(real_server_address(at), None);
        let index = self.places.binary_search(&real_server_address(at));
        index.is_ok_and(|index| {
            self.places.remove(index);
            true
        })
    }

    /// Keeps what is otherwise than usual of one, if anything is.
    fn note(&mut self, real_server_address: RealServerAddress, otherwise: Option<MirrorRealServer>) {
        if let Some(real_server) = otherwise {
            self.otherwise.get_or_insert_default().insert(real_server_address, real_server);
        } else if let Some(held) = &mut self.otherwise {
            held.remove(&real_server_address);
            if held.is_empty() {
                self.otherwise = None;
            }
        }
    }
}

/// Real servers as they were read, each with whether it was without connections.
impl FromIterator<(RealServer, bool)> for RealServers {
    fn from_iter<T: IntoIterator<Item = (RealServer, bool)>>(read: T) -> Self {
        let mut all = Self::default();
        for (server, is_idle) in read {
            let at = server.socket_address();
            let real_server = MirrorRealServer { server, is_drained: is_idle && server.weight == 0 };
            all.note(real_server_address(at), (real_server != MirrorRealServer::usual(at)).then_some(real_server));
            all.places.push(real_server_address(at));
        }
        all.places.sort_unstable();
        all.places.dedup();
        all.places.shrink_to_fit();
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
        fn they_are_what_was_put_in_and_not_taken_out(steps in prop::collection::vec((any::<bool>(), real_server()), 0..60)) {
            let (mut all, mut model) = (RealServers::default(), BTreeMap::new());
            for (is_put_in, real_server) in steps {
                let at = real_server.server.socket_address();
                if is_put_in {
                    prop_assert_eq!(all.insert(real_server), model.insert(at, real_server).is_none());
                } else {
                    prop_assert_eq!(all.remove(at), model.remove(&at).is_some());
                }
                prop_assert_eq!(all.get(at), model.get(&at).copied());
                prop_assert!(all.iter().eq(model.values().copied()));
                                prop_assert_eq!((all.len(), all.is_empty()), (model.len(), model.is_empty()));
                let wanted: Vec<_> = model.keys().copied().map(real_server_address).collect();
                prop_assert_eq!(all.addresses(), &wanted);
                let are_usual = model.iter().all(|(at, real_server)| *real_server == MirrorRealServer::usual(*at));
                prop_assert_eq!(all.are(&wanted), are_usual);
                let read: RealServers = model.values().rev().map(|it| (it.server, it.is_drained)).collect();
                let are_drained_at_weight_0 = model.values().all(|it| !it.is_drained || it.server.weight == 0);
                prop_assert_eq!(read == all, are_drained_at_weight_0);
            }
        }
    }
}
