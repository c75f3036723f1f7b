//! JSONL files: one pass that checks every line and learns the columns, one that reads them.

use std::io::{BufRead, BufReader};

use arrow_array::RecordBatch;
use arrow_json::ReaderBuilder;
use arrow_json::reader::Decoder;
use arrow_schema::SchemaRef;
use lora_flow_core::{Error, Result};

use crate::data_file::DataFile;
use crate::json_shape::{Conflict, Fields};

/// The lines of a file that hold something, with their numbers from 1, without a byte order mark.
struct Lines {
    name: String,
    reader: BufReader<std::fs::File>,
    buffer: Vec<u8>,
    number: u64,
}

impl Lines {
    fn open(file: &DataFile) -> Result<Self> {
        let reader = BufReader::with_capacity(1 << 18, file.open()?);
        Ok(Self { name: file.name.clone(), reader, buffer: Vec::new(), number: 0 })
    }

    /// The next line that is not blank, with its final line feed if it has one.
    fn next(&mut self) -> Result<Option<(u64, &[u8])>> {
        loop {
            self.buffer.clear();
            let read = self
                .reader
                .read_until(b'\n', &mut self.buffer)
                .map_err(|e| Error::new(format!("cannot read `{}`", self.name)).with_source(e))?;
            if read == 0 {
                return Ok(None);
            }
            self.number += 1;
            if self.number == 1 && self.buffer.starts_with(b"\xef\xbb\xbf") {
                self.buffer.drain(..3);
            }
            if !self.buffer.iter().all(u8::is_ascii_whitespace) {
                return Ok(Some((self.number, &self.buffer)));
            }
        }
    }
}

/// Checks every line of a file; gives its columns and the number of its rows.
///
/// # Errors
/// For the first line that is not UTF-8, not JSON, not an object, or that puts another type of
/// value into a column than the lines before.
pub(crate) fn inspect(file: &DataFile, index: usize) -> Result<(Fields, u64)> {
    let mut fields = Fields::default();
    let mut rows = 0;
    let mut lines = Lines::open(file)?;
    while let Some((number, line)) = lines.next()? {
        let place = || format!("`{}` line {number}", file.name);
        std::str::from_utf8(line).map_err(|e| {
            Error::new(format!("{} is not UTF-8 at byte {}", place(), e.valid_up_to() + 1))
                .with_hint("convert the file to UTF-8, for example with `iconv -t utf-8`")
        })?;
        if rows == 0 && line.trim_ascii_start().starts_with(b"[") {
            return Err(Error::new(format!("{} starts a JSON array", place()))
                .with_hint("write one object a line, for example with `jq -c '.[]'`"));
        }
        let mut conflict = None;
        fields.read_row(line, (index, number), &mut conflict).map_err(|e| match conflict {
            Some(conflict) => conflict_error(&conflict, |_| file.name.clone()),
            None => json_error(file, number, &e),
        })?;
        rows += 1;
    }
    if rows == 0 {
        return Err(Error::new(format!("`{}` has no rows", file.name)));
    }
    Ok((fields, rows))
}

/// The error of values that no column can hold; `name` gives a file's name by its index.
pub(crate) fn conflict_error(conflict: &Conflict, name: impl Fn(usize) -> String) -> Error {
    let (first, (first_file, first_line)) = conflict.first;
    let (later, (later_file, later_line)) = conflict.later;
    Error::new(format!(
        "column `{}` holds {first} in `{}` line {first_line} and {later} in `{}` line {later_line}",
        conflict.path.join("."),
        name(first_file),
        name(later_file),
    ))
    .with_hint("a column has one type in all rows and files")
}

fn json_error(file: &DataFile, line: u64, e: &serde_json::Error) -> Error {
    // The reader saw one line, so only its column means anything.
    let text = e.to_string();
    let what = text.split(" at line ").next().unwrap_or(&text).to_owned();
    // A line that ends too early is counted as the one after it.
    let column = if e.is_eof() { String::new() } else { format!(":{}", e.column()) };
    Error::new(format!("`{}:{line}{column}` is not a JSON object: {what}", file.name))
        .with_hint("JSONL has one complete object a line")
}

/// Reads the columns of a schema from a file that [`inspect`] has passed.
pub(crate) struct JsonlReader {
    lines: Lines,
    decoder: Decoder,
    batch_rows: usize,
}

impl JsonlReader {
    pub(crate) fn new(file: &DataFile, schema: SchemaRef, batch_rows: usize) -> Result<Self> {
        let decoder = ReaderBuilder::new(schema)
            .with_batch_size(batch_rows)
            .build_decoder()
            .map_err(|e| Error::new(format!("cannot read `{}`", file.name)).with_source(e))?;
        Ok(Self { lines: Lines::open(file)?, decoder, batch_rows })
    }

    fn batch(&mut self) -> Result<Option<RecordBatch>> {
        let name = self.lines.name.clone();
        let changed = |line: u64, e: arrow_schema::ArrowError| {
            Error::new(format!("`{name}` line {line} cannot be read"))
                .with_hint("did the file change while it was read?")
                .with_source(e)
        };
        for _ in 0..self.batch_rows {
            let Some((number, line)) = self.lines.next()? else { break };
            self.decoder.decode(line).map_err(|e| changed(number, e))?;
            // The decoder ends a row at its line feed, which the last line may lack.
            if !line.ends_with(b"\n") {
                self.decoder.decode(b"\n").map_err(|e| changed(number, e))?;
            }
        }
        let number = self.lines.number;
        self.decoder.flush().map_err(|e| changed(number, e))
    }
}

impl Iterator for JsonlReader {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        self.batch().transpose()
    }
}
