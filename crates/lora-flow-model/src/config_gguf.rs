//! From GGUF metadata to [`ModelConfig`].

use candle_core::DType;
use lora_flow_core::Result;

use crate::config::{Architecture, HiddenAct, ModelConfig, RopeScaling};
use crate::gguf::GgufFile;

/// Metadata keys after the architecture's prefix that are read or say nothing about the
/// computation.
const KNOWN: &[&str] = &[
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scale_linear",
    "attention.causal",
    "expert_count",
    "expert_used_count",
    "tensor_data_layout",
];

impl ModelConfig {
    /// Reads the config from a GGUF file of architecture `llama`, `qwen2` or `qwen3`. The dtype
    /// is f32.
    ///
    /// # Errors
    /// When the architecture is unknown, a key is missing, or a key asks for a computation that
    /// is not supported.
    pub fn from_gguf(gguf: &GgufFile) -> Result<Self> {
        let name = gguf
            .string("general.architecture")?
            .ok_or_else(|| gguf.error("metadata `general.architecture` is missing"))?;
        let architecture = match name {
            "llama" => Architecture::Llama,
            "qwen2" => Architecture::Qwen2,
            "qwen3" => Architecture::Qwen3,
            other => {
                return Err(gguf
                    .error(format!("architecture `{other}` is not supported"))
                    .with_hint("supported are `llama`, `qwen2` and `qwen3`"));
            }
        };
        if let Some(kind) = gguf.string("general.type")?.filter(|t| *t != "model") {
            return Err(gguf.error(format!("it holds a `{kind}`, not a model")));
        }
        let keys = Keys { gguf, name };
        keys.refuse_unknown()?;

        let num_attention_heads = keys.required("attention.head_count")?;
        let hidden_size = keys.required("embedding_length")?;
        let head_dim = match keys.usize("attention.key_length")? {
            Some(d) => d,
            None if num_attention_heads > 0 => hidden_size / num_attention_heads,
            None => 0,
        };
        keys.must_equal("attention.value_length", head_dim)?;
        keys.must_equal("rope.dimension_count", head_dim)?;
        keys.must_equal("expert_count", 0)?;
        let rows = |tensor: &str| gguf.tensors().get(tensor).and_then(|t| t.shape.first().copied());
        let vocab_size = rows("token_embd.weight")
            .ok_or_else(|| gguf.error("tensor `token_embd.weight` is missing"))?;
        let rope_theta = keys.f64("rope.freq_base")?.unwrap_or(10_000.0);
        let token = |key: &str| -> Result<Option<u32>> {
            let id = gguf.integer(&format!("tokenizer.ggml.{key}_token_id"))?;
            Ok(id.and_then(|id| u32::try_from(id).ok()))
        };
        let has = |tensor: &str| gguf.tensors().contains_key(tensor);
        Self {
            architecture,
            vocab_size,
            hidden_size,
            intermediate_size: keys.required("feed_forward_length")?,
            num_hidden_layers: keys.required("block_count")?,
            num_attention_heads,
            num_key_value_heads: keys
                .usize("attention.head_count_kv")?
                .unwrap_or(num_attention_heads),
            head_dim,
            rms_norm_eps: keys.f64("attention.layer_norm_rms_epsilon")?.ok_or_else(|| {
                gguf.error(format!("metadata `{name}.attention.layer_norm_rms_epsilon` is missing"))
            })?,
            rope_theta,
            rope_scaling: keys.rope_scaling(rope_theta, head_dim)?,
            max_position_embeddings: keys.required("context_length")?,
            // GGUF has no word for it: a file without a head uses the embedding.
            tie_word_embeddings: !has("output.weight"),
            hidden_act: HiddenAct::Silu,
            qkv_bias: has("blk.0.attn_q.bias"),
            o_bias: has("blk.0.attn_output.bias"),
            mlp_bias: has("blk.0.ffn_gate.bias"),
            qk_norm: architecture == Architecture::Qwen3,
            sliding_window: None,
            dtype: DType::F32,
            bos_token_id: token("bos")?,
            eos_token_ids: token("eos")?.into_iter().collect(),
            pad_token_id: token("padding")?,
            initializer_range: 0.02,
        }
        .check()
        .map_err(|e| gguf.error(e))
    }
}

/// Metadata keys under the architecture's prefix.
struct Keys<'a> {
    gguf: &'a GgufFile,
    name: &'a str,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.name)
    }

    fn usize(&self, key: &str) -> Result<Option<usize>> {
        self.gguf.integer(&self.key(key))
    }

    fn required(&self, key: &str) -> Result<usize> {
        self.usize(key)?
            .ok_or_else(|| self.gguf.error(format!("metadata `{}` is missing", self.key(key))))
    }

    fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.gguf.float(&self.key(key))
    }

    fn must_equal(&self, key: &str, expected: usize) -> Result<()> {
        match self.usize(key)? {
            Some(v) if v != expected => Err(self.gguf.error(format!(
                "metadata `{}` is {v}; only {expected} is supported",
                self.key(key)
            ))),
            _ => Ok(()),
        }
    }

    fn refuse_unknown(&self) -> Result<()> {
        let prefix = self.key("");
        for key in self.gguf.keys().filter(|k| k.starts_with(&prefix)) {
            if !KNOWN.contains(&&key[prefix.len()..]) {
                return Err(self.gguf.error(format!(
                    "metadata `{key}` may change the computation and is not supported"
                )));
            }
        }
        Ok(())
    }

    /// Linear scaling stands in the metadata; Llama 3.1's stands there only as the table of
    /// divisors `rope_freqs.weight`, from which the published settings are recognised.
    fn rope_scaling(&self, theta: f64, head_dim: usize) -> Result<RopeScaling> {
        let factor = match self.f64("rope.scaling.factor")? {
            Some(f) => f,
            None => self.f64("rope.scale_linear")?.unwrap_or(1.0),
        };
        let kind = self.gguf.string(&self.key("rope.scaling.type"))?;
        let scaling = match kind {
            None | Some("none") if kind.is_some() || factor == 1.0 => RopeScaling::None,
            None | Some("linear") if factor.is_finite() && factor > 0.0 => {
                RopeScaling::Linear { factor }
            }
            other => {
                return Err(self.gguf.error(format!(
                    "rope scaling `{}` with factor {factor} is not supported",
                    other.unwrap_or("linear")
                )));
            }
        };
        if !self.gguf.tensors().contains_key("rope_freqs.weight") {
            return Ok(scaling);
        }
        let table = self.gguf.read_f32("rope_freqs.weight", &|i| i, false)?;
        let largest = table.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let candidate = RopeScaling::Llama3 {
            factor: f64::from(largest),
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let matches = scaling == RopeScaling::None
            && table.len() == head_dim / 2
            && largest.is_finite()
            && largest >= 1.0
            && table.iter().enumerate().all(|(i, found)| {
                let freq = theta.powf(-2.0 * i as f64 / head_dim as f64);
                let expected = candidate.divisor(freq);
                (f64::from(*found) / expected - 1.0).abs() < 1e-3
            });
        if !matches {
            return Err(self
                .gguf
                .error("tensor `rope_freqs.weight` is not the table of a known rope scaling"));
        }
        Ok(if largest == 1.0 { RopeScaling::None } else { candidate })
    }
}
