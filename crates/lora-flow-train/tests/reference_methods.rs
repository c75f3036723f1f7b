//! The variants of the method against PEFT and plain torch (`tests/reference/methods`): DoRA,
//! LoRA+, whole modules, PiSSA, OLoRA and full fine-tuning. Logits, every gradient, ten steps, and
//! what is left after them; dropout by its means.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};
use lora_flow_core::{Artifact, ArtifactKind};
use lora_flow_model::adapter::{DropoutKey, LoraGrads};
use lora_flow_model::batch::Batch;
use lora_flow_model::decoder::{Checkpoint, Decoder, PassOptions};
use lora_flow_model::lora::{Init, Lora, LoraConfig, TargetModules};
use lora_flow_model::merge::{MergeOptions, merge_weights};
use lora_flow_model::residual::{self, Start};
use lora_flow_model::safetensors_file::SafetensorsFile;
use lora_flow_model::weights::WeightSource;
use serde_json::{Value, json};

#[path = "../../../tests/reference/support.rs"]
mod support;
#[path = "../../../tests/reference/training.rs"]
mod training;
use support::{
    batch, documents, float, ids, list, load_adapter, max_difference, relative, relative_distance,
    values,
};

/// Logits are of the order of 1.
const LOGITS: f64 = 3e-5;
const GRADIENT: f64 = 2e-5;
const LOSS: f64 = 2e-6;
const GRAD_NORM: f64 = 2e-5;
const AFTER: f64 = 1e-5;

/// A case: its decoder to train on, and what is trained.
struct Case {
    name: &'static str,
    folder: std::path::PathBuf,
    model: Artifact,
    decoder: Decoder,
    lora: Lora,
    start: Option<Start>,
    values: Value,
}

impl Case {
    fn load(name: &'static str) -> Self {
        let folder = support::folder().join("methods").join(name);
        let values = support::json(&format!("methods/{name}/values.json"));
        let base = support::folder().join("tiny").join(values["base"].as_str().unwrap());
        let model = Artifact::from_dir(ArtifactKind::Model, &base.join("model")).unwrap();
        let mut decoder = Decoder::load(&model, &Device::Cpu, DType::F32).unwrap();
        let tensors = SafetensorsFile::open(&folder.join("tensors.safetensors")).unwrap();
        let settings = &values["lora"];
        let mut start = None;
        let lora = if settings.is_null() {
            let names: Vec<_> = decoder.config().tensors().into_iter().map(|(n, _)| n).collect();
            let saved = decoder.take(&names).unwrap();
            Lora { config: LoraConfig::default(), modules: Vec::new(), saved }
        } else if let Some(init) = settings["init_lora_weights"].as_str() {
            // Our own start is compared first; training goes on from PEFT's, whose signs are
            // those of its own decomposition.
            let (config, init) = start_config(settings, init);
            let mut lora = Lora::init(&config, &decoder.linear_modules(), 0).unwrap();
            let source = WeightSource::open(&model).unwrap();
            let ours = lora.init_from(decoder.config(), |n, s| source.read_f32(n, s)).unwrap();
            let mut theirs = lora.clone();
            for m in &mut theirs.modules {
                let read = |which: char, t: &candle_core::Tensor| {
                    let name = format!("start.base_model.model.{}.lora_{which}.weight", m.path);
                    let values = tensors.read_f32(&name).unwrap();
                    candle_core::Tensor::from_vec(values, t.shape(), &Device::Cpu).unwrap()
                };
                (m.a, m.b) = (read('A', &m.a), read('B', &m.b));
            }
            check_start(name, &lora, &theirs);
            assert_eq!(ours.unwrap().init, init);
            let matrices = theirs.modules.iter().map(|m| (m.a.clone(), m.b.clone())).collect();
            let begun = Start { init, matrices };
            let lessened = residual::lessened(&decoder, &theirs, &begun).unwrap();
            decoder = decoder.overlay(&lessened).unwrap();
            start = Some(begun);
            theirs
        } else {
            load_adapter(&folder.join("adapter"), &decoder)
        };
        Self { name, folder, model, decoder, lora, start, values }
    }

    fn tensor(&self, name: &str) -> Vec<f32> {
        let path = self.folder.join("tensors.safetensors");
        SafetensorsFile::open(&path).unwrap().read_f32(name).unwrap()
    }

    /// Names of the trained tensors in PEFT's file (the model's own in full fine-tuning), in the
    /// order of gradients.
    fn names(&self, lora: &Lora) -> Vec<String> {
        let prefix = if self.values["lora"].is_null() { "" } else { "base_model.model." };
        let module = |m: &lora_flow_model::lora::LoraModule| {
            let mut names = vec![
                format!("{prefix}{}.lora_A.weight", m.path),
                format!("{prefix}{}.lora_B.weight", m.path),
            ];
            if m.magnitude.is_some() {
                names.push(format!("{prefix}{}.lora_magnitude_vector", m.path));
            }
            names
        };
        let mut names: Vec<_> = lora.modules.iter().flat_map(module).collect();
        names.extend(lora.saved.iter().map(|s| format!("{prefix}{}", s.name)));
        names
    }
}

fn start_config(settings: &Value, init: &str) -> (LoraConfig, Init) {
    let init = if init == "pissa" { Init::Pissa } else { Init::Olora };
    let target_modules = match &settings["target_modules"] {
        Value::String(s) => TargetModules::from_text(s),
        list => TargetModules::List(serde_json::from_value(list.clone()).unwrap()),
    };
    let config = LoraConfig {
        r: settings["r"].as_u64().unwrap() as usize,
        lora_alpha: float(&settings["lora_alpha"]),
        use_rslora: settings["use_rslora"].as_bool().unwrap_or(false),
        init_lora_weights: init,
        target_modules,
        ..LoraConfig::default()
    };
    (config, init)
}

/// A₀ and B₀ are PEFT's but for the signs of singular and orthonormal vectors.
fn check_start(name: &str, ours: &Lora, theirs: &Lora) {
    let mut worst = 0f64;
    for (ours, theirs) in ours.modules.iter().zip(&theirs.modules) {
        let product = |m: &lora_flow_model::lora::LoraModule| values(&m.b.matmul(&m.a).unwrap());
        worst = worst.max(relative_distance(&product(ours), &product(theirs)));
        let size = |t: &candle_core::Tensor| values(&t.abs().unwrap());
        worst = worst.max(relative_distance(&size(&ours.a), &size(&theirs.a)));
        worst = worst.max(relative_distance(&size(&ours.b), &size(&theirs.b)));
    }
    println!("{name}: start {worst:.1e}");
    assert!(worst < 2e-5, "{name}: the start is {worst:.1e} off");
}

fn check(name: &'static str) {
    let case = Case::load(name);
    let mut worst = 0f64;
    for (n, prompt) in list(&case.values["prompts"]).iter().enumerate() {
        let prompt = Batch::from_documents(&[ids(prompt)]);
        let ours = values(&case.decoder.logits(&prompt, Some(&case.lora)).unwrap());
        worst = worst.max(max_difference(&ours, &case.tensor(&format!("logits.{n}"))));
    }
    assert!(worst <= LOGITS, "{name}: max |Δ logit| {worst:.1e}");

    let docs = batch(&documents(&case.values["grad_documents"]));
    let count = docs.supervised();
    let mut gradient = 0f64;
    for checkpoint in [Checkpoint::None, Checkpoint::Full] {
        let options = PassOptions { grad_scale: 1.0 / count as f32, dropout: None, checkpoint };
        let mut grads = LoraGrads::zeros(&case.lora);
        let loss = case.decoder.loss_and_grad(&docs, &case.lora, &options, &mut grads).unwrap();
        let off = relative(loss.nll_sum() / count as f64, float(&case.values["grad_loss"]));
        assert!(off < 1e-6, "{name}: the loss is {off:.1e} off");
        for (tensor, ours) in case.names(&case.lora).iter().zip(grads.tensors()) {
            let theirs = case.tensor(&format!("grad.{tensor}"));
            let distance = relative_distance(ours, &theirs);
            assert!(distance <= GRADIENT, "{name} {checkpoint:?} {tensor}: {distance:.1e}");
            gradient = gradient.max(distance);
        }
    }

    let steps = list(&case.values["documents"]).iter().map(documents).collect();
    let trained = training::run(
        &case.decoder,
        case.lora.clone(),
        &case.values["settings"],
        training::steps(&case.values),
        steps,
        2,
    );
    let lora = match &case.start {
        None => trained.lora.clone(),
        Some(start) => residual::join(&trained.lora, start).unwrap(),
    };
    let after = if case.values["lora"].is_null() { "model_after" } else { "adapter_after" };
    let file = if case.values["lora"].is_null() { "model" } else { "adapter_model" };
    let file = case.folder.join(after).join(format!("{file}.safetensors"));
    let theirs = SafetensorsFile::open(&file).unwrap();
    let names = case.names(&lora);
    assert_eq!(theirs.tensors().len(), names.len(), "{name}: tensors in {}", file.display());
    let (mut ours_all, mut theirs_all) = (Vec::new(), Vec::new());
    for (tensor, (_, ours)) in names.iter().zip(lora.tensors()) {
        ours_all.extend(values(ours));
        theirs_all.extend(theirs.read_f32(tensor).unwrap());
    }
    let distance = relative_distance(&ours_all, &theirs_all);
    println!(
        "{name}: logits {worst:.1e}, gradients {gradient:.1e}, losses {:.1e}, norms {:.1e}, after ten steps {distance:.1e}",
        trained.loss, trained.grad_norm
    );
    assert!(trained.loss <= LOSS, "{name}: a loss is {:.1e} off", trained.loss);
    assert!(trained.grad_norm <= GRAD_NORM, "{name}: a norm is {:.1e} off", trained.grad_norm);
    assert!(distance <= AFTER, "{name}: after ten steps {distance:.1e}");
    check_saved(&case, &lora);
    if let Some(out) = std::env::var_os("LORA_FLOW_REFERENCE_OUT") {
        write_for_peft(&Path::new(&out).join(name), &case, &trained.lora, &lora);
    }
}

/// The folder holds what PEFT's holds: the same names, and the same fields of the configuration.
fn check_saved(case: &Case, lora: &Lora) {
    if case.values["lora"].is_null() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    lora.save_peft(dir.path(), None).unwrap();
    let read = |dir: &Path| -> BTreeMap<String, Value> {
        let text = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let (ours, theirs) = (read(dir.path()), read(&case.folder.join("adapter_after")));
    for (field, ours) in &ours {
        // PEFT keeps the name of the start; to us the converted adapter is plain LoRA.
        let loose = ["init_lora_weights", "lora_alpha", "target_modules"].contains(&field.as_str());
        match (loose, &case.start) {
            (true, Some(_)) if field == "lora_alpha" => {
                assert!(relative(float(ours), float(&theirs[field])) < 1e-12, "{}", case.name);
            }
            (true, Some(_)) => {}
            _ => assert_eq!(Some(ours), theirs.get(field), "{}: `{field}`", case.name),
        }
    }
    let again = load_adapter(dir.path(), &case.decoder);
    let bits = |lora: &Lora| lora.tensors().flat_map(|(_, t)| values(t)).collect::<Vec<_>>();
    assert_eq!(bits(lora), bits(&again), "{}: saved and loaded", case.name);
}

/// For `check_peft_load.py` and `check_merged.py`: the adapter, logits with it, the merged model.
fn write_for_peft(dir: &Path, case: &Case, trained: &Lora, saved: &Lora) {
    let entry = |prompt: &Value| {
        let prompt = ids(prompt);
        let batch = Batch::from_documents(&[&prompt]);
        let logits = case.decoder.logits(&batch, Some(trained)).unwrap();
        json!({ "ids": prompt, "logits": logits.to_vec2::<f32>().unwrap() })
    };
    let entries: Vec<_> = list(&case.values["prompts"]).iter().map(entry).collect();
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("logits.json"), Value::from(entries).to_string()).unwrap();
    if !case.values["lora"].is_null() {
        std::fs::create_dir_all(dir.join("adapter")).unwrap();
        saved.save_peft(&dir.join("adapter"), None).unwrap();
    }
    let merged = dir.join("merged");
    merge_into(case, saved, &merged);
}

fn merge_into(case: &Case, lora: &Lora, dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    let source = WeightSource::open(&case.model).unwrap();
    let config = case.decoder.config();
    let options = MergeOptions { dtype: DType::F32, max_shard_size: None };
    merge_weights(&source, config, lora, dir, options, |_, _| Ok(())).unwrap();
    std::fs::write(dir.join("config.json"), config.to_hf().to_string()).unwrap();
}

/// Merging is the same function: DoRA's magnitudes, whole modules, halves of PiSSA.
fn check_merge(name: &'static str) {
    let case = Case::load(name);
    let lora = match &case.start {
        None => case.lora.clone(),
        Some(start) => residual::join(&case.lora, start).unwrap(),
    };
    let dir = tempfile::tempdir().unwrap();
    merge_into(&case, &lora, dir.path());
    let merged = Artifact::from_dir(ArtifactKind::Model, dir.path()).unwrap();
    let merged = Decoder::load(&merged, &Device::Cpu, DType::F32).unwrap();
    for prompt in list(&case.values["prompts"]) {
        let batch = Batch::from_documents(&[ids(prompt)]);
        let with = values(&case.decoder.logits(&batch, Some(&case.lora)).unwrap());
        let alone = values(&merged.logits(&batch, None).unwrap());
        let off = max_difference(&with, &alone);
        assert!(off < 3e-5, "{name}: merged logits are {off:.1e} off");
    }
}

macro_rules! cases {
    ($($name:ident),*) => {
        const NAMES: &[&str] = &[$(stringify!($name)),*];
        mod parity { $(#[test] fn $name() { super::check(stringify!($name)) })* }
        mod merged { $(#[test] fn $name() { super::check_merge(stringify!($name)) })* }
    };
}
cases!(
    dora,
    dora_rslora,
    full_mistral,
    full_qwen2,
    full_qwen3,
    loraplus,
    modules_to_save,
    olora,
    pissa
);

#[test]
fn every_committed_case_is_tested() {
    let entries = std::fs::read_dir(support::folder().join("methods")).unwrap();
    let entries = entries.map(|e| e.unwrap()).filter(|e| e.path().is_dir());
    let mut there: Vec<_> = entries.map(|e| e.file_name().into_string().unwrap()).collect();
    there.sort();
    assert_eq!(there, NAMES);
}

#[test]
fn dropout_has_the_means_of_pefts() {
    let reference = support::json("methods/dropout.json");
    let (p, passes) = (float(&reference["p"]), 4000u64);
    for name in ["loraplus", "dora_rslora"] {
        let theirs = &reference[name];
        let mut case = Case::load(name);
        case.lora.config.lora_dropout = p;
        let docs = documents(&case.values["grad_documents"]);
        let docs = batch(&docs[..1]);
        let count = docs.supervised() as f64;
        let mut grads = LoraGrads::zeros(&case.lora);
        let losses: Vec<f64> = (0..passes)
            .map(|key| {
                let options = PassOptions {
                    grad_scale: (1.0 / count / passes as f64) as f32,
                    dropout: Some(DropoutKey(key.wrapping_mul(0x9e37_79b9_7f4a_7c15))),
                    checkpoint: Checkpoint::None,
                };
                case.decoder
                    .loss_and_grad(&docs, &case.lora, &options, &mut grads)
                    .unwrap()
                    .nll_sum()
                    / count
            })
            .collect();
        let mean = losses.iter().sum::<f64>() / passes as f64;
        let sd = (losses.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / passes as f64).sqrt();
        let n = float(&reference["samples"]);
        let error = float(&theirs["loss_sd"]) * (1.0 / n + 1.0 / passes as f64).sqrt();
        let off = (mean - float(&theirs["loss_mean"])).abs() / error;
        let moved = (mean - float(&theirs["loss_without"])).abs() / error;
        let spread = relative(sd, float(&theirs["loss_sd"]));
        let names = case.names(&case.lora);
        let at = names.iter().position(|n| theirs["gradient"] == **n).unwrap();
        let gradient = grads.tensors().nth(at).unwrap();
        let distance = relative_distance(gradient, &support::floats(&theirs["gradient_mean"]));
        println!(
            "{name}: mean {off:.1} and no dropout {moved:.1} standard errors away, sd {spread:.1e}, gradient {distance:.1e}"
        );
        assert!(off < 4.0, "{name}: the mean loss is {off:.1} standard errors off");
        assert!(spread < 0.1, "{name}: the spread of the loss is {spread:.1e} off");
        assert!(distance < 0.1, "{name}: the mean gradient is {distance:.1e} off");
    }
}
