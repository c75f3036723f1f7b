//! The normalised model config: one struct for all architectures, read from a Hugging Face
//! `config.json` ([`crate::config_hf`]) or from GGUF metadata ([`crate::config_gguf`]), written
//! back as `config.json`.

use candle_core::DType;
use lora_flow_core::{Artifact, Error, Result, ResultExt};
use serde_json::{Map, Value, json};

use crate::gguf::GgufFile;
use crate::weights::GGUF;

/// The architectures that the decoder computes. They differ only in what the fields of
/// [`ModelConfig`] say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// `LlamaForCausalLM`: Llama 1–3, SmolLM, SmolLM2, TinyLlama …
    Llama,
    /// `MistralForCausalLM`: Llama with an optional sliding window.
    Mistral,
    /// `Qwen2ForCausalLM`: biases on q, k and v.
    Qwen2,
    /// `Qwen3ForCausalLM`: RMS norm on each head of q and k.
    Qwen3,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// Name under `architectures` of a `config.json`.
    pub fn hf_name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// `model_type` of a `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// How the rotary frequencies are changed for contexts longer than those of pretraining.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// Context extension.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// Context extension.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided by `factor`.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of pretraining.
        original_max_position_embeddings: usize,
    },
}

/// Activation of the gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HiddenAct {
    /// x·σ(x).
    Silu,
    /// GELU by the error function.
    Gelu,
    /// GELU by the tanh approximation.
    GeluTanh,
}

impl HiddenAct {
    /// Name in a `config.json`.
    pub fn hf_name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu_pytorch_tanh",
        }
    }
}

/// A linear layer that an adapter can attach to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleInfo {
    /// Path as in Hugging Face's model: `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Columns of the weight.
    pub in_features: usize,
    /// Rows of the weight.
    pub out_features: usize,
}

/// Everything that decides what the decoder computes.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Family.
    pub architecture: Architecture,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// ε under the root of the RMS norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Change of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// The output head is the embedding; there is no `lm_head.weight`.
    pub tie_word_embeddings: bool,
    /// Activation of the MLP.
    pub hidden_act: HiddenAct,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub o_bias: bool,
    /// Biases on the projections of the MLP.
    pub mlp_bias: bool,
    /// RMS norm of each head of q and k (`self_attn.q_norm.weight`, `k_norm`, [head_dim]).
    pub qk_norm: bool,
    /// A position sees itself and this many − 1 before it; `None` sees all.
    pub sliding_window: Option<usize>,
    /// Dtype to load the weights in: `F32` or `BF16`.
    pub dtype: DType,
    /// Beginning-of-sequence token.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence tokens; generation stops at any of them.
    pub eos_token_ids: Vec<u32>,
    /// Padding token.
    pub pad_token_id: Option<u32>,
    /// Standard deviation of the initial weights, carried along.
    pub initializer_range: f64,
}

impl ModelConfig {
    /// Reads the `config.json` of a Model artifact, or where it has none what its GGUF file says.
    ///
    /// # Errors
    /// When both are missing, or [`Self::from_hf`] or [`Self::from_gguf`] refuses what is there.
    pub fn open(model: &Artifact) -> Result<Self> {
        if let (None, Some(gguf)) = (model.get("config.json"), model.get(GGUF)) {
            return Self::from_gguf(&GgufFile::open(gguf)?);
        }
        let text = fs_err::read_to_string(model.file("config.json")?)?;
        let json: Value = serde_json::from_str(&text).context("cannot read `config.json`")?;
        Ok(Self::from_hf(&json)?.0)
    }

    /// The linear layers of the decoder in model order (`q, k, v, o, gate, up, down` of layer 0,
    /// then layer 1, …), without `lm_head`.
    pub fn linear_modules(&self) -> Vec<ModuleInfo> {
        let (h, f) = (self.hidden_size, self.intermediate_size);
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        let shapes = [
            ("self_attn.q_proj", h, q),
            ("self_attn.k_proj", h, kv),
            ("self_attn.v_proj", h, kv),
            ("self_attn.o_proj", q, h),
            ("mlp.gate_proj", h, f),
            ("mlp.up_proj", h, f),
            ("mlp.down_proj", f, h),
        ];
        (0..self.num_hidden_layers)
            .flat_map(|layer| {
                shapes.map(|(name, in_features, out_features)| ModuleInfo {
                    path: format!("model.layers.{layer}.{name}"),
                    in_features,
                    out_features,
                })
            })
            .collect()
    }

    /// Every tensor of the model, name and shape, in model order.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let h = self.hidden_size;
        let mut out = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, h])];
        let modules = self.linear_modules();
        for (layer, linears) in modules.chunks(7).enumerate() {
            let prefix = format!("model.layers.{layer}");
            out.push((format!("{prefix}.input_layernorm.weight"), vec![h]));
            for module in linears {
                let shape = vec![module.out_features, module.in_features];
                out.push((format!("{}.weight", module.path), shape));
                let last = module.path.rsplit('.').next().unwrap_or_default();
                let biased = match last {
                    "q_proj" | "k_proj" | "v_proj" => self.qkv_bias,
                    "o_proj" => self.o_bias,
                    _ => self.mlp_bias,
                };
                if biased {
                    out.push((format!("{}.bias", module.path), vec![module.out_features]));
                }
            }
            if self.qk_norm {
                for norm in ["q_norm", "k_norm"] {
                    let name = format!("{prefix}.self_attn.{norm}.weight");
                    out.push((name, vec![self.head_dim]));
                }
            }
            out.push((format!("{prefix}.post_attention_layernorm.weight"), vec![h]));
        }
        out.push(("model.norm.weight".to_owned(), vec![h]));
        if !self.tie_word_embeddings {
            out.push(("lm_head.weight".to_owned(), vec![self.vocab_size, h]));
        }
        out
    }

    /// Number of parameters, the tied head not counted twice.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    /// Rotary frequencies θ^(−2i/d), i in 0..d/2, with [`RopeScaling`] applied: radians per
    /// position.
    pub fn inv_freq(&self) -> Vec<f32> {
        (0..self.head_dim / 2)
            .map(|i| {
                let freq = self.rope_theta.powf(-2.0 * i as f64 / self.head_dim as f64);
                (freq / self.rope_scaling.divisor(freq)) as f32
            })
            .collect()
    }

    /// What must hold whatever the architecture.
    ///
    /// # Errors
    /// Names the first field that makes no sense.
    pub(crate) fn check(self) -> Result<Self> {
        /// Larger values are a damaged or hostile file, and would overflow products.
        const LIMIT: usize = 1 << 28;
        for (name, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            if value == 0 || value > LIMIT {
                return Err(Error::new(format!("`{name}` of the model config is {value}")));
            }
        }
        if self.num_hidden_layers > 10_000 {
            return Err(Error::new(format!(
                "`num_hidden_layers` of the model config is {}",
                self.num_hidden_layers
            )));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(Error::new(format!(
                "`num_attention_heads` ({}) is no multiple of `num_key_value_heads` ({})",
                self.num_attention_heads, self.num_key_value_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::new(format!("`head_dim` ({}) is odd", self.head_dim)));
        }
        for (name, value) in [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)]
        {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::new(format!("`{name}` of the model config is {value}")));
            }
        }
        Ok(self)
    }

    /// The normalised `config.json`: Hugging Face's names, every field that the computation
    /// depends on explicit, so that any reader gets the same model. Rotary settings stand there
    /// both as `rope_theta`/`rope_scaling` and as the newer `rope_parameters`.
    pub fn to_hf(&self) -> Value {
        let mut out = Map::new();
        let mut put = |key: &str, value: Value| {
            out.insert(key.to_owned(), value);
        };
        put("architectures", json!([self.architecture.hf_name()]));
        put("model_type", json!(self.architecture.model_type()));
        put("vocab_size", json!(self.vocab_size));
        put("hidden_size", json!(self.hidden_size));
        put("intermediate_size", json!(self.intermediate_size));
        put("num_hidden_layers", json!(self.num_hidden_layers));
        put("num_attention_heads", json!(self.num_attention_heads));
        put("num_key_value_heads", json!(self.num_key_value_heads));
        put("head_dim", json!(self.head_dim));
        put("rms_norm_eps", json!(self.rms_norm_eps));
        put("rope_theta", json!(self.rope_theta));
        let scaling = self.rope_scaling.to_hf();
        let mut parameters = scaling.as_object().cloned().unwrap_or_default();
        parameters.entry("rope_type").or_insert_with(|| json!("default"));
        parameters.insert("rope_theta".to_owned(), json!(self.rope_theta));
        put("rope_scaling", scaling);
        put("rope_parameters", Value::Object(parameters));
        put("max_position_embeddings", json!(self.max_position_embeddings));
        put("tie_word_embeddings", json!(self.tie_word_embeddings));
        put("hidden_act", json!(self.hidden_act.hf_name()));
        put("attention_dropout", json!(0.0));
        match self.architecture {
            Architecture::Llama => {
                put("attention_bias", json!(self.qkv_bias));
                put("mlp_bias", json!(self.mlp_bias));
            }
            Architecture::Mistral => put("sliding_window", json!(self.sliding_window)),
            Architecture::Qwen2 | Architecture::Qwen3 => {
                put("use_sliding_window", json!(self.sliding_window.is_some()));
                put("sliding_window", json!(self.sliding_window));
                // Layers from this one on use the window.
                let first = self.sliding_window.map_or(self.num_hidden_layers, |_| 0);
                put("max_window_layers", json!(first));
                if self.architecture == Architecture::Qwen3 {
                    put("attention_bias", json!(self.qkv_bias));
                }
            }
        }
        put("initializer_range", json!(self.initializer_range));
        put("dtype", json!(dtype_name(self.dtype)));
        put("bos_token_id", json!(self.bos_token_id));
        put(
            "eos_token_id",
            match self.eos_token_ids.as_slice() {
                [] => Value::Null,
                [one] => json!(one),
                many => json!(many),
            },
        );
        put("pad_token_id", json!(self.pad_token_id));
        put("use_cache", json!(true));
        Value::Object(out)
    }
}

impl RopeScaling {
    /// What a frequency is divided by (Llama 3.1's rule; see the fields).
    pub(crate) fn divisor(&self, freq: f64) -> f64 {
        match *self {
            Self::None => 1.0,
            Self::Linear { factor } => factor,
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let original = original_max_position_embeddings as f64;
                let wavelength = 2.0 * std::f64::consts::PI / freq;
                if wavelength < original / high_freq_factor {
                    1.0
                } else if wavelength > original / low_freq_factor {
                    factor
                } else {
                    let smooth = (original / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    1.0 / ((1.0 - smooth) / factor + smooth)
                }
            }
        }
    }

    fn to_hf(self) -> Value {
        match self {
            Self::None => Value::Null,
            Self::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            }),
        }
    }
}

/// Name of a dtype in a `config.json`.
pub fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
}
