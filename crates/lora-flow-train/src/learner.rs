//! The adapter as it learns: gradients, moments and steps, on the host or on the GPU of the decoder.

use lora_flow_core::Result;
use lora_flow_model::adapter::LoraGrads;
use lora_flow_model::batch::Batch;
use lora_flow_model::decoder::{Decoder, LossOut, PassOptions};
use lora_flow_model::lora::Lora;

use crate::optimizer::{self, AdamW, AdamWSettings, clip_grad_norm};

/// Values and moments of A and B of each module in turn.
pub(crate) struct Values {
    pub(crate) params: Vec<Vec<f32>>,
    pub(crate) m: Vec<Vec<f32>>,
    pub(crate) v: Vec<Vec<f32>>,
}

/// Gradients and optimiser of one adapter. A step is [`Learner::clear`], passes, [`Learner::step`].
pub struct Learner<'a> {
    decoder: &'a Decoder,
    state: State,
}

enum State {
    Host {
        optimizer: AdamW,
        grads: LoraGrads,
    },
    #[cfg(feature = "cuda")]
    Cuda {
        settings: AdamWSettings,
        training: Box<lora_flow_model::cuda::Training>,
    },
}

impl<'a> Learner<'a> {
    /// Moments at zero for the values of an adapter.
    ///
    /// # Errors
    /// When the adapter does not fit the model, or a GPU has no room.
    pub fn new(decoder: &'a Decoder, lora: &Lora, settings: AdamWSettings) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = decoder.cuda() {
            // Half of what the host has left is enough for what does not fit on the device.
            let host = crate::memory::available_bytes().unwrap_or(0) / 2;
            let training = Box::new(cuda.training(lora, settings.b_ratio, host)?);
            return Ok(Self { decoder, state: State::Cuda { settings, training } });
        }
        let (optimizer, grads) = (AdamW::new(lora, settings)?, LoraGrads::zeros(lora));
        Ok(Self { decoder, state: State::Host { optimizer, grads } })
    }

    /// Sets the gradients to zero.
    pub fn clear(&mut self) {
        match &mut self.state {
            State::Host { grads, .. } => grads.clear(),
            #[cfg(feature = "cuda")]
            State::Cuda { training, .. } => training.clear(),
        }
    }

    /// Loss of a batch; its gradients are added.
    ///
    /// # Errors
    /// Those of [`Decoder::loss_and_grad`].
    pub fn pass(&mut self, batch: &Batch, lora: &Lora, options: &PassOptions) -> Result<LossOut> {
        match &mut self.state {
            State::Host { grads, .. } => self.decoder.loss_and_grad(batch, lora, options, grads),
            #[cfg(feature = "cuda")]
            State::Cuda { training, .. } => match self.decoder.cuda() {
                Some(cuda) => cuda.loss_and_grad(batch, training, options),
                None => Err(lora_flow_core::Error::new("the decoder is not on the GPU")),
            },
        }
    }

    /// Clips the gradients and takes step `step` (from 1) at a learning rate. Returns their norm
    /// before; if that is not finite nothing changed. The adapter on the host follows at once only
    /// where it is trained there; see [`Self::write_to`].
    ///
    /// # Errors
    /// When the device failed.
    pub fn step(&mut self, lora: &mut Lora, max_norm: f64, lr: f64, step: u64) -> Result<f64> {
        match &mut self.state {
            State::Host { optimizer, grads } => {
                let norm = clip_grad_norm(grads, max_norm);
                if norm.is_finite() {
                    optimizer.step(grads, lr, step)?;
                    optimizer.write_to(lora)?;
                }
                Ok(norm)
            }
            #[cfg(feature = "cuda")]
            State::Cuda { settings: s, training } => {
                training.step(&lora_flow_model::cuda::AdamWFactors {
                    lr,
                    beta1: s.beta1,
                    beta2: s.beta2,
                    eps: s.epsilon,
                    weight_decay: s.weight_decay,
                    step,
                    max_norm,
                })
            }
        }
    }

    /// Values of A and B of each module.
    ///
    /// # Errors
    /// When the device failed.
    pub(crate) fn params(&self) -> Result<Vec<Vec<f32>>> {
        match &self.state {
            State::Host { optimizer, .. } => Ok(optimizer.params.clone()),
            #[cfg(feature = "cuda")]
            State::Cuda { training, .. } => training.params(),
        }
    }

    /// Values and moments.
    ///
    /// # Errors
    /// When the device failed.
    pub(crate) fn values(&self) -> Result<Values> {
        match &self.state {
            State::Host { optimizer: o, .. } => {
                Ok(Values { params: o.params.clone(), m: o.m.clone(), v: o.v.clone() })
            }
            #[cfg(feature = "cuda")]
            State::Cuda { training, .. } => {
                let state = training.state()?;
                Ok(Values { params: state.params, m: state.m, v: state.v })
            }
        }
    }

    /// Goes on from values and moments of the same adapter.
    ///
    /// # Errors
    /// When they are another's, or the device failed.
    pub(crate) fn restore(&mut self, from: Values) -> Result<()> {
        match &mut self.state {
            State::Host { optimizer: o, .. } => {
                (o.params, o.m, o.v) = (from.params, from.m, from.v)
            }
            #[cfg(feature = "cuda")]
            State::Cuda { training, .. } => {
                let Values { params, m, v } = from;
                training.restore(&lora_flow_model::cuda::TrainState { params, m, v })?;
            }
        }
        Ok(())
    }

    /// Puts the values into the adapter on the host.
    ///
    /// # Errors
    /// When the device failed.
    pub(crate) fn write_to(&self, lora: &mut Lora) -> Result<()> {
        optimizer::write(lora, &self.params()?)
    }
}
