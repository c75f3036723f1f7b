//! Layers alone and in groups against the reference and finite differences.

use super::*;
use crate::testing::{assert_close, check_gradient, f64s, random, same_bits, weighted_sum};

/// A weight for the reference, which rounds the operands of its products if it is in `bf16`: on a
/// processor that does not, the same numbers in `f64`.
fn for_reference(w: &Tensor) -> Result<Tensor> {
    if Inputs::over(w.dtype()) == Inputs::Bf16 { Ok(w.clone()) } else { f64s(w) }
}

#[test]
fn products_equal_reference() -> Result<()> {
    for (n, k, o) in [(1, 1, 1), (1, 64, 80), (2, 33, 5), (4, 70, 19), (7, 33, 20), (70, 80, 1100)]
    {
        let (x, w, dy) = (random(&[n, k], 1), random(&[o, k], 2), random(&[n, o], 3));
        let (x64, dy64) = (f64s(&x)?, f64s(&dy)?);
        for w in [w.clone(), w.to_dtype(DType::BF16)?] {
            let wide = for_reference(&w)?;
            assert_close(&matmul_nt(&x, &w)?, &reference::matmul_nt(&x64, &wide)?, 2e-6);
            assert_close(&matmul_nn(&dy, &w)?, &reference::matmul_nn(&dy64, &wide)?, 2e-6);
        }
        assert_close(&matmul_tn(&dy, &x)?, &reference::matmul_tn(&dy64, &x64)?, 2e-6);
    }
    Ok(())
}

#[test]
fn lora_equals_reference() -> Result<()> {
    for (n, k, o, r) in [(1, 5, 3, 1), (33, 40, 70, 4), (65, 96, 48, 16)] {
        let (x, w, dy) = (random(&[n, k], 1), random(&[o, k], 2), random(&[n, o], 3));
        let (a, b) = (random(&[r, k], 4), random(&[o, r], 5));
        let all = [&x, &w, &a, &b, &dy].map(f64s);
        let [x64, w64, a64, b64, dy64] = all;
        let (x64, w64, a64, b64, dy64) = (x64?, w64?, a64?, b64?, dy64?);
        let (y, xa) = lora_forward(&x, &w, &a, &b, 2.0)?;
        let layer = Projection { w: &w64, lora: Some(LoraPair { a: &a64, b: &b64, s: 2.0 }) };
        let (y64, xa64) = reference::forward(&x64, &x64, &layer)?;
        let xa64 = xa64.unwrap();
        assert_close(&y, &y64, 3e-6);
        assert_close(&xa, &xa64, 3e-6);
        let (dx, da, db) = lora_backward(&dy, &x, &w, &a, &b, 2.0, &xa, true)?;
        let (dys, xas) = ([&dy64], [Some(&xa64)]);
        let (parts, mut gradients) =
            reference::backward(&dys, Some(&x64), &[layer], &xas, true, true)?;
        let (base, low) = parts.unwrap();
        let (low, (da64, db64)) = (low.unwrap(), gradients.pop().unwrap().unwrap());
        assert_close(&dx.unwrap(), &(&base + &low)?, 3e-6);
        assert_close(&da, &da64, 3e-6);
        assert_close(&db, &db64, 3e-6);
        let parts = lora_backward_parts(&dy, &x, &w, &a, &b, 2.0, &xa, true)?;
        assert_close(&parts.dx_base.unwrap(), &base, 3e-6);
        assert_close(&parts.dx_low_rank.unwrap(), &low, 3e-6);
        assert_close(&parts.da, &da64, 3e-6);
        assert!(lora_backward(&dy, &x, &w, &a, &b, 2.0, &xa, false)?.0.is_none());
    }
    Ok(())
}

/// Layers that share an input, one of them without an adapter, over weights of both dtypes.
#[test]
fn groups_equal_reference() -> Result<()> {
    for (n, k) in [(1, 5), (3, 40), (33, 70), (150, 340)] {
        let x = random(&[n, k], 1);
        let outs = [(19, 4), (8, 0), (70, 3)];
        let adapters = outs.map(|(o, r)| (random(&[r, k], o as u64), random(&[o, r], 7)));
        let dys = outs.map(|(o, _)| random(&[n, o], 9 + o as u64));
        for dtype in [DType::F32, DType::BF16] {
            let weights = outs.map(|(o, _)| random(&[o, k], 3 + o as u64).to_dtype(dtype));
            let weights: Vec<_> = weights.into_iter().collect::<Result<_>>()?;
            let weights64: Vec<_> = weights.iter().map(for_reference).collect::<Result<_>>()?;
            let pairs64: Vec<_> =
                adapters.iter().map(|(a, b)| Ok((f64s(a)?, f64s(b)?))).collect::<Result<_>>()?;
            let layers: Vec<_> = (0..3)
                .map(|i| Projection {
                    w: &weights[i],
                    lora: (i != 1).then(|| LoraPair {
                        a: &adapters[i].0,
                        b: &adapters[i].1,
                        s: 1.5,
                    }),
                })
                .collect();
            let layers64: Vec<_> = (0..3)
                .map(|i| Projection {
                    w: &weights64[i],
                    lora: (i != 1).then(|| LoraPair { a: &pairs64[i].0, b: &pairs64[i].1, s: 1.5 }),
                })
                .collect();
            // What is rounded may fall to the other side after another order of adding.
            let close = if dtype == DType::F32 { 5e-6 } else { 6e-3 };
            let x64 = f64s(&x)?;
            let found = forward(&x, &layers)?;
            for (layer, (y, xa)) in layers64.iter().zip(&found) {
                let (y64, xa64) = reference::forward(&x64, &x64, layer)?;
                assert_close(y, &y64, close);
                assert_eq!(xa.is_some(), xa64.is_some());
                if let (Some(xa), Some(xa64)) = (xa, xa64) {
                    assert_close(xa, &xa64, 5e-6);
                }
            }
            let xas: Vec<_> = found.iter().map(|(_, xa)| xa.as_ref()).collect();
            let xas64 = xas.iter().map(|xa| xa.map(f64s).transpose());
            let xas64: Vec<_> = xas64.collect::<Result<_>>()?;
            let xas64: Vec<_> = xas64.iter().map(Option::as_ref).collect();
            let dys64: Vec<_> = dys.iter().map(f64s).collect::<Result<_>>()?;
            let (dys, dys64): (Vec<_>, Vec<_>) = (dys.iter().collect(), dys64.iter().collect());
            let (dx, gradients) = backward(&dys, Some(&x), &layers, &xas, true)?;
            let (parts, gradients64) =
                reference::backward(&dys64, Some(&x64), &layers64, &xas64, true, false)?;
            assert_close(&dx.unwrap(), &parts.unwrap().0, close);
            for (found, wanted) in gradients.iter().zip(&gradients64) {
                assert_eq!(found.is_some(), wanted.is_some());
                if let (Some((da, db)), Some((da64, db64))) = (found, wanted) {
                    assert_close(da, da64, 1e-5);
                    assert_close(db, db64, 5e-6);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn lora_gradients_by_finite_differences() -> Result<()> {
    let (x, w) = (f64s(&random(&[4, 5], 1))?, f64s(&random(&[6, 5], 2))?);
    let (a, b) = (f64s(&random(&[2, 5], 3))?, f64s(&random(&[6, 2], 4))?);
    let dy = f64s(&random(&[4, 6], 5))?;
    let loss =
        |x: &Tensor, a: &Tensor, b: &Tensor| weighted_sum(&lora_forward(x, &w, a, b, 0.5)?.0, &dy);
    let xa = lora_forward(&x, &w, &a, &b, 0.5)?.1;
    let (dx, da, db) = lora_backward(&dy, &x, &w, &a, &b, 0.5, &xa, true)?;
    check_gradient(&x, &dx.unwrap(), |x| loss(x, &a, &b))?;
    check_gradient(&a, &da, |a| loss(&x, a, &b))?;
    check_gradient(&b, &db, |b| loss(&x, &a, b))
}

#[test]
fn bits_do_not_depend_on_threads() -> Result<()> {
    let (x, w, dy) = (random(&[150, 200], 1), random(&[600, 200], 2), random(&[150, 600], 3));
    let (a, b) = (random(&[16, 200], 4), random(&[600, 16], 5));
    for w in [w.clone(), w.to_dtype(DType::BF16)?] {
        same_bits(|| {
            let (y, xa) = lora_forward(&x, &w, &a, &b, 2.0)?;
            let (dx, da, db) = lora_backward(&dy, &x, &w, &a, &b, 2.0, &xa, true)?;
            Ok(vec![y, xa, dx.unwrap(), da, db])
        })?;
    }
    Ok(())
}

#[test]
fn wrong_shapes_are_named() {
    let error = matmul_nt(&random(&[2, 3], 1), &random(&[4, 5], 2)).unwrap_err().to_string();
    assert!(error.contains("`w` must have shape [_, 3], its shape is [4, 5]"), "{error}");
}
