//! `merge`: the adapter merged into the base, as a Hugging Face folder that needs no PEFT.
//!
//! The sum is formed in f32 and rounded once to the output's dtype. The last step proves the
//! result: the folder is loaded again from disk and its logits are held against those of base
//! and adapter ([`crate::proof`]).

use candle_core::DType;
use lora_flow_core::{
    Artifact, ArtifactKind, Error, Ports, Problem, Result, Task, TaskContext, parse_size,
};
use lora_flow_model::config::{ModelConfig, dtype_name};
use lora_flow_model::lora::Lora;
use lora_flow_model::merge::{CARRIED, MergeOptions, MergeReport, merge_weights};
use lora_flow_model::weights::WeightSource;
use lora_flow_train::{open_device, with_threads};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::json;

use crate::proof;

/// Layers shown in the report, those that rounding hurts most.
const SHOWN: usize = 5;

/// Rounding is worth a warning from this share of the adapter's own effect on the logits.
const LOUD: f64 = 0.5;

/// Parameters of `merge`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Merge {
    /// Number format of the merged weights. `base` keeps that of the base's safetensors; for a
    /// GGUF base it is the format the model is computed in.
    #[serde(default)]
    pub dtype: OutputDtype,
    /// Largest difference |Δ| allowed between a logit of base and adapter and the same logit of
    /// the merged model. Left out, it depends on `dtype`: 0.02 for float32, 0.2 for float16,
    /// 1 for bfloat16.
    #[serde(default)]
    pub tolerance: Option<f64>,
    /// Largest size of one weight file: bytes, or a number with `MB`, `GB`, `MiB` or `GiB`. Left
    /// out, all weights go into one file.
    #[serde(default)]
    pub max_shard_size: Option<Size>,
    /// Take the adapter out of a model that it was merged into: W − s·BA. What rounding did to the
    /// merged weights stays. Not for adapters with DoRA or `modules_to_save`, which overwrite what
    /// they change.
    #[serde(default)]
    pub unmerge: bool,
}

/// Number format of the merged weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OutputDtype {
    /// That of the base.
    #[default]
    Base,
    /// 32 bits.
    Float32,
    /// 16 bits, 8 of them for the fraction.
    Bfloat16,
    /// 16 bits, 11 of them for the fraction, range to 65,504.
    Float16,
}

/// A size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl Size {
    fn parse(text: &str) -> Option<Self> {
        let bytes = parse_size(text)?;
        (1.0..1e18).contains(&bytes).then_some(Self(bytes as u64))
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(d)?;
        let text = match &value {
            serde_json::Value::String(s) => s.clone(),
            other => other.to_string(),
        };
        Self::parse(&text).ok_or_else(|| {
            de::Error::custom(format!("{value} is not a size such as `5GB` or a number of bytes"))
        })
    }
}

impl JsonSchema for Size {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Size".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                { "type": "integer", "minimum": 1 },
                { "type": "string", "pattern": r"^[0-9.]+ *(B|KB|MB|GB|KiB|MiB|GiB)?$" },
            ],
        })
    }
}

impl Task for Merge {
    fn inputs(&self) -> Ports {
        Ports::none().required("model", ArtifactKind::Model, "the base model").required(
            "adapter",
            ArtifactKind::Adapter,
            "the trained adapter",
        )
    }

    fn outputs(&self) -> Ports {
        Ports::none().required("model", ArtifactKind::Model, "the merged model")
    }

    fn validate(&self) -> Vec<Problem> {
        match self.tolerance {
            Some(t) if !(t.is_finite() && t >= 0.0) => {
                let message = format!("`tolerance` is {t}, not a number from 0");
                vec![Problem::at("/tolerance", message)]
            }
            _ => Vec::new(),
        }
    }

    fn run(&self, cx: &mut TaskContext) -> Result<()> {
        let base = cx.input("model")?.clone();
        let mut config = ModelConfig::open(&base)?;
        let source = WeightSource::open(&base)?;
        source.check_all(&config)?;
        let mut lora = Lora::load_peft(cx.input("adapter")?, &config.linear_modules())?;
        if self.unmerge {
            if lora.modules.iter().any(|m| m.magnitude.is_some()) || !lora.saved.is_empty() {
                return Err(Error::new(
                    "an adapter with DoRA or `modules_to_save` cannot be taken out again",
                )
                .with_hint("it overwrites what it changes; keep the base"));
            }
            lora.modules.iter_mut().for_each(|m| m.scale = -m.scale);
        }
        let (dtype, origin) = self.output_dtype(&config, &source);

        let out = cx.output("model")?.path.clone();
        let options =
            MergeOptions { dtype, max_shard_size: self.max_shard_size.map(|size| size.0) };
        let report = with_threads(cx.threads(), || {
            merge_weights(&source, &config, &lora, &out, options, |done, total| {
                cx.progress(done as u64, Some(total as u64), "tensor", "merging");
                cx.check_cancelled()
            })
        })?;
        drop(source);
        config.dtype = dtype;
        let output = cx.output("model")?;
        output.write_json("config.json", &config.to_hf())?;
        for name in CARRIED {
            if let Some(file) = base.files.get(*name) {
                output.adopt(name, file);
            }
        }
        output.set_meta(json!({
            "architecture": config.architecture.hf_name(),
            "parameters": config.parameters(),
        }));
        cx.report(describe(&report, dtype, &origin));

        let merged = Artifact::from_dir(ArtifactKind::Model, &out)?;
        let device = open_device(cx.device())?;
        cx.progress(0, None, "model", "comparing logits");
        let proof = with_threads(cx.threads(), || {
            proof::compare(&base, &lora, &merged, &device, cx.cancel_token())
        })?;
        let tolerance = self.tolerance.unwrap_or(default_tolerance(dtype));
        cx.report(proof.describe(tolerance));
        cx.summary("dtype", dtype_name(dtype));
        cx.summary("max |Δ logit|", format!("{:.2e}", proof.max_difference));
        if proof.adapter_rms > 0.0 && proof.rms_difference > LOUD * proof.adapter_rms {
            cx.warn(format!(
                "rounding the weights to {} moves the logits by {:.2e} (rms), the adapter itself \
                 only by {:.2e}; merge to `float32` to keep what was learned",
                dtype_name(dtype),
                proof.rms_difference,
                proof.adapter_rms
            ));
        }
        // NaN compares as false and fails.
        if proof.max_difference <= tolerance {
            return Ok(());
        }
        Err(Error::new(format!(
            "the merged model does not compute what base and adapter do: a logit differs by {:.3e}, \
             more than the tolerance of {tolerance}",
            proof.max_difference
        ))
        .with_hint(if dtype == DType::F32 {
            "this is beyond rounding; verify the base model and the adapter"
        } else {
            "rounding the weights costs this much; merge to `float32`, or raise `tolerance`"
        }))
    }
}

impl Merge {
    /// The dtype to write, and a word on where it comes from.
    fn output_dtype(&self, config: &ModelConfig, source: &WeightSource) -> (DType, String) {
        let asked = "as asked".to_owned();
        match self.dtype {
            OutputDtype::Float32 => (DType::F32, asked),
            OutputDtype::Bfloat16 => (DType::BF16, asked),
            OutputDtype::Float16 => (DType::F16, asked),
            OutputDtype::Base => {
                let first = config.linear_modules().into_iter().next();
                let name = first.map(|m| format!("{}.weight", m.path)).unwrap_or_default();
                match source.stored_dtype(&name) {
                    Some(dtype) => (dtype, "as the base".to_owned()),
                    None => {
                        let stored = source.storage_type(&name).unwrap_or_default();
                        let origin =
                            format!("the base is GGUF ({stored}) and is computed in this format");
                        (config.dtype, origin)
                    }
                }
            }
        }
    }
}

/// Some times what is seen on a 135 M model whose every layer is adapted (5e-3, 0.05, 0.3, among
/// logits of up to 35). In f32 that is a single position, where attention stands between two tokens and
/// rounding decides (PyTorch: 1.3e-3 there); everywhere else it is 1e-4.
fn default_tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 0.02,
        DType::F16 => 0.2,
        _ => 1.0,
    }
}

/// What rounding did, worst layers first.
fn describe(report: &MergeReport, dtype: DType, origin: &str) -> String {
    let mut out = format!(
        "merged {} layers into {} ({origin}): {:.1} MB in {}\n",
        report.modules.len(),
        dtype_name(dtype),
        report.bytes as f64 / 1e6,
        match report.files.len() {
            1 => "one file".to_owned(),
            n => format!("{n} files"),
        },
    );
    let mut worst: Vec<_> = report.modules.iter().filter(|m| m.max_rounding > 0.0).collect();
    if worst.is_empty() {
        out.push_str("no layer is rounded\n");
        return out;
    }
    worst.sort_by(|a, b| b.relative.total_cmp(&a.relative).then_with(|| a.path.cmp(&b.path)));
    out.push_str(&format!(
        "{:<40} {:>10} {:>14} {:>16}\n",
        "rounding hurts most", "max |ΔW|", "max |rounding|", "‖rounding‖/‖ΔW‖"
    ));
    for m in worst.iter().take(SHOWN) {
        out.push_str(&format!(
            "{:<40} {:>10.2e} {:>14.2e} {:>16.4}\n",
            m.path, m.max_delta, m.max_rounding, m.relative
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn sizes_are_bytes_or_carry_a_unit() {
        let parse = |v: Value| serde_json::from_value::<Size>(v).map(|s| s.0).ok();
        assert_eq!(parse(json!("5GB")), Some(5_000_000_000));
        assert_eq!(parse(json!("1.5 MiB")), Some(1_572_864));
        assert_eq!(parse(json!(1000)), Some(1000));
        for bad in [json!("5 parsecs"), json!("GB"), json!(0), json!(-1), json!("1e400"), json!([])]
        {
            assert_eq!(parse(bad.clone()), None, "{bad}");
        }
    }

    #[test]
    fn tolerance_must_be_a_number() {
        let merge = |tolerance| Merge {
            dtype: OutputDtype::Base,
            tolerance: Some(tolerance),
            max_shard_size: None,
            unmerge: false,
        };
        assert_eq!(merge(f64::NAN).validate().len(), 1);
        assert_eq!(merge(-1.0).validate().len(), 1);
        assert!(merge(0.0).validate().is_empty());
    }
}
