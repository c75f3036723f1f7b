//! With checkpointing on a host that has room: what the first half of each layer leaves (the stream
//! that enters it, q, k and v, attention's output, the stream again) goes to the host while the next
//! layers compute, and comes back before the layer's backward. On the device there are two sets of it
//! and three streams, in turns; the last two layers' stay.

use lora_flow_kernels::cuda::{Copier, CudaError, DevicePtr, HostBuffer};

type Result<T> = std::result::Result<T, CudaError>;

/// Streams on the device: a layer's input, its output, and one that is being copied.
pub(super) const RING: usize = 3;

/// The way of the layers' activations.
pub(super) struct Ring {
    /// First, so that it waits for its copies before their memory goes.
    copier: Copier,
    /// Of each layer but the last two.
    host: Vec<HostBuffer>,
}

impl Ring {
    /// `None` where the host has no room for `bytes` of each layer.
    pub(super) fn new(copier: Copier, layers: usize, bytes: usize) -> Option<Self> {
        let host = (2..layers).map(|_| copier.host(bytes)).collect::<Option<_>>()?;
        Some(Self { copier, host })
    }

    /// Before a layer's forward: its places are those of two layers before.
    pub(super) fn enter(&self, layer: usize) -> Result<()> {
        if layer < 2 { Ok(()) } else { self.copier.after_copy(layer - 2) }
    }

    /// After a layer's forward: sends what it left.
    pub(super) fn leave(&self, layer: usize, parts: &[(DevicePtr, usize)]) -> Result<()> {
        let Some(host) = self.host.get(layer) else { return Ok(()) };
        self.copier.worked(layer)?;
        self.copier.after_work(layer)?;
        self.copier.send(layer, host, parts)
    }

    /// Before a layer's backward: waits for what it left.
    pub(super) fn enter_backward(&self, layer: usize) -> Result<()> {
        if layer < self.host.len() { self.copier.after_copy(layer) } else { Ok(()) }
    }

    /// After a layer's backward: fetches what comes into its places, that of two layers before, of
    /// which these are the `parts`.
    pub(super) fn leave_backward(&self, layer: usize, parts: &[(DevicePtr, usize)]) -> Result<()> {
        let Some(before) = layer.checked_sub(2) else { return Ok(()) };
        self.copier.worked(layer)?;
        self.copier.after_work(layer)?;
        self.copier.fetch(before, parts, &self.host[before])
    }
}
