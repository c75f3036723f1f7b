//! Linear layers without copies: y = x·wᵀ with a frozen weight, with or without LoRA, and their
//! backward.
//!
//! LoRA (Hu et al. 2021): y = x·wᵀ + s·(x·aᵀ)·bᵀ with a [r, K], b [O, r]. The low-rank parts are
//! added into the product in place; the backward never forms a dense dw.
//!
//! A frozen weight may be `bf16` while x is `f32`: its rows are widened a block at a time (exact),
//! so the weight takes half the memory and the arithmetic stays `f32`.

use crate::common::{View, all_cpu_f32, dims2, expect_shape, tensor, zeros};
use crate::embedding::widen;
use crate::gemm::{Into, Mat, matmul, product};
use crate::profile::{Category, span};
use crate::simd::{Isa, dispatch, dot, dot_bf16};
use candle_core::{DType, Result, Tensor, bail};
use half::bf16;
use rayon::prelude::*;

/// Rows of a `bf16` weight that are widened at a time.
const WEIGHT_ROWS: usize = 512;
/// Up to so many rows of x, as in generation, a product with a weight is bound by memory.
const FEW_ROWS: usize = 4;

/// x [N, K] · wᵀ for w [O, K], as [N, O] in the dtype of x.
///
/// # Errors
/// If the shapes do not fit.
pub fn matmul_nt(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let _span = span(Category::Gemm);
    let (n, k) = dims2(x, "x")?;
    let (o, _) = weight_dims(w, "w", None, Some(k))?;
    if !fused(&[x], w) {
        return reference::matmul_nt(x, w);
    }
    let x = View::new(x, "x")?;
    let y = product_nt(x.f32()?, w, n)?;
    tensor(y, &[n, o])
}

/// dy [N, O] · w for w [O, K], as [N, K] in the dtype of dy.
///
/// # Errors
/// If the shapes do not fit.
pub fn matmul_nn(dy: &Tensor, w: &Tensor) -> Result<Tensor> {
    let _span = span(Category::Gemm);
    let (n, o) = dims2(dy, "dy")?;
    let (_, k) = weight_dims(w, "w", Some(o), None)?;
    if !fused(&[dy], w) {
        return reference::matmul_nn(dy, w);
    }
    let dy = View::new(dy, "dy")?;
    let dx = product_nn(dy.f32()?, w, n)?;
    tensor(dx, &[n, k])
}

/// aᵀ·b for a [N, O] and b [N, K], as [O, K] in the dtype of a: the gradient of a weight.
///
/// # Errors
/// If the shapes do not fit.
pub fn matmul_tn(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let _span = span(Category::Gemm);
    let (n, o) = dims2(a, "a")?;
    let (_, k) = weight_dims(b, "b", Some(n), None)?;
    if !all_cpu_f32(&[a, b]) {
        return reference::matmul_tn(a, b);
    }
    let (a, b) = (View::new(a, "a")?, View::new(b, "b")?);
    let out = product(1.0, Mat::new(a.f32()?, n, o).t(), Mat::new(b.f32()?, n, k));
    tensor(out, &[o, k])
}

/// A linear layer with LoRA: returns y [N, O] = x·wᵀ + s·(x·aᵀ)·bᵀ and xa [N, r] = x·aᵀ, which the
/// backward needs.
///
/// # Errors
/// If the shapes do not fit.
pub fn lora_forward(
    x: &Tensor,
    w: &Tensor,
    a: &Tensor,
    b: &Tensor,
    s: f32,
) -> Result<(Tensor, Tensor)> {
    lora_forward_dropped(x, x, w, a, b, s)
}

/// [`lora_forward`] whose low-rank path reads `dropped`, x after dropout.
///
/// # Errors
/// If the shapes do not fit.
pub fn lora_forward_dropped(
    x: &Tensor,
    dropped: &Tensor,
    w: &Tensor,
    a: &Tensor,
    b: &Tensor,
    s: f32,
) -> Result<(Tensor, Tensor)> {
    let _span = span(Category::Gemm);
    let (n, k) = dims2(x, "x")?;
    expect_shape(dropped, "dropped", &[n, k])?;
    let (o, _) = weight_dims(w, "w", None, Some(k))?;
    let (r, _) = weight_dims(a, "a", None, Some(k))?;
    expect_shape(b, "b", &[o, r])?;
    if !fused(&[x, dropped, a, b], w) {
        return reference::lora_forward(x, dropped, w, a, b, s);
    }
    let (x, dropped) = (View::new(x, "x")?, View::new(dropped, "dropped")?);
    let (a, b) = (View::new(a, "a")?, View::new(b, "b")?);
    let mut y = product_nt(x.f32()?, w, n)?;
    let dropped = Mat::new(dropped.f32()?, n, k);
    let xa = product(1.0, dropped, Mat::new(a.f32()?, r, k).t());
    matmul(&mut y, o, Into::Add, s, Mat::new(&xa, n, r), Mat::new(b.f32()?, o, r).t());
    Ok((tensor(y, &[n, o])?, tensor(xa, &[n, r])?))
}

/// Backward of [`lora_forward`]: (dx, da [r, K], db [O, r]) from dy [N, O].
///
/// `x` is what the low-rank path read (after dropout, if any) and `xa` its product with aᵀ.
/// dx [N, K] = dy·w + s·(dy·b)·a only if `need_dx`; da = s·(dy·b)ᵀ·x; db = s·dyᵀ·xa.
///
/// With dropout the low-rank part of dx must pass the mask before it is added: see
/// [`lora_backward_parts`].
///
/// # Errors
/// If the shapes do not fit.
#[allow(clippy::too_many_arguments)]
pub fn lora_backward(
    dy: &Tensor,
    x: &Tensor,
    w: &Tensor,
    a: &Tensor,
    b: &Tensor,
    s: f32,
    xa: &Tensor,
    need_dx: bool,
) -> Result<(Option<Tensor>, Tensor, Tensor)> {
    let _span = span(Category::Gemm);
    let dims = LoraDims::check(dy, x, w, a, b, xa)?;
    if !fused(&[dy, x, a, b, xa], w) {
        let (base, low, da, db) = reference::lora_backward(dy, x, w, a, b, s, xa, need_dx)?;
        let dx = match (base, low) {
            (Some(base), Some(low)) => Some((base + low)?),
            _ => None,
        };
        return Ok((dx, da, db));
    }
    let LoraDims { n, o, k, r } = dims;
    let (dyb, da, db) = lora_gradients(dims, dy, x, b, s, xa)?;
    let dx = if need_dx {
        let (dy, a) = (View::new(dy, "dy")?, View::new(a, "a")?);
        let mut dx = product_nn(dy.f32()?, w, n)?;
        matmul(&mut dx, k, Into::Add, s, Mat::new(&dyb, n, r), Mat::new(a.f32()?, r, k));
        Some(tensor(dx, &[n, k])?)
    } else {
        None
    };
    Ok((dx, tensor(da, &[r, k])?, tensor(db, &[o, r])?))
}

/// What [`lora_backward_parts`] returns.
#[derive(Debug, Clone)]
pub struct LoraGradients {
    /// dy·w [N, K], if asked for.
    pub dx_base: Option<Tensor>,
    /// s·(dy·b)·a [N, K], the gradient of what the low-rank path read, if asked for.
    pub dx_low_rank: Option<Tensor>,
    /// Gradient of a [r, K].
    pub da: Tensor,
    /// Gradient of b [O, r].
    pub db: Tensor,
}

/// [`lora_backward`] with the two parts of dx apart, for dropout on the low-rank path.
///
/// # Errors
/// If the shapes do not fit.
#[allow(clippy::too_many_arguments)]
pub fn lora_backward_parts(
    dy: &Tensor,
    x: &Tensor,
    w: &Tensor,
    a: &Tensor,
    b: &Tensor,
    s: f32,
    xa: &Tensor,
    need_dx: bool,
) -> Result<LoraGradients> {
    let _span = span(Category::Gemm);
    let dims = LoraDims::check(dy, x, w, a, b, xa)?;
    if !fused(&[dy, x, a, b, xa], w) {
        let (dx_base, dx_low_rank, da, db) =
            reference::lora_backward(dy, x, w, a, b, s, xa, need_dx)?;
        return Ok(LoraGradients { dx_base, dx_low_rank, da, db });
    }
    let LoraDims { n, o, k, r } = dims;
    let (dyb, da, db) = lora_gradients(dims, dy, x, b, s, xa)?;
    let (mut dx_base, mut dx_low_rank) = (None, None);
    if need_dx {
        let (dy, a) = (View::new(dy, "dy")?, View::new(a, "a")?);
        let base = product_nn(dy.f32()?, w, n)?;
        let low = product(s, Mat::new(&dyb, n, r), Mat::new(a.f32()?, r, k));
        dx_base = Some(tensor(base, &[n, k])?);
        dx_low_rank = Some(tensor(low, &[n, k])?);
    }
    Ok(LoraGradients { dx_base, dx_low_rank, da: tensor(da, &[r, k])?, db: tensor(db, &[o, r])? })
}

/// The dimensions of a linear layer with LoRA.
#[derive(Clone, Copy)]
struct LoraDims {
    n: usize,
    o: usize,
    k: usize,
    r: usize,
}

impl LoraDims {
    fn check(
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        a: &Tensor,
        b: &Tensor,
        xa: &Tensor,
    ) -> Result<Self> {
        let (n, o) = dims2(dy, "dy")?;
        let (_, k) = weight_dims(w, "w", Some(o), None)?;
        expect_shape(x, "x", &[n, k])?;
        let (r, _) = weight_dims(a, "a", None, Some(k))?;
        expect_shape(b, "b", &[o, r])?;
        expect_shape(xa, "xa", &[n, r])?;
        Ok(Self { n, o, k, r })
    }
}

/// dy·b [N, r], da [r, K] and db [O, r] of a linear layer with LoRA.
fn lora_gradients(
    LoraDims { n, o, k, r }: LoraDims,
    dy: &Tensor,
    x: &Tensor,
    b: &Tensor,
    s: f32,
    xa: &Tensor,
) -> Result<(Vec<f32>, Vec<f32>, Vec<f32>)> {
    let (dy, x) = (View::new(dy, "dy")?, View::new(x, "x")?);
    let (b, xa) = (View::new(b, "b")?, View::new(xa, "xa")?);
    let dy = Mat::new(dy.f32()?, n, o);
    let dyb = product(1.0, dy, Mat::new(b.f32()?, o, r));
    let da = product(s, Mat::new(&dyb, n, r).t(), Mat::new(x.f32()?, n, k));
    let db = product(s, dy.t(), Mat::new(xa.f32()?, n, r));
    Ok((dyb, da, db))
}

/// True if all of `tensors` are f32 on the CPU and `w` is f32 or bf16 there.
pub(crate) fn fused(tensors: &[&Tensor], w: &Tensor) -> bool {
    all_cpu_f32(tensors) && w.device().is_cpu() && matches!(w.dtype(), DType::F32 | DType::BF16)
}

/// y [n, O] = x·wᵀ.
fn product_nt(x: &[f32], w: &Tensor, n: usize) -> Result<Vec<f32>> {
    let (o, k) = dims2(w, "w")?;
    let view = View::new(w, "w")?;
    if (1..=FEW_ROWS).contains(&n) && k > 0 {
        return Ok(match w.dtype() {
            DType::F32 => few_rows(x, view.f32()?, n, o, k, dots_f32),
            _ => few_rows(x, view.bf16()?, n, o, k, dots_bf16),
        });
    }
    let x = Mat::new(x, n, k);
    if w.dtype() == DType::F32 {
        return Ok(product(1.0, x, Mat::new(view.f32()?, o, k).t()));
    }
    let mut y = zeros(n * o);
    for_widened_rows(view.bf16()?, k, |row, rows, weight| {
        let y = &mut y[row..];
        matmul(y, o, Into::Overwrite, 1.0, x, Mat::new(weight, rows, k).t());
    });
    Ok(y)
}

/// dx [n, K] = dy·w.
fn product_nn(dy: &[f32], w: &Tensor, n: usize) -> Result<Vec<f32>> {
    let (o, k) = dims2(w, "w")?;
    let dy = Mat::new(dy, n, o);
    let view = View::new(w, "w")?;
    if w.dtype() == DType::F32 {
        return Ok(product(1.0, dy, Mat::new(view.f32()?, o, k)));
    }
    let mut dx = zeros(n * k);
    for_widened_rows(view.bf16()?, k, |row, rows, weight| {
        matmul(&mut dx, k, Into::Add, 1.0, dy.columns(row, rows), Mat::new(weight, rows, k));
    });
    Ok(dx)
}

/// y [n, O] = x·wᵀ for a few rows of x: one task reads each row of the weight, once, because the
/// weight's way from memory is all that such a product costs.
fn few_rows<W: Sync>(
    x: &[f32],
    w: &[W],
    n: usize,
    o: usize,
    k: usize,
    dots: impl Fn(&mut [f32], &[f32], &[W], usize) + Sync,
) -> Vec<f32> {
    const ROWS: usize = 16;
    let mut columns = zeros(o * n);
    let tasks = columns.par_chunks_mut(ROWS * n).zip(w.par_chunks(ROWS * k));
    tasks.for_each(|(out, w)| dots(out, x, w, k));
    if n == 1 {
        return columns;
    }
    let mut y = zeros(n * o);
    for (column, values) in columns.chunks_exact(n).enumerate() {
        for (row, &value) in values.iter().enumerate() {
            y[row * o + column] = value;
        }
    }
    y
}

dispatch! {
    fn dots_f32(out: &mut [f32], x: &[f32], w: &[f32], k: usize) = dots_f32_body;
    fn dots_bf16(out: &mut [f32], x: &[f32], w: &[bf16], k: usize) = dots_bf16_body;
}

/// out [rows of w, rows of x]: the product of each row of w [_, k] with each row of x [_, k].
#[inline(always)]
fn dots_f32_body<M: Isa>(out: &mut [f32], x: &[f32], w: &[f32], k: usize) {
    let pairs = w.chunks_exact(k).flat_map(|w| x.chunks_exact(k).map(move |x| (w, x)));
    for (out, (w, x)) in out.iter_mut().zip(pairs) {
        *out = dot::<M>(x, w);
    }
}

/// The same for w in `bf16`.
#[inline(always)]
fn dots_bf16_body<M: Isa>(out: &mut [f32], x: &[f32], w: &[bf16], k: usize) {
    let pairs = w.chunks_exact(k).flat_map(|w| x.chunks_exact(k).map(move |x| (w, x)));
    for (out, (w, x)) in out.iter_mut().zip(pairs) {
        *out = dot_bf16::<M>(x, w);
    }
}

/// Calls `each(first row, number of rows, their values in f32)` for blocks of rows of `k` values.
pub(crate) fn for_widened_rows(
    weight: &[bf16],
    k: usize,
    mut each: impl FnMut(usize, usize, &[f32]),
) {
    if k == 0 {
        return;
    }
    let mut buffer = zeros((WEIGHT_ROWS * k).min(weight.len()));
    for (block, values) in weight.chunks(WEIGHT_ROWS * k).enumerate() {
        let buffer = &mut buffer[..values.len()];
        buffer.par_chunks_mut(8 * k).zip(values.par_chunks(8 * k)).for_each(|(b, v)| widen(b, v));
        each(block * WEIGHT_ROWS, values.len() / k, buffer);
    }
}

/// The dimensions of a matrix, checked against what its neighbours say of them.
fn weight_dims(
    w: &Tensor,
    name: &str,
    rows: Option<usize>,
    columns: Option<usize>,
) -> Result<(usize, usize)> {
    let (o, k) = dims2(w, name)?;
    if rows.is_some_and(|rows| rows != o) || columns.is_some_and(|columns| columns != k) {
        let show = |dim: Option<usize>| dim.map_or("_".to_string(), |dim| dim.to_string());
        bail!(
            "`{name}` must have shape [{}, {}], its shape is [{o}, {k}]",
            show(rows),
            show(columns)
        )
    }
    Ok((o, k))
}

/// The same with plain candle operations. Weights of another dtype are converted to that of x.
pub mod reference {
    use candle_core::{Result, Tensor};

    /// See [`super::matmul_nt`].
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn matmul_nt(x: &Tensor, w: &Tensor) -> Result<Tensor> {
        x.matmul(&w.to_dtype(x.dtype())?.t()?)
    }

    /// See [`super::matmul_nn`].
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn matmul_nn(dy: &Tensor, w: &Tensor) -> Result<Tensor> {
        dy.matmul(&w.to_dtype(dy.dtype())?)
    }

    /// See [`super::matmul_tn`].
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn matmul_tn(a: &Tensor, b: &Tensor) -> Result<Tensor> {
        a.t()?.matmul(&b.to_dtype(a.dtype())?)
    }

    /// See [`super::lora_forward_dropped`].
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn lora_forward(
        x: &Tensor,
        dropped: &Tensor,
        w: &Tensor,
        a: &Tensor,
        b: &Tensor,
        s: f32,
    ) -> Result<(Tensor, Tensor)> {
        let xa = matmul_nt(dropped, a)?;
        let y = (matmul_nt(x, w)? + (matmul_nt(&xa, b)? * f64::from(s))?)?;
        Ok((y, xa))
    }

    /// dy·w, s·(dy·b)·a, da and db. See [`super::lora_backward_parts`]. da and db have the dtypes
    /// of a and b.
    ///
    /// # Errors
    /// If the shapes do not fit.
    #[allow(clippy::too_many_arguments, clippy::type_complexity)]
    pub fn lora_backward(
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        a: &Tensor,
        b: &Tensor,
        s: f32,
        xa: &Tensor,
        need_dx: bool,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Tensor, Tensor)> {
        let dyb = (matmul_nn(dy, b)? * f64::from(s))?;
        let da = matmul_tn(&dyb, x)?.to_dtype(a.dtype())?;
        let db = (matmul_tn(dy, xa)? * f64::from(s))?.to_dtype(b.dtype())?;
        let (base, low) = if need_dx {
            (Some(matmul_nn(dy, w)?), Some(matmul_nn(&dyb, a)?))
        } else {
            (None, None)
        };
        Ok((base, low, da, db))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, check_gradient, f64s, random, same_bits, weighted_sum};

    #[test]
    fn products_equal_reference() -> Result<()> {
        for (n, k, o) in
            [(1, 1, 1), (1, 64, 80), (2, 33, 5), (4, 70, 19), (7, 33, 20), (70, 80, 1100)]
        {
            let (x, w, dy) = (random(&[n, k], 1), random(&[o, k], 2), random(&[n, o], 3));
            let (x64, dy64) = (f64s(&x)?, f64s(&dy)?);
            for w in [w.clone(), w.to_dtype(DType::BF16)?] {
                let w64 = f64s(&w)?;
                assert_close(&matmul_nt(&x, &w)?, &reference::matmul_nt(&x64, &w64)?, 2e-6);
                assert_close(&matmul_nn(&dy, &w)?, &reference::matmul_nn(&dy64, &w64)?, 2e-6);
            }
            assert_close(&matmul_tn(&dy, &x)?, &reference::matmul_tn(&dy64, &x64)?, 2e-6);
        }
        Ok(())
    }

    #[test]
    fn lora_equals_reference() -> Result<()> {
        for (n, k, o, r) in [(1, 5, 3, 1), (33, 40, 70, 4), (65, 96, 48, 16)] {
            let (x, w, dy) = (random(&[n, k], 1), random(&[o, k], 2), random(&[n, o], 3));
            let (a, b) = (random(&[r, k], 4), random(&[o, r], 5));
            let all = [&x, &w, &a, &b, &dy].map(f64s);
            let [x64, w64, a64, b64, dy64] = all;
            let (x64, w64, a64, b64, dy64) = (x64?, w64?, a64?, b64?, dy64?);
            let (y, xa) = lora_forward(&x, &w, &a, &b, 2.0)?;
            let (y64, xa64) = reference::lora_forward(&x64, &x64, &w64, &a64, &b64, 2.0)?;
            assert_close(&y, &y64, 3e-6);
            assert_close(&xa, &xa64, 3e-6);
            let (dx, da, db) = lora_backward(&dy, &x, &w, &a, &b, 2.0, &xa, true)?;
            let (base, low, da64, db64) =
                reference::lora_backward(&dy64, &x64, &w64, &a64, &b64, 2.0, &xa64, true)?;
            let (base, low) = (base.unwrap(), low.unwrap());
            assert_close(&dx.unwrap(), &(&base + &low)?, 3e-6);
            assert_close(&da, &da64, 3e-6);
            assert_close(&db, &db64, 3e-6);
            let parts = lora_backward_parts(&dy, &x, &w, &a, &b, 2.0, &xa, true)?;
            assert_close(&parts.dx_base.unwrap(), &base, 3e-6);
            assert_close(&parts.dx_low_rank.unwrap(), &low, 3e-6);
            assert_close(&parts.da, &da64, 3e-6);
            assert!(lora_backward(&dy, &x, &w, &a, &b, 2.0, &xa, false)?.0.is_none());
        }
        Ok(())
    }

    #[test]
    fn lora_gradients_by_finite_differences() -> Result<()> {
        let (x, w) = (f64s(&random(&[4, 5], 1))?, f64s(&random(&[6, 5], 2))?);
        let (a, b) = (f64s(&random(&[2, 5], 3))?, f64s(&random(&[6, 2], 4))?);
        let dy = f64s(&random(&[4, 6], 5))?;
        let loss = |x: &Tensor, a: &Tensor, b: &Tensor| {
            weighted_sum(&lora_forward(x, &w, a, b, 0.5)?.0, &dy)
        };
        let xa = lora_forward(&x, &w, &a, &b, 0.5)?.1;
        let (dx, da, db) = lora_backward(&dy, &x, &w, &a, &b, 0.5, &xa, true)?;
        check_gradient(&x, &dx.unwrap(), |x| loss(x, &a, &b))?;
        check_gradient(&a, &da, |a| loss(&x, a, &b))?;
        check_gradient(&b, &db, |b| loss(&x, &a, b))
    }

    #[test]
    fn bits_do_not_depend_on_threads() -> Result<()> {
        let (x, w, dy) = (random(&[150, 200], 1), random(&[600, 200], 2), random(&[150, 600], 3));
        let (a, b) = (random(&[16, 200], 4), random(&[600, 16], 5));
        for w in [w.clone(), w.to_dtype(DType::BF16)?] {
            same_bits(|| {
                let (y, xa) = lora_forward(&x, &w, &a, &b, 2.0)?;
                let (dx, da, db) = lora_backward(&dy, &x, &w, &a, &b, 2.0, &xa, true)?;
                Ok(vec![y, xa, dx.unwrap(), da, db])
            })?;
        }
        Ok(())
    }

    #[test]
    fn wrong_shapes_are_named() {
        let error = matmul_nt(&random(&[2, 3], 1), &random(&[4, 5], 2)).unwrap_err().to_string();
        assert!(error.contains("`w` must have shape [_, 3], its shape is [4, 5]"), "{error}");
    }
}
