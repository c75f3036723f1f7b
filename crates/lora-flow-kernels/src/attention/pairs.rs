//! Blockwise attention with operands rounded to `bf16`, by AMX or AVX512_BF16.
//!
//! The same blocks as in [`super::fused`], but every product is made of pairs of `bf16` numbers with
//! `f32` sums: q, k, v and the gradient are rounded as they enter, probabilities and their gradients
//! when they become operands. Softmax, log-sum-exp and what is added up stay in `f32`.
//!
//! A pair lies along the depth of a product. Rows of q and of the gradient are left operands as they
//! stand. For the gradients of keys and values the turned sums are made, dvᵀ = doᵀ·p and dkᵀ = qᵀ·ds,
//! for then two neighbouring rows of p need only be woven into each other to be a right operand.

use super::Dims;
use super::blocks::Blocks;
use super::fused::{
    BackwardInputs, Block, Scratch, each_block, each_head, score_gradient_row, softmax_row,
};
use super::panels::Head;
use crate::common::{Aligned, Shared, View};
use crate::gemm::{PAIR_COLUMNS, amx, has_pairs, pair_panels, pair_row, weave};
use crate::simd::Raw;
use candle_core::{Result, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Most query rows of a block: two tiles high, twice.
const ROWS: usize = 64;
/// Keys of a block.
const KEYS: usize = 128;
/// Distance of two rows of scores: not a power of two, whose rows would share cache sets.
const STRIDE: usize = KEYS + 16;
/// Columns of a panel, and tokens or elements of a step of the depth.
const STEP: usize = PAIR_COLUMNS;
const _: () = assert!(STEP == 2 * amx::STEP);

/// Widest head.
const WIDEST: usize = 512;

/// True if heads of `width` elements can be multiplied here.
pub(super) fn usable(width: usize) -> bool {
    width.is_multiple_of(STEP) && width <= WIDEST && has_pairs()
}

/// See [`super::forward`].
pub(super) fn forward(
    dims: Dims,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    docs: &[usize],
    scale: f32,
    window: Option<usize>,
) -> Result<(Tensor, Tensor)> {
    let (q, k, v) = (View::new(q, "q")?, View::new(k, "k")?, View::new(v, "v")?);
    let cut = Blocks::new(docs, window, ROWS);
    let q = RowPairs::new(q.f32()?, dims.tokens, dims.heads, dims.width);
    let keys = RowPairs::new(k.f32()?, dims.tokens, dims.kv_heads, dims.width);
    let keys = TokenPanels::new(&keys, dims.tokens, dims.kv_heads);
    let values = DepthPanels::new(v.f32()?, dims.tokens, dims.kv_heads, dims.width);
    each_block(dims, &cut, Scratch::new(ROWS, STRIDE, dims.width), |scratch, block, head| {
        let (kv_head, width) = (head / dims.group(), dims.width);
        for keys_of in key_blocks(block) {
            let rows = block.rows_seeing(keys_of.clone());
            let scores = Into { data: &mut scratch.scores, stride: STRIDE, add: false };
            keys.times(scores, &q, head, block, rows, kv_head, &keys_of);
            for row in 0..block.len() {
                let scores = &mut scratch.scores[row * STRIDE..][..keys_of.len()];
                let seen = block.seen_by(row, &keys_of);
                let o = &mut scratch.o[row * width..][..width];
                softmax_row(scores, seen, scale, &mut scratch.running[row], o);
                pair_row(&mut scratch.weights[row * KEYS / 2..][..keys_of.len() / 2], scores);
            }
            let o = Into { data: &mut scratch.o, stride: width, add: true };
            let weights = Left { data: &scratch.weights, row: KEYS / 2 };
            values.times(o, block.len(), weights, kv_head, &keys_of);
        }
    })
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
    let Dims { tokens, heads, kv_heads, width } = dims;
    let (grad, q, o) = (View::new(grad, "do")?, View::new(q, "q")?, View::new(o, "o")?);
    let (k, v, lse) = (View::new(k, "k")?, View::new(v, "v")?, View::new(lse, "lse")?);
    let cut = Blocks::new(docs, window, ROWS);
    let (q, k, v) = (q.f32()?, k.f32()?, v.f32()?);
    let all = Backward {
        inputs: BackwardInputs {
            dims,
            cut: &cut,
            scale,
            grad: grad.f32()?,
            q,
            o: o.f32()?,
            lse: lse.f32()?,
        },
        q_rows: RowPairs::new(q, tokens, heads, width),
        grad_rows: RowPairs::new(grad.f32()?, tokens, heads, width),
        keys: TokenPanels::new(&RowPairs::new(k, tokens, kv_heads, width), tokens, kv_heads),
        values: TokenPanels::new(&RowPairs::new(v, tokens, kv_heads, width), tokens, kv_heads),
        key_depth: DepthPanels::new(k, tokens, kv_heads, width),
    };
    each_head(dims, &cut, |segment, head, dq| all.head(segment, head, dq))
}

/// What all tasks of a backward read.
struct Backward<'a> {
    inputs: BackwardInputs<'a>,
    q_rows: RowPairs,
    grad_rows: RowPairs,
    keys: TokenPanels,
    values: TokenPanels,
    key_depth: DepthPanels,
}

impl Backward<'_> {
    /// See [`each_head`].
    fn head(&self, segment: &Range<usize>, head: usize, dq_parts: Shared) -> (Aligned, Aligned) {
        let BackwardInputs { dims, cut, scale, .. } = self.inputs;
        let Dims { tokens, heads, width, .. } = dims;
        let kv_head = head / dims.group();
        let segment_tokens = cut.tokens(segment);
        // The sums of the segment are turned, and begin where its first block of keys does.
        let first = segment_tokens.start / STEP * STEP;
        let stride = (segment_tokens.end - first).next_multiple_of(STEP) + STEP / 2;
        let (mut dk, mut dv) = (Aligned::zeros(width * stride), Aligned::zeros(width * stride));
        let (mut p, mut ds) = (Aligned::zeros(ROWS * STRIDE), Aligned::zeros(ROWS * STRIDE));
        // Rows of ds in pairs along the keys; two rows of p and of ds woven, in panels of STEP keys.
        let mut ds_rows = Aligned::zeros(ROWS * KEYS / 2);
        let (mut p_woven, mut ds_woven) =
            (Aligned::zeros(ROWS / 2 * KEYS), Aligned::zeros(ROWS / 2 * KEYS));
        let (mut q_turned, mut grad_turned) =
            (Aligned::zeros(width * ROWS / 2), Aligned::zeros(width * ROWS / 2));
        let mut dq = Aligned::zeros(ROWS * width);
        let mut delta = [0f32; ROWS];
        let grad = Head::new(self.inputs.grad, heads, head, width);
        for rows in &cut.blocks[segment.clone()] {
            let block = Block::new(cut, rows);
            let lse = &self.inputs.lse[head * tokens..][..tokens][rows.clone()];
            self.inputs.deltas(&mut delta, rows, head);
            let depth = block.len().next_multiple_of(STEP) / 2;
            turn(&mut q_turned, Head::new(self.inputs.q, heads, head, width), rows, depth);
            turn(&mut grad_turned, grad, rows, depth);
            dq.fill(0.0);
            for keys in key_blocks(&block) {
                let seeing = block.rows_seeing(keys.clone());
                for (out, left, panels) in
                    [(&mut p, &self.q_rows, &self.keys), (&mut ds, &self.grad_rows, &self.values)]
                {
                    let out = Into { data: out, stride: STRIDE, add: false };
                    panels.times(out, left, head, &block, seeing.clone(), kv_head, &keys);
                }
                for row in 0..2 * depth {
                    let cells = row * STRIDE..row * STRIDE + keys.len();
                    let (p, ds) = (&mut p[cells.clone()], &mut ds[cells]);
                    if row >= block.len() {
                        p.fill(0.0);
                        ds.fill(0.0);
                        continue;
                    }
                    let seen = block.seen_by(row, &keys);
                    score_gradient_row(p, ds, seen, scale, lse[row], delta[row]);
                    pair_row(&mut ds_rows[row * KEYS / 2..][..keys.len() / 2], ds);
                }
                for (woven, scores) in [(&mut p_woven, &p), (&mut ds_woven, &ds)] {
                    for pair in 0..depth {
                        let (low, high) = scores[2 * pair * STRIDE..].split_at(STRIDE);
                        for panel in 0..keys.len() / STEP {
                            let columns = panel * STEP..(panel + 1) * STEP;
                            let at = (panel * ROWS / 2 + pair) * STEP;
                            let out = &mut woven[at..at + STEP];
                            weave(out, &low[columns.clone()], &high[columns]);
                        }
                    }
                }
                let panels = keys.len() / STEP;
                for (out, left, woven) in
                    [(&mut dv, &grad_turned, &p_woven), (&mut dk, &q_turned, &ds_woven)]
                {
                    let out = Into { data: &mut out[keys.start - first..], stride, add: true };
                    let left = Left { data: left, row: ROWS / 2 };
                    product(out, width, left, depth, Panels::new(woven, ROWS / 2 * STEP, panels));
                }
                let out = Into { data: &mut dq, stride: width, add: true };
                let left = Left { data: &ds_rows, row: KEYS / 2 };
                self.key_depth.times(out, block.len(), left, kv_head, &keys);
            }
            self.inputs.hand_over(dq_parts, rows, head, &dq, width);
        }
        let skipped = segment_tokens.start - first;
        let back = |turned: &Aligned| {
            let mut out = Aligned::zeros(segment_tokens.len() * width);
            for (token, out) in out.chunks_exact_mut(width).enumerate() {
                let column = turned[skipped + token..].iter().step_by(stride);
                out.iter_mut().zip(column).for_each(|(out, &x)| *out = x);
            }
            out
        };
        (back(&dk), back(&dv))
    }
}

/// Blocks of keys that some row sees; each begins and ends at a multiple of [`STEP`].
fn key_blocks(block: &Block<'_>) -> impl Iterator<Item = Range<usize>> + use<> {
    let start = block.first_key() / STEP * STEP;
    let end = block.rows.end.next_multiple_of(STEP);
    (start..end).step_by(KEYS).map(move |start| start..end.min(start + KEYS))
}

/// The destination: rows of `stride` elements.
struct Into<'a> {
    data: &'a mut [f32],
    stride: usize,
    add: bool,
}

/// A left operand: rows of `row` pairs.
#[derive(Clone, Copy)]
struct Left<'a> {
    data: &'a [f32],
    row: usize,
}

/// `count` panels of [`STEP`] columns, `size` floats from each other.
#[derive(Clone, Copy)]
struct Panels<'a> {
    data: &'a [f32],
    size: usize,
    count: usize,
}

impl<'a> Panels<'a> {
    fn new(data: &'a [f32], size: usize, count: usize) -> Self {
        Self { data, size, count }
    }
}

/// `rows` rows of C = A·B (or C += A·B) for `depth` pairs of A and of each panel.
fn product(c: Into<'_>, rows: usize, a: Left<'_>, depth: usize, panels: Panels<'_>) {
    if rows == 0 || panels.count == 0 || depth == 0 {
        return;
    }
    // Tiles are read whole.
    let read = rows.next_multiple_of(amx::HEIGHT);
    let last = panels.count - 1;
    assert!(
        depth.is_multiple_of(amx::STEP),
        "depth of a product in pairs is no multiple of a tile"
    );
    assert!(
        (rows - 1) * c.stride + panels.count * STEP <= c.data.len(),
        "destination is too small"
    );
    assert!((read - 1) * a.row + depth <= a.data.len(), "left operand is too small");
    assert!(last * panels.size + depth * STEP <= panels.data.len(), "panels are too small");
    let raw = Raw {
        c: c.data.as_mut_ptr(),
        stride: c.stride,
        add: c.add,
        a: a.data.as_ptr(),
        row: a.row,
        column: 1,
        b: panels.data.as_ptr(),
        depth,
    };
    // Safety: the assertions keep every access in bounds, and `usable` has asked.
    unsafe { pair_panels(raw, rows, panels.count, panels.size) }
}

/// A tensor [N, heads, D] in pairs along D, row-major, with rows of zeros to fill the last tile.
struct RowPairs {
    data: Aligned,
    /// Pairs of a row of all heads, and of one.
    row: usize,
    width: usize,
}

impl RowPairs {
    fn new(tensor: &[f32], tokens: usize, heads: usize, width: usize) -> Self {
        let row = heads * width / 2;
        let mut data = Aligned::zeros((tokens + ROWS) * row);
        let rows = data.par_chunks_mut(row).zip(tensor.par_chunks(heads * width));
        rows.with_min_len(64).for_each(|(out, values)| pair_row(out, values));
        Self { data, row, width: width / 2 }
    }

    /// The rows of `head` from `token` on.
    fn left(&self, head: usize, token: usize) -> Left<'_> {
        Left { data: &self.data[token * self.row + head * self.width..], row: self.row }
    }
}

/// Panels whose columns are tokens and whose depth is D.
struct TokenPanels {
    data: Aligned,
    /// Panels of a head.
    panels: usize,
    /// Pairs of D.
    depth: usize,
}

impl TokenPanels {
    fn new(rows: &RowPairs, tokens: usize, heads: usize) -> Self {
        let (panels, depth) = (tokens.div_ceil(STEP), rows.width);
        let mut data = Aligned::zeros(heads * panels * depth * STEP);
        data.par_chunks_mut(depth * STEP).with_min_len(8).enumerate().for_each(|(index, panel)| {
            let (head, first) = (index / panels, index % panels * STEP);
            for column in 0..STEP.min(tokens - first) {
                let row = &rows.left(head, first + column).data[..depth];
                for (cell, &pair) in panel[column..].iter_mut().step_by(STEP).zip(row) {
                    *cell = pair;
                }
            }
        });
        Self { data, panels, depth }
    }

    /// `out` [rows of the block, STRIDE] = left · panelsᵀ: rows `rows` of the block by the keys `keys`.
    #[allow(clippy::too_many_arguments)]
    fn times(
        &self,
        out: Into<'_>,
        left: &RowPairs,
        head: usize,
        block: &Block<'_>,
        rows: Range<usize>,
        kv_head: usize,
        keys: &Range<usize>,
    ) {
        let size = self.depth * STEP;
        let data = &self.data[(kv_head * self.panels + keys.start / STEP) * size..];
        let out = Into { data: &mut out.data[rows.start * out.stride..], ..out };
        let left = left.left(head, block.rows.start + rows.start);
        let panels = Panels::new(data, size, keys.len() / STEP);
        product(out, rows.len(), left, self.depth, panels);
    }
}

/// Panels whose columns are elements of a head and whose depth is tokens.
struct DepthPanels {
    data: Aligned,
    /// Pairs of tokens in a panel.
    depth: usize,
    /// Panels of a head.
    panels: usize,
}

impl DepthPanels {
    fn new(tensor: &[f32], tokens: usize, heads: usize, width: usize) -> Self {
        let (depth, panels) = (tokens.next_multiple_of(STEP) / 2, width / STEP);
        let mut data = Aligned::zeros(heads * panels * depth * STEP);
        data.par_chunks_mut((depth * STEP).max(1)).enumerate().for_each(|(index, panel)| {
            let head = Head::new(tensor, heads, index / panels, width);
            let columns = index % panels * STEP..(index % panels + 1) * STEP;
            let nothing = [0f32; STEP];
            for (pair, out) in panel.chunks_exact_mut(STEP).enumerate().take(tokens.div_ceil(2)) {
                let low = &head.row(2 * pair)[columns.clone()];
                let lone = 2 * pair + 1 == tokens;
                let high =
                    if lone { &nothing[..] } else { &head.row(2 * pair + 1)[columns.clone()] };
                weave(out, low, high);
            }
        });
        Self { data, depth, panels }
    }

    /// `out` [rows, D] += left · panels over the tokens `keys`.
    fn times(
        &self,
        out: Into<'_>,
        rows: usize,
        left: Left<'_>,
        kv_head: usize,
        keys: &Range<usize>,
    ) {
        let size = self.depth * STEP;
        let data = &self.data[kv_head * self.panels * size + keys.start / 2 * STEP..];
        product(out, rows, left, keys.len() / 2, Panels::new(data, size, self.panels));
    }
}

/// Rows of a head, turned: [D, ROWS / 2] in pairs along the rows, `depth` of them, filled up with zeros.
fn turn(out: &mut [f32], head: Head<'_>, rows: &Range<usize>, depth: usize) {
    let nothing = [0f32; WIDEST];
    let mut woven = [0f32; WIDEST];
    let row = |row: usize| {
        if row < rows.end { head.row(row) } else { &nothing[..head.width] }
    };
    for pair in 0..depth {
        let first = rows.start + 2 * pair;
        weave(&mut woven[..head.width], row(first), row(first + 1));
        for (cell, &pair) in out[pair..].iter_mut().step_by(ROWS / 2).zip(&woven[..head.width]) {
            *cell = pair;
        }
    }
}
