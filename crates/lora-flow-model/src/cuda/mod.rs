//! The decoder on an NVIDIA GPU: the same model, losses and gradients as [`crate::decoder`], laid
//! out for few and large launches.
//!
//! - [`weights`]: frozen weights, each group of projections that share an input as one matrix with
//!   the adapter's A and B around it, so that W·x + s·B·A·x is one product.
//! - [`arena`]: activations and scratch, allocated once per shape of batch and reused; [`away`] and
//!   [`ring`]: what of them goes to the host in between.
//! - [`batch`]: what a batch is on the device.
//! - [`pass`]: forward and backward of a layer; [`loss`]: the head.
//! - [`training`]: gradients, moments and AdamW, all on the device.
//! - [`generate`]: cached keys and values.

mod arena;
mod away;
mod batch;
mod generate;
mod loss;
mod pass;
mod ring;
mod training;
mod weights;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Tensor};
use lora_flow_core::{Error, Result};
use lora_flow_kernels::cuda::{CudaError, Element, Gpu};

use crate::batch::Batch;
use crate::config::ModelConfig;
use crate::decoder::{LossOut, PassOptions};
use crate::lora::Lora;
use arena::Arena;
use batch::DeviceBatch;
use weights::Weights;

pub use generate::Session;
pub use training::{AdamWFactors, TrainState, Training};

/// An error of the GPU as everything else reports errors.
pub fn report(e: CudaError) -> Error {
    match e.hint {
        Some(hint) if !hint.is_empty() => Error::new(e.message).with_hint(hint),
        _ => Error::new(e.message),
    }
}

/// A decoder whose weights are on a GPU.
pub struct CudaDecoder {
    gpu: Arc<Gpu>,
    config: ModelConfig,
    element: Element,
    /// Most bytes that activations, weights and all may take; decides what is kept.
    limit: Option<u64>,
    /// Takes copies to the host to cost nothing.
    fast_copies: bool,
    state: Mutex<State>,
}

/// What passes change.
struct State {
    weights: Weights,
    arena: Option<Arena>,
}

impl std::fmt::Debug for CudaDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaDecoder({:?}, {:?})", self.gpu, self.element)
    }
}

/// The device's dtype of weights of a dtype.
fn element(dtype: DType) -> Result<Element> {
    match dtype {
        DType::F32 => Ok(Element::F32),
        DType::BF16 => Ok(Element::Bf16),
        other => Err(Error::new(format!("dtype {other:?} is not supported on a GPU"))
            .with_hint("use f32 or bf16")),
    }
}

/// Bytes that a variable of the environment gives in GiB.
fn gib(name: &str) -> Option<u64> {
    let gib = std::env::var(name).ok()?.parse::<f64>().ok()?;
    Some((gib * (1u64 << 30) as f64) as u64)
}

/// Widths that rows of 16 bytes need.
fn check(config: &ModelConfig) -> Result<()> {
    let q = config.num_attention_heads * config.head_dim;
    let kv = config.num_key_value_heads * config.head_dim;
    for (name, width) in [
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("num_attention_heads × head_dim", q),
        ("num_key_value_heads × head_dim", kv),
    ] {
        if !width.is_multiple_of(8) {
            return Err(Error::new(format!(
                "`{name}` is {width}: on a GPU it must be a multiple of 8"
            ))
            .with_hint("use `--device cpu` for this model"));
        }
    }
    if config.head_dim > 256 {
        return Err(Error::new(format!(
            "`head_dim` is {}, a GPU takes up to 256",
            config.head_dim
        ))
        .with_hint("use `--device cpu` for this model"));
    }
    Ok(())
}

/// Refuses adapters that the GPU's decoder does not know: DoRA, and tensors trained as a whole.
fn check_supported(lora: &Lora) -> Result<()> {
    let what = if !lora.saved.is_empty() {
        "an adapter with `modules_to_save`"
    } else if lora.modules.iter().any(|m| m.magnitude.is_some()) {
        "a DoRA adapter"
    } else {
        return Ok(());
    };
    Err(Error::new(format!("{what} does not run on a GPU yet"))
        .with_hint("use `--device cpu`, or merge it into the base first"))
}

impl CudaDecoder {
    /// Puts weights on a GPU; `read` gives a tensor by name and shape, on the CPU, matrices in
    /// `dtype`.
    ///
    /// # Errors
    /// When `read` fails, the model's widths do not suit a GPU, or the GPU has no room.
    pub fn load(
        gpu: Arc<Gpu>,
        config: ModelConfig,
        dtype: DType,
        read: &mut dyn FnMut(&str, &[usize]) -> Result<Tensor>,
    ) -> Result<Self> {
        check(&config)?;
        let element = element(dtype)?;
        let weights = Weights::load(&gpu, &config, element, read)?;
        Ok(Self::new(gpu, config, element, weights))
    }

    /// Random weights of a config's shapes, made on the GPU: for measurements.
    ///
    /// # Errors
    /// When the model's widths do not suit a GPU, or the GPU has no room.
    pub fn random(gpu: Arc<Gpu>, config: ModelConfig, dtype: DType) -> Result<Self> {
        check(&config)?;
        let element = element(dtype)?;
        let weights = Weights::random(&gpu, &config, element).map_err(report)?;
        Ok(Self::new(gpu, config, element, weights))
    }

    fn new(gpu: Arc<Gpu>, config: ModelConfig, element: Element, weights: Weights) -> Self {
        let limit = gib("LORA_FLOW_CUDA_MEMORY_GIB");
        let state = Mutex::new(State { weights, arena: None });
        Self { gpu, config, element, limit, fast_copies: false, state }
    }

    /// Keeps less between forward and backward where more than `bytes` of the GPU would be taken.
    pub fn set_memory_limit(&mut self, bytes: Option<u64>) {
        self.limit = bytes;
    }

    /// Plans as if copies to the host took no time: for tests, whose layers are small.
    pub fn assume_fast_copies(&mut self) {
        self.fast_copies = true;
    }

    /// Whether the last pass, one with checkpointing, took activations to the host.
    pub fn on_host(&self) -> bool {
        self.lock().arena.as_ref().is_some_and(|arena| arena.ring.is_some())
    }

    /// Of how many layers the last pass kept gate and up on the device, sent them to the host, and
    /// computed them again.
    pub fn kept(&self) -> [usize; 3] {
        self.lock().arena.as_ref().map_or([0; 3], |arena| arena.gate_up.counts())
    }

    /// The device.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// The config it was built from.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`crate::decoder::Decoder::logits`]. The tensor is on the CPU.
    ///
    /// # Errors
    /// As there.
    pub fn logits(&self, batch: &Batch, adapter: Option<&Lora>) -> Result<Tensor> {
        let mut state = self.lock();
        let values = self.forward(&mut state, batch, adapter, |run, n| run.logits(n))?;
        Tensor::from_vec(values, (batch.len(), self.config.vocab_size), &candle_core::Device::Cpu)
            .map_err(|e| Error::new("cannot read the logits").with_source(e))
    }

    /// See [`crate::decoder::Decoder::nll`].
    ///
    /// # Errors
    /// As there.
    pub fn nll(&self, batch: &Batch, adapter: Option<&Lora>) -> Result<Vec<f32>> {
        let mut state = self.lock();
        self.forward(&mut state, batch, adapter, |run, _| run.loss(None))
    }

    fn forward(
        &self,
        state: &mut State,
        batch: &Batch,
        adapter: Option<&Lora>,
        top: impl FnOnce(&pass::Run<'_>, usize) -> std::result::Result<Vec<f32>, CudaError>,
    ) -> Result<Vec<f32>> {
        batch.check(self.config.vocab_size)?;
        if let Some(lora) = adapter {
            check_supported(lora)?;
            state.weights.attach(&self.gpu, &self.config, self.element, lora)?;
        }
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let run = |state: &mut State| {
            let batch_on = DeviceBatch::new(&self.gpu, &self.config, batch)?;
            let arena =
                Arena::ready(&mut state.arena, self, &mut state.weights, &batch_on, None, 0)?;
            let run =
                pass::Run::new(self, &state.weights, arena, &batch_on, adapter.is_some(), None);
            run.embed()?;
            for layer in 0..self.config.num_hidden_layers {
                run.layer_forward(layer, false)?;
            }
            top(&run, batch.len())
        };
        run(state).map_err(report)
    }

    /// Loss of a batch; the gradients of Σ nll · `grad_scale` are added to those of `training`.
    ///
    /// # Errors
    /// When the batch does not fit the model or has no targets, another adapter was attached in
    /// between, or the device fails.
    pub fn loss_and_grad(
        &self,
        batch: &Batch,
        training: &mut Training,
        options: &PassOptions,
    ) -> Result<LossOut> {
        batch.check(self.config.vocab_size)?;
        if batch.supervised() == 0 {
            return Err(Error::new("the batch has no supervised tokens"));
        }
        let mut state = self.lock();
        let state = &mut *state;
        training.check(&state.weights)?;
        let lowest =
            state.weights.lowest().ok_or_else(|| Error::new("the adapter has no modules"))?;
        let mut run = || {
            let batch_on = DeviceBatch::new(&self.gpu, &self.config, batch)?;
            let wanted = arena::Wanted { checkpoint: options.checkpoint, lowest };
            let arena = Arena::ready(
                &mut state.arena,
                self,
                &mut state.weights,
                &batch_on,
                Some(wanted),
                training.host_memory(),
            )?;
            let dropout = training.dropout(options.dropout, batch_on.tokens)?;
            let run = pass::Run::new(self, &state.weights, arena, &batch_on, true, dropout);
            run.embed()?;
            for layer in 0..self.config.num_hidden_layers {
                if let Some(ring) = &arena.ring {
                    ring.enter(layer)?;
                }
                run.layer_forward(layer, layer >= lowest)?;
                if let Some(ring) = &arena.ring {
                    ring.leave(layer, &arena.parts(layer))?;
                }
            }
            arena.gate_up.leave_backward(self.config.num_hidden_layers)?;
            run.start_loss(options.grad_scale)?;
            for layer in (lowest..self.config.num_hidden_layers).rev() {
                if let Some(ring) = &arena.ring {
                    ring.enter_backward(layer)?;
                }
                run.layer_backward(
                    layer,
                    layer > lowest,
                    training.grads(layer),
                    training.accumulate(),
                )?;
                if let (Some(ring), Some(before)) = (&arena.ring, layer.checked_sub(2)) {
                    ring.leave_backward(layer, &arena.parts(before))?;
                }
            }
            training.added();
            run.read_loss()
        };
        Ok(LossOut { nll: run().map_err(report)? })
    }
}
