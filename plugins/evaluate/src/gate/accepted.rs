//! Accepted baselines: what a release was judged by, in a small file that lives in git.
//!
//! `lora-flow accept RUN` writes it, `max_regression` compares with it. It holds the metrics, what
//! they were measured on (digests of rows, prompts, tokenizer, model and adapter), and of each
//! metric the samples, so that the comparison is paired like any other.

use lora_flow_core::{Artifact, Error, Problem, Result, ResultExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::gate::paired::{candidate, confidence};
use crate::gate::side::Side;

/// Version of the file.
const FORMAT: u64 = 1;
/// Characters kept of a row's digest: enough to tell the rows of a test set apart.
const KEY: usize = 16;

/// A comparison with the last accepted run.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MaxRegression {
    /// The metric, as it stands in `metrics.json`.
    pub metric: String,
    /// Input that is judged.
    #[serde(default = "candidate")]
    pub candidate: String,
    /// What the accepted file calls its results; the same task's if left out.
    #[serde(default)]
    pub accepted_as: Option<String>,
    /// How much worse it may be, in units of the metric.
    #[serde(default)]
    pub margin: f64,
    /// Confidence of the one-sided bound.
    #[serde(default = "confidence")]
    pub confidence: f64,
}

impl MaxRegression {
    pub(crate) fn check(&self, pointer: &str) -> Vec<Problem> {
        crate::gate::paired::check(pointer, self.margin, self.confidence)
    }
}

/// The name under which results are accepted: the reference without the usual output's name.
pub fn accepted_name(reference: &str) -> &str {
    reference.strip_suffix(".metrics").unwrap_or(reference)
}

/// What the file keeps of one Metrics artifact.
///
/// # Errors
/// When its samples cannot be read.
pub fn accepted_entry(reference: &str, artifact: &Artifact) -> Result<Value> {
    let side = Side::open(reference, artifact)?;
    let text = fs_err::read_to_string(artifact.file("metrics.json")?)?;
    let metrics: Value = serde_json::from_str(&text).context("`metrics.json`")?;
    // Metrics of the same rows share the list of their digests.
    let mut samples: Vec<(Vec<String>, Map<String, Value>)> = Vec::new();
    for metric in side.metrics() {
        let rows = side.rows(&metric)?;
        let keys: Vec<String> = rows.iter().map(|r| r.key.chars().take(KEY).collect()).collect();
        let values: Vec<Value> = rows
            .iter()
            .map(|row| match row.sample.as_slice() {
                [one] => compact(*one),
                many => many.iter().map(|x| compact(*x)).collect(),
            })
            .collect();
        let at = samples.iter().position(|(rows, _)| *rows == keys).unwrap_or_else(|| {
            samples.push((keys, Map::new()));
            samples.len() - 1
        });
        samples[at].1.insert(metric, Value::Array(values));
    }
    let samples: Vec<Value> = samples
        .into_iter()
        .map(|(rows, values)| json!({ "rows": rows, "values": values }))
        .collect();
    Ok(json!({ "digest": artifact.digest, "metrics": metrics, "samples": samples }))
}

/// Whole numbers without a fraction, others with seven digits.
fn compact(x: f64) -> Value {
    if x == x.trunc() && x.abs() < 1e15 {
        return json!(x as i64);
    }
    format!("{x:.6e}").parse::<f64>().map_or(Value::Null, Value::from)
}

/// The whole file; one line per list, so that a change of numbers is a small diff.
pub fn accepted_file(facts: &Value, entries: &Map<String, Value>) -> String {
    let mut file = json!({ "format": FORMAT });
    if let (Some(file), Some(facts)) = (file.as_object_mut(), facts.as_object()) {
        file.extend(facts.clone());
        file.insert("results".into(), Value::Object(entries.clone()));
    }
    let mut out = String::new();
    lines(&file, 0, &mut out);
    out.push('\n');
    out
}

/// Objects, and lists of them, over lines; everything else on one.
fn lines(value: &Value, depth: usize, out: &mut String) {
    if let Some(items) = value.as_array().filter(|a| a.iter().any(Value::is_object)) {
        out.push('[');
        for (i, item) in items.iter().enumerate() {
            lines(item, depth, out);
            out.push_str(if i + 1 < items.len() { ", " } else { "]" });
        }
        return;
    }
    let Some(map) = value.as_object().filter(|m| !m.is_empty()) else {
        out.push_str(&value.to_string());
        return;
    };
    out.push_str("{\n");
    for (i, (key, value)) in map.iter().enumerate() {
        out.extend(std::iter::repeat_n("  ", depth + 1));
        out.push_str(&format!("{}: ", Value::from(key.as_str())));
        lines(value, depth + 1, out);
        out.push_str(if i + 1 < map.len() { ",\n" } else { "\n" });
    }
    out.extend(std::iter::repeat_n("  ", depth));
    out.push('}');
}

/// The results of one name in a file.
pub(crate) fn read(path: &std::path::Path, name: &str) -> Result<Side> {
    let text = fs_err::read_to_string(path)?;
    let shown = path.file_name().unwrap_or_default().to_string_lossy();
    let file: Value = serde_json::from_str(&text)
        .with_context(|| format!("`{shown}` is no accepted baseline"))?;
    if file["format"] != FORMAT {
        return Err(Error::new(format!(
            "`{shown}` has format {}, this is {FORMAT}",
            file["format"]
        ))
        .with_hint("write it again with `lora-flow accept`"));
    }
    let Some(entry) = file["results"][name].as_object() else {
        let known: Vec<&str> =
            file["results"].as_object().into_iter().flatten().map(|(k, _)| k.as_str()).collect();
        return Err(Error::new(format!("`{shown}` has no results of `{name}`"))
            .with_hint(format!("it has {}; name one with `accepted_as`", known.join(", "))));
    };
    Ok(Side::accepted(&format!("{name} in {shown}"), entry))
}
