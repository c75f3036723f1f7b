//! Reductions and the exponential function, for bodies of [`super::dispatch`].

use super::{Isa, Vector};

/// Registers that a reduction keeps its partial results in, to hide the latency of the addition.
const SUMS: usize = 4;

/// Σ aᵢ·bᵢ over the shorter length.
#[inline(always)]
pub(crate) fn dot<M: Isa>(a: &[f32], b: &[f32]) -> f32 {
    let len = a.len().min(b.len());
    let term = |at: usize, sum: M::Vector| {
        // Safety: `fold` asks for registers that lie within `len`.
        unsafe { load::<M>(a, at).mul_add(load::<M>(b, at), sum) }
    };
    let rest = |at: usize, sum: f32| M::mul_add(a[at], b[at], sum);
    sum_of::<M>(len, term, rest)
}

/// Σ aᵢ·bᵢ·cᵢ over the shortest length.
#[inline(always)]
pub(crate) fn dot3<M: Isa>(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let len = a.len().min(b.len()).min(c.len());
    let term = |at: usize, sum: M::Vector| {
        // Safety: as in `dot`.
        unsafe { load::<M>(a, at).mul(load::<M>(b, at)).mul_add(load::<M>(c, at), sum) }
    };
    let rest = |at: usize, sum: f32| M::mul_add(a[at] * b[at], c[at], sum);
    sum_of::<M>(len, term, rest)
}

/// Σ xᵢ·wᵢ for w in `bf16`, over the shorter length.
#[inline(always)]
pub(crate) fn dot_bf16<M: Isa>(x: &[f32], w: &[half::bf16]) -> f32 {
    let len = x.len().min(w.len());
    let term = |at: usize, sum: M::Vector| {
        // Safety: as in `dot`; a `bf16` is two bytes.
        unsafe { load::<M>(x, at).mul_add(M::Vector::load_bf16(w.as_ptr().add(at).cast()), sum) }
    };
    let rest = |at: usize, sum: f32| M::mul_add(x[at], w[at].to_f32(), sum);
    sum_of::<M>(len, term, rest)
}

/// Σ xᵢ.
#[inline(always)]
pub(crate) fn sum<M: Isa>(x: &[f32]) -> f32 {
    // Safety: as in `dot`.
    let term = |at: usize, sum: M::Vector| unsafe { load::<M>(x, at).add(sum) };
    sum_of::<M>(x.len(), term, |at, sum| x[at] + sum)
}

/// The largest element; −∞ for none. A NaN may be passed over.
#[inline(always)]
pub(crate) fn max<M: Isa>(x: &[f32]) -> f32 {
    // Safety: as in `dot`.
    let term = |at: usize, max: M::Vector| unsafe { load::<M>(x, at).max(max) };
    let rest = |at: usize, max: f32| if x[at] > max { x[at] } else { max };
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    // Safety: registers of this instruction set.
    let join = |a: M::Vector, b: M::Vector| unsafe { a.max(b) };
    fold::<M>(x.len(), f32::NEG_INFINITY, term, join, larger, rest)
}

/// # Safety
/// `at + M::Vector::LEN` must not exceed the length of `x`.
#[inline(always)]
unsafe fn load<M: Isa>(x: &[f32], at: usize) -> M::Vector {
    debug_assert!(at + M::Vector::LEN <= x.len());
    // Safety: by the caller.
    unsafe { M::Vector::load(x.as_ptr().add(at)) }
}

/// A sum of `len` terms: `term` adds those of one register, `rest` a single one.
#[inline(always)]
fn sum_of<M: Isa>(
    len: usize,
    term: impl Fn(usize, M::Vector) -> M::Vector,
    rest: impl Fn(usize, f32) -> f32,
) -> f32 {
    // Safety: registers of this instruction set.
    let join = |a: M::Vector, b: M::Vector| unsafe { a.add(b) };
    fold::<M>(len, 0.0, term, join, |a, b| a + b, rest)
}

/// Folds `len` elements in an order that depends on `len` and the instruction set alone.
#[inline(always)]
fn fold<M: Isa>(
    len: usize,
    start: f32,
    term: impl Fn(usize, M::Vector) -> M::Vector,
    join: impl Fn(M::Vector, M::Vector) -> M::Vector,
    join_one: impl Fn(f32, f32) -> f32,
    rest: impl Fn(usize, f32) -> f32,
) -> f32 {
    let width = M::Vector::LEN;
    // Safety: a body runs only where its instruction set is there.
    let start_all = unsafe { M::Vector::splat(start) };
    let mut all = [start_all; SUMS];
    let mut at = 0;
    while at + SUMS * width <= len {
        all[0] = term(at, all[0]);
        all[1] = term(at + width, all[1]);
        all[2] = term(at + 2 * width, all[2]);
        all[3] = term(at + 3 * width, all[3]);
        at += SUMS * width;
    }
    while at + width <= len {
        all[0] = term(at, all[0]);
        at += width;
    }
    let mut lanes = [start; 16];
    // Safety: no register has more than 16 lanes.
    unsafe { join(join(all[0], all[1]), join(all[2], all[3])).store(lanes.as_mut_ptr()) };
    let mut half = width / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = join_one(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    (at..len).fold(lanes[0], |sum, at| rest(at, sum))
}

/// Below this, [`exp`] is 0 (the true value is under the smallest normal number).
const EXP_LOW: f32 = -87.33;
/// Above this, [`exp`] keeps its value here (2.4e38).
const EXP_HIGH: f32 = 88.37;

/// eˣ with a relative error under 1.5e-7 for −87.33 ≤ x ≤ 88.37, 0 below and e^88.37 above; NaN
/// stays NaN. Without branches or calls, so that loops around it vectorise.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; eʳ by the polynomial of Cephes' `expf`, 2ⁿ by its bits.
#[inline(always)]
pub(crate) fn exp<M: Isa>(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // 0.693359375: ln 2 to 10 bits, so that n times it is exact.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > EXP_HIGH { EXP_HIGH } else { x };
    let shifted = M::mul_add(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = M::mul_add(n, -LN2_LOW, M::mul_add(n, -LN2_HIGH, clamped));
    let mut p = 1.987_569_1e-4;
    p = M::mul_add(p, r, 1.398_2e-3);
    p = M::mul_add(p, r, 8.333_452e-3);
    p = M::mul_add(p, r, 4.166_579_6e-2);
    p = M::mul_add(p, r, 1.666_666_5e-1);
    p = M::mul_add(p, r, 0.5);
    let e = M::mul_add(p * r, r, r) + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < EXP_LOW { 0.0 } else { e * power }
}

/// 1 / (1 + e⁻ˣ), absolute error under 2e-7.
#[inline(always)]
pub(crate) fn sigmoid<M: Isa>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<M>(-x))
}

#[cfg(test)]
mod tests {
    use super::super::{Baseline, dispatch};
    use super::*;

    dispatch! {
        fn exp_all(x: &mut [f32]) = exp_all_body;
        fn dot_all(a: &[f32], b: &[f32]) -> f32 = dot;
        fn max_all(a: &[f32]) -> f32 = max_body;
    }

    #[inline(always)]
    fn exp_all_body<M: Isa>(x: &mut [f32]) {
        for x in x {
            *x = exp::<M>(*x);
        }
    }

    #[inline(always)]
    fn max_body<M: Isa>(a: &[f32]) -> f32 {
        max::<M>(a)
    }

    #[test]
    fn exp_is_within_its_stated_error() {
        for baseline in [false, true] {
            let inputs: Vec<f32> =
                (0..1_757_000).map(|i| -87.33 + i as f32 * 1e-4).filter(|&x| x <= 88.37).collect();
            let mut outputs = inputs.clone();
            if baseline {
                exp_all_body::<Baseline>(&mut outputs)
            } else {
                exp_all(&mut outputs)
            }
            let worst = inputs
                .iter()
                .zip(&outputs)
                .map(|(&x, &y)| (f64::from(y) / f64::from(x).exp() - 1.0).abs())
                .fold(0.0, f64::max);
            assert!(worst < 1.5e-7, "relative error {worst}");
        }
    }

    #[test]
    fn exp_at_the_edges() {
        let mut x = [f32::NEG_INFINITY, -1e30, -88.0, 0.0, 100.0, f32::INFINITY, f32::NAN];
        exp_all(&mut x);
        assert_eq!(&x[..4], &[0.0, 0.0, 0.0, 1.0]);
        assert!(x[4].is_finite() && x[4] > 2e38 && x[5] == x[4] && x[6].is_nan());
    }

    #[test]
    fn dot_and_max_cover_every_length() {
        for len in 0..100 {
            let a: Vec<f32> = (0..len).map(|i| (i % 7) as f32 - 3.0).collect();
            let b: Vec<f32> = (0..len).map(|i| (i % 5) as f32).collect();
            let expected: f32 = a.iter().zip(&b).map(|(x, y)| x * y).sum();
            assert_eq!(dot_all(&a, &b), expected);
            assert_eq!(max_all(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
