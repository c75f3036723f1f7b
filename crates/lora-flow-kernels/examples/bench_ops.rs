//! Times the operations at the shapes of SmolLM2-135M: `cargo run --release -p lora-flow-kernels
//! --example bench_ops -- [part of a name]`. Prints the best of several runs; rates count the
//! arithmetic that the operation needs (for attention: what lies under the diagonal).
//! `RAYON_NUM_THREADS=1` gives the rate of one core.

use candle_core::{DType, Device, Result, Tensor};
use lora_flow_kernels::activation::{self, Act};
use lora_flow_kernels::{attention, embedding, linear, loss, rms_norm, rope};
use std::hint::black_box;
use std::time::Instant;

const N: usize = 1024;
const H: usize = 576;
const F: usize = 1536;
const V: usize = 49152;
const HEADS: (usize, usize, usize) = (9, 3, 64);

fn random(dims: &[usize]) -> Result<Tensor> {
    Tensor::randn(0f32, 0.5, dims, &Device::Cpu)
}

/// Seconds that all threads of this process have run on a processor (Linux).
fn cpu_seconds() -> Option<f64> {
    let tasks = std::fs::read_dir("/proc/self/task").ok()?;
    let nanoseconds = tasks.flatten().filter_map(|task| {
        let stat = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        stat.split(' ').next()?.parse::<f64>().ok()
    });
    Some(nanoseconds.sum::<f64>() / 1e9)
}

/// Prints the best wall time of `run`, its mean processor time (what counts on a shared machine,
/// with one thread), and the rates for `flops` floating-point operations.
fn time(name: &str, flops: f64, mut run: impl FnMut() -> Result<()>) -> Result<()> {
    if std::env::args().nth(1).is_some_and(|part| !name.contains(&part)) {
        return Ok(());
    }
    run()?;
    let begin = Instant::now();
    // The kernel books processor time by the tick, so only the sum over many runs is exact.
    let cpu_begin = cpu_seconds();
    let (mut wall, mut runs) = (f64::INFINITY, 0);
    while runs < 5 || (begin.elapsed().as_secs_f64() < 0.5 && runs < 2000) {
        let start = Instant::now();
        run()?;
        wall = wall.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    let cpu = match (cpu_begin, cpu_seconds()) {
        (Some(begin), Some(end)) => (end - begin) / f64::from(runs),
        _ => f64::NAN,
    };
    let rate = |seconds: f64| match flops > 0.0 {
        true => format!("{:7.1} GFLOP/s", flops / seconds / 1e9),
        false => String::new(),
    };
    println!(
        "{name:44} wall {:9.3} ms {:16} cpu {:9.3} ms {}",
        wall * 1e3,
        rate(wall),
        cpu * 1e3,
        rate(cpu)
    );
    Ok(())
}

fn main() -> Result<()> {
    println!("{} threads, N = {N}", rayon::current_num_threads());
    products()?;
    lora()?;
    single_row()?;
    attentions()?;
    elementwise()?;
    losses()
}

fn products() -> Result<()> {
    for n in [512, 1024, 2048] {
        for (k, o) in [(H, H), (H, 192), (H, F), (F, H)] {
            let (x, w, dy) = (random(&[n, k])?, random(&[o, k])?, random(&[n, o])?);
            let flops = 2.0 * (n * k * o) as f64;
            time(&format!("matmul_nt {n}x{k}x{o}"), flops, || {
                black_box(linear::matmul_nt(&x, &w)?);
                Ok(())
            })?;
            time(&format!("matmul_nn {n}x{o}x{k}"), flops, || {
                black_box(linear::matmul_nn(&dy, &w)?);
                Ok(())
            })?;
            if n == N {
                let w16 = w.to_dtype(DType::BF16)?;
                time(&format!("matmul_nt {n}x{k}x{o} bf16 weight"), flops, || {
                    black_box(linear::matmul_nt(&x, &w16)?);
                    Ok(())
                })?;
                time(&format!("matmul_nn {n}x{o}x{k} bf16 weight"), flops, || {
                    black_box(linear::matmul_nn(&dy, &w16)?);
                    Ok(())
                })?;
                let wt = w.t()?;
                time(&format!("candle matmul x·wᵀ {n}x{k}x{o}"), flops, || {
                    black_box(x.matmul(&wt)?);
                    Ok(())
                })?;
            }
        }
    }
    Ok(())
}

/// One token through a weight, as in generation: bound by the memory that the weight is read from.
fn single_row() -> Result<()> {
    for (k, o) in [(H, F), (H, V)] {
        let (x, w) = (random(&[1, k])?, random(&[o, k])?);
        let w16 = w.to_dtype(DType::BF16)?;
        let flops = 2.0 * (k * o) as f64;
        for (name, w) in [("f32", &w), ("bf16", &w16)] {
            time(&format!("one row 1x{k}x{o} {name} weight"), flops, || {
                black_box(linear::matmul_nt(&x, w)?);
                Ok(())
            })?;
        }
    }
    Ok(())
}

fn lora() -> Result<()> {
    let r = 16;
    for (k, o) in [(H, H), (H, 192), (H, F), (F, H)] {
        let (x, w, dy) = (random(&[N, k])?, random(&[o, k])?, random(&[N, o])?);
        let (a, b) = (random(&[r, k])?, random(&[o, r])?);
        let flops = 2.0 * (N * (k * o + r * (k + o))) as f64;
        time(&format!("lora_forward {N}x{k}x{o}"), flops, || {
            black_box(linear::lora_forward(&x, &w, &a, &b, 2.0)?);
            Ok(())
        })?;
        let (_, xa) = linear::lora_forward(&x, &w, &a, &b, 2.0)?;
        let flops = 2.0 * (N * (k * o + 2 * r * (k + o))) as f64;
        time(&format!("lora_backward {N}x{k}x{o}"), flops, || {
            black_box(linear::lora_backward(&dy, &x, &w, &a, &b, 2.0, &xa, true)?);
            Ok(())
        })?;
    }
    Ok(())
}

fn attentions() -> Result<()> {
    let (heads, kv_heads, width) = HEADS;
    let q = random(&[N, heads, width])?;
    let (k, v) = (random(&[N, kv_heads, width])?, random(&[N, kv_heads, width])?);
    let lengths = [("1x1024", 1024), ("2x512", 512), ("64x16", 16)];
    for (name, length) in lengths {
        let docs: Vec<usize> = (0..=N / length).map(|i| i * length).collect();
        let pairs = (N / length * length * (length + 1) / 2 * heads) as f64;
        let scale = 0.125;
        for operands in [DType::F32, DType::BF16] {
            let setting = attention::Setting { docs: &docs, scale, window: None, operands };
            let name = format!("{name} {operands:?}");
            time(&format!("attention forward {name}"), 4.0 * pairs * width as f64, || {
                black_box(attention::forward(&q, &k, &v, &setting)?);
                Ok(())
            })?;
            let (o, lse) = attention::forward(&q, &k, &v, &setting)?;
            time(&format!("attention backward {name}"), 10.0 * pairs * width as f64, || {
                black_box(attention::backward(&q, &q, &k, &v, &o, &lse, &setting)?);
                Ok(())
            })?;
        }
        time(&format!("attention reference forward {name}"), 4.0 * pairs * width as f64, || {
            black_box(attention::reference::forward(&q, &k, &v, &docs, scale, None)?);
            Ok(())
        })?;
    }
    Ok(())
}

fn elementwise() -> Result<()> {
    let (heads, _, width) = HEADS;
    let (x, w) = (random(&[N, H])?, random(&[H])?);
    time("rms_norm forward", 0.0, || {
        black_box(rms_norm::forward(&x, &w, 1e-5)?);
        Ok(())
    })?;
    let (_, rstd) = rms_norm::forward(&x, &w, 1e-5)?;
    time("rms_norm add_forward", 0.0, || {
        black_box(rms_norm::add_forward(&x, &x, &w, 1e-5)?);
        Ok(())
    })?;
    time("rms_norm backward", 0.0, || {
        black_box(rms_norm::backward(&x, &x, &w, &rstd)?);
        Ok(())
    })?;
    time("rms_norm reference forward", 0.0, || {
        black_box(rms_norm::reference::forward(&x, &w, 1e-5)?);
        Ok(())
    })?;
    let (gate, up) = (random(&[N, F])?, random(&[N, F])?);
    time("swiglu forward", 0.0, || {
        black_box(activation::swiglu_forward(&gate, &up, Act::Silu)?);
        Ok(())
    })?;
    time("swiglu backward", 0.0, || {
        black_box(activation::swiglu_backward(&up, &gate, &up, Act::Silu)?);
        Ok(())
    })?;
    time("swiglu reference forward", 0.0, || {
        black_box(activation::reference::swiglu_forward(&gate, &up, Act::Silu)?);
        Ok(())
    })?;
    let q = random(&[N, heads, width])?;
    let inv_freq: Vec<f32> = (0..width / 2).map(|i| 1e5f32.powf(-(i as f32) / 32.0)).collect();
    let table = rope::RopeTable::new(&inv_freq, 2048, 1.0);
    let positions: Vec<u32> = (0..N as u32).map(|t| t % 512).collect();
    time("rope", 0.0, || {
        black_box(rope::apply(&q, &positions, &table, false)?);
        Ok(())
    })?;
    let weight = random(&[V, H])?;
    let ids: Vec<u32> = (0..N as u32).map(|t| t * 47 % V as u32).collect();
    time("embedding", 0.0, || {
        black_box(embedding::gather(&weight, &ids, DType::F32)?);
        Ok(())
    })
}

fn losses() -> Result<()> {
    let (h, head) = (random(&[N, H])?, random(&[V, H])?);
    let head16 = head.to_dtype(DType::BF16)?;
    let targets: Vec<u32> = (0..N as u32).map(|t| t * 47 % V as u32).collect();
    let flops = 2.0 * (N * H * V) as f64;
    for (name, head) in [("f32", &head), ("bf16", &head16)] {
        for chunk in [0, 256] {
            time(&format!("cross_entropy {name} chunk {chunk}"), flops, || {
                black_box(loss::cross_entropy(&h, head, &targets, chunk, false, 1.0)?);
                Ok(())
            })?;
            time(&format!("cross_entropy {name} chunk {chunk} gradient"), 2.0 * flops, || {
                black_box(loss::cross_entropy(&h, head, &targets, chunk, true, 1.0)?);
                Ok(())
            })?;
        }
    }
    Ok(())
}
