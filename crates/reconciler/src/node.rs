//! The node as far as Services depend on it: its zone, its addresses, and where NodePorts listen.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use ipvs_netlink::Family;
use service_watch::Node;

use crate::policy::{NodePortAddresses, Policy};

/// What contributions depend on besides Services, endpoints and the policy. Equal views give equal contributions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeView {
    /// The zone of the Node object.
    pub zone: Option<Arc<str>>,
    /// The addresses of all interfaces except `kube-ipvs0`. A VIP among them is not bound again. IPv6 link-local addresses are
    /// left out, as every new pod interface has one.
    pub interface_addresses: BTreeSet<IpAddr>,
    /// The addresses NodePorts listen on.
    pub node_port_addresses: BTreeSet<IpAddr>,
    /// The addresses on which the node answers health checks of load balancers, by family; all addresses of a family without an
    /// entry.
    pub health_check_addresses: BTreeMap<Family, BTreeSet<IpAddr>>,
    /// The IPs of this node, at most one per family. Source ranges are compared with them.
    pub node_ips: Vec<IpAddr>,
    /// The addresses of this Node. None of them can be a VIP.
    pub node_addresses: BTreeSet<IpAddr>,
    /// The addresses of the other Nodes that are known. None of them can be an external or load-balancer IP: bound here, it would
    /// cut this node off from the other.
    pub peer_node_addresses: BTreeSet<IpAddr>,
    /// The addresses of API servers. Only Services of the control plane can have them as external or load-balancer IPs.
    pub api_servers: BTreeSet<IpAddr>,
    /// The pod CIDRs of this node.
    pub pod_cidrs: Vec<IpNet>,
}

impl NodeView {
    /// Derives the view from the Node object, the addresses of the other Nodes, those of API servers in addition to the
    /// policy's, and the addresses of all interfaces except `kube-ipvs0`.
    pub fn new(
        node: Option<&Node>,
        peer_node_addresses: impl IntoIterator<Item = IpAddr>,
        api_servers: impl IntoIterator<Item = IpAddr>,
        interfaces: &BTreeSet<IpAddr>,
        policy: &Policy,
    ) -> Self {
        let node_ips = node_ips(node, policy);
        Self {
            zone: node.and_then(|node| node.zone.clone()),
            interface_addresses: interfaces.iter().copied().filter(|address| !is_link_local_v6(*address)).collect(),
            node_port_addresses: policy
                .families
                .iter()
                .flat_map(|family| node_port_addresses(family, &node_ips, interfaces, policy))
                .collect(),
            health_check_addresses: policy
                .families
                .iter()
                .filter_map(|family| Some((family, selected_addresses(family, &node_ips, interfaces, policy)?)))
                .collect(),
            node_ips,
            node_addresses: node.into_iter().flat_map(|node| node.addresses.iter().copied()).collect(),
            peer_node_addresses: peer_node_addresses.into_iter().collect(),
            api_servers: api_servers.into_iter().chain(policy.api_servers.iter().copied()).collect(),
            pod_cidrs: node.map(|node| node.pod_cidrs.clone()).unwrap_or_default(),
        }
    }
}

/// At most one IP per family: the first of the Node object, unless `--bind-address` names one.
fn node_ips(node: Option<&Node>, policy: &Policy) -> Vec<IpAddr> {
    let of_node = node.map(|node| node.addresses.as_slice()).unwrap_or_default();
    [Family::Ipv4, Family::Ipv6]
        .into_iter()
        .filter_map(|family| {
            let is_of_family = |address: &IpAddr| Family::of(*address) == family;
            policy.bind_address.filter(is_of_family).or_else(|| of_node.iter().copied().find(is_of_family))
        })
        .collect()
}

/// The addresses NodePorts of a family listen on, as in kube-proxy: without a range, IPv6 link-local addresses are left out; a
/// range may include them. Loopback addresses are always left out.
fn node_port_addresses(
    family: Family,
    node_ips: &[IpAddr],
    interfaces: &BTreeSet<IpAddr>,
    policy: &Policy,
) -> BTreeSet<IpAddr> {
    let mut addresses = selected_addresses(family, node_ips, interfaces, policy).unwrap_or_else(|| {
        let of_family = interfaces.iter().copied().filter(|address| Family::of(*address) == family);
        of_family.filter(|address| !is_link_local_v6(*address)).collect()
    });
    addresses.retain(|address| !address.is_loopback());
    addresses
}

/// The addresses of a family that `--nodeport-addresses` selects, including loopback addresses; `None` if it does not restrict
/// the family.
fn selected_addresses(
    family: Family,
    node_ips: &[IpAddr],
    interfaces: &BTreeSet<IpAddr>,
    policy: &Policy,
) -> Option<BTreeSet<IpAddr>> {
    let of_family = || interfaces.iter().copied().filter(|address| Family::of(*address) == family);
    let within = |ranges: &[IpNet]| {
        let ranges: Vec<_> = ranges.iter().filter(|range| Family::of(range.addr()) == family).collect();
        let is_restricted = !ranges.is_empty() && ranges.iter().all(|range| range.prefix_len() > 0);
        is_restricted
            .then(|| of_family().filter(|address| ranges.iter().any(|range| range.contains(address))).collect())
    };
    let primary = || {
        let ip = node_ips.iter().find(|ip| Family::of(**ip) == family && !ip.is_loopback())?;
        Some(of_family().filter(|address| address == ip).collect::<BTreeSet<_>>())
    };
    match &policy.node_port_addresses {
        NodePortAddresses::All => None,
        NodePortAddresses::None => Some(BTreeSet::new()),
        NodePortAddresses::Within(ranges) => within(ranges),
        NodePortAddresses::Primary => primary(),
        NodePortAddresses::PrimaryAndWithin(ranges) => {
            let has_range = ranges.iter().any(|range| Family::of(range.addr()) == family);
            match (primary(), within(ranges)) {
                (Some(primary), Some(within)) => Some(&primary | &within),
                // All addresses are within the ranges.
                (_, None) if has_range => None,
                (primary, within) => primary.or(within),
            }
        }
    }
}

/// Whether an address is in `fe80::/10`.
pub(crate) fn is_link_local_v6(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(addresses: &[&str]) -> BTreeSet<IpAddr> {
        addresses.iter().map(|address| address.parse().unwrap()).collect()
    }

    fn within(ranges: &[&str]) -> NodePortAddresses {
        NodePortAddresses::Within(ranges.iter().map(|range| range.parse().unwrap()).collect())
    }

    fn primary_and(ranges: &[&str]) -> NodePortAddresses {
        NodePortAddresses::PrimaryAndWithin(ranges.iter().map(|range| range.parse().unwrap()).collect())
    }

    #[test]
    fn node_ports_listen_on_the_addresses_the_flag_selects() {
        let interfaces =
            set(&["127.0.0.1", "::1", "192.168.1.1", "169.254.3.4", "10.0.0.1", "fe80::1", "fd00::1", "fd01::1"]);
        let node = Node { addresses: vec!["10.0.0.1".parse().unwrap()], ..Node::default() };
        let all_v4 = ["192.168.1.1", "169.254.3.4", "10.0.0.1"];
        let all_v6 = ["fd00::1", "fd01::1"];
        for (flag, expected) in [
            (NodePortAddresses::All, [&all_v4[..], &all_v6].concat()),
            (within(&["10.0.0.0/8"]), [&["10.0.0.1"][..], &all_v6].concat()),
            (within(&["10.0.0.0/8", "0.0.0.0/0"]), [&all_v4[..], &all_v6].concat()),
            (within(&["127.0.0.0/8", "fe80::/10"]), vec!["fe80::1"]),
            (within(&["172.16.0.0/12", "fd00::/16"]), vec!["fd00::1"]),
            (NodePortAddresses::Primary, [&["10.0.0.1"][..], &all_v6].concat()),
            (primary_and(&["192.168.0.0/16"]), [&["10.0.0.1", "192.168.1.1"][..], &all_v6].concat()),
            (primary_and(&["fd00::/16"]), vec!["10.0.0.1", "fd00::1"]),
            (primary_and(&["0.0.0.0/0", "fd01::/16"]), [&all_v4[..], &["fd01::1"]].concat()),
            (NodePortAddresses::None, vec![]),
        ] {
            let policy = Policy { node_port_addresses: flag.clone(), ..Policy::new("n") };
            assert_eq!(
                NodeView::new(Some(&node), [], [], &interfaces, &policy).node_port_addresses,
                set(&expected),
                "{flag:?}"
            );
        }
    }

    #[test]
    fn a_bind_address_replaces_the_node_ip_of_its_family() {
        let node = Node { addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()], ..Node::default() };
        let policy = Policy {
            node_port_addresses: NodePortAddresses::Primary,
            bind_address: Some("10.0.0.9".parse().unwrap()),
            ..Policy::new("n")
        };
        let view = NodeView::new(Some(&node), [], [], &set(&["10.0.0.1", "10.0.0.9", "fd00::1", "fd00::2"]), &policy);
        assert_eq!(view.node_port_addresses, set(&["10.0.0.9", "fd00::1"]));
    }

    #[test]
    fn a_new_link_local_address_changes_nothing() {
        let view = |interfaces: &[&str]| NodeView::new(None, [], [], &set(interfaces), &Policy::new("n"));
        assert_eq!(view(&["10.0.0.1"]), view(&["10.0.0.1", "fe80::1"]));
    }
}
