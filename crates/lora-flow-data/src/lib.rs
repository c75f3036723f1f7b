//! Data sets, formats, chat templates, tokenizers, packing.
//!
//! The way of a row: a file ([`DataFile`]) is read as part of a [`Table`]; rows are filtered
//! ([`RowFilter`]), freed of duplicates ([`Deduplicator`]), dealt to splits ([`Splitter`]) and
//! written as a Dataset artifact ([`DatasetWriter`]). A [`RowEncoder`] then turns each row into
//! token [`Document`]s, [`pack`] puts them into training sequences, [`TokensWriter`] writes the
//! Tokens artifact, and the trainer and the evaluator read it as a [`TokenSet`].

mod assistant_spans;
mod cell;
mod chat_template;
mod columns;
mod copied_groups;
mod csv_file;
mod data_file;
mod dataset;
mod dedup;
mod document;
pub mod jinja;
mod json_shape;
mod jsonl_file;
pub mod pack;
mod parquet_file;
mod python_text;
mod row_filter;
mod row_groups;
mod row_hash;
mod split;
mod table;
mod token_report;
mod token_set;
mod token_statistics;
mod tokenizer;
mod tokens_writer;

pub mod formats;

#[cfg(test)]
mod testing;

pub use cell::cell;
pub use chat_template::{ChatTemplate, Rendered};
pub use columns::{no_such_column, require_text};
pub use data_file::{DataFile, FileFormat};
pub use dataset::{DatasetInfo, DatasetWriter, dataset_files};
pub use dedup::Deduplicator;
pub use document::{Document, DropReason, Encoded, Overflow, count_words, split_document};
pub use formats::{ColumnNames, FormatKind, FormatOptions, RowEncoder};
pub use python_text::python_str;
pub use row_filter::RowFilter;
pub use row_hash::{RowHash, hash_row};
pub use split::{SplitCount, Splitter};
pub use table::{Batch, Scan, Table};
pub use token_report::{group_digits, render_masked};
pub use token_set::{TokenRow, TokenSet, TokensInfo};
pub use token_statistics::{Bar, Example, Piece, STATISTICS_FILE, TokenStatistics};
pub use tokenizer::{ByteSpan, SpecialToken, TextTokenizer};
pub use tokens_writer::{TokensSummary, TokensWriter, TokensWriterOptions};
