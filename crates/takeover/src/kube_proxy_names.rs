//! The names of kube-proxy's chains, sets and tables.
//!
//! The prefix `KUBE-` is not enough: kube-router, which is part of k3s, names the chains of its network policies
//! `KUBE-ROUTER-*`, `KUBE-POD-FW-*` and `KUBE-NWPLCY-*`. So kube-proxy's names are listed.

/// The tables of iptables that kube-proxy and kubelet have chains in.
pub(crate) const TABLES: [&str; 4] = ["filter", "nat", "mangle", "raw"];

/// The table of kube-proxy's nftables action, in families `ip` and `ip6`.
pub(crate) const NFT_TABLE: &str = "kube-proxy";

/// Chains that kubelet creates and maintains.
const KUBELET_CHAINS: [&str; 3] = ["KUBE-FIREWALL", "KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"];

/// Chains of the ipvs mode and the iptables mode. Until Kubernetes 1.28 kubelet created `KUBE-MARK-MASQ`,
/// `KUBE-MARK-DROP` and `KUBE-POSTROUTING` too.
const CHAINS: [&str; 14] = [
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-FORWARD",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
    "KUBE-LOAD-BALANCER",
    "KUBE-MARK-DROP",
    "KUBE-MARK-MASQ",
    "KUBE-NODE-PORT",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-PROXY-CANARY",
    "KUBE-PROXY-FIREWALL",
    "KUBE-SERVICES",
    "KUBE-SOURCE-RANGES-FIREWALL",
];

/// Chains of the iptables action, one for each port of a Service or each endpoint: these prefixes and a hash.
const CHAIN_PREFIXES: [&str; 6] = ["KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-", "KUBE-SVC-", "KUBE-SVL-", "KUBE-XLB-"];

/// The ipsets for IPv4.
const SETS: [&str; 17] = [
    "KUBE-CLUSTER-IP",
    "KUBE-EXTERNAL-IP",
    "KUBE-EXTERNAL-IP-LOCAL",
    "KUBE-HEALTH-CHECK-NODE-PORT",
    "KUBE-IPVS-IPS",
    "KUBE-LOAD-BALANCER",
    "KUBE-LOAD-BALANCER-FW",
    "KUBE-LOAD-BALANCER-LOCAL",
    "KUBE-LOAD-BALANCER-SOURCE-CIDR",
    "KUBE-LOAD-BALANCER-SOURCE-IP",
    "KUBE-LOOP-BACK",
    "KUBE-NODE-PORT-LOCAL-SCTP-HASH",
    "KUBE-NODE-PORT-LOCAL-TCP",
    "KUBE-NODE-PORT-LOCAL-UDP",
    "KUBE-NODE-PORT-SCTP-HASH",
    "KUBE-NODE-PORT-TCP",
    "KUBE-NODE-PORT-UDP",
];

/// `IPSET_MAXNAMELEN` of `linux/netfilter/ipset/ip_set.h`, less the terminating zero.
const SET_NAME_BYTES: usize = 31;

/// Whether a chain is kube-proxy's.
pub(crate) fn is_chain(name: &str) -> bool {
    CHAINS.contains(&name) || CHAIN_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Whether a chain is kubelet's.
pub(crate) fn is_kubelet_chain(name: &str) -> bool {
    KUBELET_CHAINS.contains(&name)
}

/// Whether an ipset is kube-proxy's, of either family.
pub(crate) fn is_set(name: &str) -> bool {
    SETS.iter().any(|set| name == *set || name == for_ipv6(set))
}

/// kube-proxy's name of the set for IPv6.
fn for_ipv6(set: &str) -> String {
    let mut name = set.replacen("KUBE-", "KUBE-6-", 1);
    name.truncate(SET_NAME_BYTES);
    name
}

/// An extended regular expression for the lines of `iptables-save` that [`is_chain`] is true of.
pub(crate) fn pattern() -> String {
    let prefixes = CHAIN_PREFIXES.map(|prefix| format!("{prefix}[^ ]*"));
    format!("(^:|-[Ajg] )({}|{})( |$)", CHAINS.join("|"), prefixes.join("|"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_of_both_modes_belong_to_kube_proxy() {
        for chain in ["KUBE-SERVICES", "KUBE-IPVS-FILTER", "KUBE-NODEPORTS", "KUBE-MARK-MASQ", "KUBE-PROXY-CANARY"] {
            assert!(is_chain(chain), "{chain}");
        }
        for chain in ["KUBE-SVC-TCOU7JCQXEZGVUNU", "KUBE-SEP-A", "KUBE-EXT-A", "KUBE-FW-A", "KUBE-SVL-A", "KUBE-XLB-A"]
        {
            assert!(is_chain(chain), "{chain}");
        }
    }

    #[test]
    fn chains_of_kubelet_and_kube_router_do_not() {
        for chain in KUBELET_CHAINS {
            assert!(!is_chain(chain) && is_kubelet_chain(chain), "{chain}");
        }
        for chain in [
            "KUBE-ROUTER-FORWARD",
            "KUBE-POD-FW-A",
            "KUBE-NWPLCY-DEFAULT",
            "KUBE-",
            "KUBE-SERVICES-MINE",
            "MY-KUBE-SERVICES",
            "DOCKER",
        ] {
            assert!(!is_chain(chain) && !is_kubelet_chain(chain), "{chain}");
        }
    }

    #[test]
    fn ipv6_sets_have_truncated_names() {
        assert_eq!(for_ipv6("KUBE-CLUSTER-IP"), "KUBE-6-CLUSTER-IP");
        assert_eq!(for_ipv6("KUBE-LOAD-BALANCER-SOURCE-CIDR"), "KUBE-6-LOAD-BALANCER-SOURCE-CID");
        assert_eq!(for_ipv6("KUBE-NODE-PORT-LOCAL-SCTP-HASH"), "KUBE-6-NODE-PORT-LOCAL-SCTP-HAS");
        for set in ["KUBE-LOOP-BACK", "KUBE-6-LOOP-BACK", "KUBE-6-LOAD-BALANCER-SOURCE-CID"] {
            assert!(is_set(set), "{set}");
        }
        for set in
            ["KUBE-6-LOAD-BALANCER-SOURCE-CIDR", "KUBE-SRC-A", "KUBE-", "cali40all-ipam-pools", "KUBE-LOOP-BACK2"]
        {
            assert!(!is_set(set), "{set}");
        }
        assert!(SETS.iter().all(|set| set.len() <= SET_NAME_BYTES));
    }

    #[test]
    fn names_are_sorted_and_unique() {
        for list in [&CHAINS[..], &SETS[..], &CHAIN_PREFIXES[..]] {
            assert!(list.is_sorted_by(|a, b| a < b), "{list:?}");
        }
    }
}
