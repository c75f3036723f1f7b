//! Small operations on whole tensors and on the parameter vectors of the optimiser.

use crate::common::{self, View, all_cpu_f32, expect_shape, tensor};
use crate::profile::{Category, span};
use crate::simd::{Isa, dispatch};
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

/// Elements of one parallel task.
const BLOCK: usize = 16 * 1024;

/// a + s·b for tensors of one shape.
///
/// # Errors
/// If the shapes differ.
pub fn add_scaled(a: &Tensor, b: &Tensor, s: f32) -> Result<Tensor> {
    let _span = span(Category::Elementwise);
    expect_shape(b, "b", a.dims())?;
    if !all_cpu_f32(&[a, b]) {
        return a + (b * f64::from(s))?;
    }
    let dims = a.dims();
    let (a, b) = (View::new(a, "a")?, View::new(b, "b")?);
    let (a, b) = (a.f32()?, b.f32()?);
    let mut out = common::zeros(a.len());
    out.par_chunks_mut(BLOCK)
        .zip(a.par_chunks(BLOCK).zip(b.par_chunks(BLOCK)))
        .for_each(|(out, (a, b))| add_scaled_block(out, a, b, s));
    tensor(out, dims)
}

/// y += s·x, in place.
///
/// # Errors
/// If the lengths differ.
pub fn axpy(y: &mut [f32], s: f32, x: &[f32]) -> Result<()> {
    if y.len() != x.len() {
        bail!("`x` has {} elements, `y` has {}", x.len(), y.len())
    }
    y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).for_each(|(y, x)| axpy_block(y, s, x));
    Ok(())
}

/// x *= s, in place.
pub fn scale(x: &mut [f32], s: f32) {
    let _span = span(Category::Optimizer);
    x.par_chunks_mut(BLOCK).for_each(|x| x.iter_mut().for_each(|x| *x *= s));
}

/// Σ xᵢ², added up in f64 by blocks of a fixed size: the same bits for any number of threads.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    let _span = span(Category::Optimizer);
    let blocks: Vec<f64> = x
        .par_chunks(BLOCK)
        .map(|x| x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>())
        .collect();
    blocks.into_iter().sum()
}

dispatch! {
    fn axpy_block(y: &mut [f32], s: f32, x: &[f32]) = axpy_body;
    fn add_scaled_block(out: &mut [f32], a: &[f32], b: &[f32], s: f32) = add_scaled_body;
}

#[inline(always)]
fn axpy_body<M: Isa>(y: &mut [f32], s: f32, x: &[f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = M::mul_add(x, s, *y);
    }
}

#[inline(always)]
fn add_scaled_body<M: Isa>(out: &mut [f32], a: &[f32], b: &[f32], s: f32) {
    for ((out, &a), &b) in out.iter_mut().zip(a).zip(b) {
        *out = M::mul_add(b, s, a);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn sums_and_scales() -> Result<()> {
        let a = Tensor::arange(0f32, 40_000.0, &Device::Cpu)?;
        let sum = add_scaled(&a, &a, 0.5)?.to_vec1::<f32>()?;
        assert!(sum.iter().enumerate().all(|(i, &x)| x == i as f32 * 1.5));
        let mut y = vec![1.0; 3];
        axpy(&mut y, 2.0, &[1.0, 2.0, 3.0])?;
        scale(&mut y, 0.5);
        assert_eq!(y, [1.5, 2.5, 3.5]);
        assert!(axpy(&mut y, 1.0, &[0.0]).is_err());
        assert_eq!(sum_of_squares(&[3.0, 4.0]), 25.0);
        assert_eq!(sum_of_squares(&vec![1.0; 100_000]), 100_000.0);
        Ok(())
    }
}
