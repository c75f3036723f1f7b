//! Times the attention kernels of the GPU: `cargo run --release -p lora-flow-kernels --features cuda
//! --example bench_flash`. One line a shape; TFLOP/s count what lies under the diagonal, twice (five
//! products backward, of which dq and dk, dv share the work of seven). `LORA_FLOW_CUDA_KERNELS` names
//! a folder with other builds.

use lora_flow_kernels::cuda::ops::{self, Attention};
use lora_flow_kernels::cuda::{CudaError, Element, Gpu};

fn main() -> Result<(), CudaError> {
    let gpu = Gpu::open(0)?;
    for (docs, len, heads, kv_heads, dim) in
        [(16, 512, 9, 3, 64), (4, 2048, 32, 8, 64), (4, 2048, 32, 8, 128)]
    {
        let (n, q, kv) = (docs * len, heads * dim, kv_heads * dim);
        let width = q + 2 * kv;
        let matrix = |width: usize, key| {
            let buffer = gpu.alloc::<u8>(n * width * 2)?;
            ops::fill_uniform(&gpu, Element::Bf16, (buffer.ptr(), width), n, width, key, 1.0)?;
            Ok::<_, CudaError>(buffer)
        };
        let (qkv, d, o, grads) =
            (matrix(width, 1)?, matrix(q, 2)?, matrix(q, 3)?, matrix(width, 4)?);
        let (lse, delta) = (gpu.alloc::<f32>(heads * n)?, gpu.alloc::<f32>(heads * n)?);
        let Some(rows) = gpu.flash_rows(dim) else { continue };
        let mut tiles = Vec::new();
        for (pass, rows) in rows.into_iter().enumerate() {
            let mut all: Vec<[i32; 4]> = (0..docs)
                .flat_map(|i| {
                    let (a, b) = (i * len, (i + 1) * len);
                    (a..b).step_by(rows).map(move |row| [a as i32, b as i32, row as i32, 0])
                })
                .collect();
            all.sort_by_key(|[a, b, row, _]| if pass < 2 { a - row } else { row - b });
            tiles.push((gpu.upload(&all.concat())?, all.len()));
        }
        let at = |column: usize| qkv.ptr() + 2 * column as u64;
        let to = |column: usize| grads.ptr() + 2 * column as u64;
        let a = Attention {
            q: at(0),
            k: at(q),
            v: at(q + kv),
            ld: width,
            tokens: n,
            heads,
            kv_heads,
            dim,
            window: 0,
            first: 0,
            last: 0,
            tiles: [0, 1, 2].map(|i| (tiles[i].0.ptr(), tiles[i].1)),
        };
        let run = || {
            ops::attention_fwd(&gpu, Element::Bf16, (o.ptr(), q), lse.ptr(), &a)?;
            ops::attention_bwd(
                &gpu,
                Element::Bf16,
                (to(0), width),
                to(q),
                to(q + kv),
                (d.ptr(), q),
                (o.ptr(), q),
                lse.ptr(),
                delta.ptr(),
                &a,
            )
        };
        for _ in 0..3 {
            run()?;
        }
        gpu.start_profile();
        for _ in 0..10 {
            run()?;
        }
        // One product under the diagonal.
        let unit = (docs * len * len * heads * dim) as f64;
        print!("{docs:>2}x{len:<4} {heads}/{kv_heads}x{dim:<3}");
        for (name, count, ms) in gpu.stop_profile()? {
            let ms = ms / count as f64;
            let products = match name.split('_').nth(1) {
                Some("fwd") => 2.0,
                Some("dq") => 3.0,
                Some("dkv") => 4.0,
                _ => 0.0,
            };
            print!("  {name} {:.1} us {:.0} T", ms * 1e3, products * unit / ms * 1e-9);
        }
        println!();
    }
    Ok(())
}
