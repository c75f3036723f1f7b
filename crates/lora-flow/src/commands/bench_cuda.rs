//! `lora-flow bench --device cuda`: whole steps on a GPU, their memory, where their time goes, and
//! how far they are from the rate of a plain product.

use std::sync::Arc;
use std::time::Instant;

use candle_core::DType;
use lora_flow_core::{Error, Result};
use lora_flow_kernels::cuda::{CudaError, Element, Gpu, Product, ops};
use lora_flow_model::config::ModelConfig;
use lora_flow_model::cuda::{CudaDecoder, report};
use lora_flow_model::decoder::{Checkpoint, Decoder, PassOptions};
use lora_flow_model::lora::{Lora, LoraConfig};
use lora_flow_model::place::Place;
use lora_flow_train::{AdamWSettings, Learner, TrainConfig};
use serde_json::json;

use super::bench::open_model;
use super::bench::synthetic;
use crate::args::{BenchArgs, BenchCommand};
use crate::table;
use crate::ui::Failure;

/// Steps before those that are timed: the first chooses algorithms and takes the memory.
const WARM_UP: usize = 3;

pub(super) fn bench(
    command: &BenchCommand,
    args: &BenchArgs,
    gpu: &Arc<Gpu>,
) -> Result<i32, Failure> {
    let started = Instant::now();
    let decoder = decoder(args, gpu)?;
    let batch = synthetic(args.batch, decoder.config().vocab_size)?;
    let loaded = started.elapsed().as_secs_f64();
    let mut step: Box<dyn FnMut() -> Result<f64>> = match command {
        BenchCommand::Train { r, checkpointing, .. } => {
            let config = LoraConfig { r: *r, lora_alpha: 2.0 * *r as f64, ..LoraConfig::default() };
            let mut lora = Lora::init(&config, &decoder.linear_modules(), 0)?;
            let train = TrainConfig::default();
            let mut learner = Learner::new(&decoder, &lora, AdamWSettings::new(&train))?;
            let options = PassOptions {
                grad_scale: 1.0 / batch.supervised() as f32,
                dropout: None,
                checkpoint: if *checkpointing { Checkpoint::Full } else { Checkpoint::None },
            };
            let (mut done, batch) = (0, &batch);
            Box::new(move || {
                done += 1;
                learner.clear();
                let loss = learner.pass(batch, &lora, &options)?;
                let norm =
                    learner.step(&mut lora, train.max_grad_norm, train.learning_rate, done)?;
                let mean = loss.nll_sum() / loss.count() as f64;
                if !(mean.is_finite() && norm.is_finite()) {
                    return Err(Error::new(format!(
                        "step {done}: the loss or gradient is not finite"
                    )));
                }
                Ok(mean)
            })
        }
        BenchCommand::Eval(_) | BenchCommand::Generate(_) => Box::new(|| {
            let nll = decoder.nll(&batch, None)?;
            Ok(nll.iter().map(|x| f64::from(*x)).sum::<f64>() / nll.len() as f64)
        }),
    };
    let mut loss = step()?;
    let first = started.elapsed().as_secs_f64();
    for _ in 1..WARM_UP {
        step()?;
    }
    let mut times = Vec::new();
    for _ in 0..args.steps {
        let begun = Instant::now();
        loss = step()?;
        times.push(begun.elapsed().as_secs_f64());
    }
    gpu.start_profile();
    step()?;
    let profile = gpu.stop_profile().map_err(report)?;
    let launches: usize = profile.iter().map(|p| p.1).sum();
    drop(step);
    let peak = gpu.memory().1;
    let kept = decoder.cuda().map_or([0; 3], CudaDecoder::kept);
    let ceiling = ceiling(gpu).map_err(report)?;

    times.sort_by(f64::total_cmp);
    let seconds = times[times.len() / 2];
    let trains = matches!(command, BenchCommand::Train { .. });
    let flops = flops(decoder.config(), args.batch, trains);
    let rate = flops / seconds;
    let share = rate / ceiling;
    if args.json {
        let profile: Vec<_> = profile
            .iter()
            .map(|(name, launches, ms)| json!({ "name": name, "launches": launches, "ms": ms }))
            .collect();
        let result = json!({
            "bench": if trains { "train" } else { "eval" },
            "gpu": gpu.info().name,
            "documents": args.batch.0,
            "document_tokens": args.batch.1,
            "steps": args.steps,
            "loss": loss,
            "ms_per_step": seconds * 1e3,
            "tokens_per_second": batch.len() as f64 / seconds,
            "peak_gpu_bytes": peak,
            "gate_up_layers": { "kept": kept[0], "on_host": kept[1], "recomputed": kept[2] },
            "tflops": rate * 1e-12,
            "ceiling_tflops": ceiling * 1e-12,
            "model_flop_utilisation": share,
            "launches_per_step": launches,
            "seconds_to_load": loaded,
            "seconds_to_first_step": first,
            "profile": profile,
        });
        println!("{}", serde_json::to_string_pretty(&result)?);
        return Ok(0);
    }
    println!("gpu                  {:>12}", gpu.info().name);
    println!(
        "ms/step              {:>12.2}  (median of {}; {launches} launches)",
        seconds * 1e3,
        args.steps
    );
    println!("tokens/s             {:>12.0}", batch.len() as f64 / seconds);
    println!("peak GPU memory      {:>12}", table::bytes(peak));
    if trains {
        let [here, away, again] = kept;
        println!("gate and up          {here:>12}  layers kept, {away} on the host, {again} again");
    }
    println!(
        "model arithmetic     {:>12.1}  TFLOP/s, {:.1} % of a plain product's {:.0}",
        rate * 1e-12,
        share * 100.0,
        ceiling * 1e-12
    );
    println!("loss                 {loss:>12.4}");
    println!("first step after     {first:>12.2}  s, weights after {loaded:.2} s");
    let all: f64 = profile.iter().map(|p| p.2).sum();
    println!("one step by kernel, {all:.2} ms on the device:");
    for (name, launches, ms) in profile.iter().take(28) {
        println!(
            "  {name:<28} {launches:>5} × {:>8.1} µs {:>8.2} ms {:>6.1} %",
            ms * 1e3 / *launches as f64,
            ms,
            ms / all * 100.0
        );
    }
    Ok(0)
}

fn decoder(args: &BenchArgs, gpu: &Arc<Gpu>) -> Result<Decoder, Failure> {
    let dtype =
        args.dtype.as_deref().map(|d| if d == "float32" { DType::F32 } else { DType::BF16 });
    let limit = args.memory.map(|gib| (gib * (1u64 << 30) as f64) as u64);
    let mut decoder = match (&args.shape, &args.model) {
        (Some(shape), _) => {
            let config = shape_config(shape)?;
            let inner =
                CudaDecoder::random(gpu.clone(), config.clone(), dtype.unwrap_or(DType::BF16))?;
            Decoder::on_gpu(config, inner)?
        }
        (None, Some(model)) => {
            let model = open_model(model)?;
            let dtype = dtype.map_or_else(|| ModelConfig::open(&model).map(|c| c.dtype), Ok)?;
            Decoder::open(&model, &Place::Cuda(gpu.clone()), dtype)?
        }
        (None, None) => return Err(Failure::Usage(Error::new("name `--model` or `--shape`"))),
    };
    decoder.set_gpu_memory_limit(limit);
    Ok(decoder)
}

/// Sizes of models that need not be here to be measured.
fn shape_config(name: &str) -> Result<ModelConfig> {
    let (hidden, layers, heads, kv, inner, vocab, tied, theta) = match name {
        "smollm2-135m" => (576, 30, 9, 3, 1536, 49152, true, 1e5),
        "llama3.2-1b" => (2048, 16, 32, 8, 8192, 128_256, true, 5e5),
        _ => (4096, 32, 32, 8, 14336, 128_256, false, 5e5),
    };
    let json = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "intermediate_size": inner, "vocab_size": vocab, "tie_word_embeddings": tied,
        "rope_theta": theta, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 8192,
    });
    Ok(ModelConfig::from_hf(&json)?.0)
}

/// Arithmetic that a step needs: products with the frozen weights forward and for the gradient of
/// their input, and the scores and values of attention, twice that backward. The adapter's own and
/// what is computed again do not count.
fn flops(config: &ModelConfig, (documents, tokens): (usize, usize), trains: bool) -> f64 {
    let (h, layers) = (config.hidden_size as f64, config.num_hidden_layers as f64);
    let weights: usize =
        config.linear_modules().iter().map(|m| m.in_features * m.out_features).sum();
    let weights = weights as f64 + config.vocab_size as f64 * h;
    let (documents, tokens) = (documents as f64, tokens as f64);
    let q = (config.num_attention_heads * config.head_dim) as f64;
    let attention = 2.0 * tokens * tokens * q * layers * documents;
    let passes = if trains { (2.0, 3.0) } else { (1.0, 1.0) };
    2.0 * passes.0 * weights * documents * tokens + passes.1 * attention
}

/// Rate of one large bf16 product on random values.
fn ceiling(gpu: &Arc<Gpu>) -> std::result::Result<f64, CudaError> {
    const N: usize = 8192;
    let matrix = |key: u64| {
        let buffer = gpu.alloc::<u8>(N * N * 2)?;
        ops::fill_uniform(gpu, Element::Bf16, (buffer.ptr(), N), N, N, key, 1.0)?;
        Ok::<_, CudaError>(buffer)
    };
    let (a, b, c) = (matrix(1)?, matrix(2)?, gpu.alloc::<u8>(N * N * 2)?);
    let product = Product {
        m: N,
        n: N,
        k: N,
        a: (a.ptr(), N),
        a_t: false,
        b: (b.ptr(), N),
        b_t: true,
        c: (c.ptr(), N),
        add: (c.ptr(), N),
        alpha: 1.0,
        beta: 0.0,
        input: Element::Bf16,
        output: Element::Bf16,
    };
    for _ in 0..3 {
        gpu.product(&product)?;
    }
    let start = gpu.mark()?;
    for _ in 0..10 {
        gpu.product(&product)?;
    }
    let end = gpu.mark()?;
    gpu.wait()?;
    Ok(2.0 * (N as f64).powi(3) * 10.0 / (f64::from(end.since(&start)?) * 1e-3))
}
