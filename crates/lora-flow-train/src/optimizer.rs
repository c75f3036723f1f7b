//! AdamW over what is trained, and the clipping of its gradients.

use candle_core::{DType, Tensor};
use lora_flow_core::{Error, Result, ResultExt};
use lora_flow_kernels::{adamw, elementwise};
use lora_flow_model::adapter::LoraGrads;
use lora_flow_model::lora::{Lora, Role};

use crate::config::TrainConfig;

/// Constants of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSettings {
    /// Decay of the mean of the gradient.
    pub beta1: f64,
    /// Decay of the mean of its square.
    pub beta2: f64,
    /// Added to the root.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// LoRA+: learning rate of B, and as in PEFT of everything with one dimension, over that of
    /// the rest.
    pub b_ratio: f64,
}

impl AdamWSettings {
    /// Those of a run.
    pub fn new(config: &TrainConfig) -> Self {
        Self {
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
            b_ratio: config.loraplus_lr_ratio.unwrap_or(1.0),
        }
    }
}

/// Parameters and moments, flat, in the order of [`Lora::tensors`].
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    settings: AdamWSettings,
    roles: Vec<Role>,
    /// Values.
    pub params: Vec<Vec<f32>>,
    /// Running mean of the gradient.
    pub m: Vec<Vec<f32>>,
    /// Running mean of its square.
    pub v: Vec<Vec<f32>>,
}

impl AdamW {
    /// Moments at zero for the values of an adapter.
    ///
    /// # Errors
    /// When the values cannot be read from the device.
    pub fn new(lora: &Lora, settings: AdamWSettings) -> Result<Self> {
        let params = values(lora)?;
        let zeros: Vec<_> = params.iter().map(|p| vec![0.0; p.len()]).collect();
        let roles = lora.tensors().map(|(role, _)| role).collect();
        Ok(Self { settings, roles, params, m: zeros.clone(), v: zeros })
    }

    /// One step; `step` counts from 1.
    ///
    /// # Errors
    /// When the gradients belong to another adapter.
    pub fn step(&mut self, grads: &LoraGrads, lr: f64, step: u64) -> Result<()> {
        if grads.tensors().count() != self.params.len() {
            return Err(Error::new("the gradients belong to another adapter"));
        }
        let s = self.settings;
        let moments = self.m.iter_mut().zip(&mut self.v);
        let tensors = self.params.iter_mut().zip(grads.tensors()).zip(moments);
        for (((param, grad), (m, v)), role) in tensors.zip(&self.roles) {
            let lr = match role {
                Role::A | Role::Weight => lr,
                Role::B | Role::Magnitude | Role::Undecayed => lr * s.b_ratio,
            };
            let decay = if *role == Role::Undecayed { 0.0 } else { s.weight_decay };
            let (b1, b2, eps) = (s.beta1, s.beta2, s.epsilon);
            adamw::step(param, grad, m, v, lr, b1, b2, eps, decay, step)
                .context("cannot update the adapter")?;
        }
        Ok(())
    }

    /// Puts the values into the adapter's tensors.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn write_to(&self, lora: &mut Lora) -> Result<()> {
        write(lora, &self.params)
    }
}

/// Values of what is trained, f32.
pub(crate) fn values(lora: &Lora) -> Result<Vec<Vec<f32>>> {
    let read = |t: &Tensor| t.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>();
    lora.tensors().map(|(_, t)| read(t).context("cannot read the adapter")).collect()
}

/// Puts values into the adapter's tensors.
pub(crate) fn write(lora: &mut Lora, values: &[Vec<f32>]) -> Result<()> {
    for (tensor, values) in lora.tensors_mut().zip(values) {
        *tensor = Tensor::from_slice(values, tensor.shape(), tensor.device())
            .and_then(|t| t.to_dtype(tensor.dtype()))
            .context("cannot place the adapter on the device")?;
    }
    Ok(())
}

/// Scales the gradients down to a norm of `max_norm` if theirs is larger (never if it is 0) and
/// returns the norm before. As `torch.nn.utils.clip_grad_norm_`: the factor is
/// min(1, max / (norm + 1e-6)).
pub fn clip_grad_norm(grads: &mut LoraGrads, max_norm: f64) -> f64 {
    let norm = grads.tensors().map(elementwise::sum_of_squares).sum::<f64>().sqrt();
    let factor = max_norm / (norm + 1e-6);
    if max_norm > 0.0 && factor < 1.0 {
        grads.tensors_mut().for_each(|g| elementwise::scale(g, factor as f32));
    }
    norm
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_flow_model::adapter::ModuleGrads;

    #[test]
    fn clipping_scales_all_tensors_together_and_only_down() {
        let module = ModuleGrads { a: vec![3.0], b: vec![0.0, 4.0], magnitude: None };
        let grads = LoraGrads { modules: vec![module], saved: Vec::new() };
        let mut clipped = grads.clone();
        assert_eq!(clip_grad_norm(&mut clipped, 1.0), 5.0);
        let expected = [3.0 / 5.000_001, 4.0 / 5.000_001];
        assert!((f64::from(clipped.modules[0].a[0]) - expected[0]).abs() < 1e-7);
        assert!((f64::from(clipped.modules[0].b[1]) - expected[1]).abs() < 1e-7);
        for max in [0.0, 10.0] {
            let mut same = grads.clone();
            assert_eq!(clip_grad_norm(&mut same, max), 5.0);
            assert_eq!(same, grads);
        }
    }
}
