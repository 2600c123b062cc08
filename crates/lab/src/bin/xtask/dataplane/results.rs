//! What was recorded and what came of playing it, as they pass between this machine and the lab.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

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
                let within = [&cell.family, &cell.protocol].map(|word| word.clone().unwrap_or_default());
                (cell.row(), cell.client.unwrap_or_default(), within.join(" "))
            }
            (None, None) => Default::default(),
        };
        Played {
            file: self.file.clone(),
            name: self.name(),
            service: None,
            expected: self.value.get("result").map(ToString::to_string).unwrap_or_default(),
            got: "was not played".into(),
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
