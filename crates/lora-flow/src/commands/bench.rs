//! `lora-flow bench`: speed and memory of whole steps on synthetic tokens.
//!
//! A step does what the trainer's does, through the same functions. Token ids are a fixed sequence
//! over the vocabulary: nothing that is measured depends on their values. Processor time is the
//! figure to compare, as it hardly feels what else runs on the machine; wall time does.

use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use lora_flow_core::{Artifact, ArtifactKind, DeviceSpec, Error, Result, ResultExt as _};
use lora_flow_kernels::linear;
use lora_flow_kernels::profile::{self, Category};
use lora_flow_model::adapter::LoraGrads;
use lora_flow_model::batch::Batch;
use lora_flow_model::decoder::{Checkpoint, Decoder, PassOptions};
use lora_flow_model::generate::{GenerateOptions, Generator};
use lora_flow_model::lora::{Lora, LoraConfig};
use lora_flow_model::weights::GGUF;
use lora_flow_train::{
    AdamW, AdamWSettings, TrainConfig, clip_grad_norm, cpu_seconds, open_device, peak_rss_bytes,
};
use serde_json::{Map, json};

use super::generate::open_dir;
use crate::args::{BenchArgs, BenchCommand, BenchGenerateArgs};
use crate::table;
use crate::ui::Failure;

pub fn bench(command: &BenchCommand) -> Result<i32, Failure> {
    let args = match command {
        BenchCommand::Train { bench, .. } | BenchCommand::Eval(bench) => bench,
        BenchCommand::Generate(args) => return generate(args),
    };
    let place = open_device(args.device).map_err(Failure::Usage)?;
    #[cfg(feature = "cuda")]
    if let lora_flow_model::place::Place::Cuda(gpu) = &place {
        return super::bench_cuda::bench(command, args, gpu);
    }
    let Some(model) = args.model.as_ref().filter(|_| args.device == DeviceSpec::Cpu) else {
        let error = Error::new("`--shape` makes its weights on a GPU");
        return Err(Failure::Usage(
            error.with_hint("use `--model` on the CPU, or `--device cuda`"),
        ));
    };
    let device = Device::Cpu;
    let bf16 = args.bf16 || args.dtype.as_deref() == Some("bfloat16");
    let dtype = if bf16 { DType::BF16 } else { DType::F32 };
    let decoder = Decoder::open(&open_model(model)?, &place, dtype)?;
    let batch = synthetic(args.batch, decoder.config().vocab_size)?;
    let timed = match command {
        BenchCommand::Train { r, checkpointing, .. } => {
            let mut step = training_step(&decoder, &batch, *r, *checkpointing)?;
            time(args.steps, &device, &mut step)?
        }
        BenchCommand::Eval(_) | BenchCommand::Generate(_) => {
            time(args.steps, &device, &mut || decoder.nll(&batch, None).map(drop))?
        }
    };
    // The peak comes first: the ceiling is measured on buffers of its own.
    let peak = peak_rss_bytes();
    let ceiling =
        gemm_ceiling(&decoder, dtype, batch.len()).context("cannot measure the products")?;
    report(args, command, &batch, &timed, peak, ceiling)?;
    Ok(0)
}

/// A published folder or a GGUF file.
pub(super) fn open_model(path: &Path) -> Result<Artifact, Failure> {
    if path.is_file() && path.extension().is_some_and(|extension| extension == "gguf") {
        return Ok(Artifact::from_file(ArtifactKind::Model, GGUF, path)?);
    }
    open_dir(ArtifactKind::Model, path)
}

/// Speed of the prompt (with the first new token) and of each further token.
fn generate(args: &BenchGenerateArgs) -> Result<i32, Failure> {
    let dtype = if args.bf16 { DType::BF16 } else { DType::F32 };
    let model = open_model(&args.model)?;
    let decoder = Decoder::load(&model, &Device::Cpu, dtype)?;
    let prompt = synthetic((1, args.prompt), decoder.config().vocab_size)?.input_ids;
    let options = GenerateOptions {
        max_new_tokens: args.tokens,
        stop: Some(Vec::new()),
        ..GenerateOptions::default()
    };
    // Once to warm up, once with the clock.
    let mut clock = Vec::new();
    for _ in 0..2 {
        clock = vec![(Instant::now(), cpu_seconds())];
        Generator::new(&decoder).generate(&prompt, None, &options, |_| {
            clock.push((Instant::now(), cpu_seconds()));
            true
        })?;
    }
    let span = |from: usize, to: usize| {
        ((clock[to].0 - clock[from].0).as_secs_f64(), clock[to].1 - clock[from].1)
    };
    let (prompt_wall, prompt_cpu) = span(0, 1);
    let (wall, cpu) = span(1, clock.len() - 1);
    let (first, rest) = (args.prompt as f64, (clock.len() - 2) as f64);
    let result = json!({
        "bench": "generate",
        "prompt_tokens": args.prompt,
        "new_tokens": rest,
        "prompt_tokens_per_second": first / prompt_wall,
        "prompt_tokens_per_cpu_second": first / prompt_cpu,
        "tokens_per_second": rest / wall,
        "tokens_per_cpu_second": rest / cpu,
        "peak_rss_bytes": peak_rss_bytes(),
    });
    if args.json {
        println!("{}", serde_json::to_string_pretty(&result)?);
    } else {
        println!("prompt, tokens/s     {:>9.1}", first / prompt_wall);
        println!("tokens/s             {:>9.1}", rest / wall);
        println!("tokens/CPU-second    {:>9.1}", rest / cpu);
        println!("peak memory          {:>9}", table::bytes(peak_rss_bytes()));
    }
    Ok(0)
}

/// Documents of one length whose every token but the first is a target.
pub(super) fn synthetic((documents, tokens): (usize, usize), vocab: usize) -> Result<Batch> {
    let id = |i: usize| (i.wrapping_mul(2_654_435_761) % vocab) as u32;
    let documents: Vec<Vec<u32>> =
        (0..documents).map(|d| (0..tokens).map(|t| id(d * tokens + t)).collect()).collect();
    let batch = Batch::from_documents(&documents);
    batch.check(vocab)?;
    Ok(batch)
}

/// One optimiser step on the batch, as the trainer takes it.
fn training_step<'a>(
    decoder: &'a Decoder,
    batch: &'a Batch,
    r: usize,
    checkpointing: bool,
) -> Result<impl FnMut() -> Result<()> + 'a> {
    let config = LoraConfig { r, lora_alpha: 2.0 * r as f64, ..LoraConfig::default() };
    let mut lora = Lora::init(&config, &decoder.linear_modules(), 0)?;
    let train = TrainConfig::default();
    let mut optimizer = AdamW::new(&lora, AdamWSettings::new(&train))?;
    let mut grads = LoraGrads::zeros(&lora);
    let options = PassOptions {
        grad_scale: 1.0 / batch.supervised() as f32,
        dropout: None,
        checkpoint: if checkpointing { Checkpoint::Full } else { Checkpoint::Auto },
    };
    let mut done = 0;
    Ok(move || {
        done += 1;
        grads.clear();
        let loss = decoder.loss_and_grad(batch, &lora, &options, &mut grads)?;
        let norm = clip_grad_norm(&mut grads, train.max_grad_norm);
        if !(loss.nll_sum().is_finite() && norm.is_finite()) {
            return Err(Error::new(format!("step {done}: the loss or gradient is not finite")));
        }
        optimizer.step(&grads, train.learning_rate, done)?;
        optimizer.write_to(&mut lora)
    })
}

/// What the timed steps took.
struct Timed {
    wall: Duration,
    cpu: f64,
    by_category: [Duration; 6],
}

/// One step to warm up, then `steps` that count.
fn time(steps: usize, device: &Device, step: &mut dyn FnMut() -> Result<()>) -> Result<Timed> {
    let mut step = || {
        step()?;
        device.synchronize().context("the device failed")
    };
    step()?;
    let (started, cpu) = (Instant::now(), cpu_seconds());
    profile::start();
    let done = (0..steps).try_for_each(|_| step());
    let by_category = profile::stop();
    done?;
    Ok(Timed { wall: started.elapsed(), cpu: cpu_seconds() - cpu, by_category })
}

/// The rate of plain products at the shapes of the model's linear layers, forward and backward,
/// weighted as in the model.
struct Ceiling {
    /// Multiplications and additions per second of processor time (of wall time where the system
    /// does not say).
    flops: f64,
    /// Weights of the linear layers and the head.
    weights: f64,
}

/// `dtype` is that of the weights.
fn gemm_ceiling(decoder: &Decoder, dtype: DType, tokens: usize) -> candle_core::Result<Ceiling> {
    let config = decoder.config();
    let modules = decoder.linear_modules();
    let head = config.vocab_size * config.hidden_size;
    let weights = modules.iter().map(|m| m.in_features * m.out_features).sum::<usize>() + head;
    let layer = &modules[..modules.len() / config.num_hidden_layers.max(1)];
    let rows = tokens.min(1024);
    let ones = |shape: (usize, usize), dtype| Tensor::ones(shape, dtype, decoder.device());
    let (mut seconds, mut operations) = (0.0, 0.0);
    for module in layer {
        let (inputs, outputs) = (module.in_features, module.out_features);
        let (x, dy) = (ones((rows, inputs), DType::F32)?, ones((rows, outputs), DType::F32)?);
        let w = ones((outputs, inputs), dtype)?;
        for timed in [false, true, true, true] {
            let (wall, cpu) = (Instant::now(), cpu_seconds());
            linear::matmul_nt(&x, &w)?;
            linear::matmul_nn(&dy, &w)?;
            decoder.device().synchronize()?;
            let cpu = cpu_seconds() - cpu;
            if timed {
                seconds += if cpu > 0.0 { cpu } else { wall.elapsed().as_secs_f64() };
                operations += 4.0 * (rows * inputs * outputs) as f64;
            }
        }
    }
    Ok(Ceiling { flops: operations / seconds, weights: weights as f64 })
}

fn report(
    args: &BenchArgs,
    command: &BenchCommand,
    batch: &Batch,
    timed: &Timed,
    peak: u64,
    ceiling: Ceiling,
) -> Result<(), Failure> {
    let tokens = (batch.len() * args.steps) as f64;
    let (what, passes) = match command {
        // Forward, and the gradient of the input: a frozen weight has none of its own.
        BenchCommand::Train { .. } => ("train", 2.0),
        BenchCommand::Eval(_) | BenchCommand::Generate(_) => ("eval", 1.0),
    };
    let wall = timed.wall.as_secs_f64();
    let floor = ceiling.flops / (2.0 * passes * ceiling.weights);
    let mut shares = Map::new();
    for (category, time) in Category::ALL.iter().zip(timed.by_category) {
        shares.insert(category.name().to_owned(), json!(time.as_secs_f64() / wall));
    }
    let covered: f64 = timed.by_category.iter().map(Duration::as_secs_f64).sum();
    shares.insert("rest".to_owned(), json!((1.0 - covered / wall).max(0.0)));
    if args.json {
        let result = json!({
            "bench": what,
            "documents": args.batch.0,
            "document_tokens": args.batch.1,
            "steps": args.steps,
            "device": args.device.to_string(),
            "tokens_per_second": tokens / wall,
            "tokens_per_cpu_second": tokens / timed.cpu,
            "peak_rss_bytes": peak,
            "share": shares,
            "gemm_gflops_per_cpu_second": ceiling.flops * 1e-9,
            "gemm_bound_tokens_per_cpu_second": floor,
        });
        println!("{}", serde_json::to_string_pretty(&result)?);
        return Ok(());
    }
    println!("tokens/s             {:>9.1}", tokens / wall);
    println!("tokens/CPU-second    {:>9.1}", tokens / timed.cpu);
    println!("bound by products    {floor:>9.1}  ({:.1} GFLOP/CPU-second)", ceiling.flops * 1e-9);
    println!("peak memory          {:>9}", table::bytes(peak));
    for (name, share) in &shares {
        println!("  {name:<18} {:>8.1} %", share.as_f64().unwrap_or_default() * 100.0);
    }
    Ok(())
}
