//! What of a fresh adapter comes from the base's weights: DoRA's magnitudes, `modules_to_save`,
//! and the starts of PiSSA and OLoRA.
//!
//! PiSSA and OLoRA take A₀ and B₀ from W and train on W − s·B₀A₀, so that the model starts as the
//! base. The base artifact stays as it is. On disk the adapter is the plain LoRA of twice the rank
//! that says the same of the base itself, W − s·B₀A₀ + s·BA = W + s·[B, −B₀]·[A; A₀]: any tool
//! can load it at any time. A file beside it, [`START`], tells the trainer that the second half is
//! A₀ and −B₀ and is not trained; [`split`] parts the halves and [`join`] puts them together.

use std::collections::BTreeSet;
use std::path::Path;

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use lora_flow_core::{Artifact, Error, Result, ResultExt};
use serde_json::{Value, json};

use crate::config::ModelConfig;
use crate::decoder::Decoder;
use crate::dora::row_norms;
use crate::lora::{Init, Lora, LoraModule, SavedTensor};
use crate::peft::{is_of_module, values};
use crate::svd;
use crate::weights::list;

/// Name of the file that says how the adapter of a folder was started.
pub const START: &str = "lora_flow_start.json";

/// A₀ and B₀ of each module, in the adapter's order.
#[derive(Debug, Clone)]
pub struct Start {
    /// `pissa` or `olora`.
    pub init: Init,
    /// A₀ [r, in] and B₀ [out, r] of each module.
    pub matrices: Vec<(Tensor, Tensor)>,
}

impl Lora {
    /// Fills in what comes from the base's weights. `read` gives a tensor of the base by name and
    /// shape, in f32. Returns A₀ and B₀ where the adapter starts from the weights.
    ///
    /// # Errors
    /// When a name of `modules_to_save` matches nothing, variants cannot be combined, or a weight
    /// cannot be read.
    pub fn init_from(
        &mut self,
        config: &ModelConfig,
        mut read: impl FnMut(&str, &[usize]) -> Result<Vec<f32>>,
    ) -> Result<Option<Start>> {
        let (init, dora) = (self.config.init_lora_weights, self.config.use_dora);
        if dora && init.from_weights() {
            return Err(Error::new("`use_dora` cannot be combined with PiSSA or OLoRA")
                .with_hint("the trained adapter could not be written as plain LoRA"));
        }
        for (name, shape) in self.config.saved_tensors(config)? {
            let values = read(&name, &shape)?;
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu)
                .with_context(|| format!("cannot make tensor `{name}`"))?;
            self.saved.push(SavedTensor { name, tensor });
        }
        if !dora && !init.from_weights() {
            return Ok(None);
        }
        for m in &mut self.modules {
            let name = format!("{}.weight", m.path);
            let values = read(&name, &[m.out_features, m.in_features])?;
            from_weight(m, &values, init, dora)
                .with_context(|| format!("cannot start the adapter of `{}`", m.path))?;
        }
        let matrices = self.modules.iter().map(|m| (m.a.clone(), m.b.clone())).collect();
        Ok(init.from_weights().then_some(Start { init, matrices }))
    }
}

fn from_weight(m: &mut LoraModule, values: &[f32], init: Init, dora: bool) -> CandleResult<()> {
    let (rows, cols, r) = (m.out_features, m.in_features, m.r);
    if dora {
        let w = Tensor::from_slice(values, (rows, cols), &Device::Cpu)?;
        m.magnitude = Some(row_norms(&w, None)?);
        return Ok(());
    }
    let w: Vec<f64> = values.iter().map(|x| f64::from(*x)).collect();
    let (a, b) = match init {
        Init::Pissa => {
            let top = svd::top(&w, rows, cols, r)?;
            // √(σ/s) on either side, so that s·B₀A₀ is the r largest parts of W.
            let root: Vec<f64> = top.values.iter().map(|s| (s / m.scale).sqrt()).collect();
            let scaled = |vectors: &[Vec<f64>]| -> Vec<Vec<f64>> {
                let pairs = vectors.iter().zip(&root);
                pairs.map(|(v, f)| v.iter().map(|x| x * f).collect()).collect()
            };
            (scaled(&top.right), scaled(&top.left))
        }
        _ => {
            let first = (0..r).map(|j| w.iter().skip(j).step_by(cols).copied().collect()).collect();
            let q = svd::orthonormal(first);
            // R = QᵀW, its first r rows.
            let project = |q: &Vec<f64>| {
                let mut row = vec![0f64; cols];
                for (w, q) in w.chunks(cols).zip(q) {
                    row.iter_mut().zip(w).for_each(|(r, w)| *r += q * w);
                }
                row
            };
            (q.iter().map(project).collect(), q)
        }
    };
    let f32s = |v: Vec<f64>| v.into_iter().map(|x| x as f32).collect::<Vec<_>>();
    m.a = Tensor::from_vec(f32s(a.concat()), (r, cols), &Device::Cpu)?;
    let b = Tensor::from_vec(f32s(b.concat()), (r, rows), &Device::Cpu)?;
    m.b = b.t()?.contiguous()?;
    Ok(())
}

/// The plain LoRA of rank 2r that says of the base itself what (A, B) say of W − s·B₀A₀.
///
/// # Errors
/// When the matrices do not fit.
pub fn join(lora: &Lora, start: &Start) -> Result<Lora> {
    let mut out = lora.clone();
    let config = &mut out.config;
    config.init_lora_weights = Init::Default;
    // The scale stays: α/r = 2α/2r, and α/√r = √2·α/√2r.
    let factor = if config.use_rslora { 2f64.sqrt() } else { 2.0 };
    config.r *= 2;
    config.lora_alpha *= factor;
    config.rank_pattern.values_mut().for_each(|r| *r *= 2);
    config.alpha_pattern.values_mut().for_each(|alpha| *alpha *= factor);
    for (m, (a0, b0)) in out.modules.iter_mut().zip(&start.matrices) {
        let both = || -> CandleResult<(Tensor, Tensor)> {
            let (a0, b0) = (a0.to_device(m.a.device())?, b0.to_device(m.b.device())?);
            Ok((Tensor::cat(&[&m.a, &a0], 0)?, Tensor::cat(&[&m.b, &b0.neg()?], 1)?))
        };
        (m.a, m.b) = both().with_context(|| format!("cannot join the halves of `{}`", m.path))?;
        m.r *= 2;
    }
    Ok(out)
}

/// The inverse of [`join`].
///
/// # Errors
/// When a rank is odd.
pub fn split(joined: &Lora, init: Init) -> Result<(Lora, Start)> {
    let mut lora = joined.clone();
    let config = &mut lora.config;
    if config.r % 2 == 1 || joined.modules.iter().any(|m| m.r % 2 == 1) {
        return Err(Error::new(format!("an adapter with a `{START}` has even ranks")));
    }
    config.init_lora_weights = init;
    let factor = if config.use_rslora { 2f64.sqrt() } else { 2.0 };
    config.r /= 2;
    config.lora_alpha /= factor;
    config.rank_pattern.values_mut().for_each(|r| *r /= 2);
    config.alpha_pattern.values_mut().for_each(|alpha| *alpha /= factor);
    let mut matrices = Vec::new();
    for m in &mut lora.modules {
        let r = m.r / 2;
        let halves = || -> CandleResult<_> {
            let part = |t: &Tensor, dim, from| t.narrow(dim, from, r)?.contiguous();
            let b0 = part(&m.b, 1, r)?.neg()?;
            Ok((part(&m.a, 0, 0)?, part(&m.b, 1, 0)?, part(&m.a, 0, r)?, b0))
        };
        let (a, b, a0, b0) =
            halves().with_context(|| format!("cannot part the halves of `{}`", m.path))?;
        (m.a, m.b, m.r) = (a, b, r);
        matrices.push((a0, b0));
    }
    Ok((lora, Start { init, matrices }))
}

/// W − s·B₀A₀ of each module, to train on ([`Decoder::overlay`]).
///
/// # Errors
/// When the decoder lacks a module.
pub fn lessened(decoder: &Decoder, lora: &Lora, start: &Start) -> Result<Vec<SavedTensor>> {
    let modules = lora.modules.iter().zip(&start.matrices);
    modules
        .map(|(m, (a0, b0))| {
            let name = format!("{}.weight", m.path);
            let weight = decoder
                .tensor(&name)
                .ok_or_else(|| Error::new(format!("the model has no tensor `{name}`")))?;
            let less = || -> CandleResult<Tensor> {
                let device = weight.device();
                let low = b0.to_device(device)?.matmul(&a0.to_device(device)?)?;
                weight.to_dtype(DType::F32)? - (low * m.scale)?
            };
            let tensor = less().with_context(|| format!("cannot lessen `{name}`"))?;
            Ok(SavedTensor { name, tensor })
        })
        .collect()
}

/// Writes [`START`] beside an adapter that [`join`] made.
///
/// # Errors
/// When the file cannot be written.
pub fn save_start(dir: &Path, init: Init) -> Result<()> {
    let name = if init == Init::Pissa { "pissa" } else { "olora" };
    let text = serde_json::to_string_pretty(&json!({ "init_lora_weights": name }))?;
    fs_err::write(dir.join(START), text + "\n")?;
    Ok(())
}

/// Reads [`START`], if the adapter has one.
///
/// # Errors
/// When it is malformed.
pub fn read_start(adapter: &Artifact) -> Result<Option<Init>> {
    let Some(path) = adapter.get(START) else { return Ok(None) };
    let value: Value = serde_json::from_slice(&fs_err::read(path)?)
        .with_context(|| format!("cannot read `{START}`"))?;
    match value["init_lora_weights"].as_str() {
        Some("pissa") => Ok(Some(Init::Pissa)),
        Some("olora") => Ok(Some(Init::Olora)),
        _ => Err(Error::new(format!("`{START}` names neither `pissa` nor `olora`"))),
    }
}

impl crate::lora::LoraConfig {
    /// Name and shape of the tensors that `modules_to_save` means, in model order: those of
    /// modules whose path ends in an entry.
    ///
    /// # Errors
    /// When an entry matches nothing, or the embedding of a model whose head is tied to it.
    pub fn saved_tensors(&self, config: &ModelConfig) -> Result<Vec<(String, Vec<usize>)>> {
        let tensors = config.tensors();
        let missing: Vec<_> = self
            .modules_to_save
            .iter()
            .filter(|entry| !tensors.iter().any(|(name, _)| is_of_module(name, entry)))
            .collect();
        let tied = config.tie_word_embeddings;
        let shared =
            |e: &String| tied && ["embed_tokens", "lm_head"].iter().any(|n| e.ends_with(n));
        if let Some(entry) = self.modules_to_save.iter().find(|e| shared(e)) {
            return Err(Error::new(format!(
                "`modules_to_save`: `{entry}` shares its weights with the {} in this model",
                if entry.ends_with("lm_head") { "embedding" } else { "output head" }
            ))
            .with_hint("a copy would part the two; use `method: full` to train them together"));
        }
        if !missing.is_empty() {
            let modules: BTreeSet<_> =
                tensors.iter().filter_map(|(name, _)| name.rsplit('.').nth(1)).collect();
            return Err(Error::new(format!(
                "`modules_to_save`: no module matches {}",
                list(&missing)
            ))
            .with_hint(format!(
                "modules are {}",
                modules.iter().map(|m| format!("`{m}`")).collect::<Vec<_>>().join(", ")
            )));
        }
        let asked = |name: &str| self.modules_to_save.iter().any(|entry| is_of_module(name, entry));
        Ok(tensors.into_iter().filter(|(name, _)| asked(name)).collect())
    }
}

/// ΔW = s·B·A of a module in f64, row by row.
pub(crate) fn delta(m: &LoraModule) -> CandleResult<Vec<f64>> {
    let (a, b) = (values(&m.a)?, values(&m.b)?);
    let mut out = vec![0f64; m.out_features * m.in_features];
    for (row, b) in out.chunks_mut(m.in_features).zip(b.chunks(m.r)) {
        for (a, b) in a.chunks(m.in_features).zip(b) {
            let factor = m.scale * f64::from(*b);
            row.iter_mut().zip(a).for_each(|(x, a)| *x += factor * f64::from(*a));
        }
    }
    Ok(out)
}
