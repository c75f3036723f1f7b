//! Settings of a training run, in the words and with the defaults of Hugging Face's
//! `TrainingArguments` where it has them.

use lora_flow_core::Problem;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// An adapter; the base stays as it is.
    #[default]
    Lora,
    /// Every weight of the model.
    Full,
}

/// What a spike of loss or gradient norm leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnSpike {
    /// A warning.
    #[default]
    Warn,
    /// The end of the run, with a checkpoint.
    Stop,
}

/// Where metrics go beside `log.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ReportTo {
    /// Event files for TensorBoard, in the metrics' folder `tensorboard`.
    Tensorboard,
}

/// `learning_rate: auto` in [`TrainConfig`]: no number, so that nobody trains with it unawares.
pub const AUTO: f64 = f64::NAN;

/// A learning rate or `auto`.
mod rate {
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(rate: &f64, s: S) -> Result<S::Ok, S::Error> {
        if rate.is_nan() { s.serialize_str("auto") } else { s.serialize_f64(*rate) }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
        match serde_json::Value::deserialize(d)? {
            serde_json::Value::String(text) if text == "auto" => Ok(super::AUTO),
            value => value.as_f64().ok_or_else(|| {
                de::Error::custom(format!("expected a number or `auto`, found {value}"))
            }),
        }
    }
}

fn rate_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "anyOf": [{ "type": "number" }, { "enum": ["auto"] }] })
}

/// Shape of the learning rate over the steps, after the warmup. Formulas of `transformers`
/// (`optimization.py`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedulerType {
    /// The same rate throughout, without warmup.
    Constant,
    /// Linear warmup, then the same rate.
    ConstantWithWarmup,
    /// Linear warmup, then linearly down to 0.
    #[default]
    Linear,
    /// Linear warmup, then down to 0 along half a cosine.
    Cosine,
    /// Linear warmup, then `num_cycles` cosines with hard restarts.
    CosineWithRestarts,
    /// Linear warmup, then down along a cosine to `min_lr` or `min_lr_rate`.
    CosineWithMinLr,
    /// Linear warmup, then down to `lr_end` with a power.
    Polynomial,
    /// Linear warmup, then down as one over the root of the step.
    InverseSqrt,
    /// Linear warmup, a constant stretch, and a decay over the last `num_decay_steps`.
    WarmupStableDecay,
}

/// Shape of the decay of `warmup_stable_decay`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum WsdDecay {
    /// A straight line.
    #[serde(rename = "linear")]
    Linear,
    /// Half a cosine.
    #[serde(rename = "cosine")]
    Cosine,
    /// 1 − √progress.
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
}

/// Further settings of a schedule; each is read by the schedules its text names.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LrSchedulerKwargs {
    /// Waves of the cosine: `cosine` and `cosine_with_min_lr` (0.5 if left out), hard restarts of
    /// `cosine_with_restarts` (1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_cycles: Option<f64>,
    /// Power of `polynomial` (1 if left out).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power: Option<f64>,
    /// Rate at the end of `polynomial` (1e-7 if left out).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr_end: Option<f64>,
    /// Lowest rate of `cosine_with_min_lr`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_lr: Option<f64>,
    /// Lowest rate of `cosine_with_min_lr` and `warmup_stable_decay` as a share of
    /// `learning_rate` (0 if left out).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_lr_rate: Option<f64>,
    /// Steps of the decay of `warmup_stable_decay` (a tenth of all steps if left out).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_decay_steps: Option<u64>,
    /// Shape of the decay of `warmup_stable_decay` (`linear` if left out).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay_type: Option<WsdDecay>,
}

/// Settings of a training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// `lora` trains the adapter of the input `adapter`; `full` trains every weight, takes no
    /// adapter and makes a model.
    #[serde(default)]
    pub method: Method,
    /// Highest learning rate. LoRA takes about ten times that of full fine-tuning. `auto` finds
    /// one by a short range test before the run and reports its curve (`lr_range.json`).
    #[serde(default = "default::learning_rate", with = "rate")]
    #[schemars(schema_with = "rate_schema")]
    pub learning_rate: f64,
    /// Shape of the learning rate over the steps.
    #[serde(default)]
    pub lr_scheduler_type: LrSchedulerType,
    /// Further settings of the schedule.
    #[serde(default)]
    pub lr_scheduler_kwargs: LrSchedulerKwargs,
    /// Steps of the linear warmup; goes before `warmup_ratio`.
    #[serde(default)]
    pub warmup_steps: u64,
    /// Share of all steps spent on the warmup, rounded up.
    #[serde(default)]
    pub warmup_ratio: f64,
    /// Passes over the data, whole or fractional.
    #[serde(default = "default::num_train_epochs")]
    pub num_train_epochs: f64,
    /// Number of optimiser steps; goes before `num_train_epochs`.
    #[serde(default)]
    pub max_steps: Option<u64>,
    /// Rows of the tokens artifact in one pass through the model.
    #[serde(default = "default::batch_size")]
    pub per_device_train_batch_size: usize,
    /// Passes whose gradients are added up for one step. The loss is the mean over the supervised
    /// tokens of all of them.
    #[serde(default = "default::one")]
    pub gradient_accumulation_steps: usize,
    /// Gradients are scaled down to this norm (all modules together); 0 never does.
    #[serde(default = "default::max_grad_norm")]
    pub max_grad_norm: f64,
    /// Decoupled weight decay of AdamW, on A and B alike.
    #[serde(default)]
    pub weight_decay: f64,
    /// β₁ of AdamW.
    #[serde(default = "default::adam_beta1")]
    pub adam_beta1: f64,
    /// β₂ of AdamW.
    #[serde(default = "default::adam_beta2")]
    pub adam_beta2: f64,
    /// ε of AdamW.
    #[serde(default = "default::adam_epsilon")]
    pub adam_epsilon: f64,
    /// LoRA+: the learning rate of B is this many times that of A (Hayou et al. 2024).
    #[serde(default)]
    pub loraplus_lr_ratio: Option<f64>,
    /// Seed of the data order and of the dropout.
    #[serde(default = "default::seed")]
    pub seed: u64,
    /// Steps between two lines of the log.
    #[serde(default = "default::logging_steps")]
    pub logging_steps: u64,
    /// Steps between two evaluations on the input `eval`; it is evaluated at the end in any case.
    #[serde(default)]
    pub eval_steps: Option<u64>,
    /// Rows in one pass of an evaluation.
    #[serde(default = "default::batch_size")]
    pub per_device_eval_batch_size: usize,
    /// Steps between two checkpoints, from which an interrupted run resumes.
    #[serde(default = "default::save_steps")]
    pub save_steps: u64,
    /// Return the adapter with the lowest evaluation loss instead of the last one.
    #[serde(default)]
    pub load_best_model_at_end: bool,
    /// Stop after this many evaluations in a row that did not lower the loss.
    #[serde(default)]
    pub early_stopping_patience: Option<u64>,
    /// By how much an evaluation must lower the loss to count for `early_stopping_patience`.
    #[serde(default)]
    pub early_stopping_threshold: f64,
    /// A loss or gradient norm above this many times the median of the last 32 steps is a spike.
    /// Left out, nothing is. (A loss that is no number ends the run in any case.)
    #[serde(default)]
    pub spike_factor: Option<f64>,
    /// What a spike leads to: `warn` or `stop`.
    #[serde(default)]
    pub on_spike: OnSpike,
    /// Further ways to report metrics: `[tensorboard]`.
    #[serde(default)]
    pub report_to: Vec<ReportTo>,
    /// Keep only the residual stream between the layers and run each layer's forward again in the
    /// backward: about a third more work for a fraction of the memory. Same result. Without it, as
    /// much is kept as the weights take in f32 (at least what 732 MiB leave beside the layer at
    /// work), and what exceeds that is made again.
    #[serde(default)]
    pub gradient_checkpointing: bool,
}

mod default {
    pub(super) fn learning_rate() -> f64 {
        2e-4
    }
    pub(super) fn num_train_epochs() -> f64 {
        3.0
    }
    pub(super) fn batch_size() -> usize {
        8
    }
    pub(super) fn one() -> usize {
        1
    }
    pub(super) fn max_grad_norm() -> f64 {
        1.0
    }
    pub(super) fn adam_beta1() -> f64 {
        0.9
    }
    pub(super) fn adam_beta2() -> f64 {
        0.999
    }
    pub(super) fn adam_epsilon() -> f64 {
        1e-8
    }
    pub(super) fn seed() -> u64 {
        42
    }
    pub(super) fn logging_steps() -> u64 {
        1
    }
    pub(super) fn save_steps() -> u64 {
        50
    }
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            method: Method::default(),
            learning_rate: default::learning_rate(),
            lr_scheduler_type: LrSchedulerType::default(),
            lr_scheduler_kwargs: LrSchedulerKwargs::default(),
            warmup_steps: 0,
            warmup_ratio: 0.0,
            num_train_epochs: default::num_train_epochs(),
            max_steps: None,
            per_device_train_batch_size: default::batch_size(),
            gradient_accumulation_steps: 1,
            max_grad_norm: default::max_grad_norm(),
            weight_decay: 0.0,
            adam_beta1: default::adam_beta1(),
            adam_beta2: default::adam_beta2(),
            adam_epsilon: default::adam_epsilon(),
            loraplus_lr_ratio: None,
            seed: default::seed(),
            logging_steps: default::logging_steps(),
            eval_steps: None,
            per_device_eval_batch_size: default::batch_size(),
            save_steps: default::save_steps(),
            load_best_model_at_end: false,
            early_stopping_patience: None,
            early_stopping_threshold: 0.0,
            spike_factor: None,
            on_spike: OnSpike::default(),
            report_to: Vec::new(),
            gradient_checkpointing: false,
        }
    }
}

impl TrainConfig {
    /// Values that make no sense, with the pointer of the field.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut check = |good: bool, field: &str, found: String, must: &str| {
            if !good {
                let message = format!("`{field}` is {found}, it must {must}");
                problems.push(Problem::at(format!("/{field}"), message));
            }
        };
        let positive = |x: f64| x > 0.0 && x.is_finite();
        let rate = if self.learning_rate.is_nan() { 1.0 } else { self.learning_rate };
        for (field, value) in [
            ("learning_rate", rate),
            ("num_train_epochs", self.num_train_epochs),
            ("adam_epsilon", self.adam_epsilon),
            ("loraplus_lr_ratio", self.loraplus_lr_ratio.unwrap_or(1.0)),
        ] {
            check(positive(value), field, value.to_string(), "be above 0");
        }
        for (field, value) in [
            ("max_grad_norm", self.max_grad_norm),
            ("weight_decay", self.weight_decay),
            ("early_stopping_threshold", self.early_stopping_threshold),
        ] {
            let good = value >= 0.0 && value.is_finite();
            check(good, field, value.to_string(), "not be negative");
        }
        for (field, value) in [
            ("adam_beta1", self.adam_beta1),
            ("adam_beta2", self.adam_beta2),
            ("warmup_ratio", self.warmup_ratio),
        ] {
            let good = (0.0..1.0).contains(&value);
            check(good, field, value.to_string(), "be at least 0 and below 1");
        }
        for (field, value) in [
            ("per_device_train_batch_size", self.per_device_train_batch_size as u64),
            ("per_device_eval_batch_size", self.per_device_eval_batch_size as u64),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps as u64),
            ("logging_steps", self.logging_steps),
            ("save_steps", self.save_steps),
            ("max_steps", self.max_steps.unwrap_or(1)),
            ("eval_steps", self.eval_steps.unwrap_or(1)),
            ("early_stopping_patience", self.early_stopping_patience.unwrap_or(1)),
        ] {
            check(value > 0, field, value.to_string(), "be at least 1");
        }
        let factor = self.spike_factor.unwrap_or(2.0);
        check(factor > 1.0, "spike_factor", factor.to_string(), "be above 1");
        if let Some(steps) = self.max_steps.filter(|s| *s > 0 && self.warmup_steps > *s) {
            let message = format!(
                "`warmup_steps` is {}, more than the {steps} of `max_steps`",
                self.warmup_steps
            );
            problems.push(Problem::at("/warmup_steps", message));
        }
        if self.load_best_model_at_end && self.eval_steps.is_none() {
            problems.push(
                Problem::at(
                    "/load_best_model_at_end",
                    "`load_best_model_at_end` needs evaluations to choose from",
                )
                .with_hint("set `eval_steps` and connect the input `eval`"),
            );
        }
        if self.early_stopping_patience.is_some() && self.eval_steps.is_none() {
            problems.push(
                Problem::at(
                    "/early_stopping_patience",
                    "`early_stopping_patience` counts evaluations, and there are none",
                )
                .with_hint("set `eval_steps` and connect the input `eval`"),
            );
        }
        if self.method == Method::Full && self.loraplus_lr_ratio.is_some() {
            let message = "`loraplus_lr_ratio` is for adapters; `method: full` has none";
            problems.push(Problem::at("/loraplus_lr_ratio", message));
        }
        problems.extend(self.kwargs_problems());
        problems
    }

    fn kwargs_problems(&self) -> Vec<Problem> {
        use LrSchedulerType as T;
        let (kind, k) = (self.lr_scheduler_type, &self.lr_scheduler_kwargs);
        let uses: [(&str, bool, &[T]); 7] = [
            (
                "num_cycles",
                k.num_cycles.is_some(),
                &[T::Cosine, T::CosineWithRestarts, T::CosineWithMinLr],
            ),
            ("power", k.power.is_some(), &[T::Polynomial]),
            ("lr_end", k.lr_end.is_some(), &[T::Polynomial]),
            ("min_lr", k.min_lr.is_some(), &[T::CosineWithMinLr]),
            ("min_lr_rate", k.min_lr_rate.is_some(), &[T::CosineWithMinLr, T::WarmupStableDecay]),
            ("num_decay_steps", k.num_decay_steps.is_some(), &[T::WarmupStableDecay]),
            ("decay_type", k.decay_type.is_some(), &[T::WarmupStableDecay]),
        ];
        let name = |t: T| serde_json::to_value(t).ok().and_then(|v| Some(v.as_str()?.to_owned()));
        let mut problems: Vec<_> = uses
            .iter()
            .filter(|(_, given, kinds)| *given && !kinds.contains(&kind))
            .map(|(field, ..)| {
                Problem::at(
                    format!("/lr_scheduler_kwargs/{field}"),
                    format!(
                        "the schedule `{}` has no setting `{field}`",
                        name(kind).unwrap_or_default()
                    ),
                )
            })
            .collect();
        if k.min_lr.is_some() && k.min_lr_rate.is_some() {
            problems.push(Problem::at(
                "/lr_scheduler_kwargs/min_lr",
                "`min_lr` and `min_lr_rate` say the same thing twice",
            ));
        }
        if let Some(end) =
            k.lr_end.filter(|end| end.is_nan() || *end < 0.0 || *end >= self.learning_rate)
        {
            problems.push(Problem::at(
                "/lr_scheduler_kwargs/lr_end",
                format!("`lr_end` is {end}, it must be at least 0 and below `learning_rate`"),
            ));
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_those_of_an_empty_mapping() {
        let empty: TrainConfig = serde_json::from_str("{}").unwrap();
        assert_eq!(empty, TrainConfig::default());
        assert!(empty.problems().is_empty());
    }

    #[test]
    fn every_problem_is_reported_at_its_field() {
        let config = TrainConfig {
            learning_rate: -1.0,
            adam_beta2: 1.0,
            gradient_accumulation_steps: 0,
            load_best_model_at_end: true,
            lr_scheduler_kwargs: LrSchedulerKwargs { power: Some(2.0), ..Default::default() },
            ..TrainConfig::default()
        };
        let pointers: Vec<_> = config.problems().into_iter().map(|p| p.pointer).collect();
        assert_eq!(
            pointers,
            [
                "/learning_rate",
                "/adam_beta2",
                "/gradient_accumulation_steps",
                "/load_best_model_at_end",
                "/lr_scheduler_kwargs/power"
            ]
        );
    }
}
