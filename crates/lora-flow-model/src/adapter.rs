//! What a pass through the decoder sees of an adapter: its modules by layer and projection,
//! the tensors trained as a whole, dropout masks, and the buffers gradients are added to.

use std::sync::OnceLock;

use candle_core::{DType, Result as CandleResult, Tensor};
use lora_flow_core::{Error, Result};
use rayon::prelude::*;

use crate::config::ModelConfig;
use crate::dora;
use crate::layer::Proj;
use crate::lora::{Lora, LoraModule};

/// Key of the dropout masks of one pass. The mask of an element is a function of this key, of the
/// module and of the element's place, so a recomputed forward draws the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DropoutKey(pub u64);

/// One projection with something trained on it: a low-rank module, or itself.
#[derive(Debug, Default)]
pub(crate) struct Slot<'a> {
    /// The low-rank module and its index among those of the adapter.
    pub(crate) low_rank: Option<(usize, &'a LoraModule)>,
    /// Index of the whole weight among the saved tensors.
    pub(crate) weight: Option<usize>,
    /// Index of the whole bias among the saved tensors.
    pub(crate) bias: Option<usize>,
    /// Probability and key, while training with dropout.
    dropout: Option<(f64, u64)>,
    /// Row norms of W + sBA, once asked for.
    norms: OnceLock<Tensor>,
}

impl Slot<'_> {
    /// m/‖W + sBA‖ and the norms of a DoRA module, both [out]; the norms are made once a pass.
    pub(crate) fn dora(&self, weight: &Tensor) -> CandleResult<Option<(Tensor, &Tensor)>> {
        let Some((_, module)) = self.low_rank else { return Ok(None) };
        let Some(magnitude) = &module.magnitude else { return Ok(None) };
        let norms = match self.norms.get() {
            Some(norms) => norms,
            None => {
                let (a, b) = (&module.a, &module.b);
                let norms = dora::row_norms(weight, Some((a, b, module.scale)))?;
                self.norms.get_or_init(|| norms)
            }
        };
        Ok(Some(((magnitude / norms)?, norms)))
    }

    /// Whether the projection cannot be multiplied together with others that read the same input:
    /// its low-rank path drops elements of the input, it is DoRA, or it is trained as a whole.
    pub(crate) fn alone(&self) -> bool {
        self.dropout.is_some()
            || self.weight.is_some()
            || self.bias.is_some()
            || self.low_rank.is_some_and(|(_, module)| module.magnitude.is_some())
    }

    /// The dropout mask for an input of the module: 0 or 1/(1 − p), in the input's shape and dtype.
    pub(crate) fn mask(&self, x: &Tensor) -> CandleResult<Option<Tensor>> {
        let Some((p, key)) = self.dropout else { return Ok(None) };
        let mask = dropout_mask(x.elem_count(), p, key);
        let mask = Tensor::from_vec(mask, x.shape(), &candle_core::Device::Cpu)?;
        Ok(Some(mask.to_device(x.device())?.to_dtype(x.dtype())?))
    }
}

/// `len` elements that are 0 with probability `p` and 1/(1 − p) otherwise.
fn dropout_mask(len: usize, p: f64, key: u64) -> Vec<f32> {
    const BLOCK: usize = 16 * 1024;
    let threshold = (p * 2f64.powi(32)) as u64;
    let keep = (1.0 / (1.0 - p)) as f32;
    let mut mask = vec![0f32; len];
    mask.par_chunks_mut(BLOCK).enumerate().for_each(|(block, cells)| {
        for (i, pair) in cells.chunks_mut(2).enumerate() {
            let bits = mix(key, (block * BLOCK / 2 + i) as u64);
            let halves = [bits & 0xffff_ffff, bits >> 32];
            for (cell, half) in pair.iter_mut().zip(halves) {
                *cell = if half < threshold { 0.0 } else { keep };
            }
        }
    });
    mask
}

/// The `counter`-th output of SplitMix64 (Steele, Lea & Flood 2014) started at `key`.
fn mix(key: u64, counter: u64) -> u64 {
    let mut z = key.wrapping_add(counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Key of the mask of one linear layer, by its index among all of the model.
pub(crate) fn linear_key(DropoutKey(key): DropoutKey, at: usize) -> u64 {
    mix(key, at as u64)
}

/// What is trained in one layer.
#[derive(Debug, Default)]
pub(crate) struct LayerAdapter<'a> {
    slots: [Option<Slot<'a>>; 7],
    /// Index among the saved tensors of the norms before attention and MLP, and of those of q and
    /// k, in this order.
    pub(crate) norms: [Option<usize>; 4],
}

impl<'a> LayerAdapter<'a> {
    pub(crate) fn slot(&self, p: Proj) -> Option<&Slot<'a>> {
        self.slots[p as usize].as_ref()
    }

    /// Ranks of all its modules together.
    pub(crate) fn ranks(&self) -> usize {
        self.slots.iter().flatten().filter_map(|slot| slot.low_rank).map(|(_, m)| m.r).sum()
    }

    fn is_empty(&self) -> bool {
        self.slots.iter().all(Option::is_none) && self.norms.iter().all(Option::is_none)
    }
}

/// What is trained, by its place.
#[derive(Debug)]
pub(crate) struct AdapterMap<'a> {
    pub(crate) layers: Vec<LayerAdapter<'a>>,
    /// Indices among the saved tensors.
    pub(crate) embed: Option<usize>,
    pub(crate) norm: Option<usize>,
    /// That of the embedding where the head is tied to it.
    pub(crate) head: Option<usize>,
}

impl<'a> AdapterMap<'a> {
    /// Finds the place of each module.
    ///
    /// # Errors
    /// When a module has no place in the model, shares one, or has other shapes than the model's.
    pub(crate) fn new(
        config: &ModelConfig,
        lora: Option<&'a Lora>,
        dropout: Option<DropoutKey>,
    ) -> Result<Self> {
        let mut layers: Vec<LayerAdapter<'a>> = Vec::new();
        layers.resize_with(config.num_hidden_layers, LayerAdapter::default);
        let mut map = Self { layers, embed: None, norm: None, head: None };
        let Some(lora) = lora else { return Ok(map) };
        let dropout = dropout.filter(|_| lora.config.lora_dropout > 0.0);
        let infos = config.linear_modules();
        for (index, module) in lora.modules.iter().enumerate() {
            let at = infos.iter().position(|info| info.path == module.path).ok_or_else(|| {
                Error::new(format!("the model has no linear layer `{}`", module.path))
                    .with_hint("the adapter was made for another model")
            })?;
            let info = &infos[at];
            let shapes = [
                ("lora_A", &module.a, [module.r, info.in_features]),
                ("lora_B", &module.b, [info.out_features, module.r]),
            ];
            for (name, tensor, expected) in shapes {
                if tensor.dims() != expected {
                    return Err(Error::new(format!(
                        "`{name}` of `{}` has the shape {:?}, the model needs {expected:?}",
                        module.path,
                        tensor.dims()
                    ))
                    .with_hint("the adapter was made for another model"));
                }
            }
            let slot = &mut map.layers[at / 7].slots[at % 7];
            if slot.is_some() {
                return Err(Error::new(format!("the adapter has `{}` twice", module.path)));
            }
            let dropout = dropout.map(|key| (lora.config.lora_dropout, linear_key(key, at)));
            let low_rank = Some((index, module));
            *slot = Some(Slot { low_rank, dropout, ..Slot::default() });
        }
        for (index, saved) in lora.saved.iter().enumerate() {
            map.place(&saved.name, index, config).ok_or_else(|| {
                Error::new(format!("the model has no tensor `{}`", saved.name))
                    .with_hint("the adapter was made for another model")
            })?;
        }
        Ok(map)
    }

    /// Notes where a tensor that is trained as a whole stands.
    fn place(&mut self, name: &str, index: usize, config: &ModelConfig) -> Option<()> {
        match name {
            "model.embed_tokens.weight" => {
                self.embed = Some(index);
                if config.tie_word_embeddings {
                    self.head = Some(index);
                }
            }
            "model.norm.weight" => self.norm = Some(index),
            "lm_head.weight" if !config.tie_word_embeddings => self.head = Some(index),
            _ => {
                let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
                let layer = self.layers.get_mut(layer.parse::<usize>().ok()?)?;
                let norms = ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm"];
                let norms = norms.into_iter().chain(["self_attn.k_norm"]);
                let (module, kind) = part.rsplit_once('.')?;
                if let Some(at) = norms.into_iter().position(|n| n == module) {
                    layer.norms[at] = Some(index);
                    return Some(());
                }
                let at = Proj::ALL.into_iter().find(|p| p.name() == module)?;
                let slot = layer.slots[at as usize].get_or_insert_default();
                match kind {
                    "weight" => slot.weight = Some(index),
                    "bias" => slot.bias = Some(index),
                    _ => return None,
                }
            }
        }
        Some(())
    }

    /// The lowest layer in which something is trained: 0 where the embedding is, and the number of
    /// layers where only what stands above them is. `None` where nothing is trained at all.
    pub(crate) fn lowest(&self) -> Option<usize> {
        if self.embed.is_some() {
            return Some(0);
        }
        let above = (self.norm.is_some() || self.head.is_some()).then_some(self.layers.len());
        self.layers.iter().position(|l| !l.is_empty()).or(above)
    }
}

/// Gradients of one module, flat and row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct ModuleGrads {
    /// Of A: [r, in].
    pub a: Vec<f32>,
    /// Of B: [out, r].
    pub b: Vec<f32>,
    /// Of DoRA's magnitude: [out].
    pub magnitude: Option<Vec<f32>>,
}

/// Gradients of an adapter, one entry per module in the adapter's order. Passes add to them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LoraGrads {
    /// One entry per module.
    pub modules: Vec<ModuleGrads>,
    /// Of the tensors trained as a whole.
    pub saved: Vec<Vec<f32>>,
}

impl LoraGrads {
    /// Zeros for the modules of an adapter.
    pub fn zeros(lora: &Lora) -> Self {
        let modules = lora.modules.iter().map(|m| ModuleGrads {
            a: vec![0.0; m.a.elem_count()],
            b: vec![0.0; m.b.elem_count()],
            magnitude: m.magnitude.as_ref().map(|t| vec![0.0; t.elem_count()]),
        });
        let saved = lora.saved.iter().map(|s| vec![0.0; s.tensor.elem_count()]);
        Self { modules: modules.collect(), saved: saved.collect() }
    }

    /// Sets all to zero.
    pub fn clear(&mut self) {
        self.tensors_mut().for_each(|g| g.fill(0.0));
    }

    /// The gradients in the order of [`Lora::tensors`].
    pub fn tensors(&self) -> impl Iterator<Item = &[f32]> {
        let modules = self.modules.iter().flat_map(|m| {
            [m.a.as_slice(), m.b.as_slice()].into_iter().chain(m.magnitude.as_deref())
        });
        modules.chain(self.saved.iter().map(Vec::as_slice))
    }

    /// [`Self::tensors`], to change them.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let modules = self.modules.iter_mut().flat_map(|m| {
            let magnitude = m.magnitude.as_deref_mut();
            [m.a.as_mut_slice(), m.b.as_mut_slice()].into_iter().chain(magnitude)
        });
        modules.chain(self.saved.iter_mut().map(Vec::as_mut_slice))
    }

    pub(crate) fn add(&mut self, index: usize, da: &Tensor, db: &Tensor) -> CandleResult<()> {
        let module = &mut self.modules[index];
        add_to(&mut module.a, da)?;
        add_to(&mut module.b, db)
    }

    pub(crate) fn add_magnitude(&mut self, index: usize, dm: &Tensor) -> CandleResult<()> {
        match &mut self.modules[index].magnitude {
            Some(sum) => add_to(sum, dm),
            None => candle_core::bail!("the gradients belong to an adapter without magnitudes"),
        }
    }

    /// Adds the gradient of a tensor that is trained as a whole.
    pub(crate) fn add_saved(&mut self, index: usize, d: &Tensor) -> CandleResult<()> {
        add_to(&mut self.saved[index], d)
    }
}

fn add_to(sum: &mut [f32], new: &Tensor) -> CandleResult<()> {
    let new = new.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    debug_assert_eq!(sum.len(), new.len());
    sum.iter_mut().zip(new).for_each(|(sum, new)| *sum += new);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropout_drops_the_asked_share_and_keeps_the_mean() {
        let mask = dropout_mask(100_001, 0.25, 7);
        let dropped = mask.iter().filter(|m| **m == 0.0).count() as f64 / mask.len() as f64;
        assert!((dropped - 0.25).abs() < 0.01, "{dropped}");
        assert!(mask.iter().all(|m| *m == 0.0 || (*m - 4.0 / 3.0).abs() < 1e-6));
        assert_eq!(mask, dropout_mask(100_001, 0.25, 7));
        assert_ne!(mask, dropout_mask(100_001, 0.25, 8));
        assert_eq!(mask[..50_000], dropout_mask(50_000, 0.25, 7), "depends on the place alone");
    }
}
