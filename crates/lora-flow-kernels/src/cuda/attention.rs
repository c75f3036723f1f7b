//! Launches of the attention kernels: the fast ones of flash.cu, or those of attention.cu.

use std::ffi::c_void;
use std::sync::Arc;

use super::Element;
use super::driver::{DevicePtr, TensorMap};
use super::gpu::{CudaError, FlashShape, Gpu, check};
use super::ops::{Mat, int, kernel, launch};

type Result<T> = std::result::Result<T, CudaError>;

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

/// A matrix in bf16 as the copy engine sees it: boxes of `rows` rows and 64 columns, laid down as
/// the tensor cores read them.
fn map(gpu: &Gpu, (at, ld): Mat, columns: usize, tokens: usize, rows: usize) -> Result<TensorMap> {
    const BF16: i32 = 9;
    const SWIZZLE_128: i32 = 3;
    const FETCH_128: i32 = 2;
    let mut map = TensorMap::default();
    // Safety: two sizes, one stride, as the rank says.
    let code = unsafe {
        (gpu.driver.tensor_map)(
            &mut map,
            BF16,
            2,
            at,
            [columns as u64, tokens as u64].as_ptr(),
            [2 * ld as u64].as_ptr(),
            [64, rows as u32].as_ptr(),
            [1, 1].as_ptr(),
            0,
            SWIZZLE_128,
            FETCH_128,
            0,
        )
    };
    check(gpu.driver, code, "describe a matrix to the copy engine")?;
    Ok(map)
}

impl Attention {
    /// Map of q, or of what has its shape, for blocks of `rows` rows.
    fn map_q(&self, gpu: &Gpu, of: Mat, rows: usize) -> Result<TensorMap> {
        map(gpu, of, self.heads * self.dim, self.tokens, rows)
    }

    fn map_kv(&self, gpu: &Gpu, rows: usize) -> Result<[TensorMap; 2]> {
        let one = |at| map(gpu, (at, self.ld), self.kv_heads * self.dim, self.tokens, rows);
        Ok([one(self.k)?, one(self.v)?])
    }

    /// Name, shape, grid and blocks of a fast kernel.
    fn pass(
        &self,
        gpu: &Gpu,
        pass: usize,
        heads: usize,
    ) -> (String, FlashShape, (u32, u32), DevicePtr) {
        let name = format!("flash_{}_{}", ["fwd", "dq", "dkv"][pass], self.dim);
        let (tiles, count) = self.tiles[pass];
        (name, gpu.flash(self.dim, pass), (count as u32, heads as u32), tiles)
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
        let (name, shape, grid, tiles) = a.pass(gpu, 0, a.heads);
        let (tokens, group, scale, window) = (int(a.tokens), a.group(), a.scale(), int(a.window));
        if shape.block > 0 {
            let q = a.map_q(gpu, (a.q, a.ld), 64)?;
            let [k, v] = a.map_kv(gpu, shape.block)?;
            return launch!(
                gpu,
                &name,
                grid,
                shape.threads,
                shape.shared,
                q,
                k,
                v,
                o.0,
                o.1,
                lse,
                tiles,
                tokens,
                group,
                scale,
                window
            );
        }
        return launch!(
            gpu,
            &name,
            grid,
            shape.threads,
            shape.shared,
            o.0,
            o.1,
            lse,
            a.q,
            a.k,
            a.v,
            a.ld,
            tiles,
            tokens,
            group,
            scale,
            window
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
        (a.tokens as u32, 1),
        256,
        0,
        delta,
        d.0,
        d.1,
        o.0,
        o.1,
        int(a.tokens),
        int(a.heads),
        int(a.dim)
    )?;
    if a.fast(e) {
        let (tokens, group, scale, window) = (int(a.tokens), a.group(), a.scale(), int(a.window));
        let (name, shape, grid, tiles) = a.pass(gpu, 2, a.kv_heads);
        if shape.block > 0 {
            let (q, d) = (a.map_q(gpu, (a.q, a.ld), shape.block)?, a.map_q(gpu, d, shape.block)?);
            let [k, v] = a.map_kv(gpu, 64)?;
            launch!(
                gpu,
                &name,
                grid,
                shape.threads,
                shape.shared,
                q,
                d,
                k,
                v,
                dk,
                dv,
                dq.1,
                lse,
                delta,
                tiles,
                tokens,
                group,
                scale,
                window
            )?;
        } else {
            launch!(
                gpu,
                &name,
                grid,
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
                tiles,
                tokens,
                group,
                scale,
                window
            )?;
        }
        let (name, shape, grid, tiles) = a.pass(gpu, 1, a.heads);
        if shape.block > 0 {
            let (q, d) = (a.map_q(gpu, (a.q, a.ld), 64)?, a.map_q(gpu, d, 64)?);
            let [k, v] = a.map_kv(gpu, shape.block)?;
            return launch!(
                gpu,
                &name,
                grid,
                shape.threads,
                shape.shared,
                q,
                d,
                k,
                v,
                dq.0,
                dq.1,
                lse,
                delta,
                tiles,
                tokens,
                group,
                scale,
                window
            );
        }
        return launch!(
            gpu,
            &name,
            grid,
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
            tiles,
            tokens,
            group,
            scale,
            window
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
