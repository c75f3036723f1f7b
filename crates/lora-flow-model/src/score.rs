//! Log-probabilities of chosen tokens at chosen positions, and the likeliest token there.
//!
//! What evaluation by log-likelihood asks: a position may have several candidates (the one-token
//! answers of a multiple choice share one pass), and whether greedy decoding would have said the
//! same needs the largest logit as well. Only the rows asked about go through the head.

use candle_core::Tensor;
use lora_flow_core::{Error, Result, ResultExt};
use lora_flow_kernels::embedding;
use rayon::prelude::*;

use crate::adapter::AdapterMap;
use crate::batch::Batch;
use crate::decoder::Decoder;
use crate::layer::KvCache;
use crate::lora::Lora;

/// Rows of logits that exist at a time.
const ROWS: usize = 128;

/// What to tell about the token after a position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// Position in the batch, counted over all its documents.
    pub position: usize,
    /// Tokens whose log-probability is wanted.
    pub tokens: Vec<u32>,
}

/// The answer to an [`Ask`].
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    /// ln p of each token asked about.
    pub logprobs: Vec<f64>,
    /// The likeliest token; of equals the lowest id.
    pub likeliest: u32,
}

impl Decoder {
    /// Answers questions about a batch, in order. The batch's own targets play no part.
    ///
    /// # Errors
    /// When the batch or the adapter does not fit the model, a position or token is out of range,
    /// the logits are not numbers, or the device fails.
    pub fn score(&self, batch: &Batch, adapter: Option<&Lora>, asks: &[Ask]) -> Result<Vec<Told>> {
        let vocab = self.config().vocab_size;
        let wrong = asks
            .iter()
            .find(|a| a.position >= batch.len() || a.tokens.iter().any(|t| *t as usize >= vocab));
        if let Some(ask) = wrong {
            return Err(Error::new(format!(
                "position {} of a batch of {} tokens is asked about tokens {:?} of a vocabulary of \
                 {vocab}",
                ask.position,
                batch.len(),
                ask.tokens
            )));
        }
        #[cfg(feature = "cuda")]
        if self.cuda().is_some() {
            let logits = self.logits(batch, adapter)?.flatten_all().and_then(|l| l.to_vec1());
            let logits: Vec<f32> = logits.context("cannot read the logits")?;
            return asks.iter().map(|a| tell(a, &logits[a.position * vocab..][..vocab])).collect();
        }
        if let Some((own, lora)) = self.overlaid(adapter)? {
            return own.score(batch, Some(&lora), asks);
        }
        let map = AdapterMap::new(self.config(), adapter, None)?;
        let x = self.hidden(batch, &map)?;
        let mut told = Vec::with_capacity(asks.len());
        for asks in asks.chunks(ROWS) {
            let rows: Vec<u32> = asks.iter().map(|a| a.position as u32).collect();
            let logits = embedding::gather(&x, &rows, x.dtype())
                .and_then(|picked| self.head_logits(&picked)?.flatten_all()?.to_vec1::<f32>())
                .context("cannot compute the logits")?;
            let answers: Vec<Result<Told>> = asks
                .par_iter()
                .zip(logits.par_chunks(vocab))
                .map(|(a, row)| tell(a, row))
                .collect();
            for answer in answers {
                told.push(answer?);
            }
        }
        Ok(told)
    }
}

impl Decoder {
    /// ln p of each continuation after one context, and whether greedy decoding gives just it. The
    /// context runs once; its keys and values serve every continuation.
    ///
    /// # Errors
    /// When context or a continuation is empty, a token is out of range, the logits are not numbers,
    /// or the device fails.
    pub fn score_continuations(
        &self,
        context: &[u32],
        continuations: &[&[u32]],
        adapter: Option<&Lora>,
    ) -> Result<Vec<(f64, bool)>> {
        if context.is_empty() || continuations.iter().any(|c| c.is_empty()) {
            return Err(Error::new("a context and its continuations must have tokens"));
        }
        #[cfg(feature = "cuda")]
        if self.cuda().is_some() {
            return self.score_apart(context, continuations, adapter);
        }
        if let Some((own, lora)) = self.overlaid(adapter)? {
            return own.score_continuations(context, continuations, Some(&lora));
        }
        let map = AdapterMap::new(self.config(), adapter, None)?;
        let mut caches: Vec<_> = map.layers.iter().map(|_| KvCache::new()).collect();
        let hidden = self.cached_hidden(context, 0, &map.layers, &mut caches)?;
        let told = |x: &Tensor,
                    rows: std::ops::Range<usize>,
                    tokens: &[u32]|
         -> Result<Vec<Told>> {
            let logits = x
                .narrow(0, rows.start, rows.len())
                .and_then(|x| self.head_logits(&x.contiguous()?)?.flatten_all()?.to_vec1::<f32>())
                .context("cannot compute the logits")?;
            let rows = logits.chunks(self.config().vocab_size).zip(tokens);
            rows.map(|(row, token)| tell(&Ask { position: 0, tokens: vec![*token] }, row)).collect()
        };
        let vocab = self.config().vocab_size;
        if let Some(id) = continuations.iter().copied().flatten().find(|t| **t as usize >= vocab) {
            return Err(Error::new(format!("token {id} is outside the vocabulary of {vocab}")));
        }
        // The first token of every continuation is told by the end of the context.
        let firsts: Vec<u32> = continuations.iter().map(|c| c[0]).collect();
        let last = context.len() - 1;
        let logits = hidden
            .narrow(0, last, 1)
            .and_then(|x| self.head_logits(&x.contiguous()?)?.flatten_all()?.to_vec1::<f32>())
            .context("cannot compute the logits")?;
        let first = tell(&Ask { position: last, tokens: firsts }, &logits)?;
        let mut out = Vec::with_capacity(continuations.len());
        for (continuation, logprob) in continuations.iter().zip(&first.logprobs) {
            let (mut sum, mut greedy) = (*logprob, first.likeliest == continuation[0]);
            if let [begin @ .., _] = continuation
                && !begin.is_empty()
            {
                caches.iter_mut().for_each(|c| c.truncate(context.len()));
                let x = self.cached_hidden(begin, context.len(), &map.layers, &mut caches)?;
                for (told, token) in
                    told(&x, 0..begin.len(), &continuation[1..])?.iter().zip(&continuation[1..])
                {
                    sum += told.logprobs[0];
                    greedy &= told.likeliest == *token;
                }
            }
            out.push((sum, greedy));
        }
        Ok(out)
    }

    /// [`Self::score_continuations`] with the context run again for each: a GPU's decoder has no
    /// cache that can be cut back.
    #[cfg(feature = "cuda")]
    fn score_apart(
        &self,
        context: &[u32],
        continuations: &[&[u32]],
        adapter: Option<&Lora>,
    ) -> Result<Vec<(f64, bool)>> {
        let score = |continuation: &&[u32]| {
            let ids = [context, &continuation[..continuation.len() - 1]].concat();
            let ask = |(i, token): (usize, &u32)| Ask {
                position: context.len() - 1 + i,
                tokens: vec![*token],
            };
            let asks: Vec<Ask> = continuation.iter().enumerate().map(ask).collect();
            let told = self.score(&Batch::from_documents(&[&ids]), adapter, &asks)?;
            let greedy =
                told.iter().zip(*continuation).all(|(told, token)| told.likeliest == *token);
            Ok((told.iter().map(|t| t.logprobs[0]).sum(), greedy))
        };
        continuations.iter().map(score).collect()
    }
}

/// ln softmax of one row of logits at the tokens asked about. Sums are in f64: with tens of
/// thousands of columns an f32 sum loses its small terms.
fn tell(ask: &Ask, logits: &[f32]) -> Result<Told> {
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
    let logprob = |token: &u32| f64::from(logits[*token as usize] - max) - log_sum;
    Ok(Told { logprobs: ask.tokens.iter().map(logprob).collect(), likeliest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logprobs_are_those_of_the_softmax_and_ties_go_to_the_lowest_id() {
        let ask = Ask { position: 0, tokens: vec![0, 2, 2] };
        let told = tell(&ask, &[1.0, 3.0, 3.0, -2.0]).unwrap();
        let sum: f64 = [1.0f64, 3.0, 3.0, -2.0].iter().map(|x| x.exp()).sum();
        assert_eq!(told.likeliest, 1);
        for (got, logit) in told.logprobs.iter().zip([1.0, 3.0, 3.0]) {
            assert!((got - (logit - sum.ln())).abs() < 1e-6, "{got}");
        }
        assert!(tell(&ask, &[f32::NAN; 4]).is_err());
    }
}
