//! Matrix products, C = Σ Aₜ·Bₜ or C += Σ Aₜ·Bₜ, on all threads of the current rayon pool.
//!
//! The right operands are weights, as they stand in memory (`f32` or `bf16`, either orientation).
//! They are copied into panels of a few registers' width ([`pack`]); the left operands are read in
//! place. A block of rows of C meets one panel after the other while the panel stays in the
//! first-level cache ([`crate::simd::tile`]). Adding several terms into one C (the low-rank part of
//! a linear layer, the gradients that q, k and v send to their input) costs no pass over C.
//!
//! With [`Inputs::Bf16`] both operands of a term are rounded to `bf16` and multiplied with `f32`
//! sums: by AMX where the processor has it ([`amx`]), else by AVX512_BF16. A processor with neither
//! takes them as they stand.
//!
//! Each element of C is a sum in an order that the depths alone decide, so results keep their bits
//! for any number of threads.

pub(crate) mod amx;
mod pack;
#[cfg(test)]
mod tests;

pub(crate) use pack::{pair_row, weave};

use crate::common::Aligned;
use crate::simd::{Level, Raw, level, rows_in_tiles};
use candle_core::DType;
use half::bf16;
use rayon::prelude::*;
use std::sync::{LazyLock, Mutex, PoisonError};

/// A matrix inside a slice: element (i, j) at `i * row_stride + j * column_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a, T = f32> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// A row-major matrix without gaps.
    pub(crate) fn new(data: &'a [T], rows: usize, columns: usize) -> Self {
        assert!(rows * columns <= data.len(), "matrix is larger than its slice");
        Self { data, rows, columns, row_stride: columns, column_stride: 1 }
    }

    /// The transpose, without moving anything.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// Columns `[start, start + columns)`.
    pub(crate) fn columns(self, start: usize, columns: usize) -> Self {
        assert!(start + columns <= self.columns, "columns out of bounds");
        let data = self.data.get(start * self.column_stride..).unwrap_or_default();
        Self { data, columns, ..self }
    }
}

/// A right operand.
#[derive(Clone, Copy)]
pub(crate) enum Right<'a> {
    F32(Mat<'a>),
    Bf16(Mat<'a, bf16>),
}

impl<'a> Right<'a> {
    /// A row-major matrix in `f32`.
    pub(crate) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::F32(Mat::new(data, rows, columns))
    }

    /// The transpose, without moving anything.
    pub(crate) fn t(self) -> Self {
        match self {
            Self::F32(b) => Self::F32(b.t()),
            Self::Bf16(b) => Self::Bf16(b.t()),
        }
    }

    fn shape(&self) -> (usize, usize) {
        match self {
            Self::F32(b) => (b.rows, b.columns),
            Self::Bf16(b) => (b.rows, b.columns),
        }
    }
}

/// What the operands of a product are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Inputs {
    /// As they stand.
    F32,
    /// Rounded to `bf16` where the processor multiplies such numbers, else as they stand.
    Bf16,
}

impl Inputs {
    /// For products with a weight of this dtype. Rounding pays where it halves the work; without an
    /// instruction for it the operands would only lose precision, and time.
    pub(crate) fn over(weight: DType) -> Self {
        let pays = weight == DType::BF16 && Kernels::best().pairs.is_some();
        if pays { Self::Bf16 } else { Self::F32 }
    }
}

/// A left operand, which several products may share.
pub(crate) struct Left<'a> {
    mat: Mat<'a>,
    /// Its numbers rounded to `bf16`, in pairs.
    rounded: Option<Scratch>,
    kernels: Kernels,
}

impl<'a> Left<'a> {
    pub(crate) fn new(mat: Mat<'a>, inputs: Inputs) -> Self {
        Self::for_kernels(mat, inputs, Kernels::best())
    }

    fn for_kernels(mat: Mat<'a>, inputs: Inputs, kernels: Kernels) -> Self {
        let rounded = match (inputs, kernels.pairs) {
            (Inputs::F32, _) | (Inputs::Bf16, None) => None,
            (Inputs::Bf16, Some(pairs)) => Some(pack::rounded_pairs(mat, pairs.step, pairs.height)),
        };
        Self { mat, rounded, kernels }
    }

    /// The kernel for pairs, if the products are made of them.
    fn pairs(&self) -> Option<Pairs> {
        self.kernels.pairs.filter(|_| self.rounded.is_some())
    }
}

/// One product of a sum. The right operand is rounded if the left one is.
#[derive(Clone, Copy)]
pub(crate) struct Term<'a> {
    pub(crate) a: &'a Left<'a>,
    pub(crate) b: Right<'a>,
}

/// What happens with the values that the destination held.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// They are overwritten (and may be anything).
    Overwrite,
    /// The product is added to them.
    Add,
}

/// `c` (rows of `c_stride` elements) becomes the sum of the `terms`, or gets it added.
pub(crate) fn matmul(c: &mut [f32], c_stride: usize, mode: Into, terms: &[Term<'_>]) {
    let (m, n) = shape(terms);
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= c_stride && (m - 1) * c_stride + n <= c.len(), "destination is too small");
    // Safety: the destination is large enough by the assertion and borrowed exclusively.
    unsafe { run(C { data: c.as_mut_ptr(), stride: c_stride }, mode, terms) }
}

/// The sum of the `terms`, row-major, in a new vector that is not filled with zeros first.
pub(crate) fn product(terms: &[Term<'_>]) -> Vec<f32> {
    let (m, n) = shape(terms);
    let mut c: Vec<f32> = Vec::with_capacity(m * n);
    if m * n > 0 {
        // Safety: the spare capacity holds m·n elements, and overwriting writes all of them.
        unsafe {
            let target = C { data: c.as_mut_ptr(), stride: n };
            run(target, Into::Overwrite, terms);
            c.set_len(m * n);
        }
    }
    c
}

/// Rows and columns of a sum of products.
fn shape(terms: &[Term<'_>]) -> (usize, usize) {
    let first = &terms[0];
    let (m, n) = (first.a.mat.rows, first.b.shape().1);
    for term in terms {
        let (depth, columns) = term.b.shape();
        assert_eq!(term.a.mat.columns, depth, "inner dimensions of a matrix product");
        assert_eq!((term.a.mat.rows, columns), (m, n), "outer dimensions of a sum of products");
    }
    (m, n)
}

/// The destination.
#[derive(Clone, Copy)]
struct C {
    data: *mut f32,
    stride: usize,
}

// Safety: tasks write disjoint parts.
unsafe impl Send for C {}
unsafe impl Sync for C {}

/// Multiplies a number of rows with a panel.
type Kernel = unsafe fn(Raw, usize);

/// The loops for one kind of processor.
#[derive(Clone, Copy)]
struct Kernels {
    /// Columns of a panel: two registers.
    width: usize,
    f32: Kernel,
    /// For pairs of `bf16` numbers, if there is such an instruction.
    pairs: Option<Pairs>,
}

/// The loop for pairs of `bf16` numbers.
#[derive(Clone, Copy)]
struct Pairs {
    kernel: Kernel,
    /// Depths are filled up with zeros to multiples of so many pairs.
    step: usize,
    /// The left operand has rows up to a multiple of this, with anything in them.
    height: usize,
    /// Rows of C that meet a group of panels together, if not the usual number.
    rows: Option<usize>,
}

/// Widest panel of all kernels.
const MAX_WIDTH: usize = 32;

impl Kernels {
    fn best() -> Self {
        static BEST: LazyLock<Kernels> = LazyLock::new(Kernels::choose);
        *BEST
    }

    fn choose() -> Self {
        let pairs = Self::all_pairs().into_iter().next();
        match level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Self { width: 32, f32: x86::avx512, pairs },
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Self { width: 16, f32: x86::avx2, pairs },
            Level::Baseline => Self { width: 8, f32: baseline, pairs },
        }
    }

    /// What this processor has for pairs, the fastest first.
    fn all_pairs() -> Vec<Pairs> {
        #[cfg(target_arch = "x86_64")]
        {
            x86::all_pairs()
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            Vec::new()
        }
    }
}

/// True if this processor multiplies pairs of `bf16` numbers.
pub(crate) fn has_pairs() -> bool {
    Kernels::best().pairs.is_some()
}

/// Columns of a panel of pairs.
pub(crate) const PAIR_COLUMNS: usize = 32;

/// Rows of C = A·B or C += A·B, in pairs, for `count` panels of [`PAIR_COLUMNS`], each `size` floats
/// after the one before and for the next columns of C. `raw.column` is 1, the depth a multiple of
/// [`amx::STEP`], and the left operand has rows up to the next multiple of [`amx::HEIGHT`].
///
/// # Safety
/// The operands must be valid for all of that, and [`has_pairs`] be true.
pub(crate) unsafe fn pair_panels(raw: Raw, rows: usize, count: usize, size: usize) {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if amx::available() {
        // Safety: by the caller.
        return unsafe { amx::panels(raw, rows, count, size) };
    }
    let Some(pairs) = Kernels::best().pairs else { return };
    for panel in 0..count {
        // Safety: by the caller.
        unsafe {
            let (c, b) = (raw.c.add(panel * PAIR_COLUMNS), raw.b.add(panel * size));
            (pairs.kernel)(Raw { c, b, ..raw }, rows);
        }
    }
}

unsafe fn baseline(raw: Raw, rows: usize) {
    // Safety: by the caller.
    unsafe { rows_in_tiles!(raw, rows, crate::simd::Baseline, 2, [4, 2, 1]) }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Pairs;
    #[cfg(target_os = "linux")]
    use super::amx;
    use crate::simd::{Avx2, Avx512, Avx512Bf16, Raw, has_bf16_pairs, rows_in_tiles};

    pub(super) fn all_pairs() -> Vec<Pairs> {
        let mut all = Vec::new();
        #[cfg(target_os = "linux")]
        if amx::available() {
            // Rows of two tiles stay in the first-level cache while the panels, which lie in one
            // piece, stream past them.
            let (step, height) = (amx::STEP, amx::HEIGHT);
            all.push(Pairs { kernel: amx::amx, step, height, rows: Some(2 * height) });
        }
        if has_bf16_pairs() {
            all.push(Pairs { kernel: pairs, step: 1, height: 1, rows: None });
        }
        all
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2(raw: Raw, rows: usize) {
        // Safety: by the caller.
        unsafe { rows_in_tiles!(raw, rows, Avx2, 2, [6, 4, 2, 1]) }
    }

    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
    pub(super) unsafe fn avx512(raw: Raw, rows: usize) {
        // Safety: by the caller.
        unsafe { rows_in_tiles!(raw, rows, Avx512, 2, [12, 8, 4, 2, 1]) }
    }

    #[target_feature(enable = "avx512bf16,avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
    pub(super) unsafe fn pairs(raw: Raw, rows: usize) {
        // Safety: by the caller.
        unsafe { rows_in_tiles!(raw, rows, Avx512Bf16, 2, [12, 8, 4, 2, 1]) }
    }
}

/// Depth of a panel, so that it stays in the first-level cache with some rows of the left operand.
const DEPTH: usize = 320;
/// Rows of C that meet a panel together: a multiple of the heights of the tallest tiles.
const ROWS: usize = 96;
/// Columns of C that one task takes.
const COLUMNS: usize = 256;
/// Elements that are packed at a time.
const PACKED: usize = 1 << 20;

/// A range of the depth of one term: C += A[:, range]·B[range, :].
struct Block<'a> {
    /// Element (0, range.start) of the left operand, in units of 4 bytes.
    a: *const f32,
    row: usize,
    column: usize,
    term: &'a Term<'a>,
    start: usize,
    end: usize,
    /// Rows of its panels: its depth, or the pairs in it.
    depth: usize,
    /// Rows of the panels of the blocks before it.
    before: usize,
    kernel: Kernel,
    pairs: bool,
    /// Rows of C that meet a group of panels together, where the kernel has a say in it.
    rows: Option<usize>,
}

// Safety: the pointer goes to a shared slice.
unsafe impl Sync for Block<'_> {}

/// # Safety
/// `c` must be valid for reads and writes of all rows of the sum and overlap no operand.
unsafe fn run(c: C, mode: Into, terms: &[Term<'_>]) {
    let (m, n) = shape(terms);
    let kernels = terms[0].a.kernels;
    let mut blocks = Vec::new();
    let mut rows_of_panels = 0;
    for term in terms {
        let (a, pairs) = (&term.a.mat, term.a.pairs());
        let depth = a.columns;
        // Pairs take half the room.
        let most = if pairs.is_some() { 2 * DEPTH } else { DEPTH };
        let unit = pairs.map_or(1, |pairs| pairs.step);
        let step = depth.div_ceil(depth.div_ceil(most).max(1)).next_multiple_of(8.max(2 * unit));
        for start in (0..depth).step_by(step.max(1)) {
            let end = depth.min(start + step);
            let (a, row, column, rows) = match (&term.a.rounded, pairs) {
                (Some(a), Some(_)) => {
                    let pairs = |depth: usize| depth.div_ceil(2).next_multiple_of(unit);
                    (&a[start / 2..], pairs(depth), 1, pairs(end - start))
                }
                _ => {
                    (&a.data[start * a.column_stride..], a.row_stride, a.column_stride, end - start)
                }
            };
            blocks.push(Block {
                a: a.as_ptr(),
                row,
                column,
                term,
                start,
                end,
                depth: rows,
                before: rows_of_panels,
                kernel: pairs.map_or(kernels.f32, |pairs| pairs.kernel),
                pairs: pairs.is_some(),
                rows: pairs.and_then(|pairs| pairs.rows),
            });
            rows_of_panels += rows;
        }
    }
    let sum = Sum { c, m, n, add: mode == Into::Add, width: kernels.width, blocks: &blocks };
    if blocks.is_empty() {
        // Safety: by the caller.
        unsafe { sum.clear() }
    } else if m <= ROWS {
        sum.run_few_rows();
    } else {
        sum.run_many_rows(rows_of_panels);
    }
}

/// A sum of products whose work has been cut along the depth.
struct Sum<'a> {
    c: C,
    m: usize,
    n: usize,
    add: bool,
    width: usize,
    blocks: &'a [Block<'a>],
}

impl Sum<'_> {
    /// A sum of nothing.
    ///
    /// # Safety
    /// The destination must be valid.
    unsafe fn clear(&self) {
        if !self.add {
            for row in 0..self.m {
                // Safety: by the caller.
                unsafe { self.c.data.add(row * self.c.stride).write_bytes(0, self.n) }
            }
        }
    }

    /// One block of rows: each task packs the panels that it needs, one at a time.
    fn run_few_rows(&self) {
        let panels = self.n.div_ceil(self.width);
        let deepest = self.blocks.iter().map(|b| b.depth).max().unwrap_or(0);
        (0..panels).into_par_iter().for_each_init(
            || Scratch::new(deepest * self.width),
            |scratch, panel| {
                for (index, block) in self.blocks.iter().enumerate() {
                    let packed = &mut scratch[..block.depth * self.width];
                    self.pack(block, panel, packed);
                    self.multiply(block, index, 0..self.m, panel, packed);
                }
            },
        );
    }

    /// Packs a range of columns, then multiplies blocks of rows with it.
    fn run_many_rows(&self, depth: usize) {
        let panels = self.n.div_ceil(self.width);
        let at_once = (PACKED / (depth * self.width)).clamp(1, panels);
        let mut packed = Scratch::new(at_once * depth * self.width);
        for first in (0..panels).step_by(at_once) {
            let panels = first..panels.min(first + at_once);
            let count = panels.len();
            let size = |block: &Block<'_>| block.depth * self.width;
            // Panels of one block stand together.
            let mut parts: Vec<(&Block<'_>, usize, &mut [f32])> = Vec::new();
            let mut rest = &mut packed[..count * depth * self.width];
            for block in self.blocks {
                let (these, others) = rest.split_at_mut(count * size(block));
                rest = others;
                let chunks = these.chunks_exact_mut(size(block)).enumerate();
                parts.extend(chunks.map(|(i, part)| (block, first + i, part)));
            }
            parts.into_par_iter().for_each(|(block, panel, part)| self.pack(block, panel, part));

            let group = (COLUMNS / self.width).max(1).min(count);
            let groups = count.div_ceil(group);
            // Thin products are cut finer, so that all threads have work to the end.
            let rows = if groups < 3 { ROWS / 2 } else { ROWS };
            let rows = self.blocks[0].rows.unwrap_or(rows);
            let packed = &packed[..];
            (0..self.m.div_ceil(rows) * groups).into_par_iter().for_each(|task| {
                let start = task / groups * rows;
                let rows = start..self.m.min(start + rows);
                let group = task % groups * group..count.min((task % groups + 1) * group);
                for (index, block) in self.blocks.iter().enumerate() {
                    let these = &packed[block.before * self.width * count..];
                    for i in group.clone() {
                        let panel = &these[i * size(block)..][..size(block)];
                        self.multiply(block, index, rows.clone(), first + i, panel);
                    }
                }
            });
        }
    }

    fn pack(&self, block: &Block<'_>, panel: usize, out: &mut [f32]) {
        let columns = panel * self.width..self.n.min((panel + 1) * self.width);
        let term = block.term;
        let place = pack::Place { depth: block.start..block.end, columns, width: self.width };
        let used = if block.pairs { place.depth.len().div_ceil(2) } else { place.depth.len() };
        let (out, filling) = out.split_at_mut(used * self.width);
        filling.fill(0.0);
        match (term.b, block.pairs) {
            (Right::F32(b), true) => pack::pairs_f32(out, b, place),
            (Right::Bf16(b), true) => pack::pairs_bf16(out, b, place),
            (Right::F32(b), false) => pack::panel_f32(out, b, place),
            (Right::Bf16(b), false) => pack::panel_bf16(out, b, place),
        }
    }

    /// Rows of C get a block's product with one panel.
    fn multiply(
        &self,
        block: &Block<'_>,
        index: usize,
        rows: std::ops::Range<usize>,
        panel: usize,
        packed: &[f32],
    ) {
        let first = panel * self.width;
        let columns = self.width.min(self.n - first);
        let add = self.add || index > 0;
        // Safety: rows and columns lie inside the destination and belong to this task; the left
        // operand is in bounds by `Mat::new`, the packed panel has the block's depth.
        unsafe {
            let c = self.c.data.add(rows.start * self.c.stride + first);
            let raw = Raw {
                c,
                stride: self.c.stride,
                add,
                a: block.a.add(rows.start * block.row),
                row: block.row,
                column: block.column,
                b: packed.as_ptr(),
                depth: block.depth,
            };
            if columns == self.width {
                return (block.kernel)(raw, rows.len());
            }
            let mut buffer = [0f32; ROWS * MAX_WIDTH];
            let whole = Raw { c: buffer.as_mut_ptr(), stride: self.width, add: false, ..raw };
            (block.kernel)(whole, rows.len());
            for row in 0..rows.len() {
                let c = std::slice::from_raw_parts_mut(c.add(row * self.c.stride), columns);
                for (c, &x) in c.iter_mut().zip(&buffer[row * self.width..]) {
                    *c = if add { *c + x } else { x };
                }
            }
        }
    }
}

/// Numbers rounded to `bf16`.
pub(crate) fn round_to_bf16(values: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    pack::round_row(&mut out, values);
    out
}

/// A buffer from the pool, with whatever its last user left in it.
///
/// Fresh memory would be mapped and cleared by the system for every product.
struct Scratch {
    buffer: Aligned,
    len: usize,
}

/// Buffers that nobody uses.
static POOL: Mutex<Vec<Aligned>> = Mutex::new(Vec::new());
/// As many buffers are kept.
const KEPT: usize = 16;
/// Larger ones are given back to the system.
const LARGEST_KEPT: usize = 4 << 20;

impl Scratch {
    fn new(len: usize) -> Self {
        let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = pool
            .iter()
            .enumerate()
            .filter(|(_, b)| b.len() >= len)
            .min_by_key(|(_, b)| b.len())
            .map(|(index, _)| index);
        let buffer = fits.map(|index| pool.swap_remove(index));
        drop(pool);
        Self { buffer: buffer.unwrap_or_else(|| Aligned::zeros(len.next_power_of_two())), len }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.buffer.len() > LARGEST_KEPT {
            return;
        }
        let buffer = std::mem::replace(&mut self.buffer, Aligned::zeros(0));
        let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.len() >= KEPT {
            // A small one makes room.
            if let Some(least) = (0..pool.len()).min_by_key(|i| pool[*i].len()) {
                pool.swap_remove(least);
            }
        }
        pool.push(buffer);
    }
}

impl std::ops::Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.buffer[..self.len]
    }
}

impl std::ops::DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[..self.len]
    }
}
