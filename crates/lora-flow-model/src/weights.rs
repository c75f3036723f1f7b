//! The weights of a Model artifact under Hugging Face's names, whatever file they stand in.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use lora_flow_core::{Artifact, Error, Result, ResultExt};
use serde_json::Value;

use crate::config::ModelConfig;
use crate::gguf::GgufFile;
use crate::safetensors_file::SafetensorsFile;

/// Name of the GGUF file in a Model artifact.
pub const GGUF: &str = "model.gguf";
/// Name of the index of sharded safetensors.
pub const INDEX: &str = "model.safetensors.index.json";
/// At most this many names are listed in an error.
const LISTED: usize = 8;

/// Open weight files; tensors are read (and dequantised) only when asked for.
#[derive(Debug)]
pub struct WeightSource {
    store: Store,
}

#[derive(Debug)]
enum Store {
    Safetensors {
        shards: Vec<SafetensorsFile>,
        /// Shard of each tensor.
        place: BTreeMap<String, usize>,
    },
    Gguf {
        file: GgufFile,
        /// GGUF name of each Hugging Face name.
        names: BTreeMap<String, String>,
        /// GGUF names that no Hugging Face name belongs to.
        strangers: Vec<String>,
        /// Heads of q and of k when their rows are permuted (architecture `llama`).
        permuted: Option<(usize, usize)>,
    },
}

impl WeightSource {
    /// Opens `model.gguf`, the shards that `model.safetensors.index.json` names, or
    /// `model.safetensors`, and reads the headers.
    ///
    /// # Errors
    /// When there are no weights, a shard is missing, or a file is damaged; the message names
    /// the file.
    pub fn open(model: &Artifact) -> Result<Self> {
        if let Some(path) = model.get(GGUF) {
            return Self::open_gguf(GgufFile::open(path)?);
        }
        let Some(index) = model.get(INDEX) else {
            let files: Vec<(&str, &Path)> = model.with_suffix(".safetensors").collect();
            let (name, path) = match files.as_slice() {
                [one] => *one,
                _ => {
                    let file = model.get("model.safetensors").ok_or_else(|| {
                        Error::new("the model has no weights").with_hint(
                            "a model needs `model.safetensors`, its shards with \
                             `model.safetensors.index.json`, or `model.gguf`",
                        )
                    })?;
                    ("model.safetensors", file)
                }
            };
            let shard =
                SafetensorsFile::open(path).with_context(|| format!("cannot open `{name}`"))?;
            let place = shard.tensors().keys().map(|n| (n.clone(), 0)).collect();
            return Ok(Self { store: Store::Safetensors { shards: vec![shard], place } });
        };
        Self::open_shards(model, index)
    }

    fn open_shards(model: &Artifact, index: &Path) -> Result<Self> {
        let text = fs_err::read_to_string(index)?;
        let index: Value =
            serde_json::from_str(&text).with_context(|| format!("cannot read `{INDEX}`"))?;
        let map = index
            .get("weight_map")
            .and_then(Value::as_object)
            .ok_or_else(|| Error::new(format!("`{INDEX}` has no `weight_map`")))?;
        let mut of_shard: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in map {
            let shard = shard.as_str().ok_or_else(|| {
                Error::new(format!("`{INDEX}`: the shard of `{tensor}` is {shard}, not a name"))
            })?;
            of_shard.entry(shard).or_default().push(tensor);
        }
        let missing: Vec<_> = of_shard.keys().filter(|s| model.get(s).is_none()).copied().collect();
        if !missing.is_empty() {
            return Err(Error::new(format!(
                "`{INDEX}` names {} that {} not there",
                list(&missing),
                if missing.len() == 1 { "is" } else { "are" }
            ))
            .with_hint("fetch the missing files again"));
        }
        let mut shards = Vec::new();
        let mut place = BTreeMap::new();
        for (name, tensors) in of_shard {
            let shard = SafetensorsFile::open(model.file(name)?)
                .with_context(|| format!("cannot open `{name}`"))?;
            for tensor in tensors {
                if !shard.tensors().contains_key(tensor)
                    && !shard.unsupported().contains_key(tensor)
                {
                    return Err(Error::new(format!(
                        "`{INDEX}` places tensor `{tensor}` in `{name}`, which does not have it"
                    )));
                }
            }
            for tensor in shard.tensors().keys() {
                if place.insert(tensor.clone(), shards.len()).is_some() {
                    return Err(Error::new(format!("tensor `{tensor}` stands in two shards")));
                }
            }
            shards.push(shard);
        }
        Ok(Self { store: Store::Safetensors { shards, place } })
    }

    /// Takes an open GGUF file as the weights.
    ///
    /// # Errors
    /// When its head counts are missing.
    pub fn open_gguf(file: GgufFile) -> Result<Self> {
        let mut names = BTreeMap::new();
        let mut strangers = Vec::new();
        for name in file.tensors().keys() {
            match hf_name(name) {
                // `blk.00` beside `blk.0` would give the same name twice.
                Some(hf) if names.contains_key(&hf) => strangers.push(name.clone()),
                Some(hf) => {
                    names.insert(hf, name.clone());
                }
                // The table of a rope scaling, which the config has understood.
                None if name == "rope_freqs.weight" => {}
                None => strangers.push(name.clone()),
            }
        }
        let permuted = match file.string("general.architecture")? {
            Some("llama") => {
                let heads = file.integer("llama.attention.head_count")?.ok_or_else(|| {
                    file.error("metadata `llama.attention.head_count` is missing")
                })?;
                let kv = file.integer("llama.attention.head_count_kv")?.unwrap_or(heads);
                Some((heads, kv))
            }
            _ => None,
        };
        Ok(Self { store: Store::Gguf { file, names, strangers, permuted } })
    }

    /// The GGUF file, where the weights stand in one.
    pub fn gguf(&self) -> Option<&GgufFile> {
        match &self.store {
            Store::Gguf { file, .. } => Some(file),
            Store::Safetensors { .. } => None,
        }
    }

    /// Shape of a tensor, if it is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        match &self.store {
            Store::Safetensors { shards, place } => {
                Some(&shards.get(*place.get(name)?)?.tensors().get(name)?.shape)
            }
            Store::Gguf { file, names, .. } => Some(&file.tensors().get(names.get(name)?)?.shape),
        }
    }

    /// Storage type of a tensor as people call it: `F32`, `BF16`, `Q4_1` …
    pub fn storage_type(&self, name: &str) -> Option<String> {
        Some(match &self.store {
            Store::Safetensors { .. } => format!("{:?}", self.stored_dtype(name)?),
            Store::Gguf { file, names, .. } => {
                let ggml = format!("{:?}", file.tensors().get(names.get(name)?)?.dtype);
                // candle writes Q4K where everybody else writes Q4_K.
                match ggml.strip_suffix('K').filter(|s| !s.ends_with('_')) {
                    Some(short) => format!("{short}_K"),
                    None => ggml,
                }
            }
        })
    }

    /// Dtype of a tensor stored in safetensors; `None` in GGUF.
    pub fn stored_dtype(&self, name: &str) -> Option<DType> {
        match &self.store {
            Store::Safetensors { shards, place } => {
                Some(shards.get(*place.get(name)?)?.tensors().get(name)?.dtype)
            }
            Store::Gguf { .. } => None,
        }
    }

    /// Checks that the files hold exactly the tensors of the config, each of its shape, without
    /// reading any. Returns the names of tensors that are there without need and do no harm
    /// (rotary tables, the head of a tied model).
    ///
    /// # Errors
    /// Lists missing tensors, wrong shapes, unsupported types and unknown tensors.
    pub fn check_all(&self, config: &ModelConfig) -> Result<Vec<String>> {
        let expected = config.tensors();
        let mut problems = Vec::new();
        let unsupported = self.unsupported();
        let missing: Vec<_> = expected
            .iter()
            .map(|(name, _)| name.as_str())
            .filter(|n| self.shape(n).is_none() && !unsupported.iter().any(|(u, _)| u == n))
            .collect();
        if !missing.is_empty() {
            problems.push(format!("missing: {}", list(&missing)));
        }
        let wrong: Vec<_> = expected
            .iter()
            .filter_map(|(name, shape)| {
                let found = self.shape(name).filter(|found| found != shape)?;
                Some(format!("{name} {found:?} instead of {shape:?}"))
            })
            .collect();
        if !wrong.is_empty() {
            problems.push(format!("of another shape: {}", list(&wrong)));
        }
        if !unsupported.is_empty() {
            let names: Vec<_> =
                unsupported.iter().map(|(name, dtype)| format!("{name} ({dtype})")).collect();
            problems.push(format!("of an unsupported type: {}", list(&names)));
        }
        let known: BTreeSet<_> = expected.iter().map(|(name, _)| name.as_str()).collect();
        let (idle, unknown): (Vec<_>, Vec<_>) = self
            .names()
            .into_iter()
            .filter(|n| !known.contains(n.as_str()))
            .partition(|n| n.ends_with("rotary_emb.inv_freq") || n == "lm_head.weight");
        if !unknown.is_empty() {
            problems.push(format!("not of this architecture: {}", list(&unknown)));
        }
        if problems.is_empty() {
            return Ok(idle);
        }
        Err(Error::new(format!(
            "the weights do not fit the config of `{}`; tensors {}",
            config.architecture.hf_name(),
            problems.join("; ")
        ))
        .with_hint("the files may belong to different models, or one is missing"))
    }

    /// Names of all tensors: Hugging Face's, or GGUF's where there is none.
    fn names(&self) -> Vec<String> {
        match &self.store {
            Store::Safetensors { place, .. } => place.keys().cloned().collect(),
            Store::Gguf { names, strangers, .. } => {
                names.keys().chain(strangers).cloned().collect()
            }
        }
    }

    fn unsupported(&self) -> Vec<(&str, &str)> {
        match &self.store {
            Store::Safetensors { shards, .. } => shards
                .iter()
                .flat_map(SafetensorsFile::unsupported)
                // Old checkpoints carry integer buffers that nobody reads.
                .filter(|(name, _)| !name.ends_with(".attn.bias"))
                .map(|(name, dtype)| (name.as_str(), dtype.as_str()))
                .collect(),
            Store::Gguf { .. } => Vec::new(),
        }
    }

    fn check_shape(&self, name: &str, shape: &[usize]) -> Result<()> {
        match self.shape(name) {
            Some(found) if found == shape => Ok(()),
            Some(found) => Err(Error::new(format!(
                "tensor `{name}` has the shape {found:?} instead of {shape:?}"
            ))),
            None => Err(Error::new(format!("the model has no tensor `{name}`"))),
        }
    }

    /// A tensor's values as f32 in memory, in the order of Hugging Face's layout.
    ///
    /// # Errors
    /// When it is missing or has another shape.
    pub fn read_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.check_shape(name, shape)?;
        match &self.store {
            Store::Safetensors { shards, place } => shards[place[name]].read_f32(name),
            Store::Gguf { file, names, permuted, .. } => {
                let heads = heads(name, *permuted);
                let rows = unpermute(shape.first().copied().unwrap_or(0), heads, name)?;
                file.read_f32(&names[name], &rows, heads.is_some())
            }
        }
    }

    /// A tensor of the model on a device, as f32 or bf16, dequantised where it is quantised.
    ///
    /// # Errors
    /// When it is missing, has another shape, holds a value that is not finite, or the device has
    /// no room.
    pub fn tensor(
        &self,
        name: &str,
        shape: &[usize],
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        self.check_shape(name, shape)?;
        let tensor = if dtype == DType::BF16 {
            let values = match &self.store {
                Store::Safetensors { shards, place } => shards[place[name]].read_bf16(name)?,
                Store::Gguf { file, names, permuted, .. } => {
                    let heads = heads(name, *permuted);
                    let rows = unpermute(shape.first().copied().unwrap_or(0), heads, name)?;
                    file.read_bf16(&names[name], &rows, heads.is_some())?
                }
            };
            require_finite(name, values.iter().position(|x| !x.is_finite()))?;
            Tensor::from_vec(values, shape, device)
        } else {
            let values = self.read_f32(name, shape)?;
            require_finite(name, values.iter().position(|x| !x.is_finite()))?;
            Tensor::from_vec(values, shape, device).and_then(|t| t.to_dtype(dtype))
        };
        tensor.with_context(|| format!("cannot place tensor `{name}` on the device"))
    }

    /// The stored bytes of a tensor, where it stands in safetensors as `dtype` already.
    pub fn raw(&self, name: &str, dtype: DType) -> Option<&[u8]> {
        match &self.store {
            Store::Safetensors { shards, place } if self.stored_dtype(name) == Some(dtype) => {
                shards.get(*place.get(name)?)?.bytes(name).ok()
            }
            _ => None,
        }
    }
}

/// Up to [`LISTED`] names, and how many more.
pub(crate) fn list(names: &[impl AsRef<str>]) -> String {
    let mut out: Vec<_> = names.iter().take(LISTED).map(|n| format!("`{}`", n.as_ref())).collect();
    if names.len() > LISTED {
        out.push(format!("and {} more", names.len() - LISTED));
    }
    out.join(", ")
}

/// Heads of a tensor whose rows are permuted.
fn heads(name: &str, permuted: Option<(usize, usize)>) -> Option<usize> {
    let (q, kv) = permuted?;
    if name.contains(".self_attn.q_proj.") {
        Some(q)
    } else if name.contains(".self_attn.k_proj.") {
        Some(kv)
    } else {
        None
    }
}

/// Row of the file for a row of Hugging Face's layout. A `llama` GGUF stores the two halves of a
/// rotary pair side by side, Hugging Face half a head apart: (head, half, i) ← (head, i, half).
fn unpermute(
    rows: usize,
    heads: Option<usize>,
    name: &str,
) -> Result<Box<dyn Fn(usize) -> usize + Sync>> {
    let Some(heads) = heads else { return Ok(Box::new(|row| row)) };
    if heads == 0 || !rows.is_multiple_of(2 * heads) {
        return Err(Error::new(format!(
            "tensor `{name}` has {rows} rows, which do not make {heads} heads of even width"
        )));
    }
    let width = rows / heads;
    Ok(Box::new(move |row| {
        let (head, within) = (row / width, row % width);
        let (half, i) = (within / (width / 2), within % (width / 2));
        head * width + 2 * i + half
    }))
}

/// One value that is not finite would spoil every loss: better said by name than found as a NaN
/// after a step.
fn require_finite(name: &str, bad: Option<usize>) -> Result<()> {
    match bad {
        None => Ok(()),
        Some(at) => Err(Error::new(format!("tensor `{name}` is not finite at element {at}"))
            .with_hint("the file is damaged, or the model was broken when it was saved")),
    }
}

/// Hugging Face's name of a GGUF tensor.
pub fn hf_name(gguf: &str) -> Option<String> {
    match gguf {
        "token_embd.weight" => return Some("model.embed_tokens.weight".into()),
        "output_norm.weight" => return Some("model.norm.weight".into()),
        "output.weight" => return Some("lm_head.weight".into()),
        _ => {}
    }
    let (layer, rest) = gguf.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let (part, kind) = rest.split_once('.')?;
    if !matches!(kind, "weight" | "bias") {
        return None;
    }
    let part = match part {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{part}.{kind}"))
}
