//! From Hugging Face's `config.json` to [`ModelConfig`].
//!
//! A field that changes what the model computes and is not understood is an error that names it;
//! a field that none of the supported architectures reads is ignored and reported.

use candle_core::DType;
use lora_flow_core::{Error, Result};
use serde_json::{Map, Value};

use crate::config::{Architecture, HiddenAct, ModelConfig, RopeScaling};

/// Fields that say nothing about the computation of a forward pass.
const HARMLESS: &[&str] = &[
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "generation_config",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "id2label",
    "initializer_range",
    "intermediate_size",
    "is_llama_config",
    "label2id",
    "max_position_embeddings",
    "max_window_layers",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "return_dict",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sep_token_id",
    "sliding_window",
    "tie_word_embeddings",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "use_cache",
    "vocab_size",
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "layer_types",
    "unsloth_fixed",
    "unsloth_version",
    "transformers.js_config",
    "problem_type",
    "task_specific_params",
    "chunk_size_feed_forward",
];

/// Fields that change the computation, each with the only value under which it does not.
fn neutral(field: &str) -> Option<Value> {
    Some(match field {
        "attention_dropout" | "hidden_dropout" | "embd_pdrop" | "resid_pdrop" => Value::from(0.0),
        "pretraining_tp"
        | "partial_rotary_factor"
        | "rotary_pct"
        | "embedding_multiplier"
        | "residual_multiplier"
        | "logits_scaling"
        | "logit_scale"
        | "scale_emb" => Value::from(1.0),
        "rope_interleaved"
        | "use_qk_norm"
        | "use_mrope"
        | "is_encoder_decoder"
        | "add_cross_attention"
        | "scale_attn_by_inverse_layer_idx" => Value::from(false),
        "quantization_config"
        | "attn_logit_softcapping"
        | "final_logit_softcapping"
        | "attention_multiplier"
        | "num_experts"
        | "num_local_experts"
        | "attention_chunk_size"
        | "no_rope_layers"
        | "pruned_heads"
        | "scale_depth"
        | "cross_attention_hidden_size" => Value::Null,
        _ => return None,
    })
}

impl ModelConfig {
    /// Reads a `config.json`. Returns the config and the names of the fields that were ignored
    /// because no supported architecture reads them.
    ///
    /// # Errors
    /// When the architecture is unknown, a needed field is missing, or a field asks for a
    /// computation that is not supported.
    pub fn from_hf(json: &Value) -> Result<(Self, Vec<String>)> {
        let Value::Object(map) = json else {
            return Err(Error::new("`config.json` holds no JSON object"));
        };
        let fields = Fields(map);
        let architecture = fields.architecture()?;
        let ignored = fields.check_others()?;

        let hidden_size = fields.required("hidden_size")?;
        let num_attention_heads = fields.required("num_attention_heads")?;
        let num_hidden_layers = fields.required("num_hidden_layers")?;
        let num_key_value_heads = match fields.usize("num_key_value_heads")? {
            Some(n) => n,
            None if architecture == Architecture::Llama => num_attention_heads,
            None => fields.required("num_key_value_heads")?,
        };
        let head_dim = match fields.usize("head_dim")? {
            Some(d) => d,
            // The class's default, not derived from the width.
            None if architecture == Architecture::Qwen3 => 128,
            None if num_attention_heads > 0 && hidden_size % num_attention_heads == 0 => {
                hidden_size / num_attention_heads
            }
            None => {
                return Err(Error::new(format!(
                    "`hidden_size` ({hidden_size}) is no multiple of `num_attention_heads` \
                     ({num_attention_heads}) and `head_dim` is not given"
                )));
            }
        };
        let attention_bias = fields.bool("attention_bias")?.unwrap_or(false);
        let (qkv_bias, o_bias, mlp_bias, qk_norm) = match architecture {
            Architecture::Llama => {
                let mlp_bias = fields.bool("mlp_bias")?.unwrap_or(false);
                (attention_bias, attention_bias, mlp_bias, false)
            }
            Architecture::Mistral => (false, false, false, false),
            Architecture::Qwen2 => (true, false, false, false),
            Architecture::Qwen3 => (attention_bias, attention_bias, false, true),
        };
        let (rope_theta, rope_scaling) = fields.rope()?;
        let config = Self {
            architecture,
            vocab_size: fields.required("vocab_size")?,
            hidden_size,
            intermediate_size: fields.required("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: fields.f64("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            max_position_embeddings: fields.usize("max_position_embeddings")?.unwrap_or(2048),
            tie_word_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(false),
            hidden_act: fields.hidden_act()?,
            qkv_bias,
            o_bias,
            mlp_bias,
            qk_norm,
            sliding_window: fields.sliding_window(architecture, num_hidden_layers)?,
            dtype: fields.dtype()?,
            bos_token_id: fields.token("bos_token_id")?.first().copied(),
            eos_token_ids: fields.token("eos_token_id")?,
            pad_token_id: fields.token("pad_token_id")?.first().copied(),
            initializer_range: fields.f64("initializer_range")?.unwrap_or(0.02),
        };
        Ok((config.check()?, ignored))
    }
}

/// Typed access to the fields; `null` counts as missing.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    fn wrong(name: &str, value: &Value, wanted: &str) -> Error {
        Error::new(format!("`{name}` of `config.json` is {value}, not {wanted}"))
    }

    fn usize(&self, name: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
        number.map(Some).ok_or_else(|| Self::wrong(name, value, "a non-negative integer"))
    }

    fn required(&self, name: &str) -> Result<usize> {
        self.usize(name)?.ok_or_else(|| Error::new(format!("`config.json` lacks `{name}`")))
    }

    fn f64(&self, name: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| Self::wrong(name, value, "a number"))
    }

    fn bool(&self, name: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| Self::wrong(name, value, "a boolean"))
    }

    /// One token id or a list of them.
    fn token(&self, name: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(name) else { return Ok(Vec::new()) };
        let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = match value {
            Value::Array(list) => list.iter().map(one).collect::<Option<Vec<_>>>(),
            other => one(other).map(|id| vec![id]),
        };
        ids.ok_or_else(|| Self::wrong(name, value, "a token id or a list of them"))
    }

    fn architecture(&self) -> Result<Architecture> {
        let known = || {
            let names = Architecture::ALL.map(|a| format!("`{}`", a.hf_name()));
            format!("supported are {}", names.join(", "))
        };
        let named = self.get("architectures").and_then(|v| v.get(0)).and_then(Value::as_str);
        if let Some(name) = named {
            return Architecture::ALL.into_iter().find(|a| a.hf_name() == name).ok_or_else(|| {
                Error::new(format!("architecture `{name}` is not supported")).with_hint(known())
            });
        }
        let model_type = self.get("model_type").and_then(Value::as_str);
        Architecture::ALL.into_iter().find(|a| Some(a.model_type()) == model_type).ok_or_else(
            || {
                match model_type {
                    Some(t) => Error::new(format!("model type `{t}` is not supported")),
                    None => {
                        Error::new("`config.json` names neither `architectures` nor `model_type`")
                    }
                }
                .with_hint(known())
            },
        )
    }

    /// Refuses fields that would change the computation; returns those that nobody reads.
    fn check_others(&self) -> Result<Vec<String>> {
        let mut ignored = Vec::new();
        for (name, value) in self.0 {
            if HARMLESS.contains(&name.as_str()) || value.is_null() {
                continue;
            }
            match neutral(name) {
                None => ignored.push(name.clone()),
                Some(expected) => {
                    let same = match (value.as_f64(), expected.as_f64()) {
                        (Some(a), Some(b)) => a == b,
                        _ => *value == expected,
                    };
                    let empty = value.as_object().is_some_and(Map::is_empty)
                        || value.as_array().is_some_and(Vec::is_empty);
                    if !same && !empty {
                        let shown: String = value.to_string().chars().take(80).collect();
                        return Err(Error::new(format!(
                            "`{name}` of `config.json` is {shown}, which changes the computation \
                             and is not supported"
                        )));
                    }
                }
            }
        }
        Ok(ignored)
    }

    fn hidden_act(&self) -> Result<HiddenAct> {
        match self.get("hidden_act") {
            None => Ok(HiddenAct::Silu),
            Some(value) => match value.as_str() {
                Some("silu" | "swish") => Ok(HiddenAct::Silu),
                Some("gelu") => Ok(HiddenAct::Gelu),
                Some("gelu_pytorch_tanh") => Ok(HiddenAct::GeluTanh),
                _ => Err(Self::wrong("hidden_act", value, "`silu`, `gelu` or `gelu_pytorch_tanh`")),
            },
        }
    }

    /// f16 weights are loaded as f32: their range is too small to compute in.
    fn dtype(&self) -> Result<DType> {
        let name = if self.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
        match self.get(name) {
            None => Ok(DType::F32),
            Some(value) => match value.as_str() {
                Some("float32" | "float16") => Ok(DType::F32),
                Some("bfloat16") => Ok(DType::BF16),
                _ => Err(Self::wrong(name, value, "`float32`, `bfloat16` or `float16`")),
            },
        }
    }

    /// `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of the versions
    /// before. Where both stand there they must agree.
    fn rope(&self) -> Result<(f64, RopeScaling)> {
        let parameters = self.get("rope_parameters").map(|v| ("rope_parameters", v));
        let old = self.get("rope_scaling").map(|v| ("rope_scaling", v));
        let mut found = Vec::new();
        for (name, value) in [parameters, old].into_iter().flatten() {
            let Value::Object(map) = value else {
                return Err(Self::wrong(name, value, "an object"));
            };
            found.push(Fields(map).rope_object(name)?);
        }
        let mut thetas = found.iter().filter_map(|(theta, _)| *theta).collect::<Vec<_>>();
        thetas.extend(self.f64("rope_theta")?);
        if thetas.windows(2).any(|w| w[0] != w[1]) {
            return Err(Error::new(
                "`rope_theta` and `rope_parameters` of `config.json` do not agree",
            ));
        }
        let scaling = found.first().map_or(RopeScaling::None, |(_, s)| *s);
        if found.iter().any(|(_, s)| *s != scaling) {
            return Err(Error::new(
                "`rope_scaling` and `rope_parameters` of `config.json` do not agree",
            ));
        }
        Ok((thetas.first().copied().unwrap_or(10_000.0), scaling))
    }

    fn rope_object(&self, place: &str) -> Result<(Option<f64>, RopeScaling)> {
        let kind = self.get("rope_type").or_else(|| self.get("type"));
        let kind = match kind {
            None => "default",
            Some(v) => v.as_str().ok_or_else(|| Self::wrong("rope_type", v, "a string"))?,
        };
        let used: &[&str] = match kind {
            "default" => &[],
            "linear" => &["factor"],
            "llama3" => &[
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ],
            other => {
                return Err(Error::new(format!(
                    "`{place}` of `config.json` asks for `{other}`, which is not supported"
                ))
                .with_hint("supported are `default`, `linear` and `llama3`"));
            }
        };
        for (name, value) in self.0 {
            let neutral = matches!(name.as_str(), "partial_rotary_factor" | "attention_factor")
                && value.as_f64() == Some(1.0);
            let known = ["type", "rope_type", "rope_theta"].contains(&name.as_str())
                || used.contains(&name.as_str());
            if !known && !neutral && !value.is_null() {
                return Err(Error::new(format!(
                    "`{name}` in `{place}` of `config.json` is not supported with `{kind}`"
                )));
            }
        }
        let number = |name: &str| -> Result<f64> {
            let value = self.f64(name)?;
            value.filter(|v| v.is_finite() && *v > 0.0).ok_or_else(|| {
                Error::new(format!("`{place}` of `config.json` lacks a positive `{name}`"))
            })
        };
        let scaling = match kind {
            "linear" => RopeScaling::Linear { factor: number("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position_embeddings: number("original_max_position_embeddings")?
                    as usize,
            },
            _ => RopeScaling::None,
        };
        Ok((self.f64("rope_theta")?, scaling))
    }

    /// The window of all layers. Mixed layers are refused.
    fn sliding_window(&self, architecture: Architecture, layers: usize) -> Result<Option<usize>> {
        let window = match self.usize("sliding_window")? {
            // The class's default; a window that is off is `null`.
            None if architecture == Architecture::Mistral
                && !self.0.contains_key("sliding_window") =>
            {
                Some(4096)
            }
            window => window,
        };
        let sliding: Vec<bool> = match self.get("layer_types") {
            Some(Value::Array(types)) => types
                .iter()
                .map(|t| match t.as_str() {
                    Some("full_attention") => Ok(false),
                    Some("sliding_attention") => Ok(true),
                    _ => Err(Error::new(format!(
                        "`layer_types` of `config.json` has {t}, which is not supported"
                    ))),
                })
                .collect::<Result<_>>()?,
            Some(other) => return Err(Self::wrong("layer_types", other, "a list")),
            None => match architecture {
                Architecture::Llama => vec![false],
                Architecture::Mistral => vec![window.is_some()],
                Architecture::Qwen2 | Architecture::Qwen3 => {
                    let on = self.bool("use_sliding_window")?.unwrap_or(false);
                    let first = self.usize("max_window_layers")?.unwrap_or(28);
                    (0..layers.min(10_000)).map(|l| on && window.is_some() && l >= first).collect()
                }
            },
        };
        match (sliding.contains(&true), sliding.contains(&false), window) {
            (true, true, _) => Err(Error::new(
                "`layer_types` (or `max_window_layers`) of `config.json` mixes sliding and full \
                 attention, which is not supported",
            )),
            (true, false, None) => {
                Err(Error::new("`layer_types` of `config.json` slides without a `sliding_window`"))
            }
            (true, false, Some(0)) => Err(Error::new("`sliding_window` of `config.json` is 0")),
            (true, false, window) => Ok(window),
            (false, ..) => Ok(None),
        }
    }
}
