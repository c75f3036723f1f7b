//! Merging: W′ = W + s·B·A for every adapted layer (each row scaled to its magnitude with DoRA),
//! and the tensors trained as a whole in place of the base's; written as safetensors one tensor at
//! a time.
//!
//! The sum is formed in f32, whatever the base is stored in, and rounded once; the report says
//! what that rounding costs.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use half::{bf16, f16};
use lora_flow_core::{Error, Result, ResultExt};
use rayon::prelude::*;
use serde_json::json;

use crate::config::{ModelConfig, dtype_name};
use crate::lora::{Lora, LoraModule};
use crate::peft::values;
use crate::safetensors_file::{SafetensorsWriter, encode};
use crate::weights::{INDEX, WeightSource};

/// Files of a model's folder that go on to what is made of it as they are.
pub const CARRIED: &[&str] =
    &["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"];

/// Values measured side by side.
const LANES: usize = 16;

/// How the merged weights are written.
#[derive(Debug, Clone, Copy)]
pub struct MergeOptions {
    /// `F32`, `BF16` or `F16`.
    pub dtype: DType,
    /// Largest size of one file in bytes; `None` writes one file.
    pub max_shard_size: Option<u64>,
}

/// What rounding did to one adapted layer.
#[derive(Debug, Clone, PartialEq)]
pub struct ModuleRounding {
    /// Path of the layer.
    pub path: String,
    /// max |ΔW| of the adapter's change ΔW = s·B·A.
    pub max_delta: f64,
    /// max |rounded W′ − W′|.
    pub max_rounding: f64,
    /// ‖rounded W′ − W′‖ / ‖ΔW‖ (Frobenius); above 1 the rounding outweighs the change.
    pub relative: f64,
}

/// What was written.
#[derive(Debug, Clone)]
pub struct MergeReport {
    /// One entry per adapted layer, in model order.
    pub modules: Vec<ModuleRounding>,
    /// Names of the files written.
    pub files: Vec<String>,
    /// Bytes of weights written.
    pub bytes: u64,
}

/// Writes the merged weights into `dir`: `model.safetensors`, or shards and their index. A tied
/// model gets no `lm_head.weight`. `progress(done, total)` is called after every tensor and may
/// stop the work with an error.
///
/// # Errors
/// When a base tensor is missing, a merged value leaves the range of the dtype, or a file cannot
/// be written.
pub fn merge_weights(
    source: &WeightSource,
    config: &ModelConfig,
    lora: &Lora,
    dir: &Path,
    options: MergeOptions,
    mut progress: impl FnMut(usize, usize) -> Result<()>,
) -> Result<MergeReport> {
    let dtype = options.dtype;
    let adapters: BTreeMap<String, &LoraModule> =
        lora.modules.iter().map(|m| (format!("{}.weight", m.path), m)).collect();
    let whole: BTreeMap<&str, &Tensor> =
        lora.saved.iter().map(|s| (s.name.as_str(), &s.tensor)).collect();
    let mut tensors = config.tensors();
    tensors.sort();
    for s in &lora.saved {
        if !tensors.iter().any(|(name, shape)| *name == s.name && shape == s.tensor.dims()) {
            return Err(Error::new(format!(
                "the adapter replaces `{}` {:?}, which the model lacks or has in another shape",
                s.name,
                s.tensor.dims()
            )));
        }
    }
    if let Some(name) = adapters.keys().find(|n| !tensors.iter().any(|(t, _)| t == *n)) {
        return Err(Error::new(format!("the adapter changes `{name}`, which the model lacks")));
    }

    let shards = shards(&tensors, dtype, options.max_shard_size);
    let total = tensors.len();
    let mut done = 0;
    let mut roundings = BTreeMap::new();
    let mut weight_map = BTreeMap::new();
    let mut files = Vec::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = if shards.len() == 1 {
            "model.safetensors".to_owned()
        } else {
            format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len())
        };
        let announced: Vec<_> =
            shard.iter().map(|(name, shape)| (name.clone(), dtype, shape.clone())).collect();
        let mut writer = SafetensorsWriter::create(&dir.join(&file), &announced)?;
        for (name, shape) in shard.iter() {
            match (adapters.get(name), whole.get(name.as_str())) {
                (None, None) => writer.write(name, &base_bytes(source, name, shape, dtype)?)?,
                (_, Some(tensor)) => {
                    let values = values(tensor).with_context(|| format!("cannot read `{name}`"))?;
                    check_range(&values, dtype, name)?;
                    writer.write(name, &encode(&values, dtype))?;
                }
                (Some(module), None) => {
                    let (bytes, rounding) = merged_bytes(source, name, shape, module, dtype)?;
                    writer.write(name, &bytes)?;
                    roundings.insert(module.path.clone(), rounding);
                }
            }
            weight_map.insert(name.clone(), file.clone());
            done += 1;
            progress(done, total)?;
        }
        writer.finish()?;
        files.push(file);
    }
    let parameters = config.parameters();
    let bytes = (parameters * dtype.size_in_bytes()) as u64;
    if shards.len() > 1 {
        let index = json!({
            "metadata": { "total_parameters": parameters, "total_size": bytes },
            "weight_map": weight_map,
        });
        fs_err::write(dir.join(INDEX), serde_json::to_string_pretty(&index)? + "\n")?;
        files.push(INDEX.to_owned());
    }
    let modules = lora.modules.iter().filter_map(|m| roundings.remove(&m.path)).collect();
    Ok(MergeReport { modules, files, bytes })
}

/// Splits tensors into files of at most `limit` bytes; a larger tensor gets a file of its own.
fn shards(
    tensors: &[(String, Vec<usize>)],
    dtype: DType,
    limit: Option<u64>,
) -> Vec<&[(String, Vec<usize>)]> {
    let mut out = Vec::new();
    let (mut start, mut size) = (0, 0u64);
    for (i, (_, shape)) in tensors.iter().enumerate() {
        let bytes = (shape.iter().product::<usize>() * dtype.size_in_bytes()) as u64;
        if i > start && limit.is_some_and(|limit| size + bytes > limit) {
            out.push(&tensors[start..i]);
            (start, size) = (i, 0);
        }
        size += bytes;
    }
    out.push(&tensors[start..]);
    out
}

/// A tensor that no adapter changes: its stored bytes, or its values in the new dtype.
fn base_bytes(source: &WeightSource, name: &str, shape: &[usize], dtype: DType) -> Result<Vec<u8>> {
    if source.shape(name) == Some(shape)
        && let Some(bytes) = source.raw(name, dtype)
    {
        return Ok(bytes.to_vec());
    }
    let values = source.read_f32(name, shape)?;
    check_range(&values, dtype, name)?;
    Ok(encode(&values, dtype))
}

fn merged_bytes(
    source: &WeightSource,
    name: &str,
    shape: &[usize],
    module: &LoraModule,
    dtype: DType,
) -> Result<(Vec<u8>, ModuleRounding)> {
    let mut weight = source.read_f32(name, shape)?;
    let norms = add_delta(&mut weight, module, dtype)
        .with_context(|| format!("cannot merge the adapter of `{}`", module.path))?;
    if !norms.rounding.is_finite() || !norms.delta.is_finite() {
        check_range(&weight, dtype, name)?;
    }
    let relative = if norms.rounding == 0.0 { 0.0 } else { (norms.rounding / norms.delta).sqrt() };
    let rounding = ModuleRounding {
        path: module.path.clone(),
        max_delta: norms.max_delta.into(),
        max_rounding: norms.max_rounding.into(),
        relative,
    };
    Ok((encode(&weight, dtype), rounding))
}

/// Measures of one row, combined over rows.
#[derive(Debug, Clone, Copy, Default)]
struct Norms {
    max_delta: f32,
    max_rounding: f32,
    /// Σ ΔW².
    delta: f64,
    /// Σ (rounded − W′)².
    rounding: f64,
}

impl Norms {
    fn add(self, other: Self) -> Self {
        Self {
            max_delta: self.max_delta.max(other.max_delta),
            max_rounding: self.max_rounding.max(other.max_rounding),
            delta: self.delta + other.delta,
            rounding: self.rounding + other.rounding,
        }
    }
}

/// W += s·B·A in f32, row by row, and with DoRA W ← m/‖W‖·W; each row sums over the rank in order,
/// so the bits do not depend on the number of threads.
fn add_delta(weight: &mut [f32], module: &LoraModule, dtype: DType) -> candle_core::Result<Norms> {
    let (n_in, r) = (module.in_features, module.r);
    let (a, b) = (values(&module.a)?, values(&module.b)?);
    let scale = module.scale as f32;
    let magnitudes = module.magnitude.as_ref().map(values).transpose()?;
    let rows: Vec<Norms> = weight
        .par_chunks_mut(n_in)
        .zip(b.par_chunks(r))
        .enumerate()
        .map(|(i, (row, b_row))| {
            let mut delta = vec![0f32; n_in];
            for (b, a_row) in b_row.iter().zip(a.chunks(n_in)) {
                delta.iter_mut().zip(a_row).for_each(|(d, a)| *d += b * a);
            }
            delta.iter_mut().for_each(|d| *d *= scale);
            if let Some(magnitudes) = &magnitudes {
                let sum = || row.iter().zip(&delta).map(|(w, d)| w + d);
                let norm = sum().map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
                let gain = (f64::from(magnitudes[i]) / norm) as f32;
                delta.iter_mut().zip(&*row).for_each(|(d, w)| *d = gain * (w + *d) - w);
            }
            // Lanes, so that the sums of the report do not slow the loop down.
            let mut lanes = [[0f32; LANES]; 4];
            for (w, d) in row.chunks_mut(LANES).zip(delta.chunks(LANES)) {
                for (lane, (w, d)) in w.iter_mut().zip(d).enumerate() {
                    let change = *d;
                    *w += change;
                    let error = round(*w, dtype) - *w;
                    lanes[0][lane] = lanes[0][lane].max(change.abs());
                    lanes[1][lane] = lanes[1][lane].max(error.abs());
                    lanes[2][lane] += change * change;
                    lanes[3][lane] += error * error;
                }
            }
            let sum = |lane: &[f32; LANES]| lane.iter().map(|v| f64::from(*v)).sum();
            Norms {
                max_delta: lanes[0].iter().copied().fold(0.0, f32::max),
                max_rounding: lanes[1].iter().copied().fold(0.0, f32::max),
                delta: sum(&lanes[2]),
                rounding: sum(&lanes[3]),
            }
        })
        .collect();
    Ok(rows.into_iter().fold(Norms::default(), Norms::add))
}

fn round(v: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_f32(v).to_f32(),
        DType::F16 => f16::from_f32(v).to_f32(),
        _ => v,
    }
}

fn check_range(values: &[f32], dtype: DType, name: &str) -> Result<()> {
    match values.par_iter().find_first(|v| !round(**v, dtype).is_finite()) {
        None => Ok(()),
        Some(v) => Err(Error::new(format!(
            "tensor `{name}` holds {v}, which {} cannot hold",
            dtype_name(dtype)
        ))
        .with_hint("merge to `bfloat16` or `float32`, or look for a diverged training")),
    }
}
