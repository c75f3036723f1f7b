//! Task kinds that make and prepare data: `ingest` (files → Dataset) and `tokenize`
//! (Dataset → Tokens).

mod ingest;
mod params;
mod selection;
mod tokenize;

#[cfg(test)]
mod testing;

use lora_flow_core::{TaskKind, kind};

pub use ingest::Ingest;
pub use params::{Columns, Dedup, Names};
pub use tokenize::{Format, OnOverflow, TokenColumns, Tokenize};

/// The task kinds of this plugin.
pub const TASKS: &[TaskKind] = &[
    kind::<Ingest>("ingest", 3, "rows from Parquet, JSONL or CSV: filter, deduplicate, split"),
    kind::<Tokenize>("tokenize", 2, "rows to token sequences: chat template, loss mask, packing"),
];
