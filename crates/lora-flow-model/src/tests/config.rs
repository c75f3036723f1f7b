use serde_json::{Value, json};

use super::{config, hf_config};
use crate::config::{Architecture, ModelConfig, RopeScaling};

fn error(more: Value) -> String {
    ModelConfig::from_hf(&hf_config(more)).unwrap_err().chain()
}

#[test]
fn normal_form_round_trips_for_every_architecture() {
    for architecture in Architecture::ALL {
        for scaling in [
            Value::Null,
            json!({ "type": "linear", "factor": 2.0 }),
            json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192 }),
        ] {
            let config = config(json!({
                "architectures": [architecture.hf_name()], "rope_scaling": scaling,
                "eos_token_id": [2, 3], "head_dim": 16,
            }));
            let (again, ignored) = ModelConfig::from_hf(&config.to_hf()).unwrap();
            assert_eq!(config, again);
            assert!(ignored.is_empty(), "{ignored:?}");
        }
    }
}

#[test]
fn architectures_differ_in_biases_norms_and_windows() {
    let of = |name: &str| config(json!({ "architectures": [name], "sliding_window": 16 }));
    let llama = of("LlamaForCausalLM");
    assert!(!llama.qkv_bias && !llama.qk_norm && llama.sliding_window.is_none());
    assert_eq!(llama.head_dim, 8);
    assert_eq!(of("MistralForCausalLM").sliding_window, Some(16));
    // A window that is off is `null`; one that is not named is the class's default.
    let off = json!({ "architectures": ["MistralForCausalLM"], "sliding_window": null });
    assert_eq!(config(off).sliding_window, None);
    let unnamed = json!({ "architectures": ["MistralForCausalLM"] });
    assert_eq!(config(unnamed).sliding_window, Some(4096));
    let qwen2 = of("Qwen2ForCausalLM");
    assert!(qwen2.qkv_bias && !qwen2.o_bias && qwen2.sliding_window.is_none());
    let qwen3 = of("Qwen3ForCausalLM");
    assert!(qwen3.qk_norm && !qwen3.qkv_bias);
    assert_eq!(qwen3.head_dim, 128);
    let windowed = json!({ "architectures": ["Qwen2ForCausalLM"], "sliding_window": 16,
                           "use_sliding_window": true, "max_window_layers": 0 });
    assert_eq!(config(windowed).sliding_window, Some(16));
}

#[test]
fn rope_parameters_of_newer_transformers_are_read() {
    let mut json = hf_config(json!({ "rope_parameters": { "rope_type": "default",
                                                          "rope_theta": 500000.0 } }));
    json.as_object_mut().unwrap().remove("rope_theta");
    let (config, _) = ModelConfig::from_hf(&json).unwrap();
    assert_eq!(config.rope_theta, 500_000.0);
    assert_eq!(config.rope_scaling, RopeScaling::None);
    assert!(error(json!({ "rope_parameters": { "rope_theta": 5.0 } })).contains("do not agree"));
}

#[test]
fn unknown_computation_is_refused_by_name() {
    for (more, expected) in [
        (json!({ "architectures": ["GemmaForCausalLM"] }), "`GemmaForCausalLM`"),
        (json!({ "architectures": [], "model_type": "phi" }), "`phi`"),
        (json!({ "hidden_act": "relu" }), "`hidden_act`"),
        (json!({ "rope_scaling": { "type": "yarn", "factor": 4.0 } }), "`yarn`"),
        (json!({ "rope_scaling": { "type": "linear" } }), "`factor`"),
        (json!({ "rope_scaling": { "type": "linear", "factor": 2.0, "beta": 3 } }), "`beta`"),
        (json!({ "quantization_config": { "bits": 4 } }), "`quantization_config`"),
        (json!({ "attention_dropout": 0.1 }), "`attention_dropout`"),
        (json!({ "rope_interleaved": true }), "`rope_interleaved`"),
        (json!({ "partial_rotary_factor": 0.5 }), "`partial_rotary_factor`"),
        (json!({ "hidden_size": null }), "lacks `hidden_size`"),
        (json!({ "hidden_size": -3 }), "`hidden_size`"),
        (json!({ "num_key_value_heads": 3 }), "`num_key_value_heads`"),
        (json!({ "num_attention_heads": 0 }), "`num_attention_heads`"),
        (json!({ "vocab_size": 1e30 }), "`vocab_size`"),
        (json!({ "rms_norm_eps": 0.0 }), "`rms_norm_eps`"),
        (json!({ "torch_dtype": "int8" }), "`torch_dtype`"),
        (json!({ "eos_token_id": "x" }), "`eos_token_id`"),
        (
            json!({ "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8 }),
            "`layer_types`",
        ),
    ] {
        let message = error(more.clone());
        assert!(message.contains(expected), "{more}: {message}");
    }
    assert!(ModelConfig::from_hf(&json!([])).is_err());
}

#[test]
fn harmless_fields_pass_and_strangers_are_reported() {
    let json = hf_config(json!({
        "rope_interleaved": false, "pretraining_tp": 1, "use_cache": true,
        "transformers.js_config": {}, "quantization_config": null, "my_note": "hello",
    }));
    assert_eq!(ModelConfig::from_hf(&json).unwrap().1, ["my_note"]);
}

#[test]
fn tensors_and_parameters_count_what_the_architecture_has() {
    let llama = config(json!({}));
    // Per layer: q 32·32, k and v 32·16, o 32·32, MLP 3·32·64, two norms.
    let layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32;
    assert_eq!(llama.parameters(), 64 * 32 + 2 * layer + 32);
    let untied = config(json!({ "tie_word_embeddings": false }));
    assert_eq!(untied.parameters(), llama.parameters() + 64 * 32);
    let qwen = config(json!({ "architectures": ["Qwen2ForCausalLM"] }));
    assert_eq!(qwen.parameters(), llama.parameters() + 2 * (32 + 16 + 16));
    assert_eq!(llama.linear_modules().len(), 14);
    assert_eq!(llama.linear_modules()[1].out_features, 16);
}

#[test]
fn llama3_frequencies_keep_short_and_stretch_long_wavelengths() {
    let scaling = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192 });
    let more = json!({ "head_dim": 64, "rope_theta": 500000.0 });
    let plain = config(more.clone()).inv_freq();
    let mut scaled = more;
    scaled["rope_scaling"] = scaling;
    let scaled = config(scaled).inv_freq();
    assert_eq!(plain[0], 1.0);
    assert_eq!(plain[0], scaled[0]);
    assert!((plain[31] / scaled[31] - 8.0).abs() < 1e-5);
    let middle = plain.iter().zip(&scaled).filter(|(p, s)| *p / *s > 1.01 && *p / *s < 7.99);
    assert!(middle.count() > 0);
    let linear = json!({ "rope_scaling": { "type": "linear", "factor": 4.0 } });
    assert_eq!(config(linear).inv_freq()[0], 0.25);
}
