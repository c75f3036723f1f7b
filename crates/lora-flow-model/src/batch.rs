//! Padding-free batches: documents one after the other, with cumulative lengths.
//!
//! There is no padding and no attention mask. A document's tokens see only tokens of the same
//! document, positions restart with each document, and a position has at most one target: the
//! token that follows it in its document. A batch of packed rows, of single documents, or of any
//! mixture gives the same loss per token.

use lora_flow_core::{Error, Result};

/// One training row as it stands in a `Tokens` artifact.
#[derive(Debug, Clone, Copy)]
pub struct RowRef<'a> {
    /// Token ids of the row: its documents one after the other.
    pub input_ids: &'a [u32],
    /// Whether the token at this position is a supervised target. Same length as `input_ids`.
    pub loss_mask: &'a [bool],
    /// Lengths of the documents; their sum is the length of the row.
    pub doc_lengths: &'a [u32],
}

/// Where a document of a batch came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DocSource {
    /// Index of the row among the rows given to [`Batch::from_rows`].
    pub row: usize,
    /// Index of the document in that row.
    pub doc: usize,
}

/// Documents one after the other, padding-free.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, N in all.
    pub input_ids: Vec<u32>,
    /// Cumulative document lengths, from 0 to N.
    pub doc_starts: Vec<usize>,
    /// The token that each position has to predict; `None` where nothing is supervised.
    pub targets: Vec<Option<u32>>,
}

impl Batch {
    /// Whole documents, every token but the first of each supervised.
    pub fn from_documents<D: AsRef<[u32]>>(documents: &[D]) -> Self {
        let mut batch = Self { doc_starts: vec![0], ..Self::default() };
        for document in documents {
            let ids = document.as_ref();
            batch.input_ids.extend_from_slice(ids);
            batch.targets.extend(ids.iter().skip(1).map(|id| Some(*id)));
            batch.targets.resize(batch.input_ids.len(), None);
            batch.doc_starts.push(batch.input_ids.len());
        }
        batch
    }

    /// The rows of a `Tokens` artifact. What cannot change the loss is left out: the tokens after
    /// the last one that has a target (attention is causal), and documents without any target.
    ///
    /// Returns for each document of the batch where it came from.
    ///
    /// # Errors
    /// When the lengths of a row contradict each other; the message has the row's index.
    pub fn from_rows<'a>(
        rows: impl IntoIterator<Item = RowRef<'a>>,
    ) -> Result<(Self, Vec<DocSource>)> {
        let mut batch = Self { doc_starts: vec![0], ..Self::default() };
        let mut sources = Vec::new();
        for (row, data) in rows.into_iter().enumerate() {
            let length: usize = data.doc_lengths.iter().map(|l| *l as usize).sum();
            if data.input_ids.len() != data.loss_mask.len() || data.input_ids.len() != length {
                return Err(Error::new(format!(
                    "row {row} of the batch has {} `input_ids`, {} `loss_mask` and `doc_lengths` \
                     that add up to {length}",
                    data.input_ids.len(),
                    data.loss_mask.len(),
                )));
            }
            let mut start = 0;
            for (doc, len) in data.doc_lengths.iter().enumerate() {
                let end = start + *len as usize;
                if batch.push_document(&data.input_ids[start..end], &data.loss_mask[start..end]) {
                    sources.push(DocSource { row, doc });
                }
                start = end;
            }
        }
        Ok((batch, sources))
    }

    /// Adds a document up to its last target; false if it has none.
    fn push_document(&mut self, ids: &[u32], mask: &[bool]) -> bool {
        let is_target = |t: usize| t > 0 && mask[t];
        let Some(last) = (0..ids.len()).rev().find(|t| is_target(*t)) else { return false };
        self.input_ids.extend_from_slice(&ids[..last]);
        self.targets.extend((1..=last).map(|t| is_target(t).then(|| ids[t])));
        self.doc_starts.push(self.input_ids.len());
        true
    }

    /// Number of tokens N.
    pub fn len(&self) -> usize {
        self.input_ids.len()
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.input_ids.is_empty()
    }

    /// Number of positions that have a target.
    pub fn supervised(&self) -> usize {
        self.targets.iter().flatten().count()
    }

    /// Positions that have a target, and those targets, in order.
    pub fn supervised_rows(&self) -> (Vec<u32>, Vec<u32>) {
        let rows = self.targets.iter().enumerate();
        rows.filter_map(|(i, target)| target.map(|t| (i as u32, t))).unzip()
    }

    /// Number of supervised positions of each document.
    pub fn supervised_per_document(&self) -> Vec<usize> {
        let docs = self.doc_starts.windows(2);
        docs.map(|d| self.targets[d[0]..d[1]].iter().flatten().count()).collect()
    }

    /// Position of each token in its document.
    pub fn positions(&self) -> Vec<u32> {
        self.doc_starts.windows(2).flat_map(|d| 0..(d[1] - d[0]) as u32).collect()
    }

    /// Length of the longest document.
    pub fn longest(&self) -> usize {
        self.doc_starts.windows(2).map(|d| d[1] - d[0]).max().unwrap_or(0)
    }

    /// Checks that the parts agree and that every id is below `vocab_size`.
    ///
    /// # Errors
    /// Says which part is wrong and where.
    pub fn check(&self, vocab_size: usize) -> Result<()> {
        let n = self.len();
        let ends = (self.doc_starts.first(), self.doc_starts.last());
        if self.targets.len() != n || ends != (Some(&0), Some(&n)) || !self.doc_starts.is_sorted() {
            return Err(Error::new(format!(
                "a batch of {n} tokens has {} targets and document starts from {:?} to {:?}",
                self.targets.len(),
                ends.0,
                ends.1
            )));
        }
        let ids = self.input_ids.iter().chain(self.targets.iter().flatten());
        if let Some(id) = ids.copied().find(|id| *id as usize >= vocab_size) {
            return Err(Error::new(format!(
                "token id {id} is outside the model's vocabulary of {vocab_size}"
            ))
            .with_hint("tokenise the data with the tokenizer of this model"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row<'a>(ids: &'a [u32], mask: &'a [bool], docs: &'a [u32]) -> RowRef<'a> {
        RowRef { input_ids: ids, loss_mask: mask, doc_lengths: docs }
    }

    #[test]
    fn targets_stop_at_documents_and_unneeded_tokens_are_left_out() {
        let (t, f) = (true, false);
        let (batch, sources) = Batch::from_rows([
            // The mask at a document's first token must not make its predecessor predict it.
            row(&[1, 2, 3, 4, 5], &[t, t, t, t, t], &[3, 2]),
            // A prompt of two tokens; the last token is not supervised.
            row(&[6, 7, 8, 9], &[f, f, t, f], &[4]),
            // Nothing supervised at all.
            row(&[10, 11], &[t, f], &[2]),
        ])
        .unwrap();
        assert_eq!(batch.input_ids, [1, 2, 4, 6, 7]);
        assert_eq!(batch.targets, [Some(2), Some(3), Some(5), None, Some(8)]);
        assert_eq!(batch.doc_starts, [0, 2, 3, 5]);
        assert_eq!(batch.positions(), [0, 1, 0, 0, 1]);
        assert_eq!(batch.supervised_per_document(), [2, 1, 1]);
        assert_eq!(batch.supervised_rows(), (vec![0, 1, 2, 4], vec![2, 3, 5, 8]));
        let of = |row, doc| DocSource { row, doc };
        assert_eq!(sources, [of(0, 0), of(0, 1), of(1, 0)]);
        batch.check(12).unwrap();
        assert!(batch.check(8).unwrap_err().to_string().contains("token id 8"));
    }

    #[test]
    fn rows_whose_lengths_disagree_are_refused() {
        let e = Batch::from_rows([row(&[1, 2], &[true, true], &[3])]).unwrap_err();
        assert!(e.to_string().contains("row 0"), "{e}");
    }
}
