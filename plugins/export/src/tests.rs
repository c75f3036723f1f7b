//! `merge` on a tiny model.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use lora_flow_core::{
    Artifact, ArtifactKind, DeviceSpec, Event, NamedArtifact, OutputDir, Reporter, Result, Task,
    TaskContext, TaskContextParts,
};
use lora_flow_model::config::ModelConfig;
use lora_flow_model::lora::{Lora, LoraConfig};
use lora_flow_model::place::Place;
use lora_flow_model::safetensors_file::{SafetensorsWriter, encode};
use lora_flow_model::weights::WeightSource;
use serde_json::{Value, json};

use crate::Merge;

struct Silent;

impl Reporter for Silent {
    fn event(&self, _: Event) {}
}

fn config() -> ModelConfig {
    let json = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 48, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 64, "tie_word_embeddings": true,
    });
    ModelConfig::from_hf(&json).unwrap().0
}

/// Pseudo-random values in −0.5..0.5.
fn values(seed: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 1009.0 - 0.5).collect()
}

fn base(dir: &Path, dtype: DType) -> Artifact {
    let config = config();
    let mut tensors = config.tensors();
    tensors.sort();
    let announced: Vec<_> = tensors.iter().map(|(n, s)| (n.clone(), dtype, s.clone())).collect();
    let mut writer = SafetensorsWriter::create(&dir.join("model.safetensors"), &announced).unwrap();
    for (i, (name, shape)) in tensors.iter().enumerate() {
        let values = values(i, shape.iter().product());
        writer.write(name, &encode(&values, dtype)).unwrap();
    }
    writer.finish().unwrap();
    std::fs::write(dir.join("config.json"), config.to_hf().to_string()).unwrap();
    std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    Artifact::from_dir(ArtifactKind::Model, dir).unwrap()
}

fn adapter(dir: &Path) -> Artifact {
    let config = LoraConfig { r: 4, ..LoraConfig::default() };
    let mut lora = Lora::init(&config, &self::config().linear_modules(), 1).unwrap();
    for (i, m) in lora.modules.iter_mut().enumerate() {
        let data = values(i, m.out_features * m.r);
        m.b = Tensor::from_vec(data, (m.out_features, m.r), &Device::Cpu).unwrap();
    }
    lora.save_peft(dir, None).unwrap();
    Artifact::from_dir(ArtifactKind::Adapter, dir).unwrap()
}

/// Merges an adapter into a fresh base; returns output and report.
fn merge(base_dtype: DType, params: Value) -> (tempfile::TempDir, OutputDir, Result<String>) {
    let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
    run(base(dirs[0].path(), base_dtype), adapter(dirs[1].path()), params)
}

/// Runs `merge` and returns its output and report.
fn run(
    model: Artifact,
    adapter: Artifact,
    params: Value,
) -> (tempfile::TempDir, OutputDir, Result<String>) {
    let out = tempfile::tempdir().unwrap();
    let named = |artifact| vec![NamedArtifact { reference: "t".into(), artifact }];
    let output = OutputDir {
        port: "model".into(),
        kind: ArtifactKind::Model,
        path: out.path().to_owned(),
        adopted: BTreeMap::new(),
        meta: Value::Null,
    };
    let mut cx = TaskContext::new(TaskContextParts {
        inputs: [("model".to_owned(), named(model)), ("adapter".to_owned(), named(adapter))].into(),
        outputs: [("model".to_owned(), output)].into(),
        files: BTreeMap::new(),
        scratch: out.path().to_owned(),
        state_dir: out.path().to_owned(),
        device: DeviceSpec::Cpu,
        threads: 2,
        allow_network: false,
        cancel: Default::default(),
        reporter: Arc::new(Silent),
    });
    let task: Merge = serde_json::from_value(params).unwrap();
    let result = task.run(&mut cx);
    let (mut outputs, report, ..) = cx.finish();
    (out, outputs.remove("model").unwrap(), result.map(|()| report))
}

#[test]
fn a_merged_model_is_proven_and_complete() {
    let (dir, output, report) = merge(DType::F32, json!({}));
    let report = report.unwrap();
    assert!(report.contains("into float32 (as the base)"), "{report}");
    assert!(report.contains("no layer is rounded"), "{report}");
    assert!(report.contains("same top token 128/128"), "{report}");
    assert!(output.adopted.contains_key("tokenizer.json"));
    let merged = Artifact::from_dir(ArtifactKind::Model, dir.path()).unwrap();
    assert_eq!(ModelConfig::open(&merged).unwrap(), config());
}

/// All tensors of a model's folder, in f64.
fn tensors(dir: &Path) -> BTreeMap<String, Vec<f64>> {
    let read = candle_core::safetensors::load(dir.join("model.safetensors"), &Device::Cpu).unwrap();
    let wide = |t: Tensor| {
        t.to_dtype(DType::F64).and_then(|t| t.flatten_all()).and_then(|t| t.to_vec1()).unwrap()
    };
    read.into_iter().map(|(name, t)| (name, wide(t))).collect()
}

/// Merged is W + s·BA as dense matrices in f64 have it, and un-merged is the base again, each within
/// the roundings of its sums: with u = 2⁻²⁴, r + 2 of them at |W| + s·Σ|B||A| for the merged weight,
/// and one each at the merged and at the restored weight for taking the same ΔW out again.
#[test]
fn what_was_merged_can_be_taken_out_again() {
    let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let model = base(dirs[0].path(), DType::F32);
    let adapter = adapter(dirs[1].path());
    let (merged_dir, _, report) = run(model, adapter.clone(), json!({}));
    report.unwrap();
    let merged_model = Artifact::from_dir(ArtifactKind::Model, merged_dir.path()).unwrap();
    let (restored_dir, _, report) = run(merged_model, adapter.clone(), json!({ "unmerge": true }));
    report.unwrap();

    let [base, merged, restored] =
        [dirs[0].path(), merged_dir.path(), restored_dir.path()].map(tensors);
    let lora = Lora::load_peft(&adapter, &config().linear_modules()).unwrap();
    let u = 2f64.powi(-24);
    let mut changed = 0f64;
    for m in &lora.modules {
        let matrix = |t: &Tensor| t.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
        let (a, b, scale) = (matrix(&m.a), matrix(&m.b), f64::from(m.scale as f32));
        let name = format!("{}.weight", m.path);
        let (w, merged, restored) = (&base[&name], &merged[&name], &restored[&name]);
        for i in 0..w.len() {
            let (row, column) = (i / m.in_features, i % m.in_features);
            let terms = (0..m.r).map(|k| scale * b[row][k] * a[k][column]);
            let (delta, size) = terms.fold((0.0, 0.0), |(d, s), t| (d + t, s + f64::abs(t)));
            let bound = (m.r + 2) as f64 * u * (w[i].abs() + size);
            assert!((merged[i] - (w[i] + delta)).abs() <= bound, "{name}[{i}]: {}", merged[i]);
            let bound = u * (merged[i].abs() + restored[i].abs());
            assert!((restored[i] - w[i]).abs() <= bound, "{name}[{i}]: {}", restored[i]);
            changed = changed.max(delta.abs());
        }
    }
    assert!(changed > 1e-2, "the adapter does something: {changed}");
    // What the adapter does not touch keeps its bits.
    for (name, w) in base.iter().filter(|(name, _)| !name.contains("_proj")) {
        assert_eq!((w, w), (&merged[name], &restored[name]), "{name}");
    }
}

#[test]
fn base_keeps_the_dtype_on_disk_and_rounding_is_reported() {
    let (dir, _, report) = merge(DType::BF16, json!({ "tolerance": 100 }));
    let report = report.unwrap();
    assert!(report.contains("into bfloat16 (as the base)"), "{report}");
    assert!(report.contains("rounding hurts most"), "{report}");
    let merged = Artifact::from_dir(ArtifactKind::Model, dir.path()).unwrap();
    let source = WeightSource::open(&merged).unwrap();
    assert_eq!(source.stored_dtype("model.norm.weight"), Some(DType::BF16));
    assert_eq!(ModelConfig::open(&merged).unwrap().dtype, DType::BF16);
}

#[test]
fn beyond_the_tolerance_the_merge_fails() {
    let (.., result) = merge(DType::F32, json!({ "dtype": "bfloat16", "tolerance": 1e-6 }));
    let error = result.unwrap_err();
    assert!(error.chain().contains("more than the tolerance of 0.000001"), "{}", error.chain());
    assert!(error.hint().unwrap().contains("float32"));
}

#[test]
fn the_proof_notices_an_adapter_that_was_not_merged() {
    let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let model = base(dirs[0].path(), DType::F32);
    let modules = config().linear_modules();
    let lora = Lora::load_peft(&adapter(dirs[1].path()), &modules).unwrap();
    let cancel = Default::default();
    let proof = crate::proof::compare(&model, &lora, &model, &Place::Cpu, &cancel).unwrap();
    assert!(proof.max_difference > 0.01, "{proof:?}");
    assert_eq!(proof.rms_difference, proof.adapter_rms);
}

#[test]
fn shards_are_written_and_read_back() {
    let (dir, _, report) =
        merge(DType::F32, json!({ "dtype": "float16", "max_shard_size": "20KB", "tolerance": 10 }));
    report.unwrap();
    assert!(dir.path().join("model.safetensors.index.json").exists());
    assert!(!dir.path().join("model.safetensors").exists());
}
