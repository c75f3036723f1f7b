//! Every kernel on the GPU against the CPU's, on fresh random inputs, with outputs poisoned before.
//!
//! Needs a GPU: without `LORA_FLOW_TEST_GPU=1` the tests say that they were not run.
#![cfg(feature = "cuda")]

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use lora_flow_kernels::activation::{Act, swiglu_backward, swiglu_forward};
use lora_flow_kernels::cuda::ops::{self, AdamWBuffers, AdamWStep, Attention, Matrix};
use lora_flow_kernels::cuda::{Buffer, Element, Gpu, Product};
use lora_flow_kernels::rope::RopeTable;
use lora_flow_kernels::{adamw, attention, loss, rms_norm, rope};

const BOTH: [Element; 2] = [Element::F32, Element::Bf16];

fn gpu() -> Option<Arc<Gpu>> {
    if std::env::var_os("LORA_FLOW_TEST_GPU").is_none() {
        eprintln!("not run: set LORA_FLOW_TEST_GPU=1 on a machine with a GPU");
        return None;
    }
    Some(Gpu::open(0).expect("a GPU"))
}

/// Random numbers; the seed differs from run to run and is printed.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        eprintln!("seed {now}");
        Self(now | 1)
    }

    fn next(&mut self) -> f32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Values in [−1, 1) that the dtype holds exactly.
    fn values(&mut self, len: usize, e: Element) -> Vec<f32> {
        (0..len).map(|_| round(self.next(), e)).collect()
    }
}

fn round(x: f32, e: Element) -> f32 {
    if e == Element::Bf16 { bf16::from_f32(x).to_f32() } else { x }
}

/// A matrix on the device with a row stride, all bytes beside it poisoned.
struct Mat {
    buffer: Buffer<u8>,
    ld: usize,
    e: Element,
}

impl Mat {
    fn poisoned(gpu: &Arc<Gpu>, rows: usize, ld: usize, e: Element) -> Self {
        let buffer = gpu.alloc::<u8>(rows * ld * e.size()).unwrap();
        gpu.fill_bytes(buffer.ptr(), 0xff, buffer.len()).unwrap();
        Self { buffer, ld, e }
    }

    fn new(gpu: &Arc<Gpu>, values: &[f32], width: usize, ld: usize, e: Element) -> Self {
        let out = Self::poisoned(gpu, values.len() / width, ld, e);
        let bytes: Vec<u8> = match e {
            Element::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Element::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        };
        gpu.write_rows((out.buffer.ptr(), ld * e.size()), &bytes, width * e.size()).unwrap();
        out
    }

    fn at(&self) -> ops::Mat {
        (self.buffer.ptr(), self.ld)
    }

    /// The first `width` columns from column `from` on.
    fn read(&self, from: usize, width: usize) -> Vec<f32> {
        let bytes = self.buffer.to_vec().unwrap();
        let all: Vec<f32> = match self.e {
            Element::F32 => {
                bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
            }
            Element::Bf16 => bytes
                .chunks(2)
                .map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32())
                .collect(),
        };
        all.chunks(self.ld).flat_map(|row| row[from..from + width].to_vec()).collect()
    }
}

fn tensor(values: &[f32], dims: &[usize]) -> Tensor {
    Tensor::from_slice(values, dims, &Device::Cpu).unwrap()
}

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// ‖got − want‖ / ‖want‖ must stay below 2e-6·√… for f32 and 6e-3 for bf16.
#[track_caller]
fn close(what: &str, e: Element, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let off = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    let size = norm(&mut want.iter().map(|x| f64::from(*x)));
    let error = off / size.max(1e-30);
    eprintln!("{what:<44} {e:?}: relative error {error:.1e}");
    let limit = if e == Element::F32 { 5e-6 } else { 8e-3 };
    assert!(error < limit || (size == 0.0 && off == 0.0), "{what} {e:?}: relative error {error:e}");
}

#[test]
fn norms_activations_and_rotations() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for e in BOTH {
        for (rows, width) in [(1, 8), (5, 576), (67, 2048), (3, 4104)] {
            let (ld_x, ld_y) = (width + 8, width + 24);
            let x = random.values(rows * width, e);
            let w = random.values(width, Element::F32);
            let dy = random.values(rows * width, e);
            let res = random.values(rows * width, e);
            let (want, rstd) =
                rms_norm::forward(&tensor(&x, &[rows, width]), &tensor(&w, &[width]), 1e-5)
                    .unwrap();
            let (dx, dw) = (Mat::new(&gpu, &x, width, ld_x, e), gpu.upload(&w).unwrap());
            let (y, again) =
                (Mat::poisoned(&gpu, rows, ld_y, e), Mat::poisoned(&gpu, rows, ld_y, e));
            let r = gpu.alloc::<f32>(rows).unwrap();
            ops::rms_fwd(&gpu, e, y.at(), r.ptr(), dx.at(), dw.ptr(), 0, rows, width, 1e-5)
                .unwrap();
            ops::rms_again(&gpu, e, again.at(), r.ptr(), dx.at(), dw.ptr(), rows, width).unwrap();
            close(&format!("rms_fwd {rows}×{width}"), e, &y.read(0, width), &flat(&want));
            assert_eq!(y.read(0, width), again.read(0, width));
            close("rstd", Element::F32, &r.to_vec().unwrap(), &flat(&rstd));
            let want = rms_norm::backward_add(
                &tensor(&dy, &[rows, width]),
                &tensor(&x, &[rows, width]),
                &tensor(&w, &[width]),
                &rstd,
                Some(&tensor(&res, &[rows, width])),
            )
            .unwrap();
            let (d, g) =
                (Mat::new(&gpu, &res, width, ld_y, e), Mat::new(&gpu, &dy, width, ld_x, e));
            ops::rms_bwd(&gpu, e, d.at(), g.at(), dx.at(), dw.ptr(), r.ptr(), 0, rows, width, true)
                .unwrap();
            close("rms_bwd", e, &d.read(0, width), &flat(&want));

            // Picked rows, the last of them none.
            let mut pick: Vec<i32> = (0..rows as i32).rev().step_by(2).collect();
            pick.push(-1);
            let picks = gpu.upload(&pick).unwrap();
            let y = Mat::poisoned(&gpu, pick.len(), ld_y, e);
            let r = gpu.alloc::<f32>(pick.len()).unwrap();
            ops::rms_fwd(
                &gpu,
                e,
                y.at(),
                r.ptr(),
                dx.at(),
                dw.ptr(),
                picks.ptr(),
                pick.len(),
                width,
                1e-5,
            )
            .unwrap();
            let all = rms_norm::forward(&tensor(&x, &[rows, width]), &tensor(&w, &[width]), 1e-5)
                .unwrap()
                .0;
            let all = flat(&all);
            let want: Vec<f32> = pick
                .iter()
                .flat_map(|p| {
                    if *p < 0 {
                        vec![0.0; width]
                    } else {
                        all[*p as usize * width..][..width].to_vec()
                    }
                })
                .collect();
            close("rms_fwd picked", e, &y.read(0, width), &want);

            for (code, act) in [(0, Act::Silu), (1, Act::Gelu), (2, Act::GeluTanh)] {
                let (gate, up) = (random.values(rows * width, e), random.values(rows * width, e));
                let both: Vec<f32> = (0..rows)
                    .flat_map(|i| {
                        [&gate[i * width..(i + 1) * width], &up[i * width..(i + 1) * width]]
                            .concat()
                    })
                    .collect();
                let gu = Mat::new(&gpu, &both, 2 * width, 2 * width + 8, e);
                let h = Mat::poisoned(&gpu, rows, ld_y, e);
                ops::gated_fwd(&gpu, e, h.at(), gu.at(), rows, width, code).unwrap();
                let (tg, tu) = (tensor(&gate, &[rows, width]), tensor(&up, &[rows, width]));
                let want = flat(&swiglu_forward(&tg, &tu, act).unwrap());
                close(&format!("gated_fwd {act:?}"), e, &h.read(0, width), &want);
                let dh = Mat::new(&gpu, &dy, width, ld_y, e);
                ops::gated_bwd(&gpu, e, dh.at(), gu.at(), rows, width, code).unwrap();
                let (wg, wu) =
                    swiglu_backward(&tensor(&dy, &[rows, width]), &tg, &tu, act).unwrap();
                close("gated_bwd h", e, &dh.read(0, width), &want);
                close("gated_bwd gate", e, &gu.read(0, width), &flat(&wg));
                close("gated_bwd up", e, &gu.read(width, width), &flat(&wu));
            }
        }
        for (rows, heads, kept, dim) in
            [(1, 1, 0, 8), (37, 3, 2, 64), (20, 2, 1, 80), (5, 3, 1, 24)]
        {
            let width = (heads + kept) * dim;
            let inv_freq: Vec<f32> =
                (0..dim / 2).map(|i| 1e4f32.powf(-(i as f32) / (dim / 2) as f32)).collect();
            let table = RopeTable::new(&inv_freq, 700, 1.0);
            let pairs: Vec<f32> = (0..700)
                .flat_map(|p| {
                    inv_freq.iter().flat_map(move |f| {
                        let a = f64::from(p as f32 * f);
                        [a.cos() as f32, a.sin() as f32]
                    })
                })
                .collect();
            let positions: Vec<u32> = (0..rows as u32).map(|t| t * 17 % 700).collect();
            let on: Vec<i32> = positions.iter().map(|p| *p as i32).collect();
            let x = random.values(rows * width, e);
            let m = Mat::new(&gpu, &x, width, width + 8, e);
            let (pairs, on) = (gpu.upload(&pairs).unwrap(), gpu.upload(&on).unwrap());
            ops::rope(&gpu, e, m.at(), pairs.ptr(), on.ptr(), rows, heads, dim, false).unwrap();
            let first: Vec<f32> = x.chunks(width).flat_map(|r| r[..heads * dim].to_vec()).collect();
            let want = rope::apply(&tensor(&first, &[rows, heads, dim]), &positions, &table, false)
                .unwrap();
            close(&format!("rope {heads}×{dim}"), e, &m.read(0, heads * dim), &flat(&want));
            let rest: Vec<f32> = x.chunks(width).flat_map(|r| r[heads * dim..].to_vec()).collect();
            assert_eq!(m.read(heads * dim, kept * dim), rest, "the other heads stay");
            ops::rope(&gpu, e, m.at(), pairs.ptr(), on.ptr(), rows, heads, dim, true).unwrap();
            close("rope back", e, &m.read(0, heads * dim), &first);

            let w = random.values(dim, Element::F32);
            let (dw, y) = (gpu.upload(&w).unwrap(), Mat::poisoned(&gpu, rows, width + 8, e));
            let (m, r) =
                (Mat::new(&gpu, &x, width, width + 8, e), gpu.alloc::<f32>(rows * heads).unwrap());
            ops::head_norm(&gpu, e, y.at(), r.ptr(), m.at(), dw.ptr(), rows, heads, dim, 1e-5)
                .unwrap();
            let by_head = tensor(&first, &[rows * heads, dim]);
            let (want, rstd) = rms_norm::forward(&by_head, &tensor(&w, &[dim]), 1e-5).unwrap();
            close("head_norm", e, &y.read(0, heads * dim), &flat(&want));
            let dy = random.values(rows * heads * dim, e);
            let d = Mat::new(&gpu, &dy, heads * dim, width, e);
            ops::head_norm_bwd(&gpu, e, d.at(), r.ptr(), m.at(), dw.ptr(), rows, heads, dim)
                .unwrap();
            let want = rms_norm::backward(
                &tensor(&dy, &[rows * heads, dim]),
                &by_head,
                &tensor(&w, &[dim]),
                &rstd,
            )
            .unwrap();
            close("head_norm_bwd", e, &d.read(0, heads * dim), &flat(&want));
        }
    }
}

#[test]
fn cross_entropy_of_logits() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for e in BOTH {
        for (rows, vocab) in [(1usize, 1usize), (3, 7), (5, 131), (4, 49152), (2, 50_257)] {
            let ld = vocab.next_multiple_of(8);
            let x: Vec<f32> = (0..rows * vocab).map(|_| round(8.0 * random.next(), e)).collect();
            let mut targets: Vec<i32> = (0..rows).map(|i| ((i * 7919) % vocab) as i32).collect();
            if rows > 1 {
                targets[1] = -1;
            }
            let (m, nll) =
                (Mat::new(&gpu, &x, vocab, ld, e), gpu.upload(&vec![f32::NAN; rows]).unwrap());
            let on = gpu.upload(&targets).unwrap();
            ops::cross_entropy(&gpu, e, m.at(), nll.ptr(), on.ptr(), rows, vocab, None).unwrap();
            let alone = nll.to_vec().unwrap();
            ops::cross_entropy(&gpu, e, m.at(), nll.ptr(), on.ptr(), rows, vocab, Some(0.37))
                .unwrap();
            assert_eq!(alone, nll.to_vec().unwrap());
            let (mut want_nll, mut want) = (Vec::new(), Vec::new());
            for (row, target) in x.chunks(vocab).zip(&targets) {
                if *target < 0 {
                    want_nll.push(0.0);
                    want.extend(vec![0.0; vocab]);
                    continue;
                }
                let max = row.iter().fold(f32::MIN, |a, b| a.max(*b));
                let sum: f64 = row.iter().map(|v| f64::from(v - max).exp()).sum();
                want_nll.push((sum.ln() + f64::from(max - row[*target as usize])) as f32);
                want.extend(row.iter().enumerate().map(|(i, v)| {
                    let p =
                        f64::from(v - max).exp() / sum - f64::from(u8::from(i == *target as usize));
                    (p * 0.37) as f32
                }));
            }
            close(&format!("nll {rows}×{vocab}"), Element::F32, &alone, &want_nll);
            close("dlogits", e, &m.read(0, vocab), &want);
        }
    }
    // The same as the CPU's fused loss gives from hidden states.
    let (rows, width, vocab) = (9, 32, 57);
    let (h, head) =
        (random.values(rows * width, Element::F32), random.values(vocab * width, Element::F32));
    let targets: Vec<u32> = (0..rows as u32).collect();
    let want = loss::cross_entropy(
        &tensor(&h, &[rows, width]),
        &tensor(&head, &[vocab, width]),
        &targets,
        4,
        false,
        1.0,
    )
    .unwrap();
    let logits =
        tensor(&h, &[rows, width]).matmul(&tensor(&head, &[vocab, width]).t().unwrap()).unwrap();
    let m = Mat::new(&gpu, &flat(&logits), vocab, 64, Element::F32);
    let (nll, on) = (
        gpu.alloc::<f32>(rows).unwrap(),
        gpu.upload(&targets.iter().map(|t| *t as i32).collect::<Vec<_>>()).unwrap(),
    );
    ops::cross_entropy(&gpu, Element::F32, m.at(), nll.ptr(), on.ptr(), rows, vocab, None).unwrap();
    close("nll as the CPU's", Element::F32, &nll.to_vec().unwrap(), &want.nll);
}

/// Ends of the documents by token, and the blocks of the fast path.
fn layout(docs: &[usize], rows: [usize; 3]) -> (Vec<i32>, Vec<i32>, [Vec<i32>; 3]) {
    let (mut first, mut last, mut tiles) = (Vec::new(), Vec::new(), <[Vec<i32>; 3]>::default());
    for d in docs.windows(2) {
        first.extend(vec![d[0] as i32; d[1] - d[0]]);
        last.extend(vec![d[1] as i32; d[1] - d[0]]);
        for (tiles, rows) in tiles.iter_mut().zip(rows) {
            let blocks = (d[0]..d[1]).step_by(rows);
            tiles.extend(blocks.flat_map(|row| [d[0] as i32, d[1] as i32, row as i32, 0]));
        }
    }
    (first, last, tiles)
}

#[test]
fn attention_forward_and_backward() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let lengths: [&[usize]; 3] = [&[1], &[1, 2, 63, 64, 65, 1, 130], &[300, 127, 128, 129, 1]];
    let mut failed = Vec::new();
    for e in BOTH {
        for (dim, heads, kv_heads) in
            [(64, 4, 2), (128, 2, 2), (64, 3, 1), (128, 4, 1), (16, 4, 2), (80, 2, 1), (256, 1, 1)]
        {
            for lengths in lengths {
                for window in [None, Some(1), Some(70)] {
                    let mut docs = vec![0];
                    docs.extend(lengths.iter().scan(0, |at, l| {
                        *at += l;
                        Some(*at)
                    }));
                    let n = *docs.last().unwrap();
                    let what =
                        format!("attention {heads}/{kv_heads}×{dim} {lengths:?} window {window:?}");
                    let problem = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        attend(&gpu, &mut random, e, (dim, heads, kv_heads), &docs, window, &what);
                    }));
                    if problem.is_err() {
                        failed.push(format!("{what} {e:?}"));
                    }
                    let _ = n;
                }
            }
        }
    }
    assert!(failed.is_empty(), "{} failed: {failed:#?}", failed.len());
}

fn attend(
    gpu: &Arc<Gpu>,
    random: &mut Random,
    e: Element,
    (dim, heads, kv_heads): (usize, usize, usize),
    docs: &[usize],
    window: Option<usize>,
    what: &str,
) {
    let n = *docs.last().unwrap();
    let (qw, kw) = (heads * dim, kv_heads * dim);
    let width = qw + 2 * kw;
    let q: Vec<f32> = random.values(n * qw, e);
    let (k, v, d) = (random.values(n * kw, e), random.values(n * kw, e), random.values(n * qw, e));
    let all: Vec<f32> = (0..n)
        .flat_map(|i| [&q[i * qw..][..qw], &k[i * kw..][..kw], &v[i * kw..][..kw]].concat())
        .collect();
    let scale = 1.0 / (dim as f32).sqrt();
    let (tq, tk, tv) = (
        tensor(&q, &[n, heads, dim]),
        tensor(&k, &[n, kv_heads, dim]),
        tensor(&v, &[n, kv_heads, dim]),
    );
    let setting = attention::Setting { docs, scale, window, operands: DType::F32 };
    let (o, lse) = attention::forward(&tq, &tk, &tv, &setting).unwrap();
    let (dq, dk, dv) =
        attention::backward(&tensor(&d, &[n, heads, dim]), &tq, &tk, &tv, &o, &lse, &setting)
            .unwrap();

    let (first, last, tiles) = layout(docs, gpu.flash_rows(dim).unwrap_or([128; 3]));
    let (first, last) = (gpu.upload(&first).unwrap(), gpu.upload(&last).unwrap());
    let tiles = tiles.map(|t| (gpu.upload(&t).unwrap(), t.len() / 4));
    let qkv = Mat::new(gpu, &all, width, width + 8, e);
    let at = |column: usize| qkv.at().0 + (column * e.size()) as u64;
    let a = Attention {
        q: at(0),
        k: at(qw),
        v: at(qw + kw),
        ld: qkv.ld,
        tokens: n,
        heads,
        kv_heads,
        dim,
        window: window.unwrap_or(0),
        first: first.ptr(),
        last: last.ptr(),
        tiles: [0, 1, 2].map(|i| (tiles[i].0.ptr(), tiles[i].1)),
    };
    let (go, glse) =
        (Mat::poisoned(gpu, n, qw + 16, e), gpu.upload(&vec![f32::NAN; heads * n]).unwrap());
    ops::attention_fwd(gpu, e, go.at(), glse.ptr(), &a).unwrap();
    close(&format!("{what} o"), e, &go.read(0, qw), &flat(&o));
    // The reference's lse may be in another order; it is compared through the gradients.
    let gd = Mat::new(gpu, &d, qw, qw + 8, e);
    let grads = Mat::poisoned(gpu, n, width + 16, e);
    let g = |column: usize| grads.at().0 + (column * e.size()) as u64;
    let delta = gpu.upload(&vec![f32::NAN; heads * n]).unwrap();
    ops::attention_bwd(
        gpu,
        e,
        grads.at(),
        g(qw),
        g(qw + kw),
        gd.at(),
        go.at(),
        glse.ptr(),
        delta.ptr(),
        &a,
    )
    .unwrap();
    // A query that sees one key alone has no gradient: rounding against nothing.
    let zero = |t: &Tensor| flat(t).iter().all(|x| x.abs() < 1e-5);
    if !zero(&dq) {
        close("  dq", e, &grads.read(0, qw), &flat(&dq));
        close("  dk", e, &grads.read(qw, kw), &flat(&dk));
    }
    assert!(grads.read(0, qw + kw).iter().all(|x| x.is_finite()));
    close("  dv", e, &grads.read(qw + kw, kw), &flat(&dv));
}

#[test]
fn products_in_all_orders() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (m, n, k) in [(1, 8, 8), (64, 16, 576), (16, 200, 65), (128, 136, 72)] {
        for (a_t, b_t) in [(false, true), (false, false), (true, false)] {
            for (input, output) in [
                (Element::F32, Element::F32),
                (Element::Bf16, Element::Bf16),
                (Element::Bf16, Element::F32),
            ] {
                let (a, b, c) = (
                    random.values(m * k, input),
                    random.values(k * n, input),
                    random.values(m * n, output),
                );
                let transposed = |v: &[f32], rows: usize, cols: usize| -> Vec<f32> {
                    (0..cols)
                        .flat_map(|j| (0..rows).map(move |i| (i, j)))
                        .map(|(i, j)| v[i * cols + j])
                        .collect()
                };
                let want: Vec<f32> = (0..m * n)
                    .map(|at| {
                        let (i, j) = (at / n, at % n);
                        let sum: f64 =
                            (0..k).map(|l| f64::from(a[i * k + l]) * f64::from(b[l * n + j])).sum();
                        (0.5 * sum + f64::from(c[at])) as f32
                    })
                    .collect();
                let ma = if a_t {
                    Mat::new(&gpu, &transposed(&a, m, k), m, m.next_multiple_of(8) + 8, input)
                } else {
                    Mat::new(&gpu, &a, k, k.next_multiple_of(8) + 8, input)
                };
                let mb = if b_t {
                    Mat::new(&gpu, &transposed(&b, k, n), k, k.next_multiple_of(8) + 8, input)
                } else {
                    Mat::new(&gpu, &b, n, n + 8, input)
                };
                let (mc, to) =
                    (Mat::new(&gpu, &c, n, n + 8, output), Mat::poisoned(&gpu, m, n + 16, output));
                let p = Product {
                    m,
                    n,
                    k,
                    a: ma.at(),
                    a_t,
                    b: mb.at(),
                    b_t,
                    c: to.at(),
                    add: mc.at(),
                    alpha: 0.5,
                    beta: 1.0,
                    input,
                    output,
                };
                gpu.product(&p).unwrap();
                close(
                    &format!("product {m}×{n}×{k} {a_t} {b_t} {input:?}"),
                    output,
                    &to.read(0, n),
                    &want,
                );
                gpu.product(&Product { beta: 0.0, add: to.at(), ..p }).unwrap();
                let want: Vec<f32> = want.iter().zip(&c).map(|(w, c)| w - c).collect();
                close("  alone", output, &to.read(0, n), &want);
            }
        }
    }
}

#[test]
fn adamw_follows_the_cpu_and_clips() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for e in BOTH {
        // Two matrices with their gradients and copies inside wider ones.
        let shapes = [(16usize, 200usize), (300, 16)];
        let total: usize = shapes.iter().map(|(r, c)| r * c).sum();
        let mut params = random.values(total, Element::F32);
        let (mut m, mut v) = (vec![0f32; total], vec![0f32; total]);
        let scales = [1.0f32, 2.0];
        let (on, means, squares) =
            (gpu.upload(&params).unwrap(), gpu.upload(&m).unwrap(), gpu.upload(&v).unwrap());
        let grads: Vec<Vec<f32>> =
            shapes.iter().map(|(r, c)| random.values(r * c, Element::F32)).collect();
        let stored: Vec<Mat> = shapes
            .iter()
            .zip(&grads)
            .map(|((_, c), g)| Mat::new(&gpu, g, *c, c + 8, Element::F32))
            .collect();
        let copies: Vec<Mat> =
            shapes.iter().map(|(r, c)| Mat::poisoned(&gpu, *r, c + 8, e)).collect();
        let (mut matrices, mut pieces, mut offset) = (Vec::new(), Vec::new(), 0);
        for (i, (r, c)) in shapes.iter().enumerate() {
            matrices.push(Matrix {
                offset,
                grad: stored[i].at().0,
                copy: copies[i].at().0,
                ld_grad: *c as u64 + 8,
                ld_copy: *c as u64 + 8,
                rows: *r as u32,
                cols: *c as u32,
                grad_scale: scales[i],
                copy_scale: scales[i],
                lr_scale: 1.0 + i as f32,
                pad: 0,
            });
            pieces.extend((0..r * c).step_by(ops::PIECE).flat_map(|s| [i as i32, s as i32]));
            offset += (r * c) as u64;
        }
        let count = pieces.len() / 2;
        let (dm, dp, sums, clip) = (
            gpu.upload(&matrices).unwrap(),
            gpu.upload(&pieces).unwrap(),
            gpu.alloc::<f64>(count).unwrap(),
            gpu.alloc::<f32>(2).unwrap(),
        );
        let b = AdamWBuffers {
            params: on.ptr(),
            means: means.ptr(),
            squares: squares.ptr(),
            matrices: dm.ptr(),
            pieces: dp.ptr(),
            count,
            sums: sums.ptr(),
            clip: clip.ptr(),
        };
        for step in 1..=4 {
            let max_norm = if step % 2 == 0 { 1.0 } else { 0.0 };
            let s = AdamWStep {
                lr: 1e-2,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.1,
                step,
                max_norm,
            };
            ops::adamw(&gpu, e, &b, &s).unwrap();
            let scaled: Vec<Vec<f32>> =
                grads.iter().zip(scales).map(|(g, s)| g.iter().map(|x| x * s).collect()).collect();
            let norm = scaled.iter().flatten().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            close("norm", Element::F32, &clip.to_vec().unwrap()[..1], &[norm as f32]);
            let factor = if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
            let mut at = 0;
            for (i, g) in scaled.iter().enumerate() {
                let g: Vec<f32> = g.iter().map(|x| x * factor as f32).collect();
                let r = at..at + g.len();
                adamw::step(
                    &mut params[r.clone()],
                    &g,
                    &mut m[r.clone()],
                    &mut v[r.clone()],
                    1e-2 * (1 + i) as f64,
                    0.9,
                    0.999,
                    1e-8,
                    0.1,
                    step,
                )
                .unwrap();
                at += g.len();
            }
            close("params", Element::F32, &on.to_vec().unwrap(), &params);
            close("second moments", Element::F32, &squares.to_vec().unwrap(), &v);
        }
        let want: Vec<f32> = params[..3200].iter().map(|x| x * scales[0]).collect();
        close("copy", e, &copies[0].read(0, 200), &want);
        let want: Vec<f32> = params[3200..].iter().map(|x| x * scales[1]).collect();
        close("copy", e, &copies[1].read(0, 16), &want);
        // A gradient that is not a number changes nothing.
        let before = on.to_vec().unwrap();
        gpu.write(stored[0].at().0, &[f32::NAN]).unwrap();
        ops::adamw(
            &gpu,
            e,
            &b,
            &AdamWStep {
                lr: 1.0,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.0,
                step: 5,
                max_norm: 1.0,
            },
        )
        .unwrap();
        assert!(clip.to_vec().unwrap()[0].is_nan());
        assert_eq!(before, on.to_vec().unwrap());
    }
}

#[test]
fn errors_say_what_is_wrong() {
    let Some(gpu) = gpu() else { return };
    let e = Gpu::open(99).unwrap_err();
    assert!(e.message.contains("no GPU 99"), "{e:?}");
    let e = gpu.alloc::<u8>(1 << 45).unwrap_err();
    assert!(e.out_of_memory && e.message.contains("out of memory"), "{e:?}");
    // And the device goes on working.
    assert_eq!(gpu.upload(&[1i32, 2]).unwrap().to_vec().unwrap(), [1, 2]);
}

/// The MLP's backward in one pass: every product against sums of the rounded operands in f64.
#[test]
fn gated_backward_with_its_thin_products() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let e = Element::Bf16;
    // Ranks of gate, up, down; 0 is no adapter.
    for (rows, width, ranks, add) in [
        (1, 8, [16, 16, 16], false),
        (33, 264, [16, 16, 16], true),
        (300, 1536, [8, 4, 16], false),
        (97, 520, [0, 16, 1], true),
        (2100, 768, [16, 0, 8], false),
    ] {
        let Some((low_room, sums_room)) = ops::gated_room(&gpu, rows, width) else {
            eprintln!("not run: the GPU has too little shared memory");
            return;
        };
        let [gate_rank, up_rank, down_rank]: [usize; 3] = ranks;
        let r = (gate_rank + up_rank).next_multiple_of(8);
        for (code, act) in [(0, Act::Silu), (1, Act::Gelu), (2, Act::GeluTanh)] {
            let (gate, up) = (random.values(rows * width, e), random.values(rows * width, e));
            let dh = random.values(rows * width, e);
            let (low, down) = (random.values(rows * r, e), random.values(rows * down_rank, e));
            let b = random.values(2 * width * r, e);
            let both: Vec<f32> = (0..rows)
                .flat_map(|i| [&gate[i * width..][..width], &up[i * width..][..width]].concat())
                .collect();
            let ld = 2 * width + r + 8;
            let gu = Mat::poisoned(&gpu, rows, ld, e);
            let bytes: Vec<u8> =
                both.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
            gpu.write_rows((gu.at().0, ld * 2), &bytes, 4 * width).unwrap();
            let old_b = random.values(2 * width * r, Element::F32);
            let old_a = random.values(down_rank * width, Element::F32);
            let poison = |v: &[f32]| match add {
                true => v.to_vec(),
                false => vec![f32::NAN; v.len()],
            };
            let db = gpu.upload(&poison(&old_b)).unwrap();
            let da = gpu.upload(&poison(&old_a)).unwrap();
            let room = [low_room, sums_room].map(|len| gpu.upload(&vec![f32::NAN; len]).unwrap());
            let on = [
                Mat::new(&gpu, &dh, width, width + 8, e),
                Mat::new(&gpu, &low, r, r, e),
                Mat::new(&gpu, &down, down_rank, down_rank + 8, e),
                Mat::new(&gpu, &b, r, r + 8, e),
            ];
            let gated = ops::GatedBack {
                dh: on[0].at(),
                gu: gu.at(),
                low: on[1].at(),
                down: on[2].at(),
                b: on[3].at(),
                rows,
                width,
                act: code,
                r,
                parts: [(0, gate_rank), (gate_rank, up_rank)],
                rank_down: down_rank,
            };
            let to = (db.ptr(), da.ptr());
            ops::gated_back(&gpu, &gated, to, (room[0].ptr(), room[1].ptr()), add).unwrap();

            let (tg, tu) = (tensor(&gate, &[rows, width]), tensor(&up, &[rows, width]));
            let (wg, wu) = swiglu_backward(&tensor(&dh, &[rows, width]), &tg, &tu, act).unwrap();
            let name = |what: &str| format!("{what} {rows}×{width} {ranks:?} {act:?}");
            let grads = [gu.read(0, width), gu.read(width, width)];
            close(&name("gate"), e, &grads[0], &flat(&wg));
            close(&name("up"), e, &grads[1], &flat(&wu));
            // From here on, of what the device has rounded.
            let h: Vec<f32> = flat(&swiglu_forward(&tg, &tu, act).unwrap());
            let h: Vec<f32> = h.iter().map(|x| round(*x, e)).collect();
            let parts = [(0, gate_rank), (gate_rank, up_rank)];
            let mut want = vec![0f32; rows * r];
            for (half, (at, rank)) in parts.into_iter().enumerate() {
                for row in 0..rows {
                    for j in 0..rank {
                        let sum: f64 = (0..width)
                            .map(|i| {
                                let b = b[(half * width + i) * r + at + j];
                                f64::from(grads[half][row * width + i]) * f64::from(b)
                            })
                            .sum();
                        want[row * r + at + j] = sum as f32;
                    }
                }
            }
            close(&name("dy·s·B"), e, &gu.read(2 * width, r), &want);
            let (db, da) = (db.to_vec().unwrap(), da.to_vec().unwrap());
            let over = |x: &[f32], i: usize, thin: &[f32], ld: usize, j: usize| -> f32 {
                let products = (0..rows)
                    .map(|row| f64::from(x[row * width + i]) * f64::from(thin[row * ld + j]));
                products.sum::<f64>() as f32
            };
            let (mut got, mut want) = (Vec::new(), Vec::new());
            for (half, (at, rank)) in parts.into_iter().enumerate() {
                for i in 0..width {
                    for j in 0..rank {
                        let place = (half * width + i) * r + at + j;
                        let old = if add { old_b[place] } else { 0.0 };
                        got.push(db[place]);
                        want.push(old + over(&grads[half], i, &low, r, at + j));
                    }
                }
            }
            close(&name("B of gate and up"), Element::F32, &got, &want);
            let want: Vec<f32> = (0..down_rank * width)
                .map(|at| {
                    let old = if add { old_a[at] } else { 0.0 };
                    old + over(&h, at % width, &down, down_rank, at / width)
                })
                .collect();
            // h is rounded on both sides, but not always the same way.
            close(&name("A of down"), e, &da, &want);
        }
    }
}
