//! Helpers of the tests.

use candle_core::{DType, Device, Result, Tensor};

/// Numbers in [−1, 1) that depend on `seed` alone.
pub(crate) fn random(dims: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let values: Vec<f32> = (0..dims.iter().product())
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

/// `tensor` in f64, which sends it through the reference path.
pub(crate) fn f64s(tensor: &Tensor) -> Result<Tensor> {
    tensor.to_dtype(DType::F64)
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Asserts that no element differs by more than `tolerance` times the largest element (at least
/// 0.1, for gradients that cancel).
#[track_caller]
pub(crate) fn assert_close(got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.dims(), want.dims());
    let (got, want) = (values(got), values(want));
    let size = want.iter().fold(0.1f64, |size, x| size.max(x.abs()));
    for (index, (got, want)) in got.iter().zip(&want).enumerate() {
        assert!(
            (got - want).abs() <= tolerance * size,
            "element {index}: {got} instead of {want}, relative difference {:e}",
            (got - want).abs() / size
        );
    }
}

/// Σ y·weights, a loss whose gradient for y is `weights`.
pub(crate) fn weighted_sum(y: &Tensor, weights: &Tensor) -> Result<f64> {
    (y * weights)?.sum_all()?.to_scalar()
}

/// Compares `grad` with central differences of `loss` at every element of `x` (f64).
#[track_caller]
pub(crate) fn check_gradient(
    x: &Tensor,
    grad: &Tensor,
    loss: impl Fn(&Tensor) -> Result<f64>,
) -> Result<()> {
    let step = 1e-5;
    let (at, grad) = (values(x), values(grad));
    for index in 0..at.len() {
        let moved = |by: f64| -> Result<f64> {
            let mut at = at.clone();
            at[index] += by;
            loss(&Tensor::from_vec(at, x.dims(), &Device::Cpu)?)
        };
        let slope = (moved(step)? - moved(-step)?) / (2.0 * step);
        assert!(
            (slope - grad[index]).abs() < 1e-7 * slope.abs().max(1.0),
            "element {index}: gradient {} but slope {slope}",
            grad[index]
        );
    }
    Ok(())
}

/// Asserts that `compute` gives the same bits on 1, 2 and 3 threads.
#[track_caller]
pub(crate) fn same_bits(compute: impl Fn() -> Result<Vec<Tensor>> + Sync) -> Result<()> {
    let run = |threads: usize| -> Vec<Vec<u32>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let tensors = pool.install(&compute).unwrap();
        let bits = |tensor: &Tensor| {
            let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
            values.into_iter().map(f32::to_bits).collect()
        };
        tensors.iter().map(bits).collect()
    };
    let one = run(1);
    assert!(one.iter().flatten().any(|&bits| bits != 0));
    assert_eq!(one, run(2));
    assert_eq!(one, run(3));
    Ok(())
}
