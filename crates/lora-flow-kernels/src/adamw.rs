//! AdamW (Loshchilov & Hutter 2019) with PyTorch's order of operations and rounding, so that a
//! trajectory can be compared with `torch.optim.AdamW`.

use crate::profile::{Category, span};
use crate::simd::{Isa, dispatch};
use candle_core::{Result, bail};
use rayon::prelude::*;

/// Elements of one parallel task.
const BLOCK: usize = 16 * 1024;

/// Factors of one step, rounded to f32 where PyTorch rounds them.
#[derive(Clone, Copy)]
struct Factors {
    keep: f32,
    mean: f32,
    beta2: f32,
    square: f32,
    root: f32,
    eps: f32,
    size: f32,
}

/// One step on a flat parameter, in place.
///
/// `m` and `v` are the running mean of the gradient and of its square; `step` counts from 1.
/// p ← p·(1 − lr·wd); m ← m + (1 − β₁)(g − m); v ← β₂v + (1 − β₂)g²;
/// p ← p − lr/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε).
///
/// # Errors
/// If the lengths differ or `step` is 0.
#[allow(clippy::too_many_arguments)]
pub fn step(
    param: &mut [f32],
    grad: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    step: u64,
) -> Result<()> {
    let _span = span(Category::Optimizer);
    let len = param.len();
    for (name, other) in [("grad", grad.len()), ("m", m.len()), ("v", v.len())] {
        if other != len {
            bail!("`{name}` has {other} elements, the parameter has {len}")
        }
    }
    if step == 0 {
        bail!("`step` counts from 1")
    }
    // Beyond 2³¹ steps both corrections are 1.
    let power = i32::try_from(step).unwrap_or(i32::MAX);
    let factors = Factors {
        keep: (1.0 - lr * weight_decay) as f32,
        mean: (1.0 - beta1) as f32,
        beta2: beta2 as f32,
        square: (1.0 - beta2) as f32,
        root: (1.0 - beta2.powi(power)).sqrt() as f32,
        eps: eps as f32,
        size: (lr / (1.0 - beta1.powi(power))) as f32,
    };
    param
        .par_chunks_mut(BLOCK)
        .zip(grad.par_chunks(BLOCK))
        .zip(m.par_chunks_mut(BLOCK).zip(v.par_chunks_mut(BLOCK)))
        .for_each(|((param, grad), (m, v))| step_block(param, grad, m, v, factors));
    Ok(())
}

dispatch! {
    fn step_block(param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], by: Factors)
        = step_body;
}

#[inline(always)]
fn step_body<M: Isa>(param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], by: Factors) {
    for ((param, &grad), (m, v)) in param.iter_mut().zip(grad).zip(m.iter_mut().zip(v)) {
        *m = M::mul_add(by.mean, grad - *m, *m);
        *v = M::mul_add(by.square * grad, grad, *v * by.beta2);
        let denominator = v.sqrt() / by.root + by.eps;
        *param = *param * by.keep - by.size * (*m / denominator);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_pytorch() -> Result<()> {
        // The same formulas in f64, in the order of `torch.optim._single_tensor_adamw`.
        let (lr, b1, b2, eps, wd) = (2e-3, 0.9, 0.999, 1e-8, 0.1);
        let start: Vec<f64> = (0..37).map(|i| (i as f64 * 0.7).sin()).collect();
        let mut param: Vec<f32> = start.iter().map(|&x| x as f32).collect();
        let (mut m, mut v) = (vec![0f32; 37], vec![0f32; 37]);
        let (mut p64, mut m64, mut v64) = (start, vec![0f64; 37], vec![0f64; 37]);
        for t in 1..=20u64 {
            let grad: Vec<f32> =
                (0..37).map(|i| ((i as f32 + t as f32) * 1.3).cos() * 0.1).collect();
            step(&mut param, &grad, &mut m, &mut v, lr, b1, b2, eps, wd, t)?;
            for i in 0..37 {
                let g = f64::from(grad[i]);
                p64[i] *= 1.0 - lr * wd;
                m64[i] += (1.0 - b1) * (g - m64[i]);
                v64[i] = v64[i] * b2 + (1.0 - b2) * g * g;
                let correction1 = 1.0 - b1.powi(t as i32);
                let correction2 = (1.0 - b2.powi(t as i32)).sqrt();
                p64[i] -= lr / correction1 * m64[i] / (v64[i].sqrt() / correction2 + eps);
            }
        }
        for i in 0..37 {
            assert!((f64::from(param[i]) - p64[i]).abs() < 1e-6, "{} {}", param[i], p64[i]);
            assert!((f64::from(v[i]) - v64[i]).abs() < 1e-9);
        }
        Ok(())
    }

    #[test]
    fn first_step_moves_by_the_learning_rate() -> Result<()> {
        let mut param = [1.0f32, 1.0];
        step(
            &mut param,
            &[3.0, -5.0],
            &mut [0.0; 2],
            &mut [0.0; 2],
            0.01,
            0.9,
            0.999,
            1e-8,
            0.0,
            1,
        )?;
        assert!((param[0] - 0.99).abs() < 1e-6 && (param[1] - 1.01).abs() < 1e-6, "{param:?}");
        Ok(())
    }

    #[test]
    fn wrong_lengths_are_errors() {
        let mut one = [0.0f32];
        let error = step(&mut one, &[], &mut [0.0], &mut [0.0], 0.1, 0.9, 0.9, 0.1, 0.0, 1);
        assert!(error.unwrap_err().to_string().contains("`grad` has 0 elements"));
        assert!(
            step(&mut one, &[0.0], &mut [0.0], &mut [0.0], 0.1, 0.9, 0.9, 0.1, 0.0, 0).is_err()
        );
    }
}
