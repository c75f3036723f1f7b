//! Every kernel that this processor has against sums written out in `f64`.

use super::*;

/// Numbers in [−1, 1) that depend on `seed` alone.
fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn all_kernels() -> Vec<Kernels> {
    let mut all = vec![Kernels { width: 8, f32: baseline, pairs: None }];
    all.push(Kernels { width: 32, f32: wide, pairs: Some(TILES) });
    #[cfg(target_arch = "x86_64")]
    {
        if level() != Level::Baseline {
            all.push(Kernels { width: 16, f32: x86::avx2, pairs: None });
        }
        if level() == Level::Avx512 {
            all.push(Kernels { width: 32, f32: x86::avx512, pairs: None });
        }
        let pairs = Kernels::all_pairs().into_iter();
        all.extend(pairs.map(|p| Kernels { width: 32, f32: x86::avx512, pairs: Some(p) }));
    }
    all
}

/// What [`amx::amx`] does, written out: tests how operands are packed for it on any processor.
const TILES: Pairs =
    Pairs { kernel: tiles, step: amx::STEP, height: amx::HEIGHT, rows: Some(2 * amx::HEIGHT) };

unsafe fn wide(raw: Raw, rows: usize) {
    // Safety: by the caller.
    unsafe { rows_in_tiles!(raw, rows, crate::simd::Baseline, 8, [1]) }
}

unsafe fn tiles(raw: Raw, rows: usize) {
    const WIDTH: usize = 32;
    assert!(raw.depth.is_multiple_of(amx::STEP) && raw.column == 1);
    let halves = |x: f32| {
        let bits = x.to_bits();
        [bits << 16, bits & 0xffff_0000].map(f32::from_bits)
    };
    for i in 0..rows.next_multiple_of(amx::HEIGHT) {
        let mut sums = [0f32; WIDTH];
        // Safety: the left operand has whole tiles of rows, the destination `rows`.
        unsafe {
            let c = std::slice::from_raw_parts_mut(
                raw.c.add(i.min(rows - 1) * raw.stride),
                if i < rows { WIDTH } else { 0 },
            );
            if raw.add && i < rows {
                sums.copy_from_slice(c);
            }
            for k in 0..raw.depth {
                let [a0, a1] = halves(raw.a.add(i * raw.row + k).read());
                for (j, sum) in sums.iter_mut().enumerate() {
                    let [b0, b1] = halves(raw.b.add(k * WIDTH + j).read());
                    *sum += a0 * b0 + a1 * b1;
                }
            }
            c.copy_from_slice(&sums[..c.len()]);
        }
    }
}

/// An operand [rows, columns], stored as its transpose where `turned` says so.
fn mat<T>(data: &[T], rows: usize, columns: usize, turned: bool) -> Mat<'_, T> {
    if turned { Mat::new(data, columns, rows).t() } else { Mat::new(data, rows, columns) }
}

fn rounded_if(x: f32, rounds: bool) -> f64 {
    f64::from(if rounds { bf16::from_f32(x).to_f32() } else { x })
}

#[test]
fn every_kernel_shape_and_orientation() {
    // (rows, columns, depths of the terms); more rows than a block, deeper than a panel.
    let shapes: &[(usize, usize, &[usize])] = &[
        (1, 1, &[1]),
        (5, 7, &[3]),
        (13, 33, &[17, 2]),
        (97, 40, &[31]),
        (200, 70, &[650, 16]),
        (11, 300, &[641]),
        (3, 4, &[0]),
        (300, 16, &[40, 0, 9]),
    ];
    for kernels in all_kernels() {
        for (at, &(m, n, depths)) in shapes.iter().enumerate() {
            for variant in 0..16 {
                let [turned_a, turned_b, halves, round] =
                    [1, 2, 4, 8].map(|bit| variant & bit != 0);
                let inputs = if round { Inputs::Bf16 } else { Inputs::F32 };
                let rounds = round && kernels.pairs.is_some();
                let seed = (at * 16 + variant) as u64;
                let a: Vec<_> = depths.iter().map(|k| random(m * k, seed + *k as u64)).collect();
                let b: Vec<_> =
                    depths.iter().map(|k| random(n * k, seed + 99 + *k as u64)).collect();
                let b16: Vec<Vec<bf16>> =
                    b.iter().map(|b| b.iter().map(|x| bf16::from_f32(*x)).collect()).collect();
                let lefts: Vec<_> = (a.iter().zip(depths))
                    .map(|(a, k)| Left::for_kernels(mat(a, m, *k, turned_a), inputs, kernels))
                    .collect();
                let terms: Vec<_> = (0..depths.len())
                    .map(|t| Term {
                        a: &lefts[t],
                        b: match halves {
                            true => Right::Bf16(mat(&b16[t], depths[t], n, turned_b)),
                            false => Right::F32(mat(&b[t], depths[t], n, turned_b)),
                        },
                    })
                    .collect();
                let stride = n + 3;
                let before = random(m * stride, 5);
                for mode in [Into::Overwrite, Into::Add] {
                    let mut c = before.clone();
                    matmul(&mut c, stride, mode, &terms);
                    for i in 0..m {
                        for j in 0..n {
                            let mut sum = 0.0;
                            for (t, &k) in depths.iter().enumerate() {
                                for p in 0..k {
                                    let x = a[t][if turned_a { p * m + i } else { i * k + p }];
                                    let at = if turned_b { j * k + p } else { p * n + j };
                                    let y = if halves { b16[t][at].to_f32() } else { b[t][at] };
                                    sum += rounded_if(x, rounds) * rounded_if(y, rounds);
                                }
                            }
                            if mode == Into::Add {
                                sum += f64::from(before[i * stride + j]);
                            }
                            let found = f64::from(c[i * stride + j]);
                            let allowed = 2e-6 * (1.0 + depths.iter().sum::<usize>() as f64).sqrt();
                            assert!(
                                (found - sum).abs() < allowed * 4.0,
                                "{m}×{n} {depths:?}, variant {variant}, width {}: {found}, not {sum}",
                                kernels.width
                            );
                        }
                        assert_eq!(
                            c[i * stride + n..(i + 1) * stride],
                            before[i * stride + n..(i + 1) * stride]
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn rounding_is_to_the_nearest_even_and_keeps_what_is_no_number() {
    let values: Vec<f32> = [0x3f80_8000u32, 0x3f81_8000, 0x3f80_8001, 0x7f7f_ffff, 0x7f80_0000]
        .map(f32::from_bits)
        .into_iter()
        .chain([f32::NAN, f32::from_bits(0x7f80_0001), -f32::NAN, -0.0, 1e-40])
        .chain(random(1000, 3))
        .collect();
    for (rounded, x) in round_to_bf16(&values).into_iter().zip(values) {
        let expected = bf16::from_f32(x).to_f32();
        assert!(rounded.to_bits() == expected.to_bits() || (rounded.is_nan() && x.is_nan()), "{x}");
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_on_other_rows() {
    let (m, n, k) = (230, 75, 700);
    let (a, b) = (random(m * k, 1), random(n * k, 2));
    for inputs in [Inputs::F32, Inputs::Bf16] {
        let run = |threads: usize, rows: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let left = Left::new(Mat::new(&a[..rows * k], rows, k), inputs);
                product(&[Term { a: &left, b: Right::new(&b, n, k).t() }])
            })
        };
        let one = run(1, m);
        assert_eq!(one, run(2, m));
        assert_eq!(one, run(3, m));
        assert_eq!(one[..50 * n], run(2, 50), "a row is the same in any company");
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let values = vec![1.0; 12];
    let attempt = |work: &(dyn Fn() + std::panic::RefUnwindSafe)| {
        assert!(std::panic::catch_unwind(work).is_err());
    };
    attempt(&|| {
        Mat::new(&values, 4, 4);
    });
    attempt(&|| {
        let a = Left::new(Mat::new(&values, 3, 4), Inputs::F32);
        product(&[Term { a: &a, b: Right::new(&values, 3, 4) }]);
    });
    attempt(&|| {
        let a = Left::new(Mat::new(&values, 3, 4), Inputs::F32);
        matmul(&mut [0.0; 8], 3, Into::Overwrite, &[Term { a: &a, b: Right::new(&values, 4, 3) }]);
    });
}
