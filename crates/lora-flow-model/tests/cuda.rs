//! The decoder on a GPU against the one on the CPU: tiny random models with every feature of the
//! config, odd sizes, documents of one token; losses, gradients, ten steps, generation.
//!
//! Needs a GPU: without `LORA_FLOW_TEST_GPU=1` the tests say that they were not run.
#![cfg(feature = "cuda")]

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use lora_flow_core::Result;
use lora_flow_kernels::adamw;
use lora_flow_kernels::cuda::Gpu;
use lora_flow_model::adapter::{DropoutKey, LoraGrads};
use lora_flow_model::batch::Batch;
use lora_flow_model::config::{Architecture, HiddenAct, ModelConfig, RopeScaling};
use lora_flow_model::cuda::{AdamWFactors, CudaDecoder};
use lora_flow_model::decoder::{Checkpoint, Decoder, PassOptions};
use lora_flow_model::generate::{GenerateOptions, Generator};
use lora_flow_model::lora::{Lora, LoraConfig, TargetModules};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn gpu() -> Option<Arc<Gpu>> {
    if std::env::var_os("LORA_FLOW_TEST_GPU").is_none() {
        eprintln!("not run: set LORA_FLOW_TEST_GPU=1 on a machine with a GPU");
        return None;
    }
    Some(Gpu::open(0).expect("a GPU"))
}

fn config() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 131,
        hidden_size: 64,
        intermediate_size: 88,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 16,
        rms_norm_eps: 1e-5,
        rope_theta: 1000.0,
        rope_scaling: RopeScaling::None,
        max_position_embeddings: 1024,
        tie_word_embeddings: true,
        hidden_act: HiddenAct::Silu,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: None,
        dtype: DType::F32,
        bos_token_id: None,
        eos_token_ids: vec![],
        pad_token_id: None,
        initializer_range: 0.02,
    }
}

fn variants() -> Vec<(&'static str, ModelConfig)> {
    let fast = |dim: usize| ModelConfig { head_dim: dim, ..config() };
    vec![
        ("llama", config()),
        ("head width 64", fast(64)),
        ("head width 128, untied", ModelConfig { tie_word_embeddings: false, ..fast(128) }),
        ("biases", ModelConfig { qkv_bias: true, o_bias: true, mlp_bias: true, ..config() }),
        ("norms of heads", ModelConfig { qk_norm: true, ..fast(64) }),
        (
            "window, gelu",
            ModelConfig { sliding_window: Some(9), hidden_act: HiddenAct::Gelu, ..fast(64) },
        ),
        (
            "one kv head",
            ModelConfig { num_key_value_heads: 1, hidden_act: HiddenAct::GeluTanh, ..config() },
        ),
    ]
}

struct Model {
    config: ModelConfig,
    tensors: HashMap<String, Tensor>,
    cpu: Decoder,
}

fn model(config: &ModelConfig, seed: u64) -> Model {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let tensors: HashMap<String, Tensor> = config
        .tensors()
        .into_iter()
        .map(|(name, shape)| {
            let len = shape.iter().product::<usize>();
            let wide = (shape.len() == 2).then(|| 1.0 / (shape[1] as f32).sqrt());
            // Values that bf16 holds: both decoders have the same weights.
            let values: Vec<f32> = (0..len)
                .map(|_| {
                    let x = rng.random::<f32>() * 2.0 - 1.0;
                    half::bf16::from_f32(wide.map_or(1.0 + 0.3 * x, |w| 1.7 * w * x)).to_f32()
                })
                .collect();
            (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
        })
        .collect();
    let cpu = Decoder::from_tensors(config.clone(), &tensors).unwrap();
    Model { config: config.clone(), tensors, cpu }
}

impl Model {
    fn on(&self, gpu: &Arc<Gpu>, dtype: DType) -> CudaDecoder {
        let mut read =
            |name: &str, _: &[usize]| -> Result<Tensor> { Ok(self.tensors[name].clone()) };
        CudaDecoder::load(gpu.clone(), self.config.clone(), dtype, &mut read).unwrap()
    }

    fn lora(&self, config: &LoraConfig, seed: u64) -> Lora {
        let mut lora = Lora::init(config, &self.cpu.linear_modules(), seed).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for m in &mut lora.modules {
            let values: Vec<f32> =
                (0..m.out_features * m.r).map(|_| 0.1 * (rng.random::<f32>() - 0.5)).collect();
            m.b = Tensor::from_vec(values, (m.out_features, m.r), &Device::Cpu).unwrap();
        }
        lora
    }
}

/// Documents of odd lengths, one of a single token, with unsupervised stretches.
fn batch(vocab: usize, lengths: &[usize], seed: u64) -> Batch {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let documents: Vec<Vec<u32>> = lengths
        .iter()
        .map(|n| (0..*n).map(|_| rng.random_range(0..vocab as u32)).collect())
        .collect();
    let mut batch = Batch::from_documents(&documents);
    for (i, target) in batch.targets.iter_mut().enumerate() {
        if i % 7 == 3 {
            *target = None;
        }
    }
    batch
}

fn error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let off = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    let size = norm(&mut want.iter().map(|x| f64::from(*x)));
    if size == 0.0 { off } else { off / size }
}

fn options(batch: &Batch, checkpoint: Checkpoint, dropout: Option<DropoutKey>) -> PassOptions {
    PassOptions { grad_scale: 1.0 / batch.supervised() as f32, dropout, checkpoint }
}

/// Relative errors of losses and of all gradients together.
fn compare(
    model: &Model,
    cuda: &CudaDecoder,
    lora: &Lora,
    batch: &Batch,
    options: &PassOptions,
) -> (f64, f64) {
    let mut grads = LoraGrads::zeros(lora);
    let want = model.cpu.loss_and_grad(batch, lora, options, &mut grads).unwrap();
    let mut training = cuda.training(lora, 1.0, 0).unwrap();
    let got = cuda.loss_and_grad(batch, &mut training, options).unwrap();
    let found = training.gradients(cuda, lora).unwrap().concat();
    let expected: Vec<f32> = grads.tensors().flatten().copied().collect();
    (error(&got.nll, &want.nll), error(&found, &expected))
}

fn limits(dtype: DType) -> (f64, f64) {
    if dtype == DType::F32 { (2e-5, 1e-4) } else { (2e-2, 6e-2) }
}

#[test]
fn losses_and_gradients_are_the_cpus() {
    let Some(gpu) = gpu() else { return };
    let mut bad = Vec::new();
    for (seed, (name, config)) in variants().into_iter().enumerate() {
        let model = model(&config, seed as u64);
        let lora = model.lora(&LoraConfig { r: 4, lora_alpha: 8.0, ..LoraConfig::default() }, 5);
        let batch = batch(config.vocab_size, &[1, 37, 200, 2, 1, 66], 6);
        for dtype in [DType::F32, DType::BF16] {
            let mut cuda = model.on(&gpu, dtype);
            let logits = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let base = error(
                &logits(cuda.logits(&batch, None).unwrap()),
                &logits(model.cpu.logits(&batch, None).unwrap()),
            );
            let adapted = error(
                &cuda.nll(&batch, Some(&lora)).unwrap(),
                &model.cpu.nll(&batch, Some(&lora)).unwrap(),
            );
            let (nll, grad) =
                compare(&model, &cuda, &lora, &batch, &options(&batch, Checkpoint::None, None));
            let (full_nll, full) =
                compare(&model, &cuda, &lora, &batch, &options(&batch, Checkpoint::Full, None));
            cuda.set_memory_limit(Some(1));
            let (_, tight) =
                compare(&model, &cuda, &lora, &batch, &options(&batch, Checkpoint::None, None));
            eprintln!(
                "{name:<24} {dtype:?}: logits {base:.1e} nll {adapted:.1e} {nll:.1e} grads {grad:.1e}, recomputed {full:.1e}, tight {tight:.1e}"
            );
            let (a, b) = limits(dtype);
            if !(base < a
                && adapted < a
                && nll < a
                && full_nll < a
                && grad < b
                && full < b
                && tight < b)
            {
                bad.push(format!("{name} {dtype:?}"));
            }
        }
    }
    assert!(bad.is_empty(), "{bad:?}");
}

/// Whether activations stay, go to the host or are computed again, the gradients have the same bits.
#[test]
fn what_is_kept_and_where_changes_no_bit() {
    let Some(gpu) = gpu() else { return };
    // With a head of its own, so that the embeddings can go to the host as well.
    let config = ModelConfig { num_hidden_layers: 9, tie_word_embeddings: false, ..config() };
    let model = model(&config, 3);
    // With the lowest layers left out, which keep nothing, and with all.
    let [upper, all] = [1..9, 0..9].map(|layers| {
        let layers_to_transform = Some(layers.collect());
        model.lora(&LoraConfig { layers_to_transform, r: 4, ..LoraConfig::default() }, 8)
    });
    let batches = [4, 5].map(|seed| batch(config.vocab_size, &[70, 133, 1], seed));
    let run = |lora: &Lora, limit: Option<u64>, host: u64, checkpoint: Checkpoint| {
        let mut cuda = model.on(&gpu, DType::BF16);
        cuda.set_memory_limit(limit);
        cuda.assume_fast_copies();
        let mut training = cuda.training(lora, 1.0, host).unwrap();
        // Two passes: the second finds the buffers as the first left them.
        for batch in &batches {
            cuda.loss_and_grad(batch, &mut training, &options(batch, checkpoint, None)).unwrap();
        }
        let gradients = training.gradients(&cuda, lora).unwrap().concat();
        (cuda.kept(), cuda.on_host(), gradients, gpu.memory().0)
    };
    let (kept, _, want, most) = run(&upper, None, 0, Checkpoint::None);
    assert_eq!(kept, [8, 0, 0]);
    let size = (256 * (2 * config.intermediate_size).next_multiple_of(64) * 2) as u64;
    let mut seen = Vec::new();
    for less in 1..16 {
        // Room on the host for three layers, for all, or for none.
        let host = [3 * size, 1 << 30, 0][less as usize % 3];
        let (kept, _, got, _) = run(&upper, Some(most - less * size), host, Checkpoint::None);
        assert_eq!(got, want, "{kept:?}");
        seen.push(kept);
    }
    eprintln!("here, away, again: {seen:?}");
    assert!(seen.iter().any(|kept| kept[1] > 0), "{seen:?}");
    assert!(seen.iter().any(|kept| kept[2] > 0), "{seen:?}");

    let (_, _, want, _) = run(&all, None, 0, Checkpoint::None);
    for host in [0, 1 << 30] {
        let (_, on_host, got, _) = run(&all, None, host, Checkpoint::Full);
        assert_eq!(on_host, host > 0);
        assert_eq!(got, want, "checkpointing, {host} bytes on the host");
    }
}

#[test]
fn partial_adapters_mixed_ranks_and_dropout() {
    let Some(gpu) = gpu() else { return };
    let config = config();
    let model = model(&config, 3);
    let batch = batch(config.vocab_size, &[70, 33, 1], 4);
    let list =
        |names: &[&str]| TargetModules::List(names.iter().map(|n| (*n).to_owned()).collect());
    let base = LoraConfig { r: 4, lora_alpha: 8.0, ..LoraConfig::default() };
    let cases = [
        (
            "q and v of layer 1",
            LoraConfig {
                target_modules: list(&["q_proj", "v_proj"]),
                layers_to_transform: Some(vec![1]),
                ..base.clone()
            },
        ),
        ("down alone", LoraConfig { target_modules: list(&["down_proj"]), ..base.clone() }),
        (
            "o and up",
            LoraConfig {
                target_modules: list(&["o_proj", "up_proj"]),
                use_rslora: true,
                ..base.clone()
            },
        ),
        (
            "other ranks",
            LoraConfig {
                rank_pattern: [("k_proj".to_owned(), 3), ("gate_proj".to_owned(), 9)].into(),
                alpha_pattern: [("q_proj".to_owned(), 1.0)].into(),
                ..base.clone()
            },
        ),
        ("dropout", LoraConfig { lora_dropout: 0.3, ..base.clone() }),
    ];
    let mut bad = Vec::new();
    for (name, config) in cases {
        let lora = model.lora(&config, 8);
        for (dtype, checkpoint) in [
            (DType::F32, Checkpoint::None),
            (DType::F32, Checkpoint::Full),
            (DType::BF16, Checkpoint::None),
        ] {
            let cuda = model.on(&gpu, dtype);
            let key = (config.lora_dropout > 0.0).then_some(DropoutKey(99));
            let (nll, grad) =
                compare(&model, &cuda, &lora, &batch, &options(&batch, checkpoint, key));
            eprintln!("{name:<20} {dtype:?} {checkpoint:?}: nll {nll:.1e}, grads {grad:.1e}");
            let (a, b) = limits(dtype);
            if !(nll < a && grad < b) {
                bad.push(format!("{name} {dtype:?} {checkpoint:?}"));
            }
        }
    }
    assert!(bad.is_empty(), "{bad:?}");
}

#[test]
fn adapters_of_other_ranks_take_turns() {
    let Some(gpu) = gpu() else { return };
    let config = config();
    let model = model(&config, 3);
    let cuda = model.on(&gpu, DType::F32);
    let batch = batch(config.vocab_size, &[70, 33, 1], 4);
    let of = |r: usize, seed| {
        model.lora(&LoraConfig { r, lora_alpha: 8.0, ..LoraConfig::default() }, seed)
    };
    let (a, b, c) = (of(4, 1), of(16, 2), of(4, 3));
    for lora in [Some(&a), None, Some(&b), Some(&c), None, Some(&a)] {
        let e = error(&cuda.nll(&batch, lora).unwrap(), &model.cpu.nll(&batch, lora).unwrap());
        assert!(e < 2e-5, "{e}");
    }
}

#[test]
fn ten_steps_follow_the_cpu_and_resume_to_the_same_bits() {
    let Some(gpu) = gpu() else { return };
    for (config, dtype, limit) in [
        (config(), DType::F32, 1e-3),
        (ModelConfig { head_dim: 64, ..config() }, DType::BF16, 1e-2),
    ] {
        let model = model(&config, 11);
        // Two batches a step, their gradients added, at a rate that moves the loss.
        let batches =
            [batch(config.vocab_size, &[90, 1, 41], 1), batch(config.vocab_size, &[64, 64], 2)];
        let start = Lora::init(
            &LoraConfig { r: 8, lora_alpha: 16.0, ..LoraConfig::default() },
            &model.cpu.linear_modules(),
            2,
        )
        .unwrap();
        let supervised: usize = batches.iter().map(Batch::supervised).sum();
        let options = PassOptions {
            grad_scale: 1.0 / supervised as f32,
            dropout: None,
            checkpoint: Checkpoint::None,
        };
        let factors = |step| AdamWFactors {
            lr: 1e-2,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            step,
            max_norm: 1.0,
        };
        // The losses of ten steps, and what stands at the end; after `pause` steps all is taken to
        // the host and another training goes on from there.
        let on_gpu = |pause: u64| {
            let cuda = model.on(&gpu, dtype);
            let mut training = cuda.training(&start, 1.0, 0).unwrap();
            let mut losses = Vec::new();
            for step in 1..=10 {
                training.clear();
                let pass = |b| cuda.loss_and_grad(b, &mut training, &options).unwrap().nll_sum();
                losses.push(batches.iter().map(pass).sum::<f64>() / supervised as f64);
                training.step(&factors(step)).unwrap();
                if step == pause {
                    let state = training.state().unwrap();
                    training = cuda.training(&start, 1.0, 0).unwrap();
                    training.restore(&state).unwrap();
                }
            }
            (losses, training.state().unwrap())
        };
        let (losses, state) = on_gpu(0);
        let (again, same) = on_gpu(4);
        assert_eq!(losses, again);
        assert!(state == same, "equal runs give equal bits, paused or not");

        let mut lora = start.clone();
        let mut params: Vec<Vec<f32>> = lora
            .modules
            .iter()
            .flat_map(|m| [&m.a, &m.b])
            .map(|t| t.flatten_all().unwrap().to_vec1().unwrap())
            .collect();
        let (mut m, mut v): (Vec<Vec<f32>>, Vec<Vec<f32>>) =
            params.iter().map(|p| (vec![0.0; p.len()], vec![0.0; p.len()])).unzip();
        for (step, found) in (1..=10).zip(&losses) {
            let mut grads = LoraGrads::zeros(&lora);
            let nll: f64 = batches
                .iter()
                .map(|b| model.cpu.loss_and_grad(b, &lora, &options, &mut grads).unwrap().nll_sum())
                .sum();
            let want = nll / supervised as f64;
            eprintln!("{dtype:?} step {step:>2}: loss {found:.6}, the CPU's {want:.6}");
            assert!((found - want).abs() < limit * want, "step {step}: {found} instead of {want}");
            let norm = grads.tensors().flatten().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let factor = (1.0 / (norm + 1e-6)).min(1.0) as f32;
            grads.tensors_mut().for_each(|g| g.iter_mut().for_each(|g| *g *= factor));
            for (i, g) in grads.tensors().enumerate() {
                adamw::step(
                    &mut params[i],
                    g,
                    &mut m[i],
                    &mut v[i],
                    1e-2,
                    0.9,
                    0.999,
                    1e-8,
                    0.0,
                    step,
                )
                .unwrap();
            }
            let mut values = params.iter();
            for t in lora.modules.iter_mut().flat_map(|m| [&mut m.a, &mut m.b]) {
                *t = Tensor::from_slice(values.next().unwrap(), t.shape(), &Device::Cpu).unwrap();
            }
        }
        assert!(losses[9] < losses[0] - 0.1, "it learns: {losses:?}");
    }
}

#[test]
fn generation_is_the_cpus() {
    let Some(gpu) = gpu() else { return };
    for (name, config) in variants() {
        let model = model(&config, 21);
        let lora = model.lora(&LoraConfig { r: 4, lora_alpha: 8.0, ..LoraConfig::default() }, 5);
        let decoder = Decoder::on_gpu(config.clone(), model.on(&gpu, DType::F32)).unwrap();
        let prompt: Vec<u32> = (0..70).map(|i| i * 13 % 131).collect();
        let options = GenerateOptions { max_new_tokens: 20, ..GenerateOptions::default() };
        for adapter in [None, Some(&lora)] {
            let got =
                Generator::new(&decoder).generate(&prompt, adapter, &options, |_| true).unwrap();
            let want =
                Generator::new(&model.cpu).generate(&prompt, adapter, &options, |_| true).unwrap();
            assert_eq!(got, want, "{name}");
        }
    }
}

#[test]
fn out_of_memory_is_an_error_and_no_end() {
    let Some(gpu) = gpu() else { return };
    let model = model(&config(), 1);
    let cuda = model.on(&gpu, DType::F32);
    let (free, _) = gpu.free_memory().unwrap();
    let hog = gpu.alloc::<u8>(free.saturating_sub(64 << 20)).unwrap();
    let lora = model.lora(&LoraConfig { r: 4, lora_alpha: 8.0, ..LoraConfig::default() }, 5);
    let big = batch(131, &[200; 1000], 6);
    let mut training = cuda.training(&lora, 1.0, 0).unwrap();
    let e = cuda
        .loss_and_grad(&big, &mut training, &options(&big, Checkpoint::None, None))
        .unwrap_err();
    assert!(e.to_string().contains("out of memory"), "{e}");
    drop(hog);
    let small = batch(131, &[20], 6);
    cuda.loss_and_grad(&small, &mut training, &options(&small, Checkpoint::None, None)).unwrap();
}
