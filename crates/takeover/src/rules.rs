//! Which rules and chains of an iptables table are removed and which are kept, for both backends.

use std::collections::{BTreeMap, BTreeSet};

use crate::kube_proxy_names;
use crate::report::{Iptables, Kept, Object, Report};

/// The built-in chains.
const BUILT_IN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

/// A table's chains and jumps. `R` identifies a rule for its backend.
#[derive(Debug)]
pub(crate) struct Table<R> {
    pub(crate) iptables: Iptables,
    pub(crate) name: String,
    pub(crate) chains: BTreeSet<String>,
    pub(crate) jumps: Vec<Jump<R>>,
}

/// A rule with a jump or goto to another chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Jump<R> {
    pub(crate) chain: String,
    pub(crate) target: String,
    pub(crate) rule: R,
}

/// The changes to a table.
#[derive(Debug)]
pub(crate) struct Plan<'a, R> {
    table: &'a Table<R>,
    /// Rules in built-in chains to delete.
    pub(crate) jumps: Vec<&'a Jump<R>>,
    /// Chains to flush and delete.
    pub(crate) chains: BTreeSet<&'a str>,
    /// Chains that are kept, with the reason.
    kept: BTreeMap<&'a str, String>,
}

impl<R> Table<R> {
    /// Plans the removal, where `busy_chains` are kept besides kubelet's. A kept chain keeps working: its target chains
    /// and the rules that jump to it are kept too. Foreign chains are not changed, such as a CNI plugin's that marks
    /// packets with `KUBE-MARK-MASQ`; rules are removed from the built-in chains only.
    pub(crate) fn plan(&self, busy_chains: &BTreeSet<String>) -> Plan<'_, R> {
        let mut kept = BTreeMap::new();
        let mut unvisited: Vec<&str> = Vec::new();
        for chain in self.chains.iter().map(String::as_str) {
            if kube_proxy_names::is_kubelet_chain(chain) {
                kept.insert(chain, "it is kubelet's".to_owned());
                unvisited.push(chain);
            } else if busy_chains.contains(chain) || !(kube_proxy_names::is_chain(chain) || BUILT_IN.contains(&chain)) {
                unvisited.push(chain);
            }
        }
        while let Some(chain) = unvisited.pop() {
            for jump in self.jumps.iter().filter(|jump| jump.chain == chain) {
                let target = jump.target.as_str();
                if kube_proxy_names::is_chain(target) && !busy_chains.contains(target) && !kept.contains_key(target) {
                    let is_known = kube_proxy_names::is_chain(chain) || kube_proxy_names::is_kubelet_chain(chain);
                    let whose = if is_known { "stays" } else { "is not kube-proxy's" };
                    kept.insert(target, format!("{chain}, which {whose}, leads there"));
                    unvisited.push(target);
                }
            }
        }
        let goes = |chain: &str| {
            kube_proxy_names::is_chain(chain) && !busy_chains.contains(chain) && !kept.contains_key(chain)
        };
        let chains = self.chains.iter().map(String::as_str).filter(|chain| goes(chain)).collect();
        let jumps = self.jumps.iter().filter(|jump| goes(&jump.target) && !goes(&jump.chain)).collect();
        Plan { table: self, jumps, chains, kept }
    }

    /// Whether it has chains of kube-proxy or kubelet.
    pub(crate) fn has_kubernetes_chains(&self) -> bool {
        self.chains.iter().any(|chain| kube_proxy_names::is_chain(chain) || kube_proxy_names::is_kubelet_chain(chain))
    }
}

impl<R> Plan<'_, R> {
    pub(crate) fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// Adds the objects of this plan to a report.
    pub(crate) fn report(&self, report: &mut Report) {
        let rules = self.jumps.iter().map(|jump| Object::Rule {
            iptables: self.table.iptables,
            table: self.table.name.clone(),
            chain: jump.chain.clone(),
            target: jump.target.clone(),
        });
        report.objects.extend(rules);
        report.objects.extend(self.chains.iter().map(|chain| self.table.chain(chain)));
        self.report_kept(report);
    }

    /// Adds the kept chains to a report.
    pub(crate) fn report_kept(&self, report: &mut Report) {
        let left =
            self.kept.iter().map(|(chain, reason)| Kept { object: self.table.chain(chain), reason: reason.clone() });
        report.kept.extend(left);
    }
}

impl<R> Table<R> {
    pub(crate) fn chain(&self, chain: &str) -> Object {
        Object::Chain { iptables: self.iptables, table: self.name.clone(), chain: chain.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Backend, Family};

    /// A table of these chains, and of rules that lead from one to another.
    fn table(chains: &[&str], jumps: &[(&str, &str)]) -> Table<usize> {
        Table {
            iptables: Iptables { backend: Backend::Nft, family: Family::Ip },
            name: "nat".into(),
            chains: chains.iter().map(|&chain| chain.to_owned()).collect(),
            jumps: jumps
                .iter()
                .enumerate()
                .map(|(rule, (chain, target))| Jump { chain: (*chain).into(), target: (*target).into(), rule })
                .collect(),
        }
    }

    /// The chains and the rules that go, and the chains that stay.
    fn planned(table: &Table<usize>, busy_chains: &[&str]) -> (Vec<String>, Vec<usize>, Vec<String>) {
        let plan = table.plan(&busy_chains.iter().map(|&chain| chain.to_owned()).collect());
        let owned = |names: Vec<&&str>| names.into_iter().map(|&name| name.to_owned()).collect();
        let jumps = plan.jumps.iter().map(|jump| jump.rule).collect();
        (owned(plan.chains.iter().collect()), jumps, owned(plan.kept.keys().collect()))
    }

    #[test]
    fn chains_are_removed_with_jumps_from_built_in_chains_unless_in_use() {
        let table = table(
            &["OUTPUT", "DOCKER", "KUBE-SERVICES", "KUBE-MARK-MASQ", "KUBE-ROUTER-OUTPUT"],
            &[
                ("OUTPUT", "KUBE-SERVICES"),
                ("OUTPUT", "DOCKER"),
                ("OUTPUT", "KUBE-ROUTER-OUTPUT"),
                ("KUBE-SERVICES", "KUBE-MARK-MASQ"),
                ("DOCKER", "KUBE-MARK-MASQ"),
            ],
        );
        let (chains, jumps, kept) = planned(&table, &[]);
        assert_eq!(chains, ["KUBE-SERVICES"]);
        assert_eq!(jumps, [0]);
        assert_eq!(kept, ["KUBE-MARK-MASQ"], "somebody else goes by it");
    }

    #[test]
    fn chains_reachable_from_kubelets_chains_are_kept() {
        let table = table(
            &["OUTPUT", "KUBE-FIREWALL", "KUBE-MARK-DROP", "KUBE-SEP-A", "KUBE-SERVICES"],
            &[
                ("OUTPUT", "KUBE-FIREWALL"),
                ("KUBE-FIREWALL", "KUBE-MARK-DROP"),
                ("KUBE-MARK-DROP", "KUBE-SEP-A"),
                ("KUBE-SERVICES", "KUBE-MARK-DROP"),
                ("OUTPUT", "KUBE-MARK-DROP"),
            ],
        );
        let (chains, jumps, kept) = planned(&table, &[]);
        assert_eq!(chains, ["KUBE-SERVICES"]);
        assert_eq!(jumps, [0; 0], "a rule that leads to what stays stays");
        assert_eq!(kept, ["KUBE-FIREWALL", "KUBE-MARK-DROP", "KUBE-SEP-A"]);
    }

    #[test]
    fn a_busy_chain_keeps_its_targets_and_nothing_else() {
        let table = table(
            &["INPUT", "KUBE-NODE-PORT", "KUBE-MARK-MASQ", "KUBE-FORWARD"],
            &[("INPUT", "KUBE-NODE-PORT"), ("KUBE-NODE-PORT", "KUBE-MARK-MASQ"), ("INPUT", "KUBE-FORWARD")],
        );
        let (chains, jumps, kept) = planned(&table, &["KUBE-NODE-PORT"]);
        assert_eq!(chains, ["KUBE-FORWARD"]);
        assert_eq!(jumps, [2]);
        assert_eq!(kept, ["KUBE-MARK-MASQ"]);
    }

    #[test]
    fn chains_in_a_cycle_are_removed() {
        let jumps = [("KUBE-SVC-A", "KUBE-SVC-B"), ("KUBE-SVC-B", "KUBE-SVC-A")];
        let (chains, jumps, _) = planned(&table(&["KUBE-SVC-A", "KUBE-SVC-B"], &jumps), &[]);
        assert_eq!(chains, ["KUBE-SVC-A", "KUBE-SVC-B"]);
        assert_eq!(jumps, [0; 0]);
    }
}
