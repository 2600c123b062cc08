//! What there is of the agent's in a kernel, as text, to compare it with what a fresh start makes.

use std::collections::BTreeSet;

use anyhow::Result;
use lab::netns::Namespace;

/// What there is of the agent's in a kernel.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct KernelState(BTreeSet<String>);

impl KernelState {
    pub(crate) fn read(namespace: &Namespace) -> Result<Self> {
        let servers = namespace.exec("ipvsadm -Sn")?;
        let addresses = namespace.exec("ip -br address show dev kube-ipvs0")?;
        let mut all: BTreeSet<String> = servers.lines().map(str::to_owned).collect();
        all.extend(addresses.split_whitespace().skip(2).map(|it| format!("address {it}")));
        for family in ["ip", "ip6"] {
            let table = namespace.exec(&format!("nft list table {family} kube-ipvs"))?;
            // Sets list their elements in any options, several in a line.
            let mut within = "";
            for line in table.lines().map(str::trim) {
                if line.starts_with("set ") || line.starts_with("map ") || line.starts_with("chain ") {
                    within = line;
                }
                // The table's own lines say whether it has an owner: what runs once leaves it without.
                if within.is_empty() {
                    continue;
                }
                let words = line.trim_start_matches("elements = ").split([',', '{', '}']).map(str::trim);
                all.extend(words.filter(|word| !word.is_empty()).map(|word| format!("{family} {within} {word}")));
            }
        }
        Ok(Self(all))
    }

    /// What one has and the other has not, but for what is somebody else's, and real servers that drain: what connection
    /// tracking of IPVS remembers of a connection that is over lasts two minutes.
    pub(crate) fn differences(&self, right: &Self) -> Vec<String> {
        let missing = right.0.difference(&self.0).map(|line| format!("missing: {line}"));
        let surplus = self.0.difference(&right.0);
        let surplus = surplus.filter(|line| !line.contains("172.16.0.1:80") && !line.ends_with(" -w 0"));
        missing.chain(surplus.map(|line| format!("too much: {line}"))).collect()
    }
}
