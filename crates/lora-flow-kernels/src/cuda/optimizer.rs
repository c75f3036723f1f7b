//! Launches of the optimiser's kernels (adamw.cu).

use std::ffi::c_void;
use std::sync::Arc;

use super::Element;
use super::driver::DevicePtr;
use super::gpu::{CudaError, Gpu};
use super::ops::{int, kernel, launch};

type Result<T> = std::result::Result<T, CudaError>;

/// Values of one matrix that one block of the optimiser's kernels works on.
pub const PIECE: usize = 2048;

/// One matrix of an adapter for the optimiser, as the kernels read it (`Matrix` in adamw.cu).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    /// Its first value in the parameters and moments.
    pub offset: u64,
    /// Its first gradient.
    pub grad: DevicePtr,
    /// The first value of its copy in the compute dtype.
    pub copy: DevicePtr,
    /// Row stride of the gradients.
    pub ld_grad: u64,
    /// Row stride of the copy.
    pub ld_copy: u64,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub cols: u32,
    /// Gradient of the value / stored gradient.
    pub grad_scale: f32,
    /// Copy / value.
    pub copy_scale: f32,
    /// Factor of the learning rate.
    pub lr_scale: f32,
    /// Unused.
    pub pad: u32,
}

impl super::buffer::Value for Matrix {}

/// Factors of an AdamW step.
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f64,
    /// β₁.
    pub beta1: f64,
    /// β₂.
    pub beta2: f64,
    /// ε.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Step, from 1.
    pub step: u64,
    /// Norm that gradients are scaled down to; 0: never.
    pub max_norm: f64,
}

/// Parameters and moments (flat, f32) and the tables of matrices and pieces.
#[derive(Debug, Clone, Copy)]
pub struct AdamWBuffers {
    /// Values.
    pub params: DevicePtr,
    /// First moments.
    pub means: DevicePtr,
    /// Second moments.
    pub squares: DevicePtr,
    /// [`Matrix`] entries.
    pub matrices: DevicePtr,
    /// (matrix, first value) pairs, u32.
    pub pieces: DevicePtr,
    /// Number of pieces.
    pub count: usize,
    /// f64 of scratch for each piece.
    pub sums: DevicePtr,
    /// f32 [2]: the norm of the gradients, and the factor that clipping gave.
    pub clip: DevicePtr,
}

/// The norm of all gradients, clipping, and one step; the copies follow the values. A norm that is
/// not finite leaves all as it was.
///
/// # Errors
/// When the device failed.
pub fn adamw(gpu: &Arc<Gpu>, e: Element, b: &AdamWBuffers, s: &AdamWStep) -> Result<()> {
    let grid = (b.count as u32, 1);
    launch!(gpu, "grad_squares", grid, 256, 0, b.sums, b.matrices, b.pieces)?;
    launch!(gpu, "clip_factor", (1, 1), 256, 0, b.clip, b.sums, int(b.count), s.max_norm as f32)?;
    let power = i32::try_from(s.step).unwrap_or(i32::MAX);
    let root = (1.0 - s.beta2.powi(power)).sqrt() as f32;
    let correction = (1.0 - s.beta1.powi(power)) as f32;
    launch!(
        gpu,
        &kernel("adamw", e),
        grid,
        256,
        0,
        b.params,
        b.means,
        b.squares,
        b.matrices,
        b.pieces,
        b.clip,
        s.lr as f32,
        s.weight_decay as f32,
        (1.0 - s.beta1) as f32,
        s.beta2 as f32,
        (1.0 - s.beta2) as f32,
        root,
        correction,
        s.eps as f32
    )
}

/// Writes the copies from the values.
///
/// # Errors
/// When the device failed.
pub fn place(gpu: &Arc<Gpu>, e: Element, b: &AdamWBuffers) -> Result<()> {
    launch!(gpu, &kernel("place", e), (b.count as u32, 1), 256, 0, b.params, b.matrices, b.pieces)
}
