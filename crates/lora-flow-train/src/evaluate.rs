//! Loss over a set of sequences, document by document.

use lora_flow_core::{Error, Result};
use lora_flow_model::decoder::Decoder;
use lora_flow_model::lora::Lora;

use crate::sequences::{Sequences, load};

/// How many rows go through the model at once. The losses are the same to rounding whatever it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// At most this many rows.
    pub rows: usize,
    /// At most this many tokens; a longer row goes alone.
    pub tokens: usize,
}

/// Loss of one document.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DocumentLoss {
    /// Row of the tokens artifact.
    pub row: usize,
    /// Document within the row.
    pub doc: usize,
    /// Supervised tokens, at least one.
    pub tokens: usize,
    /// Σ −ln p of them.
    pub nll: f64,
}

/// Mean loss with its standard error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MeanLoss {
    /// Σ −ln p over all supervised tokens / their number.
    pub mean: f64,
    /// Standard error of the mean with documents as clusters; `None` with a single one.
    pub standard_error: Option<f64>,
    /// Supervised tokens.
    pub tokens: usize,
    /// Documents that have any.
    pub documents: usize,
}

/// Losses of the documents of the first `rows` rows, those without supervised tokens left out.
/// `progress` is called with the number of rows done and may stop the work with an error.
///
/// # Errors
/// When a row cannot be read or does not fit the model, a loss is not finite, or `progress` says
/// so.
pub fn document_losses(
    decoder: &Decoder,
    adapter: Option<&Lora>,
    data: &dyn Sequences,
    rows: usize,
    budget: Budget,
    mut progress: impl FnMut(usize) -> Result<()>,
) -> Result<Vec<DocumentLoss>> {
    let rows = rows.min(data.len());
    let mut losses = Vec::new();
    let mut next = 0;
    while next < rows {
        let start = next;
        let mut tokens = 0;
        let mut indices = Vec::new();
        while next < rows && indices.len() < budget.rows.max(1) {
            let len = data.row(next).input_ids.len();
            if !indices.is_empty() && tokens + len > budget.tokens {
                break;
            }
            tokens += len;
            indices.push(next);
            next += 1;
        }
        let loaded = load(data, &indices)?;
        let nll = decoder.nll(&loaded.batch, adapter)?;
        let counts = loaded.batch.supervised_per_document();
        let mut at = 0;
        for (source, tokens) in loaded.sources.iter().zip(counts) {
            let nll: f64 = nll[at..at + tokens].iter().map(|x| f64::from(*x)).sum();
            at += tokens;
            if !nll.is_finite() {
                return Err(Error::new(format!(
                    "the loss of document {} in row {} is {nll}",
                    source.doc, source.row
                ))
                .with_hint("check the weights and the adapter for values that are not finite"));
            }
            losses.push(DocumentLoss { row: source.row, doc: source.doc, tokens, nll });
        }
        debug_assert!(next > start);
        progress(next)?;
    }
    Ok(losses)
}

/// Token-weighted mean of the losses.
///
/// The mean is a ratio m = Σ nllᵢ / Σ nᵢ over documents i; its variance by the delta method with
/// documents as clusters is G/(G−1) · Σ (nllᵢ − m·nᵢ)² / (Σ nᵢ)². Tokens of a document are not
/// independent, so counting tokens instead would make the error look too small.
pub fn mean_loss(losses: &[DocumentLoss]) -> Option<MeanLoss> {
    let tokens: usize = losses.iter().map(|l| l.tokens).sum();
    if tokens == 0 {
        return None;
    }
    let total = tokens as f64;
    let mean = losses.iter().map(|l| l.nll).sum::<f64>() / total;
    let documents = losses.len();
    let standard_error = (documents > 1).then(|| {
        let squares: f64 = losses.iter().map(|l| (l.nll - mean * l.tokens as f64).powi(2)).sum();
        let groups = documents as f64;
        (groups / (groups - 1.0) * squares).sqrt() / total
    });
    Some(MeanLoss { mean, standard_error, tokens, documents })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_error_of_equal_clusters_is_that_of_their_means() {
        let losses: Vec<_> = [1.0, 2.0, 4.0, 5.0]
            .iter()
            .enumerate()
            .map(|(row, mean)| DocumentLoss { row, doc: 0, tokens: 10, nll: mean * 10.0 })
            .collect();
        let loss = mean_loss(&losses).unwrap();
        assert_eq!((loss.mean, loss.tokens, loss.documents), (3.0, 40, 4));
        // Sample variance of 1, 2, 4, 5 is 10/3; divided by 4 and rooted.
        let expected = (10.0f64 / 3.0 / 4.0).sqrt();
        assert!((loss.standard_error.unwrap() - expected).abs() < 1e-12);
        assert_eq!(mean_loss(&losses[..1]).unwrap().standard_error, None);
        assert_eq!(mean_loss(&[]), None);
    }

    #[test]
    fn the_mean_weighs_tokens_not_documents() {
        let doc = |tokens, nll| DocumentLoss { row: 0, doc: 0, tokens, nll };
        assert_eq!(mean_loss(&[doc(1, 10.0), doc(9, 0.0)]).unwrap().mean, 1.0);
    }
}
