//! Addresses of this Node and of API servers that no Service may take, as they were known last. Objects lack them for a moment now and
//! then: an API server that stops takes its endpoint away, and a Node is deleted and registered again. Nobody else owns an address
//! because of that.

use std::net::IpAddr;

use service_watch::Node;

/// The last known addresses.
#[derive(Clone, Debug, Default)]
pub(crate) struct LastKnown {
    api_servers: Vec<IpAddr>,
    node: Vec<IpAddr>,
}

impl LastKnown {
    /// The endpoints of API servers, with those of before whose place no other has taken.
    pub(crate) fn api_servers(&self) -> &[IpAddr] {
        &self.api_servers
    }

    /// The addresses of this Node; those of before while it has none.
    pub(crate) fn node(&self) -> &[IpAddr] {
        &self.node
    }

    /// Records the endpoints of API servers. One of before is forgotten once there are as many others.
    pub(crate) fn set_api_servers(&mut self, endpoints: impl Iterator<Item = IpAddr>) {
        let mut current: Vec<IpAddr> = endpoints.collect();
        current.sort_unstable();
        current.dedup();
        let vacant = self.api_servers.len().saturating_sub(current.len());
        let former = self.api_servers.iter().copied().filter(|address| current.binary_search(address).is_err());
        let former: Vec<IpAddr> = former.take(vacant).collect();
        self.api_servers = [current, former].concat();
    }

    /// Records the addresses of this Node.
    pub(crate) fn set_node(&mut self, node: &Node) {
        if !node.addresses.is_empty() {
            self.node.clone_from(&node.addresses);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    #[test]
    fn an_api_server_stays_known_until_another_takes_its_place() {
        let mut known = LastKnown::default();
        for (endpoints, expected) in [
            (&[1, 2, 3][..], &[1, 2, 3][..]),
            (&[1, 2], &[1, 2, 3]),
            (&[], &[1, 2, 3]),
            (&[2], &[2, 1, 3]),
            (&[2, 4], &[2, 4, 1]),
            (&[2, 4, 5, 5], &[2, 4, 5]),
            (&[6, 7, 8, 9], &[6, 7, 8, 9]),
        ] {
            let expected: Vec<IpAddr> = expected.iter().copied().map(ip).collect();
            known.set_api_servers(endpoints.iter().copied().map(ip));
            assert_eq!(known.api_servers(), expected, "{endpoints:?}");
        }
    }

    #[test]
    fn addresses_of_the_node_stay_known_while_it_has_none() {
        let mut known = LastKnown::default();
        let node = |last: &[u8]| Node { addresses: last.iter().copied().map(ip).collect(), ..Node::default() };
        for (addresses, expected) in [(&[][..], &[][..]), (&[1, 2], &[1, 2]), (&[], &[1, 2]), (&[3], &[3])] {
            known.set_node(&node(addresses));
            assert_eq!(known.node(), node(expected).addresses);
        }
    }
}
