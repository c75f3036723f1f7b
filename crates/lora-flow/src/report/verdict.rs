//! A gate's verdict as rows of a table.

use serde::Serialize;
use serde_json::Value;

use super::data::VerdictView;

/// What the page shows of a verdict.
#[derive(Debug, Serialize)]
pub struct Shown {
    task: String,
    outcome: String,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    rule: String,
    /// `pass`, `fail`, `inconclusive` or `warn`.
    outcome: String,
    found: String,
}

/// Reads `verdict.json` as the `gate` task writes it.
pub fn view(verdict: &VerdictView) -> Shown {
    let json = &verdict.verdict;
    let row = |rule: &Value| {
        let text = |field: &str| rule[field].as_str().unwrap_or_default().to_owned();
        Row { rule: text("rule"), outcome: text("outcome"), found: text("found") }
    };
    Shown {
        task: verdict.task.clone(),
        // A verdict that does not say yes says no.
        outcome: if json["passed"] == Value::Bool(true) { "pass" } else { "fail" }.to_owned(),
        rows: json["rules"].as_array().into_iter().flatten().map(row).collect(),
    }
}
