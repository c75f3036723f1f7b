//! Embedding: rows of a frozen matrix by token.

use crate::common::{self, View, dims2, tensor};
use crate::profile::{Category, span};
use crate::simd::{Isa, dispatch};
use candle_core::{DType, Result, Tensor, bail};
use half::bf16;
use rayon::prelude::*;

/// Tokens of one parallel task.
const BLOCK: usize = 32;

/// The rows `ids` of `weight` [V, H] as [N, H] in `dtype`. A `bf16` weight on the CPU is widened
/// row by row, never as a whole.
///
/// # Errors
/// If an id is not below V.
pub fn gather(weight: &Tensor, ids: &[u32], dtype: DType) -> Result<Tensor> {
    let _span = span(Category::Elementwise);
    let (vocab, width) = dims2(weight, "weight")?;
    if let Some((at, id)) = ids.iter().enumerate().find(|(_, id)| **id as usize >= vocab) {
        bail!("token {id} at position {at} is beyond the {vocab} rows of the embedding")
    }
    let fused = weight.device().is_cpu()
        && dtype == DType::F32
        && matches!(weight.dtype(), DType::F32 | DType::BF16);
    if !fused || width == 0 {
        return reference::gather(weight, ids, dtype);
    }
    let view = View::new(weight, "weight")?;
    let mut out = common::zeros(ids.len() * width);
    let rows = out.par_chunks_mut(BLOCK * width).zip(ids.par_chunks(BLOCK));
    match weight.dtype() {
        DType::BF16 => {
            let weight = view.bf16()?;
            rows.for_each(|(out, ids)| {
                for (out, &id) in out.chunks_exact_mut(width).zip(ids) {
                    widen(out, &weight[id as usize * width..][..width]);
                }
            });
        }
        _ => {
            let weight = view.f32()?;
            rows.for_each(|(out, ids)| {
                for (out, &id) in out.chunks_exact_mut(width).zip(ids) {
                    out.copy_from_slice(&weight[id as usize * width..][..width]);
                }
            });
        }
    }
    tensor(out, &[ids.len(), width])
}

dispatch! {
    /// Exact widening of `bf16` to `f32`.
    pub(crate) fn widen(out: &mut [f32], values: &[bf16]) = widen_body;
}

#[inline(always)]
fn widen_body<M: Isa>(out: &mut [f32], values: &[bf16]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = f32::from_bits(u32::from(value.to_bits()) << 16);
    }
}

/// The same with plain candle operations.
pub mod reference {
    use candle_core::{DType, Result, Tensor};

    /// See [`super::gather`].
    ///
    /// # Errors
    /// If an id is not below V.
    pub fn gather(weight: &Tensor, ids: &[u32], dtype: DType) -> Result<Tensor> {
        let ids = Tensor::new(ids, weight.device())?;
        weight.index_select(&ids, 0)?.to_dtype(dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, random};

    #[test]
    fn gathers_rows_of_both_dtypes() -> Result<()> {
        let weight = random(&[11, 5], 1);
        let ids: Vec<u32> = (0..70).map(|i| (i * 3) % 11).collect();
        let expected = reference::gather(&weight, &ids, DType::F32)?;
        assert_close(&gather(&weight, &ids, DType::F32)?, &expected, 0.0);
        let weight = weight.to_dtype(DType::BF16)?;
        let expected = reference::gather(&weight, &ids, DType::F32)?;
        assert_close(&gather(&weight, &ids, DType::F32)?, &expected, 0.0);
        assert_eq!(gather(&weight, &ids, DType::BF16)?.dtype(), DType::BF16);
        let error = gather(&weight, &[0, 11], DType::F32).unwrap_err().to_string();
        assert!(error.contains("token 11 at position 1"), "{error}");
        Ok(())
    }
}
