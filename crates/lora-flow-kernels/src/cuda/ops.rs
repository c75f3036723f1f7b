//! The kernels, with typed arguments. A matrix is an address and a row stride in values; rows start
//! at multiples of 16 bytes and widths are multiples of 8 where a kernel does not say otherwise.
//! Shapes are the caller's to get right: nothing is checked on the device.

use std::ffi::c_void;
use std::sync::Arc;

use super::Element;
use super::driver::DevicePtr;
use super::gpu::{CudaError, Gpu};

pub use super::attention::{Attention, attention_bwd, attention_cached, attention_fwd};
pub use super::gated::{GATED_RANK, GatedBack, gated_back, gated_room};
pub use super::optimizer::{AdamWBuffers, AdamWStep, Matrix, PIECE, adamw, place};

type Result<T> = std::result::Result<T, CudaError>;
/// Address of the first value, and values from one row to the next.
pub type Mat = (DevicePtr, usize);

/// Builds the argument list of a kernel and launches it: one line per kernel below.
macro_rules! launch {
    ($gpu:expr, $name:expr, $grid:expr, $threads:expr, $shared:expr, $($arg:expr),* $(,)?) => {{
        $gpu.enter()?;
        let mut args: Vec<*mut c_void> = Vec::with_capacity(20);
        // Each value lives to the end of the launch, which copies it.
        launch!(@bind args, $gpu, $name, $grid, $threads, $shared; $($arg),*)
    }};
    (@bind $args:ident, $gpu:expr, $name:expr, $grid:expr, $threads:expr, $shared:expr; $first:expr $(, $rest:expr)*) => {{
        let mut value = $first;
        $args.push((&raw mut value).cast());
        launch!(@bind $args, $gpu, $name, $grid, $threads, $shared; $($rest),*)
    }};
    (@bind $args:ident, $gpu:expr, $name:expr, $grid:expr, $threads:expr, $shared:expr;) => {
        $gpu.launch($name, $grid, $threads, $shared, &mut $args)
    };
}

pub(super) use launch;

/// Name of a kernel for a dtype.
pub(super) fn kernel(name: &str, element: Element) -> String {
    format!("{name}_{}", element.suffix())
}

/// Threads for a row of `width` values, eight each.
fn row_threads(width: usize) -> u32 {
    (width.div_ceil(8).next_multiple_of(32)).clamp(32, 256) as u32
}

/// Blocks of 256 threads for `count` values.
fn blocks(count: usize) -> (u32, u32) {
    (count.div_ceil(256).min(1 << 16) as u32, 1)
}

pub(super) fn int(x: usize) -> i32 {
    i32::try_from(x).unwrap_or(i32::MAX)
}

/// x[row] = table[ids[row]], `table` [vocab, width].
///
/// # Errors
/// When the device failed.
pub fn gather(
    gpu: &Arc<Gpu>,
    e: Element,
    x: Mat,
    table: DevicePtr,
    ids: DevicePtr,
    rows: usize,
    width: usize,
) -> Result<()> {
    launch!(
        gpu,
        &kernel("gather", e),
        (rows as u32, 1),
        row_threads(width),
        0,
        x.0,
        x.1,
        table,
        ids,
        int(width)
    )
}

/// y = RMSNorm(x)·w and 1/σ of each row. With `pick` (not 0) row i comes from row pick[i] of x, and
/// is zeros where that is negative.
///
/// # Errors
/// When the device failed.
#[allow(clippy::too_many_arguments)]
pub fn rms_fwd(
    gpu: &Arc<Gpu>,
    e: Element,
    y: Mat,
    rstd: DevicePtr,
    x: Mat,
    w: DevicePtr,
    pick: DevicePtr,
    rows: usize,
    width: usize,
    eps: f32,
) -> Result<()> {
    launch!(
        gpu,
        &kernel("rms_fwd", e),
        (rows as u32, 1),
        row_threads(width),
        0,
        y.0,
        y.1,
        rstd,
        x.0,
        x.1,
        w,
        pick,
        int(width),
        eps
    )
}

/// y again, from x and 1/σ.
///
/// # Errors
/// When the device failed.
#[allow(clippy::too_many_arguments)]
pub fn rms_again(
    gpu: &Arc<Gpu>,
    e: Element,
    y: Mat,
    rstd: DevicePtr,
    x: Mat,
    w: DevicePtr,
    rows: usize,
    width: usize,
) -> Result<()> {
    launch!(
        gpu,
        &kernel("rms_again", e),
        (rows as u32, 1),
        row_threads(width),
        0,
        y.0,
        y.1,
        rstd,
        x.0,
        x.1,
        w,
        int(width)
    )
}

/// d = the gradient of the norm's input, or += with `add`; `pick` as in [`rms_fwd`].
///
/// # Errors
/// When the device failed.
#[allow(clippy::too_many_arguments)]
pub fn rms_bwd(
    gpu: &Arc<Gpu>,
    e: Element,
    d: Mat,
    dy: Mat,
    x: Mat,
    w: DevicePtr,
    rstd: DevicePtr,
    pick: DevicePtr,
    rows: usize,
    width: usize,
    add: bool,
) -> Result<()> {
    launch!(
        gpu,
        &kernel("rms_bwd", e),
        (rows as u32, 1),
        row_threads(width),
        0,
        d.0,
        d.1,
        dy.0,
        dy.1,
        x.0,
        x.1,
        w,
        rstd,
        pick,
        int(width),
        i32::from(add)
    )
}

/// x += bias (f32) in each row.
///
/// # Errors
/// When the device failed.
pub fn add_bias(
    gpu: &Arc<Gpu>,
    e: Element,
    x: Mat,
    bias: DevicePtr,
    rows: usize,
    width: usize,
) -> Result<()> {
    launch!(
        gpu,
        &kernel("add_bias", e),
        (rows as u32, 1),
        row_threads(width),
        0,
        x.0,
        x.1,
        bias,
        int(width)
    )
}

/// RMS norm of each of `heads` heads of a row; `rstd` [rows, heads].
///
/// # Errors
/// When the device failed.
#[allow(clippy::too_many_arguments)]
pub fn head_norm(
    gpu: &Arc<Gpu>,
    e: Element,
    y: Mat,
    rstd: DevicePtr,
    x: Mat,
    w: DevicePtr,
    rows: usize,
    heads: usize,
    dim: usize,
    eps: f32,
) -> Result<()> {
    launch!(
        gpu,
        &kernel("head_norm", e),
        (rows as u32, 1),
        128,
        0,
        y.0,
        y.1,
        rstd,
        x.0,
        x.1,
        w,
        int(heads),
        int(dim),
        eps
    )
}

/// Its backward, in place on the gradient `d`.
///
/// # Errors
/// When the device failed.
#[allow(clippy::too_many_arguments)]
pub fn head_norm_bwd(
    gpu: &Arc<Gpu>,
    e: Element,
    d: Mat,
    rstd: DevicePtr,
    x: Mat,
    w: DevicePtr,
    rows: usize,
    heads: usize,
    dim: usize,
) -> Result<()> {
    launch!(
        gpu,
        &kernel("head_norm_bwd", e),
        (rows as u32, 1),
        128,
        0,
        d.0,
        d.1,
        rstd,
        x.0,
        x.1,
        w,
        int(heads),
        int(dim)
    )
}

/// Rotates the first `heads` heads of each row in place, back with `inverse`. `table`
/// [positions, dim/2] of (cos, sin).
///
/// # Errors
/// When the device failed.
#[allow(clippy::too_many_arguments)]
pub fn rope(
    gpu: &Arc<Gpu>,
    e: Element,
    x: Mat,
    table: DevicePtr,
    positions: DevicePtr,
    rows: usize,
    heads: usize,
    dim: usize,
    inverse: bool,
) -> Result<()> {
    let sign: f32 = if inverse { -1.0 } else { 1.0 };
    launch!(
        gpu,
        &kernel("rope", e),
        (rows as u32, 1),
        row_threads(heads * dim / 2),
        0,
        x.0,
        x.1,
        table,
        positions,
        int(heads),
        int(dim),
        sign
    )
}

/// h = act(gate)·up; a row of `gu` is the gate and then up. `act`: 0 SiLU, 1 GELU, 2 GELU by tanh.
///
/// # Errors
/// When the device failed.
pub fn gated_fwd(
    gpu: &Arc<Gpu>,
    e: Element,
    h: Mat,
    gu: Mat,
    rows: usize,
    width: usize,
    act: i32,
) -> Result<()> {
    launch!(
        gpu,
        &kernel("gated_fwd", e),
        (rows as u32, 1),
        row_threads(width),
        0,
        h.0,
        h.1,
        gu.0,
        gu.1,
        int(width),
        act
    )
}

/// In place: dh becomes h, gate and up become their gradients.
///
/// # Errors
/// When the device failed.
pub fn gated_bwd(
    gpu: &Arc<Gpu>,
    e: Element,
    dh: Mat,
    gu: Mat,
    rows: usize,
    width: usize,
    act: i32,
) -> Result<()> {
    launch!(
        gpu,
        &kernel("gated_bwd", e),
        (rows as u32, 1),
        row_threads(width),
        0,
        dh.0,
        dh.1,
        gu.0,
        gu.1,
        int(width),
        act
    )
}

/// y = x; any width.
///
/// # Errors
/// When the device failed.
pub fn copy2d(gpu: &Arc<Gpu>, e: Element, y: Mat, x: Mat, rows: usize, width: usize) -> Result<()> {
    launch!(
        gpu,
        &kernel("copy2d", e),
        blocks(rows * width),
        256,
        0,
        y.0,
        y.1,
        x.0,
        x.1,
        int(rows),
        int(width)
    )
}

/// y (+)= x·mask: the CPU's mask of the same key, dropping with probability p. Any width.
///
/// # Errors
/// When the device failed.
#[allow(clippy::too_many_arguments)]
pub fn dropout(
    gpu: &Arc<Gpu>,
    e: Element,
    y: Mat,
    x: Mat,
    rows: usize,
    width: usize,
    key: u64,
    p: f64,
    add: bool,
) -> Result<()> {
    let threshold = ((p * 2f64.powi(32)) as u64).min(u64::from(u32::MAX)) as u32;
    let keep = (1.0 / (1.0 - p)) as f32;
    launch!(
        gpu,
        &kernel("dropout", e),
        blocks(rows * width),
        256,
        0,
        y.0,
        y.1,
        x.0,
        x.1,
        int(rows),
        int(width),
        key,
        threshold,
        keep,
        i32::from(add)
    )
}

/// Values uniform in ±bound, a function of the key and the place. Any width.
///
/// # Errors
/// When the device failed.
pub fn fill_uniform(
    gpu: &Arc<Gpu>,
    e: Element,
    y: Mat,
    rows: usize,
    width: usize,
    key: u64,
    bound: f32,
) -> Result<()> {
    launch!(
        gpu,
        &kernel("fill_uniform", e),
        blocks(rows * width),
        256,
        0,
        y.0,
        y.1,
        int(rows),
        int(width),
        key,
        bound
    )
}

/// A sum over the bits and places of a matrix's values, equal for equal matrices. Waits.
///
/// # Errors
/// When the device failed.
pub fn checksum(gpu: &Arc<Gpu>, e: Element, x: Mat, rows: usize, width: usize) -> Result<u64> {
    let sum = gpu.zeros::<u64>(1)?;
    launch!(
        gpu,
        &kernel("checksum", e),
        (blocks(rows * width).0.min(1024), 1),
        256,
        0,
        sum.ptr(),
        x.0,
        x.1,
        int(rows),
        int(width)
    )?;
    Ok(sum.to_vec()?[0])
}

/// nll of each row of logits; with a scale the logits become scale·(softmax − onehot). A row with a
/// negative target has no loss and no gradient.
///
/// # Errors
/// When the device failed.
#[allow(clippy::too_many_arguments)]
pub fn cross_entropy(
    gpu: &Arc<Gpu>,
    e: Element,
    logits: Mat,
    nll: DevicePtr,
    targets: DevicePtr,
    rows: usize,
    vocab: usize,
    scale: Option<f32>,
) -> Result<()> {
    launch!(
        gpu,
        &kernel("cross_entropy", e),
        (rows as u32, 1),
        512,
        0,
        logits.0,
        logits.1,
        nll,
        targets,
        int(vocab),
        i32::from(scale.is_some()),
        scale.unwrap_or(0.0)
    )
}
