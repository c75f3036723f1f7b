//! The loop on a tiny model: it learns, resumes, stops, and is deterministic.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use lora_flow_core::{CancelToken, Digest, Error, ErrorKind, Event, Reporter, Result};
use lora_flow_model::config::{Architecture, HiddenAct, ModelConfig, RopeScaling};
use lora_flow_model::decoder::Decoder;
use lora_flow_model::lora::{Init, Lora, LoraConfig, TargetModules};
use lora_flow_train::{
    Budget, LOG_FILE, Outcome, Run, Sequence, TrainConfig, document_losses, mean_loss, train,
    with_threads,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const VOCAB: usize = 29;

fn decoder() -> Decoder {
    let config = ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: VOCAB,
        hidden_size: 16,
        intermediate_size: 32,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 4,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: RopeScaling::None,
        max_position_embeddings: 64,
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
    };
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let tensors: HashMap<String, Tensor> = config
        .tensors()
        .into_iter()
        .map(|(name, shape)| {
            let len = shape.iter().product();
            let norm = name.ends_with("norm.weight");
            let mut value = || if norm { 1.0 } else { 0.6 * (rng.random::<f32>() - 0.5) };
            let values: Vec<f32> = (0..len).map(|_| value()).collect();
            (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
        })
        .collect();
    Decoder::from_tensors(config, &tensors).unwrap()
}

fn adapter(decoder: &Decoder, dropout: f64) -> Lora {
    let config = LoraConfig {
        r: 4,
        lora_alpha: 8.0,
        lora_dropout: dropout,
        target_modules: TargetModules::AllLinear,
        exclude_modules: None,
        layers_to_transform: None,
        rank_pattern: BTreeMap::new(),
        alpha_pattern: BTreeMap::new(),
        use_rslora: false,
        init_lora_weights: Init::Default,
        use_dora: false,
        modules_to_save: Vec::new(),
    };
    Lora::init(&config, &decoder.linear_modules(), 7).unwrap()
}

/// Rows of two documents that count upwards from random starts.
fn rows(count: usize, seed: u64) -> Vec<Sequence> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut row = || {
        let lengths = [rng.random_range(4..9), rng.random_range(4..9)];
        let mut sequence = Sequence::default();
        for len in lengths {
            let start = rng.random_range(0..VOCAB as u32);
            sequence.input_ids.extend((0..len).map(|i| (start + i) % VOCAB as u32));
            sequence.loss_mask.extend((0..len).map(|i| i > 0));
            sequence.doc_lengths.push(len);
        }
        sequence
    };
    (0..count).map(|_| row()).collect()
}

fn config() -> TrainConfig {
    TrainConfig {
        learning_rate: 2e-2,
        max_steps: Some(9),
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 2,
        warmup_steps: 2,
        save_steps: 3,
        ..TrainConfig::default()
    }
}

type OnMetric = Box<dyn Fn(&str, u64) + Send + Sync>;

/// Keeps the metrics and runs a hook at each.
#[derive(Default)]
struct Watch {
    seen: Mutex<Vec<(String, u64, f64)>>,
    hook: Option<OnMetric>,
}

impl Reporter for Watch {
    fn event(&self, event: Event) {
        if let Event::Metric { name, step, value } = event {
            if let Some(hook) = &self.hook {
                hook(&name, step);
            }
            self.seen.lock().unwrap().push((name, step, value));
        }
    }
}

struct Case<'a> {
    decoder: &'a Decoder,
    config: TrainConfig,
    dropout: f64,
    train: Vec<Sequence>,
    eval: Option<Vec<Sequence>>,
    cancel: CancelToken,
    hook: Option<OnMetric>,
}

impl<'a> Case<'a> {
    fn new(decoder: &'a Decoder) -> Self {
        Self {
            decoder,
            config: config(),
            dropout: 0.2,
            train: rows(11, 1),
            eval: None,
            cancel: CancelToken::default(),
            hook: None,
        }
    }

    fn run(self, dir: &Path) -> Result<Outcome> {
        train(Run {
            decoder: self.decoder,
            lora: adapter(self.decoder, self.dropout),
            train: &self.train,
            eval: self.eval.as_ref().map(|e| e as _),
            config: &self.config,
            state_dir: dir,
            identity: Digest::of_bytes(b"tiny"),
            reporter: Arc::new(Watch { hook: self.hook, ..Watch::default() }),
            cancel: self.cancel,
        })
    }
}

fn values(lora: &Lora) -> Vec<Vec<f32>> {
    let tensors = lora.modules.iter().flat_map(|m| [&m.a, &m.b]);
    tensors.map(|t| t.flatten_all().unwrap().to_vec1().unwrap()).collect()
}

/// The log without what depends on the clock and on memory.
fn log(dir: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(dir.join(LOG_FILE)).unwrap();
    let mut lines: Vec<serde_json::Value> =
        text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    for line in &mut lines {
        let line = line.as_object_mut().unwrap();
        line.remove("tokens_per_second");
        line.remove("peak_rss_bytes");
    }
    lines
}

fn loss_on(decoder: &Decoder, lora: Option<&Lora>, rows: &Vec<Sequence>) -> f64 {
    let budget = Budget { rows: 3, tokens: 1000 };
    let losses = document_losses(decoder, lora, rows, rows.len(), budget, |_| Ok(())).unwrap();
    mean_loss(&losses).unwrap().mean
}

#[test]
fn training_learns_and_every_parameter_moves() {
    let decoder = decoder();
    let dir = tempfile::tempdir().unwrap();
    let mut case = Case::new(&decoder);
    case.config.max_steps = Some(100);
    case.dropout = 0.0;
    case.train = rows(60, 1);
    let outcome = case.run(dir.path()).unwrap();
    let held_out = rows(6, 99);
    let (before, after) =
        (loss_on(&decoder, None, &held_out), loss_on(&decoder, Some(&outcome.lora), &held_out));
    assert!(after < 0.7 * before, "{before} → {after}");
    for (i, (now, start)) in
        values(&outcome.lora).iter().zip(values(&adapter(&decoder, 0.0))).enumerate()
    {
        assert!(now.iter().zip(start).all(|(a, b)| *a != b), "tensor {i} has values that stay");
    }
}

#[test]
fn a_stopped_run_goes_on_to_the_bits_of_an_undisturbed_one() {
    let decoder = decoder();
    let make = || {
        let mut case = Case::new(&decoder);
        case.eval = Some(rows(3, 5));
        case.config.eval_steps = Some(4);
        case
    };
    let whole = tempfile::tempdir().unwrap();
    let undisturbed = make().run(whole.path()).unwrap();
    for stop_at in [1, 4, 5, 8] {
        let dir = tempfile::tempdir().unwrap();
        let mut case = make();
        let cancel = case.cancel.clone();
        case.hook = Some(Box::new(move |_, step| {
            if step == stop_at {
                cancel.cancel();
            }
        }));
        let e = case.run(dir.path()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Cancelled);
        let resumed = make().run(dir.path()).unwrap();
        assert_eq!(resumed.resumed_from, stop_at);
        assert_eq!(values(&resumed.lora), values(&undisturbed.lora), "stopped at {stop_at}");
        assert_eq!(log(dir.path()), log(whole.path()), "stopped at {stop_at}");
        assert_eq!(resumed.tokens_seen, undisturbed.tokens_seen);
        assert_eq!(resumed.best, undisturbed.best);
    }
}

#[test]
fn a_killed_run_goes_on_from_its_last_checkpoint() {
    let decoder = decoder();
    let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // What the disk holds in the middle of step 5 is all that a killed process leaves.
    let (from, to) = (whole.path().to_owned(), killed.path().to_owned());
    let mut case = Case::new(&decoder);
    case.hook = Some(Box::new(move |name, step| {
        if step == 5 && name == "train/loss" {
            copy(&from, &to);
        }
    }));
    let undisturbed = case.run(whole.path()).unwrap();
    assert!(killed.path().join("step-00000003").is_dir());
    let resumed = Case::new(&decoder).run(killed.path()).unwrap();
    assert_eq!(resumed.resumed_from, 3);
    assert_eq!(values(&resumed.lora), values(&undisturbed.lora));
    assert_eq!(log(killed.path()), log(whole.path()));

    // Other settings do not take over the checkpoint.
    let mut other = Case::new(&decoder);
    other.config.learning_rate = 1e-3;
    assert_eq!(other.run(killed.path()).unwrap().resumed_from, 0);
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() { copy(&path, &target) } else { drop(std::fs::copy(&path, target)) }
    }
}

#[test]
fn threads_and_checkpointing_do_not_change_a_bit() {
    let decoder = decoder();
    let run = |threads, gradient_checkpointing| {
        let dir = tempfile::tempdir().unwrap();
        let mut case = Case::new(&decoder);
        case.config.gradient_checkpointing = gradient_checkpointing;
        let outcome = with_threads(threads, || case.run(dir.path())).unwrap();
        values(&outcome.lora)
    };
    let one = run(1, false);
    assert_eq!(one, run(2, false));
    assert_eq!(one, run(2, true));
}

#[test]
fn accumulated_batches_are_the_big_batch() {
    let decoder = decoder();
    let run = |batch, accumulation| {
        let dir = tempfile::tempdir().unwrap();
        let mut case = Case::new(&decoder);
        case.dropout = 0.0;
        case.config.per_device_train_batch_size = batch;
        case.config.gradient_accumulation_steps = accumulation;
        let outcome = case.run(dir.path()).unwrap();
        (values(&outcome.lora), log(dir.path()))
    };
    let ((big, big_log), (small, small_log)) = (run(4, 1), run(1, 4));
    for (a, b) in big.concat().iter().zip(small.concat()) {
        assert!((a - b).abs() < 1e-4, "{a} and {b}");
    }
    for (a, b) in big_log.iter().zip(&small_log) {
        let loss = |line: &serde_json::Value| line["loss"].as_f64().unwrap();
        assert!((loss(a) - loss(b)).abs() < 1e-4);
    }
}

#[test]
fn the_best_adapter_is_kept_and_the_log_has_every_line() {
    let decoder = decoder();
    let dir = tempfile::tempdir().unwrap();
    let mut case = Case::new(&decoder);
    let eval = rows(4, 8);
    case.eval = Some(eval.clone());
    case.config.max_steps = Some(30);
    case.config.eval_steps = Some(2);
    case.config.logging_steps = 7;
    case.config.load_best_model_at_end = true;
    // Large enough to spoil what was learnt.
    case.config.learning_rate = 0.5;
    let outcome = case.run(dir.path()).unwrap();
    let (step, best) = outcome.best.unwrap();
    assert!(step < 30, "the last adapter is the best, nothing is tested");
    assert!((loss_on(&decoder, Some(&outcome.lora), &eval) - best).abs() < 1e-5);
    let lines = log(dir.path());
    let steps = |key: &str| -> Vec<u64> {
        let lines = lines.iter().filter(|l| l.get(key).is_some());
        lines.map(|l| l["step"].as_u64().unwrap()).collect()
    };
    assert_eq!(steps("loss"), [7, 14, 21, 28, 30]);
    assert_eq!(steps("eval_loss"), (1..=15).map(|i| 2 * i).collect::<Vec<_>>());
    let lowest = lines.iter().filter_map(|l| l.get("eval_loss")?.as_f64()).fold(9e9, f64::min);
    assert_eq!(lowest, best);
}

#[test]
fn a_loss_that_is_not_finite_names_the_step_and_the_rows() {
    let decoder = decoder();
    let dir = tempfile::tempdir().unwrap();
    let mut case = Case::new(&decoder);
    case.config.learning_rate = 1e30;
    case.config.warmup_steps = 0;
    let e = case.run(dir.path()).unwrap_err();
    let text = e.chain();
    assert!(text.contains("step 2") && text.contains("row"), "{text}");
    assert!(e.hint().unwrap().contains("learning_rate"));
}

#[test]
fn rows_without_targets_are_left_out_and_none_left_is_an_error() {
    let decoder = decoder();
    let dir = tempfile::tempdir().unwrap();
    let mut case = Case::new(&decoder);
    let silent =
        Sequence { input_ids: vec![1, 2], loss_mask: vec![false; 2], doc_lengths: vec![2] };
    case.train = vec![silent.clone()];
    let e: Error = case.run(dir.path()).unwrap_err();
    assert!(e.to_string().contains("nothing to learn"), "{e}");

    let mut case = Case::new(&decoder);
    case.train.insert(4, silent);
    let with = case.run(tempfile::tempdir().unwrap().path()).unwrap();
    let without = Case::new(&decoder).run(tempfile::tempdir().unwrap().path()).unwrap();
    assert_eq!(with.tokens_seen, without.tokens_seen);
}

#[test]
fn a_run_that_broke_off_repeats_just_the_step_that_broke_it() {
    let decoder = decoder();
    let dir = tempfile::tempdir().unwrap();
    let run = || {
        let mut case = Case::new(&decoder);
        case.config.learning_rate = 1e30;
        case.config.warmup_steps = 0;
        case.run(dir.path()).unwrap_err().chain()
    };
    let first = run();
    assert!(dir.path().join("step-00000001").is_dir(), "the checkpoint before step 2");
    assert_eq!(run(), first);
    assert_eq!(log(dir.path()).len(), 1, "step 1 was not run again");
}

#[test]
fn early_stopping_ends_the_run_and_goes_on_counting_after_a_resume() {
    let decoder = decoder();
    let eval = rows(6, 2);
    let case = |cancel_at: Option<u64>| {
        let mut case = Case::new(&decoder);
        case.eval = Some(eval.clone());
        case.config.max_steps = Some(60);
        case.config.learning_rate = 0.5;
        case.config.eval_steps = Some(2);
        case.config.early_stopping_patience = Some(3);
        let cancel = case.cancel.clone();
        case.hook = Some(Box::new(move |name, step| {
            if name == "train/loss" && Some(step) == cancel_at {
                cancel.cancel();
            }
        }));
        case
    };
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let stopped = case(None).run(whole.path()).unwrap();
    assert!(stopped.stopped_early && stopped.steps < 60);
    let (best, _) = stopped.best.unwrap();
    assert_eq!(stopped.steps, best + 6, "three evaluations after the best");
    let e = case(Some(best + 3)).run(parts.path()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Cancelled);
    let resumed = case(None).run(parts.path()).unwrap();
    assert_eq!((resumed.steps, resumed.best), (stopped.steps, stopped.best));
    assert_eq!(values(&resumed.lora), values(&stopped.lora));
}

#[test]
fn an_automatic_rate_leaves_no_trace_but_its_curve() {
    let decoder = decoder();
    let dir = tempfile::tempdir().unwrap();
    let mut auto = Case::new(&decoder);
    auto.config.learning_rate = lora_flow_train::AUTO;
    let found = auto.run(dir.path()).unwrap();
    let rate = found.learning_rate;
    assert!((1e-4..0.2).contains(&rate), "{rate}");
    let text = std::fs::read_to_string(dir.path().join(lora_flow_train::LR_RANGE_FILE)).unwrap();
    let curve: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(curve["learning_rate"], rate);
    assert!(curve["curve"].as_array().unwrap().len() > 20);
    // The run itself is the one with that rate.
    let mut given = Case::new(&decoder);
    given.config.learning_rate = rate;
    let given = given.run(tempfile::tempdir().unwrap().path()).unwrap();
    assert_eq!(values(&found.lora), values(&given.lora));
}

#[test]
fn a_spike_stops_the_run_where_it_is_asked_to() {
    let decoder = decoder();
    let dir = tempfile::tempdir().unwrap();
    let mut case = Case::new(&decoder);
    case.config.max_steps = Some(40);
    case.config.spike_factor = Some(1.01);
    case.config.on_spike = lora_flow_train::OnSpike::Stop;
    let e = case.run(dir.path()).unwrap_err();
    let text = e.to_string();
    assert!(text.contains("times the median") && text.contains("rows ["), "{text}");
}

#[test]
fn full_fine_tuning_learns_resumes_and_leaves_the_base_alone() {
    let base = decoder();
    let names: Vec<_> = base.config().tensors().into_iter().map(|(n, _)| n).collect();
    let run = |dir: &Path, steps: u64| {
        let mut decoder = decoder();
        let saved = decoder.take(&names).unwrap();
        let lora = Lora { config: LoraConfig::default(), modules: Vec::new(), saved };
        let config = TrainConfig {
            learning_rate: 5e-3,
            max_steps: Some(steps),
            method: lora_flow_train::Method::Full,
            report_to: vec![lora_flow_train::ReportTo::Tensorboard],
            ..config()
        };
        let cancel = CancelToken::default();
        train(Run {
            decoder: &decoder,
            lora,
            train: &rows(11, 1),
            eval: None,
            config: &config,
            state_dir: dir,
            identity: Digest::of_bytes(b"tiny"),
            reporter: Arc::new(Watch::default()),
            cancel,
        })
        .unwrap()
    };
    let dir = tempfile::tempdir().unwrap();
    let trained = run(dir.path(), 9);
    let held_out = rows(6, 9);
    let before = loss_on(&base, None, &held_out);
    let after = loss_on(&base, Some(&trained.lora), &held_out);
    assert!(after < 0.9 * before, "{before} {after}");
    assert_eq!(loss_on(&base, None, &held_out), before);
    for (saved, (name, tensor)) in
        trained.lora.saved.iter().zip(names.iter().map(|n| (n, base.tensor(n).unwrap())))
    {
        assert_eq!(&saved.name, name);
        let new = saved.tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let old = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_ne!(new, old, "{name} did not move");
    }
    let events = std::fs::read_dir(dir.path().join("tensorboard")).unwrap().count();
    assert_eq!(events, 1);
    // A run that finds the checkpoint of its sixth step does the last three again.
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.ends_with("step-00000009") {
            std::fs::remove_dir_all(path).unwrap();
        }
    }
    let again = run(dir.path(), 9);
    assert_eq!(again.resumed_from, 6);
    let bits = |lora: &Lora| -> Vec<f32> {
        lora.tensors().flat_map(|(_, t)| t.flatten_all().unwrap().to_vec1().unwrap()).collect()
    };
    assert_eq!(bits(&again.lora), bits(&trained.lora));
}
