//! Linear layers without copies: y = x·wᵀ with a frozen weight, with or without LoRA, and their
//! backward.
//!
//! LoRA (Hu et al. 2021): y = x·wᵀ + s·(x·aᵀ)·bᵀ with a [r, K], b [O, r]. The low-rank parts are
//! added into the product in place; the backward never forms a dense dw. Layers that read the same
//! input (q, k and v; gate and up) go together: their a's make one product, and the gradients of
//! their input one sum.
//!
//! Over a frozen weight in `bf16` the operands of all products with w, a and b are rounded to
//! `bf16` as they enter, the sums are `f32`. The gradients of a and b are products in `f32`.

pub mod reference;
#[cfg(test)]
mod tests;

use crate::common::{View, all_cpu_f32, dims2, expect_shape, tensor, zeros};
use crate::gemm::{Inputs, Into, Left, Mat, Right, Term, matmul, product, round_to_bf16};
use crate::profile::{Category, span};
use crate::simd::{Isa, dispatch, dot, dot_bf16};
use candle_core::{DType, Result, Tensor, bail};
use half::bf16;
use rayon::prelude::*;
use std::borrow::Cow;

/// Up to so many rows of x, as in generation, each row is multiplied by itself while the weight
/// passes, so that its result has the same bits however many rows there are.
pub const FEW_ROWS: usize = 16;

/// A frozen weight with its adapter, if it has one.
#[derive(Debug, Clone, Copy)]
pub struct Projection<'a> {
    /// [O, K], `f32` or `bf16`.
    pub w: &'a Tensor,
    /// The adapter.
    pub lora: Option<LoraPair<'a>>,
}

/// The matrices of a LoRA module.
#[derive(Debug, Clone, Copy)]
pub struct LoraPair<'a> {
    /// [r, K]
    pub a: &'a Tensor,
    /// [O, r]
    pub b: &'a Tensor,
    /// Factor of the low-rank product.
    pub s: f32,
}

/// y [N, O] of one of several layers, and x·aᵀ [N, r] where it has an adapter.
pub type Projected = (Tensor, Option<Tensor>);

/// Gradients of a [r, K] and of b [O, r].
pub type PairGradients = (Tensor, Tensor);

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
    let view = View::new(x, "x")?;
    let x = Input::new(view.f32()?, n, k, inputs(w));
    tensor(x.times_transposed(w, None)?, &[n, o])
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
    let (dy, weight) = (View::new(dy, "dy")?, Weight::new(w)?);
    let dy = Left::new(Mat::new(dy.f32()?, n, o), inputs(w));
    tensor(product(&[Term { a: &dy, b: weight.right()? }]), &[n, k])
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
    let a = Left::new(Mat::new(a.f32()?, n, o).t(), Inputs::F32);
    tensor(product(&[Term { a: &a, b: Right::new(b.f32()?, n, k) }]), &[o, k])
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
    let layer = Projection { w, lora: Some(LoraPair { a, b, s }) };
    match forward_dropped(x, dropped, &[layer])?.pop() {
        Some((y, Some(xa))) => Ok((y, xa)),
        _ => bail!("a layer with an adapter gave no x·aᵀ"),
    }
}

/// Several layers that read the same x [N, K].
///
/// # Errors
/// If the shapes do not fit.
pub fn forward(x: &Tensor, layers: &[Projection<'_>]) -> Result<Vec<Projected>> {
    forward_dropped(x, x, layers)
}

/// x·aᵀ [N, r] alone, with the bits that [`forward`] gives it.
///
/// # Errors
/// If the shapes do not fit or the layer has no adapter.
pub fn low_rank(x: &Tensor, layer: &Projection<'_>) -> Result<Tensor> {
    let Some(LoraPair { a, .. }) = layer.lora else { bail!("the layer has no adapter") };
    // A weight's dtype says how operands are rounded.
    matmul_nt(x, &if layer.w.dtype() == DType::BF16 { a.to_dtype(DType::BF16)? } else { a.clone() })
}

fn forward_dropped(
    x: &Tensor,
    dropped: &Tensor,
    layers: &[Projection<'_>],
) -> Result<Vec<Projected>> {
    let _span = span(Category::Gemm);
    let (n, k) = dims2(x, "x")?;
    expect_shape(dropped, "dropped", &[n, k])?;
    let group = Group::check(layers, k)?;
    if !group.fused(&[x, dropped]) {
        return layers.iter().map(|layer| reference::forward(x, dropped, layer)).collect();
    }
    let same = x.id() == dropped.id();
    let (x, dropped) = (View::new(x, "x")?, View::new(dropped, "dropped")?);
    let x = Input::new(x.f32()?, n, k, group.inputs);
    let ranks = group.ranks();
    // x·aᵀ of all adapters side by side.
    let mut low = Vec::new();
    if ranks > 0 {
        let a = group.stacked_a()?;
        let other = (!same).then(|| dropped.f32()).transpose()?;
        let other = other.map(|dropped| Input::new(dropped, n, k, group.inputs));
        low = other.as_ref().unwrap_or(&x).times_slices(&a, ranks);
    }
    let mut first = 0;
    let mut out = Vec::with_capacity(layers.len());
    for layer in layers {
        let (o, _) = dims2(layer.w, "w")?;
        let Some(lora) = &layer.lora else {
            out.push((tensor(x.times_transposed(layer.w, None)?, &[n, o])?, None));
            continue;
        };
        let (r, _) = dims2(lora.a, "a")?;
        let xa = Mat::new(&low, n, ranks).columns(first, r);
        let b = scaled(lora.b, lora.s)?;
        let y = x.times_transposed(layer.w, Some((xa, &b)))?;
        let xa = low.chunks_exact(ranks).flat_map(|row| &row[first..first + r]).copied().collect();
        out.push((tensor(y, &[n, o])?, Some(tensor(xa, &[n, r])?)));
        first += r;
    }
    Ok(out)
}

/// Backward of [`forward`]: dx [N, K] = Σ dy·w + s·(dy·b)·a if `need_dx`, and the gradients of each
/// adapter, da = s·(dy·b)ᵀ·x and db = s·dyᵀ·xa, from the gradients `dys` [N, O] of the layers.
///
/// `x` is what the low-rank paths read; it may be missing where no layer has an adapter.
/// `xas` are the products x·aᵀ that the forward returned.
///
/// # Errors
/// If the shapes do not fit.
pub fn backward(
    dys: &[&Tensor],
    x: Option<&Tensor>,
    layers: &[Projection<'_>],
    xas: &[Option<&Tensor>],
    need_dx: bool,
) -> Result<(Option<Tensor>, Vec<Option<PairGradients>>)> {
    let (parts, gradients) = backward_parts(dys, x, layers, xas, need_dx, false)?;
    Ok((parts.map(|(dx, _)| dx), gradients))
}

/// [`backward`] that gives dx as dy·w and, if `apart`, s·(dy·b)·a by itself.
#[allow(clippy::type_complexity)]
fn backward_parts(
    dys: &[&Tensor],
    x: Option<&Tensor>,
    layers: &[Projection<'_>],
    xas: &[Option<&Tensor>],
    need_dx: bool,
    apart: bool,
) -> Result<(Option<(Tensor, Option<Tensor>)>, Vec<Option<PairGradients>>)> {
    let _span = span(Category::Gemm);
    if dys.len() != layers.len() || xas.len() != layers.len() || layers.is_empty() {
        bail!("`dys` and `xas` must have an entry for each layer")
    }
    let (n, _) = dims2(dys[0], "dy")?;
    let (_, k) = dims2(layers[0].w, "w")?;
    let group = Group::check(layers, k)?;
    if let Some(x) = x {
        expect_shape(x, "x", &[n, k])?;
    }
    for ((layer, dy), xa) in layers.iter().zip(dys).zip(xas) {
        expect_shape(dy, "dy", &[n, layer.w.dim(0)?])?;
        match (&layer.lora, xa) {
            (None, _) => {}
            (Some(lora), Some(xa)) => expect_shape(xa, "xa", &[n, lora.a.dim(0)?])?,
            (Some(_), None) => bail!("`xa` of a layer with an adapter is missing"),
        }
    }
    let all = dys.iter().copied().chain(x).chain(xas.iter().copied().flatten());
    if !group.fused(&all.collect::<Vec<_>>()) {
        return reference::backward(dys, x, layers, xas, need_dx, apart);
    }
    let views = dys.iter().map(|dy| View::new(dy, "dy")).collect::<Result<Vec<_>>>()?;
    let rows = |i: usize| Ok::<_, candle_core::Error>((views[i].f32()?, layers[i].w.dim(0)?));
    let mut lefts = Vec::with_capacity(layers.len());
    for i in 0..layers.len() {
        let (dy, o) = rows(i)?;
        lefts.push(Left::new(Mat::new(dy, n, o), group.inputs));
    }
    // s·dy·b of all adapters side by side.
    let ranks = group.ranks();
    let mut low = zeros(n * ranks);
    let mut first = 0;
    for (layer, dy) in layers.iter().zip(&lefts) {
        let Some(lora) = &layer.lora else { continue };
        let (o, r) = dims2(lora.b, "b")?;
        let b = scaled(lora.b, lora.s)?;
        let term = Term { a: dy, b: Right::new(&b, o, r) };
        matmul(low.get_mut(first..).unwrap_or_default(), ranks, Into::Overwrite, &[term]);
        first += r;
    }
    let mut dx = None;
    if need_dx {
        let weights = layers.iter().map(|l| Weight::new(l.w)).collect::<Result<Vec<_>>>()?;
        let mut terms = Vec::with_capacity(layers.len() + 1);
        for (dy, weight) in lefts.iter().zip(&weights) {
            terms.push(Term { a: dy, b: weight.right()? });
        }
        let a = group.stacked_a()?;
        let low = Left::new(Mat::new(&low, n, ranks), group.inputs);
        let low = Term { a: &low, b: Right::new(&a, ranks, k) };
        let low_part = apart.then(|| tensor(product(&[low]), &[n, k])).transpose()?;
        if ranks > 0 && !apart {
            terms.push(low);
        }
        dx = Some((tensor(product(&terms), &[n, k])?, low_part));
    }
    drop(lefts);

    let mut gradients = Vec::with_capacity(layers.len());
    let mut da = Vec::new();
    if ranks > 0 {
        let Some(x) = x else { bail!("`x` is missing, which an adapter has read") };
        let x = View::new(x, "x")?;
        // Turned: the wide side is read in place and the thin one packed.
        let x = Left::new(Mat::new(x.f32()?, n, k).t(), Inputs::F32);
        da = product(&[Term { a: &x, b: Right::new(&low, n, ranks) }]);
    }
    let mut first = 0;
    for (i, layer) in layers.iter().enumerate() {
        let (Some(lora), Some(xa)) = (&layer.lora, xas[i]) else {
            gradients.push(None);
            continue;
        };
        let (r, (dy, o)) = (lora.a.dim(0)?, rows(i)?);
        let xa = View::new(xa, "xa")?;
        let dy = Left::new(Mat::new(dy, n, o).t(), Inputs::F32);
        let mut db = product(&[Term { a: &dy, b: Right::new(xa.f32()?, n, r) }]);
        db.iter_mut().for_each(|x| *x *= lora.s);
        let da = (0..r * k).map(|i| da[i % k * ranks + first + i / k]).collect();
        let da = tensor(da, &[r, k])?;
        gradients.push(Some((da, tensor(db, &[o, r])?)));
        first += r;
    }
    Ok((dx, gradients))
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
    let layer = Projection { w, lora: Some(LoraPair { a, b, s }) };
    let (dx, mut gradients) = backward(&[dy], Some(x), &[layer], &[Some(xa)], need_dx)?;
    match gradients.pop() {
        Some(Some((da, db))) => Ok((dx, da, db)),
        _ => bail!("a layer with an adapter gave no gradients"),
    }
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
    let layer = Projection { w, lora: Some(LoraPair { a, b, s }) };
    let (dx, mut gradients) = backward_parts(&[dy], Some(x), &[layer], &[Some(xa)], need_dx, true)?;
    let (dx_base, dx_low_rank) = dx.map_or((None, None), |(base, low)| (Some(base), low));
    match gradients.pop() {
        Some(Some((da, db))) => Ok(LoraGradients { dx_base, dx_low_rank, da, db }),
        _ => bail!("a layer with an adapter gave no gradients"),
    }
}

/// Layers that read the same input, checked.
struct Group<'a> {
    layers: &'a [Projection<'a>],
    inputs: Inputs,
}

impl<'a> Group<'a> {
    fn check(layers: &'a [Projection<'a>], k: usize) -> Result<Self> {
        for layer in layers {
            let (o, _) = weight_dims(layer.w, "w", None, Some(k))?;
            if let Some(lora) = &layer.lora {
                let (r, _) = weight_dims(lora.a, "a", None, Some(k))?;
                expect_shape(lora.b, "b", &[o, r])?;
            }
        }
        Ok(Self { layers, inputs: layers.first().map_or(Inputs::F32, |l| inputs(l.w)) })
    }

    /// True if the fused path can take the layers and these `f32` tensors.
    fn fused(&self, tensors: &[&Tensor]) -> bool {
        let adapters = self.layers.iter().filter_map(|l| l.lora.as_ref());
        adapters.flat_map(|l| [l.a, l.b]).all(|t| all_cpu_f32(&[t]))
            && self.layers.iter().all(|l| fused(tensors, l.w) && inputs(l.w) == self.inputs)
    }

    /// Rows of all a's.
    fn ranks(&self) -> usize {
        self.layers.iter().filter_map(|l| l.lora?.a.dim(0).ok()).sum()
    }

    /// All a's, one below the other.
    fn stacked_a(&self) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        for lora in self.layers.iter().filter_map(|l| l.lora.as_ref()) {
            all.extend_from_slice(View::new(lora.a, "a")?.f32()?);
        }
        Ok(all)
    }
}

/// s·b as [O, r].
fn scaled(b: &Tensor, s: f32) -> Result<Vec<f32>> {
    Ok(View::new(b, "b")?.f32()?.iter().map(|b| s * b).collect())
}

/// What the operands of products with `w` are.
fn inputs(w: &Tensor) -> Inputs {
    Inputs::over(w.dtype())
}

/// True if all of `tensors` are f32 on the CPU and `w` is f32 or bf16 there.
pub(crate) fn fused(tensors: &[&Tensor], w: &Tensor) -> bool {
    all_cpu_f32(tensors) && w.device().is_cpu() && matches!(w.dtype(), DType::F32 | DType::BF16)
}

/// A frozen weight, locked.
struct Weight<'a> {
    view: View<'a>,
    dtype: DType,
    rows: usize,
    columns: usize,
}

impl<'a> Weight<'a> {
    fn new(w: &'a Tensor) -> Result<Self> {
        let (rows, columns) = dims2(w, "w")?;
        Ok(Self { view: View::new(w, "w")?, dtype: w.dtype(), rows, columns })
    }

    fn right(&self) -> Result<Right<'_>> {
        Ok(match self.dtype {
            DType::BF16 => Right::Bf16(Mat::new(self.view.bf16()?, self.rows, self.columns)),
            _ => Right::F32(Mat::new(self.view.f32()?, self.rows, self.columns)),
        })
    }
}

/// The input of linear layers, x [n, k].
enum Input<'a> {
    /// A few rows, which meet a weight as it is read from memory.
    Few {
        x: Cow<'a, [f32]>,
        n: usize,
        k: usize,
        inputs: Inputs,
    },
    Many(Left<'a>),
}

impl<'a> Input<'a> {
    fn new(x: &'a [f32], n: usize, k: usize, inputs: Inputs) -> Self {
        if !(1..=FEW_ROWS).contains(&n) || k == 0 {
            return Self::Many(Left::new(Mat::new(x, n, k), inputs));
        }
        let x = match inputs {
            Inputs::F32 => Cow::Borrowed(x),
            Inputs::Bf16 => Cow::Owned(round_to_bf16(x)),
        };
        Self::Few { x, n, k, inputs }
    }

    /// x·wᵀ [n, O], plus xa·bᵀ for xa [n, r] and b [O, r].
    fn times_transposed(&self, w: &Tensor, low: Option<(Mat<'_>, &[f32])>) -> Result<Vec<f32>> {
        let weight = Weight::new(w)?;
        let (o, k) = (weight.rows, weight.columns);
        match self {
            Self::Many(x) => {
                let main = Term { a: x, b: weight.right()?.t() };
                let Some((xa, b)) = low else { return Ok(product(&[main])) };
                let r = b.len() / o.max(1);
                let xa = Left::new(xa, inputs(w));
                Ok(product(&[main, Term { a: &xa, b: Right::new(b, o, r).t() }]))
            }
            Self::Few { x, n, .. } => {
                let mut y = match weight.dtype {
                    DType::BF16 => few_rows(x, weight.view.bf16()?, *n, o, k, dots_bf16),
                    _ => few_rows(x, weight.view.f32()?, *n, o, k, dots_f32),
                };
                if let Some((xa, b)) = low {
                    let xa = Left::new(xa, inputs(w));
                    let b = Right::new(b, o, b.len() / o.max(1)).t();
                    matmul(&mut y, o, Into::Add, &[Term { a: &xa, b }]);
                }
                Ok(y)
            }
        }
    }

    /// x·aᵀ [n, rows] for a [rows, k].
    fn times_slices(&self, a: &[f32], rows: usize) -> Vec<f32> {
        match self {
            Self::Many(x) => {
                let k = a.len() / rows.max(1);
                product(&[Term { a: x, b: Right::new(a, rows, k).t() }])
            }
            Self::Few { x, n, k, inputs } => match inputs {
                Inputs::F32 => few_rows(x, a, *n, rows, *k, dots_f32),
                Inputs::Bf16 => few_rows(x, &round_to_bf16(a), *n, rows, *k, dots_f32),
            },
        }
    }
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
