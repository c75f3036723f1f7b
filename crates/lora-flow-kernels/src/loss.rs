//! Cross-entropy of a linear head, without the logits of all rows.
//!
//! Logits are h·headᵀ. The head is cut into tiles of the vocabulary and the softmax runs along
//! them with a running maximum, as in blockwise attention: one pass over the head yields the loss
//! and, since dh = (softmax − onehot)·head, the gradient of h as well. At most chunk × tile logits
//! exist at a time. The head is frozen and gets no gradient.

use crate::common::{self, View, dims2, tensor};
use crate::embedding::widen;
use crate::gemm::{Inputs, Into, Left, Mat, Right, Term, matmul};
use crate::linear::fused;
use crate::profile::{Category, span};
use crate::simd::{Isa, dispatch, exp, max, sum};
use candle_core::{DType, Result, Tensor, bail};
use half::bf16;
use rayon::prelude::*;

/// Rows of the head in one tile.
const TILE: usize = 1024;
/// Rows of one parallel task between two matrix products.
const BLOCK: usize = 16;

/// What [`cross_entropy`] returns.
#[derive(Debug, Clone)]
pub struct CrossEntropy {
    /// −ln softmax(logits)[target] of each row.
    pub nll: Vec<f32>,
    /// grad_scale · (softmax − onehot)·head [N, H] in the dtype of h, if asked for.
    pub dh: Option<Tensor>,
}

/// Cross-entropy of the rows of `h` [N, H] against `targets`, with logits h·headᵀ for `head`
/// [V, H] in `f32`, or in `bf16`: then the operands of the products with it are rounded to `bf16`.
///
/// `chunk` rows are worked on at a time (0: all); it bounds memory, and the fused path is fastest
/// with a thousand or more. The gradient of Σ nll · grad_scale is computed in the same pass.
///
/// # Errors
/// If the shapes do not fit or a target is not below V.
pub fn cross_entropy(
    h: &Tensor,
    head: &Tensor,
    targets: &[u32],
    chunk: usize,
    want_grad: bool,
    grad_scale: f32,
) -> Result<CrossEntropy> {
    let _span = span(Category::Loss);
    let (rows, width) = dims2(h, "h")?;
    let (vocab, head_width) = dims2(head, "head")?;
    if head_width != width {
        bail!("`head` has rows of {head_width} elements, `h` of {width}")
    }
    if targets.len() != rows {
        bail!("`targets` has {} entries for {rows} rows", targets.len())
    }
    if let Some((row, target)) = targets.iter().enumerate().find(|(_, t)| **t as usize >= vocab) {
        bail!("target {target} of row {row} is beyond the {vocab} tokens of the vocabulary")
    }
    let chunk = if chunk == 0 { rows.max(1) } else { chunk };
    if !fused(&[h], head) || width == 0 {
        return reference::cross_entropy(h, head, targets, chunk, want_grad, grad_scale);
    }
    let (h, head_view) = (View::new(h, "h")?, View::new(head, "head")?);
    let head = match head.dtype() {
        DType::BF16 => Head::Bf16(head_view.bf16()?),
        _ => Head::F32(head_view.f32()?),
    };
    let mut nll = common::zeros(rows);
    let mut dh = want_grad.then(|| common::zeros(rows * width));
    for (index, h) in h.f32()?.chunks(chunk * width).enumerate() {
        let first = index * chunk;
        let count = h.len() / width;
        let targets = &targets[first..first + count];
        let dh = dh.as_mut().map(|dh| &mut dh[first * width..][..h.len()]);
        chunk_loss(&mut nll[first..first + count], dh, h, head, width, vocab, targets, grad_scale);
    }
    let dh = dh.map(|dh| tensor(dh, &[rows, width])).transpose()?;
    Ok(CrossEntropy { nll, dh })
}

/// The head in its storage dtype.
#[derive(Clone, Copy)]
enum Head<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> Head<'a> {
    /// Rows `[start, start + rows)`.
    fn tile(&self, start: usize, rows: usize, width: usize) -> Right<'a> {
        let cells = start * width..(start + rows) * width;
        match self {
            Head::F32(values) => Right::F32(Mat::new(&values[cells], rows, width)),
            Head::Bf16(values) => Right::Bf16(Mat::new(&values[cells], rows, width)),
        }
    }

    /// What the operands of its products are.
    fn inputs(&self) -> Inputs {
        match self {
            Head::F32(_) => Inputs::F32,
            Head::Bf16(_) => Inputs::over(DType::BF16),
        }
    }
}

/// The state of one row while the tiles pass.
#[derive(Clone, Copy)]
struct Running {
    /// Largest logit so far.
    max: f32,
    /// Σ exp(logit − max) so far.
    sum: f64,
    /// Logit of the target, once its tile has passed.
    target: f32,
}

/// Loss of `nll.len()` rows, and with `dh` the gradient.
#[allow(clippy::too_many_arguments)]
fn chunk_loss(
    nll: &mut [f32],
    mut dh: Option<&mut [f32]>,
    h: &[f32],
    head: Head<'_>,
    width: usize,
    vocab: usize,
    targets: &[u32],
    grad_scale: f32,
) {
    let rows = nll.len();
    let mut running = vec![Running { max: f32::NEG_INFINITY, sum: 0.0, target: 0.0 }; rows];
    let mut logits = common::zeros(rows * TILE.min(vocab));
    let h = Left::new(Mat::new(h, rows, width), head.inputs());
    for start in (0..vocab).step_by(TILE) {
        let columns = TILE.min(vocab - start);
        let weight = head.tile(start, columns, width);
        let logits = &mut logits[..rows * columns];
        matmul(logits, columns, Into::Overwrite, &[Term { a: &h, b: weight.t() }]);
        // The tile's logits become exp(logit − max); what dh holds is brought to the new maximum.
        let blocks = logits.par_chunks_mut(BLOCK * columns).zip(running.par_chunks_mut(BLOCK));
        let blocks = blocks.zip(targets.par_chunks(BLOCK));
        match &mut dh {
            Some(dh) => {
                blocks.zip(dh.par_chunks_mut(BLOCK * width)).for_each(
                    |(((logits, running), targets), dh)| {
                        softmax_rows(logits, running, targets, start, dh);
                    },
                );
                let p = Left::new(Mat::new(logits, rows, columns), head.inputs());
                matmul(dh, width, Into::Add, &[Term { a: &p, b: weight }]);
            }
            None => blocks.for_each(|((logits, running), targets)| {
                softmax_rows(logits, running, targets, start, &mut []);
            }),
        }
    }
    for (nll, row) in nll.iter_mut().zip(&running) {
        *nll = (f64::from(row.max) + row.sum.ln() - f64::from(row.target)) as f32;
    }
    if let Some(dh) = dh {
        let mut buffer = Vec::new();
        for ((dh, row), &target) in dh.chunks_exact_mut(width).zip(&running).zip(targets) {
            let scale = (f64::from(grad_scale) / row.sum) as f32;
            let weight = head.row(target as usize, width, &mut buffer);
            for (dh, &weight) in dh.iter_mut().zip(weight) {
                *dh = *dh * scale - weight * grad_scale;
            }
        }
    }
}

impl<'a> Head<'a> {
    /// One row in f32.
    fn row<'b>(&self, row: usize, width: usize, buffer: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        match self {
            Head::F32(values) => &values[row * width..][..width],
            Head::Bf16(values) => {
                buffer.resize(width, 0.0);
                widen(buffer, &values[row * width..][..width]);
                buffer
            }
        }
    }
}

dispatch! {
    fn softmax_rows(
        logits: &mut [f32], running: &mut [Running], targets: &[u32], start: usize, dh: &mut [f32],
    ) = softmax_rows_body;
}

/// Takes rows of logits of the tile that begins at token `start` into `running` and replaces them
/// by exp(logit − max). `dh` (empty, or as many rows) is scaled to the new maximum.
#[inline(always)]
fn softmax_rows_body<M: Isa>(
    logits: &mut [f32],
    running: &mut [Running],
    targets: &[u32],
    start: usize,
    dh: &mut [f32],
) {
    let columns = logits.len() / running.len();
    let width = dh.len() / running.len();
    for (row, (logits, running)) in
        logits.chunks_exact_mut(columns).zip(running.iter_mut()).enumerate()
    {
        if let Some(target) = (targets[row] as usize).checked_sub(start)
            && let Some(&logit) = logits.get(target)
        {
            running.target = logit;
        }
        let tile_max = max::<M>(logits);
        if tile_max > running.max {
            // On the first tile this is exp(−∞) = 0, on a sum and a gradient of 0.
            let rescale = exp::<M>(running.max - tile_max);
            running.sum *= f64::from(rescale);
            running.max = tile_max;
            dh[row * width..][..width].iter_mut().for_each(|dh| *dh *= rescale);
        }
        let max = running.max;
        logits.iter_mut().for_each(|x| *x = exp::<M>(*x - max));
        running.sum += f64::from(sum::<M>(logits));
    }
}

/// The same with plain candle operations, chunk × V logits at a time.
pub mod reference {
    use super::CrossEntropy;
    use crate::common::{wide, widen};
    use candle_core::{D, DType, Result, Tensor};

    /// See [`super::cross_entropy`].
    ///
    /// # Errors
    /// As there.
    pub fn cross_entropy(
        h: &Tensor,
        head: &Tensor,
        targets: &[u32],
        chunk: usize,
        want_grad: bool,
        grad_scale: f32,
    ) -> Result<CrossEntropy> {
        let dtype = wide(h.dtype());
        let head = head.to_dtype(h.dtype())?;
        let (mut nll, mut grads) = (Vec::with_capacity(targets.len()), Vec::new());
        for (index, targets) in targets.chunks(chunk).enumerate() {
            let h = h.narrow(0, index * chunk, targets.len())?;
            let logits = widen(&h.matmul(&head.t()?)?)?;
            let targets = Tensor::new(targets, h.device())?.unsqueeze(1)?;
            let max = logits.max_keepdim(D::Minus1)?;
            let p = logits.broadcast_sub(&max)?.exp()?;
            let sum = p.sum_keepdim(D::Minus1)?;
            let rows = ((max + sum.log()?)? - logits.gather(&targets, 1)?)?;
            nll.extend(rows.squeeze(1)?.to_dtype(DType::F32)?.to_vec1::<f32>()?);
            if want_grad {
                let ones = targets.ones_like()?.to_dtype(dtype)?.neg()?;
                let d = p.broadcast_div(&sum)?.scatter_add(&targets, &ones, 1)?;
                let d = (d * f64::from(grad_scale))?.to_dtype(h.dtype())?;
                grads.push(d.matmul(&head)?);
            }
        }
        let dh = match (want_grad, grads.is_empty()) {
            (false, _) => None,
            (true, true) => Some(h.clone()),
            (true, false) => Some(Tensor::cat(&grads, 0)?),
        };
        Ok(CrossEntropy { nll, dh })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, check_gradient, f64s, random, same_bits};

    fn targets(rows: usize, vocab: usize) -> Vec<u32> {
        (0..rows).map(|row| ((row * 7919 + 3) % vocab) as u32).collect()
    }

    #[test]
    fn fused_equals_reference() -> Result<()> {
        for (rows, width, vocab, chunk) in
            [(1, 8, 5, 0), (33, 16, 1024, 10), (20, 24, 2500, 0), (70, 40, 1025, 64)]
        {
            // Logits of some size, so that the maximum moves from tile to tile.
            let h = (random(&[rows, width], 1) * 3.0)?;
            let head = random(&[vocab, width], 2);
            let targets = targets(rows, vocab);
            for head in [head.clone(), head.to_dtype(DType::BF16)?] {
                let got = cross_entropy(&h, &head, &targets, chunk, true, 0.25)?;
                // Over a head in bf16 both sides of its products are rounded, where that pays.
                let narrow = Inputs::over(head.dtype()) == Inputs::Bf16;
                let h64 = f64s(&if narrow { h.to_dtype(DType::BF16)? } else { h.clone() })?;
                let want = reference::cross_entropy(&h64, &f64s(&head)?, &targets, 7, true, 0.25)?;
                for (got, want) in got.nll.iter().zip(&want.nll) {
                    assert!((got - want).abs() < 1e-5 * want.abs().max(1.0), "{got} {want}");
                }
                let close = if narrow { 4e-3 } else { 3e-6 };
                assert_close(&got.dh.unwrap(), &want.dh.unwrap(), close);
                let without = cross_entropy(&h, &head, &targets, chunk, false, 1.0)?;
                assert_eq!(without.nll, got.nll);
                assert!(without.dh.is_none());
            }
        }
        Ok(())
    }

    #[test]
    fn equal_logits_cost_the_logarithm_of_the_vocabulary() -> Result<()> {
        let (h, head) = (random(&[3, 4], 1).zeros_like()?, random(&[1500, 4], 2));
        let got = cross_entropy(&h, &head, &[0, 1200, 1499], 0, false, 1.0)?;
        assert!(got.nll.iter().all(|nll| (nll - 1500f32.ln()).abs() < 1e-5), "{:?}", got.nll);
        Ok(())
    }

    #[test]
    fn gradient_by_finite_differences() -> Result<()> {
        let (h, head) = (f64s(&random(&[3, 5], 1))?, f64s(&random(&[11, 5], 2))?);
        let targets = targets(3, 11);
        let dh = cross_entropy(&h, &head, &targets, 2, true, 0.5)?.dh.unwrap();
        // nll is f32, so the loss is written out in f64 here.
        check_gradient(&h, &dh, |h| {
            let logits = h.matmul(&head.t()?)?.to_vec2::<f64>()?;
            let rows = logits.iter().zip(&targets).map(|(row, &target)| {
                row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[target as usize]
            });
            Ok(0.5 * rows.sum::<f64>())
        })
    }

    #[test]
    fn bits_do_not_depend_on_threads() -> Result<()> {
        let (h, head) = (random(&[90, 64], 1), random(&[2100, 64], 2));
        let targets = targets(90, 2100);
        same_bits(|| {
            let got = cross_entropy(&h, &head, &targets, 0, true, 1.0)?;
            Ok(vec![Tensor::new(got.nll, &candle_core::Device::Cpu)?, got.dh.unwrap()])
        })
    }

    #[test]
    fn no_rows_and_wrong_targets() -> Result<()> {
        let (h, head) = (random(&[0, 4], 1), random(&[5, 4], 2));
        let got = cross_entropy(&h, &head, &[], 0, true, 1.0)?;
        assert!(got.nll.is_empty());
        assert_eq!(got.dh.unwrap().dims(), [0, 4]);
        let h = random(&[1, 4], 1);
        let error = cross_entropy(&h, &head, &[5], 0, true, 1.0).unwrap_err().to_string();
        assert!(error.contains("target 5 of row 0 is beyond the 5 tokens"), "{error}");
        Ok(())
    }
}
