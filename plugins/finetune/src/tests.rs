//! `model` and `lora-inject` on tiny models.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Tensor};
use lora_flow_core::{
    Artifact, ArtifactKind, DeviceSpec, Event, NamedArtifact, OutputDir, Reporter, Result, Task,
    TaskContext, TaskContextParts,
};
use lora_flow_model::config::ModelConfig;
use lora_flow_model::lora::Lora;
use lora_flow_model::safetensors_file::{SafetensorsWriter, encode};
use lora_flow_model::weights::WeightSource;
use serde_json::{Value, json};

use crate::{LoraInject, Model};

#[derive(Default)]
struct Events(Mutex<Vec<Event>>);

impl Reporter for Events {
    fn event(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }
}

/// What a task left behind.
struct Ran {
    output: OutputDir,
    report: String,
    summary: Vec<(String, String)>,
    events: Vec<Event>,
}

impl Ran {
    /// The output as the store would hand it on.
    fn artifact(&self) -> Artifact {
        let mut artifact = Artifact::from_dir(self.output.kind, &self.output.path).unwrap();
        artifact.files.extend(self.output.adopted.clone());
        artifact
    }
}

fn run(
    task: &dyn Task,
    inputs: &[(&str, &Artifact)],
    files: &[PathBuf],
    dir: &Path,
) -> Result<Ran> {
    let events = Arc::new(Events::default());
    let port = &task.outputs().ports[0];
    let output = OutputDir {
        port: port.name.clone(),
        kind: port.kinds[0],
        path: dir.to_owned(),
        adopted: BTreeMap::new(),
        meta: Value::Null,
    };
    let named = |a: &Artifact| vec![NamedArtifact { reference: "t".into(), artifact: a.clone() }];
    let mut cx = TaskContext::new(TaskContextParts {
        inputs: inputs.iter().map(|(port, a)| ((*port).to_owned(), named(a))).collect(),
        outputs: [(port.name.clone(), output)].into(),
        files: [("/source".to_owned(), files.to_vec())].into(),
        scratch: dir.to_owned(),
        state_dir: dir.to_owned(),
        device: DeviceSpec::Cpu,
        threads: 1,
        allow_network: false,
        cancel: Default::default(),
        reporter: events.clone(),
    });
    task.run(&mut cx)?;
    let (mut outputs, report, summary, _) = cx.finish();
    let events = std::mem::take(&mut *events.0.lock().unwrap());
    Ok(Ran { output: outputs.remove(&port.name).unwrap(), report, summary, events })
}

fn hf_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 64, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "eos_token_id": 2, "strange": 1,
    })
}

fn tokenizer() -> Value {
    let vocab: serde_json::Map<_, _> =
        ('a'..='p').enumerate().map(|(i, c)| (c.to_string(), json!(i))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": { "type": "BPE", "dropout": null, "unk_token": null,
                   "continuing_subword_prefix": null, "end_of_word_suffix": null,
                   "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [] },
    })
}

/// Writes a Hugging Face folder and returns its files.
fn write_hf(dir: &Path) -> Vec<PathBuf> {
    let config = ModelConfig::from_hf(&hf_config()).unwrap().0;
    let mut tensors = config.tensors();
    tensors.sort();
    let announced: Vec<_> =
        tensors.iter().map(|(n, s)| (n.clone(), DType::BF16, s.clone())).collect();
    let weights = dir.join("model.safetensors");
    let mut writer = SafetensorsWriter::create(&weights, &announced).unwrap();
    for (name, shape) in &tensors {
        let values = vec![0.5; shape.iter().product()];
        writer.write(name, &encode(&values, DType::BF16)).unwrap();
    }
    writer.finish().unwrap();
    let mut files = vec![weights];
    for (name, value) in [
        ("config.json", hf_config()),
        ("tokenizer.json", tokenizer()),
        ("tokenizer_config.json", json!({ "eos_token": { "content": "c" }, "chat_template": "t" })),
        ("generation_config.json", json!({ "eos_token_id": [2, 5] })),
    ] {
        std::fs::write(dir.join(name), value.to_string()).unwrap();
        files.push(dir.join(name));
    }
    files.sort();
    files
}

fn write_gguf(path: &Path) {
    use gguf_file::Value as V;
    let strings =
        |v: &[&str]| V::Array(v.iter().map(|s| V::String((*s).to_owned())).collect::<Vec<_>>());
    let letters: Vec<String> = ('a'..='p').map(String::from).collect();
    let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
    let metadata = [
        ("general.architecture", V::String("llama".into())),
        ("llama.block_count", V::U32(1)),
        ("llama.context_length", V::U32(64)),
        ("llama.embedding_length", V::U32(32)),
        ("llama.feed_forward_length", V::U32(64)),
        ("llama.attention.head_count", V::U32(4)),
        ("llama.attention.layer_norm_rms_epsilon", V::F32(1e-5)),
        ("tokenizer.ggml.model", V::String("gpt2".into())),
        ("tokenizer.ggml.pre", V::String("smollm".into())),
        ("tokenizer.ggml.tokens", strings(&letters)),
        ("tokenizer.ggml.merges", strings(&[])),
        ("tokenizer.ggml.eos_token_id", V::U32(2)),
    ];
    let tensor = |shape: &[usize], dtype| {
        QTensor::quantize(&Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap(), dtype).unwrap()
    };
    let (q8, f32) = (GgmlDType::Q8_0, GgmlDType::F32);
    let tensors = [
        ("token_embd.weight", tensor(&[16, 32], q8)),
        ("output_norm.weight", tensor(&[32], f32)),
        ("blk.0.attn_norm.weight", tensor(&[32], f32)),
        ("blk.0.ffn_norm.weight", tensor(&[32], f32)),
        ("blk.0.attn_q.weight", tensor(&[32, 32], q8)),
        ("blk.0.attn_k.weight", tensor(&[32, 32], q8)),
        ("blk.0.attn_v.weight", tensor(&[32, 32], q8)),
        ("blk.0.attn_output.weight", tensor(&[32, 32], q8)),
        ("blk.0.ffn_gate.weight", tensor(&[64, 32], q8)),
        ("blk.0.ffn_up.weight", tensor(&[64, 32], q8)),
        ("blk.0.ffn_down.weight", tensor(&[32, 64], q8)),
    ];
    let mut file = std::fs::File::create(path).unwrap();
    let metadata: Vec<_> = metadata.iter().map(|(k, v)| (*k, v)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(k, v)| (*k, v)).collect();
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
}

fn model(params: Value) -> Model {
    serde_json::from_value(params).unwrap()
}

#[test]
fn a_folder_becomes_a_model_with_everything_explicit() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let files = write_hf(from.path());
    let task = model(json!({ "source": "x", "dtype": "bfloat16" }));
    let ran = run(&task, &[], &files, to.path()).unwrap();
    let artifact = ran.artifact();
    let config = ModelConfig::open(&artifact).unwrap();
    assert_eq!(config.dtype, DType::BF16);
    assert_eq!(config.eos_token_ids, [2, 5]);
    WeightSource::open(&artifact).unwrap().check_all(&config).unwrap();
    let read = |name: &str| std::fs::read_to_string(artifact.file(name).unwrap()).unwrap();
    assert_eq!(read("chat_template.jinja"), "t");
    let tokenizer_config: Value = serde_json::from_str(&read("tokenizer_config.json")).unwrap();
    assert_eq!(tokenizer_config, json!({ "eos_token": "c" }));
    assert!(ran.report.contains("stored as BF16, computed in bfloat16"), "{}", ran.report);
    assert_eq!(ran.summary[0].1, "LlamaForCausalLM");
    let warned = ran
        .events
        .iter()
        .any(|e| matches!(e, Event::Log { message, .. } if message.contains("strange")));
    assert!(warned, "{:?}", ran.events);
}

#[test]
fn a_gguf_of_an_artifact_is_adopted_not_copied() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::create_dir(from.path().join("pkg")).unwrap();
    write_gguf(&from.path().join("pkg/tiny.gguf"));
    std::fs::write(from.path().join("pkg/readme.txt"), "hello").unwrap();
    let files = Artifact::from_dir(ArtifactKind::Files, from.path()).unwrap();
    let ran = run(&model(json!({})), &[("files", &files)], &[], to.path()).unwrap();
    assert_eq!(ran.output.adopted["model.gguf"], files.files["pkg/tiny.gguf"]);
    assert!(!to.path().join("model.gguf").exists());
    let artifact = ran.artifact();
    let config = ModelConfig::open(&artifact).unwrap();
    assert_eq!((config.num_key_value_heads, config.dtype), (4, DType::F32));
    WeightSource::open(&artifact).unwrap().check_all(&config).unwrap();
    assert!(ran.report.contains("stored as Q8_0, computed in float32"), "{}", ran.report);
}

#[test]
fn what_is_no_usable_model_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let files = write_hf(dir.path());
    let task = model(json!({ "source": "x" }));
    let fails = |files: &[PathBuf]| {
        let to = tempfile::tempdir().unwrap();
        run(&task, &[], files, to.path()).err().unwrap().chain()
    };
    let without = |name: &str| -> Vec<PathBuf> {
        files.iter().filter(|f| !f.ends_with(name)).cloned().collect()
    };
    assert!(fails(&without("config.json")).contains("no model among 4 files"));
    assert!(fails(&without("tokenizer.json")).contains("`tokenizer.json`"));
    assert!(fails(&without("model.safetensors")).contains("no weights"));

    // A tokenizer with an id beyond the embedding.
    let mut large = tokenizer();
    large["model"]["vocab"]["zz"] = json!(16);
    std::fs::write(dir.path().join("tokenizer.json"), large.to_string()).unwrap();
    assert!(fails(&files).contains("`zz`"), "{}", fails(&files));
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer().to_string()).unwrap();

    let mut deeper = hf_config();
    deeper["num_hidden_layers"] = json!(3);
    std::fs::write(dir.path().join("config.json"), deeper.to_string()).unwrap();
    assert!(fails(&files).contains("missing: `model.layers.2.input_layernorm.weight`"));
}

#[test]
fn inject_writes_a_peft_folder_that_loads_and_reports_it() {
    let (from, base, to) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let files = write_hf(from.path());
    let base = run(&model(json!({ "source": "x" })), &[], &files, base.path()).unwrap().artifact();
    let inject = |params: Value, dir: &Path| {
        let task: LoraInject = serde_json::from_value(params).unwrap();
        run(&task, &[("model", &base)], &[], dir)
    };
    let params = json!({ "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"] });
    let ran = inject(params.clone(), to.path()).unwrap();
    let modules = ModelConfig::open(&base).unwrap().linear_modules();
    let lora = Lora::load_peft(&ran.artifact(), &modules).unwrap();
    // Two layers: q 32 × 32, down 32 × 64.
    assert_eq!(lora.trainable_parameters(), 2 * 4 * (64 + 96));
    assert_eq!(ran.output.meta, json!({ "trainable_parameters": 1280 }));
    assert!(ran.report.contains("model.layers.*.self_attn.q_proj"), "{}", ran.report);
    assert!(ran.report.contains("trainable parameters 1,280 of "), "{}", ran.report);

    // The same seed gives the same bytes, another one other bytes.
    let digest = |extra: Value| {
        let mut params = params.clone();
        params["seed"] = extra;
        let dir = tempfile::tempdir().unwrap();
        inject(params, dir.path()).unwrap().artifact().digest
    };
    assert_eq!(digest(json!(0)), ran.artifact().digest);
    assert_ne!(digest(json!(1)), ran.artifact().digest);

    let other = tempfile::tempdir().unwrap();
    let error = inject(json!({ "target_modules": ["c_attn"] }), other.path()).err().unwrap();
    assert!(error.hint().unwrap().contains("`q_proj`"));
}
