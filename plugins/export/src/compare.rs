//! `compare`: runs side by side, one row each.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use lora_flow_core::{
    ArtifactKind, Error, NamedArtifact, Ports, Result, ResultExt, Task, TaskContext,
};
use lora_flow_data::group_digits;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Parameters of `compare`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Compare {
    /// Which numbers, in the order of the columns: names of `runs` or of `evals`.
    pub metrics: Vec<String>,
}

/// Metrics of one run: name → number.
type Numbers = BTreeMap<String, f64>;

impl Task for Compare {
    fn inputs(&self) -> Ports {
        Ports::none().many("runs", &[ArtifactKind::Metrics], true, "one row for each").many(
            "evals",
            &[ArtifactKind::Metrics],
            false,
            "further numbers of the runs: by the same matrix values, or in the same order",
        )
    }

    fn outputs(&self) -> Ports {
        Ports::none().required("metrics", ArtifactKind::Metrics, "`table.md`, and each number")
    }

    fn run(&self, cx: &mut TaskContext) -> Result<()> {
        let mut rows = read(cx.many("runs"))?;
        let evals = read(cx.many("evals"))?;
        let by_name = evals.iter().all(|(name, _)| rows.iter().any(|(row, _)| row == name));
        if !by_name && evals.len() != rows.len() {
            return Err(Error::new(format!(
                "there are {} runs and {} evals, and they do not go together by name",
                rows.len(),
                evals.len()
            ))
            .with_hint("give both the same matrix, or list them in the same order"));
        }
        for (i, (name, numbers)) in evals.into_iter().enumerate() {
            let at = if by_name { rows.iter().position(|(row, _)| *row == name) } else { Some(i) };
            if let Some((_, row)) = at.and_then(|at| rows.get_mut(at)) {
                row.extend(numbers);
            }
        }
        for name in &self.metrics {
            if !rows.iter().any(|(_, row)| row.contains_key(name)) {
                let known: std::collections::BTreeSet<_> =
                    rows.iter().flat_map(|(_, row)| row.keys().map(String::as_str)).collect();
                let error = Error::new(format!("none of the runs has a metric `{name}`"));
                return Err(match lora_flow_core::nearest(name, known.iter().copied()) {
                    Some(near) => error.with_hint(format!("did you mean `{near}`?")),
                    None => error,
                });
            }
        }
        let table = self.table(&rows);
        let flat: Numbers = rows
            .iter()
            .flat_map(|(row, numbers)| {
                let named = self.metrics.iter().filter_map(|m| Some((m, *numbers.get(m)?)));
                named.map(move |(m, value)| (format!("{row}.{m}"), value))
            })
            .collect();
        let out = cx.output("metrics")?;
        out.write("table.md", &table)?;
        out.write_json("metrics.json", &flat)?;
        cx.report(&table);
        cx.summary("runs", rows.len().to_string());
        Ok(())
    }
}

impl Compare {
    fn table(&self, rows: &[(String, Numbers)]) -> String {
        let mut cells = vec![
            ["run"].into_iter().map(str::to_owned).chain(self.metrics.clone()).collect::<Vec<_>>(),
        ];
        for (name, numbers) in rows {
            let values =
                self.metrics.iter().map(|m| numbers.get(m).map_or("–".into(), |v| number(*v)));
            cells.push([name.clone()].into_iter().chain(values).collect());
        }
        let width =
            |column: usize| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<_> = (0..=self.metrics.len()).map(width).collect();
        let mut out = String::new();
        for (i, row) in cells.iter().enumerate() {
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                // Writing to a string cannot fail.
                let _ = match column {
                    0 => write!(out, "| {cell:<width$} "),
                    _ => write!(out, "| {cell:>width$} "),
                };
            }
            out.push_str("|\n");
            if i == 0 {
                for (column, width) in widths.iter().enumerate() {
                    let dashes = "-".repeat(*width + 1);
                    let _ = if column == 0 {
                        write!(out, "|{dashes}-")
                    } else {
                        write!(out, "|{dashes}:")
                    };
                }
                out.push_str("|\n");
            }
        }
        out
    }
}

/// Label and metrics of each: `r=8` of `train[r=8].metrics`, or the task's name.
fn read(artifacts: &[NamedArtifact]) -> Result<Vec<(String, Numbers)>> {
    artifacts
        .iter()
        .map(|named| {
            let reference = named.reference.as_str();
            let task = reference.rsplit_once('.').map_or(reference, |(task, _)| task);
            let task = if task.contains('[') && !task.ends_with(']') { reference } else { task };
            let label = task.split_once('[').map_or(task, |(_, rest)| rest.trim_end_matches(']'));
            let text = fs_err::read(named.artifact.file("metrics.json")?)?;
            let values: BTreeMap<String, Value> = serde_json::from_slice(&text)
                .with_context(|| format!("cannot read the metrics of `{reference}`"))?;
            let numbers = values.into_iter().filter_map(|(k, v)| Some((k, v.as_f64()?)));
            Ok((label.to_owned(), numbers.collect()))
        })
        .collect()
}

/// Whole numbers in groups of three, others with four digits that count.
fn number(v: f64) -> String {
    if v.fract() == 0.0 && v.abs() < 1e15 {
        let digits = group_digits(v.abs() as u64);
        return if v < 0.0 { format!("-{digits}") } else { digits };
    }
    let decimals = (3 - v.abs().log10().floor() as i64).clamp(0, 9) as usize;
    format!("{v:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_whole_ones_grouped() {
        let shown = [1234567.0, -12.0, 0.0, 3.4567, 0.000123456, 1234.5678].map(number);
        assert_eq!(shown, ["1,234,567", "-12", "0", "3.457", "0.0001235", "1235"]);
    }
}
