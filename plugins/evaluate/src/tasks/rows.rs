//! The rows of a task's splits, and the digests that pair the samples of two runs.

use lora_flow_core::{Artifact, Error, Result, ResultExt, TaskContext, nearest};
use lora_flow_data::{DataFile, Table, cell, dataset_files};
use minijinja::Value;
use sha2::{Digest as _, Sha256};

use crate::tasks::task_file::TaskFile;

/// A split: its rows as templates see them.
#[derive(Debug, Clone)]
pub(crate) struct Rows {
    pub(crate) columns: Vec<String>,
    pub(crate) rows: Vec<Value>,
    /// What messages call a row: file and number.
    pub(crate) places: Vec<String>,
}

impl Rows {
    fn read(files: Vec<DataFile>, limit: Option<usize>) -> Result<Self> {
        let table = Table::open(files, &[])?;
        let columns: Vec<String> = table.columns().into_iter().map(str::to_owned).collect();
        let limit = limit.unwrap_or(usize::MAX);
        let (mut rows, mut places) = (Vec::new(), Vec::new());
        'all: for batch in table.scan(&columns)? {
            let batch = batch?;
            for row in 0..batch.rows.num_rows() {
                if rows.len() == limit {
                    break 'all;
                }
                let cells = columns.iter().zip(batch.rows.columns());
                rows.push(Value::from_pairs(
                    cells.map(|(name, column)| (name.as_str(), cell(column.as_ref(), row))),
                ));
                places.push(batch.place(row));
            }
        }
        Ok(Self { columns, rows, places })
    }

    /// Rows given in the task file itself.
    pub(crate) fn written(samples: &[serde_json::Value]) -> Self {
        let rows: Vec<Value> = samples.iter().map(lora_flow_data::jinja::from_json).collect();
        let places = (0..rows.len()).map(|i| format!("example {}", i + 1)).collect();
        Self { columns: Vec::new(), rows, places }
    }
}

/// Where a task's rows come from.
pub(crate) struct Source<'a> {
    pub(crate) task: &'a TaskFile,
    /// Outside files of the parameter `data_files`.
    pub(crate) files: Vec<std::path::PathBuf>,
    pub(crate) data: Option<(&'a Artifact, String)>,
    pub(crate) fewshot: Option<(&'a Artifact, String)>,
}

impl<'a> Source<'a> {
    /// The source of a task, from the inputs and files of the context.
    pub(crate) fn new(
        task: &'a TaskFile,
        cx: &'a TaskContext,
        files: Vec<std::path::PathBuf>,
    ) -> Self {
        let input = |port: &str| cx.many(port).first().map(|n| (&n.artifact, n.reference.clone()));
        Self { task, files, data: input("data"), fewshot: input("fewshot") }
    }

    /// The rows to evaluate.
    pub(crate) fn eval(&self, limit: Option<usize>) -> Result<Rows> {
        let rows = match &self.data {
            Some((artifact, reference)) => Rows::read(dataset_files(artifact, reference)?, limit),
            None => self.split(self.task.eval_split(), limit),
        }?;
        if rows.rows.is_empty() {
            return Err(Error::new(format!(
                "{}: the split `{}` is empty, so there is nothing to evaluate",
                self.task.place("/test_split"),
                self.task.eval_split()
            )));
        }
        Ok(rows)
    }

    /// The rows that examples are taken from, and whether the row that is asked about may be among
    /// them.
    pub(crate) fn examples(&self) -> Result<(Rows, bool)> {
        let task = self.task;
        if let Some((artifact, reference)) = &self.fewshot {
            return Ok((Rows::read(dataset_files(artifact, reference)?, None)?, false));
        }
        if let Some(split) = &task.fewshot.split {
            let same = Some(split) == task.test_split.as_ref();
            let rows = match &self.data {
                Some((artifact, reference)) if same => {
                    Rows::read(dataset_files(artifact, reference)?, None)
                }
                _ => self.split(split, None),
            };
            return Ok((rows?, same));
        }
        if let Some(samples) = &task.fewshot.samples {
            // The harness: without a split for either, the row asked about is taken out.
            return Ok((Rows::written(samples), task.test_split.is_none()));
        }
        // The harness's rule for a file that names none; it would go on to the test split, which
        // shows the model the answer.
        let split =
            task.training_split.as_ref().or(task.validation_split.as_ref()).ok_or_else(|| {
                Error::new(format!(
                    "{}: `num_fewshot` is {} but no split is there to take examples from",
                    task.place("/num_fewshot"),
                    task.num_fewshot
                ))
                .with_hint("name one with `fewshot_split`, or connect the input `fewshot`")
            })?;
        Ok((self.split(split, None)?, task.test_split.is_none()))
    }

    fn split(&self, split: &str, limit: Option<usize>) -> Result<Rows> {
        let task = self.task;
        let place = || task.place("/dataset_kwargs/data_files");
        let Some(names) = task.data_files.get(split) else {
            let known: Vec<&str> = task.data_files.keys().map(String::as_str).collect();
            let error = Error::new(format!("{}: there is no split `{split}`", place()));
            return Err(match nearest(split, known.iter().copied()) {
                Some(near) => error.with_hint(format!("did you mean `{near}`?")),
                None if known.is_empty() => error.with_hint(
                    "connect the input `data`, or name files under `dataset_kwargs: { data_files: … }`",
                ),
                None => error.with_hint(format!("splits of this file: {}", known.join(", "))),
            });
        };
        let files = names.iter().map(|name| {
            let wanted = std::path::Path::new(name.trim_start_matches("./"));
            let path = self.files.iter().find(|p| p.ends_with(wanted)).ok_or_else(|| {
                Error::new(format!("{}: `{name}` is not among the task's `data_files`", place()))
                    .with_hint(format!("declare it: `with: {{ data_files: {name} }}`"))
            })?;
            DataFile::new(name.as_str(), path, task.format)
        });
        Rows::read(files.collect::<Result<_>>()?, limit)
            .with_context(|| format!("{}: split `{split}`", place()))
    }
}

/// SHA-256 of a text in hex, as the harness hashes samples.
pub(crate) fn sha256(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|b| format!("{b:02x}")).collect()
}
