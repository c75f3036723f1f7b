//! Where training rows come from.

use lora_flow_core::Result;
use lora_flow_data::{TokenRow, TokenSet};
use lora_flow_model::batch::{Batch, DocSource, RowRef};

/// One training row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sequence {
    /// Token ids of the documents one after the other.
    pub input_ids: Vec<u32>,
    /// Whether the token at this position is a supervised target.
    pub loss_mask: Vec<bool>,
    /// Lengths of the documents.
    pub doc_lengths: Vec<u32>,
}

impl Sequence {
    /// The row as the batch takes it.
    pub fn as_row(&self) -> RowRef<'_> {
        RowRef {
            input_ids: &self.input_ids,
            loss_mask: &self.loss_mask,
            doc_lengths: &self.doc_lengths,
        }
    }
}

/// Rows by index.
pub trait Sequences: Send + Sync {
    /// Number of rows.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One row; `index` is below [`Self::len`].
    fn row(&self, index: usize) -> RowRef<'_>;
}

impl Sequences for Vec<Sequence> {
    fn len(&self) -> usize {
        self.as_slice().len()
    }

    fn row(&self, index: usize) -> RowRef<'_> {
        self[index].as_row()
    }
}

impl Sequences for TokenSet {
    fn len(&self) -> usize {
        self.rows()
    }

    fn row(&self, index: usize) -> RowRef<'_> {
        let TokenRow { input_ids, loss_mask, doc_lengths } = TokenSet::row(self, index);
        RowRef { input_ids, loss_mask, doc_lengths }
    }
}

/// The rows of one pass.
pub(crate) struct Loaded {
    pub(crate) batch: Batch,
    /// Row and document of each document of the batch, rows by their index in the whole.
    pub(crate) sources: Vec<DocSource>,
    /// Tokens of the rows, also of those that the batch leaves out.
    pub(crate) tokens: usize,
}

/// Reads rows into a batch.
pub(crate) fn load(rows: &dyn Sequences, indices: &[usize]) -> Result<Loaded> {
    let (batch, mut sources) = Batch::from_rows(indices.iter().map(|i| rows.row(*i)))?;
    sources.iter_mut().for_each(|s| s.row = indices[s.row]);
    let tokens = indices.iter().map(|i| rows.row(*i).input_ids.len()).sum();
    Ok(Loaded { batch, sources, tokens })
}

/// Number of positions whose loss counts: targets that are not the first of their document.
pub(crate) fn supervised(row: RowRef<'_>) -> usize {
    let mut start = 0;
    let mut count = 0;
    for len in row.doc_lengths {
        let end = (start + *len as usize).min(row.loss_mask.len());
        let targets = row.loss_mask.get(start + 1..end).unwrap_or_default();
        count += targets.iter().filter(|t| **t).count();
        start = end;
    }
    count
}
