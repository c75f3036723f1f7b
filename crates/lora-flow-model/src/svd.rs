//! Singular values and an orthonormal basis, in f64, for what adapters are made of: PiSSA's and
//! OLoRA's start, and the combination of adapters.

use candle_core::{Device, Result, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Up to this smaller side a matrix is decomposed whole.
const WHOLE: usize = 160;
/// Columns of the subspace beyond those asked for.
const SPARE: usize = 16;
/// Most rounds of the subspace iteration.
const ROUNDS: usize = 60;
/// Relative change of every singular value at which it stops.
const SETTLED: f64 = 1e-9;

/// The largest singular values σ of a matrix and their vectors: W ≈ Σ σᵢ uᵢ vᵢᵀ.
#[derive(Debug, Clone)]
pub struct Svd {
    /// Descending.
    pub values: Vec<f64>,
    /// One vector of `rows` elements for each value.
    pub left: Vec<Vec<f64>>,
    /// One vector of `cols` elements for each value.
    pub right: Vec<Vec<f64>>,
}

/// The `k` largest singular values of a matrix [rows, cols] (or all, if it has fewer).
///
/// Small matrices are decomposed whole. Of others, a subspace iteration (Halko, Martinsson & Tropp
/// 2011) finds the space; where neighbouring values hardly differ, its last vectors may be mixtures
/// of theirs, which spans as good a space. The result depends on the matrix alone.
///
/// # Errors
/// When the sizes do not fit.
pub fn top(values: &[f64], rows: usize, cols: usize, k: usize) -> Result<Svd> {
    let w = Tensor::from_slice(values, (rows, cols), &Device::Cpu)?;
    let small = rows.min(cols);
    let mut svd = if small <= WHOLE || k + SPARE >= small {
        // The sides swapped, so that the shorter one is rotated.
        if cols <= rows {
            let (sigma, left, right) = jacobi(columns(&w)?);
            Svd { values: sigma, left, right }
        } else {
            let (sigma, right, left) = jacobi(columns(&w.t()?)?);
            Svd { values: sigma, left, right }
        }
    } else {
        subspace(&w, k + SPARE)?
    };
    svd.values.truncate(k);
    svd.left.truncate(k);
    svd.right.truncate(k);
    Ok(svd)
}

/// Q with orthonormal columns that span those of W = [out, in]'s first `r` columns, as r vectors.
/// Columns that depend on those before them give zero vectors.
pub fn orthonormal(mut vectors: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    for i in 0..vectors.len() {
        let (done, rest) = vectors.split_at_mut(i);
        let v = &mut rest[0];
        let before = norm(v);
        // Twice is enough (Giraud et al. 2005).
        for _ in 0..2 {
            for q in done.iter() {
                let along = dot(q, v);
                v.iter_mut().zip(q).for_each(|(v, q)| *v -= along * q);
            }
        }
        let length = norm(v);
        let factor = if length > 1e-12 * before { 1.0 / length } else { 0.0 };
        v.iter_mut().for_each(|x| *x *= factor);
    }
    vectors
}

/// The space of the `b` largest singular values by iteration, and the values in it.
fn subspace(w: &Tensor, b: usize) -> Result<Svd> {
    let (rows, _) = w.dims2()?;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let start: Vec<Vec<f64>> =
        (0..b).map(|_| (0..rows).map(|_| 2.0 * rng.random::<f64>() - 1.0).collect()).collect();
    let mut q = orthonormal(start);
    let mut before: Vec<f64> = Vec::new();
    let wt = w.t()?.contiguous()?;
    for _ in 0..ROUNDS {
        // Qᵀ as rows: Z = QᵀW, then (WZᵀ)ᵀ = ZWᵀ.
        let z = matrix(&q)?.matmul(w)?;
        let sigma: Vec<f64> = z.sqr()?.sum(1)?.sqrt()?.to_vec1()?;
        q = orthonormal(vectors(&z.matmul(&wt)?)?);
        let settled = !before.is_empty()
            && sigma.iter().zip(&before).all(|(a, b)| (a - b).abs() <= SETTLED * sigma[0]);
        if settled {
            break;
        }
        before = sigma;
    }
    // W ≈ Q(QᵀW), and the rows of QᵀW are few.
    let z = vectors(&matrix(&q)?.matmul(w)?)?;
    let (sigma, right, small) = jacobi(z);
    let left = matrix(&small)?.matmul(&matrix(&q)?)?;
    Ok(Svd { values: sigma, left: vectors(&left)?, right })
}

/// One-sided Jacobi rotations (Hestenes 1958) on the columns of a matrix: singular values in
/// descending order, left vectors, right vectors.
#[allow(clippy::type_complexity)]
fn jacobi(mut a: Vec<Vec<f64>>) -> (Vec<f64>, Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let n = a.len();
    // v[j] is the j-th right vector; rotations act on it as on a[j].
    let mut v: Vec<Vec<f64>> =
        (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    for _ in 0..60 {
        let mut rotated = false;
        for p in 0..n {
            for q in p + 1..n {
                let (alpha, beta, gamma) =
                    (dot(&a[p], &a[p]), dot(&a[q], &a[q]), dot(&a[p], &a[q]));
                if gamma.abs() <= 1e-15 * (alpha * beta).sqrt() || gamma == 0.0 {
                    continue;
                }
                rotated = true;
                let zeta = (beta - alpha) / (2.0 * gamma);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let t = if zeta == 0.0 { 1.0 } else { t };
                let c = 1.0 / (1.0 + t * t).sqrt();
                for m in [&mut a, &mut v] {
                    let (left, right) = m.split_at_mut(q);
                    rotate(&mut left[p], &mut right[0], c, c * t);
                }
            }
        }
        if !rotated {
            break;
        }
    }
    let mut order: Vec<(f64, usize)> = a.iter().map(|x| norm(x)).zip(0..).collect();
    order.sort_by(|x, y| y.0.total_cmp(&x.0).then(x.1.cmp(&y.1)));
    let sigma = order.iter().map(|o| o.0).collect();
    let unit = |(length, i): &(f64, usize)| {
        let factor = if *length > 0.0 { 1.0 / length } else { 0.0 };
        a[*i].iter().map(|x| x * factor).collect()
    };
    let left = order.iter().map(unit).collect();
    // Row i of the accumulated rotations belongs to column i of the matrix.
    let right = order.iter().map(|(_, i)| v[*i].clone()).collect();
    (sigma, left, right)
}

fn rotate(x: &mut [f64], y: &mut [f64], c: f64, s: f64) {
    for (x, y) in x.iter_mut().zip(y) {
        (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

/// Vectors as the rows of a matrix.
fn matrix(vectors: &[Vec<f64>]) -> Result<Tensor> {
    let width = vectors.first().map_or(0, Vec::len);
    Tensor::from_vec(vectors.concat(), (vectors.len(), width), &Device::Cpu)
}

/// The rows of a matrix.
fn vectors(m: &Tensor) -> Result<Vec<Vec<f64>>> {
    m.to_vec2()
}

/// The columns of a matrix.
fn columns(m: &Tensor) -> Result<Vec<Vec<f64>>> {
    m.t()?.contiguous()?.to_vec2()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, cols: usize, seed: u64) -> Vec<f64> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..rows * cols).map(|_| rng.random::<f64>() - 0.5).collect()
    }

    /// ‖W − Σ σuvᵀ‖ / ‖W‖.
    fn residue(w: &[f64], cols: usize, svd: &Svd) -> f64 {
        let mut left = w.to_vec();
        for ((s, u), v) in svd.values.iter().zip(&svd.left).zip(&svd.right) {
            for (row, u) in left.chunks_mut(cols).zip(u) {
                row.iter_mut().zip(v).for_each(|(x, v)| *x -= s * u * v);
            }
        }
        norm(&left) / norm(w)
    }

    #[test]
    fn a_whole_decomposition_gives_the_matrix_back() {
        for (rows, cols) in [(7, 5), (5, 7), (6, 6)] {
            let w = random(rows, cols, 3);
            let svd = top(&w, rows, cols, 9).unwrap();
            assert_eq!(svd.values.len(), 5.min(rows.min(cols)).max(rows.min(cols)));
            assert!(svd.values.is_sorted_by(|a, b| a >= b));
            assert!(residue(&w, cols, &svd) < 1e-13);
            for (i, u) in svd.left.iter().enumerate() {
                for (j, other) in svd.left.iter().enumerate() {
                    assert!((dot(u, other) - f64::from(u8::from(i == j))).abs() < 1e-12);
                }
            }
        }
    }

    #[test]
    fn the_iteration_finds_the_largest_values_of_a_large_matrix() {
        // Rank 6 with known values, and a little noise.
        let (rows, cols) = (220, 300);
        let q = |n, seed| {
            let flat = random(n, 6, seed);
            orthonormal((0..6).map(|j| flat.iter().skip(j).step_by(6).copied().collect()).collect())
        };
        let (u, v) = (q(rows, 1), q(cols, 2));
        let mut w: Vec<f64> = random(rows, cols, 5).iter().map(|x| x * 1e-4).collect();
        for (k, sigma) in [9.0, 7.0, 4.0, 3.0, 2.0, 1.0].into_iter().enumerate() {
            for i in 0..rows {
                for j in 0..cols {
                    w[i * cols + j] += sigma * u[k][i] * v[k][j];
                }
            }
        }
        let svd = top(&w, rows, cols, 6).unwrap();
        for (found, sigma) in svd.values.iter().zip([9.0, 7.0, 4.0, 3.0, 2.0, 1.0]) {
            assert!((found - sigma).abs() < 2e-3, "{found} {sigma}");
        }
        assert!(residue(&w, cols, &svd) < 2e-3);
        assert!((dot(&svd.left[0], &u[0]).abs() - 1.0).abs() < 1e-4);
    }

    #[test]
    fn dependent_columns_give_no_direction() {
        let q = orthonormal(vec![vec![3.0, 4.0], vec![6.0, 8.0]]);
        assert_eq!(q[1], [0.0, 0.0]);
        assert!((norm(&q[0]) - 1.0).abs() < 1e-15);
    }
}
