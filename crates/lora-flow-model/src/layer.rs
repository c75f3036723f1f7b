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
use lora_flow_kernels::linear::{LoraPair, Projection};
use lora_flow_kernels::rope::RopeTable;
use lora_flow_kernels::{attention, elementwise, linear, rms_norm, rope};
use rayon::prelude::*;

use crate::adapter::{LayerAdapter, LoraGrads, Slot};
use crate::keep::Keep;
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
    /// The weight with the low-rank module of `slot`.
    fn with<'a>(&'a self, slot: Option<&Slot<'a>>) -> Projection<'a> {
        let lora = slot.and_then(|slot| slot.low_rank).map(|(_, module)| LoraPair {
            a: &module.a,
            b: &module.b,
            s: module.scale as f32,
        });
        Projection { w: &self.weight, lora }
    }

    /// y [N, out] without the bias and, with a low-rank module, x·Aᵀ [N, r], for a projection that
    /// is [`Slot::alone`] or stands beside one.
    fn forward_alone(
        &self,
        x: &Tensor,
        slot: Option<&Slot<'_>>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let w = &self.weight;
        let Some((slot, (_, module))) = slot.and_then(|slot| Some((slot, slot.low_rank?))) else {
            return Ok((linear::matmul_nt(x, w)?, None));
        };
        let (y, xa) = if module.magnitude.is_some() {
            dora::forward(x, w, slot)?
        } else {
            let (a, b, s) = (&module.a, &module.b, module.scale as f32);
            match slot.mask(x)? {
                None => linear::lora_forward(x, w, a, b, s)?,
                Some(mask) => linear::lora_forward_dropped(x, &(x * mask)?, w, a, b, s)?,
            }
        };
        Ok((y, Some(xa)))
    }

    /// Backward of [`Self::forward_alone`]: adds the gradients of what is trained and returns dx
    /// [N, in] if `need_dx`.
    fn backward_alone(
        &self,
        dy: &Tensor,
        x: &Tensor,
        xa: Option<&Tensor>,
        slot: Option<&Slot<'_>>,
        need_dx: bool,
        grads: &mut LoraGrads,
    ) -> Result<Option<Tensor>> {
        let w = &self.weight;
        let low_rank = slot.and_then(|slot| Some((slot, slot.low_rank?)));
        let (Some((slot, (index, module))), Some(xa)) = (low_rank, xa) else {
            if let Some(slot) = slot {
                full::linear_backward(dy, x, slot, grads)?;
            }
            return need_dx.then(|| linear::matmul_nn(dy, w)).transpose();
        };
        if module.magnitude.is_some() {
            return dora::backward(dy, x, w, slot, xa, need_dx, grads);
        }
        let (a, b, s) = (&module.a, &module.b, module.scale as f32);
        let Some(mask) = slot.mask(x)? else {
            let (dx, da, db) = linear::lora_backward(dy, x, w, a, b, s, xa, need_dx)?;
            grads.add(index, &da, &db)?;
            return Ok(dx);
        };
        let dropped = (x * &mask)?;
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
    /// Dtype of the matrices, and so of what products may round their operands to.
    pub(crate) operands: DType,
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
    /// Of documents that share their beginnings, where the branch of each token ends; `docs` is then
    /// not read.
    pub(crate) ends: Option<&'a [usize]>,
}

impl Pass<'_> {
    fn setting(&self) -> attention::Setting<'_> {
        let Dims { window, operands, .. } = *self.dims;
        attention::Setting { docs: self.docs, scale: self.dims.scale(), window, operands }
    }

    /// Attention output and log-sum-exp, see [`attention::forward`].
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        match self.ends {
            Some(ends) => attention::forward_tree(q, k, v, ends, self.dims.scale()),
            None => attention::forward(q, k, v, &self.setting()),
        }
    }
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
    /// Gate and up, unless they are made again.
    mlp: Option<[Tensor; 2]>,
    /// Elementwise from gate and up; not kept.
    h: Option<Tensor>,
    /// x·Aᵀ of the adapted projections.
    xa: [Option<Tensor>; 7],
}

impl Activations {
    /// Without what is elementwise in the rest, and without Gate and Up if `keep` says so.
    pub(crate) fn slim(self, keep: Keep) -> Self {
        let mlp = self.mlp.filter(|_| keep == Keep::All);
        Self { n1: None, n2: None, h: None, mlp, ..self }
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

    /// y [N, out] of projections that read the same x, with their biases; x·Aᵀ goes into `xa`.
    fn project<const P: usize>(
        &self,
        x: &Tensor,
        ps: [Proj; P],
        adapter: &LayerAdapter<'_>,
        xa: &mut [Option<Tensor>; 7],
    ) -> Result<[Tensor; P]> {
        let slots = ps.map(|p| adapter.slot(p));
        let made = if slots.iter().flatten().any(|slot| slot.alone()) {
            let each = ps.iter().zip(slots).map(|(p, slot)| self.linear(*p).forward_alone(x, slot));
            each.collect::<Result<Vec<_>>>()?
        } else {
            linear::forward(x, &ps.map(|p| self.linear(p).with(adapter.slot(p))))?
        };
        let mut ys = Vec::with_capacity(P);
        for (p, (y, low)) in ps.into_iter().zip(made) {
            xa[p as usize] = low;
            ys.push(match &self.linear(p).bias {
                Some(bias) => y.broadcast_add(bias)?,
                None => y,
            });
        }
        ys.try_into().map_err(|_| candle_core::Error::Msg("a projection is missing".into()))
    }

    /// Backward of [`Self::project`]: adds the gradients of the adapters and returns dx [N, in] if
    /// `need_dx`. `x` is only called for where an adapter needs it.
    #[allow(clippy::too_many_arguments)]
    fn project_back<const P: usize>(
        &self,
        dys: [&Tensor; P],
        ps: [Proj; P],
        x: impl FnOnce() -> Result<Tensor>,
        adapter: &LayerAdapter<'_>,
        xa: &[Option<Tensor>; 7],
        need_dx: bool,
        grads: &mut LoraGrads,
    ) -> Result<Option<Tensor>> {
        let slots = ps.map(|p| adapter.slot(p));
        let x = slots.iter().any(Option::is_some).then(x).transpose()?;
        if let Some(x) = &x
            && slots.iter().flatten().any(|slot| slot.alone())
        {
            let mut sum: Option<Tensor> = None;
            for ((p, dy), slot) in ps.into_iter().zip(dys).zip(slots) {
                let xa = xa[p as usize].as_ref();
                let dx = self.linear(p).backward_alone(dy, x, xa, slot, need_dx, grads)?;
                sum = match (sum, dx) {
                    (Some(a), Some(b)) => Some(elementwise::add_scaled(&a, &b, 1.0)?),
                    (one, None) | (None, one) => one,
                };
            }
            return Ok(sum);
        }
        if x.is_none() && !need_dx {
            return Ok(None);
        }
        let layers = ps.map(|p| self.linear(p).with(adapter.slot(p)));
        let xas = ps.map(|p| xa[p as usize].as_ref());
        let (dx, gradients) = linear::backward(&dys, x.as_ref(), &layers, &xas, need_dx)?;
        for (slot, gradients) in slots.into_iter().zip(gradients) {
            let index = slot.and_then(|slot| slot.low_rank).map(|(index, _)| index);
            if let (Some(index), Some((da, db))) = (index, gradients) {
                grads.add(index, &da, &db)?;
            }
        }
        Ok(dx)
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
        let [mut q, mut k, v] = self.project(n1, [Proj::Q, Proj::K, Proj::V], adapter, xa)?;
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
        let (o, lse) = pass.attend(&q, &k, &v)?;
        let [attended] = self.project(&o.flatten_from(1)?, [Proj::O], adapter, &mut xa)?;
        let (x2, n2, rstd2) = rms_norm::add_forward(&attended, x, &self.mlp_norm, dims.eps)?;
        drop(attended);
        let mlp = self.project(&n2, [Proj::Gate, Proj::Up], adapter, &mut xa)?;
        let h = swiglu_forward(&mlp[0], &mlp[1], dims.act)?;
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
            mlp: Some(mlp),
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
        let [y] = self.project(&h, [Proj::Down], adapter, &mut acts.xa)?;
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
        // The rest of the layer needs none of this.
        (acts.n1, acts.n2) = (None, None);
        if let Some(h) = &acts.h {
            (acts.mlp, acts.h) = (None, Some(h.clone()));
        }
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
        if let Some(slot) = down.filter(|slot| slot.low_rank.is_some()) {
            let mut h = acts.h(pass.dims)?;
            if let Some(mask) = slot.mask(&h)? {
                h = (h * mask)?;
            }
            let down = self.linear(Proj::Down).with(Some(slot));
            acts.xa[Proj::Down as usize] = Some(linear::low_rank(&h, &down)?);
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
        let mut xa = std::mem::take(&mut acts.xa);

        // MLP
        if acts.mlp.is_none() {
            let n2 = self.norm2(&acts.x2, dims)?.0;
            acts.mlp = Some(self.project(&n2, [Proj::Gate, Proj::Up], adapter, &mut xa)?);
            acts.n2 = Some(n2);
        }
        let h = || acts.h(dims);
        let dh = self.project_back([dy], [Proj::Down], h, adapter, &xa, reach_gated, grads)?;
        let Some(dh) = dh else { return Ok(None) };
        let [gate, up] = acts.mlp.take().map_or_else(|| candle_core::bail!("no gate"), Ok)?;
        acts.h = None;
        let (dgate, dup) = swiglu_backward(&dh, &gate, &up, dims.act)?;
        drop((dh, gate, up));
        let n2 = || match acts.n2.take() {
            Some(n2) => Ok(n2),
            None => Ok(self.norm2(&acts.x2, dims)?.0),
        };
        let ps = [Proj::Gate, Proj::Up];
        let dn2 = self.project_back([&dgate, &dup], ps, n2, adapter, &xa, reach_middle, grads)?;
        drop((dgate, dup));
        let Some(dn2) = dn2 else { return Ok(None) };
        full::norm_backward(norm2, &dn2, &acts.x2, &acts.rstd2, grads)?;
        let dx2 = rms_norm::backward_add(&dn2, &acts.x2, &self.mlp_norm, &acts.rstd2, Some(dy))?;
        drop(dn2);

        // Attention
        let o = || acts.o.flatten_from(1);
        let Some(dattended) =
            self.project_back([&dx2], [Proj::O], o, adapter, &xa, reach_attention, grads)?
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
            &pass.setting(),
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
        let n1 = || match acts.n1.take() {
            Some(n1) => Ok(n1),
            None => Ok(self.norm1(&acts.x, dims)?.0),
        };
        let tokens = pass.positions.len();
        let flat = |d: Tensor| d.reshape((tokens, ()));
        let (dq, dk, dv) = (flat(dq)?, flat(dk)?, flat(dv)?);
        let ps = [Proj::Q, Proj::K, Proj::V];
        let dn1 = self.project_back([&dq, &dk, &dv], ps, n1, adapter, &xa, reach_norm1, grads)?;
        drop((dq, dk, dv));
        let Some(dn1) = dn1 else { return Ok(None) };
        full::norm_backward(norm1, &dn1, &acts.x, &acts.rstd1, grads)?;
        if !need_dx {
            return Ok(None);
        }
        let (x, norm, rstd) = (&acts.x, &self.input_norm, &acts.rstd1);
        Ok(Some(rms_norm::backward_add(&dn1, x, norm, rstd, Some(&dx2))?))
    }

    /// Forward of the first tokens of one document, whose cache is empty, or of one further token of
    /// each of several, whose keys and values so far stand in `caches`.
    pub(crate) fn forward_cached(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        adapter: &LayerAdapter<'_>,
        caches: &mut [&mut KvCache],
    ) -> Result<Tensor> {
        let dims = pass.dims;
        let mut xa: [Option<Tensor>; 7] = Default::default();
        let (n1, _) = self.norm1(x, dims)?;
        let (q, k, v, _) = self.qkv(&n1, pass, adapter, &mut xa)?;
        let o = match caches {
            [cache] if cache.len == 0 => {
                cache.append(&k, &v)?;
                pass.attend(&q, &k, &v)?.0
            }
            _ => {
                let rows = caches.par_iter_mut().enumerate();
                let rows = rows.map(|(i, cache)| {
                    cache.append(&k.narrow(0, i, 1)?, &v.narrow(0, i, 1)?)?;
                    cache.attend(&q.narrow(0, i, 1)?, dims)
                });
                Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)?
            }
        };
        let [attended] = self.project(&o.flatten_from(1)?, [Proj::O], adapter, &mut xa)?;
        let (x2, n2, _) = rms_norm::add_forward(&attended, x, &self.mlp_norm, dims.eps)?;
        let [gate, up] = self.project(&n2, [Proj::Gate, Proj::Up], adapter, &mut xa)?;
        let h = swiglu_forward(&gate, &up, dims.act)?;
        let [y] = self.project(&h, [Proj::Down], adapter, &mut xa)?;
        elementwise::add_scaled(&x2, &y, 1.0)
    }
}

impl Activations {
    /// The gated product, kept or made again.
    fn h(&self, dims: &Dims) -> Result<Tensor> {
        match (&self.h, &self.mlp) {
            (Some(h), _) => Ok(h.clone()),
            (None, Some([gate, up])) => swiglu_forward(gate, up, dims.act),
            (None, None) => candle_core::bail!("gate and up were not kept"),
        }
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

    /// Attention of the last token, q [1, heads, D], over all tokens so far.
    fn attend(&self, q: &Tensor, dims: &Dims) -> Result<Tensor> {
        let (Some(k), Some(v)) = (&self.k, &self.v) else {
            candle_core::bail!("the cache of keys and values is empty")
        };
        let (_, _, width) = q.dims3()?;
        let group = dims.heads / dims.kv_heads;
        let start = dims.window.map_or(0, |window| self.len.saturating_sub(window));
        let seen = self.len - start;
        let (k, v) = (k.narrow(1, start, seen)?, v.narrow(1, start, seen)?);
        let q = q.reshape((dims.kv_heads, group, width))?;
        let scores = (q.matmul(&k.t()?)?.to_dtype(wide(q.dtype()))? * f64::from(dims.scale()))?;
        let max = scores.max_keepdim(2)?;
        let weights = scores.broadcast_sub(&max)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(2)?)?.to_dtype(v.dtype())?;
        weights.matmul(&v.contiguous()?)?.reshape((1, dims.heads, width))
    }
}

fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { dtype } else { DType::F32 }
}
