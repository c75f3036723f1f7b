//! What the reference tests share: the committed values, batches made of them, and comparisons.
//! Included by path, so not every test uses all of it.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use lora_flow_core::{Artifact, ArtifactKind};
use lora_flow_model::batch::{Batch, RowRef};
use lora_flow_model::config::ModelConfig;
use lora_flow_model::decoder::Decoder;
use lora_flow_model::gguf::GgufFile;
use lora_flow_model::lora::Lora;
use serde_json::Value;

/// The variants of `tests/reference/tiny`.
pub const VARIANTS: [&str; 5] = ["llama", "llama_untied", "mistral", "qwen2", "qwen3"];

/// `tests/reference`.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference")
}

/// A committed JSON file.
pub fn json(name: &str) -> Value {
    let path = folder().join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The GGUF of SmolLM2-135M-Instruct (Q4_1), or a message that the test is skipped.
pub fn smollm2_gguf() -> Option<PathBuf> {
    let path = std::env::var_os("LORA_FLOW_SMOLLM2_GGUF").map(PathBuf::from);
    if path.is_none() {
        eprintln!("skipped: LORA_FLOW_SMOLLM2_GGUF does not name SmolLM2-135M-Instruct.Q4_1.gguf");
    }
    path
}

/// SmolLM2 in f32 from its GGUF.
pub fn smollm2(path: &Path) -> Decoder {
    let folder = tempfile::tempdir().unwrap();
    let gguf = GgufFile::open(path).unwrap_or_else(|e| panic!("{}", e.chain()));
    let config = ModelConfig::from_gguf(&gguf).unwrap_or_else(|e| panic!("{}", e.chain()));
    std::fs::write(folder.path().join("config.json"), config.to_hf().to_string()).unwrap();
    std::os::unix::fs::symlink(path, folder.path().join("model.gguf")).unwrap();
    let model = Artifact::from_dir(ArtifactKind::Model, folder.path()).unwrap();
    Decoder::load(&model, &Device::Cpu, DType::F32).unwrap_or_else(|e| panic!("{}", e.chain()))
}

/// A document of a batch: its ids, and which of them are targets.
pub struct Document {
    pub ids: Vec<u32>,
    pub mask: Vec<bool>,
}

/// The ids in a JSON list.
pub fn ids(value: &Value) -> Vec<u32> {
    list(value).iter().map(|v| v.as_u64().expect("an id") as u32).collect()
}

/// The numbers in a JSON list.
pub fn floats(value: &Value) -> Vec<f32> {
    list(value).iter().map(|v| float(v) as f32).collect()
}

/// A JSON number.
pub fn float(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is not a number"))
}

/// A JSON list.
pub fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("{value} is not a list"))
}

/// The documents in a JSON list of `{"ids", "mask"}`.
pub fn documents(value: &Value) -> Vec<Document> {
    let document = |v: &Value| Document {
        ids: ids(&v["ids"]),
        mask: ids(&v["mask"]).into_iter().map(|m| m == 1).collect(),
    };
    list(value).iter().map(document).collect()
}

/// One padding-free batch of documents, each as a row of its own.
pub fn batch(documents: &[Document]) -> Batch {
    let lengths: Vec<[u32; 1]> = documents.iter().map(|d| [d.ids.len() as u32]).collect();
    let rows = documents.iter().zip(&lengths).map(|(d, length)| RowRef {
        input_ids: &d.ids,
        loss_mask: &d.mask,
        doc_lengths: length,
    });
    Batch::from_rows(rows).expect("the documents make a batch").0
}

/// A tiny variant: its model, the adapter that PEFT saved, and the values.
pub struct Tiny {
    pub folder: PathBuf,
    pub decoder: Decoder,
    pub adapter: Lora,
    pub values: Value,
}

impl Tiny {
    pub fn load(variant: &str) -> Self {
        let folder = folder().join("tiny").join(variant);
        let model = Artifact::from_dir(ArtifactKind::Model, &folder.join("model")).unwrap();
        let decoder = Decoder::load(&model, &Device::Cpu, DType::F32)
            .unwrap_or_else(|e| panic!("{variant}: {}", e.chain()));
        let adapter = load_adapter(&folder.join("adapter"), &decoder);
        let values = json(&format!("tiny/{variant}/values.json"));
        Self { folder, decoder, adapter, values }
    }

    /// A tensor of `tensors.safetensors`.
    pub fn tensor(&self, name: &str) -> Vec<f32> {
        let path = self.folder.join("tensors.safetensors");
        let file = lora_flow_model::safetensors_file::SafetensorsFile::open(&path).unwrap();
        file.read_f32(name).unwrap()
    }

    pub fn prompts(&self) -> Vec<Vec<u32>> {
        list(&self.values["prompts"]).iter().map(ids).collect()
    }
}

/// A PEFT folder, loaded strictly for a decoder.
pub fn load_adapter(dir: &Path, decoder: &Decoder) -> Lora {
    let artifact = Artifact::from_dir(ArtifactKind::Adapter, dir).unwrap();
    Lora::load_peft(&artifact, &decoder.linear_modules())
        .unwrap_or_else(|e| panic!("{}: {}", dir.display(), e.chain()))
}

/// The values of a tensor, row by row.
pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// max |a − b|.
pub fn max_difference(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "lengths differ");
    assert!(a.iter().all(|x| x.is_finite()), "a value is not finite");
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).fold(0.0, f64::max)
}

/// ‖a‖.
pub fn norm(a: &[f32]) -> f64 {
    a.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

/// ‖a − b‖ / ‖b‖.
pub fn relative_distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "lengths differ");
    let difference: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    norm(&difference) / norm(b)
}

/// |a − b| / |b|.
pub fn relative(a: f64, b: f64) -> f64 {
    (a - b).abs() / b.abs()
}

/// The hash of `tests/reference/README.md`: 16 bits.
pub fn hash(kind: u32, module: u32, row: u32, column: u32) -> u32 {
    let mut x = row
        .wrapping_mul(0x9E37_79B1)
        .wrapping_add(column.wrapping_mul(0x85EB_CA77))
        .wrapping_add(module.wrapping_mul(0xC2B2_AE3D))
        .wrapping_add(kind.wrapping_mul(0x27D4_EB2F));
    x ^= x >> 15;
    x = x.wrapping_mul(0x2C1B_3C6D);
    x ^= x >> 12;
    x = x.wrapping_mul(0x297A_2D39);
    x ^= x >> 15;
    x >> 16
}

/// A [rows, columns] matrix of the hashed floats, in [−½, ½) · 2^exponent.
pub fn hashed(kind: u32, module: u32, (rows, columns): (usize, usize), exponent: i32) -> Tensor {
    let scale = (f64::from(exponent) - 16.0).exp2() as f32;
    let value = |at: usize| {
        let h = hash(kind, module, (at / columns) as u32, (at % columns) as u32);
        (h as f32 - 32768.0) * scale
    };
    let values: Vec<f32> = (0..rows * columns).map(value).collect();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
}

/// The projection `probe` of a matrix: Σ ± value.
pub fn projection(probe: u32, kind: u32, module: u32, columns: usize, matrix: &[f64]) -> f64 {
    let signed = |(at, v): (usize, &f64)| {
        let h = hash(2 + 2 * probe + kind, module, (at / columns) as u32, (at % columns) as u32);
        if h & 1 == 1 { *v } else { -*v }
    };
    matrix.iter().enumerate().map(signed).sum()
}
