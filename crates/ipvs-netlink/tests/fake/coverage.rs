//! What was tried how often, and what came of it.

use std::collections::BTreeMap;
use std::fmt;

use ipvs_netlink::{Error, Message};

/// For each command and outcome, how often it occurred.
#[derive(Default)]
pub(crate) struct Coverage(BTreeMap<(&'static str, String), u32>);

impl Coverage {
    pub(crate) fn count(&mut self, message: &Message, result: &Result<(), Error>) {
        *self.0.entry((command(message), outcome(result))).or_default() += 1;
    }

    /// Those of the expected pairs that never occurred.
    pub(crate) fn missing(&self, expected: &[(&'static str, &str)]) -> Vec<(&'static str, String)> {
        let expected = expected
            .iter()
            .flat_map(|(command, outcomes)| outcomes.split(' ').map(move |outcome| (*command, outcome.to_owned())));
        expected.filter(|pair| !self.0.contains_key(pair)).collect()
    }

    pub(crate) fn total(&self) -> u32 {
        self.0.values().sum()
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = "";
        for ((command, outcome), count) in &self.0 {
            if *command != last {
                write!(f, "\n{command:12}")?;
                last = command;
            }
            write!(f, " {outcome} {count:5} ")?;
        }
        Ok(())
    }
}

pub(crate) fn outcome(result: &Result<(), Error>) -> String {
    match result {
        Ok(()) => "ok".into(),
        Err(error) => error.refusal().map_or("unsent".into(), |refusal| name(refusal.errno)),
    }
}

fn name(errno: i32) -> String {
    match errno {
        2 => "ENOENT".into(),
        3 => "ESRCH".into(),
        17 => "EEXIST".into(),
        19 => "ENODEV".into(),
        22 => "EINVAL".into(),
        34 => "ERANGE".into(),
        95 => "EOPNOTSUPP".into(),
        97 => "EAFNOSUPPORT".into(),
        101 => "ENETUNREACH".into(),
        other => other.to_string(),
    }
}

/// The command, as in `IPVS_CMD_NEW_SERVICE`.
fn command(message: &Message) -> &'static str {
    match message {
        Message::AddVirtualServer(_) => "NEW_SERVICE",
        Message::SetVirtualServer(_) => "SET_SERVICE",
        Message::DeleteVirtualServer(_) => "DEL_SERVICE",
        Message::GetVirtualServer(_) | Message::ListVirtualServers => "GET_SERVICE",
        Message::AddRealServer(..) => "NEW_DEST",
        Message::SetRealServer(..) => "SET_DEST",
        Message::DeleteRealServer(..) => "DEL_DEST",
        Message::ListRealServers(_) => "GET_DEST",
        Message::StartSyncDaemon(_) => "NEW_DAEMON",
        Message::StopSyncDaemon(_) => "DEL_DAEMON",
        Message::ListSyncDaemons => "GET_DAEMON",
        Message::GetTimeouts => "GET_CONFIG",
        Message::SetTimeouts(_) => "SET_CONFIG",
        Message::GetInfo => "GET_INFO",
        Message::ZeroVirtualServer(_) | Message::Zero => "ZERO",
        Message::Flush => "FLUSH",
        _ => "answer",
    }
}
