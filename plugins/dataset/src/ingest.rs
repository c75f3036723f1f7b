//! `ingest`: rows from files, filtered, freed of duplicates, split, as Parquet.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::Arc;

use arrow_array::{Array, ArrayRef, BooleanArray, RecordBatch};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use arrow_select::filter::filter_record_batch;
use lora_flow_core::{
    ArtifactKind, Error, FileRef, Ports, Problem, Result, ResultExt, Task, TaskContext,
};
use lora_flow_data::{
    Batch, DataFile, DatasetInfo, DatasetWriter, Deduplicator, FileFormat, RowFilter, RowHash,
    Splitter, Table, dataset_files, group_digits, hash_row,
};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::params::{Columns, Dedup, Names};
use crate::selection::Selection;

/// Parameters of `ingest`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ingest {
    /// Files to read: a path, a folder, a glob, or a list of these, relative to the pipeline's
    /// root. Leave it out to take the rows from the input `files`.
    #[serde(default)]
    pub files: Option<Names>,
    /// Format of the files, where their extension (`.parquet`, `.jsonl`, `.ndjson`, `.json`,
    /// `.csv`) does not tell.
    #[serde(default)]
    pub format: Option<Format>,
    /// Column that holds the text; it must hold text, and is called `text` from here on.
    #[serde(default)]
    pub text: Option<String>,
    /// Columns to keep: a list, or new name → old name. All, if left out.
    #[serde(default)]
    pub columns: Option<Columns>,
    /// Keep only rows for which this holds, such as `text | length > 100 and book == 'nomicon'`.
    /// A Jinja expression over the columns, by their new names; columns that are not kept are
    /// seen too. `text is matching('^#')` tests a regular expression.
    #[serde(default, rename = "where")]
    pub condition: Option<String>,
    /// Remove rows that are equal to an earlier one: in the text (`true`), or in a list of
    /// columns. Without a `text` column `true` compares all kept columns of text.
    #[serde(default)]
    pub dedup: Dedup,
    /// Outputs and the fraction of rows each gets, such as `{ train: 0.9, eval: 0.1 }`; they add
    /// up to 1. A row's place depends on its content and `seed` alone, so equal rows stay together
    /// and new rows move no old ones; fractions are met on average.
    #[serde(default)]
    pub split: BTreeMap<String, f64>,
    /// Column whose equal values stay in one split, such as a book or an author.
    #[serde(default)]
    pub split_by: Option<String>,
    /// Seed of the split.
    #[serde(default)]
    pub seed: u64,
    /// Take at most this many rows, the first that are left after `where` and `dedup`.
    #[serde(default)]
    pub limit: Option<u64>,
}

/// A kind of file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Apache Parquet.
    Parquet,
    /// One JSON object a line.
    Jsonl,
    /// Comma-separated values with a header line.
    Csv,
}

impl From<Format> for FileFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Parquet => Self::Parquet,
            Format::Jsonl => Self::Jsonl,
            Format::Csv => Self::Csv,
        }
    }
}

/// Output of a task without `split`.
const DATASET: &str = "dataset";

impl Task for Ingest {
    fn inputs(&self) -> Ports {
        match self.files {
            Some(_) => Ports::none(),
            None => Ports::none().many(
                "files",
                &[ArtifactKind::Files, ArtifactKind::Dataset],
                true,
                "rows made by other tasks, instead of `with.files`",
            ),
        }
    }

    fn outputs(&self) -> Ports {
        if self.split.is_empty() {
            return Ports::none().required(DATASET, ArtifactKind::Dataset, "the rows");
        }
        self.split.keys().fold(Ports::none(), |ports, name| {
            ports.required(name, ArtifactKind::Dataset, "the rows of this split")
        })
    }

    fn files(&self) -> Vec<FileRef> {
        let files = self.files.iter().flat_map(|files| files.with_pointers("/files"));
        files.map(|(pointer, pattern)| FileRef { pointer, pattern: pattern.to_owned() }).collect()
    }

    fn validate(&self) -> Vec<Problem> {
        let mut out = Vec::new();
        if self.files == Some(Names::Many(Vec::new())) {
            out.push(Problem::at("/files", "`files` is an empty list"));
        }
        self.check_columns(&mut out);
        if let Some(condition) = &self.condition
            && let Err(e) = RowFilter::parse(condition)
        {
            out.push(problem("/where", &e));
        }
        if self.dedup == Dedup::By(Vec::new()) {
            out.push(Problem::at("/dedup", "`dedup` names no column").with_hint("or set `true`"));
        }
        self.check_split(&mut out);
        if self.limit == Some(0) {
            out.push(Problem::at("/limit", "`limit` of 0 leaves no rows"));
        }
        out
    }

    fn run(&self, cx: &mut TaskContext) -> Result<()> {
        let files = self.data_files(cx)?;
        let file_count = files.len();
        cx.progress(0, None, "row", "looking into the files");
        let table = Table::open(files, &self.text.iter().map(String::as_str).collect::<Vec<_>>())?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(cx.threads())
            .build()
            .context("cannot start threads")?;

        let mut rows = Rows::new(self, &table)?;
        let mut outputs = self.writers(cx, &rows.schema)?;
        // On a thread of the pool, which encodes what is written: reading takes one of the task's
        // threads and not one more.
        pool.install(|| self.copy(cx, &table, &mut rows, &mut outputs))?;
        rows.counts.check(self)?;
        let splits = match &rows.splitter {
            Some(splitter) => splitter.finish()?,
            None => Vec::new(),
        };
        let finish = || outputs.into_iter().map(DatasetWriter::finish).collect::<Result<Vec<_>>>();
        let infos = pool.install(finish)?;

        cx.report(rows.report(self, file_count, table.rows(), &infos));
        cx.summary("rows", group_digits(rows.counts.kept));
        for split in splits {
            cx.summary(split.name, group_digits(split.rows));
        }
        Ok(())
    }
}

impl Ingest {
    /// Reads the table and gives what is kept of it to the outputs.
    fn copy(
        &self,
        cx: &TaskContext,
        table: &Table,
        rows: &mut Rows,
        outputs: &mut [DatasetWriter],
    ) -> Result<()> {
        if let ([output], true) = (&mut *outputs, rows.all_are_kept(self)) {
            return output.write_table(table, &mut |done| {
                (rows.counts.read, rows.counts.kept) = (done, done);
                cx.progress(done, Some(table.rows()), "row", "");
                cx.check_cancelled()
            });
        }
        for batch in table.scan(&rows.selection.read)? {
            cx.check_cancelled()?;
            let batch = batch?;
            let destinations = rows.destinations(&batch)?;
            let kept = rows.kept(&batch)?;
            for (i, output) in outputs.iter_mut().enumerate() {
                let mask: Vec<bool> = destinations.iter().map(|d| *d == Some(i)).collect();
                let part = filter_record_batch(&kept, &BooleanArray::from(mask))
                    .context("cannot select rows")?;
                output.write(&part)?;
            }
            cx.progress(rows.counts.read, Some(table.rows()), "row", "");
            if self.limit.is_some_and(|limit| rows.counts.kept >= limit) {
                break;
            }
        }
        Ok(())
    }

    fn check_columns(&self, out: &mut Vec<Problem>) {
        let Some(columns) = &self.columns else { return };
        let pairs = columns.pairs();
        if pairs.is_empty() {
            out.push(
                Problem::at("/columns", "`columns` names no column")
                    .with_hint("leave it out to keep all"),
            );
        }
        let mut seen = BTreeSet::new();
        for (new, _) in &pairs {
            if !seen.insert(new) {
                out.push(Problem::at("/columns", format!("`columns` names `{new}` twice")));
            }
        }
        let other =
            pairs.iter().find(|(new, old)| new == "text" && Some(old) != self.text.as_ref());
        if let (Some(text), Some((_, old))) = (&self.text, other) {
            out.push(Problem::at(
                "/columns",
                format!(
                    "both `{text}` (by `text`) and `{old}` (by `columns`) would be called `text`"
                ),
            ));
        }
    }

    fn check_split(&self, out: &mut Vec<Problem>) {
        if self.split.is_empty() {
            if self.split_by.is_some() {
                out.push(
                    Problem::at("/split_by", "`split_by` without `split` does nothing")
                        .with_hint("for example `split: { train: 0.9, eval: 0.1 }`"),
                );
            }
            return;
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        for name in self.split.keys() {
            if name.is_empty() || !name.chars().all(plain) {
                out.push(
                    Problem::at("/split", format!("`{name}` cannot name an output"))
                        .with_hint("use letters, digits, `_` and `-`"),
                );
            }
        }
        if let Err(e) = Splitter::check(&self.split) {
            out.push(problem("/split", &e));
        }
    }

    /// The files to read, each once, in the order named.
    fn data_files(&self, cx: &TaskContext) -> Result<Vec<DataFile>> {
        let format = self.format.map(FileFormat::from);
        let mut files = Vec::new();
        if let Some(names) = &self.files {
            let mut seen = BTreeSet::new();
            for (pointer, _) in names.with_pointers("/files") {
                for path in cx.files(&pointer) {
                    if seen.insert(path.clone()) {
                        files.push(DataFile::new(path.display().to_string(), path, format)?);
                    }
                }
            }
        } else {
            for input in cx.many("files") {
                if let Some(format) = format
                    && input.artifact.kind == ArtifactKind::Files
                {
                    for (name, file) in &input.artifact.files {
                        let name = format!("{}/{name}", input.reference);
                        files.push(DataFile::new(name, &file.path, Some(format))?);
                    }
                } else {
                    files.extend(dataset_files(&input.artifact, &input.reference)?);
                }
            }
        }
        Ok(files)
    }

    /// One writer an output, in the order of the splits.
    fn writers(&self, cx: &mut TaskContext, schema: &SchemaRef) -> Result<Vec<DatasetWriter>> {
        let mut names: Vec<&str> = self.split.keys().map(String::as_str).collect();
        if names.is_empty() {
            names.push(DATASET);
        }
        names
            .into_iter()
            .map(|name| Ok(DatasetWriter::new(&cx.output(name)?.path, schema.clone())))
            .collect()
    }
}

fn problem(pointer: &str, error: &Error) -> Problem {
    let problem = Problem::at(pointer, error.chain());
    match error.hint() {
        Some(hint) => problem.with_hint(hint),
        None => problem,
    }
}

/// The way of the rows from the table to the outputs.
struct Rows {
    selection: Selection,
    /// Schema of the outputs.
    schema: SchemaRef,
    filter: Option<RowFilter>,
    filter_columns: Vec<usize>,
    dedup: Option<(Deduplicator, Vec<usize>)>,
    splitter: Option<Splitter>,
    split_columns: Vec<usize>,
    limit: Option<u64>,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    read: u64,
    filtered: u64,
    duplicates: u64,
    kept: u64,
}

impl Rows {
    fn new(task: &Ingest, table: &Table) -> Result<Self> {
        let mut selection = Selection::new(table, task.columns.as_ref(), task.text.as_deref())?;
        let types = table.schema(&selection.read)?;
        let kept = selection.kept_indexes();
        let fields: Vec<Field> = selection
            .kept
            .iter()
            .zip(&kept)
            .map(|((new, _), index)| Field::new(new, types.field(*index).data_type().clone(), true))
            .collect();
        if let (Some(text), Some(field)) = (&task.text, fields.iter().find(|f| f.name() == "text"))
            && field.data_type() != &DataType::Utf8
        {
            return Err(not_text(text, &table.name(), field.data_type()));
        }
        let filter = task.condition.as_deref().map(RowFilter::parse).transpose()?;
        let filter_columns = filter
            .iter()
            .flat_map(RowFilter::columns)
            .map(|name| selection.find(table, name).context("in `where`"))
            .collect::<Result<Vec<_>>>()?;
        let dedup = match &task.dedup {
            Dedup::Flag(false) => None,
            Dedup::Flag(true) => Some(text_columns(task, &fields, &kept)),
            Dedup::By(names) => Some(
                names
                    .iter()
                    .map(|name| selection.find(table, name).context("in `dedup`"))
                    .collect::<Result<Vec<_>>>()?,
            ),
        };
        let splitter = match task.split.is_empty() {
            true => None,
            false => Some(Splitter::new(&task.split, task.seed)?),
        };
        let split_columns = match &task.split_by {
            Some(name) => vec![selection.find(table, name).context("in `split_by`")?],
            None => kept,
        };
        Ok(Self {
            selection,
            schema: Arc::new(Schema::new(fields)),
            filter,
            filter_columns,
            dedup: dedup.map(|columns| (Deduplicator::default(), columns)),
            splitter,
            split_columns,
            limit: task.limit,
            counts: Counts::default(),
        })
    }

    /// Whether the one output gets every row, with the columns that are read under their names.
    fn all_are_kept(&self, task: &Ingest) -> bool {
        self.filter.is_none()
            && self.dedup.is_none()
            && task.split.is_empty()
            && self.limit.is_none()
            && self.selection.kept.iter().all(|(new, old)| new == old)
    }

    /// For each row the output it goes to, if any.
    fn destinations(&mut self, batch: &Batch) -> Result<Vec<Option<usize>>> {
        let rows = batch.rows.num_rows();
        let pick = |indexes: &[usize]| -> Vec<ArrayRef> {
            indexes.iter().map(|i| batch.rows.column(*i).clone()).collect()
        };
        let keep: Vec<bool> = match &self.filter {
            Some(filter) => filter
                .keep(&pick(&self.filter_columns), rows, |row| batch.place(row))?
                .values()
                .iter()
                .collect(),
            None => vec![true; rows],
        };
        let hashes = |indexes: &[usize]| -> Vec<RowHash> {
            let columns = pick(indexes);
            (0..rows).into_par_iter().with_min_len(64).map(|row| hash_row(&columns, row)).collect()
        };
        let duplicate_keys = self.dedup.as_ref().map(|(_, columns)| hashes(columns));
        let split_keys = self.splitter.as_ref().map(|_| hashes(&self.split_columns));
        let mut out = vec![None; rows];
        for row in 0..rows {
            if self.limit.is_some_and(|limit| self.counts.kept >= limit) {
                break;
            }
            self.counts.read += 1;
            if !keep[row] {
                self.counts.filtered += 1;
                continue;
            }
            if let (Some((dedup, _)), Some(keys)) = (&mut self.dedup, &duplicate_keys)
                && !dedup.is_new(keys[row])
            {
                self.counts.duplicates += 1;
                continue;
            }
            self.counts.kept += 1;
            out[row] = Some(match (&mut self.splitter, &split_keys) {
                (Some(splitter), Some(keys)) => splitter.assign(keys[row]),
                _ => 0,
            });
        }
        Ok(out)
    }

    /// The kept columns of a batch under their new names.
    fn kept(&self, batch: &Batch) -> Result<RecordBatch> {
        let indexes = self.selection.kept_indexes();
        let columns = indexes.iter().map(|i| batch.rows.column(*i).clone()).collect();
        RecordBatch::try_new(self.schema.clone(), columns).context("cannot gather columns")
    }

    fn report(&self, task: &Ingest, files: usize, available: u64, infos: &[DatasetInfo]) -> String {
        let counts = &self.counts;
        let mut out = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(out, "{name:<12} {value}");
        };
        line("files", files.to_string());
        let read = group_digits(counts.read);
        line(
            "rows",
            match counts.read < available {
                true => format!("{read} of {}, to the `limit`", group_digits(available)),
                false => read,
            },
        );
        if let Some(condition) = &task.condition {
            line("  dropped", format!("{} by `where: {condition}`", group_digits(counts.filtered)));
        }
        if self.dedup.is_some() {
            line("  dropped", format!("{} duplicates", group_digits(counts.duplicates)));
        }
        line("kept", group_digits(counts.kept));
        if let (Some(by), Some(splitter)) = (&task.split_by, &self.splitter) {
            let groups = splitter.distinct_keys().map_or("many".to_owned(), |n| n.to_string());
            line("groups", format!("{groups} of `{by}`"));
        }
        for (name, info) in task.split.keys().zip(infos) {
            let share = 100.0 * info.rows as f64 / counts.kept.max(1) as f64;
            let name = format!("  {name}");
            line(&name, format!("{} rows ({share:.1} %)", group_digits(info.rows)));
        }
        let bytes = infos.iter().map(|i| i.bytes).sum();
        line("text", format!("{} bytes", group_digits(bytes)));
        let columns: Vec<String> = self
            .schema
            .fields()
            .iter()
            .map(|f| format!("{}: {}", f.name(), f.data_type()))
            .collect();
        line("columns", columns.join(", "));
        out
    }
}

impl Counts {
    /// Refuses to end with nothing.
    fn check(&self, task: &Ingest) -> Result<()> {
        if self.kept > 0 {
            return Ok(());
        }
        if self.read == 0 {
            return Err(Error::new("the files hold no rows"));
        }
        let error = Error::new(format!(
            "none of the {} rows is kept: {} are dropped by `where`",
            group_digits(self.read),
            group_digits(self.filtered)
        ));
        Err(match &task.condition {
            Some(condition) => error.with_hint(format!("is `{condition}` what you mean?")),
            None => error,
        })
    }
}

fn not_text(column: &str, table: &str, data_type: &DataType) -> Error {
    let array = arrow_array::new_empty_array(data_type);
    match lora_flow_data::require_text(array.as_ref() as &dyn Array, column, table) {
        Err(error) => error,
        Ok(_) => Error::new(format!("column `{column}` of {table} holds no text")),
    }
}

/// Indexes of the columns that `dedup: true` compares.
fn text_columns(task: &Ingest, fields: &[Field], kept: &[usize]) -> Vec<usize> {
    let pairs = || fields.iter().zip(kept);
    if task.text.is_some() {
        return pairs().filter(|(f, _)| f.name() == "text").map(|(_, i)| *i).collect();
    }
    let text: Vec<usize> =
        pairs().filter(|(f, _)| f.data_type() == &DataType::Utf8).map(|(_, i)| *i).collect();
    if text.is_empty() { kept.to_vec() } else { text }
}

#[cfg(test)]
#[path = "ingest_tests.rs"]
mod tests;
