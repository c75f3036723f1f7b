//! Gated activation of the MLP: h = act(gate) · up, and its backward.

use crate::common::{self, View, all_cpu_f32, expect_shape, tensor};
use crate::profile::{Category, span};
use crate::simd::{Isa, dispatch, exp, sigmoid};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// Elements of one parallel task.
const BLOCK: usize = 16 * 1024;

/// The activation of the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// x·σ(x).
    Silu,
    /// GELU by the tanh approximation, ½x(1 + tanh(√(2/π)(x + 0.044715x³))).
    GeluTanh,
    /// GELU by the error function, x·Φ(x); Φ with an absolute error under 3e-7 on the fused path.
    Gelu,
}

/// act(gate) · up for tensors of one shape ([N, F]).
///
/// # Errors
/// If the shapes differ.
pub fn swiglu_forward(gate: &Tensor, up: &Tensor, act: Act) -> Result<Tensor> {
    let _span = span(Category::Elementwise);
    expect_shape(up, "up", gate.dims())?;
    if !all_cpu_f32(&[gate, up]) {
        return reference::swiglu_forward(gate, up, act);
    }
    let dims = gate.dims();
    let (gate, up) = (View::new(gate, "gate")?, View::new(up, "up")?);
    let (gate, up) = (gate.f32()?, up.f32()?);
    let mut h = common::zeros(gate.len());
    h.par_chunks_mut(BLOCK)
        .zip(gate.par_chunks(BLOCK))
        .zip(up.par_chunks(BLOCK))
        .for_each(|((h, gate), up)| forward_block(h, gate, up, act));
    tensor(h, dims)
}

/// Gradients (dgate, dup) of [`swiglu_forward`] from `dh`, all of one shape.
///
/// # Errors
/// If the shapes differ.
pub fn swiglu_backward(
    dh: &Tensor,
    gate: &Tensor,
    up: &Tensor,
    act: Act,
) -> Result<(Tensor, Tensor)> {
    let _span = span(Category::Elementwise);
    expect_shape(dh, "dh", gate.dims())?;
    expect_shape(up, "up", gate.dims())?;
    if !all_cpu_f32(&[dh, gate, up]) {
        return reference::swiglu_backward(dh, gate, up, act);
    }
    let dims = gate.dims();
    let (dh, gate, up) = (View::new(dh, "dh")?, View::new(gate, "gate")?, View::new(up, "up")?);
    let (dh, gate, up) = (dh.f32()?, gate.f32()?, up.f32()?);
    let (mut dgate, mut dup) = (common::zeros(gate.len()), common::zeros(gate.len()));
    dgate
        .par_chunks_mut(BLOCK)
        .zip(dup.par_chunks_mut(BLOCK))
        .zip(dh.par_chunks(BLOCK))
        .zip(gate.par_chunks(BLOCK))
        .zip(up.par_chunks(BLOCK))
        .for_each(|((((dgate, dup), dh), gate), up)| {
            backward_block(dgate, dup, dh, gate, up, act);
        });
    Ok((tensor(dgate, dims)?, tensor(dup, dims)?))
}

dispatch! {
    fn forward_block(h: &mut [f32], gate: &[f32], up: &[f32], act: Act) = forward_body;
    fn backward_block(
        dgate: &mut [f32], dup: &mut [f32], dh: &[f32], gate: &[f32], up: &[f32], act: Act,
    ) = backward_body;
}

#[inline(always)]
fn forward_body<M: Isa>(h: &mut [f32], gate: &[f32], up: &[f32], act: Act) {
    #[inline(always)]
    fn each(h: &mut [f32], gate: &[f32], up: &[f32], gated: impl Fn(f32) -> (f32, f32)) {
        for ((h, &gate), &up) in h.iter_mut().zip(gate).zip(up) {
            *h = gated(gate).0 * up;
        }
    }
    match act {
        Act::Silu => each(h, gate, up, silu::<M>),
        Act::GeluTanh => each(h, gate, up, gelu_tanh::<M>),
        Act::Gelu => each(h, gate, up, gelu::<M>),
    }
}

#[inline(always)]
fn backward_body<M: Isa>(
    dgate: &mut [f32],
    dup: &mut [f32],
    dh: &[f32],
    gate: &[f32],
    up: &[f32],
    act: Act,
) {
    #[inline(always)]
    fn each(
        dgate: &mut [f32],
        dup: &mut [f32],
        dh: &[f32],
        gate: &[f32],
        up: &[f32],
        gated: impl Fn(f32) -> (f32, f32),
    ) {
        let cells = dgate.iter_mut().zip(dup.iter_mut()).zip(dh).zip(gate).zip(up);
        for ((((dgate, dup), &dh), &gate), &up) in cells {
            let (value, slope) = gated(gate);
            *dgate = dh * up * slope;
            *dup = dh * value;
        }
    }
    match act {
        Act::Silu => each(dgate, dup, dh, gate, up, silu::<M>),
        Act::GeluTanh => each(dgate, dup, dh, gate, up, gelu_tanh::<M>),
        Act::Gelu => each(dgate, dup, dh, gate, up, gelu::<M>),
    }
}

/// Value and derivative of x·σ(x).
#[inline(always)]
fn silu<M: Isa>(x: f32) -> (f32, f32) {
    let s = sigmoid::<M>(x);
    let value = x * s;
    (value, M::mul_add(value, 1.0 - s, s))
}

const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

/// Value and derivative of the tanh approximation of GELU; ½(1 + tanh u) = σ(2u).
#[inline(always)]
fn gelu_tanh<M: Isa>(x: f32) -> (f32, f32) {
    let square = x * x;
    let u = SQRT_2_OVER_PI * x * M::mul_add(CUBIC, square, 1.0);
    let s = sigmoid::<M>(2.0 * u);
    let du = SQRT_2_OVER_PI * M::mul_add(3.0 * CUBIC, square, 1.0);
    let value = x * s;
    (value, M::mul_add(value * (1.0 - s), 2.0 * du, s))
}

/// Value and derivative of x·Φ(x). Φ by Abramowitz and Stegun 7.1.26.
#[inline(always)]
fn gelu<M: Isa>(x: f32) -> (f32, f32) {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / M::mul_add(0.327_591_1, z, 1.0);
    let mut p = 1.061_405_4;
    p = M::mul_add(p, t, -1.453_152);
    p = M::mul_add(p, t, 1.421_413_8);
    p = M::mul_add(p, t, -0.284_496_72);
    p = M::mul_add(p, t, 0.254_829_6);
    let bell = exp::<M>(-z * z);
    // Half of erfc(z), the tail that Φ lacks on the positive side and is on the negative.
    let tail = 0.5 * p * t * bell;
    let phi = if x > 0.0 { 1.0 - tail } else { tail };
    // Density of the normal distribution: 1/√(2π).
    (x * phi, M::mul_add(x * bell, 0.398_942_3, phi))
}

/// The same with plain candle operations.
pub mod reference {
    use super::Act;
    use crate::common::widen;
    use candle_core::{Result, Tensor};

    /// Value and derivative of the activation.
    fn gated(x: &Tensor, act: Act) -> Result<(Tensor, Tensor)> {
        let sigmoid = |x: &Tensor| -> Result<Tensor> { (x.neg()?.exp()? + 1.0)?.recip() };
        match act {
            Act::Silu => {
                let s = sigmoid(x)?;
                let value = (x * &s)?;
                let slope = ((&value * s.affine(-1.0, 1.0)?)? + &s)?;
                Ok((value, slope))
            }
            Act::GeluTanh => {
                let c = (2.0 / std::f64::consts::PI).sqrt();
                let square = x.sqr()?;
                let u = ((x * square.affine(0.044_715, 1.0)?)? * c)?;
                let s = sigmoid(&(u * 2.0)?)?;
                let du = square.affine(3.0 * 0.044_715 * c, c)?;
                let value = (x * &s)?;
                let slope = (((&value * s.affine(-1.0, 1.0)?)? * (du * 2.0)?)? + &s)?;
                Ok((value, slope))
            }
            Act::Gelu => {
                let phi = ((x / std::f64::consts::SQRT_2)?.erf()?.affine(0.5, 0.5))?;
                let density = ((x.sqr()? * -0.5)?.exp()? / (2.0 * std::f64::consts::PI).sqrt())?;
                Ok(((x * &phi)?, (phi + (x * density)?)?))
            }
        }
    }

    /// See [`super::swiglu_forward`].
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn swiglu_forward(gate: &Tensor, up: &Tensor, act: Act) -> Result<Tensor> {
        let (value, _) = gated(&widen(gate)?, act)?;
        (value * widen(up)?)?.to_dtype(gate.dtype())
    }

    /// See [`super::swiglu_backward`].
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn swiglu_backward(
        dh: &Tensor,
        gate: &Tensor,
        up: &Tensor,
        act: Act,
    ) -> Result<(Tensor, Tensor)> {
        let (value, slope) = gated(&widen(gate)?, act)?;
        let dh = dh.to_dtype(value.dtype())?;
        let dgate = ((&dh * up.to_dtype(value.dtype())?)? * slope)?;
        Ok((dgate.to_dtype(gate.dtype())?, (dh * value)?.to_dtype(gate.dtype())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, check_gradient, f64s, random, same_bits, weighted_sum};

    const ALL: [Act; 3] = [Act::Silu, Act::GeluTanh, Act::Gelu];

    #[test]
    fn fused_equals_reference() -> Result<()> {
        for act in ALL {
            for (rows, width) in [(1, 1), (3, 7), (130, 131)] {
                let gate = (random(&[rows, width], 1) * 4.0)?;
                let (up, dh) = (random(&[rows, width], 2), random(&[rows, width], 3));
                let (gate64, up64, dh64) = (f64s(&gate)?, f64s(&up)?, f64s(&dh)?);
                let h64 = reference::swiglu_forward(&gate64, &up64, act)?;
                assert_close(&swiglu_forward(&gate, &up, act)?, &h64, 5e-7);
                let (dgate64, dup64) = reference::swiglu_backward(&dh64, &gate64, &up64, act)?;
                let (dgate, dup) = swiglu_backward(&dh, &gate, &up, act)?;
                assert_close(&dgate, &dgate64, 2e-6);
                assert_close(&dup, &dup64, 1e-6);
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_by_finite_differences() -> Result<()> {
        let (gate, up) = ((f64s(&random(&[2, 9], 1))? * 3.0)?, f64s(&random(&[2, 9], 2))?);
        let dh = f64s(&random(&[2, 9], 3))?;
        for act in ALL {
            let loss = |gate: &Tensor, up: &Tensor| {
                weighted_sum(&reference::swiglu_forward(gate, up, act)?, &dh)
            };
            let (dgate, dup) = reference::swiglu_backward(&dh, &gate, &up, act)?;
            check_gradient(&gate, &dgate, |gate| loss(gate, &up))?;
            check_gradient(&up, &dup, |up| loss(&gate, up))?;
        }
        Ok(())
    }

    #[test]
    fn extremes_stay_finite() -> Result<()> {
        let gate = Tensor::new(&[-1e4f32, -90.0, 0.0, 90.0, 1e4], &candle_core::Device::Cpu)?;
        let up = gate.ones_like()?;
        for act in ALL {
            let h = swiglu_forward(&gate, &up, act)?.to_vec1::<f32>()?;
            assert!(h[0].abs() < 1e-20 && h[2] == 0.0 && h[3] == 90.0 && h[4] == 1e4, "{h:?}");
            let slopes = swiglu_backward(&up, &gate, &up, act)?.0.to_vec1::<f32>()?;
            assert!(
                slopes[0].abs() < 1e-20 && (slopes[2] - 0.5).abs() < 1e-6 && slopes[4] == 1.0,
                "{slopes:?}"
            );
        }
        Ok(())
    }

    #[test]
    fn bits_do_not_depend_on_threads() -> Result<()> {
        let (gate, up) = (random(&[200, 301], 1), random(&[200, 301], 2));
        same_bits(|| {
            let (dgate, dup) = swiglu_backward(&up, &gate, &up, Act::Silu)?;
            Ok(vec![swiglu_forward(&gate, &up, Act::Silu)?, dgate, dup])
        })
    }
}
