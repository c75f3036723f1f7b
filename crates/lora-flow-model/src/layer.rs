//! One decoder layer: forward, and the backward of its adapters, without autograd.
//!
//! x₂ = x + O·attention(rope(norm(Q·n₁)), rope(norm(K·n₁)), V·n₁), n₁ = RMSNorm(x)
//! y  = x₂ + Down·(act(Gate·n₂) · Up·n₂), n₂ = RMSNorm(x₂)
//!
//! Each of the seven projections is frozen and may carry a LoRA module. The backward is a function
//! of the [`Activations`]: what the products and the attention made. Anything elementwise (the
//! normalised inputs, the gated product) is cheap and made again where an adapter needs it.

use candle_core::{DType, Result, Tensor};
use lora_flow_kernels::activation::{Act, swiglu_backward, swiglu_forward};
use lora_flow_kernels::rope::RopeTable;
use lora_flow_kernels::{attention, elementwise, linear, rms_norm, rope};

use crate::adapter::{LayerAdapter, LoraGrads, Slot};
use crate::{dora, full};

/// The projections of a layer, in model order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Proj {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Proj {
    pub(crate) const ALL: [Self; 7] =
        [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Its place below `model.layers.N.`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

/// A frozen projection.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    /// [out, in]
    pub(crate) weight: Tensor,
    /// [out]
    pub(crate) bias: Option<Tensor>,
}

impl Linear {
    /// y [N, out] and, with an adapter, x·Aᵀ [N, r], which the backward needs.
    fn forward(&self, x: &Tensor, slot: Option<&Slot<'_>>) -> Result<(Tensor, Option<Tensor>)> {
        let (y, xa) = match slot.and_then(|slot| Some((slot, slot.low_rank?.1))) {
            None => (linear::matmul_nt(x, &self.weight)?, None),
            Some((slot, module)) if module.magnitude.is_some() => {
                let (y, xa) = dora::forward(x, &self.weight, slot)?;
                (y, Some(xa))
            }
            Some((slot, module)) => {
                let (a, b, s) = (&module.a, &module.b, module.scale as f32);
                let (y, xa) = match slot.mask(x)? {
                    None => linear::lora_forward(x, &self.weight, a, b, s)?,
                    Some(mask) => {
                        let dropped = (x * mask)?;
                        linear::lora_forward_dropped(x, &dropped, &self.weight, a, b, s)?
                    }
                };
                (y, Some(xa))
            }
        };
        match &self.bias {
            None => Ok((y, xa)),
            Some(bias) => Ok((y.broadcast_add(bias)?, xa)),
        }
    }

    /// Adds the gradients of the adapter, if there is one, and returns dx [N, in] if `need_dx`.
    /// `x` is only called for where an adapter needs it.
    fn backward(
        &self,
        dy: &Tensor,
        x: impl FnOnce() -> Result<Tensor>,
        xa: Option<&Tensor>,
        slot: Option<&Slot<'_>>,
        need_dx: bool,
        grads: &mut LoraGrads,
    ) -> Result<Option<Tensor>> {
        let low_rank = slot.and_then(|slot| Some((slot, slot.low_rank?)));
        let (Some((slot, (index, module))), Some(xa)) = (low_rank, xa) else {
            if let Some(slot) = slot {
                full::linear_backward(dy, &x()?, slot, grads)?;
            }
            return need_dx.then(|| linear::matmul_nn(dy, &self.weight)).transpose();
        };
        if module.magnitude.is_some() {
            return dora::backward(dy, &x()?, &self.weight, slot, xa, need_dx, grads);
        }
        let (a, b, s) = (&module.a, &module.b, module.scale as f32);
        let (x, w) = (x()?, &self.weight);
        let Some(mask) = slot.mask(&x)? else {
            let (dx, da, db) = linear::lora_backward(dy, &x, w, a, b, s, xa, need_dx)?;
            grads.add(index, &da, &db)?;
            return Ok(dx);
        };
        let dropped = (&x * &mask)?;
        let parts = linear::lora_backward_parts(dy, &dropped, w, a, b, s, xa, need_dx)?;
        grads.add(index, &parts.da, &parts.db)?;
        let (Some(base), Some(low)) = (parts.dx_base, parts.dx_low_rank) else { return Ok(None) };
        Ok(Some(elementwise::add_scaled(&base, &(low * mask)?, 1.0)?))
    }
}

/// What all layers of a model share.
#[derive(Debug, Clone)]
pub(crate) struct Dims {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) eps: f64,
    pub(crate) window: Option<usize>,
    pub(crate) act: Act,
}

impl Dims {
    /// Scale of the attention's scores.
    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// What all layers of a pass over one batch share.
pub(crate) struct Pass<'a> {
    pub(crate) dims: &'a Dims,
    pub(crate) rope: &'a RopeTable,
    /// Cumulative document lengths.
    pub(crate) docs: &'a [usize],
    /// Position of each token in its document.
    pub(crate) positions: &'a [u32],
}

/// The weights of one layer.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) input_norm: Tensor,
    pub(crate) mlp_norm: Tensor,
    /// Norms of the heads of q and k, [head_dim].
    pub(crate) qk_norm: Option<[Tensor; 2]>,
    /// In the order of [`Proj::ALL`].
    pub(crate) linears: [Linear; 7],
}

/// q or k as it was before its norm, and the norm's 1/σ: [N·heads, D] and [N·heads].
type BeforeNorm = (Tensor, Tensor);

/// What the backward of a layer starts from.
#[derive(Debug)]
pub(crate) struct Activations {
    x: Tensor,
    rstd1: Tensor,
    /// Elementwise from `x` and `rstd1`; not kept.
    n1: Option<Tensor>,
    before_qk_norm: Option<[BeforeNorm; 2]>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    x2: Tensor,
    rstd2: Tensor,
    /// Elementwise from `x2` and `rstd2`; not kept.
    n2: Option<Tensor>,
    gate: Tensor,
    up: Tensor,
    /// Elementwise from `gate` and `up`; not kept.
    h: Option<Tensor>,
    /// x·Aᵀ of the adapted projections.
    xa: [Option<Tensor>; 7],
}

impl Activations {
    /// Without what is elementwise in the rest.
    pub(crate) fn slim(self) -> Self {
        Self { n1: None, n2: None, h: None, ..self }
    }
}

impl Layer {
    fn linear(&self, p: Proj) -> &Linear {
        &self.linears[p as usize]
    }

    fn norm1(&self, x: &Tensor, dims: &Dims) -> Result<(Tensor, Tensor)> {
        rms_norm::forward(x, &self.input_norm, dims.eps)
    }

    fn norm2(&self, x2: &Tensor, dims: &Dims) -> Result<(Tensor, Tensor)> {
        rms_norm::forward(x2, &self.mlp_norm, dims.eps)
    }

    /// q, k and v [N, heads, D] of n₁, normalised and rotated.
    #[allow(clippy::type_complexity)]
    fn qkv(
        &self,
        n1: &Tensor,
        pass: &Pass<'_>,
        adapter: &LayerAdapter<'_>,
        xa: &mut [Option<Tensor>; 7],
    ) -> Result<(Tensor, Tensor, Tensor, Option<[BeforeNorm; 2]>)> {
        let dims = pass.dims;
        let mut project = |p: Proj| -> Result<Tensor> {
            let (y, low) = self.linear(p).forward(n1, adapter.slot(p))?;
            xa[p as usize] = low;
            Ok(y)
        };
        let (mut q, mut k, v) = (project(Proj::Q)?, project(Proj::K)?, project(Proj::V)?);
        let mut before = None;
        if let Some([q_weight, k_weight]) = &self.qk_norm {
            let by_head = |t: Tensor| t.reshape(((), dims.head_dim));
            let (q_before, k_before) = (by_head(q)?, by_head(k)?);
            let (q_normed, q_rstd) = rms_norm::forward(&q_before, q_weight, dims.eps)?;
            let (k_normed, k_rstd) = rms_norm::forward(&k_before, k_weight, dims.eps)?;
            before = Some([(q_before, q_rstd), (k_before, k_rstd)]);
            (q, k) = (q_normed, k_normed);
        }
        let q = q.reshape(((), dims.heads, dims.head_dim))?;
        let k = k.reshape(((), dims.kv_heads, dims.head_dim))?;
        let v = v.reshape(((), dims.kv_heads, dims.head_dim))?;
        let q = rope::apply(&q, pass.positions, pass.rope, false)?;
        let k = rope::apply(&k, pass.positions, pass.rope, false)?;
        Ok((q, k, v, before))
    }

    /// Everything up to the last projection, from the residual stream x [N, H].
    pub(crate) fn activations(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        adapter: &LayerAdapter<'_>,
    ) -> Result<Activations> {
        let dims = pass.dims;
        let mut xa: [Option<Tensor>; 7] = Default::default();
        let (n1, rstd1) = self.norm1(x, dims)?;
        let (q, k, v, before_qk_norm) = self.qkv(&n1, pass, adapter, &mut xa)?;
        let (o, lse) = attention::forward(&q, &k, &v, pass.docs, dims.scale(), dims.window)?;
        let (attended, low) =
            self.linear(Proj::O).forward(&o.flatten_from(1)?, adapter.slot(Proj::O))?;
        xa[Proj::O as usize] = low;
        let (x2, n2, rstd2) = rms_norm::add_forward(&attended, x, &self.mlp_norm, dims.eps)?;
        let (gate, low) = self.linear(Proj::Gate).forward(&n2, adapter.slot(Proj::Gate))?;
        xa[Proj::Gate as usize] = low;
        let (up, low) = self.linear(Proj::Up).forward(&n2, adapter.slot(Proj::Up))?;
        xa[Proj::Up as usize] = low;
        let h = swiglu_forward(&gate, &up, dims.act)?;
        Ok(Activations {
            x: x.clone(),
            rstd1,
            n1: Some(n1),
            before_qk_norm,
            q,
            k,
            v,
            o,
            lse,
            x2,
            rstd2,
            n2: Some(n2),
            gate,
            up,
            h: Some(h),
            xa,
        })
    }

    /// The last projection and the residual: y [N, H].
    pub(crate) fn output(
        &self,
        acts: &mut Activations,
        dims: &Dims,
        adapter: &LayerAdapter<'_>,
    ) -> Result<Tensor> {
        let h = acts.h(dims)?;
        let (y, low) = self.linear(Proj::Down).forward(&h, adapter.slot(Proj::Down))?;
        acts.xa[Proj::Down as usize] = low;
        elementwise::add_scaled(&acts.x2, &y, 1.0)
    }

    /// Forward alone, nothing kept.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        adapter: &LayerAdapter<'_>,
    ) -> Result<Tensor> {
        let mut acts = self.activations(x, pass, adapter)?;
        self.output(&mut acts, pass.dims, adapter)
    }

    /// [`Self::activations`] again for a backward that kept only x: the last projection is not
    /// needed, but for x·Aᵀ of its adapter.
    pub(crate) fn recompute(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        adapter: &LayerAdapter<'_>,
    ) -> Result<Activations> {
        let mut acts = self.activations(x, pass, adapter)?;
        let down = adapter.slot(Proj::Down);
        if let Some((slot, (_, module))) = down.and_then(|slot| Some((slot, slot.low_rank?))) {
            let mut h = acts.h(pass.dims)?;
            if let Some(mask) = slot.mask(&h)? {
                h = (h * mask)?;
            }
            acts.xa[Proj::Down as usize] = Some(linear::matmul_nt(&h, &module.a)?);
        }
        Ok(acts)
    }

    /// Adds the gradients of the layer's adapters and returns dx if `need_dx`, from dy and what
    /// the forward kept. Stops as soon as nothing below needs a gradient.
    pub(crate) fn backward(
        &self,
        dy: &Tensor,
        mut acts: Activations,
        pass: &Pass<'_>,
        adapter: &LayerAdapter<'_>,
        need_dx: bool,
        grads: &mut LoraGrads,
    ) -> Result<Option<Tensor>> {
        let dims = pass.dims;
        let adapted = |ps: &[Proj]| ps.iter().any(|p| adapter.slot(*p).is_some());
        let [norm1, norm2, q_norm, k_norm] = adapter.norms;
        // Whether a gradient has to reach the inputs of Q, K and V, of O, of the MLP, and of Down.
        let reach_norm1 = need_dx || norm1.is_some();
        let reach_heads = reach_norm1 || q_norm.is_some() || k_norm.is_some();
        let reach_attention = reach_heads || adapted(&[Proj::Q, Proj::K, Proj::V]);
        let reach_middle = reach_attention || adapted(&[Proj::O]) || norm2.is_some();
        let reach_gated = reach_middle || adapted(&[Proj::Gate, Proj::Up]);
        let xa = std::mem::take(&mut acts.xa);
        let xa = |p: Proj| xa[p as usize].as_ref();

        // MLP
        let h = || acts.h(dims);
        let down = self.linear(Proj::Down);
        let slot = adapter.slot(Proj::Down);
        let Some(dh) = down.backward(dy, h, xa(Proj::Down), slot, reach_gated, grads)? else {
            return Ok(None);
        };
        let (dgate, dup) = swiglu_backward(&dh, &acts.gate, &acts.up, dims.act)?;
        drop(dh);
        if acts.n2.is_none() && adapted(&[Proj::Gate, Proj::Up]) {
            acts.n2 = Some(self.norm2(&acts.x2, dims)?.0);
        }
        let n2 = || kept(&acts.n2);
        let mut dn2 = None;
        for (p, d) in [(Proj::Gate, dgate), (Proj::Up, dup)] {
            let slot = adapter.slot(p);
            let dx = self.linear(p).backward(&d, n2, xa(p), slot, reach_middle, grads)?;
            dn2 = sum(dn2, dx)?;
        }
        let Some(dn2) = dn2 else { return Ok(None) };
        full::norm_backward(norm2, &dn2, &acts.x2, &acts.rstd2, grads)?;
        let dx2 = rms_norm::backward_add(&dn2, &acts.x2, &self.mlp_norm, &acts.rstd2, Some(dy))?;
        drop(dn2);

        // Attention
        let (linear, slot) = (self.linear(Proj::O), adapter.slot(Proj::O));
        let o = || acts.o.flatten_from(1);
        let Some(dattended) =
            linear.backward(&dx2, o, xa(Proj::O), slot, reach_attention, grads)?
        else {
            return Ok(None);
        };
        let dattended = dattended.reshape(acts.o.shape())?;
        let (dq, dk, dv) = attention::backward(
            &dattended,
            &acts.q,
            &acts.k,
            &acts.v,
            &acts.o,
            &acts.lse,
            pass.docs,
            dims.scale(),
            dims.window,
        )?;
        drop(dattended);
        let mut dq = rope::apply(&dq, pass.positions, pass.rope, true)?;
        let mut dk = rope::apply(&dk, pass.positions, pass.rope, true)?;
        if let (Some([q_weight, k_weight]), Some([q, k])) = (&self.qk_norm, &acts.before_qk_norm) {
            let back = |d: Tensor, (before, rstd): &BeforeNorm, weight: &Tensor| {
                rms_norm::backward(&d.reshape(before.shape())?, before, weight, rstd)
            };
            full::norm_backward(q_norm, &dq.reshape(q.0.shape())?, &q.0, &q.1, grads)?;
            full::norm_backward(k_norm, &dk.reshape(k.0.shape())?, &k.0, &k.1, grads)?;
            (dq, dk) = (back(dq, q, q_weight)?, back(dk, k, k_weight)?);
        }
        if acts.n1.is_none() && adapted(&[Proj::Q, Proj::K, Proj::V]) {
            acts.n1 = Some(self.norm1(&acts.x, dims)?.0);
        }
        let n1 = || kept(&acts.n1);
        let tokens = pass.positions.len();
        let mut dn1 = None;
        for (p, d) in [(Proj::Q, dq), (Proj::K, dk), (Proj::V, dv)] {
            let (d, slot) = (d.reshape((tokens, ()))?, adapter.slot(p));
            let dx = self.linear(p).backward(&d, n1, xa(p), slot, reach_norm1, grads)?;
            dn1 = sum(dn1, dx)?;
        }
        let Some(dn1) = dn1 else { return Ok(None) };
        full::norm_backward(norm1, &dn1, &acts.x, &acts.rstd1, grads)?;
        if !need_dx {
            return Ok(None);
        }
        let (x, norm, rstd) = (&acts.x, &self.input_norm, &acts.rstd1);
        Ok(Some(rms_norm::backward_add(&dn1, x, norm, rstd, Some(&dx2))?))
    }

    /// Forward of M new tokens of one document whose earlier keys and values stand in `cache`.
    pub(crate) fn forward_cached(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        adapter: &LayerAdapter<'_>,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        let dims = pass.dims;
        let mut xa: [Option<Tensor>; 7] = Default::default();
        let (n1, _) = self.norm1(x, dims)?;
        let (q, k, v, _) = self.qkv(&n1, pass, adapter, &mut xa)?;
        let first = cache.len == 0;
        cache.append(&k, &v)?;
        let o = if first {
            attention::forward(&q, &k, &v, pass.docs, dims.scale(), dims.window)?.0
        } else {
            cache.attend(&q, dims)?
        };
        let (attended, _) =
            self.linear(Proj::O).forward(&o.flatten_from(1)?, adapter.slot(Proj::O))?;
        let (x2, n2, _) = rms_norm::add_forward(&attended, x, &self.mlp_norm, dims.eps)?;
        let (gate, _) = self.linear(Proj::Gate).forward(&n2, adapter.slot(Proj::Gate))?;
        let (up, _) = self.linear(Proj::Up).forward(&n2, adapter.slot(Proj::Up))?;
        let h = swiglu_forward(&gate, &up, dims.act)?;
        let (y, _) = self.linear(Proj::Down).forward(&h, adapter.slot(Proj::Down))?;
        elementwise::add_scaled(&x2, &y, 1.0)
    }
}

impl Activations {
    /// The gated product, kept or made again.
    fn h(&self, dims: &Dims) -> Result<Tensor> {
        match &self.h {
            Some(h) => Ok(h.clone()),
            None => swiglu_forward(&self.gate, &self.up, dims.act),
        }
    }
}

/// A tensor that was made just before it is asked for.
fn kept(tensor: &Option<Tensor>) -> Result<Tensor> {
    tensor.clone().ok_or_else(|| candle_core::Error::Msg("an activation was not kept".into()))
}

fn sum(a: Option<Tensor>, b: Option<Tensor>) -> Result<Option<Tensor>> {
    match (a, b) {
        (Some(a), Some(b)) => Ok(Some(elementwise::add_scaled(&a, &b, 1.0)?)),
        (one, None) | (None, one) => Ok(one),
    }
}

/// Keys and values of the tokens generated so far, in buffers that double when full.
#[derive(Debug)]
pub(crate) struct KvCache {
    /// [kv_heads, capacity, D]
    k: Option<Tensor>,
    v: Option<Tensor>,
    len: usize,
}

impl KvCache {
    pub(crate) fn new() -> Self {
        Self { k: None, v: None, len: 0 }
    }

    /// Forgets all but the first `len` tokens; what comes next is written over the others.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Adds keys and values [M, kv_heads, D].
    fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let added = k.dim(0)?;
        for (buffer, new) in [(&mut self.k, k), (&mut self.v, v)] {
            let new = new.transpose(0, 1)?.contiguous()?;
            let (heads, _, width) = new.dims3()?;
            let room = buffer.as_ref().map_or(Ok(0), |b| b.dim(1))?;
            if self.len + added > room {
                let capacity = (self.len + added).next_power_of_two().max(64);
                let grown = Tensor::zeros((heads, capacity, width), new.dtype(), new.device())?;
                if let Some(old) = buffer.as_ref().filter(|_| self.len > 0) {
                    grown.slice_set(&old.narrow(1, 0, self.len)?.contiguous()?, 1, 0)?;
                }
                *buffer = Some(grown);
            }
            if let Some(buffer) = buffer {
                buffer.slice_set(&new, 1, self.len)?;
            }
        }
        self.len += added;
        Ok(())
    }

    /// Attention of the last M tokens, q [M, heads, D], over all tokens so far. The scores are
    /// M × length, so M is one or a few.
    fn attend(&self, q: &Tensor, dims: &Dims) -> Result<Tensor> {
        let (Some(k), Some(v)) = (&self.k, &self.v) else {
            candle_core::bail!("the cache of keys and values is empty")
        };
        let (m, _, width) = q.dims3()?;
        let group = dims.heads / dims.kv_heads;
        // A lone query never looks back beyond the window, so the keys before it can be left out.
        let start = match dims.window {
            Some(window) if m == 1 => self.len.saturating_sub(window),
            _ => 0,
        };
        let seen = self.len - start;
        let (k, v) = (k.narrow(1, start, seen)?, v.narrow(1, start, seen)?);
        let q = q.reshape((m, dims.kv_heads, group, width))?.permute((1, 2, 0, 3))?;
        let q = q.contiguous()?.reshape((dims.kv_heads, group * m, width))?;
        let scores = (q.matmul(&k.t()?)?.to_dtype(wide(q.dtype()))? * f64::from(dims.scale()))?;
        let scores = if m == 1 {
            scores
        } else {
            let mask = self.mask(m, group, dims.window, scores.dtype())?;
            scores.broadcast_add(&mask.to_device(q.device())?)?
        };
        let max = scores.max_keepdim(2)?;
        let weights = scores.broadcast_sub(&max)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(2)?)?.to_dtype(v.dtype())?;
        let o = weights.matmul(&v.contiguous()?)?.reshape((dims.kv_heads, group, m, width))?;
        o.permute((2, 0, 1, 3))?.contiguous()?.reshape((m, dims.heads, width))
    }

    /// 0 where the query may look, −∞ elsewhere: [group·m, length].
    fn mask(&self, m: usize, group: usize, window: Option<usize>, dtype: DType) -> Result<Tensor> {
        let first = self.len - m;
        let cells: Vec<f32> = (0..group * m)
            .flat_map(|row| {
                let at = first + row % m;
                (0..self.len).map(move |key| {
                    let seen = key <= at && window.is_none_or(|w| at - key < w);
                    if seen { 0.0 } else { f32::NEG_INFINITY }
                })
            })
            .collect();
        Tensor::from_vec(cells, (group * m, self.len), &candle_core::Device::Cpu)?.to_dtype(dtype)
    }
}

fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { dtype } else { DType::F32 }
}
