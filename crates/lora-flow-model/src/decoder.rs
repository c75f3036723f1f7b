//! The decoder: embedding, layers, final norm and head of the Llama family, driven by
//! [`ModelConfig`].
//!
//! Training chains the layers by hand. The forward keeps of each layer what [`Checkpoint`] says,
//! the backward takes the layers one at a time from the top and stops below the lowest layer that
//! carries an adapter; layers under it keep nothing. Only positions that have a target go through
//! the final norm and the head.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use lora_flow_core::{Artifact, Error, Result, ResultExt};
use lora_flow_kernels::activation::Act;
use lora_flow_kernels::loss::{CrossEntropy, cross_entropy};
use lora_flow_kernels::rope::RopeTable;
use lora_flow_kernels::{embedding, linear, rms_norm};

use crate::adapter::{AdapterMap, DropoutKey, LayerAdapter, LoraGrads};
use crate::batch::Batch;
use crate::config::{HiddenAct, ModelConfig, ModuleInfo};
use crate::full;
use crate::keep::{self, Keep};
use crate::layer::{Activations, Dims, KvCache, Layer, Linear, Pass, Proj};
use crate::lora::Lora;
use crate::place::Place;
use crate::prefix_tree::PrefixTree;
use crate::weights::WeightSource;

pub use crate::keep::Checkpoint;

/// Rows of the head's input that the loss works on at a time.
const LOSS_ROWS: usize = 1024;

/// Settings of one training pass.
#[derive(Debug, Clone, Copy)]
pub struct PassOptions {
    /// Factor of the gradient: 1 / (supervised tokens of the whole accumulated batch).
    pub grad_scale: f32,
    /// Key of the dropout masks; `None` trains without dropout.
    pub dropout: Option<DropoutKey>,
    /// What to keep for the backward.
    pub checkpoint: Checkpoint,
}

/// Loss of one training pass.
#[derive(Debug, Clone)]
pub struct LossOut {
    /// −ln p of each supervised token, in order.
    pub nll: Vec<f32>,
}

impl LossOut {
    /// Σ −ln p, in natural units.
    pub fn nll_sum(&self) -> f64 {
        self.nll.iter().map(|x| f64::from(*x)).sum()
    }

    /// Number of supervised tokens.
    pub fn count(&self) -> usize {
        self.nll.len()
    }
}

/// A decoder with frozen weights.
pub struct Decoder {
    pub(crate) config: ModelConfig,
    pub(crate) dims: Dims,
    pub(crate) embed: Tensor,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Tensor,
    pub(crate) head: Tensor,
    /// Grows with the longest document seen.
    pub(crate) rope: Mutex<Arc<RopeTable>>,
    pub(crate) device: Device,
    /// Dtype of the activations.
    pub(crate) compute: DType,
    /// The whole decoder, where it is on a GPU: then there are no layers here.
    #[cfg(feature = "cuda")]
    pub(crate) cuda: Option<Box<crate::cuda::CudaDecoder>>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let config = &self.config;
        write!(f, "Decoder({:?}, {} layers)", config.architecture, config.num_hidden_layers)
    }
}

/// Dtype of the activations for weights of a dtype. On the CPU, 16-bit weights stay as they are
/// and activations are f32; over bf16 weights the operands of products are rounded to bf16.
fn compute_dtype(weights: DType, device: &Device) -> DType {
    match weights {
        DType::BF16 | DType::F16 if device.is_cpu() => DType::F32,
        other => other,
    }
}

fn dims(config: &ModelConfig, operands: DType) -> Dims {
    Dims {
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        eps: config.rms_norm_eps,
        window: config.sliding_window,
        act: match config.hidden_act {
            HiddenAct::Silu => Act::Silu,
            HiddenAct::Gelu => Act::Gelu,
            HiddenAct::GeluTanh => Act::GeluTanh,
        },
        operands,
    }
}

impl Decoder {
    /// Reads the config and the weights of a Model artifact onto a device.
    ///
    /// `dtype` is that of the matrices (f32 or bf16). Activations have the same, but on the CPU
    /// they are f32 also over bf16 weights, and rounded only as they enter a product.
    ///
    /// # Errors
    /// When the config is not understood or the weights do not fit it.
    pub fn load(model: &Artifact, device: &Device, dtype: DType) -> Result<Self> {
        let config = ModelConfig::open(model)?;
        let source = WeightSource::open(model)?;
        source.check_all(&config)?;
        let compute = compute_dtype(dtype, device);
        Self::build(config, device, compute, |name, shape| {
            let matrix = shape.len() == 2;
            source.tensor(name, shape, if matrix { dtype } else { compute }, device)
        })
    }

    /// [`Self::load`] at a place.
    ///
    /// # Errors
    /// As there, and when the GPU has no room.
    pub fn open(model: &Artifact, place: &Place, dtype: DType) -> Result<Self> {
        match place {
            Place::Cpu => Self::load(model, &Device::Cpu, dtype),
            #[cfg(feature = "cuda")]
            Place::Cuda(gpu) => {
                let config = ModelConfig::open(model)?;
                let source = WeightSource::open(model)?;
                source.check_all(&config)?;
                let mut read = |name: &str, shape: &[usize]| {
                    let matrix = shape.len() == 2;
                    source.tensor(
                        name,
                        shape,
                        if matrix { dtype } else { DType::F32 },
                        &Device::Cpu,
                    )
                };
                let (gpu, own) = (gpu.clone(), config.clone());
                let decoder = crate::cuda::CudaDecoder::load(gpu, own, dtype, &mut read)?;
                Self::on_gpu(config, decoder)
            }
        }
    }

    /// A decoder around one that is on a GPU.
    ///
    /// # Errors
    /// Never in practice: the stand-ins for the weights are empty.
    #[cfg(feature = "cuda")]
    pub fn on_gpu(config: ModelConfig, decoder: crate::cuda::CudaDecoder) -> Result<Self> {
        let none = Tensor::zeros(0, DType::F32, &Device::Cpu).context("cannot make a tensor")?;
        Ok(Self {
            dims: dims(&config, DType::F32),
            config,
            embed: none.clone(),
            layers: Vec::new(),
            norm: none.clone(),
            head: none,
            rope: Mutex::new(Arc::new(RopeTable::new(&[], 0, 1.0))),
            device: Device::Cpu,
            compute: DType::F32,
            cuda: Some(Box::new(decoder)),
        })
    }

    /// The decoder on a GPU, if it is on one.
    #[cfg(feature = "cuda")]
    pub fn cuda(&self) -> Option<&crate::cuda::CudaDecoder> {
        self.cuda.as_deref()
    }

    /// On a GPU, keeps less between forward and backward where more than `bytes` would be taken.
    #[cfg(feature = "cuda")]
    pub fn set_gpu_memory_limit(&mut self, bytes: Option<u64>) {
        if let Some(cuda) = &mut self.cuda {
            cuda.set_memory_limit(bytes);
        }
    }

    /// A decoder from tensors under Hugging Face's names, all on one device; their dtype is that
    /// of the embedding.
    ///
    /// # Errors
    /// When one is missing or has another shape.
    pub fn from_tensors(config: ModelConfig, tensors: &HashMap<String, Tensor>) -> Result<Self> {
        let embed = tensors
            .get("model.embed_tokens.weight")
            .ok_or_else(|| Error::new("tensor `model.embed_tokens.weight` is missing"))?;
        let device = embed.device().clone();
        let compute = compute_dtype(embed.dtype(), &device);
        Self::build(config, &device, compute, |name, shape| {
            let tensor = tensors.get(name).filter(|t| t.dims() == shape).ok_or_else(|| {
                Error::new(format!("tensor `{name}` of shape {shape:?} is missing"))
            })?;
            if shape.len() == 2 {
                return Ok(tensor.clone());
            }
            tensor.to_dtype(compute).with_context(|| format!("cannot convert tensor `{name}`"))
        })
    }

    fn build(
        config: ModelConfig,
        device: &Device,
        compute: DType,
        mut read: impl FnMut(&str, &[usize]) -> Result<Tensor>,
    ) -> Result<Self> {
        // The config says which tensors there are (biases, norms of heads, a head of its own).
        let shapes: HashMap<String, Vec<usize>> = config.tensors().into_iter().collect();
        let mut take = |name: &str| -> Result<Option<Tensor>> {
            shapes.get(name).map(|shape| read(name, shape)).transpose()
        };
        let mut need = |name: String| -> Result<Tensor> {
            take(&name)?.ok_or_else(|| Error::new(format!("tensor `{name}` is missing")))
        };
        let embed = need("model.embed_tokens.weight".into())?;
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for i in 0..config.num_hidden_layers {
            let prefix = format!("model.layers.{i}");
            let mut linears = Vec::with_capacity(7);
            for p in Proj::ALL {
                let path = format!("{prefix}.{}", p.name());
                let weight = need(format!("{path}.weight"))?;
                let bias = format!("{path}.bias");
                let bias = if shapes.contains_key(&bias) { Some(need(bias)?) } else { None };
                linears.push(Linear { weight, bias });
            }
            let linears = <[Linear; 7]>::try_from(linears)
                .map_err(|_| Error::new("a layer has seven projections"))?;
            let qk_norm = if config.qk_norm {
                let attention = format!("{prefix}.self_attn");
                Some([
                    need(format!("{attention}.q_norm.weight"))?,
                    need(format!("{attention}.k_norm.weight"))?,
                ])
            } else {
                None
            };
            layers.push(Layer {
                input_norm: need(format!("{prefix}.input_layernorm.weight"))?,
                mlp_norm: need(format!("{prefix}.post_attention_layernorm.weight"))?,
                qk_norm,
                linears,
            });
        }
        let norm = need("model.norm.weight".into())?;
        let head = match config.tie_word_embeddings {
            true => embed.clone(),
            false => need("lm_head.weight".into())?,
        };
        let rope = Mutex::new(Arc::new(RopeTable::new(&config.inv_freq(), 0, 1.0)));
        Ok(Self {
            dims: dims(&config, embed.dtype()),
            config,
            embed,
            layers,
            norm,
            head,
            rope,
            device: device.clone(),
            compute,
            #[cfg(feature = "cuda")]
            cuda: None,
        })
    }

    /// The config it was built from.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device of its adapters: that of the weights, but the CPU where those are on a GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether it computes on the CPU.
    pub(crate) fn on_cpu(&self) -> bool {
        #[cfg(feature = "cuda")]
        if self.cuda.is_some() {
            return false;
        }
        self.device.is_cpu()
    }

    /// The linear layers that an adapter can attach to, in model order.
    pub fn linear_modules(&self) -> Vec<ModuleInfo> {
        self.config.linear_modules()
    }

    /// The rotary table for positions below `len`, or a longer one.
    fn rope(&self, len: usize) -> Arc<RopeTable> {
        let mut table = self.rope.lock().unwrap_or_else(PoisonError::into_inner);
        if table.max_position() < len {
            let len = len.next_power_of_two().max(256);
            *table = Arc::new(RopeTable::new(&self.config.inv_freq(), len, 1.0));
        }
        table.clone()
    }

    /// Logits [N, V] (f32) of every position, for tests: N × V numbers.
    ///
    /// # Errors
    /// When the batch or the adapter does not fit the model, or the device fails.
    pub fn logits(&self, batch: &Batch, adapter: Option<&Lora>) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return cuda.logits(batch, adapter);
        }
        if let Some((own, lora)) = self.overlaid(adapter)? {
            return own.logits(batch, Some(&lora));
        }
        let map = AdapterMap::new(&self.config, adapter, None)?;
        let x = self.hidden(batch, &map)?;
        self.head_logits(&x).context("cannot compute the logits")
    }

    /// −ln p of each supervised token, in order. Keeps one layer's buffers at a time.
    ///
    /// # Errors
    /// When the batch or the adapter does not fit the model, or the device fails.
    pub fn nll(&self, batch: &Batch, adapter: Option<&Lora>) -> Result<Vec<f32>> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return cuda.nll(batch, adapter);
        }
        if let Some((own, lora)) = self.overlaid(adapter)? {
            return own.nll(batch, Some(&lora));
        }
        let map = AdapterMap::new(&self.config, adapter, None)?;
        let x = self.hidden(batch, &map)?;
        let loss = self.loss(&x, batch, None).context("cannot compute the loss")?;
        Ok(loss.nll)
    }

    /// Loss of a batch; the gradients of Σ nll · `grad_scale` are added to `grads`.
    ///
    /// # Errors
    /// When the batch or the adapter does not fit the model, the adapter has no modules, the batch
    /// has no targets, or the device fails.
    pub fn loss_and_grad(
        &self,
        batch: &Batch,
        lora: &Lora,
        options: &PassOptions,
        grads: &mut LoraGrads,
    ) -> Result<LossOut> {
        #[cfg(feature = "cuda")]
        if self.cuda.is_some() {
            return Err(Error::new("a decoder on a GPU keeps its gradients there")
                .with_hint("this is a bug: it trains through `CudaDecoder::training`"));
        }
        batch.check(self.config.vocab_size)?;
        if batch.supervised() == 0 {
            return Err(Error::new("the batch has no supervised tokens"));
        }
        if grads.modules.len() != lora.modules.len() || grads.saved.len() != lora.saved.len() {
            return Err(Error::new("the gradients belong to another adapter"));
        }
        let map = AdapterMap::new(&self.config, Some(lora), options.dropout)?;
        let lowest = map.lowest().ok_or_else(|| Error::new("the adapter has no modules"))?;
        let own = if lora.saved.is_empty() { None } else { Some(self.overlay(&lora.saved)?) };
        let decoder = own.as_ref().unwrap_or(self);
        let adapters = &map.layers[lowest..];
        let ranks = adapters.iter().map(LayerAdapter::ranks).max().unwrap_or(0);
        let bytes = self.embed.dtype().size_in_bytes();
        let (policy, tokens) = (options.checkpoint, batch.len());
        let keep = keep::plan(&self.config, policy, bytes, tokens, ranks, adapters.len());
        decoder
            .forward_backward(batch, &map, lowest, &keep, options, grads)
            .context("cannot compute the loss and its gradients")
    }

    fn forward_backward(
        &self,
        batch: &Batch,
        map: &AdapterMap<'_>,
        lowest: usize,
        keep: &[Keep],
        options: &PassOptions,
        grads: &mut LoraGrads,
    ) -> candle_core::Result<LossOut> {
        /// What one layer left for its backward.
        enum Kept {
            Input(Tensor),
            Activations(Box<Activations>),
        }
        let positions = batch.positions();
        let rope = self.rope(batch.longest());
        let pass = self.pass(&batch.doc_starts, &positions, &rope);
        let mut x = embedding::gather(&self.embed, &batch.input_ids, self.compute)?;
        for (layer, adapter) in self.layers.iter().zip(&map.layers).take(lowest) {
            x = layer.forward(&x, &pass, adapter)?;
        }
        let adapted = || self.layers.iter().zip(&map.layers).skip(lowest);
        let mut kept = Vec::with_capacity(self.layers.len() - lowest);
        for ((layer, adapter), &keep) in adapted().zip(keep) {
            let y = match keep {
                Keep::Input => {
                    let y = layer.forward(&x, &pass, adapter)?;
                    kept.push(Kept::Input(x));
                    y
                }
                Keep::All | Keep::WithoutMlp => {
                    let mut acts = layer.activations(&x, &pass, adapter)?;
                    let y = layer.output(&mut acts, &self.dims, adapter)?;
                    kept.push(Kept::Activations(Box::new(acts.slim(keep))));
                    y
                }
            };
            x = y;
        }

        let loss = match (map.norm, map.head) {
            (None, None) => self.loss(&x, batch, Some(options.grad_scale))?,
            _ => self.loss_of_trained_head(&x, batch, options.grad_scale, map, grads)?,
        };
        let mut dx = match loss.dx {
            Some(dx) => dx,
            None => candle_core::bail!("the loss has no gradient"),
        };
        drop(x);

        for (depth, (layer, adapter)) in adapted().enumerate().collect::<Vec<_>>().into_iter().rev()
        {
            let acts = match kept.pop() {
                Some(Kept::Input(x)) => layer.recompute(&x, &pass, adapter)?,
                Some(Kept::Activations(acts)) => *acts,
                None => candle_core::bail!("a layer kept nothing"),
            };
            let need_dx = depth > 0 || map.embed.is_some();
            match layer.backward(&dx, acts, &pass, adapter, need_dx, grads)? {
                Some(below) => dx = below,
                None => break,
            }
        }
        if let Some(index) = map.embed {
            full::embedding_backward(index, &batch.input_ids, &dx, grads)?;
        }
        Ok(LossOut { nll: loss.nll })
    }

    fn pass<'a>(
        &'a self,
        docs: &'a [usize],
        positions: &'a [u32],
        rope: &'a RopeTable,
    ) -> Pass<'a> {
        Pass { dims: &self.dims, rope, docs, positions, ends: None }
    }

    /// The residual stream after the last layer, [N, H].
    pub(crate) fn hidden(&self, batch: &Batch, map: &AdapterMap<'_>) -> Result<Tensor> {
        batch.check(self.config.vocab_size)?;
        let positions = batch.positions();
        let rope = self.rope(batch.longest());
        let pass = self.pass(&batch.doc_starts, &positions, &rope);
        self.run(&batch.input_ids, &pass, map)
    }

    /// The same of documents that share their beginnings.
    pub(crate) fn tree_hidden(&self, tree: &PrefixTree, map: &AdapterMap<'_>) -> Result<Tensor> {
        let longest = tree.positions.iter().max().map_or(0, |p| *p as usize + 1);
        let rope = self.rope(longest);
        let pass = Pass { ends: Some(&tree.ends), ..self.pass(&[], &tree.positions, &rope) };
        self.run(&tree.ids, &pass, map)
    }

    fn run(&self, ids: &[u32], pass: &Pass<'_>, map: &AdapterMap<'_>) -> Result<Tensor> {
        let run = || {
            let mut x = embedding::gather(&self.embed, ids, self.compute)?;
            for (layer, adapter) in self.layers.iter().zip(&map.layers) {
                x = layer.forward(&x, pass, adapter)?;
            }
            Ok(x)
        };
        run().map_err(|e: candle_core::Error| {
            Error::new("cannot run the model forward").with_source(e)
        })
    }

    /// Loss of the positions that have a target, and with a scale the gradient of the stream.
    fn loss(
        &self,
        x: &Tensor,
        batch: &Batch,
        grad_scale: Option<f32>,
    ) -> candle_core::Result<StreamLoss> {
        let (rows, targets) = batch.supervised_rows();
        if rows.is_empty() {
            return Ok(StreamLoss { nll: Vec::new(), dx: None });
        }
        let all = rows.len() == batch.len();
        let picked = if all { x.clone() } else { embedding::gather(x, &rows, x.dtype())? };
        let (h, rstd) = rms_norm::forward(&picked, &self.norm, self.dims.eps)?;
        let CrossEntropy { nll, dh } = cross_entropy(
            &h,
            &self.head,
            &targets,
            LOSS_ROWS,
            grad_scale.is_some(),
            grad_scale.unwrap_or(1.0),
        )?;
        let Some(dh) = dh else { return Ok(StreamLoss { nll, dx: None }) };
        let dx = rms_norm::backward(&dh, &picked, &self.norm, &rstd)?;
        if all {
            return Ok(StreamLoss { nll, dx: Some(dx) });
        }
        let index = Tensor::from_vec(rows, dx.dim(0)?, x.device())?;
        let dx = x.zeros_like()?.index_add(&index, &dx, 0)?;
        Ok(StreamLoss { nll, dx: Some(dx) })
    }

    /// Logits of rows of the residual stream, f32.
    pub(crate) fn head_logits(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (h, _) = rms_norm::forward(x, &self.norm, self.dims.eps)?;
        linear::matmul_nt(&h, &self.head)?.to_dtype(DType::F32)
    }

    /// Logits [V] after a prompt; its keys and values go into `caches` (empty ones, one a layer).
    pub(crate) fn read_prompt(
        &self,
        ids: &[u32],
        adapters: &[LayerAdapter<'_>],
        caches: &mut [KvCache],
    ) -> Result<Vec<f32>> {
        let batch = Batch::from_documents(&[ids]);
        batch.check(self.config.vocab_size)?;
        let positions = batch.positions();
        let rope = self.rope(ids.len());
        let pass = self.pass(&batch.doc_starts, &positions, &rope);
        let mut run = || {
            let mut x = embedding::gather(&self.embed, ids, self.compute)?;
            for ((layer, adapter), cache) in self.layers.iter().zip(adapters).zip(&mut *caches) {
                let mut one = [cache];
                x = layer.forward_cached(&x, &pass, adapter, &mut one)?;
            }
            let last = x.narrow(0, ids.len() - 1, 1)?.contiguous()?;
            self.head_logits(&last)?.flatten_all()?.to_vec1::<f32>()
        };
        run().map_err(|e: candle_core::Error| {
            Error::new("cannot run the model forward").with_source(e)
        })
    }

    /// Logits [V] after one further token of each of several documents, whose tokens so far stand in
    /// its caches (one a layer).
    pub(crate) fn next_logits(
        &self,
        ids: &[u32],
        positions: &[u32],
        adapters: &[LayerAdapter<'_>],
        caches: &mut [&mut [KvCache]],
    ) -> Result<Vec<Vec<f32>>> {
        let rope = self.rope(positions.iter().max().map_or(0, |p| *p as usize + 1));
        let pass = self.pass(&[], positions, &rope);
        let mut run = || {
            let mut x = embedding::gather(&self.embed, ids, self.compute)?;
            for (i, (layer, adapter)) in self.layers.iter().zip(adapters).enumerate() {
                let mut of_layer: Vec<&mut KvCache> =
                    caches.iter_mut().map(|c| &mut c[i]).collect();
                x = layer.forward_cached(&x, &pass, adapter, &mut of_layer)?;
            }
            self.head_logits(&x)?.to_vec2::<f32>()
        };
        run().map_err(|e: candle_core::Error| {
            Error::new("cannot run the model forward").with_source(e)
        })
    }
}

/// Loss at the top of the residual stream.
pub(crate) struct StreamLoss {
    pub(crate) nll: Vec<f32>,
    pub(crate) dx: Option<Tensor>,
}

#[cfg(test)]
#[path = "decoder_tests.rs"]
mod tests;
