//! Rows → a `Dataset` artifact: one Parquet file and `dataset.json`.

use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, StringArray};
use lora_flow_plugin_sdk::{Context, Output, PluginError};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use serde_json::json;

use crate::rows::Row;

/// Writes the data set. The same rows give the same bytes.
///
/// # Errors
/// When a file cannot be written.
pub fn write(output: &Output, rows: &[Row]) -> Result<(), PluginError> {
    let column = |get: fn(&Row) -> &str| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(get)))
    };
    let columns: [(&str, ArrayRef); 5] = [
        ("id", column(|r| &r.id)),
        ("book", column(|r| &r.book)),
        ("chapter", column(|r| &r.chapter)),
        ("title", column(|r| &r.title)),
        ("text", column(|r| &r.text)),
    ];
    let types: serde_json::Map<String, serde_json::Value> =
        columns.iter().map(|(name, _)| ((*name).to_owned(), json!("Utf8"))).collect();
    let batch = RecordBatch::try_from_iter_with_nullable(
        columns.into_iter().map(|(name, array)| (name, array, false)),
    )
    .context("cannot make the table")?;

    let path = output.file("part-00000.parquet")?;
    let shown = format!("cannot write `{}`", path.display());
    let file = std::fs::File::create(&path).context(&shown)?;
    // Statistics of long texts are large and of no use; the writer's version must not show.
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(Default::default()))
        .set_statistics_enabled(EnabledStatistics::None)
        .set_created_by("rust-docs".to_owned())
        .build();
    let mut writer =
        ArrowWriter::try_new(file, batch.schema(), Some(properties)).context(&shown)?;
    writer.write(&batch).context(&shown)?;
    writer.close().context(&shown)?;

    let bytes: usize = rows
        .iter()
        .map(|r| r.id.len() + r.book.len() + r.chapter.len() + r.title.len() + r.text.len())
        .sum();
    let about = json!({ "rows": rows.len(), "bytes": bytes, "columns": types });
    std::fs::write(output.file("dataset.json")?, format!("{about:#}\n"))
        .context("cannot write `dataset.json`")
}
