//! PEFT folders: `adapter_config.json` + `adapter_model.safetensors`, as PEFT 0.21 writes them.
//!
//! Loading is strict both ways: missing and extra tensors, wrong shapes, values that are no
//! numbers, and settings that would change the computation and are not supported are errors.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use lora_flow_core::{Artifact, Error, Result, ResultExt};
use serde_json::{Map, Value, json};

use crate::config::ModuleInfo;
use crate::lora::{Init, Lora, LoraConfig, LoraModule, SavedTensor, TargetModules};
use crate::lora_match::suffixes;
use crate::safetensors_file::{SafetensorsFile, SafetensorsWriter, encode};
use crate::weights::list;

/// Name of the configuration in a PEFT folder.
pub const CONFIG: &str = "adapter_config.json";
/// Name of the weights in a PEFT folder.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before every module's path.
const PREFIX: &str = "base_model.model.";

/// Fields that do not change what an adapter computes once it is trained.
const HARMLESS: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
];

impl Lora {
    /// Writes the adapter into a folder. The same adapter gives the same bytes.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save_peft(&self, dir: &Path, base_model: Option<&str>) -> Result<()> {
        let config = serde_json::to_string_pretty(&self.peft_config(base_model))?;
        fs_err::write(dir.join(CONFIG), config + "\n")?;

        let mut tensors = BTreeMap::new();
        for m in &self.modules {
            tensors.insert(tensor_name(&m.path, 'A'), &m.a);
            tensors.insert(tensor_name(&m.path, 'B'), &m.b);
            if let Some(magnitude) = &m.magnitude {
                tensors.insert(magnitude_name(&m.path), magnitude);
            }
        }
        for saved in &self.saved {
            tensors.insert(format!("{PREFIX}{}", saved.name), &saved.tensor);
        }
        let announced: Vec<_> =
            tensors.iter().map(|(name, t)| (name.clone(), DType::F32, t.dims().to_vec())).collect();
        let mut writer = SafetensorsWriter::create(&dir.join(WEIGHTS), &announced)?;
        for (name, tensor) in tensors {
            let values = values(tensor).with_context(|| format!("cannot read `{name}`"))?;
            writer.write(&name, &encode(&values, DType::F32))?;
        }
        writer.finish()
    }

    /// `adapter_config.json`.
    fn peft_config(&self, base_model: Option<&str>) -> Value {
        let config = &self.config;
        let modules: Vec<_> = self
            .modules
            .iter()
            .map(|m| ModuleInfo {
                path: m.path.clone(),
                in_features: m.in_features,
                out_features: m.out_features,
            })
            .collect();
        let sorted = |names: BTreeSet<&str>| json!(names);
        let target = |target: &TargetModules| match target {
            TargetModules::List(names) => sorted(names.iter().map(String::as_str).collect()),
            TargetModules::Regex(regex) => json!(regex),
            TargetModules::AllLinear => sorted(suffixes(&modules).into_iter().collect()),
        };
        json!({
            "alora_invocation_tokens": null,
            "alpha_pattern": config.alpha_pattern.iter().map(|(k, v)| (k.clone(), number(*v)))
                .collect::<Map<_, _>>(),
            "arrow_config": null,
            "auto_mapping": null,
            "base_model_name_or_path": base_model,
            "bias": "none",
            "corda_config": null,
            "ensure_weight_tying": false,
            "eva_config": null,
            "exclude_modules": config.exclude_modules.as_ref().map(target),
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": match config.init_lora_weights {
                Init::Default => json!(true),
                Init::Gaussian => json!("gaussian"),
                Init::Pissa => json!("pissa"),
                Init::Olora => json!("olora"),
            },
            "layer_replication": null,
            "layers_pattern": null,
            "layers_to_transform": config.layers_to_transform,
            "loftq_config": {},
            "lora_alpha": number(config.lora_alpha),
            "lora_bias": false,
            "lora_dropout": config.lora_dropout,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": match config.modules_to_save.as_slice() {
                [] => Value::Null,
                names => sorted(names.iter().map(String::as_str).collect()),
            },
            "peft_type": "LORA",
            "qalora_group_size": 16,
            "r": config.r,
            "rank_pattern": config.rank_pattern,
            "revision": null,
            "target_modules": target(&config.target_modules),
            "target_parameters": null,
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": null,
            "use_dora": config.use_dora,
            "use_qalora": false,
            "use_rslora": config.use_rslora,
        })
    }

    /// Reads an adapter for a model with these linear layers, onto the CPU. Tensors of
    /// `modules_to_save` are checked against the model where it is run.
    ///
    /// # Errors
    /// When the configuration is not supported or does not fit the model, or the tensors are not
    /// exactly those that it asks for.
    pub fn load_peft(adapter: &Artifact, modules: &[ModuleInfo]) -> Result<Self> {
        let config = read_config(adapter)?;
        let resolved = config
            .resolve(modules)
            .with_context(|| format!("the adapter's `{CONFIG}` does not fit the model"))?;
        let file = SafetensorsFile::open(adapter.file(WEIGHTS)?)
            .with_context(|| format!("cannot open the adapter's `{WEIGHTS}`"))?;

        let mut expected = BTreeMap::new();
        for m in &resolved {
            expected.insert(tensor_name(&m.module.path, 'A'), vec![m.r, m.module.in_features]);
            expected.insert(tensor_name(&m.module.path, 'B'), vec![m.module.out_features, m.r]);
            if config.use_dora {
                expected.insert(magnitude_name(&m.module.path), vec![m.module.out_features]);
            }
        }
        let whole = saved_in(&file, &config.modules_to_save)?;
        for (name, shape) in &whole {
            expected.insert(format!("{PREFIX}{name}"), shape.clone());
        }
        check_tensors(&file, &expected)?;

        let read = |name: String| -> Result<Tensor> {
            let values = file.read_f32(&name)?;
            if let Some(bad) = values.iter().find(|v| !v.is_finite()) {
                return Err(Error::new(format!("tensor `{name}` of the adapter holds {bad}"))
                    .with_hint("the training that made it diverged"));
            }
            let shape = expected.get(&name).cloned().unwrap_or_default();
            Tensor::from_vec(values, shape, &Device::Cpu)
                .with_context(|| format!("cannot make tensor `{name}`"))
        };
        let saved = whole
            .into_iter()
            .map(|(name, _)| Ok(SavedTensor { tensor: read(format!("{PREFIX}{name}"))?, name }))
            .collect::<Result<_>>()?;
        let modules = resolved
            .into_iter()
            .map(|m| {
                let path = &m.module.path;
                let magnitude = config.use_dora.then(|| read(magnitude_name(path)));
                Ok(LoraModule {
                    a: read(tensor_name(path, 'A'))?,
                    b: read(tensor_name(path, 'B'))?,
                    magnitude: magnitude.transpose()?,
                    in_features: m.module.in_features,
                    out_features: m.module.out_features,
                    r: m.r,
                    scale: config.scale(m.r, m.alpha),
                    path: m.module.path.clone(),
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { config, modules, saved })
    }
}

/// Reads and checks `adapter_config.json`.
///
/// # Errors
/// When it is missing, malformed, or asks for something that is not supported.
pub fn read_config(adapter: &Artifact) -> Result<LoraConfig> {
    let text = fs_err::read_to_string(adapter.file(CONFIG)?)?;
    let json: Value =
        serde_json::from_str(&text).with_context(|| format!("cannot read `{CONFIG}`"))?;
    let Value::Object(map) = &json else {
        return Err(Error::new(format!("`{CONFIG}` holds no JSON object")));
    };
    parse_config(map).with_context(|| format!("cannot use the adapter's `{CONFIG}`"))
}

fn parse_config(map: &Map<String, Value>) -> Result<LoraConfig> {
    let get = |name: &str| map.get(name).filter(|v| !v.is_null());
    match get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        Some(other) => {
            return Err(Error::new(format!("`peft_type` is `{other}`; only `LORA` is supported")));
        }
        None => return Err(Error::new("`peft_type` is missing")),
    }
    for (name, value) in map {
        check_supported(name, value)?;
    }
    let wrong = |name: &str, wanted: &str| {
        let found = map.get(name).cloned().unwrap_or(Value::Null);
        Error::new(format!("`{name}` is {found}, not {wanted}"))
    };
    let integer = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
    let boolean = |name: &str| match get(name) {
        None => Ok(false),
        Some(v) => v.as_bool().ok_or_else(|| wrong(name, "a boolean")),
    };
    let target = |name: &str| -> Result<Option<TargetModules>> {
        match get(name) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(TargetModules::from_text(s))),
            Some(Value::Array(list)) => list
                .iter()
                .map(|v| v.as_str().map(str::to_owned))
                .collect::<Option<Vec<_>>>()
                .map(|l| Some(TargetModules::List(l)))
                .ok_or_else(|| wrong(name, "a list of strings")),
            Some(_) => Err(wrong(name, "a string or a list")),
        }
    };
    let pattern = |name: &str| match get(name) {
        None => Ok(Map::new()),
        Some(Value::Object(map)) => Ok(map.clone()),
        Some(_) => Err(wrong(name, "an object")),
    };
    let ranks = pattern("rank_pattern")?
        .into_iter()
        .map(|(k, v)| Ok((k, integer(&v).ok_or_else(|| wrong("rank_pattern", "ranks"))?)))
        .collect::<Result<_>>()?;
    let alphas = pattern("alpha_pattern")?
        .into_iter()
        .map(|(k, v)| Ok((k, v.as_f64().ok_or_else(|| wrong("alpha_pattern", "numbers"))?)))
        .collect::<Result<_>>()?;
    let layers = match get("layers_to_transform") {
        None => None,
        Some(Value::Array(list)) => Some(
            list.iter()
                .map(integer)
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| wrong("layers_to_transform", "a list of layer numbers"))?,
        ),
        Some(one) => {
            let layer = integer(one);
            Some(vec![layer.ok_or_else(|| wrong("layers_to_transform", "a layer number"))?])
        }
    };
    let init = match get("init_lora_weights") {
        Some(Value::String(s)) if s == "gaussian" => Init::Gaussian,
        _ => Init::Default,
    };
    Ok(LoraConfig {
        r: get("r").and_then(integer).ok_or_else(|| wrong("r", "a rank"))?,
        lora_alpha: get("lora_alpha")
            .and_then(Value::as_f64)
            .ok_or_else(|| wrong("lora_alpha", "a number"))?,
        lora_dropout: match get("lora_dropout") {
            None => 0.0,
            Some(v) => v.as_f64().ok_or_else(|| wrong("lora_dropout", "a number"))?,
        },
        target_modules: target("target_modules")?
            .ok_or_else(|| Error::new("`target_modules` is missing"))?,
        exclude_modules: target("exclude_modules")?
            .filter(|t| !matches!(t, TargetModules::List(l) if l.is_empty())),
        layers_to_transform: layers,
        rank_pattern: ranks,
        alpha_pattern: alphas,
        use_rslora: boolean("use_rslora")?,
        init_lora_weights: init,
        use_dora: boolean("use_dora")?,
        modules_to_save: match get("modules_to_save") {
            None => Vec::new(),
            Some(Value::Array(list)) => list
                .iter()
                .map(|v| v.as_str().map(str::to_owned))
                .collect::<Option<_>>()
                .ok_or_else(|| wrong("modules_to_save", "a list of names"))?,
            Some(_) => return Err(wrong("modules_to_save", "a list of names")),
        },
    })
}

/// Refuses a field whose value changes the computation in a way that is not supported. Fields of
/// later PEFT versions pass where they are off (`null`, `false`, empty).
fn check_supported(name: &str, value: &Value) -> Result<()> {
    let off = match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    let fine = match name {
        "peft_type"
        | "r"
        | "lora_alpha"
        | "lora_dropout"
        | "target_modules"
        | "exclude_modules"
        | "layers_to_transform"
        | "rank_pattern"
        | "alpha_pattern"
        | "modules_to_save"
        | "use_dora"
        | "use_rslora" => true,
        "bias" => value.as_str() == Some("none"),
        "task_type" => value.as_str().is_none_or(|t| t == "CAUSAL_LM"),
        // `pissa`, `olora` and the like change the base, which is not in this folder.
        "init_lora_weights" => match value {
            Value::String(s) => matches!(s.as_str(), "gaussian" | "eva" | "orthogonal"),
            _ => true,
        },
        _ => off || HARMLESS.contains(&name),
    };
    if fine {
        return Ok(());
    }
    let shown: String = value.to_string().chars().take(80).collect();
    Err(Error::new(format!("`{name}` is {shown}, which is not supported")))
}

/// The file must hold exactly the expected tensors.
fn check_tensors(file: &SafetensorsFile, expected: &BTreeMap<String, Vec<usize>>) -> Result<()> {
    let mut problems = Vec::new();
    let there = file.tensors();
    let missing: Vec<_> = expected.keys().filter(|n| !there.contains_key(*n)).collect();
    if !missing.is_empty() {
        problems.push(format!("missing: {}", list(&missing)));
    }
    let extra: Vec<_> = there
        .keys()
        .chain(file.unsupported().keys())
        .filter(|n| !expected.contains_key(*n))
        .collect();
    if !extra.is_empty() {
        problems.push(format!("not asked for: {}", list(&extra)));
    }
    let wrong: Vec<_> = expected
        .iter()
        .filter_map(|(name, shape)| {
            let found = there.get(name).map(|i| &i.shape).filter(|f| f[..] != shape[..])?;
            Some(format!("{name} {found:?} instead of {shape:?}"))
        })
        .collect();
    if !wrong.is_empty() {
        problems.push(format!("of another shape: {}", list(&wrong)));
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::new(format!(
        "the adapter's `{WEIGHTS}` does not fit its `{CONFIG}` and the model; tensors {}",
        problems.join("; ")
    ))
    .with_hint("it may have been made for another base model"))
}

fn tensor_name(path: &str, which: char) -> String {
    format!("{PREFIX}{path}.lora_{which}.weight")
}

/// Name and shape of the tensors that `modules_to_save` put into a file.
fn saved_in(file: &SafetensorsFile, entries: &[String]) -> Result<Vec<(String, Vec<usize>)>> {
    let tensors = file.tensors().iter().filter_map(|(name, info)| {
        let name = name.strip_prefix(PREFIX).filter(|n| !n.contains(".lora_"))?;
        Some((name.to_owned(), info.shape.clone()))
    });
    let tensors: Vec<_> = tensors.collect();
    let missing: Vec<_> =
        entries.iter().filter(|e| !tensors.iter().any(|(name, _)| is_of_module(name, e))).collect();
    if !missing.is_empty() {
        return Err(Error::new(format!(
            "the adapter's `{WEIGHTS}` has no tensor of {}, which its `modules_to_save` names",
            list(&missing)
        )));
    }
    let asked = |name: &str| entries.iter().any(|e| is_of_module(name, e));
    Ok(tensors.into_iter().filter(|(name, _)| asked(name)).collect())
}

/// Whether a tensor belongs to a module whose path ends in `entry`: PEFT's rule, by which `norm`
/// means `input_layernorm` as well.
pub(crate) fn is_of_module(tensor: &str, entry: &str) -> bool {
    tensor.rsplit_once('.').is_some_and(|(module, _)| module.ends_with(entry))
}

/// PEFT leaves out `.weight` here.
fn magnitude_name(path: &str) -> String {
    format!("{PREFIX}{path}.lora_magnitude_vector")
}

/// Whole numbers as integers, as Python writes them.
fn number(v: f64) -> Value {
    if v.fract() == 0.0 && v.abs() < 1e15 { json!(v as i64) } else { json!(v) }
}

/// A tensor's values as f32 on the CPU, row by row.
pub(crate) fn values(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}
