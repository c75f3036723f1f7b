//! `gate`: a verdict on metrics.
//!
//! Each rule of `require` must be true; if one is not, what depends on the gate does not run and
//! the run exits with 3. Rules of `warn` are shown alike but stop nothing. A rule never passes on a
//! metric that is missing, not a finite number, or counted over no tokens, and metrics of different
//! data are not compared unless that is allowed.

use std::collections::BTreeMap;
use std::fmt::Write;

use lora_flow_core::{
    ArtifactKind, Error, NamedArtifact, Ports, Problem, Result, ResultExt, Task, TaskContext,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::rule::{self, Finding, Metrics};

/// Parameters of `gate`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Gate {
    /// Rules that must hold: expressions over `input.metric` that are true or false, such as
    /// `candidate.perplexity < 0.97 * baseline.perplexity`.
    pub require: Vec<String>,
    /// Rules that are reported when they do not hold, and stop nothing.
    #[serde(default)]
    pub warn: Vec<String>,
    /// Let a rule compare metrics that were measured on different data.
    #[serde(default)]
    pub allow_different_data: bool,
}

impl Task for Gate {
    fn inputs(&self) -> Ports {
        Ports::none().any_name(&[ArtifactKind::Metrics])
    }

    fn outputs(&self) -> Ports {
        Ports::none().required(
            "verdict",
            ArtifactKind::Verdict,
            "`verdict.json`: each rule with every number it read",
        )
    }

    fn validate(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.require.is_empty() {
            problems.push(
                Problem::at("/require", "`require` is empty, so the gate checks nothing")
                    .with_hint("add a rule, such as `candidate.perplexity < baseline.perplexity`"),
            );
        }
        for (field, rules) in [("require", &self.require), ("warn", &self.warn)] {
            for (i, rule) in rules.iter().enumerate() {
                if let Err(message) = rule::check(rule) {
                    problems.push(Problem::at(format!("/{field}/{i}"), message));
                }
            }
        }
        problems
    }

    fn run(&self, cx: &mut TaskContext) -> Result<()> {
        let mut inputs = BTreeMap::new();
        let mut sources = serde_json::Map::new();
        for (name, artifacts) in cx.inputs() {
            let (metrics, source) =
                read(name, artifacts).with_context(|| format!("input `{name}`"))?;
            inputs.insert(name.clone(), metrics);
            sources.insert(name.clone(), source);
        }
        if inputs.is_empty() {
            return Err(Error::new("the gate has no inputs")
                .with_hint("name them as its rules do: `inputs: { candidate: scores }`"));
        }
        let judge = |rules: &[String]| -> Result<Vec<Finding>> {
            rules.iter().map(|r| rule::evaluate(r, &inputs, self.allow_different_data)).collect()
        };
        let (required, warned) = (judge(&self.require)?, judge(&self.warn)?);
        let failed: Vec<_> = required.iter().filter(|f| !f.passed).collect();

        cx.report(table(&required, &warned));
        let passed = required.len() - failed.len();
        cx.summary("rules", format!("{passed} of {} hold", required.len()));
        for (name, change) in required.iter().chain(&warned).filter_map(change) {
            cx.summary(name, change);
        }
        for finding in warned.iter().filter(|f| !f.passed) {
            cx.warn(format!("does not hold: {}", describe(finding)));
        }
        cx.output("verdict")?.write_json(
            "verdict.json",
            &json!({
                "passed": failed.is_empty(),
                "require": required,
                "warn": warned,
                "inputs": sources,
            }),
        )?;
        if !failed.is_empty() {
            let reasons: Vec<_> = failed.iter().map(|f| describe(f)).collect();
            cx.deny(reasons.join("; "));
        }
        Ok(())
    }
}

/// The metrics of an input, and what `verdict.json` says of it.
fn read(name: &str, artifacts: &[NamedArtifact]) -> Result<(Metrics, Value)> {
    let [NamedArtifact { artifact, .. }] = artifacts else {
        return Err(Error::new(format!("`{name}` has {} artifacts", artifacts.len()))
            .with_hint("give each its own name"));
    };
    let text = fs_err::read_to_string(artifact.file("metrics.json")?)?;
    let json: serde_json::Map<String, Value> =
        serde_json::from_str(&text).context("`metrics.json` is not a JSON object")?;
    let values: BTreeMap<_, _> = json
        .iter()
        .filter(|(key, _)| *key != "meta")
        .map(|(key, value)| (key.clone(), value.as_f64().filter(|x| x.is_finite())))
        .collect();
    let data = json.get("meta").and_then(|m| m.get("data")).and_then(Value::as_str);
    let source = json!({ "digest": artifact.digest, "data": data, "metrics": values });
    Ok((Metrics { values, data: data.map(str::to_owned) }, source))
}

/// A number with as many digits as people compare by.
fn short(x: f64) -> String {
    let size = x.abs();
    if x == x.trunc() && size < 1e15 {
        format!("{x}")
    } else if (1e-3..1e6).contains(&size) {
        let decimals = (4 - size.log10().floor() as i32).clamp(0, 7) as usize;
        format!("{x:.decimals$}")
    } else {
        format!("{x:.4e}")
    }
}

/// What was found, by the sides of the comparison or by the metrics.
fn found(finding: &Finding) -> String {
    if let Some(reason) = &finding.reason {
        return reason.clone();
    }
    if let (Some(left), Some(right)) = (finding.left, finding.right) {
        return format!("{} against {}", short(left), short(right));
    }
    let values = finding.values.iter();
    let values = values.map(|(k, v)| format!("{k} = {}", v.map_or("null".to_owned(), short)));
    values.collect::<Vec<_>>().join(", ")
}

/// For a rule over one metric of two inputs, the one it names second being the standard: the name
/// of the first and `12.95 → 9.79 (−24.4 %)`.
fn change(finding: &Finding) -> Option<(String, String)> {
    let mut values: Vec<(&str, f64)> = Vec::new();
    for (reference, value) in &finding.values {
        values.push((reference, (*value)?));
    }
    let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
    let words: Vec<&str> = finding.rule.split(|c| !is_part(c)).collect();
    values.sort_by_key(|(reference, _)| words.iter().position(|word| word == reference));
    let [(name, after), (standard, before)] = values[..] else { return None };
    let metric = |reference: &str| reference.rsplit_once('.').map(|(_, m)| m.to_owned());
    if metric(name) != metric(standard) || before == 0.0 {
        return None;
    }
    let percent = 100.0 * (after / before - 1.0);
    Some((name.to_owned(), format!("{} → {} ({percent:+.1} %)", short(before), short(after))))
}

fn describe(finding: &Finding) -> String {
    format!("`{}` ({})", finding.rule, found(finding))
}

/// The rules with what was found.
fn table(required: &[Finding], warned: &[Finding]) -> String {
    let rows = required.iter().map(|f| (f, "FAIL")).chain(warned.iter().map(|f| (f, "warn")));
    let rows: Vec<_> = rows.map(|(f, no)| (if f.passed { "pass" } else { no }, f)).collect();
    let width = rows.iter().map(|(_, f)| f.rule.chars().count()).max().unwrap_or(0).max(4);
    let mut out = format!("{:<6}  {:<width$}  found\n", "result", "rule");
    for (result, finding) in rows {
        let _ = writeln!(out, "{result:<6}  {:<width$}  {}", finding.rule, found(finding));
    }
    out
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
