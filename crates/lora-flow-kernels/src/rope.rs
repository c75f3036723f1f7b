//! Rotary position embedding in the convention of Hugging Face's `rotate_half`: the two halves of
//! a head are the real and the imaginary parts.
//!
//! y₁ = x₁·cos − x₂·sin, y₂ = x₂·cos + x₁·sin (Su et al. 2021). The rotation is orthogonal, so the
//! backward is the rotation by the opposite angle.

use crate::common::{self, View, all_cpu_f32, dims3, tensor};
use crate::profile::{Category, span};
use crate::simd::{Isa, dispatch};
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

/// Tokens of one parallel task.
const BLOCK: usize = 16;

/// Cosines and sines of all positions.
#[derive(Debug, Clone)]
pub struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
    max_position: usize,
}

impl RopeTable {
    /// The table for positions below `max_position`. `inv_freq` holds the angle of one step for
    /// each pair (D/2 of them; fewer leave the end of a head unrotated), `scale` multiplies cosine
    /// and sine (1 but for YaRN-like variants).
    ///
    /// Angles are rounded to f32 before the cosine, as Hugging Face does.
    pub fn new(inv_freq: &[f32], max_position: usize, scale: f32) -> Self {
        let angles = (0..max_position)
            .flat_map(|position| inv_freq.iter().map(move |f| f64::from(position as f32 * f)));
        let scale = f64::from(scale);
        let (cos, sin) =
            angles.map(|a| ((a.cos() * scale) as f32, (a.sin() * scale) as f32)).unzip();
        Self { cos, sin, half: inv_freq.len(), max_position }
    }

    /// Positions in the table.
    pub fn max_position(&self) -> usize {
        self.max_position
    }

    fn row(&self, position: u32) -> (&[f32], &[f32]) {
        let cells = position as usize * self.half..(position as usize + 1) * self.half;
        (&self.cos[cells.clone()], &self.sin[cells])
    }

    fn check(&self, tokens: usize, width: usize, positions: &[u32]) -> Result<()> {
        if positions.len() != tokens {
            bail!("`positions` has {} entries for {tokens} tokens", positions.len())
        }
        if 2 * self.half > width {
            bail!("the rotary table turns {} elements, a head has {width}", 2 * self.half)
        }
        if let Some(&max) = positions.iter().max()
            && max as usize >= self.max_position
        {
            bail!("position {max} is beyond the {} of the rotary table", self.max_position)
        }
        Ok(())
    }
}

/// Rotates each head of `x` [N, heads, D] by the angle of its token's position; `inverse` rotates
/// back, which is the backward.
///
/// # Errors
/// If `positions` does not have N entries, one is beyond the table, or D is less than the table
/// turns.
pub fn apply(x: &Tensor, positions: &[u32], table: &RopeTable, inverse: bool) -> Result<Tensor> {
    let _span = span(Category::Elementwise);
    let (tokens, heads, width) = dims3(x, "x")?;
    table.check(tokens, width, positions)?;
    if !all_cpu_f32(&[x]) {
        return reference::apply(x, positions, table, inverse);
    }
    let row = heads * width;
    let x = View::new(x, "x")?;
    let x = x.f32()?;
    let mut y = common::zeros(x.len());
    if row > 0 {
        y.par_chunks_mut(BLOCK * row)
            .zip(x.par_chunks(BLOCK * row))
            .zip(positions.par_chunks(BLOCK))
            .for_each(|((y, x), positions)| {
                for ((y, x), &position) in
                    y.chunks_exact_mut(row).zip(x.chunks_exact(row)).zip(positions)
                {
                    let (cos, sin) = table.row(position);
                    rotate(y, x, cos, sin, width, if inverse { -1.0 } else { 1.0 });
                }
            });
    }
    tensor(y, &[tokens, heads, width])
}

dispatch! {
    fn rotate(y: &mut [f32], x: &[f32], cos: &[f32], sin: &[f32], width: usize, sign: f32)
        = rotate_body;
}

#[inline(always)]
fn rotate_body<M: Isa>(
    y: &mut [f32],
    x: &[f32],
    cos: &[f32],
    sin: &[f32],
    width: usize,
    sign: f32,
) {
    let half = cos.len();
    for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
        let (y1, y) = y.split_at_mut(half);
        let (y2, y_rest) = y.split_at_mut(half);
        let (x1, x) = x.split_at(half);
        let (x2, x_rest) = x.split_at(half);
        let cells = y1.iter_mut().zip(y2).zip(x1.iter().zip(x2)).zip(cos.iter().zip(sin));
        for (((y1, y2), (&x1, &x2)), (&cos, &sin)) in cells {
            let sin = sin * sign;
            *y1 = M::mul_add(x1, cos, -(x2 * sin));
            *y2 = M::mul_add(x2, cos, x1 * sin);
        }
        y_rest.copy_from_slice(x_rest);
    }
}

/// The same with plain candle operations.
pub mod reference {
    use super::RopeTable;
    use crate::common::{dims3, widen};
    use candle_core::{D, Result, Tensor};

    /// See [`super::apply`].
    ///
    /// # Errors
    /// As there.
    pub fn apply(
        x: &Tensor,
        positions: &[u32],
        table: &RopeTable,
        inverse: bool,
    ) -> Result<Tensor> {
        let (tokens, _, width) = dims3(x, "x")?;
        table.check(tokens, width, positions)?;
        let half = table.half;
        let (cos, sin): (Vec<&[f32]>, Vec<&[f32]>) =
            positions.iter().map(|&position| table.row(position)).unzip();
        let wide_x = widen(x)?;
        let on_device = |rows: Vec<&[f32]>| {
            Tensor::from_vec(rows.concat(), (tokens, 1, half), x.device())?.to_dtype(wide_x.dtype())
        };
        let (cos, mut sin) = (on_device(cos)?, on_device(sin)?);
        if inverse {
            sin = sin.neg()?;
        }
        let x1 = wide_x.narrow(D::Minus1, 0, half)?;
        let x2 = wide_x.narrow(D::Minus1, half, half)?;
        let y1 = (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?;
        let y2 = (x2.broadcast_mul(&cos)? + x1.broadcast_mul(&sin)?)?;
        let rest = wide_x.narrow(D::Minus1, 2 * half, width - 2 * half)?;
        let parts = if width > 2 * half { vec![y1, y2, rest] } else { vec![y1, y2] };
        Tensor::cat(&parts, D::Minus1)?.to_dtype(x.dtype())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, f64s, random, same_bits};
    use candle_core::Tensor;

    fn table(half: usize, scale: f32) -> RopeTable {
        let inv_freq: Vec<f32> =
            (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect();
        RopeTable::new(&inv_freq, 600, scale)
    }

    #[test]
    fn fused_equals_reference_and_inverse_undoes() -> Result<()> {
        for (tokens, heads, width, half) in
            [(1, 1, 2, 1), (37, 3, 16, 8), (20, 2, 80, 40), (5, 2, 10, 3)]
        {
            let x = random(&[tokens, heads, width], 1);
            let positions: Vec<u32> = (0..tokens as u32).map(|t| (t * 17) % 600).collect();
            let table = table(half, 1.0);
            let y = apply(&x, &positions, &table, false)?;
            assert_close(&y, &reference::apply(&f64s(&x)?, &positions, &table, false)?, 1e-6);
            assert_close(&apply(&y, &positions, &table, true)?, &x, 1e-6);
        }
        Ok(())
    }

    #[test]
    fn inverse_is_the_transpose_also_with_a_scale() -> Result<()> {
        // <R x, dy> = <x, Rᵀ dy>.
        let (x, dy) = (f64s(&random(&[4, 2, 8], 1))?, f64s(&random(&[4, 2, 8], 2))?);
        let (table, positions) = (table(4, 1.3), [3, 0, 7, 599]);
        let left = (reference::apply(&x, &positions, &table, false)? * &dy)?.sum_all()?;
        let right = (x * reference::apply(&dy, &positions, &table, true)?)?.sum_all()?;
        assert!((left - right)?.to_scalar::<f64>()?.abs() < 1e-9);
        Ok(())
    }

    #[test]
    fn known_rotation() -> Result<()> {
        // One pair at 1 radian for each position, at position 2: (1, 0) → (cos 2, sin 2).
        let table = RopeTable::new(&[1.0], 3, 1.0);
        let x = Tensor::new(&[[[1f32, 0.0]]], &candle_core::Device::Cpu)?;
        let y = apply(&x, &[2], &table, false)?.flatten_all()?.to_vec1::<f32>()?;
        assert!((y[0] - 2f32.cos()).abs() < 1e-7 && (y[1] - 2f32.sin()).abs() < 1e-7);
        let error = apply(&x, &[3], &table, false).unwrap_err().to_string();
        assert!(error.contains("position 3 is beyond the 3"), "{error}");
        Ok(())
    }

    #[test]
    fn bits_do_not_depend_on_threads() -> Result<()> {
        let x = random(&[100, 3, 16], 1);
        let (table, positions) = (table(8, 1.0), (0..100).collect::<Vec<u32>>());
        same_bits(|| Ok(vec![apply(&x, &positions, &table, false)?]))
    }
}
