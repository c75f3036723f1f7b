//! The Dataset artifact: `part-NNNNN.parquet` files in name order, and `dataset.json`.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};

use arrow_array::cast::AsArray;
use arrow_array::{Array, RecordBatch};
use arrow_schema::{DataType, SchemaRef};
use lora_flow_core::{Artifact, Error, Result, ResultExt};
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use serde::{Deserialize, Serialize};

use crate::copied_groups::{SourceGroup, source_groups};
use crate::data_file::{DataFile, FileFormat};
use crate::row_groups::RowGroups;
use crate::table::Table;

/// Rows of a row group that we encode. Rows are written in whole groups, so that the bytes of a part
/// depend on the rows alone and not on how they came in.
pub(crate) const ROW_GROUP_ROWS: usize = 2048;
/// Row groups of a part. The store hashes parts as memory, a part a thread, so that their size
/// counts in the peak.
const PART_GROUPS: usize = 128;
/// Bytes of a part's copied row groups, from which on it takes none; they may be larger than ours.
const PART_COPIED_BYTES: usize = 48 << 20;

/// What `dataset.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetInfo {
    /// Number of rows.
    pub rows: u64,
    /// Bytes of text in all columns.
    pub bytes: u64,
    /// Column name → Arrow type.
    pub columns: BTreeMap<String, String>,
}

/// How hard zstd tries on a data set. Writing is bound by the compression: level 1 takes three
/// quarters of level 3's time and the files grow by 9 %. Codecs without entropy coding save little
/// more time and take half as much disk again (docs/performance.md).
const ZSTD_LEVEL: i32 = 1;

/// Properties of every Parquet file that we write: zstd, no statistics (texts make them large),
/// and nothing that names a version or a time.
pub(crate) fn parquet_properties(row_group_rows: usize, level: i32) -> Result<ArrowWriterOptions> {
    let level = ZstdLevel::try_new(level).context("zstd level")?;
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(level))
        .set_statistics_enabled(EnabledStatistics::None)
        .set_offset_index_disabled(true)
        .set_max_row_group_row_count(Some(row_group_rows))
        .set_created_by("lora-flow".to_owned())
        .build();
    Ok(ArrowWriterOptions::new().with_properties(properties).with_skip_arrow_metadata(true))
}

/// Writes the files of a Dataset artifact. Rows that are [written](DatasetWriter::write) give bytes
/// that depend on them alone; a [table](DatasetWriter::write_table) gives equal bytes for equal rows
/// from files that are encoded alike, since their row groups are copied where that is possible. Row
/// groups are encoded, and decoded to be checked, by the threads of the rayon pool that the caller
/// belongs to (see `row_groups`).
pub struct DatasetWriter {
    folder: PathBuf,
    schema: SchemaRef,
    part: Option<RowGroups>,
    /// Rows that do not fill a row group yet.
    pending: VecDeque<RecordBatch>,
    pending_rows: usize,
    /// Parts that are complete.
    parts: usize,
    rows: u64,
    bytes: u64,
}

impl DatasetWriter {
    /// A writer into an empty folder.
    pub fn new(folder: &Path, schema: SchemaRef) -> Self {
        Self {
            folder: folder.to_owned(),
            schema,
            part: None,
            pending: VecDeque::new(),
            pending_rows: 0,
            parts: 0,
            rows: 0,
            bytes: 0,
        }
    }

    /// Adds rows.
    ///
    /// # Errors
    /// When they are of another schema or cannot be written.
    pub fn write(&mut self, rows: &RecordBatch) -> Result<()> {
        if rows.num_rows() == 0 {
            return Ok(());
        }
        self.rows += rows.num_rows() as u64;
        self.bytes += rows.columns().iter().map(|c| text_bytes(c.as_ref())).sum::<u64>();
        self.pending_rows += rows.num_rows();
        self.pending.push_back(rows.clone());
        while self.pending_rows >= ROW_GROUP_ROWS {
            self.write_group(ROW_GROUP_ROWS)?;
        }
        Ok(())
    }

    /// Adds all rows of a table of just these columns, in this order. Where a file's row groups can
    /// be copied (see `copied_groups`), they are; rows that are pending then become a group of their
    /// own. `progress` is told how many rows of the table are done, and may end it all.
    ///
    /// # Errors
    /// When the table has other columns, a file is damaged or the rows cannot be written, and what
    /// `progress` gives. Of several errors in the files it is the first.
    pub fn write_table(
        &mut self,
        table: &Table,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let written = self.write_files(table, progress);
        if written.is_err()
            && let Some(part) = &mut self.part
        {
            // A group before the place of this error may be damaged too.
            part.settle()?;
        }
        written
    }

    fn write_files(
        &mut self,
        table: &Table,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let columns: Vec<String> = self.schema.fields().iter().map(|f| f.name().clone()).collect();
        let schema = table.schema(&columns)?;
        let mut done = 0;
        for (index, file) in table.files().enumerate() {
            match source_groups(file, &self.schema)? {
                Some(groups) => {
                    for group in groups {
                        done += group.rows();
                        self.copy_group(group)?;
                        progress(done)?;
                    }
                }
                None => {
                    for batch in table.scan_files(schema.clone(), index..index + 1) {
                        let rows = batch?.rows;
                        done += rows.num_rows() as u64;
                        self.write(&rows)?;
                        progress(done)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn copy_group(&mut self, group: SourceGroup) -> Result<()> {
        if self.pending_rows > 0 {
            self.write_group(self.pending_rows)?;
        }
        self.rows += group.rows();
        self.part_for_a_group()?.copy(group)
    }

    /// Makes a row group of the first rows that are pending.
    fn write_group(&mut self, rows: usize) -> Result<()> {
        let mut group = Vec::with_capacity(self.pending.len());
        let mut missing = rows;
        while missing > 0 {
            let Some(batch) = self.pending.pop_front() else { break };
            if batch.num_rows() > missing {
                self.pending.push_front(batch.slice(missing, batch.num_rows() - missing));
            }
            group.push(batch.slice(0, missing.min(batch.num_rows())));
            missing -= missing.min(batch.num_rows());
        }
        self.pending_rows -= rows;
        self.part_for_a_group()?.write(group)
    }

    /// The part that takes the next row group.
    fn part_for_a_group(&mut self) -> Result<&mut RowGroups> {
        let full = |part: &RowGroups| {
            part.groups() == PART_GROUPS || part.copied_bytes() >= PART_COPIED_BYTES
        };
        if self.part.as_ref().is_some_and(full) {
            self.close_part()?;
        }
        Ok(match &mut self.part {
            Some(part) => part,
            none => {
                let path = self.folder.join(format!("part-{:05}.parquet", self.parts));
                let options = parquet_properties(ROW_GROUP_ROWS, ZSTD_LEVEL)?;
                none.insert(RowGroups::create(&path, self.schema.clone(), options)?)
            }
        })
    }

    fn close_part(&mut self) -> Result<()> {
        if let Some(part) = self.part.take() {
            self.bytes += part.finish()?;
            self.parts += 1;
        }
        Ok(())
    }

    /// Writes what is left and `dataset.json`.
    ///
    /// # Errors
    /// When there were no rows at all, what is copied is damaged or the files cannot be written.
    pub fn finish(mut self) -> Result<DatasetInfo> {
        if self.pending_rows > 0 {
            self.write_group(self.pending_rows)?;
        }
        self.close_part()?;
        if self.rows == 0 {
            return Err(Error::new("there are no rows to write"));
        }
        let columns = self
            .schema
            .fields()
            .iter()
            .map(|f| (f.name().clone(), f.data_type().to_string()))
            .collect();
        let info = DatasetInfo { rows: self.rows, bytes: self.bytes, columns };
        let json = serde_json::to_string_pretty(&info)? + "\n";
        fs_err::write(self.folder.join("dataset.json"), json)?;
        Ok(info)
    }
}

/// Bytes of all strings in an array.
pub(crate) fn text_bytes(array: &dyn Array) -> u64 {
    match array.data_type() {
        DataType::Utf8 => {
            let offsets = array.as_string::<i32>().value_offsets();
            let (first, last) = (offsets.first().copied(), offsets.last().copied());
            u64::try_from(last.unwrap_or(0) - first.unwrap_or(0)).unwrap_or(0)
        }
        DataType::List(_) => {
            let list = array.as_list::<i32>();
            let offsets = list.value_offsets();
            let first = usize::try_from(offsets.first().copied().unwrap_or(0)).unwrap_or(0);
            let last = usize::try_from(offsets.last().copied().unwrap_or(0)).unwrap_or(0);
            text_bytes(list.values().slice(first, last - first).as_ref())
        }
        DataType::Struct(_) => {
            array.as_struct().columns().iter().map(|c| text_bytes(c.as_ref())).sum()
        }
        _ => 0,
    }
}

/// The files of rows in an artifact, in name order. `reference` is what the pipeline calls it.
///
/// # Errors
/// When it has none.
pub fn dataset_files(artifact: &Artifact, reference: &str) -> Result<Vec<DataFile>> {
    let files: Vec<DataFile> = artifact
        .files
        .iter()
        // `.json` beside data is a description, not rows.
        .filter(|(name, _)| !name.ends_with(".json"))
        .filter_map(|(name, file)| {
            Some(DataFile {
                name: format!("{reference}/{name}"),
                path: file.path.clone(),
                format: FileFormat::from_name(name)?,
            })
        })
        .collect();
    if files.is_empty() {
        let names: Vec<_> = artifact.files.keys().map(|n| format!("`{n}`")).collect();
        return Err(Error::new(format!(
            "`{reference}` holds no Parquet, JSONL or CSV file; it holds {}",
            if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
        )));
    }
    Ok(files)
}
