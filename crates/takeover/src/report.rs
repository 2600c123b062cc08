//! What was found, removed and left, in words for an administrator.

use std::fmt;

/// What [`find`](crate::find) found, or what became of it under [`remove`](crate::remove).
#[derive(Debug, Default)]
pub struct Report {
    /// What is kube-proxy's: found, or removed. What could not be removed is among the problems instead.
    pub objects: Vec<Object>,
    /// What stays on purpose.
    pub left: Vec<Left>,
    /// What could not be looked at or removed.
    pub problems: Vec<Error>,
    /// What cannot be looked at from here, for want of the tools that know it: there may be something of kube-proxy's in it,
    /// and to try again would not help.
    pub unseen: Vec<Error>,
}

impl Report {
    /// Whether there is nothing of kube-proxy's, as far as one could see everything.
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

/// Which part of the kernel holds the rules of an `iptables`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Backend {
    /// `nf_tables`.
    Nft,
    /// `ip_tables` and `ip6_tables`.
    Legacy,
}

/// One of the four programs that are called iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iptables {
    /// Where its rules are.
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

/// Something kube-proxy made, or kubelet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Object {
    /// A table of kube-proxy's nftables mode.
    Table {
        /// The family of the table.
        family: Family,
    },
    /// A rule in a chain that is not kube-proxy's, which leads to one that is.
    Rule {
        /// Whose rule.
        iptables: Iptables,
        /// The table.
        table: String,
        /// The chain it is in.
        chain: String,
        /// The chain it leads to.
        target: String,
    },
    /// A chain with its rules.
    Chain {
        /// Whose chain.
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
            Self::Table { family } => write!(f, "table {family} {} of nf_tables", crate::names::NFT_TABLE),
            Self::Rule { iptables, table, chain, target } => {
                write!(f, "rule in {table}/{chain} of {iptables} that leads to {target}")
            }
            Self::Chain { iptables, table, chain } => write!(f, "chain {table}/{chain} of {iptables}"),
            Self::Set { name } => write!(f, "ipset {name}"),
        }
    }
}

/// What stays on purpose, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// What stays.
    pub object: Object,
    /// Why, as the end of a sentence.
    pub reason: String,
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.reason)
    }
}

/// What could not be looked at or removed, why, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Some of it may still be there, unseen.
    #[error("cannot look at {place}: {reason}; {advice}")]
    Unread {
        /// Where.
        place: String,
        /// What went wrong.
        reason: String,
        /// What to do.
        advice: String,
    },
    /// One thing is still there.
    #[error("cannot remove {object}: {reason}; {advice}")]
    Remains {
        /// What.
        object: Box<Object>,
        /// What went wrong.
        reason: String,
        /// What to do.
        advice: String,
    },
    /// All chains of a table are still there.
    #[error("cannot remove the {} chains of kube-proxy from table {table} of {iptables}: {reason}; {advice}", chains.len())]
    ChainsRemain {
        /// Whose table.
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

/// What helps against most refusals.
pub(crate) const AGAIN: &str =
    "it takes CAP_NET_ADMIN in the node's network namespace; see to the reason and run it again";
