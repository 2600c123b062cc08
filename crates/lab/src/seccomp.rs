//! Profiles of system calls as container runtimes read them (the runtime specification's `linux.seccomp`), compiled for the
//! architecture this runs on.

use std::fs;
use std::io;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::{Context, Error, Result};

/// A profile, with the fields that ours have. Another field is an error: it would mean something that is not done here.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Profile {
    default_action: String,
    default_errno_ret: u32,
    /// The architectures it is for.
    pub architectures: Vec<String>,
    syscalls: Vec<AllowRule>,
}

/// System calls that may be made, where all conditions hold.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct AllowRule {
    names: Vec<String>,
    action: String,
    #[serde(default)]
    args: Vec<Condition>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Condition {
    index: u8,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

impl Profile {
    /// Reads a profile from a file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).context("read", path.display())?;
        serde_json::from_slice(&text).map_err(|error| invalid(path, &error.to_string()))
    }

    /// The names of all system calls that may be made, under conditions or without.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.syscalls.iter().flat_map(|allowed| allowed.names.iter().map(String::as_str))
    }

    /// What the kernel loads. A name that this architecture does not have is an error, which runtimes would pass over.
    pub fn compile(&self, path: &Path) -> Result<Filter> {
        let invalid = |what: &str| invalid(path, what);
        if self.default_action != "SCMP_ACT_ERRNO" {
            return Err(invalid("the default action is not SCMP_ACT_ERRNO"));
        }
        let mut rules = Vec::new();
        for allowed in &self.syscalls {
            if allowed.action != "SCMP_ACT_ALLOW" {
                return Err(invalid("an action is not SCMP_ACT_ALLOW"));
            }
            let conditions = allowed.args.iter().map(|condition| condition.translated(path));
            let conditions = conditions.collect::<Result<Vec<Value>>>()?;
            for name in &allowed.names {
                let mut rule = json!({"syscall": name});
                if !conditions.is_empty() {
                    rule["args"] = conditions.clone().into();
                }
                rules.push(rule);
            }
        }
        let filters = json!({"container": {
            "mismatch_action": {"errno": self.default_errno_ret}, "match_action": "allow", "filter": rules,
        }});
        compiler::compile(&filters.to_string()).map(Filter).map_err(|error| invalid(&error))
    }
}

impl Condition {
    /// As the compiler has it.
    fn translated(&self, path: &Path) -> Result<Value> {
        let (op, value) = match self.op.as_str() {
            "SCMP_CMP_EQ" => (json!("eq"), self.value),
            // The first value is the mask.
            "SCMP_CMP_MASKED_EQ" => (json!({"masked_eq": self.value}), self.value_two),
            other => return Err(invalid(path, &format!("{other} is not known here"))),
        };
        Ok(json!({"index": self.index, "type": "qword", "op": op, "val": value}))
    }
}

/// A compiled profile.
#[derive(Debug)]
pub struct Filter(compiler::Program);

impl Filter {
    /// Restricts this process from now on, and what it executes.
    pub(crate) fn load(&self) -> io::Result<()> {
        compiler::load(&self.0)
    }
}

#[cfg(target_endian = "little")]
mod compiler {
    use std::io;

    pub(super) type Program = seccompiler::BpfProgram;

    pub(super) fn compile(filters: &str) -> Result<Program, String> {
        let arch = seccompiler::TargetArch::try_from(std::env::consts::ARCH).map_err(|error| error.to_string())?;
        let mut programs =
            seccompiler::compile_from_json(filters.as_bytes(), arch).map_err(|error| error.to_string())?;
        programs.remove("container").ok_or_else(|| "nothing was compiled".into())
    }

    pub(super) fn load(program: &Program) -> io::Result<()> {
        seccompiler::apply_filter(program).map_err(io::Error::other)
    }
}

/// The crate seccompiler supports little-endian architectures only.
#[cfg(target_endian = "big")]
mod compiler {
    use std::io;

    pub(super) type Program = std::convert::Infallible;

    pub(super) fn compile(_filters: &str) -> Result<Program, String> {
        Err("profiles cannot be compiled for a big-endian architecture".into())
    }

    pub(super) fn load(program: &Program) -> io::Result<()> {
        match *program {}
    }
}

fn invalid(path: &Path, what: &str) -> Error {
    Error::Usage(format!("{}: {what}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(syscalls: &Value) -> serde_json::Result<Profile> {
        serde_json::from_value(json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": syscalls,
        }))
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn unknown_system_calls_and_unknown_fields_are_errors() {
        let path = Path::new("profile.json");
        let good = json!([{"names": ["read", "socket"], "action": "SCMP_ACT_ALLOW"}]);
        let profile_of_two = profile(&good).unwrap();
        assert!(!profile_of_two.compile(path).unwrap().0.is_empty());
        assert_eq!(profile_of_two.names().collect::<Vec<_>>(), ["read", "socket"]);
        let misspelt = json!([{"names": ["raed"], "action": "SCMP_ACT_ALLOW"}]);
        let error = profile(&misspelt).unwrap().compile(path).unwrap_err().to_string();
        assert!(error.starts_with("profile.json: ") && error.contains("raed"), "{error}");
        assert!(profile(&json!([{"names": ["read"], "action": "SCMP_ACT_ALLOW", "includes": {}}])).is_err());
        let killing = json!([{"names": ["read"], "action": "SCMP_ACT_KILL"}]);
        assert!(profile(&killing).unwrap().compile(path).is_err());
    }

    #[test]
    fn conditions_are_translated() {
        let condition = |op: &str| Condition { index: 1, value: 6, value_two: 2, op: op.to_owned() };
        let path = Path::new("profile.json");
        let equal = json!({"index": 1, "type": "qword", "op": "eq", "val": 6});
        assert_eq!(condition("SCMP_CMP_EQ").translated(path).unwrap(), equal);
        let masked = json!({"index": 1, "type": "qword", "op": {"masked_eq": 6}, "val": 2});
        assert_eq!(condition("SCMP_CMP_MASKED_EQ").translated(path).unwrap(), masked);
        assert!(condition("SCMP_CMP_GT").translated(path).is_err());
    }
}
