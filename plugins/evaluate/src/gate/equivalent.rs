//! `merge_equivalent`: the merged model says what base and adapter say, row by row.

use std::collections::BTreeMap;

use arrow_array::Array;
use arrow_array::cast::AsArray;
use arrow_array::types::Float64Type;
use lora_flow_core::{Error, Problem, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::gate::named::Named;
use crate::gate::side::{Side, batches, text_at};
use crate::short;

/// Rows listed in the verdict.
const LISTED: usize = 20;

/// Two evaluations that should say the same.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MergeEquivalent {
    /// Results of the merged model.
    pub merged: String,
    /// Results of base and adapter on the same rows.
    pub adapted: String,
    /// Largest difference |Δ| of a row's log-likelihood, in nats.
    #[serde(default = "tolerance")]
    pub tolerance: f64,
    /// Rows whose answer may differ, as a share of all.
    #[serde(default)]
    pub max_changed_share: f64,
}

fn tolerance() -> f64 {
    0.05
}

/// What a model said of a row.
struct Said {
    loglikelihoods: Vec<f64>,
    answer: Option<String>,
    prompt: Option<String>,
}

impl MergeEquivalent {
    pub(crate) fn check(&self, pointer: &str) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (field, value) in
            [("tolerance", self.tolerance), ("max_changed_share", self.max_changed_share)]
        {
            if !(value >= 0.0 && value.is_finite()) {
                let message = format!("`{field}` is {value}, it must not be negative");
                problems.push(Problem::at(format!("{pointer}/{field}"), message));
            }
        }
        problems
    }

    /// Compares row by row.
    ///
    /// # Errors
    /// When the two have other rows, or nothing to compare.
    pub(crate) fn judge(&self, merged: &Side, adapted: &Side) -> Result<Named> {
        let (a, b) = (said(merged)?, said(adapted)?);
        if a.keys().ne(b.keys()) {
            return Err(Error::new(format!(
                "`{}` and `{}` were not asked the same: {} and {} rows",
                merged.name,
                adapted.name,
                a.len(),
                b.len()
            ))
            .with_hint("evaluate both on the same rows and the same `limit`"));
        }
        let (mut worst, mut compared, mut changed, mut rows) = (0f64, 0usize, 0usize, Vec::new());
        // Rows about which neither side said anything: two silences are no agreement.
        let mut silent = 0usize;
        for (key, (now, before)) in a.keys().zip(a.values().zip(b.values())) {
            if now.prompt != before.prompt {
                return Err(Error::new("the same rows were asked with other prompts"));
            }
            let pairs = now.loglikelihoods.iter().zip(&before.loglikelihoods);
            let apart = pairs.map(|(x, y)| (x - y).abs());
            // A NaN on either side is a difference, not nothing.
            let apart =
                apart.fold(0f64, |max, d| if d.is_finite() { max.max(d) } else { f64::INFINITY });
            compared += now.loglikelihoods.len();
            silent += usize::from(now.loglikelihoods.is_empty() && now.answer.is_none());
            worst = worst.max(apart);
            let other = now.answer != before.answer
                || now.loglikelihoods.len() != before.loglikelihoods.len();
            changed += usize::from(other);
            if (other || apart > self.tolerance) && rows.len() < LISTED {
                rows.push(json!({ "row": key.1, "task": key.0, "difference": apart,
                    "merged": now.answer, "adapted": before.answer }));
            }
        }
        let n = a.len();
        let share = changed as f64 / n.max(1) as f64;
        let details = json!({
            "n": n,
            "loglikelihoods": compared,
            "max_difference": if worst.is_finite() { Some(worst) } else { None },
            "tolerance": self.tolerance,
            "changed_answers": changed,
            "max_changed_share": self.max_changed_share,
            "rows": rows,
        });
        if n == 0 || silent > 0 {
            let headline = format!("{silent} of {n} rows have neither log-likelihood nor answer");
            return Ok(Named::settled(false, headline, details));
        }
        let headline = format!(
            "max |Δ log-likelihood| {} over {n} rows, {changed} other answers",
            short(worst)
        );
        let passed = worst <= self.tolerance && share <= self.max_changed_share;
        Ok(Named::settled(passed, headline, details))
    }
}

/// What was said, by task, digest of the row, and number among its twins.
fn said(side: &Side) -> Result<BTreeMap<(String, String, usize), Said>> {
    let path = side.samples().ok_or_else(|| {
        Error::new(format!("`{}` has no `samples.parquet`, so rows cannot be compared", side.name))
    })?;
    let mut out = BTreeMap::new();
    for batch in batches(path)? {
        for row in 0..batch.num_rows() {
            let text = |column: &str| text_at(&batch, column, row).map(str::to_owned);
            let key = text("doc_hash").or_else(|| text("digest"));
            let key =
                key.ok_or_else(|| Error::new(format!("`{}` has rows without digest", side.name)))?;
            let lls = match batch.column_by_name("loglikelihoods") {
                Some(column) => column.as_list::<i32>().value(row),
                None => match batch.column_by_name("loglikelihood") {
                    Some(column) => column.slice(row, 1),
                    None => {
                        return Err(Error::new(format!("`{}` has no log-likelihoods", side.name)));
                    }
                },
            };
            let said = Said {
                // A null is a number that is missing.
                loglikelihoods: lls
                    .as_primitive::<Float64Type>()
                    .iter()
                    .map(|x| x.unwrap_or(f64::NAN))
                    .collect(),
                answer: text("prediction"),
                prompt: text("prompt_hash"),
            };
            let task = text("task").unwrap_or_default();
            let twins = (0..).find(|i| !out.contains_key(&(task.clone(), key.clone(), *i)));
            out.insert((task, key, twins.unwrap_or(0)), said);
        }
    }
    Ok(out)
}
