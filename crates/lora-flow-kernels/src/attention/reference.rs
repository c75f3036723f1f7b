//! Attention with plain candle operations, one document at a time.

use crate::common::{dims3, wide};
use candle_core::{D, DType, Device, Result, Tensor};

/// See [`super::forward`].
///
/// # Errors
/// As there.
pub fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    docs: &[usize],
    scale: f32,
    window: Option<usize>,
) -> Result<(Tensor, Tensor)> {
    let (tokens, heads, _) = dims3(q, "q")?;
    let dtype = wide(q.dtype());
    let (mut outputs, mut sums) = (Vec::new(), Vec::new());
    for (start, len) in documents(docs) {
        let document = Document::new(q, k, v, start, len)?;
        let (p, lse) = document.probabilities(scale, window)?;
        outputs.push(p.matmul(&document.v)?.transpose(0, 1)?);
        sums.push(lse);
    }
    if outputs.is_empty() {
        return Ok((q.clone(), Tensor::zeros((heads, tokens), dtype, q.device())?));
    }
    let o = Tensor::cat(&outputs, 0)?.to_dtype(q.dtype())?.contiguous()?;
    Ok((o, Tensor::cat(&sums, 1)?))
}

/// See [`super::forward_tree`].
///
/// # Errors
/// As there.
pub fn forward_tree(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    ends: &[usize],
    scale: f32,
) -> Result<(Tensor, Tensor)> {
    let all = Document::new(q, k, v, 0, ends.len())?;
    let (p, lse) = all.masked(scale, |row, column| column <= row && row < ends[column])?;
    Ok((p.matmul(&all.v)?.transpose(0, 1)?.to_dtype(q.dtype())?.contiguous()?, lse))
}

/// See [`super::backward`].
///
/// # Errors
/// As there.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    grad: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    _lse: &Tensor,
    docs: &[usize],
    scale: f32,
    window: Option<usize>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (mut dq, mut dk, mut dv) = (Vec::new(), Vec::new(), Vec::new());
    for (start, len) in documents(docs) {
        let document = Document::new(q, k, v, start, len)?;
        let (p, _) = document.probabilities(scale, window)?;
        let grad = heads_first(grad, start, len, 1)?;
        let o = heads_first(o, start, len, 1)?;
        let delta = (&grad * &o)?.sum_keepdim(D::Minus1)?;
        let dp = grad.matmul(&document.v.t()?)?;
        let ds = ((&p * dp.broadcast_sub(&delta)?)? * f64::from(scale))?;
        dq.push(ds.matmul(&document.k)?.transpose(0, 1)?);
        dk.push(document.sum_groups(&ds.t()?.matmul(&document.q)?)?);
        dv.push(document.sum_groups(&p.t()?.matmul(&grad)?)?);
    }
    if dq.is_empty() {
        return Ok((q.clone(), k.clone(), v.clone()));
    }
    let join = |parts: &[Tensor], like: &Tensor| {
        Tensor::cat(parts, 0)?.to_dtype(like.dtype())?.contiguous()
    };
    Ok((join(&dq, q)?, join(&dk, k)?, join(&dv, v)?))
}

/// (first token, length) of each document that is not empty.
fn documents(docs: &[usize]) -> impl Iterator<Item = (usize, usize)> + '_ {
    docs.windows(2).map(|pair| (pair[0], pair[1] - pair[0])).filter(|&(_, len)| len > 0)
}

/// `x` [N, H, D] cut to one document as [H·repeat, T, D], each head `repeat` times.
fn heads_first(x: &Tensor, start: usize, len: usize, repeat: usize) -> Result<Tensor> {
    let (_, heads, width) = dims3(x, "x")?;
    let x = x.narrow(0, start, len)?.to_dtype(wide(x.dtype()))?.transpose(0, 1)?.contiguous()?;
    x.unsqueeze(1)?.broadcast_as((heads, repeat, len, width))?.reshape((heads * repeat, len, width))
}

/// One document with its heads first, keys and values repeated for their group.
struct Document {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: usize,
    len: usize,
}

impl Document {
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, start: usize, len: usize) -> Result<Self> {
        let group = q.dim(1)? / k.dim(1)?;
        Ok(Self {
            q: heads_first(q, start, len, 1)?,
            k: heads_first(k, start, len, group)?,
            v: heads_first(v, start, len, group)?,
            group,
            len,
        })
    }

    /// Softmax of the visible scores [Hq, T, T] and their log-sum-exp [Hq, T].
    fn probabilities(&self, scale: f32, window: Option<usize>) -> Result<(Tensor, Tensor)> {
        let window = window.unwrap_or(self.len);
        self.masked(scale, |row, column| column <= row && row - column < window)
    }

    /// The same where `sees` says which column a row sees.
    fn masked(&self, scale: f32, sees: impl Fn(usize, usize) -> bool) -> Result<(Tensor, Tensor)> {
        let scores = (self.q.matmul(&self.k.t()?)? * f64::from(scale))?;
        let mask = mask(self.len, sees, scores.dtype(), scores.device())?;
        let scores = scores.broadcast_add(&mask)?;
        let max = scores.max_keepdim(D::Minus1)?;
        let p = scores.broadcast_sub(&max)?.exp()?;
        let sum = p.sum_keepdim(D::Minus1)?;
        Ok((p.broadcast_div(&sum)?, (max + sum.log()?)?.squeeze(D::Minus1)?))
    }

    /// A gradient [Hq, T, D] added up over the heads of each group, tokens first.
    fn sum_groups(&self, grad: &Tensor) -> Result<Tensor> {
        let (heads, len, width) = dims3(grad, "gradient")?;
        grad.reshape((heads / self.group, self.group, len, width))?.sum(1)?.transpose(0, 1)
    }
}

/// 0 where a row sees a column, −∞ elsewhere.
fn mask(
    len: usize,
    sees: impl Fn(usize, usize) -> bool,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let cells: Vec<f32> = (0..len * len)
        .map(|cell| if sees(cell / len, cell % len) { 0.0 } else { f32::NEG_INFINITY })
        .collect();
    Tensor::from_vec(cells, (len, len), device)?.to_dtype(dtype)
}
