//! From Service changes to IPVS state: what should be, what is, and the plan between them.
//!
//! ```text
//!  Change ──▶ ServiceTable ──dirty Services──▶ contribution ──▶ Desired ──dirty keys──▶ diff ──Plan──▶ Kernel
//!                                                                                        ▲               │
//!                                                                                     Mirror ◀──results──┘
//! ```
//!
//! * [`table`]: every Service with its EndpointSlices; says which Services a change concerns.
//! * [`contribution`]: a pure function of a Service, its endpoints, the node and the policy to what that Service wants.
//! * [`desired`]: the sum of all contributions, with one owner for each front end.
//! * [`mirror`]: what the kernel holds, as far as known; [`real_servers`]: most of it.
//! * [`diff`]: the operations that lead from the mirror to what is desired, for the keys that are dirty.
//! * [`binding`]: how the kernel learns that VIPs are this node's.
//! * [`front_end`]: what clients connect to; [`filter`]: who may, and who is masqueraded.
//! * [`plan`]: operations, in phases whose order keeps traffic right at every instant.
//! * [`kernel`]: the trait through which plans reach a kernel; [`linux`] is the real one, [`fake`] a model in memory.
//! * [`reconciler`]: the composition of all of these; [`run`] gives it a thread and a clock.
//!
//! Everything up to `plan` is free of I/O and clocks. What must stay true: the kernel is the database. Nothing that
//! matters is remembered here alone, so that an agent killed at any instant continues from a dump.

#![forbid(unsafe_code)]

mod backoff;
pub mod binding;
mod bootstrap;
pub mod contribution;
pub mod desired_state;
pub mod diff;
pub mod fake;
pub mod filter;
pub mod front_end;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod kernel;
pub mod linux;
mod log;
pub mod mirror;
pub mod node;
pub mod plan;
pub mod policy;
pub mod real_servers;
pub mod reconciler;
pub mod report;
pub mod run;
pub mod table;

pub use policy::Policy;
pub use reconciler::Reconciler;
