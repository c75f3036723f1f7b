//! An adapter in training: values, gradients and moments on the device.

use std::sync::Arc;

use lora_flow_core::{Error, Result};
use lora_flow_kernels::cuda::ops::{self, AdamWStep};
use lora_flow_kernels::cuda::{Buffer, CudaError, Element, Gpu};

use super::pass::Dropout;
use super::weights::{GroupGrads, Table, Weights, values};
use super::{CudaDecoder, report};
use crate::adapter::{DropoutKey, linear_key};
use crate::lora::Lora;

/// Factors of a step, as [`ops::AdamWStep`].
pub type AdamWFactors = AdamWStep;

/// Values and moments of A and B of each module in turn, on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainState {
    /// Values.
    pub params: Vec<Vec<f32>>,
    /// Running mean of the gradient.
    pub m: Vec<Vec<f32>>,
    /// Running mean of its square.
    pub v: Vec<Vec<f32>>,
}

/// An adapter in training on a GPU.
pub struct Training {
    gpu: Arc<Gpu>,
    element: Element,
    lengths: Vec<usize>,
    params: Buffer<f32>,
    m: Buffer<f32>,
    v: Buffer<f32>,
    grads: Vec<[GroupGrads; 4]>,
    table: Table,
    /// Whether the gradients hold those of an earlier pass of the same step.
    accumulate: bool,
    generation: u64,
    dropout: f64,
    widest_input: usize,
    host: u64,
}

impl std::fmt::Debug for Training {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Training({} tensors on {:?})", self.lengths.len(), self.gpu)
    }
}

impl CudaDecoder {
    /// Puts an adapter on the device to be trained. `b_ratio`: learning rate of B over that of A;
    /// `host`: bytes of the host's memory that activations may take where the device has no room,
    /// `LORA_FLOW_CUDA_HOST_GIB` if that is set.
    ///
    /// # Errors
    /// When the adapter does not fit the model or the device has no room.
    pub fn training(&self, lora: &Lora, b_ratio: f64, host: u64) -> Result<Training> {
        super::check_supported(lora)?;
        let mut state = self.lock();
        let weights = &mut state.weights;
        weights.make_room(&self.gpu, &self.config, self.element, lora)?;
        let grads: Vec<[GroupGrads; 4]> = weights
            .layers
            .iter()
            .map(|layer| {
                let groups: Vec<GroupGrads> = layer
                    .groups
                    .iter()
                    .map(|g| {
                        Ok(GroupGrads {
                            a: self.gpu.zeros(g.r * g.input)?,
                            b: self.gpu.zeros(g.output * g.r)?,
                        })
                    })
                    .collect::<std::result::Result<_, CudaError>>()
                    .map_err(report)?;
                <[GroupGrads; 4]>::try_from(groups)
                    .map_err(|_| Error::new("a layer has four groups"))
            })
            .collect::<Result<_>>()?;
        let table = Table::new(&self.gpu, weights, lora, Some((&grads, b_ratio)))?;
        let values = values(lora)?;
        let lengths: Vec<usize> = values.iter().map(Vec::len).collect();
        let all = lengths.iter().sum();
        let inputs = weights.layers.iter().flat_map(|l| l.groups.iter().map(|g| g.input));
        let training = Training {
            gpu: self.gpu.clone(),
            element: self.element,
            lengths,
            params: self.gpu.upload(&values.concat()).map_err(report)?,
            m: self.gpu.zeros(all).map_err(report)?,
            v: self.gpu.zeros(all).map_err(report)?,
            grads,
            table,
            accumulate: false,
            generation: weights.generation,
            dropout: lora.config.lora_dropout,
            widest_input: inputs.max().unwrap_or(0),
            host: super::gib("LORA_FLOW_CUDA_HOST_GIB").unwrap_or(host),
        };
        weights.detach();
        training.place()?;
        Ok(training)
    }
}

impl Training {
    fn place(&self) -> Result<()> {
        ops::place(&self.gpu, self.element, &self.table.buffers(self.params.ptr(), 0, 0))
            .map_err(report)
    }

    /// Checks that the matrices still have this adapter's places.
    pub(super) fn check(&self, weights: &Weights) -> Result<()> {
        if self.generation != weights.generation {
            return Err(Error::new("another adapter was put on the GPU while this one trains"));
        }
        Ok(())
    }

    /// Dropout of a pass over `tokens` tokens, if the adapter has it and the pass a key.
    pub(super) fn dropout(
        &self,
        key: Option<DropoutKey>,
        tokens: usize,
    ) -> std::result::Result<Option<Dropout>, CudaError> {
        let Some(key) = key.filter(|_| self.dropout > 0.0) else { return Ok(None) };
        let scratch = self.gpu.alloc(tokens * self.widest_input * self.element.size())?;
        let key = Box::new(move |at| linear_key(key, at));
        Ok(Some(Dropout { p: self.dropout, key, scratch }))
    }

    pub(super) fn grads(&self, layer: usize) -> &[GroupGrads; 4] {
        &self.grads[layer]
    }

    /// Bytes of the host's memory that activations may take.
    pub(super) fn host_memory(&self) -> u64 {
        self.host
    }

    pub(super) fn accumulate(&self) -> bool {
        self.accumulate
    }

    pub(super) fn added(&mut self) {
        self.accumulate = true;
    }

    /// Starts a step: the next pass overwrites the gradients.
    pub fn clear(&mut self) {
        self.accumulate = false;
    }

    /// Clips and takes a step. Returns the norm of the gradients before clipping; one that is not
    /// finite changed nothing. Waits.
    ///
    /// # Errors
    /// When the device failed.
    pub fn step(&mut self, factors: &AdamWFactors) -> Result<f64> {
        let buffers = self.table.buffers(self.params.ptr(), self.m.ptr(), self.v.ptr());
        let run = || {
            ops::adamw(&self.gpu, self.element, &buffers, factors)?;
            self.table.norm()
        };
        Ok(f64::from(run().map_err(report)?))
    }

    /// Values of A and B of each module. Waits.
    ///
    /// # Errors
    /// When the device failed.
    pub fn params(&self) -> Result<Vec<Vec<f32>>> {
        self.split(&self.params)
    }

    /// Values and moments. Waits.
    ///
    /// # Errors
    /// When the device failed.
    pub fn state(&self) -> Result<TrainState> {
        Ok(TrainState {
            params: self.split(&self.params)?,
            m: self.split(&self.m)?,
            v: self.split(&self.v)?,
        })
    }

    /// Goes on from a state.
    ///
    /// # Errors
    /// When it is another adapter's, or the device failed.
    pub fn restore(&mut self, state: &TrainState) -> Result<()> {
        for (to, from) in [(&self.params, &state.params), (&self.m, &state.m), (&self.v, &state.v)]
        {
            if from.iter().map(Vec::len).ne(self.lengths.iter().copied()) {
                return Err(Error::new("the checkpoint belongs to another adapter"));
            }
            to.write(&from.concat()).map_err(report)?;
        }
        self.place()
    }

    /// Gradients of A and B of each module as the last passes left them, for tests. Waits.
    ///
    /// # Errors
    /// When the device failed.
    pub fn gradients(&self, decoder: &CudaDecoder, lora: &Lora) -> Result<Vec<Vec<f32>>> {
        let state = decoder.lock();
        let mut out = vec![Vec::new(); self.lengths.len()];
        for (layer, grads) in state.weights.layers.iter().zip(&self.grads) {
            for (group, grads) in layer.groups.iter().zip(grads).filter(|(g, _)| g.r > 0) {
                let (a, b) = (grads.a.to_vec().map_err(report)?, grads.b.to_vec().map_err(report)?);
                for p in &group.places {
                    let rows = p.column * group.input..(p.column + p.rank) * group.input;
                    out[2 * p.module] = a[rows].to_vec();
                    let scale = lora.modules[p.module].scale as f32;
                    out[2 * p.module + 1] = (p.row..p.row + p.rows)
                        .flat_map(|row| &b[row * group.r + p.column..][..p.rank])
                        .map(|x| x * scale)
                        .collect();
                }
            }
        }
        Ok(out)
    }

    fn split(&self, buffer: &Buffer<f32>) -> Result<Vec<Vec<f32>>> {
        let all = buffer.to_vec().map_err(report)?;
        let mut rest = all.as_slice();
        Ok(self
            .lengths
            .iter()
            .map(|len| {
                let (one, others) = rest.split_at(*len);
                rest = others;
                one.to_vec()
            })
            .collect())
    }
}
