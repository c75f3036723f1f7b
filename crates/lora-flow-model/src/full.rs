//! Tensors that are trained as a whole: all of them in full fine-tuning, those of
//! `modules_to_save` beside an adapter.
//!
//! They stand in the adapter and take the place of the base's in a view of the decoder, which
//! shares everything else with it; so the base stays as it is, and the forward needs no change.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Result as CandleResult, Tensor};
use lora_flow_core::{Error, Result};
use lora_flow_kernels::{embedding, linear, loss_head, rms_norm};

use crate::adapter::{AdapterMap, LoraGrads, Slot};
use crate::batch::Batch;
use crate::decoder::{Decoder, StreamLoss};
use crate::layer::Proj;
use crate::lora::{Lora, SavedTensor};

/// Rows of the head's input that are worked on at a time.
const HEAD_ROWS: usize = 256;

impl Decoder {
    /// The decoder with some of its tensors replaced; the others are shared.
    ///
    /// # Errors
    /// When the model has no such tensor, or one of another shape.
    pub fn overlay(&self, saved: &[SavedTensor]) -> Result<Self> {
        let rope = self.rope.lock().unwrap_or_else(PoisonError::into_inner).clone();
        #[cfg(feature = "cuda")]
        if self.cuda.is_some() {
            return Err(Error::new("whole tensors are not trained or replaced on a GPU yet")
                .with_hint("use `--device cpu`"));
        }
        let mut own = Self {
            config: self.config.clone(),
            dims: self.dims.clone(),
            embed: self.embed.clone(),
            layers: self.layers.clone(),
            norm: self.norm.clone(),
            head: self.head.clone(),
            rope: Mutex::new(Arc::clone(&rope)),
            device: self.device.clone(),
            compute: self.compute,
            #[cfg(feature = "cuda")]
            cuda: None,
        };
        let shapes = self.config.tensors();
        for SavedTensor { name, tensor } in saved {
            let shape = shapes.iter().find(|(n, _)| n == name).map(|(_, shape)| shape);
            match (own.tensor_mut(name), shape) {
                (Some(place), Some(shape)) if tensor.dims() == &shape[..] => {
                    *place = tensor.clone();
                }
                (Some(_), Some(shape)) => {
                    return Err(Error::new(format!(
                        "`{name}` has the shape {:?}, the model needs {shape:?}",
                        tensor.dims()
                    ))
                    .with_hint("the adapter was made for another model"));
                }
                _ => return Err(Error::new(format!("the model has no tensor `{name}`"))),
            }
        }
        if own.config.tie_word_embeddings {
            own.head = own.embed.clone();
        }
        Ok(own)
    }

    /// For an adapter with whole tensors: the view with them, and the adapter without.
    pub(crate) fn overlaid(&self, adapter: Option<&Lora>) -> Result<Option<(Self, Lora)>> {
        let Some(lora) = adapter.filter(|lora| !lora.saved.is_empty()) else { return Ok(None) };
        Ok(Some((self.overlay(&lora.saved)?, Lora { saved: Vec::new(), ..lora.clone() })))
    }

    /// Puts an adapter in place as every pass does, and checks that it fits: all that a swap takes.
    ///
    /// # Errors
    /// When it was made for another model.
    pub fn check_adapter(&self, adapter: Option<&Lora>) -> Result<()> {
        let own = self.overlaid(adapter)?;
        AdapterMap::new(&self.config, own.as_ref().map(|(_, lora)| lora).or(adapter), None)?;
        Ok(())
    }

    /// A tensor of the model under Hugging Face's name, if there is one.
    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        let rest = Vec::new();
        self.overlay(&rest).ok()?.tensor_mut(name).map(|t| t.clone())
    }

    /// Takes tensors out of the decoder, in f32, to be trained as a whole: nothing of them stays
    /// in it, so the base takes no memory beside what is trained. Only a view with all of them
    /// ([`Self::overlay`]) can be run from here on.
    ///
    /// # Errors
    /// When the model has no such tensor.
    pub fn take(&mut self, names: &[String]) -> Result<Vec<SavedTensor>> {
        let device = self.device.clone();
        let mut out = Vec::with_capacity(names.len());
        for name in names {
            let place = self
                .tensor_mut(name)
                .ok_or_else(|| Error::new(format!("the model has no tensor `{name}`")))?;
            let nothing = Tensor::zeros(0, DType::F32, &device);
            let wide = place.to_dtype(DType::F32).and_then(|t| Ok((t, nothing?)));
            let (tensor, nothing) = wide.map_err(|e| {
                Error::new(format!("cannot take `{name}` out of the model")).with_source(e)
            })?;
            *place = nothing;
            out.push(SavedTensor { name: name.clone(), tensor });
        }
        if self.config.tie_word_embeddings {
            self.head = self.embed.clone();
        }
        Ok(out)
    }

    fn tensor_mut(&mut self, name: &str) -> Option<&mut Tensor> {
        match name {
            "model.embed_tokens.weight" => return Some(&mut self.embed),
            "model.norm.weight" => return Some(&mut self.norm),
            "lm_head.weight" if !self.config.tie_word_embeddings => return Some(&mut self.head),
            _ => {}
        }
        let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let layer = self.layers.get_mut(layer.parse::<usize>().ok()?)?;
        let (module, kind) = part.rsplit_once('.')?;
        match module {
            "input_layernorm" => Some(&mut layer.input_norm),
            "post_attention_layernorm" => Some(&mut layer.mlp_norm),
            "self_attn.q_norm" => layer.qk_norm.as_mut().map(|n| &mut n[0]),
            "self_attn.k_norm" => layer.qk_norm.as_mut().map(|n| &mut n[1]),
            _ => {
                let linear = Proj::ALL.into_iter().find(|p| p.name() == module)?;
                let linear = &mut layer.linears[linear as usize];
                match kind {
                    "weight" => Some(&mut linear.weight),
                    "bias" => linear.bias.as_mut(),
                    _ => None,
                }
            }
        }
    }

    /// [`Decoder::loss`] where the last norm or the head is trained: their gradients as well.
    pub(crate) fn loss_of_trained_head(
        &self,
        x: &Tensor,
        batch: &Batch,
        grad_scale: f32,
        map: &AdapterMap<'_>,
        grads: &mut LoraGrads,
    ) -> CandleResult<StreamLoss> {
        let (rows, targets) = batch.supervised_rows();
        let all = rows.len() == batch.len();
        let picked = if all { x.clone() } else { embedding::gather(x, &rows, x.dtype())? };
        let (h, rstd) = rms_norm::forward(&picked, &self.norm, self.dims.eps)?;
        let dhead = map.head.map(|index| grads.saved[index].as_mut_slice());
        let (nll, dh) =
            loss_head::cross_entropy(&h, &self.head, &targets, HEAD_ROWS, grad_scale, dhead)?;
        norm_backward(map.norm, &dh, &picked, &rstd, grads)?;
        let dx = rms_norm::backward(&dh, &picked, &self.norm, &rstd)?;
        if all {
            return Ok(StreamLoss { nll, dx: Some(dx) });
        }
        let index = Tensor::from_vec(rows, dx.dim(0)?, x.device())?;
        let dx = x.zeros_like()?.index_add(&index, &dx, 0)?;
        Ok(StreamLoss { nll, dx: Some(dx) })
    }
}

/// dW = dyᵀ·x and db = Σ dy of a projection, as far as they are trained.
pub(crate) fn linear_backward(
    dy: &Tensor,
    x: &Tensor,
    slot: &Slot<'_>,
    grads: &mut LoraGrads,
) -> CandleResult<()> {
    if let Some(index) = slot.weight {
        grads.add_saved(index, &linear::matmul_tn(dy, x)?)?;
    }
    if let Some(index) = slot.bias {
        grads.add_saved(index, &dy.sum(0)?)?;
    }
    Ok(())
}

/// The gradient of a norm's weight, if it is trained, from that of its output.
pub(crate) fn norm_backward(
    index: Option<usize>,
    dy: &Tensor,
    x: &Tensor,
    rstd: &Tensor,
    grads: &mut LoraGrads,
) -> CandleResult<()> {
    match index {
        None => Ok(()),
        Some(index) => grads.add_saved(index, &rms_norm::backward_weight(dy, x, rstd)?),
    }
}

/// Adds the rows of dx [N, H] to those of the embedding's gradient.
pub(crate) fn embedding_backward(
    index: usize,
    ids: &[u32],
    dx: &Tensor,
    grads: &mut LoraGrads,
) -> CandleResult<()> {
    let width = dx.dim(1)?;
    let rows = dx.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    let sum = &mut grads.saved[index];
    for (id, row) in ids.iter().zip(rows.chunks_exact(width)) {
        let place = &mut sum[*id as usize * width..][..width];
        place.iter_mut().zip(row).for_each(|(s, d)| *s += d);
    }
    Ok(())
}
