//! What of a table of iptables goes and what stays: the same for both backends.

use std::collections::{BTreeMap, BTreeSet};

use crate::names;
use crate::report::{Iptables, Left, Object, Report};

/// The chains that the kernel itself calls.
const BUILT_IN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

/// A table, as far as it matters here. `R` is what a backend deletes a rule by.
#[derive(Debug)]
pub(crate) struct Table<R> {
    pub(crate) iptables: Iptables,
    pub(crate) name: String,
    pub(crate) chains: BTreeSet<String>,
    pub(crate) jumps: Vec<Jump<R>>,
}

/// A rule that leads to another chain and may come back or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Jump<R> {
    pub(crate) chain: String,
    pub(crate) target: String,
    pub(crate) rule: R,
}

/// What is to be done to a table.
#[derive(Debug)]
pub(crate) struct Plan<'a, R> {
    table: &'a Table<R>,
    /// Rules of others to be deleted.
    pub(crate) jumps: Vec<&'a Jump<R>>,
    /// Chains to be emptied and deleted.
    pub(crate) chains: BTreeSet<&'a str>,
    /// Chains that stay, with the reason.
    kept: BTreeMap<&'a str, String>,
}

impl<R> Table<R> {
    /// What goes, if these chains have to stay besides kubelet's. A chain that stays works as before: what it leads to stays
    /// as well, and so do the rules that lead to it. Others' chains are not changed either, as that of a CNI plugin that
    /// marks packets by way of `KUBE-MARK-MASQ`; only from the kernel's own chains rules go.
    pub(crate) fn plan(&self, stuck: &BTreeSet<String>) -> Plan<'_, R> {
        let mut kept = BTreeMap::new();
        let mut look_at: Vec<&str> = Vec::new();
        for chain in self.chains.iter().map(String::as_str) {
            if names::is_kubelet_chain(chain) {
                kept.insert(chain, "it is kubelet's".to_owned());
                look_at.push(chain);
            } else if stuck.contains(chain) || !(names::is_chain(chain) || BUILT_IN.contains(&chain)) {
                look_at.push(chain);
            }
        }
        while let Some(chain) = look_at.pop() {
            for jump in self.jumps.iter().filter(|jump| jump.chain == chain) {
                let target = jump.target.as_str();
                if names::is_chain(target) && !stuck.contains(target) && !kept.contains_key(target) {
                    let is_known = names::is_chain(chain) || names::is_kubelet_chain(chain);
                    let whose = if is_known { "stays" } else { "is not kube-proxy's" };
                    kept.insert(target, format!("{chain}, which {whose}, leads there"));
                    look_at.push(target);
                }
            }
        }
        let goes = |chain: &str| names::is_chain(chain) && !stuck.contains(chain) && !kept.contains_key(chain);
        let chains = self.chains.iter().map(String::as_str).filter(|chain| goes(chain)).collect();
        let jumps = self.jumps.iter().filter(|jump| goes(&jump.target) && !goes(&jump.chain)).collect();
        Plan { table: self, jumps, chains, kept }
    }

    /// Whether there is anything to report of.
    pub(crate) fn is_of_interest(&self) -> bool {
        self.chains.iter().any(|chain| names::is_chain(chain) || names::is_kubelet_chain(chain))
    }
}

impl<R> Plan<'_, R> {
    pub(crate) fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// Takes in what this plan finds, or has done.
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

    /// Takes in what stays.
    pub(crate) fn report_kept(&self, report: &mut Report) {
        let left =
            self.kept.iter().map(|(chain, reason)| Left { object: self.table.chain(chain), reason: reason.clone() });
        report.left.extend(left);
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
    fn planned(table: &Table<usize>, stuck: &[&str]) -> (Vec<String>, Vec<usize>, Vec<String>) {
        let plan = table.plan(&stuck.iter().map(|&chain| chain.to_owned()).collect());
        let owned = |names: Vec<&&str>| names.into_iter().map(|&name| name.to_owned()).collect();
        let jumps = plan.jumps.iter().map(|jump| jump.rule).collect();
        (owned(plan.chains.iter().collect()), jumps, owned(plan.kept.keys().collect()))
    }

    #[test]
    fn chains_go_with_the_rules_of_the_kernels_chains_that_lead_to_them_and_those_stay_that_others_go_by() {
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
    fn what_a_chain_of_kubelet_leads_to_stays_and_all_that_follows() {
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
    fn what_cannot_go_keeps_what_it_needs_and_holds_up_nothing_else() {
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
    fn chains_that_lead_to_each_other_go_together() {
        let jumps = [("KUBE-SVC-A", "KUBE-SVC-B"), ("KUBE-SVC-B", "KUBE-SVC-A")];
        let (chains, jumps, _) = planned(&table(&["KUBE-SVC-A", "KUBE-SVC-B"], &jumps), &[]);
        assert_eq!(chains, ["KUBE-SVC-A", "KUBE-SVC-B"]);
        assert_eq!(jumps, [0; 0]);
    }
}
