//! What gates said, read back from the store: for `gate explain` and for CI.

use lora_flow_pipeline::{Engine, RunReport, TaskOutcome};
use serde_json::Value;

use crate::commands;
use crate::table::table;
use crate::ui::Failure;

/// The verdicts of a run's gates, with the gates.
pub struct Verdict<'a> {
    pub task: &'a TaskOutcome,
    pub json: Value,
}

/// Reads the verdicts of a run. A gate that did not run has none.
pub fn read<'a>(engine: &Engine, report: &'a RunReport) -> Vec<Verdict<'a>> {
    let of = |task: &'a TaskOutcome| {
        let entry = engine.store().entry(&task.key?)?;
        let artifact = engine.store().artifact(entry.outputs.get("verdict")?);
        Some(Verdict { task, json: commands::artifact_json(&artifact, "verdict.json")? })
    };
    report.tasks.iter().filter_map(of).collect()
}

impl Verdict<'_> {
    /// The rules, in order.
    pub fn rules(&self) -> impl Iterator<Item = Rule<'_>> {
        let blocks = self.json["inconclusive"] != "warn";
        let rules = self.json["rules"].as_array();
        rules.into_iter().flatten().map(move |json| Rule { json, inconclusive_blocks: blocks })
    }
}

/// A rule of a verdict.
pub struct Rule<'a> {
    pub json: &'a Value,
    inconclusive_blocks: bool,
}

impl<'a> Rule<'a> {
    pub fn text(&self, field: &str) -> &'a str {
        self.json[field].as_str().unwrap_or_default()
    }

    /// `pass`, `fail`, `inconclusive` or `warn`.
    pub fn outcome(&self) -> &'a str {
        self.text("outcome")
    }

    /// Whether it made the gate say no.
    pub fn blocks(&self) -> bool {
        match self.outcome() {
            "fail" => true,
            "inconclusive" => self.inconclusive_blocks,
            _ => false,
        }
    }

    /// Value before and after, and whether more is better, where the rule compares two results.
    pub fn change(&self) -> Option<(f64, f64, bool)> {
        let details = &self.json["details"];
        let value = |side: &str| details[side]["value"].as_f64();
        Some((value("baseline")?, value("candidate")?, details["higher_is_better"].as_bool()?))
    }
}

/// `lora-flow gate explain`.
pub fn explain(run: &str, gate: Option<&str>, json: bool) -> Result<i32, Failure> {
    let engine = commands::engine_here()?;
    let report = engine.load_run(run).map_err(Failure::Usage)?;
    let verdicts = read(&engine, &report);
    let names = || verdicts.iter().map(|v| v.task.id.as_str());
    if let Some(name) = gate.filter(|g| !names().any(|n| n == *g)) {
        let message = format!("run {} has no verdict of `{name}`", report.run_id);
        return Err(Failure::unknown_task(message, name, names()));
    }
    let chosen: Vec<&Verdict> =
        verdicts.iter().filter(|v| gate.is_none_or(|g| v.task.id == g)).collect();
    if json {
        let all: serde_json::Map<String, Value> =
            chosen.iter().map(|v| (v.task.id.clone(), v.json.clone())).collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(0);
    }
    if chosen.is_empty() {
        println!("no gate of run {} came to a verdict", report.run_id);
        return Ok(0);
    }
    for (i, verdict) in chosen.iter().enumerate() {
        if i > 0 {
            println!();
        }
        let word = match verdict.json["passed"].as_bool() {
            Some(true) => "says yes",
            _ => "says no",
        };
        println!("{} {word} (run {})", verdict.task.id, report.run_id);
        verdict.rules().for_each(|rule| print_rule(&rule));
        print_inputs(&verdict.json["inputs"]);
    }
    Ok(0)
}

fn print_rule(rule: &Rule<'_>) {
    let mark = match rule.outcome() {
        "pass" => "pass",
        "warn" => "warn",
        "inconclusive" if rule.blocks() => "OPEN: not enough samples to tell, and that blocks",
        "inconclusive" => "open: not enough samples to tell",
        _ => "FAIL",
    };
    println!("\n  {}\n    {mark}: {}", rule.text("rule"), rule.text("found"));
    let details = &rule.json["details"];
    for (key, value) in details.as_object().into_iter().flatten() {
        // What the lines above say already, or what has its own form below.
        let known =
            ["rows", "metric", "candidate", "baseline", "scores", "values", "left", "right"];
        if !known.contains(&key.as_str()) && !value.is_null() {
            println!("    {}: {value}", key.replace('_', " "));
        }
    }
    for (name, value) in details["values"].as_object().into_iter().flatten() {
        println!("    {name} = {value}");
    }
    for (metric, scores) in details["scores"].as_object().into_iter().flatten() {
        let rows = &scores["clean_rows"];
        println!(
            "    {metric}: all rows {}, the {rows} clean rows {}",
            scores["all"], scores["clean"]
        );
    }
    let rows = match &details["rows"] {
        Value::Array(rows) => rows.as_slice(),
        Value::Object(of) => {
            let count = |key: &str| of.get(key).map_or("0".to_owned(), Value::to_string);
            println!("    rows: {} better, {} worse", count("better"), count("worse"));
            of.get("worst").and_then(Value::as_array).map_or(&[][..], Vec::as_slice)
        }
        _ => &[],
    };
    for row in rows.iter().take(10) {
        let parts = row.as_object().into_iter().flatten();
        let parts: Vec<String> = parts
            .map(|(key, value)| match value {
                Value::String(text) if key == "row" && text.len() == 64 => text[..12].to_owned(),
                Value::String(text) => text.clone(),
                other => format!("{key} {other}"),
            })
            .collect();
        println!("      {}", parts.join(" · "));
    }
    if rows.len() > 10 {
        println!("      … {} more in `verdict.json` (`gate explain --json`)", rows.len() - 10);
    }
}

fn print_inputs(inputs: &Value) {
    let mut rows = table(&["input", "from", "kind", "digest"]);
    for (name, input) in inputs.as_object().into_iter().flatten() {
        let text = |key: &str| input[key].as_str().unwrap_or_default().to_owned();
        let digest: String = text("digest").chars().take(12).collect();
        rows.add_row([name.clone(), text("reference"), text("kind"), digest]);
    }
    println!("\n{}", rows.trim_fmt());
}
