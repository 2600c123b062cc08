//! What the queue holds: one test, one recorded run of kube-proxy, one set of traffic; and what came of it.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{conformance, dataplane};

/// A task that one worker does in one go.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Task {
    /// The executable that has the test, or the command.
    pub(crate) suite: String,
    pub(crate) name: String,
    pub(crate) action: Action,
}

/// What is to be done for a task.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Action {
    /// Run one ignored test of an executable.
    Test {
        /// The executable.
        executable: PathBuf,
        /// The directory of its package, where cargo would run it.
        package_dir: PathBuf,
    },
    /// Play a recorded run of kube-proxy.
    Conformance(conformance::GuestCase),
    /// Send recorded traffic.
    DataPlane(Box<dataplane::Share>),
}

/// What came of a task.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// The task's place in the list.
    pub(crate) index: usize,
    pub(crate) passed: bool,
    pub(crate) seconds: f32,
    /// What it wrote, for people.
    pub(crate) output: String,
    /// What the command makes of it.
    pub(crate) value: Value,
}

/// A task with its outcome.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) task: Task,
    pub(crate) outcome: Outcome,
}

impl Task {
    /// The name under which its duration is recorded.
    pub(crate) fn key(&self) -> String {
        format!("{} {}", self.suite, self.name)
    }

    /// Whether nobody else may use IPVS in the same kernel meanwhile. The tests of `ipvs-netlink` compare whole lists, and
    /// before Linux 7.2 a list of virtual servers can miss one while another namespace deletes one: there is one table for
    /// all namespaces (`ip_vs_genl_dump_services`).
    pub(crate) fn needs_kernel_alone(&self) -> bool {
        matches!(&self.action, Action::Test { package_dir, .. } if package_dir.ends_with("ipvs-netlink"))
    }
}

impl Finished {
    /// The result of a command's task. One that was not done to its end has none, which is an error.
    pub(crate) fn value<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_value(self.outcome.value.clone())
            .with_context(|| format!("{} was not done to its end:\n{}", self.task.key(), self.outcome.output))
    }
}
