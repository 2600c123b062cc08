//! One kernel setting: its file below /proc/sys or /sys, its value, and how it is read, compared and written.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use tracing::info;

/// A setting with the value that it should have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) key: SettingKey,
    pub(super) value: SettingValue,
    pub(super) importance: Importance,
}

/// The file of a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SettingKey {
    /// Its path below /proc/sys.
    Sysctl(&'static str),
    /// Its path below /sys.
    Sysfs(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SettingValue {
    Exactly(u64),
    AtLeast(u64),
}

/// What follows if a setting cannot be applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Importance {
    /// The agent does not start: Services would not work correctly. The monitor restores these settings.
    Required,
    /// An error in the log: a table has another size, or a flow another timeout.
    ///
    /// kube-proxy does not start then. But Services work, and outside the initial network namespace these settings are
    /// read-only: in kind, for example, where nodes are containers. Users there would have to find out which flags
    /// disable these settings before any Service works.
    Tuning,
    /// A warning in the log: the kernel spends more or less time on statistics than asked for.
    Optional,
}

impl Setting {
    pub(super) fn sysctl(path: &'static str, value: u64, importance: Importance) -> Self {
        Self { key: SettingKey::Sysctl(path), value: SettingValue::Exactly(value), importance }
    }

    pub(super) fn sysfs_at_least(path: &'static str, value: u64, importance: Importance) -> Self {
        Self { key: SettingKey::Sysfs(path), value: SettingValue::AtLeast(value), importance }
    }

    /// Writes the setting if it differs, and returns whether it did.
    pub(super) fn apply(self, root: &Path) -> Result<bool, String> {
        let path = self.key.path(root);
        let found = fs::read_to_string(&path);
        let found = match found {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::NotFound && self.is_met_without_file() => return Ok(false),
            Err(error) => return Err(self.problem(None, &error)),
        };
        let found = found.trim();
        let is_met = found.parse().is_ok_and(|found: u64| match self.value {
            SettingValue::Exactly(value) => found == value,
            SettingValue::AtLeast(value) => found >= value,
        });
        if is_met {
            return Ok(false);
        }
        let (SettingValue::Exactly(value) | SettingValue::AtLeast(value)) = self.value;
        fs::write(&path, value.to_string()).map_err(|error| self.problem(Some(found), &error))?;
        info!(key = %self.key, old = %found, new = value, "set");
        Ok(true)
    }

    /// A kernel without the switch of an optional feature has the feature enabled.
    fn is_met_without_file(self) -> bool {
        self.importance == Importance::Optional && self.value == SettingValue::Exactly(1)
    }

    /// The error text: what is wrong, and the remedy.
    fn problem(self, found: Option<&str>, error: &io::Error) -> String {
        let Self { key, value, .. } = self;
        let (SettingValue::Exactly(number) | SettingValue::AtLeast(number)) = value;
        let command = match key {
            SettingKey::Sysctl(_) => format!("`sysctl -w {key}={number}`"),
            SettingKey::Sysfs(_) => format!("`echo {number} > {key}`"),
        };
        let mount = key.mount();
        match found {
            Some(found) => format!(
                "{key} must be {value}, is {found}, and cannot be written ({error}): run {command} on the node, or give the \
                 container a writable {mount}"
            ),
            None if error.kind() == ErrorKind::NotFound => format!(
                "{key} must be {value}, and this kernel or network namespace does not have it: load the module, or use a \
                 kernel that has it"
            ),
            None => format!(
                "{key} must be {value}, and cannot be read ({error}): run {command} on the node, and make {mount} readable"
            ),
        }
    }
}

impl SettingKey {
    fn mount(self) -> &'static str {
        match self {
            Self::Sysctl(_) => "/proc/sys",
            Self::Sysfs(_) => "/sys",
        }
    }

    fn path(self, root: &Path) -> PathBuf {
        let (Self::Sysctl(path) | Self::Sysfs(path)) = self;
        root.join(self.mount().trim_start_matches('/')).join(path)
    }
}

/// As `sysctl(8)` names it, or for /sys the path.
impl fmt::Display for SettingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sysctl(path) => f.write_str(&path.replace('/', ".")),
            Self::Sysfs(path) => write!(f, "/sys/{path}"),
        }
    }
}

impl fmt::Display for SettingValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exactly(value) => write!(f, "{value}"),
            Self::AtLeast(value) => write!(f, "at least {value}"),
        }
    }
}
