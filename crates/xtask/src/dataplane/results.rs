//! What was recorded and what came of playing it, as they pass between this machine and the lab.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::recording::{Cell, Event};

/// A cell or an event of a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Recorded {
    pub(crate) file: String,
    pub(crate) value: Value,
}

/// What came of a cell or an event.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Played {
    pub(crate) file: String,
    pub(crate) name: String,
    pub(crate) service: Option<String>,
    pub(crate) expected: String,
    pub(crate) got: String,
    pub(crate) verdict: Verdict,
    /// Keys of the recording that were not compared.
    pub(crate) not_compared: BTreeSet<String>,
    /// Where it stands in the picture, and how it looks there.
    pub(crate) row: [String; 2],
    pub(crate) column: String,
    pub(crate) within: String,
    pub(crate) symbol: char,
}

/// Whether what came is what was wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Verdict {
    /// It is what was recorded.
    AsRecorded {
        /// The rule of deviation that wants something else.
        unlike: Option<String>,
    },
    /// It is what a rule of deviation wants.
    OnPurpose {
        rule: String,
    },
    Differs,
}

/// What a result says until there is another.
pub(crate) const NOT_PLAYED: &str = "was not played";

impl Recorded {
    /// What it is called.
    pub(crate) fn name(&self) -> String {
        match (self.cell(), self.event()) {
            (_, Some(event)) => event.name(),
            (Some(cell), None) => cell.name(),
            (None, None) => self.value.to_string(),
        }
    }

    fn cell(&self) -> Option<Cell> {
        serde_json::from_value(self.value.clone()).ok()
    }

    pub(crate) fn event(&self) -> Option<Event> {
        serde_json::from_value(self.value.clone()).ok()
    }

    /// The result until there is another.
    pub(crate) fn not_played(&self) -> Played {
        let (row, column, within) = match (self.event(), self.cell()) {
            (Some(event), _) => ([event.case, event.service.unwrap_or_default()], event.client, event.family),
            (None, Some(cell)) => {
                let within: Vec<&str> =
                    [&cell.family, &cell.protocol].into_iter().flatten().map(String::as_str).collect();
                (cell.row(), cell.client.clone().unwrap_or_default(), within.join(" "))
            }
            (None, None) => Default::default(),
        };
        let expected = match self.event() {
            Some(event) => describe(&event.observed),
            None => self.value.get("result").map(compact).unwrap_or_default(),
        };
        Played {
            file: self.file.clone(),
            name: self.name(),
            service: None,
            expected,
            got: NOT_PLAYED.into(),
            verdict: Verdict::Differs,
            not_compared: BTreeSet::new(),
            row,
            column,
            within,
            symbol: '?',
        }
    }
}

impl Played {
    pub(crate) fn passed(&self) -> bool {
        self.verdict != Verdict::Differs
    }
}

/// What was observed after an event, as people read it.
pub(crate) fn describe(observed: &BTreeMap<String, Value>) -> String {
    let each = observed.iter().map(|(key, value)| format!("{key} {}", compact(value)));
    each.collect::<Vec<_>>().join("; ")
}

/// A value as people read it.
fn compact(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => format!("[{}]", values.iter().map(compact).collect::<Vec<_>>().join(" ")),
        Value::Object(server) if server.contains_key("weight") => {
            let active = if server.get("has_active_connections") == Some(&json!(true)) { "*" } else { "" };
            let text = |key: &str| server.get(key).map(compact).unwrap_or_default();
            format!("{}={}{active}", text("address"), text("weight"))
        }
        other => other.to_string(),
    }
}
