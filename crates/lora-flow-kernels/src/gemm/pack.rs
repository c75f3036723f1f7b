//! Operands brought into the form that the inner loop reads.

use super::{Mat, Scratch};
use crate::simd::{Isa, dispatch};
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;

/// The part of a right operand that becomes a panel: `depth` rows of `columns`, filled up with
/// zeros to `width`.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) depth: Range<usize>,
    pub(super) columns: Range<usize>,
    pub(super) width: usize,
}

dispatch! {
    /// A panel of numbers as they stand.
    pub(super) fn panel_f32(out: &mut [f32], b: Mat<'_>, place: Place) = panel_f32_body;
    /// A panel of widened numbers.
    pub(super) fn panel_bf16(out: &mut [f32], b: Mat<'_, bf16>, place: Place) = panel_bf16_body;
    /// A panel whose rows are pairs of numbers in `bf16`, each pair in the 4 bytes of a float.
    pub(super) fn pairs_f32(out: &mut [f32], b: Mat<'_>, place: Place) = pairs_f32_body;
    /// The same from `bf16`.
    pub(super) fn pairs_bf16(out: &mut [f32], b: Mat<'_, bf16>, place: Place) = pairs_bf16_body;
    /// Numbers rounded to `bf16`.
    pub(super) fn round_row(out: &mut [f32], values: &[f32]) = round_row_body;
    /// A row in pairs along it, filled up with zeros.
    pub(crate) fn pair_row(out: &mut [f32], values: &[f32]) = pair_row_body;
    /// Two rows in pairs across them.
    pub(crate) fn weave(out: &mut [f32], low: &[f32], high: &[f32]) = weave_body;
}

#[inline(always)]
fn panel_f32_body<M: Isa>(out: &mut [f32], b: Mat<'_>, place: Place) {
    panel::<M, f32>(out, b, place, |x| x);
}

#[inline(always)]
fn panel_bf16_body<M: Isa>(out: &mut [f32], b: Mat<'_, bf16>, place: Place) {
    panel::<M, bf16>(out, b, place, |x| widened(x.to_bits()));
}

#[inline(always)]
fn pairs_f32_body<M: Isa>(out: &mut [f32], b: Mat<'_>, place: Place) {
    pairs::<M, f32>(out, b, place, rounded_bits);
}

#[inline(always)]
fn pairs_bf16_body<M: Isa>(out: &mut [f32], b: Mat<'_, bf16>, place: Place) {
    pairs::<M, bf16>(out, b, place, bf16::to_bits);
}

#[inline(always)]
fn panel<M: Isa, T: Copy>(
    out: &mut [f32],
    b: Mat<'_, T>,
    place: Place,
    get: impl Fn(T) -> f32 + Copy,
) {
    let Place { depth, columns, width } = place;
    if b.column_stride == 1 {
        let row = |k: usize| &b.data[k * b.row_stride..][columns.clone()];
        match (columns.len() == width, width) {
            (true, 16) => rows::<16, T>(out, depth, row, get),
            (true, 32) => rows::<32, T>(out, depth, row, get),
            _ => {
                for (k, out) in depth.zip(out.chunks_exact_mut(width)) {
                    out.fill(0.0);
                    out.iter_mut().zip(row(k)).for_each(|(out, &x)| *out = get(x));
                }
            }
        }
    } else {
        let cell = |k: usize, j: usize| get(b.data[k * b.row_stride + j * b.column_stride]);
        let run = |k: usize, j: usize| {
            let from: &[T; 8] = b.data[k + j * b.column_stride..].first_chunk()?;
            Some(from.map(get))
        };
        let run = (b.row_stride == 1).then_some(run);
        turned::<M>(out, depth, columns, width, cell, run);
    }
}

#[inline(always)]
fn rows<'a, const WIDTH: usize, T: Copy + 'a>(
    out: &mut [f32],
    depth: Range<usize>,
    row: impl Fn(usize) -> &'a [T],
    get: impl Fn(T) -> f32,
) {
    for (k, out) in depth.zip(out.as_chunks_mut::<WIDTH>().0) {
        if let Some(row) = row(k).first_chunk::<WIDTH>() {
            for j in 0..WIDTH {
                out[j] = get(row[j]);
            }
        }
    }
}

#[inline(always)]
fn pairs<M: Isa, T: Copy>(
    out: &mut [f32],
    b: Mat<'_, T>,
    place: Place,
    get: impl Fn(T) -> u16 + Copy,
) {
    let Place { depth, columns, width } = place;
    if b.column_stride == 1 {
        for (first, out) in depth.clone().step_by(2).zip(out.chunks_exact_mut(width)) {
            // The partner of a lone row is zero.
            let lone = first + 1 == depth.end;
            let low = &b.data[first * b.row_stride..][columns.clone()];
            let high =
                if lone { low } else { &b.data[(first + 1) * b.row_stride..][columns.clone()] };
            let keep = if lone { 0 } else { u16::MAX };
            let pair = |low: T, high: T| join(get(low), get(high) & keep);
            if let (Some(out), Some(low), Some(high)) =
                (out.first_chunk_mut::<32>(), low.first_chunk::<32>(), high.first_chunk::<32>())
            {
                for j in 0..32 {
                    out[j] = pair(low[j], high[j]);
                }
                continue;
            }
            out[low.len()..].fill(0.0);
            for ((out, &low), &high) in out.iter_mut().zip(low).zip(high) {
                *out = pair(low, high);
            }
        }
        return;
    }
    let end = depth.end;
    let cell = |pair: usize, j: usize| {
        let at = 2 * pair * b.row_stride + j * b.column_stride;
        let high = if 2 * pair + 1 < end { get(b.data[at + b.row_stride]) } else { 0 };
        join(get(b.data[at]), high)
    };
    let run = |pair: usize, j: usize| {
        if 2 * pair + 16 > end {
            return None;
        }
        let from: &[T; 16] = b.data[2 * pair + j * b.column_stride..].first_chunk()?;
        let halves: [u16; 16] = std::array::from_fn(|i| get(from[i]));
        // Safety: any 32 bytes are eight floats.
        Some(unsafe { std::mem::transmute::<[u16; 16], [f32; 8]>(halves) })
    };
    let run = (b.row_stride == 1).then_some(run);
    // A range of the depth begins at an even place.
    turned::<M>(out, depth.start / 2..end.div_ceil(2), columns, width, cell, run);
}

/// Two numbers in `bf16` in the order of memory.
#[inline(always)]
fn join(low: u16, high: u16) -> f32 {
    f32::from_bits(u32::from(low) | (u32::from(high) << 16))
}

/// A panel whose columns are rows in memory: `cell(k, column)` is one number, `run(k, column)` the
/// eight of a column from k on, if there are so many.
#[inline(always)]
fn turned<M: Isa>(
    out: &mut [f32],
    depth: Range<usize>,
    columns: Range<usize>,
    width: usize,
    cell: impl Fn(usize, usize) -> f32,
    run: Option<impl Fn(usize, usize) -> Option<[f32; 8]>>,
) {
    for (first, out) in depth.clone().step_by(8).zip(out.chunks_mut(8 * width)) {
        for start in (0..width).step_by(8) {
            let have = columns.len().saturating_sub(start).min(8);
            if have == 8
                && out.len() == 8 * width
                && let Some(run) = &run
            {
                let mut square = [[0.0; 8]; 8];
                let mut whole = true;
                for (j, column) in square.iter_mut().enumerate() {
                    match run(first, columns.start + start + j) {
                        Some(eight) => *column = eight,
                        None => whole = false,
                    }
                }
                if whole {
                    let square = M::turn(square);
                    for (out, row) in out[start..].chunks_mut(width).zip(square) {
                        out[..8].copy_from_slice(&row);
                    }
                    continue;
                }
            }
            for (k, out) in out.chunks_exact_mut(width).enumerate() {
                for j in 0..8 {
                    let inside = j < have;
                    out[start + j] =
                        if inside { cell(first + k, columns.start + start + j) } else { 0.0 };
                }
            }
        }
    }
}

/// The nearest number in `bf16` (ties to even), as bits; NaN stays NaN.
#[inline(always)]
fn rounded_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    // Rounding could carry a NaN into infinity or out of range.
    let nan = (bits >> 16) | 0x40;
    (if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { nearest }) as u16
}

#[inline(always)]
fn widened(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rows per parallel task of the rounding.
const ROWS: usize = 16;

/// A left operand rounded to `bf16`, in pairs along its rows, row-major. Rows are filled up with
/// zeros to a multiple of `step` pairs; their number is brought to a multiple of `height`.
pub(super) fn rounded_pairs(a: Mat<'_>, step: usize, height: usize) -> Scratch {
    each_row(a, a.columns.div_ceil(2).next_multiple_of(step), height, pair_row)
}

fn each_row(
    a: Mat<'_>,
    width: usize,
    height: usize,
    each: impl Fn(&mut [f32], &[f32]) + Sync,
) -> Scratch {
    let mut out = Scratch::new(a.rows.next_multiple_of(height) * width);
    if width == 0 {
        return out;
    }
    out[..a.rows * width].par_chunks_mut(ROWS * width).enumerate().for_each(|(index, out)| {
        let mut gathered = Vec::new();
        for (i, out) in out.chunks_exact_mut(width).enumerate() {
            let start = (index * ROWS + i) * a.row_stride;
            if a.column_stride == 1 {
                each(out, &a.data[start..][..a.columns]);
            } else {
                gathered.clear();
                let values = a.data[start..].iter().step_by(a.column_stride);
                gathered.extend(values.take(a.columns));
                each(out, &gathered);
            }
        }
    });
    out
}

#[inline(always)]
fn round_row_body<M: Isa>(out: &mut [f32], values: &[f32]) {
    out.iter_mut().zip(values).for_each(|(out, &x)| *out = widened(rounded_bits(x)));
}

/// Pairs along a row, in the order of memory, are the row itself in `bf16`.
#[inline(always)]
fn pair_row_body<M: Isa>(out: &mut [f32], values: &[f32]) {
    // Safety: a float is two 16-bit numbers, and any bits are such numbers.
    let out: &mut [u16] =
        unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast(), 2 * out.len()) };
    let (out, filling) = out.split_at_mut(values.len());
    filling.fill(0);
    out.iter_mut().zip(values).for_each(|(out, &x)| *out = rounded_bits(x));
}

#[inline(always)]
fn weave_body<M: Isa>(out: &mut [f32], low: &[f32], high: &[f32]) {
    for ((out, &low), &high) in out.iter_mut().zip(low).zip(high) {
        *out = join(rounded_bits(low), rounded_bits(high));
    }
}
