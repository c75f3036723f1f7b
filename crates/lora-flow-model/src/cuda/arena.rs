//! Activations and scratch of a pass, allocated once and used again as long as batches fit.
//!
//! Strides depend on the adapter's ranks, which may differ between layers, so that a buffer here is
//! bytes for the widest; [`super::pass`] knows how it is laid out.

use lora_flow_kernels::cuda::{Buffer, CudaError};

use super::CudaDecoder;
use super::batch::{DeviceBatch, rope_table};
use super::weights::{DOWN, GATE_UP, O, QKV, Weights};
use crate::decoder::Checkpoint;

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
}

pub(super) struct Arena {
    sizes: Sizes,
    /// The residual stream before each layer and after the last, [N, H]; two in turns where
    /// nothing is kept.
    x: Vec<Buffer<u8>>,
    /// Sets of kept activations: one of scratch, and one for each layer that keeps its own.
    kept: Vec<Kept>,
    /// Gate and up [N, 2F + r]: one of scratch, and one for each layer that keeps its own.
    gate_up: Vec<Buffer<u8>>,
    /// First layer that keeps activations, and first layer that keeps gate and up.
    keeps: (usize, usize),
    /// A normalised input with its x·Aᵀ, [N, H + r].
    pub(super) n: Buffer<u8>,
    /// The gated product with its x·Aᵀ, [N, F + r]; in the backward first its gradient, and later
    /// the gradient of q, k and v with dy·s·B beside, [N, q + k + v + r].
    pub(super) h: Buffer<u8>,
    /// Logits of a chunk.
    logits: Option<Buffer<u8>>,
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
    pub(super) dn: Buffer<u8>,
    pub(super) delta: Buffer<f32>,
}

/// Rows of logits at a time: as many as fit in about this many bytes.
const LOGITS_BYTES: usize = 512 << 20;

impl Arena {
    /// The arena that a batch needs: the one there is, if it is large enough.
    pub(super) fn ready<'a>(
        slot: &'a mut Option<Self>,
        decoder: &CudaDecoder,
        weights: &Weights,
        batch: &DeviceBatch,
        wanted: Option<Wanted>,
    ) -> Result<&'a Self, CudaError> {
        let sizes = Sizes {
            tokens: batch.tokens,
            picked: batch.picked,
            wanted,
            ranks: [QKV, O, GATE_UP, DOWN].map(|g| weights.widest(g)),
            limit: decoder.limit,
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
            *slot = Some(Self::new(decoder, grown, batch.longest)?);
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

    fn new(decoder: &CudaDecoder, sizes: Sizes, longest: usize) -> Result<Self, CudaError> {
        let (gpu, config) = (&decoder.gpu, &decoder.config);
        let size = decoder.element.size();
        let n = sizes.tokens;
        let layers = config.num_hidden_layers;
        let (h, f) = (config.hidden_size, config.intermediate_size);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        let [r1, r2, r3, r4] = sizes.ranks;
        let matrix = |width: usize| gpu.alloc::<u8>(n * width * size);

        let mut keeps = (layers, layers);
        if let Some(wanted) = sizes.wanted
            && wanted.checkpoint == Checkpoint::None
        {
            keeps = (wanted.lowest, wanted.lowest);
        }
        let rope_len = longest.next_power_of_two();
        let rope = gpu.upload(&rope_table(config, rope_len))?;
        let streams = if sizes.wanted.is_some() { layers + 1 } else { 2 };
        let x = (0..streams).map(|_| matrix(h)).collect::<Result<_, _>>()?;
        let backward = match sizes.wanted {
            None => None,
            Some(_) => Some(Backward {
                d: matrix(h + r2.max(r4))?,
                ld: h + r2.max(r4),
                dn: matrix(h.max(q))?,
                delta: gpu.alloc(n * config.num_attention_heads)?,
            }),
        };
        let scratch = (matrix(h + r1.max(r3))?, matrix((f + r4).max(q + 2 * kv + r1))?);
        let kept = |own: usize| -> Result<Vec<Kept>, CudaError> {
            (0..=own)
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
                        o: matrix(q + r2)?,
                        lse: gpu.alloc(n * config.num_attention_heads)?,
                        x2: matrix(h)?,
                        rstd1: gpu.alloc(n)?,
                        rstd2: gpu.alloc(n)?,
                        low: [matrix(r1)?, matrix(r3)?, matrix(r4)?],
                    })
                })
                .collect()
        };
        let kept = kept(layers - keeps.0)?;
        let gate_up = 2 * f + r3;

        // The logits of a chunk: the scratch of gate and up is free at the top and serves for them,
        // unless it is small and there is memory to spare.
        let ld = config.vocab_size.next_multiple_of(8) * size;
        let all = sizes.picked.max(64);
        let scratch_bytes = n * gate_up * size;
        let rows = |bytes: usize| (bytes / ld / 64 * 64).clamp(64, 2048).min(all);
        let full = sizes.wanted.is_some_and(|w| w.checkpoint == Checkpoint::Full);
        let shared = rows(scratch_bytes) >= 1024.min(all) || full && scratch_bytes / ld >= 64;
        let chunk = if shared { rows(scratch_bytes) } else { rows(LOGITS_BYTES) };
        let logits = if shared { None } else { Some(gpu.alloc::<u8>(chunk * ld)?) };
        let top = gpu.alloc::<u8>(chunk * h * size)?;
        let top_rstd = gpu.alloc(chunk)?;
        let nll = gpu.alloc(sizes.picked.max(1))?;

        // Gate and up are most of what a layer keeps: those of as many layers as there is room for,
        // from the top; the others compute them again.
        let mut gates = vec![matrix(gate_up)?];
        if keeps.1 < layers {
            let (free, _) = gpu.free_memory()?;
            let used = gpu.memory().0;
            let room = (free as u64).saturating_sub(1 << 30);
            let room = match sizes.limit {
                Some(limit) => room.min(limit.saturating_sub(used)),
                None => room,
            };
            let count =
                (room / scratch_bytes.max(1) as u64).min((layers - keeps.1) as u64) as usize;
            keeps.1 = layers - count;
            for _ in 0..count {
                gates.push(matrix(gate_up)?);
            }
        }
        Ok(Self {
            sizes,
            x,
            kept,
            gate_up: gates,
            keeps,
            n: scratch.0,
            h: scratch.1,
            logits,
            chunk,
            top,
            top_rstd,
            nll,
            backward,
            rope,
            rope_len,
        })
    }

    /// The residual stream that enters a layer; after the last, that of layer L.
    pub(super) fn x(&self, layer: usize) -> &Buffer<u8> {
        &self.x[if self.x.len() == 2 { layer % 2 } else { layer }]
    }

    /// Whether a layer's activations stay until its backward.
    pub(super) fn keeps(&self, layer: usize) -> bool {
        layer >= self.keeps.0
    }

    /// Whether a layer's gate and up do.
    pub(super) fn keeps_gate_up(&self, layer: usize) -> bool {
        layer >= self.keeps.1
    }

    /// Where a layer's activations go.
    pub(super) fn kept(&self, layer: usize) -> &Kept {
        &self.kept[if self.keeps(layer) { layer + 1 - self.keeps.0 } else { 0 }]
    }

    /// Where its gate and up go.
    pub(super) fn gate_up(&self, layer: usize) -> &Buffer<u8> {
        &self.gate_up[if self.keeps_gate_up(layer) { layer + 1 - self.keeps.1 } else { 0 }]
    }

    /// Where logits go.
    pub(super) fn logits(&self) -> &Buffer<u8> {
        self.logits.as_ref().unwrap_or(&self.gate_up[0])
    }
}
