//! `train`: trains a LoRA adapter on tokens.
//!
//! Checkpoints stand in the task's state folder, so a run that was interrupted goes on from the
//! last one, to the same bytes on the CPU. Weights are loaded in the `dtype` of the model's config
//! (on the CPU bf16 weights take half the memory, the arithmetic is f32 either way); adapter and
//! optimiser state are f32.

use lora_flow_core::{ArtifactKind, Digest, Ports, Problem, Result, ResultExt, Task, TaskContext};
use lora_flow_data::TokenSet;
use lora_flow_model::config::ModelConfig;
use lora_flow_model::decoder::Decoder;
use lora_flow_model::lora::Lora;
use lora_flow_train::{
    LOG_FILE, Outcome, Run, Sequences, TrainConfig, open_device, peak_rss_bytes, with_threads,
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
        Ports::none()
            .required("model", ArtifactKind::Model, "the base, which stays as it is")
            .required("adapter", ArtifactKind::Adapter, "the adapter to start from")
            .required("train", ArtifactKind::Tokens, "what to train on")
            .optional("eval", ArtifactKind::Tokens, "what to evaluate on during training")
    }

    fn outputs(&self) -> Ports {
        Ports::none().required("adapter", ArtifactKind::Adapter, "the trained adapter").required(
            "metrics",
            ArtifactKind::Metrics,
            "final numbers and `log.jsonl`",
        )
    }

    fn validate(&self) -> Vec<Problem> {
        self.0.problems()
    }

    fn uses_device(&self) -> bool {
        true
    }

    fn run(&self, cx: &mut TaskContext) -> Result<()> {
        let (model, adapter) = (cx.input("model")?.clone(), cx.input("adapter")?.clone());
        let tokens = cx.input("train")?.clone();
        let eval_tokens = cx.optional("eval").cloned();
        if self.0.load_best_model_at_end && eval_tokens.is_none() {
            return Err(lora_flow_core::Error::new(
                "`load_best_model_at_end` needs the input `eval` to choose by",
            )
            .with_hint("connect a Tokens artifact to `eval`"));
        }
        let open = |what: &str, artifact| {
            let set = TokenSet::open(artifact).with_context(|| format!("input `{what}`"))?;
            set.check_tokenizer(&model).with_context(|| format!("input `{what}`"))?;
            Ok::<_, lora_flow_core::Error>(set)
        };
        let train_set = open("train", &tokens)?;
        let eval_set = eval_tokens.as_ref().map(|t| open("eval", t)).transpose()?;

        let identity = Digest::of_json(&json!({
            "model": model.digest,
            "adapter": adapter.digest,
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
        let outcome = with_threads(cx.threads(), || {
            let dtype = ModelConfig::open(&model)?.dtype;
            let decoder = Decoder::open(&model, &device, dtype).context("input `model`")?;
            let lora = Lora::load_peft(&adapter, &decoder.linear_modules());
            let lora = lora.context("input `adapter`")?;
            lora_flow_train::train(Run {
                decoder: &decoder,
                lora,
                train: &train_set,
                eval: eval_set.as_ref().map(|set| set as &dyn Sequences),
                config: &self.0,
                state_dir: &state_dir,
                identity,
                reporter,
                cancel,
            })
        })?;
        self.write(cx, &outcome, &train_set)
    }
}

impl Train {
    fn write(&self, cx: &mut TaskContext, outcome: &Outcome, train_set: &TokenSet) -> Result<()> {
        let trainable = outcome.lora.trainable_parameters();
        let (speed, memory) = (outcome.tokens_per_second(), peak_rss_bytes());
        let log = fs_err::read(cx.state_dir().join(LOG_FILE))?;

        let out = cx.output("adapter")?;
        outcome.lora.save_peft(&out.path, None)?;
        out.set_meta(json!({ "trainable_parameters": trainable, "steps": outcome.steps }));
        let adapter_bytes = fs_err::metadata(out.path.join("adapter_model.safetensors"))?.len();

        let out = cx.output("metrics")?;
        out.write(LOG_FILE, log)?;
        let mut metrics = json!({
            "train_loss": outcome.train_loss,
            "steps": outcome.steps,
            "tokens_seen": outcome.tokens_seen,
            "rows": train_set.rows(),
            "trainable_parameters": trainable,
            "train_seconds": outcome.seconds,
            "tokens_per_second": speed,
            "peak_rss_bytes": memory,
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
        cx.summary("adapter", format!("{:.1} MB", adapter_bytes as f64 / 1e6));
        cx.summary("peak memory", format!("{:.2} GB", memory as f64 / 1e9));
        if outcome.resumed_from > 0 {
            let (from, all) = (outcome.resumed_from, outcome.steps);
            cx.report(format!("resumed after step {from} of {all}"));
        }
        Ok(())
    }
}
