//! A Parquet file whose row groups are made several at a time.
//!
//! Encoding and compressing are most of what writing costs, and a row group is encoded from its
//! rows alone; one that is copied (see `copied_groups`) is decoded from its own pages alone. So
//! groups become jobs of the rayon pool that the writing thread belongs to, while that thread goes
//! on to read; what they gave is appended in the order of the rows. The bytes depend neither on the
//! number of threads nor on their timing.

use std::collections::VecDeque;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use arrow_select::concat::concat_batches;
use lora_flow_core::{Error, Result, ResultExt};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::{
    ArrowColumnChunk, ArrowRowGroupWriterFactory, ArrowWriterOptions, compute_leaves,
};
use parquet::file::writer::SerializedFileWriter;

use crate::copied_groups::{CheckedGroup, SourceGroup};

/// Bytes of rows that may wait for a thread. Far more than keeps any number of threads at work
/// while groups are of usual size; what it bounds is the memory that many threads, or very long
/// rows, would take.
const WAITING_BYTES: usize = 48 << 20;

/// Rows that the encoder is given at a time. It looks at the size of a page between what it is
/// given, so that the pieces show in the bytes: they are cut from the rows of a group by count, not
/// as the rows came in.
const PIECE_ROWS: usize = 256;

/// Writes one Parquet file; each call of [`RowGroups::write`] or [`RowGroups::copy`] is a row group.
///
/// On a thread of a rayon pool the groups are encoded by that pool, and by the writing thread too
/// once enough of them wait; on any other thread by the global pool. Dropped before
/// [`RowGroups::finish`], as after an error, it leaves a file without an end, and what was not
/// begun yet is never encoded.
pub(crate) struct RowGroups {
    schema: SchemaRef,
    file: SerializedFileWriter<File>,
    columns: Arc<ArrowRowGroupWriterFactory>,
    /// The groups that are not in the file yet, in order.
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
    abandoned: Arc<AtomicBool>,
    groups: usize,
    copied_bytes: usize,
    copied_text: u64,
}

/// A group that is being encoded or checked, or waits for that.
struct Waiting {
    made: Receiver<std::thread::Result<Result<Group>>>,
    /// Memory it takes.
    bytes: usize,
}

/// A group that can be appended.
enum Group {
    Encoded(Vec<ArrowColumnChunk>),
    Copied(CheckedGroup),
}

impl RowGroups {
    /// Creates the file.
    ///
    /// # Errors
    /// When that fails, or Parquet cannot hold such columns.
    pub(crate) fn create(
        path: &Path,
        schema: SchemaRef,
        options: ArrowWriterOptions,
    ) -> Result<Self> {
        let file =
            File::create(path).with_context(|| format!("cannot create `{}`", path.display()))?;
        let (file, columns) = ArrowWriter::try_new_with_options(file, schema.clone(), options)
            .and_then(ArrowWriter::into_serialized_writer)
            .context("these columns cannot be written as Parquet")?;
        Ok(Self {
            schema,
            file,
            columns: Arc::new(columns),
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            abandoned: Arc::default(),
            groups: 0,
            copied_bytes: 0,
            copied_text: 0,
        })
    }

    /// Row groups so far, those that wait included.
    pub(crate) fn groups(&self) -> usize {
        self.groups
    }

    /// Bytes of the groups that are copied, so far.
    pub(crate) fn copied_bytes(&self) -> usize {
        self.copied_bytes
    }

    /// Adds a row group of all these rows. Returns before it is in the file; where too much waits,
    /// not before some of that is.
    ///
    /// # Errors
    /// When an earlier group cannot be encoded or written.
    pub(crate) fn write(&mut self, rows: Vec<RecordBatch>) -> Result<()> {
        let bytes = rows.iter().map(RecordBatch::get_array_memory_size).sum();
        let (schema, columns) = (self.schema.clone(), self.columns.clone());
        self.make(bytes, move || Ok(Group::Encoded(encode(&columns, &schema, rows)?)))
    }

    /// Adds a row group of a file of the same columns, once it has been decoded. Returns as
    /// [`RowGroups::write`].
    ///
    /// # Errors
    /// When an earlier group is damaged, or cannot be encoded or written.
    pub(crate) fn copy(&mut self, group: SourceGroup) -> Result<()> {
        self.copied_bytes += group.bytes();
        self.make(group.decoding_bytes(), move || Ok(Group::Copied(group.check()?)))
    }

    /// Has the pool make the next group, which takes so many bytes meanwhile.
    fn make(
        &mut self,
        bytes: usize,
        make: impl FnOnce() -> Result<Group> + Send + 'static,
    ) -> Result<()> {
        // Two a thread, so that none is idle while this one encodes a group itself.
        let most = 2 * rayon::current_num_threads();
        while self.waiting.len() >= most
            || (!self.waiting.is_empty() && self.waiting_bytes + bytes > WAITING_BYTES)
        {
            self.append_first()?;
        }
        let (send, made) = sync_channel(1);
        let abandoned = self.abandoned.clone();
        // First in, first out, since the first is the one that is waited for.
        rayon::spawn_fifo(move || {
            if abandoned.load(Ordering::Relaxed) {
                return;
            }
            // A panic here would end the process; the writing thread hands it on instead.
            let group = catch_unwind(AssertUnwindSafe(make));
            // Nobody may be left to take it.
            let _ = send.send(group);
        });
        self.waiting.push_back(Waiting { made, bytes });
        self.waiting_bytes += bytes;
        self.groups += 1;
        Ok(())
    }

    /// Puts the first group that waits into the file.
    fn append_first(&mut self) -> Result<()> {
        let Some(first) = self.waiting.pop_front() else { return Ok(()) };
        self.waiting_bytes -= first.bytes;
        let group = first.wait()?;
        self.append(group)
    }

    fn append(&mut self, group: Group) -> Result<()> {
        let mut out = self.file.next_row_group().context("cannot write rows")?;
        match group {
            Group::Encoded(chunks) => {
                for chunk in chunks {
                    chunk.append_to_row_group(&mut out).context("cannot write rows")?;
                }
            }
            Group::Copied(checked) => {
                checked.append_to(&mut out)?;
                self.copied_text += checked.text_bytes;
            }
        }
        out.close().context("cannot write rows")?;
        Ok(())
    }

    /// Waits for all groups.
    ///
    /// # Errors
    /// When a group is damaged, or cannot be encoded or written.
    pub(crate) fn settle(&mut self) -> Result<()> {
        while !self.waiting.is_empty() {
            self.append_first()?;
        }
        Ok(())
    }

    /// Waits for all groups and writes the end of the file. Gives the bytes of text in the groups
    /// that were copied.
    ///
    /// # Errors
    /// As [`RowGroups::settle`].
    pub(crate) fn finish(mut self) -> Result<u64> {
        self.settle()?;
        self.file.finish().context("cannot write rows")?;
        Ok(self.copied_text)
    }
}

impl Drop for RowGroups {
    fn drop(&mut self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }
}

impl Waiting {
    fn wait(self) -> Result<Group> {
        let made = loop {
            match self.made.try_recv() {
                Ok(made) => break Some(made),
                Err(TryRecvError::Disconnected) => break None,
                Err(TryRecvError::Empty) => {}
            }
            // This thread is one of the pool's: in a pool of one, nobody else does the work. If it
            // finds nothing to do, the group is in another's hands.
            if rayon::yield_now() != Some(rayon::Yield::Executed) {
                break self.made.recv().ok();
            }
        };
        match made {
            Some(Ok(group)) => group,
            Some(Err(panic)) => resume_unwind(panic),
            None => Err(Error::new("cannot write rows: the threads that make them are gone")),
        }
    }
}

/// The columns of a row group, encoded and compressed.
fn encode(
    columns: &ArrowRowGroupWriterFactory,
    schema: &SchemaRef,
    rows: Vec<RecordBatch>,
) -> Result<Vec<ArrowColumnChunk>> {
    // The number enters the bytes of encrypted files alone.
    let mut writers = columns.create_column_writers(0).context("cannot write rows")?;
    for piece in pieces(schema, rows)? {
        let mut writers = writers.iter_mut();
        for (field, column) in schema.fields().iter().zip(piece.columns()) {
            for leaf in compute_leaves(field, column).context("cannot write rows")? {
                let Some(writer) = writers.next() else {
                    return Err(Error::new(
                        "cannot write rows: there are more columns than before",
                    ));
                };
                writer.write(&leaf).context("cannot write rows")?;
            }
        }
    }
    writers.into_iter().map(|w| w.close().context("cannot write rows")).collect()
}

/// The rows in pieces of [`PIECE_ROWS`], whatever pieces they came in. Only those that lie across
/// two batches are copied.
fn pieces(schema: &SchemaRef, rows: Vec<RecordBatch>) -> Result<Vec<RecordBatch>> {
    let mut out = Vec::new();
    let mut begun: Vec<RecordBatch> = Vec::new();
    let mut begun_rows = 0;
    for batch in rows {
        if batch.schema_ref().fields() != schema.fields() {
            return Err(Error::new("cannot write rows: their columns are not those of the file"));
        }
        let mut start = 0;
        while start < batch.num_rows() {
            let count = (PIECE_ROWS - begun_rows).min(batch.num_rows() - start);
            begun.push(batch.slice(start, count));
            begun_rows += count;
            start += count;
            if begun_rows == PIECE_ROWS {
                out.push(whole(schema, &mut begun)?);
                begun_rows = 0;
            }
        }
    }
    if begun_rows > 0 {
        out.push(whole(schema, &mut begun)?);
    }
    Ok(out)
}

/// The batches as one, which costs nothing if they are one.
fn whole(schema: &SchemaRef, batches: &mut Vec<RecordBatch>) -> Result<RecordBatch> {
    let batches = std::mem::take(batches);
    match <[RecordBatch; 1]>::try_from(batches) {
        Ok([batch]) => Ok(batch),
        Err(batches) => concat_batches(schema, &batches).context("cannot gather rows"),
    }
}

#[cfg(test)]
#[path = "row_groups_tests.rs"]
mod tests;
