//! Activations and scratch of a pass, allocated once and used again as long as batches fit.
//!
//! Strides depend on the adapter's ranks, which may differ between layers, so that a buffer here is
//! bytes for the widest; [`super::pass`] knows how it is laid out.

use std::time::Instant;

use lora_flow_kernels::cuda::ops;
use lora_flow_kernels::cuda::{Buffer, Copier, CudaError, DevicePtr, Product};

use super::CudaDecoder;
use super::away::{self, GateUp, Keep, Speed};
use super::batch::{DeviceBatch, rope_table};
use super::ring::{RING, Ring};
use super::weights::{DOWN, GATE_UP, O, QKV, Weights};
use crate::decoder::Checkpoint;

/// Values from one row to the next: rows start at multiples of 128 bytes, which products are a few
/// per cent faster with.
pub(super) fn padded(width: usize) -> usize {
    width.next_multiple_of(64)
}

/// What a layer leaves for its backward, besides its input and the MLP's gate and up.
pub(super) struct Kept {
    /// [N, q + k + v]: rotated q and k, and v.
    pub(super) qkv: Buffer<u8>,
    /// q and k before their norms, where the model has them, and 1/σ.
    pub(super) qk: Option<(Buffer<u8>, Buffer<f32>, Buffer<f32>)>,
    /// [N, q + r]: the attention's output and its x·Aᵀ.
    pub(super) o: Buffer<u8>,
    /// [heads, N]
    pub(super) lse: Buffer<f32>,
    /// [N, H]: the residual stream between attention and MLP.
    pub(super) x2: Buffer<u8>,
    pub(super) rstd1: Buffer<f32>,
    pub(super) rstd2: Buffer<f32>,
    /// x·Aᵀ of the inputs of q, k, v; gate, up; down: [N, r].
    pub(super) low: [Buffer<u8>; 3],
}

impl Kept {
    /// Places of all of it and their bytes.
    fn parts(&self) -> Vec<(DevicePtr, usize)> {
        let bytes = |b: &Buffer<u8>| (b.ptr(), b.len());
        let floats = |b: &Buffer<f32>| (b.ptr(), 4 * b.len());
        let mut parts: Vec<_> = [&self.qkv, &self.o, &self.x2].into_iter().map(bytes).collect();
        parts.extend(self.low.iter().map(bytes));
        parts.extend([&self.lse, &self.rstd1, &self.rstd2].map(floats));
        if let Some((before, q, k)) = &self.qk {
            parts.extend([bytes(before), floats(q), floats(k)]);
        }
        parts
    }
}

/// What a training pass asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) checkpoint: Checkpoint,
    pub(super) lowest: usize,
}

/// What decides the sizes of the buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sizes {
    tokens: usize,
    picked: usize,
    wanted: Option<Wanted>,
    ranks: [usize; 4],
    limit: Option<u64>,
    host: u64,
}

pub(super) struct Arena {
    sizes: Sizes,
    /// The residual stream after each layer, [N, H]; two in turns where nothing is kept. That before
    /// the first, the embeddings, stands in the place of the first layer's output, to be read again in
    /// the backward,
    x: Vec<Buffer<u8>>,
    /// or, where reading them is slow and there is room, here.
    embedded: Option<Buffer<u8>>,
    in_turns: bool,
    /// With checkpointing: what takes the streams and the kept activations to the host.
    pub(super) ring: Option<Ring>,
    /// Kept activations of each layer that keeps its own, behind one set of scratch if others do not.
    kept: Vec<Kept>,
    /// First layer that keeps activations.
    keeps: usize,
    /// Gate and up, [N, 2F + r].
    pub(super) gate_up: GateUp,
    /// Scratch of one layer: the next two, one behind the other.
    scratch: Buffer<u8>,
    /// A normalised input with its x·Aᵀ, [N, H + r].
    pub(super) n: DevicePtr,
    /// The gated product with its x·Aᵀ, [N, F + r]; in the backward first its gradient, and later
    /// the gradient of q, k and v with dy·s·B beside, [N, q + k + v + r].
    pub(super) h: DevicePtr,
    /// Logits of a chunk, where the scratch is too small for them.
    logits: Option<Buffer<u8>>,
    /// Whether they go to the buffer of gate and up, else to the scratch.
    logits_in_gate_up: bool,
    /// Rows of a chunk.
    pub(super) chunk: usize,
    /// Input of the head for a chunk, 1/σ, and −ln p of all supervised positions.
    pub(super) top: Buffer<u8>,
    pub(super) top_rstd: Buffer<f32>,
    pub(super) nll: Buffer<f32>,
    pub(super) backward: Option<Backward>,
    pub(super) rope: Buffer<f32>,
    rope_len: usize,
}

/// Gradients of activations.
pub(super) struct Backward {
    /// Of the residual stream, with dy·s·B beside: [N, H + r].
    pub(super) d: Buffer<u8>,
    /// Its row stride.
    pub(super) ld: usize,
    /// Of a normalised input [N, H], and in between of the attention's output [N, q].
    pub(super) dn: DevicePtr,
    pub(super) delta: Buffer<f32>,
    /// Partial sums of the MLP's backward in one pass ([`ops::gated_back`]), where it can be: those of
    /// dy·s·B go to the place of a normalised input, those of the gradients here.
    pub(super) gated: Option<Buffer<f32>>,
}

/// Rows of logits at a time, where there is room, and the fewest that products are fast with.
const LOGITS_ROWS: usize = 2048;
const FEW_LOGITS_ROWS: usize = 1024;
/// Bytes of the device that are left to others.
const SPARE: u64 = 1 << 30;

impl Arena {
    /// The arena that a batch needs: the one there is, if it is large enough.
    pub(super) fn ready<'a>(
        slot: &'a mut Option<Self>,
        decoder: &CudaDecoder,
        weights: &mut Weights,
        batch: &DeviceBatch,
        wanted: Option<Wanted>,
        host: u64,
    ) -> Result<&'a Self, CudaError> {
        let sizes = Sizes {
            tokens: batch.tokens,
            picked: batch.picked,
            wanted,
            ranks: [QKV, O, GATE_UP, DOWN].map(|g| weights.widest(g)),
            limit: decoder.limit,
            host,
        };
        let fits = |a: &Self| {
            let (tokens, picked) = (a.sizes.tokens, a.sizes.picked);
            let same = Sizes { tokens, picked, ..sizes } == a.sizes;
            same && tokens >= sizes.tokens && picked >= sizes.picked
        };
        if !slot.as_ref().is_some_and(fits) {
            // Freed first: both together might not fit.
            let old = slot.take().map(|a| a.sizes);
            let same = old.filter(|o| Sizes { tokens: o.tokens, picked: o.picked, ..sizes } == *o);
            let grown = Sizes {
                tokens: sizes.tokens.max(same.map_or(0, |o| o.tokens)),
                picked: sizes.picked.max(same.map_or(0, |o| o.picked)),
                ..sizes
            };
            *slot = Some(Self::new(decoder, weights, grown, batch.longest)?);
        }
        let Some(arena) = slot else {
            return Err(CudaError {
                message: "there are no buffers".into(),
                hint: None,
                out_of_memory: false,
            });
        };
        if arena.rope_len < batch.longest {
            let len = batch.longest.next_power_of_two();
            arena.rope = decoder.gpu.upload(&rope_table(&decoder.config, len))?;
            arena.rope_len = len;
        }
        Ok(arena)
    }

    fn new(
        decoder: &CudaDecoder,
        weights: &mut Weights,
        sizes: Sizes,
        longest: usize,
    ) -> Result<Self, CudaError> {
        let (gpu, config) = (&decoder.gpu, &decoder.config);
        let size = decoder.element.size();
        let n = sizes.tokens;
        let layers = config.num_hidden_layers;
        let (h, f) = (config.hidden_size, config.intermediate_size);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        let [r1, r2, r3, r4] = sizes.ranks;
        let matrix = |width: usize| gpu.alloc::<u8>(n * width * size);

        let (lowest, training) =
            (sizes.wanted.map_or(layers, |w| w.lowest), sizes.wanted.is_some());
        let full = sizes.wanted.is_none_or(|w| w.checkpoint == Checkpoint::Full);
        let rope_len = longest.next_power_of_two();
        let rope = gpu.upload(&rope_table(config, rope_len))?;
        // Both are free at the top, where logits go. In the backward the second holds h or, later,
        // the gradient of q, k and v with that of a normalised input behind it.
        let qkv = padded(q + 2 * kv + r1);
        let behind = if training { qkv + h.max(q) } else { 0 };
        let first = n * padded(h + r1.max(r3)) * size;
        let second = n * padded(f + r4).max(qkv).max(behind) * size;
        let scratch = gpu.alloc::<u8>(first + second)?;
        let part = [scratch.ptr(), scratch.ptr() + first as u64];
        let backward = match training {
            false => None,
            true => Some(Backward {
                d: matrix(padded(h + r2.max(r4)))?,
                ld: padded(h + r2.max(r4)),
                dn: part[1] + (n * qkv * size) as u64,
                delta: gpu.alloc(n * config.num_attention_heads)?,
                gated: match ops::gated_room(gpu, n, f) {
                    Some((low, sums)) if size == 2 && r3 > 0 && 4 * low <= first => {
                        Some(gpu.alloc(sums)?)
                    }
                    _ => None,
                },
            }),
        };
        let kept = |sets: usize| -> Result<Vec<Kept>, CudaError> {
            (0..sets)
                .map(|_| {
                    let qk = match config.qk_norm {
                        false => None,
                        true => Some((
                            matrix(q + kv)?,
                            gpu.alloc(n * config.num_attention_heads)?,
                            gpu.alloc(n * config.num_key_value_heads)?,
                        )),
                    };
                    Ok(Kept {
                        qkv: matrix(q + 2 * kv)?,
                        qk,
                        o: matrix(padded(q + r2))?,
                        lse: gpu.alloc(n * config.num_attention_heads)?,
                        x2: matrix(h)?,
                        rstd1: gpu.alloc(n)?,
                        rstd2: gpu.alloc(n)?,
                        low: [matrix(r1)?, matrix(r3)?, matrix(r4)?],
                    })
                })
                .collect()
        };
        let gate_up = n * padded(2 * f + r3) * size;
        let one = GateUp::one(gpu.alloc::<u8>(gate_up)?, layers);

        // With checkpointing, what the first half of a layer leaves goes to the host if that is
        // faster than to compute it again.
        let (mut sets, mut ring) = (kept(1)?, None);
        if training && full && lowest == 0 && layers > RING {
            sets.extend(kept(1)?);
            let bytes = sets[0].parts().iter().map(|p| p.1).sum::<usize>() + n * h * size;
            if sizes.host >= ((layers - 2) * bytes) as u64 {
                let copier = Copier::new(gpu, layers)?;
                let speed = trial(decoder, weights, &copier, (part[0], n), one.at(0, false))?;
                let copy = |t: &Speed| t.copy * bytes as f64 / gate_up as f64;
                if speed.is_some_and(|t| copy(&t) <= 1.1 * t.forward) {
                    ring = Ring::new(copier, layers, bytes);
                }
            }
        }
        let keeps = if full && ring.is_none() { layers } else { lowest };
        sets.truncate(if ring.is_some() { 2 } else { usize::from(keeps > 0) });
        sets.extend(kept(if ring.is_some() { 0 } else { layers - keeps })?);
        let kept = sets;
        let streams = match ring {
            _ if !training => 2,
            Some(_) => RING,
            None => layers,
        };
        let x = (0..streams).map(|_| matrix(h)).collect::<Result<_, _>>()?;

        // What others leave, and what a limit does.
        let room = || -> Result<u64, CudaError> {
            let free = (gpu.free_memory()?.0 as u64).saturating_sub(SPARE);
            Ok(sizes.limit.map_or(free, |limit| free.min(limit.saturating_sub(gpu.memory().0))))
        };
        let others = if full { 0 } else { layers - lowest - 1 };
        // A row of embeddings is read once a token; what takes its place, several times.
        let mut host = sizes.host;
        if room()? < (others * gate_up) as u64 {
            host -= weights.embed_on_host(gpu, host)?;
        }
        let ld = config.vocab_size.next_multiple_of(8) * size;
        let all = sizes.picked.max(64);
        let fits = (room()? / ld as u64).saturating_sub((others * gate_up / ld) as u64) as usize;
        // Where gate and up are computed again, their buffer is free at the top as well.
        let there = if full { scratch.len().max(gate_up) } else { scratch.len() } / ld;
        let even = |rows: usize| match rows.min(all) {
            rows if rows >= FEW_LOGITS_ROWS => rows / FEW_LOGITS_ROWS * FEW_LOGITS_ROWS,
            rows => (rows / 64 * 64).max(64),
        };
        let (chunk, logits) = match even(there) {
            rows if full && there >= 64 => (rows, None),
            rows if fits < LOGITS_ROWS && rows >= FEW_LOGITS_ROWS.min(all) => (rows, None),
            _ => {
                let rows = even(if fits < LOGITS_ROWS { FEW_LOGITS_ROWS } else { LOGITS_ROWS });
                (rows, Some(gpu.alloc::<u8>(rows * ld)?))
            }
        };
        let top = gpu.alloc::<u8>(chunk * h * size)?;
        let top_rstd = gpu.alloc(chunk)?;
        let nll = gpu.alloc(sizes.picked.max(1))?;

        let mut arena = Self {
            sizes,
            x,
            embedded: None,
            in_turns: !training,
            ring,
            kept,
            keeps,
            gate_up: one,
            n: part[0],
            h: part[1],
            logits_in_gate_up: full && gate_up > scratch.len(),
            scratch,
            logits,
            chunk,
            top,
            top_rstd,
            nll,
            backward,
            rope,
            rope_len,
        };
        // Gate and up are most of what a layer keeps.
        if !full {
            let buffers = (0..others.min((room()? / gate_up as u64) as usize))
                .map(|_| gpu.alloc::<u8>(gate_up))
                .collect::<Result<_, _>>()?;
            arena.place_gate_up(decoder, weights, lowest, buffers, host)?;
            if weights.embeds_from_host() && lowest == 0 && room()? >= (n * h * size) as u64 {
                arena.embedded = Some(matrix(h)?);
            }
        }
        Ok(arena)
    }

    /// Decides where gate and up of each layer stay, with more buffers than the one there is.
    fn place_gate_up(
        &mut self,
        decoder: &CudaDecoder,
        weights: &Weights,
        lowest: usize,
        mut buffers: Vec<Buffer<u8>>,
        host: u64,
    ) -> Result<(), CudaError> {
        let layers = weights.layers.len() - lowest;
        let bytes = self.gate_up.at(0, false).len();
        let most = (host / bytes as u64) as usize;
        let (mut copier, mut speed) = (None, None);
        if buffers.len() + 1 < layers && most > 0 {
            let new = Copier::new(&decoder.gpu, weights.layers.len() + 1)?;
            let x = (self.n, self.sizes.tokens);
            speed = trial(decoder, weights, &new, x, self.gate_up.at(0, false))?;
            copier = Some(new);
        }
        let mut plan = away::plan(layers, buffers.len() + 1, most, speed);
        let mut host = Vec::new();
        for keep in &mut plan {
            let memory = copier.as_ref().filter(|_| *keep == Keep::Away);
            host.push(memory.and_then(|copier| copier.host(bytes)));
            if *keep == Keep::Away && host.last().is_some_and(Option::is_none) {
                // The host had less than it said.
                *keep = Keep::Again;
            }
        }
        buffers.extend(self.gate_up.take_one());
        self.gate_up = GateUp::new(buffers, lowest, plan, copier, host);
        Ok(())
    }

    /// The residual stream that enters a layer; after the last, that of layer L.
    pub(super) fn x(&self, layer: usize) -> &Buffer<u8> {
        if let (0, Some(embedded)) = (layer, &self.embedded) {
            return embedded;
        }
        &self.x[match self.ring {
            Some(_) => layer % RING,
            None if self.in_turns => layer % 2,
            None => layer.saturating_sub(1),
        }]
    }

    /// Whether the first layer's input is gone when its backward begins.
    pub(super) fn embeds_again(&self) -> bool {
        self.ring.is_none() && self.embedded.is_none()
    }

    /// Whether a layer's activations stay until its backward.
    pub(super) fn keeps(&self, layer: usize) -> bool {
        layer >= self.keeps
    }

    /// Where a layer's activations go.
    pub(super) fn kept(&self, layer: usize) -> &Kept {
        if self.ring.is_some() {
            return &self.kept[layer % 2];
        }
        let own = usize::from(self.keeps > 0) + layer.saturating_sub(self.keeps);
        &self.kept[if self.keeps(layer) { own } else { 0 }]
    }

    /// What a layer leaves for its backward besides gate and up: places and their bytes.
    pub(super) fn parts(&self, layer: usize) -> Vec<(DevicePtr, usize)> {
        let x = self.x(layer);
        let mut parts = self.kept(layer).parts();
        parts.push((x.ptr(), x.len()));
        parts
    }

    /// Where logits go.
    pub(super) fn logits(&self) -> DevicePtr {
        match &self.logits {
            Some(logits) => logits.ptr(),
            None if self.logits_in_gate_up => self.gate_up.at(0, false).ptr(),
            None => self.scratch.ptr(),
        }
    }
}

/// How long a layer's forward and the copy of its gate and up take, by a trial with scratch for `m`
/// inputs and the buffer of gate and up. Nothing that is computed depends on it.
fn trial(
    decoder: &CudaDecoder,
    weights: &Weights,
    copier: &Copier,
    (x, m): (DevicePtr, usize),
    buffer: &Buffer<u8>,
) -> Result<Option<Speed>, CudaError> {
    let gpu = &decoder.gpu;
    let Some(layer) = weights.layers.last() else { return Ok(None) };
    let Some(host) = copier.host(buffer.len()) else { return Ok(None) };
    let group = &layer.groups[GATE_UP];
    let (n, k) = (group.output, group.input);
    let to = (buffer.ptr(), padded(n + group.r));
    let product = Product {
        m,
        n,
        k,
        a: (x, padded(k + group.r)),
        a_t: false,
        b: group.w(),
        b_t: true,
        c: to,
        add: to,
        alpha: 1.0,
        beta: 0.0,
        input: decoder.element,
        output: decoder.element,
    };
    // Values as of a norm: products of zeros would be faster.
    let e = decoder.element;
    ops::fill_uniform(gpu, e, product.a, m, k, 1, 1.0)?;
    let timed = |work: &dyn Fn() -> Result<(), CudaError>| {
        work()?;
        let start = Instant::now();
        work()?;
        Ok::<_, CudaError>(start.elapsed().as_secs_f64() * 1e3)
    };
    let product = timed(&|| {
        gpu.product(&product)?;
        gpu.wait()
    })?;
    let copy = timed(&|| {
        copier.send(0, &host, &[(buffer.ptr(), buffer.len())])?;
        copier.finish()
    })?;
    let linear: usize = layer.groups.iter().map(|g| g.input * g.output).sum();
    // Attention and what is elementwise are about a quarter above the products.
    let forward = product * linear as f64 / (n * k) as f64 * 1.25;
    let copy = if decoder.fast_copies { 0.0 } else { copy };
    Ok(Some(Speed { forward, copy, again: product }))
}
