use std::path::Path;

use candle_core::{DType, Device, Tensor};
use lora_flow_core::{ArtifactKind, Result};
use serde_json::{Value, json};

use super::{artifact, config, values, write_safetensors};
use crate::config::ModuleInfo;
use crate::lora::{Init, Lora, LoraConfig, TargetModules};
use crate::peft::{CONFIG, WEIGHTS};

fn modules() -> Vec<ModuleInfo> {
    config(json!({})).linear_modules()
}

fn lora(config: &LoraConfig) -> Lora {
    let mut lora = Lora::init(config, &modules(), 3).unwrap();
    for m in &mut lora.modules {
        let data = values(&m.path, m.out_features * m.r);
        m.b = Tensor::from_vec(data, (m.out_features, m.r), &Device::Cpu).unwrap();
    }
    lora
}

fn load(dir: &Path) -> Result<Lora> {
    Lora::load_peft(&artifact(ArtifactKind::Adapter, dir), &modules())
}

/// Changes one field of a saved `adapter_config.json`.
fn set(dir: &Path, field: &str, value: Value) {
    let path = dir.join(CONFIG);
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    json[field] = value;
    std::fs::write(path, json.to_string()).unwrap();
}

fn data(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn an_adapter_round_trips_to_the_bit() {
    for config in [
        LoraConfig::default(),
        LoraConfig {
            r: 3,
            lora_alpha: 4.5,
            lora_dropout: 0.1,
            target_modules: TargetModules::Regex(".*_proj".into()),
            exclude_modules: Some(TargetModules::List(vec!["up_proj".into()])),
            rank_pattern: [("q_proj".to_owned(), 2)].into(),
            alpha_pattern: [("k_proj".to_owned(), 1.0)].into(),
            use_rslora: true,
            init_lora_weights: Init::Gaussian,
            ..LoraConfig::default()
        },
        LoraConfig {
            target_modules: TargetModules::List(vec!["v_proj".into(), "mlp.down_proj".into()]),
            layers_to_transform: Some(vec![1]),
            ..LoraConfig::default()
        },
    ] {
        let dir = tempfile::tempdir().unwrap();
        let saved = lora(&config);
        saved.save_peft(dir.path(), Some("base")).unwrap();
        let loaded = load(dir.path()).unwrap();
        assert_eq!(loaded.modules.len(), saved.modules.len());
        for (a, b) in loaded.modules.iter().zip(&saved.modules) {
            assert_eq!((&a.path, a.r, a.scale), (&b.path, b.r, b.scale));
            assert_eq!((data(&a.a), data(&a.b)), (data(&b.a), data(&b.b)));
        }
        // Saved again, it is the same file.
        let again = tempfile::tempdir().unwrap();
        loaded.save_peft(again.path(), Some("base")).unwrap();
        for file in [CONFIG, WEIGHTS] {
            let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
            assert_eq!(read(dir.path()), read(again.path()), "{file}");
        }
    }
}

#[test]
fn all_linear_is_saved_as_the_sorted_names_that_peft_reads() {
    let dir = tempfile::tempdir().unwrap();
    lora(&LoraConfig::default()).save_peft(dir.path(), None).unwrap();
    let text = std::fs::read_to_string(dir.path().join(CONFIG)).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"];
    assert_eq!(json["target_modules"], json!(names));
    assert_eq!(json["lora_alpha"], json!(8));
    assert_eq!(json["inference_mode"], json!(true));
}

#[test]
fn unsupported_settings_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    lora(&LoraConfig::default()).save_peft(dir.path(), None).unwrap();
    for (field, bad, good) in [
        ("modules_to_save", json!(["lm_head"]), Value::Null),
        ("lora_bias", json!(true), json!(false)),
        ("bias", json!("all"), json!("none")),
        ("peft_type", json!("IA3"), json!("LORA")),
        ("task_type", json!("SEQ_CLS"), json!("CAUSAL_LM")),
        ("init_lora_weights", json!("pissa"), json!(true)),
        ("fan_in_fan_out", json!(true), json!(false)),
        ("layer_replication", json!([[0, 4], [2, 5]]), Value::Null),
        ("trainable_token_indices", json!([1]), Value::Null),
        ("of_the_future", json!(2), json!(false)),
        ("r", json!("eight"), json!(8)),
        ("lora_alpha", Value::Null, json!(8)),
    ] {
        set(dir.path(), field, bad);
        let message = load(dir.path()).unwrap_err().chain();
        assert!(message.contains(&format!("`{field}`")), "{message}");
        set(dir.path(), field, good);
        load(dir.path()).unwrap();
    }
    std::fs::remove_file(dir.path().join(WEIGHTS)).unwrap();
    assert!(load(dir.path()).unwrap_err().chain().contains(WEIGHTS));
}

#[test]
fn the_tensors_must_be_exactly_those_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let saved = lora(&LoraConfig {
        target_modules: TargetModules::List(vec!["q_proj".into()]),
        ..LoraConfig::default()
    });
    let name = |l: usize, w: char| {
        format!("base_model.model.model.layers.{l}.self_attn.q_proj.lora_{w}.weight")
    };
    let good = vec![
        (name(0, 'A'), vec![8, 32]),
        (name(0, 'B'), vec![32, 8]),
        (name(1, 'A'), vec![8, 32]),
        (name(1, 'B'), vec![32, 8]),
    ];
    let with = |tensors: &[(String, Vec<usize>)]| {
        saved.save_peft(dir.path(), None).unwrap();
        write_safetensors(&dir.path().join(WEIGHTS), tensors, DType::F32);
        load(dir.path())
    };
    with(&good).unwrap();
    let message = with(&good[1..]).unwrap_err().chain();
    assert!(message.contains(&format!("missing: `{}`", name(0, 'A'))), "{message}");
    let mut extra = good.clone();
    extra.push((name(2, 'A'), vec![8, 32]));
    let message = with(&extra).unwrap_err().chain();
    assert!(message.contains(&format!("not asked for: `{}`", name(2, 'A'))), "{message}");
    let mut shape = good.clone();
    shape[0].1 = vec![4, 32];
    let message = with(&shape).unwrap_err().chain();
    assert!(message.contains("[4, 32] instead of [8, 32]"), "{message}");
}

#[test]
fn values_that_are_no_numbers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut bad = lora(&LoraConfig::default());
    let m = &mut bad.modules[0];
    let mut b = data(&m.b);
    b[5] = f32::NAN;
    m.b = Tensor::from_vec(b, (m.out_features, m.r), &Device::Cpu).unwrap();
    bad.save_peft(dir.path(), None).unwrap();
    let message = load(dir.path()).unwrap_err().chain();
    assert!(message.contains("q_proj.lora_B.weight") && message.contains("NaN"), "{message}");
}
