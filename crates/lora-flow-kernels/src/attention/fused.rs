//! Blockwise attention on the CPU.
//!
//! Forward: one task for each block of query rows and head. Backward: one task for each segment
//! and query head, which walks its blocks in order; heads that share a key head are added up in
//! order afterwards. Tiles that lie wholly above the diagonal or outside the documents of their
//! rows are skipped; cells masked inside a tile become probabilities of 0.

use super::Dims;
use super::blocks::Blocks;
use super::panels::{Head, TokenPanels, WidthPanels, fill};
use super::tile::{Left, PANEL, Target, product};
use crate::common::{Aligned, Shared, View, tensor, zeros};
use crate::simd::{Isa, dispatch, dot, exp, max, sum};
use candle_core::{Result, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Most query rows of a block: a multiple of the heights of all register tiles.
pub(super) const QUERY_ROWS: usize = 48;
/// Keys of a block: scores of QUERY_ROWS × KEYS stay in the first-level cache.
const KEYS: usize = 128;
/// Distance of two rows of scores: not a power of two, whose rows would share cache sets.
const STRIDE: usize = KEYS + PANEL;
/// Rows that are multiplied together with one range of the other side.
const ROWS: usize = 12;

/// See [`super::forward`] and [`super::forward_tree`].
pub(super) fn forward(
    dims: Dims,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cut: &Blocks,
    scale: f32,
) -> Result<(Tensor, Tensor)> {
    let Dims { tokens, heads, kv_heads, width } = dims;
    let (q, k, v) = (View::new(q, "q")?, View::new(k, "k")?, View::new(v, "v")?);
    let (q, k, v) = (q.f32()?, k.f32()?, v.f32()?);
    let keys = TokenPanels::new(k, tokens, kv_heads, width);
    let values = WidthPanels::new(v, tokens, kv_heads, width);
    let o_stride = width.next_multiple_of(PANEL);
    each_block(dims, cut, Scratch::new(QUERY_ROWS, STRIDE, o_stride), |scratch, block, head| {
        let kv_head = head / dims.group();
        let q = Head::new(q, heads, head, width);
        for range in block.key_blocks() {
            block.times_keys(&mut scratch.scores, q, &keys, kv_head, &range);
            for row in 0..block.len() {
                let scores = &mut scratch.scores[row * STRIDE..][..range.len()];
                block.part_branches(scores, row, &range);
                let seen = block.seen_by(row, &range);
                let o = &mut scratch.o[row * o_stride..][..o_stride];
                softmax_row(scores, seen, scale, &mut scratch.running[row], o);
            }
            block.times_values(&mut scratch.o, o_stride, &scratch.scores, &values, kv_head, &range);
        }
    })
}

/// Runs a forward: `run` takes a block of one head through the running softmax, from buffers such
/// as `empty`. Returns o and the log-sum-exp.
pub(super) fn each_block(
    dims: Dims,
    cut: &Blocks,
    empty: Scratch,
    run: impl Fn(&mut Scratch, &Block<'_>, usize) + Sync,
) -> Result<(Tensor, Tensor)> {
    let Dims { tokens, heads, width, .. } = dims;
    let (mut o, mut lse) = (zeros(tokens * heads * width), zeros(heads * tokens));
    let (o_parts, lse_parts) = (Shared::new(&mut o), Shared::new(&mut lse));
    (0..cut.blocks.len() * heads).into_par_iter().for_each_init(
        || empty.clone(),
        |scratch, task| {
            let (block, head) = (Block::new(cut, &cut.blocks[task / heads]), task % heads);
            scratch.o.fill(0.0);
            scratch.running.fill((f32::NEG_INFINITY, 0.0));
            run(scratch, &block, head);
            // Safety: each row of each head belongs to one task.
            let lse = unsafe { lse_parts.slice(head * tokens + block.rows.start, block.len()) };
            for (row, lse) in lse.iter_mut().enumerate() {
                let (max, sum) = scratch.running[row];
                *lse = max + sum.ln();
                let at = ((block.rows.start + row) * heads + head) * width;
                // Safety: as above.
                let o = unsafe { o_parts.slice(at, width) };
                let inverse = 1.0 / sum;
                for (o, &x) in o.iter_mut().zip(&scratch.o[row * scratch.o_stride..]) {
                    *o = x * inverse;
                }
            }
        },
    );
    Ok((tensor(o, &[tokens, heads, width])?, tensor(lse, &[heads, tokens])?))
}

/// A block of query rows.
pub(super) struct Block<'a> {
    /// Its tokens.
    pub(super) rows: Range<usize>,
    /// First token that each row sees.
    first_seen: &'a [usize],
    /// See [`Blocks::ends`].
    ends: &'a [usize],
}

impl<'a> Block<'a> {
    pub(super) fn new(cut: &'a Blocks, rows: &Range<usize>) -> Self {
        let first_seen = &cut.first_seen[rows.clone()];
        Self { rows: rows.clone(), first_seen, ends: &cut.ends }
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// The first key that any row sees.
    pub(super) fn first_key(&self) -> usize {
        self.first_seen.first().copied().unwrap_or(0)
    }

    /// Blocks of keys that some row sees; each begins at a multiple of PANEL.
    fn key_blocks(&self) -> Vec<Range<usize>> {
        let start = self.first_key() / PANEL * PANEL;
        let end = self.rows.end;
        if self.ends.is_empty() {
            let starts = (start..end).step_by(KEYS);
            return starts.map(|start| start..end.min(start + KEYS)).collect();
        }
        // Panels of other branches lie between those that are seen.
        let mut blocks: Vec<Range<usize>> = Vec::new();
        for panel in (start..end).step_by(PANEL) {
            let keys = panel..end.min(panel + PANEL);
            if self.ends[keys.clone()].iter().all(|&end| end <= self.rows.start) {
                continue;
            }
            match blocks.last_mut() {
                Some(last) if last.end == panel && last.len() < KEYS => last.end = keys.end,
                _ => blocks.push(keys),
            }
        }
        blocks
    }

    /// Of a tree, takes the keys of other branches out of the scores of a row.
    fn part_branches(&self, scores: &mut [f32], row: usize, keys: &Range<usize>) {
        let row = self.rows.start + row;
        if !self.ends.is_empty() {
            for (score, &end) in scores.iter_mut().zip(&self.ends[keys.clone()]) {
                *score = if end <= row { f32::NEG_INFINITY } else { *score };
            }
        }
    }

    /// The rows that see any key of `keys`, counted from the start of the block.
    pub(super) fn rows_seeing(&self, keys: Range<usize>) -> Range<usize> {
        let first = keys.start.max(self.rows.start) - self.rows.start;
        let end = self.first_seen.partition_point(|&seen| seen < keys.end);
        first.min(end)..end
    }

    /// The keys among `keys` that any of `rows` sees.
    fn keys_seen(&self, rows: Range<usize>, keys: &Range<usize>) -> Range<usize> {
        let start = self.first_seen[rows.start].max(keys.start);
        let end = (self.rows.start + rows.end).min(keys.end);
        start..end.max(start)
    }

    /// What one row sees among `keys`, counted from their start.
    pub(super) fn seen_by(&self, row: usize, keys: &Range<usize>) -> Range<usize> {
        let seen = self.keys_seen(row..row + 1, keys);
        seen.start - keys.start..seen.end - keys.start
    }

    /// Groups of rows for products.
    fn row_groups(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let len = self.len();
        (0..len).step_by(ROWS).map(move |start| start..len.min(start + ROWS))
    }

    /// `out` [rows, STRIDE] = left · panelsᵀ for the keys that each row sees (and some others).
    fn times_keys(
        &self,
        out: &mut [f32],
        left: Head<'_>,
        panels: &TokenPanels,
        kv_head: usize,
        keys: &Range<usize>,
    ) {
        for first in keys.clone().step_by(PANEL) {
            let rows = self.rows_seeing(first..first + PANEL);
            if rows.is_empty() {
                continue;
            }
            let target = Target {
                data: &mut out[rows.start * STRIDE + first - keys.start..],
                stride: STRIDE,
                add: false,
            };
            let data = &left.data[(self.rows.start + rows.start) * left.stride..];
            let left = Left { data, row: left.stride, column: 1 };
            product(target, rows.len(), panels.width(), left, panels.panel(kv_head, first));
        }
    }

    /// `out` [rows, `out_stride`] += weights [rows, STRIDE] · panels over the keys of `keys`.
    fn times_values(
        &self,
        out: &mut [f32],
        out_stride: usize,
        weights: &[f32],
        panels: &WidthPanels,
        kv_head: usize,
        keys: &Range<usize>,
    ) {
        for rows in self.row_groups() {
            let seen = self.keys_seen(rows.clone(), keys);
            if seen.is_empty() {
                continue;
            }
            let data = &weights[rows.start * STRIDE + seen.start - keys.start..];
            let left = Left { data, row: STRIDE, column: 1 };
            for panel in 0..out_stride / PANEL {
                let target = Target {
                    data: &mut out[rows.start * out_stride + panel * PANEL..],
                    stride: out_stride,
                    add: true,
                };
                let right = panels.panel(kv_head, panel, seen.start);
                product(target, rows.len(), seen.len(), left, right);
            }
        }
    }

    /// `out` [tokens of the segment, `out_stride`] += weightsᵀ · panels, where `panels` are those
    /// of the block's own rows: the gradient that the rows send to the keys of `keys`.
    fn transposed_times_rows(
        &self,
        out: &mut [f32],
        out_stride: usize,
        first_token: usize,
        weights: &[f32],
        panels: &[f32],
        keys: &Range<usize>,
    ) {
        let start = self.first_seen[0].max(keys.start);
        for first in (start..keys.end).step_by(ROWS) {
            let count = ROWS.min(keys.end - first);
            let rows = self.rows_seeing(first..first + count);
            if rows.is_empty() {
                continue;
            }
            let data = &weights[rows.start * STRIDE + first - keys.start..];
            let left = Left { data, row: 1, column: STRIDE };
            for panel in 0..out_stride / PANEL {
                let target = Target {
                    data: &mut out[(first - first_token) * out_stride + panel * PANEL..],
                    stride: out_stride,
                    add: true,
                };
                let right = &panels[(panel * QUERY_ROWS + rows.start) * PANEL..];
                product(target, count, rows.len(), left, right);
            }
        }
    }
}

/// Buffers of one forward task.
#[derive(Clone)]
pub(super) struct Scratch {
    pub(super) scores: Aligned,
    /// The scores rounded to pairs, where products are made of them.
    pub(super) weights: Aligned,
    /// Σ exp(score − max)·v of each row so far.
    pub(super) o: Aligned,
    o_stride: usize,
    /// (max, Σ exp(score − max)) of each row so far.
    pub(super) running: Vec<(f32, f32)>,
}

impl Scratch {
    /// For `rows` rows of `stride` scores and of `o_stride` outputs.
    pub(super) fn new(rows: usize, stride: usize, o_stride: usize) -> Self {
        Self {
            scores: Aligned::zeros(rows * stride),
            weights: Aligned::zeros(rows * stride / 2),
            o: Aligned::zeros(rows * o_stride),
            o_stride,
            running: vec![(f32::NEG_INFINITY, 0.0); rows],
        }
    }
}

/// See [`super::backward`].
#[allow(clippy::too_many_arguments)]
pub(super) fn backward(
    dims: Dims,
    grad: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    docs: &[usize],
    scale: f32,
    window: Option<usize>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let Dims { tokens, kv_heads, width, .. } = dims;
    let (grad, q, o) = (View::new(grad, "do")?, View::new(q, "q")?, View::new(o, "o")?);
    let (k, v, lse) = (View::new(k, "k")?, View::new(v, "v")?, View::new(lse, "lse")?);
    let (k, v) = (k.f32()?, v.f32()?);
    let cut = Blocks::new(docs, window, QUERY_ROWS);
    let all = Backward {
        inputs: BackwardInputs {
            dims,
            cut: &cut,
            scale,
            grad: grad.f32()?,
            q: q.f32()?,
            o: o.f32()?,
            lse: lse.f32()?,
        },
        keys: TokenPanels::new(k, tokens, kv_heads, width),
        key_rows: WidthPanels::new(k, tokens, kv_heads, width),
        values: TokenPanels::new(v, tokens, kv_heads, width),
    };
    each_head(dims, &cut, |segment, head, dq| all.head(segment, head, dq))
}

/// Runs a backward: `run` gives the gradients that a query head sends through a segment. It writes
/// its own rows of dq, and returns its part of dk and dv [tokens of the segment, D or more].
pub(super) fn each_head(
    dims: Dims,
    cut: &Blocks,
    run: impl Fn(&Range<usize>, usize, Shared) -> (Aligned, Aligned) + Sync,
) -> Result<(Tensor, Tensor, Tensor)> {
    let Dims { tokens, heads, kv_heads, width } = dims;
    let mut dq = zeros(tokens * heads * width);
    let (mut dk, mut dv) = (zeros(tokens * kv_heads * width), zeros(tokens * kv_heads * width));
    let parts = (Shared::new(&mut dq), Shared::new(&mut dk), Shared::new(&mut dv));
    (0..cut.segments.len() * kv_heads).into_par_iter().for_each(|task| {
        let (segment, kv_head) = (&cut.segments[task / kv_heads], task % kv_heads);
        let group = kv_head * dims.group()..(kv_head + 1) * dims.group();
        let sent: Vec<(Aligned, Aligned)> =
            group.into_par_iter().map(|head| run(segment, head, parts.0)).collect();
        let segment_tokens = cut.tokens(segment);
        for (row, token) in segment_tokens.clone().enumerate() {
            let at = (token * kv_heads + kv_head) * width;
            // Safety: each row of each key head belongs to one task.
            let (dk, dv) = unsafe { (parts.1.slice(at, width), parts.2.slice(at, width)) };
            for (dk_head, dv_head) in &sent {
                let at = row * (dk_head.len() / segment_tokens.len());
                dk.iter_mut().zip(&dk_head[at..]).for_each(|(sum, x)| *sum += x);
                dv.iter_mut().zip(&dv_head[at..]).for_each(|(sum, x)| *sum += x);
            }
        }
    });
    let kv_dims = [tokens, kv_heads, width];
    Ok((tensor(dq, &[tokens, heads, width])?, tensor(dk, &kv_dims)?, tensor(dv, &kv_dims)?))
}

/// What all tasks of a backward read, on every path.
pub(super) struct BackwardInputs<'a> {
    pub(super) dims: Dims,
    pub(super) cut: &'a Blocks,
    pub(super) scale: f32,
    pub(super) grad: &'a [f32],
    pub(super) q: &'a [f32],
    pub(super) o: &'a [f32],
    pub(super) lse: &'a [f32],
}

impl BackwardInputs<'_> {
    /// δ of some rows of a head: do · o (Dao et al. 2022, appendix B).
    pub(super) fn deltas(&self, delta: &mut [f32], rows: &Range<usize>, head: usize) {
        let Dims { heads, width, .. } = self.dims;
        let grad = Head::new(self.grad, heads, head, width);
        let o = Head::new(self.o, heads, head, width);
        for (row, delta) in rows.clone().zip(delta) {
            *delta = dot_rows(grad.row(row), o.row(row));
        }
    }

    /// Writes the finished `dq` [rows, `stride`] of a head into its place.
    pub(super) fn hand_over(
        &self,
        dq_parts: Shared,
        rows: &Range<usize>,
        head: usize,
        dq: &[f32],
        stride: usize,
    ) {
        let Dims { heads, width, .. } = self.dims;
        for (row, token) in rows.clone().enumerate() {
            // Safety: each row of each query head belongs to one task.
            let out = unsafe { dq_parts.slice((token * heads + head) * width, width) };
            out.copy_from_slice(&dq[row * stride..][..width]);
        }
    }
}

/// That and the operands of the products here.
struct Backward<'a> {
    inputs: BackwardInputs<'a>,
    keys: TokenPanels,
    key_rows: WidthPanels,
    values: TokenPanels,
}

impl Backward<'_> {
    /// See [`each_head`]; D is rounded up to PANEL.
    fn head(&self, segment: &Range<usize>, head: usize, dq_parts: Shared) -> (Aligned, Aligned) {
        let BackwardInputs { dims, cut, scale, .. } = self.inputs;
        let Dims { tokens, heads, width, .. } = dims;
        let kv_head = head / dims.group();
        let segment_tokens = cut.tokens(segment);
        let stride = width.next_multiple_of(PANEL);
        let (mut dk, mut dv) = (
            Aligned::zeros(segment_tokens.len() * stride),
            Aligned::zeros(segment_tokens.len() * stride),
        );
        let (mut p, mut ds) =
            (Aligned::zeros(QUERY_ROWS * STRIDE), Aligned::zeros(QUERY_ROWS * STRIDE));
        let mut dq = Aligned::zeros(QUERY_ROWS * stride);
        let (mut q_rows, mut grad_rows) =
            (Aligned::zeros(QUERY_ROWS * stride), Aligned::zeros(QUERY_ROWS * stride));
        let mut delta = zeros(QUERY_ROWS);
        let q = Head::new(self.inputs.q, heads, head, width);
        let grad = Head::new(self.inputs.grad, heads, head, width);
        for rows in &cut.blocks[segment.clone()] {
            let block = Block::new(cut, rows);
            let lse = &self.inputs.lse[head * tokens..][..tokens][rows.clone()];
            self.inputs.deltas(&mut delta, rows, head);
            for panel in 0..stride / PANEL {
                let cells = panel * QUERY_ROWS * PANEL..(panel * QUERY_ROWS + block.len()) * PANEL;
                fill(&mut q_rows[cells.clone()], q, rows.start, panel);
                fill(&mut grad_rows[cells], grad, rows.start, panel);
            }
            dq.fill(0.0);
            for range in block.key_blocks() {
                block.times_keys(&mut p, q, &self.keys, kv_head, &range);
                block.times_keys(&mut ds, grad, &self.values, kv_head, &range);
                for row in 0..block.len() {
                    let seen = block.seen_by(row, &range);
                    let cells = row * STRIDE..row * STRIDE + range.len();
                    let (p, ds) = (&mut p[cells.clone()], &mut ds[cells]);
                    score_gradient_row(p, ds, seen, scale, lse[row], delta[row]);
                }
                let first = segment_tokens.start;
                block.transposed_times_rows(&mut dv, stride, first, &p, &grad_rows, &range);
                block.transposed_times_rows(&mut dk, stride, first, &ds, &q_rows, &range);
                block.times_values(&mut dq, stride, &ds, &self.key_rows, kv_head, &range);
            }
            self.inputs.hand_over(dq_parts, rows, head, &dq, stride);
        }
        (dk, dv)
    }
}

dispatch! {
    pub(super) fn softmax_row(
        scores: &mut [f32], seen: Range<usize>, scale: f32, running: &mut (f32, f32), o: &mut [f32],
    ) = softmax_row_body;
    pub(super) fn score_gradient_row(
        p: &mut [f32], ds: &mut [f32], seen: Range<usize>, scale: f32, lse: f32, delta: f32,
    ) = score_gradient_row_body;
    fn dot_rows(a: &[f32], b: &[f32]) -> f32 = dot;
}

/// Takes one row of raw scores into the running softmax: the scores in `seen` become
/// exp(scale·score − max), the others 0, and `o` is scaled to the new maximum.
#[inline(always)]
fn softmax_row_body<M: Isa>(
    scores: &mut [f32],
    seen: Range<usize>,
    scale: f32,
    running: &mut (f32, f32),
    o: &mut [f32],
) {
    scores[..seen.start].fill(0.0);
    scores[seen.end..].fill(0.0);
    let scores = &mut scores[seen];
    if scores.is_empty() {
        return;
    }
    scores.iter_mut().for_each(|x| *x *= scale);
    let highest = max::<M>(scores);
    if highest == f32::NEG_INFINITY {
        // All of another branch.
        scores.fill(0.0);
        return;
    }
    if highest > running.0 {
        let rescale = exp::<M>(running.0 - highest);
        running.0 = highest;
        if running.1 > 0.0 {
            running.1 *= rescale;
            o.iter_mut().for_each(|o| *o *= rescale);
        }
    }
    let highest = running.0;
    scores.iter_mut().for_each(|x| *x = exp::<M>(*x - highest));
    running.1 += sum::<M>(scores);
}

/// Raw scores in `p` become probabilities, gradients of probabilities in `ds` become gradients of
/// raw scores: p·(dp − δ)·scale. Cells outside `seen` become 0 in both.
#[inline(always)]
fn score_gradient_row_body<M: Isa>(
    p: &mut [f32],
    ds: &mut [f32],
    seen: Range<usize>,
    scale: f32,
    lse: f32,
    delta: f32,
) {
    p[..seen.start].fill(0.0);
    p[seen.end..].fill(0.0);
    ds[..seen.start].fill(0.0);
    ds[seen.end..].fill(0.0);
    for (p, ds) in p[seen.clone()].iter_mut().zip(&mut ds[seen]) {
        let probability = exp::<M>(M::mul_add(*p, scale, -lse));
        *p = probability;
        *ds = probability * scale * (*ds - delta);
    }
}
