//! The budget of a Service: how much one Service may have of a node.
//!
//! The ports of a Service, its addresses and its endpoints multiply: an object of 50 KB may ask for a million real servers. Who may
//! write a Service should not decide over the memory of every node.

use std::fmt;
use std::sync::Arc;

use crate::real_servers::RealServerAddress;

/// About how many operations are written before the changes of other Services get their turn. A Service of more is large: it is written
/// in parts.
pub(crate) const PART_OPERATIONS: usize = 4000;

/// How much one Service may have on this node (`kubeIPVS.serviceBudget`). What exceeds it is left out: first external IPs, then
/// load-balancer IPs, then NodePorts, then ClusterIPs, and of each the last ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceBudget {
    /// Virtual servers: one for each address and port.
    pub front_ends: usize,
    /// Real servers of all its virtual servers together. As many endpoints are considered, each once for each port.
    pub real_servers: usize,
}

impl Default for ServiceBudget {
    /// 100,000 front ends, enough for every port of an address; and 500,000 real servers, enough for 5,000 endpoints at 10 ports of
    /// 10 addresses.
    fn default() -> Self {
        Self { front_ends: 100_000, real_servers: 500_000 }
    }
}

/// What the budget of a Service leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// How many front ends are not served, or only with a part of their real servers.
    pub front_ends: usize,
    /// The budget.
    pub budget: ServiceBudget,
}

/// For the log and for the Event on the Service.
impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ServiceBudget { front_ends, real_servers } = self.budget;
        write!(
            f,
            "{} front ends are not served, or not with all endpoints, since a Service may have {front_ends} front ends and \
             {real_servers} real servers on a node: give the Service fewer ports, addresses or endpoints, divide it, or \
             raise kubeIPVS.serviceBudget",
            self.front_ends
        )
    }
}

/// What a Service has spent of its budget.
#[derive(Debug)]
pub(crate) struct Spending {
    budget: ServiceBudget,
    front_ends: usize,
    real_servers: usize,
    considered: usize,
    left_out: usize,
}

impl Spending {
    pub(crate) fn new(budget: ServiceBudget) -> Self {
        Self { budget, front_ends: 0, real_servers: 0, considered: 0, left_out: 0 }
    }

    /// Pays for considering endpoints of a port. Returns how many of them are paid.
    pub(crate) fn consider(&mut self, endpoints: usize) -> usize {
        let paid = endpoints.min(self.budget.real_servers - self.considered);
        self.considered += paid;
        paid
    }

    /// Pays for a front end with these real servers, or with the first of them. `None` if the budget is spent.
    pub(crate) fn spend(&mut self, wanted: &Arc<[RealServerAddress]>) -> Option<Arc<[RealServerAddress]>> {
        let paid = wanted.len().min(self.budget.real_servers - self.real_servers);
        if self.front_ends == self.budget.front_ends || (paid == 0 && !wanted.is_empty()) {
            return None;
        }
        self.front_ends += 1;
        self.real_servers += paid;
        if paid == wanted.len() {
            return Some(wanted.clone());
        }
        self.left_out += 1;
        Some(wanted[..paid].into())
    }

    /// How many front ends the rest of the budget pays for.
    pub(crate) fn front_ends_left(&self) -> usize {
        self.budget.front_ends - self.front_ends
    }

    /// Records front ends that are not served.
    pub(crate) fn leave_out(&mut self, front_ends: usize) {
        self.left_out = self.left_out.saturating_add(front_ends);
    }

    /// Front ends and real servers.
    pub(crate) fn spent(&self) -> usize {
        self.front_ends + self.real_servers
    }

    pub(crate) fn left_out(&self) -> Option<LeftOut> {
        (self.left_out > 0).then_some(LeftOut { front_ends: self.left_out, budget: self.budget })
    }
}
