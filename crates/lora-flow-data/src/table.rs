//! Several files of rows read as one table, in a fixed order and in bounded memory.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, RecordBatchOptions};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use lora_flow_core::{Error, Result};

use crate::columns::{common_type, convert, no_such_column, type_name};
use crate::csv_file::{self, CellKind, CsvReader};
use crate::data_file::{DataFile, FileFormat};
use crate::json_shape::Fields;
use crate::jsonl_file::{self, JsonlReader};
use crate::parquet_file::{self, ParquetReader};

/// Rows read at a time.
const BATCH_ROWS: usize = 1024;

/// Files of rows, checked and ready to be read.
pub struct Table {
    files: Vec<TableFile>,
}

struct TableFile {
    file: DataFile,
    columns: Vec<(String, DataType)>,
    rows: u64,
}

impl TableFile {
    fn type_of(&self, column: &str) -> Option<&DataType> {
        self.columns.iter().find(|(name, _)| name == column).map(|(_, t)| t)
    }
}

/// Rows of one file that follow each other.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The rows.
    pub rows: RecordBatch,
    /// Name of their file.
    pub file: Arc<str>,
    /// Number in the file of the first one, from 1.
    pub first_row: u64,
}

impl Batch {
    /// The place of a row, for messages.
    pub fn place(&self, row: usize) -> String {
        format!("`{}` row {}", self.file, self.first_row + row as u64)
    }
}

impl Table {
    /// Looks into every file: columns, types, number of rows. JSONL and CSV files are read and
    /// checked whole; a column named in `text_columns` is text in CSV even where all its cells
    /// are numbers.
    ///
    /// # Errors
    /// For no files, and for the first file that is damaged, malformed, not UTF-8 or empty.
    pub fn open(files: Vec<DataFile>, text_columns: &[&str]) -> Result<Self> {
        if files.is_empty() {
            return Err(Error::new("there are no files to read"));
        }
        let mut names = BTreeSet::new();
        if let Some(twice) = files.iter().find(|f| !names.insert(f.name.as_str())) {
            return Err(Error::new(format!("`{}` is listed twice", twice.name)));
        }
        let mut seen: Vec<Seen> = Vec::with_capacity(files.len());
        for (index, file) in files.iter().enumerate() {
            seen.push(match file.format {
                FileFormat::Parquet => {
                    let (columns, rows) = parquet_file::inspect(file)?;
                    Seen::Typed(columns, rows)
                }
                FileFormat::Jsonl => {
                    let (fields, rows) = jsonl_file::inspect(file, index)?;
                    Seen::Json(fields, rows)
                }
                FileFormat::Csv => {
                    let (mut columns, rows) = csv_file::inspect(file)?;
                    for (name, kind) in &mut columns {
                        if text_columns.contains(&name.as_str()) {
                            *kind = CellKind::Text;
                        }
                    }
                    Seen::Csv(columns, rows)
                }
            });
        }
        // Types of JSONL and CSV columns are learnt from all files together.
        let mut json = Fields::default();
        for seen in &seen {
            if let Seen::Json(fields, _) = seen {
                json.merge(fields).map_err(|conflict| {
                    jsonl_file::conflict_error(&conflict, |i| files[i].name.clone())
                })?;
            }
        }
        let csv_kind = |name: &str| {
            seen.iter()
                .filter_map(|s| if let Seen::Csv(columns, _) = s { Some(columns) } else { None })
                .flatten()
                .filter(|(n, _)| n == name)
                .fold(CellKind::Empty, |joined, (_, kind)| joined.join(*kind))
        };
        let files = files
            .into_iter()
            .zip(&seen)
            .map(|(file, seen)| {
                let (columns, rows) = match seen {
                    Seen::Typed(columns, rows) => (columns.clone(), *rows),
                    Seen::Json(fields, rows) => (
                        fields
                            .iter()
                            .filter_map(|(name, _)| {
                                Some((name.to_owned(), json.get(name)?.data_type()?))
                            })
                            .collect(),
                        *rows,
                    ),
                    Seen::Csv(columns, rows) => (
                        columns
                            .iter()
                            .map(|(name, _)| (name.clone(), csv_kind(name).data_type()))
                            .collect(),
                        *rows,
                    ),
                };
                TableFile { file, columns, rows }
            })
            .collect();
        Ok(Self { files })
    }

    /// Names of all columns, in order of first appearance.
    pub fn columns(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for (name, _) in self.files.iter().flat_map(|f| &f.columns) {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        names
    }

    /// Number of rows in all files.
    pub fn rows(&self) -> u64 {
        self.files.iter().map(|f| f.rows).sum()
    }

    /// What messages call the table: its file, or its first file and how many more.
    pub fn name(&self) -> String {
        let first = &self.files[0].file.name;
        match self.files.len() {
            1 => format!("`{first}`"),
            n => format!("`{first}` (and {} more)", n - 1),
        }
    }

    /// The schema of the chosen columns, in the order chosen.
    ///
    /// # Errors
    /// When a file lacks a column, or two files hold different types in it.
    pub fn schema(&self, columns: &[String]) -> Result<SchemaRef> {
        let fields = columns
            .iter()
            .map(|name| self.column_type(name).map(|t| Field::new(name, t, true)))
            .collect::<Result<Vec<_>>>()?;
        Ok(Arc::new(Schema::new(fields)))
    }

    fn column_type(&self, name: &str) -> Result<DataType> {
        let Some(home) = self.files.iter().find(|f| f.type_of(name).is_some()) else {
            return Err(no_such_column(name, &self.name(), self.columns()));
        };
        let mut joined: Option<(DataType, &TableFile)> = None;
        for file in &self.files {
            let Some(data_type) = file.type_of(name) else {
                return Err(Error::new(format!(
                    "`{}` has no column `{name}`, which `{}` has",
                    file.file.name, home.file.name
                ))
                .with_hint("choose `columns` that all files have, or read the files apart"));
            };
            joined = Some(match joined {
                None => (data_type.clone(), file),
                Some((before, first)) => match common_type(&before, data_type) {
                    Some(common) => (common, first),
                    None => {
                        return Err(Error::new(format!(
                            "column `{name}` holds {} in `{}` and {} in `{}`",
                            type_name(&before),
                            first.file.name,
                            type_name(data_type),
                            file.file.name,
                        )));
                    }
                },
            });
        }
        joined.map(|(t, _)| t).ok_or_else(|| Error::new("there are no files to read"))
    }

    /// Reads the chosen columns of all rows, file after file.
    ///
    /// # Errors
    /// As [`Table::schema`]; reading errors come from the iterator.
    pub fn scan(&self, columns: &[String]) -> Result<Scan<'_>> {
        Ok(self.scan_files(self.schema(columns)?, 0..self.files.len()))
    }

    /// Reads these files alone; the schema is that of the table.
    pub(crate) fn scan_files(&self, schema: SchemaRef, files: Range<usize>) -> Scan<'_> {
        Scan { table: self, schema, file: files.start, end: files.end, reader: None, row: 0 }
    }

    /// The files, in the order they are read.
    pub(crate) fn files(&self) -> impl Iterator<Item = &DataFile> {
        self.files.iter().map(|f| &f.file)
    }
}

/// What a first look at a file has found, with its number of rows.
enum Seen {
    Typed(Vec<(String, DataType)>, u64),
    Json(Fields, u64),
    Csv(Vec<(String, CellKind)>, u64),
}

/// Iterator over the rows of a [`Table`].
pub struct Scan<'a> {
    table: &'a Table,
    schema: SchemaRef,
    file: usize,
    /// The file before which it ends.
    end: usize,
    reader: Option<Box<dyn Iterator<Item = Result<RecordBatch>> + Send>>,
    row: u64,
}

impl Scan<'_> {
    /// The columns it gives.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn open(
        &self,
        file: &TableFile,
    ) -> Result<Box<dyn Iterator<Item = Result<RecordBatch>> + Send>> {
        let names: Vec<String> = self.schema.fields().iter().map(|f| f.name().clone()).collect();
        let own = || -> SchemaRef {
            let fields: Vec<Field> = names
                .iter()
                .filter_map(|n| Some(Field::new(n, file.type_of(n)?.clone(), true)))
                .collect();
            Arc::new(Schema::new(fields))
        };
        Ok(match file.file.format {
            FileFormat::Parquet => Box::new(ParquetReader::new(&file.file, &names, BATCH_ROWS)?),
            FileFormat::Jsonl => Box::new(JsonlReader::new(&file.file, own(), BATCH_ROWS)?),
            FileFormat::Csv => Box::new(CsvReader::new(&file.file, own(), BATCH_ROWS)?),
        })
    }

    fn batch(&mut self) -> Result<Option<Batch>> {
        loop {
            let Some(file) = self.table.files[..self.end].get(self.file) else { return Ok(None) };
            if self.reader.is_none() {
                self.reader = Some(self.open(file)?);
                self.row = 0;
            }
            let next = self.reader.as_mut().and_then(Iterator::next).transpose()?;
            let Some(rows) = next else {
                if self.row != file.rows {
                    return Err(Error::new(format!(
                        "`{}` gave {} of its {} rows",
                        file.file.name, self.row, file.rows
                    )));
                }
                self.reader = None;
                self.file += 1;
                continue;
            };
            let batch = Batch {
                rows: self.shape(file, &rows)?,
                file: file.file.name.as_str().into(),
                first_row: self.row + 1,
            };
            self.row += rows.num_rows() as u64;
            if batch.rows.num_rows() > 0 {
                return Ok(Some(batch));
            }
        }
    }

    /// Columns in the order and the types of the table's schema.
    fn shape(&self, file: &TableFile, rows: &RecordBatch) -> Result<RecordBatch> {
        let columns = self
            .schema
            .fields()
            .iter()
            .map(|field| {
                let column = rows.column_by_name(field.name()).ok_or_else(|| {
                    Error::new(format!("`{}` has no column `{}`", file.file.name, field.name()))
                })?;
                convert(column, field.data_type()).map_err(|e| {
                    Error::new(format!(
                        "column `{}` of `{}` cannot be read as {}",
                        field.name(),
                        file.file.name,
                        field.data_type()
                    ))
                    .with_source(e)
                })
            })
            .collect::<Result<Vec<ArrayRef>>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(rows.num_rows()));
        RecordBatch::try_new_with_options(self.schema.clone(), columns, &options)
            .map_err(|e| Error::new(format!("cannot read `{}`", file.file.name)).with_source(e))
    }
}

impl Iterator for Scan<'_> {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = self.batch();
        if batch.is_err() {
            // An error ends the scan.
            self.file = usize::MAX;
        }
        batch.transpose()
    }
}
