//! NVIDIA GPUs: the device, its memory, matrix products through cuBLASLt, and our own kernels.
//!
//! The driver and cuBLASLt are opened at run time ([`driver`]); the kernels are machine code for
//! the usual architectures, with PTX behind it, inside the program. Work is queued on one stream of
//! a [`Gpu`], and nothing waits but what says so. A device is a value: there is no current one.

mod attention;
mod blas;
mod buffer;
mod copier;
mod driver;
mod gated;
mod gpu;
pub mod ops;
mod optimizer;
mod profile;

pub use blas::Product;
pub use buffer::{Buffer, Event, Value};
pub use copier::{Copier, HostBuffer};
pub use driver::DevicePtr;
pub use gpu::{CudaError, Gpu, GpuInfo, gpus};

/// Dtype of a matrix on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// f32, with exact products (no TF32).
    F32,
    /// bf16, summed in f32.
    Bf16,
}

impl Element {
    /// Bytes of one value.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}
