//! Where a decoder computes.

#[cfg(feature = "cuda")]
use std::sync::Arc;

/// The processor, or one GPU. Adapters are on the CPU either way; a decoder on a GPU takes them
/// there.
#[derive(Debug, Clone)]
pub enum Place {
    /// The processor.
    Cpu,
    /// One NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda(Arc<lora_flow_kernels::cuda::Gpu>),
}

impl Place {
    /// Whether it is the processor.
    pub fn is_cpu(&self) -> bool {
        matches!(self, Self::Cpu)
    }
}
