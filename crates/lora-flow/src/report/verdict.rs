//! A gate's verdict as rows of a table.

use serde::Serialize;
use serde_json::Value;

use super::data::VerdictView;
use super::page::number;

/// What the page shows of a verdict.
#[derive(Debug, Serialize)]
pub struct Shown {
    task: String,
    outcome: &'static str,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    rule: String,
    outcome: &'static str,
    found: String,
}

/// Reads `verdict.json` as the `gate` task writes it.
pub fn view(verdict: &VerdictView) -> Shown {
    let json = &verdict.verdict;
    let rules = |field: &str, bad: &'static str| {
        let rules = json[field].as_array().into_iter().flatten();
        rules.map(|rule| row(rule, bad)).collect::<Vec<_>>()
    };
    let mut rows = rules("require", "fail");
    rows.extend(rules("warn", "warn"));
    Shown {
        task: verdict.task.clone(),
        outcome: if json["passed"] == Value::Bool(true) { "pass" } else { "fail" },
        rows,
    }
}

fn row(rule: &Value, bad: &'static str) -> Row {
    let passed = rule["passed"] == Value::Bool(true);
    let found = match rule["reason"].as_str() {
        Some(reason) => reason.to_owned(),
        None => match (rule["left"].as_f64(), rule["right"].as_f64()) {
            (Some(left), Some(right)) => format!("{} against {}", number(left), number(right)),
            _ => values(&rule["values"]),
        },
    };
    Row {
        rule: rule["rule"].as_str().unwrap_or_default().to_owned(),
        outcome: if passed { "pass" } else { bad },
        found,
    }
}

fn values(values: &Value) -> String {
    let parts = values.as_object().into_iter().flatten().map(|(name, v)| {
        let v = v.as_f64().map_or_else(|| "missing".to_owned(), number);
        format!("{name} = {v}")
    });
    parts.collect::<Vec<_>>().join(", ")
}
