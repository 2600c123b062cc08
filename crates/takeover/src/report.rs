//! The report of what was found, removed and kept.

use std::fmt;

/// The result of [`find`](crate::find) or [`remove`](crate::remove).
#[derive(Debug, Default)]
pub struct Report {
    /// Objects of kube-proxy that were found or removed. Those that could not be removed are in `problems` instead.
    pub objects: Vec<Object>,
    /// Objects that are kept on purpose.
    pub kept: Vec<Kept>,
    /// Objects that could not be inspected or removed.
    pub problems: Vec<Error>,
    /// What could not be checked because the tools for it are missing: it may have objects of kube-proxy, and a retry
    /// would not help.
    pub unchecked: Vec<Error>,
}

impl Report {
    /// Whether nothing of kube-proxy was found and nothing failed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty() && self.problems.is_empty()
    }
}

/// A family of addresses, as `nft` calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
}

impl Family {
    pub(crate) const BOTH: [Self; 2] = [Self::Ip, Self::Ip6];

    /// `NFPROTO_IPV4` or `NFPROTO_IPV6` of `linux/netfilter.h`.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Ip => 2,
            Self::Ip6 => 10,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
        })
    }
}

/// The kernel subsystem that has the rules of an `iptables`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Backend {
    /// `nf_tables`.
    Nft,
    /// `ip_tables` and `ip6_tables`.
    Legacy,
}

/// One of the four variants of iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iptables {
    /// The subsystem of its rules.
    pub backend: Backend,
    /// The family of its rules.
    pub family: Family,
}

impl fmt::Display for Iptables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backend = match self.backend {
            Backend::Nft => "nft",
            Backend::Legacy => "legacy",
        };
        write!(f, "iptables-{backend} ({})", self.family)
    }
}

/// An object of kube-proxy or kubelet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Object {
    /// A table of kube-proxy's nftables mode.
    Table {
        /// The family of the table.
        family: Family,
    },
    /// A rule in a foreign chain that jumps to a chain of kube-proxy.
    Rule {
        /// The iptables variant.
        iptables: Iptables,
        /// The table.
        table: String,
        /// Its chain.
        chain: String,
        /// Its target chain.
        target: String,
    },
    /// A chain with its rules.
    Chain {
        /// The iptables variant.
        iptables: Iptables,
        /// The table.
        table: String,
        /// The name of the chain.
        chain: String,
    },
    /// An ipset.
    Set {
        /// The name of the set.
        name: String,
    },
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table { family } => write!(f, "table {family} {} of nf_tables", crate::kube_proxy_names::NFT_TABLE),
            Self::Rule { iptables, table, chain, target } => {
                write!(f, "rule in {table}/{chain} of {iptables} that leads to {target}")
            }
            Self::Chain { iptables, table, chain } => write!(f, "chain {table}/{chain} of {iptables}"),
            Self::Set { name } => write!(f, "ipset {name}"),
        }
    }
}

/// An object that is kept on purpose, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The object.
    pub object: Object,
    /// The reason.
    pub reason: String,
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.reason)
    }
}

/// What could not be inspected or removed, why, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Something could not be inspected; it may have objects of kube-proxy.
    #[error("cannot inspect {location}: {reason}; {advice}")]
    CannotInspect {
        /// What could not be inspected.
        location: String,
        /// What went wrong.
        reason: String,
        /// What to do.
        advice: String,
    },
    /// An object could not be removed.
    #[error("cannot remove {object}: {reason}; {advice}")]
    CannotRemove {
        /// The object.
        object: Box<Object>,
        /// What went wrong.
        reason: String,
        /// What to do.
        advice: String,
    },
    /// The chains of a table could not be removed.
    #[error("cannot remove the {} chains of kube-proxy from table {table} of {iptables}: {reason}; {advice}", chains.len())]
    CannotRemoveChains {
        /// The iptables variant.
        iptables: Iptables,
        /// The table.
        table: String,
        /// The names of the chains.
        chains: Vec<String>,
        /// What went wrong.
        reason: String,
        /// What to do.
        advice: String,
    },
}

/// The advice for most errors.
pub(crate) const RETRY_ADVICE: &str =
    "CAP_NET_ADMIN in the node's network namespace is required; fix the cause and run it again";
