//! `combine`: several adapters of one base as one ([`lora_flow_model::combine`]).

use std::collections::BTreeMap;

use lora_flow_core::{ArtifactKind, Error, Ports, Problem, Result, ResultExt, Task, TaskContext};
use lora_flow_model::combine::{Combination, combine};
use lora_flow_model::config::ModelConfig;
use lora_flow_model::lora::Lora;
use lora_flow_train::with_threads;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Parameters of `combine`. Every input but `model` is an adapter; its name is free.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Combine {
    /// How: `cat` (exact, ranks add up), `linear` (the same at the least rank that holds it),
    /// `svd` (the same, truncated to `r`), `ties` or `dare` (interfering entries resolved or
    /// dropped first, then truncated to `r`).
    #[serde(default)]
    pub combination_type: CombinationType,
    /// Weight of each adapter, by the name of its input; 1 where left out.
    #[serde(default)]
    pub weights: BTreeMap<String, f64>,
    /// Rank of the result, for `svd`, `ties` and `dare`; the sum of all ranks if left out.
    #[serde(default)]
    pub r: Option<usize>,
    /// Share of each adapter's entries that `ties` and `dare` keep.
    #[serde(default)]
    pub density: Option<f64>,
    /// Seed of what `dare` drops.
    #[serde(default)]
    pub seed: u64,
}

/// How adapters become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CombinationType {
    /// Σ wᵢΔWᵢ, exact.
    #[default]
    Cat,
    /// Σ wᵢΔWᵢ at the least rank.
    Linear,
    /// Σ wᵢΔWᵢ, truncated.
    Svd,
    /// TIES.
    Ties,
    /// DARE.
    Dare,
}

/// Density of `ties` and `dare` where none is given.
const DENSITY: f64 = 0.5;

impl Task for Combine {
    fn inputs(&self) -> Ports {
        Ports::none()
            .required("model", ArtifactKind::Model, "the base of all the adapters")
            .any_name(&[ArtifactKind::Adapter])
    }

    fn outputs(&self) -> Ports {
        Ports::none().required("adapter", ArtifactKind::Adapter, "the adapters as one")
    }

    fn validate(&self) -> Vec<Problem> {
        use CombinationType as T;
        let mut out = Vec::new();
        if self.r == Some(0) {
            out.push(Problem::at("/r", "`r` is 0").with_hint("the rank must be at least 1"));
        }
        if self.r.is_some() && matches!(self.combination_type, T::Cat | T::Linear) {
            let message = "`r` has no meaning here: `cat` and `linear` are exact";
            out.push(Problem::at("/r", message).with_hint("use `combination_type: svd`"));
        }
        if let Some(density) = self.density {
            if !(density > 0.0 && density <= 1.0) {
                let message = format!("`density` is {density}, not in 0 < density ≤ 1");
                out.push(Problem::at("/density", message));
            }
            if !matches!(self.combination_type, T::Ties | T::Dare) {
                let message = "`density` belongs to `ties` and `dare`";
                out.push(Problem::at("/density", message));
            }
        }
        for (name, weight) in &self.weights {
            if !weight.is_finite() {
                let place = format!("/weights/{}", name.replace('~', "~0").replace('/', "~1"));
                out.push(Problem::at(place, format!("the weight is {weight}")));
            }
        }
        out
    }

    fn run(&self, cx: &mut TaskContext) -> Result<()> {
        let config = ModelConfig::open(cx.input("model")?)?;
        let modules = config.linear_modules();
        let mut adapters = Vec::new();
        for (name, artifacts) in cx.inputs() {
            for artifact in artifacts.iter().filter(|_| name != "model") {
                let lora = Lora::load_peft(&artifact.artifact, &modules)
                    .with_context(|| format!("input `{name}`"))?;
                let weight = self.weights.get(name).copied().unwrap_or(1.0);
                adapters.push((name.clone(), weight, lora));
            }
        }
        if adapters.is_empty() {
            return Err(Error::new("there are no adapters to combine").with_hint(
                "connect them under names of your own: `inputs: { tone: …, facts: … }`",
            ));
        }
        if let Some(name) = self.weights.keys().find(|n| !adapters.iter().any(|(a, ..)| a == *n)) {
            return Err(Error::new(format!("`weights` names `{name}`, which is no input")));
        }
        let ranks = adapters.iter().map(|(_, _, lora)| lora.config.r).sum();
        let (r, density) = (self.r.unwrap_or(ranks), self.density.unwrap_or(DENSITY));
        let how = match self.combination_type {
            CombinationType::Cat => Combination::Cat,
            CombinationType::Linear => Combination::Linear,
            CombinationType::Svd => Combination::Svd { r },
            CombinationType::Ties => Combination::Ties { r, density },
            CombinationType::Dare => Combination::Dare { r, density, seed: self.seed },
        };
        let weighted: Vec<_> = adapters.iter().map(|(_, w, lora)| (*w, lora)).collect();
        let (lora, report) = with_threads(cx.threads(), || combine(&weighted, &modules, how))?;

        let trainable = lora.trainable_parameters();
        let out = cx.output("adapter")?;
        lora.save_peft(&out.path, None)?;
        out.set_meta(json!({ "trainable_parameters": trainable }));
        for (name, weight, lora) in &adapters {
            cx.report(format!("{weight} × {name}: {} layers", lora.modules.len()));
        }
        let ranks: Vec<_> = report.iter().map(|c| c.r).collect();
        let worst = report.iter().map(|c| c.relative_error).fold(0.0, f64::max);
        let (low, high) = (ranks.iter().min(), ranks.iter().max());
        cx.report(format!(
            "{} layers of rank {} to {}; at worst ‖ΔW − BA‖/‖ΔW‖ = {worst:.2e}",
            report.len(),
            low.copied().unwrap_or(0),
            high.copied().unwrap_or(0)
        ));
        cx.summary("layers", report.len().to_string());
        cx.summary("error", format!("{worst:.1e}"));
        Ok(())
    }
}
