//! What a named rule of a gate found.

use serde::Serialize;
use serde_json::Value;

/// How a rule ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// The data show that it holds.
    Pass,
    /// The data show that it does not, or it could not be judged.
    Fail,
    /// There are too few samples to tell.
    Inconclusive,
}

/// A rule with what was found.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Named {
    /// JSON pointer of the rule below `with`.
    pub(crate) pointer: String,
    /// The rule as a person says it.
    pub(crate) rule: String,
    pub(crate) outcome: Outcome,
    /// What was found, in a line.
    #[serde(rename = "found")]
    pub(crate) headline: String,
    /// Every number, interval, test and row that decided.
    pub(crate) details: Value,
}

impl Named {
    pub(crate) fn new(outcome: Outcome, headline: String, details: Value) -> Self {
        Self { pointer: String::new(), rule: String::new(), outcome, headline, details }
    }

    pub(crate) fn unsure(headline: String, details: Value) -> Self {
        Self::new(Outcome::Inconclusive, headline, details)
    }

    /// Pass or fail.
    pub(crate) fn settled(passed: bool, headline: String, details: Value) -> Self {
        Self::new(if passed { Outcome::Pass } else { Outcome::Fail }, headline, details)
    }

    pub(crate) fn at(self, pointer: String, rule: String) -> Self {
        Self { pointer, rule, ..self }
    }
}
