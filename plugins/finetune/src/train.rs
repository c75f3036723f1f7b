//! `train`: trains a LoRA adapter on tokens, or with `method: full` every weight of the model.
//!
//! Checkpoints stand in the task's state folder, so a run that was interrupted goes on from the
//! last one, to the same bytes on the CPU. Weights are loaded in the `dtype` of the model's config
//! (on the CPU bf16 weights take half the memory, the arithmetic is f32 either way); adapter and
//! optimiser state are f32.

use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use lora_flow_core::{
    Artifact, ArtifactKind, Digest, Error, Ports, Problem, Result, ResultExt, Task, TaskContext,
};
use lora_flow_data::TokenSet;
use lora_flow_model::config::ModelConfig;
use lora_flow_model::decoder::Decoder;
use lora_flow_model::lora::{Lora, LoraConfig};
use lora_flow_model::merge::{CARRIED, MergeOptions, merge_weights};
use lora_flow_model::place::Place;
use lora_flow_model::residual::{self, Start};
use lora_flow_model::weights::WeightSource;
use lora_flow_train::preflight::{self, Shape};
use lora_flow_train::{
    LOG_FILE, LR_RANGE_FILE, Method, Outcome, Run, Sequences, TENSORBOARD_FOLDER, TrainConfig,
    available_bytes, open_device, peak_rss_bytes, reset_peak_rss, with_threads,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Parameters of `train`, in Hugging Face's words.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Train(pub TrainConfig);

impl Task for Train {
    fn inputs(&self) -> Ports {
        let ports =
            Ports::none().required("model", ArtifactKind::Model, "the base, which stays as it is");
        let ports = match self.0.method {
            Method::Lora => {
                ports.required("adapter", ArtifactKind::Adapter, "the adapter to start from")
            }
            Method::Full => ports,
        };
        ports.required("train", ArtifactKind::Tokens, "what to train on").optional(
            "eval",
            ArtifactKind::Tokens,
            "what to evaluate on during training",
        )
    }

    fn outputs(&self) -> Ports {
        let ports = match self.0.method {
            Method::Lora => {
                Ports::none().required("adapter", ArtifactKind::Adapter, "the trained adapter")
            }
            Method::Full => {
                Ports::none().required("model", ArtifactKind::Model, "the trained model")
            }
        };
        ports.required("metrics", ArtifactKind::Metrics, "final numbers and `log.jsonl`")
    }

    fn validate(&self) -> Vec<Problem> {
        self.0.problems()
    }

    fn uses_device(&self) -> bool {
        true
    }

    fn run(&self, cx: &mut TaskContext) -> Result<()> {
        let (model, adapter) = (cx.input("model")?.clone(), cx.optional("adapter").cloned());
        let tokens = cx.input("train")?.clone();
        let eval_tokens = cx.optional("eval").cloned();
        if self.0.load_best_model_at_end && eval_tokens.is_none() {
            return Err(Error::new("`load_best_model_at_end` needs the input `eval` to choose by")
                .with_hint("connect a Tokens artifact to `eval`"));
        }
        let open = |what: &str, artifact| {
            let set = TokenSet::open(artifact).with_context(|| format!("input `{what}`"))?;
            set.check_tokenizer(&model).with_context(|| format!("input `{what}`"))?;
            Ok::<_, Error>(set)
        };
        let train_set = open("train", &tokens)?;
        let eval_set = eval_tokens.as_ref().map(|t| open("eval", t)).transpose()?;

        let identity = Digest::of_json(&json!({
            "model": model.digest,
            "adapter": adapter.as_ref().map(|a| a.digest),
            "train": tokens.digest,
            "eval": eval_tokens.as_ref().map(|t| t.digest),
            "device": cx.device().class(),
        }));
        let device = open_device(cx.device())?;
        let (state_dir, reporter) = (cx.state_dir().to_owned(), cx.reporter());
        let cancel = cx.cancel_token().clone();
        cx.info(format!(
            "training on {} rows with {} threads on {}",
            train_set.rows(),
            cx.threads(),
            cx.device()
        ));
        reset_peak_rss();
        let mut predicted = None;
        let threads = cx.threads();
        let mut outcome = with_threads(threads, || {
            let Started { decoder, lora, start, weight_bytes } =
                self.start(&model, adapter.as_ref(), &device)?;
            let keeps_best = self.0.eval_steps.is_some() && eval_set.is_some();
            let config = decoder.config();
            let shape = Shape::new(config, weight_bytes, &lora, &train_set, &self.0, keeps_best);
            predicted = self.preflight(cx, &shape, &decoder, &train_set, &device)?;
            let mut outcome = lora_flow_train::train(Run {
                decoder: &decoder,
                lora,
                train: &train_set,
                eval: eval_set.as_ref().map(|set| set as &dyn Sequences),
                config: &self.0,
                state_dir: &state_dir,
                identity,
                reporter,
                cancel,
            })?;
            if let Some(start) = &start {
                outcome.lora = residual::join(&outcome.lora, start)?;
            }
            Ok::<_, Error>(outcome)
        })?;
        let measured = peak_rss_bytes();
        let stored = match self.0.method {
            Method::Lora => save_adapter(cx, &outcome)?,
            Method::Full => save_model(cx, &model, &mut outcome)?,
        };
        self.write(cx, &outcome, &train_set, Sizes { predicted, measured, stored })
    }
}

/// What a run starts from.
struct Started {
    decoder: Decoder,
    lora: Lora,
    start: Option<Start>,
    weight_bytes: u64,
}

/// What the preflight says.
#[derive(Clone, Copy)]
struct Prediction {
    /// Peak in bytes.
    peak: u64,
    /// Time of the whole training.
    seconds: f64,
}

/// Bytes, and time.
struct Sizes {
    /// What the preflight predicted, where it did.
    predicted: Option<Prediction>,
    /// Peak of the training.
    measured: u64,
    /// Weights written.
    stored: u64,
}

impl Train {
    fn start(
        &self,
        model: &Artifact,
        adapter: Option<&Artifact>,
        place: &Place,
    ) -> Result<Started> {
        let cpu_only = |what: &str| match place.is_cpu() {
            true => Ok(()),
            false => Err(Error::new(format!("{what} is not done on a GPU yet"))
                .with_hint("use `--device cpu`, or plain LoRA")),
        };
        let Some(adapter) = adapter else {
            cpu_only("`method: full`")?;
            let mut decoder =
                Decoder::load(model, &Device::Cpu, DType::F32).context("input `model`")?;
            let names: Vec<_> = decoder.config().tensors().into_iter().map(|(n, _)| n).collect();
            let saved = decoder.take(&names)?;
            let lora = Lora { config: LoraConfig::default(), modules: Vec::new(), saved };
            return Ok(Started { decoder, lora, start: None, weight_bytes: 4 });
        };
        let dtype = ModelConfig::open(model)?.dtype;
        let weight_bytes = dtype.size_in_bytes() as u64;
        let decoder = Decoder::open(model, place, dtype).context("input `model`")?;
        let lora =
            Lora::load_peft(adapter, &decoder.linear_modules()).context("input `adapter`")?;
        let Some(init) = residual::read_start(adapter).context("input `adapter`")? else {
            return Ok(Started { decoder, lora, start: None, weight_bytes });
        };
        cpu_only("training from PiSSA or OLoRA")?;
        let (lora, start) = residual::split(&lora, init)?;
        let decoder = decoder.overlay(&residual::lessened(&decoder, &lora, &start)?)?;
        Ok(Started { decoder, lora, start: Some(start), weight_bytes })
    }

    /// Says what the run will need, and refuses what does not fit. Returns peak and time.
    fn preflight(
        &self,
        cx: &mut TaskContext,
        shape: &Shape,
        decoder: &Decoder,
        rows: &TokenSet,
        place: &Place,
    ) -> Result<Option<Prediction>> {
        // The figures are those of the CPU; a GPU's decoder plans its own memory.
        if !place.is_cpu() {
            return Ok(None);
        }
        let model = decoder.config();
        let memory = shape.memory(model, &self.0);
        let steps = self.0.max_steps.map(|s| s as f64);
        let in_step = self.0.per_device_train_batch_size * self.0.gradient_accumulation_steps;
        let epochs = steps
            .map_or(self.0.num_train_epochs, |s| s * in_step as f64 / rows.rows().max(1) as f64);
        let all: usize = (0..rows.rows()).map(|i| rows.row(i).input_ids.len()).sum();
        let tokens = (epochs * all as f64) as u64;
        let rate = product_rate(model, shape).context("cannot time a product")?;
        let seconds = preflight::operations(shape, model, &self.0, tokens) / rate;
        cx.report(preflight::describe(&memory, shape));
        cx.report(format!(
            "{} tokens to train on, about {} at {:.1} GFLOP/s",
            lora_flow_data::group_digits(tokens),
            duration(seconds),
            rate / 1e9
        ));
        if let Some(available) = available_bytes() {
            // What the process holds already (the weights) is no longer available, nor needed again.
            let held = lora_flow_train::rss_bytes().unwrap_or(0);
            preflight::check(shape, model, &self.0, available + held)?;
        }
        Ok(Some(Prediction { peak: memory.total(), seconds }))
    }
}

/// Operations a second of a product like those of the model's MLP.
fn product_rate(model: &ModelConfig, shape: &Shape) -> candle_core::Result<f64> {
    let n = shape.tokens.clamp(1, 256) as usize;
    let (h, f) = (model.hidden_size, model.intermediate_size);
    let dtype = if shape.weight_bytes < 4 { DType::BF16 } else { DType::F32 };
    let x = Tensor::ones((n, h), DType::F32, &Device::Cpu)?;
    let w = Tensor::ones((f, h), dtype, &Device::Cpu)?;
    let (mut done, started) = (0u32, Instant::now());
    while done < 1 || started.elapsed().as_millis() < 30 {
        lora_flow_kernels::linear::matmul_nt(&x, &w)?;
        done += 1;
    }
    Ok(f64::from(done) * 2.0 * (n * h * f) as f64 / started.elapsed().as_secs_f64())
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

/// Writes the adapter; returns the bytes of its weights.
fn save_adapter(cx: &mut TaskContext, outcome: &Outcome) -> Result<u64> {
    let trainable = outcome.lora.trainable_parameters();
    let out = cx.output("adapter")?;
    outcome.lora.save_peft(&out.path, None)?;
    out.set_meta(json!({ "trainable_parameters": trainable, "steps": outcome.steps }));
    Ok(fs_err::metadata(out.path.join("adapter_model.safetensors"))?.len())
}

/// Writes the fully trained model in f32, which rounds nothing; returns the bytes of its weights.
fn save_model(cx: &mut TaskContext, base: &Artifact, outcome: &mut Outcome) -> Result<u64> {
    let mut config = ModelConfig::open(base)?;
    let source = WeightSource::open(base)?;
    let options = MergeOptions { dtype: DType::F32, max_shard_size: None };
    let path = cx.output("model")?.path.clone();
    let written = merge_weights(&source, &config, &outcome.lora, &path, options, |_, _| {
        cx.check_cancelled()
    })?;
    config.dtype = DType::F32;
    let out = cx.output("model")?;
    out.write_json("config.json", &config.to_hf())?;
    for name in CARRIED {
        if let Some(file) = base.files.get(*name) {
            out.adopt(name, file);
        }
    }
    out.set_meta(json!({
        "architecture": config.architecture.hf_name(),
        "parameters": config.parameters(),
    }));
    Ok(written.bytes)
}

/// Event files of TensorBoard, from the state folder.
fn event_files(state_dir: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let dir = state_dir.join(TENSORBOARD_FOLDER);
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let mut files = Vec::new();
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let name = format!("{TENSORBOARD_FOLDER}/{}", entry.file_name().to_string_lossy());
        files.push((name, fs_err::read(entry.path())?));
    }
    files.sort();
    Ok(files)
}

impl Train {
    fn write(
        &self,
        cx: &mut TaskContext,
        outcome: &Outcome,
        train_set: &TokenSet,
        sizes: Sizes,
    ) -> Result<()> {
        let trainable = outcome.lora.trainable_parameters();
        let speed = outcome.tokens_per_second();
        let state_dir = cx.state_dir().to_owned();
        let log = fs_err::read(state_dir.join(LOG_FILE))?;
        let curve = state_dir.join(LR_RANGE_FILE);

        let out = cx.output("metrics")?;
        out.write(LOG_FILE, log)?;
        for (name, bytes) in event_files(&state_dir)? {
            out.write(&name, bytes)?;
        }
        if curve.is_file() {
            out.write(LR_RANGE_FILE, fs_err::read(&curve)?)?;
        }
        let mut metrics = json!({
            "train_loss": outcome.train_loss,
            "steps": outcome.steps,
            "tokens_seen": outcome.tokens_seen,
            "rows": train_set.rows(),
            "trainable_parameters": trainable,
            "train_seconds": outcome.seconds,
            "tokens_per_second": speed,
            "peak_rss_bytes": sizes.measured,
            "predicted_peak_bytes": sizes.predicted.map(|p| p.peak),
            "predicted_seconds": sizes.predicted.map(|p| p.seconds),
            "checkpoint_bytes": sizes.stored,
            "learning_rate": outcome.learning_rate,
        });
        if let Some(loss) = outcome.eval_loss {
            metrics["eval_loss"] = json!(loss);
        }
        if let Some((step, loss)) = outcome.best {
            metrics["best_step"] = json!(step);
            metrics["best_eval_loss"] = json!(loss);
        }
        out.write_json("metrics.json", &metrics)?;

        cx.summary("loss", format!("{:.4}", outcome.train_loss));
        if let Some(loss) = outcome.eval_loss {
            cx.summary("eval loss", format!("{loss:.4}"));
        }
        if let Some((step, loss)) = outcome.best.filter(|_| self.0.load_best_model_at_end) {
            cx.summary("kept", format!("step {step}, eval loss {loss:.4}"));
        }
        cx.summary("speed", format!("{speed:.0} tok/s"));
        if self.0.learning_rate.is_nan() {
            cx.summary("learning rate", format!("{:.1e}", outcome.learning_rate));
        }
        if outcome.stopped_early {
            cx.summary("stopped early", format!("after step {}", outcome.steps));
        }
        let stored = if self.0.method == Method::Full { "model" } else { "adapter" };
        cx.summary(stored, format!("{:.1} MB", sizes.stored as f64 / 1e6));
        cx.summary("peak memory", format!("{:.2} GB", sizes.measured as f64 / 1e9));
        let measured = sizes.measured as f64 / 1e9;
        let mut peak = format!("peak memory {measured:.3} GB");
        if let Some(predicted) = sizes.predicted {
            let predicted = predicted.peak as f64 / 1e9;
            let off = 100.0 * (predicted / measured - 1.0);
            peak += &format!("; predicted {predicted:.3} GB ({off:+.0} %)");
        }
        cx.report(peak);
        if outcome.resumed_from > 0 {
            let (from, all) = (outcome.resumed_from, outcome.steps);
            cx.report(format!("resumed after step {from} of {all}"));
        }
        Ok(())
    }
}
