//! Backward of the gated activation and the thin products beside it, in one pass over memory
//! (`gated.cu`).

use std::ffi::c_void;
use std::sync::Arc;

use super::driver::DevicePtr;
use super::gpu::{CudaError, Gpu};
use super::ops::{Mat, int, launch};

type Result<T> = std::result::Result<T, CudaError>;

/// Largest rank.
pub const GATED_RANK: usize = 16;

/// The kernels by activation.
pub(super) const GATED_BACK: [&str; 3] = ["gated_back_0", "gated_back_1", "gated_back_2"];

/// How the kernel is launched, as it says itself.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct GatedShape {
    pub(super) tokens: usize,
    pub(super) columns: usize,
    pub(super) threads: u32,
    pub(super) shared: usize,
}

/// Operands of [`gated_back`], all bf16.
#[derive(Debug, Clone, Copy)]
pub struct GatedBack {
    /// Gradient of h = act(gate)·up, [rows, width].
    pub dh: Mat,
    /// Gate and up side by side, [rows, 2·width], which become their gradients; dy·s·B goes beside
    /// them, [rows, r].
    pub gu: Mat,
    /// x·Aᵀ of gate and up, [rows, r].
    pub low: Mat,
    /// dy·s·B of down, [rows, rank].
    pub down: Mat,
    /// s·B of gate and up, [2·width, r].
    pub b: Mat,
    /// Rows and columns of dh.
    pub rows: usize,
    /// Columns of dh.
    pub width: usize,
    /// 0 SiLU, 1 GELU, 2 GELU by tanh.
    pub act: i32,
    /// Columns of `low`: the ranks of gate and up, filled up to a multiple of 8.
    pub r: usize,
    /// First column of gate's and of up's part in r, and its rank; 0 without an adapter.
    pub parts: [(usize, usize); 2],
    /// Rank of down.
    pub rank_down: usize,
}

/// As the kernel has it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    pointers: [DevicePtr; 7],
    strides: [u64; 5],
    rows: i32,
    width: i32,
    act: i32,
    tiles: i32,
    at: [i32; 2],
    rank: [i32; 2],
    rank_down: i32,
}

/// Tokens of a batch that [`stretches`] is made for.
const USUAL: usize = 8192;

/// Stretches of tokens: as many as keep all multiprocessors at work to the end, against the partial
/// sums that each costs. A smaller batch has no more of them than a larger one, so that there is
/// room for its sums where there is for the larger one's.
fn stretches(shape: GatedShape, processors: usize, rows: usize, width: usize) -> usize {
    let chunks = width.div_ceil(shape.columns);
    // Passes over a tile's values: five of its own, and for a stretch two over its sums.
    let cost = |s: usize| {
        let each = 5 * USUAL.div_ceil(shape.tokens).div_ceil(s) * shape.tokens;
        (s * chunks).div_ceil(processors) * (each + 2 * 3 * GATED_RANK * 2)
    };
    let best = (1..=64).min_by_key(|s| cost(*s)).unwrap_or(1);
    best.min(rows.div_ceil(shape.tokens)).max(1)
}

/// Floats for the partial sums of [`gated_back`]: those of dy·s·B, and those of the gradients.
/// `None` where the GPU has too little shared memory for it.
pub fn gated_room(gpu: &Gpu, rows: usize, width: usize) -> Option<(usize, usize)> {
    let shape = gpu.gated?;
    let stretches = stretches(shape, gpu.processors, rows, width);
    let low = width.div_ceil(shape.columns) * rows * 2 * GATED_RANK;
    Some((low, stretches * 3 * width * GATED_RANK))
}

/// Gradients of gate and up in their place, dy·s·B beside them, the gradients of their B into `db`
/// [2·width, r] (its blocks) and that of down's A into `da` [rank, width]; those two are added to
/// with `add`. `room`: see [`gated_room`].
///
/// # Errors
/// When the device failed.
pub fn gated_back(
    gpu: &Arc<Gpu>,
    g: &GatedBack,
    (db, da): (DevicePtr, DevicePtr),
    room: (DevicePtr, DevicePtr),
    add: bool,
) -> Result<()> {
    let Some(shape) = gpu.gated else {
        return Err(CudaError::new("the GPU has too little shared memory", "this is a bug"));
    };
    let tiles = g.rows.div_ceil(shape.tokens);
    let per = tiles.div_ceil(stretches(shape, gpu.processors, g.rows, g.width)).max(1);
    let stretches = tiles.div_ceil(per);
    let chunks = g.width.div_ceil(shape.columns);
    let args = Args {
        pointers: [g.dh.0, g.gu.0, g.low.0, g.down.0, g.b.0, room.0, room.1],
        strides: [g.dh.1, g.gu.1, g.low.1, g.down.1, g.b.1].map(|ld| ld as u64),
        rows: int(g.rows),
        width: int(g.width),
        act: g.act,
        tiles: int(per),
        at: g.parts.map(|p| int(p.0)),
        rank: g.parts.map(|p| int(p.1)),
        rank_down: int(g.rank_down),
    };
    let grid = (chunks as u32, stretches as u32);
    let name = GATED_BACK[g.act.clamp(0, 2) as usize];
    launch!(gpu, name, grid, shape.threads, shape.shared, args)?;
    let four = |values: usize| ((values / 4).div_ceil(256) as u32, 1);
    let low = four(g.rows * 2 * GATED_RANK);
    launch!(gpu, "gated_low", low, 256, 0, args, int(chunks), int(g.r))?;
    let thin = four(3 * g.width * GATED_RANK);
    launch!(gpu, "gated_thin", thin, 256, 0, args, db, da, int(stretches), int(g.r), i32::from(add))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_fill_the_device() {
        let shape = GatedShape { tokens: 32, columns: 256, threads: 512, shared: 0 };
        for (rows, width) in [(8192, 14336), (8192, 8192), (8192, 1536), (1, 8), (100, 14336)] {
            let s = stretches(shape, 132, rows, width);
            let (tiles, chunks) = (rows.div_ceil(32), width.div_ceil(256));
            assert!(s >= 1 && s <= tiles);
            if tiles == 256 {
                let blocks = s * chunks;
                let slots = blocks.div_ceil(132) * 132;
                assert!(blocks as f64 / slots as f64 > 0.9, "{rows}×{width}: {s}");
            }
        }
    }
}
