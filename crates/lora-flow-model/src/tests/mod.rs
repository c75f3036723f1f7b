//! Tests that need model files: tiny ones, written here.

mod combine;
mod config;
mod gguf;
mod merge;
mod peft;
mod safetensors;
mod tokenizer;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::quantized::gguf_file::Value as Gguf;
use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Tensor};
use lora_flow_core::{Artifact, ArtifactKind};

use crate::config::ModelConfig;
use crate::safetensors_file::{SafetensorsWriter, encode};

/// A `config.json` of a tiny model; `more` is merged in.
fn hf_config(more: serde_json::Value) -> serde_json::Value {
    let mut out = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64,
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 128, "tie_word_embeddings": true,
        "hidden_act": "silu", "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
    });
    for (key, value) in more.as_object().unwrap() {
        out[key] = value.clone();
    }
    out
}

fn config(more: serde_json::Value) -> ModelConfig {
    ModelConfig::from_hf(&hf_config(more)).unwrap().0
}

/// Pseudo-random values in −0.5..0.5, by tensor name.
fn values(name: &str, count: usize) -> Vec<f32> {
    let mut state = name.bytes().fold(17u64, |s, b| s.wrapping_mul(31).wrapping_add(b.into()));
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        })
        .collect()
}

fn artifact(kind: ArtifactKind, dir: &Path) -> Artifact {
    Artifact::from_dir(kind, dir).unwrap()
}

/// Writes `config.json` and `model.safetensors` of a model.
fn write_model(dir: &Path, config: &ModelConfig, dtype: DType) {
    let mut tensors = config.tensors();
    tensors.sort();
    write_safetensors(&dir.join("model.safetensors"), &tensors, dtype);
    std::fs::write(dir.join("config.json"), config.to_hf().to_string()).unwrap();
}

fn write_safetensors(path: &Path, tensors: &[(String, Vec<usize>)], dtype: DType) {
    let announced: Vec<_> = tensors.iter().map(|(n, s)| (n.clone(), dtype, s.clone())).collect();
    let mut writer = SafetensorsWriter::create(path, &announced).unwrap();
    for (name, shape) in tensors {
        let bytes = encode(&values(name, shape.iter().product()), dtype);
        writer.write(name, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

/// A GGUF file in the making.
struct GgufBuilder {
    metadata: BTreeMap<String, Gguf>,
    tensors: BTreeMap<String, QTensor>,
}

impl GgufBuilder {
    /// The tiny model of [`hf_config`] in GGUF's words. Rows of q and k are permuted as the
    /// converter does for `llama`; the weights are [`values`] of their Hugging Face names.
    fn llama(dtype: GgmlDType) -> Self {
        let config = config(serde_json::json!({}));
        let mut out = Self { metadata: BTreeMap::new(), tensors: BTreeMap::new() };
        for (key, value) in [
            ("general.architecture", Gguf::String("llama".into())),
            ("llama.block_count", Gguf::U32(2)),
            ("llama.context_length", Gguf::U32(128)),
            ("llama.embedding_length", Gguf::U32(32)),
            ("llama.feed_forward_length", Gguf::U32(64)),
            ("llama.attention.head_count", Gguf::U32(4)),
            ("llama.attention.head_count_kv", Gguf::U32(2)),
            ("llama.attention.layer_norm_rms_epsilon", Gguf::F32(1e-5)),
            ("llama.rope.dimension_count", Gguf::U32(8)),
            ("tokenizer.ggml.bos_token_id", Gguf::U32(1)),
            ("tokenizer.ggml.eos_token_id", Gguf::U32(2)),
        ] {
            out.metadata.insert(key.into(), value);
        }
        for (name, shape) in config.tensors() {
            let mut data = values(&name, shape.iter().product());
            let heads = if name.contains("q_proj") { 4 } else { 2 };
            if name.contains("q_proj") || name.contains("k_proj") {
                data = permute(&data, heads, shape[0], shape[1]);
            }
            let dtype = if shape.len() == 1 { GgmlDType::F32 } else { dtype };
            out.tensor(&gguf_name(&name), &data, &shape, dtype);
        }
        out
    }

    fn tensor(&mut self, name: &str, data: &[f32], shape: &[usize], dtype: GgmlDType) {
        let tensor = Tensor::from_slice(data, shape, &Device::Cpu).unwrap();
        self.tensors.insert(name.into(), QTensor::quantize(&tensor, dtype).unwrap());
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = std::io::Cursor::new(Vec::new());
        let metadata: Vec<_> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
        gguf_file::write(&mut out, &metadata, &tensors).unwrap();
        out.into_inner()
    }
}

/// As `convert_hf_to_gguf.py`: (head, half, i) → (head, i, half).
fn permute(data: &[f32], heads: usize, rows: usize, columns: usize) -> Vec<f32> {
    let half = rows / heads / 2;
    let mut out = Vec::new();
    for head in 0..heads {
        for i in 0..half {
            for h in 0..2 {
                let row = head * 2 * half + h * half + i;
                out.extend_from_slice(&data[row * columns..(row + 1) * columns]);
            }
        }
    }
    out
}

fn gguf_name(hf: &str) -> String {
    let mut out = hf.replace("model.layers.", "blk.");
    for (from, to) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        out = out.replace(from, to);
    }
    out
}
