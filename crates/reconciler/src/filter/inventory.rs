//! The sets, chains and rules of a table, for comparison: those this program would write, and those the kernel holds.

use std::collections::BTreeSet;

use super::Fingerprint;

/// The sets, chains and rules of a table, desired or held, independent of their order.
#[derive(Debug, Default)]
pub(crate) struct Inventory(BTreeSet<String>);

impl Inventory {
    /// The flags of the table; 0 for none.
    pub(crate) fn table(&mut self, flags: u32) {
        self.0.insert(format!("table {flags:x}"));
    }

    pub(crate) fn set(&mut self, name: &str, key_bytes: u32, data: u32) {
        self.0.insert(format!("set {name} {key_bytes} {data:x}"));
    }

    pub(crate) fn has_set(&self, name: &str) -> bool {
        self.0.iter().any(|line| line.strip_prefix("set ").is_some_and(|rest| rest.split(' ').next() == Some(name)))
    }

    pub(crate) fn chain(&mut self, name: &str, base: Option<(&str, u32, i32)>, rules: &[u64]) {
        self.0.insert(format!("chain {name} {base:?} {rules:x?}"));
    }

    pub(crate) fn fingerprint(&self) -> u64 {
        let mut fingerprint = Fingerprint::default();
        for line in &self.0 {
            fingerprint.add(line.as_bytes());
        }
        fingerprint.finish()
    }
}
