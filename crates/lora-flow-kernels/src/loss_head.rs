//! Cross-entropy of a linear head that is trained itself: [`crate::loss`] and the head's gradient.
//!
//! Both gradients need the softmax of whole rows, dh = (softmax − onehot)·head and
//! dhead = (softmax − onehot)ᵀ·h, so the logits of a few rows at a time exist in full.

use crate::common::dims2;
use crate::linear;
use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

/// −ln softmax(logits)[target] of each row, and the gradient of Σ nll · grad_scale for h
/// [N, H]; that for the head [V, H] is added to `dhead`, if it is asked for. Logits are h·headᵀ;
/// `chunk` rows are worked on at a time.
///
/// # Errors
/// If the shapes do not fit or a target is not below V.
pub fn cross_entropy(
    h: &Tensor,
    head: &Tensor,
    targets: &[u32],
    chunk: usize,
    grad_scale: f32,
    mut dhead: Option<&mut [f32]>,
) -> Result<(Vec<f32>, Tensor)> {
    let (rows, _) = dims2(h, "h")?;
    let (vocab, width) = dims2(head, "head")?;
    if targets.len() != rows {
        bail!("`targets` has {} entries for {rows} rows", targets.len())
    }
    if let Some(target) = targets.iter().find(|t| **t as usize >= vocab) {
        bail!("target {target} is beyond the {vocab} tokens of the vocabulary")
    }
    if dhead.as_ref().is_some_and(|d| d.len() != vocab * width) {
        bail!("`dhead` has another size than the head")
    }
    let mut nll = Vec::with_capacity(rows);
    let mut dh = Vec::new();
    for start in (0..rows).step_by(chunk.max(1)) {
        let count = chunk.max(1).min(rows - start);
        let part = h.narrow(0, start, count)?.contiguous()?;
        let logits = linear::matmul_nt(&part, head)?.to_dtype(DType::F32)?;
        let mut logits = logits.flatten_all()?.to_vec1::<f32>()?;
        let targets = &targets[start..start + count];
        let losses = logits.par_chunks_mut(vocab).zip(targets).map(|(row, target)| {
            let target = *target as usize;
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let of_target = f64::from(row[target]);
            let mut sum = 0f64;
            for logit in row.iter_mut() {
                *logit = (*logit - max).exp();
                sum += f64::from(*logit);
            }
            let factor = (f64::from(grad_scale) / sum) as f32;
            row.iter_mut().for_each(|p| *p *= factor);
            row[target] -= grad_scale;
            (f64::from(max) + sum.ln() - of_target) as f32
        });
        nll.extend(losses.collect::<Vec<f32>>());
        let dlogits = Tensor::from_vec(logits, (count, vocab), h.device())?.to_dtype(h.dtype())?;
        dh.push(linear::matmul_nn(&dlogits, head)?);
        if let Some(sum) = &mut dhead {
            let part = linear::matmul_tn(&dlogits, &part)?.to_dtype(DType::F32)?;
            let part = part.flatten_all()?.to_vec1::<f32>()?;
            sum.iter_mut().zip(part).for_each(|(s, d)| *s += d);
        }
    }
    Ok((nll, Tensor::cat(&dh, 0)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss;
    use crate::testing::{assert_close, random};

    #[test]
    fn loss_and_dh_are_those_of_the_frozen_head_and_dhead_is_a_finite_difference() {
        let (h, head) = (random(&[5, 8], 1), random(&[11, 8], 2));
        let targets = [3, 0, 10, 7, 7];
        let mut dhead = vec![0f32; 88];
        let (nll, dh) = cross_entropy(&h, &head, &targets, 2, 0.5, Some(&mut dhead)).unwrap();
        let frozen = loss::cross_entropy(&h, &head, &targets, 0, true, 0.5).unwrap();
        for (a, b) in nll.iter().zip(&frozen.nll) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
        assert_close(&dh, &frozen.dh.unwrap(), 1e-5);

        let values = head.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let total = |values: Vec<f32>| -> f64 {
            let head = Tensor::from_vec(values, (11, 8), head.device()).unwrap();
            let out = loss::cross_entropy(&h, &head, &targets, 0, false, 1.0).unwrap();
            out.nll.iter().map(|x| f64::from(*x)).sum::<f64>() * 0.5
        };
        for at in [0, 13, 30, 61, 87] {
            let step = 1e-2;
            let moved = |by: f32| {
                let mut values = values.clone();
                values[at] += by;
                total(values)
            };
            let slope = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
            assert!((slope - f64::from(dhead[at])).abs() < 2e-4, "{at}: {slope} {}", dhead[at]);
        }
    }
}
