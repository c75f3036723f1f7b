//! `lora-flow diff`: parameters and metrics of two runs side by side, either of which may be the file of
//! an accepted one.

use std::collections::BTreeMap;
use std::path::Path;

use lora_flow_core::{ArtifactKind, Error};
use lora_flow_pipeline::{Engine, RunRecord};
use serde_json::{Value, json};

use crate::commands;
use crate::table::table;
use crate::ui::Failure;

/// What one run has to compare, by name. `BTreeMap` gives all sections one order.
#[derive(Default)]
struct Side {
    /// The run, or the file of an accepted one.
    id: String,
    parameters: BTreeMap<String, Value>,
    metrics: BTreeMap<String, Value>,
    summaries: BTreeMap<String, Value>,
    /// Tasks whose parameters and metrics are not known any longer, or never were.
    unknown: Vec<String>,
}

/// One line of the comparison.
struct Row {
    name: String,
    a: Option<Value>,
    b: Option<Value>,
}

pub fn diff(a: &str, b: &str, all: bool, as_json: bool) -> Result<i32, Failure> {
    let engine = commands::engine_here()?;
    let (left, right) = (Side::open(&engine, a)?, Side::open(&engine, b)?);
    let sections = [
        ("parameters", rows(&left.parameters, &right.parameters, all)),
        ("metrics", rows(&left.metrics, &right.metrics, all)),
        ("summaries", rows(&left.summaries, &right.summaries, all)),
    ];
    for side in [&left, &right] {
        if !side.unknown.is_empty() {
            eprintln!(
                "run {}: the store has no result of {}; their parameters and metrics are not compared",
                side.id,
                side.unknown.join(", ")
            );
        }
    }
    let (id_a, id_b) = (&left.id, &right.id);
    if as_json {
        let mut out = json!({ "a": id_a, "b": id_b });
        for (title, rows) in &sections {
            out[title] = rows.iter().map(Row::json).collect();
        }
        println!("{}", serde_json::to_string_pretty(&out)?);
        return Ok(0);
    }
    if sections.iter().all(|(_, rows)| rows.is_empty()) {
        println!("no differences between {id_a} and {id_b}");
        return Ok(0);
    }
    for (i, (title, rows)) in sections.iter().filter(|(_, rows)| !rows.is_empty()).enumerate() {
        if i > 0 {
            println!();
        }
        let mut shown = table(&[title, id_a, id_b, "change"]);
        for row in rows {
            shown.add_row([row.name.clone(), text(&row.a), text(&row.b), row.change()]);
        }
        println!("{}", shown.trim_fmt());
    }
    Ok(0)
}

impl Side {
    /// A run, or an accepted run by its file.
    fn open(engine: &Engine, name: &str) -> Result<Self, Failure> {
        if !Path::new(name).is_file() {
            let record = engine.load_record(name).map_err(Failure::Usage)?;
            return Ok(Self::read(engine, &record));
        }
        let json: Value = serde_json::from_str(&fs_err::read_to_string(name)?)?;
        let Some(results) = json["results"].as_object() else {
            return Err(Failure::Usage(Error::new(format!("`{name}` is no accepted run"))));
        };
        let mut side = Self { id: name.to_owned(), ..Self::default() };
        flatten("params", &json["params"], &mut side.parameters);
        for (task, result) in results {
            let numbers = result["metrics"].as_object().into_iter().flatten();
            let numbers = numbers.filter(|(_, v)| v.is_number() || v.is_null());
            side.metrics.extend(numbers.map(|(name, v)| (format!("{task}.{name}"), v.clone())));
        }
        Ok(side)
    }

    fn read(engine: &Engine, record: &RunRecord) -> Self {
        let mut side = Self { id: record.report.run_id.clone(), ..Self::default() };
        flatten("params", &record.params, &mut side.parameters);
        for task in &record.report.tasks {
            for (name, value) in &task.summary {
                side.summaries.insert(format!("{}.{name}", task.id), value.clone().into());
            }
            let Some(entry) = task.key.and_then(|key| engine.store().entry(&key)) else {
                side.unknown.push(format!("`{}`", task.id));
                continue;
            };
            let with = format!("{}.with", task.id);
            flatten(&with, &entry.explained.key.params, &mut side.parameters);
            for (output, artifact) in &entry.outputs {
                if artifact.manifest.kind != ArtifactKind::Metrics {
                    continue;
                }
                let prefix = commands::metrics_name(&task.id, output);
                let artifact = engine.store().artifact(artifact);
                let Some(Value::Object(numbers)) =
                    commands::artifact_json(&artifact, "metrics.json")
                else {
                    side.unknown.push(format!("`{}.{output}`", task.id));
                    continue;
                };
                let numbers = numbers.into_iter().filter(|(_, v)| v.is_number() || v.is_null());
                side.metrics.extend(numbers.map(|(name, v)| (format!("{prefix}.{name}"), v)));
            }
        }
        side
    }
}

/// Puts the leaves of a tree under dotted names. Lists stay whole: their elements have no names.
pub fn flatten(prefix: &str, value: &Value, out: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            map.iter().for_each(|(key, value)| flatten(&format!("{prefix}.{key}"), value, out));
        }
        Value::Object(_) | Value::Null => {}
        leaf => {
            out.insert(prefix.to_owned(), leaf.clone());
        }
    }
}

fn rows(a: &BTreeMap<String, Value>, b: &BTreeMap<String, Value>, all: bool) -> Vec<Row> {
    let only_b = b.keys().filter(|name| !a.contains_key(*name));
    let mut names: Vec<&String> = a.keys().chain(only_b).collect();
    names.sort();
    let row = |name: &String| Row {
        name: name.clone(),
        a: a.get(name).cloned(),
        b: b.get(name).cloned(),
    };
    names.into_iter().map(row).filter(|row| all || row.a != row.b).collect()
}

impl Row {
    /// Change from `a` to `b` in per cent of `a`, where both are numbers and `a` is not zero.
    fn percent(&self) -> Option<f64> {
        let (a, b) = (number(self.a.as_ref()?)?, number(self.b.as_ref()?)?);
        (a != 0.0).then(|| (b - a) / a.abs() * 100.0)
    }

    fn change(&self) -> String {
        match (&self.a, &self.b) {
            (None, _) => "added".to_owned(),
            (_, None) => "removed".to_owned(),
            (a, b) if a == b => String::new(),
            _ => self.percent().map_or_else(String::new, |p| format!("{p:+.2} %")),
        }
    }

    fn json(&self) -> Value {
        json!({ "name": self.name, "a": self.a, "b": self.b, "change_percent": self.percent() })
    }
}

/// A number, also one that a task wrote as text.
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::String(text) => text.trim().parse().ok().filter(|n: &f64| n.is_finite()),
        value => value.as_f64(),
    }
}

fn text(value: &Option<Value>) -> String {
    match value {
        None => "–".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_get_dotted_names_and_changes_are_in_per_cent_of_the_first() {
        let flat = |value: Value| {
            let mut out = BTreeMap::new();
            flatten("t.with", &value, &mut out);
            out
        };
        let a = flat(json!({ "lr": 0.002, "split": { "train": 0.9 }, "files": ["x"], "same": 1 }));
        let b = flat(
            json!({ "lr": 0.001, "split": { "train": 0.9 }, "files": ["y"], "same": 1, "new": true }),
        );
        let rows_of = |all| rows(&a, &b, all);
        let shown: Vec<(String, String)> =
            rows_of(false).iter().map(|row| (row.name.clone(), row.change())).collect();
        let row = |name: &str, change: &str| (name.to_owned(), change.to_owned());
        assert_eq!(
            shown,
            [row("t.with.files", ""), row("t.with.lr", "-50.00 %"), row("t.with.new", "added")]
        );
        assert_eq!(rows_of(true).len(), 5);
        let from_zero = Row { name: String::new(), a: Some(json!(0)), b: Some(json!(1)) };
        assert_eq!(from_zero.percent(), None);
        let negative = Row { name: String::new(), a: Some(json!("-2")), b: Some(json!("-1.0")) };
        assert_eq!(negative.percent(), Some(50.0));
    }
}
