//! Log-probabilities of chosen tokens after chosen positions, and whether each is the likeliest.
//!
//! What evaluation by log-likelihood asks. Documents that share their beginnings are computed
//! together ([`PrefixTree`]), and only the rows asked about go through the head, each once.

use std::collections::BTreeMap;

use candle_core::Tensor;
use lora_flow_core::{Error, Result, ResultExt};
use lora_flow_kernels::embedding;
use rayon::prelude::*;

use crate::adapter::AdapterMap;
use crate::batch::Batch;
use crate::decoder::Decoder;
use crate::lora::Lora;
use crate::prefix_tree::PrefixTree;

/// Rows of logits that exist at a time.
const ROWS: usize = 128;

/// A token whose log-probability is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// Which document.
    pub document: usize,
    /// The position in it that the token would follow.
    pub position: usize,
    /// The token.
    pub token: u32,
}

/// The answer to an [`Ask`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Told {
    /// ln p of the token.
    pub logprob: f64,
    /// Whether it is the likeliest one; of equals only that of the lowest id is.
    pub likeliest: bool,
}

impl Decoder {
    /// Whether [`Self::score`] computes shared beginnings once: not on a GPU, and not where tokens
    /// see a window of what is before them.
    pub fn shares_beginnings(&self) -> bool {
        self.on_cpu() && self.config().sliding_window.is_none()
    }

    /// Answers questions about documents, in order.
    ///
    /// # Errors
    /// When a document or the adapter does not fit the model, a position or token is out of range,
    /// the logits are not numbers, or the device fails.
    pub fn score(
        &self,
        documents: &[&[u32]],
        adapter: Option<&Lora>,
        asks: &[Ask],
    ) -> Result<Vec<Told>> {
        let vocab = self.config().vocab_size;
        for ask in asks {
            let length = documents.get(ask.document).map_or(0, |d| d.len());
            if ask.position >= length || ask.token as usize >= vocab {
                return Err(Error::new(format!(
                    "position {} of a document of {length} tokens is asked about token {} of a \
                     vocabulary of {vocab}",
                    ask.position, ask.token
                )));
            }
        }
        let batch = Batch::from_documents(documents);
        batch.check(vocab)?;
        let plain = |ask: &Ask| (batch.doc_starts[ask.document] + ask.position) as u32;
        #[cfg(feature = "cuda")]
        if self.cuda().is_some() {
            let logits = self.logits(&batch, adapter)?;
            return answers(asks, plain, |rows| {
                let picked = Tensor::from_slice(rows, rows.len(), logits.device())?;
                logits.index_select(&picked, 0)?.flatten_all()?.to_vec1()
            });
        }
        if let Some((own, lora)) = self.overlaid(adapter)? {
            return own.score(documents, Some(&lora), asks);
        }
        let map = AdapterMap::new(self.config(), adapter, None)?;
        let logits = |x: &Tensor, rows: &[u32]| {
            let picked = embedding::gather(x, rows, x.dtype())?;
            self.head_logits(&picked)?.flatten_all()?.to_vec1::<f32>()
        };
        if !self.shares_beginnings() {
            let x = self.hidden(&batch, &map)?;
            return answers(asks, plain, |rows| logits(&x, rows));
        }
        let tree = PrefixTree::new(documents);
        let x = self.tree_hidden(&tree, &map)?;
        answers(asks, |ask| tree.rows[ask.document][ask.position], |rows| logits(&x, rows))
    }
}

/// Answers by the logits [rows × vocabulary] of the rows that the asks stand in.
fn answers(
    asks: &[Ask],
    row_of: impl Fn(&Ask) -> u32,
    logits_of: impl Fn(&[u32]) -> candle_core::Result<Vec<f32>>,
) -> Result<Vec<Told>> {
    let mut by_row: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (i, ask) in asks.iter().enumerate() {
        by_row.entry(row_of(ask)).or_default().push(i);
    }
    let by_row: Vec<(u32, Vec<usize>)> = by_row.into_iter().collect();
    let mut out = vec![Told { logprob: f64::NAN, likeliest: false }; asks.len()];
    for part in by_row.chunks(ROWS) {
        let rows: Vec<u32> = part.iter().map(|(row, _)| *row).collect();
        let logits = logits_of(&rows).context("cannot compute the logits")?;
        let told: Vec<Result<Vec<Told>>> = part
            .par_iter()
            .zip(logits.par_chunks(logits.len() / rows.len()))
            .map(|((_, members), row)| tell(members.iter().map(|i| asks[*i].token), row))
            .collect();
        for ((_, members), told) in part.iter().zip(told) {
            for (i, told) in members.iter().zip(told?) {
                out[*i] = told;
            }
        }
    }
    Ok(out)
}

/// ln softmax of one row of logits at some tokens. Sums are in f64: with tens of thousands of
/// columns an f32 sum loses its small terms.
fn tell(tokens: impl Iterator<Item = u32>, logits: &[f32]) -> Result<Vec<Told>> {
    let (mut likeliest, mut max) = (0, f32::NEG_INFINITY);
    for (id, logit) in logits.iter().enumerate() {
        if *logit > max {
            (likeliest, max) = (id as u32, *logit);
        }
    }
    // A few thousand f32 terms at a time, added up in f64.
    let sum: f64 = logits
        .chunks(1024)
        .map(|part| part.iter().map(|l| f64::from((l - max).exp())).sum::<f64>())
        .sum();
    let log_sum = sum.ln();
    if !log_sum.is_finite() {
        return Err(Error::new("the model's logits are not numbers")
            .with_hint("check the weights and the adapter for NaN"));
    }
    let told = tokens.map(|token| Told {
        logprob: f64::from(logits[token as usize] - max) - log_sum,
        likeliest: token == likeliest,
    });
    Ok(told.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logprobs_are_those_of_the_softmax_and_ties_go_to_the_lowest_id() {
        let told = tell([0, 1, 2].into_iter(), &[1.0, 3.0, 3.0, -2.0]).unwrap();
        let sum: f64 = [1.0f64, 3.0, 3.0, -2.0].iter().map(|x| x.exp()).sum();
        for (got, (logit, likeliest)) in told.iter().zip([(1.0, false), (3.0, true), (3.0, false)])
        {
            assert!((got.logprob - (logit - sum.ln())).abs() < 1e-6, "{got:?}");
            assert_eq!(got.likeliest, likeliest);
        }
        assert!(tell([0].into_iter(), &[f32::NAN; 4]).is_err());
    }
}
