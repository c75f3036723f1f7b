//! The device of a run, and its threads.

use candle_core::Device;
use lora_flow_core::{DeviceSpec, Error, Result, ResultExt};

/// Opens the device that a run asks for.
///
/// # Errors
/// When there is no such GPU, or the program was built without CUDA.
pub fn open_device(spec: DeviceSpec) -> Result<Device> {
    match spec {
        DeviceSpec::Cpu => Ok(Device::Cpu),
        DeviceSpec::Cuda(index) => Device::new_cuda(index).map_err(|e| {
            Error::new(format!("cannot open device `{spec}`"))
                .with_hint("use `--device cpu`: this version has no CUDA")
                .with_source(e)
        }),
    }
}

/// Runs `work` on a pool of `threads` threads. Results do not depend on their number.
///
/// # Errors
/// When the pool cannot be started, or those of `work`.
pub fn with_threads<T: Send>(threads: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.max(1));
    pool.build().context("cannot start the threads")?.install(work)
}
