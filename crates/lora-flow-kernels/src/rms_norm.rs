//! RMS norm: y = w · x · rstd with rstd = 1 / √(mean(x²) + ε) for each row (Zhang & Sennrich
//! 2019), computed in f32 like Hugging Face's `LlamaRMSNorm`.
//!
//! Rows may be tokens (`[N, H]`) or heads for QK-norm (`[N·heads, D]`).

use crate::common::{self, View, all_cpu_f32, dims2, expect_shape, tensor};
use crate::profile::{Category, span};
use crate::simd::{Isa, dispatch, dot, dot3};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// Rows of one parallel task, and of one partial sum of [`backward_weight`].
const BLOCK: usize = 32;

/// The norm of each row of `x` [N, H] times `w` [H]. Returns y [N, H] and rstd [N] (f32), which
/// the backward needs.
///
/// # Errors
/// If the shapes do not fit.
pub fn forward(x: &Tensor, w: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let _span = span(Category::Norm);
    let (rows, width) = dims2(x, "x")?;
    expect_shape(w, "w", &[width])?;
    if !all_cpu_f32(&[x, w]) {
        return reference::forward(x, w, eps);
    }
    let (x, w) = (View::new(x, "x")?, View::new(w, "w")?);
    let (x, w) = (x.f32()?, w.f32()?);
    let (mut y, mut rstd) = (common::zeros(x.len()), common::zeros(rows));
    if width > 0 {
        y.par_chunks_mut(BLOCK * width)
            .zip(x.par_chunks(BLOCK * width))
            .zip(rstd.par_chunks_mut(BLOCK))
            .for_each(|((y, x), rstd)| forward_rows(y, rstd, x, w, eps));
    }
    Ok((tensor(y, &[rows, width])?, tensor(rstd, &[rows])?))
}

/// [`forward`] of `x + residual`. Returns the sum [N, H], y [N, H] and rstd [N]: one pass over
/// memory less than adding first.
///
/// # Errors
/// If the shapes do not fit.
pub fn add_forward(
    x: &Tensor,
    residual: &Tensor,
    w: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor, Tensor)> {
    let _span = span(Category::Norm);
    let (rows, width) = dims2(x, "x")?;
    expect_shape(residual, "residual", &[rows, width])?;
    expect_shape(w, "w", &[width])?;
    if !all_cpu_f32(&[x, residual, w]) {
        let sum = (x + residual)?;
        let (y, rstd) = reference::forward(&sum, w, eps)?;
        return Ok((sum, y, rstd));
    }
    let (x, residual, w) =
        (View::new(x, "x")?, View::new(residual, "residual")?, View::new(w, "w")?);
    let (x, residual, w) = (x.f32()?, residual.f32()?, w.f32()?);
    let mut sum = common::zeros(x.len());
    let (mut y, mut rstd) = (common::zeros(x.len()), common::zeros(rows));
    if width > 0 {
        sum.par_chunks_mut(BLOCK * width)
            .zip(x.par_chunks(BLOCK * width))
            .zip(residual.par_chunks(BLOCK * width))
            .zip(y.par_chunks_mut(BLOCK * width))
            .zip(rstd.par_chunks_mut(BLOCK))
            .for_each(|((((sum, x), residual), y), rstd)| {
                for ((sum, x), residual) in sum.iter_mut().zip(x).zip(residual) {
                    *sum = x + residual;
                }
                forward_rows(y, rstd, sum, w, eps);
            });
    }
    let dims = [rows, width];
    Ok((tensor(sum, &dims)?, tensor(y, &dims)?, tensor(rstd, &[rows])?))
}

/// Gradient of [`forward`] for `x`: dx = rstd · (dy·w − x · rstd² · mean(dy·w·x)).
///
/// # Errors
/// If the shapes do not fit.
pub fn backward(dy: &Tensor, x: &Tensor, w: &Tensor, rstd: &Tensor) -> Result<Tensor> {
    backward_add(dy, x, w, rstd, None)
}

/// [`backward`] plus `add` [N, H], the gradient that reaches `x` along the residual stream.
///
/// # Errors
/// If the shapes do not fit.
pub fn backward_add(
    dy: &Tensor,
    x: &Tensor,
    w: &Tensor,
    rstd: &Tensor,
    add: Option<&Tensor>,
) -> Result<Tensor> {
    let _span = span(Category::Norm);
    let (rows, width) = dims2(x, "x")?;
    expect_shape(dy, "dy", &[rows, width])?;
    expect_shape(w, "w", &[width])?;
    expect_shape(rstd, "rstd", &[rows])?;
    if let Some(add) = add {
        expect_shape(add, "add", &[rows, width])?;
    }
    if !all_cpu_f32(&[dy, x, w, rstd]) || !add.is_none_or(|add| all_cpu_f32(&[add])) {
        let dx = reference::backward(dy, x, w, rstd)?;
        return match add {
            Some(add) => dx + add,
            None => Ok(dx),
        };
    }
    let (dy, x) = (View::new(dy, "dy")?, View::new(x, "x")?);
    let (w, rstd) = (View::new(w, "w")?, View::new(rstd, "rstd")?);
    let add = add.map(|add| View::new(add, "add")).transpose()?;
    let (dy, x, w, rstd) = (dy.f32()?, x.f32()?, w.f32()?, rstd.f32()?);
    let add = add.as_ref().map(View::f32).transpose()?;
    let mut dx = common::zeros(x.len());
    if width > 0 {
        dx.par_chunks_mut(BLOCK * width).enumerate().for_each(|(block, dx)| {
            let rows = block * BLOCK..block * BLOCK + dx.len() / width;
            let cells = rows.start * width..rows.end * width;
            let (dy, x) = (&dy[cells.clone()], &x[cells.clone()]);
            backward_rows(dx, dy, x, w, &rstd[rows], add.map(|add| &add[cells]));
        });
    }
    tensor(dx, &[rows, width])
}

/// Gradient of [`forward`] for `w`: dw = Σ over rows of dy · x · rstd.
///
/// # Errors
/// If the shapes do not fit.
pub fn backward_weight(dy: &Tensor, x: &Tensor, rstd: &Tensor) -> Result<Tensor> {
    let _span = span(Category::Norm);
    let (rows, width) = dims2(x, "x")?;
    expect_shape(dy, "dy", &[rows, width])?;
    expect_shape(rstd, "rstd", &[rows])?;
    if !all_cpu_f32(&[dy, x, rstd]) {
        return reference::backward_weight(dy, x, rstd);
    }
    let (dy, x, rstd) = (View::new(dy, "dy")?, View::new(x, "x")?, View::new(rstd, "rstd")?);
    let (dy, x, rstd) = (dy.f32()?, x.f32()?, rstd.f32()?);
    let mut dw = common::zeros(width);
    if width > 0 {
        let partial: Vec<Vec<f32>> = dy
            .par_chunks(BLOCK * width)
            .zip(x.par_chunks(BLOCK * width))
            .zip(rstd.par_chunks(BLOCK))
            .map(|((dy, x), rstd)| {
                let mut sum = common::zeros(width);
                weight_rows(&mut sum, dy, x, rstd);
                sum
            })
            .collect();
        for part in partial {
            dw.iter_mut().zip(part).for_each(|(dw, part)| *dw += part);
        }
    }
    tensor(dw, &[width])
}

dispatch! {
    fn forward_rows(y: &mut [f32], rstd: &mut [f32], x: &[f32], w: &[f32], eps: f64)
        = forward_rows_body;
    fn backward_rows(dx: &mut [f32], dy: &[f32], x: &[f32], w: &[f32], rstd: &[f32], add: Option<&[f32]>)
        = backward_rows_body;
    fn weight_rows(dw: &mut [f32], dy: &[f32], x: &[f32], rstd: &[f32]) = weight_rows_body;
}

#[inline(always)]
fn forward_rows_body<M: Isa>(y: &mut [f32], rstd: &mut [f32], x: &[f32], w: &[f32], eps: f64) {
    let width = w.len();
    let rows = y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(rstd);
    for ((y, x), rstd) in rows {
        let scale = 1.0 / (dot::<M>(x, x) / width as f32 + eps as f32).sqrt();
        for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
            *y = x * scale * w;
        }
        *rstd = scale;
    }
}

#[inline(always)]
fn backward_rows_body<M: Isa>(
    dx: &mut [f32],
    dy: &[f32],
    x: &[f32],
    w: &[f32],
    rstd: &[f32],
    add: Option<&[f32]>,
) {
    let width = w.len();
    let rows = dx.chunks_exact_mut(width).zip(dy.chunks_exact(width)).zip(x.chunks_exact(width));
    for (row, (((dx, dy), x), &rstd)) in rows.zip(rstd).enumerate() {
        let along = dot3::<M>(dy, w, x) / width as f32 * rstd * rstd * rstd;
        let cells = dx.iter_mut().zip(dy).zip(x).zip(w);
        match add {
            Some(add) => {
                for ((((dx, &dy), &x), &w), &add) in cells.zip(&add[row * width..][..width]) {
                    *dx = M::mul_add(dy * w, rstd, M::mul_add(x, -along, add));
                }
            }
            None => {
                for (((dx, &dy), &x), &w) in cells {
                    *dx = M::mul_add(dy * w, rstd, -(x * along));
                }
            }
        }
    }
}

#[inline(always)]
fn weight_rows_body<M: Isa>(dw: &mut [f32], dy: &[f32], x: &[f32], rstd: &[f32]) {
    let width = dw.len();
    for ((dy, x), &rstd) in dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(rstd) {
        for ((dw, &dy), &x) in dw.iter_mut().zip(dy).zip(x) {
            *dw = M::mul_add(dy * rstd, x, *dw);
        }
    }
}

/// The same with plain candle operations.
pub mod reference {
    use crate::common::{wide, widen};
    use candle_core::{D, Result, Tensor};

    /// See [`super::forward`].
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn forward(x: &Tensor, w: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
        let wide_x = widen(x)?;
        let rstd = (wide_x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
        let y = wide_x.broadcast_mul(&rstd)?.broadcast_mul(&w.to_dtype(wide_x.dtype())?)?;
        Ok((y.to_dtype(x.dtype())?, rstd.squeeze(D::Minus1)?))
    }

    /// See [`super::backward`].
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn backward(dy: &Tensor, x: &Tensor, w: &Tensor, rstd: &Tensor) -> Result<Tensor> {
        let wide_x = widen(x)?;
        let dtype = wide(x.dtype());
        let g = dy.to_dtype(dtype)?.broadcast_mul(&w.to_dtype(dtype)?)?;
        let rstd = rstd.to_dtype(dtype)?.unsqueeze(D::Minus1)?;
        let xhat = wide_x.broadcast_mul(&rstd)?;
        let mean = (&g * &xhat)?.mean_keepdim(D::Minus1)?;
        (g - xhat.broadcast_mul(&mean)?)?.broadcast_mul(&rstd)?.to_dtype(x.dtype())
    }

    /// See [`super::backward_weight`].
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn backward_weight(dy: &Tensor, x: &Tensor, rstd: &Tensor) -> Result<Tensor> {
        let dtype = wide(x.dtype());
        let rstd = rstd.to_dtype(dtype)?.unsqueeze(D::Minus1)?;
        let xhat = x.to_dtype(dtype)?.broadcast_mul(&rstd)?;
        (dy.to_dtype(dtype)? * xhat)?.sum(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, check_gradient, f64s, random, same_bits, weighted_sum};

    #[test]
    fn fused_equals_reference() -> Result<()> {
        for (rows, width) in [(1, 1), (1, 576), (3, 5), (33, 64), (70, 80), (100, 577)] {
            let (x, dy) = (random(&[rows, width], 1), random(&[rows, width], 2));
            let (w, more) = (random(&[width], 3), random(&[rows, width], 4));
            let (y, rstd) = forward(&x, &w, 1e-5)?;
            let (x64, w64, dy64) = (f64s(&x)?, f64s(&w)?, f64s(&dy)?);
            let (y64, rstd64) = reference::forward(&x64, &w64, 1e-5)?;
            assert_close(&y, &y64, 1e-6);
            assert_close(&rstd, &rstd64, 1e-6);
            let dx64 = reference::backward(&dy64, &x64, &w64, &rstd64)?;
            assert_close(&backward(&dy, &x, &w, &rstd)?, &dx64, 2e-6);
            let with = backward_add(&dy, &x, &w, &rstd, Some(&more))?;
            assert_close(&with, &(dx64 + f64s(&more)?)?, 2e-6);
            let dw64 = reference::backward_weight(&dy64, &x64, &rstd64)?;
            assert_close(&backward_weight(&dy, &x, &rstd)?, &dw64, 2e-6);
            let (sum, y, rstd) = add_forward(&x, &more, &w, 1e-5)?;
            let (y2, rstd2) = forward(&sum, &w, 1e-5)?;
            assert_close(&sum, &(&x + &more)?, 0.0);
            assert_close(&y, &y2, 0.0);
            assert_close(&rstd, &rstd2, 0.0);
        }
        Ok(())
    }

    #[test]
    fn gradients_by_finite_differences() -> Result<()> {
        let (x, w) = (f64s(&random(&[3, 7], 1))?, f64s(&random(&[7], 2))?);
        let dy = f64s(&random(&[3, 7], 3))?;
        let loss = |x: &Tensor, w: &Tensor| weighted_sum(&reference::forward(x, w, 1e-3)?.0, &dy);
        let rstd = reference::forward(&x, &w, 1e-3)?.1;
        let dx = reference::backward(&dy, &x, &w, &rstd)?;
        check_gradient(&x, &dx, |x| loss(x, &w))?;
        check_gradient(&w, &reference::backward_weight(&dy, &x, &rstd)?, |w| loss(&x, w))
    }

    #[test]
    fn bits_do_not_depend_on_threads() -> Result<()> {
        let (x, dy, w) = (random(&[301, 96], 1), random(&[301, 96], 2), random(&[96], 3));
        same_bits(|| {
            let (y, rstd) = forward(&x, &w, 1e-5)?;
            let dx = backward(&dy, &x, &w, &rstd)?;
            let dw = backward_weight(&dy, &x, &rstd)?;
            Ok(vec![y, rstd, dx, dw])
        })
    }

    #[test]
    fn half_precision_takes_the_reference_and_wrong_shapes_are_named() -> Result<()> {
        let x = random(&[2, 4], 1).to_dtype(candle_core::DType::BF16)?;
        let w = random(&[4], 2);
        let (y, rstd) = forward(&x, &w, 1e-5)?;
        assert_eq!(y.dtype(), candle_core::DType::BF16);
        assert_eq!(rstd.dtype(), candle_core::DType::F32);
        let error = forward(&random(&[2, 4], 1), &random(&[5], 1), 1e-5).unwrap_err().to_string();
        assert!(error.contains("`w` must have shape [4]"), "{error}");
        let turned = random(&[4, 2], 1).t()?;
        let error = forward(&turned, &w, 1e-5).unwrap_err().to_string();
        assert!(error.contains("`x` must be contiguous"), "{error}");
        Ok(())
    }
}
