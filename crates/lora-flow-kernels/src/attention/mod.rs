//! Causal attention of a padding-free batch: softmax(scale · q·kᵀ)·v for each head, where a token
//! sees the tokens of its own document up to itself (and no further back than the window).
//!
//! Grouped queries: query head h reads key head h / (Hq / Hkv). Neither path ever holds the scores
//! of the whole batch; the fused one works through blocks with a running softmax (Milakov &
//! Gimelshein 2018; Dao et al. 2022) and keeps only the log-sum-exp of each row for the backward.

mod blocks;
mod fused;
mod pairs;
mod panels;
pub mod reference;
#[cfg(test)]
mod tests;
mod tile;

use self::blocks::Blocks;
use crate::common::{all_cpu_f32, check_docs, dims3, expect_shape};
use crate::profile::{Category, span};
use candle_core::{DType, Result, Tensor, bail};

/// What a token sees of a batch, and how it is multiplied.
#[derive(Debug, Clone, Copy)]
pub struct Setting<'a> {
    /// Cumulative lengths of the documents.
    pub docs: &'a [usize],
    /// Factor of the scores.
    pub scale: f32,
    /// With w a token sees itself and the w − 1 before it.
    pub window: Option<usize>,
    /// `bf16`: where the processor multiplies such numbers, the operands of products are rounded to
    /// `bf16` and the sums are `f32`. Elsewhere, and with anything else, they are taken as they stand.
    pub operands: DType,
}

impl Setting<'_> {
    fn in_pairs(&self, dims: Dims) -> bool {
        self.operands == DType::BF16 && pairs::usable(dims.width)
    }
}

/// Attention output o [N, Hq, D] and the log-sum-exp of the scaled scores, lse [Hq, N] (f32).
///
/// `q` [N, Hq, D], `k` and `v` [N, Hkv, D].
///
/// # Errors
/// If the shapes do not fit, `docs` does not run from 0 to N, or the window is 0.
pub fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    setting: &Setting<'_>,
) -> Result<(Tensor, Tensor)> {
    let _span = span(Category::Attention);
    let Setting { docs, scale, window, .. } = *setting;
    let dims = Dims::check(q, k, v, docs, window)?;
    if !all_cpu_f32(&[q, k, v]) {
        return reference::forward(q, k, v, docs, scale, window);
    }
    if setting.in_pairs(dims) {
        return pairs::forward(dims, q, k, v, docs, scale, window);
    }
    fused::forward(dims, q, k, v, &Blocks::new(docs, window, fused::QUERY_ROWS), scale)
}

/// [`forward`] over a tree of documents that share their beginnings, each of which stands once. The
/// rows are in depth-first order, and token t is seen by the rows from t to `ends[t]`, those of its
/// branch.
///
/// # Errors
/// If the shapes do not fit, or an end is no end of a branch.
pub fn forward_tree(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    ends: &[usize],
    scale: f32,
) -> Result<(Tensor, Tensor)> {
    let _span = span(Category::Attention);
    let dims = Dims::check(q, k, v, &[0, ends.len()], None)?;
    for (token, &end) in ends.iter().enumerate() {
        let inside = ends.get(token + 1).is_none_or(|&next| token + 1 >= end || next <= end);
        if end <= token || end > ends.len() || !inside {
            bail!("the branch of token {token} cannot end at {end}")
        }
    }
    if all_cpu_f32(&[q, k, v]) {
        fused::forward(dims, q, k, v, &Blocks::tree(ends, fused::QUERY_ROWS), scale)
    } else {
        reference::forward_tree(q, k, v, ends, scale)
    }
}

/// Gradients (dq, dk, dv) of [`forward`] from `grad` = do [N, Hq, D], with the `o` and `lse` that
/// it returned.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    grad: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    setting: &Setting<'_>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let _span = span(Category::Attention);
    let Setting { docs, scale, window, .. } = *setting;
    let dims = Dims::check(q, k, v, docs, window)?;
    expect_shape(grad, "do", q.dims())?;
    expect_shape(o, "o", q.dims())?;
    expect_shape(lse, "lse", &[dims.heads, dims.tokens])?;
    if !all_cpu_f32(&[grad, q, k, v, o, lse]) {
        return reference::backward(grad, q, k, v, o, lse, docs, scale, window);
    }
    if setting.in_pairs(dims) {
        return pairs::backward(dims, grad, q, k, v, o, lse, docs, scale, window);
    }
    fused::backward(dims, grad, q, k, v, o, lse, docs, scale, window)
}

/// The dimensions of one attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dims {
    /// N.
    tokens: usize,
    /// Hq.
    heads: usize,
    /// Hkv.
    kv_heads: usize,
    /// D.
    width: usize,
}

impl Dims {
    fn check(
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        docs: &[usize],
        window: Option<usize>,
    ) -> Result<Self> {
        let (tokens, heads, width) = dims3(q, "q")?;
        let (_, kv_heads, _) = dims3(k, "k")?;
        expect_shape(k, "k", &[tokens, kv_heads, width])?;
        expect_shape(v, "v", &[tokens, kv_heads, width])?;
        check_docs(docs, tokens)?;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            bail!("{heads} query heads are not a multiple of {kv_heads} key heads")
        }
        if width == 0 {
            bail!("a head of `q` has no elements, its shape is {:?}", q.dims())
        }
        if window == Some(0) {
            bail!("the attention window must be at least 1")
        }
        Ok(Self { tokens, heads, kv_heads, width })
    }

    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}
