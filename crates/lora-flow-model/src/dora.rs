//! DoRA (Liu et al. 2024): y = g ⊙ (Wx + sBAx) with g = m/‖W + sBA‖, one magnitude m for each row.
//!
//! The norms count as constants in the backward (section 4.3 of the paper, as PEFT has it). With
//! dropout the base's own path reads the whole input and everything that DoRA adds to it the
//! dropped one, x̃ = mask ⊙ x: y = Wx + (g − 1) ⊙ Wx̃ + g ⊙ sBAx̃.

use candle_core::{DType, Result, Tensor};
use lora_flow_kernels::{elementwise, linear};

use crate::adapter::{LoraGrads, Slot};

/// ‖W + sBA‖ of each row [out] in f32 (f64 for a weight in f64), or ‖W‖ without a module.
pub(crate) fn row_norms(
    weight: &Tensor,
    module: Option<(&Tensor, &Tensor, f64)>,
) -> Result<Tensor> {
    let dtype = if weight.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let mut sum = weight.to_dtype(dtype)?;
    if let Some((a, b, scale)) = module {
        let low = b.to_dtype(dtype)?.matmul(&a.to_dtype(dtype)?)?;
        sum = (sum + (low * scale)?)?;
    }
    sum.sqr()?.sum(1)?.sqrt()
}

/// y [N, out] without the bias, and x̃·Aᵀ [N, r] for the backward.
pub(crate) fn forward(x: &Tensor, w: &Tensor, slot: &Slot<'_>) -> Result<(Tensor, Tensor)> {
    let (Some((_, module)), Some((gain, _))) = (slot.low_rank, slot.dora(w)?) else {
        candle_core::bail!("not a DoRA module")
    };
    let (a, b, s) = (&module.a, &module.b, module.scale as f32);
    match slot.mask(x)? {
        None => {
            let (u, xa) = linear::lora_forward(x, w, a, b, s)?;
            Ok((u.broadcast_mul(&gain)?, xa))
        }
        Some(mask) => {
            let dropped = (x * mask)?;
            let (u, xa) = linear::lora_forward(&dropped, w, a, b, s)?;
            let (whole, kept) = (linear::matmul_nt(x, w)?, linear::matmul_nt(&dropped, w)?);
            let y = ((whole - kept)? + u.broadcast_mul(&gain)?)?;
            Ok((y, xa))
        }
    }
}

/// Adds the gradients of A, B and m, and returns dx if `need_dx`. u = Wx̃ + sBAx̃, which the
/// gradient of m needs, is made again: one product more than plain LoRA.
pub(crate) fn backward(
    dy: &Tensor,
    x: &Tensor,
    w: &Tensor,
    slot: &Slot<'_>,
    xa: &Tensor,
    need_dx: bool,
    grads: &mut LoraGrads,
) -> Result<Option<Tensor>> {
    let (Some((index, module)), Some((gain, norms))) = (slot.low_rank, slot.dora(w)?) else {
        candle_core::bail!("not a DoRA module")
    };
    let (a, b, s) = (&module.a, &module.b, module.scale as f32);
    let mask = slot.mask(x)?;
    let dropped = match &mask {
        None => x.clone(),
        Some(mask) => (x * mask)?,
    };
    let (u, _) = linear::lora_forward(&dropped, w, a, b, s)?;
    grads.add_magnitude(index, &(dy * u)?.sum(0)?.div(norms)?)?;
    let du = dy.broadcast_mul(&gain)?.contiguous()?;
    let (dropped_dx, da, db) = linear::lora_backward(&du, &dropped, w, a, b, s, xa, need_dx)?;
    grads.add(index, &da, &db)?;
    let (Some(dx), Some(mask)) = (&dropped_dx, mask) else { return Ok(dropped_dx) };
    // What DoRA adds passes the mask; the base's own path does not.
    let base = linear::matmul_nn(dy, w)?;
    let added = ((dx - &base)? * mask)?;
    Ok(Some(elementwise::add_scaled(&base, &added, 1.0)?))
}
