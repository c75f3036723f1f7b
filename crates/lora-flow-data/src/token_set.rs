//! The Tokens artifact as the trainer and the evaluator use it: all sequences in memory.

use arrow_array::cast::AsArray;
use arrow_array::types::UInt32Type;
use arrow_array::{Array, ArrayRef, ListArray};
use arrow_schema::{DataType, Field};
use lora_flow_core::{Artifact, Digest, Error, Result, ResultExt};
use serde::{Deserialize, Serialize};

use crate::columns::type_name;
use crate::data_file::{DataFile, FileFormat};
use crate::table::Table;

/// What `tokens.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokensInfo {
    /// Training sequences, the rows of `tokens.parquet`.
    pub sequences: u64,
    /// Documents in them.
    pub documents: u64,
    /// Tokens in them.
    pub tokens: u64,
    /// Tokens that are targets.
    pub supervised: u64,
    /// Rows of data whose end was cut off.
    #[serde(default)]
    pub truncated_documents: u64,
    /// Rows of data that became no document.
    #[serde(default)]
    pub dropped_documents: u64,
    /// Most tokens of a sequence.
    pub max_length: usize,
    /// Whether a sequence may hold several documents.
    pub packing: bool,
    /// One more than the largest id the tokenizer can give.
    pub vocab_size: usize,
    /// Digest of the `tokenizer.json` that made them.
    pub tokenizer_digest: Option<Digest>,
    /// The id that ends a text.
    pub eos_token_id: Option<u32>,
    /// Bytes of text behind the tokens.
    #[serde(default)]
    pub text_bytes: u64,
    /// Words of text behind the tokens.
    #[serde(default)]
    pub text_words: u64,
}

/// One training sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenRow<'a> {
    /// Token ids.
    pub input_ids: &'a [u32],
    /// Whether each token is a target; as long as `input_ids`.
    pub loss_mask: &'a [bool],
    /// Lengths of its documents, in order; they add up to its length.
    pub doc_lengths: &'a [u32],
}

impl<'a> TokenRow<'a> {
    /// Its documents, in order, each as a row of one document.
    pub fn documents(self) -> impl Iterator<Item = TokenRow<'a>> {
        let mut start = 0;
        self.doc_lengths.iter().enumerate().map(move |(i, &length)| {
            let end = start + length as usize;
            let document = TokenRow {
                input_ids: &self.input_ids[start..end],
                loss_mask: &self.loss_mask[start..end],
                doc_lengths: &self.doc_lengths[i..=i],
            };
            start = end;
            document
        })
    }
}

/// A Tokens artifact in memory: 5 bytes a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenSet {
    /// The facts of `tokens.json`.
    pub info: TokensInfo,
    ids: Vec<u32>,
    mask: Vec<bool>,
    /// Start of each row in `ids`, and the end of the last.
    offsets: Vec<usize>,
    lengths: Vec<u32>,
    /// Start of each row in `lengths`, and the end of the last.
    length_offsets: Vec<usize>,
}

impl TokenSet {
    /// Reads and checks a Tokens artifact.
    ///
    /// # Errors
    /// When a file is missing or damaged, or the rows contradict themselves or `tokens.json`.
    pub fn open(artifact: &Artifact) -> Result<Self> {
        let info: TokensInfo =
            serde_json::from_slice(&fs_err::read(artifact.file("tokens.json")?)?)
                .context("`tokens.json` cannot be read")?;
        let file = DataFile::new(
            "tokens.parquet",
            artifact.file("tokens.parquet")?,
            Some(FileFormat::Parquet),
        )?;
        let table = Table::open(vec![file], &[])?;
        let names = ["input_ids", "loss_mask", "doc_lengths"].map(str::to_owned);
        let mut set = Self::empty(info);
        for batch in table.scan(&names)? {
            let batch = batch?;
            let [ids, mask, lengths] = [
                list(batch.rows.column(0), &names[0], &DataType::UInt32)?,
                list(batch.rows.column(1), &names[1], &DataType::Boolean)?,
                list(batch.rows.column(2), &names[2], &DataType::UInt32)?,
            ];
            for row in 0..batch.rows.num_rows() {
                let (ids, mask, lengths) = (ids.value(row), mask.value(row), lengths.value(row));
                let mask: Vec<bool> = mask.as_boolean().values().iter().collect();
                set.push(
                    ids.as_primitive::<UInt32Type>().values(),
                    &mask,
                    lengths.as_primitive::<UInt32Type>().values(),
                )
                .with_context(|| batch.place(row))?;
            }
        }
        if set.rows() as u64 != set.info.sequences {
            return Err(Error::new(format!(
                "`tokens.json` promises {} sequences, `tokens.parquet` has {}",
                set.info.sequences,
                set.rows()
            )));
        }
        if set.rows() == 0 {
            return Err(Error::new("`tokens.parquet` has no sequences"));
        }
        Ok(set)
    }

    /// A set made in memory from `(input_ids, loss_mask, doc_lengths)`, checked in the same way.
    ///
    /// # Errors
    /// When a row contradicts itself.
    pub fn from_rows<'a>(
        info: TokensInfo,
        rows: impl IntoIterator<Item = (&'a [u32], &'a [bool], &'a [u32])>,
    ) -> Result<Self> {
        let mut set = Self::empty(info);
        for (i, (ids, mask, lengths)) in rows.into_iter().enumerate() {
            set.push(ids, mask, lengths).with_context(|| format!("row {}", i + 1))?;
        }
        Ok(set)
    }

    fn empty(info: TokensInfo) -> Self {
        let tokens = usize::try_from(info.tokens).unwrap_or(0).min(1 << 32);
        Self {
            info,
            ids: Vec::with_capacity(tokens.min(1 << 24)),
            mask: Vec::with_capacity(tokens.min(1 << 24)),
            offsets: vec![0],
            lengths: Vec::new(),
            length_offsets: vec![0],
        }
    }

    fn push(&mut self, ids: &[u32], mask: &[bool], lengths: &[u32]) -> Result<()> {
        if ids.is_empty() {
            return Err(Error::new("a sequence without tokens"));
        }
        if mask.len() != ids.len() {
            return Err(Error::new(format!(
                "`loss_mask` has {} entries for {} tokens",
                mask.len(),
                ids.len()
            )));
        }
        let total: u64 = lengths.iter().map(|l| u64::from(*l)).sum();
        if total != ids.len() as u64 || lengths.contains(&0) {
            return Err(Error::new(format!(
                "`doc_lengths` are {lengths:?}, which is no division of {} tokens",
                ids.len()
            )));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.info.vocab_size) {
            return Err(Error::new(format!(
                "token id {id} is not below the vocabulary size {}",
                self.info.vocab_size
            )));
        }
        let mut start = 0;
        for length in lengths {
            if mask[start] {
                return Err(Error::new(format!(
                    "token {start} is the first of its document and yet a target"
                )));
            }
            start += *length as usize;
        }
        self.ids.extend_from_slice(ids);
        self.mask.extend_from_slice(mask);
        self.offsets.push(self.ids.len());
        self.lengths.extend_from_slice(lengths);
        self.length_offsets.push(self.lengths.len());
        Ok(())
    }

    /// Number of sequences.
    pub fn rows(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Number of targets.
    pub fn supervised(&self) -> usize {
        self.mask.iter().filter(|m| **m).count()
    }

    /// A sequence.
    ///
    /// # Panics
    /// When there is no row `i`.
    pub fn row(&self, i: usize) -> TokenRow<'_> {
        let tokens = self.offsets[i]..self.offsets[i + 1];
        TokenRow {
            input_ids: &self.ids[tokens.clone()],
            loss_mask: &self.mask[tokens],
            doc_lengths: &self.lengths[self.length_offsets[i]..self.length_offsets[i + 1]],
        }
    }

    /// All sequences, in order.
    pub fn iter(&self) -> impl Iterator<Item = TokenRow<'_>> {
        (0..self.rows()).map(|i| self.row(i))
    }

    /// Checks that the tokens were made by a model's tokenizer.
    ///
    /// # Errors
    /// When the model's `tokenizer.json` is another one.
    pub fn check_tokenizer(&self, model: &Artifact) -> Result<()> {
        let theirs = model.files.get("tokenizer.json").map(|f| f.digest);
        match (self.info.tokenizer_digest, theirs) {
            (Some(ours), Some(theirs)) if ours != theirs => {
                Err(Error::new("the tokens were made by another tokenizer than the model's")
                    .with_hint("give `tokenize` and this task the same `model`"))
            }
            _ => Ok(()),
        }
    }
}

/// A list column with items of the wanted type and no nulls.
fn list(array: &ArrayRef, name: &str, item: &DataType) -> Result<ListArray> {
    let wanted = DataType::List(std::sync::Arc::new(Field::new("item", item.clone(), true)));
    let wrong = || {
        Error::new(format!(
            "column `{name}` of `tokens.parquet` holds {}, not lists of {item}",
            type_name(array.data_type())
        ))
    };
    if !matches!(array.data_type(), DataType::List(_)) {
        return Err(wrong());
    }
    let list = crate::columns::convert(array, &wanted).map_err(|e| wrong().with_source(e))?;
    let list = list.as_list_opt::<i32>().ok_or_else(wrong)?;
    if list.null_count() > 0 || list.values().null_count() > 0 {
        return Err(Error::new(format!("column `{name}` of `tokens.parquet` holds nulls")));
    }
    Ok(list.clone())
}
