//! Generation on the device: one document, its keys and values cached.

use lora_flow_core::{Error, Result};
use lora_flow_kernels::cuda::{Buffer, CudaError};

use super::arena::Arena;
use super::batch::DeviceBatch;
use super::pass::{Cached, Run};
use super::{CudaDecoder, report};
use crate::batch::Batch;
use crate::lora::Lora;

/// One document under way.
pub struct Session<'a> {
    decoder: &'a CudaDecoder,
    adapter: Option<&'a Lora>,
    /// Per layer [capacity, 2·kv].
    cache: Vec<Buffer<u8>>,
    capacity: usize,
    past: usize,
}

impl CudaDecoder {
    /// Starts a document.
    pub fn session<'a>(&'a self, adapter: Option<&'a Lora>) -> Session<'a> {
        Session { decoder: self, adapter, cache: Vec::new(), capacity: 0, past: 0 }
    }
}

impl Session<'_> {
    /// Logits [V] of the last of some new tokens.
    ///
    /// # Errors
    /// When an id is outside the vocabulary, the adapter does not fit, or the device fails.
    pub fn next_logits(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        let decoder = self.decoder;
        let batch = Batch::from_documents(&[ids]);
        batch.check(decoder.config.vocab_size)?;
        if ids.is_empty() {
            return Err(Error::new("there are no new tokens"));
        }
        let mut state = decoder.lock();
        let state = &mut *state;
        if let Some(lora) = self.adapter {
            super::check_supported(lora)?;
            state.weights.attach(&decoder.gpu, &decoder.config, decoder.element, lora)?;
        }
        let mut run = || -> std::result::Result<Vec<f32>, CudaError> {
            let mut on = DeviceBatch::new(&decoder.gpu, &decoder.config, &batch)?;
            self.reserve(self.past + on.tokens)?;
            let longest = self.past + on.tokens;
            on.longest = longest;
            let arena = Arena::ready(&mut state.arena, decoder, &mut state.weights, &on, None, 0)?;
            let run = Run::new(decoder, &state.weights, arena, &on, self.adapter.is_some(), None);
            let positions: Vec<i32> = (self.past..longest).map(|p| p as i32).collect();
            let (positions, zeros) =
                (decoder.gpu.upload(&positions)?, decoder.gpu.zeros::<i32>(on.tokens)?);
            let cached = Cached {
                layers: &self.cache,
                past: self.past,
                positions: positions.ptr(),
                zeros: zeros.ptr(),
            };
            run.embed()?;
            for layer in 0..decoder.config.num_hidden_layers {
                run.attend(layer, false, Some(&cached))?;
                run.gate_up(layer, false, false)?;
                run.down(layer, false)?;
            }
            run.last_logits(ids.len() - 1)
        };
        let logits = run().map_err(report)?;
        self.past += ids.len();
        Ok(logits)
    }

    /// Makes room for `len` tokens. Padding is cached as well and overwritten by what follows.
    fn reserve(&mut self, len: usize) -> std::result::Result<(), CudaError> {
        if len <= self.capacity {
            return Ok(());
        }
        let (gpu, config) = (&self.decoder.gpu, &self.decoder.config);
        let capacity = len.next_power_of_two().max(512);
        let row = 2 * config.num_key_value_heads * config.head_dim * self.decoder.element.size();
        let grown = (0..config.num_hidden_layers)
            .map(|layer| {
                let buffer = gpu.zeros::<u8>(capacity * row)?;
                if let Some(old) = self.cache.get(layer) {
                    gpu.copy_rows((buffer.ptr(), row), (old.ptr(), row), row, self.past)?;
                    gpu.wait()?;
                }
                Ok(buffer)
            })
            .collect::<std::result::Result<_, CudaError>>()?;
        (self.cache, self.capacity) = (grown, capacity);
        Ok(())
    }
}
