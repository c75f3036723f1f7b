//! `evaluate`: perplexity of a model on tokens, with its standard error.
//!
//! Every supervised token counts once, whatever the batches: results are independent of
//! `batch_size` and `max_tokens_per_batch` to rounding. Errors treat documents as the independent
//! units ([`lora_flow_train::mean_loss`]); the pieces of a text that `tokenize` split count as
//! documents, which makes the error of long texts a little too small.

use std::sync::Arc;

use arrow_array::{ArrayRef, Float64Array, RecordBatch, StringArray, UInt32Array};
use lora_flow_core::{
    Artifact, ArtifactKind, Digest, Error, Ports, Problem, Result, ResultExt, Task, TaskContext,
};
use lora_flow_data::TokenSet;
use lora_flow_model::config::ModelConfig;
use lora_flow_model::decoder::Decoder;
use lora_flow_model::lora::Lora;
use lora_flow_train::{
    Budget, DocumentLoss, MeanLoss, document_losses, mean_loss, open_device, with_threads,
};
use parquet::arrow::ArrowWriter;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Parameters of `evaluate`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Evaluate {
    /// Most tokens in one pass through the model; a longer row goes alone.
    #[serde(default = "default_tokens")]
    pub max_tokens_per_batch: usize,
    /// Most rows in one pass; as many as fit if left out.
    #[serde(default)]
    pub batch_size: Option<usize>,
    /// Use only this many rows, the first ones.
    #[serde(default)]
    pub limit: Option<usize>,
}

fn default_tokens() -> usize {
    2048
}

impl Task for Evaluate {
    fn inputs(&self) -> Ports {
        Ports::none()
            .required("model", ArtifactKind::Model, "the model")
            .optional("adapter", ArtifactKind::Adapter, "an adapter on top of it")
            .required("eval", ArtifactKind::Tokens, "what to evaluate on")
    }

    fn outputs(&self) -> Ports {
        Ports::none().required(
            "metrics",
            ArtifactKind::Metrics,
            "perplexity, loss and their errors; `samples.parquet` has each document",
        )
    }

    fn validate(&self) -> Vec<Problem> {
        let fields = [
            ("max_tokens_per_batch", self.max_tokens_per_batch),
            ("batch_size", self.batch_size.unwrap_or(1)),
            ("limit", self.limit.unwrap_or(1)),
        ];
        fields
            .iter()
            .filter(|(_, value)| *value == 0)
            .map(|(field, _)| {
                Problem::at(format!("/{field}"), format!("`{field}` is 0, it must be at least 1"))
            })
            .collect()
    }

    fn uses_device(&self) -> bool {
        true
    }

    fn run(&self, cx: &mut TaskContext) -> Result<()> {
        let model = cx.input("model")?.clone();
        let adapter = cx.optional("adapter").cloned();
        let tokens = cx.input("eval")?.clone();
        let set = TokenSet::open(&tokens).context("input `eval`")?;
        set.check_tokenizer(&model).context("input `eval`")?;
        let rows = self.limit.unwrap_or(usize::MAX).min(set.rows());

        let device = open_device(cx.device())?;
        let budget = Budget {
            rows: self.batch_size.unwrap_or(usize::MAX),
            tokens: self.max_tokens_per_batch,
        };
        let context = &*cx;
        let losses = with_threads(cx.threads(), || {
            let dtype = ModelConfig::open(&model)?.dtype;
            let decoder = Decoder::open(&model, &device, dtype).context("input `model`")?;
            let lora = load_adapter(adapter.as_ref(), &decoder)?;
            context.progress(0, Some(rows as u64), "row", "");
            document_losses(&decoder, lora.as_ref(), &set, rows, budget, |done| {
                context.progress(done as u64, Some(rows as u64), "row", "");
                context.check_cancelled()
            })
        })?;
        let loss = mean_loss(&losses).ok_or_else(|| {
            Error::new(format!("none of the {rows} rows has a supervised token"))
                .with_hint("look at the report of the `tokenize` task: what does its mask cover?")
        })?;

        let metrics = self.metrics(&set, &loss, rows);
        let data = Digest::of_json(&json!({ "tokens": tokens.digest, "rows": rows }));
        let out = cx.output("metrics")?;
        let mut document = metrics.clone();
        document.insert(
            "meta".into(),
            json!({
                "data": data,
                "tokens": tokens.digest,
                "model": model.digest,
                "adapter": adapter.as_ref().map(|a| a.digest),
                "tokenizer": set.info.tokenizer_digest,
                "metrics": paired_metrics(),
            }),
        );
        out.write_json("metrics.json", &document)?;
        write_samples(&out.file("samples.parquet")?, &set, &losses)?;

        let value = |name: &str| metrics.get(name).and_then(Value::as_f64);
        let with_error = |name: &str| {
            let error = value(&format!("{name}_stderr"));
            let number = value(name).map_or("not finite".to_owned(), |x| format!("{x:.2}"));
            error.map_or(number.clone(), |e| format!("{number} ± {e:.2}"))
        };
        cx.summary("perplexity", with_error("perplexity"));
        cx.summary("tokens", loss.tokens.to_string());
        if loss.standard_error.is_none() {
            cx.report("a single document: there is no standard error");
        }
        Ok(())
    }
}

impl Evaluate {
    /// The numbers of `metrics.json`; what is not finite is null.
    fn metrics(&self, set: &TokenSet, loss: &MeanLoss, rows: usize) -> Map<String, Value> {
        let MeanLoss { mean, standard_error, tokens, documents } = *loss;
        let perplexity = mean.exp();
        let mut out = Map::new();
        let mut put = |name: &str, value: Value| {
            out.insert(name.to_owned(), value);
        };
        put("perplexity", json!(perplexity));
        // Delta method: d exp(m) = exp(m) dm.
        put("perplexity_stderr", json!(standard_error.map(|e| perplexity * e)));
        put("loss", json!(mean));
        put("loss_stderr", json!(standard_error));
        put("bits_per_token", json!(mean / std::f64::consts::LN_2));
        put("tokens", json!(tokens));
        put("documents", json!(documents));
        put("rows", json!(rows));
        let total = mean * tokens as f64;
        if covers_all_text(set, tokens, rows) {
            let (bytes, words) = (set.info.text_bytes as f64, set.info.text_words as f64);
            put("bits_per_byte", json!(total / bytes / std::f64::consts::LN_2));
            put("byte_perplexity", json!((total / bytes).exp()));
            if words > 0.0 {
                put("word_perplexity", json!((total / words).exp()));
            }
        }
        out
    }
}

/// What a gate's paired tests have to know of the metrics that each document adds to.
fn paired_metrics() -> Value {
    let of = |statistic: &str| {
        let columns = ["loglikelihood", "tokens"];
        json!({ "statistic": statistic, "higher_is_better": false, "columns": columns })
    };
    json!({
        "perplexity": of("weighted_perplexity"),
        "loss": of("weighted_loss"),
        "bits_per_token": of("bits_per_byte"),
    })
}

/// Whether the scored tokens are those of all the text that `tokens.json` counts, but for the first
/// of each document, which nothing predicts. Otherwise a loss per byte would be too low.
fn covers_all_text(set: &TokenSet, scored: usize, rows: usize) -> bool {
    let info = &set.info;
    info.text_bytes > 0
        && rows == set.rows()
        && scored as u64 + info.documents == set.tokens() as u64
}

fn load_adapter(adapter: Option<&Artifact>, decoder: &Decoder) -> Result<Option<Lora>> {
    let load =
        |artifact| Lora::load_peft(artifact, &decoder.linear_modules()).context("input `adapter`");
    adapter.map(load).transpose()
}

/// `samples.parquet`: one line per document, with a digest of its tokens to pair runs by.
fn write_samples(path: &std::path::Path, set: &TokenSet, losses: &[DocumentLoss]) -> Result<()> {
    let number = |f: fn(&DocumentLoss) -> usize| -> ArrayRef {
        Arc::new(losses.iter().map(|l| u32::try_from(f(l)).ok()).collect::<UInt32Array>())
    };
    let digests: StringArray =
        losses.iter().map(|l| Some(document_digest(set, l).to_string())).collect();
    let nll: Float64Array = losses.iter().map(|l| Some(l.nll)).collect();
    let ll: Float64Array = losses.iter().map(|l| Some(-l.nll)).collect();
    let batch = RecordBatch::try_from_iter([
        ("row", number(|l| l.row)),
        ("doc", number(|l| l.doc)),
        ("digest", Arc::new(digests) as ArrayRef),
        ("tokens", number(|l| l.tokens)),
        ("nll", Arc::new(nll) as ArrayRef),
        ("loglikelihood", Arc::new(ll) as ArrayRef),
    ])
    .context("cannot make `samples.parquet`")?;
    let file = fs_err::File::create(path)?;
    let mut writer =
        ArrowWriter::try_new(file, batch.schema(), None).context("cannot write samples")?;
    writer.write(&batch).context("cannot write samples")?;
    writer.close().context("cannot write samples")?;
    Ok(())
}

/// Digest of a document's tokens and of which of them are targets.
fn document_digest(set: &TokenSet, loss: &DocumentLoss) -> Digest {
    let mut bytes = Vec::new();
    if let Some(document) = set.row(loss.row).documents().nth(loss.doc) {
        bytes.extend(document.input_ids.iter().flat_map(|id| id.to_le_bytes()));
        bytes.extend(document.loss_mask.iter().map(|target| u8::from(*target)));
    }
    Digest::of_bytes(&bytes)
}
