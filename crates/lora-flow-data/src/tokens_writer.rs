//! Writes the Tokens artifact, packing documents on the way.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::builder::{BooleanBuilder, ListBuilder, UInt32Builder};
use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use lora_flow_core::{Digest, Error, Result, ResultExt};
use parquet::arrow::ArrowWriter;

use crate::dataset::parquet_properties;
use crate::document::{Document, DropReason, Encoded};
use crate::pack::best_fit_decreasing;
use crate::token_report::render_masked;
use crate::token_set::TokensInfo;
use crate::token_statistics::{STATISTICS_FILE, TokenStatistics};
use crate::tokenizer::TextTokenizer;

/// Sequences of a row group.
const ROW_GROUP_ROWS: usize = 1024;
/// How hard zstd tries: next to tokenising it costs nothing.
const ZSTD_LEVEL: i32 = 3;
/// Tokens gathered before they are packed; bounds memory and fixes which documents can meet.
const WINDOW_TOKENS: usize = 1 << 23;
/// Characters of the example.
const EXAMPLE_CHARS: usize = 700;

/// Facts and choices for a Tokens artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokensWriterOptions {
    /// Most tokens of a sequence.
    pub max_length: usize,
    /// Whether a sequence may hold several documents.
    pub packing: bool,
    /// One more than the largest id the tokenizer can give.
    pub vocab_size: usize,
    /// Digest of `tokenizer.json`.
    pub tokenizer_digest: Option<Digest>,
    /// The id that ends a text.
    pub eos_token_id: Option<u32>,
}

/// What became of the rows.
#[derive(Debug, Clone)]
pub struct TokensSummary {
    /// What `tokens.json` says.
    pub info: TokensInfo,
    /// Rows of data taken in.
    pub rows: u64,
    /// Rows that became several documents.
    pub split_rows: u64,
    /// Rows that became no document, by reason.
    pub dropped: BTreeMap<DropReason, u64>,
    /// Rows where one token holds the end of the prompt and the start of the completion.
    pub joined_tokens: u64,
    /// What `statistics.json` says.
    pub statistics: TokenStatistics,
    /// The first document, written out with its targets marked.
    pub example: String,
}

/// Takes in what rows became and writes `tokens.parquet`, `tokens.json` and `statistics.json`.
pub struct TokensWriter {
    folder: PathBuf,
    options: TokensWriterOptions,
    writer: ArrowWriter<std::fs::File>,
    sequences: SequenceBuilder,
    window: Vec<Document>,
    window_tokens: usize,
    first: Option<Document>,
    info: TokensInfo,
    rows: u64,
    split_rows: u64,
    joined_tokens: u64,
    dropped: BTreeMap<DropReason, u64>,
    lengths: Vec<u32>,
}

impl TokensWriter {
    /// A writer into an empty folder.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn new(folder: &Path, options: TokensWriterOptions) -> Result<Self> {
        let sequences = SequenceBuilder::new();
        let path = folder.join("tokens.parquet");
        let file = std::fs::File::create(&path)
            .with_context(|| format!("cannot create `{}`", path.display()))?;
        let writer = ArrowWriter::try_new_with_options(
            file,
            sequences.schema.clone(),
            parquet_properties(ROW_GROUP_ROWS, ZSTD_LEVEL)?,
        )
        .context("cannot write `tokens.parquet`")?;
        let info = TokensInfo {
            sequences: 0,
            documents: 0,
            tokens: 0,
            supervised: 0,
            truncated_documents: 0,
            dropped_documents: 0,
            max_length: options.max_length,
            packing: options.packing,
            vocab_size: options.vocab_size,
            tokenizer_digest: options.tokenizer_digest,
            eos_token_id: options.eos_token_id,
            text_bytes: 0,
            text_words: 0,
        };
        Ok(Self {
            folder: folder.to_owned(),
            options,
            writer,
            sequences,
            window: Vec::new(),
            window_tokens: 0,
            first: None,
            info,
            rows: 0,
            split_rows: 0,
            joined_tokens: 0,
            dropped: BTreeMap::new(),
            lengths: Vec::new(),
        })
    }

    /// Takes in what one row became.
    ///
    /// # Errors
    /// When full sequences cannot be written.
    pub fn push(&mut self, encoded: Encoded) -> Result<()> {
        self.rows += 1;
        self.info.truncated_documents += u64::from(encoded.truncated);
        self.joined_tokens += u64::from(encoded.joined_token);
        self.split_rows += u64::from(encoded.documents.len() > 1);
        if let Some(reason) = encoded.dropped {
            self.info.dropped_documents += 1;
            *self.dropped.entry(reason).or_default() += 1;
        }
        for document in encoded.documents {
            self.info.documents += 1;
            self.info.tokens += document.ids.len() as u64;
            self.info.supervised += document.supervised() as u64;
            self.info.text_bytes += document.bytes;
            self.info.text_words += document.words;
            self.lengths.push(u32::try_from(document.ids.len()).unwrap_or(u32::MAX));
            if self.first.is_none() {
                self.first = Some(document.clone());
            }
            if self.options.packing {
                self.window_tokens += document.ids.len();
                self.window.push(document);
                if self.window_tokens >= WINDOW_TOKENS {
                    self.pack_window()?;
                }
            } else {
                self.write_sequence(&[&document])?;
            }
        }
        Ok(())
    }

    fn pack_window(&mut self) -> Result<()> {
        let window = std::mem::take(&mut self.window);
        self.window_tokens = 0;
        let lengths: Vec<usize> = window.iter().map(|d| d.ids.len()).collect();
        for sequence in best_fit_decreasing(&lengths, self.options.max_length) {
            let documents: Vec<&Document> = sequence.iter().map(|&i| &window[i]).collect();
            self.write_sequence(&documents)?;
        }
        Ok(())
    }

    fn write_sequence(&mut self, documents: &[&Document]) -> Result<()> {
        self.info.sequences += 1;
        if self.sequences.push(documents) == ROW_GROUP_ROWS {
            self.write_group()?;
        }
        Ok(())
    }

    fn write_group(&mut self) -> Result<()> {
        let batch = self.sequences.finish()?;
        self.writer.write(&batch).context("cannot write `tokens.parquet`")
    }

    /// Writes what is left, `tokens.json` and `statistics.json`.
    ///
    /// # Errors
    /// When no row became a document, when no token is supervised (the error shows an example),
    /// or when the files cannot be written.
    pub fn finish(mut self, tokenizer: &TextTokenizer) -> Result<TokensSummary> {
        self.pack_window()?;
        if self.sequences.rows > 0 {
            self.write_group()?;
        }
        let Some(first) = &self.first else {
            let reasons: Vec<String> =
                self.dropped.iter().map(|(r, n)| format!("{n} {}", r.text())).collect();
            return Err(Error::new(format!(
                "none of the {} rows became tokens: {}",
                self.rows,
                reasons.join(", ")
            ))
            .with_hint(
                "check the names under `columns`, the filter of the data, and `max_length`",
            ));
        };
        let example = render_masked(first, tokenizer, EXAMPLE_CHARS)?;
        if self.info.supervised == 0 {
            return Err(Error::new(format!(
                "no token of the {} documents is supervised, so there is nothing to learn; the \
                 first is:\n{example}",
                self.info.documents
            ))
            .with_hint("check the roles or the completion column, and the chat template"));
        }
        self.writer.close().context("cannot write `tokens.parquet`")?;
        let json = serde_json::to_string_pretty(&self.info)? + "\n";
        fs_err::write(self.folder.join("tokens.json"), json)?;
        self.lengths.sort_unstable();
        let statistics = TokenStatistics::new(&self.lengths, first, tokenizer)?;
        let json = serde_json::to_string(&statistics)? + "\n";
        fs_err::write(self.folder.join(STATISTICS_FILE), json)?;
        Ok(TokensSummary {
            info: self.info,
            rows: self.rows,
            split_rows: self.split_rows,
            dropped: self.dropped,
            joined_tokens: self.joined_tokens,
            statistics,
            example,
        })
    }
}

/// Gathers sequences for a row group.
struct SequenceBuilder {
    schema: SchemaRef,
    ids: ListBuilder<UInt32Builder>,
    mask: ListBuilder<BooleanBuilder>,
    lengths: ListBuilder<UInt32Builder>,
    rows: usize,
}

impl SequenceBuilder {
    fn new() -> Self {
        let item = |t: DataType| Arc::new(Field::new("item", t, false));
        let list = |name: &str, t: DataType| Field::new(name, DataType::List(item(t)), false);
        Self {
            schema: Arc::new(Schema::new(vec![
                list("input_ids", DataType::UInt32),
                list("loss_mask", DataType::Boolean),
                list("doc_lengths", DataType::UInt32),
            ])),
            ids: ListBuilder::new(UInt32Builder::new()).with_field(item(DataType::UInt32)),
            mask: ListBuilder::new(BooleanBuilder::new()).with_field(item(DataType::Boolean)),
            lengths: ListBuilder::new(UInt32Builder::new()).with_field(item(DataType::UInt32)),
            rows: 0,
        }
    }

    /// Adds a sequence; gives how many there are now.
    fn push(&mut self, documents: &[&Document]) -> usize {
        for document in documents {
            self.ids.values().append_slice(&document.ids);
            self.mask.values().append_slice(&document.targets);
            self.lengths
                .values()
                .append_value(u32::try_from(document.ids.len()).unwrap_or(u32::MAX));
        }
        self.ids.append(true);
        self.mask.append(true);
        self.lengths.append(true);
        self.rows += 1;
        self.rows
    }

    fn finish(&mut self) -> Result<RecordBatch> {
        self.rows = 0;
        let columns: Vec<ArrayRef> = vec![
            Arc::new(self.ids.finish()),
            Arc::new(self.mask.finish()),
            Arc::new(self.lengths.finish()),
        ];
        RecordBatch::try_new(self.schema.clone(), columns).context("cannot gather sequences")
    }
}
