//! `with`: checks a task's parameters against its kind and makes the task.

use std::collections::BTreeMap;
use std::sync::Arc;

use lora_flow_core::Task;
use serde_json::{Number, Value};

use crate::explain::{Finding, Subject};
use crate::expr::Expanded;
use crate::fits::surely_fits;
use crate::kinds::Kind;
use crate::plan::nearest_span;
use crate::source::{Problems, Span};
use crate::yaml::{NodeValue, Places};

/// What other trainers call our parameters: (their name, ours).
const ALIASES: &[(&str, &str)] = &[
    ("lora_r", "r"),
    ("lora_rank", "r"),
    ("rank", "r"),
    ("alpha", "lora_alpha"),
    ("dropout", "lora_dropout"),
    ("lora_target_modules", "target_modules"),
    ("lora_target", "target_modules"),
    ("lora_attn_modules", "target_modules"),
    ("lora_target_linear", "target_modules"),
    ("lora_modules_to_save", "modules_to_save"),
    ("peft_use_rslora", "use_rslora"),
    ("peft_use_dora", "use_dora"),
    ("peft_init_lora_weights", "init_lora_weights"),
    ("micro_batch_size", "per_device_train_batch_size"),
    ("train_batch_size", "per_device_train_batch_size"),
    ("batch_size", "per_device_train_batch_size"),
    ("eval_batch_size", "per_device_eval_batch_size"),
    ("grad_accum", "gradient_accumulation_steps"),
    ("grad_accumulation_steps", "gradient_accumulation_steps"),
    ("gradient_accumulation", "gradient_accumulation_steps"),
    ("sequence_len", "max_length"),
    ("sequence_length", "max_length"),
    ("cutoff_len", "max_length"),
    ("max_seq_length", "max_length"),
    ("max_seq_len", "max_length"),
    ("block_size", "max_length"),
    ("sample_packing", "packing"),
    ("neat_packing", "packing"),
    ("packed", "packing"),
    ("train_on_inputs", "completion_only_loss"),
    ("train_on_input", "completion_only_loss"),
    ("train_on_prompt", "completion_only_loss"),
    ("epochs", "num_train_epochs"),
    ("num_epochs", "num_train_epochs"),
    ("steps", "max_steps"),
    ("total_steps", "max_steps"),
    ("num_steps", "max_steps"),
    ("lr", "learning_rate"),
    ("lr_scheduler", "lr_scheduler_type"),
    ("scheduler", "lr_scheduler_type"),
    ("schedule", "lr_scheduler_type"),
    ("warmup", "warmup_ratio"),
    ("num_warmup_steps", "warmup_steps"),
    ("clip_grad", "max_grad_norm"),
    ("clip_grad_norm", "max_grad_norm"),
    ("gradient_clipping", "max_grad_norm"),
    ("enable_activation_checkpointing", "gradient_checkpointing"),
    ("activation_checkpointing", "gradient_checkpointing"),
    ("random_seed", "seed"),
    ("path", "files"),
    ("paths", "files"),
    ("data_files", "files"),
    ("data_path", "files"),
    ("path", "source"),
    ("model", "source"),
    ("base_model", "source"),
    ("model_id", "source"),
    ("model_path", "source"),
    ("model_name_or_path", "source"),
    ("pretrained_model_name_or_path", "source"),
    ("text_column", "text"),
    ("text_field", "text"),
    ("dataset_text_field", "text"),
    ("template", "chat_template"),
];

/// A task whose parameters are in order.
#[derive(Debug, Clone)]
pub(crate) struct Configured {
    pub task: Arc<dyn Task>,
    pub params: Value,
}

/// Checks parameters and makes the task. `owner` is the place of the task's name.
pub(crate) fn configure(
    kind: &Kind,
    with: &Expanded,
    with_places: &Places,
    owner: Span,
    problems: &mut Problems,
) -> Option<Configured> {
    let before = problems.len();
    let json = match &with.node.value {
        NodeValue::Map(_) => whole_floats_to_integers(with.node.to_json()),
        NodeValue::Null if with.broken.is_empty() => Value::Object(Default::default()),
        NodeValue::Null => return None,
        _ => {
            let message = format!("`with` must be a mapping, found {}", with.node.describe());
            problems.report(with.node.span, message, None);
            return None;
        }
    };
    let place = |finding: &Finding| {
        let keys = if finding.at_key { with_places.keys.get(&finding.pointer) } else { None };
        match keys {
            Some(span) => *span,
            None if finding.pointer.is_empty() => owner,
            None => nearest_span(&with_places.values, &finding.pointer).unwrap_or(owner),
        }
    };
    for finding in findings(kind, &json) {
        if finding.about_keys || !touches(&with.broken, &finding.pointer) {
            let span = place(&finding);
            // `"${{ params.r }}"` is in quotes already, and they are not what makes it a string.
            let expression = problems.source.snippet(span).contains("${{");
            let hint = finding.hint.filter(|h| !(expression && h.contains("quotes")));
            problems.report(span, finding.message, hint);
        }
    }
    if problems.len() > before || !with.broken.is_empty() {
        return None;
    }
    let (params, task) = match kind.make(json) {
        Ok(made) => made,
        Err(e) => {
            let message = format!("the parameters of `{}` do not fit: {}", kind.name, e.chain());
            problems.report(owner, message, e.hint().map(str::to_owned));
            return None;
        }
    };
    for problem in task.validate() {
        let span = if problem.pointer.is_empty() {
            owner
        } else {
            nearest_span(&with_places.values, &problem.pointer)
                .filter(|span| *span != with.node.span)
                .unwrap_or(owner)
        };
        problems.report(span, problem.message, problem.hint);
    }
    (problems.len() == before).then_some(Configured { task, params })
}

/// All problems of parameters under the schema of their kind.
fn findings(kind: &Kind, params: &Value) -> Vec<Finding> {
    let subject = Subject { kind: &kind.name, schema: kind.schema(), aliases: ALIASES };
    let mut findings = Vec::new();
    if surely_fits(params, subject.schema, subject.schema) {
        return findings;
    }
    if let Some(validator) = kind.validator() {
        validator.iter_errors(params).for_each(|e| subject.explain(&e, &mut findings));
    }
    // `file:` for `files:` is one mistake, not an unknown parameter and a missing one.
    let meant: Vec<(String, String)> = findings
        .iter()
        .filter_map(|f| Some((parent(&f.pointer).to_owned(), f.meant.clone()?)))
        .collect();
    findings.retain(|f| match &f.missing {
        Some(key) => !meant.iter().any(|(owner, meant)| *owner == f.pointer && meant == key),
        None => true,
    });
    findings
}

fn parent(pointer: &str) -> &str {
    &pointer[..pointer.rfind('/').unwrap_or(0)]
}

/// Whether a pointer lies at, above or below one of others.
fn touches(broken: &[String], pointer: &str) -> bool {
    let under = |a: &str, b: &str| a == b || a.strip_prefix(b).is_some_and(|r| r.starts_with('/'));
    broken.iter().any(|b| under(b, pointer) || under(pointer, b))
}

/// `1000.0` and `1e3` are integers for JSON Schema; make them so for the parameter structs too.
/// A struct that wants a float takes an integer as well.
fn whole_floats_to_integers(value: Value) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match value {
        Value::Number(n) if n.is_f64() => match n.as_f64() {
            Some(f) if f.fract() == 0.0 && f.abs() < EXACT => Value::Number(Number::from(f as i64)),
            _ => Value::Number(n),
        },
        Value::Array(items) => items.into_iter().map(whole_floats_to_integers).collect(),
        Value::Object(map) => {
            map.into_iter().map(|(k, v)| (k, whole_floats_to_integers(v))).collect()
        }
        other => other,
    }
}

/// Places of the parameters for [`crate::PlannedTask::param_spans`].
pub(crate) fn spans(places: &Places) -> BTreeMap<String, Span> {
    places.values.clone()
}
