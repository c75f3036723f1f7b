//! Forward and backward of the layers, queued on the device. The formulas are those of
//! [`crate::layer`]; what differs is where things stand: an input has its x·Aᵀ beside it, a
//! gradient its dy·s·B, so that a frozen product takes the adapter along.

use std::sync::Arc;

use lora_flow_kernels::cuda::ops::{self, Attention, Mat};
use lora_flow_kernels::cuda::{Buffer, CudaError, DevicePtr, Element, Gpu, Product};

use super::CudaDecoder;
use super::arena::{Arena, Backward, Kept, padded};
use super::batch::DeviceBatch;
use super::weights::{DOWN, GATE_UP, Group, GroupGrads, LayerWeights, O, QKV, Weights};
use crate::config::{HiddenAct, ModelConfig};

type Result<T> = std::result::Result<T, CudaError>;

/// Dropout of a pass: its probability, and the key of each linear layer's mask.
pub(super) struct Dropout {
    pub(super) p: f64,
    pub(super) key: Box<dyn Fn(usize) -> u64>,
    /// Masked inputs, [N, widest].
    pub(super) scratch: Buffer<u8>,
}

/// One pass over one batch.
pub(super) struct Run<'a> {
    pub(super) gpu: &'a Arc<Gpu>,
    pub(super) config: &'a ModelConfig,
    pub(super) e: Element,
    pub(super) weights: &'a Weights,
    pub(super) arena: &'a Arena,
    pub(super) batch: &'a DeviceBatch,
    pub(super) adapted: bool,
    dropout: Option<Dropout>,
    pub(super) n: usize,
    q: usize,
    kv: usize,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        decoder: &'a CudaDecoder,
        weights: &'a Weights,
        arena: &'a Arena,
        batch: &'a DeviceBatch,
        adapted: bool,
        dropout: Option<Dropout>,
    ) -> Self {
        let config = &decoder.config;
        Self {
            gpu: &decoder.gpu,
            config,
            e: decoder.element,
            weights,
            arena,
            batch,
            adapted,
            dropout,
            n: batch.tokens,
            q: config.num_attention_heads * config.head_dim,
            kv: config.num_key_value_heads * config.head_dim,
        }
    }

    /// Address of column `column` of row 0.
    pub(super) fn shift(&self, m: Mat, column: usize) -> Mat {
        (m.0 + (column * self.e.size()) as u64, m.1)
    }

    fn act(&self) -> i32 {
        match self.config.hidden_act {
            HiddenAct::Silu => 0,
            HiddenAct::Gelu => 1,
            HiddenAct::GeluTanh => 2,
        }
    }

    fn eps(&self) -> f32 {
        self.config.rms_norm_eps as f32
    }

    /// c (+)= a·bᵀ or a·b in the compute dtype.
    fn product(
        &self,
        (m, n, k): (usize, usize, usize),
        a: Mat,
        b: Mat,
        b_t: bool,
        c: Mat,
        add: Option<Mat>,
    ) -> Result<()> {
        self.gpu.product(&Product {
            m,
            n,
            k,
            a,
            a_t: false,
            b,
            b_t,
            c,
            add: add.unwrap_or(c),
            alpha: 1.0,
            beta: if add.is_some() { 1.0 } else { 0.0 },
            input: self.e,
            output: self.e,
        })
    }

    /// r of a group in this pass: 0 without an adapter.
    fn r(&self, group: &Group) -> usize {
        if self.adapted { group.r } else { 0 }
    }

    /// The batch's tokens as the first residual stream.
    pub(super) fn embed(&self) -> Result<()> {
        let h = self.config.hidden_size;
        let x = (self.arena.x(0).ptr(), h);
        ops::gather(self.gpu, self.e, x, self.weights.embed(), self.batch.ids(), self.n, h)
    }

    /// x·Aᵀ into the columns beside x, and a copy of it into `keep`.
    fn low_rank_in(&self, group: &Group, x: Mat, keep: Option<&Buffer<u8>>) -> Result<()> {
        let r = self.r(group);
        if r == 0 {
            return Ok(());
        }
        let low = self.shift(x, group.input);
        self.product((self.n, r, group.input), x, group.a(), true, low, None)?;
        if let Some(dropout) = &self.dropout {
            for place in &group.places {
                let dropped = (dropout.scratch.ptr(), group.input);
                let key = (dropout.key)(place.at);
                ops::dropout(
                    self.gpu,
                    self.e,
                    dropped,
                    x,
                    self.n,
                    group.input,
                    key,
                    dropout.p,
                    false,
                )?;
                let a = (group.at(group.output + place.column, 0), group.ld());
                let to = self.shift(low, place.column);
                self.product((self.n, place.rank, group.input), dropped, a, true, to, None)?;
            }
        }
        match keep {
            Some(keep) => ops::copy2d(self.gpu, self.e, (keep.ptr(), r), low, self.n, r),
            None => Ok(()),
        }
    }

    /// y = W·x + s·B·A·x (+ add), where x has its x·Aᵀ beside it.
    fn project(&self, group: &Group, x: Mat, y: Mat, add: Option<Mat>) -> Result<()> {
        let k = group.input + self.r(group);
        self.product((self.n, group.output, k), x, group.w(), true, y, add)?;
        match &group.bias {
            Some(bias) => ops::add_bias(self.gpu, self.e, y, bias.ptr(), self.n, group.output),
            None => Ok(()),
        }
    }

    /// Strides of a layer's matrices.
    fn places(&self, w: &LayerWeights, kept: &Kept, layer: usize, backward: bool) -> Places {
        let r = |g: usize| self.r(&w.groups[g]);
        let (h, f) = (self.config.hidden_size, self.config.intermediate_size);
        Places {
            n1: (self.arena.n, padded(h + r(QKV))),
            qkv: (kept.qkv.ptr(), self.q + 2 * self.kv),
            o: (kept.o.ptr(), padded(self.q + r(O))),
            x2: (kept.x2.ptr(), h),
            n2: (self.arena.n, padded(h + r(GATE_UP))),
            gu: (self.arena.gate_up.at(layer, backward).ptr(), padded(2 * f + r(GATE_UP))),
            h: (self.arena.h, padded(f + r(DOWN))),
        }
    }

    fn attention(&self, qkv: Mat) -> Attention {
        Attention {
            q: qkv.0,
            k: self.shift(qkv, self.q).0,
            v: self.shift(qkv, self.q + self.kv).0,
            ld: qkv.1,
            tokens: self.n,
            heads: self.config.num_attention_heads,
            kv_heads: self.config.num_key_value_heads,
            dim: self.config.head_dim,
            window: self.config.sliding_window.unwrap_or(0),
            first: self.batch.first(),
            last: self.batch.last(),
            tiles: self.batch.tiles(),
        }
    }

    /// q, k and v of n₁, normalised and rotated.
    fn qkv(
        &self,
        w: &LayerWeights,
        kept: &Kept,
        n1: Mat,
        qkv: Mat,
        positions: DevicePtr,
    ) -> Result<()> {
        self.project(&w.groups[QKV], n1, qkv, None)?;
        let (heads, kv_heads, dim) = self.heads();
        if let (Some([q_norm, k_norm]), Some((before, q_rstd, k_rstd))) = (&w.qk_norm, &kept.qk) {
            let before = (before.ptr(), self.q + self.kv);
            ops::copy2d(self.gpu, self.e, before, qkv, self.n, self.q + self.kv)?;
            let norm = |at: usize, rstd: &Buffer<f32>, w: &Buffer<f32>, heads: usize| {
                let (y, x) = (self.shift(qkv, at), self.shift(before, at));
                ops::head_norm(
                    self.gpu,
                    self.e,
                    y,
                    rstd.ptr(),
                    x,
                    w.ptr(),
                    self.n,
                    heads,
                    dim,
                    self.eps(),
                )
            };
            norm(0, q_rstd, q_norm, heads)?;
            norm(self.q, k_rstd, k_norm, kv_heads)?;
        }
        let table = self.arena.rope.ptr();
        ops::rope(self.gpu, self.e, qkv, table, positions, self.n, heads + kv_heads, dim, false)
    }

    fn heads(&self) -> (usize, usize, usize) {
        let c = self.config;
        (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
    }

    /// One layer from x(layer) to x(layer + 1). `keep` also leaves x·Aᵀ for the backward.
    pub(super) fn layer_forward(&self, layer: usize, keep: bool) -> Result<()> {
        self.attend(layer, keep, None)?;
        self.arena.gate_up.enter(layer)?;
        self.gate_up(layer, keep, false)?;
        self.arena.gate_up.leave(layer)?;
        self.down(layer, keep)
    }

    /// The first half of a layer, to x₂. With `cache`, keys and values go there and attention is
    /// over all that stand there.
    pub(super) fn attend(&self, layer: usize, keep: bool, cache: Option<&Cached>) -> Result<()> {
        let (w, kept) = (&self.weights.layers[layer], self.arena.kept(layer));
        let at = self.places(w, kept, layer, false);
        let h = self.config.hidden_size;
        let x = (self.arena.x(layer).ptr(), h);
        let low = |i: usize| keep.then_some(&kept.low[i]);
        ops::rms_fwd(
            self.gpu,
            self.e,
            at.n1,
            kept.rstd1.ptr(),
            x,
            w.input_norm.ptr(),
            0,
            self.n,
            h,
            self.eps(),
        )?;
        self.low_rank_in(&w.groups[QKV], at.n1, low(0))?;
        let attention = self.attention(at.qkv);
        match cache {
            None => {
                self.qkv(w, kept, at.n1, at.qkv, self.batch.positions())?;
                ops::attention_fwd(self.gpu, self.e, at.o, kept.lse.ptr(), &attention)?;
            }
            Some(cache) => {
                self.qkv(w, kept, at.n1, at.qkv, cache.positions)?;
                cache.attend(self, layer, at.qkv, at.o, &attention)?;
            }
        }
        self.low_rank_in(&w.groups[O], at.o, None)?;
        self.project(&w.groups[O], at.o, at.x2, Some(x))
    }

    /// Gate and up of the second half, where the forward or the backward has them.
    pub(super) fn gate_up(&self, layer: usize, keep: bool, backward: bool) -> Result<()> {
        let (w, kept) = (&self.weights.layers[layer], self.arena.kept(layer));
        let (at, h) = (self.places(w, kept, layer, backward), self.config.hidden_size);
        let low = keep.then_some(&kept.low[1]);
        ops::rms_fwd(
            self.gpu,
            self.e,
            at.n2,
            kept.rstd2.ptr(),
            at.x2,
            w.mlp_norm.ptr(),
            0,
            self.n,
            h,
            self.eps(),
        )?;
        self.low_rank_in(&w.groups[GATE_UP], at.n2, low)?;
        self.project(&w.groups[GATE_UP], at.n2, at.gu, None)
    }

    /// The rest of the layer, from gate and up.
    pub(super) fn down(&self, layer: usize, keep: bool) -> Result<()> {
        let (w, kept) = (&self.weights.layers[layer], self.arena.kept(layer));
        let at = self.places(w, kept, layer, false);
        let (h, f) = (self.config.hidden_size, self.config.intermediate_size);
        ops::gated_fwd(self.gpu, self.e, at.h, at.gu, self.n, f, self.act())?;
        self.low_rank_in(&w.groups[DOWN], at.h, keep.then_some(&kept.low[2]))?;
        let y = (self.arena.x(layer + 1).ptr(), h);
        self.project(&w.groups[DOWN], at.h, y, Some(at.x2))
    }

    /// dy·s·B into the columns beside dy.
    fn low_rank_out(&self, group: &Group, dy: Mat) -> Result<()> {
        if group.r == 0 {
            return Ok(());
        }
        let low = self.shift(dy, group.output);
        self.product((self.n, group.r, group.output), dy, group.b(), false, low, None)
    }

    /// dx, from a dy that has its dy·s·B beside it.
    fn back(&self, group: &Group, dy: Mat, dx: Mat) -> Result<()> {
        let Some(dropout) = &self.dropout else {
            let k = group.output + group.r;
            return self.product((self.n, group.input, k), dy, group.w(), false, dx, None);
        };
        self.product((self.n, group.input, group.output), dy, group.w(), false, dx, None)?;
        for place in &group.places {
            let low = self.shift(dy, group.output + place.column);
            let a = (group.at(group.output + place.column, 0), group.ld());
            let part = (dropout.scratch.ptr(), group.input);
            self.product((self.n, group.input, place.rank), low, a, false, part, None)?;
            let key = (dropout.key)(place.at);
            ops::dropout(self.gpu, self.e, dx, part, self.n, group.input, key, dropout.p, true)?;
        }
        Ok(())
    }

    /// A product over all tokens, aᵀ·b, into f32.
    fn over_tokens(&self, (m, n): (usize, usize), a: Mat, b: Mat, c: Mat, add: bool) -> Result<()> {
        self.gpu.product(&Product {
            m,
            n,
            k: self.n,
            a,
            a_t: true,
            b,
            b_t: false,
            c,
            add: c,
            alpha: 1.0,
            beta: if add { 1.0 } else { 0.0 },
            input: self.e,
            output: Element::F32,
        })
    }

    /// Gradient of a group's B, dyᵀ·(x·Aᵀ).
    fn gradient_b(
        &self,
        group: &Group,
        grads: &GroupGrads,
        dy: Mat,
        low: Mat,
        add: bool,
    ) -> Result<()> {
        if group.r == 0 {
            return Ok(());
        }
        self.over_tokens((group.output, group.r), dy, low, (grads.b.ptr(), group.r), add)
    }

    /// Gradient of a group's A, (dy·s·B)ᵀ·x.
    fn gradient_a(
        &self,
        group: &Group,
        grads: &GroupGrads,
        dy: Mat,
        x: Mat,
        add: bool,
    ) -> Result<()> {
        if group.r == 0 {
            return Ok(());
        }
        let dlow = self.shift(dy, group.output);
        let Some(dropout) = &self.dropout else {
            let to = (grads.a.ptr(), group.input);
            return self.over_tokens((group.r, group.input), dlow, x, to, add);
        };
        for place in &group.places {
            let dropped = (dropout.scratch.ptr(), group.input);
            let key = (dropout.key)(place.at);
            ops::dropout(self.gpu, self.e, dropped, x, self.n, group.input, key, dropout.p, false)?;
            let to = grads.a.ptr() + 4 * (place.column * group.input) as u64;
            let dlow = self.shift(dlow, place.column);
            let shape = (place.rank, group.input);
            self.over_tokens(shape, dlow, dropped, (to, group.input), add)?;
        }
        Ok(())
    }

    /// Gradients of a group's A and B.
    fn gradients(
        &self,
        group: &Group,
        grads: &GroupGrads,
        dy: Mat,
        x: Mat,
        low: Mat,
        add: bool,
    ) -> Result<()> {
        self.gradient_b(group, grads, dy, low, add)?;
        self.gradient_a(group, grads, dy, x, add)
    }

    /// The place of the partial sums, if [`ops::gated_back`] takes a layer: gate, up and down with
    /// ranks up to 16, no dropout.
    fn gated_sums(&self, w: &LayerWeights) -> Option<&'a Buffer<f32>> {
        let sums = self.arena.backward.as_ref()?.gated.as_ref()?;
        let (group, down) = (&w.groups[GATE_UP], &w.groups[DOWN]);
        let ranks = group.places.iter().chain(&down.places).map(|p| p.rank);
        let takes = self.dropout.is_none()
            && group.r > 0
            && down.r > 0
            && ranks.max() <= Some(ops::GATED_RANK);
        takes.then_some(sums)
    }

    /// The gated activation's backward and all that is thin beside it.
    fn gated_back(
        &self,
        w: &LayerWeights,
        grads: &[GroupGrads; 4],
        at: &Places,
        (d, low): (Mat, Mat),
        sums: &Buffer<f32>,
        add: bool,
    ) -> Result<()> {
        let (group, down) = (&w.groups[GATE_UP], &w.groups[DOWN]);
        let width = self.config.intermediate_size;
        let part = |row: usize| {
            group.places.iter().find(|p| p.row == row).map_or((0, 0), |p| (p.column, p.rank))
        };
        let gated = ops::GatedBack {
            dh: at.h,
            gu: at.gu,
            low,
            down: self.shift(d, down.output),
            b: group.b(),
            rows: self.n,
            width,
            act: self.act(),
            r: group.r,
            parts: [part(0), part(width)],
            rank_down: down.places.iter().map(|p| p.rank).sum(),
        };
        // The normalised input is made again afterwards.
        let room = (at.n2.0, sums.ptr());
        let to = (grads[GATE_UP].b.ptr(), grads[DOWN].a.ptr());
        ops::gated_back(self.gpu, &gated, to, room, add)
    }

    /// Backward of one layer: the gradients of its modules (added to those there if `add`), and
    /// with `need_dx` the gradient of its input in place of that of its output.
    pub(super) fn layer_backward(
        &self,
        layer: usize,
        need_dx: bool,
        grads: &[GroupGrads; 4],
        add: bool,
    ) -> Result<()> {
        let Some(backward) = &self.arena.backward else { return Ok(()) };
        let again = !self.arena.keeps(layer);
        if layer == 0 && self.arena.embeds_again() {
            // The first layer's output stood in their place.
            self.embed()?;
        }
        let (w, kept) = (&self.weights.layers[layer], self.arena.kept(layer));
        let at = self.places(w, kept, layer, true);
        let Backward { d, ld, dn, delta, .. } = backward;
        let (gpu, e, n) = (self.gpu, self.e, self.n);
        let (h, f) = (self.config.hidden_size, self.config.intermediate_size);
        let sums = self.gated_sums(w);
        if again {
            self.attend(layer, true, None)?;
            self.gate_up(layer, true, true)?;
            if sums.is_some() {
                ops::gated_fwd(gpu, e, at.h, at.gu, n, f, self.act())?;
                self.low_rank_in(&w.groups[DOWN], at.h, Some(&kept.low[2]))?;
            }
        }
        let (d, dn, d_o) = ((d.ptr(), *ld), (*dn, h), (*dn, self.q));
        let low = |i: usize, g: usize| (kept.low[i].ptr(), w.groups[g].r);

        // MLP
        let normalise =
            || ops::rms_again(gpu, e, at.n2, kept.rstd2.ptr(), at.x2, w.mlp_norm.ptr(), n, h);
        let gate_up = &self.arena.gate_up;
        let from_n2 = !again && gate_up.again(layer);
        if from_n2 {
            normalise()?;
            gate_up.enter_backward(layer)?;
            let group = &w.groups[GATE_UP];
            if group.r > 0 {
                ops::copy2d(gpu, e, self.shift(at.n2, h), low(1, GATE_UP), n, group.r)?;
            }
            self.project(group, at.n2, at.gu, None)?;
        }
        self.low_rank_out(&w.groups[DOWN], d)?;
        self.back(&w.groups[DOWN], d, at.h)?;
        if !gate_up.again(layer) {
            gate_up.enter_backward(layer)?;
        }
        if let Some(sums) = sums {
            self.gradient_b(&w.groups[DOWN], &grads[DOWN], d, low(2, DOWN), add)?;
            self.gated_back(w, grads, &at, (d, low(1, GATE_UP)), sums, add)?;
        } else {
            ops::gated_bwd(gpu, e, at.h, at.gu, n, f, self.act())?;
            if again {
                self.low_rank_in(&w.groups[DOWN], at.h, Some(&kept.low[2]))?;
            }
            self.gradients(&w.groups[DOWN], &grads[DOWN], d, at.h, low(2, DOWN), add)?;
            self.low_rank_out(&w.groups[GATE_UP], at.gu)?;
            self.gradient_b(&w.groups[GATE_UP], &grads[GATE_UP], at.gu, low(1, GATE_UP), add)?;
        }
        self.back(&w.groups[GATE_UP], at.gu, dn)?;
        if sums.is_some() || !(again || from_n2) {
            normalise()?;
        }
        self.gradient_a(&w.groups[GATE_UP], &grads[GATE_UP], at.gu, at.n2, add)?;
        gate_up.leave_backward(layer)?;
        ops::rms_bwd(gpu, e, d, dn, at.x2, w.mlp_norm.ptr(), kept.rstd2.ptr(), 0, n, h, true)?;

        // Attention
        self.low_rank_out(&w.groups[O], d)?;
        self.back(&w.groups[O], d, d_o)?;
        self.gradients(&w.groups[O], &grads[O], d, at.o, self.shift(at.o, self.q), add)?;
        let group = &w.groups[QKV];
        if !need_dx && group.r == 0 {
            return Ok(());
        }
        let (heads, kv_heads, dim) = self.heads();
        let dqkv = (self.arena.h, padded(self.q + 2 * self.kv + group.r));
        let (dk, dv) = (self.shift(dqkv, self.q), self.shift(dqkv, self.q + self.kv));
        let attention = self.attention(at.qkv);
        ops::attention_bwd(
            gpu,
            e,
            dqkv,
            dk.0,
            dv.0,
            d_o,
            at.o,
            kept.lse.ptr(),
            delta.ptr(),
            &attention,
        )?;
        let (table, positions) = (self.arena.rope.ptr(), self.batch.positions());
        ops::rope(gpu, e, dqkv, table, positions, n, heads + kv_heads, dim, true)?;
        if let (Some([q_norm, k_norm]), Some((before, q_rstd, k_rstd))) = (&w.qk_norm, &kept.qk) {
            let before = (before.ptr(), self.q + self.kv);
            ops::head_norm_bwd(gpu, e, dqkv, q_rstd.ptr(), before, q_norm.ptr(), n, heads, dim)?;
            let k_before = self.shift(before, self.q);
            ops::head_norm_bwd(gpu, e, dk, k_rstd.ptr(), k_before, k_norm.ptr(), n, kv_heads, dim)?;
        }
        let x = (self.arena.x(layer).ptr(), h);
        self.low_rank_out(group, dqkv)?;
        if group.r > 0 {
            ops::rms_again(gpu, e, at.n1, kept.rstd1.ptr(), x, w.input_norm.ptr(), n, h)?;
            self.gradients(group, &grads[QKV], dqkv, at.n1, low(0, QKV), add)?;
        }
        if !need_dx {
            return Ok(());
        }
        self.back(group, dqkv, dn)?;
        ops::rms_bwd(gpu, e, d, dn, x, w.input_norm.ptr(), kept.rstd1.ptr(), 0, n, h, true)
    }
}

/// Where a layer's matrices stand.
struct Places {
    n1: Mat,
    qkv: Mat,
    o: Mat,
    x2: Mat,
    n2: Mat,
    gu: Mat,
    h: Mat,
}

/// Cached keys and values of one document, and the place of the new tokens in it.
pub(super) struct Cached<'a> {
    /// Per layer [capacity, 2·kv]: k, then v.
    pub(super) layers: &'a [Buffer<u8>],
    /// Tokens cached before.
    pub(super) past: usize,
    /// Positions of the new tokens.
    pub(super) positions: DevicePtr,
    /// Zeros, i32 [N].
    pub(super) zeros: DevicePtr,
}

impl Cached<'_> {
    fn attend(
        &self,
        run: &Run<'_>,
        layer: usize,
        qkv: Mat,
        o: Mat,
        attention: &Attention,
    ) -> Result<()> {
        let width = 2 * run.kv;
        let cache = (self.layers[layer].ptr(), width);
        let to = (cache.0 + (self.past * width * run.e.size()) as u64, width);
        ops::copy2d(run.gpu, run.e, to, run.shift(qkv, run.q), run.n, width)?;
        let attention = Attention {
            k: cache.0,
            v: run.shift(cache, run.kv).0,
            ld: width,
            first: self.zeros,
            ..*attention
        };
        ops::attention_cached(run.gpu, run.e, o, 0, &attention, qkv.1, self.past)
    }
}
