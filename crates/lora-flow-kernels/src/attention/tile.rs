//! Products of small matrices held in registers: C (+)= A·B, where B is a panel of [`PANEL`]
//! columns stored row by row and A may have any strides.
//!
//! Attention multiplies blocks that are too small for a general matrix product to pay for packing
//! its operands. Here keys and values are laid out as panels once and A is read in place. Each
//! element of C is one sum in the order of k on every instruction set.

use crate::simd::{Baseline, Level, Raw, level, rows_in_tiles};

/// Columns of a panel.
pub(super) const PANEL: usize = 16;

/// The left operand: element (i, k) at `i * row + k * column`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) data: &'a [f32],
    pub(super) row: usize,
    pub(super) column: usize,
}

/// The destination: rows of `stride` elements, whose first [`PANEL`] are written.
pub(super) struct Target<'a> {
    pub(super) data: &'a mut [f32],
    pub(super) stride: usize,
    /// The product is added to what is there instead of replacing it.
    pub(super) add: bool,
}

/// `rows` rows of C = A·B (or C += A·B) for `depth` columns of A and a `panel` of `depth` rows.
#[inline]
pub(super) fn product(c: Target<'_>, rows: usize, depth: usize, a: Left<'_>, panel: &[f32]) {
    if rows == 0 {
        return;
    }
    assert!((rows - 1) * c.stride + PANEL <= c.data.len(), "destination of a tile is too small");
    assert!(depth * PANEL <= panel.len(), "panel of a tile is too small");
    assert!(
        depth == 0 || (rows - 1) * a.row + (depth - 1) * a.column < a.data.len(),
        "left operand of a tile is too small"
    );
    let raw = Raw {
        c: c.data.as_mut_ptr(),
        stride: c.stride,
        add: c.add,
        a: a.data.as_ptr(),
        row: a.row,
        column: a.column,
        b: panel.as_ptr(),
        depth,
    };
    // Safety: the assertions keep every access in bounds; `level` has found the features.
    unsafe {
        match level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => x86::product_avx512(raw, rows),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => x86::product_avx2(raw, rows),
            Level::Baseline => product_baseline(raw, rows),
        }
    }
}

unsafe fn product_baseline(raw: Raw, rows: usize) {
    // Safety: by the caller.
    unsafe { rows_in_tiles!(raw, rows, Baseline, 4, [2, 1]) }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use crate::simd::{Avx2, Avx512, Raw, rows_in_tiles};

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn product_avx2(raw: Raw, rows: usize) {
        // Safety: by the caller.
        unsafe { rows_in_tiles!(raw, rows, Avx2, 2, [6, 4, 2, 1]) }
    }

    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
    pub(super) unsafe fn product_avx512(raw: Raw, rows: usize) {
        // Safety: by the caller.
        unsafe { rows_in_tiles!(raw, rows, Avx512, 1, [12, 4, 2, 1]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small integers, so that every order of adding gives the same sum.
    fn integers(len: usize, step: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * step) % 11) as f32 - 5.0).collect()
    }

    /// The product of every instruction set that this processor has.
    fn products() -> Vec<unsafe fn(Raw, usize)> {
        let mut products: Vec<unsafe fn(Raw, usize)> = vec![product_baseline];
        #[cfg(target_arch = "x86_64")]
        {
            if level() != Level::Baseline {
                products.push(x86::product_avx2);
            }
            if level() == Level::Avx512 {
                products.push(x86::product_avx512);
            }
        }
        products
    }

    #[test]
    fn operands_too_small_are_refused() {
        let attempt = |c_len: usize, a_len: usize, b_len: usize| {
            std::panic::catch_unwind(|| {
                let mut c = vec![0.0; c_len];
                let target = Target { data: &mut c, stride: PANEL, add: false };
                let left = Left { data: &vec![0.0; a_len], row: 3, column: 1 };
                product(target, 2, 3, left, &vec![0.0; b_len]);
            })
        };
        assert!(attempt(2 * PANEL, 6, 3 * PANEL).is_ok());
        assert!(attempt(2 * PANEL - 1, 6, 3 * PANEL).is_err());
        assert!(attempt(2 * PANEL, 5, 3 * PANEL).is_err());
        assert!(attempt(2 * PANEL, 6, 3 * PANEL - 1).is_err());
    }

    #[test]
    fn every_height_and_both_orders_of_a() {
        for rows in 1..30 {
            for (depth, add) in [(0, false), (1, true), (7, false), (33, true)] {
                let a = integers(rows * depth.max(1), 7);
                let b = integers(depth * PANEL, 5);
                let before = integers(rows * 20, 3);
                let expected = |i: usize, j: usize, at: &dyn Fn(usize, usize) -> f32| {
                    let product: f32 = (0..depth).map(|k| at(i, k) * b[k * PANEL + j]).sum();
                    product + if add { before[i * 20 + j] } else { 0.0 }
                };
                for (row, column) in [(depth, 1), (1, rows)] {
                    let at = |i: usize, k: usize| a[i * row + k * column];
                    for run in products() {
                        let mut c = before.clone();
                        let raw = Raw {
                            c: c.as_mut_ptr(),
                            stride: 20,
                            add,
                            a: a.as_ptr(),
                            row,
                            column,
                            b: b.as_ptr(),
                            depth,
                        };
                        // Safety: the vectors above have these sizes.
                        unsafe { run(raw, rows) };
                        for i in 0..rows {
                            for j in 0..20 {
                                let want = if j < PANEL {
                                    expected(i, j, &at)
                                } else {
                                    before[i * 20 + j]
                                };
                                assert_eq!(c[i * 20 + j], want, "{rows}×{depth} at {i}, {j}");
                            }
                        }
                    }
                }
            }
        }
    }
}
