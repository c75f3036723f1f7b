//! The innermost loop of all matrix products: a few rows of C = A·B held in registers, where B is
//! a panel stored row by row and A may have any strides.

use super::{Isa, Vector};

/// Operands whose bounds the caller has checked.
#[derive(Clone, Copy)]
pub(crate) struct Raw {
    /// The destination: rows of `stride` elements, of which a panel's width is written.
    pub(crate) c: *mut f32,
    pub(crate) stride: usize,
    /// The product is added to what is there instead of replacing it.
    pub(crate) add: bool,
    /// The left operand: element (i, k) at `i * row + k * column`.
    pub(crate) a: *const f32,
    pub(crate) row: usize,
    pub(crate) column: usize,
    /// The panel: `depth` rows.
    pub(crate) b: *const f32,
    pub(crate) depth: usize,
}

impl Raw {
    /// The operands from row `rows` on.
    #[inline(always)]
    pub(crate) unsafe fn skip(self, rows: usize) -> Self {
        // Safety: the caller has not come to the last row yet.
        unsafe {
            Self { c: self.c.add(rows * self.stride), a: self.a.add(rows * self.row), ..self }
        }
    }
}

/// `ROWS` rows by `VECTORS` registers of C. Each element is one sum in the order of k.
///
/// # Safety
/// The operands must be valid for `ROWS` rows and the whole depth, the instruction set be there.
#[inline(always)]
pub(crate) unsafe fn tile<M: Isa, const ROWS: usize, const VECTORS: usize>(raw: Raw) {
    let width = VECTORS * M::Vector::LEN;
    // Safety: by the caller.
    unsafe {
        let mut sums = [[M::Vector::splat(0.0); VECTORS]; ROWS];
        // Two bases for the rows of A, so that their addresses are no long chain of additions. The
        // loop is not unrolled: the compiler would gather the loads of a row and spill them.
        let (mut top, mut b) = (raw.a, raw.b);
        let mut low = raw.a.wrapping_add(ROWS / 2 * raw.row);
        for _ in 0..raw.depth {
            let mut right = [M::Vector::splat(0.0); VECTORS];
            for (j, right) in right.iter_mut().enumerate() {
                *right = M::Vector::load(b.add(j * M::Vector::LEN));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let (base, i) = if i < ROWS / 2 { (top, i) } else { (low, i - ROWS / 2) };
                let left = M::Vector::splat(*base.add(i * raw.row));
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = left.mul_add(right, *sum);
                }
            }
            (top, low) = (top.wrapping_add(raw.column), low.wrapping_add(raw.column));
            b = b.wrapping_add(width);
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (j, sum) in sums.into_iter().enumerate() {
                let c = raw.c.add(i * raw.stride + j * M::Vector::LEN);
                let sum = if raw.add { M::Vector::load(c).add(sum) } else { sum };
                sum.store(c);
            }
        }
    }
}

/// Goes down the rows in tiles of the given heights, the tallest first.
macro_rules! rows_in_tiles {
    ($raw:ident, $rows:ident, $isa:ty, $vectors:literal, [$($height:literal),+]) => {{
        let (mut raw, mut rows) = ($raw, $rows);
        $(
            while rows >= $height {
                $crate::simd::tile::<$isa, $height, $vectors>(raw);
                rows -= $height;
                if rows > 0 {
                    raw = raw.skip($height);
                }
            }
        )+
    }};
}
pub(crate) use rows_in_tiles;
