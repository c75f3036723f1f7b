//! Before a run: what it trains, how much memory it will hold at most, and whether that fits.
//!
//! The estimate adds up what the code keeps; nothing is fitted to measurements but the allowance
//! for the process itself. `docs/lora.md` holds estimates against measured peaks.

use std::fmt::Write as _;

use lora_flow_core::{Error, Result};
use lora_flow_data::group_digits;
use lora_flow_model::config::ModelConfig;
use lora_flow_model::keep::{Checkpoint, Kept};
use lora_flow_model::lora::Lora;

use crate::config::{Method, TrainConfig};
use crate::sequences::Sequences;

/// Program, threads and their stacks, tokenized rows in the page cache, fragments of the heap.
const PROCESS: u64 = 36 << 20;
/// Rows and columns of the tile of logits.
const LOGITS: (u64, u64) = (1024, 1024);
/// Rows of logits where the head is trained.
const HEAD_ROWS: u64 = 256;
const F32: u64 = 4;

/// What decides the memory of a run.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Most tokens in one pass.
    pub tokens: u64,
    /// Bytes of a weight in memory.
    pub weight_bytes: u64,
    /// Parameters of the base.
    pub base: u64,
    /// Parameters that are trained.
    pub trainable: u64,
    /// Σ r over the modules of one layer, at most.
    pub ranks: u64,
    /// Layers from the lowest that is trained up; those below keep nothing.
    pub layers: u64,
    /// Whether a row of the training has a copy of the best parameters.
    pub keeps_best: bool,
}

/// Bytes by purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// The base's weights; none in full fine-tuning, where they are what is trained.
    pub weights: u64,
    /// What is trained: the tensors and the optimizer's copy.
    pub trained: u64,
    /// Gradients.
    pub gradients: u64,
    /// The two moments of AdamW.
    pub optimizer: u64,
    /// What the forward keeps for the backward.
    pub activations: u64,
    /// What one layer, the loss or an update needs for a moment.
    pub transient: u64,
}

impl Memory {
    /// All of it, the process included.
    pub fn total(&self) -> u64 {
        PROCESS
            + self.weights
            + self.trained
            + self.gradients
            + self.optimizer
            + self.activations
            + self.transient
    }
}

impl Shape {
    /// The shape of a run.
    pub fn new(
        model: &ModelConfig,
        weight_bytes: u64,
        lora: &Lora,
        train: &dyn Sequences,
        config: &TrainConfig,
        keeps_best: bool,
    ) -> Self {
        // The longest rows may well meet in one batch.
        let mut lengths: Vec<u64> =
            (0..train.len()).map(|i| train.row(i).input_ids.len() as u64).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        let tokens = lengths.iter().take(config.per_device_train_batch_size).sum();
        let (ranks, layers) = match config.method {
            Method::Full => (0, model.num_hidden_layers),
            Method::Lora => adapted(model, lora),
        };
        Self {
            tokens,
            weight_bytes,
            base: model.parameters() as u64,
            trainable: lora.trainable_parameters() as u64,
            ranks: ranks as u64,
            layers: layers as u64,
            keeps_best,
        }
    }

    /// What a run of this shape holds at most.
    pub fn memory(&self, model: &ModelConfig, config: &TrainConfig) -> Memory {
        let n = self.tokens;
        let (h, f) = (model.hidden_size as u64, model.intermediate_size as u64);
        let policy = match config.gradient_checkpointing {
            true => Checkpoint::Full,
            false => Checkpoint::Auto,
        };
        let (ranks, layers) = (self.ranks as usize, self.layers as usize);
        let kept = Kept::of(model, policy, self.weight_bytes as usize, n as usize, ranks, layers);
        // The widest moment of a layer's backward: the gradients of gate, up and their product,
        // that product, both streams and the normalised input.
        let backward = n * (4 * f + 5 * h) * F32;
        let vocab = model.vocab_size as u64;
        let full = config.method == Method::Full;
        let loss = if full {
            // Logits, their gradient, and the head's gradient as a tensor and as numbers.
            3 * HEAD_ROWS.min(n) * vocab * F32 + 2 * vocab * h * F32 + 4 * n * h * F32
        } else {
            LOGITS.0.min(n) * LOGITS.1.min(vocab) * F32 + 5 * n * h * F32
        };
        let copies = if self.keeps_best { 3 } else { 2 };
        let largest = if full { vocab * h } else { 0 };
        Memory {
            weights: if full { 0 } else { self.base * self.weight_bytes },
            trained: copies * self.trainable * F32,
            gradients: self.trainable * F32,
            optimizer: 2 * self.trainable * F32,
            activations: kept.after_forward,
            transient: (kept.most - kept.after_forward + backward).max(loss).max(2 * largest * F32),
        }
    }
}

/// Σ r of the layer that has most, and the layers from the lowest with a module up.
fn adapted(model: &ModelConfig, lora: &Lora) -> (usize, usize) {
    let mut ranks = vec![0; model.num_hidden_layers];
    for module in &lora.modules {
        let layer = module.path.strip_prefix("model.layers.").and_then(|p| p.split('.').next());
        if let Some(rank) = layer.and_then(|l| ranks.get_mut(l.parse::<usize>().ok()?)) {
            *rank += module.r;
        }
    }
    let lowest = ranks.iter().position(|r| *r > 0).unwrap_or(0);
    (ranks.iter().copied().max().unwrap_or(0), ranks.len() - lowest)
}

/// A table of the estimate.
pub fn describe(memory: &Memory, shape: &Shape) -> String {
    let mut out = format!(
        "trainable parameters {} of {}; at most {} tokens in one pass\n",
        group_digits(shape.trainable),
        group_digits(shape.base.max(shape.trainable)),
        group_digits(shape.tokens)
    );
    let gb = |bytes: u64| format!("{:.3} GB", bytes as f64 / 1e9);
    for (name, bytes) in [
        ("weights", memory.weights),
        ("trained", memory.trained),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", memory.activations),
        ("for a moment", memory.transient),
        ("in all", memory.total()),
    ] {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{name:<14} {:>10}", gb(bytes));
    }
    out
}

/// Refuses a run that needs more than `available` bytes, and says what each knob would change.
///
/// # Errors
/// When it does not fit.
pub fn check(
    shape: &Shape,
    model: &ModelConfig,
    config: &TrainConfig,
    available: u64,
) -> Result<()> {
    let needed = shape.memory(model, config).total();
    if needed <= available {
        return Ok(());
    }
    let gb = |bytes: u64| format!("{:.2} GB", bytes as f64 / 1e9);
    let mut knobs = Vec::new();
    let mut knob = |name: String, shape: Shape, config: &TrainConfig| {
        let with = shape.memory(model, config).total();
        if with < needed {
            knobs.push(format!("{name} ({})", gb(with)));
        }
    };
    let batch = config.per_device_train_batch_size;
    if !config.gradient_checkpointing {
        let other = TrainConfig { gradient_checkpointing: true, ..config.clone() };
        knob("`gradient_checkpointing: true`".into(), *shape, &other);
    }
    if batch > 1 {
        let one = Shape { tokens: shape.tokens.div_ceil(batch as u64), ..*shape };
        let name = format!(
            "`per_device_train_batch_size: 1` with `gradient_accumulation_steps: {}`",
            batch * config.gradient_accumulation_steps
        );
        knob(name, one, config);
    }
    let half = Shape { tokens: shape.tokens.div_ceil(2), ..*shape };
    knob("half the `max_length` of `tokenize`".into(), half, config);
    if config.method == Method::Full {
        let other = TrainConfig { method: Method::Lora, ..config.clone() };
        let lora = Shape { trainable: shape.base / 100, ..*shape };
        knob("`method: lora`".into(), lora, &other);
    } else {
        if shape.weight_bytes > 2 {
            let half = Shape { weight_bytes: 2, ..*shape };
            knob("`dtype: bfloat16` of `model`".into(), half, config);
        }
        let smaller = Shape { trainable: shape.trainable / 2, ranks: shape.ranks / 2, ..*shape };
        knob("half the rank `r`".into(), smaller, config);
    }
    Err(Error::new(format!(
        "training would need about {}, and {} are available",
        gb(needed),
        gb(available)
    ))
    .with_hint(format!("what would help, and what it would leave: {}", knobs.join("; "))))
}

/// Floating-point operations of a whole run: 2 per weight and token for a product, once forward,
/// once for the input's gradient, once more for the weights' in full fine-tuning and, of the layers,
/// for the forward again with checkpointing.
pub fn operations(shape: &Shape, model: &ModelConfig, config: &TrainConfig, tokens: u64) -> f64 {
    let head = (model.vocab_size * model.hidden_size) as u64;
    let linear = shape.base - if model.tie_word_embeddings { 0 } else { head };
    let full = config.method == Method::Full;
    let passes = 2 + u64::from(full);
    let again = if config.gradient_checkpointing { linear.saturating_sub(head) } else { 0 };
    2.0 * ((passes * linear + again) * tokens) as f64
        + if full { 0.0 } else { 6.0 * (shape.trainable * tokens) as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> ModelConfig {
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "vocab_size": 49152, "tie_word_embeddings": true,
        });
        ModelConfig::from_hf(&json).unwrap().0
    }

    fn shape(tokens: u64, trainable: u64) -> Shape {
        let base = model().parameters() as u64;
        Shape {
            tokens,
            weight_bytes: 4,
            base,
            trainable,
            ranks: 112,
            layers: 30,
            keeps_best: false,
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_knobs_that_help() {
        let (model, config) = (model(), TrainConfig::default());
        let shape = shape(6000, 4_884_480);
        let needed = shape.memory(&model, &config).total();
        check(&shape, &model, &config, needed).unwrap();
        let error = check(&shape, &model, &config, needed / 2).unwrap_err();
        let hint = error.hint().unwrap();
        for knob in [
            "gradient_checkpointing: true",
            "per_device_train_batch_size: 1",
            "max_length",
            "bfloat16",
        ] {
            assert!(hint.contains(knob), "{knob}: {hint}");
        }
        let light = TrainConfig { gradient_checkpointing: true, ..config.clone() };
        let with = shape.memory(&model, &light);
        assert!(with.total() < needed, "the stream alone is less than what is kept by itself");
        let full = TrainConfig { method: Method::Full, ..config };
        let all = Shape { trainable: shape.base, ranks: 0, ..shape };
        assert!(all.memory(&model, &full).total() > shape.memory(&model, &full).total());
    }
}
