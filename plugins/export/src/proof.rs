//! The proof of a merge: logits of base and adapter against logits of the merged model, loaded
//! again from disk. One model is in memory at a time.

use candle_core::DType;
use lora_flow_core::{Artifact, CancelToken, Error, Result, ResultExt};
use lora_flow_model::batch::Batch;
use lora_flow_model::decoder::Decoder;
use lora_flow_model::lora::Lora;
use lora_flow_model::place::Place;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Probe sequences.
const SEQUENCES: usize = 4;
/// Tokens of each.
const LENGTH: usize = 32;
/// Seed of the probe tokens: the same for every model, so that reports compare.
const SEED: u64 = 0x6c6f_7261;

/// What the comparison found.
#[derive(Debug, Clone, PartialEq)]
pub struct Proof {
    /// max |Δ| over all logits; NaN if a logit is no number.
    pub max_difference: f64,
    /// Root of the mean Δ².
    pub rms_difference: f64,
    /// The same measure between the base alone and base + adapter: what the adapter does.
    pub adapter_rms: f64,
    /// Positions whose most likely next token is the same.
    pub same_top: usize,
    /// Positions compared.
    pub positions: usize,
}

/// Compares both models on probe sequences, both in f32, which holds their weights exactly.
///
/// # Errors
/// When a model cannot be loaded, or the run is cancelled.
pub fn compare(
    base: &Artifact,
    lora: &Lora,
    merged: &Artifact,
    device: &Place,
    cancel: &CancelToken,
) -> Result<Proof> {
    let (plain, expected) = {
        let decoder =
            Decoder::open(base, device, DType::F32).context("cannot load the base model")?;
        let batch = probes(decoder.config().vocab_size);
        let adapted = logits(&decoder, &batch, Some(lora))?;
        (logits(&decoder, &batch, None)?, adapted)
    };
    if cancel.is_cancelled() {
        return Err(Error::cancelled());
    }
    let decoder =
        Decoder::open(merged, device, DType::F32).context("cannot load the merged model")?;
    let batch = probes(decoder.config().vocab_size);
    let adapter_rms = measure(&expected, &plain).rms_difference;
    Ok(Proof { adapter_rms, ..measure(&expected, &logits(&decoder, &batch, None)?) })
}

/// Random tokens, the same for the same vocabulary.
fn probes(vocab_size: usize) -> Batch {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let ids: Vec<Vec<u32>> = (0..SEQUENCES)
        .map(|_| (0..LENGTH).map(|_| rng.random_range(0..vocab_size as u32)).collect())
        .collect();
    Batch::from_documents(&ids)
}

fn logits(decoder: &Decoder, batch: &Batch, lora: Option<&Lora>) -> Result<Vec<Vec<f32>>> {
    decoder
        .logits(batch, lora)?
        .to_dtype(DType::F32)
        .and_then(|t| t.to_vec2())
        .context("cannot read the logits")
}

fn measure(expected: &[Vec<f32>], found: &[Vec<f32>]) -> Proof {
    let mut max = 0f64;
    let mut squares = 0f64;
    let mut count = 0usize;
    for (a, b) in expected.iter().flatten().zip(found.iter().flatten()) {
        let difference = (f64::from(*a) - f64::from(*b)).abs();
        // `f64::max` would lose a NaN.
        max = if difference.is_nan() || max.is_nan() { f64::NAN } else { max.max(difference) };
        squares += difference * difference;
        count += 1;
    }
    let top =
        |row: &Vec<f32>| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| i);
    Proof {
        max_difference: max,
        rms_difference: (squares / count.max(1) as f64).sqrt(),
        adapter_rms: 0.0,
        same_top: expected.iter().zip(found).filter(|(a, b)| top(a) == top(b)).count(),
        positions: expected.len(),
    }
}

impl Proof {
    /// One line for the report.
    pub fn describe(&self, tolerance: f64) -> String {
        format!(
            "proof: logits of base + adapter against the merged model read back from disk, {} \
             positions: max |Δ| {:.2e} (tolerance {tolerance}), rms {:.2e} (the adapter itself: {:.2e}), \
             same top token {}/{}",
            self.positions,
            self.max_difference,
            self.rms_difference,
            self.adapter_rms,
            self.same_top,
            self.positions
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_differences_and_agreement() {
        let a = vec![vec![1.0, 2.0], vec![3.0, 0.0]];
        let b = vec![vec![1.0, 2.5], vec![0.0, 1.0]];
        let proof = measure(&a, &b);
        assert_eq!((proof.max_difference, proof.same_top, proof.positions), (3.0, 1, 2));
        assert!((proof.rms_difference - (10.25f64 / 4.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn a_logit_that_is_no_number_is_not_lost() {
        let a = vec![vec![f32::NAN, 2.0], vec![3.0, 9.0]];
        let b = vec![vec![1.0, 2.0], vec![3.0, 0.0]];
        assert!(measure(&a, &b).max_difference.is_nan());
    }

    #[test]
    fn probes_are_the_same_every_time() {
        assert_eq!(probes(100), probes(100));
        assert!(probes(100).input_ids.iter().all(|id| *id < 100));
    }
}
