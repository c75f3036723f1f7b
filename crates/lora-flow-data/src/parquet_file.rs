//! Parquet files: schema, and record batches of chosen columns, one row group at a time.

use std::fs::File;

use arrow_array::RecordBatch;
use arrow_schema::DataType;
use lora_flow_core::{Error, Result};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader,
    ParquetRecordBatchReaderBuilder,
};

use crate::columns::plain_type;
use crate::data_file::DataFile;

/// Columns with their plain types, and the number of rows.
pub(crate) fn inspect(file: &DataFile) -> Result<(Vec<(String, DataType)>, u64)> {
    let builder = builder(file)?;
    let columns = builder
        .schema()
        .fields()
        .iter()
        .map(|f| (f.name().clone(), plain_type(f.data_type())))
        .collect();
    let rows = builder.metadata().file_metadata().num_rows();
    Ok((columns, u64::try_from(rows).unwrap_or(0)))
}

/// What the footer of a file says.
pub(crate) fn metadata(file: &DataFile) -> Result<ArrowReaderMetadata> {
    Ok(open(file)?.1)
}

/// Reads the chosen columns of a file in batches, in the file's own column order.
pub(crate) struct ParquetReader {
    name: String,
    inner: ParquetRecordBatchReader,
    row: u64,
}

impl ParquetReader {
    pub(crate) fn new(file: &DataFile, columns: &[String], batch_rows: usize) -> Result<Self> {
        let builder = builder(file)?;
        let roots: Vec<usize> = builder
            .schema()
            .fields()
            .iter()
            .enumerate()
            .filter(|(_, field)| columns.contains(field.name()))
            .map(|(index, _)| index)
            .collect();
        let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
        let inner = builder
            .with_projection(mask)
            .with_batch_size(batch_rows)
            .build()
            .map_err(|e| damaged(file, 0, e))?;
        Ok(Self { name: file.name.clone(), inner, row: 0 })
    }

    /// All columns of one row group; `row` is how many rows of the file stand before it.
    pub(crate) fn of_group(
        file: &DataFile,
        handle: File,
        metadata: ArrowReaderMetadata,
        group: usize,
        row: u64,
        batch_rows: usize,
    ) -> Result<Self> {
        let inner = ParquetRecordBatchReaderBuilder::new_with_metadata(handle, metadata)
            .with_row_groups(vec![group])
            .with_batch_size(batch_rows)
            .build()
            .map_err(|e| damaged(file, row, e))?;
        Ok(Self { name: file.name.clone(), inner, row })
    }
}

impl Iterator for ParquetReader {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = self.inner.next()?.map_err(|e| {
            Error::new(format!("`{}` is damaged after row {}", self.name, self.row))
                .with_hint(DAMAGED)
                .with_source(e)
        });
        if let Ok(batch) = &batch {
            self.row += batch.num_rows() as u64;
        }
        Some(batch)
    }
}

const DAMAGED: &str = "the file may be cut short or spoilt; fetch or write it again";

fn damaged(file: &DataFile, row: u64, e: parquet::errors::ParquetError) -> Error {
    let place = if row == 0 { String::new() } else { format!(" after row {row}") };
    Error::new(format!("`{}` is damaged{place}", file.name)).with_hint(DAMAGED).with_source(e)
}

fn builder(file: &DataFile) -> Result<ParquetRecordBatchReaderBuilder<File>> {
    let (handle, metadata) = open(file)?;
    Ok(ParquetRecordBatchReaderBuilder::new_with_metadata(handle, metadata))
}

fn open(file: &DataFile) -> Result<(File, ArrowReaderMetadata)> {
    let handle = file.open()?;
    let magic = magic(&handle, file)?;
    // The embedded Arrow schema is not needed, and other writers fill it with their own types.
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let metadata = ArrowReaderMetadata::load(&handle, options).map_err(|e| {
        if magic {
            damaged(file, 0, e)
        } else {
            Error::new(format!("`{}` is not a Parquet file", file.name))
                .with_hint("set `format` if its extension does not tell what it is")
                .with_source(e)
        }
    })?;
    Ok((handle, metadata))
}

/// Whether the file starts as a Parquet file does.
fn magic(mut handle: &File, file: &DataFile) -> Result<bool> {
    use std::io::{Read, Seek, SeekFrom};
    let mut bytes = [0; 4];
    let found = handle.read_exact(&mut bytes).is_ok() && &bytes == b"PAR1";
    handle
        .seek(SeekFrom::Start(0))
        .map_err(|e| Error::new(format!("cannot read `{}`", file.name)).with_source(e))?;
    Ok(found)
}
