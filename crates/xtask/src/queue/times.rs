//! How long each task took, so that the longest ones start first.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::task::{Finished, Task};

/// The recorded durations, in seconds: tasks of less than [`WORTH_RECORDING`] are left out.
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/times.json");

/// Below this the order makes no difference.
const WORTH_RECORDING: f32 = 1.0;

/// Durations of tasks in seconds, by [`Task::key`].
#[derive(Debug, Default)]
pub(crate) struct Times(BTreeMap<String, f32>);

impl Times {
    /// What is recorded. Without it every order is right, only some are slower.
    pub(crate) fn read() -> Self {
        let text = fs::read(FILE).unwrap_or_default();
        Self(serde_json::from_slice(&text).unwrap_or_default())
    }

    /// The places of the tasks, longest task first. What is unknown or short keeps its order.
    pub(crate) fn order(&self, tasks: &[Task]) -> Vec<usize> {
        let seconds = |index: &usize| tasks.get(*index).and_then(|task| self.0.get(&task.key())).copied();
        let mut order: Vec<usize> = (0..tasks.len()).collect();
        order.sort_by(|a, b| seconds(b).unwrap_or_default().total_cmp(&seconds(a).unwrap_or_default()));
        order
    }

    /// Records the durations of what passed.
    pub(crate) fn record(finished: &[Finished]) -> Result<()> {
        let passed = finished.iter().filter(|finished| finished.outcome.passed);
        let worth = passed.filter(|finished| finished.outcome.seconds >= WORTH_RECORDING);
        // Tenths, so that two runs differ in few lines.
        let times: BTreeMap<String, f32> =
            worth.map(|finished| (finished.task.key(), (finished.outcome.seconds * 10.0).round() / 10.0)).collect();
        let text = serde_json::to_string_pretty(&times)?;
        fs::write(Path::new(FILE), text + "\n").with_context(|| format!("cannot write {FILE}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::task::Action;

    #[test]
    fn the_longest_tasks_come_first_and_unknown_ones_keep_their_order() {
        let task = |name: &str| Task {
            suite: "s".into(),
            name: name.into(),
            action: Action::Test { executable: "/x".into(), package_dir: "/".into() },
        };
        let tasks = ["new", "short", "long", "newer"].map(task);
        let times = Times([("s long".to_owned(), 9.0), ("s short".to_owned(), 2.0)].into());
        assert_eq!(times.order(&tasks), [2, 1, 0, 3]);
    }
}
