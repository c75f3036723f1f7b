//! The same with plain candle operations. Weights of another dtype are converted to that of x;
//! over weights in `bf16` the operands are rounded to it.

use super::{LoraPair, PairGradients, Projected, Projection};
use candle_core::{DType, Result, Tensor, bail};

/// `t` as an operand of products with `w`.
fn operand(t: &Tensor, w: &Tensor) -> Result<Tensor> {
    match (w.dtype(), t.dtype()) {
        // By way of f32: the direct conversion from f64 does not see its last bits.
        (DType::BF16, DType::F32 | DType::F64) => {
            t.to_dtype(DType::F32)?.to_dtype(DType::BF16)?.to_dtype(t.dtype())
        }
        _ => Ok(t.clone()),
    }
}

/// See [`super::matmul_nt`].
///
/// # Errors
/// If the shapes do not fit.
pub fn matmul_nt(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    operand(x, w)?.matmul(&w.to_dtype(x.dtype())?.t()?)
}

/// See [`super::matmul_nn`].
///
/// # Errors
/// If the shapes do not fit.
pub fn matmul_nn(dy: &Tensor, w: &Tensor) -> Result<Tensor> {
    operand(dy, w)?.matmul(&w.to_dtype(dy.dtype())?)
}

/// See [`super::matmul_tn`].
///
/// # Errors
/// If the shapes do not fit.
pub fn matmul_tn(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.t()?.matmul(&b.to_dtype(a.dtype())?)
}

/// One layer of [`super::forward`], whose low-rank path reads `dropped`.
///
/// # Errors
/// If the shapes do not fit.
pub fn forward(x: &Tensor, dropped: &Tensor, layer: &Projection<'_>) -> Result<Projected> {
    let w = layer.w;
    let y = matmul_nt(x, w)?;
    let Some(LoraPair { a, b, s }) = layer.lora else { return Ok((y, None)) };
    let (a, b) = (operand(a, w)?, operand(&(b * f64::from(s))?, w)?);
    let xa = matmul_nt(&operand(dropped, w)?, &a)?;
    Ok(((y + matmul_nt(&operand(&xa, w)?, &b)?)?, Some(xa)))
}

/// See [`super::backward`]; `apart` gives s·(dy·b)·a by itself. The gradients have the dtypes
/// of a and b.
///
/// # Errors
/// If the shapes do not fit.
#[allow(clippy::type_complexity)]
pub fn backward(
    dys: &[&Tensor],
    x: Option<&Tensor>,
    layers: &[Projection<'_>],
    xas: &[Option<&Tensor>],
    need_dx: bool,
    apart: bool,
) -> Result<(Option<(Tensor, Option<Tensor>)>, Vec<Option<PairGradients>>)> {
    let sum = |a: Option<Tensor>, b: Tensor| a.map_or(Ok(b.clone()), |a| a + b);
    let (mut base, mut low, mut gradients) = (None, None, Vec::new());
    for ((dy, layer), xa) in dys.iter().zip(layers).zip(xas) {
        let w = layer.w;
        if need_dx {
            base = Some(sum(base, matmul_nn(dy, w)?)?);
        }
        let Some(LoraPair { a, b, s }) = layer.lora else {
            gradients.push(None);
            continue;
        };
        let (Some(x), Some(xa)) = (x, xa) else { bail!("`x` or `xa` is missing") };
        let scaled = operand(&(b * f64::from(s))?, w)?;
        let dyb = matmul_nn(&operand(dy, w)?, &scaled)?;
        if need_dx {
            low = Some(sum(low, matmul_nn(&operand(&dyb, w)?, &operand(a, w)?)?)?);
        }
        let da = matmul_tn(&dyb, x)?.to_dtype(a.dtype())?;
        let db = (matmul_tn(dy, xa)? * f64::from(s))?.to_dtype(b.dtype())?;
        gradients.push(Some((da, db)));
    }
    let dx = match (base, low) {
        (Some(base), low) if apart => Some((base, low)),
        (Some(base), Some(low)) => Some(((base + low)?, None)),
        (base, _) => base.map(|base| (base, None)),
    };
    Ok((dx, gradients))
}
