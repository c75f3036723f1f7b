//! Times what cuBLASLt suggests for the frozen products of a step, `cargo run --release
//! -p lora-flow-kernels --features cuda --example bench_products`: one line a product, TFLOP/s of
//! the first suggestion, of the fastest with the same bits, and of the fastest.

use lora_flow_kernels::cuda::{CudaError, Element, Gpu, Product, ops};

fn main() -> Result<(), CudaError> {
    let gpu = Gpu::open(0)?;
    for (name, h, qkv, q, f, vocab) in [
        ("135m", 576, 960, 576, 1536, 49152),
        ("1b", 2048, 3072, 2048, 8192, 128_256),
        ("8b", 4096, 6144, 4096, 14336, 128_256),
    ] {
        // (input, output, rank) of each group; 48, 16, 32 and 16 are those of r = 16.
        for (group, input, output, r) in [
            ("qkv", h, qkv, 48),
            ("o", q, h, 16),
            ("gate_up", h, 2 * f, 32),
            ("down", f, h, 16),
            ("head", h, vocab, 0),
        ] {
            let m = if group == "head" { 1024 } else { 8192 };
            let matrix = |rows: usize, cols: usize, key| {
                let buffer = gpu.alloc::<u8>(rows * cols * 2)?;
                let to = (buffer.ptr(), cols);
                ops::fill_uniform(&gpu, Element::Bf16, to, rows, cols, key, 1.0)?;
                Ok::<_, CudaError>(buffer)
            };
            for pad in [0, 64] {
                // With `pad`, rows start at multiples of 128 bytes.
                let ld = |width: usize| if pad == 0 { width } else { width.next_multiple_of(pad) };
                let (x, w) = (matrix(m, ld(input + r), 1)?, matrix(output + r, ld(input + r), 2)?);
                let (y, dx) = (matrix(m, ld(output + r), 3)?, matrix(m, ld(input), 4)?);
                let forward = Product {
                    m,
                    n: output,
                    k: input + r,
                    a: (x.ptr(), ld(input + r)),
                    a_t: false,
                    b: (w.ptr(), ld(input + r)),
                    b_t: true,
                    c: (y.ptr(), ld(output + r)),
                    add: (y.ptr(), ld(output + r)),
                    alpha: 1.0,
                    beta: 0.0,
                    input: Element::Bf16,
                    output: Element::Bf16,
                };
                let back = Product {
                    n: input,
                    k: output + r,
                    a: (y.ptr(), ld(output + r)),
                    b_t: false,
                    c: (dx.ptr(), ld(input)),
                    add: (dx.ptr(), ld(input)),
                    ..forward
                };
                for (pass, p) in [("forward", forward), ("back", back)] {
                    let times = gpu.compare_algorithms(&p)?;
                    let flops = 2.0 * p.m as f64 * p.n as f64 * p.k as f64;
                    let rate = |ms: f32| flops / f64::from(ms) * 1e-9;
                    let best = |all: bool| {
                        let times = times.iter().filter(|t| all || t.1).map(|t| t.0);
                        times.fold(f32::INFINITY, f32::min)
                    };
                    println!(
                        "{name:<5}{group:<8}{pass:<8} rows of {:<3} {:>4.0} {:>4.0} {:>4.0} T of {}",
                        if pad == 0 { "any" } else { "128" },
                        rate(times[0].0),
                        rate(best(false)),
                        rate(best(true)),
                        times.len(),
                    );
                }
            }
        }
    }
    Ok(())
}
