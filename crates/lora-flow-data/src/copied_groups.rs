//! Row groups of a Parquet file that go into a data set as they are.
//!
//! Where all rows and columns of a file are kept, its column chunks can be copied byte for byte, and
//! encoding and compressing them again, most of what writing costs, is saved. They are decoded all
//! the same before they are copied: what is damaged is found here and not in a later task, and the
//! bytes of text are counted. What the source says beside its pages (statistics, indexes, bloom
//! filters, who wrote it) stays behind.
//!
//! A file is copied whole or not at all, by what its footer says alone, so that nothing hangs on
//! threads or timing. Its columns must be those of the data set to the letter, as Parquet has them:
//! a column that may hold no nulls, for one, is stored otherwise than ours. Its row groups must be
//! of a size that readers of a data set can expect.

use std::fs::File;

use arrow_schema::SchemaRef;
use lora_flow_core::{Error, Result, ResultExt};
use parquet::arrow::ArrowSchemaConverter;
use parquet::arrow::arrow_reader::ArrowReaderMetadata;
use parquet::basic::Compression;
use parquet::column::writer::ColumnCloseResult;
use parquet::file::metadata::{ColumnChunkMetaData, RowGroupMetaData};
use parquet::file::writer::SerializedRowGroupWriter;

use crate::data_file::{DataFile, FileFormat};
use crate::dataset::{ROW_GROUP_ROWS, text_bytes};
use crate::parquet_file::{self, ParquetReader};

/// Fewest rows of a group that is copied, but for the last of several in a file. Files of a few
/// rows are gathered to groups of usual size instead.
const MIN_ROWS: i64 = 256;
/// Most rows of a group that is copied.
const MAX_ROWS: i64 = 4 * ROW_GROUP_ROWS as i64;
/// Most bytes of a group that is copied, uncompressed.
const MAX_BYTES: i64 = 48 << 20;
/// Rows decoded at a time.
const BATCH_ROWS: usize = 1024;

/// A row group that may be copied.
pub(crate) struct SourceGroup {
    file: DataFile,
    metadata: ArrowReaderMetadata,
    index: usize,
    /// Rows of the file before it.
    first_row: u64,
}

/// A row group that can be read to its end.
pub(crate) struct CheckedGroup {
    group: SourceGroup,
    handle: File,
    /// Bytes of text in all columns.
    pub(crate) text_bytes: u64,
}

/// The row groups of a file, if they may be copied into a data set of these columns.
///
/// # Errors
/// When the file cannot be read.
pub(crate) fn source_groups(
    file: &DataFile,
    schema: &SchemaRef,
) -> Result<Option<Vec<SourceGroup>>> {
    if file.format != FileFormat::Parquet {
        return Ok(None);
    }
    let ours = ArrowSchemaConverter::new()
        .convert(schema)
        .context("these columns cannot be written as Parquet")?;
    let metadata = parquet_file::metadata(file)?;
    let footer = metadata.metadata().file_metadata();
    let groups = metadata.metadata().row_groups();
    // The root of the tree has a name of the writer's choice.
    if footer.schema().get_fields() != ours.root_schema().get_fields()
        || !(0..groups.len()).all(|index| is_usual(groups, index))
        || groups.iter().map(RowGroupMetaData::num_rows).sum::<i64>() != footer.num_rows()
    {
        return Ok(None);
    }
    let mut first_row = 0;
    let groups = (0..groups.len()).map(|index| {
        let (file, metadata) = (file.clone(), metadata.clone());
        let group = SourceGroup { file, metadata, index, first_row };
        first_row += group.rows();
        group
    });
    Ok(Some(groups.collect()))
}

/// Whether a group is of a size and of a kind to be copied.
fn is_usual(groups: &[RowGroupMetaData], index: usize) -> bool {
    let group = &groups[index];
    let fewest = if index > 0 && index + 1 == groups.len() { 1 } else { MIN_ROWS };
    (fewest..=MAX_ROWS).contains(&group.num_rows())
        && group.columns().iter().all(|column| {
            let codec = column.compression();
            let start = column.dictionary_page_offset().unwrap_or(column.data_page_offset());
            matches!(codec, Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_))
                && column.file_path().is_none()
                && start > 0
                && (0..=2 * MAX_BYTES).contains(&column.compressed_size())
                && (0..=MAX_BYTES).contains(&column.uncompressed_size())
                && (start..=start.saturating_add(column.compressed_size()))
                    .contains(&column.data_page_offset())
        })
        // Last, when no number can be so large that sums of them overflow.
        && group.columns().iter().map(ColumnChunkMetaData::uncompressed_size).sum::<i64>()
            <= MAX_BYTES
}

impl SourceGroup {
    fn footer(&self) -> &RowGroupMetaData {
        self.metadata.metadata().row_group(self.index)
    }

    /// Its rows.
    pub(crate) fn rows(&self) -> u64 {
        u64::try_from(self.footer().num_rows()).unwrap_or(0)
    }

    /// Bytes it takes in a file.
    pub(crate) fn bytes(&self) -> usize {
        let columns = self.footer().columns().iter();
        columns.map(|c| usize::try_from(c.compressed_size()).unwrap_or(0)).sum()
    }

    /// About what is in memory at once while it is decoded.
    pub(crate) fn decoding_bytes(&self) -> usize {
        let columns = self.footer().columns().iter();
        let all: usize = columns.map(|c| usize::try_from(c.uncompressed_size()).unwrap_or(0)).sum();
        let rows = usize::try_from(self.rows()).unwrap_or(1).max(1);
        all / rows * BATCH_ROWS.min(rows)
    }

    /// Decodes all of it.
    ///
    /// # Errors
    /// When it is damaged.
    pub(crate) fn check(self) -> Result<CheckedGroup> {
        // A handle of its own: clones of one share its position, and other threads read too.
        let handle = self.file.open()?;
        let again =
            handle.try_clone().with_context(|| format!("cannot read `{}`", self.file.name))?;
        let reader = ParquetReader::of_group(
            &self.file,
            again,
            self.metadata.clone(),
            self.index,
            self.first_row,
            BATCH_ROWS,
        )?;
        let (mut rows, mut bytes) = (0, 0);
        for batch in reader {
            let batch = batch?;
            rows += batch.num_rows() as u64;
            bytes += batch.columns().iter().map(|c| text_bytes(c.as_ref())).sum::<u64>();
        }
        if rows != self.rows() {
            return Err(Error::new(format!(
                "`{}` gave {rows} of the {} rows of its row group {}",
                self.file.name,
                self.rows(),
                self.index
            )));
        }
        Ok(CheckedGroup { group: self, handle, text_bytes: bytes })
    }
}

impl CheckedGroup {
    /// Copies its columns.
    ///
    /// # Errors
    /// When that fails.
    pub(crate) fn append_to(&self, out: &mut SerializedRowGroupWriter<'_, File>) -> Result<()> {
        let name = &self.group.file.name;
        for column in self.group.footer().columns() {
            // Made anew of what a reader needs, so that all else stays behind.
            let metadata = ColumnChunkMetaData::builder(column.column_descr_ptr())
                .set_compression_codec(column.compression_codec())
                .set_encodings_mask(*column.encodings_mask())
                .set_num_values(column.num_values())
                .set_total_compressed_size(column.compressed_size())
                .set_total_uncompressed_size(column.uncompressed_size())
                .set_dictionary_page_offset(column.dictionary_page_offset())
                .set_data_page_offset(column.data_page_offset())
                .build();
            let chunk = ColumnCloseResult {
                bytes_written: u64::try_from(column.compressed_size()).unwrap_or(0),
                rows_written: self.group.rows(),
                metadata: metadata.with_context(|| format!("cannot copy rows of `{name}`"))?,
                bloom_filter: None,
                column_index: None,
                offset_index: None,
            };
            out.append_column(&self.handle, chunk)
                .with_context(|| format!("cannot copy rows of `{name}`"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "copied_groups_tests.rs"]
mod tests;
