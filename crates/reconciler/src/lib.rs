//! Programs the kernel of a node from Services: computes the desired state, compares it with the kernel's, and carries out a plan of the
//! difference.
//!
//! ```text
//!  Change ──▶ ServiceTable ──dirty Services──▶ Contribution ──▶ DesiredState ──dirty keys──▶ diff ──Plan──▶ Kernel
//!                                                                                             ▲               │
//!                                                                                          Mirror ◀──results──┘
//! ```
//!
//! Input:
//! * [`table`]: every Service with its EndpointSlices; says which Services a change affects.
//! * [`node`]: the node as far as Services depend on it; [`policy`]: the operator's configuration.
//!
//! Pure core:
//! * [`contribution`]: a pure function of a Service, its endpoints, the node and the policy to what the Service needs.
//! * [`budget`]: how much one Service may have on a node.
//! * [`desired_state`]: the sum of all contributions, with one owner for each front end.
//! * [`front_end`]: what clients connect to; [`real_servers`]: the real servers behind it.
//! * [`filter`]: who may connect to a front end, and which connections are masqueraded.
//! * [`binding`]: how VIPs are bound to the node.
//!
//! Plan:
//! * [`mirror`]: what the kernel holds, as far as known.
//! * [`diff`]: the operations that lead from the mirror to the desired state, for some keys.
//! * [`plan`]: operations in phases, whose order keeps traffic correct at every instant.
//!
//! Kernel interface and its implementations:
//! * [`kernel`]: the trait through which the kernel is read and plans are applied.
//! * [`linux`]: the kernel of this network namespace, over netlink.
//! * [`fake`]: a model in memory, for tests.
//!
//! Driver:
//! * [`reconciler`]: composes all of these; it is synchronous and reads no clock.
//! * [`inbox`]: the queue of its inputs; [`run`]: the main loop around it; [`report`]: what each sync reports.
//!
//! Everything up to `plan` is free of I/O and clocks. The kernel is the database: nothing that matters is stored only in this process, so
//! an agent that is killed at any instant continues from a dump.

#![forbid(unsafe_code)]

// Input.
pub mod node;
pub mod policy;
pub mod table;

// Pure core.
pub mod binding;
mod bootstrap;
pub mod budget;
pub mod contribution;
pub mod desired_state;
pub mod filter;
pub mod front_end;
pub mod real_servers;

// Plan.
pub mod diff;
pub mod mirror;
pub mod plan;

// Kernel interface and its implementations.
pub mod fake;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod kernel;
pub mod linux;

// Driver.
mod audit_requests;
mod backoff;
pub mod inbox;
mod last_known;
mod log;
pub mod reconciler;
pub mod report;
mod requested;
pub mod run;

pub use policy::Policy;
pub use reconciler::Reconciler;
