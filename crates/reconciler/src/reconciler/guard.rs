//! The rules that withhold operations of a plan after others have failed.
//!
//! A plan is carried out in three [parts](PlanPart). What fails in one part decides what the later parts may still do: nothing
//! is opened to clients before the packet filter guards it, and nothing loses its guard while clients can still reach it. All
//! other operations go on, so that what is already served stays correct.

use std::collections::{BTreeMap, BTreeSet};

use ipvs_netlink::Family;
use service_watch::ObjectName;

use crate::filter::{FrontEndElements, SourceRangesElement};
use crate::front_end::FrontEnd;
use crate::plan::{Key, Operation, Phase, Plan};
use crate::report::PlanErrors;

/// A plan, split where the next operations depend on the results of the last.
pub(super) struct PlanParts {
    /// Before [`Phase::Device`]: what the packet filter must know.
    pub(super) guards: Plan,
    /// From [`Phase::Device`] on: the device, IPVS, VIPs and flows.
    pub(super) services: Plan,
    /// From [`Phase::RemoveFromFilter`] on: what the packet filter may forget.
    pub(super) release: Plan,
}

impl From<Plan> for PlanParts {
    fn from(mut plan: Plan) -> Self {
        let mut services = plan.split_off(Phase::Device);
        let release = services.split_off(Phase::RemoveFromFilter);
        Self { guards: plan, services, release }
    }
}

/// A part of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PlanPart {
    Guards,
    Services,
    Release,
}

/// Why an operation is withheld. [`Guard::rule_against`] says when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// The family's table could not be built, so nothing is written to it: each operation would fail for the same reason.
    TableMissing,
    /// The packet filter does not guard the VIP or the range, so it is neither bound nor routed to this node.
    VipUnguarded,
    /// The packet filter does not have the front end's rule, so no virtual server is added for it, and it admits no more clients. One
    /// that exists is kept up to date.
    FrontEndUnguarded,
    /// The virtual server was withheld, so its real servers and the cleanup of its connections are pointless.
    VirtualServerWithheld,
    /// The front end keeps its element, which refers to the chain with these source ranges: the kernel would answer `EBUSY`.
    /// The chain is deleted when the front end is tried again.
    SourceRangesInUse,
    /// What the element guards could not be taken away, so it stays.
    StillReachable,
}

/// What failed in a plan so far, and what was withheld for it.
#[derive(Debug)]
pub(super) struct Guard {
    /// The errors of all operations so far.
    pub(super) errors: PlanErrors,
    /// Families whose table could not be built.
    missing_tables: Vec<Family>,
    /// Keys whose guard was withheld.
    unguarded: BTreeSet<Key>,
    /// Front ends whose virtual server was withheld.
    withheld_servers: BTreeSet<FrontEnd>,
    /// Services whose source ranges are still referred to, each with the key of a front end that does.
    referenced_source_ranges: BTreeMap<ObjectName, Key>,
}

impl Guard {
    /// For a plan of which nothing has been carried out. `missing_tables` are the families whose table could not be built.
    pub(super) fn new(missing_tables: Vec<Family>) -> Self {
        Self {
            errors: PlanErrors::default(),
            missing_tables,
            unguarded: BTreeSet::new(),
            withheld_servers: BTreeSet::new(),
            referenced_source_ranges: BTreeMap::new(),
        }
    }

    /// Removes the operations from a part that the rules withhold.
    pub(super) fn withhold(&mut self, part: PlanPart, operations: &mut Plan) {
        operations.retain(|operation| match self.rule_against(part, operation) {
            None => true,
            Some(rule) => {
                self.note_withheld(rule, operation);
                false
            }
        });
    }

    /// The rules: which of them withholds an operation of a part.
    fn rule_against(&self, part: PlanPart, operation: &Operation) -> Option<Rule> {
        use Operation as O;
        use PlanPart::{Guards, Release, Services};
        Some(match (part, operation) {
            (Guards, O::BuildTable { .. }) => return None,
            (Guards, it) if self.is_table_missing(it) => Rule::TableMissing,
            (Services, O::BindAddress(_) | O::AddRoute(_)) if self.is_unguarded(operation) => Rule::VipUnguarded,
            (Services, O::AddVirtualServer(..) | O::SetFrontEnd { .. }) if self.is_unguarded(operation) => {
                Rule::FrontEndUnguarded
            }
            (Services, O::AddRealServer(front_end, _) | O::DeleteUntranslatedFlows(front_end, _))
                if self.withheld_servers.contains(front_end) =>
            {
                Rule::VirtualServerWithheld
            }
            (Release, O::RemoveSourceRanges(service, _)) if self.referenced_source_ranges.contains_key(service) => {
                Rule::SourceRangesInUse
            }
            (Release, it) if self.errors.contains(&it.key()) => Rule::StillReachable,
            _ => return None,
        })
    }

    /// Notes what later operations must know of one that is withheld.
    fn note_withheld(&mut self, rule: Rule, operation: &Operation) {
        match (rule, operation) {
            (Rule::TableMissing, it) => _ = self.unguarded.insert(it.key()),
            (Rule::FrontEndUnguarded, Operation::AddVirtualServer(front_end, _)) => {
                self.withheld_servers.insert(*front_end);
            }
            (
                Rule::StillReachable,
                Operation::RemoveFrontEnd(
                    _,
                    FrontEndElements { source_ranges: SourceRangesElement::Service(service), .. },
                ),
            ) => {
                self.referenced_source_ranges.insert(service.clone(), operation.key());
            }
            (Rule::SourceRangesInUse, Operation::RemoveSourceRanges(service, _)) => {
                if let Some(front_end) = self.referenced_source_ranges.get(service) {
                    self.errors.copy(front_end, &operation.key());
                }
            }
            _ => {}
        }
    }

    fn is_table_missing(&self, operation: &Operation) -> bool {
        operation.filter_family().is_some_and(|family| self.missing_tables.contains(&family))
    }

    /// Whether the guard of what an operation opens has failed or was withheld.
    fn is_unguarded(&self, operation: &Operation) -> bool {
        let key = operation.key();
        self.errors.contains(&key) || self.unguarded.contains(&key)
    }
}
