//! One side of a comparison: metrics with what they mean, and the samples behind them.

use std::collections::BTreeMap;
use std::path::Path;

use arrow_array::cast::AsArray;
use arrow_array::types::Float64Type;
use arrow_array::{Array, RecordBatch};
use lora_flow_core::{Artifact, Error, Result, ResultExt, nearest};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Map, Value};

use crate::metric::{Sample, Statistic};

/// Results of one evaluation, read from a Metrics artifact or from an accepted baseline.
#[derive(Debug, Clone)]
pub(crate) struct Side {
    /// What messages call it.
    pub(crate) name: String,
    /// Name → number; none where it is null.
    pub(crate) values: BTreeMap<String, Option<f64>>,
    pub(crate) meta: Value,
    rows: Rows,
}

/// Where the samples are.
#[derive(Debug, Clone)]
enum Rows {
    None,
    Parquet(std::path::PathBuf),
    /// Of an accepted baseline: groups of metrics with the digests of their rows.
    Kept(Vec<Value>),
}

/// What a metric is, for a test.
#[derive(Debug, Clone)]
pub(crate) struct MetricInfo {
    pub(crate) statistic: Statistic,
    pub(crate) higher_is_better: bool,
    task: Option<String>,
    columns: Vec<String>,
}

/// A sample with the row it is of.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    /// Digest of the row; equal in two runs if the row is.
    pub(crate) key: String,
    pub(crate) sample: Sample,
    /// The prompt or what else shows a person which row it is.
    pub(crate) shown: String,
}

impl Side {
    /// Reads a Metrics artifact.
    pub(crate) fn open(name: &str, artifact: &Artifact) -> Result<Self> {
        let text = fs_err::read_to_string(artifact.file("metrics.json")?)?;
        let json: Map<String, Value> =
            serde_json::from_str(&text).context("`metrics.json` is not a JSON object")?;
        let rows = artifact.get("samples.parquet");
        let rows = rows.map_or(Rows::None, |p| Rows::Parquet(p.to_owned()));
        Ok(Self::new(name, &json, rows))
    }

    /// A side of an accepted baseline, see [`crate::gate::accepted`].
    pub(crate) fn accepted(name: &str, entry: &Map<String, Value>) -> Self {
        let metrics = entry.get("metrics").and_then(Value::as_object).cloned().unwrap_or_default();
        let kept = entry.get("samples").and_then(Value::as_array).cloned().unwrap_or_default();
        Self::new(name, &metrics, Rows::Kept(kept))
    }

    fn new(name: &str, json: &Map<String, Value>, rows: Rows) -> Self {
        let values = json.iter().filter(|(key, _)| *key != "meta");
        let finite = |v: &Value| v.as_f64().filter(|x| x.is_finite());
        Self {
            name: name.to_owned(),
            values: values.map(|(key, value)| (key.clone(), finite(value))).collect(),
            meta: json.get("meta").cloned().unwrap_or_default(),
            rows,
        }
    }

    /// The digest of the data that it was measured on, if it says.
    pub(crate) fn data(&self) -> Option<&str> {
        self.meta["data"].as_str()
    }

    /// Metrics that have samples.
    pub(crate) fn metrics(&self) -> Vec<String> {
        let metrics = self.meta["metrics"].as_object();
        metrics.into_iter().flatten().map(|(name, _)| name.clone()).collect()
    }

    /// What a metric is.
    ///
    /// # Errors
    /// When there is none of the name, or it has no samples.
    pub(crate) fn info(&self, metric: &str) -> Result<MetricInfo> {
        let json = &self.meta["metrics"][metric];
        let statistic = json["statistic"].as_str().and_then(Statistic::named);
        let columns: Option<Vec<String>> = json["columns"]
            .as_array()
            .map(|c| c.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect());
        if let (Some(statistic), Some(columns)) = (statistic, columns) {
            return Ok(MetricInfo {
                statistic,
                columns,
                higher_is_better: json["higher_is_better"].as_bool().unwrap_or(true),
                task: json["task"].as_str().map(str::to_owned),
            });
        }
        let known = self.metrics();
        let there = self.values.contains_key(metric);
        let what = if there { "has no samples for" } else { "has no metric" };
        let error = Error::new(format!("`{}` {what} `{metric}`", self.name));
        Err(match nearest(metric, known.iter().map(String::as_str)) {
            Some(near) => error.with_hint(format!("did you mean `{near}`?")),
            None if known.is_empty() => {
                error.with_hint("it is no output of `evaluate` or `evaluate-tasks`")
            }
            None => error.with_hint(format!("metrics with samples: {}", known.join(", "))),
        })
    }

    /// The samples of a metric, in the order of the rows.
    pub(crate) fn rows(&self, metric: &str) -> Result<Vec<Row>> {
        let info = self.info(metric)?;
        match &self.rows {
            Rows::Parquet(path) => read_rows(path, &info),
            Rows::Kept(kept) => kept_rows(kept, metric).ok_or_else(|| {
                Error::new(format!("`{}` keeps no samples of `{metric}`", self.name))
            }),
            Rows::None => Err(Error::new(format!("`{}` has no `samples.parquet`", self.name))),
        }
        .with_context(|| format!("cannot read the samples of `{}`", self.name))
    }

    /// The path of `samples.parquet`.
    pub(crate) fn samples(&self) -> Option<&Path> {
        if let Rows::Parquet(path) = &self.rows { Some(path) } else { None }
    }
}

/// The batches of a Parquet file.
pub(crate) fn batches(path: &Path) -> Result<Vec<RecordBatch>> {
    let file = fs_err::File::open(path)?;
    let reader = ParquetRecordBatchReaderBuilder::try_new(file.into_parts().0)
        .and_then(|b| b.build())
        .context("cannot read `samples.parquet`")?;
    reader.map(|b| b.context("cannot read `samples.parquet`")).collect()
}

/// A cell of text; none where the column or the value is missing.
pub(crate) fn text_at<'a>(batch: &'a RecordBatch, column: &str, row: usize) -> Option<&'a str> {
    let column = batch.column_by_name(column)?.as_string_opt::<i32>()?;
    (!column.is_null(row)).then(|| column.value(row))
}

/// A cell that is a number or a list of numbers.
fn numbers_at(batch: &RecordBatch, column: &str, row: usize) -> Option<Vec<f64>> {
    let column = batch.column_by_name(column)?;
    if column.is_null(row) {
        return None;
    }
    if let Some(list) = column.as_list_opt::<i32>() {
        let items = list.value(row);
        return Some(items.as_primitive_opt::<Float64Type>()?.values().to_vec());
    }
    if let Some(numbers) = column.as_primitive_opt::<Float64Type>() {
        return Some(vec![numbers.value(row)]);
    }
    let whole = column.as_primitive_opt::<arrow_array::types::UInt32Type>()?;
    Some(vec![f64::from(whole.value(row))])
}

fn read_rows(path: &Path, info: &MetricInfo) -> Result<Vec<Row>> {
    let mut out = Vec::new();
    for batch in batches(path)? {
        for row in 0..batch.num_rows() {
            let task = text_at(&batch, "task", row);
            if info.task.is_some() && task != info.task.as_deref() {
                continue;
            }
            let mut sample = Vec::new();
            for column in &info.columns {
                sample.extend(numbers_at(&batch, column, row).ok_or_else(|| {
                    Error::new(format!("row {row} has no number in the column `{column}`"))
                })?);
            }
            if sample.len() != info.statistic.width() || sample.iter().any(|x| !x.is_finite()) {
                return Err(Error::new(format!(
                    "row {row} has {sample:?} where {} finite numbers are expected",
                    info.statistic.width()
                )));
            }
            let key = text_at(&batch, "doc_hash", row).or_else(|| text_at(&batch, "digest", row));
            let key = key.ok_or_else(|| Error::new(format!("row {row} has no digest")))?;
            let shown = text_at(&batch, "prompt", row).filter(|p| !p.is_empty());
            let shown = shown.or_else(|| text_at(&batch, "target", row)).unwrap_or(key);
            out.push(Row { key: key.to_owned(), sample, shown: shorten(shown) });
        }
    }
    Ok(out)
}

fn kept_rows(kept: &[Value], metric: &str) -> Option<Vec<Row>> {
    let group = kept.iter().find(|group| group["values"][metric].is_array())?;
    let (keys, samples) = (group["rows"].as_array()?, group["values"][metric].as_array()?);
    let row = |(key, sample): (&Value, &Value)| {
        let key = key.as_str()?.to_owned();
        let sample: Option<Sample> = match sample {
            Value::Array(items) => items.iter().map(Value::as_f64).collect(),
            number => number.as_f64().map(|x| vec![x]),
        };
        Some(Row { shown: key.clone(), key, sample: sample? })
    };
    (keys.len() == samples.len()).then(|| keys.iter().zip(samples).map(row).collect())?
}

/// The end of a text in one line: prompts differ at their end.
fn shorten(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let count = line.chars().count();
    if count <= 100 {
        return line;
    }
    format!("…{}", line.chars().skip(count - 100).collect::<String>())
}

/// The pairs of two sides for a metric: rows that are equal by digest, twins in their order.
///
/// # Errors
/// When the sides were not measured on the same rows with the same prompts, or mean different
/// things by the metric.
pub(crate) fn pair(
    metric: &str,
    candidate: &Side,
    baseline: &Side,
    different_prompts: bool,
) -> Result<(MetricInfo, Vec<Row>, Vec<Row>)> {
    let (info, other) = (candidate.info(metric)?, baseline.info(metric)?);
    let names = format!("`{}` and `{}`", candidate.name, baseline.name);
    let refuse =
        |what: String| Error::new(format!("{names} cannot be compared on `{metric}`: {what}"));
    if info.statistic != other.statistic || info.higher_is_better != other.higher_is_better {
        return Err(refuse("they mean different things by it".into()));
    }
    for (key, what) in [("tokenizer", "tokenizer"), ("prompts", "way of making prompts")] {
        let (a, b) = (&candidate.meta[key], &baseline.meta[key]);
        if key == "prompts" && different_prompts {
            continue;
        }
        if a != b && !a.is_null() && !b.is_null() {
            return Err(refuse(format!("another {what}{}", differing(a, b))));
        }
    }
    if let Some(task) = info.task.as_ref().filter(|_| !different_prompts) {
        let (a, b) = (&candidate.meta["tasks"][task], &baseline.meta["tasks"][task]);
        if a["config"] != b["config"] {
            return Err(refuse(format!(
                "the task file differs{}",
                differing(&a["config"], &b["config"])
            )));
        }
        if a["rows"] == b["rows"] && a["prompts"] != b["prompts"] {
            return Err(refuse("the same rows were asked with other prompts".into()));
        }
    }
    let (rows, others) = (candidate.rows(metric)?, baseline.rows(metric)?);
    // Accepted baselines keep the beginning of each digest.
    let length = rows.iter().chain(&others).map(|r| r.key.len()).min().unwrap_or(0);
    let mut left: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
    for row in others.iter().rev() {
        left.entry(&row.key[..length]).or_default().push(row);
    }
    let mut paired = Vec::with_capacity(rows.len());
    for row in &rows {
        match left.get_mut(&row.key[..length]).and_then(Vec::pop) {
            Some(twin) => paired.push(twin.clone()),
            None => {
                let (n, m) = (rows.len(), others.len());
                let message =
                    format!("other rows ({n} and {m}); the first that is missing: {}", row.shown);
                return Err(refuse(message)
                    .with_hint("evaluate both on the same rows and the same `limit`"));
            }
        }
    }
    if rows.len() != others.len() {
        return Err(refuse(format!("{} rows and {}", rows.len(), others.len())));
    }
    Ok((info, rows, paired))
}

/// The keys whose values differ.
fn differing(a: &Value, b: &Value) -> String {
    let (Some(a), Some(b)) = (a.as_object(), b.as_object()) else { return String::new() };
    let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    let keys: Vec<String> =
        keys.into_iter().filter(|k| a.get(*k) != b.get(*k)).map(|k| format!("`{k}`")).collect();
    if keys.is_empty() { String::new() } else { format!(" ({})", keys.join(", ")) }
}
