//! The kernels, with typed arguments. A matrix is an address and a row stride in values; rows start
//! at multiples of 16 bytes and widths are multiples of 8 where a kernel does not say otherwise.
//! Shapes are the caller's to get right: nothing is checked on the device.

use std::ffi::c_void;
use std::sync::Arc;

use super::Element;
use super::driver::DevicePtr;
use super::gpu::{CudaError, Gpu};

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

/// Name of a kernel for a dtype.
fn kernel(name: &str, element: Element) -> String {
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

fn int(x: usize) -> i32 {
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

/// Shape and inputs of an attention over N tokens in documents laid end to end. `q`, `k` and `v`
/// share the row stride `ld`; heads of `dim` values stand side by side.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    /// First head of q in row 0.
    pub q: DevicePtr,
    /// First head of k.
    pub k: DevicePtr,
    /// First head of v.
    pub v: DevicePtr,
    /// Row stride of the three.
    pub ld: usize,
    /// N.
    pub tokens: usize,
    /// Heads of q.
    pub heads: usize,
    /// Heads of k and v.
    pub kv_heads: usize,
    /// Width of a head.
    pub dim: usize,
    /// Keys that a query sees, itself included; 0: all.
    pub window: usize,
    /// First row of the document of each token, i32 [N].
    pub first: DevicePtr,
    /// Row after the last of the document of each token, i32 [N].
    pub last: DevicePtr,
    /// Blocks of the fast path's three kernels ([`Gpu::flash_rows`]) and their numbers; a block is
    /// (first, last, row, 0), i32: its document and its first row. In the order they are to start.
    pub tiles: [(DevicePtr, usize); 3],
}

impl Attention {
    fn group(&self) -> i32 {
        int(self.heads / self.kv_heads)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// Whether the tensor cores' path takes it.
    pub fn fast(&self, e: Element) -> bool {
        e == Element::Bf16 && matches!(self.dim, 64 | 128)
    }
}

/// o [N, heads·dim] and lse [heads, N].
///
/// # Errors
/// When the device failed.
pub fn attention_fwd(
    gpu: &Arc<Gpu>,
    e: Element,
    o: Mat,
    lse: DevicePtr,
    a: &Attention,
) -> Result<()> {
    if a.fast(e) {
        let (name, shape, tiles) =
            (format!("flash_fwd_{}", a.dim), gpu.flash(a.dim, 0), a.tiles[0]);
        return launch!(
            gpu,
            &name,
            (tiles.1 as u32, a.heads as u32),
            shape.threads,
            shape.shared,
            o.0,
            o.1,
            lse,
            a.q,
            a.k,
            a.v,
            a.ld,
            tiles.0,
            int(a.tokens),
            a.group(),
            a.scale(),
            int(a.window)
        );
    }
    attention_cached(gpu, e, o, lse, a, a.ld, 0)
}

/// [`attention_fwd`] by the plain path, for queries that stand at row i of `q` (stride `ld_q`) and
/// at row i + shift of k and v.
///
/// # Errors
/// When the device failed.
pub fn attention_cached(
    gpu: &Arc<Gpu>,
    e: Element,
    o: Mat,
    lse: DevicePtr,
    a: &Attention,
    ld_q: usize,
    shift: usize,
) -> Result<()> {
    let grid = (a.tokens.div_ceil(4) as u32, a.heads as u32);
    launch!(
        gpu,
        &kernel("attn_fwd", e),
        grid,
        128,
        0,
        o.0,
        o.1,
        lse,
        a.q,
        ld_q,
        a.k,
        a.v,
        a.ld,
        a.first,
        int(a.tokens),
        int(shift),
        int(a.heads),
        a.group(),
        int(a.dim),
        a.scale(),
        int(a.window)
    )
}

/// dq, dk and dv (`dq.1`, the row stride, is that of all three) from do, o and lse; `delta`
/// [heads, N] is scratch.
///
/// # Errors
/// When the device failed.
#[allow(clippy::too_many_arguments)]
pub fn attention_bwd(
    gpu: &Arc<Gpu>,
    e: Element,
    dq: Mat,
    dk: DevicePtr,
    dv: DevicePtr,
    d: Mat,
    o: Mat,
    lse: DevicePtr,
    delta: DevicePtr,
    a: &Attention,
) -> Result<()> {
    let by_warp = a.tokens.div_ceil(4) as u32;
    launch!(
        gpu,
        &kernel("attn_delta", e),
        (by_warp, a.heads as u32),
        128,
        0,
        delta,
        d.0,
        d.1,
        o.0,
        o.1,
        int(a.tokens),
        int(a.dim)
    )?;
    if a.fast(e) {
        let (shape, tiles) = (gpu.flash(a.dim, 2), a.tiles[2]);
        launch!(
            gpu,
            &format!("flash_dkv_{}", a.dim),
            (tiles.1 as u32, a.kv_heads as u32),
            shape.threads,
            shape.shared,
            dk,
            dv,
            dq.1,
            d.0,
            d.1,
            a.q,
            a.k,
            a.v,
            a.ld,
            lse,
            delta,
            tiles.0,
            int(a.tokens),
            a.group(),
            a.scale(),
            int(a.window)
        )?;
        let (shape, tiles) = (gpu.flash(a.dim, 1), a.tiles[1]);
        return launch!(
            gpu,
            &format!("flash_dq_{}", a.dim),
            (tiles.1 as u32, a.heads as u32),
            shape.threads,
            shape.shared,
            dq.0,
            dq.1,
            d.0,
            d.1,
            a.q,
            a.k,
            a.v,
            a.ld,
            lse,
            delta,
            tiles.0,
            int(a.tokens),
            a.group(),
            a.scale(),
            int(a.window)
        );
    }
    launch!(
        gpu,
        &kernel("attn_dq", e),
        (by_warp, a.heads as u32),
        128,
        0,
        dq.0,
        dq.1,
        d.0,
        d.1,
        a.q,
        a.k,
        a.v,
        a.ld,
        lse,
        delta,
        a.first,
        int(a.tokens),
        a.group(),
        int(a.dim),
        a.scale(),
        int(a.window)
    )?;
    launch!(
        gpu,
        &kernel("attn_dkv", e),
        (by_warp, a.kv_heads as u32),
        128,
        0,
        dk,
        dv,
        dq.1,
        d.0,
        d.1,
        a.q,
        a.k,
        a.v,
        a.ld,
        lse,
        delta,
        a.last,
        int(a.tokens),
        a.group(),
        int(a.dim),
        a.scale(),
        int(a.window)
    )
}

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

impl super::gpu::Value for Matrix {}

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
