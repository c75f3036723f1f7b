//! `lora-inject`: a fresh LoRA adapter for a model, as a PEFT folder.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use lora_flow_core::{ArtifactKind, Ports, Problem, Result, Task, TaskContext};
use lora_flow_data::group_digits;
use lora_flow_model::config::ModelConfig;
use lora_flow_model::lora::{Init, Lora, LoraConfig, TargetModules};
use lora_flow_model::lora_match::check_regex;
use lora_flow_model::residual;
use lora_flow_model::weights::WeightSource;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::{Value, json};

/// Parameters of `lora-inject`, in PEFT's words.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoraInject {
    /// Rank: the width of the bottleneck between A and B.
    #[serde(default = "default_r")]
    pub r: usize,
    /// α of the scale s = α/r that B·A is multiplied by.
    #[serde(default = "default_alpha")]
    pub lora_alpha: f64,
    /// Probability that an element of an adapter's input is dropped while training.
    #[serde(default)]
    pub lora_dropout: f64,
    /// Which linear layers: a list of names (`q_proj`, `mlp.down_proj`), a regular expression for
    /// the whole path (`model\.layers\.\d+\.mlp\..*`), or `all-linear`.
    #[serde(default = "all_linear")]
    pub target_modules: Names,
    /// Which of those not: a list of names or a regular expression.
    #[serde(default)]
    pub exclude_modules: Option<Names>,
    /// Only these decoder layers, counted from 0. Not with a regular expression.
    #[serde(default)]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Other ranks for some layers: name or regular expression → rank.
    #[serde(default)]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other α for some layers: name or regular expression → α.
    #[serde(default)]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Scale by α/√r instead of α/r (rank-stabilised LoRA).
    #[serde(default)]
    pub use_rslora: bool,
    /// How A and B start: `true` (A Kaiming uniform, U(±1/√in), B zero), `gaussian` (A with
    /// standard deviation 1/r, B zero), `pissa` (the largest singular values of W) or `olora` (its
    /// QR decomposition). The last two train what they take out of W; the adapter is written as
    /// plain LoRA of twice the rank, which says the same of W itself.
    #[serde(default)]
    pub init_lora_weights: InitWeights,
    /// Train the magnitude of each row of W + sBA beside A and B (DoRA). A third more time.
    #[serde(default)]
    pub use_dora: bool,
    /// Modules to train and store whole beside the adapter, such as `[lm_head]`.
    #[serde(default)]
    pub modules_to_save: Vec<String>,
    /// Seed of the initial weights.
    #[serde(default)]
    pub seed: u64,
}

fn default_r() -> usize {
    8
}

fn default_alpha() -> f64 {
    8.0
}

fn all_linear() -> Names {
    Names::Text("all-linear".into())
}

/// A list of names, or one string (a regular expression or `all-linear`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Names {
    /// One string.
    Text(String),
    /// A list.
    List(Vec<String>),
}

impl Names {
    fn target(&self) -> TargetModules {
        match self {
            Self::Text(text) => TargetModules::from_text(text),
            Self::List(list) => TargetModules::List(list.clone()),
        }
    }
}

impl Serialize for Names {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Text(text) => s.serialize_str(text),
            Self::List(list) => list.serialize(s),
        }
    }
}

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Names;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E: de::Error>(self, v: &str) -> Result<Names, E> {
                Ok(Names::Text(v.to_owned()))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Names, A::Error> {
                let mut out = Vec::new();
                while let Some(name) = seq.next_element()? {
                    out.push(name);
                }
                Ok(Names::List(out))
            }
        }
        d.deserialize_any(Visitor)
    }
}

impl JsonSchema for Names {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Names".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                { "type": "string" },
                { "type": "array", "items": { "type": "string" } },
            ],
        })
    }
}

/// `true` or a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InitWeights(Init);

impl Serialize for InitWeights {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Init::Default => s.serialize_bool(true),
            Init::Gaussian => s.serialize_str("gaussian"),
            Init::Pissa => s.serialize_str("pissa"),
            Init::Olora => s.serialize_str("olora"),
        }
    }
}

impl<'de> Deserialize<'de> for InitWeights {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        match Value::deserialize(d)? {
            Value::Bool(true) => Ok(Self(Init::Default)),
            Value::String(s) if s == "gaussian" => Ok(Self(Init::Gaussian)),
            Value::String(s) if s == "pissa" => Ok(Self(Init::Pissa)),
            Value::String(s) if s == "olora" => Ok(Self(Init::Olora)),
            other => Err(de::Error::custom(format!(
                "expected `true`, `gaussian`, `pissa` or `olora`, found {other}"
            ))),
        }
    }
}

impl JsonSchema for InitWeights {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "InitWeights".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "enum": [true, "gaussian", "pissa", "olora"] })
    }
}

impl LoraInject {
    fn config(&self) -> LoraConfig {
        LoraConfig {
            r: self.r,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            target_modules: self.target_modules.target(),
            exclude_modules: self.exclude_modules.as_ref().map(Names::target),
            layers_to_transform: self.layers_to_transform.clone(),
            rank_pattern: self.rank_pattern.clone(),
            alpha_pattern: self.alpha_pattern.clone(),
            use_rslora: self.use_rslora,
            init_lora_weights: self.init_lora_weights.0,
            use_dora: self.use_dora,
            modules_to_save: self.modules_to_save.clone(),
        }
    }
}

impl Task for LoraInject {
    fn inputs(&self) -> Ports {
        Ports::none().required("model", ArtifactKind::Model, "the base model")
    }

    fn outputs(&self) -> Ports {
        Ports::none().required("adapter", ArtifactKind::Adapter, "the untrained adapter")
    }

    fn validate(&self) -> Vec<Problem> {
        let mut out = Vec::new();
        if self.r == 0 {
            out.push(Problem::at("/r", "`r` is 0").with_hint("the rank must be at least 1"));
        }
        for (name, r) in &self.rank_pattern {
            if *r == 0 {
                out.push(Problem::at(pointer("rank_pattern", name), "the rank is 0"));
            }
        }
        let alphas = self.alpha_pattern.iter();
        let alphas = alphas.map(|(name, alpha)| (pointer("alpha_pattern", name), *alpha));
        for (place, alpha) in alphas.chain([("/lora_alpha".to_owned(), self.lora_alpha)]) {
            if !(alpha.is_finite() && alpha > 0.0) {
                out.push(Problem::at(place, format!("α is {alpha}, not a positive number")));
            }
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            let message = format!("`lora_dropout` is {}, not in 0 ≤ p < 1", self.lora_dropout);
            out.push(Problem::at("/lora_dropout", message));
        }
        let named = [
            ("target_modules", Some(&self.target_modules)),
            ("exclude_modules", self.exclude_modules.as_ref()),
        ];
        for (field, names) in named {
            match names.map(Names::target) {
                Some(TargetModules::List(list)) if list.is_empty() => {
                    out.push(Problem::at(format!("/{field}"), format!("`{field}` is empty")));
                }
                Some(TargetModules::Regex(regex)) => {
                    check(&mut out, &regex, field, format!("/{field}"));
                    if field == "target_modules" && self.layers_to_transform.is_some() {
                        let message = "`layers_to_transform` cannot be combined with a regular \
                                       expression";
                        out.push(
                            Problem::at("/layers_to_transform", message)
                                .with_hint("name the layers in the regular expression itself"),
                        );
                    }
                }
                _ => {}
            }
        }
        if self.layers_to_transform.as_ref().is_some_and(Vec::is_empty) {
            out.push(Problem::at("/layers_to_transform", "`layers_to_transform` is empty"));
        }
        for key in self.rank_pattern.keys() {
            check(&mut out, key, "rank_pattern", pointer("rank_pattern", key));
        }
        for key in self.alpha_pattern.keys() {
            check(&mut out, key, "alpha_pattern", pointer("alpha_pattern", key));
        }
        if self.use_dora && self.init_lora_weights.0.from_weights() {
            let message = "`use_dora` cannot be combined with `pissa` or `olora`";
            let hint = "the trained adapter could not be written as plain LoRA";
            out.push(Problem::at("/use_dora", message).with_hint(hint));
        }
        out
    }

    fn run(&self, cx: &mut TaskContext) -> Result<()> {
        let artifact = cx.input("model")?.clone();
        let model = ModelConfig::open(&artifact)?;
        let mut lora = Lora::init(&self.config(), &model.linear_modules(), self.seed)?;
        let source = WeightSource::open(&artifact)?;
        let start = lora.init_from(&model, |name, shape| source.read_f32(name, shape))?;

        let trainable = lora.trainable_parameters();
        let out = cx.output("adapter")?;
        match &start {
            None => lora.save_peft(&out.path, None)?,
            Some(start) => {
                residual::join(&lora, start)?.save_peft(&out.path, None)?;
                residual::save_start(&out.path, start.init)?;
            }
        }
        out.set_meta(json!({ "trainable_parameters": trainable }));

        let all = model.parameters() + trainable;
        let percent = 100.0 * trainable as f64 / all as f64;
        cx.report(table(&lora));
        cx.report(format!(
            "trainable parameters {} of {} ({percent:.4} %)",
            group_digits(trainable as u64),
            group_digits(all as u64)
        ));
        cx.summary("trainable", format!("{} ({percent:.2} %)", group_digits(trainable as u64)));
        cx.summary("layers", lora.modules.len().to_string());
        Ok(())
    }
}

/// JSON pointer of a key below a field.
fn pointer(field: &str, key: &str) -> String {
    format!("/{field}/{}", key.replace('~', "~0").replace('/', "~1"))
}

fn check(out: &mut Vec<Problem>, regex: &str, field: &str, place: String) {
    if let Err(e) = check_regex(regex, field) {
        let problem = Problem::at(place, e.to_string());
        out.push(match e.hint() {
            Some(hint) => problem.with_hint(hint),
            None => problem,
        });
    }
}

/// One line per kind of layer: layers of one name, shape, rank and scale are counted together.
fn table(lora: &Lora) -> String {
    let mut groups: Vec<(String, usize)> = Vec::new();
    for m in &lora.modules {
        let name: Vec<_> = m
            .path
            .split('.')
            .map(|part| if part.bytes().all(|b| b.is_ascii_digit()) { "*" } else { part })
            .collect();
        let line = format!(
            "{:<36} {:>6} × {:<6} {:>5} {:>8} {:>12}",
            name.join("."),
            m.out_features,
            m.in_features,
            m.r,
            format!("{:.4}", m.scale),
            group_digits((m.r * (m.in_features + m.out_features)) as u64),
        );
        match groups.iter_mut().find(|(l, _)| *l == line) {
            Some((_, count)) => *count += 1,
            None => groups.push((line, 1)),
        }
    }
    let mut out = format!(
        "{:<36} {:>6} × {:<6} {:>5} {:>8} {:>12} {:>7}\n",
        "module", "out", "in", "r", "scale", "parameters", "layers"
    );
    for (line, count) in groups {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{line} {count:>7}");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: Value) -> LoraInject {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn string_and_list_round_trip() {
        for value in [json!("all-linear"), json!(["q_proj", "v_proj"])] {
            let task = parse(json!({ "target_modules": value }));
            assert_eq!(serde_json::to_value(&task).unwrap()["target_modules"], value);
        }
        for value in [json!(true), json!("gaussian"), json!("pissa"), json!("olora")] {
            let task = parse(json!({ "init_lora_weights": value }));
            assert_eq!(serde_json::to_value(&task).unwrap()["init_lora_weights"], value);
        }
        let error = serde_json::from_value::<LoraInject>(json!({ "target_modules": 3 }));
        assert!(error.unwrap_err().to_string().contains("a string or a list of strings"));
        let error = serde_json::from_value::<LoraInject>(json!({ "init_lora_weights": "eva" }));
        assert!(error.unwrap_err().to_string().contains("`gaussian`"));
    }

    #[test]
    fn problems_are_found_without_a_model_and_placed() {
        let task = parse(json!({
            "r": 0, "lora_alpha": -1, "lora_dropout": 1.5, "target_modules": "(",
            "exclude_modules": [], "layers_to_transform": [], "rank_pattern": { "a/b": 0 },
        }));
        let places: Vec<_> = task.validate().into_iter().map(|p| p.pointer).collect();
        assert_eq!(
            places,
            [
                "/r",
                "/rank_pattern/a~1b",
                "/lora_alpha",
                "/lora_dropout",
                "/target_modules",
                "/layers_to_transform",
                "/exclude_modules",
                "/layers_to_transform",
            ]
        );
        assert!(parse(json!({})).validate().is_empty());
    }
}
