//! A small project on disk for the tests of the binary: a tiny random Llama with a byte-level
//! tokenizer, a few rows of text, and a pipeline that uses every built-in task kind.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

pub const HIDDEN: usize = 32;
pub const LAYERS: usize = 2;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const FFN: usize = 64;
/// 256 bytes and two special tokens.
pub const VOCAB: usize = 258;

/// A temporary project folder.
pub struct Project {
    dir: tempfile::TempDir,
}

/// What a command printed and how it ended.
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Project {
    /// The whole project: `models/tiny`, `data/*.jsonl`, `pipeline.yaml`.
    pub fn new() -> Self {
        let project = Self::empty();
        write_model(&project.path("models/tiny"));
        project.write("data/docs.jsonl", documents(48));
        project.write("pipeline.yaml", PIPELINE);
        project
    }

    pub fn empty() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub fn root(&self) -> &Path {
        self.dir.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    /// Replaces text that must be there in a file.
    pub fn edit(&self, name: &str, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.path(name)).unwrap();
        assert!(text.contains(from), "`{from}` is not in {name}");
        self.write(name, text.replacen(from, to, 1));
    }

    /// The command, to be changed before it runs.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lora-flow"));
        command.args(args).current_dir(self.root());
        for variable in [
            "LORA_FLOW_CACHE_DIR",
            "LORA_FLOW_DEVICE",
            "LORA_FLOW_LOG",
            "LORA_FLOW_REMOTE",
            "LORA_FLOW_REMOTE_READ_ONLY",
            "CLICOLOR_FORCE",
        ] {
            command.env_remove(variable);
        }
        command.env("NO_COLOR", "1");
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        self.command(args).output().unwrap().into()
    }

    /// Runs a line of shell in the project.
    pub fn shell(&self, script: &str) -> Ran {
        let mut command = Command::new("sh");
        command.args(["-c", script]).current_dir(self.root()).output().unwrap().into()
    }

    /// Runs the command and insists on its exit code.
    pub fn expect(&self, code: i32, args: &[&str]) -> Ran {
        let ran = self.run(args);
        assert_eq!(ran.code, code, "{args:?}\n{}\n{}", ran.stdout, ran.stderr);
        ran
    }

    /// `plan --json` as task → (state, reasons).
    pub fn plan(&self, args: &[&str]) -> BTreeMap<String, (String, Vec<String>)> {
        let mut all = vec!["plan", "pipeline.yaml", "--json"];
        all.extend(args);
        let ran = self.expect(0, &all);
        let tasks: Vec<Value> = serde_json::from_str(&ran.stdout).unwrap();
        tasks
            .into_iter()
            .map(|task| {
                let text = |key: &str| task[key].as_str().unwrap().to_owned();
                let reasons = task["reasons"].as_array().unwrap();
                let reasons =
                    reasons.iter().map(|r| r["text"].as_str().unwrap().to_owned()).collect();
                (text("task"), (text("state"), reasons))
            })
            .collect()
    }

    /// The last run's record.
    pub fn latest(&self) -> Value {
        serde_json::from_str(&self.expect(0, &["show", "latest", "--json"]).stdout).unwrap()
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

pub const PIPELINE: &str = r#"version: 1
name: tiny
params:
  r: 4
  learning_rate: 5.0e-3
  steps: 12
tasks:
  docs:
    uses: ingest
    with:
      files: data/docs.jsonl
      text: text
      split: { train: 0.75, eval: 0.25 }
  base:
    uses: model
    with: { source: models/tiny }
  train_tokens:
    uses: tokenize
    inputs: { dataset: docs.train, model: base }
    with: { format: text, max_length: 64, packing: true }
  eval_tokens:
    uses: tokenize
    inputs: { dataset: docs.eval, model: base }
    with: { format: text, max_length: 64 }
  adapter:
    uses: lora-inject
    inputs: { model: base }
    with:
      r: ${{ params.r }}
      lora_alpha: 8
      target_modules: all-linear
  train:
    uses: train
    inputs: { model: base, adapter: adapter, train: train_tokens }
    with:
      learning_rate: ${{ params.learning_rate }}
      max_steps: ${{ params.steps }}
      per_device_train_batch_size: 2
      save_steps: 2
  before:
    uses: evaluate
    inputs: { model: base, eval: eval_tokens }
  after:
    uses: evaluate
    inputs: { model: base, adapter: train.adapter, eval: eval_tokens }
  gate:
    uses: gate
    inputs: { candidate: after, baseline: before }
    with:
      require: [ "candidate.perplexity < baseline.perplexity" ]
  merged:
    uses: merge
    needs: [gate]
    inputs: { model: base, adapter: train.adapter }
    publish: out/merged
"#;

/// Rows of made-up text that a model can learn from quickly.
pub fn documents(rows: usize) -> String {
    const SUBJECTS: [&str; 4] = ["the scheduler", "a worker", "the cache", "one artifact"];
    const VERBS: [&str; 4] = ["waits for", "reads", "never drops", "hands on"];
    const OBJECTS: [&str; 3] = ["every key", "its inputs", "the manifest"];
    (0..rows)
        .map(|i| {
            let text: Vec<String> = (0..3)
                .map(|j| {
                    let n = i * 7 + j * 5;
                    format!("{} {} {}", SUBJECTS[n % 4], VERBS[(n / 4) % 4], OBJECTS[(n / 3) % 3])
                })
                .collect();
            json!({ "id": i, "text": format!("{i}: {}.", text.join(", ")) }).to_string() + "\n"
        })
        .collect()
}

/// Writes an HF folder of a tiny random Llama.
pub fn write_model(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    let write = |name: &str, value: &Value| {
        std::fs::write(dir.join(name), serde_json::to_string_pretty(value).unwrap()).unwrap();
    };
    write("config.json", &model_config());
    write("tokenizer.json", &tokenizer());
    write(
        "tokenizer_config.json",
        &json!({ "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>",
                 "pad_token": "<|pad|>", "add_bos_token": false }),
    );
    let tensors = model_tensors();
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, shape, data)| {
            (name, shape, data.iter().flat_map(|x| x.to_le_bytes()).collect())
        })
        .collect();
    let views: Vec<(&str, TensorView)> = bytes
        .iter()
        .map(|(n, s, b)| (n.as_str(), TensorView::new(Dtype::F32, s.clone(), b).unwrap()))
        .collect();
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

pub fn model_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "hidden_act": "silu", "attention_bias": false, "mlp_bias": false,
        "bos_token_id": null, "eos_token_id": 256, "pad_token_id": 257, "dtype": "float32"
    })
}

/// Names, shapes and values of the tiny model's tensors.
pub fn model_tensors() -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let kv = HIDDEN / HEADS * KV_HEADS;
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN])];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![kv, HIDDEN]),
            ("self_attn.v_proj", vec![kv, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("mlp.gate_proj", vec![FFN, HIDDEN]),
            ("mlp.up_proj", vec![FFN, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, FFN]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    shapes.push(("model.norm.weight".to_owned(), vec![HIDDEN]));
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    shapes
        .into_iter()
        .map(|(name, shape)| {
            let norm = shape.len() == 1;
            let data = (0..shape.iter().product())
                .map(|_| {
                    state =
                        state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let uniform = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
                    if norm { 1.0 + 0.1 * uniform } else { 0.4 * uniform }
                })
                .collect();
            (name, shape, data)
        })
        .collect()
}

/// A byte-level tokenizer without merges: one token a byte, plus `<|end|>` and `<|pad|>`.
pub fn tokenizer() -> Value {
    // GPT-2's printable stand-ins for bytes: printable Latin-1 as it is, the rest from U+0100 up.
    let mut next = 256u32;
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255u32 {
        let printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let code = if printable {
            byte
        } else {
            next += 1;
            next - 1
        };
        vocab.insert(char::from_u32(code).unwrap().to_string(), byte.into());
    }
    let special = |id: usize, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true })
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(256, "<|end|>"), special(257, "<|pad|>")],
        "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                   "ignore_merges": false, "vocab": vocab, "merges": [] }
    })
}
