//! Restores required settings that another program has changed: a script that configures the network may switch off
//! forwarding, for example, and nothing else would report that. Other settings are left as they are.

use std::collections::BTreeSet;
use std::path::PathBuf;

use tracing::warn;

use super::setting::{Importance, Setting, SettingKey};

/// The required settings, and which of them cannot be restored.
#[derive(Debug)]
pub(crate) struct SysctlMonitor {
    root: PathBuf,
    settings: Vec<Setting>,
    /// Settings that could not be restored. Each has been reported.
    failing: BTreeSet<SettingKey>,
}

impl SysctlMonitor {
    pub(super) fn new(root: PathBuf, settings: Vec<Setting>) -> Self {
        let settings = settings.into_iter().filter(|setting| setting.importance == Importance::Required).collect();
        Self { root, settings, failing: BTreeSet::new() }
    }

    /// Restores settings that have changed. Returns a message for each that cannot be restored and was not reported
    /// before.
    pub(crate) fn restore(&mut self) -> Vec<String> {
        let mut problems = Vec::new();
        for setting in &self.settings {
            match setting.apply(&self.root) {
                Ok(is_set) => {
                    if is_set || self.failing.contains(&setting.key) {
                        warn!(
                            "another program had changed {}, which Services require: it is {} again",
                            setting.key, setting.value
                        );
                    }
                    self.failing.remove(&setting.key);
                }
                Err(problem) => {
                    if self.failing.insert(setting.key) {
                        warn!("another program has changed a setting that Services require: {problem}");
                        problems.push(problem);
                    }
                }
            }
        }
        problems
    }

    /// How many settings could not be restored.
    pub(crate) fn failing(&self) -> usize {
        self.failing.len()
    }
}
