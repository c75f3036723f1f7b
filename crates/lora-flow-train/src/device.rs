//! The device of a run, and its threads.

use lora_flow_core::{DeviceSpec, Error, Result, ResultExt};
use lora_flow_model::place::Place;

/// Opens the device that a run asks for.
///
/// # Errors
/// When the program was built without CUDA, there is no driver or GPU, or they are too old.
pub fn open_device(spec: DeviceSpec) -> Result<Place> {
    match spec {
        DeviceSpec::Cpu => Ok(Place::Cpu),
        DeviceSpec::Cuda(index) => open_cuda(index)
            .map_err(|e| Error::new(format!("cannot open device `{spec}`")).with_source(e)),
    }
}

#[cfg(feature = "cuda")]
fn open_cuda(index: usize) -> Result<Place> {
    let gpu = lora_flow_kernels::cuda::Gpu::open(index);
    gpu.map(Place::Cuda).map_err(lora_flow_model::cuda::report)
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_: usize) -> Result<Place> {
    Err(Error::new("this version of lora-flow has no CUDA")
        .with_hint("build it with `cargo build --release --features cuda`, or use `--device cpu`"))
}

/// Runs `work` on a pool of `threads` threads. Results do not depend on their number.
///
/// # Errors
/// When the pool cannot be started, or those of `work`.
pub fn with_threads<T: Send>(threads: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.max(1));
    pool.build().context("cannot start the threads")?.install(work)
}
