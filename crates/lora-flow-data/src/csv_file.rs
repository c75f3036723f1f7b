//! CSV files with a header: one pass that checks every record and learns the columns, one that
//! reads them. A column is a number or a boolean only if every filled cell of it reads as one
//! and prints back as it was written, so `007` and `1.50` stay text. Empty cells are null.

use std::sync::Arc;

use arrow_array::builder::{BooleanBuilder, Float64Builder, Int64Builder, StringBuilder};
use arrow_array::{ArrayRef, NullArray, RecordBatch, RecordBatchOptions};
use arrow_schema::{DataType, SchemaRef};
use csv::{ErrorKind, Reader, ReaderBuilder, StringRecord};
use lora_flow_core::{Error, Result};

use crate::data_file::DataFile;

/// What all filled cells of a column can be read as; later ones hold the values of earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CellKind {
    /// No filled cell yet.
    Empty,
    Boolean,
    Int,
    Float,
    Text,
}

impl CellKind {
    fn of(cell: &str) -> Self {
        match cell {
            "" => Self::Empty,
            "true" | "false" | "True" | "False" => Self::Boolean,
            _ if cell.parse::<i64>().is_ok_and(|n| n.to_string() == cell) => Self::Int,
            _ if cell.parse::<f64>().is_ok_and(|x| x.is_finite() && format!("{x:?}") == cell) => {
                Self::Float
            }
            _ => Self::Text,
        }
    }

    /// The kind that can hold both.
    pub(crate) fn join(self, other: Self) -> Self {
        match (self, other) {
            (a, b) if a == b => a,
            (Self::Empty, other) | (other, Self::Empty) => other,
            (Self::Int, Self::Float) | (Self::Float, Self::Int) => Self::Float,
            _ => Self::Text,
        }
    }

    pub(crate) fn data_type(self) -> DataType {
        match self {
            Self::Empty => DataType::Null,
            Self::Boolean => DataType::Boolean,
            Self::Int => DataType::Int64,
            Self::Float => DataType::Float64,
            Self::Text => DataType::Utf8,
        }
    }
}

/// Checks every record of a file; gives its columns and the number of its rows.
///
/// # Errors
/// For the first record that has another number of fields than the header or is not UTF-8.
pub(crate) fn inspect(file: &DataFile) -> Result<(Vec<(String, CellKind)>, u64)> {
    let mut reader = open(file)?;
    let header = header(file, &mut reader)?;
    let mut kinds = vec![CellKind::Empty; header.len()];
    let mut record = StringRecord::new();
    let mut rows = 0;
    while reader.read_record(&mut record).map_err(|e| csv_error(file, &header, e))? {
        for (kind, cell) in kinds.iter_mut().zip(&record) {
            if *kind != CellKind::Text {
                *kind = kind.join(CellKind::of(cell));
            }
        }
        rows += 1;
    }
    if rows == 0 {
        return Err(Error::new(format!("`{}` has a header but no rows", file.name)));
    }
    Ok((header.into_iter().zip(kinds).collect(), rows))
}

fn open(file: &DataFile) -> Result<Reader<std::fs::File>> {
    Ok(ReaderBuilder::new().buffer_capacity(1 << 18).from_reader(file.open()?))
}

fn header(file: &DataFile, reader: &mut Reader<std::fs::File>) -> Result<Vec<String>> {
    let header = reader.headers().map_err(|e| csv_error(file, &[], e))?;
    let mut names: Vec<String> = Vec::with_capacity(header.len());
    for name in header {
        // Spreadsheets put a byte order mark before the first name.
        let name = name.trim_start_matches('\u{feff}').trim();
        if name.is_empty() {
            return Err(Error::new(format!(
                "column {} of `{}` has no name in the header",
                names.len() + 1,
                file.name
            )));
        }
        if names.iter().any(|n| n == name) {
            return Err(Error::new(format!("`{}` has two columns `{name}`", file.name)));
        }
        names.push(name.to_owned());
    }
    Ok(names)
}

fn csv_error(file: &DataFile, header: &[String], e: csv::Error) -> Error {
    let name = &file.name;
    match e.kind() {
        ErrorKind::UnequalLengths { pos, expected_len, len } => {
            let line = pos.as_ref().map_or(0, csv::Position::line);
            Error::new(format!(
                "`{name}:{line}` has {len} fields where the header has {expected_len}"
            ))
            .with_hint("put double quotes around fields that hold commas or line breaks")
        }
        ErrorKind::Utf8 { pos, err } => {
            let line = pos.as_ref().map_or(1, csv::Position::line);
            let column = header
                .get(err.field())
                .map_or_else(|| format!("field {}", err.field() + 1), |c| format!("column `{c}`"));
            Error::new(format!("`{name}:{line}` is not UTF-8 in {column}"))
                .with_hint("convert the file to UTF-8, for example with `iconv -t utf-8`")
        }
        _ => Error::new(format!("cannot read `{name}`")).with_source(e),
    }
}

/// Reads the columns of a schema from a file that [`inspect`] has passed.
pub(crate) struct CsvReader {
    file: DataFile,
    reader: Reader<std::fs::File>,
    header: Vec<String>,
    /// Field index of each column of the schema.
    fields: Vec<usize>,
    schema: SchemaRef,
    batch_rows: usize,
    record: StringRecord,
}

impl CsvReader {
    pub(crate) fn new(file: &DataFile, schema: SchemaRef, batch_rows: usize) -> Result<Self> {
        let mut reader = open(file)?;
        let header = header(file, &mut reader)?;
        let fields = schema
            .fields()
            .iter()
            .map(|field| {
                header.iter().position(|name| name == field.name()).ok_or_else(|| {
                    crate::columns::no_such_column(
                        field.name(),
                        &format!("`{}`", file.name),
                        header.iter().map(String::as_str),
                    )
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            file: file.clone(),
            reader,
            header,
            fields,
            schema,
            batch_rows,
            record: StringRecord::new(),
        })
    }

    fn batch(&mut self) -> Result<Option<RecordBatch>> {
        let mut columns: Vec<ColumnBuilder> =
            self.schema.fields().iter().map(|f| ColumnBuilder::new(f.data_type())).collect();
        let mut rows = 0;
        while rows < self.batch_rows {
            let more = self
                .reader
                .read_record(&mut self.record)
                .map_err(|e| csv_error(&self.file, &self.header, e))?;
            if !more {
                break;
            }
            for (column, &field) in columns.iter_mut().zip(&self.fields) {
                column.push(self.record.get(field).unwrap_or(""));
            }
            rows += 1;
        }
        if rows == 0 {
            return Ok(None);
        }
        let arrays = columns.into_iter().map(ColumnBuilder::finish).collect();
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        RecordBatch::try_new_with_options(self.schema.clone(), arrays, &options)
            .map(Some)
            .map_err(|e| Error::new(format!("cannot read `{}`", self.file.name)).with_source(e))
    }
}

impl Iterator for CsvReader {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        self.batch().transpose()
    }
}

/// Fills one column.
enum ColumnBuilder {
    Null(usize),
    Boolean(BooleanBuilder),
    Int(Int64Builder),
    Float(Float64Builder),
    Text(StringBuilder),
}

impl ColumnBuilder {
    fn new(data_type: &DataType) -> Self {
        match data_type {
            DataType::Null => Self::Null(0),
            DataType::Boolean => Self::Boolean(BooleanBuilder::new()),
            DataType::Int64 => Self::Int(Int64Builder::new()),
            DataType::Float64 => Self::Float(Float64Builder::new()),
            _ => Self::Text(StringBuilder::new()),
        }
    }

    fn push(&mut self, cell: &str) {
        match self {
            Self::Null(rows) => *rows += 1,
            Self::Boolean(b) => b.append_option(cell.to_ascii_lowercase().parse().ok()),
            Self::Int(b) => b.append_option(cell.parse().ok()),
            Self::Float(b) => b.append_option(cell.parse().ok()),
            Self::Text(b) => b.append_option((!cell.is_empty()).then_some(cell)),
        }
    }

    fn finish(self) -> ArrayRef {
        match self {
            Self::Null(rows) => Arc::new(NullArray::new(rows)),
            Self::Boolean(mut b) => Arc::new(b.finish()),
            Self::Int(mut b) => Arc::new(b.finish()),
            Self::Float(mut b) => Arc::new(b.finish()),
            Self::Text(mut b) => Arc::new(b.finish()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbers_that_print_back_are_numbers() {
        for (cell, kind) in [
            ("12", CellKind::Int),
            ("-3", CellKind::Int),
            ("007", CellKind::Text),
            ("1.5", CellKind::Float),
            ("1.50", CellKind::Text),
            ("NaN", CellKind::Text),
            ("inf", CellKind::Text),
            ("true", CellKind::Boolean),
            ("", CellKind::Empty),
            ("a", CellKind::Text),
        ] {
            assert_eq!(CellKind::of(cell), kind, "{cell}");
        }
        assert_eq!(CellKind::Boolean.join(CellKind::Int), CellKind::Text);
    }
}
