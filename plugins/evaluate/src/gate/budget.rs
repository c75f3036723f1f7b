//! `budget`: what a release may cost: sizes of adapters and models, memory, speed.

use std::borrow::Cow;

use lora_flow_core::{ArtifactKind, Error, NamedArtifact, Problem, Result, parse_size};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::json;

use crate::gate::named::Named;
use crate::gate::side::Side;
use crate::short;

/// A limit on the size of an artifact or on a metric.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Input that is measured: an adapter or a model by the size of its weights, metrics by
    /// `metric`.
    pub of: String,
    /// The metric (`peak_rss_bytes`, `tokens_per_second`), where the input is metrics.
    #[serde(default)]
    pub metric: Option<String>,
    /// At most this: a number, or one with `KB`, `MB`, `GB`, `KiB`, `MiB` or `GiB`.
    #[serde(default)]
    pub max: Option<Quantity>,
    /// At least this.
    #[serde(default)]
    pub min: Option<Quantity>,
}

/// A number, or a size with a unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quantity(pub f64);

impl Serialize for Quantity {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_f64(self.0)
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(d)?;
        let number = value.as_f64().or_else(|| parse_size(value.as_str()?));
        number.map(Self).ok_or_else(|| {
            de::Error::custom(format!("{value} is neither a number nor a size such as `10MB`"))
        })
    }
}

impl JsonSchema for Quantity {
    fn schema_name() -> Cow<'static, str> {
        "Quantity".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [
            { "type": "number", "minimum": 0 },
            { "type": "string", "pattern": r"^[0-9.]+ *(B|KB|MB|GB|KiB|MiB|GiB)?$" },
        ] })
    }
}

impl Budget {
    pub(crate) fn check(&self, pointer: &str) -> Vec<Problem> {
        if self.max.is_some() || self.min.is_some() {
            return Vec::new();
        }
        let message = "a budget needs `max` or `min`";
        vec![Problem::at(pointer, message).with_hint("for a size: `{ of: adapter, max: 10MB }`")]
    }

    /// The rule as a person says it.
    pub(crate) fn rule(&self) -> String {
        let mut out = self.of.clone();
        if let Some(metric) = &self.metric {
            out.push_str(&format!(".{metric}"));
        }
        let limits = [("at most", self.max), ("at least", self.min)];
        for (word, limit) in limits.into_iter().filter_map(|(w, l)| Some((w, l?.0))) {
            out.push_str(&format!(" {word} {}", self.shown(limit)));
        }
        out
    }

    fn shown(&self, x: f64) -> String {
        let bytes = self.metric.as_ref().is_none_or(|m| m.ends_with("_bytes"));
        match x {
            x if !bytes => short(x),
            x if x >= 1e9 => format!("{:.2} GB", x / 1e9),
            x if x >= 1e6 => format!("{:.2} MB", x / 1e6),
            x => format!("{:.1} KB", x / 1e3),
        }
    }

    /// Measures an input.
    ///
    /// # Errors
    /// When it has nothing to be measured by.
    pub(crate) fn judge(&self, input: &NamedArtifact) -> Result<Named> {
        let artifact = &input.artifact;
        let value = match (&self.metric, artifact.kind) {
            (Some(metric), ArtifactKind::Metrics) => {
                let side = Side::open(&self.of, artifact)?;
                side.values.get(metric).copied().ok_or_else(|| {
                    let known: Vec<&str> = side.values.keys().map(String::as_str).collect();
                    Error::new(format!("`{}` has no metric `{metric}`", self.of))
                        .with_hint(format!("it has {}", known.join(", ")))
                })?
            }
            (None, ArtifactKind::Metrics) => {
                return Err(Error::new(format!("which metric of `{}`?", self.of))
                    .with_hint("name it: `{ of: train, metric: peak_rss_bytes, max: 4GB }`"));
            }
            (Some(metric), kind) => {
                let message = format!("`{}` is {kind}, it has no metric `{metric}`", self.of);
                return Err(Error::new(message).with_hint("leave out `metric` to measure its size"));
            }
            (None, _) => {
                let weights = artifact
                    .files
                    .iter()
                    .filter(|(name, _)| name.ends_with(".safetensors") || name.ends_with(".gguf"));
                Some(weights.map(|(_, file)| file.size as f64).sum())
            }
        };
        let limits = json!({ "max": self.max, "min": self.min });
        let details =
            json!({ "input": self.of, "metric": self.metric, "value": value, "limits": limits });
        // Nothing measured is not small: an artifact without weights is no success.
        let Some(value) = value.filter(|v| *v > 0.0) else {
            return Ok(Named::settled(false, "there is no number to judge".into(), details));
        };
        let within = self.max.is_none_or(|m| value <= m.0) && self.min.is_none_or(|m| value >= m.0);
        Ok(Named::settled(within, self.shown(value), details))
    }
}
