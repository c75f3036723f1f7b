//! Ten steps of our training loop against ten of PEFT + AdamW + HF's schedule on the tiny models
//! (`tests/reference/tiny`), and our PEFT folder against PEFT's.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::DType;
use lora_flow_core::{Artifact, ArtifactKind};
use lora_flow_model::batch::Batch;
use lora_flow_model::merge::{MergeOptions, merge_weights};
use lora_flow_model::safetensors_file::SafetensorsFile;
use lora_flow_model::weights::WeightSource;
use serde_json::{Value, json};

#[path = "../../../tests/reference/support.rs"]
mod support;
#[path = "../../../tests/reference/training.rs"]
mod training;
use support::{Tiny, documents, list, load_adapter, norm, relative_distance, values};

/// Relative difference of each loss and gradient norm.
const LOSS: f64 = 1e-6;
const GRAD_NORM: f64 = 5e-6;
/// ‖ours − theirs‖ over ‖theirs‖ of the whole adapter, and over the norm of its ten steps.
const ADAPTER: f64 = 2e-6;
const UPDATE: f64 = 1e-5;

fn flat(lora: &lora_flow_model::lora::Lora) -> Vec<f32> {
    lora.modules.iter().flat_map(|m| [values(&m.a), values(&m.b)].concat()).collect()
}

fn check_steps(variant: &str) {
    let tiny = Tiny::load(variant);
    let start = flat(&tiny.adapter);
    let steps: Vec<_> = list(&tiny.values["documents"]).iter().map(documents).collect();
    let rows = tiny.values["micro_batch_documents"].as_u64().unwrap() as usize;
    let trained = training::run(
        &tiny.decoder,
        tiny.adapter.clone(),
        &tiny.values["settings"],
        training::steps(&tiny.values),
        steps,
        rows,
    );
    let theirs = flat(&load_adapter(&tiny.folder.join("adapter_after"), &tiny.decoder));
    let ours = flat(&trained.lora);
    let adapter = relative_distance(&ours, &theirs);
    let moved: Vec<f32> = theirs.iter().zip(&start).map(|(a, b)| a - b).collect();
    let update = adapter * norm(&theirs) / norm(&moved);
    println!(
        "{variant}: losses {:.1e}, gradient norms {:.1e}, adapter {adapter:.1e}, update {update:.1e}",
        trained.loss, trained.grad_norm
    );
    assert!(trained.loss <= LOSS, "{variant}: a loss is {:.1e} off", trained.loss);
    assert!(trained.grad_norm <= GRAD_NORM, "{variant}: a norm is {:.1e} off", trained.grad_norm);
    assert!(adapter <= ADAPTER && update <= UPDATE, "{variant}: {adapter:.1e}, {update:.1e}");

    if let Some(out) = std::env::var_os("LORA_FLOW_REFERENCE_OUT") {
        write_for_peft(&Path::new(&out).join(variant), &tiny, &trained.lora);
    }
}

/// The trained adapter and logits with it, for `tests/reference/check_peft_load.py`, and the model
/// with the adapter merged, for `check_merged.py`.
fn write_for_peft(dir: &Path, tiny: &Tiny, lora: &lora_flow_model::lora::Lora) {
    let adapter = dir.join("adapter");
    std::fs::create_dir_all(&adapter).unwrap();
    lora.save_peft(&adapter, None).unwrap();
    let entry = |prompt: &Vec<u32>| {
        let logits = tiny.decoder.logits(&Batch::from_documents(&[prompt]), Some(lora)).unwrap();
        json!({ "ids": prompt, "logits": logits.to_vec2::<f32>().unwrap() })
    };
    let entries: Vec<_> = tiny.prompts().iter().map(entry).collect();
    std::fs::write(dir.join("logits.json"), Value::from(entries).to_string()).unwrap();

    let merged = dir.join("merged");
    std::fs::create_dir_all(&merged).unwrap();
    let model = Artifact::from_dir(ArtifactKind::Model, &tiny.folder.join("model")).unwrap();
    let source = WeightSource::open(&model).unwrap();
    let options = MergeOptions { dtype: DType::F32, max_shard_size: None };
    let config = tiny.decoder.config();
    merge_weights(&source, config, lora, &merged, options, |_, _| Ok(())).unwrap();
    std::fs::write(merged.join("config.json"), config.to_hf().to_string()).unwrap();
}

macro_rules! steps {
    ($($name:ident),*) => {
        mod ten_steps { $(#[test] fn $name() { super::check_steps(stringify!($name)) })* }
    };
}
steps!(llama, llama_untied, mistral, qwen2, qwen3);

/// Tensors of a safetensors file: name → (shape, dtype, values).
type Tensors = BTreeMap<String, (Vec<usize>, String, Vec<f32>)>;

fn tensors(path: &Path) -> Tensors {
    let file = SafetensorsFile::open(path).unwrap();
    assert!(file.unsupported().is_empty());
    let read = |(name, info): (&String, &lora_flow_model::safetensors_file::TensorInfo)| {
        let values = file.read_f32(name).unwrap();
        (name.clone(), (info.shape.clone(), format!("{:?}", info.dtype), values))
    };
    file.tensors().iter().map(read).collect()
}

/// The `__metadata__` of a safetensors file.
fn metadata(path: &Path) -> Value {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    header["__metadata__"].clone()
}

#[test]
fn a_saved_adapter_is_a_peft_folder() {
    for variant in support::VARIANTS {
        let tiny = Tiny::load(variant);
        let ours = tempfile::tempdir().unwrap();
        tiny.adapter.save_peft(ours.path(), None).unwrap();
        let theirs = tiny.folder.join("adapter");

        // Loaded and saved again: the same tensors to the bit, under the same names.
        let file = "adapter_model.safetensors";
        assert_eq!(tensors(&ours.path().join(file)), tensors(&theirs.join(file)), "{variant}");
        assert_eq!(metadata(&ours.path().join(file)), metadata(&theirs.join(file)), "{variant}");

        let read = |dir: &Path| -> BTreeMap<String, Value> {
            let text = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
            serde_json::from_str(&text).unwrap()
        };
        let (ours, theirs) = (read(ours.path()), read(&theirs));
        // No field that PEFT does not know, and the same value in each.
        for (field, value) in &ours {
            let expected = theirs.get(field);
            assert_eq!(Some(value), expected, "{variant}: `{field}`");
        }
        // Fields that we leave out are off.
        for (field, value) in theirs.iter().filter(|(f, _)| !ours.contains_key(*f)) {
            assert!(value.is_null() || field == "peft_version", "{variant}: `{field}` is {value}");
        }
    }
}
